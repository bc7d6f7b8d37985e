"""torch's DataLoader over a map-style data set in memory: the simplest data set, and its fastest."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from images import decode
from peers.job import SEED, Job, Opened
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from source import Source


class InMemory(torch.utils.data.Dataset[dict[str, Any]]):
    """Columns in memory: tensors, or lists of bytes or str; images are decoded record by record."""

    def __init__(self, source: Source) -> None:
        whole = source.batch(0, source.workload.n_records)
        self._columns: dict[str, Any] = {
            name: torch.from_numpy(np.array(column)) if isinstance(column, np.ndarray) else column
            for name, column in whole.items()
        }
        for field in source.workload.fields:
            if field.kind == "jpeg":
                self._columns[field.name] = Images(self._columns[field.name])

    def __len__(self) -> int:
        return len(self._columns[KEY])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self._columns.items()}


class Images:
    """Images that are decoded when they are requested."""

    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(decode(self._encoded[index]))


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader; its workers persist over the epochs, so that their start is not timed."""
    # More workers than cores are tried on purpose.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = torch.utils.data.DataLoader(
        InMemory(job.source),
        batch_size=job.workload.batch_size,
        shuffle=job.shuffled,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        generator=torch.Generator().manual_seed(SEED),
    )
    yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers")
