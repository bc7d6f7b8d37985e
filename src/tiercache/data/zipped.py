"""Two versions with the same records side by side, as one leaf of `Records`.

Shards and blocks are those of the left version. The blocks of the right version have other limits: their rows are
copied into arrays that begin and end with the blocks of the left version, when those are loaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tiercache.data.leaf import ShardSizes
from tiercache.data.plans import PublishedPlans, plan_of
from tiercache.errors import CorruptShard
from tiercache.order import BlockSizes
from tiercache.shard.read.blocks import Blocks
from tiercache.shard.schema import Schema

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.data.opened_version import OpenedVersion, VersionSpec
    from tiercache.model import CloseListener, PublishedPlan, ReadingPlan, SourcePart
    from tiercache.shard.format.statistics import Statistics
    from tiercache.shard.read.chunks import Addresses
    from tiercache.shard.read.values import ColumnValues
    from tiercache.shard.schema import Stream
    from tiercache.store import Store


@dataclass(frozen=True, slots=True)
class ZippedSpec:
    """Spec of a zipped version: those of both versions, and the served columns in order. See VersionSpec."""

    left: VersionSpec
    right: VersionSpec
    columns: tuple[str, ...]

    @property
    def versions(self) -> tuple[int, ...]:
        """Numbers of both versions."""
        return self.left.version, self.right.version

    def open(self) -> ZippedVersion:
        """Open both versions."""
        return ZippedVersion(self.left.open(), self.right.open(), self.columns)


class ZippedVersion:
    """The columns of two versions with the same number of records, side by side. Safe from any thread.

    Args:
        left: Version whose shards and blocks the zipped version has.
        right: Version whose record i belongs to record i of `left`. Its columns have other names.
        columns: Names of the served columns, of both versions. None: all of `left`, then all of `right`.

    Raises:
        ValueError: The numbers of records differ, or both versions have a column of one name.
    """

    fill_ratio: float | None = None  # see OpenedVersion, also for the next two
    is_drawn = False

    def __init__(self, left: OpenedVersion, right: OpenedVersion, columns: Sequence[str] | None = None) -> None:
        if left.n_records != right.n_records:
            raise ValueError(
                f"data sets side by side must have equally many records: {left.url} has {left.n_records:,}, "
                f"{right.url} has {right.n_records:,}"
            )
        both = sorted({*left.schema.names} & {*right.schema.names})
        if both:
            raise ValueError(
                f"both {left.url} and {right.url} have the column {both[0]!r}: leave it out of one of them, with "
                "select_columns()"
            )
        self._left, self._right = left, right
        self.stored_schema = Schema([*left.schema.columns, *right.schema.columns])
        names = tuple(self.stored_schema.names) if columns is None else tuple(columns)
        self._serve(
            names,
            left.with_columns([name for name in names if name in left.schema.names]),
            right.with_columns([name for name in names if name in right.schema.names]),
        )
        of_left, of_right = left.table.first_record, right.table.first_record
        firsts = np.searchsorted(of_right, of_left[:-1], side="right") - 1
        ends = np.searchsorted(of_right, of_left[1:], side="left")
        self._right_shards = list(map(range, firsts.tolist(), ends.tolist()))  # that share records with a left shard
        right_bytes = np.diff(np.interp(of_left, of_right, np.cumsum([0, *right.table.n_bytes.tolist()])))
        n_bytes = left.table.n_bytes + right_bytes.astype(np.int64)
        self.table = ShardSizes(left.table.n_records, n_bytes, of_left)

    def _serve(self, names: tuple[str, ...], left: OpenedVersion, right: OpenedVersion) -> None:
        self._served_left, self._served_right = left, right
        self.schema = self.stored_schema.select(names)
        self.spec = ZippedSpec(self._left.spec, self._right.spec, names)
        # Of each served column: whether it is one of the right version, and its index among those served there.
        places = {name: (False, index) for index, name in enumerate(left.schema.names)}
        places |= {name: (True, index) for index, name in enumerate(right.schema.names)}
        self._places = [places[name] for name in names]

    @property
    def parts(self) -> list[SourcePart]:
        """Both versions as a state names them."""
        return [*self._left.parts, *self._right.parts]

    @property
    def url(self) -> str:
        """URL of the left data set, without credentials."""
        return self._left.url

    @property
    def inner(self) -> Store:
        """Store of the left data set."""
        return self._left.inner

    @property
    def cache(self) -> Cache | None:
        """Cache of the left data set."""
        return self._left.cache

    @property
    def has_cache(self) -> bool:
        """See OpenedVersion.has_cache; whether that holds for any of the two."""
        return self._left.has_cache or self._right.has_cache

    @property
    def can_prefetch(self) -> bool:
        """See Records.can_prefetch."""
        return self._left.can_prefetch or self._right.can_prefetch

    @property
    def sends_requests(self) -> bool:
        """See Records.sends_requests."""
        return self._left.sends_requests or self._right.sends_requests

    def for_epoch(self, _seed: int, _epoch: int) -> ZippedVersion:
        """See OpenedVersion.for_epoch."""
        return self

    def statistics(self, shard: int) -> Statistics:
        """See OpenedVersion.statistics; only of the columns of the left version."""
        return self._left.statistics(shard)

    def block_sizes(self, shards: Sequence[int]) -> list[BlockSizes]:
        """See OpenedVersion.block_sizes. The bytes of the right columns are estimated by the record."""
        self._served_right.block_sizes([right for shard in shards for right in self._right_shards[shard]])
        return [
            BlockSizes(table.records, table.raw_bytes + self._right_bytes(shard, table.records))
            for shard, table in zip(shards, self._served_left.block_sizes(shards), strict=True)
        ]

    def _right_bytes(self, shard: int, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the raw bytes of the right columns in blocks of a shard with these numbers of records."""
        shards = list(self._right_shards[shard])
        tables = self._served_right.block_sizes(shards)
        edges = np.cumsum([0, *(n for table in tables for n in table.records.tolist())])
        sums = np.cumsum([0, *(n for table in tables for n in table.raw_bytes.tolist())])
        first = int(self.table.first_record[shard]) - (int(self._right.table.first_record[shards[0]]) if shards else 0)
        bounds = first + np.cumsum([0, *records.tolist()])
        raw_bytes: NDArray[np.int64] = np.diff(np.interp(bounds, edges, sums)).astype(np.int64)
        return raw_bytes

    def load(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """See OpenedVersion.load. The rows of the right version are checked, decoded and copied."""
        left = self._served_left.load(shard, blocks) if self._served_left.schema.columns else None
        return ZippedBlocks(self, shard, tuple(blocks), left, self._right_arrays(shard, blocks))

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """See OpenedVersion.arrays."""
        right = self._right_arrays(shard, [block])
        left = self._served_left.arrays(shard, block) if self._served_left.schema.columns else []
        return [right[index][0] if is_right else left[index] for is_right, index in self._places]

    def _right_arrays(self, shard: int, blocks: Sequence[int]) -> list[list[pa.Array]]:
        """Return the right columns of the blocks: for each column one array for each block, without an offset."""
        columns = self._served_right.schema.columns
        (table,) = self._served_left.block_sizes([shard])
        ends = self.table.first_record[shard] + np.cumsum(table.records)
        found: list[list[pa.Array]] = [[] for _ in columns]
        if not columns:
            return found
        loaded: dict[tuple[int, int], list[pa.Array]] = {}  # several blocks may have rows of one right block
        limits: dict[int, NDArray[np.int64]] = {}  # of each right shard, the first record of each block, and the end
        for block in blocks:
            stop = int(ends[block])
            at = stop - int(table.records[block])
            pieces: list[list[pa.Array]] = [[] for _ in columns]
            while at < stop:
                right = int(np.searchsorted(self._right.table.first_record, at, side="right")) - 1
                if right not in limits:
                    (sizes,) = self._served_right.block_sizes([right])
                    limits[right] = self._right.table.first_record[right] + np.cumsum([0, *sizes.records.tolist()])
                number = int(np.searchsorted(limits[right], at, side="right")) - 1
                row, n = at - int(limits[right][number]), min(int(limits[right][number + 1]), stop) - at
                if (right, number) not in loaded:
                    try:
                        loaded[right, number] = self._served_right.arrays(right, number)
                    except CorruptShard as error:
                        reason = f"{error.reason} (records {at:,} to {at + n - 1:,})"
                        named = CorruptShard(
                            reason, url=error.url, part=error.part, block=error.block, column=error.column, record=at
                        )
                        named.block = block  # the loader looks its records up by the left block
                        raise named from error
                for of_column, array in zip(pieces, loaded[right, number], strict=True):
                    of_column.append(array.slice(row, n))
                at += n
            for of_column, arrays in zip(found, pieces, strict=True):
                of_column.append(_joined(arrays))
        return found

    def record(self, number: int) -> dict[str, Any] | None:
        """See OpenedVersion.record."""
        left, right = self._served_left.record(number), self._served_right.record(number)
        return None if left is None or right is None else {name: (left | right)[name] for name in self.schema.names}

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """See OpenedVersion.values."""
        sides = [
            version.values(records) if version.schema.columns else []
            for version in (self._served_left, self._served_right)
        ]
        return [sides[is_right][index] for is_right, index in self._places]

    def publish(self, plan: ReadingPlan) -> PublishedPlan | None:
        """See Records.publish."""
        found = [] if (left := self._served_left.publish(plan)) is None else [left]
        try:
            if (right := self._served_right.publish(self._right_plan(plan))) is not None:
                found.append(right)
        except BaseException:  # the left plan has no other owner that could withdraw it
            PublishedPlans(tuple(found)).close()
            raise
        return PublishedPlans(tuple(found)) if found else None

    def _right_plan(self, plan: ReadingPlan) -> ReadingPlan:
        pairs = [(row, right) for row, shard in enumerate(plan.shards.tolist()) for right in self._right_shards[shard]]
        rows, shards = np.array(pairs, np.int64).reshape(-1, 2).T
        return plan_of(plan, rows, shards)

    def prefetch(self, shards: Sequence[int]) -> None:
        """See OpenedVersion.prefetch."""
        if self._served_left.schema.columns:
            self._served_left.prefetch(shards)
        if self._served_right.schema.columns:
            self._served_right.prefetch(self._rights(shards))

    def prefetch_blocks(self, shard: int, blocks: Sequence[int]) -> None:
        """See OpenedVersion.prefetch_blocks. Of the right version, whole shards are prefetched."""
        if self._served_left.schema.columns:
            self._served_left.prefetch_blocks(shard, blocks)
        if self._served_right.schema.columns:
            self._served_right.prefetch(self._rights([shard]))

    def is_mapped(self, shard: int) -> bool:
        """Whether load() only maps the shard: never, because the rows of the right version are copied."""
        return not self._served_right.schema.columns and self._served_left.is_mapped(shard)

    def is_local(self, shard: int) -> bool:
        """See OpenedVersion.is_local; whether that holds for both."""
        return self._served_left.is_local(shard) and all(map(self._served_right.is_local, self._rights([shard])))

    def remove_if_corrupt(self, shard: int) -> bool:
        """See OpenedVersion.remove_if_corrupt; checks the copies of both."""
        found = [self._served_left.remove_if_corrupt(shard)]
        return any([*found, *map(self._served_right.remove_if_corrupt, self._rights([shard]))])

    def prepare_reading(self, shards: NDArray[np.int64]) -> None:
        """See Records.prepare_reading."""
        self._served_left.prepare_reading(shards)
        self._served_right.prepare_reading(np.array(sorted(self._rights(shards.tolist())), np.int64))

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """See OpenedVersion.warm; the left version comes first."""
        self._served_left.warm(shards, jobs=jobs, on_progress=on_progress)
        self._served_right.warm(self._rights(shards), jobs=jobs, on_progress=on_progress)

    def figures(self) -> Mapping[str, float]:
        """See OpenedVersion.figures; a cache of both counts once."""
        left, right = self._served_left.figures(), self._served_right.figures()
        is_shared = self._left.cache is self._right.cache
        return {
            name: figure + (0 if is_shared and name.startswith("cache_") else right[name])
            for name, figure in left.items()
        }

    def on_close(self, keeper: CloseListener) -> None:
        """See Records.on_close."""
        self._served_left.on_close(keeper)
        self._served_right.on_close(keeper)

    def close(self) -> None:
        """See OpenedVersion.close."""
        for version in (self._served_left, self._served_right):
            version.close()

    def at_versions(self, numbers: Sequence[int]) -> ZippedVersion:
        """Return other versions of both, left and right, side by side.

        Raises NotFound, or SchemaError if one lacks a column, or ValueError if their numbers of records differ.
        """
        left, right = numbers
        return ZippedVersion(self._left.at_versions([left]), self._right.at_versions([right]), self.schema.names)

    def with_columns(self, columns: Sequence[str]) -> ZippedVersion:
        """See OpenedVersion.with_columns."""
        return self._serving(columns, lambda version, names: version.with_columns(names))

    def for_scan(self, columns: Sequence[str]) -> ZippedVersion:
        """See OpenedVersion.for_scan."""
        return self._serving(columns, lambda version, names: version.for_scan(names))

    def _serving(
        self, columns: Sequence[str], serve: Callable[[OpenedVersion, Sequence[str]], OpenedVersion]
    ) -> ZippedVersion:
        self.stored_schema.select(columns)  # raises SchemaError
        other = copy.copy(self)
        names = tuple(columns)
        sides = [
            serve(version, [name for name in names if name in version.schema.names])
            for version in (self._left, self._right)
        ]
        other._serve(names, *sides)  # noqa: SLF001 -- of this class
        return other

    def _rights(self, shards: Sequence[int]) -> list[int]:
        """Return the right shards that share records with these shards, each once, in their order."""
        return list(dict.fromkeys(right for shard in shards for right in self._right_shards[shard]))


class ZippedBlocks(Blocks):
    """Blocks of a zipped version: those of the left version, and arrays of the right columns cut at the same rows."""

    def __init__(
        self,
        version: ZippedVersion,
        shard: int,
        blocks: tuple[int, ...],
        left: Blocks | None,
        arrays: list[list[pa.Array]],
    ) -> None:
        self.schema, self.url = version.schema, version.url if left is None else left.url
        self.blocks, self.columns = tuple(map(int, blocks)), tuple(range(len(version.schema)))
        self.streams = tuple(s for index, column in enumerate(self.schema.columns) for s in column.streams(index))
        (table,) = version._served_left.block_sizes([shard])  # noqa: SLF001 -- of this module
        self.n_rows = table.records[list(blocks)]
        self._left, self._right_arrays, self._places = left, arrays, version._places  # noqa: SLF001
        self.private_bytes = sum(array.nbytes for of_column in arrays for array in of_column)
        self.is_cached = self.reports_residency = False
        if left is not None:
            self.private_bytes += left.private_bytes
            self.is_cached, self.reports_residency = left.is_cached, left.reports_residency
        self._left_streams = np.array([not version._places[s.column][0] for s in self.streams], bool)  # noqa: SLF001
        self.addresses = np.zeros((len(self.streams), len(blocks), 3), np.uint64)
        for number, stream in enumerate(self.streams):
            is_right, index = self._places[stream.column]
            if is_right:
                for position, array in enumerate(arrays[index]):
                    self.addresses[number, position] = _address(array, stream)
        self._take_over(lambda blocks: blocks.addresses, self.addresses)

    def _take_over(self, read: Callable[[Blocks], Addresses | None], out: Addresses) -> bool:
        """Copy values of the left blocks, by stream, into those of all streams; False if there are none."""
        values = None if self._left is None else read(self._left)
        if values is None or self._left is None:
            return False
        for column, (is_right, index) in enumerate(self._places):
            if not is_right:
                of_left = self._left.columns[index]
                out[self.column_streams(column)] = values[self._left.column_streams(of_left)]
        return True

    def _choose(self, chosen: tuple[int, ...]) -> None:
        places = np.array(chosen, np.int64)
        self.blocks, self.n_rows = tuple(self.blocks[place] for place in chosen), self.n_rows[places]
        self.addresses = np.ascontiguousarray(self.addresses[:, places])
        self._right_arrays = [[arrays[place] for place in chosen] for arrays in self._right_arrays]
        self._left = None if self._left is None else self._left.select(chosen)

    @property
    def pages(self) -> Addresses:
        """See Blocks.pages; only those of the left version are mapped."""
        return np.empty((0, 2), np.uint64) if self._left is None else self._left.pages

    @property
    def pending_checks(self) -> Addresses | None:
        """See Blocks.pending_checks; the right columns are checked."""
        checks = np.zeros((len(self.streams), len(self.blocks), 4), np.uint64)
        return checks if self._take_over(lambda blocks: blocks.pending_checks, checks) else None

    def reset_checks(self) -> None:
        """See Blocks.reset_checks."""
        if self._left is not None:
            self._left.reset_checks()

    def reset_old_checks(self, age_s: float) -> None:
        """See Blocks.reset_old_checks."""
        if self._left is not None:
            self._left.reset_old_checks(age_s)

    def reset_if_written(self) -> int | None:
        """See Blocks.reset_if_written."""
        return None if self._left is None else self._left.reset_if_written()

    def array(self, position: int, column: int) -> pa.Array:
        """See Blocks.array."""
        is_right, index = self._places[column]
        if is_right or self._left is None:
            return self._right_arrays[index][position]
        return self._left.array(position, self._left.columns[index])

    def raise_damage(self, column: int, block: NDArray[np.uint32], row: NDArray[np.uint32]) -> None:
        """See Blocks.raise_damage; the right columns are checked."""
        is_right, index = self._places[column]
        if not is_right and self._left is not None:
            self._left.raise_damage(self._left.columns[index], block, row)


def _joined(pieces: list[pa.Array]) -> pa.Array:
    """Return the pieces as one array whose buffers begin with its first row."""
    if len(pieces) == 1 and pieces[0].offset == 0:
        return pieces[0]
    # Arrow returns a single piece as it is, with its offset.
    return pa.concat_arrays([*pieces, pieces[0].slice(0, 0)])


def _address(array: pa.Array, stream: Stream) -> tuple[int, int, int]:
    """Return the address of a stream's values, that of its offsets, and the number of elements; 0 for none."""
    buffers = (array.storage if isinstance(array, pa.ExtensionArray) else array).buffers()
    values = buffers[stream.values_buffer]
    if values is None or not values.size:
        values_at, n_bytes = 0, 0
    else:
        values_at, n_bytes = values.address, values.size
    if stream.offsets_buffer is None:
        return values_at, 0, 0
    return values_at, buffers[stream.offsets_buffer].address, n_bytes // stream.width_bytes
