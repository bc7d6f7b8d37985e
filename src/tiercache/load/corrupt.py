"""Corrupt records: how they are found, which are known, and how the record before them replaces them.

Replacement is used only with `LoaderOptions(on_corrupt="previous")`. It is a function of the sequence and of the known
corruption, so a resumed run serves the same records.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache._native import gather
from tiercache.data.records import Records
from tiercache.errors import CorruptShard
from tiercache.load.batch import gather_streams
from tiercache.load.loader_options import LoaderOptions
from tiercache.load.pieces import AnyPiece, ArrayPiece, RecordLocation, locate
from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import AnyWindow, BlockSizes, ExplicitWindow, Order
from tiercache.shard.blocks import Blocks

Rows: TypeAlias = "NDArray[np.int64] | None"  # rows of a block, rising; None: all rows

# Location of corruption. None stands for a whole shard or block.
CorruptLocation: TypeAlias = tuple[int, int | None, int | None]

# rows per search for the next corrupt one: 1 ms in a block without any, little in a corrupt page
_ROWS_AT_A_TIME = 1024

_NO_ROWS = np.empty(0, np.int64)


class CorruptionMap:
    """The corrupt records of a source by shard, block and row, as they are stored. Entries are only added.

    Thread-safe: writers replace the values under the lock and never change them in place.
    """

    def __init__(self, source: Records) -> None:
        self.source = source
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._blocks: dict[tuple[int, int], Rows] = {}
        # wholly corrupt shards; block numbers are those of the shard, or of its stand-in
        self._shards: frozenset[int] = frozenset()
        self._stand_ins: dict[int, BlockSizes] = {}
        self._surveyed: set[int] = set()
        self._warned: set[int] = set()
        self.first_url: str | None = None  # of the first shard that was found corrupt
        self.shards = np.empty(0, np.int64)  # shards with any corruption

    def __bool__(self) -> bool:
        return len(self.shards) > 0

    def rows(self, shard: int, block: int) -> Rows:
        return None if shard in self._shards else self._blocks.get((shard, block), _NO_ROWS)

    def is_bad(self, location: RecordLocation) -> bool:
        """Whether a record cannot be read. location: in the order's row numbers, in a view its own ones."""
        shard, block, row = self.stored(location)
        rows = self.rows(shard, block)
        return rows is None or row in rows

    def stored(self, location: RecordLocation) -> RecordLocation:
        """Convert a location of the order to stored row numbers: in a view, rows count all rows of their block."""
        shard, block, row = location
        if shard in self._shards:  # A view's choice of its rows is unknown now, and does not matter.
            return location
        where = np.array([shard], np.int32), np.array([block], np.int32)
        stored = self.source.stored_rows(*where, np.zeros(1, np.uint32), np.array([row], np.uint32))
        return shard, block, int(stored[0])

    def add(self, location: CorruptLocation) -> None:
        """Add a corrupt record, block (no row) or shard (no block). location: in stored row numbers."""
        shard, block, row = location
        self._add(shard, block, None if row is None else np.array([row], np.int64))

    def note_corruption(self, location: CorruptLocation, error: CorruptShard) -> None:
        """Note corruption that a reader found; check the whole shard once, and warn about it once."""
        shard = location[0]
        if shard not in self._surveyed:
            self._surveyed.add(shard)
            for block, rows in self._survey(shard).items():
                self._add(shard, block, rows)
        if location[1] is not None:
            self.add(location)
        self._warn(shard, error)

    def block_sizes(self, shards: Sequence[int]) -> list[BlockSizes]:
        """See Records.block_sizes. A shard with an unreadable footer has one block, which is corrupt."""
        found = dict(self._stand_ins)
        left = [shard for shard in dict.fromkeys(shards) if shard not in found]
        try:
            found.update(zip(left, self.source.block_sizes(left), strict=True))
        except CorruptShard:
            found.update((shard, self._read_block_sizes(shard)) for shard in left)
        return [found[shard] for shard in shards]

    def _add(self, shard: int, block: int | None, rows: Rows) -> None:
        if self._pid != os.getpid():  # a forked child may have inherited the lock locked
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            if block is None:
                self._shards = self._shards | {shard}
            else:
                known = self._blocks.get((shard, block), _NO_ROWS)
                both = None if rows is None or known is None else np.union1d(known, rows)
                self._blocks = {**self._blocks, (shard, block): both}
            self.shards = np.union1d(self.shards, [shard])

    def _read_block_sizes(self, shard: int) -> BlockSizes:
        try:
            return self.source.block_sizes([shard])[0]
        except CorruptShard as error:
            counts = self.source.shard_records[shard : shard + 1], self.source.shard_bytes[shard : shard + 1]
            sizes = self._stand_ins[shard] = BlockSizes(*counts)
            self.add((shard, None, None))
            self._warn(shard, error)
            return sizes

    def _survey(self, shard: int) -> dict[int, Rows]:
        """Return the corrupt rows of a shard, by block. Reads and checks the whole shard once, block by block."""
        bad_rows: dict[int, Rows] = {}
        for block in range(len(self.block_sizes([shard])[0].records)):
            if shard in self._shards:
                break
            try:
                rows = _bad_rows(self.source.load_blocks(shard, [block]), gather_streams(self.source.schema))
            except CorruptShard:
                rows = None
            if rows is None or len(rows):
                bad_rows[block] = rows
        return bad_rows

    def _warn(self, shard: int, error: CorruptShard) -> None:
        if shard in self._warned:
            return
        self._warned.add(shard)
        self.first_url = self.first_url or error.url
        warnings.warn(
            f"{error}; its records that cannot be read are replaced by the ones before them (on_corrupt='previous'), "
            "and counted in stats()['skipped']",
            RuntimeWarning,
            stacklevel=2,
        )


def corruption_map_for(source: Records, options: LoaderOptions) -> CorruptionMap | None:
    if options.on_corrupt == "previous" and source.is_packed:
        raise ValueError(
            "on_corrupt='previous' replaces a record, and here records are packed rows of many documents: remove "
            "on_corrupt="
        )
    return CorruptionMap(source) if options.on_corrupt == "previous" else None


def _bad_rows(blocks: Blocks, streams: NDArray[np.uint32]) -> Rows:
    blocks.reset_checks()  # the file may have been corrupted since
    checks, n_rows = blocks.pending_checks, int(blocks.n_rows[0])
    corrupt_rows: set[int] = set()
    try:
        for number, (kind, width) in enumerate(streams.tolist()):
            stream = kind, width, blocks.addresses[number], None if checks is None else checks[number]
            start = 0
            while start < n_rows:
                rows = np.arange(start, min(start + _ROWS_AT_A_TIME, n_rows), dtype=np.uint32)
                bad = gather.locate(*stream, np.zeros(len(rows), np.uint32), rows)
                start += len(rows) if bad is None else bad[0] + 1
                if bad is not None:
                    corrupt_rows.add(start - 1)
    except OSError:
        return None
    return np.array(sorted(corrupt_rows), np.int64)


def replace_corrupt(
    pieces: Iterable[AnyPiece], corruption: CorruptionMap, order: Order, rank_plan: RankPlan
) -> Iterator[AnyPiece]:
    """Yield the pieces of a rank, in which good records replace those that cannot be read."""
    replacer, n_rows = _RecordReplacer(corruption, order, rank_plan), 0
    for piece in pieces:
        yield replacer.repair(piece, n_rows) if corruption else piece
        n_rows += piece.n_rows


@dataclass(slots=True)
class _RecordReplacer:
    """Replaces records piece by piece. last: the last good record after a piece with corruption; None: look for it.

    Rows are counted from the start of the pieces.
    """

    corruption: CorruptionMap
    order: Order
    rank_plan: RankPlan
    last: RecordLocation | None = None
    _alone: tuple[RecordLocation, AnyWindow] | None = None

    def repair(self, piece: AnyPiece, n_before: int) -> AnyPiece:
        shards = np.concatenate([window.shards for window in piece.windows])
        blocks = np.concatenate([window.blocks for window in piece.windows])
        suspects = np.flatnonzero(np.isin(shards, self.corruption.shards))
        if not len(suspects):
            self.last = None  # the next piece then follows this piece's last record
            return piece
        bad, unreadable = self._find_bad(piece, shards, blocks, suspects)
        good = np.flatnonzero(~bad)
        block, row = (values.copy() for values in piece.rows())
        stand_in = np.maximum.accumulate(np.where(bad, -1, np.arange(len(bad))))
        inside = np.flatnonzero(bad & (stand_in >= 0))
        block[inside], row[inside] = block[stand_in[inside]], row[stand_in[inside]]
        n_first = int(good[0]) if len(good) else len(bad)
        location = self._before(n_before) if n_first else None
        if n_first and location is None and len(good):
            block[:n_first], row[:n_first] = block[n_first], row[n_first]
        elif n_first and location is None:
            location = self._after(n_before + len(bad))
        ends = np.cumsum([len(window.blocks) for window in piece.windows])
        parts = zip(piece.needed, np.split(unreadable, ends[:-1]), strict=True)
        windows, needed = piece.windows, tuple(of_window & ~part for of_window, part in parts)
        self.last = ArrayPiece(windows, needed, block, row).locate(good[-1]) if len(good) else location
        if location is not None:
            window = self._window_of(location)
            block[:n_first], row[:n_first] = len(shards), location[2]
            windows, needed = (*windows, window), (*needed, np.ones(1, np.bool_))
        return ArrayPiece(windows, needed, block, row, np.flatnonzero(bad))

    def _find_bad(
        self, piece: AnyPiece, shards: NDArray[np.int32], blocks: NDArray[np.int32], suspects: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return the rows of a piece that cannot be read, bool[n_rows], and its unreadable blocks, bool[n_blocks]."""
        block, row = piece.rows()
        unreadable, keys = np.zeros(len(shards), np.bool_), [np.empty(0, np.int64)]
        for number in suspects.tolist():
            rows = self.corruption.rows(int(shards[number]), int(blocks[number]))
            if rows is None:
                unreadable[number] = True
            else:
                keys.append((number << 32) + rows)
        bad: NDArray[np.bool_] = unreadable[block]
        wrong = np.concatenate(keys)
        if len(wrong):
            some = np.zeros(len(shards), np.bool_)
            some[wrong >> 32] = True
            at = np.flatnonzero(some[block])
            chosen = np.flatnonzero(some)  # a view cannot convert rows of a shard whose footer is unreadable
            numbers = np.searchsorted(chosen, block[at]).astype(np.uint32)
            stored = self.corruption.source.stored_rows(shards[chosen], blocks[chosen], numbers, row[at])
            bad[at] = np.isin((block[at].astype(np.int64) << 32) + stored, wrong)
        return bad, unreadable

    def _before(self, n_rows: int) -> RecordLocation | None:
        if self.last is not None and not self.corruption.is_bad(self.last):
            return self.last
        return next((p for p in self._all_before(n_rows) if not self.corruption.is_bad(p)), None)

    def _all_before(self, n_rows: int) -> Iterator[RecordLocation]:
        """Yield the records before row n_rows, latest first, back to the start of the epoch."""
        rank_plan = self.rank_plan
        for row in reversed(range(n_rows)):
            yield locate(self.order, int(rank_plan.positions_between(row, row + 1)[0]))
        while rank_plan.offset >= rank_plan.global_batch:
            rank_plan = replace(rank_plan, offset=rank_plan.offset - rank_plan.global_batch)
            yield from (locate(self.order, position) for position in rank_plan.positions(0)[::-1].tolist())

    def _after(self, n_rows: int) -> RecordLocation:
        for row in range(n_rows, self.rank_plan.n_served):
            location = locate(self.order, int(self.rank_plan.positions_between(row, row + 1)[0]))
            if not self.corruption.is_bad(location):
                return location
        url = self.corruption.first_url or self.corruption.source.url
        raise CorruptShard("no record of this rank's share can be read", url=url)

    def _window_of(self, location: RecordLocation) -> AnyWindow:
        shard, block, _ = location
        if self._alone is None or self._alone[0][:2] != (shard, block):
            raw_bytes = self.corruption.block_sizes([shard])[0].raw_bytes[block : block + 1]
            numbers = np.array([shard], np.int32), np.array([block], np.int32)
            self._alone = location, ExplicitWindow(0, 0, *numbers, raw_bytes)
        return self._alone[1]
