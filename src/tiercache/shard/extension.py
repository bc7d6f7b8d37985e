"""Arrow extension types of columns. A reader does not depend on them, because the field's metadata has the type too.

Ragged arrays cannot use the canonical arrow.variable_shape_tensor: its list has 32-bit offsets, and Arrow refuses a
schema with other offsets. RaggedType is the same struct with 64-bit offsets.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa


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
    """Arrow type of ragged arrays, stored as struct<data: large_list<T>, shape: fixed_size_list<int32>[n_dimensions]>.

    Args:
        value_type: Arrow type of the elements.
        shape: Shape of the arrays, with None for a dimension that varies.
    """

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
