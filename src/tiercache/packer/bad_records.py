"""Writing of batches in which some records are bad: what is done about them, and the report of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.packer.files import BadRecord, InputBatch
from tiercache.shard.writer import ShardWriter

_Columns: TypeAlias = Mapping[str, Sequence[Any]] | pa.RecordBatch


def write_batch(writer: ShardWriter, batch: InputBatch, add_bad: Callable[[BadRecord], None]) -> None:
    """Write the records of a batch that fit the schema, and pass the others, and its bad records, to add_bad."""
    for one in batch.bad:
        add_bad(one)
    start, step = 0, batch.n_records
    while start < batch.n_records:
        end = min(start + step, batch.n_records)
        index = _try_to_write(writer, _slice(batch.columns, start, end), batch, start, add_bad)
        # After a bad record the steps grow from 1 again, so a batch of bad records alone takes linear time.
        start, step = (end, step * 2) if index is None else (index + 1, 1)


def _try_to_write(
    writer: ShardWriter, columns: _Columns, batch: InputBatch, start: int, add_bad: Callable[[BadRecord], None]
) -> int | None:
    """Write columns, which begin with record `start` of a batch; or those before the first bad record: its number."""
    n_before = writer.n_records
    try:
        writer.write_batch(columns)
    except SchemaError as error:
        if error.record is None:  # the whole batch does not fit, for example because a column is missing
            raise
        index = error.record - n_before
        if index:
            writer.write_batch(_slice(columns, 0, index))
        text = error.message.removeprefix(f"column {error.column!r}, ").removeprefix(f"record {error.record}: ")
        add_bad(BadRecord(batch.location(start + index), text, _record(columns, index), error.column))
        return start + index
    return None


def _slice(columns: _Columns, start: int, end: int) -> _Columns:
    if isinstance(columns, pa.RecordBatch):
        return columns.slice(start, end - start)
    return {name: values[start:end] for name, values in columns.items()}


def _record(columns: _Columns, index: int) -> dict[str, Any]:
    if isinstance(columns, pa.RecordBatch):
        return dict(columns.slice(index, 1).to_pylist()[0])
    return {name: values[index] for name, values in columns.items()}


def stop_at(bad: BadRecord) -> None:
    """Raise SchemaError for a bad record."""
    raise SchemaError(f"{bad.location}: {bad.reason}", column=bad.column)
