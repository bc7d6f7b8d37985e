"""Records: what the loader and `Dataset` read. A selection over the shards of one or more opened versions.

Views, joined data sets and mixtures differ only in the selection and in the tree of nodes that made it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain, pairwise
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.data.opened_version import Leaf, LeafSpec, Storage, distinct
from tiercache.errors import ObjectChanged, SchemaError
from tiercache.model import SourcePart
from tiercache.order.epoch_order import derive_key
from tiercache.order.explicit import PermutedOrder, ServedOrder
from tiercache.order.mixture import MixtureSpec, Schedule, StoredMixture
from tiercache.order.window import BlockSizes
from tiercache.shard.blocks import Blocks
from tiercache.shard.schema import Column, Schema, check_same_columns
from tiercache.shard.values import ColumnValues, join_values
from tiercache.store.remote import call_threads


class Selection:
    """Record numbers of a source, each 0 or more, in served order; numbers may be repeated. Immutable.

    The sorted numbers are kept as runs, so a range costs the same whatever its length: 16 bytes per run, and 8 bytes
    per record if the served order is neither stored order nor a `PermutedOrder`. starts is the first number of each
    run, first the count of numbers before it, and order the place in stored order of each served record (None: stored
    order).
    """

    order: ServedOrder | None

    def __init__(self, starts: NDArray[np.int64], first: NDArray[np.int64], order: ServedOrder | None) -> None:
        self.starts = _frozen(starts)
        self.first = _frozen(first)
        self.order = _frozen(order) if isinstance(order, np.ndarray) else order

    @staticmethod
    def span(start: int, stop: int) -> Selection:
        """Return the selection of the numbers [start, stop); empty if stop <= start."""
        if stop <= start:
            return Selection(np.empty(0, np.int64), np.zeros(1, np.int64), None)
        return Selection(np.array([start], np.int64), np.array([0, stop - start], np.int64), None)

    @staticmethod
    def of(numbers: NDArray[np.int64]) -> Selection:
        """Return the selection of these numbers, int64[n], in this order."""
        if len(numbers) < 2 or bool((numbers[1:] >= numbers[:-1]).all()):
            return Selection(*runs_of(numbers), None)
        by_number = np.argsort(numbers, kind="stable")
        order = np.empty(len(numbers), np.int64)
        order[by_number] = np.arange(len(numbers))
        return Selection(*runs_of(numbers[by_number]), order)

    @staticmethod
    def of_runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Selection:
        """Return the selection of runs that never descend: first numbers and lengths, 1 or more."""
        if not len(starts):
            return Selection.span(0, 0)
        heads = np.flatnonzero(np.r_[True, starts[1:] != (starts + lengths)[:-1]])
        ends = np.cumsum(lengths)
        return Selection(starts[heads], np.r_[0, ends[np.r_[heads[1:] - 1, len(ends) - 1]]], None)

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def n_bytes(self) -> int:
        return self.starts.nbytes + self.first.nbytes + (self.order.nbytes if isinstance(self.order, np.ndarray) else 0)

    @property
    def stop(self) -> int:
        return int(self.starts[-1] + self.first[-1] - self.first[-2]) if len(self) else 0

    @cached_property
    def digest(self) -> str:
        """Hash of the numbers in served order: 32 hex digits."""
        found = hashlib.sha256(len(self.starts).to_bytes(8, "little"))
        for array in (self.starts, self.first, self.order):
            if isinstance(array, PermutedOrder):
                found.update(b"permuted" + array.key)
            elif array is not None:
                found.update(np.ascontiguousarray(array, "<i8").data)
        return found.hexdigest()[:32]

    def is_all(self, n: int) -> bool:
        return self.order is None and (self._is_order_of(n) or len(self) == n == 0)

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record numbers at served places, int64[n], each below len()."""
        return self.stored_numbers(places if self.order is None else self.order[places])

    def number(self, place: int) -> int:
        """Return the record number at one served place below len(): takes 2 us, `numbers` 6 us."""
        if self.order is not None:
            place = int(self.order[place])
        run = int(self.first.searchsorted(place, "right")) - 1
        return int(self.starts[run]) + place - int(self.first[run])

    def stored_numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record numbers at places of the stored order, int64[n], each below len()."""
        if len(self.starts) == 1:
            run: Any = 0
        else:
            run = np.searchsorted(self.first, places, side="right") - 1
        numbers: NDArray[np.int64] = self.starts[run] + (places - self.first[run])
        return numbers

    def n_below(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of the selection's numbers are below each number, int64[m]: its place in stored order."""
        if not len(self.starts):
            return np.zeros(len(numbers), np.int64)
        run = np.searchsorted(self.starts, numbers, side="left") - 1
        before = np.maximum(run, 0)
        lengths = self.first[before + 1] - self.first[before]
        inside = np.clip(numbers - self.starts[before], 0, lengths)
        return np.where(run < 0, 0, self.first[before] + inside)

    def compose(self, chosen: Selection) -> Selection:
        """Return the selection that `chosen` makes of this selection, by places in its served order."""
        if self.order is None and chosen.order is None:
            return self._cut(chosen) if len(chosen.starts) == 1 else self._compose_runs(chosen)
        if self.order is None and chosen._is_order_of(len(self)):
            return Selection(self.starts, self.first, chosen.order)
        places = chosen.numbers(np.arange(len(chosen)))
        return Selection.of(self.numbers(places))

    def _is_order_of(self, n: int) -> bool:
        """Whether the numbers are those below n, each once, in any order."""
        return len(self) == n and len(self.starts) == 1 and self.starts[0] == 0

    def _cut(self, chosen: Selection) -> Selection:
        """Return the selection of one run of places, by slicing (50 million runs: 0.2 s; `_compose_runs`: 10 s)."""
        low, high = int(chosen.starts[0]), chosen.stop
        begin, end = (np.searchsorted(self.first, [low, high - 1], side="right") - 1).tolist()
        starts = self.starts[begin : end + 1].copy()
        starts[0] += low - self.first[begin]
        return Selection(starts, np.clip(self.first[begin : end + 2], low, high) - low, None)

    def _compose_runs(self, chosen: Selection) -> Selection:
        """Return the selection of several runs of places. A run of places is cut where it crosses a run of numbers."""
        if not len(chosen):
            return chosen
        lengths = np.diff(chosen.first)
        low, high = chosen.starts, chosen.starts + lengths
        begin = np.searchsorted(self.first, low, side="right") - 1
        end = np.searchsorted(self.first, high - 1, side="right") - 1
        counts = end - begin + 1
        owner = np.repeat(np.arange(len(low)), counts)
        run = begin[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.maximum(low[owner], self.first[run])
        stop = np.minimum(high[owner], self.first[run + 1])
        return Selection.of_runs(self.starts[run] + (start - self.first[run]), stop - start)

    def __deepcopy__(self, memo: object) -> Selection:
        return self

    def __repr__(self) -> str:
        order = "" if self.order is None else ", permuted" if isinstance(self.order, PermutedOrder) else ", listed"
        return f"Selection({len(self)} records, {len(self.starts)} runs{order})"


def runs_of(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (starts, first) of numbers that never descend."""
    if not len(numbers):
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    heads = np.flatnonzero(np.r_[True, np.diff(numbers) != 1])
    return numbers[heads], np.r_[heads, len(numbers)]


def _frozen(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array = np.ascontiguousarray(array, np.int64)
    array.flags.writeable = False
    return array


# Number of cached sets of blocks: the window that is served, and the one that is prefetched.
KEPT_TABLES = 2
# Rows laid out at a time; each takes 40 bytes meanwhile.
LAID_OUT_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class BlockSpans:
    """Blocks, int64[k] each: number of the first record; selected records before the block, and in it."""

    stored: NDArray[np.int64]
    place: NDArray[np.int64]
    n_rows: NDArray[np.int64]


class RowTables:
    """Translates rows of a selection to rows of their blocks. Safe from any thread, and after a fork.

    If the selected rows of each block are one run, a row is shifted. Otherwise the rows of all the blocks are laid out
    once (4 bytes each) and looked up: a binary search per row would cost a cache miss per step.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._tables: OrderedDict[bytes, tuple[NDArray[np.int64], NDArray[np.uint32] | None]] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def rows(
        self, key: bytes, spans: Callable[[], BlockSpans], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """Return the rows in the stored blocks. key identifies the blocks; spans() is called if it is new."""
        if not len(block):
            return row
        shift, laid_out = self._table(key, spans)
        if laid_out is None:
            moved: NDArray[np.uint32] = row + shift.astype(np.uint32)[block] if shift.any() else row
            return moved
        found: NDArray[np.uint32] = laid_out[shift[block] + row]
        return found

    def _table(
        self, key: bytes, spans: Callable[[], BlockSpans]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32] | None]:
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            found = self._tables.get(key)
            if found is not None:
                self._tables.move_to_end(key)
                return found
        made = _lay_out(self._selection, spans())
        with self._lock:
            self._tables[key] = made
            while len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        return made


def _lay_out(selection: Selection, spans: BlockSpans) -> tuple[NDArray[np.int64], NDArray[np.uint32] | None]:
    """Return (shift of each block's rows, None), or (start of each block's rows in the layout, the layout)."""
    filled = spans.n_rows > 0
    place, n_rows, stored = spans.place[filled], spans.n_rows[filled], spans.stored[filled]
    shift = np.zeros(len(filled), np.int64)
    ends = np.searchsorted(selection.first, place + n_rows - 1, side="right")
    if bool((np.searchsorted(selection.first, place, side="right") == ends).all()):
        shift[filled] = selection.stored_numbers(place) - stored
        return shift, None
    last = np.cumsum(n_rows)
    shift[filled] = begin = last - n_rows
    laid_out = np.empty(int(last[-1]), np.uint32)
    cuts = np.searchsorted(last, np.arange(0, len(laid_out), LAID_OUT_ROWS), side="right").tolist()
    for lo, hi in pairwise([*dict.fromkeys(cuts), len(last)]):
        counts, rows = n_rows[lo:hi], slice(int(begin[lo]), int(last[hi - 1]))
        places = np.arange(rows.start, rows.stop) + np.repeat(place[lo:hi] - begin[lo:hi], counts)
        laid_out[rows] = selection.stored_numbers(places) - np.repeat(stored[lo:hi], counts)
    return shift, laid_out


Stop = Literal["first", "all"]
# Number of threads that read footers of several versions in parallel.
_THREADS = 16
_NO_BLOCKS = BlockSizes(np.empty(0, np.int64), np.empty(0, np.int64))


class Step:
    """One step of a view, evaluated anew on each version. Picklable; str() is the call that makes it."""

    __slots__ = ()
    # Whether the step selects by place alone, so that it can be merged into a list of records before it.
    selects_by_place: ClassVar[bool] = True

    def choose(self, records: Records) -> Selection:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RangeStep(Step):
    """Records [start, stop), for take(n) and skip(n); stop None: to the end."""

    start: int
    stop: int | None

    def choose(self, records: Records) -> Selection:
        n = records.n_records
        return Selection.span(min(self.start, n), n if self.stop is None else min(self.stop, n))

    def __str__(self) -> str:
        return f"skip({self.start:,})" if self.stop is None else f"take({self.stop:,})"


@dataclass(frozen=True, slots=True)
class ShardStep(Step):
    """One of n_shards runs of records, whose lengths differ by at most one; the longer runs come first."""

    n_shards: int
    index: int

    def choose(self, records: Records) -> Selection:
        length, n_longer = divmod(records.n_records, self.n_shards)
        start = self.index * length + min(self.index, n_longer)
        return Selection.span(start, start + length + (self.index < n_longer))

    def __str__(self) -> str:
        return f"shard({self.n_shards}, {self.index})"


@dataclass(frozen=True, slots=True)
class SelectStep(Step):
    """Records by their numbers. choose() raises IndexError if another version has fewer records."""

    selection: Selection

    def choose(self, records: Records) -> Selection:
        if self.selection.stop > records.n_records:
            raise IndexError(
                f"select() names record {self.selection.stop - 1}, but {records.url} has only {records.n_records} "
                "records"
            )
        return self.selection

    def __str__(self) -> str:
        return f"select(<{len(self.selection):,} numbers>)"


@dataclass(frozen=True, slots=True)
class ShuffleStep(Step):
    """All records in a random order, which follows from the seed and the number of records."""

    seed: int

    def choose(self, records: Records) -> Selection:
        n = records.n_records
        span = Selection.span(0, n)
        return Selection(span.starts, span.first, shuffled_order(self.seed, n)) if n else span

    def __str__(self) -> str:
        return f"shuffle({self.seed})"


def shuffled_order(seed: int, n: int) -> PermutedOrder:
    """Return the order of `shuffle` for n records, 1 or more. It must never change: states and splits depend on it."""
    return PermutedOrder(derive_key(seed, "shuffle of a view"), n)


class StoredOrderStep(Step):
    """All records, sorted in stored order; mix() applies it to records with an explicit order."""

    __slots__ = ()
    selects_by_place = False

    def choose(self, records: Records) -> Selection:
        order = records.record_order
        return Selection.span(0, records.n_records) if order is None else Selection.of(np.argsort(order))

    def __str__(self) -> str:
        return "in stored order"


@dataclass(frozen=True, slots=True)
class ViewNode:
    """Some of the records of the node below. selection None: evaluate the steps."""

    below: Node
    steps: tuple[Step, ...]
    selection: Selection | None
    selects_all: bool = False


@dataclass(frozen=True, slots=True)
class JoinNode:
    """The records of several nodes, one after the other, or mixed by weight if there are weights."""

    below: tuple[Node, ...]
    weights: tuple[int, ...] | Schedule = ()
    stop: Stop = "first"
    source: str | None = None  # name of the column that has the number of each record's source, if it is served


# How records are derived from the versions, which are the leaves of the tree, in order. None: a whole version.
Node: TypeAlias = ViewNode | JoinNode | None


@dataclass(frozen=True, slots=True)
class RecordsSpec:
    """Small picklable description of records: everything needed to open them, and nothing that is open."""

    leaves: tuple[LeafSpec, ...]
    node: Node

    @property
    def columns(self) -> tuple[str, ...]:
        source = self.node.source if isinstance(self.node, JoinNode) else None
        return self.leaves[0].columns if source is None else (*self.leaves[0].columns, source)

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(leaf.version for leaf in self.leaves)

    def open(self) -> Records:
        """Open the versions. A version that is joined several times is opened once."""
        opened = {id(leaf): leaf.open() for leaf in {id(leaf): leaf for leaf in self.leaves}.values()}
        return build(self.node, iter([opened[id(leaf)] for leaf in self.leaves]))


class Records:
    """Records of opened versions in served order. Immutable; all methods may be called from any thread.

    The shards of all leaves are numbered one leaf after the other, whatever is selected. Shards and blocks without
    selected records are never read, nor are their footers. first_record, shard_records and n_records count the selected
    records; n_records of a mixture counts a record as often as an epoch serves it. selection None: all in stored order.
    """

    def __init__(
        self,
        leaves: tuple[Leaf, ...],
        node: Node = None,
        selection: Selection | None = None,
        mixture: MixtureSpec | None = None,
    ) -> None:
        self.node, self.selection, self.mixture = node, selection, mixture
        tables = [leaf.table for leaf in leaves]
        self._leaf_shards = np.cumsum([0, *map(len, tables)])
        self._leaf_records = np.cumsum([0, *(int(table.first_record[-1]) for table in tables)])
        self._stored_first = tables[0].first_record
        self.shard_bytes: NDArray[np.int64] = tables[0].n_bytes
        if len(leaves) > 1:
            self._stored_first = np.r_[0, np.cumsum(np.concatenate([table.n_records for table in tables]))]
            self.shard_bytes = np.concatenate([table.n_bytes for table in tables])
        self.first_record = self._stored_first if selection is None else selection.n_below(self._stored_first)
        self.shard_records: NDArray[np.int64] = np.diff(self.first_record)
        self._rows = None if selection is None else RowTables(selection)
        self.n_records = int(self.first_record[-1])
        if mixture is not None:
            sizes = mixture.part_records(self.shard_records)
            self._part_first = np.cumsum([0, *sizes])
            self._mixed = StoredMixture(mixture, sizes)
            self.n_records = len(self._mixed)
        self._read(leaves)

    def _read(self, leaves: tuple[Leaf, ...]) -> None:
        self.leaves, self.schema, self.url = leaves, leaves[0].schema, leaves[0].stored.url
        name = self.node.source if isinstance(self.node, JoinNode) else None
        self._source_column = None if name is None else Column.of(name, "int32")
        if self._source_column is not None:
            self.schema = Schema([*self.schema.columns, self._source_column])
        self.storage = Storage(leaves, self._leaf_shards, self.shard_records)

    def _over(self, leaves: Iterator[Leaf]) -> Records:
        other = copy.copy(self)
        other._read(tuple(leaves))  # noqa: SLF001 -- of this class
        return other

    @property
    def spec(self) -> RecordsSpec:
        return RecordsSpec(tuple(leaf.spec for leaf in self.leaves), self.node)

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps that made this view, as calls in order; () if the records are not a view."""
        node, found = self.node, []
        while isinstance(node, ViewNode):
            found.append([str(step) for step in node.steps])
            node = node.below
        return tuple(step for steps in reversed(found) for step in steps)

    @property
    def n_joined(self) -> int:
        """Number of the data sets that were joined, below all views; 1 if none were."""
        node = self.node
        while isinstance(node, ViewNode):
            node = node.below
        return len(node.below) if isinstance(node, JoinNode) else 1

    @cached_property
    def parts(self) -> tuple[SourcePart, ...]:
        """The data sets that are read, one per leaf, with hashes of the selections; a state compares them."""
        return tuple(_parts(self.node, iter(self.leaves)))

    @cached_property
    def stored_schema(self) -> Schema:
        """Columns that all versions have with the same type, served or not."""
        schemas = {id(leaf.stored_schema): leaf.stored_schema for leaf in self.leaves}
        first, *others = (schema.columns for schema in schemas.values())
        types = [{c.name: str(c) for c in columns} for columns in others]
        return Schema([c for c in first if all(found.get(c.name) == str(c) for found in types)])

    @cached_property
    def record_order(self) -> ServedOrder | None:
        """Place of each served record in stored order; None: in that order. Samplers number a mixture by it."""
        if self.mixture is not None:
            return self._unmixed_numbers(np.arange(self.n_records))
        return None if self.selection is None else self.selection.order

    @property
    def is_in_stored_order(self) -> bool:
        """Whether each selected record is served once, in stored order."""
        return self.mixture is None and (self.selection is None or self.selection.order is None)

    @property
    def is_packed(self) -> bool:
        return self.leaves[0].fill_ratio is not None

    @property
    def fill_ratio(self) -> float | None:
        """Share of the positions of an epoch's packed rows that hold stored tokens; None if they are not packed rows.

        Of a view it is that of all rows.
        """
        ratios = [leaf.fill_ratio for leaf in self.leaves]
        n_rows = np.array([int(leaf.table.first_record[-1]) for leaf in self.leaves], np.float64)
        if not self.is_packed or not n_rows.sum():
            return None
        if self.mixture is not None:  # each part counts by its share of the epoch
            first_leaves = np.searchsorted(self._leaf_shards, self.mixture.first_shards)
            parts = np.split(n_rows, first_leaves[1:])
            shares = self.mixture.epoch_shares(self.mixture.part_records(self.shard_records))
            n_rows = np.concatenate([part * share / part.sum() for part, share in zip(parts, shares, strict=True)])
        return float(np.average(np.array(ratios, np.float64), weights=n_rows))

    def load_blocks(self, shard: int, blocks: Sequence[int]) -> Blocks:
        leaf, number = self.storage.locate(shard)
        loaded = leaf.load_blocks(number, blocks)
        return loaded if self._source_column is None else loaded.with_constant(self._part_of(shard))

    def _part_of(self, shard: int) -> int:
        return 0 if self.mixture is None else bisect_right(self.mixture.first_shards, shard) - 1

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """Return a whole stored block as Arrow arrays of the served columns, completely checked."""
        leaf, number = self.storage.locate(shard)
        arrays = leaf.stored.arrays(number, block)
        if self._source_column is None:
            return arrays
        return [*arrays, pa.array(np.full(len(arrays[0]), self._part_of(shard), np.int32))]

    def block_sizes(self, shards: Sequence[int]) -> list[BlockSizes]:
        """Return the selected records and the raw bytes of the blocks of shards, from their footers."""
        if self.node is None:
            return self.leaves[0].block_sizes(shards)
        chosen = [shard for shard in dict.fromkeys(shards) if self.shard_records[shard]]
        found = {shard: self._selected(shard, sizes) for shard, sizes in self._stored_block_sizes(chosen).items()}
        return [found.get(shard, _NO_BLOCKS) for shard in shards]

    def _selected(self, shard: int, sizes: BlockSizes) -> BlockSizes:
        if self.selection is None:
            return sizes
        bounds = np.r_[0, np.cumsum(sizes.records)] + self._stored_first[shard]
        return BlockSizes(np.diff(self.selection.n_below(bounds)), sizes.raw_bytes)

    def _stored_block_sizes(self, shards: Sequence[int]) -> dict[int, BlockSizes]:
        """Return the sizes of whole blocks by shard. Several versions are read in parallel."""
        groups = self.storage.by_leaf(shards)
        if len(groups) < 2:
            found = [leaf.block_sizes(numbers.tolist()) for leaf, _, numbers in groups]
        else:
            with call_threads(min(_THREADS, len(groups)), "tiercache-joined") as pool:
                found = list(pool.map(lambda group: group[0].block_sizes(group[2].tolist()), groups))
        return {
            shards[position]: sizes
            for (_, where, _), of_version in zip(groups, found, strict=True)
            for position, sizes in zip(where.tolist(), of_version, strict=True)
        }

    def stored_rows(
        self, shards: NDArray[np.int32], blocks: NDArray[np.int32], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """Return for selected rows their numbers among all rows of the stored block, uint32[n].

        shards, blocks: int32[k]. block: index of each row's block among the k. row: number among its selected rows.
        """
        selection = self.selection
        if selection is None or self._rows is None:
            return row
        key = shards.tobytes() + blocks.tobytes()
        return self._rows.rows(key, lambda: self._spans(selection, shards, blocks), block, row)

    def _spans(self, selection: Selection, shards: NDArray[np.int32], blocks: NDArray[np.int32]) -> BlockSpans:
        first, n_rows = np.empty(len(blocks), np.int64), np.empty(len(blocks), np.int64)
        for shard, sizes in self._stored_block_sizes(np.unique(shards).tolist()).items():
            where = np.flatnonzero(shards == shard)
            n_rows[where] = sizes.records[blocks[where]]
            first[where] = np.cumsum(sizes.records)[blocks[where]] - n_rows[where] + self._stored_first[shard]
        position = selection.n_below(first)
        return BlockSpans(first, position, selection.n_below(first + n_rows) - position)

    def record(self, number: int) -> dict[str, Any] | None:
        """Return a served record by column; None if it is not mapped: then call `values`. Raises IndexError."""
        if not 0 <= number < self.n_records:
            raise IndexError(f"record {number} of a data set of {self.n_records}")
        served = number
        if self.mixture is not None:
            number = int(self._unmixed_numbers(np.array([number]))[0])
        if self.selection is not None:
            number = self.selection.number(number)
        leaf = 0 if len(self.leaves) == 1 else int(self._leaf_records.searchsorted(number, side="right")) - 1
        record = self.leaves[leaf].record(number - int(self._leaf_records[leaf]))
        if self._source_column is not None and record is not None:
            record[self._source_column.name] = self._mixed.locate(np.array([served]))[0].astype(np.int32)[0]
        return record

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """Return the values of served records, int64[n], by column. Raises as `load`, and IndexError."""
        found = self._stored_values(records)
        if self._source_column is None:
            return found
        return [*found, ColumnValues(self._source_column, self._mixed.locate(records)[0].astype(np.int32))]

    def _stored_values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        numbers = self._stored_numbers(records)
        if len(self.leaves) == 1 or not len(numbers):
            return self.leaves[0].values(numbers)
        leaves = np.searchsorted(self._leaf_records, numbers, side="right") - 1
        found, positions = [], []
        for leaf in distinct(leaves).tolist():
            positions.append(np.flatnonzero(leaves == leaf))
            found.append(self.leaves[leaf].values(numbers[positions[-1]] - self._leaf_records[leaf]))
        return join_values(found, positions)

    def places(self, records: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (shard, stored block, indices of its records in `records`, their rows there), each block once."""
        numbers = self._stored_numbers(records)
        shards = np.searchsorted(self._stored_first, numbers, side="right") - 1
        for shard, sizes in self._stored_block_sizes(np.unique(shards).tolist()).items():
            where = np.flatnonzero(shards == shard)
            ends = np.cumsum(sizes.records) + self._stored_first[shard]
            blocks = np.searchsorted(ends, numbers[where], side="right")
            for block in np.unique(blocks).tolist():
                chosen = where[blocks == block]
                yield shard, block, chosen, numbers[chosen] - (ends[block] - sizes.records[block])

    def describe(self, record: int) -> str:
        """Return the name of a served record for an error: its data set, and its number among all records there."""
        return self._describe(int(self._stored_numbers(np.array([record]))[0]))

    def describe_at(self, shard: int, block: int, row: int) -> str:
        """Return the name of the record in a row of the selected rows of a block. May read a footer."""
        where = np.array([shard], np.int32), np.array([block], np.int32)
        stored_row = int(self.stored_rows(*where, np.zeros(1, np.uint32), np.array([row], np.uint32))[0])
        before = int(self._stored_block_sizes([shard])[shard].records[:block].sum())
        return self._describe(int(self._stored_first[shard]) + before + stored_row)

    def _describe(self, number: int) -> str:
        leaf = int(np.searchsorted(self._leaf_records, number, side="right")) - 1
        rows = "the packed rows of " if self.is_packed else ""
        url, version = self.leaves[leaf].stored.url, self.leaves[leaf].part.version
        return f"record {number - int(self._leaf_records[leaf])} of {rows}{url!r}, version {version}"

    def _unmixed_numbers(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        part, within = self._mixed.locate(records)
        return self._part_first[part] + within

    def _stored_numbers(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of served records among the stored records of all leaves."""
        if self.mixture is not None:
            records = self._unmixed_numbers(records)
        return records if self.selection is None else self.selection.numbers(records)

    def at_versions(self, versions: Sequence[int]) -> Records:
        """Return records selected and joined in the same way at other versions. Raises NotFound."""
        leaves = [leaf.at_version(number) for leaf, number in zip(self.leaves, versions, strict=True)]
        return build(self.node, iter(leaves), is_known=False)

    def with_columns(self, columns: Sequence[str]) -> Records:
        """Return the same records with other columns of the stored schema. Raises SchemaError for an unknown column.

        The column of a mixture's source comes last.
        """
        own = None if self._source_column is None else self._source_column.name
        stored = [name for name in columns if name != own]
        if not stored:
            raise SchemaError("a mixture serves this column beside others only: name another column too", column=own)
        other = copy.copy(self)
        if isinstance(self.node, JoinNode):
            other.node = replace(self.node, source=own if own in columns else None)
        other._read(tuple(leaf.with_columns(stored) for leaf in self.leaves))  # noqa: SLF001 -- of this class
        return other

    def for_scan(self, columns: Sequence[str]) -> Records:
        """Return records for a single pass over columns: uncached shards bypass the cache, to evict no others."""
        return self._over(leaf.stored.with_columns(columns, past_cache=True) for leaf in self.leaves)

    def with_step(self, step: Step, chosen: Selection | None = None) -> Records:
        """Return the view that a step makes (chosen: its result, if known). Lists of numbers are merged."""
        chosen, node = step.choose(self) if chosen is None else chosen, self.node
        if not isinstance(node, ViewNode) or node.selection is None:
            return _view(self, (step,), chosen)
        steps, selection, last = (*node.steps, step), node.selection.compose(chosen), node.steps[-1]
        if step.selects_by_place and isinstance(last, SelectStep):
            merged = selection if len(node.steps) == 1 else last.selection.compose(chosen)
            steps = (*node.steps[:-1], SelectStep(merged))
        return _view(build(node.below, iter(self.leaves)), steps, selection)


def build(node: Node, leaves: Iterator[Leaf], *, is_known: bool = True) -> Records:
    """Return the records that a tree makes of versions. is_known: Whether the selections in the tree are valid."""
    if node is None:
        return Records((next(leaves),))
    if isinstance(node, JoinNode):
        below = [build(one, leaves, is_known=is_known) for one in node.below]
        return mix(below, node.weights, node.stop, node.source) if node.weights else join(below)
    records = build(node.below, leaves, is_known=is_known)
    if is_known and node.selection is not None:
        return _view(records, node.steps, node.selection)
    for step in node.steps:
        records = records.with_step(step)
    return records


def _view(below: Records, steps: tuple[Step, ...], selection: Selection) -> Records:
    if selection.stop > below.n_records:
        message = "the selection names records beyond the end of the data set"
        raise ObjectChanged(message, url=below.url, expected=selection.stop, found=below.n_records)
    stored = selection if below.selection is None else below.selection.compose(selection)
    node = ViewNode(below.node, steps, selection, selection.is_all(below.n_records))
    return Records(below.leaves, node, stored)


def _parts(node: Node, leaves: Iterator[Leaf]) -> list[SourcePart]:
    if node is None:
        return [next(leaves).part]
    if isinstance(node, JoinNode):
        return [part for below in node.below for part in _parts(below, leaves)]
    parts = _parts(node.below, leaves)
    if node.selects_all or node.selection is None:
        return parts
    digest, found = node.selection.digest, []
    for part in parts:
        both = sha256(f"{part.selection}/{digest}".encode()).hexdigest()[: len(digest)]
        found.append(replace(part, selection=digest if part.selection is None else both))
    return found


def join(parts: Sequence[Records]) -> Records:
    """Return the records of all parts in turn. Raises SchemaError for the first difference of their columns."""
    schemas = {id(part.schema): (part.schema, number) for number, part in reversed(list(enumerate(parts)))}
    for schema, number in schemas.values():  # many views of one data set share one schema: check it once
        check_same_columns(parts[0].schema, schema, names=("data set 0", f"data set {number}"))
    leaves = tuple(leaf for part in parts for leaf in part.leaves)
    nodes = [part.node.below if isinstance(part.node, JoinNode) else (part.node,) for part in parts]
    return Records(leaves, JoinNode(tuple(chain.from_iterable(nodes))), _joined_selection(parts))


def _joined_selection(parts: Sequence[Records]) -> Selection | None:
    if all(part.selection is None for part in parts):
        return None
    starts, lengths, orders, n_stored, n_records = [], [], [], 0, 0
    for part in parts:
        n_part = int(part._stored_first[-1])  # noqa: SLF001 -- of this module
        selection = Selection.span(0, n_part) if part.selection is None else part.selection
        starts.append(selection.starts + n_stored)
        lengths.append(np.diff(selection.first))
        order = np.arange(len(selection)) if selection.order is None else np.asarray(selection.order)
        orders.append(n_records + order)
        n_stored, n_records = n_stored + n_part, n_records + len(selection)
    joined = Selection.of_runs(np.concatenate(starts), np.concatenate(lengths))
    is_listed = any(part.selection is not None and part.selection.order is not None for part in parts)
    return Selection(joined.starts, joined.first, np.concatenate(orders)) if is_listed else joined


def mix(parts: Sequence[Records], weights: Sequence[Any], stop: Stop, source: str | None = None) -> Records:
    """Return the parts mixed by weight: record i is the record at position i of an unshuffled epoch.

    source: name of an added column with the number of each record's part. Raises SchemaError: there is such a column.
    """
    if source is not None and source in parts[0].schema.names:
        raise SchemaError("the data sets have a column of this name: give source= another name", column=source)
    # A mixture decides the order itself: explicit orders of the parts are dropped.
    parts = [part if part.record_order is None else part.with_step(StoredOrderStep()) for part in parts]
    joined = join(parts)
    n_shards = [len(part.shard_records) for part in parts]
    mixture = MixtureSpec(tuple(np.cumsum([0, *n_shards[:-1]]).tolist()), tuple(weights), stop)
    node = JoinNode(tuple(part.node for part in parts), mixture.weights, stop, source)
    return Records(joined.leaves, node, joined.selection, mixture)
