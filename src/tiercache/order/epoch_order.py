"""Order of one epoch of a data set: streams, shard groups, blocks of a group, windows of blocks, rows of a window.

Every permutation has a key that is derived from the seed and its use. The keys are part of a run's state and must never
change.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tiercache._native.permute import permute
from tiercache.order.window import (
    RAMP_MIN_WINDOWS,
    BlockSizes,
    DatasetSizes,
    OrderOptions,
    ShardGroups,
    Window,
    cut_by_size,
    offsets_of_counts,
    ramp,
    single_shard_groups,
)

_PERSON = b"tiercache.order1"  # 16 bytes of BLAKE2b personalisation: no other use of the hash yields the same keys


def derive_key(seed: int, *parts: int | str | bytes) -> bytes:
    """Return a 16-byte key for one use of a seed: personalised BLAKE2b-128 of seed and parts in canonical form.

    Each value is encoded as a tag ("i", "s" or "b"), the length of its payload as 8 bytes little-endian, and the
    payload: an integer as little-endian two's complement of bit_length // 8 + 1 bytes, text as UTF-8, bytes as they
    are. Therefore no two lists of values share an encoding, and any integer (also of numpy) may be a seed. Raises
    TypeError: a value is of another type. bool is refused, because True would equal 1.
    """
    digest = hashlib.blake2b(digest_size=16, person=_PERSON)
    for value in (seed, *parts):
        tag, payload = _encode(value)
        digest.update(tag + len(payload).to_bytes(8, "little") + payload)
    return digest.digest()


def _encode(value: int | str | bytes) -> tuple[bytes, bytes]:
    if isinstance(value, str):
        return b"s", value.encode()
    if isinstance(value, bytes):
        return b"b", value
    if isinstance(value, bool | np.bool_):
        raise TypeError("a key is derived from values of type int, str or bytes, got a bool")
    number = operator.index(value)
    return b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)


def permutation(key: bytes, n: int) -> NDArray[np.int64]:
    out = np.empty(n, np.uint64)
    if n:
        permute(key, n, 0, out)
    return out.view(np.int64)


def stratified_permutation(key: bytes, strata_key: bytes, n: int, n_run: int) -> NDArray[np.int64]:
    """Return a permutation of [0, n) in which any n_run successive items are spread over all of [0, n).

    The items are cut into n_run consecutive strata of about n / n_run items. The permutation takes one item of each
    stratum, drawn by the key, in a drawn order of the strata; then the next item of each stratum in the same order, and
    so on. Therefore a group of 32 shards of data that is stored sorted by label has each label in its share, wherever
    the group begins; 32 shards drawn freely have three shares of one label and none of another.

    If n_run does not divide n, one round has too few items for all strata: the last round or, as drawn, the first. If
    it were always the last round, items of shorter strata would come earlier than others in all epochs (for n = 12,
    n_run = 8: at 4.98 and 6.53 on average instead of 5.5).
    """
    drawn = permutation(key, n)
    if n_run >= n:
        return drawn
    turn = permutation(strata_key, n_run)
    # The key decides which strata are longer by one.
    ends = (np.arange(1, n_run + 1) * n + permutation(key, n_run)[0]) // n_run
    stratum = np.searchsorted(ends, np.arange(n), side="right")
    number = np.empty(n, np.int64)  # rank of each item in its stratum, as drawn
    number[np.lexsort((drawn, stratum))] = np.arange(n) - np.append(0, ends)[stratum]
    order = np.lexsort((turn[stratum], number))
    return order[::-1] if n % n_run and permutation(strata_key, 2)[0] else order


# All footers of a group are read before its first batch. Without this limit, a group of 4 GiB would hold 25,000 shards
# of a few kilobytes.
MAX_GROUP_SHARDS = 1024
# Without shuffle, groups only say which footers are read together: in one round trip, at most those that come soon.
STORED_GROUP_BYTES, MAX_STORED_GROUP_SHARDS = 1 << 30, 64


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Shards of one stream in the reading order of an epoch, cut into groups."""

    index: int
    shards: NDArray[np.int64]  # [k], numbers in the data set; each occurs once in a stream
    row_start: NDArray[np.int64]  # [k], first row of each shard that belongs to the stream
    rows: NDArray[np.int64]  # [k + 1], cumulative rows of the shards that belong to the stream
    stored: NDArray[np.int64]  # [k + 1], cumulative stored bytes; of a shard that is cut, in proportion
    cuts: NDArray[np.int64]  # [m + 1], group i is shards [cuts[i], cuts[i + 1])
    group_starts: NDArray[np.int64]  # [m + 1], positions at which the groups begin, and the end
    is_cut: bool  # whether a shard belongs to the stream only in part

    @property
    def group_shards(self) -> int:
        """Average number of shards of a group; the last group does not count, unless it is the only one."""
        n_groups = max(len(self.cuts) - 2, 1)
        return int(self.cuts[n_groups]) // n_groups if len(self.cuts) > 1 else 0


_Number = TypeVar("_Number", np.int32, np.int64, np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Blocks of a shard group in reading order."""

    index: int
    start: int  # position of the group's first record in the stream
    shards: NDArray[np.int32]  # [k], shard of each block
    blocks: NDArray[np.int32]  # [k], number of each block in its shard
    first: NDArray[np.int64]  # [k + 1], cumulative rows of the blocks
    raw_bytes: NDArray[np.int64]  # [k], of each block
    row_start: NDArray[np.int64] | None  # [k], first row of each block that belongs to the stream
    cuts: NDArray[np.int64]  # first block of each window, and the end


@dataclass(slots=True)
class _Kept:
    stream: Stream
    group: _Group | None = None
    window: Window | None = None


class EpochOrder:
    """Order of one epoch of a data set.

    Creating it costs O(shards). It reads footers (`sizes.blocks`) of one group of one stream at a time. It is
    immutable except for the last group and window of each stream, which are cached: threads may share it, and at worst
    two of them build the same group.
    """

    def __init__(self, sizes: DatasetSizes, options: OrderOptions, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self.sizes = sizes
        self.options = options
        self.epoch = epoch
        self.n_streams = options.streams if options.shuffle else 1
        shards = np.flatnonzero(sizes.records)
        if self.n_streams > 1:
            where = () if options.placement == "sticky" else (epoch,)
            shards = shards[permutation(derive_key(options.seed, "split", *where), len(shards))]
        self._shards = shards
        self._ends = offsets_of_counts(sizes.records[shards])
        self._kept: dict[int, _Kept] = {}

    @property
    def n_records(self) -> int:
        return int(self._ends[-1])

    def stream_records(self, stream: int) -> int:
        if not 0 <= stream < self.n_streams:
            raise ValueError(f"there is no stream {stream}: the order has {self.n_streams}")
        return -(-(self.n_records - stream) // self.n_streams)

    def section_at(self, stream: int, position: int) -> Window:
        """Return the window that holds a position of a stream; reads the footers of its group, unless kept."""
        n_records = self.stream_records(stream)
        if not 0 <= position < n_records:
            raise ValueError(f"position {position} is outside stream {stream} of {n_records} records")
        kept = self._keep(stream)
        last = kept.window
        if last is not None and last.start <= position < last.stop:
            return last
        index = int(np.searchsorted(kept.stream.group_starts, position, side="right")) - 1
        group = kept.group
        if group is None or group.index != index:
            group = kept.group = self._build_group(kept, index)
        starts = group.first[group.cuts]
        number = int(np.searchsorted(starts, position - group.start, side="right")) - 1
        kept.window = window = self._window(stream, group, number)
        return window

    def windows(self, stream: int, position: int = 0) -> Iterator[Window]:
        """Yield the windows of a stream from the one that holds a position; nothing at the end of the stream."""
        while position != self.stream_records(stream):
            window = self.section_at(stream, position)
            yield window
            position = window.stop

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """See Order.shards_ahead. With shuffle a group is read as a whole: its shards count from its start."""
        n_records = self.stream_records(stream)
        if not 0 <= position <= n_records:
            raise ValueError(f"position {position} is outside stream {stream} of {n_records} records")
        kept = self._keep(stream)
        shards, stored = kept.stream.shards, kept.stream.stored
        if position == n_records:
            return shards[:0]
        starts = kept.stream.group_starts if self.options.shuffle else kept.stream.rows
        found = int(np.searchsorted(starts, position, side="right")) - 1
        begin = int(kept.stream.cuts[found]) if self.options.shuffle else found
        if n_bytes is None:
            return shards[begin:]
        wanted_bytes = min(int(stored[begin]) + n_bytes, int(stored[-1]))
        return shards[begin : max(int(np.searchsorted(stored, wanted_bytes)), begin + 1)]

    def groups(self, stream: int) -> ShardGroups:
        """See Order.groups. Without shuffle each shard is a group, so that it is released at its last record."""
        self.stream_records(stream)  # raises ValueError
        found = self._keep(stream).stream
        if not self.options.shuffle:
            return single_shard_groups(found.rows[:-1], found.rows[1:], found.shards, np.diff(found.stored))
        positions, stored = found.group_starts, found.stored[found.cuts]
        return ShardGroups(positions[:-1], positions[1:], found.cuts, found.shards, np.diff(stored))

    def _keep(self, stream: int) -> _Kept:
        kept = self._kept.get(stream)
        if kept is None:
            kept = self._kept[stream] = _Kept(self._stream(stream))
        return kept

    def _stream(self, index: int) -> Stream:
        n_records = self.stream_records(index)
        share, longer = divmod(self.n_records, self.n_streams)
        start = index * share + min(index, longer)
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        last = int(np.searchsorted(self._ends, start + n_records, side="left")) if n_records else first
        row_start = np.maximum(start - self._ends[first:last], 0)
        row_stop = np.minimum(start + n_records, self._ends[first + 1 : last + 1]) - self._ends[first:last]
        shards = self._shards[first:last]
        # Sort by shard number first: the order inside a stream then depends only on the set of its shards, and the
        # single stream of an order without streams equals the stored order of the data set.
        turn = np.argsort(shards)
        stream = self._cut(index, shards[turn], row_start[turn], row_stop[turn])
        if not self.options.shuffle:
            return stream
        key, strata_key = self._key("shards", index), self._key("strata", index)
        turn = turn[stratified_permutation(key, strata_key, len(turn), stream.group_shards)]
        return self._cut(index, shards[turn], row_start[turn], row_stop[turn])

    def _cut(
        self, index: int, shards: NDArray[np.int64], row_start: NDArray[np.int64], row_stop: NDArray[np.int64]
    ) -> Stream:
        n_rows, whole = row_stop - row_start, self.sizes.records[shards]
        stored_bytes = self.sizes.stored_bytes[shards]
        parts = np.flatnonzero(n_rows != whole).tolist()  # at most the first and the last shard of the run
        for part in parts:  # Python integers: the product may exceed 64 bits
            stored_bytes[part] = int(stored_bytes[part]) * int(n_rows[part]) // int(whole[part])
        group_bytes, max_shards = self.options.group_bytes, MAX_GROUP_SHARDS
        if not self.options.shuffle:
            group_bytes = min(group_bytes or STORED_GROUP_BYTES, STORED_GROUP_BYTES)
            max_shards = MAX_STORED_GROUP_SHARDS
        cuts = cut_by_size(stored_bytes, group_bytes, max_items=max_shards)
        rows, stored = offsets_of_counts(n_rows), offsets_of_counts(stored_bytes)
        return Stream(index, shards, row_start, rows, stored, cuts, rows[cuts], bool(parts))

    def _key(self, use: str, *where: int) -> bytes:
        return derive_key(self.options.seed, use, self.epoch, *where)

    def _build_group(self, kept: _Kept, index: int) -> _Group:
        stream = kept.stream
        run = slice(int(stream.cuts[index]), int(stream.cuts[index + 1]))
        members = stream.shards[run]
        of_shards = self._block_sizes_of(members)
        n_blocks = [len(sizes.records) for sizes in of_shards]
        shards = np.repeat(members.astype(np.int32), n_blocks)
        blocks = np.concatenate([np.arange(n, dtype=np.int32) for n in n_blocks])
        records = np.concatenate([sizes.records for sizes in of_shards])
        raw_bytes = np.concatenate([sizes.raw_bytes for sizes in of_shards])
        row_start = None
        if stream.is_cut:
            row_start, records = _own_rows(records, _rows_of(stream, run), n_blocks)
        chosen = np.flatnonzero(records)
        if self.options.shuffle:
            chosen = chosen[permutation(self._key("blocks", stream.index, index), len(chosen))]
        raw_bytes = raw_bytes[chosen]
        cuts = cut_by_size(
            raw_bytes, self.options.window_bytes, self._first_limits(stream, index, int(raw_bytes.sum()))
        )
        return _Group(
            index=index,
            start=int(kept.stream.group_starts[index]),
            shards=shards[chosen],
            blocks=blocks[chosen],
            first=offsets_of_counts(records[chosen]),
            raw_bytes=raw_bytes,
            row_start=None if row_start is None else row_start[chosen],
            cuts=cuts,
        )

    def _block_sizes_of(self, members: NDArray[np.int64]) -> Sequence[BlockSizes]:
        of_shards = self.sizes.blocks(members.tolist())
        for shard, sizes in zip(members.tolist(), of_shards, strict=True):
            found, expected = int(sizes.records.sum()), int(self.sizes.records[shard])
            if found != expected:
                raise ValueError(f"shard {shard}: its footer holds {found} records, but the version lists {expected}")
        return of_shards

    def _first_limits(self, stream: Stream, index: int, group_raw_bytes: int) -> tuple[int, ...]:
        """Return the sizes of the first windows of a group: a ramp at the start of a long stream, else nothing.

        Only this group's footers are known. The estimate assumes that the stream has the same ratio of raw bytes to
        stored bytes as the group.
        """
        window_bytes, group_stored_bytes = self.options.window_bytes, int(stream.stored[stream.cuts[1]])
        if index > 0 or window_bytes is None or group_stored_bytes == 0:
            return ()
        n_windows = group_raw_bytes * int(stream.stored[-1]) // (window_bytes * group_stored_bytes)
        return ramp(window_bytes) if n_windows >= RAMP_MIN_WINDOWS else ()

    def _window(self, stream: int, group: _Group, index: int) -> Window:
        run = slice(int(group.cuts[index]), int(group.cuts[index + 1]))
        first = group.first[run.start : run.stop + 1] - group.first[run.start]
        start = group.start + int(group.first[run.start])
        row_start = None if group.row_start is None else group.row_start[run]
        return Window(
            group=group.index,
            index=index,
            start=start,
            stop=start + int(first[-1]),
            raw_bytes=int(group.raw_bytes[run].sum()),
            shards=_frozen(group.shards[run]),
            blocks=_frozen(group.blocks[run]),
            block_bytes=_frozen(group.raw_bytes[run].astype(np.int64)),
            first=_frozen(first),
            key=self._key("rows", stream, start) if self.options.shuffle else None,
            stream=stream,
            row_start=None if row_start is None or not row_start.any() else _frozen(row_start.astype(np.uint32)),
        )


def _rows_of(stream: Stream, run: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for each shard of a group, the first row that belongs to the stream, and the row after the last one."""
    row_start = stream.row_start[run]
    return row_start, row_start + np.diff(stream.rows[run.start : run.stop + 1])


def _own_rows(
    records: NDArray[np.int64], rows: tuple[NDArray[np.int64], NDArray[np.int64]], n_blocks: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the part of each block that belongs to the stream: its first row, and its number of rows (0: none)."""
    ends = np.cumsum(records)
    shard_ends = np.cumsum(n_blocks)
    before = offsets_of_counts(records)[shard_ends - n_blocks]  # rows of the preceding shards
    ends -= np.repeat(before, n_blocks)
    starts = ends - records
    first, last = (np.repeat(bound, n_blocks) for bound in rows)
    row_start = np.clip(first - starts, 0, records)
    return row_start, np.maximum(np.minimum(ends, last) - starts - row_start, 0)


def _frozen(array: NDArray[_Number]) -> NDArray[_Number]:
    array.flags.writeable = False
    return array
