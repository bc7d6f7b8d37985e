"""Grain over ArrayRecord: one record per group, read and batched by threads, with processes for decoding."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import grain
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter

from images import decode
from peers.columns import from_bytes, stack, to_bytes
from peers.job import SEED, Job, Opened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source
    from workloads import Workload


def pack(source: Source, folder: Path) -> None:
    """Write record by record, in groups of one, as its guide requires for random access."""
    writer = ArrayRecordWriter(str(folder / "data.array_record"), "group_size:1")
    for record in source.records():
        writer.write(to_bytes(record, source.workload))
    writer.close()


def _record(workload: Workload, data: bytes) -> dict[str, Any]:
    record = from_bytes(data, workload)
    for field in workload.fields:
        if field.kind == "jpeg":
            record[field.name] = decode(record[field.name])
    return record


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the pipeline; all epochs are in one iterator, so that its processes are started once."""
    flags.FLAGS(["peers"], known_only=True)
    source = grain.sources.ArrayRecordDataSource([str(job.path / "data.array_record")])
    batches = iter(_batches(source, job))
    n_batches = -(-job.workload.n_records // job.workload.batch_size)
    how = f"{job.workers} processes" if job.workers else "threads"
    yield Opened(lambda: (batch for batch in islice(batches, n_batches)), how)


def _batches(source: Any, job: Job) -> Any:
    dataset = grain.MapDataset.source(source).seed(SEED)
    if job.shuffled:
        dataset = dataset.shuffle()
    dataset = dataset.map(partial(_record, job.workload))
    batches = dataset.batch(job.workload.batch_size, batch_fn=stack).repeat()
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=8))
    if job.workers:
        return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=job.workers))
    return batches
