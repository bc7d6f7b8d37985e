"""A mixture in its plainest form, as brute.py is of one data set: lists of records, one rule after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice, product
from typing import Any, Literal
from unittest import mock

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from tests.support.order_oracle import Record, Shards, options, shards, shuffled, stream_windows

from tiercache.order import mixture as part_module
from tiercache.order.epoch_order import derive_key
from tiercache.order.mixture import MixtureChange, MixtureOrder, MixtureSpec
from tiercache.order.window import OrderOptions

_BASES = (2, 3, 5, 7, 11, 13, 17, 19)


@dataclass(frozen=True)
class Mixed:
    """Parts, each with some records, and how they are mixed. own_stream: as part.OWN_STREAM_RECORDS."""

    parts: tuple[Shards, ...]
    weights: tuple[int, ...]
    stop: Literal["first", "all"]
    how: OrderOptions
    own_stream: int

    @property
    def joined(self) -> Shards:
        return Shards([s for part in self.parts for s in part.blocks], [b for p in self.parts for b in p.stored_bytes])

    @property
    def spec(self) -> MixtureSpec:
        first = np.cumsum([0, *(len(part.blocks) for part in self.parts[:-1])]).tolist()
        return MixtureSpec(tuple(first), self.weights, self.stop)

    @property
    def shares(self) -> tuple[int, ...]:
        """Records of each part in an epoch."""
        return self.spec.epoch_shares([part.n_records for part in self.parts])

    @property
    def n_streams(self) -> int:
        return self.how.streams if self.how.shuffle else 1

    def order(self, epoch: int, weights: Any = None, changes: tuple[MixtureChange, ...] = ()) -> MixtureOrder:
        """The order of an epoch; weights: those that hold after changes."""
        spec = self.spec if weights is None else replace(self.spec, weights=weights)
        with mock.patch.object(part_module, "OWN_STREAM_RECORDS", self.own_stream):
            return MixtureOrder(self.joined.dataset_sizes, spec, self.how, epoch, changes)

    def part_of(self, record: Record) -> int:
        return int(np.searchsorted(self.spec.first_shards, record[0], side="right")) - 1

    def own_options(self) -> list[OrderOptions]:
        """Of each part; with one stream if it has none of its own."""
        of_parts = [part.dataset_sizes for part in self.parts]
        sizes = [(part.records, part.stored_bytes) for part in of_parts]
        found = part_module.part_options(self.how, self.spec.weights, sizes)
        has_streams = [
            min(part.n_records, share) >= self.own_stream * self.n_streams
            for part, share in zip(self.parts, self.shares, strict=True)
        ]
        return [how if has else replace(how, streams=1) for how, has in zip(found, has_streams, strict=True)]


@st.composite
def mixtures(draw: st.DrawFn) -> Mixed:
    parts = draw(st.lists(shards(max_shards=4).filter(lambda data: data.n_records > 0), min_size=1, max_size=4))
    weights = draw(st.lists(st.sampled_from([1, 2, 3, 5, 12]), min_size=len(parts), max_size=len(parts)))
    stop = draw(st.sampled_from(["first", "all"]))
    mixed = Mixed(tuple(parts), tuple(weights), stop, draw(options(max_streams=5)), draw(st.sampled_from([1, 4, 1024])))
    assume(sum(mixed.shares) <= 1000)
    return mixed


def interleaved(totals: tuple[int, ...], quotas: list[int], stream: int) -> list[int]:
    """The part of each position of a stream: the smallest two are joined first, and split last."""
    waiting: list[tuple[int, int, object]] = [(total, part, part) for part, total in enumerate(totals)]
    for number in count(len(totals)):
        if len(waiting) == 1:
            break
        (small, _, right), (large, _, left), *waiting = sorted(waiting, key=lambda node: node[:2])
        waiting.append((small + large, number, (left, right)))

    def turns(node: object, depth: int) -> list[int]:
        if isinstance(node, int):
            return [node] * quotas[node]
        left, right = (turns(child, depth + 1) for child in node)  # type: ignore[attr-defined]
        n = len(left) + len(right)
        phase = int(n * _mirrored(stream, _BASES[depth % len(_BASES)]))
        goes_left = [((i + 1) * len(left) + phase) // n > (i * len(left) + phase) // n for i in range(n)]
        sides = iter(right), iter(left)
        return [next(sides[goes]) for goes in goes_left]

    return turns(waiting[0][2], 0)


def _mirrored(number: int, base: int) -> float:
    place, found = 1.0, 0.0
    while number:
        number, digit = divmod(number, base)
        place /= base
        found += digit * place
    return found + 1e-12  # 5 * (1 / 5) is below 1


def own_records(part: Shards, how: OrderOptions, stream: int) -> Iterator[list[Record]]:
    """A part's stream, own epoch after own epoch."""
    first = stream_windows(part, how, 0, stream)
    is_whole = len(first) == 1 and (how.streams == 1 or not how.shuffle)
    for own_epoch in count():
        if is_whole and how.shuffle:
            blocks = list(dict.fromkeys(part_blocks(part, how)))
            records = [(*block, row) for block in blocks for row in range(part.blocks[block[0]][block[1]][0])]
            yield shuffled(records, derive_key(how.seed, "whole", own_epoch))
        else:
            yield [record for _, records in stream_windows(part, how, own_epoch, stream) for record in records]


def part_blocks(part: Shards, how: OrderOptions) -> list[tuple[int, int]]:
    """Blocks of a part of one window, in the order of own epoch 0: shards by key, then blocks by key."""
    members = [shard for shard, blocks in enumerate(part.blocks) if any(r for r, _ in blocks)]
    members = shuffled(members, derive_key(how.seed, "shards", 0, 0))
    blocks = [(shard, b) for shard in members for b, (records, _) in enumerate(part.blocks[shard]) if records]
    return shuffled(blocks, derive_key(how.seed, "blocks", 0, 0, 0))


def mixed_streams(data: Mixed, epoch: int) -> list[list[Record]]:
    """Each stream's records, by the shards' numbers of all parts joined."""
    if not data.how.shuffle:
        epoch = 0
    n_streams, shares = data.n_streams, data.shares
    # The records of an epoch, part after part, are dealt to the streams like cards.
    starts = np.cumsum([0, *shares]).tolist()
    found = []
    for stream in range(n_streams):
        cards = range(stream, starts[-1], n_streams)
        quotas = [sum(first <= card < first + n for card in cards) for first, n in zip(starts, shares, strict=False)]
        drawn = []
        for number, (part, how) in enumerate(zip(data.parts, data.own_options(), strict=True)):
            turned = (stream - starts[number]) % n_streams
            if how.streams == n_streams or not how.shuffle:
                own, wanted = turned, [epoch * quotas[number] + d for d in range(quotas[number])]
            else:
                own, wanted = 0, [epoch * shares[number] + turned + d * n_streams for d in range(quotas[number])]
            drawn.append(_numbered(part, how, own, wanted, data.spec.first_shards[number]))
        turns = interleaved(shares, quotas, stream)
        found.append([next(drawn[part]) for part in turns])
    return found


def _numbered(part: Shards, how: OrderOptions, stream: int, numbers: list[int], first_shard: int) -> Iterator[Record]:
    """Records of a part's stream by their numbers, which rise."""
    start = 0
    wanted = iter([*numbers, -1])
    number = next(wanted)
    for records in own_records(part, how, stream):
        if number < 0:
            return
        while 0 <= number < start + len(records):
            shard, block, row = records[number - start]
            yield first_shard + shard, block, row
            number = next(wanted)
        start += len(records)


def mixed_sequence(data: Mixed, epoch: int) -> list[Record]:
    """The global sequence of an epoch."""
    streams = mixed_streams(data, epoch)
    return [streams[p % data.n_streams][p // data.n_streams] for p in range(sum(data.shares))]


def check_sequences(data: Mixed, segments: list[list[Record]]) -> None:
    """Check that every sequence of each part is served from its first record on, without a gap or a repetition.

    The sequences of a part are its streams, or, if it has none, every n-th of its records. Over a segment, which is an
    epoch or what changes of the weights cut it into, each stream of the mixture draws from one sequence of a part, and
    the next stream from the next one.
    """
    n = data.n_streams
    for number, (part, how) in enumerate(zip(data.parts, data.own_options(), strict=True)):
        drawn = [[[r for r in segment[s::n] if data.part_of(r) == number] for s in range(n)] for segment in segments]
        n_drawn = sum(len(records) for streams in drawn for records in streams)
        has_streams, first = how.streams == n, data.spec.first_shards[number]

        def sequence(start: int, part: Shards = part, how: OrderOptions = how) -> Iterator[list[Record]]:
            return chain.from_iterable(own_records(part, how, start))

        whole = [] if has_streams else list(islice(sequence(0), n_drawn * n))
        sequences = [list(islice(sequence(s), n_drawn)) if has_streams else whole[s::n] for s in range(n)]
        sequences = [[(first + shard, *row) for shard, *row in records] for records in sequences]
        # The same records may be next in several sequences: all ways in which they can have been served are followed.
        ways = {(0,) * n}
        for streams in drawn:
            found = set()
            for way, shift in product(ways, range(n)):
                turned = streams[shift:] + streams[:shift]
                ends = tuple(at + len(records) for at, records in zip(way, turned, strict=True))
                if all(s[at:end] == r for s, at, end, r in zip(sequences, way, ends, turned, strict=True)):
                    found.add(ends)
            assert found, f"part {number}: {streams} are not the next records of its sequences, {ways}"
            ways = found
