"""Types of columns and their notation, Column and Schema, and the comparison of two schemas."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from functools import cached_property, lru_cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeAlias, get_args, get_origin

import numpy as np
import numpy.typing as npt
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
    f"{', '.join(STORED)}, int and float (64 bits), bytes, str, json, image, image<jpeg>; with a shape, as in "
    "float32[3, 64] or int32[*, 4]; list<str>, struct<a: str, b: int8>, map<str, int8>; timestamp[us] and other names "
    "of Arrow; each with '?' if values may be None; a type of Python, NumPy, torch or Arrow; tiercache.Image, "
    "tiercache.Tensor or tiercache.Ragged"
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
        encoding: Name of the encoding in lower case, such as "jpeg" or "png". None: images of any encoding.
        nullable: Whether a record may have no image (None).
    """

    encoding: str | None = None
    nullable: bool = False

    def __post_init__(self) -> None:
        if self.encoding is None:
            return
        if type(self.encoding) is not str or not _ENCODING.fullmatch(self.encoding):
            raise SchemaError(f"an image's encoding is a short lower-case name such as 'jpeg', got {self.encoding!r}")


@dataclass(frozen=True)
class Tensor:
    """Column type: an array that has the same shape in every record.

    Args:
        dtype: Data type of the elements: a name such as "float32", or a type of Python, NumPy, torch or Arrow.
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
        dtype: Data type of the elements: a name such as "float32", or a type of Python, NumPy, torch or Arrow.
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


# A type as users state it: in the notation of resolve_type(), or as an object. torch's types need no import of torch.
UserType: TypeAlias = str | type | np.dtype[Any] | Image | Tensor | Ragged | pa.DataType | pa.Field
# A resolved type, without its "?". A str is a dtype, or "bytes", "str" or "json".
PlainType: TypeAlias = str | Image | Tensor | Ragged | pa.DataType


def check_name(name: object) -> str:
    """Return the name if it is a non-empty str without NUL; raise SchemaError otherwise."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise SchemaError(f"a column's name is a non-empty str without NUL, got {name!r}")
    return name


def check_dtype(dtype: object) -> str:
    """Return the name of a dtype that is stated as a name, or as a type of Python, NumPy, torch or Arrow."""
    if type(dtype) is str and dtype in STORED:
        return dtype
    nearest: object = ""
    try:
        plain, nullable = resolve_type(dtype)
        if plain in STORED and not nullable:
            return str(plain)
    except SchemaError as error:
        nearest = error.details.get("nearest", "")
    raise SchemaError(
        f"no such dtype: {dtype!r}{nearest}; the dtypes are {', '.join(STORED)}",
        expected=f"one of {', '.join(STORED)}",
        got=repr(dtype),
    )


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


# A type that comes from elsewhere keeps its storage type: Arrow reads memory by it, and polars, for example, passes on
# bytes as binary_view.


class BFloat16Type(pa.ExtensionType):  # type: ignore[misc]  # pyarrow ships no types
    """Arrow type of bfloat16 numbers, stored as their 16 bits."""

    def __init__(self, storage_type: pa.DataType | None = None) -> None:
        super().__init__(storage_type or pa.uint16(), "tiercache.bfloat16")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> BFloat16Type:
        return cls(storage_type)


class ImageType(pa.ExtensionType):  # type: ignore[misc]  # pyarrow ships no types
    """Arrow type of encoded images, stored as bytes."""

    def __init__(self, encoding: str, storage_type: pa.DataType | None = None) -> None:
        self.encoding = encoding
        super().__init__(storage_type or pa.large_binary(), "tiercache.image")

    def __arrow_ext_serialize__(self) -> bytes:
        return json.dumps({"encoding": self.encoding}).encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> ImageType:
        return cls(str(json.loads(serialized)["encoding"]), storage_type)


class RaggedType(pa.ExtensionType):  # type: ignore[misc]  # pyarrow ships no types
    """Arrow type of ragged arrays: struct<data: large_list<T>, shape: fixed_size_list<int32>[n_dimensions]>."""

    def __init__(
        self, value_type: pa.DataType, shape: tuple[int | None, ...], storage_type: pa.DataType | None = None
    ) -> None:
        self.value_type = value_type
        self.shape = shape
        fields = [pa.field("data", pa.large_list(value_type)), pa.field("shape", pa.list_(pa.int32(), len(shape)))]
        super().__init__(storage_type or pa.struct(fields), "tiercache.variable_shape_tensor")

    def __arrow_ext_serialize__(self) -> bytes:
        return json.dumps({"uniform_shape": list(self.shape)}).encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> RaggedType:
        shape: list[Any] = json.loads(serialized)["uniform_shape"]
        return cls(storage_type.field("data").type.value_type, tuple(shape), storage_type)


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

    A dictionary is stored as its values, a view of text or bytes as the large type, and an extension type as its
    storage type. List views are refused: pyarrow's casts of them lose elements without an error.
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
    if pt.is_large_list(arrow_type):
        return pa.large_list(_storable_field(arrow_type.value_field, depth))
    if pt.is_list(arrow_type):
        return pa.list_(_storable_field(arrow_type.value_field, depth))
    if pt.is_list_view(arrow_type) or pt.is_large_list_view(arrow_type):
        raise SchemaError(
            f"values of the Arrow type {arrow_type} cannot be stored; make lists of them: pa.array(values.to_pylist())"
        )
    count_nodes_and_buffers(arrow_type)
    return arrow_type


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
    if isinstance(arrow_type, BFloat16Type):
        return "bfloat16"
    if isinstance(arrow_type, ImageType):
        return Image(arrow_type.encoding or None)
    if isinstance(arrow_type, RaggedType):
        return Ragged(_element_name(arrow_type.value_type), arrow_type.shape)
    if name == "arrow.fixed_shape_tensor" and arrow_type.permutation is None:
        return Tensor(_element_name(arrow_type.value_type), tuple(arrow_type.shape))
    if name == "arrow.json":
        return "json"
    if name == "arrow.bool8":
        return "bool"
    return type_of_arrow(arrow_type.storage_type)


_PLAIN_NAMES = {name: name for name in (*STORED, "bytes", "str", "json")} | {"int": "int64", "float": "float64"}
_NESTED = ("list", "large_list", "struct", "map")
# Names that an unknown name is compared with.
_NAMES = (*_PLAIN_NAMES, "image", *_NESTED, "timestamp", "date32", "time64", "duration", "decimal128")
_PYTHON_TYPES = (bool, int, float, str, bytes)  # their names are names of types
_NAME = re.compile(r"\s*(\w*)\s*")


def resolve_type(user: object) -> tuple[PlainType, bool]:
    """Return a type that a user states, and whether it is nullable. Raises SchemaError, which lists the types.

    The notation of types is the same wherever a type is written or shown::

        float32    int    str    bytes    json    image    image<jpeg>
        float32[3, 64]    int32[*, 4]                    a Tensor; a Ragged
        list<int32>                                      the same as int32[*]
        list<str>    list<str>[2]    struct<a: str, b: int8>    map<str, int8>
        timestamp[us]    timestamp[us, UTC]    decimal128(10, 2)    date32    and the other names of Arrow's types

    A "?" after a type, also after an inner one, says that values may be None. An Arrow list of numbers is a Ragged,
    although Arrow lists may have null elements unless they say otherwise; list<int32?> is an Arrow list.
    """
    if isinstance(user, Image | Tensor | Ragged):
        return user, user.nullable
    if isinstance(user, pa.Field):
        return _type_of_user_arrow(user.type), bool(user.nullable)
    if isinstance(user, pa.DataType):
        return _type_of_user_arrow(user), bool(pt.is_null(user))
    text = str(user)
    try:
        text = _text_of_type(user)
        plain, nullable, rest = _parse_type(text)
        if rest:
            raise ValueError(f"{rest!r} follows the type")
    except LookupError as error:
        raise _unknown_type(user, text, str(error.args[0])) from None
    except SchemaError:
        raise
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise _unknown_type(user, text) from error
    return type_of_arrow(plain) if isinstance(plain, pa.DataType) and not is_list(plain) else plain, nullable


def _text_of_type(user: object) -> str:
    """Return the notation of a type of Python, NumPy or torch. Raises LookupError for another object."""
    if isinstance(user, str):
        return user
    if isinstance(user, np.dtype):
        if user.kind in "Mm":
            return str(pa.from_numpy_dtype(user))
        return {"U": "str", "T": "str", "S": "bytes"}.get(user.kind, user.name)
    if isinstance(user, type) and (user in _PYTHON_TYPES or issubclass(user, np.generic)):
        return user.__name__.rstrip("_")
    if type(user).__module__ == "torch":
        return str(user).removeprefix("torch.")
    inner = get_args(user)
    if isinstance(user, UnionType) and len(inner) == 2 and inner[1] is NoneType:  # int | None
        return f"{_text_of_type(inner[0])}?"
    if get_origin(user) is list and len(inner) == 1:  # list[int]
        return f"list<{_text_of_type(inner[0])}>"
    raise LookupError("" if user is list else getattr(user, "__name__", ""))


def _unknown_type(user: object, text: str, name: str = "") -> SchemaError:
    """Return the error of a text that is no type. name: The part of it that is no name of a type."""
    found = get_close_matches(name.lower(), _NAMES, 1)
    nearest = f"; the nearest is {text.replace(name, found[0], 1)!r}" if found else ""
    message = f"no such type: {user!r}{nearest}; the types are {SUPPORTED_TYPES}"
    return SchemaError(message, expected=SUPPORTED_TYPES, got=repr(user), nearest=nearest)


def _parse_type(text: str) -> tuple[PlainType, bool, str]:
    """Return the type at the start of a text, whether it is nullable, and the rest of the text.

    Raises LookupError with a name that is unknown, and ValueError.
    """
    plain: PlainType
    _, name, rest = _NAME.split(text, 1)
    if rest.startswith("<"):
        plain, rest = _parse_nested(name, rest[1:].lstrip())
    elif rest.startswith(("[", "(")):
        arguments, end, rest = rest[1:].partition("]" if rest[0] == "[" else ")")
        if not end:
            raise ValueError("a bracket is not closed")
        plain = _apply_arguments(name, [argument.strip() for argument in arguments.split(",")])
    elif name == "image":
        plain = Image()
    else:
        plain = _PLAIN_NAMES.get(name) or _arrow_name(name)
    rest = rest.lstrip()
    return plain, rest.startswith("?"), rest.removeprefix("?").lstrip()


def _arrow_name(name: str, arguments: str = "") -> pa.DataType:
    try:
        return pa.type_for_alias(name + arguments)
    except ValueError:
        if name in _NAMES:
            raise
        raise LookupError(name) from None


def _apply_arguments(name: str, arguments: list[str]) -> PlainType:
    """Return a dtype with a shape, or an Arrow type with its arguments."""
    dtype = _PLAIN_NAMES.get(name, "")
    if dtype in STORED:
        shape = tuple(None if d == "*" else int(d) for d in arguments)
        return Ragged(dtype, shape) if None in shape else Tensor(dtype, tuple(d or 0 for d in shape))
    if name == "timestamp" and len(arguments) > 1:
        return pa.timestamp(arguments[0], arguments[1].removeprefix("tz="))
    if name == "fixed_size_binary":
        return pa.binary(int(arguments[0]))
    if name in ("decimal32", "decimal64", "decimal128", "decimal256"):
        return getattr(pa, name)(*map(int, arguments))
    return _arrow_name(name, f"[{', '.join(arguments)}]")


def _parse_nested(name: str, text: str) -> tuple[PlainType, str]:
    """Return the type whose name and "<" were read, and the rest of the text. Raises as _parse_type()."""
    if name == "image":
        encoding, _, rest = text.partition(">")
        return Image(encoding.strip()), rest
    if name not in _NESTED:
        raise LookupError(name)
    inner: list[PlainType] = []
    fields: list[pa.Field] = []
    while not text.startswith(">"):
        field_name = "item"
        if name == "struct":
            field_name, _, text = text.partition(":")
        plain, nullable, text = _parse_type(text)
        inner.append(plain)
        fields.append(pa.field(field_name.strip(), _arrow_type_of(plain), nullable=nullable))
        if not text.startswith((",", ">")):
            raise ValueError("expected ',' or '>'")
        text = text.removeprefix(",").lstrip()
    text = text[1:].lstrip()
    if name == "struct":
        return pa.struct(fields), text
    if name == "map":
        key, item = fields
        return pa.map_(key.type, item.with_name("value")), text
    (item,) = fields
    if text.startswith("["):
        size, _, text = text[1:].partition("]")
        return pa.list_(item, int(size)), text
    if name == "list" and inner[0] in STORED and not item.nullable:
        return Ragged(str(inner[0]), (None,)), text
    return pa.large_list(item) if name == "large_list" else pa.list_(item), text


def _arrow_type_of(plain: PlainType) -> pa.DataType:
    """Return the Arrow type of an inner type. Raises SchemaError for one that Arrow's nested types cannot have."""
    if isinstance(plain, pa.DataType):
        return plain
    if isinstance(plain, Image) or plain in ("json", "bfloat16"):
        name = "image" if isinstance(plain, Image) else plain
        raise SchemaError(f"lists, structs and maps cannot have values of the type {name}", got=name)
    if isinstance(plain, str):
        return {"str": pa.string(), "bytes": pa.binary(), "bool": pa.bool_()}.get(plain) or pa.from_numpy_dtype(
            STORED[plain]
        )
    found = _arrow_type_of(plain.dtype)
    for dimension in reversed(plain.shape):
        item = pa.field("item", found, nullable=False)
        found = pa.list_(item) if dimension is None else pa.list_(item, dimension)
    return found


def is_list(arrow_type: pa.DataType) -> bool:
    """Return whether values are lists of any lengths."""
    return bool(pt.is_list(arrow_type) or pt.is_large_list(arrow_type))


def _type_of_user_arrow(arrow_type: pa.DataType) -> PlainType:
    """Return the type for an Arrow type that a user states or a file has; a list of numbers is a Ragged."""
    if not is_list(arrow_type):
        return type_of_arrow(arrow_type)
    inner = arrow_type.value_type
    if pt.is_integer(inner) or pt.is_floating(inner) or pt.is_boolean(inner):
        return Ragged(_element_name(inner), (None,))
    return arrow_type


def show_arrow_type(arrow_type: pa.DataType) -> str:
    """Return an Arrow type in the notation of resolve_type()."""
    if is_list(arrow_type):
        name = "list" if pt.is_list(arrow_type) else "large_list"
        return f"{name}<{_show_field(arrow_type.value_field)}>"
    if pt.is_fixed_size_list(arrow_type):
        return f"list<{_show_field(arrow_type.value_field)}>[{arrow_type.list_size}]"
    if pt.is_struct(arrow_type):
        return f"struct<{', '.join(f'{field.name}: {_show_field(field)}' for field in arrow_type)}>"
    if pt.is_map(arrow_type):
        return f"map<{show_arrow_type(arrow_type.key_type)}, {_show_field(arrow_type.item_field)}>"
    if pt.is_timestamp(arrow_type) and arrow_type.tz is not None:
        return f"timestamp[{arrow_type.unit}, {arrow_type.tz}]"
    return {"string": "str", "binary": "bytes"}.get(str(arrow_type), _element_name(arrow_type))


def _show_field(field: pa.Field) -> str:
    return f"{show_arrow_type(field.type)}{'?' if field.nullable else ''}"


# These values equal those in csrc/gather.h; a test compares them.
FIXED, BITS, VAR = 0, 1, 2
TYPE_KEY = b"tiercache.type"
# Field metadata that a data set keeps: a JSON list of the class names of the labels 0, 1, 2, ...
CLASSES_KEY = b"tiercache.classes"
# Field metadata that a data set keeps: a JSON object with the name and the vocabulary of the tokenizer of the tokens.
TOKENIZER_KEY = b"tiercache.tokenizer"
_BYTE_KINDS = {
    Kind.BYTES: pa.large_binary(),
    Kind.STR: pa.large_string(),
    Kind.JSON: pa.large_string(),
    Kind.IMAGE: pa.large_binary(),
}
register_extension_types()


def with_nulls(schema: pa.Schema, found: Collection[str]) -> pa.Schema:
    """Return a schema of a file with fields that are nullable if nulls were found, or if one of ours says so."""
    return pa.schema(
        [
            field.with_nullable(field.name in found or (TYPE_KEY in (field.metadata or {}) and field.nullable))
            for field in schema
        ]
    )


class UnknownKindError(SchemaError):
    """A column has a kind that only a later release knows."""

    @property
    def needed(self) -> str:
        """Name of the feature that a release needs to read the column."""
        return f"kind {self.details['kind']!r} of column {self.column!r}"


@dataclass(frozen=True, slots=True)
class Stream:
    """The Arrow buffers of a column that the gather kernel reads as one unit.

    Attributes:
        column: Index of the column in the schema.
        role: Content of the buffers: the values, the validity bits, or the shapes of a ragged column.
        kind: FIXED, BITS or VAR.
        width_bytes: Number of bytes of a row (FIXED) or of an element (VAR).
        values_buffer: Index of the values among the buffers of the chunk.
        offsets_buffer: Index of the offsets (VAR) among the buffers of the chunk.
    """

    column: int
    role: Literal["values", "valid", "shape"]
    kind: int
    width_bytes: int
    values_buffer: int
    offsets_buffer: int | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A typed column.

    Attributes:
        dtype: Name of the dtype of the elements; None for a kind without numbers.
        shape: Shape of a record's value, () for a scalar, None for a dimension that varies.
        encoding: Encoding of an IMAGE column; None for other kinds.
        arrow: Arrow field of the column, with metadata.
    """

    name: str
    kind: Kind
    dtype: str | None
    shape: tuple[int | None, ...]
    nullable: bool
    encoding: str | None
    arrow: pa.Field

    @staticmethod
    def of(name: str, user: UserType) -> Column:
        """Return the column with this name and this type, as a user states it. Raises SchemaError."""
        check_name(name)
        try:
            return _column_of(name, user)
        except SchemaError as error:
            if error.column is None:
                raise SchemaError(error.message, column=name, **_rest(error)) from error
            raise

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the labels 0, 1, 2, ..., if the metadata of the field lists them; otherwise ()."""
        return tuple(json.loads((self.arrow.metadata or {}).get(CLASSES_KEY, b"[]")))

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """Tokenizer of the tokens, by "name", "vocabulary" and "sha256", if `tc.pack(tokenize=)` wrote them; or {}."""
        stated: Mapping[str, Any] = json.loads((self.arrow.metadata or {}).get(TOKENIZER_KEY, b"{}"))
        return stated

    @property
    def stored(self) -> np.dtype[np.generic]:
        """Numpy dtype of a stored element (uint8 for the bytes-like kinds)."""
        return STORED[self.dtype] if self.dtype is not None else np.dtype("u1")

    @property
    def n_elements(self) -> int:
        """Number of elements of a record of a SCALAR or TENSOR column."""
        return math.prod(d or 0 for d in self.shape)

    @property
    def row_bytes(self) -> int:
        """Number of stored bytes of a record of a SCALAR or TENSOR column."""
        return self.n_elements * self.stored.itemsize

    @property
    def storage_type(self) -> pa.DataType:
        """Arrow storage type of the extension type; the Arrow type itself if it is not an extension type."""
        return self.arrow.type.storage_type if isinstance(self.arrow.type, pa.BaseExtensionType) else self.arrow.type

    @property
    def has_offsets(self) -> bool:
        """Whether the records of the column differ in length (RAGGED and the bytes-like kinds)."""
        return self.kind is Kind.RAGGED or self.kind in _BYTE_KINDS

    def layout(self) -> tuple[int, int]:
        """Return the numbers of Arrow nodes and buffers of a chunk of the column, (n_nodes, n_buffers)."""
        return count_nodes_and_buffers(self.storage_type)

    def streams(self, index: int) -> tuple[Stream, ...]:
        """Return the streams of column `index` of a schema: values, then shapes, then validity. ARROW has none."""
        if self.kind is Kind.ARROW:
            return ()
        found: list[Stream] = []
        if self.kind is Kind.SCALAR:
            found.append(Stream(index, "values", FIXED, self.row_bytes, 1))
        elif self.kind is Kind.BOOL:
            found.append(Stream(index, "values", BITS, 0, 1))
        elif self.kind is Kind.TENSOR:
            found.append(Stream(index, "values", FIXED, self.row_bytes, 2))
        elif self.kind is Kind.RAGGED:
            found.append(Stream(index, "values", VAR, self.stored.itemsize, 4, 2))
            found.append(Stream(index, "shape", FIXED, 4 * len(self.shape), 7))
        else:
            found.append(Stream(index, "values", VAR, 1, 2, 1))
        if self.nullable:
            found.append(Stream(index, "valid", BITS, 0, 0))
        return tuple(found)

    def __str__(self) -> str:
        dimensions = ", ".join("*" if d is None else str(d) for d in self.shape)
        text = {
            Kind.TENSOR: f"{self.dtype}[{dimensions}]",
            Kind.RAGGED: f"{self.dtype}[{dimensions}]",
            Kind.IMAGE: f"image<{self.encoding}>" if self.encoding else "image",
            Kind.ARROW: show_arrow_type(self.arrow.type),
        }.get(self.kind, self.dtype or self.kind.value)
        return f"{text}?" if self.nullable else text

    def __reduce__(self) -> tuple[Any, ...]:
        # Not every pyarrow release can pickle a field of an extension type; the metadata of the field holds the type.
        return _column_from_bytes, (Schema([self]).to_bytes(),)


def find_bad_shape(column: Column, shapes: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> int | None:
    """Return the first record of a ragged column whose shape, [n, n_dimensions], does not fit column or length."""
    # An int64 product may wrap around to the correct number; a float64 product cannot.
    wrong = (shapes < 0).any(axis=1) | (shapes.prod(axis=1, dtype=np.int64) != lengths)
    wrong |= shapes.prod(axis=1, dtype=np.float64) != lengths
    for number, dimension in enumerate(column.shape):
        if dimension is not None:
            wrong |= shapes[:, number] != dimension
    return int(np.argmax(wrong)) if wrong.any() else None


class Schema:
    """An ordered list of named, typed columns. Immutable, and hashable by content."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        self._index = {column.name: i for i, column in enumerate(self.columns)}
        if len(self._index) != len(self.columns):
            raise SchemaError(f"column names must differ, got {[c.name for c in self.columns]}")
        for column in self.columns:
            if column.nullable and f"{column.name}.valid" in self._index:
                raise SchemaError(
                    "the name is taken: batches have the nulls of a nullable column there",
                    column=f"{column.name}.valid",
                )

    @staticmethod
    def of(user: Mapping[str, UserType] | pa.Schema | Schema) -> Schema:
        """Return the schema that a user states as a mapping of names to types, or as an Arrow schema."""
        if isinstance(user, Schema):
            return user
        if isinstance(user, pa.Schema):
            return Schema([Column.of(field.name, field) for field in user])
        if not isinstance(user, Mapping):
            raise SchemaError(f"a schema is a mapping of names to types or an Arrow schema, got {type(user).__name__}")
        return Schema([Column.of(name, kind) for name, kind in user.items()])

    @cached_property
    def arrow(self) -> pa.Schema:
        """Arrow schema of the columns, with extension types and metadata."""
        return pa.schema([column.arrow for column in self.columns])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(column.name for column in self.columns)

    def index(self, name: str) -> int:
        """Return the index of the column with this name. Raises SchemaError, which lists the existing columns."""
        if name not in self._index:
            raise SchemaError(f"no such column; there are {', '.join(map(repr, self.names)) or 'none'}", column=name)
        return self._index[name]

    def select(self, names: Sequence[str]) -> Schema:
        """Return a schema of these columns, in the order of names. Raises SchemaError if a column does not exist."""
        return Schema([self.columns[self.index(name)] for name in names])

    def with_classes(self, classes: Mapping[str, Sequence[str]]) -> Schema:
        """Return the schema with class names of the labels 0, 1, 2, ... of these columns. Raises SchemaError."""
        columns = list(self.columns)
        for name, names in classes.items():
            index = self.index(name)
            column = columns[index]
            if column.kind is not Kind.SCALAR or column.dtype not in INTEGERS:
                raise SchemaError(f"only a column of integers has class names, and this is {column}", column=name)
            if isinstance(names, str) or not all(isinstance(one, str) for one in names):
                raise SchemaError(f"class names are a list of str, got {names!r}", column=name)
            if len(set(names)) < len(names):
                raise SchemaError(f"class names must differ from each other, got {list(names)!r}", column=name)
            metadata = column.arrow.metadata | {CLASSES_KEY: json.dumps(list(names), ensure_ascii=False).encode()}
            columns[index] = replace(column, arrow=column.arrow.with_metadata(metadata))
        return Schema(columns)

    def with_tokenizer(self, name: str, facts: Mapping[str, Any]) -> Schema:
        """Return the schema with the facts of the tokenizer that made the tokens of a column."""
        columns = list(self.columns)
        column = columns[index := self.index(name)]
        metadata = column.arrow.metadata | {TOKENIZER_KEY: json.dumps(facts, sort_keys=True).encode()}
        columns[index] = replace(column, arrow=column.arrow.with_metadata(metadata))
        return Schema(columns)

    def to_bytes(self) -> bytes:
        """Return the schema as an Arrow IPC schema message."""
        fields = [c.arrow.remove_metadata() if c.kind is Kind.ARROW else c.arrow for c in self.columns]
        return bytes(pa.schema(fields).serialize())

    @staticmethod
    def from_bytes(data: bytes) -> Schema:
        """Return the schema that to_bytes() wrote. Raises SchemaError if this release cannot read it."""
        return _schema_from_bytes(data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.arrow.equals(other.arrow, check_metadata=True)

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __len__(self) -> int:
        return len(self.columns)

    def __repr__(self) -> str:
        return f"Schema({', '.join(f'{column.name}: {column}' for column in self.columns)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Schema.from_bytes, (self.to_bytes(),)


def check_mapping(named: object) -> None:
    """Check that values are given as a mapping of column names to values. Raises TypeError otherwise."""
    if not isinstance(named, Mapping):
        raise TypeError(f"values come as a mapping from column names (or an Arrow batch), got {type(named).__name__}")


@lru_cache(maxsize=64)
def _schema_from_bytes(data: bytes) -> Schema:
    """Return the schema of an IPC message. All shards share one, and parsing costs more than the rest of a footer."""
    try:
        arrow = pa.ipc.read_schema(pa.py_buffer(data))
        _ = arrow.names  # a forged name may be no UTF-8
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"not an Arrow schema message: {error}") from error
    return Schema([_stored_column(check_name(field.name), field) for field in arrow])


def _column_from_bytes(data: bytes) -> Column:
    return Schema.from_bytes(data).columns[0]


def _rest(error: SchemaError) -> dict[str, Any]:
    return error.details | {"record": error.record, "expected": error.expected, "got": error.got}


def _column_of(name: str, user: UserType) -> Column:
    if isinstance(user, pa.Field) and TYPE_KEY in (user.metadata or {}):
        return _stored_column(name, user)
    plain, nullable = resolve_type(user)
    return _column_of_plain(name, plain, nullable, _kept(user) if isinstance(user, pa.Field) else None)


def _column_of_plain(name: str, plain: PlainType, nullable: bool, kept: Mapping[bytes, bytes] | None = None) -> Column:
    if isinstance(plain, pa.DataType):
        return _arrow_column(name, plain, nullable)
    if isinstance(plain, Image):
        return _build(name, Kind.IMAGE, nullable, encoding=plain.encoding, kept=kept)
    if isinstance(plain, Tensor | Ragged):
        kind = Kind.TENSOR if isinstance(plain, Tensor) else Kind.RAGGED
        return _build(name, kind, nullable, dtype=plain.dtype, shape=plain.shape, kept=kept)
    if plain in STORED:
        return _build(name, Kind.BOOL if plain == "bool" else Kind.SCALAR, nullable, dtype=plain, kept=kept)
    return _build(name, Kind(plain), nullable, kept=kept)


def _arrow_column(name: str, arrow_type: pa.DataType, nullable: bool) -> Column:
    # Without a stated kind, a list of numbers would become a Ragged where a program or a file has this field as a type.
    # Stored schemas do not state it.
    metadata = {TYPE_KEY: b'{"kind": "arrow"}'}
    field = pa.field(name, storable_type(arrow_type), nullable=nullable, metadata=metadata)
    return Column(name, Kind.ARROW, None, (), nullable, None, field)


def _build(
    name: str,
    kind: Kind,
    nullable: bool,
    dtype: str | None = None,
    shape: tuple[int | None, ...] = (),
    encoding: str | None = None,
    kept: Mapping[bytes, bytes] | None = None,
) -> Column:
    stated = {"kind": kind.value, "dtype": dtype, "shape": list(shape), "encoding": encoding}
    metadata = {TYPE_KEY: json.dumps({key: value for key, value in stated.items() if value}, sort_keys=True).encode()}
    metadata |= kept or {}
    field = pa.field(name, _arrow_type(kind, dtype, shape, encoding), nullable=nullable, metadata=metadata)
    return Column(name, kind, dtype, shape, nullable, encoding, field)


def _arrow_type(kind: Kind, dtype: str | None, shape: tuple[int | None, ...], encoding: str | None) -> pa.DataType:
    if kind is Kind.IMAGE:
        return ImageType(encoding or "")
    if kind in _BYTE_KINDS:
        return _BYTE_KINDS[kind]
    if kind is Kind.BOOL:
        return pa.bool_()
    if kind is Kind.SCALAR and dtype == "bfloat16":
        return BFloat16Type()
    element = pa.from_numpy_dtype(STORED[dtype or ""])
    if kind is Kind.SCALAR:
        return element
    if kind is Kind.TENSOR:
        return pa.fixed_shape_tensor(element, list(shape))
    return RaggedType(element, shape)


def _stored_column(name: str, field: pa.Field) -> Column:
    """Return the column of a field of a stored schema: of the type that its metadata states, or of its Arrow type."""
    stated = (field.metadata or {}).get(TYPE_KEY)
    plain = type_of_arrow(field.type) if stated is None else _stated_type(name, field, stated)
    return _column_of_plain(name, plain, field.nullable, _kept(field))


def _stated_type(name: str, field: pa.Field, stated: bytes) -> PlainType:
    """Return the type that the metadata of the field describes, if the field's storage type agrees with it."""
    try:
        facts = json.loads(stated)
        if isinstance(facts["kind"], str) and facts["kind"] not in set(Kind):
            raise UnknownKindError(f"no such kind here: {facts['kind']!r}", column=name, kind=facts["kind"])
        kind, shape = Kind(facts["kind"]), tuple(facts.get("shape", ()))
        dtype, encoding = facts.get("dtype"), facts.get("encoding")
        if kind is Kind.ARROW:
            return field.type
        plain: PlainType = {Kind.SCALAR: dtype, Kind.BOOL: "bool"}.get(kind, kind.value)
        if kind is Kind.TENSOR:
            plain = Tensor(dtype, shape)
        elif kind is Kind.RAGGED:
            plain = Ragged(dtype, shape)
        elif kind is Kind.IMAGE:
            plain = Image(encoding)
        column = _column_of_plain(name, plain, field.nullable)
    except UnknownKindError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"cannot read the type {stated!r}: {error}", column=name) from error
    storage = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    if column.kind is not kind or column.storage_type != storage:
        raise SchemaError(f"the type {stated!r} is not stored as {storage}", column=name)
    return plain


def _kept(field: pa.Field) -> dict[bytes, bytes]:
    """Return the metadata that a schema keeps of a field: known keys only, so equal data sets have equal schemas."""
    kept = {TOKENIZER_KEY: _checked_tokenizer(field)} if TOKENIZER_KEY in (field.metadata or {}) else {}
    stated = (field.metadata or {}).get(CLASSES_KEY)
    if stated is None:
        return kept
    try:
        names = json.loads(stated)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SchemaError(f"{CLASSES_KEY.decode()} is a JSON list of names, got {stated[:80]!r}", column=field.name)
    return {**kept, CLASSES_KEY: stated}


def _checked_tokenizer(field: pa.Field) -> bytes:
    stated: bytes = field.metadata[TOKENIZER_KEY]
    try:
        facts = json.loads(stated)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise SchemaError(f"{TOKENIZER_KEY.decode()} is a JSON object, got {stated[:80]!r}", column=field.name)
    return stated


def check_same_schema(first: Schema, other: Schema) -> None:
    """Raise SchemaError for the first difference that prevents appending records of the schema `other`."""
    if first == other:
        return
    check_same_columns(first, other, names=("the data set", "the appended batch"))
    message = "the columns' Arrow metadata differs from that of the data set"
    raise SchemaError(message, expected=first.arrow, got=other.arrow)


def check_same_columns(first: Schema, other: Schema, *, names: tuple[str, str]) -> None:
    """Raise SchemaError for the first difference in columns, their types and order, or class names that both have."""
    for schema, missing, has, lacks in ((first, other, *names), (other, first, *names[::-1])):
        for name in schema.names:
            if name not in missing.names:
                raise SchemaError(f"{has} has this column, but not {lacks}", column=name)
    for column in first.columns:
        other_column = other.columns[other.index(column.name)]
        if str(column) != str(other_column):
            message = f"{names[0]} has {column}, {names[1]} has {other_column}"
            raise SchemaError(message, column=column.name, expected=str(column), got=str(other_column))
        if column.classes and other_column.classes and column.classes != other_column.classes:
            message = f"{names[1]} has other class names for its labels than {names[0]}"
            raise SchemaError(message, column=column.name, expected=str(column.classes), got=str(other_column.classes))
    if first.names != other.names:
        message = (
            f"the columns are in another order: {names[0]} has {', '.join(first.names)}; use the same order in "
            f"{names[1]} (select_columns() changes that of a data set)"
        )
        raise SchemaError(message, expected=first.names, got=other.names)
