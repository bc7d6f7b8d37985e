"""CRC-32C of bytes in memory, unit by unit, and of files."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import crc32c, crc32c_pages
from tiercache.cache.units import PIECE_BYTES, UNIT_BYTES


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
