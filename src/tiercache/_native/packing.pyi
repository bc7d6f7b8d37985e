"""Packing: rows of a fixed number of tokens, made of documents (csrc/packing.h).

A unit is the documents that are packed together. Documents of several units are given one unit after the other.

lengths: int64[n_documents], number of stored tokens of each document.
first: int64[n_units + 1], first document of each unit, and the number of documents.

All functions are thread-safe and release the GIL.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

PACKED: Final[int]
"""Kind of a stream of packed rows, for the ring."""
TOKENS: Final[int]
LABELS: Final[int]
POSITION_IDS: Final[int]
DOCUMENT_IDS: Final[int]
CONCATENATE: Final[int]
BEST_FIT: Final[int]
SEPARATE: Final[int]
IGNORED: Final[int]
"""Label that a loss ignores: -100."""

class TooLongError(ValueError):
    """A document is longer than a row. document: Its index among the given documents; n_tokens: Its stored tokens."""

    document: int
    n_tokens: int

class Packing:
    """How documents are packed. Immutable.

    Args:
        length: Tokens of a row, 1 to 2**30.
        mode: CONCATENATE, BEST_FIT or SEPARATE.
        dtype: Number of the dtype of the stored tokens (csrc/cast.h): an integer type whose values all fit int64.
        cuts_long: Whether documents longer than a row are cut, in the modes that do not cut others.
        pad: Token behind the last piece of a row.
        end: Token that ends each document. None: there is none.
        masks_borders: Whether the label of a document's last token is IGNORED also if another document follows.
        mask_dtype: Number of the dtype of the masks, as dtype, or of bool. 0: documents have no masks.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        length: int,
        mode: int,
        dtype: int,
        *,
        cuts_long: bool = True,
        pad: int = 0,
        end: int | None = None,
        masks_borders: bool = False,
        mask_dtype: int = 0,
    ) -> None: ...

def count_rows(how: Packing, lengths: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of rows of each unit, int64[n_units].

    Raises:
        TooLongError: A document is longer than a row, and is not cut.
        ValueError: The bounds do not fit the documents.
    """

class PackedUnits:
    """The planned rows of some units. It owns the plans, but not the stored tokens, which the caller keeps.

    Args:
        how: Packing. It is kept.
        lengths, first: See the module.
        addresses: uint64[n_documents], address of each document's first token.
        masks: uint64[n_documents], address of each document's mask, which has a number for each stored token; a label
            whose token has 0 is IGNORED. None: there are none.

    Attributes:
        n_rows: int64[n_units].
        addresses: uint64[n_units, 3], sources of a PACKED stream for the ring.
        boundaries: uint64[n_units, 3], sources of a VAR stream of int32: positions in a row where pieces and padding
            begin, and the length of the row.
        counts: uint64[n_units, 3], sources of a FIXED stream of int32: the number of boundaries of a row.
        n_bytes: Memory of the plans.

    Raises:
        TooLongError, ValueError: See count_rows.
        MemoryError: No memory for the plans.
    """

    n_rows: NDArray[np.int64]
    addresses: NDArray[np.uint64]
    boundaries: NDArray[np.uint64]
    counts: NDArray[np.uint64]
    n_bytes: int

    def __init__(
        self,
        how: Packing,
        lengths: NDArray[np.int64],
        addresses: NDArray[np.uint64],
        first: NDArray[np.int64],
        masks: NDArray[np.uint64] | None = None,
    ) -> None: ...

def stream_kind(output: int) -> int:
    """Return the kind of a stream of packed rows, as the ring takes it.

    Args:
        output: TOKENS, LABELS, POSITION_IDS or DOCUMENT_IDS.
    """

def gather_rows(
    kind: int, units: PackedUnits, unit: NDArray[np.uint32], row: NDArray[np.uint32], out: NDArray[np.uint8]
) -> None:
    """Write rows to out, as the ring does.

    Args:
        kind: Value that stream_kind() returned.
        units: Units whose documents the caller keeps in memory.
        unit, row: uint32[n], index of each row's unit, and the row in it.
        out: uint8[n, bytes of a row], which the caller owns: int64 for each token; int32 for DOCUMENT_IDS.

    Raises:
        ValueError: Lengths do not fit.
        IndexError: A unit or a row does not exist.
        OSError: EIO; a mapped source could not be read.
    """

def join_boundaries(boundaries: NDArray[np.int32], offsets: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Return the cumulative sequence lengths of the flattened rows of a batch, and the longest sequence.

    Args:
        boundaries: int32[m], boundaries of the rows, one row after the other; each row has the same last one.
        offsets: int64[n + 1], first boundary of each row, and m.

    Returns:
        (int32[m - n + 1], from 0 to the number of tokens; the longest sequence in tokens).

    Raises:
        OverflowError: The batch has 2**31 tokens or more.
        ValueError: The offsets do not fit.
    """

def join_in_place(memory: object, start: int, offsets_at: int, n: int) -> int:
    """Replace the boundaries of the n > 0 rows of a slot of a ring by the first result of join_boundaries().

    Args:
        memory: Slot, a writable buffer of bytes. It is not kept.
        start, offsets_at: Byte positions of the boundaries and of the offsets.

    Returns:
        Number of cumulative sequence lengths, int32 each from `start` on.

    Raises:
        OverflowError: The batch has 2**31 tokens or more.
        ValueError: The positions are outside the memory.
    """
