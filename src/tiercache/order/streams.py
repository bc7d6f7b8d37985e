"""Streams: the permuted list of shards cut into runs of equally many records, each in its reading order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.keys import derive_key, permutation
from tiercache.order.spread import stratified_permutation
from tiercache.order.window import cut_by_size, offsets_of_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.order.options import Layout, OrderOptions

# All footers of a group are read before its first batch. Without this limit, a group of 4 GiB would hold 25,000 shards
# of a few kilobytes.
MAX_GROUP_SHARDS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Shards of one stream in the reading order of an epoch, cut into groups.

    Attributes:
        index: Number of the stream.
        shards: int64[k], shard numbers in the data set; each shard occurs once in a stream.
        row_start: int64[k], first row of each shard that belongs to the stream.
        rows: int64[k + 1], cumulative rows of the shards that belong to the stream.
        stored: int64[k + 1], cumulative stored bytes; of a shard that is cut, in proportion to its rows.
        cuts: int64[m + 1], group i is shards [cuts[i], cuts[i + 1]).
        is_cut: Whether a shard belongs to the stream only in part.
    """

    index: int
    shards: NDArray[np.int64]
    row_start: NDArray[np.int64]
    rows: NDArray[np.int64]
    stored: NDArray[np.int64]
    cuts: NDArray[np.int64]
    is_cut: bool

    @property
    def n_records(self) -> int:
        """Number of records of the stream."""
        return int(self.rows[-1])

    @property
    def group_shards(self) -> int:
        """Average number of shards of a group; the last group does not count, unless it is the only one."""
        n_groups = max(len(self.cuts) - 2, 1)
        return int(self.cuts[n_groups]) // n_groups if len(self.cuts) > 1 else 0

    @property
    def group_starts(self) -> NDArray[np.int64]:
        """int64[m + 1], positions at which the groups begin, and the end of the stream."""
        return self.rows[self.cuts]


class StreamSplit:
    """Division of an epoch's shards among its streams. Immutable; creating it costs O(shards)."""

    def __init__(self, layout: Layout, options: OrderOptions, epoch: int) -> None:
        self._layout = layout
        self._options = options
        self._epoch = epoch
        self.n_streams = options.streams if options.shuffle else 1
        shards = np.flatnonzero(layout.records)
        if self.n_streams > 1:
            where = () if options.placement == "sticky" else (epoch,)
            shards = shards[permutation(derive_key(options.seed, "split", *where), len(shards))]
        self._shards = shards
        self._ends = offsets_of_counts(layout.records[shards])

    @property
    def n_records(self) -> int:
        """Number of records of all streams."""
        return int(self._ends[-1])

    def stream_records(self, stream: int) -> int:
        """Return the number of records of a stream. Raises ValueError if there is no such stream."""
        if not 0 <= stream < self.n_streams:
            raise ValueError(f"there is no stream {stream}: the order has {self.n_streams}")
        return -(-(self.n_records - stream) // self.n_streams)

    def stream(self, index: int) -> Stream:
        """Return a stream with its shards in the epoch's reading order.

        Raises:
            ValueError: There is no such stream.
        """
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
        if not self._options.shuffle:
            return stream
        key, strata_key = (derive_key(self._options.seed, use, self._epoch, index) for use in ("shards", "strata"))
        turn = turn[stratified_permutation(key, strata_key, len(turn), stream.group_shards)]
        return self._cut(index, shards[turn], row_start[turn], row_stop[turn])

    def _cut(
        self, index: int, shards: NDArray[np.int64], row_start: NDArray[np.int64], row_stop: NDArray[np.int64]
    ) -> Stream:
        n_rows, whole = row_stop - row_start, self._layout.records[shards]
        stored_bytes = self._layout.stored_bytes[shards]
        parts = np.flatnonzero(n_rows != whole).tolist()  # at most the first and the last shard of the run
        for part in parts:  # Python integers: the product may exceed 64 bits
            stored_bytes[part] = int(stored_bytes[part]) * int(n_rows[part]) // int(whole[part])
        group_bytes = self._options.group_bytes
        max_shards = None if group_bytes is None else MAX_GROUP_SHARDS
        cuts = cut_by_size(stored_bytes, group_bytes, max_items=max_shards)
        return Stream(
            index, shards, row_start, offsets_of_counts(n_rows), offsets_of_counts(stored_bytes), cuts, bool(parts)
        )
