"""Conversions that several adapters share: text as one matrix, records as bytes, Arrow columns as arrays."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from workloads import KEY, Field, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def slices(values: np.ndarray, offsets: np.ndarray) -> list[bytes]:
    """Return the records of one buffer as bytes objects. values: uint8[total]; offsets: int64[n + 1]."""
    data, ends = memoryview(values), offsets.tolist()
    return [bytes(data[a:b]) for a, b in pairwise(ends)]


def texts(values: np.ndarray, n_bytes: int) -> list[str]:
    """Return ASCII records of one length as str objects. values: uint8[n * n_bytes]."""
    whole = values.tobytes().decode("ascii")
    return [whole[at : at + n_bytes] for at in range(0, len(whole), n_bytes)]


def even_offsets(n: int, n_bytes: int) -> np.ndarray:
    """Return the offsets of n records of one length, int64[n + 1]."""
    return np.arange(0, (n + 1) * n_bytes, n_bytes, dtype=np.int64)


def chunks(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield the order cut into batches; the last one may be short."""
    for start in range(0, len(order), size):
        yield order[start : start + size]


def to_bytes(record: dict[str, Any], workload: Workload) -> bytes:
    """Return a record as bytes: its number, then its columns in order; a column of varying length comes last."""
    parts = [int(record[KEY]).to_bytes(8, "little")]
    for field in workload.fields:
        value = record[field.name]
        parts.append(value.encode("ascii") if isinstance(value, str) else bytes(value))
    return b"".join(parts)


def from_bytes(data: bytes, workload: Workload) -> dict[str, Any]:
    """Return the record: views of the bytes for arrays, bytes or str for the others, an int64 for the number."""
    record: dict[str, Any] = {KEY: np.frombuffer(data, np.int64, 1)[0]}
    at = 8
    for field in workload.fields:
        if field.kind == "array":
            count = field.n_bytes // np.dtype(field.dtype).itemsize
            record[field.name] = np.frombuffer(data, field.dtype, count, at).reshape(field.shape)
        else:
            record[field.name] = data[at:].decode("ascii") if field.kind == "text" else data[at:]
        at += field.n_bytes
    return record


def stack(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of records: arrays and numbers stacked, other objects in lists."""
    first = records[0]
    return {
        name: [record[name] for record in records]
        if isinstance(first[name], bytes | str)
        else np.stack([record[name] for record in records])
        for name in first
    }


def from_arrow(array: Any, field: Field, form: str) -> Any:
    """Return a pyarrow array of a field's column, of any Arrow type, as a batch's column; arrays without a copy."""
    if field.kind == "array":
        size, item = field.n_bytes, np.dtype(field.dtype).itemsize
        while hasattr(array, "storage"):
            array = array.storage
        start = array.offset * size // item
        flat = array
        while hasattr(flat, "values"):
            flat = flat.values
        values = flat.to_numpy(zero_copy_only=True)[start : start + len(array) * size // item]
        return values.reshape(len(array), *field.shape)
    if form == "list":
        return array.to_pylist()
    _, ends, data = array.buffers()
    width = np.int64 if str(array.type).startswith("large") else np.int32
    offsets = np.frombuffer(ends, width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    values = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
    return values, offsets - offsets[0]
