"""The job of a child process, and the result of an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from source import Source
from workloads import Workload, workload_of

SEED = 7
# Layout of a job whose workload has only one, or of pictures in a contender's usual way. The name is kept for existing
# ledgers.
USUAL = "list"


class UnsupportedError(Exception):
    """A contender cannot run this case; the message gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One task of a child process.

    Attributes:
        task: "pack"; "tune", a short run to compare numbers of workers; or "measure", one repetition.
        peer: Name of the adapter's module.
        workload: Workload that is packed or read.
        source_folder: Folder of the generated records.
        folder: Folder of the packed records.
        library_folder: Folder of the compiled floor.
        shuffle: "none", "full" or "default", the contender's own.
        form: "list" or "buffer", for columns of varying length; USUAL or one of PICTURE_FORMS, for pictures; else
        USUAL.
        workers: Number of threads or processes of the contender; 0: none besides the consumer's thread.
        min_s: Seconds of each timing; epochs are repeated until this time is reached.
        check_s: Maximum seconds of the checked epoch; 0: no epoch is checked record by record.
        url: URL of the packed records in an S3 store, for a cold epoch; "": they are read from the folder. The
            environment has the address of the store and the keys, as AWS names them.
        cache_folder: Folder for the contender's local copies, which a cold epoch begins without.
    """

    task: str
    peer: str
    workload: Workload
    source_folder: str
    folder: str
    library_folder: str
    shuffle: str = "none"
    form: str = USUAL
    workers: int = 0
    min_s: float = 0.0
    check_s: float = math.inf
    url: str = ""
    cache_folder: str = ""

    @property
    def source(self) -> Source:
        """Return the generated records."""
        return Source(self.workload, Path(self.source_folder))

    @property
    def path(self) -> Path:
        """Folder of the packed records."""
        return Path(self.folder)

    @property
    def shuffled(self) -> bool:
        """Whether the order differs from the stored order."""
        return self.shuffle != "none"

    @property
    def shown_form(self) -> str:
        """Layout shown in rows: "" for USUAL if no column has varying length."""
        return "" if self.form == USUAL and not self.workload.varied else self.form

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form that `job_of` reads."""
        return asdict(self)


def job_of(value: dict[str, Any]) -> Job:
    """Return a job from its JSON form."""
    return Job(**{**value, "workload": workload_of(value["workload"])})


@dataclass(frozen=True, slots=True)
class Opened:
    """A loader ready to run. epoch: Function that returns the next epoch's batches. note: How it is run."""

    epoch: Callable[[], Iterator[dict[str, Any]]]
    note: str = ""


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))
