"""Units, the 4 KiB blocks in which a partial copy grows, and the CRC-32C of units and files.

A mask is bool[n_units], True for the selected units. An empty file has one unit of no bytes: it too must be fetched
once before it counts as present.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

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


def bounds(span: ByteRange, n_bytes: int) -> tuple[int, int]:
    """Return the units [first, last) that a range touches, within the file."""
    start, end = min(span.start, n_bytes), min(span.end, n_bytes)
    if not n_bytes:
        return 0, 1
    return start // UNIT_BYTES, -(-end // UNIT_BYTES) if end > start else start // UNIT_BYTES


def mask_of(ranges: Iterable[ByteRange], n_bytes: int) -> Mask:
    """Return the units that the ranges touch."""
    mask = np.zeros(n_units(n_bytes), bool)
    for span in ranges:
        first, last = bounds(span, n_bytes)
        mask[first:last] = True
    return mask


def covers(present: Mask, ranges: Iterable[ByteRange], n_bytes: int) -> bool:
    """Return whether present contains all units that the ranges touch, and no range ends beyond the file."""
    for span in ranges:
        if span.end > n_bytes:
            return False
        first, last = bounds(span, n_bytes)
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
    """Return the ranges of the first units of a mask, at most piece_bytes in total (whole units), for one request."""
    first = np.zeros_like(mask)
    first[np.flatnonzero(mask)[: piece_bytes // UNIT_BYTES]] = True
    return ranges_of(first, n_bytes)


def bytes_of(mask: Mask, n_bytes: int) -> int:
    """Return the number of bytes in the units of a mask; the last unit of the file may be short."""
    whole = int(mask.sum()) * UNIT_BYTES
    return whole - (len(mask) * UNIT_BYTES - n_bytes if mask[-1] else 0)


def to_fetch(present: Mask, requested: Mask, n_bytes: int) -> Mask:
    """Return the missing units of a request, and with them the rest of the file if it is small."""
    missing = requested & ~present
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


def read_checksum(fd: int, n_bytes: int) -> tuple[int, int, OSError | None]:
    """Return the CRC-32C of a file as far as it can be read, the number of bytes read, and the error that ended it."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(n_bytes, 1))))
    crc = offset = 0
    while offset < n_bytes:
        try:
            n_read = os.preadv(fd, [buffer[: n_bytes - offset]], offset)
        except OSError as error:
            return crc, offset, error
        if not n_read:
            break
        crc = crc32c(buffer[:n_read], crc)
        offset += n_read
    return crc, offset, None


def checksum_of(fd: int, n_bytes: int) -> int:
    """Return the CRC-32C of the first n_bytes of a file, or of all of a shorter one. Raises OSError."""
    crc, _, error = read_checksum(fd, n_bytes)
    if error is not None:
        raise error
    return crc
