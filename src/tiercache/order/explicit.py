"""Records in an explicit order, given by a sampler or a selection: their locations, and windows that hold them.

The order is an array of record numbers, or a function (`PermutedOrder`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from tiercache._native.permute import permute, permute_at
from tiercache.order.window import DatasetSizes, ExplicitWindow, ShardGroups, offsets_of_counts, single_shard_groups

# Record locations of a window take 24 bytes a row; the maximum is located in about 20 ms. The first batch does not wait
# for that: the first section is small, and each section has at most four times the rows of the one before.
FIRST_WINDOW_ROWS, MAX_WINDOW_ROWS = 1 << 13, 1 << 18
# A block is guessed from the record's range (one range per average block), then corrected step by step. If blocks
# differ much in size, more steps than this are needed, and a binary search is used.
_MAX_STEPS = 4


@dataclass(frozen=True, slots=True)
class PermutedOrder:
    """A keyed permutation of n places as a served order: computed when it is read (20 to 80 ns a place)."""

    key: bytes
    n: int

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, places: int) -> int: ...

    @overload
    def __getitem__(self, places: slice | NDArray[np.int64]) -> NDArray[np.int64]: ...

    def __getitem__(self, places: int | slice | NDArray[np.int64]) -> int | NDArray[np.int64]:
        if isinstance(places, slice):
            start, stop, step = places.indices(self.n)
            if step == 1:
                out = np.empty(max(stop - start, 0), np.int64)
                permute(self.key, self.n, start, out.view(np.uint64))
                return out
            places = np.arange(start, stop, step)
        is_one = not isinstance(places, np.ndarray)
        wanted = np.array(places, np.int64, ndmin=1)
        permute_at(self.key, self.n, wanted, wanted)
        return int(wanted[0]) if is_one else wanted

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)

    def min(self) -> int:
        return 0

    def max(self) -> int:
        return self.n - 1


ServedOrder: TypeAlias = "NDArray[np.int64] | PermutedOrder"


@dataclass(frozen=True, slots=True, eq=False)
class RecordLocations:
    """Locations of n records: a table of blocks in stored order, and for each record its block in the table."""

    shards: NDArray[np.int32]  # [k], shard of each block
    blocks: NDArray[np.int32]  # [k], number of each block in its shard
    block_bytes: NDArray[np.int64]  # [k], raw bytes of the whole block, all columns
    at: NDArray[np.int64]  # [n], index of each record's block in the table
    row: NDArray[np.uint32]  # [n], row of each record in its block

    def slice(self, start: int, stop: int) -> RecordLocations:
        return RecordLocations(self.shards, self.blocks, self.block_bytes, self.at[start:stop], self.row[start:stop])

    def touched(self) -> NDArray[np.int64]:
        is_touched = np.zeros(len(self.shards), np.bool_)
        is_touched[self.at] = True
        return np.flatnonzero(is_touched)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Blocks of the shards that are known, in stored order, with their records."""

    shards: NDArray[np.int32]
    blocks: NDArray[np.int32]
    block_bytes: NDArray[np.int64]
    starts: NDArray[np.int64]  # [k], first record of each block
    ends: NDArray[np.int64]  # [k], first record of the next block
    guesses: NDArray[np.int64]  # block that holds the first record of each range of 2**shift records from `base` on
    base: int
    shift: int

    def number_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of each record's block, int64[n]. About 10 ns a record; a binary search takes 100 ns."""
        at: NDArray[np.int64] = self.guesses[(numbers - self.base) >> self.shift]
        for _ in range(_MAX_STEPS):
            behind = self.ends[at] <= numbers
            if not behind.any():
                return at
            at += behind
        return np.searchsorted(self.starts, numbers, side="right") - 1


class RecordLocator:
    """Locates records by their numbers. It keeps 24 bytes for each block of the shards that it has looked up."""

    def __init__(self, sizes: DatasetSizes) -> None:
        self._first_record = offsets_of_counts(sizes.records)
        self._n_filled = int(np.count_nonzero(sizes.records))  # number of non-empty shards
        self._blocks = sizes.blocks
        self._known: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._table = _join({}, 0)

    @property
    def n_records(self) -> int:
        return int(self._first_record[-1])

    def shards(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_record, numbers, side="right") - 1

    def find(self, numbers: NDArray[np.int64]) -> RecordLocations:
        """Return the locations of records; reads the footers of shards that were not looked up before."""
        if not self.is_complete:
            self._learn(np.unique(self.shards(numbers)).tolist())
        table = self._table
        at = table.number_of(numbers)
        row = (numbers - table.starts[at]).astype(np.uint32)
        return RecordLocations(table.shards, table.blocks, table.block_bytes, at, row)

    @property
    def is_complete(self) -> bool:
        return len(self._known) == self._n_filled

    def _learn(self, shards: Sequence[int]) -> None:
        missing = [shard for shard in shards if shard not in self._known]
        if not missing:
            return
        for shard, table in zip(missing, self._blocks(missing), strict=True):
            first = offsets_of_counts(table.records)
            found, expected = int(first[-1]), int(self._first_record[shard + 1] - self._first_record[shard])
            if found != expected:
                raise ValueError(f"shard {shard}: its footer holds {found} records, but the version lists {expected}")
            self._known[shard] = first[:-1] + self._first_record[shard], table.raw_bytes
        self._table = _join(dict(sorted(self._known.items())), int(self._first_record[max(self._known) + 1]))


def _join(known: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]], stop: int) -> _Table:
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
class ExplicitSection:
    """Section of an explicit order, with the one window that holds its records: block and row of each."""

    start: int
    window: ExplicitWindow
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]

    @property
    def stop(self) -> int:
        return self.start + len(self.row)

    @property
    def windows(self) -> tuple[ExplicitWindow, ...]:
        return (self.window,)

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        if not 0 <= lo <= hi <= len(self.row):
            raise ValueError(f"positions [{lo}, {hi}) are outside a section of {len(self.row)}")
        return self.block[lo:hi].copy(), self.row[lo:hi].copy()


def explicit_section(start: int, places: RecordLocations) -> ExplicitSection:
    touched = places.touched()
    numbers = np.empty(len(places.shards), np.int64)
    numbers[touched] = np.arange(len(touched))
    stop, blocks = start + len(places.row), (places.shards[touched], places.blocks[touched])
    window = ExplicitWindow(start, stop, *blocks, places.block_bytes[touched])
    return ExplicitSection(start, window, numbers[places.at].astype(np.uint32), places.row)


def count_fitting(places: RecordLocations, limit_bytes: int | None, free_shards: Sequence[int] = ()) -> int:
    """Return how many of the first records lie in blocks of at most limit_bytes together; at least one."""
    n = len(places.at)
    touched = places.touched()
    costly = touched[~np.isin(places.shards[touched], free_shards)]
    if limit_bytes is None or int(places.block_bytes[costly].sum()) <= limit_bytes:
        return n
    blocks, first = np.unique(places.at, return_index=True)
    cost = np.zeros(n, np.int64)
    cost[first] = places.block_bytes[blocks] * ~np.isin(places.shards[blocks], free_shards)
    return max(int(np.searchsorted(np.cumsum(cost), limit_bytes, side="right")), 1)


class ExplicitOrder:
    """Order (`window.Order`) of one stream that serves records in an explicit order, without shuffle.

    numbers: Record numbers in served order, with repetitions. window_bytes: Raw bytes of the blocks of a window; None:
    no limit. is_mapped: Whether the blocks of a shard take no memory, so that they do not count.
    """

    n_streams = 1

    def __init__(
        self,
        sizes: DatasetSizes,
        numbers: ServedOrder,
        window_bytes: int | None,
        is_mapped: Callable[[int], bool] = lambda _shard: False,
    ) -> None:
        self._numbers = numbers
        self._locator = RecordLocator(sizes)
        self._stored_bytes = sizes.stored_bytes
        self._window_bytes = window_bytes
        self._is_mapped = is_mapped
        self._last: ExplicitSection | None = None
        self._whole: ExplicitWindow | None = None  # all blocks of the data set
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self._locator.n_records:
            raise ValueError(
                f"record numbers {numbers.min()} to {numbers.max()} exceed {self._locator.n_records} records"
            )

    @property
    def n_records(self) -> int:
        return len(self._numbers)

    def stream_records(self, stream: int) -> int:
        self._check(stream, 0)
        return self.n_records

    def section_at(self, stream: int, position: int) -> ExplicitSection:
        """Return the section that holds a position: the last one that was built, or a new one that starts there."""
        self._check(stream, position)
        if position == self.n_records:
            raise ValueError(f"position {position} is outside an epoch of {self.n_records} records")
        last = self._last
        if last is None or not last.start <= position < last.stop:
            last = self._last = self._section(position)
        return last

    def _section(self, position: int) -> ExplicitSection:
        n_rows = FIRST_WINDOW_ROWS if self._last is None else min(4 * len(self._last.row), MAX_WINDOW_ROWS)
        places = self._locator.find(self._numbers[position : position + n_rows])
        if self._whole is None:
            mapped = self._mapped(places.shards[places.touched()])
            places = places.slice(0, count_fitting(places, self._window_bytes, mapped))
            if not self._should_keep_all(places):
                return explicit_section(position, places)
            self._whole = ExplicitWindow(0, self.n_records, places.shards, places.blocks, places.block_bytes)
        return ExplicitSection(position, self._whole, places.at.astype(np.uint32), places.row)

    def _mapped(self, shards: NDArray[np.int32]) -> list[int]:
        return [shard for shard in np.unique(shards).tolist() if self._is_mapped(shard)]

    def _should_keep_all(self, places: RecordLocations) -> bool:
        """Whether one window of all blocks should be used to the end: these records need most of them, and they fit.

        Loading a window takes 0.3 ms a shard and more; in a window that is kept, a record costs 0.1 us.
        """
        if not self._locator.is_complete or 2 * len(places.touched()) < len(places.shards):
            return False
        costly = ~np.isin(places.shards, self._mapped(places.shards))
        return self._window_bytes is None or int(places.block_bytes[costly].sum()) <= self._window_bytes

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """See Order.shards_ahead. With a limit it looks at most MAX_WINDOW_ROWS positions ahead."""
        self._check(stream, position)
        stop = self.n_records if n_bytes is None else position + MAX_WINDOW_ROWS
        found, first = np.unique(self._locator.shards(self._numbers[position:stop]), return_index=True)
        shards = found[np.argsort(first)]
        if n_bytes is None or not len(shards):
            return shards
        return shards[: max(int(np.searchsorted(np.cumsum(self._stored_bytes[shards]), n_bytes)) + 1, 1)]

    def groups(self, stream: int) -> ShardGroups:
        """See Order.groups. Each shard is a group, from its first record to its last one; takes 50 ns a record."""
        self._check(stream, 0)
        n_shards = len(self._stored_bytes)
        first, last = np.full(n_shards, self.n_records), np.full(n_shards, -1)
        for start in range(0, self.n_records, MAX_WINDOW_ROWS):
            shards = self._locator.shards(self._numbers[start : start + MAX_WINDOW_ROWS])
            at = np.arange(start, start + len(shards))
            last[shards] = at  # numpy keeps the last assignment to an index
            begins = np.empty(n_shards, np.int64)
            begins[shards[::-1]] = at[::-1]
            first[shards] = np.minimum(first[shards], begins[shards])
        read = np.flatnonzero(last >= 0)
        read = read[np.argsort(first[read])]
        return single_shard_groups(first[read], last[read] + 1, read, self._stored_bytes[read])

    def _check(self, stream: int, position: int) -> None:
        if stream != 0 or not 0 <= position <= self.n_records:
            raise ValueError(f"position {position} of stream {stream} is outside an epoch of {self.n_records} records")
