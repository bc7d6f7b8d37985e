"""The methods by which a data set gives fewer of its records."""

from __future__ import annotations

import operator
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow.compute as pc

from tiercache._native.finder import wrapped
from tiercache.views.selection import Selection
from tiercache.views.steps import Filter, Select, Shard, Span, Step
from tiercache.views.view import choose

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.views.contract import Readable


class Choosing:
    """Views of a data set: the same records, columns and serving, fewer of them.

    A view is a data set in every way: any loader takes it, by the native path too, it can be pickled, resumed and
    viewed again. It costs nothing per record where it is a range of them, else some bytes; shards and blocks without
    chosen records are never read.
    """

    @property
    @abstractmethod
    def source(self) -> Readable:
        """What is read."""

    @abstractmethod
    def _derive(self, source: Readable) -> Self:
        """The same data set over another source."""

    def select(self, chosen: Any) -> Self:
        """The records of these numbers, in this order; or those for which a mask is true.

        Args:
            chosen: integers (any sequence, array or tensor; negative ones count from the end; a number may come more
                than once), or len() booleans. With shuffle=False a loader follows their order, with shuffle=True it
                shuffles them as any records.

        Raises:
            IndexError: a record that is not there.
            ValueError: a mask of another length.
            TypeError: neither numbers nor a mask.
        """
        n = self.source.n_records
        if isinstance(chosen, pc.Expression) or callable(chosen):
            raise TypeError("select() takes record numbers or a mask; filter() takes a pyarrow expression")
        if isinstance(chosen, range):
            return self._choose(Select(_of_range(chosen, n)))
        given = np.asarray(chosen)
        if given.ndim != 1:
            found = f"{given.ndim} dimensions" if given.ndim else f"the type {type(chosen).__name__}"
            raise TypeError(f"select() takes a list or array of record numbers or a mask, got {found}")
        if given.dtype == np.bool_:
            if len(given) != n:
                raise ValueError(f"a mask of {len(given)} for {n} records: it needs one value a record")
            return self._choose(Select(Selection.of(np.flatnonzero(given))))
        return self._choose(Select(Selection.of(record_numbers(given, n))))

    def filter(self, expression: pc.Expression) -> Self:
        """The records for which an expression is true (null is not true), in their order.

        The columns that it names are read now, block by block in little memory, through all shards whose least and
        greatest numbers do not rule them out; they need not be among the columns that are served.

        Args:
            expression: such as `pyarrow.compute.field("label") == 3`. Images and JSON are bytes and text to it.

        Raises:
            SchemaError: a column that is not there; something that is no condition over the columns.
            TypeError: not an expression.
        """
        if not isinstance(expression, pc.Expression):
            raise TypeError(
                f"filter() takes a pyarrow expression, such as pyarrow.compute.field('label') == 3, got {expression!r};"
                " for a Python function: dataset.select([i for i, record in enumerate(dataset) if function(record)])"
            )
        return self._choose(Filter(expression))

    def shard(self, num_shards: int, index: int) -> Self:
        """Part `index` of `num_shards` runs of consecutive records, whose lengths differ by one at most.

        Raises:
            ValueError: num_shards below 1, or an index outside [0, num_shards).
        """
        num_shards, index = operator.index(num_shards), operator.index(index)
        if num_shards < 1:
            raise ValueError(f"num_shards must be 1 or more, got {num_shards}")
        if not 0 <= index < num_shards:
            raise ValueError(f"index must be 0 to {num_shards - 1}, got {index}")
        return self._choose(Shard(num_shards, index))

    def take(self, n: int) -> Self:
        """The first n records, or all if there are fewer. Raises ValueError below 0."""
        return self._choose(Span(0, _count(n)))

    def skip(self, n: int) -> Self:
        """All but the first n records; none if there are fewer. Raises ValueError below 0."""
        return self._choose(Span(_count(n), None))

    def _choose(self, step: Step) -> Self:
        source = self.source
        if source.mixture is not None:
            raise ValueError("a mixture goes on from epoch to epoch, and has no part: choose from what it is mixed of")
        return self._derive(choose(source, step))


def record_numbers(indices: Any, n: int) -> NDArray[np.int64]:
    """Record numbers, int64[.], 0 <= number < n, negative ones counted from the end. Raises IndexError, TypeError."""
    rows = np.asarray(indices)
    if rows.dtype == np.bool_ or (rows.size and rows.dtype.kind not in "iu"):
        hints = {"O": ": one is missing, or has more than 64 bits"}
        hints["U"] = f" ({indices!r:.60}): columns are chosen by select_columns([...])"
        raise TypeError(f"records are chosen by integers, got {rows.dtype}{hints.get(rows.dtype.kind, '')}")
    if rows.size and rows.dtype == np.uint64 and int(rows.max()) >= n:  # as int64 it may be -1
        raise IndexError(f"record {int(rows.max())} of a data set of {n}")
    return wrapped(np.ascontiguousarray(rows, np.int64).reshape(-1), n)


def _of_range(chosen: range, n: int) -> Selection:
    """The numbers of a range that has any number of them, without making those that are not there."""
    if not chosen:
        return Selection.span(0, 0)
    for end in (chosen[0], chosen[-1]):
        if not -n <= end < n:
            raise IndexError(f"record {end} of a data set of {n}")
    if chosen.step == 1 and chosen.start >= 0:
        return Selection.span(chosen.start, chosen.stop)
    # 100 times faster than from the range itself.
    return Selection.of(record_numbers(np.arange(chosen.start, chosen.stop, chosen.step), n))


def _count(n: int) -> int:
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"a number of records is 0 or more, got {n}")
    return n
