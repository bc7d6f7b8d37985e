"""The methods of a data set that return views of it: select, filter, shard, take, skip, shuffle, split."""

from __future__ import annotations

import operator
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow.compute as pc

from tiercache._native.record_finder import normalize_indices
from tiercache.data.records import FilterStep, RangeStep, SelectStep, ShardStep, ShuffleStep, Step
from tiercache.data.selection import Selection
from tiercache.data.split import Split, SplitStep, hash_splits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from tiercache.data.records import Records


class SelectionMethods:
    """Mixin with the selection methods of a data set. They return views: fewer records with the same output options.

    A view is a data set in every respect: any loader reads it, `tiercache.DataLoader` by its native path; it can be
    pickled, resumed and selected from again. A range of records costs nothing per record, other selections some bytes.
    Shards and blocks without selected records are never read.
    """

    @property
    @abstractmethod
    def _source(self) -> Records:
        """Opened records of the data set."""

    @abstractmethod
    def _derive(self, source: Records) -> Self:
        """Return the same data set over other records."""

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

    def shuffle(self, seed: int) -> Self:
        """Return the records in a random order, which is the same each time.

        Every order of the records is as likely as any other, so `shuffle(0).take(100)` is a fair sample. The order
        follows from the seed and the number of records; it is computed when it is read and takes no memory, while a
        selection from the view takes 8 to 24 bytes for each of its records. With shuffle=False a loader serves that
        order, in which neighbours lie in different blocks: it is fast if the data is local and uncompressed, or fits
        into the memory of a window. For training use the loader's own shuffle=True, which reads whole blocks and does
        not depend on this order.

        Args:
            seed: Any integer.
        """
        return self._choose(ShuffleStep(operator.index(seed)))

    def split(
        self, fractions: Mapping[str, float], *, seed: int = 0, by: str | None = None, by_hash: str | None = None
    ) -> dict[str, Self]:
        """Return disjoint parts that together are all records, each in the order of this data set.

        Without `by` and `by_hash`, and with `by`, the records are drawn: the first part has the records that
        `shuffle(seed)` puts first, the second part the next ones, and so on. The sizes are the exact fractions, rounded
        by the largest remainder. With `by`, each class is split so by itself: each part gets its exact share of the
        class, rounded down or up. With `by_hash`, the key of a record decides its part: records of equal keys stay
        together, a record keeps its part if data is appended or repacked, and the sizes are only about the fractions.

        The same seed, records and fractions give the same parts on every machine and in every later release. Splitting
        takes about 40 bytes per record; the parts keep 16 bytes for each run of consecutive records.

        Args:
            fractions: Fraction of the records by name of the part, each above 0; they sum up to 1. A float stands for
                its decimal digits.
            seed: Any integer.
            by: Column of classes (integers, bool or text) of which each part gets its share; null is a class too.
            by_hash: Column of keys (integers, text or bytes). The part is found by the first 8 bytes of BLAKE2b of the
                key (docs/guide/datasets.md). Hashing takes 1 to 3 us for each key.

        Raises:
            SchemaError: A column does not exist, or its values are no classes or keys.
            ValueError: The fractions do not sum up to 1; a part would have no records; both `by` and `by_hash` are
                given; this is a part of a split by the same hash and seed; or this is a mixture.
            TypeError: The fractions are not a mapping to numbers.
        """
        split = Split.of(fractions, operator.index(seed), by, by_hash)
        source = self._unmixed_source()
        if by_hash is not None and (by_hash, split.seed) in hash_splits(source.node):
            raise ValueError(
                f"these records are a part of a split by the hash of {by_hash!r} with seed={split.seed}, and the same "
                "hash would not divide them by the fractions: give another seed="
            )
        steps = [SplitStep(split, part) for part in range(len(split.names))]
        chosen = zip(split.names, steps, split.parts(source), strict=True)
        return {name: self._derive(source.with_step(step, part)) for name, step, part in chosen}

    def _choose(self, step: Step) -> Self:
        return self._derive(self._unmixed_source().with_step(step))

    def _unmixed_source(self) -> Records:
        source = self._source
        if source.mixture is not None:
            raise ValueError("cannot select from a mixture: select from the data sets before mix()")
        return source


def record_numbers(indices: Any, n: int) -> NDArray[np.int64]:
    """Return record numbers as int64[n], 0 <= number < n, with negative ones counted from the end.

    Raises IndexError and TypeError.
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
