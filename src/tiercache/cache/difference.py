"""The comparison of a corrupt file with the correct one, in pieces."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """How a corrupt file differs from the correct one.

    Attributes:
        n_bad_bytes: Size of the corrupt file.
        n_good_bytes: Size of the correct file.
        n_differ: Number of differing bytes within the shorter length.
        first: Offset of the first differing byte, or the end of the shorter file; None: the files are equal.
        last: Offset of the last differing byte; None if no byte differs.
        unreadable: Offset at which the corrupt file could not be read; the rest was not compared. None: all was read.
    """

    n_bad_bytes: int
    n_good_bytes: int
    n_differ: int = 0
    first: int | None = None
    last: int | None = None
    unreadable: int | None = None

    def facts(self) -> dict[str, Any]:
        """Return the facts for a report."""
        return {
            "n_bytes_differ": self.n_differ,
            "first_offset": self.first,
            "last_offset": self.last,
            "unreadable_at": self.unreadable,
            "n_bytes_bad": self.n_bad_bytes,
            "n_bytes_good": self.n_good_bytes,
        }

    def __str__(self) -> str:
        said = []
        if self.n_bad_bytes != self.n_good_bytes:
            said.append(f"it had {self.n_bad_bytes:,} bytes instead of {self.n_good_bytes:,}")
        if self.n_differ:
            said.append(f"{self.n_differ:,} bytes differed, from offset {self.first} to {self.last}")
        if self.unreadable is not None:
            said.append(f"it could not be read at offset {self.unreadable}")
        return "; ".join(said) or "it equals what was fetched again: a read failed, or the object itself is corrupt"


def difference_of(bad_fd: int, good_fd: int) -> Difference:
    """Return how the file bad_fd differs from good_fd. Raises OSError: the correct file cannot be read."""
    n_bad_bytes, n_good_bytes = os.fstat(bad_fd).st_size, os.fstat(good_fd).st_size
    both = min(n_bad_bytes, n_good_bytes)
    n_differ, first, last, unreadable = 0, None, None, None
    for start in range(0, both, _PIECE_BYTES):
        n_bytes = min(_PIECE_BYTES, both - start)
        good = _piece(good_fd, start, n_bytes)
        try:
            bad = _piece(bad_fd, start, n_bytes)
        except OSError:
            unreadable = start
            break
        offsets = np.flatnonzero(bad != good)
        if len(offsets):
            n_differ += len(offsets)
            first = start + int(offsets[0]) if first is None else first
            last = start + int(offsets[-1])
    if first is None and n_bad_bytes != n_good_bytes:
        first = both
    return Difference(n_bad_bytes, n_good_bytes, n_differ, first, last, unreadable)


def _piece(fd: int, start: int, n_bytes: int) -> NDArray[np.uint8]:
    """Return n_bytes at start; zeros beyond the end of a truncated file."""
    piece = np.zeros(n_bytes, np.uint8)
    done = 0
    while done < n_bytes:
        n_read = os.preadv(fd, [piece[done:].data], start + done)
        if not n_read:
            break
        done += n_read
    return piece
