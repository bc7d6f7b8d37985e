"""One part of a mixture: for each stream an endless sequence of its records, part epoch after part epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tiercache._native.permute import RowFinder
from tiercache.order.epoch import EpochOrder
from tiercache.order.groups import ShardGroups, concat_groups
from tiercache.order.keys import derive_key
from tiercache.order.memory import allocate_rows
from tiercache.order.options import Layout, OrderOptions
from tiercache.order.shares import stream_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tiercache.order.options import BlockTable
    from tiercache.order.shares import StreamAllocation
    from tiercache.order.window import Window

# Minimum records of a part per stream, in all and in an epoch, for the part to have its own streams; a smaller part is
# one sequence from which all streams draw in turn. A stream of a smaller part could be empty, and one record more or
# less than in the next stream would change the frequency of its records noticeably (of 1,024 by 0.1 %).
OWN_STREAM_RECORDS = 1024

# A part that restarts more often than this in one epoch of the mixture has all its shards in use throughout the epoch.
MAX_TURNS = 8

_KEPT_EPOCHS = 4  # the streams of a part are in the same part epoch or in neighbouring ones


class DrawRange(Protocol):
    """Draws [start, stop) of one stream from one part that are served from one window."""

    @property
    def start(self) -> int:
        """First draw."""

    @property
    def stop(self) -> int:
        """Draw after the last one."""

    @property
    def window(self) -> Window:
        """Window that holds the drawn records, with joined shard numbers."""

    def rows(self, draw: int, n: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the block and the row of n draws, n > 0, from a draw on; uint32[n] each.

        A block is an index into the blocks of the window; a row is counted from the start of the block.
        """


class MixturePart:
    """One part of a mixture: its orders by part epoch; the last few are cached. Threads may share it, as an EpochOrder.

    Args:
        layout: Shards of all parts, in the joined numbering.
        shards: Slice of the part's shards.
        options: Options of the part, with the mixture's number of streams.
        n_drawn: Number of records that an epoch of the mixture draws from the part.
    """

    def __init__(self, layout: Layout, shards: slice, options: OrderOptions, n_drawn: int) -> None:
        self.first_shard = shards.start
        self.n_drawn = n_drawn
        self.layout = Layout(layout.records[shards], layout.stored_bytes[shards], self._blocks)
        self.n_records = int(self.layout.records.sum())
        self.n_stored_bytes = int(self.layout.stored_bytes.sum())
        has_streams = min(self.n_records, n_drawn) >= OWN_STREAM_RECORDS * options.streams
        self.options = options if has_streams else replace(options, streams=1)
        self._joined = layout
        self._orders: dict[int, EpochOrder] = {}
        self._windows: dict[int, tuple[Window, Window]] = {}

    @property
    def n_streams(self) -> int:
        """Number of the part's own streams: as many as the mixture has, or one."""
        return self.options.streams if self.options.shuffle else 1

    def order(self, own_epoch: int) -> EpochOrder:
        """Return the part's order of one part epoch."""
        found = self._orders.get(own_epoch)
        if found is None:
            found = EpochOrder(self.layout, self.options, own_epoch)
            self._orders = {**dict(list(self._orders.items())[1 - _KEPT_EPOCHS :]), own_epoch: found}
        return found

    def window(self, own_epoch: int, stream: int, position: int) -> Window:
        """Return the window at a position of a stream of a part epoch, with joined shard numbers; cached."""
        own = self.order(own_epoch).section_at(stream, position)
        kept = self._windows.get(stream)
        if kept is None or kept[0] is not own:
            shards = own.shards + np.int32(self.first_shard)
            shards.flags.writeable = False
            kept = self._windows[stream] = own, replace(own, shards=shards)
        return kept[1]

    def whole(self) -> Window | None:
        """Return the window that holds the whole part, if there is one: then every part epoch has the same blocks."""
        if self.n_streams > 1:
            return None
        window = self.window(0, 0, 0)
        return window if window.stop == self.n_records else None

    def key(self, own_epoch: int) -> bytes | None:
        """Return the key of the row order of the whole part in a part epoch; None without shuffle."""
        return derive_key(self.options.seed, "whole", own_epoch) if self.options.shuffle else None

    def _blocks(self, shards: Sequence[int]) -> Sequence[BlockTable]:
        return self._joined.blocks([self.first_shard + shard for shard in shards])


@dataclass(frozen=True, slots=True, eq=False)
class PartDraws:
    """Draws of one stream of one epoch of the mixture from one part.

    Draws are numbered 0 to quota. Draw d is record base + d * step of the sequence of the part's own stream, which
    passes through part epochs of `length` records each.

    Attributes:
        part: Part that is drawn from.
        stream: Number of the part's own stream.
        base: Number in the sequence of draw 0.
        step: Distance in the sequence between two draws.
        quota: Number of draws.
        length: Number of records of the part's own stream in a part epoch.
    """

    part: MixturePart
    stream: int
    base: int
    step: int
    quota: int
    length: int
    _last: list[DrawRange]

    @staticmethod
    def of(part: MixturePart, deal: StreamAllocation, turned: int, quota: int, epoch: int) -> PartDraws:
        """Return the draws of a stream of the mixture in an epoch.

        Args:
            part: Part that is drawn from.
            deal: Allocation of the epoch's records to streams.
            turned: Number of the stream in the part's own rotation of the streams.
            quota: Number of draws.
            epoch: Number of the mixture's epoch.
        """
        if part.n_streams == deal.n_streams:
            length = stream_records(part.n_records, part.n_streams, turned)
            return PartDraws(part, turned, epoch * quota, 1, quota, length, [])
        return PartDraws(part, 0, epoch * part.n_drawn + turned, deal.n_streams, quota, part.n_records, [])

    def run_at(self, draw: int) -> DrawRange:
        """Return the draw range that holds a draw; the last one is cached."""
        for run in self._last:  # at most one; another thread may replace it meanwhile
            if run.start <= draw < run.stop:
                return run
        run = self._run(draw)
        self._last[:] = [run]
        return run

    def shards_ahead(self, draw: int, n_bytes: int | None) -> NDArray[np.int64]:
        """Return the shards that are read from a draw on, in reading order.

        Args:
            draw: Number of the draw.
            n_bytes: Stored bytes that the shards hold together; None: the shards of all remaining draws.
        """
        left = self.quota - draw
        if left <= 0:
            return np.empty(0, np.int64)
        group_bytes = self.part.options.group_bytes
        wanted = -(-left * self.step * self.part.n_stored_bytes // self.part.n_records)
        if n_bytes is not None:
            wanted = min(wanted, n_bytes)
        elif group_bytes is None:
            wanted = self.part.n_stored_bytes
        else:
            wanted += group_bytes  # shards count from the start of their group, which lies before this draw
        own_epoch, position = divmod(self.base + draw * self.step, self.length)
        found = self.part.order(own_epoch).shards_ahead(self.stream, position, wanted).copy()
        wanted -= int(self.part.layout.stored_bytes[found].sum())
        if wanted > 0:
            found = np.concatenate([found, self.part.order(own_epoch + 1).shards_ahead(self.stream, 0, wanted)])
            _, first = np.unique(found, return_index=True)
            found = found[np.sort(first)]
        found += self.part.first_shard
        return found

    def groups(self) -> ShardGroups:
        """Return the part's shard groups, with joined shard numbers, over the draws that they serve."""
        if not self.quota:
            return concat_groups([])
        first_epoch, last_epoch = (n // self.length for n in (self.base, self.base + (self.quota - 1) * self.step))
        if last_epoch - first_epoch > MAX_TURNS:
            return self._all_throughout(last_epoch - first_epoch)
        found = []
        for own_epoch in range(first_epoch, last_epoch + 1):
            own = self.part.order(own_epoch).groups(self.stream)
            draws = [self._many_draws_before(own_epoch * self.length + at) for at in (own.starts, own.stops)]
            found.append(own.moved_to(*draws))
        groups = concat_groups(found)
        return replace(groups, shards=groups.shards + self.part.first_shard)

    def _all_throughout(self, n_turns: int) -> ShardGroups:
        shards = np.flatnonzero(self.part.layout.records) + self.part.first_shard
        starts, stops, cuts = (np.array(bound, np.int64) for bound in ([0], [self.quota], [0, len(shards)]))
        stored_bytes = min(self.part.n_stored_bytes * n_turns, np.iinfo(np.int64).max)
        return ShardGroups(starts, stops, cuts, shards, np.array([stored_bytes], np.int64))

    def _many_draws_before(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.clip(-((self.base - numbers) // self.step), 0, self.quota)

    def _run(self, draw: int) -> DrawRange:
        whole = self.part.whole()
        if whole is not None:
            return _WholeRun(whole, 0, self.quota, self)
        own_epoch, position = divmod(self.base + draw * self.step, self.length)
        window = self.part.window(own_epoch, self.stream, position)
        start, stop = (self._draws_before(own_epoch * self.length + at) for at in (window.start, window.stop))
        return _WindowRun(window, start, stop, self)

    def _draws_before(self, number: int) -> int:
        """Return the number of draws that come before a number of the sequence."""
        return min(max(0, -((self.base - number) // self.step)), self.quota)


@dataclass(frozen=True, slots=True, eq=False)
class _WindowRun:
    """Draws from one window of one part epoch."""

    window: Window
    start: int
    stop: int
    lane: PartDraws

    def rows(self, draw: int, n: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        lane, window = self.lane, self.window
        first = (lane.base + draw * lane.step) % lane.length - window.start
        block, row = window.rows(first, first + (n - 1) * lane.step + 1)
        return block[:: lane.step], row[:: lane.step]


@dataclass(frozen=True, slots=True, eq=False)
class _WholeRun:
    """Draws from a part that is one window: the blocks stay the same, and each part epoch has its own key.

    A part of a few records that is repeated often therefore does not end a section with each repetition.
    """

    window: Window
    start: int
    stop: int
    lane: PartDraws

    def rows(self, draw: int, n: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        lane, length = self.lane, self.lane.length
        block, row = allocate_rows(n), allocate_rows(n)
        done = 0
        while done < n:
            own_epoch, position = divmod(lane.base + (draw + done) * lane.step, length)
            here = min(-((position - length) // lane.step), n - done)
            span = (here - 1) * lane.step + 1
            blocks, rows = np.empty(span, np.uint32), np.empty(span, np.uint32)
            RowFinder(self.window.first, lane.part.key(own_epoch)).find(position, blocks, rows)
            block[done : done + here], row[done : done + here] = blocks[:: lane.step], rows[:: lane.step]
            done += here
        return block, row


def part_options(
    options: OrderOptions, weights: Sequence[int], shards: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> list[OrderOptions]:
    """Return the options of each part: its own seed, and a share of the sizes by the stored bytes that it contributes.

    The sizes therefore hold for the mixture as a whole. A part gets at least half of an equal share: otherwise a part
    of 1 % would be mixed over windows of a hundredth of the size.

    Args:
        options: Options of the mixture.
        weights: Weight of each part, in records.
        shards: For each part the records and the stored bytes of its shards, int64[m] each.
    """
    brings = [
        Fraction(weight * max(int(stored_bytes.sum()), 1), int(records.sum()))
        for weight, (records, stored_bytes) in zip(weights, shards, strict=True)
    ]
    total = sum(brings)
    least = Fraction(1, 2 * len(brings))

    def scaled(size: int | None, share: Fraction) -> int | None:
        return None if size is None else max(int(size * max(share, least)), 1)

    return [
        replace(
            options,
            seed=int.from_bytes(derive_key(options.seed, "part", number)),
            group_bytes=scaled(options.group_bytes, amount / total),
            window_bytes=scaled(options.window_bytes, amount / total),
        )
        for number, amount in enumerate(brings)
    ]
