"""Hand-written code: raw columns in mapped files, and fancy indexing; images decoded with a thread per core."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from images import decode
from peers.columns import chunks, even_offsets, slices, texts
from peers.job import SEED, Job, Opened, cores
from source import Source
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from workloads import Field

Gather = Callable[[Any], Any]
Decode = Callable[[list[bytes]], np.ndarray]


def pack(source: Source, folder: Path) -> None:
    """Write the columns as they are."""
    source.keys.tofile(folder / KEY)
    for field in source.workload.fields:
        source.data(field).tofile(folder / field.name)
        if field.kind != "array":
            source.offsets(field).tofile(folder / f"{field.name}.offsets")


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield batches made in the consumer's own thread."""
    source, rng = Source(job.workload, job.path), np.random.default_rng(SEED)
    with ThreadPoolExecutor(cores()) as pool:
        gathers = columns(source, job.form, lambda encoded: np.stack(list(pool.map(decode, encoded))))
        yield Opened(lambda: _shuffled(job, source, gathers, rng) if job.shuffled else _stored(job, source, gathers))


def columns(source: Source, form: str, decode_all: Decode) -> dict[str, Gather]:
    """Return, by column, a function from rows (a slice or int64[n]) to the column of a batch; always new memory."""
    return {field.name: _column(source, field, form, decode_all) for field in source.workload.fields}


def _shuffled(
    job: Job, source: Source, gathers: dict[str, Gather], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    keys = source.keys
    for rows in chunks(rng.permutation(job.workload.n_records), job.workload.batch_size):
        batch = {name: column(rows) for name, column in gathers.items()}
        batch[KEY] = keys[rows]
        yield batch


def _stored(job: Job, source: Source, gathers: dict[str, Gather]) -> Iterator[dict[str, Any]]:
    keys, n = source.keys, job.workload.n_records
    for start in range(0, n, job.workload.batch_size):
        rows = slice(start, min(start + job.workload.batch_size, n))
        batch = {name: column(rows) for name, column in gathers.items()}
        batch[KEY] = np.array(keys[rows])
        yield batch


def _column(source: Source, field: Field, form: str, decode_all: Decode) -> Gather:
    if field.kind == "array":
        values = source.array(field)
        return lambda rows: np.array(values[rows])
    if field.kind == "text":
        matrix = source.data(field).reshape(-1, field.n_bytes)
        if form == "list":
            return lambda rows: texts(matrix[rows], field.n_bytes)
        return lambda rows: _text_buffer(np.array(matrix[rows]))
    read = Bytes(source.data(field), source.offsets(field))
    if field.kind == "jpeg":
        return lambda rows: decode_all(read.objects(rows))
    return read.objects if form == "list" else read.buffer


def _text_buffer(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return matrix.reshape(-1), even_offsets(*matrix.shape)


class Bytes:
    """A mapped column of records of varying length."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self._data, self._offsets = np.asarray(data), np.asarray(offsets)

    def objects(self, rows: Any) -> list[bytes]:
        """Return rows as a list of bytes."""
        if isinstance(rows, slice):
            return slices(self._data, self._offsets[rows.start : rows.stop + 1])
        starts, ends, data = self._offsets[rows].tolist(), self._offsets[rows + 1].tolist(), memoryview(self._data)
        return [bytes(data[a:b]) for a, b in zip(starts, ends, strict=True)]

    def buffer(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the joined rows and their offsets."""
        if isinstance(rows, slice):
            offsets = self._offsets[rows.start : rows.stop + 1]
            return np.array(self._data[offsets[0] : offsets[-1]]), offsets - offsets[0]
        starts, ends, data = self._offsets[rows], self._offsets[rows + 1], self._data
        values = np.concatenate([data[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
        return values, np.concatenate([[0], np.cumsum(ends - starts)])
