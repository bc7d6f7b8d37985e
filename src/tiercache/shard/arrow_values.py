"""Checks whether a Python value fits an Arrow type, for columns of Kind.ARROW.

Arrow itself converts with silent loss: it turns 1.5 into a day, drops the time from a datetime for a date column, and
drops unknown keys of a struct.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from tiercache.shard.fit import ConversionError

_BYTES = bytes | bytearray | memoryview
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 1}


def check_value(arrow_type: pa.DataType, value: Any) -> None:
    """Check that the Arrow type can hold a value, including nested values, without loss.

    Raises:
        ConversionError: The value has another type, or would lose information.
    """
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


def _fits_timestamp(arrow_type: pa.DataType, value: Any) -> bool:
    if isinstance(value, dt.datetime):
        return not value.microsecond % _MICROSECONDS[arrow_type.unit] and _fits_nanosecond(arrow_type, value)
    return isinstance(value, np.datetime64) or _is_integer(value)


def _fits_nanosecond(arrow_type: pa.DataType, value: Any) -> bool:
    """Return whether the unit can hold the nanoseconds that the pandas subclasses of datetime and timedelta have."""
    return arrow_type.unit == "ns" or not getattr(value, "nanosecond", 0) + getattr(value, "nanoseconds", 0)


def _fits_date(_: pa.DataType, value: Any) -> bool:
    if isinstance(value, dt.datetime):
        return value.time() == dt.time() and not getattr(value, "nanosecond", 0)
    return isinstance(value, dt.date | np.datetime64) or _is_integer(value)


def _fits_time(arrow_type: pa.DataType, value: Any) -> bool:
    if isinstance(value, dt.time):
        return not value.microsecond % _MICROSECONDS[arrow_type.unit]
    return _is_integer(value)


def _fits_duration(arrow_type: pa.DataType, value: Any) -> bool:
    if isinstance(value, dt.timedelta):
        return not value.microseconds % _MICROSECONDS[arrow_type.unit] and _fits_nanosecond(arrow_type, value)
    return isinstance(value, np.timedelta64) or _is_integer(value)


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
    (pt.is_timestamp, _fits_timestamp),
    (pt.is_date, _fits_date),
    (pt.is_time, _fits_time),
    (pt.is_duration, _fits_duration),
    (_is_list, _fits_list),
    (pt.is_struct, _fits_struct),
    (pt.is_map, _fits_map),
)
