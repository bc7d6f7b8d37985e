"""The plain C gather with a thread per core; for lists, the consumer's thread makes the objects."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from floor import Floor, Varied
from peers.columns import slices, texts
from peers.job import SEED, Job, Opened, UnsupportedError, cores
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the floor over the generated columns as they are stored."""
    source, fields = job.source, job.workload.fields
    if any(field.kind == "jpeg" for field in fields):
        raise UnsupportedError("it copies, it does not decode")
    columns: dict[str, Any] = {
        field.name: source.array(field)
        if field.kind == "array"
        else Varied(np.asarray(source.data(field)), np.asarray(source.offsets(field)))
        for field in fields
    }
    floor = Floor({**columns, KEY: source.keys}, job.workload.batch_size, cores(), Path(job.library_folder))
    rng, n = np.random.default_rng(SEED), job.workload.n_records
    try:
        yield Opened(lambda: _batches(floor, rng.permutation(n) if job.shuffled else np.arange(n), job))
    finally:
        floor.close()


def _batches(floor: Floor, order: np.ndarray, job: Job) -> Iterator[dict[str, Any]]:
    lists = [field for field in job.workload.fields if field.kind != "array"] if job.form == "list" else []
    for batch in floor.epoch(order):
        for field in lists:
            values, offsets = (tensor.numpy() for tensor in batch[field.name])
            batch[field.name] = texts(values, field.n_bytes) if field.kind == "text" else slices(values, offsets)
        yield batch
