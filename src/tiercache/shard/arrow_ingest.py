"""Converts Arrow arrays to stored form, and shares their memory if they have the stored layout already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tiercache.shard.extension import BFloat16Type
from tiercache.shard.fit import ConversionError, fit
from tiercache.shard.parts import ColumnData, shapes_of
from tiercache.shard.spec import Kind
from tiercache.shard.types import Column

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An Arrow array that is known to be in the stored form of a column.

    Its uint16 values may be bfloat16 bits, and its uint8 values bools; in a plain Arrow array they would be numbers.
    """

    array: pa.Array | pa.ChunkedArray


def convert_stored(column: Column, data: StoredArray) -> ColumnData:
    """Return the records of an array in stored form.

    Raises:
        ConversionError: The array is not in stored form, or has nulls that the column does not allow.
    """
    if column.dtype != "bfloat16" and (column.dtype != "bool" or column.kind is Kind.BOOL):
        return convert_arrow(column, data.array)
    part = convert_arrow(replace(column, dtype=column.stored.name), data.array)
    if column.dtype == "bool" and part.values is not None and (part.values > 1).any():
        raise ConversionError(str(column), "bytes that are neither 0 nor 1")
    return part


def convert_arrow(column: Column, data: pa.Array | pa.ChunkedArray) -> ColumnData:
    """Return the records of an Arrow array that has the column's type, or a type that casts to it without loss.

    Raises:
        ConversionError: The array has another type, or a value does not fit.
    """
    if isinstance(data.type, BFloat16Type) and column.kind is Kind.SCALAR and column.dtype == "bfloat16":
        column = replace(column, dtype="uint16")
    array = data.combine_chunks() if isinstance(data, pa.ChunkedArray) else data
    if isinstance(array, pa.ChunkedArray):  # older pyarrow returns a ChunkedArray if there are no chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array.type, pa.BaseExtensionType):
        array = _storage(array)
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()
    valid = _valid(column, array)
    part = _HOW[column.kind](column, array)
    return (
        part
        if valid is None or part.array is not None
        else ColumnData(part.n, part.values, part.offsets, part.shapes, valid)
    )


def _storage(array: pa.Array) -> pa.Array:
    storage = array.storage
    return pc.not_equal(storage, 0) if array.type.extension_name == "arrow.bool8" else storage


def _valid(column: Column, array: pa.Array) -> Array | None:
    if not array.null_count:
        return None
    valid: Array = array.is_valid().to_numpy(zero_copy_only=False)
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
    elements = array.to_numpy(zero_copy_only=False)
    return fit(elements, elements.dtype.name, column.dtype or "")


def _scalars(column: Column, array: pa.Array) -> ColumnData:
    return ColumnData(len(array), _numbers(column, array).reshape(-1, 1))


def _bools(column: Column, array: pa.Array) -> ColumnData:
    return ColumnData(len(array), _numbers(column, array))


def _tensors(column: Column, array: pa.Array) -> ColumnData:
    n, array_type = len(array), array.type
    shape: list[int] = []
    if pt.is_list(array.type) or pt.is_large_list(array.type):
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
    lengths = pc.fill_null(pc.list_value_length(array), column.n_elements).to_numpy(zero_copy_only=False)
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
            allowed = np.repeat(~valid.to_numpy(zero_copy_only=False), per_record)[: len(inner)]
        wrong = inner.is_null().to_numpy(zero_copy_only=False) & ~allowed
        if wrong.any():
            raise ConversionError(str(column), "a tensor with nulls inside", int(np.argmax(wrong)) // per_record)
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
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        data, shape = array.field("data"), array.field("shape")
        if pt.is_list(data.type):
            data = data.cast(pa.large_list(data.type.value_type))
        return _ragged_of(column, data, _shapes(column, shape, valid), valid)
    if (pt.is_list(array.type) or pt.is_large_list(array.type)) and len(column.shape) == 1:
        data = array.cast(pa.large_list(array.type.value_type))
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        return _ragged_of(column, data, None, valid)
    raise _no(column, array)


def _shapes(column: Column, shape: pa.Array, valid: Array) -> Array:
    size = shape.type.list_size if pt.is_fixed_size_list(shape.type) else -1
    if size != len(column.shape) or not pt.is_int32(shape.type.value_type):
        raise ConversionError(str(column), f"shapes of {shape.type}")
    flat = shape.values.slice(shape.offset * size, len(shape) * size).fill_null(0)
    return np.where(valid[:, None], flat.to_numpy(zero_copy_only=False).reshape(len(shape), size), 0)


def _ragged_of(column: Column, data: pa.Array, shapes: Array | None, valid: Array) -> ColumnData:
    n = len(data)
    if data.null_count and (data.is_null().to_numpy(zero_copy_only=False) & valid).any():
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
    _check_shapes(column, shapes, lengths)
    return ColumnData(n, values, offsets, np.ascontiguousarray(shapes, np.dtype("<i4")))


def _check_shapes(column: Column, shapes: Array, lengths: Array) -> None:
    # An int64 product may wrap around to the correct number; a float64 product cannot.
    wrong = (shapes < 0).any(axis=1) | (shapes.prod(axis=1, dtype=np.int64) != lengths)
    wrong |= shapes.prod(axis=1, dtype=np.float64) != lengths
    for number, dimension in enumerate(column.shape):
        if dimension is not None:
            wrong |= shapes[:, number] != dimension
    if len(wrong) and wrong.any():
        index = int(np.argmax(wrong))
        raise ConversionError(
            str(column), f"{lengths[index]} elements of the shape {tuple(shapes[index].tolist())}", index
        )


def _any_arrow(column: Column, array: pa.Array) -> ColumnData:
    try:
        found = array if array.type == column.arrow.type else array.cast(column.arrow.type)
        found.validate(full=True)
    except pa.ArrowException as error:
        raise ConversionError(str(column), f"an Arrow array of {array.type}: {error}") from error
    return ColumnData(len(found), array=found)


# JSON is missing, because its values are parsed and arrive as a list.
_HOW = {
    Kind.SCALAR: _scalars,
    Kind.BOOL: _bools,
    Kind.TENSOR: _tensors,
    Kind.RAGGED: _ragged,
    Kind.BYTES: _runs,
    Kind.IMAGE: _runs,
    Kind.STR: _runs,
    Kind.ARROW: _any_arrow,
}
