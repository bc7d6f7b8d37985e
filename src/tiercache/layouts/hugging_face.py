"""What Hugging Face `datasets` knows of a column beyond its Arrow type: images, class names, arrays of fixed shapes.

Its Arrow and Parquet files have this in the metadata of their Arrow schema, as JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tiercache.errors import SchemaError
from tiercache.shard.conversion import one_array
from tiercache.shard.schema import Column, Image, Kind, Ragged, Schema, Tensor, UserType, is_list
from tiercache.shard.shard_file import ColumnData

_METADATA_KEY = b"huggingface"
_ARRAY = re.compile(r"Array[2-5]D")
_FILES = ("Image", "Audio", "Video", "Pdf", "Nifti")


def features_of(schema: pa.Schema) -> Mapping[str, Any]:
    """Return the features by column that the metadata of an Arrow schema names; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[_METADATA_KEY])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def is_file(feature: object) -> bool:
    """Return whether a feature is a file: `datasets` stores it as a struct of its bytes and its path."""
    return isinstance(feature, dict) and feature.get("_type") in _FILES


def check_classes(location: str, features: Mapping[str, Any], first_location: str, first: Mapping[str, Any]) -> None:
    """Raise SchemaError if the classes of two files of a data set have different names, so that labels would differ."""
    for column in features.keys() & first.keys():
        names, expected = (
            one[column].get("names") if isinstance(one[column], dict) else None for one in (features, first)
        )
        if names != expected:
            message = f"{location}: expected the classes {expected} as in {first_location}, got {names}"
            raise SchemaError(message, column=column)


def hf_features_schema(features: Mapping[str, Any], schema: pa.Schema) -> Schema:
    """Return the schema of records that `datasets` has written; array_of() returns their values.

    An Image is an image, a ClassLabel an integer with class names, an Audio or Video its bytes, and an Array2D to
    Array5D a tensor; all other columns have the type of their Arrow field. A column is nullable if its field is; a file
    that the caller finds to have no nulls should have such fields.

    Args:
        features: Features by column, as dataset_info.json and features_of() have them.
        schema: Arrow schema of the stored columns.

    Raises:
        SchemaError: A column cannot be read.
    """
    types: dict[str, UserType] = {}
    classes: dict[str, list[str]] = {}
    for field in schema:
        feature = features.get(field.name)
        feature = feature if isinstance(feature, dict) else {}
        types[field.name] = _type_of(feature, field)
        if feature.get("_type") == "ClassLabel" and pt.is_integer(field.type) and feature.get("names"):
            classes[field.name] = feature["names"]
    return Schema.of(types).with_classes(classes)


def _type_of(feature: Mapping[str, Any], field: pa.Field) -> UserType:
    kind = str(feature.get("_type"))
    stored = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    if kind in _FILES and (pt.is_binary(stored) or pt.is_large_binary(stored) or _has_file_bytes(stored)):
        return Image(nullable=field.nullable) if kind == "Image" else f"bytes{'?' * field.nullable}"
    if _ARRAY.fullmatch(kind):
        return _array_type(feature, field)
    return field


def _array_type(feature: Mapping[str, Any], field: pa.Field) -> UserType:
    shape, dtype = feature.get("shape"), feature.get("dtype")
    if not isinstance(shape, list) or not isinstance(dtype, str) or None in shape[1:]:
        raise SchemaError(f"expected the shape and dtype of an array, got {dict(feature)}", column=field.name)
    made: Ragged | Tensor
    made = Ragged(dtype, tuple(shape)) if None in shape else Tensor(dtype, tuple(shape))
    return replace(made, nullable=field.nullable)


def _has_file_bytes(stored: pa.DataType) -> bool:
    return bool(pt.is_struct(stored)) and stored.get_field_index("bytes") >= 0


def array_of(
    column: Column, array: pa.Array | pa.ChunkedArray, location: str
) -> pa.Array | pa.ChunkedArray | ColumnData:
    """Return the stored values of a column of hf_features_schema() as values of the column, without a copy.

    location: File and block, for messages. Raises SchemaError for an image of which only the path is stored, and for
    an array of another shape.
    """
    array = one_array(array)
    stored = array.storage if isinstance(array.type, pa.BaseExtensionType) else array
    if column.kind in (Kind.IMAGE, Kind.BYTES) and pt.is_struct(stored.type):
        return _file_bytes(column, stored, location)
    if column.kind is Kind.TENSOR and len(column.shape) > 1 and is_list(stored.type):
        return _tensors(column, stored, location)
    if column.kind is Kind.RAGGED and len(column.shape) > 1 and is_list(stored.type):
        return _ragged(column, stored, location)
    return array


def _file_bytes(column: Column, array: pa.Array, location: str) -> pa.Array:
    found = pc.struct_field(array, "bytes")
    if found.null_count and array.type.get_field_index("path") >= 0:
        paths = pc.struct_field(array, "path")
        only_path = pc.and_(pc.is_null(found), pc.is_valid(paths))
        if pc.any(only_path).as_py():
            record = pc.index(only_path, True).as_py()
            raise SchemaError(
                f"{location}: it is stored as the path {paths[record].as_py()!r}, without its bytes; write the "
                "data set again with the bytes: dataset.with_format('arrow').map(datasets.table.embed_table_storage, "
                "batched=True, batch_size=100), then save_to_disk()",
                column=column.name,
                record=record,
            )
    return found


def _tensors(column: Column, array: pa.Array, location: str) -> pa.Array:
    valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
    flat = _flat(column, array if valid is None else array.drop_null(), location)
    found = pa.FixedSizeListArray.from_arrays(flat, column.n_elements)
    if valid is None:
        return found
    return found.take(pa.array(np.cumsum(valid) - 1, mask=~valid))


def _ragged(column: Column, array: pa.Array, location: str) -> ColumnData:
    """Return arrays of which the first dimension varies."""
    valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
    values = _flat(column, array, location)
    rows = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if values.null_count:
        raise SchemaError(f"{location}: an array has nulls", column=column.name)
    shapes = np.array([[d or 0 for d in column.shape]], "<i4").repeat(len(array), 0)
    shapes[:, 0] = rows
    offsets = np.append(0, np.cumsum(rows * math.prod(d or 0 for d in column.shape[1:])))
    elements = values.to_numpy(zero_copy_only=False).astype(column.stored, copy=False)
    return ColumnData(len(array), elements, offsets, shapes, valid)


def _flat(column: Column, array: pa.Array, location: str) -> pa.Array:
    """Return the elements of nested lists, after checking that each list has the length that the column says."""
    for depth, dimension in enumerate(column.shape):
        lengths = pc.list_value_length(array)
        if dimension is not None:
            low, high = (value.as_py() for value in pc.min_max(lengths).values())
            if low is not None and (low != dimension or high != dimension):
                message = f"{location}: expected {column}, got {low if low != dimension else high} in dimension {depth}"
                raise SchemaError(message, column=column.name)
        if depth and array.null_count:
            raise SchemaError(f"{location}: an array has nulls", column=column.name)
        array = array.flatten()
    return array
