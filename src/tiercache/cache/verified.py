"""Verified reads of copies without checksums inside: each 4 KiB unit is compared with the unit map beside the copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.partial import open_map, read_all
from tiercache.cache.sums import sums_of
from tiercache.cache.units import PIECE_BYTES, UNIT_BYTES
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.cache.folder import Folder
    from tiercache.cache.partial import UnitMap
    from tiercache.store import Span


def read_plain(fd: int, spans: Sequence[Span]) -> bool:
    """Fill every span from a file, without verification; return False if a read failed."""
    return all(read_all(fd, buffer, wanted.start) for wanted, buffer in spans)


def read_verified(folder: Folder, name: str, fd: int, n_bytes: int, spans: Sequence[Span]) -> bool:
    """Fill every span from a copy, whole or partial; return False if a read failed, or the data is corrupt.

    Args:
        folder: Folder of the cache.
        name: Name of the copy, whose unit map is used.
        fd: Descriptor of the copy, open for the duration of the call.
        n_bytes: Size of the copy.
        spans: Ranges inside the copy and their buffers. The buffers are undefined if the result is False.
    """
    presence = open_map(folder, name, fd, n_bytes)
    if presence is None:
        return False
    try:
        return read_held(fd, presence, spans)
    finally:
        presence.close()


def read_held(fd: int, presence: UnitMap, spans: Sequence[Span]) -> bool:
    """See read_verified(); the map is already open."""
    return all(_read_span(fd, presence, wanted, buffer) for wanted, buffer in spans)


def _read_span(fd: int, presence: UnitMap, wanted: ByteRange, buffer: memoryview) -> bool:
    if wanted.end > presence.n_bytes:
        return False
    for start in range(wanted.start // UNIT_BYTES * UNIT_BYTES, wanted.end, PIECE_BYTES):
        end = min(start + PIECE_BYTES, -(-wanted.end // UNIT_BYTES) * UNIT_BYTES, presence.n_bytes)
        data = np.empty(end - start, np.uint8)
        if not read_all(fd, data.data, start) or not _is_right(presence, start, data):
            return False
        begin, stop = max(start, wanted.start), min(end, wanted.end)
        buffer[begin - wanted.start : stop - wanted.start] = data.data[begin - start : stop - start]
    return True


def _is_right(presence: UnitMap, start: int, data: np.ndarray) -> bool:
    sums, first = sums_of(data)[0], start // UNIT_BYTES
    return np.array_equal(presence.sums(first, first + len(sums)), sums)
