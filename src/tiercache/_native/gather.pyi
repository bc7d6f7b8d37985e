"""Gather rows of many blocks into one buffer (csrc/gather.h).

All functions are thread-safe and raise OSError(EIO) where a mapping fails.

addresses: uint64[n_blocks, 2], the addresses of each block's values and offsets (0 for none), kept alive by the caller
    for the call.
block, row: uint32[n]; block < n_blocks and row < rows of that block are the caller's to check.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FIXED: Final[int]
"""width_bytes a row."""
BITS: Final[int]
"""One bit a row, least significant first; gathered as one byte a row, 0 or 1; a block without the buffer (address 0)
gives 1."""
VAR: Final[int]
"""int64 offsets in elements of width_bytes, and the elements."""

def measure(addresses: NDArray[np.uint64], block: NDArray[np.uint32], row: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Offsets, int64[n + 1] in elements from 0, of a VAR stream's gathered rows."""

def gather(
    kind: int,
    width_bytes: int,
    addresses: NDArray[np.uint64],
    block: NDArray[np.uint32],
    row: NDArray[np.uint32],
    out: Any,
    offsets: NDArray[np.int64] | None = None,
) -> None:
    """Copy the rows into out, a writable contiguous uint8 buffer owned by the caller and not kept.

    out: FIXED n * width_bytes; BITS n bytes; VAR offsets[n] * width_bytes, with the offsets that measure() gave.

    Raises:
        ValueError: lengths do not fit, unknown kind, no offsets for VAR.
        OSError: EIO, a mapped source could not be read.
    """

def gather_bytes(addresses: NDArray[np.uint64], block: NDArray[np.uint32], row: NDArray[np.uint32]) -> list[bytes]:
    """New bytes objects of a VAR stream's rows, copied once, straight from the source."""

def gather_str(addresses: NDArray[np.uint64], block: NDArray[np.uint32], row: NDArray[np.uint32]) -> list[str]:
    """New str objects of a VAR stream's rows. Raises UnicodeDecodeError where a row is not UTF-8."""

def offsets_ok(address: int, n: int, limit: int) -> bool:
    """Whether the n + 1 int64 offsets at address start at 0 or more, never fall, and end at limit or below."""

def copy_guarded(address: int, out: Any) -> None:
    """Copy len(out) bytes from a mapping's address into out, a writable contiguous uint8 buffer."""
