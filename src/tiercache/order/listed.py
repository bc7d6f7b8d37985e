"""Records in an order that a sampler or a selection says: where each lies, and windows that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.groups import Groups, each_alone
from tiercache.order.window import sums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from tiercache.order.options import Layout

# A window's places are found and kept at 24 bytes a row: so many rows are found in some 20 ms.
MAX_WINDOW_ROWS = 1 << 18
# Where blocks are more than so many times the records, sorting the records costs less than a mark for each block.
_DENSE = 16
# Blocks are guessed by ranges of as many records as a block has, and stepped to: where blocks differ much, from a range
# that many begin in, which are then searched.
_MAX_STEPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where n records lie: a table of blocks, in stored order, and which of them each record is in.

    shards, blocks (inside their shards): int32[k]; block_bytes: int64[k], raw bytes of the whole block, all columns;
    at: int64[n], number in the table; row (inside its block): uint32[n].
    """

    shards: NDArray[np.int32]
    blocks: NDArray[np.int32]
    block_bytes: NDArray[np.int64]
    at: NDArray[np.int64]
    row: NDArray[np.uint32]

    def cut(self, start: int, stop: int) -> Places:
        """Those of records [start, stop)."""
        return Places(self.shards, self.blocks, self.block_bytes, self.at[start:stop], self.row[start:stop])

    def touched(self) -> NDArray[np.int64]:
        """Which blocks of the table the records lie in, rising."""
        if len(self.shards) > _DENSE * len(self.at):
            return np.unique(self.at)
        is_touched = np.zeros(len(self.shards), np.bool_)
        is_touched[self.at] = True
        return np.flatnonzero(is_touched)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Blocks of the shards that are known, in stored order: Places' table, and which records each has.

    starts, ends: int64[n_blocks], a block's first record, and the next block's; guesses: int64[.], which block the
    first record of each range of 2**shift records is in, from record `base` on.
    """

    shards: NDArray[np.int32]
    blocks: NDArray[np.int32]
    block_bytes: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    guesses: NDArray[np.int64]
    base: int
    shift: int

    def number_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which block each record is in, int64[n]: some 30 ns a record, where a search by halves takes 67."""
        at: NDArray[np.int64] = self.guesses[(numbers - self.base) >> self.shift]
        for _ in range(_MAX_STEPS):
            behind = self.ends[at] <= numbers
            if not behind.any():
                return at
            at += behind
        return np.searchsorted(self.starts, numbers, side="right") - 1


class Locator:
    """Finds records by their numbers. It keeps 24 bytes for each block of the shards that it was asked for.

    Threads may share it: at worst two of them read the same footers.
    """

    def __init__(self, layout: Layout) -> None:
        self._first_record = sums(layout.records)
        self._n_filled = int(np.count_nonzero(layout.records))  # shards that have records
        self._blocks = layout.blocks
        self._known: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._table = _join({}, 0)

    @property
    def n_records(self) -> int:
        """Of the data set."""
        return int(self._first_record[-1])

    def shards(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each record, int64[n]; reads no footers. numbers: 0 <= number < n_records."""
        return np.searchsorted(self._first_record, numbers, side="right") - 1

    def find(self, numbers: NDArray[np.int64]) -> Places:
        """Where the records lie; reads the footers of shards that were not asked for before.

        Args:
            numbers: int64[n], 0 <= number < n_records, in any order, some more than once.
        """
        if len(self._known) < self._n_filled:
            self._learn(np.unique(self.shards(numbers)).tolist())
        table = self._table
        at = table.number_of(numbers)
        row = (numbers - table.starts[at]).astype(np.uint32)
        return Places(table.shards, table.blocks, table.block_bytes, at, row)

    def find_all(self) -> Places:
        """Every block, and no records; reads all footers that were not read before."""
        return self.find(self._first_record[:-1][np.diff(self._first_record) > 0]).cut(0, 0)

    def _learn(self, shards: Sequence[int]) -> None:
        missing = [shard for shard in shards if shard not in self._known]
        if not missing:
            return
        for shard, table in zip(missing, self._blocks(missing), strict=True):
            first = sums(table.records)
            found, expected = int(first[-1]), int(self._first_record[shard + 1] - self._first_record[shard])
            if found != expected:
                raise ValueError(f"shard {shard}: its footer holds {found} records, the version {expected}")
            self._known[shard] = first[:-1] + self._first_record[shard], table.raw_bytes
        self._table = _join(dict(sorted(self._known.items())), int(self._first_record[max(self._known) + 1]))


def _join(known: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]], stop: int) -> _Table:
    """The table of shards by their numbers, which rise, from (first records, raw bytes) of their blocks.

    stop: the record after the last.
    """
    counts = [len(starts) for starts, _ in known.values()]
    nothing = np.empty(0, np.int64)
    starts = np.concatenate([nothing, *(starts for starts, _ in known.values())])
    base = int(starts[0]) if len(starts) else stop
    shift = max(((stop - base) // max(len(starts), 1)).bit_length() - 1, 0)
    ranges = np.arange(base, stop + 1, 1 << shift)
    return _Table(
        np.repeat(np.array(list(known), np.int32), counts),
        np.concatenate([nothing, *(np.arange(n) for n in counts)]).astype(np.int32),
        np.concatenate([nothing, *(raw_bytes for _, raw_bytes in known.values())]),
        starts,
        np.append(starts[1:], np.iinfo(np.int64).max)[: len(starts)],
        np.maximum(np.searchsorted(starts, ranges, side="right") - 1, 0),
        base,
        shift,
    )


@dataclass(frozen=True, slots=True, eq=False)
class ListedWindow:
    """Blocks that hold listed records [start, stop). Has a `Window`'s attributes, and is a `Stretch` by itself.

    block (into shards and blocks), row: uint32[stop - start].
    """

    start: int
    stop: int
    shards: NDArray[np.int32]
    blocks: NDArray[np.int32]
    block_bytes: NDArray[np.int64]
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]
    group: int = 0
    index: int = 0
    stream: int = 0
    key: bytes | None = None
    row_start: None = None

    @property
    def raw_bytes(self) -> int:
        """Of its blocks, all columns, decoded."""
        return int(self.block_bytes.sum())

    @property
    def is_in_order(self) -> bool:
        """False: whoever listed them may have meant any order."""
        return False

    @property
    def windows(self) -> tuple[ListedWindow, ...]:
        """Itself."""
        return (self,)

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """See Window.rows. Raises ValueError: positions outside the window."""
        if not 0 <= lo <= hi <= len(self.row):
            raise ValueError(f"positions [{lo}, {hi}) are outside a window of {len(self.row)}")
        return self.block[lo:hi].copy(), self.row[lo:hi].copy()


def listed_window(start: int, places: Places) -> ListedWindow:
    """A window of the blocks that these records lie in, and no others, in stored order. start: of the first record."""
    touched = places.touched()
    if len(places.shards) > _DENSE * len(places.at):
        block = np.searchsorted(touched, places.at)
    else:
        numbers = np.empty(len(places.shards), np.int64)
        numbers[touched] = np.arange(len(touched))
        block = numbers[places.at]
    return ListedWindow(
        start,
        start + len(places.row),
        places.shards[touched],
        places.blocks[touched],
        places.block_bytes[touched],
        block.astype(np.uint32),
        places.row,
    )


def whole_window(places: Places) -> ListedWindow:
    """A window of all the blocks of the table, for the records of any pieces: `at` is the number of a block in it."""
    nothing = np.empty(0, np.uint32)
    return ListedWindow(0, 0, places.shards, places.blocks, places.block_bytes, nothing, nothing)


def count_fitting(places: Places, limit_bytes: int | None, free_shards: Sequence[int] = ()) -> int:
    """How many of the first records lie in blocks that fit limit_bytes together, each block counted once; at least one.

    Args:
        places: of one record or more.
        limit_bytes: None: no limit.
        free_shards: whose blocks cost nothing.
    """
    n = len(places.at)
    touched = places.touched()
    costly = touched[~np.isin(places.shards[touched], free_shards)]
    if limit_bytes is None or int(places.block_bytes[costly].sum()) <= limit_bytes:
        return n
    blocks, first = np.unique(places.at, return_index=True)
    cost = np.zeros(n, np.int64)
    cost[first] = places.block_bytes[blocks] * ~np.isin(places.shards[blocks], free_shards)
    return max(int(np.searchsorted(np.cumsum(cost), limit_bytes, side="right")), 1)


class ListedOrder:
    """An order (`order.Order`) of one stream that serves records as they are listed. Nothing is shuffled.

    Args:
        layout: of the records that are numbered.
        numbers: int64[n], 0 <= number < records of the layout, in served order, some more than once; kept.
        window_bytes: raw bytes of the blocks of a window; None: no limit.
    """

    n_streams = 1

    def __init__(self, layout: Layout, numbers: NDArray[np.int64], window_bytes: int | None) -> None:
        self._numbers = numbers
        self._locator = Locator(layout)
        self._stored_bytes = layout.stored_bytes
        self._window_bytes = window_bytes
        self._last: ListedWindow | None = None
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self._locator.n_records:
            raise ValueError(f"records [{numbers.min()}, {numbers.max()}] of a layout of {self._locator.n_records}")

    @property
    def n_records(self) -> int:
        """Of the epoch."""
        return len(self._numbers)

    def stream_records(self, stream: int) -> int:
        """All of them. Raises ValueError for another stream than 0."""
        self._check(stream, 0)
        return self.n_records

    def stretch_at(self, stream: int, position: int) -> ListedWindow:
        """The window that holds a position: the last one that was made, or one that begins there.

        Raises:
            ValueError: the position is outside the stream.
        """
        self._check(stream, position)
        if position == self.n_records:
            raise ValueError(f"position {position} is outside an epoch of {self.n_records} records")
        last = self._last
        if last is None or not last.start <= position < last.stop:
            places = self._locator.find(self._numbers[position : position + MAX_WINDOW_ROWS])
            n = count_fitting(places, self._window_bytes)
            last = self._last = listed_window(position, places.cut(0, n))
        return last

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """See Order.shards_ahead. With a limit it looks MAX_WINDOW_ROWS ahead at most."""
        self._check(stream, position)
        stop = self.n_records if n_bytes is None else position + MAX_WINDOW_ROWS
        found, first = np.unique(self._locator.shards(self._numbers[position:stop]), return_index=True)
        shards = found[np.argsort(first)]
        if n_bytes is None or not len(shards):
            return shards
        return shards[: max(int(np.searchsorted(np.cumsum(self._stored_bytes[shards]), n_bytes)) + 1, 1)]

    def groups(self, stream: int) -> Groups:
        """See Order.groups: each shard is one, from its first record to its last, 50 ns a record."""
        self._check(stream, 0)
        n_shards = len(self._stored_bytes)
        first, last = np.full(n_shards, self.n_records), np.full(n_shards, -1)
        for start in range(0, self.n_records, MAX_WINDOW_ROWS):
            shards = self._locator.shards(self._numbers[start : start + MAX_WINDOW_ROWS])
            at = np.arange(start, start + len(shards))
            last[shards] = at  # the last of equal ones holds
            begins = np.empty(n_shards, np.int64)
            begins[shards[::-1]] = at[::-1]
            first[shards] = np.minimum(first[shards], begins[shards])
        read = np.flatnonzero(last >= 0)
        read = read[np.argsort(first[read])]
        return each_alone(first[read], last[read] + 1, read, self._stored_bytes[read])

    def _check(self, stream: int, position: int) -> None:
        if stream != 0 or not 0 <= position <= self.n_records:
            raise ValueError(f"position {position} of stream {stream} is outside an epoch of {self.n_records} records")
