"""Users' scripts that save with `tc.Checkpoints` through a framework, or log checkpoints; run by child.py."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

import tiercache as tc


def digest(state: Any) -> str:
    """A hash of the tensors of a state dict."""
    found = hashlib.sha256()
    for key, value in sorted(state.items()):
        found.update(key.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# -- Lightning -------------------------------------------------------------------------------------------------------


def fit(url: str, folder: str, resume: str | None = None, save_top_k: int = -1) -> dict[str, Any]:
    """Two epochs, with a checkpoint every 3 steps that best:score finds; the ids of each step, and what is stored."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from tests.integration.lightning_jobs import Model

    from tiercache.integrations.lightning import TierCacheCheckpointIO

    warnings.filterwarnings("ignore", module="lightning.*")

    class ScoredModel(Model):
        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            self.log("score", float(abs(9 - self.global_step)))
            return super().training_step(batch, number)

    torch.manual_seed(1)
    model = ScoredModel()
    checkpoints = tc.Checkpoints(f"{folder}/remote", local=f"{folder}/local")
    loader = tc.DataLoader(tc.Dataset(url), batch_size=8, shuffle=True, options=tc.LoaderOptions(seed=1))
    policy = {"monitor": "score", "save_top_k": save_top_k}
    saves = ModelCheckpoint(dirpath=f"{folder}/runs", filename="{step}", every_n_train_steps=3, **policy)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saves], plugins=[TierCacheCheckpointIO(checkpoints)],
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=resume)
    checkpoints.close()
    listed = [(info.step, info.metrics) for info in checkpoints.list()]
    return {"seen": model.seen, "weights": digest(model.state_dict()), "listed": listed, "written": _names(folder)}


def _names(folder: str) -> list[str]:
    runs = Path(folder, "runs")
    return sorted(path.name for path in runs.rglob("*") if path.is_file()) if runs.exists() else []


# -- Hugging Face's Trainer ------------------------------------------------------------------------------------------


def train(url: str, folder: str, stop_after: int = -1, which: str | int = "latest") -> dict[str, Any]:
    """Two epochs, with a checkpoint every 3 steps, from the newest one if there is one; the ids of each step."""
    from tests.integration.transformers_jobs import Model, NativeTrainer
    from transformers import TrainerCallback, TrainingArguments

    from tiercache.integrations.transformers import CheckpointCallback, LoaderStateCallback

    class Stop(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == stop_after

    class NoisyModel(Model):
        def forward(self, id: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: A002
            found = super().forward(id, values)
            return {"loss": found["loss"] + torch.nn.functional.dropout(self.layer.weight).square().mean()}

    torch.manual_seed(1)
    model = NoisyModel()
    checkpoints = tc.Checkpoints(f"{folder}/remote", local=f"{folder}/local")
    saves = CheckpointCallback(checkpoints)
    settings = TrainingArguments(
        output_dir=f"{folder}/runs", num_train_epochs=2, per_device_train_batch_size=8, report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_steps=3, logging_steps=3,
    )  # fmt: skip
    trainer = NativeTrainer(
        model=model, args=settings, train_dataset=tc.Dataset(url), data_collator=tc.collate,
        callbacks=[saves, LoaderStateCallback(), Stop()],
    )  # fmt: skip
    resumed = saves.restore(f"{folder}/resumed", which)
    trainer.train(resume_from_checkpoint=resumed)
    checkpoints.close()
    listed = [(info.step, sorted(info.metrics)) for info in checkpoints.list()]
    return {
        "seen": model.seen, "weights": digest(model.state_dict()), "listed": listed, "written": _names(folder),
        "resumed": None if resumed is None else Path(resumed).name,
    }  # fmt: skip


# -- Accelerate ------------------------------------------------------------------------------------------------------


def loop(url: str, folder: str, stop_after: int | None = None) -> dict[str, Any]:
    """An epoch that resumes where a checkpoint stands."""
    from accelerate import Accelerator

    from tiercache.integrations.accelerate import load_state, prepare, save_state

    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(17, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    options = tc.LoaderOptions(seed=1)
    loader = prepare(tc.DataLoader(tc.Dataset(url), batch_size=8, shuffle=True, options=options), accelerator)
    checkpoints = tc.Checkpoints(f"{folder}/remote", rank=accelerator.process_index)
    step, seen = 0, []
    if checkpoints.list():
        load_state(accelerator, checkpoints)
        step = checkpoints.list()[-1].step
    for batch in loader:
        accelerator.backward(model(batch["values"]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen.append(batch["id"].tolist())
        step += 1
        if step == stop_after:
            save_state(accelerator, checkpoints, step)
            break
    checkpoints.close()
    rate = schedule.get_last_lr()
    weights = digest(accelerator.unwrap_model(model).state_dict())
    return {"seen": seen, "weights": weights, "rate": rate}
