"""Casts: columns that are served with another dtype than the stored one (see csrc/cast.h).

An integer (or a bool, as 0 or 1) becomes an equal integer or float. A float becomes a float, rounded once. When a value
is read that has no equal, or that would become infinite, the reader raises an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

import numpy.typing as npt

from tiercache.errors import SchemaError
from tiercache.shard.fit import ConversionError, fit
from tiercache.shard.spec import FLOATS, STORED, Kind, Ragged, Tensor, UserType, check_dtype
from tiercache.shard.types import CLASSES_KEY, Column, Schema

Casts: TypeAlias = Mapping[str, str]
"""Column name -> dtype. A column that has this dtype already is served as it is stored."""
ServedColumns: TypeAlias = Mapping[str, Column]
"""Column name -> column as it is served, for the columns that are cast."""

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
    """Return the casts that a user states, with dtypes by name.

    Raises:
        TypeError: The casts are not a mapping.
        SchemaError: A dtype does not exist.
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
    """Return the column as it is served: the column itself if it is not cast.

    Raises:
        SchemaError: The column cannot be cast to this dtype; the message lists what is possible.
    """
    dtype = casts.get(column.name)
    if dtype is None or dtype == column.dtype:
        return column
    if column.kind not in _NUMBERS:
        pictures = column.kind in (Kind.IMAGE, Kind.BYTES)
        hint = "; DecodeImage(dtype=) sets the dtype of decoded images" if pictures else ""
        raise _refusal(column.name, f"cast: only numbers can be cast, and this is {column}{hint}", "no cast", dtype)
    if column.dtype in FLOATS and dtype not in FLOATS:
        why = (
            f"cast: {column.dtype} has values without an equal {dtype}, such as 0.5; convert the served values instead"
        )
        raise _refusal(column.name, why, f"one of {', '.join(name for name in STORED if name in FLOATS)}", dtype)
    plain = Column.of(column.name, _user_type(column, dtype))
    names = (column.arrow.metadata or {}).get(CLASSES_KEY)
    if names is None:
        return plain
    return dataclasses.replace(plain, arrow=plain.arrow.with_metadata({**plain.arrow.metadata, CLASSES_KEY: names}))


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
