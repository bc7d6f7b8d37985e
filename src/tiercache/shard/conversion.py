"""Values of a user (arrays, lists, Arrow, tensors, single values): their types, and their stored form without loss."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tiercache._native.block_builder import join
from tiercache.errors import SchemaError
from tiercache.shard.schema import (
    FLOATS,
    INTEGERS,
    STORED,
    SUPPORTED_TYPES,
    TYPE_KEY,
    BFloat16Type,
    Column,
    Image,
    Kind,
    PlainType,
    Ragged,
    Schema,
    Tensor,
    UserType,
    check_mapping,
    find_bad_shape,
    is_list,
    storable_type,
)
from tiercache.shard.shard_file import ColumnData, shapes_of

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
    """Return the elements of an array of the dtype `given` in the stored form of another dtype (bfloat16: as bits).

    The memory is shared if nothing is converted. Raises ConversionError with the index along the first dimension.
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
    """Return the torch tensor over these bits of bfloat16; None if torch is not imported: numpy has no such dtype."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def widen_bfloat16(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the float32 values that equal bfloat16 values, given by their bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _fail(array: npt.NDArray[Any], wrong: npt.NDArray[Any], expected: str) -> NoReturn:
    position = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    raise ConversionError(expected, str(array[position].item()), int(position[0]) if position else 0)


_BYTES = bytes | bytearray | memoryview


def _holds(arrow_type: pa.DataType, value: Any, stored: Any) -> bool:
    """Return whether Arrow has stored a value as it is.

    Arrow changes many values without an error: 1.5 in a list to 1, a datetime to whole seconds, 1e300 to infinity.
    """
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if value is None or stored is None:
        return value is stored
    if pt.is_struct(arrow_type):
        is_known = isinstance(value, Mapping) and value.keys() <= stored.keys()
        return is_known and all(_holds_in(field, value.get(field.name), stored[field.name]) for field in arrow_type)
    if pt.is_map(arrow_type):
        pairs = zip(value.items() if isinstance(value, Mapping) else value, stored, strict=True)
        key, item = arrow_type.key_field, arrow_type.item_field
        return all(_holds_in(key, own[0], kept[0]) and _holds_in(item, own[1], kept[1]) for own, kept in pairs)
    if isinstance(stored, list):
        is_list = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | _BYTES)
        return is_list and all(_holds_in(arrow_type.value_field, *pair) for pair in zip(value, stored, strict=True))
    if isinstance(stored, bool) or isinstance(value, bool | np.bool_):
        return isinstance(stored, bool) and isinstance(value, bool | np.bool_)
    if isinstance(stored, float):
        return math.isfinite(stored) or not math.isfinite(value)
    # Of integers and of numpy's times, Arrow refuses those that it cannot hold.
    return isinstance(value, int | np.integer | np.datetime64 | np.timedelta64) or bool(value == stored)


def _holds_in(field: pa.Field, value: Any, stored: Any) -> bool:
    return (value is not None or field.nullable) and _holds(field.type, value, stored)


_PYTHON_TYPES: dict[type, str] = {bool: "bool", int: "int64", float: "float64", str: "str", dict: "json"}


# Types of the elements of a list, and of its column.
_ELEMENT_TYPES = {
    frozenset({int}): "int64",
    frozenset({float}): "float64",
    frozenset({int, float}): "float64",
    frozenset({bool}): "bool",
    frozenset({str}): "str",
}


def type_of_value(name: str, value: object) -> PlainType:
    """Return the type of a column that has this value in a record. Raises SchemaError if it cannot be inferred."""
    for python_type, text in _PYTHON_TYPES.items():
        if type(value) is python_type:
            return text
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes"
    if is_pillow_image(value):
        return Image()
    shape = _shape_of(value)
    if shape is not None:
        dtype = _dtype_name(name, value)
        return Tensor(dtype, shape) if shape else dtype
    hint = ""
    if isinstance(value, list | tuple):
        element = _ELEMENT_TYPES.get(frozenset(map(type, value)))
        if element is not None:
            return f"list<{element}>" if element == "str" else Ragged(element, (None,))
        hint = "; a list may be a Ragged, a Tensor, json or an Arrow list: pass a schema"
    got = "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
    raise SchemaError(
        f"cannot infer the column's type from {got}{hint}", column=name, expected=SUPPORTED_TYPES, got=got
    )


def type_of_column(name: str, values: Any) -> UserType:
    """Return the type of a column with these values: an array, a tensor, or a list. Raises SchemaError."""
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


def _type_of_list(name: str, values: Sequence[object]) -> PlainType:
    """Return a type for all values of a list. It may mix int and float, or arrays of one dtype and several shapes."""
    found: PlainType | None = None
    for record, value in enumerate(values):
        if value is None or (isinstance(value, list | tuple) and not value):
            continue
        value_type = type_of_value(name, value)
        joined = value_type if found is None else _join(found, value_type)
        if joined is None:
            raise SchemaError(
                f"expected {Column.of(name, found)}, like the records before, got {Column.of(name, value_type)}",
                column=name,
                record=record,
                expected=str(found),
                got=str(value_type),
            )
        found = joined
    if found is None:
        raise _untyped_error(name)
    if all(value is not None for value in values):
        return found
    return f"{found}?" if isinstance(found, str) else replace(found, nullable=True)


def _untyped_error(name: str) -> SchemaError:
    message = "cannot infer the column's type: no value, or only nulls and empty lists; pass a schema"
    return SchemaError(message, column=name, expected=SUPPORTED_TYPES, got="None", is_untyped=True)


def _join(first: PlainType, second: PlainType) -> PlainType | None:
    if first == second:
        return first
    if isinstance(first, str) and isinstance(second, str):
        return _join_dtypes(first, second)
    if isinstance(first, Tensor | Ragged) and isinstance(second, Tensor | Ragged):
        dtype = _join_dtypes(first.dtype, second.dtype)
        if dtype is None or len(first.shape) != len(second.shape):
            return None
        shape = tuple(a if a == b else None for a, b in zip(first.shape, second.shape, strict=True))
        return Ragged(dtype, shape) if None in shape else replace(first, dtype=dtype)
    return None


def _join_dtypes(first: str, second: str) -> str | None:
    if first == second:
        return first
    return "float64" if {first, second} == {"int64", "float64"} else None


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


def infer_records(records: Sequence[Mapping[str, object]]) -> Schema:
    """Return the schema of records: a column that is missing, or None, in one of them is nullable. Raises SchemaError.

    If a column has no value that gives its type, the error has the detail `is_untyped`; there is no other error then.
    """
    for record in records:
        check_mapping(record)
    types: dict[str, UserType] = {}
    untyped: str | None = None
    for name in dict.fromkeys(name for record in records for name in record):
        try:
            types[name] = _type_of_list(name, [record.get(name) for record in records])
        except SchemaError as error:
            if not error.details.get("is_untyped"):
                raise
            untyped = name
    if untyped is not None:
        raise _untyped_error(untyped)
    return Schema.of(types)


def as_table(columns: Any) -> Any:
    """Return a frame of pandas or polars, or other columns that Arrow can read, as a table; other objects as they are.

    The index of a frame of pandas becomes columns where it has names, and otherwise is left out. Its columns of NumPy's
    floats keep their NaN, which from_pandas() makes nulls.
    """
    if type(columns) is dict:  # a record: packing calls this for each one
        return columns
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(columns, pandas.DataFrame):
        named = [name for name in columns.index.names if name is not None]
        frame = columns.reset_index(named) if named else columns
        table = pa.Table.from_pandas(frame, preserve_index=False)
        for index, (field, dtype) in enumerate(zip(table.schema, frame.dtypes, strict=True)):
            if isinstance(dtype, np.dtype) and dtype.kind == "f":
                floats = pa.array(frame.iloc[:, index].to_numpy(), from_pandas=False)
                table = table.set_column(index, field.name, floats)
        return table
    if isinstance(columns, Mapping | pa.RecordBatch | pa.Table) or not hasattr(columns, "__arrow_c_stream__"):
        return columns
    return pa.table(columns)


def infer_batch(columns: Mapping[str, object] | pa.RecordBatch | pa.Table) -> Schema:
    """Return the schema of a batch: arrays or lists by column name, or an Arrow batch or table. Raises SchemaError.

    A column is nullable if the batch has a null in it: Arrow's own flag is set for almost every column. The fields of a
    data set's own batches (with TYPE_KEY) say what they are.
    """
    if isinstance(columns, pa.RecordBatch | pa.Table):
        fields = zip(columns.schema, columns.columns, strict=True)
        return Schema.of(
            pa.schema(
                [
                    field
                    if TYPE_KEY in (field.metadata or {}) or pt.is_null(field.type)
                    else field.with_nullable(array.null_count > 0)
                    for field, array in fields
                ]
            )
        )
    check_mapping(columns)
    return Schema.of({name: type_of_column(name, values) for name, values in columns.items()})


Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An Arrow array that is known to be in stored form: its uint16 may be bfloat16 bits, and its uint8 bools."""

    array: pa.Array | pa.ChunkedArray


def convert_stored(column: Column, data: StoredArray) -> ColumnData:
    """Return the records of an array in stored form. Raises ConversionError if it is not, or has forbidden nulls."""
    if column.dtype != "bfloat16" and (column.dtype != "bool" or column.kind is Kind.BOOL):
        return convert_arrow(column, data.array)
    converted = convert_arrow(replace(column, dtype=column.stored.name), data.array)
    if column.dtype == "bool" and converted.values is not None and (converted.values > 1).any():
        raise ConversionError(str(column), "bytes that are neither 0 nor 1")
    return converted


def one_array(data: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return chunks as one array. A single one is not copied, as combine_chunks() would."""
    if not isinstance(data, pa.ChunkedArray):
        return data
    if data.num_chunks == 1:
        return data.chunk(0)
    return pa.concat_arrays(data.chunks) if data.num_chunks else pa.array([], data.type)


def convert_arrow(column: Column, data: pa.Array | pa.ChunkedArray) -> ColumnData:
    """Return the records of an Arrow array of a type that casts to the column's without loss; or ConversionError."""
    if isinstance(data.type, BFloat16Type) and column.kind is Kind.SCALAR and column.dtype == "bfloat16":
        column = replace(column, dtype="uint16")
    array = one_array(data)
    if isinstance(array.type, pa.BaseExtensionType):
        array = pc.not_equal(array.storage, 0) if array.type.extension_name == "arrow.bool8" else array.storage
    if pt.is_dictionary(array.type):  # pyarrow cannot decode one of views, as polars exports
        array = array.cast(
            pa.dictionary(array.type.index_type, storable_type(array.type.value_type))
        ).dictionary_decode()
    valid = _valid(column, array)
    if pt.is_null(array.type):  # as inferred from a batch whose values are all None
        return build_column_data(column, [None] * len(array))
    converted = _HOW[column.kind](column, array)
    return converted if valid is None or converted.array is not None else replace(converted, valid=valid)


def arrow_to_numpy(array: pa.Array) -> Array:
    """Return an array of numbers or bool without nulls as numpy. to_numpy() would import pandas, which takes 0.3 s."""
    is_bool = pt.is_boolean(array.type)
    if is_bool:
        array = array.cast(pa.uint8())
    dtype = np.dtype(np.bool_ if is_bool else array.type.to_pandas_dtype())
    values = array.buffers()[1]
    return np.frombuffer(values, dtype, len(array), array.offset * dtype.itemsize) if len(array) else np.empty(0, dtype)


def _valid(column: Column, array: pa.Array) -> Array | None:
    if not array.null_count:
        return None
    valid: Array = arrow_to_numpy(array.is_valid())
    if not column.nullable:
        raise ConversionError(str(column), "null", int(np.argmin(valid)))
    return valid


def _no(column: Column, array: pa.Array) -> ConversionError:
    return ConversionError(str(column), f"an Arrow array of {array.type}")


def _numbers(column: Column, array: pa.Array) -> Array:
    """Return the elements of a primitive array in stored form, with zero for nulls."""
    if array.null_count:
        array = array.fill_null(False if pt.is_boolean(array.type) else 0)
    if not (pt.is_integer(array.type) or pt.is_floating(array.type) or pt.is_boolean(array.type)):
        raise _no(column, array)
    elements = arrow_to_numpy(array)
    return fit(elements, elements.dtype.name, column.dtype or "")


def _tensors(column: Column, array: pa.Array) -> ColumnData:
    n, array_type = len(array), array.type
    shape: list[int] = []
    if is_list(array.type):
        array = _equal_lists(column, array)
    inner = array
    while pt.is_fixed_size_list(inner.type):
        size = inner.type.list_size
        shape.append(size)
        if inner is not array and inner.null_count:
            raise ConversionError(str(column), "a tensor with nulls inside")
        start = inner.offset * size
        inner = inner.values.slice(start, len(inner) * size)
    flat = len(shape) == 1 and shape[0] == column.n_elements
    if not flat and tuple(shape) != column.shape:
        raise ConversionError(str(column), f"an Arrow array of {array_type}")
    elements = _elements(column, inner, array.is_valid() if array.null_count else None, max(column.n_elements, 1))
    return ColumnData(n, elements.reshape(n, column.n_elements))


def _equal_lists(column: Column, array: pa.Array) -> pa.Array:
    """Return lists as fixed-size lists, after checking that each has the tensor's number of elements."""
    lengths = arrow_to_numpy(pc.fill_null(pc.list_value_length(array), column.n_elements))
    wrong = lengths != column.n_elements
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ConversionError(str(column), f"a list of {lengths[index]} elements", index)
    return array.cast(pa.list_(array.type.value_type, column.n_elements))


def _elements(column: Column, inner: pa.Array, valid: pa.Array | None, per_record: int) -> Array:
    """Return flat elements in stored form. An element may be null only if its whole record is null."""
    if inner.null_count:
        allowed = np.zeros(len(inner), bool)
        if valid is not None:
            allowed = np.repeat(~arrow_to_numpy(valid), per_record)[: len(inner)]
        wrong = arrow_to_numpy(inner.is_null()) & ~allowed
        if wrong.any():
            got = "a tensor with nulls inside"
            if column.kind is Kind.RAGGED:
                got = f"a list with nulls inside, whose type is list<{column.dtype}?>"
            raise ConversionError(str(column), got, int(np.argmax(wrong)) // per_record)
    try:
        return _numbers(column, inner)
    except ConversionError as error:
        error.index //= per_record
        raise


def _runs(column: Column, array: pa.Array) -> ColumnData:
    """Return the records of a column of bytes, text or images: values and 64-bit offsets."""
    text = column.kind is Kind.STR
    kind_fits = pt.is_string(array.type) or pt.is_large_string(array.type) or pt.is_string_view(array.type)
    if not text:
        kind_fits = pt.is_binary(array.type) or pt.is_large_binary(array.type) or pt.is_binary_view(array.type)
        kind_fits = kind_fits or pt.is_fixed_size_binary(array.type)
    if not kind_fits:
        raise _no(column, array)
    array = array.cast(pa.large_string() if text else pa.large_binary())
    if array.null_count:
        array = array.fill_null("" if text else b"")
    if text:
        try:
            array.validate(full=True)
        except pa.ArrowException as error:
            raise ConversionError("valid UTF-8", str(error)) from error
    _, offsets, values = array.buffers()
    run = np.zeros(0, np.uint8) if values is None else np.frombuffer(values, np.uint8)
    return ColumnData(len(array), run, _offsets64(offsets, array))


def _offsets64(buffer: pa.Buffer | None, array: pa.Array) -> Array:
    if buffer is None or not buffer.size:
        return np.zeros(1, np.int64)
    return np.frombuffer(buffer, np.int64)[array.offset : array.offset + len(array) + 1]


def _ragged(column: Column, array: pa.Array) -> ColumnData:
    """Return the records of a ragged column, from a struct of data and shape, or from lists with one dimension."""
    if pt.is_struct(array.type) and {array.type.field(i).name for i in range(array.type.num_fields)} == {
        "data",
        "shape",
    }:
        valid = arrow_to_numpy(array.is_valid())
        data, shape = array.field("data"), array.field("shape")
        if pt.is_list(data.type):
            data = data.cast(pa.large_list(data.type.value_type))
        return _ragged_of(column, data, _shapes(column, shape, valid), valid)
    if is_list(array.type) and len(column.shape) == 1:
        data = array.cast(pa.large_list(array.type.value_type))
        valid = arrow_to_numpy(array.is_valid())
        return _ragged_of(column, data, None, valid)
    raise _no(column, array)


def _shapes(column: Column, shape: pa.Array, valid: Array) -> Array:
    size = shape.type.list_size if pt.is_fixed_size_list(shape.type) else -1
    if size != len(column.shape) or not pt.is_int32(shape.type.value_type):
        raise ConversionError(str(column), f"shapes of {shape.type}")
    flat = shape.values.slice(shape.offset * size, len(shape) * size).fill_null(0)
    return np.where(valid[:, None], arrow_to_numpy(flat).reshape(len(shape), size), 0)


def _ragged_of(column: Column, data: pa.Array, shapes: Array | None, valid: Array) -> ColumnData:
    n = len(data)
    if data.null_count and (arrow_to_numpy(data.is_null()) & valid).any():
        raise ConversionError(str(column), "a record without data")
    if not valid.all():
        # The data of a null record is undefined: replace it with an empty list.
        data = pc.if_else(pa.array(valid), data, pa.scalar([], data.type))
    offsets = _offsets64(data.buffers()[1], data)
    first, last = int(offsets[0]), int(offsets[-1])
    try:
        values = _elements(column, data.values.slice(first, last - first), None, 1)
    except ConversionError as error:
        error.index = int(np.searchsorted(offsets, error.index + first, side="right")) - 1
        raise
    offsets = offsets - first if first else offsets
    lengths = np.diff(offsets)
    if shapes is None:
        shapes = lengths.reshape(n, 1)
    shapes = np.where(valid[:, None], shapes, shapes_of(column, n, [d or 0 for d in column.shape]))
    wrong = find_bad_shape(column, shapes, lengths)
    if wrong is not None:
        got = f"{lengths[wrong]} elements of the shape {tuple(shapes[wrong].tolist())}"
        raise ConversionError(str(column), got, wrong)
    return ColumnData(n, values, offsets, np.ascontiguousarray(shapes, np.dtype("<i4")))


def _any_arrow(column: Column, array: pa.Array) -> ColumnData:
    storable_type(array.type)
    try:
        found = array if array.type == column.arrow.type else array.cast(column.arrow.type)
        found.validate(full=True)
    except pa.ArrowException as error:
        raise ConversionError(str(column), f"an Arrow array of {array.type}: {error}") from error
    if _has_forbidden_null(found):
        raise ConversionError(str(column), "a value with nulls inside", _first_forbidden(found))
    return ColumnData(len(found), array=found)


def _has_forbidden_null(array: pa.Array) -> bool:
    """Return whether a value has a null that its type forbids. Arrow casts such lists without an error."""
    inner: list[tuple[pa.Field, pa.Array]] = []
    if is_list(array.type) or pt.is_fixed_size_list(array.type):
        inner = [(array.type.value_field, array.flatten())]
    elif pt.is_struct(array.type):
        inner = list(zip(array.type, array.drop_null().flatten(), strict=True))
    elif pt.is_map(array.type):
        inner = [(array.type.item_field, array.items)]
    return any(_has_forbidden_null(values) or (values.null_count and not field.nullable) for field, values in inner)


def _first_forbidden(array: pa.Array) -> int:
    return next(index for index in range(len(array)) if _has_forbidden_null(array[index : index + 1]))


# JSON is missing, because its values are parsed and arrive as a list.
_HOW: dict[Kind, Callable[[Column, pa.Array], ColumnData]] = {
    Kind.SCALAR: lambda column, array: ColumnData(len(array), _numbers(column, array).reshape(-1, 1)),
    Kind.BOOL: lambda column, array: ColumnData(len(array), _numbers(column, array)),
    Kind.TENSOR: _tensors,
    Kind.RAGGED: _ragged,
    Kind.BYTES: _runs,
    Kind.IMAGE: _runs,
    Kind.STR: _runs,
    Kind.ARROW: _any_arrow,
}
_ARROW_REFUSES = (pa.ArrowException, TypeError, ValueError, OverflowError)
_BYTES_LIKE = (Kind.BYTES, Kind.IMAGE, Kind.STR, Kind.JSON)


def convert_column(column: Column, data: Any) -> ColumnData:
    """Return a column of a batch in stored form, over the same memory if possible; or raise ConversionError."""
    if isinstance(data, StoredArray):
        return convert_column(column, data.array) if column.kind is Kind.JSON else convert_stored(column, data)
    if isinstance(data, pa.Array | pa.ChunkedArray):
        return _convert_list(column, _parsed(data)) if column.kind is Kind.JSON else convert_arrow(column, data)
    if isinstance(data, list | tuple):
        return _convert_list(column, data)
    found = as_numpy(data)
    if found is not None:
        return _convert_numpy(column, *found)
    if isinstance(data, Sequence) and not isinstance(data, str | bytes | bytearray | memoryview):
        return _convert_list(column, list(data))
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


def _convert_numpy(column: Column, array: Array, dtype: str) -> ColumnData:
    if array.ndim == 0:
        raise ConversionError(f"an array or a list of {column}", "a single value")
    if array.dtype.kind in "OU" or column.kind in _BYTES_LIKE:
        return _convert_list(column, array.tolist())
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


def _convert_list(column: Column, values: Sequence[Any]) -> ColumnData:
    fast = _plain_numbers(column, values) if column.kind is Kind.SCALAR else None
    if fast is not None:
        return ColumnData(len(values), fast.reshape(-1, 1))
    if column.kind in _BYTES_LIKE and column.kind is not Kind.JSON:
        joined = join(values, text=column.kind is Kind.STR, nullable=column.nullable)  # None: a value needs conversion
        if joined is not None:
            return ColumnData(len(values), joined[0], joined[1], valid=joined[2])
    if column.kind is Kind.ARROW:
        return _convert_arrow_list(column, values)
    return build_column_data(column, _each(values, value_converter(column)))


def _each(values: Sequence[Any], convert: Callable[[Any], Any]) -> list[Any]:
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
    """Return a function that converts a value for build_column_data(), perhaps over the same memory."""
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
    is_rounded = array.dtype.kind == "f" and column.dtype == "uint64"  # numpy does so if only some are beyond int64
    if is_rounded and all(type(item) is int and item >= 0 for item in _leaves(value)):
        array = np.array(value, np.uint64)
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


_QUALITY = 95  # of JPEG and WebP, for images that were not read from a JPEG file


def _convert_image(column: Column, value: Any) -> bytes:
    """Return the bytes of an image: as they are given, those of a file, or of an image of Pillow, which is encoded."""
    if isinstance(value, os.PathLike):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise ConversionError(f"{column}, or a path of one", f"{os.fspath(value)!r}: {error.strerror}") from error
    if not is_pillow_image(value):
        if isinstance(value, str):
            raise ConversionError(str(column), "a str; the path of a file is a pathlib.Path")
        return _convert_bytes(column, value)
    # Pillow's `format` is that of the file from which the image was read. It is None after a change such as resize().
    encoding = column.encoding or (value.format or "png").lower()
    stream = io.BytesIO()
    try:
        value.save(stream, encoding, quality="keep" if encoding == "jpeg" and value.format == "JPEG" else _QUALITY)
    except (OSError, ValueError, KeyError) as error:
        got = f"an image of the mode {value.mode}, which Pillow cannot write as {encoding}: {error}"
        raise ConversionError(str(column), got) from error
    return stream.getvalue()


def is_pillow_image(value: object) -> bool:
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


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
    try:
        return _arrow_array(column, [value])
    except _ARROW_REFUSES as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(str(column), f"{_type_name(value)}: {error}") from error


def _arrow_array(column: Column, values: Sequence[Any]) -> pa.Array:
    array = pa.array(values, column.arrow.type)
    for index, (value, stored) in enumerate(zip(values, array.to_pylist(), strict=True)):
        if not _holds(column.arrow.type, value, stored):
            got = f"{_type_name(value)}, {value!r}, which Arrow would store as {stored!r}"
            expected, zone = str(column), getattr(stored, "tzinfo", None)
            if (getattr(value, "tzinfo", None) is None) != (zone is None):
                expected += f" (write value.replace(tzinfo={'datetime.UTC' if zone else None}))"
            raise ConversionError(expected, got, index)
    return array


_CONVERTERS: dict[Kind, Callable[[Column, Any], Any]] = {
    Kind.BOOL: _convert_bool,
    Kind.TENSOR: _fit_value,
    Kind.RAGGED: _fit_value,
    Kind.BYTES: _convert_bytes,
    Kind.IMAGE: _convert_image,
    Kind.STR: _convert_str,
    Kind.JSON: _convert_json,
    Kind.ARROW: _convert_arrow,
}


def build_column_data(column: Column, converted: Sequence[Any]) -> ColumnData:
    """Join the results of value_converter() into column data in new memory. A null is stored as zeros, or as empty."""
    n = len(converted)
    valid = None
    if column.nullable and any(value is None for value in converted):
        valid = np.fromiter((value is not None for value in converted), bool, n)
    if column.kind is Kind.ARROW:
        null = pa.nulls(1, column.arrow.type)
        arrays = [null if value is None else value for value in converted]
        return ColumnData(n, array=pa.concat_arrays(arrays) if arrays else pa.array([], column.arrow.type))
    if column.kind in _BYTES_LIKE:
        values_bytes = [value or b"" for value in converted]
        values = np.frombuffer(b"".join(values_bytes), np.uint8)
        return ColumnData(n, values, _offsets(np.fromiter(map(len, values_bytes), np.int64, n)), valid=valid)
    if column.kind is Kind.RAGGED:
        return _build_ragged(column, converted, valid)
    zero: Any = np.zeros(column.shape, column.stored) if column.kind is Kind.TENSOR else 0
    values = np.array([zero if value is None else value for value in converted], column.stored)
    return ColumnData(n, values if column.kind is Kind.BOOL else values.reshape(n, column.n_elements), valid=valid)


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


def _convert_arrow_list(column: Column, values: Sequence[Any]) -> ColumnData:
    try:
        return convert_arrow(column, _arrow_array(column, values))
    except ConversionError:
        raise
    except _ARROW_REFUSES as error:
        _each(values, value_converter(column))  # finds the bad value, which Arrow does not name
        raise ConversionError(str(column), f"a list that Arrow cannot convert: {error}") from error


def _type_name(value: Any) -> str:
    name = type(value).__qualname__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"
