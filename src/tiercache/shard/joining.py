"""Joins the values of several reads into one result, in the order that the caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tiercache.shard.types import Column, Kind
from tiercache.shard.values import ColumnValues, gather_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.shard.cast import ServedColumns
    from tiercache.shard.types import Schema


def join_values(parts: Sequence[Sequence[ColumnValues]], places: Sequence[NDArray[np.int64]]) -> list[ColumnValues]:
    """Return the values of several reads as one result.

    Args:
        parts: Values by read and column.
        places: Positions in the result of the values of each read; together a permutation of 0..n-1.
    """
    if len(parts) == 1:  # a single read has its values in order already
        return list(parts[0])
    n = sum(len(place) for place in places)
    return [_join_column([part[c] for part in parts], places, n) for c in range(len(parts[0]))]


def _join_column(parts: Sequence[ColumnValues], places: Sequence[NDArray[np.int64]], n: int) -> ColumnValues:
    first, values = parts[0], _room(parts[0].values, n)
    valid = None if first.valid is None else np.empty(n, np.bool_)
    for part, place in zip(parts, places, strict=True):
        if isinstance(values, list):
            for at, value in zip(place.tolist(), part.values, strict=True):
                values[at] = value
        else:
            values[place] = part.values
        if valid is not None:
            valid[place] = part.valid
    return ColumnValues(first.column, values, valid)


def _room(like: Any, n: int) -> Any:
    if isinstance(like, list):
        return [None] * n
    if isinstance(like, np.ndarray):
        return np.empty((n, *like.shape[1:]), like.dtype)
    return like.new_empty((n, *like.shape[1:]))  # bfloat16 values are a torch tensor


def empty_values(schema: Schema, served: ServedColumns) -> list[ColumnValues]:
    """Return the values of zero records. served: Columns that are cast, as they are served."""
    return [_none_of_column(column, served.get(column.name)) for column in schema.columns]


def _none_of_column(column: Column, served: Column | None) -> ColumnValues:
    if column.kind is Kind.ARROW:
        return ColumnValues(column, [], np.empty(0, np.bool_) if column.nullable else None)
    addresses = np.zeros((len(column.streams(0)), 1, 3), np.uint64)
    nowhere = np.empty(0, np.uint32)
    return gather_values(column, addresses, nowhere, nowhere, url="", served=served)


def join_arrow(
    parts: Sequence[Sequence[pa.Array]], places: Sequence[NDArray[np.int64]], schema: Schema
) -> list[pa.Array]:
    """Return the Arrow arrays of several reads as one result, by column. See join().

    Without parts, the arrays are empty.
    """
    if not parts:
        return [pa.array([], column.arrow.type) for column in schema.columns]
    where = np.concatenate(places)
    order = np.empty(len(where), np.int64)
    order[where] = np.arange(len(where))
    is_in_order = bool((where[1:] > where[:-1]).all())
    columns = [pa.concat_arrays([part[c] for part in parts]) for c in range(len(parts[0]))]
    return columns if is_in_order else [column.take(pa.array(order)) for column in columns]
