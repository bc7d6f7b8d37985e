"""Steps of a view: each one selects from the records of the step before. Frozen and picklable."""

from __future__ import annotations

import pickle
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow.compute as pc

from tiercache.views.filtering import matching
from tiercache.views.selection import Selection

if TYPE_CHECKING:
    from tiercache.views.contract import Readable


class ViewStep(Protocol):
    """One step of a view, evaluated anew on each version."""

    @property
    def selects_by_place(self) -> bool:
        """Whether it selects by place alone, so that it can be merged into a list of records before it."""

    def choose(self, source: Readable) -> Selection:
        """Return which of the source's records stay, as served places."""


@dataclass(frozen=True, slots=True)
class RangeStep:
    """Records [start, stop), for take(n) and skip(n); stop None: to the end."""

    start: int
    stop: int | None

    @property
    def selects_by_place(self) -> bool:
        """True: it selects by place."""
        return True

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        n = source.n_records
        return Selection.span(min(self.start, n), n if self.stop is None else min(self.stop, n))


@dataclass(frozen=True, slots=True)
class ShardStep:
    """One of n_shards runs of records, whose lengths differ by at most one; the longer runs come first."""

    n_shards: int
    index: int

    @property
    def selects_by_place(self) -> bool:
        """True: it selects by place."""
        return True

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        length, n_longer = divmod(source.n_records, self.n_shards)
        start = self.index * length + min(self.index, n_longer)
        return Selection.span(start, start + length + (self.index < n_longer))


@dataclass(frozen=True, slots=True)
class SelectStep:
    """Records by their numbers. choose() raises IndexError if another version has fewer records."""

    selection: Selection

    @property
    def selects_by_place(self) -> bool:
        """True: it selects by place."""
        return True

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        if self.selection.stop > source.n_records:
            raise IndexError(
                f"select() names record {self.selection.stop - 1}, but {source.url} has only {source.n_records} records"
            )
        return self.selection


@dataclass(frozen=True, slots=True)
class StoredOrderStep:
    """All records, sorted in stored order; mix() applies it to sources with an explicit order."""

    @property
    def selects_by_place(self) -> bool:
        """False: it depends on the order of the records before it."""
        return False

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        listed = source.record_order
        return Selection.span(0, source.n_records) if listed is None else Selection.of(np.argsort(listed))


@dataclass(frozen=True, slots=True)
class FilterStep:
    """Records for which an expression is true."""

    expression: pc.Expression

    @property
    def selects_by_place(self) -> bool:
        """False: it depends on the contents of the records."""
        return False

    def choose(self, source: Readable) -> Selection:
        """See Step.choose. Raises SchemaError for an unknown column, and the errors of reading."""
        return matching(source, self.expression)

    def __reduce__(self) -> tuple[Any, ...]:
        return _filter, (
            zlib.compress(pickle.dumps(self.expression), 9),
        )  # 0.6 KB instead of 2.2 KB, most of which are zeros


def _filter(compressed: bytes) -> FilterStep:
    return FilterStep(pickle.loads(zlib.decompress(compressed)))  # noqa: S301 -- part of a pickle itself
