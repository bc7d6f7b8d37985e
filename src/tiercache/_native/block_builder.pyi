"""Builder of a block's memory from single records."""

from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

# Kinds of values that a column takes on the fast path: none, arrays of its dtype, int, float, bool, bytes, ASCII str.
NONE: int
ARRAYS: int
INTEGERS: int
FLOATS: int
BOOLS: int
BYTES: int
TEXT: int
# Results of add() and commit(): not added, because a value needs conversion; added; added, and the block is full.
NEEDS_CONVERSION: int
ADDED: int
EXCEEDS_BLOCK: int

class Spec(Protocol):
    """A column of the block.

    dtype: Dtype of a stored element. shape: Shape of a record, None where it varies. varying: Whether records differ in
    length. fast_kind: Kind of values that are stored directly. format: Format of an array's buffer. scalar_type: Its
    numpy scalar type. low, high: Least and greatest integer. limit: Greatest finite float.
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
    def fast_kind(self) -> int: ...
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
class BlockBuilder:
    """Rows of several columns in memory that grows. Only one thread may use it.

    Args:
        specs: Columns.
        limit_bytes: Size of a full block in bytes. n_bytes, the size of the rows, is compared with it.
    """

    n_records: int
    n_bytes: int
    last_bytes: int
    limit_bytes: int
    def __new__(cls, specs: Sequence[Spec], limit_bytes: int) -> BlockBuilder: ...
    def add(self, record: object) -> int:
        """Add a dict with exactly the column names and values of the fast path, or return NEEDS_CONVERSION."""

    def fill(self, record: dict[str, Any], start: int) -> int:
        """Put values from column `start` on. Return the first column that needs conversion, or their number."""

    def put(self, index: int, value: Any, shape: Sequence[int] = ()) -> None:
        """Put a converted value: None (a null), a value that numpy can assign, or contiguous bytes and their shape."""

    def commit(self, extra_bytes: int = 0) -> int:
        """Count the record whose columns are all put, with extra_bytes beside them. Return ADDED or EXCEEDS_BLOCK."""

    def take(self, n: int) -> list[tuple[NDArray[Any], NDArray[np.int64] | None, NDArray[np.int32] | None, Any]]:
        """Return the first n records (all, or all but the last); the rest becomes the start of a new block.

        Returns:
            For each column (values, offsets int64[n + 1], shapes int32[n, dimensions], valid bool[n]), owned by the
            caller. values: Stored elements [n, *shape], or the bytes that offsets, in elements, refer to.
        """

def join(
    values: Sequence[Any], text: bool, nullable: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_] | None] | None:
    """Return the joined bytes, offsets int64[n + 1] and, if there are nulls, a mask bool[n], True for a value.

    Returns None if a value is neither bytes (with text: ASCII str) nor, if nullable, None.
    """
