"""Selection: the records of a source that a view has, as runs of record numbers, and their served order.

Includes the mapping of its rows to rows of stored blocks, and the files by which large selections reach other processes
of the machine.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.views.spool import Spool, restore

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Arrays above this size are pickled as a reference to a file, so that a pickled view stays a few hundred bytes long.
INLINE_BYTES = 256


class Selection:
    """Record numbers of a source, each 0 or more, in served order; numbers may be repeated. Immutable.

    The sorted numbers (stored order) are kept as runs of consecutive numbers, so that a range costs the same whatever
    its length: 16 bytes per run, and 8 bytes per record if the served order differs from stored order.

    Attributes:
        starts: int64[k], first number of each run; read-only.
        first: int64[k + 1], count of numbers in the runs before each run; read-only.
        order: int64[n], place in stored order of each served record; read-only. None: the served order is the stored
            order.
    """

    def __init__(self, starts: NDArray[np.int64], first: NDArray[np.int64], order: NDArray[np.int64] | None) -> None:
        self.starts = _frozen(starts)
        self.first = _frozen(first)
        self.order = None if order is None else _frozen(order)
        self._spool = Spool()

    @staticmethod
    def span(start: int, stop: int) -> Selection:
        """Return the selection of the numbers [start, stop); empty if stop <= start."""
        if stop <= start:
            return Selection(np.empty(0, np.int64), np.zeros(1, np.int64), None)
        return Selection(np.array([start], np.int64), np.array([0, stop - start], np.int64), None)

    @staticmethod
    def of(numbers: NDArray[np.int64]) -> Selection:
        """Return the selection of these numbers in this order.

        Args:
            numbers: int64[n], record numbers, each 0 or more.
        """
        if len(numbers) < 2 or bool((numbers[1:] >= numbers[:-1]).all()):
            return Selection(*_runs_of(numbers), None)
        by_number = np.argsort(numbers, kind="stable")
        order = np.empty(len(numbers), np.int64)
        order[by_number] = np.arange(len(numbers))
        return Selection(*_runs_of(numbers[by_number]), order)

    @staticmethod
    def of_runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Selection:
        """Return the selection of runs of numbers. Adjacent runs are merged.

        Args:
            starts: int64[k], first number of each run, never descending.
            lengths: int64[k], length of each run, 1 or more.
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
        """Size of its arrays in bytes."""
        return self.starts.nbytes + self.first.nbytes + (0 if self.order is None else self.order.nbytes)

    @property
    def stop(self) -> int:
        """Largest number plus one; 0 if the selection is empty."""
        return int(self.starts[-1] + self.first[-1] - self.first[-2]) if len(self) else 0

    @cached_property
    def digest(self) -> str:
        """Hash of the numbers in served order: 32 hex digits."""
        found = hashlib.sha256(len(self.starts).to_bytes(8, "little"))
        for array in (self.starts, self.first, self.order):
            if array is not None:
                found.update(np.ascontiguousarray(array, "<i8").data)
        return found.hexdigest()[:32]

    def is_all(self, n: int) -> bool:
        """Return whether the selection is all of n records, in their order."""
        return len(self) == n and self.order is None and (n == 0 or (len(self.starts) == 1 and self.starts[0] == 0))

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
        """Return the selection of a selection.

        Args:
            chosen: Selection of places of this selection, in its served order.
        """
        if self.order is None and chosen.order is None:
            return self._cut(chosen) if len(chosen.starts) == 1 else self._compose_runs(chosen)
        places = chosen.numbers(np.arange(len(chosen)))
        return Selection.of(self.numbers(places))

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

    def pack(self) -> tuple[Any, ...]:
        """Return plain values from which `unpack` restores the selection: its arrays, or a file reference.

        Large arrays are written to a file. It belongs to this object and is removed with it or at the end of its
        process; a process that has unpacked it keeps the mapping.
        """
        if self.n_bytes > INLINE_BYTES:
            ticket = self._spool.ticket((self.starts, self.first, self.order))
            if ticket is not None:
                return ticket
        order = None if self.order is None else self.order.tobytes()
        return self.starts.tobytes(), self.first.tobytes(), order

    @staticmethod
    def unpack(packed: tuple[Any, ...]) -> Selection:
        """Return the selection of `pack`, in this or another process of the machine.

        Raises:
            NotFound: The file of the selection is gone.
        """
        if isinstance(packed[0], str):
            starts, first, order = restore(packed)
        else:
            starts, first, order = (None if part is None else np.frombuffer(part, np.int64) for part in packed)
        if starts is None or first is None:
            raise ValueError("not a packed selection: its arrays are missing")
        return Selection(starts, first, order)

    def __reduce__(self) -> tuple[Any, ...]:
        return Selection.unpack, (self.pack(),)

    def __deepcopy__(self, memo: object) -> Selection:
        return self

    def __repr__(self) -> str:
        return f"Selection({len(self)} records, {len(self.starts)} runs{'' if self.order is None else ', listed'})"


def _runs_of(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (starts, first) of numbers that never descend."""
    if not len(numbers):
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    heads = np.flatnonzero(np.r_[True, np.diff(numbers) != 1])
    return numbers[heads], np.r_[heads, len(numbers)]


def _frozen(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array = np.ascontiguousarray(array, np.int64)
    array.flags.writeable = False
    return array
