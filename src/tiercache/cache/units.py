"""Units: the 4 KiB blocks of a file that a copy in part is made of. Pure: masks and ranges in, masks and ranges out.

A mask is bool[n_units], True for the units that are meant. Of an empty file there is one unit, of no bytes: so it too
has to be fetched once before it is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Iterable

# The disk's block: a smaller unit would take as much room, a larger one would have a projection fetch more that nobody
# reads, up to two units a chunk.
UNIT_BYTES = 4096
# One request: long enough for a store's full speed, and what a worker holds in memory.
PIECE_BYTES = 8 << 20
# Where less than this is left of a file it is fetched along: a whole copy needs no map, and is checked as a whole.
LITTLE_BYTES = 256 << 10
LITTLE_SHARE = 32

Mask: TypeAlias = npt.NDArray[np.bool_]


def n_units(n_bytes: int) -> int:
    """Units of a file of n_bytes."""
    return max(-(-n_bytes // UNIT_BYTES), 1)


def bounds(wanted: ByteRange, n_bytes: int) -> tuple[int, int]:
    """The units [first, last) that a range touches; what of it lies beyond the file touches none."""
    start, end = min(wanted.start, n_bytes), min(wanted.end, n_bytes)
    if not n_bytes:
        return 0, 1
    return start // UNIT_BYTES, -(-end // UNIT_BYTES) if end > start else start // UNIT_BYTES


def mask_of(ranges: Iterable[ByteRange], n_bytes: int) -> Mask:
    """The units that ranges touch."""
    mask = np.zeros(n_units(n_bytes), bool)
    for wanted in ranges:
        first, last = bounds(wanted, n_bytes)
        mask[first:last] = True
    return mask


def covers(present: Mask, ranges: Iterable[ByteRange], n_bytes: int) -> bool:
    """Whether all units that ranges touch are in present, and no range ends beyond the file."""
    for wanted in ranges:
        if wanted.end > n_bytes:
            return False
        first, last = bounds(wanted, n_bytes)
        if not present[first:last].all():
            return False
    return True


def runs_of(mask: Mask) -> list[tuple[int, int]]:
    """Units that follow one another, as [first, last)."""
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def ranges_of(mask: Mask, n_bytes: int) -> list[ByteRange]:
    """The bytes of a mask's units, neighbours as one range."""
    return [ByteRange(first * UNIT_BYTES, min(last * UNIT_BYTES, n_bytes)) for first, last in runs_of(mask)]


def first_piece(mask: Mask, n_bytes: int, piece_bytes: int = PIECE_BYTES) -> list[ByteRange]:
    """The first units of a mask that are together at most piece_bytes: ranges for one request; [] of an empty mask.

    piece_bytes: a multiple of UNIT_BYTES.
    """
    taken = np.zeros_like(mask)
    taken[np.flatnonzero(mask)[: piece_bytes // UNIT_BYTES]] = True
    return ranges_of(taken, n_bytes)


def bytes_of(mask: Mask, n_bytes: int) -> int:
    """Bytes of a mask's units; the last of the file may be short."""
    whole = int(mask.sum()) * UNIT_BYTES
    return whole - (len(mask) * UNIT_BYTES - n_bytes if mask[-1] else 0)


def to_fetch(present: Mask, wanted: Mask, n_bytes: int) -> Mask:
    """What to fetch so that wanted is there: what is missing of it, and the rest of the file where that is little."""
    missing = wanted & ~present
    if not missing.any():
        return missing
    rest = ~present & ~missing
    left_bytes = bytes_of(rest, n_bytes)
    return missing | rest if left_bytes < LITTLE_BYTES or left_bytes * LITTLE_SHARE < n_bytes else missing
