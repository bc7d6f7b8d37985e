"""Windows of blocks whose rows are shuffled together, shard groups, and the cutting of items into runs.

Row numbers are written into reused memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiercache._native.permute import RowFinder
from tiercache.order.memory import allocate_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# A stream of at least this many windows starts with small ones, from 1/64 of a full window, doubling: the first batch
# then needs few blocks, and the small windows together are about one full window.
RAMP_MIN_WINDOWS = 8
RAMP_SHIFTS = (6, 5, 4, 3, 2, 1)


class RowRun(NamedTuple):
    """Run of n_rows rows of a window in served order, from position `start` on. Rows are located when needed."""

    finder: RowFinder
    start: int
    n_rows: int

    def find(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the block and the row of rows [lo, hi) of the run, uint32[hi - lo] each.

        Raises:
            ValueError: The rows are outside the window.
        """
        if hi < lo:
            raise ValueError(f"rows [{lo}, {hi}) end before they start")
        block, row = allocate_rows(hi - lo), allocate_rows(hi - lo)
        self.finder.find(self.start + lo, block, row)
        return block, row


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Window of an order: positions [start, stop) of a stream. Immutable; threads may share it.

    Attributes:
        group: Number of the window's shard group.
        index: Number of the window in its group.
        start, stop: Positions in the stream.
        raw_bytes: Decoded bytes of its blocks, all columns; a block that is cut between streams counts completely.
        shards: int32[k], shard number of each block in the data set.
        blocks: int32[k], number of each block in its shard.
        block_bytes: int64[k], raw bytes of each block, all columns.
        first: int64[k + 1], cumulative rows of the blocks that belong to the stream; first[k] == stop - start.
        key: Key of the permutation of its rows; None if they are not shuffled.
        stream: Number of the stream.
        row_start: uint32[k], first row of each block that belongs to the stream; None: row 0 of every block.
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
        """This window alone: a window is a `Section` of an order whose sections have one window each."""
        return (self,)

    @property
    def is_in_order(self) -> bool:
        """Whether its rows are served in stored order."""
        return self.key is None

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the block and the row of the records at positions [lo, hi), counted from the window's start.

        Returns:
            block: uint32[hi - lo], index into shards and blocks. row: uint32[hi - lo], row inside the block.

        Raises:
            ValueError: The positions are outside the window.
        """
        return self.run(lo, hi).find(0, hi - lo)

    def run(self, lo: int, hi: int) -> RowRun:
        """Return the run of positions [lo, hi), counted from the window's start; they must lie in the window."""
        return RowRun(self._finder, lo, hi - lo)


def ramp(window_bytes: int) -> tuple[int, ...]:
    """Return the sizes in bytes of the first windows of a long stream: 1/64, 1/32, ... 1/2 of a full window."""
    return tuple(window_bytes >> shift for shift in RAMP_SHIFTS)


def offsets_of_counts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the cumulative sums from 0, int64[n + 1]."""
    found = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=found[1:])
    return found


def cut_by_size(
    sizes: NDArray[np.int64],
    limit_bytes: int | None,
    first_limits: Sequence[int] = (),
    max_items: int | None = None,
) -> NDArray[np.int64]:
    """Cut items into consecutive runs, each with as many whole items as fit limit_bytes together, at least one.

    Args:
        sizes: int64[n], bytes of each item.
        limit_bytes: Limit of a run; None: all items are one run.
        first_limits: Limits of the first runs, one for each; limit_bytes holds for the runs after them.
        max_items: Maximum number of items of a run after the first ones; None: no maximum.

    Returns:
        int64[m + 1]: run i is items [cuts[i], cuts[i + 1]); [0] if there are no items.
    """
    n = len(sizes)
    if limit_bytes is None or n == 0:
        return np.array([0, n] if n else [0], np.int64)
    total = offsets_of_counts(sizes)
    cuts = [0]
    for limit in first_limits:
        if cuts[-1] < n:
            end = int(np.searchsorted(total, total[cuts[-1]] + limit, side="right")) - 1
            cuts.append(max(end, cuts[-1] + 1))
    # Compute the end of a run from every item at once: the loop over the runs (10^5 of them and more) then needs no
    # search.
    ends = np.searchsorted(total, total[:-1] + min(limit_bytes, int(total[-1])), side="right") - 1
    ends = np.maximum(ends, np.arange(1, n + 1))
    following = (ends if max_items is None else np.minimum(ends, np.arange(n) + max_items)).tolist()
    while cuts[-1] < n:
        cuts.append(following[cuts[-1]])
    return np.array(cuts, np.int64)
