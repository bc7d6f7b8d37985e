"""Which positions of the global order a rank serves, as functions of the batch number, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def _stream_starts(start: int, n: int, n_streams: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first offset of each stream in a global batch of n positions from start on, and its first slot.

    Offsets count positions from the start of the batch. Sorted by stream, then by offset, they occupy the slots 0 to n.
    """
    first = (np.arange(n_streams, dtype=np.int64) - start) % n_streams
    starts = np.zeros(n_streams + 1, np.int64)
    np.cumsum(n // n_streams + (first < n % n_streams), out=starts[1:])
    return first, starts


@lru_cache(maxsize=16)  # the ranks of a process, each with its full batches and its last one
def _offsets_in_slots(start: int, n: int, n_streams: int, slots: tuple[int, int]) -> NDArray[np.int64]:
    """Return the offsets in slots [low, high) of a global batch (see _stream_starts), ascending and read-only."""
    first, starts = _stream_starts(start, n, n_streams)
    low, high = np.clip(slots[0], starts[:-1], starts[1:]), np.clip(slots[1], starts[:-1], starts[1:])
    counts = high - low
    slot = np.arange(slots[0], slots[0] + int(counts.sum()), dtype=np.int64)
    offsets = np.sort(np.repeat(first, counts) + (slot - np.repeat(starts[:-1], counts)) * n_streams)
    offsets.flags.writeable = False
    return offsets


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
    (shares differ by at most one), or, with fills_first, so that the first ranks have full shares: a caller that pads
    all shares to this size by repeating records then has the repeated records only after the last rank's own. A rank
    without a share serves the record at the start of its first stream as padding, which is not part of the global
    sequence.
    """

    offset: int  # records of the epoch that have already been served
    world_size: int
    rank: int
    batch_size: int  # records per batch of one rank
    drop_last: bool
    n_records: int  # of the epoch
    n_streams: int = 1
    fills_first: bool = False

    def __post_init__(self) -> None:
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
        return self.world_size * self.batch_size

    @property
    def n_full(self) -> int:
        return (self.n_records - self.offset) // self.global_batch

    @property
    def n_left(self) -> int:
        return 0 if self.drop_last else (self.n_records - self.offset) % self.global_batch

    @property
    def n_batches(self) -> int:
        return self.n_full + (self.n_left > 0)

    @property
    def n_padding(self) -> int:
        """Number of padding records of this rank: 0, or 1 in its last batch."""
        start, stop = self._last_share
        return int(self.n_left > 0 and start == stop)

    @property
    def n_served(self) -> int:
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
        if not 0 <= i < self.n_batches:
            raise IndexError(f"there is no batch {i}: the rank has {self.n_batches} batches")
        start = i * self.batch_size
        return self.positions_between(start, min(start + self.batch_size, self.n_served))

    def positions_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the positions of rows [start, stop) of this rank's concatenated batches. Raises IndexError."""
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
        """Return whether this rank serves positions, except as padding."""
        left_start = self._left_start
        owned = np.zeros(len(positions), np.bool_)
        if self.n_full:
            places = (positions - self.offset) % self.global_batch
            slots = self._slots(self.offset, self.global_batch, places)
            first = self.rank * self.batch_size
            owned = (first <= slots) & (slots < first + self.batch_size)
            owned &= (positions >= self.offset) & (positions < left_start)
        if self.n_left:
            start, stop = self._last_share
            slots = self._slots(left_start, self.n_left, positions - left_start)
            owned |= (start <= slots) & (slots < stop) & (positions >= left_start)
        return owned

    def offset_after(self, n_batches: int) -> int:
        """Return the epoch's offset after every rank has served n_batches; a resumed run starts there."""
        if not 0 <= n_batches <= self.n_batches:
            raise ValueError(f"n_batches is {n_batches}, but the rank has {self.n_batches} batches")
        return min(self.offset + n_batches * self.global_batch, self.n_records)

    @property
    def _left_start(self) -> int:
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
        start, stop = self._last_share
        return stop - start if stop > start else self.n_padding

    @property
    def _slot_streams(self) -> int:
        """Number of streams by which slots are sorted: all positions are one stream if streams are ignored."""
        return 1 if self.global_batch % self.n_streams else self.n_streams

    def _slots(self, start: int, n: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of offsets in the global batch of n positions from start on."""
        _, starts = _stream_starts(start, n, self._slot_streams)
        return starts[(start + offsets) % self._slot_streams] + offsets // self._slot_streams

    def _offsets(self, start: int, n: int, slots: tuple[int, int]) -> NDArray[np.int64]:
        return _offsets_in_slots(start % self._slot_streams, n, self._slot_streams, slots)

    def _full_positions(self, start: int, stop: int) -> NDArray[np.int64]:
        size, step = self.batch_size, self.global_batch
        if self.world_size == 1:
            return np.arange(self.offset + start, self.offset + stop, dtype=np.int64)
        first = self.rank * size
        taken = self._offsets(self.offset, step, (first, first + size))
        begin, end = -(-start // size), stop // size  # whole batches [begin, end)
        if begin > end:  # the rows lie inside one batch
            return taken[start % size : stop - end * size] + (self.offset + end * step)
        parts = []
        if start < begin * size:
            parts.append(taken[start % size :] + (self.offset + (begin - 1) * step))
        if begin < end:
            batches = np.arange(begin, end, dtype=np.int64) * step + self.offset
            parts.append((batches[:, None] + taken).ravel())
        if stop > end * size:
            parts.append(taken[: stop - end * size] + (self.offset + end * step))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _last_positions(self, start: int, stop: int) -> NDArray[np.int64]:
        if self.n_padding:
            stream = self.streams[0]
            return np.full(1, stream if stream < self.n_records else 0, np.int64)[start:stop]
        return self._offsets(self._left_start, self.n_left, self._last_share)[start:stop] + self._left_start
