"""Converts a user's values of a column (arrays, lists, Arrow, tensors, single values) to stored form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native.records import join
from tiercache.shard.arrow_ingest import StoredArray, convert_arrow, convert_stored
from tiercache.shard.arrow_values import check_value
from tiercache.shard.fit import ConversionError, as_numpy, fit
from tiercache.shard.parts import ColumnData, shapes_of
from tiercache.shard.spec import FLOATS, INTEGERS, STORED, Kind
from tiercache.shard.types import Column

Array: TypeAlias = npt.NDArray[Any]
_ARROW_REFUSES = (pa.ArrowException, TypeError, ValueError, OverflowError)
_BYTES_LIKE = (Kind.BYTES, Kind.IMAGE, Kind.STR, Kind.JSON)


def convert_column(column: Column, data: Any) -> ColumnData:
    """Return a column of a batch in stored form. Numpy and Arrow memory is shared if no conversion is necessary.

    Raises:
        ConversionError: A value does not fit the column.
    """
    if isinstance(data, StoredArray):
        return convert_column(column, data.array) if column.kind is Kind.JSON else convert_stored(column, data)
    if isinstance(data, pa.Array | pa.ChunkedArray):
        return _part_of_list(column, _parsed(data)) if column.kind is Kind.JSON else convert_arrow(column, data)
    if isinstance(data, list | tuple):
        return _part_of_list(column, data)
    found = as_numpy(data)
    if found is not None:
        return _part_of_numpy(column, *found)
    if isinstance(data, Sequence) and not isinstance(data, str | bytes | bytearray | memoryview):
        return _part_of_list(column, list(data))
    raise ConversionError(f"an array or a list of {column}", _type_name(data))


def _parsed(data: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the objects of a JSON column that is given as Arrow. A string is JSON text; other values are objects."""
    values: list[Any] = data.to_pylist()
    for index, value in enumerate(values):
        if isinstance(value, str):
            try:
                values[index] = json.loads(value)
            except ValueError as error:
                raise ConversionError("JSON text", str(error), index) from error
    return values


def _part_of_numpy(column: Column, array: Array, dtype: str) -> ColumnData:
    if array.ndim == 0:
        raise ConversionError(f"an array or a list of {column}", "a single value")
    if array.dtype.kind in "OU" or column.kind in _BYTES_LIKE:
        return _part_of_list(column, array.tolist())
    if column.kind is Kind.ARROW:
        try:
            return convert_arrow(column, pa.array(array))
        except (pa.ArrowException, TypeError) as error:
            raise ConversionError(str(column), f"elements of dtype {array.dtype}") from error
    n, shape = len(array), array.shape[1:]
    _check_shape(column, shape)
    stored = np.ascontiguousarray(fit(array, dtype, column.dtype or ""))
    if column.kind is Kind.RAGGED:
        offsets = np.arange(n + 1, dtype=np.int64) * math.prod(shape)
        return ColumnData(n, stored.reshape(-1), offsets, shapes_of(column, n, shape))
    return ColumnData(n, stored if column.kind is Kind.BOOL else stored.reshape(n, column.n_elements))


def _check_shape(column: Column, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(column.shape)
    if fits and all(want in (None, have) for want, have in zip(column.shape, shape, strict=True)):
        return
    raise ConversionError(str(column), f"the shape {shape}" if shape else "a single number")


def _part_of_list(column: Column, values: Sequence[Any]) -> ColumnData:
    fast = _plain_numbers(column, values) if column.kind is Kind.SCALAR else None
    if fast is not None:
        return ColumnData(len(values), fast.reshape(-1, 1))
    if column.kind in _BYTES_LIKE and column.kind is not Kind.JSON:
        joined = join(values, text=column.kind is Kind.STR, nullable=column.nullable)  # None: a value needs conversion
        if joined is not None:
            return ColumnData(len(values), joined[0], joined[1], valid=joined[2])
    if column.kind is Kind.ARROW:
        return _arrow_part_of_list(column, values)
    return build_column_data(column, _each(values, value_converter(column)))


def _each(values: Sequence[Any], convert: Callable[[Any], Any]) -> list[Any]:
    """Return convert(value) for each value. A ConversionError gets the index of its value."""
    converted = []
    for index, value in enumerate(values):
        try:
            converted.append(convert(value))
        except ConversionError as error:
            error.index = index
            raise
    return converted


def _plain_numbers(column: Column, values: Sequence[Any]) -> Array | None:
    """Convert a list of plain ints to an integer column, or of floats to a float column; None for all other lists."""
    types = set(map(type, values))
    try:
        if types == {int} and column.dtype in INTEGERS:
            return fit(np.array(values, np.int64), "int64", column.dtype)
        if types == {float} and column.dtype in FLOATS:
            return fit(np.array(values, np.float64), "float64", column.dtype)
    except OverflowError:
        return None
    return None


def value_converter(column: Column) -> Callable[[Any], Any]:
    """Return a function that converts a value for build_column_data(): to bytes, an array, a Python value, or None.

    The function raises ConversionError if the value does not fit. An array may share the value's memory.
    """
    scalar = column.kind is Kind.SCALAR
    plain = _number_converter(column) if scalar else partial(_CONVERTERS[column.kind], column)
    if not column.nullable:
        return plain  # it rejects None, except in a JSON column, where None is the JSON null
    return lambda value: None if value is None else plain(value)


def _number_converter(column: Column) -> Callable[[Any], Any]:
    dtype, stored = column.dtype or "", column.stored
    integer = dtype in INTEGERS
    low, high = _limits(dtype)

    def convert(value: Any) -> Any:
        # The common cases come first: the general conversion costs ten times as much.
        kind = type(value)
        if kind is (int if integer else float) and low <= value <= high:
            return value
        if isinstance(value, np.generic) and value.dtype == stored and dtype != "bfloat16":
            return value
        if integer and kind is int:
            raise ConversionError(f"{dtype} ({low} to {high})", str(value))
        return _fit_value(column, value).reshape(-1)[0]

    return convert


def _limits(dtype: str) -> tuple[Any, Any]:
    """Return the range of numbers that numpy itself converts correctly to the stored dtype; empty for bfloat16."""
    if dtype == "bfloat16":
        return 1, 0
    info = np.iinfo(STORED[dtype]) if dtype in INTEGERS else np.finfo(STORED[dtype])  # type: ignore[type-var]
    return (int(info.min), int(info.max)) if dtype in INTEGERS else (float(info.min), float(info.max))


def _fit_value(column: Column, value: Any) -> Array:
    """Return a value as an array of stored elements, after its shape is checked."""
    # The common case comes first: the general conversion costs ten times as much. Stored bool and bfloat16 elements
    # have integer dtypes, so an equal dtype does not mean that the value fits.
    usual = type(value) is np.ndarray and value.shape == column.shape and value.dtype == column.stored
    if usual and column.dtype not in ("bool", "bfloat16"):
        plain: Array = value
        return plain
    found = as_numpy(value)
    if found is None:
        found = _numpy_of_python(column, value)
    array, dtype = found
    _check_shape(column, array.shape)
    return np.ascontiguousarray(fit(np.atleast_1d(array), dtype, column.dtype or "")).reshape(array.shape)


def _numpy_of_python(column: Column, value: Any) -> tuple[Array, str]:
    if type(value) not in (bool, int, float, list, tuple):
        raise ConversionError(str(column), _type_name(value))
    if isinstance(value, list | tuple) and not column.shape:
        raise ConversionError(str(column), _type_name(value))
    try:
        array = np.array(value)
    except ValueError as error:
        raise ConversionError(str(column), "a list of lists of different lengths") from error
    if array.size == 0:  # numpy infers float64 for an empty list
        return np.zeros(array.shape, column.stored), column.dtype or ""
    if array.dtype.kind not in "biuf":
        raise ConversionError(str(column), f"a {type(value).__name__} of {array.dtype}, or numbers beyond 64 bits")
    if (array.dtype.kind == "f" and column.dtype in INTEGERS) or _lost(array, value):
        what = f"a {type(value).__name__}"
        raise ConversionError(
            str(column), f"{what} with elements of other types" if array.ndim else f"{what}, {value!r}"
        )
    return array, array.dtype.name


def _lost(array: Array, value: Any) -> bool:
    """Return whether numpy has turned bools into numbers or rounded integers, in a list of several types."""
    if array.dtype.kind == "b":
        return False
    rounds = array.dtype.kind == "f"
    return any(
        type(item) is bool or (rounds and type(item) is int and int(float(item)) != item) for item in _leaves(value)
    )


def _leaves(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return (value,)
    if value and isinstance(value[0], list | tuple):
        return (leaf for item in value for leaf in _leaves(item))
    return value


def _convert_bool(_: Column, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    found = as_numpy(value)
    if found is None or found[1] != "bool" or found[0].ndim:
        raise ConversionError("bool", _type_name(value))
    return bool(found[0])


def _convert_bytes(column: Column, value: Any) -> bytes:
    if type(value) is bytes:
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise ConversionError(str(column), _type_name(value))


def _convert_str(_: Column, value: Any) -> bytes:
    if not isinstance(value, str):
        raise ConversionError("str", _type_name(value))
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ConversionError("a str that UTF-8 can hold", f"a lone surrogate at {error.start}") from error


def _convert_json(_: Column, value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        _check_keys(value)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversionError("an object that JSON can hold", f"{_type_name(value)}: {error}") from error


def _check_keys(value: Any) -> None:
    """Raise TypeError for a key that is not a str; json.dumps would silently turn it into one."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys must be str, not {type(key).__name__}")
        value = value.values()
    if isinstance(value, Mapping | list | tuple) or type(value) is type({}.values()):
        for item in value:
            _check_keys(item)


def _convert_arrow(column: Column, value: Any) -> pa.Array:
    if value is None and not column.nullable:
        raise ConversionError(str(column), _type_name(value))
    check_value(column.arrow.type, value)
    try:
        return pa.array([value], column.arrow.type)
    except _ARROW_REFUSES as error:
        raise ConversionError(str(column), f"{_type_name(value)}: {error}") from error


_CONVERTERS: dict[Kind, Callable[[Column, Any], Any]] = {
    Kind.BOOL: _convert_bool,
    Kind.TENSOR: _fit_value,
    Kind.RAGGED: _fit_value,
    Kind.BYTES: _convert_bytes,
    Kind.IMAGE: _convert_bytes,
    Kind.STR: _convert_str,
    Kind.JSON: _convert_json,
    Kind.ARROW: _convert_arrow,
}


def build_column_data(column: Column, converted: Sequence[Any]) -> ColumnData:
    """Join the results of value_converter() into column data in new memory. A null is stored as zeros, or as empty."""
    n = len(converted)
    valid = None
    if column.nullable and None in map(_none_or_not, converted):
        valid = np.fromiter((value is not None for value in converted), bool, n)
    if column.kind is Kind.ARROW:
        null = pa.nulls(1, column.arrow.type)
        arrays = [null if value is None else value for value in converted]
        return ColumnData(n, array=pa.concat_arrays(arrays) if arrays else pa.array([], column.arrow.type))
    if column.kind in _BYTES_LIKE:
        pieces = [value or b"" for value in converted]
        values = np.frombuffer(b"".join(pieces), np.uint8)
        return ColumnData(n, values, _offsets(np.fromiter(map(len, pieces), np.int64, n)), valid=valid)
    if column.kind is Kind.RAGGED:
        return _build_ragged(column, converted, valid)
    zero: Any = np.zeros(column.shape, column.stored) if column.kind is Kind.TENSOR else 0
    values = np.array([zero if value is None else value for value in converted], column.stored)
    return ColumnData(n, values if column.kind is Kind.BOOL else values.reshape(n, column.n_elements), valid=valid)


def _none_or_not(value: Any) -> bool | None:
    return None if value is None else True


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _build_ragged(column: Column, converted: Sequence[Any], valid: Array | None) -> ColumnData:
    empty = np.zeros([d or 0 for d in column.shape], column.stored)
    arrays = [empty if value is None else value for value in converted]
    runs = [array.reshape(-1) for array in arrays] or [empty.reshape(-1)]
    lengths = np.array([array.size for array in arrays], np.int64)
    shapes = np.array([array.shape for array in arrays], STORED["int32"]).reshape(len(arrays), len(column.shape))
    return ColumnData(len(arrays), np.concatenate(runs), _offsets(lengths), shapes, valid)


def _arrow_part_of_list(column: Column, values: Sequence[Any]) -> ColumnData:
    _each(values, partial(check_value, column.arrow.type))
    try:
        return convert_arrow(column, pa.array(values, column.arrow.type))
    except ConversionError:
        raise
    except _ARROW_REFUSES as error:
        _each(values, value_converter(column))  # finds the bad value, which Arrow does not name
        raise ConversionError(str(column), f"a list that Arrow cannot convert: {error}") from error


def _type_name(value: Any) -> str:
    name = type(value).__qualname__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"
