"""Infers column types from values and from Arrow types. Pure functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from tiercache.errors import SchemaError
from tiercache.shard.spec import STORED, SUPPORTED_TYPES, Ragged, Tensor, UserType

_PYTHON_TYPES: dict[type, str] = {bool: "bool", int: "int64", float: "float64", str: "str", dict: "json"}


def type_of_value(name: str, value: object) -> UserType:
    """Return the type of a column that has this value in a record.

    Raises:
        SchemaError: The value is None, which has no type, or an object whose type cannot be inferred.
    """
    for python_type, text in _PYTHON_TYPES.items():
        if type(value) is python_type:
            return text
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes"
    shape = _shape_of(value)
    if shape is not None:
        dtype = _dtype_name(name, value)
        return Tensor(dtype, shape) if shape else dtype
    hint = (
        "; a list may be a Ragged, a Tensor, json or an Arrow list: pass a schema"
        if isinstance(value, list | tuple)
        else ""
    )
    got = "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
    raise SchemaError(
        f"cannot infer the column's type from {got}{hint}", column=name, expected=SUPPORTED_TYPES, got=got
    )


def type_of_column(name: str, values: Any) -> UserType:
    """Return the type of a column with these values: a numpy or Arrow array, a torch tensor, or a list.

    Raises:
        SchemaError: The type cannot be inferred, or the values have different types.
    """
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return pa.field(name, values.type, nullable=values.null_count > 0)
    if isinstance(values, np.ndarray) and values.dtype.kind in "OUMm":
        if values.dtype.kind in "Mm":
            return pa.from_numpy_dtype(values.dtype)
        values = values.tolist()
    shape = _shape_of(values)
    if shape is None and hasattr(values, "__array__"):  # for example a pandas Series
        return type_of_column(name, np.asarray(values))
    if shape is not None:
        if not shape:
            raise SchemaError(
                "a column of a batch is an array with a first dimension of records, or a list", column=name
            )
        dtype = _dtype_name(name, values)
        return Tensor(dtype, shape[1:]) if shape[1:] else dtype
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray | memoryview):
        got = type(values).__qualname__
        raise SchemaError(
            f"a column of a batch is an array or a list, got {got}", column=name, expected="an array or a list", got=got
        )
    return _type_of_list(name, values)


def _type_of_list(name: str, values: Sequence[object]) -> UserType:
    """Return a type for all values of a list. It may mix int and float, or arrays of one dtype and several shapes."""
    found: UserType | None = None
    for record, value in enumerate(values):
        if value is None:
            continue
        here = type_of_value(name, value)
        joined = here if found is None else _join(found, here)
        if joined is None:
            raise SchemaError(
                f"expected {found}, like the records before, got {here}",
                column=name,
                record=record,
                expected=str(found),
                got=str(here),
            )
        found = joined
    if found is None:
        raise SchemaError(
            "cannot infer the column's type: no value, or only nulls", column=name, expected=SUPPORTED_TYPES, got="None"
        )
    return _nullable(found) if any(value is None for value in values) else found


def _join(first: UserType, second: UserType) -> UserType | None:
    if first == second:
        return first
    if {first, second} == {"int64", "float64"}:
        return "float64"
    if isinstance(first, Tensor | Ragged) and isinstance(second, Tensor):
        if first.dtype != second.dtype or len(first.shape) != len(second.shape):
            return None
        shape = tuple(a if a == b else None for a, b in zip(first.shape, second.shape, strict=True))
        return Ragged(first.dtype, shape) if None in shape else first
    return None


def _nullable(user: UserType) -> UserType:
    if isinstance(user, Tensor):
        return Tensor(user.dtype, user.shape, nullable=True)
    if isinstance(user, Ragged):
        return Ragged(user.dtype, user.shape, nullable=True)
    return f"{user}?"


def _shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a numpy scalar or array, or of a torch tensor; None for any other object."""
    torch = sys.modules.get("torch")
    if isinstance(value, np.ndarray | np.generic) or (torch is not None and isinstance(value, torch.Tensor)):
        return tuple(value.shape)
    return None


def _dtype_name(name: str, value: Any) -> str:
    text = str(value.dtype).removeprefix("torch.")
    text = np.dtype(text).name if text[:1] in "<>=|" else text
    if text in STORED:
        return text
    raise SchemaError(
        f"elements of dtype {value.dtype} cannot be stored", column=name, expected=SUPPORTED_TYPES, got=str(value.dtype)
    )


def type_of_arrow(arrow_type: pa.DataType) -> UserType:
    """Return the column type that corresponds to an Arrow type; the Arrow type itself if there is none."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return _type_of_extension(arrow_type)
    if pt.is_dictionary(arrow_type):
        return type_of_arrow(arrow_type.value_type)
    if pt.is_boolean(arrow_type):
        return "bool"
    if pt.is_integer(arrow_type) or pt.is_floating(arrow_type):
        return _element_name(arrow_type)
    if pt.is_string(arrow_type) or pt.is_large_string(arrow_type) or pt.is_string_view(arrow_type):
        return "str"
    if pt.is_binary(arrow_type) or pt.is_large_binary(arrow_type) or pt.is_binary_view(arrow_type):
        return "bytes"
    if pt.is_fixed_size_list(arrow_type):
        return _type_of_fixed_list(arrow_type)
    return arrow_type


def _element_name(arrow_type: pa.DataType) -> str:
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(arrow_type), str(arrow_type))


def _type_of_fixed_list(arrow_type: pa.DataType) -> UserType:
    """Return a Tensor for fixed-size lists of numbers of any depth; the Arrow type itself for other lists."""
    shape: list[int] = []
    inner = arrow_type
    while pt.is_fixed_size_list(inner):
        shape.append(inner.list_size)
        inner = inner.value_type
    if not (pt.is_integer(inner) or pt.is_floating(inner)):
        return arrow_type
    return Tensor(_element_name(inner), tuple(shape))


def _type_of_extension(arrow_type: pa.BaseExtensionType) -> UserType:
    name = arrow_type.extension_name
    if name == "arrow.fixed_shape_tensor" and arrow_type.permutation is None:
        return Tensor(_element_name(arrow_type.value_type), tuple(arrow_type.shape))
    if name == "arrow.json":
        return "json"
    if name == "arrow.bool8":
        return "bool"
    return type_of_arrow(arrow_type.storage_type)
