"""A user's script with Hugging Face's Trainer, run by one process or by each of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiercache as tc
from tiercache.integrations.accelerate import prepare


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(17, 1)
        self.seen: list[list[int]] = []

    def forward(self, id: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: A002 -- a column
        if self.training:
            self.seen.append(id.tolist())
        return {"loss": self.layer(values).square().mean()}


class KeepLoader(TrainerCallback):
    """The loader's state beside each checkpoint, and back."""

    def on_save(self, args: Any, state: Any, control: Any, train_dataloader: Any, **others: Any) -> None:
        if state.is_world_process_zero:
            self._path(args, state).write_text(json.dumps(train_dataloader.state_dict()))

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **others: Any) -> None:
        if state.global_step:
            train_dataloader.load_state_dict(json.loads(self._path(args, state).read_text()))

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "loader.json"


class NativeTrainer(Trainer):
    """A Trainer whose batches come by the native path."""

    def get_train_dataloader(self) -> Any:
        loader = tc.DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, shuffle=True)
        return prepare(loader, self.accelerator)


def train(url: str, folder: str, native: bool = False, resume: str | None = None, **arguments: Any) -> dict[str, Any]:
    """Two epochs, with a checkpoint every 3 steps; the ids of each step. arguments: of the training."""
    model = Model()
    settings = TrainingArguments(
        output_dir=folder,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        ignore_data_skip=native,
        **arguments,
    )
    trainer = (NativeTrainer if native else Trainer)(
        model=model,
        args=settings,
        train_dataset=tc.Dataset(url),
        data_collator=tc.collate,
        callbacks=[KeepLoader()] if native else [],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(Path(folder) / resume))
    return {"seen": model.seen, "steps": trainer.state.global_step}
