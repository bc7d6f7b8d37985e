"""Gather: copy rows of many blocks into one buffer, with checks on first touch (csrc/gather.h).

All functions are thread-safe. They raise OSError(EIO) if a mapping cannot be read, and CorruptError if the checksum of
a page is wrong, or if offsets decrease or leave their chunk, which is always checked.

addresses: uint64[n_blocks, 3]: for each block the addresses of its values and its offsets (0 if none), and the number
    of elements of its values, which is used for VAR. The caller keeps the memory alive during the call.
checks: uint64[n_blocks, 4], or None: for each block, the chunk that holds its buffers: base address, n_bytes, address
    of the CRC-32C of its 64 KiB pages, and address of one byte per page, which becomes 1 when the page is verified (0:
    nothing is to be checked).
block, row: uint32[n]. The caller has checked that block < n_blocks and row < rows of that block.
"""

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

_U64: TypeAlias = NDArray[np.uint64]
_U32: TypeAlias = NDArray[np.uint32]

FIXED: Final[int]
"""width_bytes per row."""
BITS: Final[int]
"""One bit per row, least significant first; gathered as one byte per row, 0 or 1; 1 if a block has no buffer."""
VAR: Final[int]
"""int64 offsets in elements of width_bytes, and the elements."""
REF: Final[int]
"""As VAR with a width of 1, but references are gathered and no bytes are copied. Only rings support it."""

class CorruptError(ValueError):
    """Stored bytes are not what was written. `locate` returns the position."""

class CastError(ValueError):
    """A value cannot be represented in the dtype of the cast."""

class TooLongError(ValueError):
    """A record is longer than its output layout allows. Only rings raise it."""

def measure(addresses: _U64, block: _U32, row: _U32, checks: _U64 | None = None) -> NDArray[np.int64]:
    """Return the offsets, int64[n + 1] in elements from 0, of a VAR stream's gathered rows.

    Args:
        addresses, block, row: See the module.
        checks: Chunks. Only the pages of the rows' offsets are checked here; gather() checks those of the values.
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
    """Copy rows into out, a writable contiguous uint8 buffer that the caller owns and that is not kept.

    Args:
        kind: FIXED, BITS or VAR. For a cast (csrc/cast.h), the dtype numbers are in the higher bytes:
            kind | from << 8 | to << 16.
        width_bytes: Stored bytes per row (FIXED) or per element (VAR).
        addresses, block, row, checks: See the module.
        out: FIXED n * width_bytes; BITS n bytes; VAR offsets[n] * width_bytes. With a cast, the same number of elements
            of the other dtype.
        offsets: Offsets that measure() returned, for VAR.

    Raises:
        ValueError: Lengths do not fit, the kind is unknown, or VAR has no offsets.
        OSError: EIO; a mapped source could not be read.
        CorruptError: The stored bytes are not what was written.
        CastError: A value cannot be represented in the dtype of the cast; the content of out is undefined.
    """

def gather_bytes(addresses: _U64, block: _U32, row: _U32, checks: _U64 | None = None) -> list[bytes]:
    """Return new bytes objects of a VAR stream's rows, copied once, directly from the source."""

def gather_str(addresses: _U64, block: _U32, row: _U32, checks: _U64 | None = None) -> list[str]:
    """Return new str objects of a VAR stream's rows. Raises UnicodeDecodeError if a row is not UTF-8."""

def locate(
    kind: int, width_bytes: int, addresses: _U64, checks: _U64 | None, block: _U32, row: _U32
) -> tuple[int, int | None] | None:
    """Check rows one by one. Return the position of the first corrupt row, or None if all rows are right.

    Returns:
        (index among the rows, index of the page in its chunk whose CRC-32C is wrong, or None if the offsets are wrong).
    """

def check_chunk(chunk: _U64) -> int | None:
    """Check all pages of a chunk (a row of checks). Return the index of the first wrong page, or None."""

def offsets_ok(address: int, n: int, limit: int) -> bool:
    """Return whether the n + 1 int64 offsets at address are 0 or more, never decrease, and are at most limit."""

def set_nontemporal_copies(on: bool) -> None:
    """For tests: turn non-temporal stores for this thread's long copies on or off, if the processor supports them."""
