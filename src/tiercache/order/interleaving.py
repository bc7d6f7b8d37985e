"""Interleaving of a mixture's parts in exact shares: which part serves which position of a stream, and back.

Shares are exact by integer arithmetic, without counters.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

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


@dataclass(frozen=True, slots=True)
class StreamAllocation:
    """Allocation of an epoch's records to streams: a table whose sums are those of the parts and those of the streams.

    Stream s of the epoch holds ceil((n - s) / S) records. The records of a part beyond a multiple of S go to
    neighbouring streams, and those of the next part to the streams after them: therefore the streams' records of a part
    differ by at most one.
    """

    totals: tuple[int, ...]
    n_streams: int

    def turns(self, stream: int) -> tuple[int, ...]:
        """Return the stream's number in each part's rotation; number 0 is the first to get an extra record."""
        before = accumulate(self.totals[:-1], initial=0)
        return tuple((stream - n_records) % self.n_streams for n_records in before)

    def quotas(self, stream: int) -> tuple[int, ...]:
        """Return the number of records that a stream takes of each part; their sum is ceil((n - stream) / S)."""
        of_parts = zip(self.totals, self.turns(stream), strict=True)
        return tuple(stream_records(total, self.n_streams, turned) for total, turned in of_parts)


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


class StreamInterleaving:
    """One stream of an epoch as a function from position to part and draw number, and back, in O(parts).

    The parts are the leaves of a binary tree that joins the two smallest nodes first (Huffman's tree). Of its first q
    items a split sends floor((q * n_left + phase) / n_items) left, so each split deviates by less than one record, of
    which a part deeper in the tree gets its share. In any range of the stream a part deviates from its quota's share by
    less than 4 records, however many parts there are, since only the last split of a path gives one side more than two
    thirds.

    Immutable; threads may share it.
    """

    def __init__(self, allocation: StreamAllocation, stream: int) -> None:
        self.quotas = allocation.quotas(stream)
        self.n_records = sum(self.quotas)
        if self.n_records > MAX_RECORDS:
            raise ValueError(f"a stream of a mixture has at most {MAX_RECORDS} records, got {self.n_records}")
        self._splits = _tree(allocation.totals, self.quotas, stream)
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
        """Return the part and the draw number of any positions, int64[n] each."""
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
        """Return where each part's draws are among positions [start, stop).

        The first of them is the part's draw drawn(start)[part]; the others follow it.

        Returns:
            For each part ascending int64[m], counted from start.
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
