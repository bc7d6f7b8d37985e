"""Windows: runs of blocks whose rows are mixed together, and how runs are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache._native.permute import RowFinder
from tiercache.order.memory import empty_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# A stream of so many windows starts with small ones, 1/64 of a whole one and doubling: its first batch needs few
# blocks, and what is mixed less is one window's worth.
RAMP_MIN_WINDOWS = 8
RAMP_SHIFTS = (6, 5, 4, 3, 2, 1)


class RowRun(NamedTuple):
    """n_rows of a window in served order, from position `start` of it on: where each lies is found as it is needed."""

    finder: RowFinder
    start: int
    n_rows: int

    def find(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Places of the run's rows [lo, hi): block and row, uint32[hi - lo] each. ValueError outside the window."""
        if hi < lo:
            raise ValueError(f"rows [{lo}, {hi}) are no range")
        block, row = empty_rows(hi - lo), empty_rows(hi - lo)
        self.finder.find(self.start + lo, block, row)
        return block, row


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One window of the order: positions [start, stop) of a stream. Immutable, shared freely between threads.

    Attributes:
        group: number of the group of shards it lies in.
        index: its number inside the group.
        start, stop: positions in the stream.
        raw_bytes: of its blocks, all columns, decoded; of a block that is cut between streams the whole.
        shards: int32[k], shard of each block, by data-set index.
        blocks: int32[k], the block inside its shard.
        block_bytes: int64[k], raw bytes of each block, all columns.
        first: int64[k + 1], cumulative rows of the blocks, those of the stream only; first[k] == stop - start.
        key: of the permutation of its rows; None when they are not shuffled.
        stream: number of the stream.
        row_start: uint32[k], the first row of each block that belongs to the stream; None: each block's first.
    """

    group: int
    index: int
    start: int
    stop: int
    raw_bytes: int
    shards: NDArray[np.int32]
    blocks: NDArray[np.int32]
    block_bytes: NDArray[np.int64]
    first: NDArray[np.int64]
    key: bytes | None
    stream: int = 0
    row_start: NDArray[np.uint32] | None = None
    _finder: RowFinder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_finder", RowFinder(self.first, self.key, self.row_start))

    @property
    def windows(self) -> tuple[Window, ...]:
        """Itself: a window is a `Stretch` of an order whose stretches have one window each."""
        return (self,)

    @property
    def is_in_order(self) -> bool:
        """Whether its rows are served as they are stored."""
        return self.key is None

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Places of positions [lo, hi), counted from the window's start.

        Returns:
            block: uint32[hi - lo], indices into shards and blocks; row: uint32[hi - lo], the row inside its block.

        Raises:
            ValueError: positions outside the window.
        """
        return self.run(lo, hi).find(0, hi - lo)

    def run(self, lo: int, hi: int) -> RowRun:
        """Positions [lo, hi), counted from the window's start, which are some of its own."""
        return RowRun(self._finder, lo, hi - lo)


def ramp(window_bytes: int) -> tuple[int, ...]:
    """Sizes of the first windows of a long stream, in bytes: 1/64, 1/32, ... 1/2 of a whole one."""
    return tuple(window_bytes >> shift for shift in RAMP_SHIFTS)


def sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cumulative sums from 0: int64[n + 1]."""
    found = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=found[1:])
    return found


def cut(
    sizes: NDArray[np.int64],
    limit_bytes: int | None,
    first_limits: Sequence[int] = (),
    max_items: int | None = None,
) -> NDArray[np.int64]:
    """Cut items into consecutive runs: as many whole items as fit limit_bytes together, at least one.

    Args:
        sizes: int64[n], bytes of each item.
        limit_bytes: of a run; None: all items are one run.
        first_limits: limits of the first runs, one each, before limit_bytes holds.
        max_items: of a run after those; None: any number.

    Returns:
        int64[m + 1]: run i is items [cuts[i], cuts[i + 1]); [0] when there are no items.
    """
    n = len(sizes)
    if limit_bytes is None or n == 0:
        return np.array([0, n] if n else [0], np.int64)
    total = sums(sizes)
    cuts = [0]
    for limit in first_limits:
        if cuts[-1] < n:
            end = int(np.searchsorted(total, total[cuts[-1]] + limit, side="right")) - 1
            cuts.append(max(end, cuts[-1] + 1))
    # Where a run from each item would end, all at once: the loop over runs (10^5 of them and more) then has no search.
    ends = np.searchsorted(total, total[:-1] + min(limit_bytes, int(total[-1])), side="right") - 1
    ends = np.maximum(ends, np.arange(1, n + 1))
    following = (ends if max_items is None else np.minimum(ends, np.arange(n) + max_items)).tolist()
    while cuts[-1] < n:
        cuts.append(following[cuts[-1]])
    return np.array(cuts, np.int64)
