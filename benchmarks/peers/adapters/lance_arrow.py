"""Lance: scans for the stored order; for the shuffled order, takes of a batch's rows, several ahead in threads."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import pyarrow as pa

from images import decode
from peers.columns import chunks, from_arrow
from peers.job import SEED, Job, Opened
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source
    from workloads import Field, Workload

AHEAD = 4
GATHERED = 1024
OBJECTS = {"bytes": pa.large_binary(), "text": pa.string(), "jpeg": pa.binary()}


def _type(field: Field) -> pa.DataType:
    if field.kind == "array":
        dtype = pa.from_numpy_dtype(np.dtype(field.dtype))
        return pa.list_(dtype, field.n_bytes // np.dtype(field.dtype).itemsize)
    return OBJECTS[field.kind]


def schema(workload: Workload) -> pa.Schema:
    """Return the columns as an Arrow schema."""
    columns = [(field.name, _type(field)) for field in workload.fields]
    return pa.schema([*columns, (KEY, pa.int64())])


def record_batch(batch: dict[str, Any], workload: Workload) -> pa.RecordBatch:
    """Return a batch of the source as Arrow, arrays without a copy."""
    columns = []
    for field in workload.fields:
        value, kind = batch[field.name], _type(field)
        if field.kind == "array":
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(value).reshape(-1)), type=kind))
        else:
            columns.append(pa.array(value, kind))
    return pa.RecordBatch.from_arrays([*columns, pa.array(np.asarray(batch[KEY]))], schema=schema(workload))


def pack(source: Source, folder: Path) -> None:
    """Write record batches."""
    batches = (record_batch(batch, source.workload) for batch in source.batches())
    reader = pa.RecordBatchReader.from_batches(schema(source.workload), batches)
    lance.write_dataset(reader, str(folder / "data.lance"))


def pack_one_by_one(source: Source, folder: Path) -> None:
    """Write records collected into record batches, because Lance accepts nothing smaller."""
    lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema(source.workload), _gathered(source)), str(folder / "data.lance")
    )


def _gathered(source: Source) -> Iterator[pa.RecordBatch]:
    records = source.records()
    while some := list(itertools.islice(records, GATHERED)):
        columns: dict[str, Any] = {name: [record[name] for record in some] for name in some[0]}
        for field in source.workload.fields:
            if field.kind == "array":
                columns[field.name] = np.stack(columns[field.name])
        yield record_batch({**columns, KEY: np.array(columns[KEY], np.int64)}, source.workload)


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the data set; its own threads read, ours wait for several batches at a time and decode."""
    dataset, rng = lance.dataset(str(job.path / "data.lance")), np.random.default_rng(SEED)
    n = job.workload.n_records
    with ThreadPoolExecutor(max(job.workers, 1)) as pool:
        if job.shuffled:
            yield Opened(lambda: _taken(dataset, job, rng.permutation(n), pool), f"{job.workers} batches at a time")
        else:
            yield Opened(lambda: _scanned(dataset, job, pool), "scan")


def _scanned(dataset: Any, job: Job, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    for batch in dataset.to_batches(batch_size=job.workload.batch_size):
        yield _batch(batch, job, pool)


def _taken(dataset: Any, job: Job, order: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    rows = chunks(order, job.workload.batch_size)
    if job.workers == 0:
        for some in rows:
            yield _batch(_one(dataset.take(some)), job, pool)
        return
    waiting: deque[Any] = deque()
    for some in rows:
        waiting.append(pool.submit(dataset.take, some))
        if len(waiting) > AHEAD:
            yield _batch(_one(waiting.popleft().result()), job, pool)
    while waiting:
        yield _batch(_one(waiting.popleft().result()), job, pool)


def _one(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]


def _batch(batch: pa.RecordBatch, job: Job, pool: ThreadPoolExecutor) -> dict[str, Any]:
    found: dict[str, Any] = {KEY: batch.column(KEY).to_numpy()}
    for field in job.workload.fields:
        value = from_arrow(batch.column(field.name), field, "list" if field.kind == "jpeg" else job.form)
        found[field.name] = np.stack(list(pool.map(decode, value))) if field.kind == "jpeg" else value
    return found
