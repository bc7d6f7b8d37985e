"""Column types as a user states them (names, Image, Tensor, Ragged), and the numpy dtype that stores each dtype."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import pyarrow as pa

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
    """Return the name if it is a valid column name.

    Raises:
        SchemaError: The name is not a str, is empty, or contains NUL.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise SchemaError(f"a column's name is a non-empty str without NUL, got {name!r}")
    return name


def check_dtype(dtype: object) -> str:
    """Return the name of a dtype, which is given as a name, a numpy dtype or type, or a torch dtype.

    Raises:
        SchemaError: The dtype is not supported.
    """
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
