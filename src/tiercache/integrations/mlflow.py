"""MLflow: a callback that logs checkpoints to a run."""

from __future__ import annotations

import mlflow

from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.integrations.checkpoint_log import CheckpointLog, CheckpointRecord


class MlflowCheckpointLog(CheckpointLog):
    """Logs each committed checkpoint to a run: its metrics and the loader's counters at its step, the rest as tags.

    The tags name the checkpoint that was committed last. Each one has an artifact, `checkpoints/NAME.json`.

    Args:
        checkpoints: Checkpoints.
        run_id: Run; None: the active run.
    """

    def __init__(self, checkpoints: Checkpoints, run_id: str | None = None) -> None:
        super().__init__(checkpoints)
        active = mlflow.active_run()
        if run_id is None and active is None:
            raise ValueError("there is no active run of MLflow: call mlflow.start_run() before, or pass run_id=")
        self._run_id = run_id if run_id is not None else active.info.run_id

    def log(self, record: CheckpointRecord) -> None:
        """Log a committed checkpoint."""
        mlflow.log_metrics(record.numbers, step=record.step, run_id=self._run_id)
        client = mlflow.MlflowClient()
        for name, text in record.facts.items():
            client.set_tag(self._run_id, f"tiercache.{name}", text)
        client.log_dict(self._run_id, {**record.facts, **record.numbers}, f"checkpoints/{record.name}.json")
