"""s3fs under torch's DataLoader: a map-style data set that reads record by record, as most are written.

Each record is one range of a raw shard. Nothing is stored.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import s3fs
import torch

from peers import raw_shards
from peers.job import SEED, Job, Opened

if TYPE_CHECKING:
    from collections.abc import Iterator

pack = raw_shards.pack


class Records(torch.utils.data.Dataset[dict[str, Any]]):
    """Records in raw shards of a store."""

    def __init__(self, job: Job) -> None:
        self._workload = job.workload
        self._ranges = raw_shards.ranges(job.workload)
        self._url = job.url

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, number: int) -> dict[str, Any]:
        name, start, stop = self._ranges[number]
        # fsspec keeps one file system for each process; one that was made before a fork could not be used.
        piece = s3fs.S3FileSystem().cat_file(f"{self._url}/{name}", start=start, end=stop)
        return {column: values[0] for column, values in raw_shards.batch_of([piece], self._workload).items()}


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = torch.utils.data.DataLoader(
        Records(job),
        batch_size=job.workload.batch_size,
        shuffle=job.shuffled,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        generator=torch.Generator().manual_seed(SEED),
    )
    yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers")
