"""What a child process is asked to do, and what an adapter gives it."""

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
# The form of a job whose workload has but one, or of pictures in a contender's usual way: an odd word for it, but that
# of all ledgers so far.
USUAL = "list"


class UnsupportedError(Exception):
    """A contender cannot do this case; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One task of a child process.

    Attributes:
        task: "pack"; "tune", a short look at how fast a number of workers is; or "measure", one repetition.
        peer: the name of the adapter's module.
        workload: what is packed or read.
        source_folder: of the generated records.
        folder: of the packed ones.
        library_folder: where the compiled floor lies.
        shuffle: "none", "full" or "default", what the contender itself would do.
        form: "list" or "buffer", for columns of varied length; USUAL or one of PICTURE_FORMS, for pictures; else USUAL.
        workers: threads or processes, whichever the contender has; 0: none beside the consumer's.
        min_s: of each timing; epochs are repeated until they took so long together.
        check_s: the most that the checked epoch may take; 0: no epoch is checked record by record.
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

    @property
    def source(self) -> Source:
        """The generated records."""
        return Source(self.workload, Path(self.source_folder))

    @property
    def path(self) -> Path:
        """The folder of the packed records."""
        return Path(self.folder)

    @property
    def shuffled(self) -> bool:
        """Whether the order is not the stored one."""
        return self.shuffle != "none"

    @property
    def shown_form(self) -> str:
        """The form that rows have: "" for USUAL where no column is of varied length."""
        return "" if self.form == USUAL and not self.workload.varied else self.form

    def as_json(self) -> dict[str, Any]:
        """What `job_of` takes."""
        return asdict(self)


def job_of(value: dict[str, Any]) -> Job:
    """A job from its JSON form."""
    return Job(**{**value, "workload": workload_of(value["workload"])})


@dataclass(frozen=True, slots=True)
class Opened:
    """A loader ready to run. epoch: gives the batches of the next epoch; note: how it is run, for the reader."""

    epoch: Callable[[], Iterator[dict[str, Any]]]
    note: str = ""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
