"""Gather rows of many blocks into one buffer (csrc/gather.h), checked on first touch.

All functions are thread-safe and raise OSError(EIO) where a mapping fails, CorruptError where a page's checksum is
wrong, and where offsets fall or leave their chunk, which is looked at always.

addresses: uint64[n_blocks, 3], of each block the addresses of its values and offsets (0 for none) and the number of
    elements of its values, which counts for VAR; kept alive by the caller for the call.
checks: uint64[n_blocks, 4] of the chunk that holds each block's buffers (base, n_bytes, address of the CRC-32C of its
    64 KiB pages, address of a byte for each page that becomes 1 once it was right, or 0: nothing to check), or None.
block, row: uint32[n]; block < n_blocks and row < rows of that block are the caller's to check.
"""

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

_U64: TypeAlias = NDArray[np.uint64]
_U32: TypeAlias = NDArray[np.uint32]

FIXED: Final[int]
"""width_bytes a row."""
BITS: Final[int]
"""One bit a row, least significant first; gathered as one byte a row, 0 or 1; a block without the buffer (address 0)
gives 1."""
VAR: Final[int]
"""int64 offsets in elements of width_bytes, and the elements."""
REF: Final[int]
"""As VAR with a width of 1, but the rows are referred to and not copied; of rings only."""

class CorruptError(ValueError):
    """Bytes are not what was written. `locate` says which."""

class CastError(ValueError):
    """A value has no equal in the dtype that it is cast to."""

def measure(addresses: _U64, block: _U32, row: _U32, checks: _U64 | None = None) -> NDArray[np.int64]:
    """Offsets, int64[n + 1] in elements from 0, of a VAR stream's gathered rows.

    checks: the pages of the rows' offsets are checked; those of their values when they are gathered.
    """

def gather(
    kind: int,
    width_bytes: int,
    addresses: _U64,
    block: _U32,
    row: _U32,
    out: Any,
    offsets: NDArray[np.int64] | None = None,
    checks: _U64 | None = None,
) -> None:
    """Copy the rows into out, a writable contiguous uint8 buffer owned by the caller and not kept.

    kind: FIXED, BITS or VAR, and for elements that are cast on the way (csrc/cast.h) their dtypes' numbers in its
        higher bytes: kind | from << 8 | to << 16.
    out: FIXED n * width_bytes; BITS n bytes; VAR offsets[n] * width_bytes, with the offsets that measure() gave. Cast,
        it has as many elements of the other dtype.

    Raises:
        ValueError: lengths do not fit, unknown kind, no offsets for VAR.
        OSError: EIO, a mapped source could not be read.
        CorruptError: its bytes are not what was written.
        CastError: a value has no equal in the dtype that it is cast to; what is in out then is undefined.
    """

def gather_bytes(addresses: _U64, block: _U32, row: _U32, checks: _U64 | None = None) -> list[bytes]:
    """New bytes objects of a VAR stream's rows, copied once, straight from the source."""

def gather_str(addresses: _U64, block: _U32, row: _U32, checks: _U64 | None = None) -> list[str]:
    """New str objects of a VAR stream's rows. Raises UnicodeDecodeError where a row is not UTF-8."""

def locate(
    kind: int, width_bytes: int, addresses: _U64, checks: _U64 | None, block: _U32, row: _U32
) -> tuple[int, int | None] | None:
    """Check rows one by one: the first that must not be served, and why; None if all are right.

    Returns:
        (number among the rows, page of its chunk whose CRC-32C is wrong; None: its offsets are).
    """

def check_chunk(chunk: _U64) -> int | None:
    """Check all pages of a chunk (a row of checks): the number of the first wrong one, or None."""

def offsets_ok(address: int, n: int, limit: int) -> bool:
    """Whether the n + 1 int64 offsets at address start at 0 or more, never fall, and end at limit or below."""

def copy_guarded(address: int, out: Any) -> None:
    """Copy len(out) bytes from a mapping's address into out, a writable contiguous uint8 buffer."""

def pass_caches(on: bool) -> None:
    """For tests: have long copies of this module pass the caches by in this thread, where the processor can."""
