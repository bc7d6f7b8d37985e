"""Weights & Biases: a callback that logs checkpoints to a run."""

from __future__ import annotations

from typing import Any

import wandb

from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.integrations.checkpoint_log import CheckpointLog, CheckpointRecord


class WandbCheckpointLog(CheckpointLog):
    """Logs each committed checkpoint to a run: a row with its step, URL, metrics, data set and the loader's counters.

    The rows have their own x-axis, `checkpoint/step`, because a checkpoint is committed some steps after its save. The
    run's summary has the checkpoint that was committed last.

    Args:
        checkpoints: Checkpoints.
        run: Run; None: the active run.
    """

    def __init__(self, checkpoints: Checkpoints, run: Any = None) -> None:
        super().__init__(checkpoints)
        self._run = wandb.run if run is None else run
        if self._run is None:
            raise ValueError("there is no active run of Weights & Biases: call wandb.init() before, or pass run=")
        self._run.define_metric("checkpoint/*", step_metric="checkpoint/step")

    def log(self, record: CheckpointRecord) -> None:
        """Log a committed checkpoint."""
        row = {**record.facts, **record.numbers, "step": record.step}
        self._run.log({f"checkpoint/{name}": value for name, value in row.items()})
