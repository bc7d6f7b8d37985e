"""A rank's share of an epoch: its order, the pieces of rows in which it is served, and the epoch after it.

Shares and pieces are pure functions. NextEpoch holds what the planner prepares of the next epoch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache.errors import TierCacheError
from tiercache.load.corrupt import CorruptionMap, replace_corrupt
from tiercache.load.prefetch import WindowLoad, blocks_by_shard, loading_pool, shards_of
from tiercache.load.reading_plan import ReadingPlanPublisher
from tiercache.order import DatasetSizes, EpochOrder, OrderOptions, RankPlan, RowRun, Window
from tiercache.order.explicit import ExplicitOrder, ExplicitWindow
from tiercache.order.mixture import MixtureOrder
from tiercache.order.window import MOST_ROWS, allocate_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tiercache.data.records import Records
    from tiercache.load.corrupt import RecordLocation
    from tiercache.load.prefetch import AnyPiece, LoadThreads, MemoryPressure
    from tiercache.load.ranks import Rank
    from tiercache.load.state import RunState
    from tiercache.order import AnyWindow, Order, Section
    from tiercache.order.explicit import ServedOrder


# The records that an order orders, or their corrupt records if these are replaced.
Ordered: TypeAlias = "Records | CorruptionMap"
# Function that returns a rank's share of the epoch of a state.
MakeShare: TypeAlias = "Callable[[RunState], OrderShare]"
ClaimedEpoch: TypeAlias = "tuple[OrderShare, Future[EpochStart | None] | None, ReadingPlanPublisher]"

# Rising numbers. A single rank is served all positions, so a range is used for them: as arrays they took a third of the
# planner's time.
_Rising: TypeAlias = range | NDArray[np.int64]

# A window is served in pieces. The first piece is small, and each piece has four times the rows of the one before:
# computing the rows of a window of 10^8 records takes seconds (80 ns each), and the first batch must not wait for that.
# A piece is computed in about the time in which the fastest consumers take the piece before.
FIRST_PIECE_ROWS = 1 << 15
PIECE_ROWS = MOST_ROWS
# The rows of a run are not computed before they are gathered, so its pieces may be larger. But each piece takes 0.4 ms
# of the planner's Python while the consumer waits, and the cache and the next epoch learn only per piece how far this
# epoch is.
RUN_ROWS = 4 * PIECE_ROWS
# A call for a run of rows takes 2.6 us, and a row takes 14 to 80 ns. So runs that are further apart than this number of
# rows are computed one by one. With 4 ranks on one stream a row then takes 25 ns (batches of 256), and 66 ns if all
# rows between are computed as well (batches of 8).
_CALL_ROWS = 128
# A rank that takes fewer rows of a section than this number times its blocks leaves one block in seven (e^-2)
# untouched, so it pays to find the blocks that are needed. Looking through more positions than the second number would
# take more than 10 ms.
_SPARSE_ROWS, _SPARSE_POSITIONS = 2, 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _SectionRows:
    """Rows of a piece that lie in one section: their indices in the piece (None: all rows) and their positions.

    at: positions in the stream, rising; first_blocks: number in the piece of each window's first block.
    """

    section: Section
    places: NDArray[np.int64] | None
    at: _Rising
    first_blocks: tuple[int, ...]

    @property
    def run(self) -> RowRun | None:
        """The rows as a run of the piece's first window; None if they are not one."""
        if self.places is not None or not isinstance(self.at, range) or not isinstance(self.section, Window):
            return None
        first = self.at.start - self.section.start
        return self.section.run(first, first + len(self.at)) if self.first_blocks == (0,) else None

    def find(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return block (numbered as in the piece) and row of each row. There must be at least one row."""
        block, row = _rows_at(self.section, self.at)
        counts = [len(window.blocks) for window in self.section.windows]
        first = self.first_blocks[0]
        # numbered as in the section, plus a constant
        if self.first_blocks == tuple(accumulate(counts[:-1], initial=first)):
            if first:
                np.add(block, np.uint32(first), out=block)
            return block, row
        ranges = [np.arange(at, at + n, dtype=np.uint32) for at, n in zip(self.first_blocks, counts, strict=True)]
        return np.concatenate(ranges)[block], row


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows in served order during which the windows of the rank's streams do not change. Immutable.

    Attributes:
        windows: Windows of one or several streams, each once (streams of a mixture share the windows of a small part).
            A window is in all pieces from its first row to its last, as the same object, even if a piece in between has
            no row of it.
        n_rows: Number of rows.
        needed: bool[n_blocks] for each window: the blocks that this piece or later pieces of the window need.
    """

    windows: tuple[AnyWindow, ...]
    n_rows: int
    needed: tuple[NDArray[np.bool_], ...]
    _rows_of_sections: tuple[_SectionRows, ...]
    _found: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] = field(default_factory=list, init=False, repr=False)

    @property
    def run(self) -> RowRun | None:
        """The rows as a run of the first window, which costs nothing to compute; None if they are not a run."""
        return self._rows_of_sections[0].run if len(self._rows_of_sections) == 1 else None

    def rows(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the locations of the rows, computed at the first call and kept. The caller must not write to them.

        Returns:
            block: uint32[n_rows], numbered through the blocks of all windows; row: uint32[n_rows], the row inside its
            block.
        """
        if not self._found:
            self._found.append(self._find())
        return self._found[0]

    def _find(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        if len(self._rows_of_sections) == 1 and self._rows_of_sections[0].places is None:
            return self._rows_of_sections[0].find()
        block, row = allocate_rows(self.n_rows), allocate_rows(self.n_rows)
        for rows in self._rows_of_sections:
            block[rows.places], row[rows.places] = rows.find()
        return block, row


@dataclass(frozen=True, slots=True)
class PieceSizes:
    """Maximum rows of the first piece, of later pieces, and of later pieces whose rows are a run."""

    first: int = FIRST_PIECE_ROWS
    most: int = PIECE_ROWS
    run: int = PIECE_ROWS


ARRAY_PIECES, RUN_PIECES = PieceSizes(), PieceSizes(run=RUN_ROWS)


def cut_pieces(order: Order, rank_plan: RankPlan, sizes: PieceSizes = ARRAY_PIECES) -> Iterator[Piece]:
    """Yield what the rank is served from its offset to the end of the epoch, in order, padding last.

    A piece ends where a window of one of its streams ends, or at its maximum size, independent of the batches. The
    maximum is four times as large for each next piece. Making a piece may read footers (`Order.section_at`); their
    errors pass through.
    """
    cutter = _Cutter(order, rank_plan)
    full_stop = rank_plan.n_full * rank_plan.batch_size
    row, n_rows = 0, sizes.first
    while row < rank_plan.n_served:
        limit = full_stop if row < full_stop else rank_plan.n_served
        stop = min(row + n_rows, limit)
        if n_rows > sizes.most and not cutter.is_run(rank_plan.range_between(row, stop)):
            stop = min(row + sizes.most, limit)
        if row == full_stop and rank_plan.n_padding:
            # Padding repeats earlier records, so the blocks that are held say nothing about the blocks that it needs.
            cutter = _Cutter(order, rank_plan)
        yield from cutter.cut(rank_plan.range_or_positions(row, stop), is_last=stop == rank_plan.n_served)
        row, n_rows = stop, min(4 * n_rows, max(sizes.most, sizes.run))


@dataclass(slots=True)
class _StreamCursor:
    """The rows that a rank takes from one stream: indices among all rows, and positions in the stream; both rise."""

    stream: int
    places: _Rising
    at: _Rising
    n_cut: int = 0  # rows that are in pieces already


class _Cutter:
    """Cuts a rank's rows where sections end. It holds each stream's section as long as it is in use."""

    def __init__(self, order: Order, rank_plan: RankPlan) -> None:
        self._order = order
        self._rank_plan = rank_plan
        self._held: dict[int, tuple[Section, tuple[NDArray[np.bool_], ...]]] = {}

    def is_run(self, positions: range | None) -> bool:
        """Whether the rows are runs of windows. positions: consecutive positions of one stream; None: they are not."""
        if positions is None:
            return False
        (cursor,) = _cursors(positions, self._order.n_streams)
        return isinstance(self._order.section_at(cursor.stream, int(cursor.at[0])), Window)

    def cut(self, positions: _Rising, is_last: bool) -> Iterator[Piece]:
        """Yield the pieces of consecutive rows.

        positions: Position of each row; is_last: whether no rows follow.
        """
        cursors = _cursors(positions, self._order.n_streams)
        start, n = 0, len(positions)
        last_position = None if is_last else int(positions[-1])
        self._drop_served(cursors, last_position)
        while start < n:
            stop = n
            # Sorted by their next row, so that a section is not computed before a row of it is in the piece.
            going = [cursor for cursor in cursors if cursor.n_cut < len(cursor.at)]
            for cursor in sorted(going, key=lambda cursor: cursor.places[cursor.n_cut]):
                if cursor.places[cursor.n_cut] < stop:
                    ends_at = self._hold(cursor, is_last)
                    if ends_at < len(cursor.at):
                        stop = min(stop, int(cursor.places[ends_at]))
            yield self._piece(cursors, start, stop)
            start = stop
            self._drop_served(cursors, last_position)

    def _hold(self, cursor: _StreamCursor, is_last: bool) -> int:
        """Hold the section of the stream's next row; return the index of the stream's first row behind the section."""
        position = int(cursor.at[cursor.n_cut])
        held = self._held.get(cursor.stream)
        section = held[0] if held else None
        if section is None or not section.start <= position < section.stop:
            section = self._order.section_at(cursor.stream, position)
            rest = cursor.at[cursor.n_cut : _n_before(cursor.at, section.stop)] if is_last else None
            self._held[cursor.stream] = section, self._needed_blocks(cursor.stream, section, position, rest)
        return _n_before(cursor.at, section.stop)

    def _piece(self, cursors: list[_StreamCursor], start: int, stop: int) -> Piece:
        """Return the piece of the rows [start, stop) and advance the streams."""
        rows_of_sections: list[_SectionRows] = []
        needed: dict[AnyWindow, NDArray[np.bool_]] = {}  # streams that share a window need the same blocks of it
        first_blocks: dict[AnyWindow, int] = {}
        n_blocks = 0
        by_stream = {cursor.stream: cursor for cursor in cursors}
        for stream in sorted(self._held):
            section, of_windows = self._held[stream]
            for window, blocks in zip(section.windows, of_windows, strict=True):
                if window not in needed:
                    needed[window], first_blocks[window] = blocks, n_blocks
                    n_blocks += len(blocks)
            cursor = by_stream.get(stream)
            if cursor is None or cursor.n_cut == len(cursor.at) or cursor.places[cursor.n_cut] >= stop:
                continue
            end = _n_before(cursor.places, stop)
            at, all_are = cursor.at[cursor.n_cut : end], end - cursor.n_cut == stop - start
            places = None if all_are else np.asarray(cursor.places[cursor.n_cut : end]) - start
            firsts = tuple(first_blocks[window] for window in section.windows)
            rows_of_sections.append(_SectionRows(section, places, at, firsts))
            cursor.n_cut = end
        return Piece(tuple(needed), stop - start, tuple(needed.values()), tuple(rows_of_sections))

    def _drop_served(self, cursors: list[_StreamCursor], last_position: int | None) -> None:
        """Drop sections that are served. last_position: of all streams, if other rows follow; None: no rows follow."""
        by_stream = {cursor.stream: cursor for cursor in cursors}
        for stream, (section, _) in list(self._held.items()):
            cursor = by_stream.get(stream)
            if cursor is not None and cursor.n_cut < len(cursor.at):
                goes_on = section.start <= cursor.at[cursor.n_cut] < section.stop
            else:
                end = (section.stop - 1) * self._order.n_streams + stream
                goes_on = last_position is not None and end > last_position
            if not goes_on:
                del self._held[stream]

    def _needed_blocks(
        self, stream: int, section: Section, position: int, rest: _Rising | None
    ) -> tuple[NDArray[np.bool_], ...]:
        """Return the blocks of a section that the rank needs from a position on. rest: its rows there, if known."""
        window = section.windows[0]
        # Otherwise later sections use the same windows and need other blocks of them.
        if not (window is section or _is_covered(window, section)):
            return tuple(np.ones(len(window.blocks), np.bool_) for window in section.windows)
        n_blocks, n_left, rank_plan = len(window.blocks), section.stop - position, self._rank_plan
        sharing = (
            rank_plan.world_size if rank_plan.ignores_streams else max(rank_plan.world_size // self._order.n_streams, 1)
        )
        n_rows = n_left // sharing if rest is None else len(rest)
        if n_rows <= _SPARSE_ROWS * n_blocks and n_left <= _SPARSE_POSITIONS:
            if rest is None:
                rest = np.arange(position, section.stop, dtype=np.int64)
                rest = rest[rank_plan.owns(rest * self._order.n_streams + stream)]
            needed = np.zeros(n_blocks, np.bool_)
            needed[_rows_at(section, rest)[0]] = True
        elif window.key is None and isinstance(window, Window):  # blocks before the position are not needed
            needed = window.first[1:] > position - window.start
        else:
            needed = np.ones(n_blocks, np.bool_)
        return (needed,)


def _is_covered(window: AnyWindow, section: Section) -> bool:
    """Whether a section of an explicit order is the only one that uses its window."""
    return isinstance(window, ExplicitWindow) and len(window) == section.stop - section.start


def _n_before(rising: _Rising, value: int) -> int:
    """Return how many of the rising numbers are smaller than value."""
    if isinstance(rising, range):
        return min(max(value - rising.start, 0), len(rising))
    return int(np.searchsorted(rising, value))


def _cursors(positions: _Rising, n_streams: int) -> list[_StreamCursor]:
    """Group rows at these positions by stream."""
    n = len(positions)
    if n_streams == 1:
        return [_StreamCursor(0, range(n), positions)]
    if isinstance(positions, range) and positions.step == n_streams:
        first, stream = divmod(positions.start, n_streams)
        return [_StreamCursor(stream, range(n), range(first, first + n))]
    if isinstance(positions, range):
        positions = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
    at, streams = np.divmod(positions, n_streams)
    if (streams == streams[0]).all():
        return [_StreamCursor(int(streams[0]), range(n), at)]
    streams = streams.astype(np.uint16)  # sorted in linear time, 10 ns each
    turn = np.argsort(streams, kind="stable")
    ends = np.flatnonzero(np.diff(streams[turn])) + 1
    return [_StreamCursor(int(streams[places[0]]), places, at[places]) for places in np.split(turn, ends)]


def _rows_at(section: Section, at: _Rising) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return block and row of rising positions of a stream; skips large gaps between them."""
    first, n = int(at[0]) - section.start, len(at)
    n_spanned = int(at[-1] - at[0]) + 1
    if isinstance(at, range) or n_spanned == n:
        return section.rows(first, first + n)
    breaks = np.flatnonzero(np.diff(at) != 1) + 1
    if len(breaks) * _CALL_ROWS >= n_spanned - n:
        block, row = section.rows(first, first + n_spanned)
        chosen = at - at[0]
        return block[chosen], row[chosen]
    starts = np.concatenate([[0], breaks])
    lengths = np.diff(np.append(starts, n))
    runs = zip((at[starts] - section.start).tolist(), lengths.tolist(), strict=True)
    rows_of_runs = [section.rows(lo, lo + length) for lo, length in runs]
    return np.concatenate([block for block, _ in rows_of_runs]), np.concatenate([row for _, row in rows_of_runs])


@dataclass(frozen=True, slots=True)
class OrderShare:
    """A rank's batches of one epoch, in order. Immutable; its methods may be called from any thread.

    Attributes:
        order: Order of all ranks' records.
        rank_plan: The batches of this rank, from where the epoch begins for it.
        seed, epoch: The random values of a record follow from them and from the record's position.
        corruption: Corrupt records that are replaced. None: corrupt data is an error.
        sizes: Maximum rows of its pieces.
    """

    order: Order
    rank_plan: RankPlan
    seed: int
    epoch: int
    corruption: CorruptionMap | None = None
    sizes: PieceSizes = ARRAY_PIECES

    def pieces(self, n_batches: int) -> Iterator[AnyPiece]:
        """Yield what is served after n_batches, in order, padding last. Reads footers."""
        rank_plan = replace(self.rank_plan, offset=self.rank_plan.offset_after(n_batches))
        all_pieces = cut_pieces(self.order, rank_plan, self.sizes)
        if self.corruption is None:
            return all_pieces
        return replace_corrupt(all_pieces, self.corruption, RecordWalk(self.order, rank_plan))

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (shard, block, row in the block) of a position of the epoch. Reads footers."""
        return locate(self.order, position)

    def shards_ahead(self, n_batches: int, n_rows: int, n_bytes: int) -> list[int]:
        """Return the shards that are read after n_batches and then n_rows, in reading order. Reads no footers.

        Their stored bytes are about n_bytes, or less near the end of the epoch.
        """
        n_done = min(n_batches + n_rows // self.rank_plan.batch_size, self.rank_plan.n_batches)
        offset, n_streams, streams = self.rank_plan.offset_after(n_done), self.order.n_streams, self.rank_plan.streams
        share_bytes = max(n_bytes // len(streams), 1)
        runs = [
            self.order.shards_ahead(stream, -(-(offset - stream) // n_streams), share_bytes).tolist()
            for stream in streams
            if self.order.stream_records(stream)
        ]
        return interleaved(runs)


def locate(order: Order, position: int) -> RecordLocation:
    """Return (shard, block, row in the block) of a position of an order. Reads footers."""
    stream, at = position % order.n_streams, position // order.n_streams
    section = order.section_at(stream, at)
    blocks, rows = section.rows(at - section.start, at - section.start + 1)
    ends = np.cumsum([len(window.blocks) for window in section.windows])
    number = int(np.searchsorted(ends, blocks[0], side="right"))
    # negative: counted from the window's end
    window, within = section.windows[number], int(blocks[0]) - int(ends[number])
    return int(window.shards[within]), int(window.blocks[within]), int(rows[0])


@dataclass(frozen=True, slots=True)
class RecordWalk:
    """A rank's records one by one, counted in rows from the start of its pieces, which begin at `rank_plan`.

    Locations have the order's row numbers.
    """

    order: Order
    rank_plan: RankPlan

    def before(self, n_rows: int) -> Iterator[RecordLocation]:
        """Yield the records before row n_rows, latest first, back to the start of the epoch."""
        rank_plan = self.rank_plan
        for row in reversed(range(n_rows)):
            yield locate(self.order, int(rank_plan.positions_between(row, row + 1)[0]))
        while rank_plan.offset >= rank_plan.global_batch:
            rank_plan = replace(rank_plan, offset=rank_plan.offset - rank_plan.global_batch)
            yield from (locate(self.order, position) for position in rank_plan.positions(0)[::-1].tolist())

    def after(self, n_rows: int) -> Iterator[RecordLocation]:
        """Yield the record at row n_rows, and those after it."""
        for row in range(n_rows, self.rank_plan.n_served):
            yield locate(self.order, int(self.rank_plan.positions_between(row, row + 1)[0]))


def interleaved(runs: Sequence[Sequence[int]]) -> list[int]:
    """Return the first of each run, then the second of each, and so on; each number once."""
    longest = max(map(len, runs), default=0)
    return list(dict.fromkeys(run[i] for i in range(longest) for run in runs if i < len(run)))


def records_of(ordered: Ordered) -> Records:
    """Return the records that an order orders."""
    return ordered.source if isinstance(ordered, CorruptionMap) else ordered


def make_share(ordered: Ordered, rank: Rank, batch_size: int, fills_first: bool, state: RunState) -> OrderShare:
    """Return the rank's share of the state's epoch. Costs O(shards); reads no data.

    fills_first: see `RankPlan`. Raises ValueError: the
    state's offset is outside the epoch, or this release does not know its order.
    """
    order, corruption = make_order(ordered, state), ordered if isinstance(ordered, CorruptionMap) else None
    is_run = corruption is None and records_of(ordered).selection is None  # otherwise the rows are needed as arrays
    sizes = RUN_PIECES if is_run else ARRAY_PIECES
    rank_plan = RankPlan(
        offset=state.offset,
        world_size=rank.world_size,
        rank=rank.rank,
        batch_size=batch_size,
        drop_last=state.drop_last,
        n_records=order.n_records,
        n_streams=order.n_streams,
        fills_first=fills_first,
    )
    return OrderShare(order, rank_plan, state.seed, state.epoch, corruption, sizes)


def make_order(ordered: Ordered, state: RunState) -> Order:
    """Return the order of the state's epoch."""
    source = records_of(ordered)
    sizes = DatasetSizes(source.shard_records, source.shard_bytes, ordered.block_sizes)
    options = order_options(state)
    if source.mixture is not None:
        return MixtureOrder(sizes, source.mixture, options, state.epoch)
    listed = source.record_order
    if listed is not None and not state.shuffle:
        return explicit_order(ordered, listed, state.window_bytes)
    return EpochOrder(sizes, options, state.epoch)


def explicit_order(ordered: Ordered, numbers: ServedOrder, window_bytes: int | None) -> Order:
    """Return the order that serves these records, counted in stored order. window_bytes: limit of unmapped blocks."""
    source = records_of(ordered)
    sizes = DatasetSizes(source.shard_records, source.shard_bytes, ordered.block_sizes)
    return ExplicitOrder(sizes, numbers, window_bytes, source.storage.is_mapped)


def order_options(state: RunState) -> OrderOptions:
    """Return the state's options of the order. Raises ValueError for values that this release does not know."""
    return OrderOptions(
        seed=state.seed,
        shuffle=state.shuffle,
        group_bytes=state.group_bytes,
        window_bytes=state.window_bytes,
        streams=state.streams,
        placement=state.placement,
    )


def epoch_records(source: Records) -> int:
    """Return the number of records of an epoch, all ranks together."""
    mixture = source.mixture
    if mixture is not None:
        return int(mixture.epoch_records(mixture.part_records(source.shard_records)))
    return int(source.shard_records.sum())


def mixture_values(source: Records) -> dict[str, Any] | None:
    """Return the source's mixture as plain values for a state; None if the parts are not mixed."""
    mixture = source.mixture
    if mixture is None:
        return None
    # The state omits which shards belong to which part: that follows from the parts, and changes with their versions.
    changes = [[position, list(weights)] for position, weights in mixture.schedule]
    return {"weights": changes if len(changes) > 1 else changes[0][1], "stop": mixture.stop}


# Shards per call of prefetch(): some ms if each is looked up in a cache. drop_preparation() waits for at most one call.
_SHARDS_A_STEP = 16


@dataclass(frozen=True, slots=True, eq=False)
class EpochStart:
    """The prepared start of an epoch, for one pipeline.

    pieces: all pieces of the epoch; loading: windows of the first piece, loaded or being loaded.
    """

    pieces: Iterator[AnyPiece]
    loading: tuple[WindowLoad, ...]


def cancel_loads(ready: Future[EpochStart | None]) -> None:
    """Cancel the loads of a prepared start: now, or as soon as it is ready. May be called repeatedly."""
    ready.add_done_callback(_cancel)


def _cancel(ready: Future[EpochStart | None]) -> None:
    epoch_start = ready.result()
    for load in epoch_start.loading if epoch_start is not None else ():
        load.cancel()


class NextEpoch:
    """The epoch after the current one. The planner prepares it, and the engine takes it if the run continues there.

    Args:
        source: Records that both epochs read.
        state: State at the start of the next epoch.
        make_share: Function that returns a rank's share of an epoch. It must not refer to the loader, which would then
            live too long.
        is_expected: Whether this run has gone from one epoch to the next before. If not, no store is read for the next
            epoch.
    """

    def __init__(self, source: Records, state: RunState, make_share: MakeShare, *, is_expected: bool) -> None:
        self._source = source
        self._state = state
        self._make_share = make_share
        self._is_expected = is_expected
        self.publisher = ReadingPlanPublisher(source, state, make_share)
        self._lock = threading.Lock()
        self._ready: Future[EpochStart | None] | None = None  # None: no planner has begun to prepare it
        self._share: OrderShare | None = None
        # Set to stop the loads of the next epoch, so that closing the data set does not wait for them.
        self._unwanted = threading.Event()
        # Held during each step of the preparation. drop_preparation() waits for the current step, so no step begins
        # after the caller closes the cache or the store. Re-entrant, because the garbage collector may call it in a
        # thread that is within a step.
        self._step = threading.RLock()
        self._is_over = False  # taken or forgotten: nothing more is prepared
        self._pid = os.getpid()

    @property
    def share(self) -> OrderShare:
        """The rank's share of the next epoch, planned at the first access; two threads would plan the same share."""
        # Not a cached_property: until Python 3.12 its lock is shared by all instances, and a forked child may inherit
        # it locked.
        if self._share is None:
            self._share = self._make_share(self._state)
        return self._share

    def shards_ahead(self, n_bytes: int) -> list[int]:
        """Return the first shards of the epoch, about n_bytes (stored) of them."""
        return self.share.shards_ahead(0, 0, n_bytes)

    def prepare(self, threads: LoadThreads, pressure: MemoryPressure, ahead_bytes: int) -> None:
        """Prepare the start: plan the epoch, prefetch its first shards, and begin to load its first windows.

        The windows take memory like any next window. Data that is not on this machine is loaded only if epochs are
        known to follow one another: a run of a single epoch would fetch it for nothing.

        ahead_bytes: stored bytes of shards to prefetch.
        """
        with self._lock:
            if self._is_over:
                return
            ready = self._ready = Future()
            publisher = self.publisher
        epoch_start = None
        try:
            # The error is raised when the epoch itself is read.
            with contextlib.suppress(TierCacheError, CancelledError):
                epoch_start = self._begin(threads, pressure, ahead_bytes, publisher)
        finally:
            ready.set_result(epoch_start)

    def take(self, source: Records, state: RunState) -> ClaimedEpoch | None:
        """Return the epoch, once, if the loader continues there: its share, prepared start and publisher.

        None: the loader continues elsewhere, or this is a forked child. The caller's publisher must then follow this
        one's.
        """
        if self._pid != os.getpid():  # another thread may have held the lock at the fork
            return None
        ready = self._end()
        if source is not self._source or state != self._state:
            self._drop(ready)
            return None
        taken = self.share, ready, self.publisher
        # the taken publisher belongs to the engine now
        self.publisher = ReadingPlanPublisher(self._source, self._state, self._make_share)
        return taken

    def on_source_closed(self) -> None:
        """See CloseListener."""
        self.drop_preparation()

    def drop_preparation(self) -> None:
        """End the preparation and release its blocks: a local copy may be replaced, or the data set is closed.

        The epoch may still begin: it is then planned anew.
        """
        if self._pid != os.getpid():
            return
        ready, plan = self._end(), self.publisher
        self.publisher = ReadingPlanPublisher(self._source, self._state, self._make_share)  # the epoch may still begin
        self._release(ready, plan)

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pid") and self._pid == os.getpid():
            self._release(self._end(), self.publisher)

    def _release(self, ready: Future[EpochStart | None] | None, plan: ReadingPlanPublisher) -> None:
        self._drop(ready)
        plan.close()

    def _drop(self, ready: Future[EpochStart | None] | None) -> None:
        if ready is not None:  # None: no planner has begun it, or it is taken
            self._unwanted.set()  # Also stops loads that are being submitted now and that no one can cancel yet.
            with self._step:
                cancel_loads(ready)

    def _end(self) -> Future[EpochStart | None] | None:
        with self._lock:
            self._is_over = True
            ready, self._ready = self._ready, None
        return ready

    def _begin(
        self, threads: LoadThreads, pressure: MemoryPressure, ahead_bytes: int, publisher: ReadingPlanPublisher
    ) -> EpochStart | None:
        with self._a_step():
            publisher.begin(self.share)
            publisher.complete()
        rest = self.share.pieces(0)
        # Reads footers. drop_preparation() does not wait for that, because a store may be slow.
        first = next(rest, None)
        if first is None:
            return None
        pieces = itertools.chain([first], rest)
        if first.run is None or self._source.selection is not None:
            first.rows()
        pairs = list(zip(first.windows, first.needed, strict=True))
        shards = interleaved([shards_of(*pair) for pair in pairs])
        if self._source.storage.can_prefetch:
            for shard, blocks in itertools.chain.from_iterable(blocks_by_shard(*pair) for pair in pairs):
                with self._a_step():
                    self._source.storage.prefetch_blocks(shard, blocks)
        near = [*dict.fromkeys([*shards, *self.shards_ahead(ahead_bytes)])] if self._source.storage.can_prefetch else []
        for start in range(0, len(near), _SHARDS_A_STEP):
            with self._a_step():
                self._source.storage.prefetch(near[start : start + _SHARDS_A_STEP])
        with self._a_step():
            if not pressure.fits(first) or not (self._is_expected or all(map(self._source.storage.is_local, shards))):
                return EpochStart(pieces, ())
            # An executor of its own, because the current epoch shuts its executor down at its end.
            executor = loading_pool(threads.n_threads, sends_requests=self._source.storage.sends_requests)
            loading = [
                WindowLoad(self._source, *pair, executor, threads.n_threads, unwanted=self._unwanted) for pair in pairs
            ]
            executor.shutdown(wait=False)
        for one in loading:
            is_left = True
            while is_left:
                with self._a_step():
                    is_left = one.map_next_shard()
        return EpochStart(pieces, tuple(loading))

    @contextlib.contextmanager
    def _a_step(self) -> Iterator[None]:
        """Context of one step of the preparation. Raises CancelledError after drop_preparation()."""
        with self._step:
            if self._unwanted.is_set():
                raise CancelledError
            yield
