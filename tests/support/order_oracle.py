"""The order in its plainest form: lists of records, one rule after the other.

It shares the keys and the permutation with what it checks, which have tests of their own, and no other code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest

import numpy as np
from hypothesis import strategies as st

from tiercache._native.permute import permute_one
from tiercache.order.epoch_order import derive_key
from tiercache.order.window import BlockSizes, DatasetSizes, Order, OrderOptions, Window

Record = tuple[int, int, int]  # shard, block, row


@dataclass
class Shards:
    """Shards as lists of (records, raw bytes) of their blocks. footers: the shards whose blocks were asked for."""

    blocks: list[list[tuple[int, int]]]
    stored_bytes: list[int]
    footers: list[int] = field(default_factory=list)

    @property
    def dataset_sizes(self) -> DatasetSizes:
        records = np.array([sum(r for r, _ in shard) for shard in self.blocks], np.int64)
        return DatasetSizes(records, np.array(self.stored_bytes, np.int64), self._footers)

    @property
    def n_records(self) -> int:
        return sum(r for shard in self.blocks for r, _ in shard)

    def _footers(self, shards: list[int]) -> list[BlockSizes]:
        self.footers += shards
        tables = [np.array(self.blocks[shard], np.int64).reshape(-1, 2) for shard in shards]
        return [BlockSizes(table[:, 0], table[:, 1]) for table in tables]

    def all_records(self) -> list[Record]:
        """Every record in stored order."""
        return [record for shard in range(len(self.blocks)) for record in self.of_shard(shard)]

    def of_shard(self, shard: int) -> Iterator[Record]:
        return ((shard, b, row) for b, (records, _) in enumerate(self.blocks[shard]) for row in range(records))


def uniform(n_shards: int, n_blocks: int, records: int, raw_bytes: int) -> Shards:
    """Equal shards of equal blocks, stored as they are."""
    return Shards([[(records, raw_bytes)] * n_blocks] * n_shards, [n_blocks * raw_bytes] * n_shards)


BLOCKS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 100)), max_size=8)
SIZES = st.one_of(st.none(), st.integers(1, 1200))


@st.composite
def shards(draw: st.DrawFn, max_shards: int = 10) -> Shards:
    """Any shards: none, empty ones, empty blocks, blocks larger than any window."""
    blocks = draw(st.lists(BLOCKS, max_size=max_shards))
    return Shards(blocks, [draw(st.integers(0, 500)) for _ in blocks])


@st.composite
def options(draw: st.DrawFn, max_streams: int = 9) -> OrderOptions:
    return OrderOptions(
        draw(st.integers(-(2**70), 2**70)),
        draw(st.booleans()),
        draw(SIZES),
        draw(SIZES),
        draw(st.integers(1, max_streams)),
        draw(st.sampled_from(["sticky", "global"])),
    )


def greedy(sizes: list[int], limit_bytes: int | None, first_limits: tuple[int, ...] = ()) -> list[int]:
    """Ends of runs, item by item."""
    ends: list[int] = []
    total = held = 0
    for i, size in enumerate(sizes):
        limit = first_limits[len(ends)] if len(ends) < len(first_limits) else limit_bytes
        if held and limit is not None and total + size > limit:
            ends.append(i)
            total = held = 0
        total, held = total + size, held + 1
    return [*ends, len(sizes)] if sizes else []


def runs(items: list, ends: list[int]) -> list[list]:
    return [items[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def shuffled(items: list, key: bytes) -> list:
    return [items[permute_one(key, len(items), i)] for i in range(len(items))]


def owners(data: Shards, how: OrderOptions, epoch: int) -> list[list[Record]]:
    """Records of each stream, in no order that matters."""
    members = [shard for shard, blocks in enumerate(data.blocks) if any(r for r, _ in blocks)]
    n_streams = how.streams if how.shuffle else 1
    if n_streams > 1:
        epochs = [epoch] if how.placement == "global" else []
        members = shuffled(members, derive_key(how.seed, "split", *epochs))
    flat = [record for shard in members for record in data.of_shard(shard)]
    found, start = [], 0
    for stream in range(n_streams):
        n = len(range(stream, len(flat), n_streams))
        found.append(flat[start : start + n])
        start += n
    return found


def spread(items: list, n_run: int, keys: list[bytes]) -> list:
    """Shards in reading order: one of each stratum, then the next of each, and so on."""
    n = len(items)
    if n_run >= n:
        return shuffled(items, keys[0])
    turn = [permute_one(keys[1], n_run, i) for i in range(n_run)]
    rank = {item: permute_one(keys[0], n, i) for i, item in enumerate(items)}
    ends = [((i + 1) * n + permute_one(keys[0], n_run, 0)) // n_run for i in range(n_run)]
    strata = [sorted(items[a:b], key=rank.__getitem__) for a, b in pairwise([0, *ends])]
    ordered = [stratum for _, stratum in sorted(zip(turn, strata, strict=True), key=lambda pair: pair[0])]
    found = [item for round_ in zip_longest(*ordered) for item in round_ if item is not None]
    return found[::-1] if n % n_run and permute_one(keys[1], 2, 0) else found


def stream_windows(data: Shards, how: OrderOptions, epoch: int, stream: int) -> list[tuple[int, list[Record]]]:
    """Windows of a stream: the number of the group, and the records in served order."""
    own = owners(data, how, epoch)[stream]
    rows: dict[int, dict[int, list[Record]]] = {}
    for record in sorted(own):
        rows.setdefault(record[0], {}).setdefault(record[1], []).append(record)
    members = sorted(rows)
    whole = {shard: len(list(data.of_shard(shard))) for shard in members}
    share = {s: data.stored_bytes[s] * sum(map(len, rows[s].values())) // whole[s] for s in members}
    if how.shuffle:
        lengths = [len(run) for run in runs(members, greedy([share[s] for s in members], how.group_bytes))]
        full = lengths[:-1] or lengths
        keys = [derive_key(how.seed, use, epoch, stream) for use in ("shards", "strata")]
        members = spread(members, sum(full) // max(len(full), 1), keys)
    stored = [share[s] for s in members]
    found: list[tuple[int, list[Record]]] = []
    start = 0
    for group, run in enumerate(runs(members, greedy(stored, how.group_bytes))):
        blocks = [(shard, block) for shard in run for block in rows[shard]]
        if how.shuffle:
            blocks = shuffled(blocks, derive_key(how.seed, "blocks", epoch, stream, group))
        sizes = [data.blocks[shard][block][1] for shard, block in blocks]
        limits = first_limits(how, group, sum(sizes), (sum(stored[: len(run)]), sum(stored)))
        for window in runs(blocks, greedy(sizes, how.window_bytes, limits)):
            records = [record for shard, block in window for record in rows[shard][block]]
            if how.shuffle:
                records = shuffled(records, derive_key(how.seed, "rows", epoch, stream, start))
            found.append((group, records))
            start += len(records)
    return found


def first_limits(how: OrderOptions, group: int, raw_bytes: int, stored: tuple[int, int]) -> tuple[int, ...]:
    """Sizes of a group's first windows. stored: bytes of the first group and of the stream."""
    limit = how.window_bytes
    if group or limit is None or not stored[0] or raw_bytes * stored[1] // (limit * stored[0]) < 8:
        return ()
    return tuple(limit // 2**i for i in range(6, 0, -1))


def sequence(data: Shards, how: OrderOptions, epoch: int) -> list[Record]:
    """The global sequence: position p is record p // S of stream p % S."""
    n_streams = how.streams if how.shuffle else 1
    streams = [
        [record for _, records in stream_windows(data, how, epoch, s) for record in records] for s in range(n_streams)
    ]
    return [streams[p % n_streams][p // n_streams] for p in range(data.n_records)]


@dataclass(frozen=True)
class Ranks:
    """What ranks are asked to serve: world_size, batch_size, drop_last."""

    world_size: int
    batch_size: int
    drop_last: bool


def batches(how: Ranks, n_streams: int, offset: int, n: int) -> list[list[list[int]]]:
    """Positions of each batch of each rank, [rank][batch], without padding: a rank's last batch may be empty."""
    size = how.world_size * how.batch_size
    found: list[list[list[int]]] = [[] for _ in range(how.world_size)]
    for start in range(offset, n, size):
        left = list(range(start, min(start + size, n)))
        if len(left) < size and how.drop_last:
            break
        if size % n_streams == 0:
            left.sort(key=lambda p: (p % n_streams, p))
        shares = [len(left) // how.world_size + (r < len(left) % how.world_size) for r in range(how.world_size)]
        for rank, end in enumerate(np.cumsum(shares).tolist()):
            found[rank].append(sorted(left[end - shares[rank] : end]))
    return found


def read(order: Order, position: int = 0) -> list[Record]:
    """Records from a position to the end of the epoch, one by one."""
    n_streams, found = order.n_streams, []
    for p in range(position, order.n_records):
        stretch = order.section_at(p % n_streams, p // n_streams)
        at = p // n_streams - stretch.start
        found += records_of(stretch.windows, *stretch.rows(at, at + 1))
    return found


def records_of(windows: tuple[Window, ...], block: np.ndarray, row: np.ndarray) -> list[Record]:
    """The records at places that count through the windows' blocks."""
    places = [(int(s), int(b)) for window in windows for s, b in zip(window.shards, window.blocks, strict=True)]
    return [(*places[b], int(r)) for b, r in zip(block.tolist(), row.tolist(), strict=True)]
