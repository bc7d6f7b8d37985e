"""Casts: columns served as another dtype than they are stored as, without losing a value unseen (csrc/cast.h).

Integers, bool among them as 0 and 1, become integers or floats that are equal; floats become floats, rounded once. A
value that has no equal, or would become infinite, is an error when it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

import numpy.typing as npt

from tiercache.errors import SchemaError
from tiercache.shard.fit import MisfitError, fit
from tiercache.shard.spec import FLOATS, STORED, Kind, Ragged, Tensor, UserType, check_dtype
from tiercache.shard.types import CLASSES_KEY, Column, Schema

Casts: TypeAlias = Mapping[str, str]
"""Column -> dtype. A column that has it already is served as it is stored."""
Served: TypeAlias = Mapping[str, Column]
"""Column -> as what it is served, only those that are cast."""

# As csrc/cast.h numbers them.
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


def checked_casts(casts: object) -> dict[str, str]:
    """What the user says, with dtypes by name.

    Raises:
        TypeError: not a mapping.
        SchemaError: no such dtype.
    """
    if casts is None:
        return {}
    if not isinstance(casts, Mapping):
        raise TypeError(f"cast is a mapping from column names to dtypes, got {type(casts).__name__}")
    found = {}
    for name, dtype in casts.items():
        try:
            found[str(name)] = check_dtype(dtype)
        except SchemaError as error:
            raise _refusal(str(name), "cast: no such dtype", f"one of {', '.join(STORED)}", repr(dtype)) from error
    return found


def served_column(column: Column, casts: Casts) -> Column:
    """The column as it is served: itself where it is not cast.

    Raises:
        SchemaError: a column that cannot be cast so; the message says what can.
    """
    dtype = casts.get(column.name)
    if dtype is None or dtype == column.dtype:
        return column
    if column.kind not in _NUMBERS:
        pictures = column.kind in (Kind.IMAGE, Kind.BYTES)
        hint = "; decoded pictures have the dtype that DecodeImage(dtype=) says" if pictures else ""
        raise _refusal(column.name, f"cast: only numbers are cast, and this is {column}{hint}", "no cast", dtype)
    if column.dtype in FLOATS and dtype not in FLOATS:
        why = f"cast: {column.dtype} has values that no {dtype} is equal to, such as 0.5; convert what is served"
        raise _refusal(column.name, why, f"one of {', '.join(name for name in STORED if name in FLOATS)}", dtype)
    plain = Column.of(column.name, _user_type(column, dtype))
    names = (column.arrow.metadata or {}).get(CLASSES_KEY)
    if names is None:
        return plain
    return dataclasses.replace(plain, arrow=plain.arrow.with_metadata({**plain.arrow.metadata, CLASSES_KEY: names}))


def served_columns(schema: Schema, casts: Casts) -> dict[str, Column]:
    """The columns of a schema that are cast, as they are served. Raises as served_column."""
    served = ((column, served_column(column, casts)) for column in schema.columns)
    return {column.name: other for column, other in served if other is not column}


def _user_type(column: Column, dtype: str) -> UserType:
    if column.kind is Kind.TENSOR:
        return Tensor(dtype, tuple(d or 0 for d in column.shape), column.nullable)
    if column.kind is Kind.RAGGED:
        return Ragged(dtype, column.shape, column.nullable)
    return f"{dtype}?" if column.nullable else dtype


def cast_kind(kind: int, column: Column, served: Column) -> int:
    """The kind of a stream of values, with what the kernels are told of a cast in its higher bytes."""
    if column.dtype == served.dtype:
        return kind
    return kind | DTYPE_NUMBERS[column.dtype or ""] << 8 | DTYPE_NUMBERS[served.dtype or ""] << 16


def growth(kind: int) -> float:
    """How many times as large elements are when they are served, by the kind that cast_kind gave."""
    sizes = [1, *(STORED[name].itemsize for name in DTYPE_NUMBERS)]
    return sizes[kind >> 16 & 0xFF] / sizes[kind >> 8 & 0xFF]


def refuse_misfit(column: Column, dtype: str, elements: npt.NDArray[Any]) -> NoReturn:
    """Say which of a column's stored elements has no equal in the dtype.

    Raises:
        SchemaError: always.
    """
    got = "a value that has none"
    expected = f"a {dtype} that is equal"
    try:
        if dtype == "bool":
            wrong = elements[elements > 1] if elements.dtype.kind == "u" else elements[(elements < 0) | (elements > 1)]
            expected, got = "0 or 1", str(wrong[0]) if len(wrong) else got
        else:
            fit(elements, column.dtype or "", dtype)
    except MisfitError as error:
        expected, got = error.expected, error.got
    raise _refusal(column.name, f"cast to {dtype}: a stored value has no equal in it", expected, got)


def _refusal(column: str, message: str, expected: str, got: str) -> SchemaError:
    return SchemaError(f"{message} (takes {expected}, got {got})", column=column, expected=expected, got=got)
