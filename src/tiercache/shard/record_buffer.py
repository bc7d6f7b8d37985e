"""RecordBuffer: collects single records in stored form until they exceed a block."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiercache._native import records
from tiercache._native.records import EXCEEDS_BLOCK, KEPT, NEEDS_CONVERSION, Records
from tiercache.errors import SchemaError
from tiercache.shard.cutter import BlockData
from tiercache.shard.fit import ConversionError
from tiercache.shard.ingest import build_column_data, value_converter
from tiercache.shard.parts import ColumnData
from tiercache.shard.spec import FLOATS, INTEGERS, Kind
from tiercache.shard.types import Column

__all__ = ["EXCEEDS_BLOCK", "KEPT", "NEEDS_CONVERSION", "RecordBuffer", "misfit_error"]

_LARGEST_INT64 = 2**63 - 1


class RecordBuffer:
    """Buffer of records that are not written yet: at most a block and one record. For one thread.

    add_usual(record) is the fast path, which takes a tenth of the time of add(): it accepts a dict whose values have
    exactly the types of the columns. It returns KEPT; OVER (the record is kept and exceeds the block: take() the
    records before it); or NEEDS_CONVERSION (nothing was kept: check the names, then call add()).
    """

    def __init__(self, columns: tuple[Column, ...], block_bytes: int) -> None:
        self._columns = columns
        self._converters = [value_converter(column) for column in columns]
        self._objects: dict[int, list[Any]] = {i: [] for i, c in enumerate(columns) if c.kind is Kind.ARROW}
        self._records = Records([_spec_of(column) for column in columns], block_bytes)
        self.add_fast = self._records.add

    @property
    def cuts_exactly(self) -> bool:
        """Whether the buffer's byte counts decide where blocks end; False with ARROW columns (see BlockCutter)."""
        return not self._objects

    @property
    def n_records(self) -> int:
        """Number of records in the buffer."""
        return self._records.n_records

    def set_room(self, room_bytes: int) -> None:
        """Set the number of bytes that fit into the next block."""
        self._records.room_bytes = max(room_bytes, 0)

    def add(self, record: Mapping[str, Any], number: int) -> int:
        """Add a record, whose names the caller has checked.

        Args:
            record: Mapping of column names to values; missing columns are null.
            number: Number of the record in the writer's input, for errors.

        Returns:
            KEPT or OVER.

        Raises:
            SchemaError: A value does not fit; nothing of the record is kept.
        """
        named = {column.name: record.get(column.name) for column in self._columns}
        extra_bytes = 0
        index = self._records.fill(named, 0)
        while index < len(self._columns):
            try:
                value = self._converters[index](named[self._columns[index].name])
            except ConversionError as error:
                raise misfit_error(self._columns[index], error, number) from error
            extra_bytes += self._put(index, value)
            index = self._records.fill(named, index + 1)
        return self._records.commit(extra_bytes)

    def _put(self, index: int, value: Any) -> int:
        """Store a converted value. Returns the number of its bytes that the native buffer does not count."""
        column = self._columns[index]
        if column.kind is Kind.ARROW:
            kept = self._objects[index]
            del kept[self._records.n_records :]  # values of an earlier record that was rejected
            kept.append(value)
            self._records.put(index, 0)
            return 0 if value is None else max(value.nbytes - 1, 0)
        if column.kind is Kind.RAGGED and value is not None:
            self._records.put(index, np.ascontiguousarray(value).reshape(-1).view(np.uint8), value.shape)
        else:
            self._records.put(index, value)
        return 0

    def take(self, n: int) -> BlockData:
        """Remove and return the first n records: all, or all but the last. The result owns its memory."""
        parts = []
        for index, (column, taken) in enumerate(zip(self._columns, self._records.take(n), strict=True)):
            if column.kind is Kind.ARROW:
                kept = self._objects[index]
                parts.append(build_column_data(column, kept[:n]))
                del kept[:n]
                continue
            values, offsets, shapes, valid = taken
            if column.kind is Kind.RAGGED:
                values = values[: len(values) // column.stored.itemsize * column.stored.itemsize].view(column.stored)
            elif offsets is None and column.kind is not Kind.BOOL:
                values = values.reshape(n, column.n_elements)
            valid = None if valid is None or valid.all() else valid
            parts.append(ColumnData(n, values, offsets, shapes if column.kind is Kind.RAGGED else None, valid))
        return parts


def misfit_error(column: Column, error: ConversionError, record: int) -> SchemaError:
    """Return a ConversionError as a SchemaError. record: Number of the record in the whole input."""
    return SchemaError(str(error), column=column.name, record=record, expected=error.expected, got=error.got)


@dataclass(frozen=True, slots=True)
class _Spec:
    """Description of a column for _native.records. See Spec there."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    varying: bool
    nullable: bool
    usual: int = records.NONE
    format: str = ""
    scalar_type: type | None = None
    low: int = 0
    high: int = 0
    limit: float = 0.0


def _spec_of(column: Column) -> _Spec:
    dtype, shape, nullable = column.stored, column.shape, column.nullable
    if column.kind is Kind.ARROW:  # self._objects keeps the values; the native buffer has a byte for each
        return _Spec(column.name, np.dtype("u1"), (), varying=False, nullable=False)
    usual = _usual(column)
    limits: dict[str, Any] = {}
    if usual == records.INTEGERS:
        info = np.iinfo(dtype.type)  # type: ignore[type-var]
        limits = {"low": int(info.min), "high": min(int(info.max), _LARGEST_INT64)}
    elif usual == records.FLOATS:
        limits = {"limit": float(np.finfo(dtype.type).max)}  # type: ignore[type-var]
    text = "?" if column.dtype == "bool" else np.empty(1, dtype).data.format
    return _Spec(column.name, dtype, shape, column.has_offsets, nullable, usual, text, dtype.type, **limits)


def _usual(column: Column) -> int:
    kinds = {Kind.BOOL: records.BOOLS, Kind.BYTES: records.BYTES, Kind.IMAGE: records.BYTES, Kind.STR: records.TEXT}
    if column.kind in kinds:
        return kinds[column.kind]
    if column.dtype == "bfloat16" or sys.byteorder != "little":  # bits that look like integers; another byte order
        return records.NONE
    if column.kind in (Kind.TENSOR, Kind.RAGGED):
        return records.ARRAYS
    if column.kind is Kind.SCALAR and column.dtype in INTEGERS:
        return records.INTEGERS
    if column.kind is Kind.SCALAR and column.dtype in FLOATS and column.stored.itemsize >= 4:
        return records.FLOATS
    return records.NONE
