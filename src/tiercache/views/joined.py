"""Joined and mixed sources: several sources as one, with consecutively numbered shards.

The read plan of a joined source is divided among its sources; sources that share shards get one plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tiercache.errors import SchemaError
from tiercache.model import NEVER, PublishedPlan, ReadingPlan
from tiercache.order.mixture import MixtureSpec, StoredMixture
from tiercache.shard.read.values import join_arrow, join_values
from tiercache.shard.schema import Schema
from tiercache.views.view import DerivedSource, StoredOrderStep, View, apply_step

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.cache import WarmProgress
    from tiercache.model import SourcePart
    from tiercache.order import BlockTable
    from tiercache.shard.read.values import ColumnValues
    from tiercache.views.selection import Readable, SourceSpec


@dataclass(frozen=True, slots=True)
class PublishedPlans:
    """Several published plans as one (`model.PublishedPlan`)."""

    every: tuple[PublishedPlan, ...]

    def advance(self, clock: int) -> None:
        """See PublishedPlan.advance; advances all of them."""
        for one in self.every:
            one.advance(clock)

    def close(self) -> None:
        """See PublishedPlan.close; closes all of them, even if one raises."""
        with ExitStack() as closing:
            for one in reversed(self.every):
                closing.callback(one.close)


def root_of(source: Readable) -> Readable:
    """Return the source below a view, which has the same shard numbers; any other source is returned itself."""
    while isinstance(source, View):
        source = source.source
    return source


def part_of(plan: ReadingPlan, where: NDArray[np.int64], first_shard: int) -> ReadingPlan:
    """Return some rows of a plan, with shards counted from first_shard. The clock stays that of the job."""
    first, last, then = plan.first[where], plan.last[where], plan.then[where]
    return replace(plan, shards=plan.shards[where] - first_shard, first=first, last=last, then=then)


def merge_plans(plans: Sequence[ReadingPlan]) -> ReadingPlan:
    """Return the plans of one job for the same source as one.

    A shard of several plans is in use from its first to its last use.
    """
    if len(plans) == 1:
        return plans[0]
    every = np.concatenate([plan.shards for plan in plans])
    shards, at = np.unique(every, return_inverse=True)
    first, then = np.full(len(shards), NEVER), np.full(len(shards), NEVER)
    last = np.full(len(shards), -1, np.int64)
    np.minimum.at(first, at, np.concatenate([plan.first for plan in plans]))
    np.minimum.at(then, at, np.concatenate([plan.then for plan in plans]))
    ends = np.concatenate([plan.last for plan in plans])
    np.maximum.at(last, at, np.where(ends == NEVER, -1, ends))
    last = np.where(first == NEVER, NEVER, last)
    return ReadingPlan(plans[0].owner, shards, first, last, then, plans[0].reader)


# Number of threads that read footers of several sources in parallel.
_THREADS = 16


@dataclass(frozen=True, slots=True)
class JoinedSpec:
    """Spec of joined sources."""

    below: tuple[SourceSpec, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """See SourceSpec.columns."""
        return self.below[0].columns

    @property
    def versions(self) -> tuple[int, ...]:
        """See SourceSpec.versions."""
        return tuple(version for plan in self.below for version in plan.versions)

    def open(self, opened: dict[int, Any]) -> Joined:
        """See SourceSpec.open."""
        return Joined([plan.open(opened) for plan in self.below])


class Joined(DerivedSource):
    """Several sources as one; implements Readable. Shards and records of a source follow those of the one before.

    Safe from any thread.

    Raises:
        SchemaError: The sources' columns differ; the message names the first difference.
    """

    def __init__(self, below: Sequence[Readable]) -> None:
        schemas = {id(source.schema): (source.schema, number) for number, source in reversed(list(enumerate(below)))}
        for schema, number in schemas.values():  # many views of one data set share one schema: check it once
            _check_same(below[0].schema, schema, number)
        self.below = tuple(below)
        counts = [len(source.shard_records) for source in below]
        self._first_shard = np.cumsum([0, *counts])
        self._first_number = np.cumsum([0, *(source.n_records for source in below)])
        self.n_records = int(self._first_number[-1])
        self.shard_records = np.concatenate([source.shard_records for source in below])
        self.shard_bytes = np.concatenate([source.shard_bytes for source in below])
        self.first_record = np.r_[0, np.cumsum(self.shard_records)]

    @property
    def spec(self) -> SourceSpec:
        """See Readable.spec."""
        return JoinedSpec(tuple(source.spec for source in self.below))

    @property
    def parts(self) -> tuple[SourcePart, ...]:
        """Parts of all sources."""
        return tuple(part for source in self.below for part in source.parts)

    @cached_property
    def stored_schema(self) -> Schema:
        """Columns that all sources have with the same type."""
        others = [{c.name: c for c in source.stored_schema.columns} for source in self.below[1:]]
        kept = [c for c in self.below[0].stored_schema.columns if all(str(o.get(c.name)) == str(c) for o in others)]
        return Schema(kept)

    @cached_property
    def record_order(self) -> NDArray[np.int64] | None:
        """Explicit order, int64[n]: place of each served record in stored order. None if no source has one."""
        if all(source.record_order is None for source in self.below):
            return None
        runs = []
        for start, source in zip(self._first_number.tolist(), self.below, strict=False):
            listed = source.record_order
            runs.append(start + (np.arange(source.n_records) if listed is None else listed))
        return np.concatenate(runs)

    def of_shard(self, shard: int) -> tuple[Readable, int]:
        """Return the source that has a shard, and the shard's number in that source."""
        part = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return self.below[part], shard - int(self._first_shard[part])

    def block_tables(self, shards: Sequence[int]) -> list[BlockTable]:
        """See Source.block_tables."""
        places = np.array(shards, np.int64)
        groups = self._by_part(self._first_shard, places)
        tables: list[Any] = [None] * len(places)

        def read(group: tuple[int, NDArray[np.int64]]) -> Sequence[BlockTable]:
            part, where = group
            return self.below[part].block_tables((places[where] - self._first_shard[part]).tolist())

        if len(groups) < 2:
            found = list(map(read, groups))
        else:
            with ThreadPoolExecutor(min(_THREADS, len(groups)), "tiercache-joined") as pool:
                found = list(pool.map(read, groups))
        for (_, where), of_part in zip(groups, found, strict=True):
            for place, table in zip(where.tolist(), of_part, strict=True):
                tables[place] = table
        return tables

    @property
    def selects_all(self) -> bool:
        """See Source.selects_all."""
        return all(source.selects_all for source in self.below)

    def stored_rows(
        self, shards: NDArray[np.int32], blocks: NDArray[np.int32], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """See Source.stored_rows."""
        groups = self._by_part(self._first_shard, shards.astype(np.int64))
        if len(groups) == 1:
            part = groups[0][0]
            return self.below[part].stored_rows(shards - np.int32(self._first_shard[part]), blocks, block, row)
        out, number, owner = row.copy(), np.zeros(len(shards), np.uint32), np.zeros(len(shards), np.int64)
        for part, where in groups:
            number[where], owner[where] = np.arange(len(where)), part
        owners = owner[block]
        for part, where in groups:
            rows = np.flatnonzero(owners == part)
            of_part = (shards[where] - np.int32(self._first_shard[part]), blocks[where])
            out[rows] = self.below[part].stored_rows(*of_part, number[block[rows]], row[rows])
        return out

    def record(self, number: int) -> dict[str, Any] | None:
        """See Readable.record."""
        if not 0 <= number < self.n_records:
            raise IndexError(f"record {number} of a data set of {self.n_records}")
        part = int(np.searchsorted(self._first_number, number, side="right")) - 1
        return self.below[part].record(number - int(self._first_number[part]))

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """See Readable.values."""
        if not len(records):
            return self.below[0].values(records)
        groups = self.of_parts(records)
        found = [self.below[part].values(records[where] - self._first_number[part]) for part, where in groups]
        return join_values(found, [where for _, where in groups])

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """See Readable.take_arrow."""
        groups = self.of_parts(records)
        found = [self.below[part].take_arrow(records[where] - self._first_number[part]) for part, where in groups]
        return join_arrow(found, [where for _, where in groups], self.schema)

    def of_parts(self, records: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Return (source index, indices of its records) for each source that has any of the records."""
        return self._by_part(self._first_number, records)

    def publish(self, plan: ReadingPlan) -> PublishedPlan | None:
        """See Source.publish. All views of one source share one plan, because there may be many views."""
        plans: dict[int, tuple[Readable, list[ReadingPlan]]] = {}
        for part, where in self._by_part(self._first_shard, plan.shards):
            own = part_of(plan, where, int(self._first_shard[part]))
            root = root_of(self.below[part])
            plans.setdefault(id(root), (root, []))[1].append(own)
        found: list[PublishedPlan] = []
        try:
            for root, of_root in plans.values():
                one = root.publish(merge_plans(of_root))
                if one is not None:
                    found.append(one)
        except BaseException:  # the plans published so far have no other owner that could withdraw them
            PublishedPlans(tuple(found)).close()
            raise
        return PublishedPlans(tuple(found))

    def prepare_reading(self, shards: NDArray[np.int64]) -> None:
        """See Source.prepare_reading. Views of one source are prepared together."""
        places = shards.astype(np.int64)
        of_root: dict[int, tuple[Readable, list[NDArray[np.int64]]]] = {}
        for part, where in self._by_part(self._first_shard, places):
            root = root_of(self.below[part])
            of_root.setdefault(id(root), (root, []))[1].append(places[where] - self._first_shard[part])
        for root, asked in of_root.values():
            root.prepare_reading(np.unique(np.concatenate(asked)))

    def prefetch(self, shards: Sequence[int]) -> None:
        """See Source.prefetch; each source prefetches its own shards."""
        places = np.array(shards, np.int64)
        for part, where in self._by_part(self._first_shard, places):
            self.below[part].prefetch((places[where] - self._first_shard[part]).tolist())

    def at_versions(self, versions: Sequence[int]) -> Joined:
        """Return the same sources at other versions, joined in the same way."""
        found, start = [], 0
        for source in self.below:
            stop = start + len(source.parts)
            found.append(source.at_versions(versions[start:stop]))
            start = stop
        return self._of(found)

    def with_columns(self, columns: Sequence[str]) -> Joined:
        """Return the same records with other columns."""
        return self._of([source.with_columns(columns) for source in self.below])

    def for_scan(self, columns: Sequence[str]) -> Joined:
        """See Readable.for_scan."""
        return self._of([source.for_scan(columns) for source in self.below])

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """See Readable.warm. Sources are warmed one after the other, each with its own progress."""
        places = np.array(shards, np.int64)
        for part, where in self._by_part(self._first_shard, places):
            self.below[part].warm(
                (places[where] - self._first_shard[part]).tolist(), jobs=jobs, on_progress=on_progress
            )

    def _of(self, below: Sequence[Readable]) -> Joined:
        """Return other sources, joined in the same way."""
        return Joined(below)

    def _by_part(self, first: NDArray[np.int64], numbers: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Return (source index, indices of its numbers) for each source that has any of the numbers.

        Args:
            first: First number of each source.
            numbers: int64[n], shard or record numbers.
        """
        parts = np.searchsorted(first, numbers, side="right") - 1
        return [(part, np.flatnonzero(parts == part)) for part in np.unique(parts).tolist()]


def _check_same(first: Schema, other: Schema, number: int) -> None:
    """Raise SchemaError for the first difference between the columns of data set 0 and data set `number`."""
    if set(first.names) == set(other.names) and first.names != other.names:
        message = (
            f"data set {number} has the same columns in another order: call select_columns({list(first.names)}) first"
        )
        raise SchemaError(message, expected=str(list(first.names)), got=str(list(other.names)))
    for mine, theirs in zip(first.columns, other.columns, strict=False):
        if mine.name != theirs.name or str(mine) != str(theirs):
            message = f"data set {number} has {theirs.name!r}: {theirs} where data set 0 has {mine.name!r}: {mine}"
            raise SchemaError(message, column=mine.name, expected=str(mine), got=str(theirs))
        if mine.classes and theirs.classes and mine.classes != theirs.classes:
            message = f"data set {number} has other class names for its labels than data set 0"
            raise SchemaError(message, column=mine.name, expected=str(mine.classes), got=str(theirs.classes))
    if len(first) != len(other):
        longer = (first if len(first) > len(other) else other).names[min(len(first), len(other))]
        message = f"data set {number} has {len(other)} columns and data set 0 has {len(first)}: only one has {longer!r}"
        raise SchemaError(message, column=longer, expected=str(list(first.names)), got=str(list(other.names)))


Stop = Literal["first", "all"]


@dataclass(frozen=True, slots=True)
class MixedSpec(JoinedSpec):
    """Spec of mixed sources."""

    weights: tuple[Any, ...]
    stop: Stop

    def open(self, opened: dict[int, Any]) -> Mixed:
        """See SourceSpec.open."""
        return Mixed([plan.open(opened) for plan in self.below], self.weights, self.stop)


class Mixed(Joined):
    """Several sources mixed; implements Readable. Shards are those of all sources, one source after the other.

    Record i is the record at position i of an unshuffled epoch: each source is taken in stored order, and again from
    its start after its end. n_records counts a record as often as an epoch serves it.

    Raises:
        SchemaError: The sources' columns differ.
        ValueError: A source has no records, or the weights are invalid.
    """

    def __init__(self, below: Sequence[Readable], weights: Sequence[Any], stop: Stop) -> None:
        # A mixture decides the order itself: explicit orders of the sources are dropped.
        super().__init__(
            [source if source.record_order is None else apply_step(source, StoredOrderStep()) for source in below]
        )
        self._weights, self._stop = tuple(weights), stop
        self._spec = MixtureSpec(tuple(self._first_shard[:-1].tolist()), self._weights, stop)
        self._records = StoredMixture(self._spec, self._spec.part_records(self.shard_records))
        self.n_records = len(self._records)

    @property
    def spec(self) -> MixedSpec:
        """See Readable.spec."""
        return MixedSpec(tuple(source.spec for source in self.below), self._weights, self._stop)

    @property
    def mixture(self) -> MixtureSpec:
        """Parts and weights of the mixture."""
        return self._spec

    def unmixed(self) -> Joined:
        """Return the sources joined: a shuffled epoch may serve records that have no number in the mixture."""
        return Joined(self.below)

    @property
    def is_in_stored_order(self) -> bool:
        """False: the sources alternate."""
        return False

    @cached_property
    def record_order(self) -> NDArray[np.int64]:
        """Explicit order of an unshuffled epoch, int64[n]: place of each record in stored order.

        Samplers number records by it. The native path does not use this array; it computes the order from the mixture.
        """
        return self._joined_numbers(np.arange(self.n_records))

    def record(self, number: int) -> dict[str, Any] | None:
        """See Readable.record."""
        part, within = self._records.locate(np.array([number]))
        return self.below[int(part[0])].record(int(within[0]))

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """See Readable.values."""
        return super().values(self._joined_numbers(records))

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """See Readable.take_arrow."""
        return super().take_arrow(self._joined_numbers(records))

    def _joined_numbers(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        part, within = self._records.locate(records)
        return self._first_number[part] + within

    def _of(self, below: Sequence[Readable]) -> Joined:
        return Mixed(below, self._weights, self._stop)
