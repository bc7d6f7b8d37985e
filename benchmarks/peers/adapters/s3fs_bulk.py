"""s3fs under torch's DataLoader: a data set that reads all records of a batch at once, by ranges of raw shards.

The ranges of a batch are requested at the same time, and neighbouring records by one range. Few loaders are written
like this. Nothing is stored.
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
    from collections.abc import Iterator, Sequence

pack = raw_shards.pack


class Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """Records in raw shards of a store. A batch is requested with all its numbers."""

    def __init__(self, job: Job) -> None:
        self._workload = job.workload
        self._ranges = raw_shards.ranges(job.workload)
        self._url = job.url

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Any]:
        merged: list[tuple[str, int, int]] = []
        for number in numbers:
            name, start, stop = self._ranges[number]
            if merged and merged[-1][0] == name and merged[-1][2] == start:
                start = merged.pop()[1]
            merged.append((name, start, stop))
        names, starts, stops = (list(column) for column in zip(*merged, strict=True))
        # fsspec keeps one file system for each process; one that was made before a fork could not be used.
        store = s3fs.S3FileSystem()
        pieces = store.cat_ranges([f"{self._url}/{name}" for name in names], starts, stops, on_error="raise")
        return raw_shards.batch_of(pieces, self._workload)


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader, without batching of its own: its sampler returns whole batches of numbers."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    data = torch.utils.data
    dataset, generator = Batches(job), torch.Generator().manual_seed(SEED)
    numbers = data.RandomSampler(dataset, generator=generator) if job.shuffled else data.SequentialSampler(dataset)
    loader = data.DataLoader(
        dataset,
        sampler=data.BatchSampler(numbers, job.workload.batch_size, drop_last=False),
        batch_size=None,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers")
