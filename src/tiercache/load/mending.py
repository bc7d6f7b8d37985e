"""Replacement of corrupt records: each is replaced by the record before it in the rank's sequence.

The replacement is a function of the sequence and of the corruption, so a resumed run serves the same records. If there
is no record before it, the next one is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from tiercache.errors import CorruptShard
from tiercache.order.explicit import ExplicitWindow

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from tiercache.load.damage import CorruptionMap, RecordLocation
    from tiercache.load.plan import Piece
    from tiercache.order import Window

_NOTHING = np.empty(0, np.uint32)


class RecordWalk(Protocol):
    """A rank's records one by one, counted in rows from the start of its pieces.

    Locations have the order's row numbers.
    """

    def before(self, n_rows: int) -> Iterator[RecordLocation]:
        """Yield the records before row n_rows, latest first, also those before the start of the pieces."""

    def after(self, n_rows: int) -> Iterator[RecordLocation]:
        """Yield the record at row n_rows, and those after it."""


@dataclass(frozen=True, slots=True, eq=False)
class PatchedPiece:
    """A piece in which some records are replaced, with the attributes of a `Piece`.

    replaced: int64[m], rising, the replaced rows.
    """

    windows: tuple[Window, ...]
    wanted: tuple[NDArray[np.bool_], ...]
    batch_rows: NDArray[np.uint32] | None
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]
    replaced: NDArray[np.int64]

    @property
    def run(self) -> None:
        """None: the rows are arrays."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.row)

    def rows(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """See Piece.rows."""
        return self.block, self.row

    def place(self, index: int) -> RecordLocation:
        """Return the location of a row's record, in the order's row numbers."""
        return _place(self.windows, int(self.block[index]), int(self.row[index]))


def replace_corrupt(pieces: Iterable[Piece], damage: CorruptionMap, walk: RecordWalk) -> Iterator[Piece]:
    """Yield the pieces with corrupt records replaced; pieces without any are unchanged.

    Raises:
        CorruptShard: No record of the rank can be read.
    """
    mender, n_rows = _RecordReplacer(damage, walk), 0
    for piece in pieces:
        yield mender.repair(piece, n_rows) if damage else piece
        n_rows += piece.n_rows


@dataclass(slots=True)
class _TrimmedWindow:
    """A window without its unreadable blocks; made once, so that all its pieces have the same object."""

    window: Window
    kept: NDArray[np.bool_]
    left: Window


@dataclass(slots=True)
class _RecordReplacer:
    """Replaces records piece by piece, and keeps state between the pieces.

    last: the last good record up to the end of the last piece, if that piece had corruption; None: ask `walk`.
    """

    damage: CorruptionMap
    walk: RecordWalk
    last: RecordLocation | None = None
    _without: dict[int, _TrimmedWindow] = field(default_factory=dict)
    _alone: tuple[RecordLocation, ExplicitWindow] | None = None

    def repair(self, piece: Piece, n_before: int) -> Piece:
        """Return the piece, which begins after n_before rows, with its corrupt records replaced."""
        shards = np.concatenate([window.shards for window in piece.windows])
        blocks = np.concatenate([window.blocks for window in piece.windows])
        suspects = np.flatnonzero(np.isin(shards, self.damage.shards))
        if not len(suspects):
            self.last, self._without = None, {}  # the next piece then follows this piece's last record
            return piece
        bad = self._bad(piece, shards, blocks, suspects)
        good = np.flatnonzero(~bad)
        block, row = (values.copy() for values in piece.rows())
        stand_in = np.maximum.accumulate(np.where(bad, -1, np.arange(len(bad))))
        inside = np.flatnonzero(bad & (stand_in >= 0))
        block[inside], row[inside] = block[stand_in[inside]], row[stand_in[inside]]
        n_first = int(good[0]) if len(good) else len(bad)
        place = self._before(n_before) if n_first else None
        if n_first and place is None and len(good):
            block[:n_first], row[:n_first] = block[n_first], row[n_first]
        elif n_first and place is None:
            place = self._after(n_before + len(bad))
        self.last = _place(piece.windows, int(block[good[-1]]), int(row[good[-1]])) if len(good) else place
        windows, wanted, numbers = self._left(piece)
        block = numbers[block].astype(np.uint32)
        if place is not None:
            window = self._window_of(place)
            block[:n_first], row[:n_first] = sum(len(w.blocks) for w in windows), place[2]
            windows, wanted = (*windows, cast("Window", window)), (*wanted, np.ones(1, np.bool_))
        return cast("Piece", PatchedPiece(windows, wanted, piece.batch_rows, block, row, np.flatnonzero(bad)))

    def _bad(
        self, piece: Piece, shards: NDArray[np.int32], blocks: NDArray[np.int32], suspects: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Return bool[n_rows]: the rows of a piece that cannot be read."""
        block, row = piece.rows()
        whole, keys = np.zeros(len(shards), np.bool_), [np.empty(0, np.int64)]
        for number in suspects.tolist():
            rows = self.damage.rows(int(shards[number]), int(blocks[number]))
            if rows is None:
                whole[number] = True
            else:
                keys.append((number << 32) + rows)
        bad: NDArray[np.bool_] = whole[block]
        wrong = np.concatenate(keys)
        if len(wrong):
            some = np.zeros(len(shards), np.bool_)
            some[wrong >> 32] = True
            at = np.flatnonzero(some[block])
            chosen = np.flatnonzero(some)  # a view cannot convert rows of a shard whose footer is unreadable
            numbers = np.searchsorted(chosen, block[at]).astype(np.uint32)
            stored = self.damage.source.stored_rows(shards[chosen], blocks[chosen], numbers, row[at])
            bad[at] = np.isin((block[at].astype(np.int64) << 32) + stored, wrong)
        return bad

    def _before(self, n_rows: int) -> RecordLocation | None:
        if self.last is not None and not self.damage.is_bad(self.last):
            return self.last
        return next((p for p in self.walk.before(n_rows) if not self.damage.is_bad(p)), None)

    def _after(self, n_rows: int) -> RecordLocation:
        found = next((p for p in self.walk.after(n_rows) if not self.damage.is_bad(p)), None)
        if found is None:
            raise CorruptShard("no record of this rank's share can be read", url=self.damage.source.url)
        return found

    def _left(self, piece: Piece) -> tuple[tuple[Window, ...], tuple[NDArray[np.bool_], ...], NDArray[np.int64]]:
        """Return the windows without unreadable blocks, their wanted blocks, and the new number of each block."""
        going = {id(window): self._without.get(id(window)) or self._cut(window) for window in piece.windows}
        self._without = going
        kept = np.concatenate([one.kept for one in going.values()])
        numbers = np.cumsum(kept) - 1
        pairs = [
            (one.left, wanted[one.kept])
            for one, wanted in zip(going.values(), piece.wanted, strict=True)
            if len(one.left.blocks)
        ]
        return tuple(window for window, _ in pairs), tuple(wanted for _, wanted in pairs), numbers

    def _cut(self, window: Window) -> _TrimmedWindow:
        kept = np.ones(len(window.blocks), np.bool_)
        for number in np.flatnonzero(np.isin(window.shards, self.damage.shards)).tolist():
            kept[number] = self.damage.rows(int(window.shards[number]), int(window.blocks[number])) is not None
        if kept.all():
            return _TrimmedWindow(window, kept, window)
        parts = window.shards[kept], window.blocks[kept], window.block_bytes[kept]
        left = ExplicitWindow(window.start, window.stop, *parts, _NOTHING, _NOTHING)
        return _TrimmedWindow(window, kept, cast("Window", left))

    def _window_of(self, place: RecordLocation) -> ExplicitWindow:
        """Return a window of the single block of a record; the last one is cached."""
        shard, block, _ = place
        if self._alone is None or self._alone[0][:2] != (shard, block):
            raw_bytes = self.damage.block_tables([shard])[0].raw_bytes[block : block + 1]
            numbers = np.array([shard], np.int32), np.array([block], np.int32)
            self._alone = place, ExplicitWindow(0, 0, *numbers, raw_bytes, _NOTHING, _NOTHING)
        return self._alone[1]


def _place(windows: tuple[Window, ...], block: int, row: int) -> RecordLocation:
    for window in windows:
        if block < len(window.blocks):
            return int(window.shards[block]), int(window.blocks[block]), row
        block -= len(window.blocks)
    raise IndexError(f"block {block} behind the last of a piece")
