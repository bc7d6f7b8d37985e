"""The queue of a sampler's batches: the consumer's thread adds them and the planner reads them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tiercache.load.corrupt import replace_corrupt
from tiercache.load.prefetch import ArrayPiece, is_in_memory
from tiercache.order.explicit import RecordLocator, count_fitting, explicit_window, whole_window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.load.corrupt import CorruptionMap, RecordLocation
    from tiercache.load.prefetch import AnyPiece
    from tiercache.load.source import Source
    from tiercache.order import Window
    from tiercache.order.explicit import ExplicitWindow, RecordLocations


@dataclass(frozen=True, slots=True, eq=False)
class SamplerBatch:
    """A batch of record numbers that a sampler returned.

    Attributes:
        numbers: int64[n], n >= 1, record numbers in stored order.
        first_row: Number of the epoch's records before this batch.
        snapshot: State of the sampler after this batch.
    """

    numbers: NDArray[np.int64]
    first_row: int
    snapshot: Any


class SamplerQueue:
    """A rank's share of an epoch (`EpochShare`) whose batches a sampler supplies.

    Batches are numbered from 0. The consumer's thread calls `add`, `end` and `drop_oldest`; any thread may call the
    rest. Every method holds the lock for a moment, and pieces() waits on its condition for more batches.

    Args:
        source: Source that is read.
        locator: Locator of the source's records.
        window_bytes: Raw bytes of the blocks that are read at a time, not counting mapped shards. None: no limit.
        epoch: Number of the epoch.
        first_row: Row of the epoch with which the first batch begins.
        corruption: Corrupt records that are replaced. None: corrupt data is an error.

    Attributes:
        seed: Seed of the random values of a record.
        batch_size: Records of the longest batch so far.
        n_handed_out, last: Number of batches that were handed out, and the last of them.
    """

    padded = 0

    def __init__(
        self,
        source: Source,
        locator: RecordLocator,
        window_bytes: int | None,
        *,
        epoch: int,
        first_row: int = 0,
        corruption: CorruptionMap | None = None,
    ) -> None:
        self.epoch = epoch
        self.seed = 0
        self.batch_size = 1
        self._source = source
        self._locator = locator
        self._window_bytes = window_bytes
        self._corruption = corruption
        self._first_row = first_row
        self.last: SamplerBatch | None = None
        # The lock is taken directly: entering the condition is Python code, in which Ctrl-C could leave the lock held.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._kept: deque[SamplerBatch] = deque()
        self.n_handed_out = self._n_plannable = self._n_planned = self._n_closed = 0
        self._ended = False
        self._error: Exception | None = None

    @property
    def n_records(self) -> int:
        """Number of records of the data set, or of the longest batch, which may repeat records."""
        return max(self._locator.n_records, self.batch_size)

    @property
    def n_batches(self) -> int:
        """Number of batches that were added so far."""
        with self._lock:
            return self.n_handed_out + len(self._kept)

    @property
    def n_plannable(self) -> int:
        """Number of batches that may be planned."""
        with self._lock:
            return self._n_plannable

    def add(self, drawn: SamplerBatch) -> None:
        """Append a batch. It is planned only after make_plannable() or end()."""
        with self._lock:
            self._kept.append(drawn)
            self.batch_size = max(self.batch_size, len(drawn.numbers))

    def make_plannable(self) -> None:
        """Let the planner read the batches that were added."""
        with self._lock:
            self._n_plannable = self.n_handed_out + len(self._kept)
            self._changed.notify_all()

    def end(self, error: Exception | None) -> None:
        """Note that no batch follows. error: the sampler's error, which pieces() raises after all earlier batches."""
        with self._lock:
            self._ended, self._error = True, error
            self._n_plannable = self.n_handed_out + len(self._kept)
            self._changed.notify_all()

    def drop_oldest(self) -> None:
        """Drop the oldest batch, which was handed out."""
        with self._lock:
            # No call in between, because Ctrl-C is raised at calls.
            self.last = self._kept[0]
            del self._kept[0]
            self.n_handed_out += 1

    def close(self) -> None:
        """Raise CancelledError in threads that wait in pieces(). Both methods may be called again."""
        with self._lock:
            self._n_closed += 1
            self._changed.notify_all()

    def pieces(self, n_batches: int) -> Iterator[AnyPiece]:
        """Yield the pieces after n_batches: of all batches in the queue, then of those that are added. Reads footers.

        Raises:
            CancelledError: close() was called.
            Exception: The error that ended the sampler, after all batches before it.
        """
        with self._lock:
            n_closed = self._n_closed
            # A pipeline that begins within the epoch begins after all batches that were handed out.
            first_row = self._first_row if self.last is None else self.last.first_row + len(self.last.numbers)
        found = self._pieces(n_batches, n_closed)
        return found if self._corruption is None else replace_corrupt(found, self._corruption, _Walk(self, first_row))

    def positions(self, batch: int) -> NDArray[np.int64]:
        """Return the positions in the epoch of the records of a batch in the queue, int64[n]."""
        with self._lock:
            drawn = self._kept[batch - self.n_handed_out]
        return drawn.first_row + np.arange(len(drawn.numbers), dtype=np.int64)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (shard, block, row in the block) of a position in a batch in the queue."""
        with self._lock:
            kept = list(self._kept)
        for drawn in kept:
            if drawn.first_row <= position < drawn.first_row + len(drawn.numbers):
                return self._place_of(drawn.numbers[position - drawn.first_row])
        raise ValueError(f"position {position} was handed out, or was not drawn yet")

    def before(self, first_row: int) -> Iterator[RecordLocation]:
        """Yield the records before a row of the epoch, latest first, back to the batch that was handed out last."""
        for drawn in reversed(self._drawn()):
            for number in drawn.numbers[: max(first_row - drawn.first_row, 0)][::-1]:
                yield self._place_of(number)

    def after(self, first_row: int) -> Iterator[RecordLocation]:
        """Yield the records from a row of the epoch on, as far as they are in the queue."""
        for drawn in self._drawn():
            for number in drawn.numbers[max(first_row - drawn.first_row, 0) :]:
                yield self._place_of(number)

    def _drawn(self) -> list[SamplerBatch]:
        with self._lock:
            return [*([] if self.last is None else [self.last]), *self._kept]

    def _place_of(self, number: np.int64) -> RecordLocation:
        found = self._locator.find(np.array([number], np.int64))
        at = int(found.at[0])
        return int(found.shards[at]), int(found.blocks[at]), int(found.row[0])

    def shards_ahead(self, _n_batches: int, _n_rows: int, n_bytes: int) -> list[int]:
        """Return the shards of the batches that are not planned yet, in the order of need, at most n_bytes (stored)."""
        with self._lock:
            waiting = list(islice(self._kept, max(self._n_planned - self.n_handed_out, 0), None))
        if not waiting:
            return []
        found, first = np.unique(self._locator.shards(np.concatenate([w.numbers for w in waiting])), return_index=True)
        shards = found[np.argsort(first)]
        near: list[int] = shards[np.cumsum(self._source.shard_bytes[shards]) <= n_bytes].tolist()
        return near

    def _pieces(self, at: int, n_closed: int) -> Iterator[ArrayPiece]:
        whole, ask_at = None, at
        while (batches := self._wait(at, n_closed)) is not None:
            at += len(batches)
            sizes = np.array([len(drawn.numbers) for drawn in batches], np.uint32)
            numbers = np.concatenate([drawn.numbers for drawn in batches])
            places = self._locator.find(numbers)
            if whole is None and at >= ask_at:
                whole, ask_at = self._whole(places), 2 * at  # this check takes 0.3 ms per shard
                places = self._locator.find(numbers)  # the locator may know more blocks now, and number them otherwise
            if whole is not None:
                yield _piece(whole, places.at.astype(np.uint32), places.row, sizes)
                continue
            shards = np.unique(places.shards[places.touched()]).tolist()
            near = [shard for shard in shards if self._source.is_mapped(shard)]
            start, n = 0, len(places.row)
            while start < n:
                stop = start + count_fitting(places.slice(start, n), self._window_bytes, near)
                window = explicit_window(start, places.slice(start, stop))
                yield _piece(window, window.block, window.row, sizes)
                start, sizes = stop, sizes[:0]

    def _whole(self, places: RecordLocations) -> ExplicitWindow | None:
        """Return one window of all blocks, for these and all later records, if every shard is mapped.

        A window of listed rows costs 1.5 ms and more, and that for each batch if a sampler is asked batch by batch. In
        a window that is kept to the end of the epoch a record is found in 0.1 us. But its pages are not prefetched
        piece by piece. So all of them must be in memory, or these rows must be in most of the blocks, which are then
        read together.
        """
        source = self._source
        shards = np.flatnonzero(source.shard_records).tolist()
        if not all(map(source.is_mapped, shards)):
            return None
        every = self._locator.find_all()
        if 2 * len(places.touched()) < len(every.shards):
            blocks = (every.blocks[every.shards == shard].tolist() for shard in shards)
            if not all(is_in_memory(source.load(*pair)) for pair in zip(shards, blocks, strict=True)):
                return None
        return whole_window(every)

    def _wait(self, at: int, n_closed: int) -> list[SamplerBatch] | None:
        """Return all batches from number `at` on, at least one; None at the end."""
        with self._lock:
            self._changed.wait_for(lambda: self._n_closed != n_closed or self._ended or at < self._n_plannable)
            if self._n_closed != n_closed:
                raise CancelledError
            found = list(islice(self._kept, at - self.n_handed_out, self._n_plannable - self.n_handed_out))
            if found:
                self._n_planned = at + len(found)
                return found
            if self._error is not None:
                raise self._error
            return None


def _piece(
    window: ExplicitWindow, block: NDArray[np.uint32], row: NDArray[np.uint32], batch_rows: NDArray[np.uint32]
) -> ArrayPiece:
    wanted = np.ones(len(window.blocks), np.bool_)
    return ArrayPiece((cast("Window", window),), (wanted,), block, row, batch_rows)


@dataclass(frozen=True, slots=True)
class _Walk:
    """A RecordWalk through the batches of a sampler. first_row: row of the epoch with which the pieces begin."""

    feed: SamplerQueue
    first_row: int

    def before(self, n_rows: int) -> Iterator[RecordLocation]:
        """See SamplerQueue.before."""
        return self.feed.before(self.first_row + n_rows)

    def after(self, n_rows: int) -> Iterator[RecordLocation]:
        """See SamplerQueue.after."""
        return self.feed.after(self.first_row + n_rows)
