"""s3torchconnector: S3IterableDataset over raw shards in the stored order; S3MapDataset over an object per record.

It prescribes no format, and has no shuffle but the sampler of a map-style data set, whose records are whole objects.
"""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from s3torchconnector import S3ClientConfig, S3IterableDataset, S3MapDataset

from peers import raw_shards
from peers.job import SEED, Job, Opened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s3torchconnector import S3Reader

    from source import Source
    from workloads import Workload


def pack(source: Source, folder: Path) -> None:
    """Write the raw shards, and each record once more as a file of its own."""
    raw_shards.pack(source, folder)
    (folder / "records").mkdir()
    for _, numbers in raw_shards.shards(source.workload):
        for number, record in zip(numbers, raw_shards.stored(source, numbers), strict=True):
            (folder / _record_name(number)).write_bytes(record.tobytes())


def _record_name(number: int) -> str:
    return f"records/{number:09d}.bin"


class Batches(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Batches cut from the shards, each of which one worker reads from its beginning to its end."""

    def __init__(self, shards: S3IterableDataset, workload: Workload) -> None:
        self._shards = shards
        self._workload = workload

    def __iter__(self) -> Iterator[dict[str, Any]]:
        n_bytes = raw_shards.record_type(self._workload).itemsize * self._workload.batch_size
        for shard in self._shards:
            while piece := shard.read(n_bytes):
                yield raw_shards.batch_of([piece], self._workload)


def _content(reader: S3Reader) -> bytes:
    return reader.read()


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader; the names of the objects are given, so that it needs no listing."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    store = {
        "region": os.environ["AWS_REGION"],
        "endpoint": os.environ["AWS_ENDPOINT_URL"],
        "s3client_config": S3ClientConfig(force_path_style=True),
    }
    workers = {"num_workers": job.workers, "persistent_workers": job.workers > 0}
    if job.shuffled:
        names = [f"{job.url}/{_record_name(number)}" for number in range(job.workload.n_records)]
        loader = torch.utils.data.DataLoader(
            S3MapDataset.from_objects(names, transform=_content, **store),
            batch_size=job.workload.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(SEED),
            collate_fn=partial(raw_shards.batch_of, workload=job.workload),
            **workers,
        )
        note = "S3MapDataset, an object per record"
    else:
        names = [f"{job.url}/{name}" for name, _ in raw_shards.shards(job.workload)]
        shards = S3IterableDataset.from_objects(names, enable_sharding=True, **store)
        loader = torch.utils.data.DataLoader(Batches(shards, job.workload), batch_size=None, **workers)
        note = "S3IterableDataset, raw shards"
    yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers, {note}")
