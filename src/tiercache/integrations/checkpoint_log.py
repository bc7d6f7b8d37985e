"""What experiment trackers are told about checkpoints: the base class of mlflow.py, wandb.py and comet.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tiercache.checkpoint.checkpoints import Checkpoints


class Saved(Protocol):
    """A save: what Checkpoints.save() returns, or the writer that Checkpoints.dcp_writer() returns after `dcp.save`."""

    name: str
    step: int

    def done(self) -> bool:
        """Return whether the checkpoint is committed at the store."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A committed checkpoint, as it is logged.

    Attributes:
        name: Name of the checkpoint.
        step: Step of the training run.
        url: URL of the checkpoint, without credentials.
        metrics: Metrics by name.
        dataset: URL, version, number of records and view of the data set, as text; "" without a loader.
        dataset_version: Number of the version, or numbers of the versions, of the data set; "" without a loader.
        fingerprint: Hash of the records that the loader reads; "" without a loader.
        loader: Counters of the loader by name, such as "loader/samples_per_s".
    """

    name: str
    step: int
    url: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: str = ""
    dataset_version: str = ""
    fingerprint: str = ""
    loader: Mapping[str, float] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, str]:
        """Everything that is text and not empty, by name."""
        found = {
            "checkpoint": self.name,
            "checkpoint_url": self.url,
            "dataset": self.dataset,
            "dataset_version": self.dataset_version,
            "dataset_fingerprint": self.fingerprint,
        }
        return {name: text for name, text in found.items() if text}

    @property
    def numbers(self) -> dict[str, float]:
        """Metrics, and the counters of the loader, by name."""
        return {**self.metrics, **self.loader}


class CheckpointLog(ABC):
    """Logs each checkpoint once it is committed. Call it with every save, in the training thread, and close() it.

    A checkpoint that fails, or that is skipped or dropped, is not logged.

    Args:
        checkpoints: Checkpoints.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._waiting: list[tuple[Saved, CheckpointRecord]] = []

    def __call__(self, saved: Saved, *, metrics: Mapping[str, float] | None = None, loader: Any = None) -> None:
        """Note a save, and log the earlier ones that are committed now.

        Args:
            saved: What Checkpoints.save() returned, or the writer of `dcp.save`.
            metrics: Metrics by name.
            loader: Loader of the training loop, whose data set and counters are logged.
        """
        url = f"{self._checkpoints.remote_store.url}/{saved.name}"
        record = CheckpointRecord(saved.name, saved.step, url, dict(metrics or {}), **_loader_facts(loader))
        self._waiting.append((saved, record))
        for waiting in [one for one in self._waiting if one[0].done()]:
            self._waiting.remove(waiting)
            self.log(waiting[1])

    def close(self) -> None:
        """Wait for the saves that are not committed yet, and log them. Checkpoints.close() raises their errors."""
        self._checkpoints.join()  # wait() of a save would count as the report of its error
        for saved, record in self._waiting:
            if saved.done():
                self.log(record)
        self._waiting.clear()

    @abstractmethod
    def log(self, record: CheckpointRecord) -> None:
        """Log a committed checkpoint."""


def _loader_facts(loader: Any) -> dict[str, Any]:
    if loader is None:
        return {}
    dataset = loader.dataset
    try:
        version = str(dataset.version)
    except AttributeError as error:  # several data sets are joined
        version = str(error).partition(": ")[2]
    counters = dict(_numbers(loader.stats(), "loader/"))
    return {
        "dataset": repr(dataset),
        "dataset_version": version,
        "fingerprint": dataset.fingerprint,
        "loader": counters,
    }


def _numbers(stats: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a nested dict, with their names joined by "/"."""
    for name, value in stats.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)
