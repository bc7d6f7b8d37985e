"""Selections: runs of record numbers and their served order.

A served order is an array, or a function if it is that of `shuffle`. The module also maps the rows of a selection to
rows of stored blocks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.order.explicit import PermutedOrder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.order.explicit import ServedOrder


class Selection:
    """Record numbers of a source, each 0 or more, in served order; numbers may be repeated. Immutable.

    The sorted numbers (stored order) are kept as runs of consecutive numbers, so that a range costs the same whatever
    its length: 16 bytes per run, and 8 bytes per record if the served order differs from stored order and is not a
    `PermutedOrder`.

    Attributes:
        starts: int64[k], first number of each run; read-only.
        first: int64[k + 1], count of numbers in the runs before each run; read-only.
        order: int64[n], place in stored order of each served record; read-only. None: the served order is the stored
            order.
    """

    order: ServedOrder | None

    def __init__(self, starts: NDArray[np.int64], first: NDArray[np.int64], order: ServedOrder | None) -> None:
        self.starts = _frozen(starts)
        self.first = _frozen(first)
        self.order = _frozen(order) if isinstance(order, np.ndarray) else order

    @staticmethod
    def span(start: int, stop: int) -> Selection:
        """Return the selection of the numbers [start, stop); empty if stop <= start."""
        if stop <= start:
            return Selection(np.empty(0, np.int64), np.zeros(1, np.int64), None)
        return Selection(np.array([start], np.int64), np.array([0, stop - start], np.int64), None)

    @staticmethod
    def of(numbers: NDArray[np.int64]) -> Selection:
        """Return the selection of these numbers, int64[n], in this order."""
        if len(numbers) < 2 or bool((numbers[1:] >= numbers[:-1]).all()):
            return Selection(*runs_of(numbers), None)
        by_number = np.argsort(numbers, kind="stable")
        order = np.empty(len(numbers), np.int64)
        order[by_number] = np.arange(len(numbers))
        return Selection(*runs_of(numbers[by_number]), order)

    @staticmethod
    def of_runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Selection:
        """Return the selection of runs of numbers: int64[k] first numbers, never descending, and lengths, 1 or more.

        Adjacent runs are merged.
        """
        if not len(starts):
            return Selection.span(0, 0)
        heads = np.flatnonzero(np.r_[True, starts[1:] != (starts + lengths)[:-1]])
        ends = np.cumsum(lengths)
        return Selection(starts[heads], np.r_[0, ends[np.r_[heads[1:] - 1, len(ends) - 1]]], None)

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def n_bytes(self) -> int:
        return self.starts.nbytes + self.first.nbytes + (self.order.nbytes if isinstance(self.order, np.ndarray) else 0)

    @property
    def stop(self) -> int:
        """Largest number plus one; 0 if the selection is empty."""
        return int(self.starts[-1] + self.first[-1] - self.first[-2]) if len(self) else 0

    @cached_property
    def digest(self) -> str:
        """Hash of the numbers in served order: 32 hex digits."""
        found = hashlib.sha256(len(self.starts).to_bytes(8, "little"))
        for array in (self.starts, self.first, self.order):
            if isinstance(array, PermutedOrder):
                found.update(b"permuted" + array.key)
            elif array is not None:
                found.update(np.ascontiguousarray(array, "<i8").data)
        return found.hexdigest()[:32]

    def is_all(self, n: int) -> bool:
        """Return whether the selection is all of n records, in their order."""
        return self.order is None and (self._is_order_of(n) or len(self) == n == 0)

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record numbers at served places, int64[n], each below len()."""
        return self.stored_numbers(places if self.order is None else self.order[places])

    def number(self, place: int) -> int:
        """Return the record number at one served place below len(): takes 2 us, `numbers` 6 us."""
        if self.order is not None:
            place = int(self.order[place])
        run = int(self.first.searchsorted(place, "right")) - 1
        return int(self.starts[run]) + place - int(self.first[run])

    def stored_numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record numbers at places of the stored order, int64[n], each below len()."""
        if len(self.starts) == 1:
            run: Any = 0
        else:
            run = np.searchsorted(self.first, places, side="right") - 1
        numbers: NDArray[np.int64] = self.starts[run] + (places - self.first[run])
        return numbers

    def n_below(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of the selection's numbers are below each number, int64[m]: its place in stored order."""
        if not len(self.starts):
            return np.zeros(len(numbers), np.int64)
        run = np.searchsorted(self.starts, numbers, side="left") - 1
        before = np.maximum(run, 0)
        lengths = self.first[before + 1] - self.first[before]
        inside = np.clip(numbers - self.starts[before], 0, lengths)
        return np.where(run < 0, 0, self.first[before] + inside)

    def compose(self, chosen: Selection) -> Selection:
        """Return the selection that `chosen` makes of this selection, by places in its served order."""
        if self.order is None and chosen.order is None:
            return self._cut(chosen) if len(chosen.starts) == 1 else self._compose_runs(chosen)
        if self.order is None and chosen._is_order_of(len(self)):
            return Selection(self.starts, self.first, chosen.order)
        places = chosen.numbers(np.arange(len(chosen)))
        return Selection.of(self.numbers(places))

    def _is_order_of(self, n: int) -> bool:
        """Whether the numbers are those below n, each once, in any order."""
        return len(self) == n and len(self.starts) == 1 and self.starts[0] == 0

    def _cut(self, chosen: Selection) -> Selection:
        """Return the selection of one run of places, by slicing (50 million runs: 0.2 s; `_compose_runs`: 10 s)."""
        low, high = int(chosen.starts[0]), chosen.stop
        begin, end = (np.searchsorted(self.first, [low, high - 1], side="right") - 1).tolist()
        starts = self.starts[begin : end + 1].copy()
        starts[0] += low - self.first[begin]
        return Selection(starts, np.clip(self.first[begin : end + 2], low, high) - low, None)

    def _compose_runs(self, chosen: Selection) -> Selection:
        """Return the selection of several runs of places. A run of places is cut where it crosses a run of numbers."""
        if not len(chosen):
            return chosen
        lengths = np.diff(chosen.first)
        low, high = chosen.starts, chosen.starts + lengths
        begin = np.searchsorted(self.first, low, side="right") - 1
        end = np.searchsorted(self.first, high - 1, side="right") - 1
        counts = end - begin + 1
        owner = np.repeat(np.arange(len(low)), counts)
        run = begin[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.maximum(low[owner], self.first[run])
        stop = np.minimum(high[owner], self.first[run + 1])
        return Selection.of_runs(self.starts[run] + (start - self.first[run]), stop - start)

    def __deepcopy__(self, memo: object) -> Selection:
        return self

    def __repr__(self) -> str:
        order = "" if self.order is None else ", permuted" if isinstance(self.order, PermutedOrder) else ", listed"
        return f"Selection({len(self)} records, {len(self.starts)} runs{order})"


def runs_of(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (starts, first) of numbers that never descend."""
    if not len(numbers):
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    heads = np.flatnonzero(np.r_[True, np.diff(numbers) != 1])
    return numbers[heads], np.r_[heads, len(numbers)]


def _frozen(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array = np.ascontiguousarray(array, np.int64)
    array.flags.writeable = False
    return array


# Number of cached sets of blocks: the window that is served, and the one that is prefetched.
KEPT_TABLES = 2
# Rows laid out at a time; each takes 40 bytes meanwhile.
LAID_OUT_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class BlockSpans:
    """Blocks, int64[k] each: number of the first record; selected records before the block, and in it."""

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

        key identifies the blocks and their order; spans() is called if it is new. block: uint32[n], index of each row's
        block; row: uint32[n], its number among the selection's rows of the block.
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
