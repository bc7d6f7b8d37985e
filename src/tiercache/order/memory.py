"""Memory for the rows of pieces: lent, and lent again once nothing refers to it any more.

As `load.memory.BatchMemory` does for decoded pictures; that is a loader's, and counted, and orders know no loader.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of the arrays that are lent: two for each of the pieces that are planned, pushed and served at a time.
MOST_ROWS = 1 << 18
_MOST_KEPT = 6
_LEAST_ROWS = 1 << 14  # fewer are malloc's, whose pages stay

# Appended and popped from any thread, finalisers included, by single operations: no lock.
_free: deque[NDArray[np.uint32]] = deque(maxlen=_MOST_KEPT)


def empty_rows(n: int) -> NDArray[np.uint32]:
    """uint32[n], of any content.

    A fresh page takes 1.5 us in a virtual machine: finding 131,072 rows in the stored order takes 360 us into new
    arrays and 29 into used ones. So up to 6 MiB stay with the process.
    """
    if not _LEAST_ROWS <= n <= MOST_ROWS:
        return np.empty(n, np.uint32)
    try:
        memory = _free.pop()
    except IndexError:
        memory = np.empty(MOST_ROWS, np.uint32)
    lent = memory[:n]
    weakref.finalize(lent, _free.append, memory).atexit = False
    # Arrays made of this one refer to the memoryview, and so to `lent`; numpy's own views would refer to `memory`.
    return np.frombuffer(lent.data, np.uint32)
