"""A rank's share of one epoch, as the pipeline reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tiercache.load.mending import replace_corrupt
from tiercache.load.plan import ARRAY_PIECES, PieceSizes, pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tiercache.load.damage import CorruptionMap, RecordLocation
    from tiercache.load.plan import Piece
    from tiercache.order import Order, RankPlan


class EpochShare(Protocol):
    """A rank's batches of one epoch, in order. Immutable; its methods may be called from any thread."""

    @property
    def epoch(self) -> int:
        """Number of the epoch."""

    @property
    def seed(self) -> int:
        """Seed of the run: random values of a record follow from the seed, the epoch and the record's position."""

    @property
    def n_records(self) -> int:
        """Number of records of the epoch, all ranks together."""

    @property
    def batch_size(self) -> int:
        """Number of records of a full batch."""

    @property
    def n_batches(self) -> int:
        """Number of batches of this rank, from where the epoch begins for it."""

    @property
    def padded(self) -> int:
        """Number of this rank's records that are repeated so that all ranks have equally many batches."""

    def pieces(self, n_batches: int) -> Iterator[Piece]:
        """Yield what is served after n_batches, in order, padding last. Reads footers."""

    def positions(self, batch: int) -> NDArray[np.int64]:
        """Return the positions in the epoch of a batch's records, int64[n], in served order."""

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (shard, block, row in the block) of a position of the epoch. Reads footers."""

    def shards_ahead(self, n_batches: int, n_rows: int, n_bytes: int) -> list[int]:
        """Return the shards that are read after n_batches and then n_rows, in reading order. Reads no footers.

        Their stored bytes are about n_bytes, or less near the end of the epoch.
        """

    def close(self) -> None:
        """Raise CancelledError in threads that wait in pieces(). May be called repeatedly, from any thread."""


@dataclass(frozen=True, slots=True)
class OrderShare:
    """A rank's share of an order.

    sizes: maximum rows of its pieces; damage: corrupt records that are replaced; None: corrupt data is an error.
    """

    order: Order
    ranks: RankPlan
    seed: int
    epoch: int
    damage: CorruptionMap | None = None
    sizes: PieceSizes = ARRAY_PIECES

    @property
    def n_records(self) -> int:
        """See Share.n_records."""
        return self.ranks.n_records

    @property
    def batch_size(self) -> int:
        """See Share.batch_size."""
        return self.ranks.batch_size

    @property
    def n_batches(self) -> int:
        """Number of batches from the offset on, the same for all ranks."""
        return self.ranks.n_batches

    @property
    def padded(self) -> int:
        """Number of this rank's records that are not part of the global sequence."""
        return self.ranks.n_padding

    def pieces(self, n_batches: int) -> Iterator[Piece]:
        """See Share.pieces."""
        ranks = replace(self.ranks, offset=self.ranks.offset_after(n_batches))
        found = pieces(self.order, ranks, self.sizes)
        return found if self.damage is None else replace_corrupt(found, self.damage, _Walk(self, ranks))

    def positions(self, batch: int) -> NDArray[np.int64]:
        """See Share.positions."""
        return self.ranks.positions(batch)

    def locate(self, position: int) -> tuple[int, int, int]:
        """See Share.place."""
        stream, at = position % self.order.n_streams, position // self.order.n_streams
        stretch = self.order.section_at(stream, at)
        blocks, rows = stretch.rows(at - stretch.start, at - stretch.start + 1)
        ends = np.cumsum([len(window.blocks) for window in stretch.windows])
        number = int(np.searchsorted(ends, blocks[0], side="right"))
        # negative: counted from the window's end
        window, within = stretch.windows[number], int(blocks[0]) - int(ends[number])
        return int(window.shards[within]), int(window.blocks[within]), int(rows[0])

    def shards_ahead(self, n_batches: int, n_rows: int, n_bytes: int) -> list[int]:
        """See Share.shards_ahead."""
        n_done = min(n_batches + n_rows // self.batch_size, self.n_batches)
        offset, n_streams, streams = self.ranks.offset_after(n_done), self.order.n_streams, self.ranks.streams
        share_bytes = max(n_bytes // len(streams), 1)
        runs = [
            self.order.shards_ahead(stream, -(-(offset - stream) // n_streams), share_bytes).tolist()
            for stream in streams
            if self.order.stream_records(stream)
        ]
        return interleaved(runs)

    def close(self) -> None:
        """Do nothing: no thread waits in pieces()."""


@dataclass(frozen=True, slots=True)
class _Walk:
    """A mending.Walk through a share whose pieces begin at `ranks`."""

    share: OrderShare
    ranks: RankPlan

    def before(self, n_rows: int) -> Iterator[RecordLocation]:
        """Yield the records back to the start of the epoch, even if a resumed run began later."""
        ranks, place = self.ranks, self.share.locate
        for row in reversed(range(n_rows)):
            yield place(int(ranks.positions_between(row, row + 1)[0]))
        while ranks.offset >= ranks.global_batch:
            ranks = replace(ranks, offset=ranks.offset - ranks.global_batch)
            yield from map(place, ranks.positions(0)[::-1].tolist())

    def after(self, n_rows: int) -> Iterator[RecordLocation]:
        """Yield the records to the end of the epoch."""
        for row in range(n_rows, self.ranks.n_served):
            yield self.share.locate(int(self.ranks.positions_between(row, row + 1)[0]))


def interleaved(runs: Sequence[Sequence[int]]) -> list[int]:
    """Return the first of each run, then the second of each, and so on; each number once."""
    longest = max(map(len, runs), default=0)
    return list(dict.fromkeys(run[i] for i in range(longest) for run in runs if i < len(run)))
