"""CRC-32C of bytes in memory, unit by unit, and of files."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import crc32c, crc32c_pages
from tiercache.cache.units import PIECE_BYTES, UNIT_BYTES


def sums_of(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint32], int]:
    """CRC-32C of each unit of data, "<u4"[n], and of all of it."""
    sums = np.empty(-(-len(data) // UNIT_BYTES), np.uint32)
    whole = crc32c_pages(int(data.__array_interface__["data"][0]), len(data), UNIT_BYTES, sums)
    return sums.astype("<u4"), whole


class Summed(NamedTuple):
    """What was read of a file. n_bytes: how far that went; error: what ended it before, None at the file's end."""

    crc32c: int
    n_bytes: int
    error: OSError | None


def sum_of(fd: int, n_bytes: int) -> Summed:
    """CRC-32C of the first n_bytes of a file, as far as it can be read."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(n_bytes, 1))))
    whole, offset = 0, 0
    while offset < n_bytes:
        try:
            n_read = os.preadv(fd, [buffer[: n_bytes - offset]], offset)
        except OSError as error:
            return Summed(whole, offset, error)
        if not n_read:
            break
        whole = crc32c(buffer[:n_read], whole)
        offset += n_read
    return Summed(whole, offset, None)


def checksum_of(fd: int, n_bytes: int) -> int:
    """CRC-32C of the first n_bytes of a file; a shorter one gives another sum. Raises OSError: it cannot be read."""
    summed = sum_of(fd, n_bytes)
    if summed.error is not None:
        raise summed.error
    return summed.crc32c
