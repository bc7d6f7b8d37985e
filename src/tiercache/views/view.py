"""View: some records of a source; itself a source.

Each step selects from the records of the step before; `SelectionMethods` are the methods of `Dataset` that add a step.
"""

from __future__ import annotations

import operator
import pickle
import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import pyarrow.compute as pc

from tiercache._native.record_finder import normalize_indices
from tiercache.errors import NotFound, ObjectChanged
from tiercache.order import BlockTable
from tiercache.views.scan import matching
from tiercache.views.selection import BlockSpans, RowTables, Selection

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.cache import WarmProgress
    from tiercache.model import CloseListener, PublishedPlan, ReadingPlan, SourcePart
    from tiercache.order.mixture import MixtureSpec
    from tiercache.shard.format.statistics import Statistics
    from tiercache.shard.read.blocks import Blocks
    from tiercache.shard.read.values import ColumnValues
    from tiercache.shard.schema import Schema
    from tiercache.views.selection import Readable, SourceSpec, VersionHandle


class ViewStep(Protocol):
    """One step of a view, evaluated anew on each version."""

    selects_by_place: ClassVar[bool]
    """Whether it selects by place alone, so that it can be merged into a list of records before it."""

    def choose(self, source: Readable) -> Selection:
        """Return which of the source's records stay, as served places."""


@dataclass(frozen=True, slots=True)
class RangeStep:
    """Records [start, stop), for take(n) and skip(n); stop None: to the end."""

    start: int
    stop: int | None

    selects_by_place: ClassVar[bool] = True

    def choose(self, source: Readable) -> Selection:
        """See ViewStep.choose."""
        n = source.n_records
        return Selection.span(min(self.start, n), n if self.stop is None else min(self.stop, n))


@dataclass(frozen=True, slots=True)
class ShardStep:
    """One of n_shards runs of records, whose lengths differ by at most one; the longer runs come first."""

    n_shards: int
    index: int

    selects_by_place: ClassVar[bool] = True

    def choose(self, source: Readable) -> Selection:
        """See ViewStep.choose."""
        length, n_longer = divmod(source.n_records, self.n_shards)
        start = self.index * length + min(self.index, n_longer)
        return Selection.span(start, start + length + (self.index < n_longer))


@dataclass(frozen=True, slots=True)
class SelectStep:
    """Records by their numbers. choose() raises IndexError if another version has fewer records."""

    selection: Selection

    selects_by_place: ClassVar[bool] = True

    def choose(self, source: Readable) -> Selection:
        """See ViewStep.choose."""
        if self.selection.stop > source.n_records:
            raise IndexError(
                f"select() names record {self.selection.stop - 1}, but {source.url} has only {source.n_records} records"
            )
        return self.selection


@dataclass(frozen=True, slots=True)
class StoredOrderStep:
    """All records, sorted in stored order; mix() applies it to sources with an explicit order."""

    selects_by_place: ClassVar[bool] = False

    def choose(self, source: Readable) -> Selection:
        """See ViewStep.choose."""
        listed = source.record_order
        return Selection.span(0, source.n_records) if listed is None else Selection.of(np.argsort(listed))


@dataclass(frozen=True, slots=True)
class FilterStep:
    """Records for which an expression is true."""

    expression: pc.Expression

    selects_by_place: ClassVar[bool] = False

    def choose(self, source: Readable) -> Selection:
        """See ViewStep.choose. Raises SchemaError for an unknown column, and the errors of reading."""
        return matching(source, self.expression)

    def __reduce__(self) -> tuple[Any, ...]:
        return _filter, (
            zlib.compress(pickle.dumps(self.expression), 9),
        )  # 0.6 KB instead of 2.2 KB, most of which are zeros


def _filter(compressed: bytes) -> FilterStep:
    return FilterStep(pickle.loads(zlib.decompress(compressed)))  # noqa: S301 -- part of a pickle itself


_NO_BLOCKS = BlockTable(np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """Spec of a view.

    Attributes:
        below: Spec of the source below.
        steps: Steps that select the records.
        selection: Result of the steps; None: evaluate them when the view is opened.
    """

    below: SourceSpec
    steps: tuple[ViewStep, ...]
    selection: Selection | None

    @property
    def columns(self) -> tuple[str, ...]:
        """See SourceSpec.columns."""
        return self.below.columns

    @property
    def versions(self) -> tuple[int, ...]:
        """See SourceSpec.versions."""
        return self.below.versions

    def open(self, opened: dict[int, Any]) -> View:
        """See SourceSpec.open."""
        return View.of(self.below.open(opened), self.steps, self.selection)

    def __reduce__(self) -> tuple[Any, ...]:
        # A single Select step contains the selection itself.
        unsaid = self.selection is not None and self.steps != (SelectStep(self.selection),)
        packed = self.selection.pack() if self.selection is not None and unsaid else None
        return _chosen, (self.below, self.steps, packed)


def _chosen(below: SourceSpec, steps: tuple[ViewStep, ...], packed: tuple[Any, ...] | None) -> ViewSpec:
    try:
        selection = None if packed is None else Selection.unpack(packed)
    except NotFound:
        selection = None  # the steps are evaluated again; a list of record numbers has its own file
    return ViewSpec(below, steps, selection)


class DerivedSource:
    """Base of views and joined sources: what needs only the sources below, and the source that has a shard.

    Attributes:
        below: Sources, whose shards are numbered one source after the other.
    """

    below: tuple[Readable, ...]

    def of_shard(self, shard: int) -> tuple[Readable, int]:
        """Return the source that has a shard, and the shard's number in that source."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """URL of the first source."""
        return self.below[0].url

    @property
    def schema(self) -> Schema:
        """Served columns, in order, which are the same in all sources."""
        return self.below[0].schema

    @cached_property
    def opened_versions(self) -> tuple[VersionHandle, ...]:
        """Opened versions below all sources, each once."""
        return tuple({id(leaf): leaf for source in self.below for leaf in source.opened_versions}.values())

    @property
    def record_order(self) -> NDArray[np.int64] | None:
        """See Source.record_order."""
        raise NotImplementedError

    @property
    def is_in_stored_order(self) -> bool:
        """Whether there is no explicit order."""
        return self.record_order is None

    @property
    def mixture(self) -> MixtureSpec | None:
        """None: the sources are not mixed."""
        return None

    def load(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """See Source.load."""
        source, number = self.of_shard(shard)
        return source.load(number, blocks)

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """See Readable.arrays. It returns the whole block."""
        source, number = self.of_shard(shard)
        return source.arrays(number, block)

    def statistics(self, shard: int) -> Statistics:
        """See Readable.statistics. They describe the whole shard."""
        source, number = self.of_shard(shard)
        return source.statistics(number)

    @property
    def has_cache(self) -> bool:
        """See Source.has_cache; true if it is true of any source."""
        return any(source.has_cache for source in self.below)

    @property
    def can_prefetch(self) -> bool:
        """See Source.can_prefetch; true if it is true of any source."""
        return any(source.can_prefetch for source in self.below)

    def is_mapped(self, shard: int) -> bool:
        """See Source.is_mapped."""
        source, number = self.of_shard(shard)
        return source.is_mapped(number)

    def is_local(self, shard: int) -> bool:
        """See Source.is_local."""
        source, number = self.of_shard(shard)
        return source.is_local(number)

    def discard_corrupt_copy(self, shard: int) -> bool:
        """See Source.discard_corrupt_copy."""
        source, number = self.of_shard(shard)
        return source.discard_corrupt_copy(number)

    def figures(self) -> Mapping[str, float]:
        """See Source.figures: sums over all versions; counters of a shared cache count once."""
        sums: dict[str, float] = {}
        caches: set[int] = set()
        for leaf in self.opened_versions:
            for name, figure in leaf.figures().items():
                if not (name.startswith("cache_") and id(leaf.cache) in caches):
                    sums[name] = sums.get(name, 0) + figure
            caches.add(id(leaf.cache))
        return sums

    def close(self) -> None:
        """See Readable.close."""
        for leaf in self.opened_versions:
            leaf.close()

    def on_close(self, keeper: CloseListener) -> None:
        """See Source.on_close: the listener is notified when any source is closed."""
        for source in self.below:
            source.on_close(keeper)


class View(DerivedSource):
    """Some records of a source; implements Readable. Shards keep their numbers and count only the view's records.

    Shards and blocks without selected records are never read, nor are their footers. Safe from any thread.

    Args:
        below: Source that the view selects from.
        steps: Steps that led to the selection, for other versions.
        selection: Selected records, as served places of `below`.
    """

    def __init__(self, below: Readable, steps: tuple[ViewStep, ...], selection: Selection) -> None:
        if selection.stop > below.n_records:
            raise ObjectChanged(
                "the selection names records beyond the end of the data set",
                url=below.url,
                expected=selection.stop,
                found=below.n_records,
            )
        self.source = below
        self.below = (below,)
        self.steps = steps
        self.selection = selection
        self.n_records = len(selection)
        # If the source below has an explicit order, its served numbers differ from the stored numbers that shards
        # count.
        listed = below.record_order
        served = selection if listed is None else Selection.of(listed[selection.numbers(np.arange(len(selection)))])
        self._stored = served
        self._places = served.n_below(below.first_record)
        self._tables = RowTables(served)

    @staticmethod
    def of(below: Readable, steps: Sequence[ViewStep], selection: Selection | None = None) -> View:
        """Return the view that steps make, one after the other.

        Args:
            below: Source to select from.
            steps: One or more steps.
            selection: Result of the steps if it is known.
        """
        if selection is not None:
            return View(below, tuple(steps), selection)
        view = apply_step(below, steps[0])
        for step in steps[1:]:
            view = apply_step(view, step)
        return view

    def of_shard(self, shard: int) -> tuple[Readable, int]:
        """Return the source below; shards keep their numbers."""
        return self.source, shard

    @property
    def spec(self) -> ViewSpec:
        """See Readable.spec."""
        return ViewSpec(self.source.spec, self.steps, self.selection)

    @cached_property
    def parts(self) -> tuple[SourcePart, ...]:
        """Parts of the source below, with the hash of the selection."""
        if self.selection.is_all(self.source.n_records):
            return self.source.parts
        return tuple(
            replace(part, selection=_combined(part.selection, self.selection.digest)) for part in self.source.parts
        )

    @property
    def stored_schema(self) -> Schema:
        """All stored columns."""
        return self.source.stored_schema

    @property
    def first_record(self) -> NDArray[np.int64]:
        """int64[n_shards + 1]: the view's records before each shard, in stored order, then all its records."""
        return self._places

    @cached_property
    def shard_records(self) -> NDArray[np.int64]:
        """Number of the view's records in each shard, int64[n_shards]."""
        return np.diff(self._places)

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Stored bytes of each whole shard, int64[n_shards]."""
        return self.source.shard_bytes

    @property
    def record_order(self) -> NDArray[np.int64] | None:
        """Explicit order, int64[n]: place of each served record in stored order. None: stored order."""
        return self._stored.order

    def block_tables(self, shards: Sequence[int]) -> list[BlockTable]:
        """Return for each shard the view's records in each block, and the raw bytes of the whole block.

        Shards without selected records have no blocks.
        """
        chosen = [shard for shard in dict.fromkeys(shards) if self.shard_records[shard]]
        found = dict(zip(chosen, self.source.block_tables(chosen), strict=True))
        return [self._counted(shard, found[shard]) if shard in found else _NO_BLOCKS for shard in shards]

    @property
    def selects_all(self) -> bool:
        """False: a view is a selection."""
        return False

    def stored_rows(
        self, shards: NDArray[np.int32], blocks: NDArray[np.int32], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """Return the rows of the stored blocks at which the view's rows lie, uint32[n]."""
        key = shards.tobytes() + blocks.tobytes()
        rows = self._tables.rows(key, lambda: self._spans(shards, blocks), block, row)
        return self.source.stored_rows(shards, blocks, block, rows)

    def record(self, number: int) -> dict[str, Any] | None:
        """See Readable.record."""
        if not 0 <= number < self.n_records:
            raise IndexError(f"record {number} of a data set of {self.n_records}")
        return self.source.record(self.selection.number(number))

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """See Readable.values."""
        return self.source.values(self.selection.numbers(records))

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """See Readable.take_arrow."""
        return self.source.take_arrow(self.selection.numbers(records))

    def publish(self, plan: ReadingPlan) -> PublishedPlan | None:
        """See Source.publish; shards keep their numbers."""
        return self.source.publish(plan)

    def prepare_reading(self, shards: NDArray[np.int64]) -> None:
        """See Source.prepare_reading; only shards with selected records count."""
        self.source.prepare_reading(shards[self.shard_records[shards] > 0])

    def prefetch(self, shards: Sequence[int]) -> None:
        """See Source.prefetch; only shards with selected records are fetched."""
        self.source.prefetch([shard for shard in shards if self.shard_records[shard]])

    def at_versions(self, versions: Sequence[int]) -> View:
        """Return the same steps, evaluated on other versions."""
        return View.of(self.source.at_versions(versions), self.steps)

    def with_columns(self, columns: Sequence[str]) -> View:
        """Return the same records with other columns."""
        return View(self.source.with_columns(columns), self.steps, self.selection)

    def for_scan(self, columns: Sequence[str]) -> View:
        """See Readable.for_scan."""
        return View(self.source.for_scan(columns), self.steps, self.selection)

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """See Readable.warm; only shards with selected records are fetched."""
        chosen = [shard for shard in shards if self.shard_records[shard]]
        self.source.warm(chosen, jobs=jobs, on_progress=on_progress)

    def _spans(self, shards: NDArray[np.int32], blocks: NDArray[np.int32]) -> BlockSpans:
        """Return the spans of k blocks, given by shard and number in the shard."""
        first, n_rows = np.empty(len(blocks), np.int64), np.empty(len(blocks), np.int64)
        named = np.unique(shards)
        for shard, table in zip(named.tolist(), self.source.block_tables(named.tolist()), strict=True):
            where = np.flatnonzero(shards == shard)
            ends = np.cumsum(table.records)[blocks[where]]
            n_rows[where] = table.records[blocks[where]]
            first[where] = ends - n_rows[where] + self.source.first_record[shard]
        place = self._stored.n_below(first)
        return BlockSpans(first, place, self._stored.n_below(first + n_rows) - place)

    def _counted(self, shard: int, table: BlockTable) -> BlockTable:
        bounds = np.r_[0, np.cumsum(table.records)] + self.source.first_record[shard]
        return BlockTable(np.diff(self._stored.n_below(bounds)), table.raw_bytes)


def apply_step(source: Readable, step: ViewStep) -> View:
    """Return the view that a step makes of a source. Views of views, and lists of numbers, are merged."""
    chosen = step.choose(source)
    if not isinstance(source, View):
        return View(source, (step,), chosen)
    last, selection = source.steps[-1], source.selection.compose(chosen)
    if not step.selects_by_place or not isinstance(last, SelectStep):
        return View(source.source, (*source.steps, step), selection)
    listed = selection if len(source.steps) == 1 else last.selection.compose(chosen)
    return View(source.source, (*source.steps[:-1], SelectStep(listed)), selection)


def _combined(before: str | None, digest: str) -> str:
    return digest if before is None else sha256(f"{before}/{digest}".encode()).hexdigest()[: len(digest)]


class SelectionMethods:
    """Mixin with the selection methods of a data set. They return views: fewer records with the same output options.

    A view is a data set in every respect: any loader reads it, `tiercache.DataLoader` by its native path; it can be
    pickled, resumed and selected from again. A range of records costs nothing per record, other selections some bytes.
    Shards and blocks without selected records are never read.
    """

    @property
    @abstractmethod
    def _source(self) -> Readable:
        """Opened source of the data set."""

    @abstractmethod
    def _derive(self, source: Readable) -> Self:
        """Return the same data set over another source."""

    def select(self, chosen: Any) -> Self:
        """Return the records with these numbers, in this order; or the records for which a mask is true.

        With shuffle=False a loader keeps the order of the numbers; with shuffle=True it shuffles the records as usual.

        Args:
            chosen: Record numbers (a sequence, array or tensor of integers; negative ones count from the end;
                repetitions are allowed), or a mask of len() booleans.

        Raises:
            IndexError: A record does not exist.
            ValueError: The mask has the wrong length.
            TypeError: The argument is neither numbers nor a mask.
        """
        n = self._source.n_records
        if isinstance(chosen, pc.Expression) or callable(chosen):
            raise TypeError("select() takes record numbers or a mask; filter() takes a pyarrow expression")
        if isinstance(chosen, range):
            return self._choose(SelectStep(_of_range(chosen, n)))
        given = np.asarray(chosen)
        if given.ndim != 1:
            found = f"{given.ndim} dimensions" if given.ndim else f"the type {type(chosen).__name__}"
            raise TypeError(f"select() takes a list or array of record numbers or a mask, got {found}")
        if given.dtype == np.bool_:
            if len(given) != n:
                raise ValueError(f"the mask has {len(given)} values for {n} records; it needs one value per record")
            return self._choose(SelectStep(Selection.of(np.flatnonzero(given))))
        return self._choose(SelectStep(Selection.of(record_numbers(given, n))))

    def filter(self, expression: pc.Expression) -> Self:
        """Return the records for which an expression is true, in their order; null is not true.

        The columns of the expression are read now, block by block in bounded memory. Shards whose minimum and maximum
        rule out a match are not read. The columns need not be among the served columns.

        Args:
            expression: Expression such as `pyarrow.compute.field("label") == 3`. It sees images and JSON as bytes and
                text.

        Raises:
            SchemaError: A column does not exist, or the expression is not a condition over the columns.
            TypeError: The argument is not an expression.
        """
        if not isinstance(expression, pc.Expression):
            raise TypeError(
                f"filter() takes a pyarrow expression, such as pyarrow.compute.field('label') == 3, got {expression!r};"
                " for a Python function: dataset.select([i for i, record in enumerate(dataset) if function(record)])"
            )
        return self._choose(FilterStep(expression))

    def shard(self, num_shards: int, index: int) -> Self:
        """Return part `index` of `num_shards` runs of consecutive records, whose lengths differ by at most one.

        Args:
            num_shards: Number of runs, 1 or more.
            index: Number of the run, 0 <= index < num_shards.

        Raises:
            ValueError: num_shards is below 1, or index is outside [0, num_shards).
        """
        num_shards, index = operator.index(num_shards), operator.index(index)
        if num_shards < 1:
            raise ValueError(f"num_shards must be 1 or more, got {num_shards}")
        if not 0 <= index < num_shards:
            raise ValueError(f"index must be 0 to {num_shards - 1}, got {index}")
        return self._choose(ShardStep(num_shards, index))

    def take(self, n: int) -> Self:
        """Return the first n records, or all records if there are fewer.

        Args:
            n: Number of records, 0 or more.

        Raises:
            ValueError: n is negative.
        """
        return self._choose(RangeStep(0, _count(n)))

    def skip(self, n: int) -> Self:
        """Return all records except the first n; none if there are fewer.

        Args:
            n: Number of records, 0 or more.

        Raises:
            ValueError: n is negative.
        """
        return self._choose(RangeStep(_count(n), None))

    def _choose(self, step: ViewStep) -> Self:
        source = self._source
        if source.mixture is not None:
            raise ValueError("cannot select from a mixture: select from the data sets before mix()")
        return self._derive(apply_step(source, step))


def record_numbers(indices: Any, n: int) -> NDArray[np.int64]:
    """Return record numbers as int64[n], 0 <= number < n, with negative ones counted from the end.

    Raises:
        IndexError: A record does not exist.
        TypeError: A number is not an integer.
    """
    rows = np.asarray(indices)
    if rows.dtype == np.bool_ or (rows.size and rows.dtype.kind not in "iu"):
        hints = {"O": ": a number is missing or has more than 64 bits"}
        hints["U"] = f" ({indices!r:.60}): columns are chosen by select_columns([...])"
        raise TypeError(f"record numbers must be integers, got {rows.dtype}{hints.get(rows.dtype.kind, '')}")
    if rows.size and rows.dtype == np.uint64 and int(rows.max()) >= n:  # as int64 it may be -1
        raise IndexError(f"record {int(rows.max())} of a data set of {n}")
    return normalize_indices(np.ascontiguousarray(rows, np.int64).reshape(-1), n)


def _of_range(chosen: range, n: int) -> Selection:
    """Return the selection of a range, without an array if the range is contiguous."""
    if not chosen:
        return Selection.span(0, 0)
    for end in (chosen[0], chosen[-1]):
        if not -n <= end < n:
            raise IndexError(f"record {end} of a data set of {n}")
    if chosen.step == 1 and chosen.start >= 0:
        return Selection.span(chosen.start, chosen.stop)
    # np.arange is 100 times faster than converting the range object.
    return Selection.of(record_numbers(np.arange(chosen.start, chosen.stop, chosen.step), n))


def _count(n: int) -> int:
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"the number of records must be 0 or more, got {n}")
    return n
