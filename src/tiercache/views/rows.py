"""Mapping of a selection's rows to rows of stored blocks, cached for the blocks that are being read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.views.selection import Selection

# Number of cached sets of blocks: the window that is served, and the one that is prefetched.
KEPT_TABLES = 2
# Rows laid out at a time; each takes 40 bytes meanwhile.
LAID_OUT_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class BlockSpans:
    """Blocks, and a selection's records in them; int64[k] each.

    Attributes:
        stored: Number of the block's first record.
        place: Number of the selection's records before the block.
        n_rows: Number of the selection's records in the block.
    """

    stored: NDArray[np.int64]
    place: NDArray[np.int64]
    n_rows: NDArray[np.int64]


class RowTables:
    """Translates rows of a selection to rows of their blocks. Safe from any thread, and after a fork.

    If the selected rows of each block are one run, as with ranges, a row is shifted by the number of omitted rows
    before it. Otherwise the rows of all the blocks are laid out once (4 bytes each) and then looked up: a binary search
    per row would cost a cache miss per step.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._tables: OrderedDict[bytes, tuple[NDArray[np.int64], NDArray[np.uint32] | None]] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def rows(
        self, key: bytes, spans: Callable[[], BlockSpans], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """Return the rows in the stored blocks, uint32[n].

        Args:
            key: Key that identifies the blocks and their order.
            spans: Function that returns the spans of these blocks; called if the key is new.
            block: uint32[n], index of each row's block.
            row: uint32[n], number of each row among the selection's rows of its block.
        """
        if not len(block):
            return row
        shift, laid_out = self._table(key, spans)
        if laid_out is None:
            moved: NDArray[np.uint32] = row + shift.astype(np.uint32)[block] if shift.any() else row
            return moved
        found: NDArray[np.uint32] = laid_out[shift[block] + row]
        return found

    def _table(
        self, key: bytes, spans: Callable[[], BlockSpans]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32] | None]:
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            found = self._tables.get(key)
            if found is not None:
                self._tables.move_to_end(key)
                return found
        made = _lay_out(self._selection, spans())
        with self._lock:
            self._tables[key] = made
            while len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        return made


def _lay_out(selection: Selection, spans: BlockSpans) -> tuple[NDArray[np.int64], NDArray[np.uint32] | None]:
    """Return (shift of each block's rows, None), or (start of each block's rows in the layout, the layout)."""
    filled = spans.n_rows > 0
    place, n_rows, stored = spans.place[filled], spans.n_rows[filled], spans.stored[filled]
    shift = np.zeros(len(filled), np.int64)
    ends = np.searchsorted(selection.first, place + n_rows - 1, side="right")
    if bool((np.searchsorted(selection.first, place, side="right") == ends).all()):
        shift[filled] = selection.stored_numbers(place) - stored
        return shift, None
    last = np.cumsum(n_rows)
    shift[filled] = begin = last - n_rows
    laid_out = np.empty(int(last[-1]), np.uint32)
    cuts = np.searchsorted(last, np.arange(0, len(laid_out), LAID_OUT_ROWS), side="right").tolist()
    for lo, hi in pairwise([*dict.fromkeys(cuts), len(last)]):
        counts, rows = n_rows[lo:hi], slice(int(begin[lo]), int(last[hi - 1]))
        places = np.arange(rows.start, rows.stop) + np.repeat(place[lo:hi] - begin[lo:hi], counts)
        laid_out[rows] = selection.stored_numbers(places) - np.repeat(stored[lo:hi], counts)
    return shift, laid_out
