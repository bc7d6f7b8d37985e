"""s3fs under torch's DataLoader: a data set that reads the records of each batch by ranges of raw shards.

The ranges of a batch are requested at the same time, and neighbouring records by one range. Nothing is kept on the
disk: s3fs has no cache of ranges.
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


class Ranges(torch.utils.data.Dataset[dict[str, Any]]):
    """Records in raw shards of a store. A batch is requested with all its numbers."""

    def __init__(self, job: Job) -> None:
        self._workload = job.workload
        self._record_bytes = raw_shards.record_type(job.workload).itemsize
        self._places = [
            (f"{job.url}/{name}", at) for name, numbers in raw_shards.shards(job.workload) for at in range(len(numbers))
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Any]:
        ranges: list[tuple[str, int, int]] = []
        for number in numbers:
            path, at = self._places[number]
            if ranges and ranges[-1][::2] == (path, at):
                ranges[-1] = (path, ranges[-1][1], at + 1)
            else:
                ranges.append((path, at, at + 1))
        # fsspec keeps one file system for each process; one that was made before a fork could not be used.
        pieces = s3fs.S3FileSystem().cat_ranges(
            [path for path, _, _ in ranges],
            [start * self._record_bytes for _, start, _ in ranges],
            [stop * self._record_bytes for _, _, stop in ranges],
            on_error="raise",
        )
        return raw_shards.batch_of(pieces, self._workload)


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader, without batching of its own: its sampler returns whole batches of numbers."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    data = torch.utils.data
    dataset, generator = Ranges(job), torch.Generator().manual_seed(SEED)
    numbers = data.RandomSampler(dataset, generator=generator) if job.shuffled else data.SequentialSampler(dataset)
    loader = data.DataLoader(
        dataset,
        sampler=data.BatchSampler(numbers, job.workload.batch_size, drop_last=False),
        batch_size=None,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers")
