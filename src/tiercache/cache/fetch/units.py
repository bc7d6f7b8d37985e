"""Units, the 4 KiB blocks in which a partial copy grows, and the CRC-32C of units and files.

A mask is bool[n_units], True for the selected units. An empty file has one unit of no bytes: it too must be fetched
once before it counts as present.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import crc32c, crc32c_pages
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Iterable


# The block size of the disk. A smaller unit would take as much space; a larger one would fetch more bytes that no
# reader needs when columns are selected, up to two units per chunk.
UNIT_BYTES = 4096
# The size of one request: long enough for the full speed of a store. It is also the buffer size of a worker.
PIECE_BYTES = 8 << 20
# If less than this is missing of a file, it is fetched too: a whole copy needs no map and is verified as a whole.
LITTLE_BYTES = 256 << 10
LITTLE_SHARE = 32

Mask: TypeAlias = npt.NDArray[np.bool_]


def n_units(n_bytes: int) -> int:
    """Return the number of units of a file of n_bytes."""
    return max(-(-n_bytes // UNIT_BYTES), 1)


def bounds(wanted: ByteRange, n_bytes: int) -> tuple[int, int]:
    """Return the units [first, last) that a range touches, within the file."""
    start, end = min(wanted.start, n_bytes), min(wanted.end, n_bytes)
    if not n_bytes:
        return 0, 1
    return start // UNIT_BYTES, -(-end // UNIT_BYTES) if end > start else start // UNIT_BYTES


def mask_of(ranges: Iterable[ByteRange], n_bytes: int) -> Mask:
    """Return the units that the ranges touch."""
    mask = np.zeros(n_units(n_bytes), bool)
    for wanted in ranges:
        first, last = bounds(wanted, n_bytes)
        mask[first:last] = True
    return mask


def covers(present: Mask, ranges: Iterable[ByteRange], n_bytes: int) -> bool:
    """Return whether present contains all units that the ranges touch, and no range ends beyond the file."""
    for wanted in ranges:
        if wanted.end > n_bytes:
            return False
        first, last = bounds(wanted, n_bytes)
        if not present[first:last].all():
            return False
    return True


def runs_of(mask: Mask) -> list[tuple[int, int]]:
    """Return the runs of consecutive units, each as [first, last)."""
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def ranges_of(mask: Mask, n_bytes: int) -> list[ByteRange]:
    """Return the byte ranges of the units of a mask; adjacent units form one range."""
    return [ByteRange(first * UNIT_BYTES, min(last * UNIT_BYTES, n_bytes)) for first, last in runs_of(mask)]


def first_piece(mask: Mask, n_bytes: int, piece_bytes: int = PIECE_BYTES) -> list[ByteRange]:
    """Return the ranges of the first units of a mask, at most piece_bytes in total, for one request.

    Args:
        mask: Units to fetch.
        n_bytes: Size of the file.
        piece_bytes: Most bytes of the request, a multiple of UNIT_BYTES.
    """
    taken = np.zeros_like(mask)
    taken[np.flatnonzero(mask)[: piece_bytes // UNIT_BYTES]] = True
    return ranges_of(taken, n_bytes)


def bytes_of(mask: Mask, n_bytes: int) -> int:
    """Return the number of bytes in the units of a mask; the last unit of the file may be short."""
    whole = int(mask.sum()) * UNIT_BYTES
    return whole - (len(mask) * UNIT_BYTES - n_bytes if mask[-1] else 0)


def to_fetch(present: Mask, wanted: Mask, n_bytes: int) -> Mask:
    """Return the units to fetch for wanted: the missing ones, and the rest of the file if it is small."""
    missing = wanted & ~present
    if not missing.any():
        return missing
    rest = ~present & ~missing
    left_bytes = bytes_of(rest, n_bytes)
    return missing | rest if left_bytes < LITTLE_BYTES or left_bytes * LITTLE_SHARE < n_bytes else missing


def sums_of(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint32], int]:
    """Return the CRC-32C of each unit of data, "<u4"[n], and of all data."""
    sums = np.empty(-(-len(data) // UNIT_BYTES), np.uint32)
    whole = crc32c_pages(int(data.__array_interface__["data"][0]), len(data), UNIT_BYTES, sums)
    return sums.astype("<u4"), whole


class FileChecksum(NamedTuple):
    """The checksum of the readable part of a file.

    Attributes:
        crc32c: CRC-32C of the bytes that were read.
        n_bytes: Number of bytes that were read.
        error: Error that ended the read early; None if the file was read to its end.
    """

    crc32c: int
    n_bytes: int
    error: OSError | None


def read_checksum(fd: int, n_bytes: int) -> FileChecksum:
    """Return the CRC-32C of the first n_bytes of a file, as far as it can be read."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(n_bytes, 1))))
    whole, offset = 0, 0
    while offset < n_bytes:
        try:
            n_read = os.preadv(fd, [buffer[: n_bytes - offset]], offset)
        except OSError as error:
            return FileChecksum(whole, offset, error)
        if not n_read:
            break
        whole = crc32c(buffer[:n_read], whole)
        offset += n_read
    return FileChecksum(whole, offset, None)


def checksum_of(fd: int, n_bytes: int) -> int:
    """Return the CRC-32C of the first n_bytes of a file, or of all of a shorter file.

    Raises OSError if the read fails.
    """
    summed = read_checksum(fd, n_bytes)
    if summed.error is not None:
        raise summed.error
    return summed.crc32c
