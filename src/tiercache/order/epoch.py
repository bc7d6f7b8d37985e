"""The order of one epoch: shards, groups of shards, blocks of a group, windows of blocks, rows of a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tiercache.order.keys import derive_key, permutation
from tiercache.order.window import RAMP_MIN_WINDOWS, Window, cut, ramp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tiercache.order.options import BlockTable, Layout, OrderOptions

_Number = TypeVar("_Number", np.int32, np.int64)
_STREAM = 0  # the one stream; it stands in the keys so that more streams can join without another order for one


@dataclass(frozen=True, slots=True)
class _Group:
    """Blocks of a group in reading order.

    first: positions of the blocks, from the group's start; cuts: the first block of each window, and the end.
    """

    index: int
    start: int
    shards: NDArray[np.int32]
    blocks: NDArray[np.int32]
    first: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]
    cuts: NDArray[np.int64]


class EpochOrder:
    """The order of one epoch of a data set.

    It costs O(shards) to make, and reads footers (`layout.blocks`) of one group at a time. Immutable but for the last
    group and window, which are kept: threads may share it, and at worst two of them build the same ones.
    """

    def __init__(self, layout: Layout, options: OrderOptions, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"an epoch is 0 or more, got {epoch}")
        self.layout = layout
        self.options = options
        self.epoch = epoch
        shards = np.flatnonzero(layout.records)
        if options.shuffle:
            shards = shards[permutation(self._key("shards"), len(shards))]
        self._shards = shards
        self._rows = _sums(layout.records[shards])
        self._stored = _sums(layout.stored_bytes[shards])
        self._cuts = cut(layout.stored_bytes[shards], options.group_bytes)
        self._group_starts = self._rows[self._cuts]
        self._group: _Group | None = None
        self._last: Window | None = None

    @property
    def n_records(self) -> int:
        """Records of the epoch: all of the data set."""
        return int(self._rows[-1])

    def window_at(self, position: int) -> Window:
        """The window that holds a position; reads the footers of its group, unless that group was the last one used.

        Raises:
            ValueError: the position is outside the epoch, or a footer and the layout differ in records.
        """
        if not 0 <= position < self.n_records:
            raise ValueError(f"position {position} is outside an epoch of {self.n_records} records")
        last = self._last
        if last is not None and last.start <= position < last.stop:
            return last
        index = int(np.searchsorted(self._group_starts, position, side="right")) - 1
        group = self._group
        if group is None or group.index != index:
            group = self._group = self._build_group(index)
        starts = group.first[group.cuts]
        number = int(np.searchsorted(starts, position - group.start, side="right")) - 1
        self._last = window = self._window(group, number)
        return window

    def windows(self, position: int) -> Iterator[Window]:
        """Windows from the one that holds a position to the end of the epoch; none at the end.

        Raises:
            ValueError: as `window_at`.
        """
        while position != self.n_records:
            window = self.window_at(position)
            yield window
            position = window.stop

    def shards_ahead(self, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """Shards that are read from a position on, in reading order.

        The first ones that hold n_bytes (stored) together; None: all to the end of the epoch. With shuffle a group is
        read as a whole, so its shards all count from its start. Reads no footers.

        Returns:
            int64[m] of data-set indices; none at the end of the epoch.

        Raises:
            ValueError: the position is outside the epoch.
        """
        if not 0 <= position <= self.n_records:
            raise ValueError(f"position {position} is outside an epoch of {self.n_records} records")
        if position == self.n_records:
            return self._shards[:0]
        starts = self._group_starts if self.options.shuffle else self._rows
        found = int(np.searchsorted(starts, position, side="right")) - 1
        begin = int(self._cuts[found]) if self.options.shuffle else found
        if n_bytes is None:
            return self._shards[begin:]
        wanted = min(int(self._stored[begin]) + n_bytes, int(self._stored[-1]))
        return self._shards[begin : max(int(np.searchsorted(self._stored, wanted)), begin + 1)]

    def _key(self, use: str, *where: int) -> bytes:
        return derive_key(self.options.seed, use, self.epoch, _STREAM, *where)

    def _build_group(self, index: int) -> _Group:
        members = self._shards[self._cuts[index] : self._cuts[index + 1]]
        tables = self._tables_of(members)
        shards = np.repeat(members.astype(np.int32), [len(table.records) for table in tables])
        blocks = np.concatenate([np.arange(len(table.records), dtype=np.int32) for table in tables])
        records = np.concatenate([table.records for table in tables])
        raw_bytes = np.concatenate([table.raw_bytes for table in tables])
        chosen = np.flatnonzero(records)
        if self.options.shuffle:
            chosen = chosen[permutation(self._key("blocks", index), len(chosen))]
        raw_bytes = raw_bytes[chosen]
        cuts = cut(raw_bytes, self.options.window_bytes, self._first_limits(index, int(raw_bytes.sum())))
        start = int(self._group_starts[index])
        return _Group(index, start, shards[chosen], blocks[chosen], _sums(records[chosen]), raw_bytes, cuts)

    def _tables_of(self, members: NDArray[np.int64]) -> Sequence[BlockTable]:
        tables = self.layout.blocks(members.tolist())
        for shard, table in zip(members.tolist(), tables, strict=True):
            found, expected = int(table.records.sum()), int(self.layout.records[shard])
            if found != expected:
                raise ValueError(f"shard {shard}: its footer holds {found} records, the version {expected}")
        return tables

    def _first_limits(self, index: int, group_raw_bytes: int) -> tuple[int, ...]:
        """Sizes of the group's first windows: a ramp at the start of a long stream.

        Only this group's footers are known, so the stream's raw bytes are taken to be to its stored bytes as the
        group's are.
        """
        window_bytes, group_stored_bytes = self.options.window_bytes, int(self._stored[self._cuts[1]])
        if index > 0 or window_bytes is None or group_stored_bytes == 0:
            return ()
        n_windows = group_raw_bytes * int(self._stored[-1]) // (window_bytes * group_stored_bytes)
        return ramp(window_bytes) if n_windows >= RAMP_MIN_WINDOWS else ()

    def _window(self, group: _Group, index: int) -> Window:
        run = slice(int(group.cuts[index]), int(group.cuts[index + 1]))
        first = group.first[run.start : run.stop + 1] - group.first[run.start]
        start = group.start + int(group.first[run.start])
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
            key=self._key("rows", start) if self.options.shuffle else None,
        )


def _sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def _frozen(array: NDArray[_Number]) -> NDArray[_Number]:
    array.flags.writeable = False
    return array
