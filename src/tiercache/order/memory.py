"""Reused memory for row numbers: arrays that return to a pool when nothing refers to them any more.

`load.memory.BatchMemory` does the same for decoded images; it belongs to a loader and is counted.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Size of a pooled array in rows. Six arrays are pooled: two for each of the pieces that are planned, pushed and served
# at a time.
MOST_ROWS = 1 << 18
_MOST_KEPT = 6
_LEAST_ROWS = 1 << 14  # malloc reuses the pages of smaller arrays itself

# Any thread, and finalisers, append and pop by single atomic operations; no lock is needed.
_free: deque[NDArray[np.uint32]] = deque(maxlen=_MOST_KEPT)


def allocate_rows(n: int) -> NDArray[np.uint32]:
    """Return a uint32[n] array with undefined contents.

    A fresh page costs 1.5 us in a virtual machine: locating 131,072 rows in stored order takes 360 us with new arrays
    and 29 us with reused ones. The process therefore keeps up to 6 MiB.
    """
    if not _LEAST_ROWS <= n <= MOST_ROWS:
        return np.empty(n, np.uint32)
    try:
        memory = _free.pop()
    except IndexError:
        memory = np.empty(MOST_ROWS, np.uint32)
    lent = memory[:n]
    weakref.finalize(lent, _free.append, memory).atexit = False
    # Slices of the returned array refer to the memoryview, and thereby to `lent`; slices of `lent` would refer to
    # `memory`.
    return np.frombuffer(lent.data, np.uint32)
