"""Types of columns: as a user states them (Image, Tensor, Ragged), as Arrow extension types, and nested Arrow types."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from tiercache.errors import SchemaError

# dtype name -> numpy dtype of the stored elements. bfloat16 is stored as its 16 bits; bool is stored as a byte, except
# in a BOOL column, which has one bit per record. All are little-endian, on every machine.
STORED: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        **{
            f"{sign}int{bits}": np.dtype(f"<{sign[:1] or 'i'}{bits // 8}")
            for sign in ("", "u")
            for bits in (8, 16, 32, 64)
        },
        "float16": np.dtype("<f2"),
        "bfloat16": np.dtype("<u2"),
        "float32": np.dtype("<f4"),
        "float64": np.dtype("<f8"),
        "bool": np.dtype("u1"),
    }
)
INTEGERS = frozenset(name for name in STORED if "int" in name)
FLOATS = frozenset(name for name in STORED if "float" in name)
SUPPORTED_TYPES = (
    f"{', '.join(STORED)}, bytes, str, json (add '?' for nullable), tiercache.Image(encoding), "
    "tiercache.Tensor(dtype, shape), tiercache.Ragged(dtype, shape), or an Arrow type"
)
_ENCODING = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# The file stores a dimension as an int32. 32 dimensions are the limit of numpy 1.
MAX_DIMENSION = 2**31 - 1
MAX_DIMENSIONS = 32


class Kind(StrEnum):
    """Kind of a column, which determines how its values are stored and served."""

    SCALAR = "scalar"
    BOOL = "bool"
    TENSOR = "tensor"
    RAGGED = "ragged"
    BYTES = "bytes"
    STR = "str"
    JSON = "json"
    IMAGE = "image"
    ARROW = "arrow"


@dataclass(frozen=True)
class Image:
    """Column type: bytes of an encoded image.

    Args:
        encoding: Name of the encoding in lower case, such as "jpeg" or "png".
        nullable: Whether a record may have no image (None).
    """

    encoding: str
    nullable: bool = False

    def __post_init__(self) -> None:
        if type(self.encoding) is not str or not _ENCODING.fullmatch(self.encoding):
            raise SchemaError(f"an image's encoding is a short lower-case name such as 'jpeg', got {self.encoding!r}")


@dataclass(frozen=True)
class Tensor:
    """Column type: an array that has the same shape in every record.

    Args:
        dtype: Data type of the elements: a name such as "float32", a numpy dtype or type, or a torch dtype.
        shape: Shape of the array of a record, 1 to 32 dimensions.
        nullable: Whether a record may have no array (None).
    """

    dtype: str
    shape: tuple[int, ...]
    nullable: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", check_dtype(self.dtype))
        object.__setattr__(self, "shape", _check_shape(self.shape))
        if None in self.shape:
            raise SchemaError(f"a Tensor has one shape, got {self.shape}; dimensions that vary (None) make it a Ragged")
        n_bytes = STORED[self.dtype].itemsize
        for dimension in self.shape:
            n_bytes *= dimension
        if n_bytes > MAX_DIMENSION:
            raise SchemaError(
                f"a Tensor of shape {self.shape} has {n_bytes} bytes; the most is {MAX_DIMENSION}; use a Ragged"
            )


@dataclass(frozen=True)
class Ragged:
    """Column type: an array whose shape differs between records.

    Args:
        dtype: Data type of the elements: a name such as "float32", a numpy dtype or type, or a torch dtype.
        shape: Shape of the array of a record, 1 to 32 dimensions; None for a dimension that varies.
        nullable: Whether a record may have no array (None).
    """

    dtype: str
    shape: tuple[int | None, ...]
    nullable: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", check_dtype(self.dtype))
        object.__setattr__(self, "shape", _check_shape(self.shape))
        if None not in self.shape:
            raise SchemaError(f"a Ragged has a dimension that varies (None), got {self.shape}; use a Tensor")


UserType: TypeAlias = str | Image | Tensor | Ragged | pa.DataType | pa.Field


def check_name(name: object) -> str:
    """Return the name if it is a non-empty str without NUL; raise SchemaError otherwise."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise SchemaError(f"a column's name is a non-empty str without NUL, got {name!r}")
    return name


def check_dtype(dtype: object) -> str:
    """Return the name of a dtype given as a name, a numpy dtype or type, or a torch dtype. Raises SchemaError."""
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else dtype.__name__
    if name not in STORED:
        raise SchemaError(f"no such dtype: {dtype!r}", expected=f"one of {', '.join(STORED)}", got=repr(dtype))
    return name


def _check_shape(shape: object) -> tuple[int | None, ...]:
    try:
        dimensions = tuple(d if d is None else int(d) for d in shape)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise SchemaError(f"a shape is a tuple of integers (or None), got {shape!r}") from error
    if not 1 <= len(dimensions) <= MAX_DIMENSIONS:
        raise SchemaError(
            f"a shape has 1 to {MAX_DIMENSIONS} dimensions, got {shape!r}; one value a record is the dtype alone"
        )
    if any(d is not None and not 0 <= d <= MAX_DIMENSION for d in dimensions):
        raise SchemaError(f"a dimension is 0 to {MAX_DIMENSION}, got {shape!r}")
    return dimensions


class BFloat16Type(pa.ExtensionType):  # type: ignore[misc]  # pyarrow ships no types
    """Arrow type of bfloat16 numbers, stored as their 16 bits."""

    def __init__(self) -> None:
        super().__init__(pa.uint16(), "tiercache.bfloat16")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> BFloat16Type:
        return cls()


class ImageType(pa.ExtensionType):  # type: ignore[misc]  # pyarrow ships no types
    """Arrow type of encoded images, stored as bytes."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        super().__init__(pa.large_binary(), "tiercache.image")

    def __arrow_ext_serialize__(self) -> bytes:
        return json.dumps({"encoding": self.encoding}).encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> ImageType:
        return cls(str(json.loads(serialized)["encoding"]))


class RaggedType(pa.ExtensionType):  # type: ignore[misc]  # pyarrow ships no types
    """Arrow type of ragged arrays: struct<data: large_list<T>, shape: fixed_size_list<int32>[n_dimensions]>."""

    def __init__(self, value_type: pa.DataType, shape: tuple[int | None, ...]) -> None:
        self.value_type = value_type
        self.shape = shape
        fields = [pa.field("data", pa.large_list(value_type)), pa.field("shape", pa.list_(pa.int32(), len(shape)))]
        super().__init__(pa.struct(fields), "tiercache.variable_shape_tensor")

    def __arrow_ext_serialize__(self) -> bytes:
        return json.dumps({"uniform_shape": list(self.shape)}).encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> RaggedType:
        shape: list[Any] = json.loads(serialized)["uniform_shape"]
        return cls(storage_type.field("data").type.value_type, tuple(shape))


def register_extension_types() -> None:
    """Register the types with Arrow. A type that is registered already is left alone."""
    for example in (BFloat16Type(), ImageType("jpeg"), RaggedType(pa.float32(), (None,))):
        try:
            pa.register_extension_type(example)
        except pa.ArrowKeyError:  # registered already
            continue


MAX_DEPTH = 32


def storable_type(arrow_type: pa.DataType, depth: int = 0) -> pa.DataType:
    """Return the type as which an Arrow type is stored; raise SchemaError if it has no storable form.

    A dictionary is stored as its values, a view as the large type, and an extension type as its storage type.
    """
    if depth > MAX_DEPTH:
        raise SchemaError(f"an Arrow type may be nested at most {MAX_DEPTH} levels deep")
    if isinstance(arrow_type, pa.BaseExtensionType):
        return storable_type(arrow_type.storage_type, depth + 1)
    if pt.is_dictionary(arrow_type):
        return storable_type(arrow_type.value_type, depth + 1)
    if pt.is_string_view(arrow_type):
        return pa.large_string()
    if pt.is_binary_view(arrow_type):
        return pa.large_binary()
    if pt.is_struct(arrow_type):
        return pa.struct([_storable_field(arrow_type.field(i), depth) for i in range(arrow_type.num_fields)])
    if pt.is_map(arrow_type):
        key, item = storable_type(arrow_type.key_type, depth + 1), _storable_field(arrow_type.item_field, depth)
        return pa.map_(key, item, keys_sorted=arrow_type.keys_sorted)
    if pt.is_fixed_size_list(arrow_type):
        return pa.list_(_storable_field(arrow_type.value_field, depth), arrow_type.list_size)
    if pt.is_large_list(arrow_type) or _is_view(arrow_type):
        return pa.large_list(_storable_field(arrow_type.value_field, depth))
    if pt.is_list(arrow_type):
        return pa.list_(_storable_field(arrow_type.value_field, depth))
    count_nodes_and_buffers(arrow_type)
    return arrow_type


def _is_view(arrow_type: pa.DataType) -> bool:
    return bool(pt.is_list_view(arrow_type) or pt.is_large_list_view(arrow_type))


def _storable_field(field: pa.Field, depth: int) -> pa.Field:
    return pa.field(field.name, storable_type(field.type, depth + 1), nullable=field.nullable)


@lru_cache(maxsize=1024)
def count_nodes_and_buffers(arrow_type: pa.DataType) -> tuple[int, int]:
    """Return the numbers of nodes and buffers of an array of a type; raise SchemaError if it cannot be stored."""
    nodes, buffers = 1, _own_buffers(arrow_type)
    for child in _children(arrow_type):
        child_nodes, child_buffers = count_nodes_and_buffers(child)
        nodes, buffers = nodes + child_nodes, buffers + child_buffers
    return nodes, buffers


def _own_buffers(arrow_type: pa.DataType) -> int:
    if pt.is_struct(arrow_type) or pt.is_fixed_size_list(arrow_type) or pt.is_null(arrow_type):
        return 1
    if (
        pt.is_binary(arrow_type)
        or pt.is_string(arrow_type)
        or pt.is_large_binary(arrow_type)
        or pt.is_large_string(arrow_type)
    ):
        return 3
    if pt.is_list(arrow_type) or pt.is_large_list(arrow_type) or pt.is_map(arrow_type):
        return 2
    if pt.is_primitive(arrow_type) or pt.is_fixed_size_binary(arrow_type) or pt.is_decimal(arrow_type):
        return 2
    raise SchemaError(f"values of the Arrow type {arrow_type} cannot be stored; cast them first")


def _children(arrow_type: pa.DataType) -> list[pa.DataType]:
    if pt.is_map(arrow_type):
        return [pa.struct([arrow_type.key_field, arrow_type.item_field])]
    if pt.is_nested(arrow_type):
        return [arrow_type.field(i).type for i in range(arrow_type.num_fields)]
    return []


def build_array(
    arrow_type: pa.DataType, nodes: Iterator[tuple[int, int]], buffers: Iterator[pa.Buffer | None]
) -> pa.Array:
    """Return an array over buffers, without a copy. Nodes are (length, nulls); both are depth first.

    Raises ArrowException if they do not fit the type, as far as Arrow's cheap checks find it.
    """
    length, nulls = next(nodes)
    own = [next(buffers) for _ in range(_own_buffers(arrow_type))]
    if not nulls:
        own[0] = None
    children = [build_array(child, nodes, buffers) for child in _children(arrow_type)]
    return pa.Array.from_buffers(arrow_type, length, own, nulls, children=children)
