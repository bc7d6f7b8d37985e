"""Mixture of several data sets in exact shares: a pure function of epoch and position, like any other order.

Each part of a mixture is an endless sequence of its records, part epoch after part epoch.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from numbers import Rational, Real
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache._native.permute import RowFinder
from tiercache.order.epoch_order import EpochOrder, derive_key
from tiercache.order.window import (
    BlockSizes,
    DatasetSizes,
    OrderOptions,
    ShardGroups,
    Window,
    allocate_rows,
    concat_groups,
)

# Each stream starts each split at its own phase; otherwise all streams take the same part at once (256 streams deviated
# by 400 records together, with these phases by 24). The phases are radical inverses in these bases, by depth: splits
# below each other need phases that are not correlated (the golden ratio for all of them: deviation 200).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19)
MAX_RECORDS = 1 << 42  # per stream: 2**20 positions times this fit 63 bits
_CHUNK_PLACES = 1 << 20


def apportion(n: int, weights: Sequence[int], owed: Sequence[Fraction]) -> tuple[int, ...]:
    """Return the shares of the next n records by weights, after shares that were rounded; they add up to n.

    It is the largest-remainder method. Without debts every share is its exact value rounded down or up: a part of n_k
    records gets at most n_k if n <= n_k / share, and at least n_k if n >= n_k / share.

    owed: Records that each part was given too few before, below 0 if too many; they add up to 0. The parts make up for
    them if n is large enough.
    """
    total = sum(weights)
    goals = {part: n * Fraction(w, total) + owed[part] for part, w in enumerate(weights) if w}
    while True:
        shift = (n - sum(goals.values())) / len(goals)  # what the other parts cannot make up for
        given = {part: goal + shift for part, goal in goals.items() if goal + shift > 0}
        if len(given) in (0, len(goals)):
            break
        goals = {part: goals[part] for part in given}
    shares = [0] * len(weights)
    for part, goal in given.items():
        shares[part] = int(goal)
    by_remainder = sorted(given, key=lambda part: (int(given[part]) - given[part], part))
    for part in by_remainder[: n - sum(shares)]:
        shares[part] += 1
    return tuple(shares)


@dataclass(frozen=True, slots=True)
class StreamAllocation:
    """Allocation of an epoch's records to streams: a table whose sums are those of the parts and those of the streams.

    Stream s of the epoch holds ceil((n - s) / S) records. The records of a part beyond a multiple of S go to
    neighbouring streams, and those of the next part to the streams after them: therefore the streams' records of a part
    differ by at most one.
    """

    totals: tuple[int, ...]  # records of each part in the epoch
    n_streams: int
    changes: tuple[tuple[int, ...], ...] = ()  # records of each part before each change of the weights, in order

    def turns(self, stream: int) -> tuple[int, ...]:
        """Return the stream's number in each part's rotation; number 0 is the first to get an extra record."""
        return self._turns(stream, self.totals)

    def quotas(self, stream: int) -> tuple[int, ...]:
        return self._quotas(stream, self.totals)

    def quotas_by_change(self, stream: int) -> list[tuple[int, ...]]:
        """Return the number of records that a stream takes of each part before each change, and then in the epoch.

        A part without records between two changes has none there in any stream, and the quotas of the epoch are those
        of one without changes, so that all streams together take each record of a part once. Both are impossible for
        single records of a stream if a part pauses and returns, or if there are fewer positions between two changes
        than one for each stream and part: those records are then taken on the other side of a change.
        """
        final, found = self.quotas(stream), []
        done = before = (0,) * len(self.totals)
        for change in self.changes:
            goal, parts = self._quotas(stream, change), range(len(self.totals))
            taken = [final[part] if change[part] == self.totals[part] else done[part] for part in parts]
            free = [part for part in parts if before[part] < change[part] < self.totals[part]]
            for part in free:
                taken[part] = min(max(goal[part], done[part]), final[part])
            # The goals have the right sum, so a few records are missing or too many: at most one for each part that is
            # not free.
            for _ in range(sum(goal) - sum(taken)):
                missing = {part: goal[part] - taken[part] for part in parts if taken[part] < final[part]}
                taken[_furthest(missing, free)] += 1
            for _ in range(sum(taken) - sum(goal)):
                excess = {part: taken[part] - goal[part] for part in parts if taken[part] > done[part]}
                taken[_furthest(excess, free)] -= 1
            done, before = tuple(taken), change
            found.append(done)
        return [*found, final]

    def _turns(self, stream: int, totals: Sequence[int]) -> tuple[int, ...]:
        # The parts that end first come first: their turns are the same at all later changes.
        steps = (*self.changes, self.totals)
        ends = [
            next(n for n, step in enumerate(steps) if step[part] == self.totals[part]) for part in range(len(totals))
        ]
        turns, n_records = [0] * len(totals), 0
        for part in sorted(range(len(totals)), key=ends.__getitem__):
            turns[part] = (stream - n_records) % self.n_streams
            n_records += totals[part]
        return tuple(turns)

    def _quotas(self, stream: int, totals: Sequence[int]) -> tuple[int, ...]:
        of_parts = zip(totals, self._turns(stream, totals), strict=True)
        return tuple(stream_records(total, self.n_streams, turned) for total, turned in of_parts)


def _furthest(deviations: Mapping[int, int], preferred: Sequence[int]) -> int:
    parts = [part for part in deviations if part in preferred] or list(deviations)
    return max(parts, key=deviations.__getitem__)


def stream_records(n_records: int, n_streams: int, stream: int) -> int:
    return max(0, -((stream - n_records) // n_streams))


@dataclass(frozen=True, slots=True)
class _Split:
    """Node of the tree: it decides which of its items go left. Nodes are numbered parts first, then splits."""

    node: int
    left: int
    right: int
    n_left: int
    n_items: int
    phase: int

    def left_before(self, items: int) -> int:
        return (items * self.n_left + self.phase) // self.n_items if self.n_items else 0

    def item_of(self, child: int, number: Any) -> Any:
        """Return the index of the item that is the child's item of a number: an integer, or an array of integers."""
        if child == self.left:
            return -((self.phase - (number + 1) * self.n_items) // self.n_left) - 1
        return (number * self.n_items + self.phase) // (self.n_items - self.n_left)


def interleave(allocation: StreamAllocation, stream: int) -> Interleaving:
    """Return the interleaving of one stream. Raises ValueError if the stream has more than MAX_RECORDS records."""
    if allocation.changes:
        return ScheduledInterleaving(allocation, stream)
    return StreamInterleaving(allocation.totals, allocation.quotas(stream), stream)


class StreamInterleaving:
    """One stream of an epoch, with the same shares throughout, as a function from position to part and draw number.

    Each method is in O(parts). Immutable; threads may share it. totals, which decide the tree, are the records of each
    part in all streams, quotas those in this stream.

    The parts are the leaves of a binary tree that joins the two smallest nodes first (Huffman's tree). Of its first q
    items a split sends floor((q * n_left + phase) / n_items) left, so each split deviates by less than one record, of
    which a part deeper in the tree gets its share. In any range of the stream a part deviates from its quota's share by
    less than 4 records, however many parts there are, since only the last split of a path gives one side more than two
    thirds.
    """

    def __init__(self, totals: Sequence[int], quotas: tuple[int, ...], stream: int) -> None:
        self.quotas = quotas
        self.n_records = sum(self.quotas)
        if self.n_records > MAX_RECORDS:
            raise ValueError(f"a stream of a mixture has at most {MAX_RECORDS} records, got {self.n_records}")
        self._splits = _tree(totals, self.quotas, stream)
        self._above = {child: split for split in self._splits for child in (split.left, split.right)}

    def drawn(self, position: int) -> list[int]:
        """Return the number of records of each part among the first `position` positions."""
        items = [0] * (2 * len(self.quotas) - 1)
        items[-1] = position
        for split in self._splits:
            items[split.left] = split.left_before(items[split.node])
            items[split.right] = items[split.node] - items[split.left]
        return items[: len(self.quotas)]

    def positions_of(self, part: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of a part's draws, int64[n]; draws count from 0 and are fewer than the part's quota."""
        node, number = part, np.asarray(draws).astype(np.int64 if self.n_records < 1 << 31 else object)
        while split := self._above.get(node):
            node, number = split.node, split.item_of(node, number)
        return number.astype(np.int64)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # The code multiplies two counts: object arrays of Python integers if the product may exceed 63 bits.
        whole = np.int64 if self.n_records < 1 << 31 else object
        parts, draws = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        items = {2 * len(self.quotas) - 2: (np.arange(len(positions)), np.asarray(positions).astype(whole))}
        for split in self._splits:
            where, number = items.pop(split.node)
            left = (number * split.n_left + split.phase) // max(split.n_items, 1)
            goes_left = (((number + 1) * split.n_left + split.phase) // max(split.n_items, 1) > left).astype(np.bool_)
            items[split.left] = where[goes_left], left[goes_left]
            items[split.right] = where[~goes_left], (number - left)[~goes_left]
        for part, (where, number) in items.items():
            parts[where], draws[where] = part, number
        return parts, draws

    def offsets_by_part(self, start: int, stop: int) -> list[NDArray[np.int64]]:
        """Return for each part where its draws are among positions [start, stop): ascending, counted from start.

        The first of them is the part's draw drawn(start)[part]; the others follow it.
        """
        chunks = [self._places(at, min(at + _CHUNK_PLACES, stop), start) for at in range(start, stop, _CHUNK_PLACES)]
        if len(chunks) == 1:
            return chunks[0]
        return [np.concatenate([np.empty(0, np.int64), *parts]) for parts in zip(*chunks, strict=True)] or [
            np.empty(0, np.int64) for _ in self.quotas
        ]

    def _places(self, start: int, stop: int, origin: int) -> list[NDArray[np.int64]]:
        n_nodes = 2 * len(self.quotas) - 1
        first, places = [0] * n_nodes, [np.empty(0, np.int64)] * n_nodes
        first[-1], places[-1] = start, np.arange(start - origin, stop - origin)
        for split in self._splits:
            here, begin = places[split.node], first[split.node]
            first[split.left] = split.left_before(begin)
            first[split.right] = begin - first[split.left]
            if len(here):
                rest = (begin * split.n_left + split.phase) % split.n_items
                left = np.diff((rest + np.arange(len(here) + 1) * split.n_left) // split.n_items).astype(np.bool_)
                places[split.left], places[split.right] = here[left], here[~left]
        return places[: len(self.quotas)]


class ScheduledInterleaving:
    """A stream whose shares change: one StreamInterleaving, with the same methods, for each stretch between changes."""

    def __init__(self, allocation: StreamAllocation, stream: int) -> None:
        ends = allocation.quotas_by_change(stream)
        none = (0,) * len(ends[-1])
        self.quotas = ends[-1]
        self.n_records = sum(self.quotas)
        steps = pairwise((none, *allocation.changes, allocation.totals))
        self._stretches = [
            StreamInterleaving(_difference(*step), _difference(*taken), stream)
            for step, taken in zip(steps, pairwise((none, *ends)), strict=True)
        ]
        self._drawn = np.array([none, *ends], np.int64)  # before each stretch, and at the end
        self._starts = self._drawn.sum(axis=1).tolist()

    def drawn(self, position: int) -> list[int]:
        stretch = self._stretch_at(position)
        within = self._stretches[stretch].drawn(position - self._starts[stretch])
        return [int(n) for n in self._drawn[stretch] + within]

    def positions_of(self, part: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        draws = np.asarray(draws, np.int64)
        found, stretches = np.empty(len(draws), np.int64), np.searchsorted(self._drawn[1:, part], draws, side="right")
        for stretch in np.unique(stretches).tolist():
            where = stretches == stretch
            within = self._stretches[stretch].positions_of(part, draws[where] - self._drawn[stretch, part])
            found[where] = within + self._starts[stretch]
        return found

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        positions = np.asarray(positions, np.int64)
        parts, draws = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        stretches = np.searchsorted(self._starts[1:], positions, side="right")
        for stretch in np.unique(stretches).tolist():
            where = stretches == stretch
            part, draw = self._stretches[stretch].locate(positions[where] - self._starts[stretch])
            parts[where], draws[where] = part, draw + self._drawn[stretch, part]
        return parts, draws

    def offsets_by_part(self, start: int, stop: int) -> list[NDArray[np.int64]]:
        found: list[list[NDArray[np.int64]]] = [[np.empty(0, np.int64)] for _ in self.quotas]
        at = start
        while at < stop:
            stretch = self._stretch_at(at)
            origin, end = self._starts[stretch], min(self._starts[stretch + 1], stop)
            for part, places in enumerate(self._stretches[stretch].offsets_by_part(at - origin, end - origin)):
                found[part].append(places + (at - start))
            at = end
        return [np.concatenate(places) for places in found]

    def _stretch_at(self, position: int) -> int:
        return min(bisect_right(self._starts, position), len(self._stretches)) - 1


Interleaving: TypeAlias = StreamInterleaving | ScheduledInterleaving


def _difference(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(before, after, strict=True))


def _tree(totals: Sequence[int], quotas: Sequence[int], stream: int) -> tuple[_Split, ...]:
    """Return the splits of a stream, from the root down. All streams of the epoch have the same tree."""
    waiting = [(total, part) for part, total in enumerate(totals)]
    heapq.heapify(waiting)
    joined: list[tuple[int, int]] = []
    while len(waiting) > 1:
        (small, right), (large, left) = heapq.heappop(waiting), heapq.heappop(waiting)
        heapq.heappush(waiting, (small + large, len(totals) + len(joined)))
        joined.append((left, right))
    n_items = list(quotas)
    for left, right in joined:
        n_items.append(n_items[left] + n_items[right])
    depth = [0] * len(n_items)
    splits: list[_Split] = []
    for node in range(len(n_items) - 1, len(totals) - 1, -1):
        left, right = joined[node - len(totals)]
        depth[left] = depth[right] = depth[node] + 1
        numerator, denominator = _radical_inverse(stream, _BASES[depth[node] % len(_BASES)])
        phase = n_items[node] * numerator // denominator
        splits.append(_Split(node, left, right, n_items[left], n_items[node], phase))
    return tuple(splits)


def _radical_inverse(number: int, base: int) -> tuple[int, int]:
    """Return the number with its digits mirrored at the point, a fraction below one, as (numerator, denominator)."""
    numerator, denominator = 0, 1
    while number:
        number, digit = divmod(number, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator, denominator


# Minimum records of a part per stream, in all and in an epoch, for the part to have its own streams; a smaller part is
# one sequence from which all streams draw in turn. A stream of a smaller part could be empty, and one record more or
# less than in the next stream would change the frequency of its records noticeably (of 1,024 by 0.1 %).
OWN_STREAM_RECORDS = 1024
# A part that restarts more often than this in one epoch of the mixture has all its shards in use throughout the epoch.
MAX_TURNS = 8
_KEPT_EPOCHS = 4  # the streams of a part are in the same part epoch or in neighbouring ones


class MixturePart:
    """One part of a mixture: its orders by part epoch, of which the last few are cached. Threads may share it."""

    def __init__(self, sizes: DatasetSizes, shards: slice, options: OrderOptions, n_drawn: int) -> None:
        self.first_shard = shards.start
        self.sizes = DatasetSizes(sizes.records[shards], sizes.stored_bytes[shards], self._blocks)
        self.n_records = int(self.sizes.records.sum())
        self.n_stored_bytes = int(self.sizes.stored_bytes.sum())
        has_streams = min(self.n_records, n_drawn) >= OWN_STREAM_RECORDS * options.streams
        self.options = options if has_streams else replace(options, streams=1)
        self._joined = sizes
        self._orders: dict[int, EpochOrder] = {}
        self._windows: dict[int, tuple[Window, Window]] = {}

    @property
    def n_streams(self) -> int:
        return self.options.streams if self.options.shuffle else 1

    def order(self, own_epoch: int) -> EpochOrder:
        found = self._orders.get(own_epoch)
        if found is None:
            found = EpochOrder(self.sizes, self.options, own_epoch)
            self._orders = {**dict(list(self._orders.items())[1 - _KEPT_EPOCHS :]), own_epoch: found}
        return found

    def window(self, own_epoch: int, stream: int, position: int) -> Window:
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

    def _blocks(self, shards: Sequence[int]) -> Sequence[BlockSizes]:
        return self._joined.blocks([self.first_shard + shard for shard in shards])


@dataclass(frozen=True, slots=True, eq=False)
class PartDraws:
    """Draws of one stream of one epoch of the mixture from one part.

    Draws are numbered 0 to quota. Draw d is record base + d * step of the sequence of the part's own stream, which
    passes through part epochs of `length` records each.
    """

    part: MixturePart
    stream: int  # number of the part's own stream
    base: int  # number in the sequence of draw 0
    step: int  # distance in the sequence between two draws
    quota: int
    length: int  # records of the part's own stream in a part epoch
    _last: list[DrawRange]

    @staticmethod
    def of(part: MixturePart, n_streams: int, turned: int, quota: int, base: int) -> PartDraws:
        if part.n_streams == n_streams:
            return PartDraws(part, turned, base, 1, quota, stream_records(part.n_records, n_streams, turned), [])
        return PartDraws(part, 0, base, n_streams, quota, part.n_records, [])

    def range_at(self, draw: int) -> DrawRange:
        for run in self._last:  # at most one; another thread may replace it meanwhile
            if run.start <= draw < run.stop:
                return run
        run = self._range(draw)
        self._last[:] = [run]
        return run

    def shards_ahead(self, draw: int, n_bytes: int | None) -> NDArray[np.int64]:
        left = self.quota - draw
        if left <= 0:
            return np.empty(0, np.int64)
        group_bytes = self.part.options.group_bytes
        wanted_bytes = -(-left * self.step * self.part.n_stored_bytes // self.part.n_records)
        if n_bytes is not None:
            wanted_bytes = min(wanted_bytes, n_bytes)
        elif group_bytes is None:
            wanted_bytes = self.part.n_stored_bytes
        else:
            wanted_bytes += group_bytes  # shards count from the start of their group, which lies before this draw
        own_epoch, position = divmod(self.base + draw * self.step, self.length)
        found = self.part.order(own_epoch).shards_ahead(self.stream, position, wanted_bytes).copy()
        wanted_bytes -= int(self.part.sizes.stored_bytes[found].sum())
        if wanted_bytes > 0:
            found = np.concatenate([found, self.part.order(own_epoch + 1).shards_ahead(self.stream, 0, wanted_bytes)])
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
            draws = [self._draws_before(own_epoch * self.length + at) for at in (own.starts, own.stops)]
            found.append(own.moved_to(*draws))
        groups = concat_groups(found)
        return replace(groups, shards=groups.shards + self.part.first_shard)

    def _all_throughout(self, n_turns: int) -> ShardGroups:
        shards = np.flatnonzero(self.part.sizes.records) + self.part.first_shard
        starts, stops, cuts = (np.array(bound, np.int64) for bound in ([0], [self.quota], [0, len(shards)]))
        stored_bytes = min(self.part.n_stored_bytes * n_turns, np.iinfo(np.int64).max)
        return ShardGroups(starts, stops, cuts, shards, np.array([stored_bytes], np.int64))

    def _range(self, draw: int) -> DrawRange:
        whole = self.part.whole()
        if whole is not None:
            return DrawRange(whole, 0, self.quota, self, is_whole=True)
        own_epoch, position = divmod(self.base + draw * self.step, self.length)
        window = self.part.window(own_epoch, self.stream, position)
        start, stop = self._draws_before(own_epoch * self.length + np.array([window.start, window.stop])).tolist()
        return DrawRange(window, start, stop, self, is_whole=False)

    def _draws_before(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.clip(-((self.base - numbers) // self.step), 0, self.quota)


@dataclass(frozen=True, slots=True, eq=False)
class DrawRange:
    """Draws [start, stop) of one stream from one part that are served from one window, with joined shard numbers.

    If the window is the whole part, its blocks stay the same, and each part epoch has its own key: a part of a few
    records that is repeated often does not end a section with each repetition.
    """

    window: Window
    start: int
    stop: int
    part_draws: PartDraws
    is_whole: bool

    def rows(self, draw: int, n: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the block (an index into the window's blocks) and the row in it of n draws, n > 0, from a draw on."""
        part_draws, length = self.part_draws, self.part_draws.length
        block, row = allocate_rows(n), allocate_rows(n)
        done = 0
        while done < n:  # once, unless the window is whole
            own_epoch, position = divmod(part_draws.base + (draw + done) * part_draws.step, length)
            here = min(-((position - length) // part_draws.step), n - done)
            span = (here - 1) * part_draws.step + 1
            if self.is_whole:
                blocks, rows = np.empty(span, np.uint32), np.empty(span, np.uint32)
                RowFinder(self.window.first, part_draws.part.key(own_epoch)).find(position, blocks, rows)
            else:
                first = position - self.window.start
                blocks, rows = self.window.rows(first, first + span)
            block[done : done + here], row[done : done + here] = blocks[:: part_draws.step], rows[:: part_draws.step]
            done += here
        return block, row


def part_options(
    options: OrderOptions, weights: Sequence[int], shards: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> list[OrderOptions]:
    """Return the options of each part: its own seed, and a share of the sizes by the stored bytes that it contributes.

    The sizes therefore hold for the mixture as a whole. A part gets at least half of an equal share: otherwise a part
    of 1 % would be mixed over windows of a hundredth of the size.
    """
    amounts = [
        Fraction(weight * max(int(stored_bytes.sum()), 1), int(records.sum()))
        for weight, (records, stored_bytes) in zip(weights, shards, strict=True)
    ]
    total = sum(amounts)
    least = Fraction(1, 2 * len(amounts))

    def scaled(size: int | None, share: Fraction) -> int | None:
        return None if size is None else max(int(size * max(share, least)), 1)

    return [
        replace(
            options,
            seed=int.from_bytes(derive_key(options.seed, "part", number)),
            group_bytes=scaled(options.group_bytes, amount / total),
            window_bytes=scaled(options.window_bytes, amount / total),
        )
        for number, amount in enumerate(amounts)
    ]


def exact_weight(weight: Real | Fraction | float, *, may_be_zero: bool = False) -> Fraction:
    """Return a weight as the fraction that was written: 0.7 is 7/10, not the nearest binary number."""
    if isinstance(weight, bool | np.bool_) or not isinstance(weight, Real):
        raise TypeError(f"a weight must be a number above 0, got {weight!r}")
    if not isinstance(weight, Rational) and not math.isfinite(weight):
        raise ValueError(f"a weight must be a number above 0, got {weight!r}")
    exact = Fraction(weight) if isinstance(weight, Rational) else Fraction(str(weight))
    if exact < 0 or (exact == 0 and not may_be_zero):
        raise ValueError(f"a weight must be a number above 0, got {weight!r}; leave out a part of weight 0")
    return exact


# Weights from each position of an epoch on: (position, weight of each part), beginning with position 0.
Schedule: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class MixtureSpec:
    """How the parts of a mixture are mixed. Plain JSON-able values: equal specs of equal parts are equal mixtures.

    Weights may be any positive real numbers, or a schedule of them in which a part may have weight 0 for some time. A
    float stands for its decimal digits (0.7 is 7/10); they are stored as the smallest integers of the same ratio. An
    epoch ends before any part would repeat a record ("first"), or when every part has been served completely ("all").
    """

    first_shards: tuple[int, ...]  # of each part, in the joined numbering
    weights: tuple[int, ...] | Schedule
    stop: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        if self.stop not in ("first", "all"):
            raise ValueError(f"stop must be 'first' or 'all', got {self.stop!r}")
        if self.first_shards[0] != 0 or any(np.diff(self.first_shards) < 0):
            raise ValueError(f"first_shards must rise from 0, got {self.first_shards}")
        object.__setattr__(self, "first_shards", tuple(int(shard) for shard in self.first_shards))
        object.__setattr__(self, "weights", _checked(self.weights, len(self.first_shards)))

    @property
    def schedule(self) -> Schedule:
        return _schedule(self.weights)

    @property
    def n_parts(self) -> int:
        return len(self.first_shards)

    def shards_of(self, part: int, n_shards: int) -> slice:
        ends = (*self.first_shards[1:], n_shards)
        return slice(self.first_shards[part], ends[part])

    def part_records(self, shard_records: NDArray[np.int64]) -> tuple[int, ...]:
        found = tuple(
            int(shard_records[self.shards_of(part, len(shard_records))].sum()) for part in range(self.n_parts)
        )
        if 0 in found:
            raise ValueError(f"part {found.index(0)} of the mixture has no records; leave it out")
        return found

    def epoch_records(self, part_records: Sequence[int]) -> int:
        """Return the number of records of an epoch, which is len() of the mixture, whatever the streams and ranks.

        For "first" it is the largest number that repeats no record; for "all" the smallest that serves each part
        completely; if the weights change, both within a few records of a part. Raises ValueError if stop is "all", and
        a part has weight 0 from some position on and records left there.
        """
        return sum(self.epoch_shares(part_records))

    def epoch_shares(self, part_records: Sequence[int]) -> tuple[int, ...]:
        return self.allocation(part_records, 1).totals

    def allocation(self, part_records: Sequence[int], n_streams: int) -> StreamAllocation:
        """Return the allocation of an epoch's records to streams. Raises as epoch_records."""
        *changes, totals = _shares_before_changes(self.schedule, self.stop, tuple(part_records))
        return StreamAllocation(totals, n_streams, tuple(changes))


def _schedule(weights: Sequence[Any]) -> Schedule:
    return tuple(weights) if isinstance(weights[0], Sequence) else ((0, tuple(weights)),)


def _checked(weights: Sequence[Any], n_parts: int) -> tuple[int, ...] | Schedule:
    """Return the weights as the smallest integers; a schedule only if they change. Raises TypeError, ValueError."""
    if weights and isinstance(weights[0], Sequence) and not isinstance(weights[0], str):
        return _checked_schedule(weights, n_parts)
    if len(weights) != n_parts or not weights:
        raise ValueError(f"{n_parts} parts need one weight each, got {len(weights)} weights")
    return _reduced([exact_weight(weight) for weight in weights])


def _checked_schedule(weights: Sequence[Any], n_parts: int) -> tuple[int, ...] | Schedule:
    found: list[tuple[int, tuple[int, ...]]] = []
    for entry in weights:
        if not isinstance(entry, Sequence) or len(entry) != 2:
            raise ValueError(f"weights that change are a list of (position, weights), got the entry {entry!r}")
        position, of_parts = entry
        if isinstance(position, bool) or not isinstance(position, int | np.integer) or position < 0:
            raise ValueError(f"weights change at a position of the epoch, an integer of 0 or more, got {position!r}")
        if not isinstance(of_parts, Sequence):
            raise ValueError(f"weights that change are a list of (position, weights), got the entry {entry!r}")
        if len(of_parts) != n_parts:
            raise ValueError(
                f"{n_parts} parts need one weight each, got {len(of_parts)} weights from position {position} on"
            )
        if not found and position != 0:
            raise ValueError(f"the first weights hold from position 0 on, got position {position}")
        if found and position <= found[-1][0]:
            raise ValueError(f"the positions of weights must rise, got {position} after {found[-1][0]}")
        exact = [exact_weight(weight, may_be_zero=True) for weight in of_parts]
        if not any(exact):
            raise ValueError(f"all weights are 0 from position {position} on")
        found.append((int(position), _reduced(exact)))
    for part in range(n_parts):
        if not any(of_parts[part] for _, of_parts in found):
            raise ValueError(f"part {part} has weight 0 throughout; leave it out")
    changing = found[:1] + [after for before, after in pairwise(found) if after[1] != before[1]]
    return tuple(changing) if len(changing) > 1 else changing[0][1]


def _reduced(exact: Sequence[Fraction]) -> tuple[int, ...]:
    denominator = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*whole)
    return tuple(weight // divisor for weight in whole)


@lru_cache(maxsize=64)  # an epoch asks for it several times, and many changes take some ms
def _shares_before_changes(
    schedule: Schedule, stop: Literal["first", "all"], part_records: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return the number of records of each part before each change within the epoch, and in the epoch."""
    limits, sign = list(part_records), 1 if stop == "first" else -1
    while True:
        found = _rounded_shares(schedule, _epoch_end(schedule, stop, limits))
        # A share is rounded, by more than one record if the part paused: then aim at some records less, or more.
        excess = [sign * (share - n) for share, n in zip(found[-1], part_records, strict=True)]
        if max(excess) <= 0:
            return found
        limits = [limit - sign * max(n, 0) for limit, n in zip(limits, excess, strict=True)]


def _epoch_end(schedule: Schedule, stop: Literal["first", "all"], limits: Sequence[int]) -> int:
    """Return the last position where no exact share exceeds its limit ("first"), or the first where all reach it."""
    starts = [start for start, _ in schedule]
    found = []
    for part, limit in enumerate(limits):
        served, end = Fraction(0), None
        for (start, weights), stop_at in zip(schedule, [*starts[1:], None], strict=True):
            share = Fraction(weights[part], sum(weights))
            n_left = None if not share else (limit - served) / share
            if n_left is not None and (stop_at is None or start + n_left < stop_at):
                end = start + (math.floor(n_left) if stop == "first" else math.ceil(n_left))
                break
            served += 0 if stop_at is None else (stop_at - start) * share
        if end is not None:
            found.append(max(end, 0))
        elif stop == "all" and served < limit:
            last = next(start for start, weights in reversed(schedule) if weights[part])
            after = next(start for start in starts if start > last)
            raise ValueError(
                f"part {part} has weight 0 from position {after} on, where {limit - math.floor(served)} of its records "
                "have not been served: an epoch cannot end when all are; give stop='first', or a weight at the end"
            )
    return min(found) if stop == "first" else max(found)


def _rounded_shares(schedule: Schedule, n_records: int) -> tuple[tuple[int, ...], ...]:
    """Return the number of records of each part before each change, as far as it is in the epoch, and in the epoch."""
    exact, shares, found = [Fraction(0)] * len(schedule[0][1]), (0,) * len(schedule[0][1]), []
    for (start, weights), stop in zip(schedule, [*(start for start, _ in schedule[1:]), n_records], strict=True):
        n = min(stop, n_records) - start
        if n <= 0:
            break
        owed = [due - share for due, share in zip(exact, shares, strict=True)]
        more = apportion(n, weights, owed)
        shares = tuple(share + n_more for share, n_more in zip(shares, more, strict=True))
        exact = [due + n * Fraction(weight, sum(weights)) for due, weight in zip(exact, weights, strict=True)]
        found.append(shares)
    return tuple(found) or (shares,)


@dataclass(frozen=True, slots=True)
class MixtureChange:
    """A change of the weights of a run: `weights` held until the run had served `offset` records of `epoch`."""

    epoch: int
    offset: int
    weights: tuple[int, ...] | Schedule


@dataclass(frozen=True, slots=True)
class _Segment:
    """Positions of an epoch from start on, until the next segment, with an allocation of their own.

    The allocation deals the positions from start on: position start + i belongs to its stream i % n_streams. bases and
    taken are by part and by the turn of a stream in its rotation: the number of the next record in the part's sequence,
    and the number of records that were taken in this epoch before start.
    """

    start: int
    allocation: StreamAllocation
    bases: tuple[tuple[int, ...], ...]
    taken: tuple[tuple[int, ...], ...]

    def after(self, n_positions: int, steps: Sequence[int]) -> tuple[_Counts, _Counts]:
        """Return bases and taken after so many positions of the segment. steps: Distance of two draws, by part."""
        n_streams, bases, taken = self.allocation.n_streams, [*map(list, self.bases)], [*map(list, self.taken)]
        for stream in range(n_streams):
            drawn = interleave(self.allocation, stream).drawn(stream_records(n_positions, n_streams, stream))
            for part, (turned, n) in enumerate(zip(self.allocation.turns(stream), drawn, strict=True)):
                bases[part][turned] += n * steps[part]
                taken[part][turned] += n
        return tuple(map(tuple, bases)), tuple(map(tuple, taken))


_Counts: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Run:
    """The weights of a run, and where they changed. A part that has streams of its own is drawn from with step 1.

    A change cuts its epoch: what was served before it stays, and each stream of a part goes on with its next record
    after it. Which streams a part has does not change during a run.
    """

    schedules: tuple[Schedule, ...]  # one more than cuts
    cuts: tuple[tuple[int, int], ...]  # epoch and offset of each change
    stop: Literal["first", "all"]
    part_records: tuple[int, ...]
    steps: tuple[int, ...]  # of each part: 1, or n_streams
    n_streams: int

    def segments(self, epoch: int, n_changes: int) -> tuple[_Segment, ...]:
        """Return the segments of an epoch after the first n_changes changes."""
        none = tuple((0,) * self.n_streams for _ in self.part_records)
        cut_epoch, offset = self.cuts[n_changes - 1] if n_changes else (-1, 0)
        if epoch < cut_epoch:
            return _segments(self, epoch, n_changes - 1)
        if epoch == cut_epoch:
            before = _segments(self, epoch, n_changes - 1)
            kept = tuple(segment for segment in before if segment.start < offset)
            last = (kept or before)[-1 if kept else 0]
            bases, taken = last.after(offset - last.start, self.steps)
            return (*kept, _Segment(offset, self._rest(n_changes, offset, taken), bases, taken))
        allocation = self._allocation(self.schedules[n_changes], self.part_records)
        quotas = [
            [stream_records(total, self.n_streams, turned) for turned in range(self.n_streams)]
            for total in allocation.totals
        ]
        if not n_changes:
            bases = tuple(
                tuple(epoch * n for n in of_part)
                if step == 1
                else tuple(epoch * total + turned for turned in range(self.n_streams))
                for step, of_part, total in zip(self.steps, quotas, allocation.totals, strict=True)
            )
            return (_Segment(0, allocation, bases, none),)
        last = _segments(self, cut_epoch, n_changes)[-1]
        ends, _ = last.after(sum(last.allocation.totals), self.steps)
        n_epochs = epoch - cut_epoch - 1
        bases = tuple(
            tuple(end + n_epochs * n * step for end, n in zip(of_part, counts, strict=True))
            for step, of_part, counts in zip(self.steps, ends, quotas, strict=True)
        )
        return (_Segment(0, allocation, bases, none),)

    def _rest(self, n_changes: int, offset: int, taken: _Counts) -> StreamAllocation:
        """Return the allocation of an epoch's positions from offset on, before which `taken` was served.

        With "first" no stream of a part repeats a record of the epoch; with "all" each one comes to its end.
        """
        schedule = self.schedules[n_changes]
        begin = bisect_right([start for start, _ in schedule], offset) - 1
        rest = tuple((max(start - offset, 0), weights) for start, weights in schedule[begin:])
        limits = []
        for part, (n_records, of_part) in enumerate(zip(self.part_records, taken, strict=True)):
            left = [stream_records(n_records, self.n_streams, turned) - n for turned, n in enumerate(of_part)]
            if self.stop == "first":
                limits.append(max(0, min(turned + n * self.n_streams for turned, n in enumerate(left))))
            else:
                is_served = any(weights[part] for _, weights in rest)
                ends = [turned + 1 + (n - 1) * self.n_streams for turned, n in enumerate(left) if n > 0]
                limits.append(max(ends, default=0) if is_served else 0)
        return self._allocation(rest, tuple(limits))

    def _allocation(self, schedule: Schedule, limits: tuple[int, ...]) -> StreamAllocation:
        *changes, totals = _shares_before_changes(schedule, self.stop, limits)
        return StreamAllocation(totals, self.n_streams, tuple(changes))


@lru_cache(maxsize=16)  # a reading plan asks for many epochs after the same changes
def _segments(run: _Run, epoch: int, n_changes: int) -> tuple[_Segment, ...]:
    return run.segments(epoch, n_changes)


class StoredMixture:
    """Mixture without shuffle, by record number: each part in stored order, again from its start after its end."""

    def __init__(self, spec: MixtureSpec, part_records: Sequence[int]) -> None:
        self._sizes = np.array(part_records, np.int64)
        self._shares = interleave(spec.allocation(part_records, 1), 0)

    def __len__(self) -> int:
        return self._shares.n_records

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        numbers = np.asarray(numbers, np.int64)
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self):
            outside = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise IndexError(f"record {outside} of a mixture of {len(self)} records")
        part, draw = self._shares.locate(numbers)
        return part, draw % self._sizes[part]


@dataclass(frozen=True, slots=True, eq=False)
class MixtureSection:
    """Section of a mixture's stream: positions [start, stop) over which no part's window changes. Immutable.

    first is the position of the stream at which the interleaving begins, 0 unless the run's weights were changed.

    windows are in the order of the parts: one for each part that the section draws from, or that both earlier and later
    sections draw from. A window is the same object in all sections that use it. Its shards have joined numbers; its
    stream, start and stop are those of the part.
    """

    start: int
    stop: int
    windows: tuple[Window, ...]
    _shares: Interleaving = field(repr=False)
    _runs: dict[int, DrawRange] = field(repr=False)  # by part, in the order of windows
    first: int = 0

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        if not 0 <= lo <= hi <= self.stop - self.start:
            raise ValueError(f"positions [{lo}, {hi}) are outside a section of {self.stop - self.start} positions")
        block, row = allocate_rows(hi - lo), allocate_rows(hi - lo)
        begin = self.start - self.first
        drawn = self._shares.drawn(begin + lo)
        places = self._shares.offsets_by_part(begin + lo, begin + hi)
        n_blocks = 0
        for part, run in self._runs.items():
            where = places[part]
            if len(where):
                blocks, rows = run.rows(drawn[part], len(where))
                block[where] = blocks + np.uint32(n_blocks)
                row[where] = rows
            n_blocks += len(run.window.blocks)
        return block, row


@dataclass(slots=True)
class _Stream:
    shares: Interleaving
    all_draws: list[PartDraws]
    first: int  # positions [first, stop) of the stream
    stop: int
    section: MixtureSection | None = None


class MixtureOrder:
    """Order of one epoch of a mixture: the orders of the parts, interleaved in exact shares.

    Stream s of the mixture consists of one stream of each part. A part's records continue endlessly: a part that is
    larger than its share of an epoch continues in the next epoch where it stopped; a smaller one starts its next part
    epoch, in another order. There are no counters: epoch and position alone determine the record. Without shuffle every
    epoch is the same: parts are in stored order, and position p is record p of the mixture.

    In any range of an epoch's positions, the number of records of each part differs from its exact share by less than 5
    with one stream, and by at most 5 + 2 sqrt(S) with S streams (measured: 24 with 256); over the whole epoch by less
    than 1.

    A change of the run's weights, when it was resumed, begins a new segment of the epoch: the records before the change
    are those that the earlier weights gave, and each stream of a part goes on with its next record.

    It is immutable except for the last windows, which are cached as in `EpochOrder`; threads may share it.
    """

    def __init__(
        self,
        sizes: DatasetSizes,
        spec: MixtureSpec,
        options: OrderOptions,
        epoch: int,
        changes: Sequence[MixtureChange] = (),
    ) -> None:
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self.sizes = sizes
        self.spec = spec
        self.options = options
        self.epoch = epoch
        self._n_streams = options.streams if options.shuffle else 1
        part_records = spec.part_records(sizes.records)
        # The first weights of the run decide the windows and the streams of the parts for the whole run.
        first = replace(spec, weights=changes[0].weights) if changes else spec
        origin = first.allocation(part_records, self._n_streams)
        shards = [spec.shards_of(part, len(sizes.records)) for part in range(spec.n_parts)]
        weights = origin.totals if origin.changes else first.schedule[0][1]
        options_of_parts = part_options(options, weights, [(sizes.records[s], sizes.stored_bytes[s]) for s in shards])
        self._parts = [
            MixturePart(sizes, *of_part) for of_part in zip(shards, options_of_parts, origin.totals, strict=True)
        ]
        in_force = [*(replace(spec, weights=change.weights).schedule for change in changes), spec.schedule]
        begin, end = 0, sum(change.epoch <= epoch for change in changes)
        if not options.shuffle:  # every epoch is the same, but for the one that a change cuts
            begin = sum(change.epoch < epoch for change in changes)
            epoch = 0
        cuts = tuple((min(change.epoch, epoch), change.offset) for change in changes[begin:end])
        steps = tuple(1 if part.n_streams == self._n_streams else self._n_streams for part in self._parts)
        run = _Run(tuple(in_force[begin : end + 1]), cuts, spec.stop, part_records, steps, self._n_streams)
        self._segments = _segments(run, epoch, len(cuts))
        self._streams: dict[tuple[int, int], _Stream] = {}

    @property
    def n_records(self) -> int:
        """Number of records of the epoch; a record that occurs several times counts each time."""
        last = self._segments[-1]
        return last.start + sum(last.allocation.totals)

    @property
    def n_streams(self) -> int:
        return self._n_streams

    def stream_records(self, stream: int) -> int:
        if not 0 <= stream < self.n_streams:
            raise ValueError(f"there is no stream {stream}: the order has {self.n_streams}")
        return stream_records(self.n_records, self.n_streams, stream)

    def section_at(self, stream: int, position: int) -> MixtureSection:
        """Return the section that holds a position of a stream. It ends where the first of the parts' windows ends."""
        n_records = self.stream_records(stream)
        if not 0 <= position < n_records:
            raise ValueError(f"position {position} is outside stream {stream} of {n_records} records")
        kept = self._keep(stream, position)
        last = kept.section
        if last is not None and last.start <= position < last.stop:
            return last
        shares, start, stop, runs = kept.shares, 0, kept.stop - kept.first, {}
        for part, draw in enumerate(shares.drawn(position - kept.first)):
            if draw < shares.quotas[part]:
                runs[part] = run = kept.all_draws[part].range_at(draw)
                stop = min(stop, int(shares.positions_of(part, np.array([run.stop - 1]))[0]) + 1)
                draw = run.start
            if draw > 0:
                start = max(start, int(shares.positions_of(part, np.array([draw - 1]))[0]) + 1)
        drawn = shares.drawn(stop)
        runs = {
            part: run for part, run in runs.items() if run.start < drawn[part]
        }  # drop the draw ranges that start after the section
        windows = tuple(run.window for run in runs.values())
        kept.section = found = MixtureSection(kept.first + start, kept.first + stop, windows, shares, runs, kept.first)
        return found

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """See Order.shards_ahead. Shards have joined numbers.

        The parts alternate by their shares, so the reading order is approximate.
        """
        n_records = self.stream_records(stream)
        if not 0 <= position <= n_records:
            raise ValueError(f"position {position} is outside stream {stream} of {n_records} records")
        kept = self._keep(stream, position)
        lists = [
            part_draws.shards_ahead(draw, n_bytes)
            for part_draws, draw in zip(kept.all_draws, kept.shares.drawn(position - kept.first), strict=True)
        ]
        # The parts' lists are read in parallel, each to its end: merge them by relative position.
        when = np.concatenate([(np.arange(len(shards)) + 0.5) / max(len(shards), 1) for shards in lists])
        return np.concatenate(lists)[np.argsort(when, kind="stable")]

    def groups(self, stream: int) -> ShardGroups:
        """See Order.groups. The groups of each part follow those of the part before.

        If the weights were changed within this epoch, they are those after the change.
        """
        kept = self._keep(stream, self.stream_records(stream))
        found = []
        for part, part_draws in enumerate(kept.all_draws):
            of_part = part_draws.groups()
            ends = [kept.shares.positions_of(part, draws) for draws in (of_part.starts, of_part.stops - 1)]
            found.append(replace(of_part, starts=ends[0] + kept.first, stops=ends[1] + 1 + kept.first))
        return concat_groups(found)

    def _keep(self, stream: int, position: int = 0) -> _Stream:
        """Return a stream from the last change of the run's weights before a position to the next one."""
        number = bisect_right([one.start for one in self._segments], position * self.n_streams + stream) - 1
        kept = self._streams.get((stream, number))
        if kept is None:
            segment, n_streams = self._segments[number], self.n_streams
            is_last = number + 1 == len(self._segments)
            end = self.n_records if is_last else self._segments[number + 1].start
            own = (stream - segment.start) % n_streams  # number of the stream among those of the segment
            shares, turns = interleave(segment.allocation, own), segment.allocation.turns(own)
            of_parts = zip(self._parts, turns, shares.quotas, segment.bases, strict=True)
            all_draws = [
                PartDraws.of(part, n_streams, turned, quota, bases[turned]) for part, turned, quota, bases in of_parts
            ]
            first, stop = (stream_records(n, n_streams, stream) for n in (segment.start, end))
            kept = self._streams[stream, number] = _Stream(shares, all_draws, first, stop)
        return kept
