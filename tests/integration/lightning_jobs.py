"""A user's script with Lightning, run by one process or by each of two."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import tiercache as tc


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(17, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        self.seen.append(batch["id"].tolist())
        return self.layer(batch["values"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(
    url: str, folder: str, resume: str | None = None, n_processes: int = 1, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Two epochs, with a checkpoint every 3 steps; the ids of each step and the trainer's loader.

    options: of the Trainer.
    """
    warnings.filterwarnings("ignore", module="lightning.*")  # of torch's deprecations, folders that exist, few workers
    torch.manual_seed(1)
    model = Model()
    # Lightning restores no random numbers: with a seed all epochs follow from the loader's state.
    loader = tc.DataLoader(tc.Dataset(url), batch_size=8, shuffle=True, options=tc.LoaderOptions(seed=1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=n_processes,
        strategy="ddp" if n_processes > 1 else "auto",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)],
        **(options or {}),
    )
    trainer.fit(model, loader, ckpt_path=None if resume is None else str(Path(folder) / resume))
    used = trainer.train_dataloader
    return {"seen": model.seen, "loader": repr(used), "is_ours": used is loader, "samples": loader.stats()["samples"]}
