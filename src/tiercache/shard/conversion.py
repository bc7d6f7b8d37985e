"""Conversion of values to the stored dtype without loss, checks of values for Arrow types, and casts of columns."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.types as pt

from tiercache.errors import SchemaError
from tiercache.shard.schema import (
    CLASSES_KEY,
    FLOATS,
    INTEGERS,
    STORED,
    Column,
    Kind,
    Ragged,
    Schema,
    Tensor,
    UserType,
    check_dtype,
)

# Messages show at most this many characters of a value; an integer may have a million digits.
_GOT_CHARACTERS = 200


class ConversionError(ValueError):
    """A value does not fit its column. index: Index of the record in the batch."""

    def __init__(self, expected: str, got: str, index: int = 0) -> None:
        got = got if len(got) <= _GOT_CHARACTERS else f"{got[:_GOT_CHARACTERS]}..."
        super().__init__(f"expected {expected}, got {got}")
        self.expected = expected
        self.got = got
        self.index = index


def as_numpy(data: Any) -> tuple[npt.NDArray[Any], str] | None:
    """Return array and dtype name of a numpy value, a torch tensor or an object with __array__; else None.

    bfloat16 elements are returned as their bits in uint16. The array may share the object's memory.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.Tensor):
        try:
            tensor = data.detach().cpu()
            if tensor.dtype == torch.bfloat16:
                return tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"
            data = tensor.numpy()
        except (TypeError, RuntimeError) as error:
            got = f"a tensor of {data.dtype}, {data.layout}, on {data.device}"
            raise ConversionError("a dense tensor of a dtype that numpy has", got) from error
    if not isinstance(data, np.ndarray | np.generic):
        if not hasattr(data, "__array__"):
            return None
        try:
            data = np.asarray(data)
        except (TypeError, ValueError, RuntimeError) as error:  # raised by another library's __array__
            raise ConversionError("an object that numpy can read", f"a {type(data).__qualname__}: {error}") from error
    array = np.asarray(data)
    if array.dtype.name == "bfloat16":  # a dtype of ml_dtypes, which need not be installed
        return array.view(np.uint16), "bfloat16"
    return array, array.dtype.name


def fit(array: npt.NDArray[Any], given: str, dtype: str) -> npt.NDArray[Any]:
    """Return the elements of an array of the dtype `given` in the stored form of another dtype.

    The result has the dtype STORED[dtype], and shares the memory if no conversion is necessary. bfloat16 elements are
    given and returned as bits in uint16. Raises ConversionError for an element that does not fit, with its index along
    the first dimension.
    """
    stored = STORED[dtype]
    if given == dtype:
        return array.view(stored) if array.dtype.isnative else array.astype(stored)
    if given not in STORED or "bool" in (given, dtype):
        raise ConversionError(dtype, f"elements of dtype {given}")
    if dtype in INTEGERS:
        if given not in INTEGERS:
            raise ConversionError(dtype, f"elements of dtype {given}")
        return _fit_integers(array, stored, dtype)
    if given == "bfloat16":
        array, given = widen_bfloat16(array), "float32"
    return _fit_integers_to_float(array, dtype) if given in INTEGERS else _fit_floats(array, dtype)


def _fit_integers(array: npt.NDArray[Any], stored: np.dtype[Any], dtype: str) -> npt.NDArray[Any]:
    have, want = np.iinfo(array.dtype), np.iinfo(stored)
    # Compare only with limits that the array's dtype can hold: numpy would widen the array, or refuse the comparison.
    too_low = array.size > 0 and want.min > have.min and int(array.min()) < want.min
    too_high = array.size > 0 and want.max < have.max and int(array.max()) > want.max
    if too_low or too_high:
        wrong = np.zeros(array.shape, bool)
        if too_low:
            wrong |= array < want.min
        if too_high:
            wrong |= array > want.max
        _fail(array, wrong, f"{dtype} ({want.min} to {want.max})")
    return array.astype(stored)


def _fit_integers_to_float(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        out = _fit_floats(array.astype(np.float64), dtype)
        back = widen_bfloat16(out) if dtype == "bfloat16" else out
        # Above 2**53, float64 rounds, so several integers compare equal to one float: compare as Python integers.
        exact = back.astype(np.float64) == array
        if array.size and max(int(array.max()), -int(array.min())) > 2**53:
            exact = np.array([int(a) == int(b) for a, b in zip(array.flat, back.flat, strict=True)]).reshape(
                array.shape
            )
    if not exact.all():
        _fail(array, ~exact, f"an integer that {dtype} holds exactly")
    return out


def _fit_floats(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype not in FLOATS:
        raise ConversionError(dtype, f"elements of dtype {array.dtype.name}")
    with np.errstate(over="ignore", invalid="ignore"):
        out = round_to_bfloat16(array) if dtype == "bfloat16" else array.astype(STORED[dtype])
        infinite = np.isinf(widen_bfloat16(out) if dtype == "bfloat16" else out)
    if infinite.any() and (infinite & ~np.isinf(array)).any():
        _fail(array, infinite & ~np.isinf(array), f"a number within the range of {dtype}")
    return out


def round_to_bfloat16(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 values, ties to even. array: Array of any float dtype."""
    single = array.astype(np.float32)
    bits = single.view(np.uint32)
    if array.dtype.itemsize > 4:
        # Rounding twice (to float32, then to bfloat16) would turn near-ties into ties. So the first rounding is "to
        # odd": toward zero, with the last bit set if the result is inexact.
        inexact = np.isfinite(single) & (single.astype(array.dtype) != array)
        away = inexact & (np.abs(single.astype(array.dtype)) > np.abs(array))
        bits = (bits - away.astype(np.uint32)) | inexact.astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(single), quiet_nan, rounded).astype(np.uint16)


def bfloat16_tensor(bits: npt.NDArray[Any]) -> Any:
    """Return the torch tensor of these bits of bfloat16 elements, in the same memory; None if torch is not imported.

    numpy has no such dtype. The function does not import torch: a program that has no torch cannot use the tensor.
    """
    torch = sys.modules.get("torch")
    return None if torch is None else torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def widen_bfloat16(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the float32 values that equal bfloat16 values, given by their bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _fail(array: npt.NDArray[Any], wrong: npt.NDArray[Any], expected: str) -> NoReturn:
    position = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    raise ConversionError(expected, str(array[position].item()), int(position[0]) if position else 0)


_BYTES = bytes | bytearray | memoryview
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 1}


def check_value(arrow_type: pa.DataType, value: Any) -> None:
    """Raise ConversionError unless the Arrow type can hold a value, including nested values, without loss."""
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if value is None:
        return
    fits = next((fits for is_type, fits in _CHECKS if is_type(arrow_type)), None)
    if fits is not None and not fits(arrow_type, value):
        what = f"a {type(value).__qualname__}"
        shown = what if isinstance(value, Mapping | Sequence | np.ndarray) else f"{what}, {value!r}"
        raise ConversionError(str(arrow_type), shown)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _fits_float(arrow_type: pa.DataType, value: Any) -> bool:
    if not isinstance(value, float | np.floating):
        return _is_integer(value)
    largest = float(np.finfo(arrow_type.to_pandas_dtype()).max)
    return not math.isfinite(value) or abs(float(value)) <= largest


def _fits_moment(python: type, numpy: type | None) -> Callable[[pa.DataType, Any], bool]:
    """Return the check of timestamps, times or durations: the unit must hold the value exactly."""

    def fits(arrow_type: pa.DataType, value: Any) -> bool:
        if not isinstance(value, python):
            return _is_integer(value) or (numpy is not None and isinstance(value, numpy))
        micro = getattr(value, "microsecond", 0) + getattr(value, "microseconds", 0)
        # pandas' subclasses of datetime and timedelta have nanoseconds.
        nano = getattr(value, "nanosecond", 0) + getattr(value, "nanoseconds", 0)
        return not micro % _MICROSECONDS[arrow_type.unit] and (arrow_type.unit == "ns" or not nano)

    return fits


def _fits_date(_: pa.DataType, value: Any) -> bool:
    if isinstance(value, dt.datetime):
        return value.time() == dt.time() and not getattr(value, "nanosecond", 0)
    return isinstance(value, dt.date | np.datetime64) or _is_integer(value)


def _fits_list(arrow_type: pa.DataType, value: Any) -> bool:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | _BYTES):
        return False
    if isinstance(value, np.ndarray) and not value.ndim:
        return False
    for item in value:
        _check_field(arrow_type.value_field, item)
    return True


def _fits_struct(arrow_type: pa.DataType, value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    fields = {field.name: field for field in arrow_type}
    if unknown := [key for key in value if key not in fields]:
        raise ConversionError(str(arrow_type), f"the unknown key {unknown[0]!r}")
    for name, field in fields.items():
        _check_field(field, value.get(name))
    return True


def _fits_map(arrow_type: pa.DataType, value: Any) -> bool:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        return False
    for key, item in pairs:
        _check_field(arrow_type.key_field, key)
        _check_field(arrow_type.item_field, item)
    return True


def _check_field(field: pa.Field, value: Any) -> None:
    if value is None and not field.nullable:
        raise ConversionError(f"{field.type}, never null", f"None for {field.name!r}")
    check_value(field.type, value)


def _is_list(arrow_type: pa.DataType) -> bool:
    return bool(pt.is_list(arrow_type) or pt.is_large_list(arrow_type) or pt.is_fixed_size_list(arrow_type))


def _is_binary(arrow_type: pa.DataType) -> bool:
    binary = pt.is_binary(arrow_type) or pt.is_large_binary(arrow_type) or pt.is_fixed_size_binary(arrow_type)
    return bool(binary and not pt.is_decimal(arrow_type))


# Arrow itself checks the types that are missing here (intervals), and refuses a datetime64 of another unit, and an
# integer or a decimal with too many digits.
_CHECKS: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType, Any], bool]], ...] = (
    (pt.is_null, lambda *_: False),
    (pt.is_boolean, lambda _, value: isinstance(value, bool | np.bool_)),
    (pt.is_integer, lambda _, value: _is_integer(value)),
    (pt.is_floating, _fits_float),
    (pt.is_decimal, lambda _, value: isinstance(value, Decimal) or _is_integer(value)),
    (lambda t: pt.is_string(t) or pt.is_large_string(t), lambda _, value: isinstance(value, str)),
    (_is_binary, lambda _, value: isinstance(value, _BYTES)),
    (pt.is_timestamp, _fits_moment(dt.datetime, np.datetime64)),
    (pt.is_date, _fits_date),
    (pt.is_time, _fits_moment(dt.time, None)),
    (pt.is_duration, _fits_moment(dt.timedelta, np.timedelta64)),
    (_is_list, _fits_list),
    (pt.is_struct, _fits_struct),
    (pt.is_map, _fits_map),
)


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
    """Return the casts that a user states, with dtypes by name. Raises TypeError and SchemaError."""
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
    """Return the column as it is served: itself if it is not cast.

    Raises SchemaError if it cannot be cast to this dtype; the message lists what is possible.
    """
    dtype = casts.get(column.name)
    if dtype is None or dtype == column.dtype:
        return column
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
