"""Options and sizes that an order is made from, its interface, and its parts: windows of blocks, and shard groups.

Row numbers are written into reused memory.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache._native.permute import RowFinder

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
        """Return the block and the row of rows [lo, hi) of the run, uint32[hi - lo] each."""
        if hi < lo:
            raise ValueError(f"rows [{lo}, {hi}) end before they start")
        block, row = allocate_rows(hi - lo), allocate_rows(hi - lo)
        self.finder.find(self.start + lo, block, row)
        return block, row


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Window of an order: positions [start, stop) of a stream. Immutable; threads may share it."""

    group: int  # number of the window's shard group
    index: int  # number of the window in its group
    start: int
    stop: int
    raw_bytes: int  # of all columns of its blocks; a block that is cut between streams counts completely
    shards: NDArray[np.int32]  # [k], shard of each block
    blocks: NDArray[np.int32]  # [k], number of each block in its shard
    block_bytes: NDArray[np.int64]  # [k], raw bytes of each block, all columns
    first: NDArray[np.int64]  # [k + 1], cumulative rows of the blocks that belong to the stream
    key: bytes | None  # of the permutation of its rows; None if they are not shuffled
    stream: int = 0
    row_start: NDArray[np.uint32] | None = None  # [k], first row of each block that belongs to the stream
    _finder: RowFinder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_finder", RowFinder(self.first, self.key, self.row_start))

    @property
    def windows(self) -> tuple[Window, ...]:
        """This window alone: a window is a `Section` of an order whose sections have one window each."""
        return (self,)

    @property
    def reads_whole_blocks(self) -> bool:
        """Whether all rows of its blocks are served, by all ranks together."""
        return True

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        return self.run(lo, hi).find(0, hi - lo)

    def run(self, lo: int, hi: int) -> RowRun:
        """Return the run of positions [lo, hi), counted from the window's start; they must lie in the window."""
        return RowRun(self._finder, lo, hi - lo)

    def part_from(self, position: int, n_bytes: int) -> Window:
        """Return the window of the blocks from that of a position on that fit n_bytes, at least one.

        Only for a window whose rows are not shuffled: its parts in turn serve the same rows.
        """
        begin = int(np.searchsorted(self.first, position - self.start, side="right")) - 1
        end = begin + max(int(np.searchsorted(np.cumsum(self.block_bytes[begin:]), n_bytes, side="right")), 1)
        first = self.first[begin : end + 1]
        return replace(
            self,
            start=self.start + int(first[0]),
            stop=self.start + int(first[-1]),
            raw_bytes=int(self.block_bytes[begin:end].sum()),
            shards=self.shards[begin:end],
            blocks=self.blocks[begin:end],
            block_bytes=self.block_bytes[begin:end],
            first=first - first[0],
            row_start=None if self.row_start is None else self.row_start[begin:end],
        )


def ramp(window_bytes: int) -> tuple[int, ...]:
    """Return the sizes in bytes of the first windows of a long stream: 1/64, 1/32, ... 1/2 of a full window."""
    return tuple(window_bytes >> shift for shift in RAMP_SHIFTS)


def offsets_of_counts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    found = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=found[1:])
    return found


def cut_by_size(
    sizes: NDArray[np.int64], limit_bytes: int | None, first_limits: Sequence[int] = (), max_items: int | None = None
) -> NDArray[np.int64]:
    """Cut items into consecutive runs, each with as many whole items as fit limit_bytes together, at least one.

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


@dataclass(frozen=True, slots=True, eq=False)
class ShardGroups:
    """Shard groups that a stream reads. Immutable. Iteration yields (start, stop, shards).

    Every record of the stream lies in a shard of a group whose positions include the record's position. Groups may
    overlap; none is empty.
    """

    starts: NDArray[np.int64]  # [g], positions [start, stop) over which the shards of each group are in use
    stops: NDArray[np.int64]
    cuts: NDArray[np.int64]  # [g + 1], group i reads shards[cuts[i]:cuts[i + 1]]
    shards: NDArray[np.int64]  # [m], in reading order
    stored_bytes: NDArray[np.int64]  # [g], that the stream reads of each group

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        bounds = zip(
            self.starts.tolist(), self.stops.tolist(), self.cuts.tolist(), self.cuts[1:].tolist(), strict=False
        )
        for start, stop, first, last in bounds:
            yield start, stop, self.shards[first:last]

    def moved_to(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> ShardGroups:
        """Return the groups over other positions, with proportional bytes; groups that become empty are dropped."""
        kept = np.flatnonzero(stops > starts)
        share = (stops[kept] - starts[kept]) / (self.stops[kept] - self.starts[kept])
        sizes = np.diff(self.cuts)
        chosen = np.zeros(len(self), np.bool_)
        chosen[kept] = True
        return ShardGroups(
            starts[kept],
            stops[kept],
            offsets_of_counts(sizes[kept]),
            self.shards[np.repeat(chosen, sizes)],
            (self.stored_bytes[kept] * share).astype(np.int64),
        )


def single_shard_groups(
    starts: NDArray[np.int64], stops: NDArray[np.int64], shards: NDArray[np.int64], stored_bytes: NDArray[np.int64]
) -> ShardGroups:
    return ShardGroups(starts, stops, np.arange(len(shards) + 1), shards, stored_bytes)


def concat_groups(parts: Sequence[ShardGroups]) -> ShardGroups:
    if len(parts) == 1:
        return parts[0]
    nothing = np.empty(0, np.int64)
    return ShardGroups(
        np.concatenate([nothing, *(part.starts for part in parts)]),
        np.concatenate([nothing, *(part.stops for part in parts)]),
        offsets_of_counts(np.concatenate([nothing, *(np.diff(part.cuts) for part in parts)])),
        np.concatenate([nothing, *(part.shards for part in parts)]),
        np.concatenate([nothing, *(part.stored_bytes for part in parts)]),
    )


# One stream for each rank of the largest cluster. A stream number fits 16 bits, which numpy sorts in linear time.
MAX_STREAMS = 1 << 16


@dataclass(frozen=True, slots=True)
class OrderOptions:
    """Options of an epoch's order, which depends only on them, the sizes of the data set and the epoch.

    Streams are parts of the order that are read in parallel, each by its own rank if there are enough ranks; without
    shuffle there is one. "sticky": a stream has the same shards in all epochs; "global": it does not.
    """

    seed: int
    shuffle: bool
    group_bytes: int | None  # stored bytes of the shards that are read at a time; None: all shards
    window_bytes: int | None  # raw bytes of the blocks over which rows are mixed; None: a whole group
    streams: int = 1
    placement: Literal["sticky", "global"] = "sticky"

    def __post_init__(self) -> None:
        for name, size in (("shuffle_group_bytes", self.group_bytes), ("shuffle_window_bytes", self.window_bytes)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be 1 or more, or 'all', got {size}")
        if self.placement not in ("sticky", "global"):
            raise ValueError(f"placement must be 'sticky' or 'global', got {self.placement!r}")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be 1 to {MAX_STREAMS}, got {self.streams}")


@dataclass(frozen=True, slots=True, eq=False)
class BlockSizes:
    """Sizes of the blocks of one shard, from its footer: records, and decoded bytes of all columns."""

    records: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in ("records", "raw_bytes"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if len(self.records) != len(self.raw_bytes):
            raise ValueError(f"records has {len(self.records)} blocks, raw_bytes has {len(self.raw_bytes)}")


@dataclass(frozen=True, slots=True, eq=False)
class DatasetSizes:
    """Sizes of the shards of a data set, in stored order, and of their blocks.

    blocks returns the block sizes of shards, given their numbers, in the same order. An order calls it for the
    non-empty shards of one shard group, or of the records of one window, from any thread. Its exceptions are passed on;
    the function itself should cache its results.
    """

    records: NDArray[np.int64]  # [n_shards]
    stored_bytes: NDArray[np.int64]  # [n_shards], of each whole shard
    blocks: Callable[[Sequence[int]], Sequence[BlockSizes]]

    def __post_init__(self) -> None:
        for name in ("records", "stored_bytes"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if len(self.records) != len(self.stored_bytes):
            raise ValueError(f"records has {len(self.records)} shards, stored_bytes has {len(self.stored_bytes)}")


def _counts(name: str, values: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the values as a read-only int64 array (a view if they already are int64)."""
    array = np.ascontiguousarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{name} must be a one-dimensional integer array, got {array.dtype} of shape {array.shape}")
    counts = array.astype(np.int64, copy=False).view()
    if counts.size and counts.min() < 0:
        raise ValueError(f"{name} must be 0 or more, below 2**63, got {array[counts.argmin()]}")
    counts.flags.writeable = False
    return counts


@dataclass(frozen=True, slots=True, eq=False)
class ExplicitWindow:
    """Blocks that hold the records at positions [start, stop) of an explicit order, as a `Window` has them."""

    start: int
    stop: int
    shards: NDArray[np.int32]
    blocks: NDArray[np.int32]
    block_bytes: NDArray[np.int64]
    key: bytes | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def raw_bytes(self) -> int:
        return int(self.block_bytes.sum())

    @property
    def reads_whole_blocks(self) -> bool:
        """See Window.reads_whole_blocks: of a block, an explicit order may serve a single row."""
        return False


AnyWindow: TypeAlias = Window | ExplicitWindow


class Section(Protocol):
    """Section: consecutive positions of one stream that are served from the same windows. Immutable.

    A `Window` is a section by itself: its `windows` are (itself,).
    """

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def windows(self) -> tuple[AnyWindow, ...]: ...

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return block (among those of all windows) and row of the records at positions [lo, hi) from `start`."""


class Order(Protocol):
    """Order of one epoch. Position p is record p // n_streams of stream p % n_streams.

    All methods may be called from any thread.
    """

    @property
    def n_records(self) -> int: ...

    @property
    def n_streams(self) -> int:
        """Number of streams; 1 without shuffle. Some are empty if the epoch has fewer records than streams."""

    def stream_records(self, stream: int) -> int:
        """Return the number of records of a stream: ceil((n_records - stream) / n_streams)."""

    def section_at(self, stream: int, position: int) -> Section:
        """Return the section that holds a position of a stream; may read its footers. Raises ValueError."""

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """Return the shards that are read from a position of a stream on, in reading order, without footers.

        n_bytes: Stored bytes that they hold together; None: to the end of the stream. Raises ValueError.
        """

    def groups(self, stream: int) -> ShardGroups:
        """Return the shard groups of a stream, with the positions over which each is read. Raises ValueError."""
