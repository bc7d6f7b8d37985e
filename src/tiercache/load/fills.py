"""Fill values: served in place of nulls; checked, in stored form and in the user's form."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.errors import SchemaError
from tiercache.shard.conversion import ConversionError
from tiercache.shard.read.values import ColumnValues
from tiercache.shard.schema import Column, Kind
from tiercache.shard.write.ingest import value_converter

Array: TypeAlias = npt.NDArray[Any]

_NUMBERS = (Kind.SCALAR, Kind.BOOL, Kind.TENSOR, Kind.RAGGED)


def stored_fill(column: Column, fill: Any) -> Any:
    """Return a fill value in stored form: bytes, an array of the record's shape, or an Arrow array of one value.

    A single number fills a whole tensor.

    Raises:
        SchemaError: The column is not nullable, or cannot hold the value.
    """
    if not column.nullable:
        message = "nulls: only a nullable column takes a fill value, and this column is not nullable"
        raise SchemaError(message, column=column.name, expected="'mask'", got=repr(fill))
    plain = dataclasses.replace(column, nullable=False)
    if column.kind is Kind.TENSOR and _is_single(fill):
        plain = dataclasses.replace(plain, kind=Kind.BOOL if column.dtype == "bool" else Kind.SCALAR, shape=())
    try:
        value = value_converter(plain)(fill)
    except ConversionError as error:
        message = f"nulls: the column cannot hold this fill value: {error}"
        raise SchemaError(message, column=column.name, expected=error.expected, got=error.got) from error
    if column.kind is Kind.TENSOR:
        return np.broadcast_to(np.asarray(value, column.stored), tuple(d or 0 for d in column.shape))
    return np.asarray(value, column.stored) if column.kind in _NUMBERS else value


def _is_single(fill: Any) -> bool:
    n_dimensions = getattr(fill, "ndim", None)  # arrays and tensors of no dimension have __len__ too
    return not hasattr(fill, "__len__") if n_dimensions is None else n_dimensions == 0


def stream_fills(column: Column, fill: Any) -> tuple[bytes, ...]:
    """Return the bytes of a null in each stream of the column (values, shape) but the last, which is the mask."""
    stored = stored_fill(column, fill)
    if column.kind is Kind.RAGGED:
        return np.ascontiguousarray(stored).tobytes(), np.array(stored.shape, "<i4").tobytes()
    return (np.ascontiguousarray(stored).tobytes() if column.kind in _NUMBERS else stored,)


def replace_nulls(found: ColumnValues, fill: Any) -> ColumnValues:
    """Replace the nulls in place, each by a value of its own; return the values without a mask."""
    column, values = found.column, found.values
    if found.valid is None or found.valid.all():
        return ColumnValues(column, values)
    stored = stored_fill(column, fill)
    where = np.flatnonzero(~found.valid).tolist()
    if isinstance(values, np.ndarray):
        values[where] = stored  # stored bools are 0 and 1
    elif isinstance(values, list):
        for index in where:
            values[index] = value_of(column, stored)
    else:
        values[where] = _bfloat16(stored)
    return ColumnValues(column, values)


def value_of(column: Column, stored: Any) -> Any:
    """Return a stored fill value as the value of a column that is served as a list, in memory of its own."""
    if column.kind is Kind.RAGGED:
        if column.dtype == "bfloat16":
            return _bfloat16(stored)
        return stored.astype(np.bool_) if column.dtype == "bool" else stored.copy()
    if column.kind is Kind.STR:
        return stored.decode()
    if column.kind is Kind.JSON:
        return json.loads(stored)
    return stored[0].as_py() if column.kind is Kind.ARROW else stored


def _bfloat16(bits: Array) -> Any:
    """Convert bits to a torch tensor. torch is imported, because the column's values are tensors too."""
    torch = sys.modules["torch"]
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16)
