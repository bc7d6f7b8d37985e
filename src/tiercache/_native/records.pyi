"""Records one by one into the memory of a block."""

from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

# The values that a column takes without a closer look: none, arrays of its dtype, int, float, bool, bytes, ASCII str.
NONE: int
ARRAYS: int
INTEGERS: int
FLOATS: int
BOOLS: int
BYTES: int
TEXT: int
# What became of a record: nothing; it is kept; it is kept, and all are more than the room.
NEEDS_CONVERSION: int
KEPT: int
EXCEEDS_BLOCK: int

class Spec(Protocol):
    """A column. dtype: of a stored element.

    varying: whether records differ in length; shape: of a record, None where they differ. usual: see above; format:
    of an array's buffer; scalar_type: numpy's; low, high: the least and the greatest int; limit: the greatest float.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def shape(self) -> tuple[int | None, ...]: ...
    @property
    def varying(self) -> bool: ...
    @property
    def nullable(self) -> bool: ...
    @property
    def usual(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def scalar_type(self) -> type | None: ...
    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def limit(self) -> float: ...

@final
class Records:
    """Rows of some columns in memory that grows. One thread.

    room_bytes: above it a record is EXCEEDS_BLOCK; n_bytes: of the rows, by which blocks are cut.
    """

    n_records: int
    n_bytes: int
    last_bytes: int
    room_bytes: int
    def __new__(cls, specs: Sequence[Spec], room_bytes: int) -> Records: ...
    def add(self, record: object) -> int:
        """Keep a record: a dict that has exactly the columns' names, and usual values only. Else NEEDS_CONVERSION."""

    def fill(self, record: dict[str, Any], start: int) -> int:
        """Put usual values from column `start` on, up to one that is none; returns its number, or that of columns."""

    def put(self, index: int, value: Any, shape: Sequence[int] = ()) -> None:
        """Put a converted value: None for a null, what numpy can assign, or a contiguous run of bytes and its shape."""

    def commit(self, extra_bytes: int = 0) -> int:
        """Count the record whose columns were all put, and extra_bytes beside them. Returns KEPT or EXCEEDS_BLOCK."""

    def take(self, n: int) -> list[tuple[NDArray[Any], NDArray[np.int64] | None, NDArray[np.int32] | None, Any]]:
        """The first n records, all or all but the last, and begin anew with what is left.

        Of each column (values, offsets int64[n + 1], shapes int32[n, dimensions], valid bool[n]), the caller's from now
        on. values: stored elements [n, *shape], or all bytes that offsets, in elements, point into.
        """

def join(
    values: Sequence[Any], text: bool, nullable: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_] | None] | None:
    """All bytes one after another, the offsets int64[n + 1] and, if there are nulls, which are none: bool[n].

    None if a value is anything but bytes, or ASCII str if text, or None if nullable.
    """
