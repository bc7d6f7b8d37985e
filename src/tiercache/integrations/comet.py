"""Comet: a callback that logs checkpoints to an experiment."""

from __future__ import annotations

from typing import Any

from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.integrations.checkpoint_log import CheckpointLog, CheckpointRecord


class CometCheckpointLog(CheckpointLog):
    """Logs each committed checkpoint to an experiment: metrics and the loader's counters at its step, and where it is.

    The other values name the checkpoint that was committed last. Each one is also a remote asset of the experiment.

    Args:
        checkpoints: Checkpoints.
        experiment: Experiment of comet_ml, online or offline.
    """

    def __init__(self, checkpoints: Checkpoints, experiment: Any) -> None:
        super().__init__(checkpoints)
        self._experiment = experiment

    def log(self, record: CheckpointRecord) -> None:
        """Log a committed checkpoint."""
        self._experiment.log_metrics(record.numbers, step=record.step)
        for name, text in record.facts.items():
            self._experiment.log_other(f"tiercache.{name}", text)
        self._experiment.log_remote_asset(
            record.url, remote_file_name=record.name, step=record.step, metadata=record.facts
        )
