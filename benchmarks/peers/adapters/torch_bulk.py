"""torch's DataLoader over columns in memory that are indexed once per batch: its documented way to load in bulk.

Few data sets are written like this, and images gain nothing: for images it is the same as `torch_map`.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peers.job import SEED, Job, Opened
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from source import Source


class Columns(torch.utils.data.Dataset[dict[str, Any]]):
    """Columns in memory: tensors, or lists of bytes or str. A batch is requested with all its rows."""

    def __init__(self, source: Source) -> None:
        whole = source.batch(0, source.workload.n_records)
        self._columns: dict[str, Any] = {
            name: torch.from_numpy(np.array(column)) if isinstance(column, np.ndarray) else column
            for name, column in whole.items()
        }

    def __len__(self) -> int:
        return len(self._columns[KEY])

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Any]:
        index = torch.as_tensor(rows)
        return {
            name: [column[i] for i in rows] if isinstance(column, list) else column[index]
            for name, column in self._columns.items()
        }


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader, without batching of its own: its sampler returns whole batches of rows."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    data = torch.utils.data
    dataset, generator = Columns(job.source), torch.Generator().manual_seed(SEED)
    rows = data.RandomSampler(dataset, generator=generator) if job.shuffled else data.SequentialSampler(dataset)
    loader = data.DataLoader(
        dataset,
        sampler=data.BatchSampler(rows, job.workload.batch_size, drop_last=False),
        batch_size=None,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers")
