"""Values as users get them: numpy arrays, bytes, text and objects, in the order of the request.

All arrays are new, writable and owned by the caller. In a record, a null is None. In a batch, a null is zero (None in a
list), and the array "<column>.valid" is False for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.typing import NDArray

from tiercache._native import gather
from tiercache.errors import CorruptShard, SchemaError
from tiercache.shard.blocks import Blocks, Indices
from tiercache.shard.codec import Addresses
from tiercache.shard.conversion import ConversionError, bfloat16_tensor, fit
from tiercache.shard.schema import (
    CLASSES_KEY,
    FLOATS,
    STORED,
    TOKENIZER_KEY,
    Column,
    Kind,
    Ragged,
    Schema,
    Tensor,
    UserType,
    find_bad_shape,
)

Casts: TypeAlias = Mapping[str, str]  # dtypes, or whole types of columns in their notation
ServedColumns: TypeAlias = Mapping[str, Column]
# The numbers equal those in csrc/cast.h.
DTYPE_NUMBERS: dict[str, int] = {
    name: number
    for number, name in enumerate(
        (
            *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
            *("float16", "bfloat16", "float32", "float64"),
        ),
        1,
    )
}
_NUMBERS = (Kind.SCALAR, Kind.BOOL, Kind.TENSOR, Kind.RAGGED)


def parse_casts(casts: object) -> dict[str, str]:
    """Return the casts that a user states, in the notation of types. Raises TypeError and SchemaError."""
    if casts is None:
        return {}
    if not isinstance(casts, Mapping):
        raise TypeError(f"cast is a mapping from column names to dtypes, got {type(casts).__name__}")
    found = {}
    for name, dtype in casts.items():
        try:
            served = Column.of(name, dtype)
        except SchemaError as error:
            text = error.message.removeprefix(f"column {name!r}: ")
            raise SchemaError(f"cast: {text}", column=name, expected=error.expected, got=error.got) from error
        if served.kind not in _NUMBERS:
            raise _refusal(name, "cast: only numbers can be cast", f"one of {', '.join(STORED)}", str(served))
        found[name] = str(served)
    return found


def served_column(column: Column, casts: Casts) -> Column:
    """Return the column as it is served: itself if it is not cast. Raises SchemaError."""
    dtype = casts.get(column.name)
    if dtype is None or dtype == column.dtype:
        return column
    if column.kind in _NUMBERS and dtype not in STORED:
        stated = Column.of(column.name, dtype)
        if (stated.shape or column.shape) != column.shape or stated.nullable > column.nullable:
            raise _refusal(column.name, f"cast: only the dtype can be cast, and this is {column}", "a dtype", dtype)
        return served_column(column, {column.name: stated.dtype or ""})
    if column.kind not in _NUMBERS:
        pictures = column.kind in (Kind.IMAGE, Kind.BYTES)
        hint = "; DecodeImage(dtype=) sets the dtype of decoded images" if pictures else ""
        raise _refusal(column.name, f"cast: only numbers can be cast, and this is {column}{hint}", "no cast", dtype)
    if column.dtype in FLOATS and dtype not in FLOATS:
        reason = (
            f"cast: {column.dtype} has values without an equal {dtype}, such as 0.5; convert the served values instead"
        )
        raise _refusal(column.name, reason, f"one of {', '.join(name for name in STORED if name in FLOATS)}", dtype)
    plain = Column.of(column.name, _user_type(column, dtype))
    metadata = column.arrow.metadata or {}
    kept = {key: metadata[key] for key in (CLASSES_KEY, TOKENIZER_KEY) if key in metadata}
    return replace(plain, arrow=plain.arrow.with_metadata({**plain.arrow.metadata, **kept})) if kept else plain


def served_columns(schema: Schema, casts: Casts) -> dict[str, Column]:
    """Return the columns of a schema that are cast, as they are served. Raises as served_column()."""
    served = ((column, served_column(column, casts)) for column in schema.columns)
    return {column.name: other for column, other in served if other is not column}


def _user_type(column: Column, dtype: str) -> UserType:
    if column.kind is Kind.TENSOR:
        return Tensor(dtype, tuple(d or 0 for d in column.shape), column.nullable)
    if column.kind is Kind.RAGGED:
        return Ragged(dtype, column.shape, column.nullable)
    return f"{dtype}?" if column.nullable else dtype


def cast_kind(kind: int, column: Column, served: Column) -> int:
    """Return the kind of a stream of values for the kernels, with the two dtypes of a cast in its higher bytes."""
    if column.dtype == served.dtype:
        return kind
    return kind | DTYPE_NUMBERS[column.dtype or ""] << 8 | DTYPE_NUMBERS[served.dtype or ""] << 16


def size_ratio(kind: int) -> float:
    """Return the ratio of the served to the stored size of an element, from a kind that cast_kind() returned."""
    sizes = [1, *(STORED[name].itemsize for name in DTYPE_NUMBERS)]
    return sizes[kind >> 16 & 0xFF] / sizes[kind >> 8 & 0xFF]


def raise_cast_error(column: Column, dtype: str, elements: npt.NDArray[Any]) -> NoReturn:
    """Raise SchemaError for the first of a column's stored elements that has no equal in the dtype."""
    got = "another value"
    expected = f"a value with an equal {dtype}"
    try:
        if dtype == "bool":
            wrong = elements[elements > 1] if elements.dtype.kind == "u" else elements[(elements < 0) | (elements > 1)]
            expected, got = "0 or 1", str(wrong[0]) if len(wrong) else got
        else:
            fit(elements, column.dtype or "", dtype)
    except ConversionError as error:
        expected, got = error.expected, error.got
    raise _refusal(column.name, f"cast to {dtype}: a stored value has no equal in it", expected, got)


def _refusal(column: str, message: str, expected: str, got: str) -> SchemaError:
    return SchemaError(f"{message} (takes {expected}, got {got})", column=column, expected=expected, got=got)


# Addresses of several streams: one array, or a sequence with one array per stream.
StreamAddresses: TypeAlias = Addresses | Sequence[Addresses]


@dataclass(frozen=True, slots=True)
class ColumnValues:
    """n values of a column: an array [n, ...], a bfloat16 tensor or a list. valid: None if it is not nullable."""

    column: Column
    values: Any
    valid: npt.NDArray[np.bool_] | None = None

    def record(self, index: int) -> Any:
        """Return the value at index, in its own memory; None for a null."""
        if self.valid is not None and not self.valid[index]:
            return None
        value = self.values[index]
        if len(self.values) > 1 and isinstance(value, np.ndarray):
            return value.copy()
        return value.clone() if hasattr(value, "clone") else value


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a column (as stored, and as served): its streams in some blocks, and the (block, row) of each row."""

    addresses: StreamAddresses
    checks: StreamAddresses | None
    block: Indices
    row: Indices
    column: Column
    served: Column

    def __len__(self) -> int:
        return len(self.row)

    def at(self, stream: int) -> tuple[Addresses, Indices, Indices]:
        return self.addresses[stream], self.block, self.row

    def check(self, stream: int) -> Addresses | None:
        return None if self.checks is None else self.checks[stream]

    def fixed(self, stream: int, width_bytes: int) -> npt.NDArray[np.uint8]:
        out = np.empty(len(self) * width_bytes, np.uint8)
        if width_bytes:
            gather.gather(gather.FIXED, width_bytes, *self.at(stream), out, checks=self.check(stream))
        return out

    def flags(self, stream: int) -> npt.NDArray[np.bool_]:
        out = np.empty(len(self), np.uint8)
        gather.gather(gather.BITS, 0, *self.at(stream), out, checks=self.check(stream))
        return out.view(np.bool_)

    def numbers(self) -> npt.NDArray[Any]:
        """Return the served elements of all rows of a column whose rows have equal lengths."""
        out = np.empty(len(self) * self.served.n_elements, self.served.stored)
        if out.size:
            kind = gather.BITS if self.column.kind is Kind.BOOL else gather.FIXED
            kind = cast_kind(kind, self.column, self.served)
            gather.gather(kind, self.column.row_bytes, *self.at(0), out.view(np.uint8), checks=self.check(0))
        return out

    def elements(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Return the offsets, int64[n + 1], and the served elements of all rows of a RAGGED column."""
        offsets = gather.measure(*self.at(0), self.check(0))
        out = np.empty(int(offsets[-1]), self.served.stored)
        kind, width_bytes = cast_kind(gather.VAR, self.column, self.served), self.column.stored.itemsize
        gather.gather(kind, width_bytes, *self.at(0), out.view(np.uint8), offsets, self.check(0))
        return offsets, out


def gather_values(
    column: Column,
    addresses: StreamAddresses,
    block: Indices,
    row: Indices,
    *,
    url: str,
    checks: StreamAddresses | None = None,
    served: Column | None = None,
) -> ColumnValues:
    """Return the values of rows of a column, which may be in blocks of different shards. Not for ARROW columns.

    addresses, checks: As Blocks.addresses and pending_checks; the caller keeps the memory alive. block: index of each
    row's block in addresses. Raises CorruptShard; or SchemaError for bfloat16 without torch, or a cast that fails.
    """
    served = served or column
    with as_corrupt_shard(column, url):
        rows = _Rows(addresses, checks, block, row, column, served)
        valid = rows.flags(-1) if column.nullable else None
        try:
            values = _HOW[column.kind](served, rows)
        except gather.CastError:
            stored = replace(rows, served=column)
            elements = stored.elements()[1] if column.kind is Kind.RAGGED else stored.numbers()
            raise_cast_error(column, served.dtype or "", elements)
        if valid is not None and not valid.all():
            _blank(values, valid)
    return ColumnValues(served, values, valid)


@contextmanager
def as_corrupt_shard(column: Column, url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorruptShard(f"the local copy cannot be read: {error.strerror}", url=url, column=column.name) from error
    except (gather.CorruptError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, _NotAShapeError) as error:
        raise CorruptShard(str(error), url=url, column=column.name) from error


class _NotAShapeError(ValueError):
    """The shape of a ragged record does not match its number of elements."""


def _blank(values: Any, valid: npt.NDArray[np.bool_]) -> None:
    if isinstance(values, list):
        for index in np.flatnonzero(~valid).tolist():
            values[index] = None
    else:
        values[~valid] = 0


def _numbers(column: Column, rows: _Rows) -> Any:
    return _as_dtype(column, rows.numbers().reshape(len(rows), *(d or 0 for d in column.shape)))


def _as_dtype(column: Column, stored: npt.NDArray[Any]) -> Any:
    """Return stored elements as elements of the column's dtype."""
    if column.dtype == "bool":
        return stored.view(np.bool_) if column.kind is Kind.BOOL else stored != 0  # a tensor's byte may have any value
    if column.dtype != "bfloat16":
        return stored
    tensor = bfloat16_tensor(stored)
    if tensor is None:
        message = "values of dtype bfloat16 are torch tensors: import torch first (numpy has no such dtype)"
        raise SchemaError(message, column=column.name, expected="torch", got="no torch")
    return tensor


def _ragged(column: Column, rows: _Rows) -> list[Any]:
    offsets, flat = rows.elements()
    n_dimensions = len(column.shape)
    shapes = rows.fixed(1, 4 * n_dimensions).view(np.dtype("<i4")).reshape(len(rows), n_dimensions)
    wrong = find_bad_shape(column, shapes, np.diff(offsets))
    if wrong is not None:
        n_elements, shape = offsets[wrong + 1] - offsets[wrong], tuple(shapes[wrong].tolist())
        raise _NotAShapeError(f"{n_elements} elements of the shape {shape} are not {column}")
    elements = _as_dtype(column, flat)
    bounds, dimensions = offsets.tolist(), shapes.tolist()
    return [
        elements[start:end].reshape(shape) for start, end, shape in zip(bounds, bounds[1:], dimensions, strict=False)
    ]


def _bytes(_: Column, rows: _Rows) -> list[Any]:
    return gather.gather_bytes(*rows.at(0), rows.check(0))


def _objects(column: Column, rows: _Rows) -> list[Any]:
    # A null has no text to parse.
    return [json.loads(text) if text else None for text in _bytes(column, rows)]


_HOW: dict[Kind, Callable[[Column, _Rows], Any]] = {
    Kind.SCALAR: _numbers,
    Kind.TENSOR: _numbers,
    Kind.BOOL: _numbers,
    Kind.RAGGED: _ragged,
    Kind.BYTES: _bytes,
    Kind.IMAGE: _bytes,
    Kind.STR: lambda _, rows: gather.gather_str(*rows.at(0), rows.check(0)),
    Kind.JSON: _objects,
}


def arrow_values(column: Column, arrays: Sequence[pa.Array], block: Indices, row: Indices) -> ColumnValues:
    """Return the values of rows of an ARROW column, given as one array per block, as Python objects."""
    values: list[Any] = [None] * len(row)
    for number in np.unique(block).tolist():
        positions = np.flatnonzero(block == number)
        try:
            found = arrays[number].take(pa.array(row[positions])).to_pylist()
        except (OverflowError, ValueError) as error:
            message = f"Python cannot hold a value of the type {column}: {error}; read it as Arrow, with to_arrow()"
            raise SchemaError(message, column=column.name) from error
        for position, value in zip(positions.tolist(), found, strict=True):
            values[position] = value
    valid = np.array([value is not None for value in values], np.bool_) if column.nullable else None
    return ColumnValues(column, values, valid)


def block_values(
    blocks: Blocks, columns: Sequence[int], block: Indices, row: Indices, served: ServedColumns | None = None
) -> list[ColumnValues]:
    """Return the values of rows of loaded blocks, by column; block: positions in blocks.blocks.

    Raises as gather_values; CorruptShard also names the block if a page or an offset is wrong.
    """
    found, checks = [], blocks.pending_checks
    for number in columns:
        column, part = blocks.schema.columns[number], blocks.column_streams(number)
        if column.kind is Kind.ARROW:
            arrays = [blocks.array(position, number) for position in range(len(blocks.blocks))]
            found.append(arrow_values(column, arrays, block, row))
            continue
        left = None if checks is None else checks[part]
        try:
            other = (served or {}).get(column.name)
            found.append(
                gather_values(column, blocks.addresses[part], block, row, url=blocks.url, checks=left, served=other)
            )
        except CorruptShard as error:
            if isinstance(error.__cause__, gather.CorruptError):
                blocks.raise_damage(number, block, row)
            raise
    return found


def as_batch(columns: Sequence[ColumnValues]) -> dict[str, Any]:
    """Return the result of dataset[[...]]: column -> array or list, and "<column>.valid" for nullable columns."""
    batch: dict[str, Any] = {}
    for values in columns:
        batch[values.column.name] = values.values
        if values.valid is not None:
            batch[f"{values.column.name}.valid"] = values.valid
    return batch


def as_records(columns: Sequence[ColumnValues]) -> list[dict[str, Any]]:
    n = len(columns[0].values) if columns else 0
    return [{values.column.name: values.record(index) for values in columns} for index in range(n)]


def join_values(parts: Sequence[Sequence[ColumnValues]], positions: Sequence[NDArray[np.int64]]) -> list[ColumnValues]:
    """Return the values of several reads as one result. positions: Those of each read's values in the result."""
    if len(parts) == 1:  # a single read has its values in order already
        return list(parts[0])
    n = sum(len(position) for position in positions)
    return [_join_column([part[c] for part in parts], positions, n) for c in range(len(parts[0]))]


def _join_column(parts: Sequence[ColumnValues], positions: Sequence[NDArray[np.int64]], n: int) -> ColumnValues:
    first, values = parts[0], _empty_like(parts[0].values, n)
    valid = None if first.valid is None else np.empty(n, np.bool_)
    for part, position in zip(parts, positions, strict=True):
        if isinstance(values, list):
            for at, value in zip(position.tolist(), part.values, strict=True):
                values[at] = value
        else:
            values[position] = part.values
        if valid is not None:
            valid[position] = part.valid
    return ColumnValues(first.column, values, valid)


def _empty_like(like: Any, n: int) -> Any:
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
    parts: Sequence[Sequence[pa.Array]], positions: Sequence[NDArray[np.int64]], schema: Schema
) -> list[pa.Array]:
    """Return the Arrow arrays of several reads as one result, by column; empty arrays without reads."""
    if not parts:
        return [pa.array([], column.arrow.type) for column in schema.columns]
    where = np.concatenate(positions)
    order = np.empty(len(where), np.int64)
    order[where] = np.arange(len(where))
    is_in_order = bool((where[1:] > where[:-1]).all())
    columns = [part[0] if len(part) == 1 else pa.concat_arrays(part) for part in zip(*parts, strict=True)]
    return columns if is_in_order else [column.take(pa.array(order)) for column in columns]
