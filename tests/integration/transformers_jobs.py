"""A user's script with Hugging Face's Trainer, run by one process or by each of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import tiercache as tc
from tiercache.integrations.accelerate import prepare
from tiercache.integrations.transformers import LoaderStateCallback


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(17, 1)
        self.seen: list[list[int]] = []

    def forward(self, id: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: A002 -- a column
        if self.training:
            self.seen.append(id.tolist())
        return {"loss": self.layer(values).square().mean()}


class NativeTrainer(Trainer):
    """A Trainer whose batches come by the native path."""

    def get_train_dataloader(self) -> Any:
        loader = tc.DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, shuffle=True)
        return prepare(loader, self.accelerator)


class BareTrainer(Trainer):
    """A Trainer that is given the loader as it is, and skips batches by indices."""

    def get_train_dataloader(self) -> Any:
        options = tc.LoaderOptions(seed=self.args.seed)
        return tc.DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, shuffle=True, options=options)


# "wrapped": the Trainer's own loader with the callback, which cannot have its state.
TRAINERS = {"plain": Trainer, "native": NativeTrainer, "bare": BareTrainer, "wrapped": Trainer}


def train(
    url: str, folder: str, trainer: str = "plain", resume: str | None = None, late: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Two epochs, with a checkpoint every 3 steps; the ids of each step.

    late: the callback is added to the trainer that was made; arguments: of the training.
    """
    model = Model()
    settings = TrainingArguments(
        output_dir=folder,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"save_steps": 3, **arguments},
    )
    callbacks = [LoaderStateCallback()] if trainer in ("native", "wrapped") else []
    made = TRAINERS[trainer](
        model=model,
        args=settings,
        train_dataset=tc.Dataset(url),
        data_collator=tc.collate,
        callbacks=[] if late else callbacks,
    )
    for callback in callbacks if late else []:
        made.add_callback(callback)
    made.train(resume_from_checkpoint=None if resume is None else str(Path(folder) / resume))
    return {"seen": model.seen, "steps": made.state.global_step}


def refusals(url: str, folder: str) -> dict[str, str]:
    """By name, the error of what cannot go on."""
    train(url, f"{folder}/bare", "bare", save_steps=5, max_steps=5)
    train(url, f"{folder}/native", "native", max_steps=3)
    return {
        "saved without the callback": error_of(url, f"{folder}/bare", "native", "checkpoint-5"),
        "added late": error_of(url, f"{folder}/native", "native", "checkpoint-3", late=True),
        "another loader": error_of(url, f"{folder}/native", "wrapped", None),
    }


def error_of(*arguments: Any, **others: Any) -> str:
    try:
        train(*arguments, **others)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"
