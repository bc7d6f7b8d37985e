"""Interleaving of a mixture's parts in exact shares: which part serves which position of a stream, and back.

Shares are exact by integer arithmetic, without counters.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


# Each stream starts each split at its own phase; otherwise all streams take the same part at once (256 streams deviated
# by 400 records together, with these phases by 24). The phases are radical inverses in these bases, by depth: splits
# below each other need phases that are not correlated (the golden ratio for all of them: deviation 200).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19)

MAX_RECORDS = 1 << 42  # per stream: 2**20 positions times this fit 63 bits
_CHUNK_PLACES = 1 << 20


def apportion(n: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Return the shares of n records by weights, by the largest-remainder method; the shares add up to n.

    Every share is its exact value rounded down or up. Therefore a part of n_k records gets at most n_k if n <= n_k /
    share, and at least n_k if n >= n_k / share.
    """
    total = sum(weights)
    shares = [n * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda part: (-(n * weights[part] % total), part))
    for part in by_remainder[: n - sum(shares)]:
        shares[part] += 1
    return tuple(shares)


def apportion_next(n: int, weights: Sequence[int], owed: Sequence[Fraction]) -> tuple[int, ...]:
    """Return the shares of the next n records by weights, after shares that were rounded; they add up to n.

    Args:
        n: Number of records.
        weights: Weight of each part; a part of weight 0 gets no record.
        owed: Records that each part was given too few before, below 0 if too many; they add up to 0. The parts make up
            for them if n is large enough.
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

    Attributes:
        totals: Number of records of each part in the epoch.
        n_streams: Number of streams.
        changes: Number of records of each part before each change of the weights, in the order of the epoch; () if the
            weights do not change.
    """

    totals: tuple[int, ...]
    n_streams: int
    changes: tuple[tuple[int, ...], ...] = ()

    def turns(self, stream: int) -> tuple[int, ...]:
        """Return the stream's number in each part's rotation; number 0 is the first to get an extra record."""
        return self._turns(stream, self.totals)

    def quotas(self, stream: int) -> tuple[int, ...]:
        """Return the number of records that a stream takes of each part; their sum is ceil((n - stream) / S)."""
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
    """Return the part that deviates most, among the preferred ones if there are any."""
    parts = [part for part in deviations if part in preferred] or list(deviations)
    return max(parts, key=deviations.__getitem__)


def stream_records(n_records: int, n_streams: int, stream: int) -> int:
    """Return the number of records of one stream: ceil((n_records - stream) / n_streams)."""
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
        """Return how many of the first `items` items go left; n_left for all items."""
        return (items * self.n_left + self.phase) // self.n_items if self.n_items else 0

    def item_of(self, child: int, number: Any) -> Any:
        """Return the index of the item that is the child's item of a number: an integer, or an array of integers."""
        if child == self.left:
            return -((self.phase - (number + 1) * self.n_items) // self.n_left) - 1
        return (number * self.n_items + self.phase) // (self.n_items - self.n_left)


class Interleaving(Protocol):
    """One stream of an epoch as a function from position to part and draw number, and back.

    Attributes:
        quotas: Number of records of each part.
        n_records: Number of records of all parts.
    """

    quotas: tuple[int, ...]
    n_records: int

    def drawn(self, position: int) -> list[int]:
        """Return the number of records of each part among the first `position` positions."""

    def positions_of(self, part: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of a part's draws, int64[n]; draws count from 0 and are fewer than the part's quota."""

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the part and the draw number of any positions, int64[n] each."""

    def offsets_by_part(self, start: int, stop: int) -> list[NDArray[np.int64]]:
        """Return where each part's draws are among positions [start, stop).

        The first of them is the part's draw drawn(start)[part]; the others follow it.

        Returns:
            For each part ascending int64[m], counted from start.
        """


def interleave(allocation: StreamAllocation, stream: int) -> Interleaving:
    """Return the interleaving of one stream. Raises ValueError if the stream has more than MAX_RECORDS records."""
    if allocation.changes:
        return ScheduledInterleaving(allocation, stream)
    return StreamInterleaving(allocation.totals, allocation.quotas(stream), stream)


class StreamInterleaving:
    """Interleaving with the same shares throughout, in O(parts).

    The parts are the leaves of a binary tree that joins the two smallest nodes first (Huffman's tree). Of its first q
    items a split sends floor((q * n_left + phase) / n_items) left, so each split deviates by less than one record, of
    which a part deeper in the tree gets its share. In any range of the stream a part deviates from its quota's share by
    less than 4 records, however many parts there are, since only the last split of a path gives one side more than two
    thirds.

    Immutable; threads may share it.

    Args:
        totals: Number of records of each part in all streams; they decide the tree.
        quotas: Number of records of each part in this stream.
        stream: Number of the stream.
    """

    def __init__(self, totals: Sequence[int], quotas: tuple[int, ...], stream: int) -> None:
        self.quotas = quotas
        self.n_records = sum(self.quotas)
        if self.n_records > MAX_RECORDS:
            raise ValueError(f"a stream of a mixture has at most {MAX_RECORDS} records, got {self.n_records}")
        self._splits = _tree(totals, self.quotas, stream)
        self._above = {child: split for split in self._splits for child in (split.left, split.right)}

    def drawn(self, position: int) -> list[int]:
        items = [0] * (2 * len(self.quotas) - 1)
        items[-1] = position
        for split in self._splits:
            items[split.left] = split.left_before(items[split.node])
            items[split.right] = items[split.node] - items[split.left]
        return items[: len(self.quotas)]

    def positions_of(self, part: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
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
    """Interleaving whose shares change: one StreamInterleaving for each stretch between two changes.

    Immutable; threads may share it.
    """

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
        """Return the number of the stretch that holds a position; of the last one for the end."""
        return min(bisect_right(self._starts, position), len(self._stretches)) - 1


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
