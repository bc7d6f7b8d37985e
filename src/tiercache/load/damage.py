"""The corrupt parts of a source that a run has found: records, blocks and shards that are replaced.

It is used only with `LoaderOptions(on_corrupt="previous")`. There is no search for corruption in advance: loading,
gathering and decoding find it, and then the rest of the same shard is checked.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tiercache._native import gather
from tiercache.errors import CorruptShard
from tiercache.load.streams import gather_streams
from tiercache.order import BlockTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tiercache.load.options import LoaderOptions
    from tiercache.load.source import Source
    from tiercache.shard.read.blocks import Blocks

    Rows: TypeAlias = NDArray[np.int64] | None  # rows of a block, rising; None: all rows

# Location of a record: shard, block in it, row in that. In a location of corruption None stands for a whole shard or
# block.
RecordLocation: TypeAlias = tuple[int, int, int]
CorruptLocation: TypeAlias = tuple[int, int | None, int | None]

# rows per search for the next corrupt one: 1 ms in a block without any, little in a corrupt page
_ROWS_AT_A_TIME = 1024
_NO_ROWS = np.empty(0, np.int64)


class CorruptionMap:
    """The corrupt records of a source by shard, block and row, as they are stored. Entries are only added.

    Thread-safe: writers replace the values under the lock and never change them in place.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._blocks: dict[tuple[int, int], Rows] = {}
        # wholly corrupt shards; block numbers are those of the shard, or of its stand-in table
        self._shards: frozenset[int] = frozenset()
        self._stand_ins: dict[int, BlockTable] = {}
        self._surveyed: set[int] = set()
        self._warned: set[int] = set()
        self.shards = np.empty(0, np.int64)  # shards with any corruption

    def __bool__(self) -> bool:
        return len(self.shards) > 0

    def rows(self, shard: int, block: int) -> Rows:
        """Return the rows of a block that cannot be read; None: all of them."""
        return None if shard in self._shards else self._blocks.get((shard, block), _NO_ROWS)

    def is_bad(self, place: RecordLocation) -> bool:
        """Whether a record cannot be read. place: location in the order's row numbers, in a view its own ones."""
        shard, block, row = self.stored(place)
        rows = self.rows(shard, block)
        return rows is None or row in rows

    def stored(self, place: RecordLocation) -> RecordLocation:
        """Convert a location of the order to stored row numbers: in a view, rows count all rows of their block."""
        shard, block, row = place
        if shard in self._shards:  # A view's choice of its rows is unknown now, and does not matter.
            return place
        where = np.array([shard], np.int32), np.array([block], np.int32)
        found = self.source.stored_rows(*where, np.zeros(1, np.uint32), np.array([row], np.uint32))
        return shard, block, int(found[0])

    def add(self, place: CorruptLocation) -> None:
        """Add a corrupt record, block (no row) or shard (no block). place: in stored row numbers."""
        shard, block, row = place
        self._add(shard, block, None if row is None else np.array([row], np.int64))

    def note_corruption(self, place: CorruptLocation, error: CorruptShard) -> None:
        """Note corruption that a reader found; check the whole shard once, and warn about it once.

        Raises:
            StoreError: The shard cannot be checked.
        """
        shard = place[0]
        if shard not in self._surveyed:
            self._surveyed.add(shard)
            for block, rows in self._survey(shard).items():
                self._add(shard, block, rows)
        if place[1] is not None:
            self.add(place)
        self._warn(shard, error)

    def block_tables(self, shards: Sequence[int]) -> list[BlockTable]:
        """See Source.block_tables. A shard with an unreadable footer has one block, which is corrupt."""
        found = dict(self._stand_ins)
        left = [shard for shard in dict.fromkeys(shards) if shard not in found]
        try:
            found.update(zip(left, self.source.block_tables(left), strict=True))
        except CorruptShard:
            found.update((shard, self._table(shard)) for shard in left)
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

    def _table(self, shard: int) -> BlockTable:
        try:
            return self.source.block_tables([shard])[0]
        except CorruptShard as error:
            counts = self.source.shard_records[shard : shard + 1], self.source.shard_bytes[shard : shard + 1]
            table = self._stand_ins[shard] = BlockTable(*counts)
            self.add((shard, None, None))
            self._warn(shard, error)
            return table

    def _survey(self, shard: int) -> dict[int, Rows]:
        """Return the corrupt rows of a shard, by block. Reads and checks the whole shard once, block by block."""
        found: dict[int, Rows] = {}
        for block in range(len(self.block_tables([shard])[0].records)):
            if shard in self._shards:
                break
            try:
                rows = _bad_rows(self.source.load(shard, [block]), gather_streams(self.source.schema))
            except CorruptShard:
                rows = None
            if rows is None or len(rows):
                found[block] = rows
        return found

    def _warn(self, shard: int, error: CorruptShard) -> None:
        if shard in self._warned:
            return
        self._warned.add(shard)
        warnings.warn(
            f"{error}; its records that cannot be read are replaced by the ones before them (on_corrupt='previous'), "
            "and counted in stats()['skipped']",
            RuntimeWarning,
            stacklevel=2,
        )


def corruption_map_for(source: Source, options: LoaderOptions) -> CorruptionMap | None:
    """Return the record of corruption of a run; None if corrupt data is an error."""
    return CorruptionMap(source) if options.on_corrupt == "previous" else None


def _bad_rows(blocks: Blocks, streams: NDArray[np.uint32]) -> Rows:
    """Return the corrupt rows of the single loaded block; None if all of it is unreadable."""
    blocks.reset_checks()  # the file may have been corrupted since
    checks, n_rows = blocks.pending_checks, int(blocks.n_rows[0])
    found: set[int] = set()
    try:
        for number, (kind, width) in enumerate(streams.tolist()):
            stream = kind, width, blocks.addresses[number], None if checks is None else checks[number]
            start = 0
            while start < n_rows:
                rows = np.arange(start, min(start + _ROWS_AT_A_TIME, n_rows), dtype=np.uint32)
                bad = gather.locate(*stream, np.zeros(len(rows), np.uint32), rows)
                start += len(rows) if bad is None else bad[0] + 1
                if bad is not None:
                    found.add(start - 1)
    except OSError:
        return None
    return np.array(sorted(found), np.int64)
