"""The pieces of rows in which a rank's share of an epoch is served, and the blocks that they need. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import MOST_ROWS, AnyWindow, ExplicitWindow, Order, RowRun, Section, Window, allocate_rows

# Location of a record: shard, block in it, row in that.
RecordLocation: TypeAlias = tuple[int, int, int]

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

# A window in stored order that comes from a store is served in parts. A part is served when all of it has come, so the
# first ones are small; later ones have a quarter of what has come before, so a consumer of up to 4/5 of the bandwidth
# does not wait for them. Each part takes 1 ms of the planner.
FIRST_PART_BYTES, MAX_PART_BYTES, PARTS_SO_FAR = 4 << 20, 64 << 20, 4

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

    first_blocks: number in the piece of each window's first block.
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

    windows: Each once (streams of a mixture share the windows of a small part), and in all pieces from its first row
    to its last, as the same object. needed: bool[n_blocks] for each: blocks that this piece or later pieces of the
    window need.
    """

    windows: tuple[AnyWindow, ...]
    n_rows: int
    needed: tuple[NDArray[np.bool_], ...]
    _rows_of_sections: tuple[_SectionRows, ...]
    _found: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] = field(default_factory=list, init=False, repr=False)

    @property
    def run(self) -> RowRun | None:
        return self._rows_of_sections[0].run if len(self._rows_of_sections) == 1 else None

    def rows(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return (block, row), uint32[n_rows], computed at the first call and kept: read-only for the caller."""
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


def cut_pieces(
    order: Order,
    rank_plan: RankPlan,
    sizes: PieceSizes = ARRAY_PIECES,
    is_local: Callable[[int], bool] | None = None,
) -> Iterator[Piece]:
    """Yield what the rank is served from its offset to the end of the epoch, in order, padding last.

    A piece ends where a window of one of its streams ends, or at its maximum size, independent of the batches. The
    maximum is four times as large for each next piece. Making a piece may read footers (`Order.section_at`); their
    errors pass through.

    is_local: Says whether a shard is on this machine. A window in stored order that is not is served in short parts,
        as its blocks arrive. None: all are.
    """
    cutter = _Cutter(order, rank_plan, is_local)
    full_stop = rank_plan.n_full * rank_plan.batch_size
    row, n_rows = 0, sizes.first
    while row < rank_plan.n_served:
        limit = full_stop if row < full_stop else rank_plan.n_served
        stop = min(row + n_rows, limit)
        if n_rows > sizes.most and not cutter.is_run(rank_plan.range_between(row, stop)):
            stop = min(row + sizes.most, limit)
        if row == full_stop and rank_plan.n_padding:
            # Padding repeats earlier records, so the blocks that are held say nothing about the blocks that it needs.
            cutter = _Cutter(order, rank_plan, is_local)
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

    def __init__(self, order: Order, rank_plan: RankPlan, is_local: Callable[[int], bool] | None) -> None:
        self._order = order
        self._rank_plan = rank_plan
        self._is_local = is_local
        self._parts_bytes = 0  # of all parts of windows so far
        self._held: dict[int, tuple[Section, tuple[NDArray[np.bool_], ...]]] = {}

    def is_run(self, positions: range | None) -> bool:
        """Whether the rows are runs of windows. positions: consecutive positions of one stream; None: they are not."""
        if positions is None:
            return False
        (cursor,) = _cursors(positions, self._order.n_streams)
        return isinstance(self._order.section_at(cursor.stream, int(cursor.at[0])), Window)

    def cut(self, positions: _Rising, is_last: bool) -> Iterator[Piece]:
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
            section = self._section_at(cursor.stream, position)
            rest = cursor.at[cursor.n_cut : _n_before(cursor.at, section.stop)] if is_last else None
            self._held[cursor.stream] = section, self._needed_blocks(cursor.stream, section, position, rest)
        return _n_before(cursor.at, section.stop)

    def _section_at(self, stream: int, position: int) -> Section:
        section = self._order.section_at(stream, position)
        if self._is_local is None or not isinstance(section, Window) or section.key is not None:
            return section
        if all(map(self._is_local, dict.fromkeys(section.shards.tolist()))):
            return section
        part_bytes = min(max(self._parts_bytes // PARTS_SO_FAR, FIRST_PART_BYTES), MAX_PART_BYTES)
        part = section.part_from(position, part_bytes)
        self._parts_bytes += part.raw_bytes
        return part

    def _piece(self, cursors: list[_StreamCursor], start: int, stop: int) -> Piece:
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
        is_covered = isinstance(window, ExplicitWindow) and len(window) == section.stop - section.start
        if not (window is section or is_covered):
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


def _n_before(rising: _Rising, value: int) -> int:
    if isinstance(rising, range):
        return min(max(value - rising.start, 0), len(rising))
    return int(np.searchsorted(rising, value))


def _cursors(positions: _Rising, n_streams: int) -> list[_StreamCursor]:
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


@dataclass(frozen=True, slots=True, eq=False)
class ArrayPiece:
    """Rows whose locations are arrays, with the attributes of a Piece. replaced: rows whose records are replaced."""

    windows: tuple[AnyWindow, ...]
    needed: tuple[NDArray[np.bool_], ...]
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]
    replaced: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    run: None = None  # the rows are never a run

    @property
    def n_rows(self) -> int:
        return len(self.row)

    def rows(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        return self.block, self.row

    def locate(self, index: int) -> RecordLocation:
        block = int(self.block[index])
        for window in self.windows:
            if block < len(window.blocks):
                return int(window.shards[block]), int(window.blocks[block]), int(self.row[index])
            block -= len(window.blocks)
        raise IndexError(f"block {block} behind the last of a piece")


AnyPiece: TypeAlias = "Piece | ArrayPiece"

# Bytes of the blocks of the first slice of an epoch: a store sends them in about the time of two round trips.
SLICE_BYTES = 4 << 20

# Blocks of a first piece of less than this many slices come in a second or less: then slices only cost requests.
MIN_SLICES = 32

# Blocks between needed ones are requested with them up to this gap, because later windows need them in any case, and
# a request costs more. docs/design.md compares the limits of all layers.
BLOCK_GAP_BYTES = 128 << 10


def is_worth_slicing(piece: AnyPiece) -> bool:
    n_bytes = sum(int(w.block_bytes[needed].sum()) for w, needed in zip(piece.windows, piece.needed, strict=True))
    return n_bytes > MIN_SLICES * SLICE_BYTES


def start_slices(piece: AnyPiece, n_rows: int) -> Iterator[ArrayPiece]:
    """Yield the rows of an epoch's first piece in slices, so that a batch waits only for the blocks of its own rows.

    The rows and their order are those of the piece. The first slice has n_rows, doubled while the blocks of the slice
    have less than SLICE_BYTES. Each slice is at least twice as long as the one before, so that each block is in few
    slices.
    """
    block, row = piece.rows()
    sizes = np.concatenate([window.block_bytes for window in piece.windows])
    start = 0
    while start < len(row):
        while start + n_rows < len(row) and int(sizes[np.unique(block[start : start + n_rows])].sum()) < SLICE_BYTES:
            n_rows *= 2
        stop = min(start + n_rows, len(row))
        yield ArrayPiece(
            piece.windows, touched_blocks(piece.windows, block[start:stop]), block[start:stop], row[start:stop]
        )
        start, n_rows = stop, 2 * n_rows


def shards_of(window: AnyWindow, needed: NDArray[np.bool_]) -> list[int]:
    return list(dict.fromkeys(window.shards[needed].tolist()))


def blocks_by_shard(window: AnyWindow, needed: NDArray[np.bool_]) -> list[tuple[int, list[int]]]:
    """Return the needed blocks of a window by shard, shards in the order in which the window names them.

    Blocks in short gaps between them are needed later, and are returned too (see BLOCK_GAP_BYTES).
    """
    found: dict[int, list[int]] = {}
    for shard, block in zip(window.shards[needed].tolist(), window.blocks[needed].tolist(), strict=True):
        found.setdefault(shard, []).append(block)
    sizes = window.block_bytes[needed]
    longest_gap = BLOCK_GAP_BYTES // max(int(sizes.mean()), 1) if len(sizes) else 0
    return [(shard, _with_short_gaps(blocks, longest_gap)) for shard, blocks in found.items()]


def _with_short_gaps(blocks: list[int], longest_gap: int) -> list[int]:
    ordered = sorted(blocks)
    with_gaps = ordered[:1]
    for block in ordered[1:]:
        first = with_gaps[-1] + 1
        with_gaps += range(first if block - first <= longest_gap else block, block + 1)
    return with_gaps


def touched_blocks(windows: tuple[AnyWindow, ...], block: NDArray[np.uint32]) -> tuple[NDArray[np.bool_], ...]:
    ends = np.cumsum([len(window.blocks) for window in windows])
    touched = np.zeros(int(ends[-1]), np.bool_)
    touched[block] = True
    return tuple(np.split(touched, ends[:-1]))
