"""Which positions of the global order a rank serves, as functions of the batch number, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class BatchSlots:
    """Offsets of a global batch (positions counted from its start), sorted by stream, then by offset.

    Offset p belongs to the stream whose first offset is p % n_streams; it is that stream's number p // n_streams.

    Attributes:
        n_streams: Number of streams of the order.
        first: int64[n_streams], first offset of each stream; beyond the batch if the stream has none.
        starts: int64[n_streams + 1], slot at which each stream's offsets begin.
    """

    n_streams: int
    first: NDArray[np.int64]
    starts: NDArray[np.int64]

    def number(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of offsets, int64[n]."""
        if self.n_streams == 1:
            return places
        by_place = np.empty(self.n_streams, np.int64)
        by_place[self.first] = self.starts[:-1]
        rounds, first = np.divmod(places, self.n_streams)
        return by_place[first] + rounds

    def take(self, start: int, stop: int) -> RankOffsets:
        """Return the offsets in slots [start, stop), ascending; start < stop."""
        begin = int(np.searchsorted(self.starts, start, side="right")) - 1
        end = int(np.searchsorted(self.starts, stop, side="left"))
        lo = np.maximum(start - self.starts[begin:end], 0)
        hi = np.minimum(stop, self.starts[begin + 1 : end + 1]) - self.starts[begin:end]
        filled = lo < hi
        return _taken(self.first[begin:end][filled], (lo[filled], hi[filled]), self.n_streams)


def stream_slots(start: int, n: int, n_streams: int) -> BatchSlots:
    """Return the slots of a global batch.

    Args:
        start: First position of the batch.
        n: Number of positions.
        n_streams: Number of streams of the order.
    """
    first = (np.arange(n_streams, dtype=np.int64) - start % n_streams) % n_streams
    rounds, longer = divmod(n, n_streams)
    starts = np.zeros(n_streams + 1, np.int64)
    np.cumsum(rounds + (first < longer), out=starts[1:])
    return BatchSlots(n_streams, first, starts)


@dataclass(frozen=True, slots=True, eq=False)
class _Rounds:
    """Rows [start, stop) of the offsets taken: one offset of each of some streams per round, from round `first` on.

    columns: int64[m], first offsets of those streams, ascending.
    """

    start: int
    stop: int
    first: int
    columns: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RankOffsets:
    """Offsets of a global batch that a rank takes, ascending; any range of them is computed at once.

    All streams but the first and the last are taken completely, so there are few parts, whatever the size of the batch:
    the set of streams changes only at a round at which a stream begins or ends.
    """

    n_streams: int
    parts: tuple[_Rounds, ...]

    def offsets(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return rows [start, stop) of the offsets taken, int64[stop - start]."""
        found = []
        for part in self.parts:
            lo, hi = max(start, part.start), min(stop, part.stop)
            if lo >= hi:
                continue
            rows = np.arange(lo - part.start, hi - part.start, dtype=np.int64)
            if len(part.columns) == 1:
                found.append((rows + part.first) * self.n_streams + part.columns[0])
            else:
                rounds, column = np.divmod(rows, len(part.columns))
                found.append((rounds + part.first) * self.n_streams + part.columns[column])
        return np.concatenate(found) if found else np.zeros(0, np.int64)


def _taken(
    first: NDArray[np.int64], rounds: tuple[NDArray[np.int64], NDArray[np.int64]], n_streams: int
) -> RankOffsets:
    """Return the offsets that a rank takes.

    Args:
        first: int64[m], first offset of each stream.
        rounds: First round of each stream that is taken, and the round after the last one.
        n_streams: Number of streams of the order.
    """
    turn = np.argsort(first)
    first, lo, hi = first[turn], rounds[0][turn], rounds[1][turn]
    parts, start = [], 0
    for begin, end in pairwise(np.unique(np.concatenate([lo, hi])).tolist()):
        columns = first[(lo <= begin) & (hi >= end)]
        if len(columns):
            stop = start + (end - begin) * len(columns)
            parts.append(_Rounds(start, stop, begin, columns))
            start = stop
    return RankOffsets(n_streams, tuple(parts))


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Batches of one rank from an offset to the end of an epoch. It stores nothing per batch.

    A global batch is world_size * batch_size consecutive positions; position p belongs to stream p % n_streams. The
    positions of a global batch are sorted by stream, then by position. Rank r takes slots [r * batch_size, (r + 1) *
    batch_size) of this list, and serves them in order of position. Each rank therefore has its own streams, or several
    ranks share a stream. If n_streams does not divide the global batch, the streams of a rank would change from batch
    to batch; then rank r takes the r-th run of batch_size positions, from all streams.

    Every rank has the same number of batches. The positions after the last full global batch, counted from the offset,
    are dropped with drop_last. Otherwise they form one more global batch, sorted in the same way and divided evenly
    (shares differ by at most one), or, with fills_first, so that the first ranks have full shares. A rank without a
    share serves the record at the start of its first stream as padding, which is not part of the global sequence.

    Attributes:
        offset: Number of records of the epoch that have already been served.
        world_size: Number of ranks.
        rank: Number of this rank, 0 <= rank < world_size.
        batch_size: Records per batch of one rank.
        drop_last: Whether the positions after the last full global batch are dropped.
        n_records: Number of records of the epoch.
        n_streams: Number of streams of the order.
        fills_first: Whether the first ranks take the remaining positions, each as many as the longest even share. A
            caller that pads all shares to this size by repeating records then has the repeated records only after the
            last rank's own.
    """

    offset: int
    world_size: int
    rank: int
    batch_size: int
    drop_last: bool
    n_records: int
    n_streams: int = 1
    fills_first: bool = False

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError naming the value that is out of range."""
        if self.world_size < 1 or self.batch_size < 1:
            raise ValueError(
                f"world_size and batch_size must be 1 or more, got {self.world_size} and {self.batch_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")
        if not 0 <= self.offset <= self.n_records:
            raise ValueError(f"offset must be in [0, {self.n_records}], got {self.offset}")
        if self.n_streams < 1:
            raise ValueError(f"n_streams must be 1 or more, got {self.n_streams}")

    @property
    def global_batch(self) -> int:
        """Number of records of a full global batch."""
        return self.world_size * self.batch_size

    @property
    def n_full(self) -> int:
        """Number of full global batches."""
        return (self.n_records - self.offset) // self.global_batch

    @property
    def n_left(self) -> int:
        """Number of records that are served after the last full global batch (0 with drop_last)."""
        return 0 if self.drop_last else (self.n_records - self.offset) % self.global_batch

    @property
    def n_batches(self) -> int:
        """Number of batches of this rank, the same for all ranks."""
        return self.n_full + (self.n_left > 0)

    @property
    def n_padding(self) -> int:
        """Number of padding records of this rank: 0, or 1 in its last batch."""
        start, stop = self._last_share
        return int(self.n_left > 0 and start == stop)

    @property
    def n_served(self) -> int:
        """Number of records in all batches of this rank, including padding."""
        return self.n_full * self.batch_size + self._n_last

    @property
    def ignores_streams(self) -> bool:
        """Whether ranks take runs of positions from all streams; several ranks then read the same blocks."""
        return self.world_size > 1 and self.global_batch % self.n_streams != 0

    @property
    def streams(self) -> range:
        """Streams that this rank reads in full global batches: a range of neighbours."""
        if self.global_batch % self.n_streams:
            return range(self.n_streams)
        length = self.global_batch // self.n_streams  # records of a stream in a global batch
        start = self.rank * self.batch_size
        return range(start // length, (start + self.batch_size - 1) // length + 1)

    def positions(self, i: int) -> NDArray[np.int64]:
        """Return the positions in the epoch of batch i, in served order, which is ascending.

        Returns:
            int64[n], 1 <= n <= batch_size.

        Raises:
            IndexError: There is no such batch.
        """
        if not 0 <= i < self.n_batches:
            raise IndexError(f"there is no batch {i}: the rank has {self.n_batches} batches")
        start = i * self.batch_size
        return self.positions_between(start, min(start + self.batch_size, self.n_served))

    def positions_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the positions in the epoch of rows [start, stop) of this rank's concatenated batches, in served order.

        Returns:
            int64[stop - start], ascending except for padding at the end.

        Raises:
            IndexError: The rows do not exist.
        """
        if not 0 <= start <= stop <= self.n_served:
            raise IndexError(f"rows [{start}, {stop}) are not within the rank's {self.n_served} rows")
        full_stop = self.n_full * self.batch_size
        if start == stop:
            return np.zeros(0, np.int64)
        found = self._full_positions(start, min(stop, full_stop)) if start < full_stop else np.zeros(0, np.int64)
        if stop > full_stop:
            last = self._last_positions(max(start - full_stop, 0), stop - full_stop)
            found = np.concatenate([found, last]) if len(found) else last
        return found

    def range_or_positions(self, start: int, stop: int) -> range | NDArray[np.int64]:
        """Return positions_between(), as a range if possible, which takes no memory however many rows there are."""
        if self.world_size == 1 and 0 <= start <= stop <= self.n_served:
            return range(self.offset + start, self.offset + stop)
        run = self.range_between(start, stop)
        return self.positions_between(start, stop) if run is None else run

    def range_between(self, start: int, stop: int) -> range | None:
        """Return positions_between() as a range if the rows follow one another in one stream; else None.

        None also stands for no rows. With several ranks, only rows of full global batches qualify: a rank's rows of the
        last global batch may lie in any streams.
        """
        if not 0 <= start < stop <= self.n_served or len(self.streams) > 1:
            return None
        if self.world_size == 1:
            return range(self.offset + start, self.offset + stop)
        if stop > self.n_full * self.batch_size:
            return None
        first, last = (int(self.positions_between(row, row + 1)[0]) for row in (start, stop - 1))
        # Ascending positions of one stream differ by at least n_streams.
        return range(first, last + 1, self.n_streams) if last - first == (stop - 1 - start) * self.n_streams else None

    def owns(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether this rank serves positions, except as padding.

        Args:
            positions: int64[n], positions in the epoch from the offset on.

        Returns:
            bool[n].
        """
        left_start = self._left_start
        owned = np.zeros(len(positions), np.bool_)
        if self.n_full:
            places = (positions - self.offset) % self.global_batch
            slots = self._full_slots().number(places)
            first = self.rank * self.batch_size
            owned = (first <= slots) & (slots < first + self.batch_size)
            owned &= (positions >= self.offset) & (positions < left_start)
        if self.n_left:
            start, stop = self._last_share
            slots = self._last_slots().number(positions - left_start)
            owned |= (start <= slots) & (slots < stop) & (positions >= left_start)
        return owned

    def offset_after(self, n_batches: int) -> int:
        """Return the epoch's offset after every rank has served n_batches of this plan; a resumed run starts there.

        Raises:
            ValueError: The plan has fewer batches.
        """
        if not 0 <= n_batches <= self.n_batches:
            raise ValueError(f"n_batches is {n_batches}, but the rank has {self.n_batches} batches")
        return min(self.offset + n_batches * self.global_batch, self.n_records)

    @property
    def _left_start(self) -> int:
        """Position after the last full global batch."""
        return self.offset + self.n_full * self.global_batch

    @property
    def _last_share(self) -> tuple[int, int]:
        """Slots [start, stop) of this rank in the last, incomplete global batch; empty if the rank pads."""
        if self.fills_first:
            share = -(-self.n_left // self.world_size)
            return min(self.rank * share, self.n_left), min((self.rank + 1) * share, self.n_left)
        share, longer = divmod(self.n_left, self.world_size)
        start = self.rank * share + min(self.rank, longer)
        return start, start + share + (self.rank < longer)

    @property
    def _n_last(self) -> int:
        """Number of records of the last, incomplete batch, if there is one."""
        start, stop = self._last_share
        return stop - start if stop > start else self.n_padding

    def _full_slots(self) -> BatchSlots:
        return self._slots(self.offset, self.global_batch)

    def _last_slots(self) -> BatchSlots:
        return self._slots(self._left_start, self.n_left)

    def _slots(self, start: int, n: int) -> BatchSlots:
        # If streams are ignored, all positions are one stream.
        return stream_slots(start, n, 1 if self.global_batch % self.n_streams else self.n_streams)

    def _full_positions(self, start: int, stop: int) -> NDArray[np.int64]:
        size, step = self.batch_size, self.global_batch
        if self.world_size == 1:
            return np.arange(self.offset + start, self.offset + stop, dtype=np.int64)
        first = self.rank * size
        taken = self._full_slots().take(first, first + size)
        begin, end = -(-start // size), stop // size  # whole batches [begin, end)
        if begin > end:  # the rows lie inside one batch
            return taken.offsets(start % size, stop - end * size) + (self.offset + end * step)
        parts = []
        if start < begin * size:
            parts.append(taken.offsets(start % size, size) + (self.offset + (begin - 1) * step))
        if begin < end:
            batches = np.arange(begin, end, dtype=np.int64) * step + self.offset
            parts.append((batches[:, None] + taken.offsets(0, size)).ravel())
        if stop > end * size:
            parts.append(taken.offsets(0, stop - end * size) + (self.offset + end * step))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _last_positions(self, start: int, stop: int) -> NDArray[np.int64]:
        if self.n_padding:
            stream = self.streams[0]
            return np.full(1, stream if stream < self.n_records else 0, np.int64)[start:stop]
        return self._last_slots().take(*self._last_share).offsets(start, stop) + self._left_start
