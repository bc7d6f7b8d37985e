"""Steps of a view's recipe: each says, of the records before it, which ones stay. Frozen and picklable."""

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


class Step(Protocol):
    """One step, evaluated anew on whatever version it is asked of."""

    @property
    def is_fixed(self) -> bool:
        """Whether it chooses by place alone, so that it can be worked into a list of records before it."""

    def choose(self, source: Readable) -> Selection:
        """Which of the source's records stay: their places as served."""


@dataclass(frozen=True, slots=True)
class Span:
    """Records [start, stop); stop None: to the end. take(n) and skip(n)."""

    start: int
    stop: int | None

    @property
    def is_fixed(self) -> bool:
        """By place alone."""
        return True

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        n = source.n_records
        return Selection.span(min(self.start, n), n if self.stop is None else min(self.stop, n))


@dataclass(frozen=True, slots=True)
class Shard:
    """One of n_shards runs of records, whose lengths differ by one at most, the longer ones first."""

    n_shards: int
    index: int

    @property
    def is_fixed(self) -> bool:
        """By place alone."""
        return True

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        length, n_longer = divmod(source.n_records, self.n_shards)
        start = self.index * length + min(self.index, n_longer)
        return Selection.span(start, start + length + (self.index < n_longer))


@dataclass(frozen=True, slots=True)
class Select:
    """Records by their numbers. Raises IndexError in choose(): another version has fewer records."""

    selection: Selection

    @property
    def is_fixed(self) -> bool:
        """By place alone."""
        return True

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        if self.selection.stop > source.n_records:
            raise IndexError(
                f"select() names record {self.selection.stop - 1}, and {source.url} gives {source.n_records} here"
            )
        return self.selection


@dataclass(frozen=True, slots=True)
class InStoredOrder:
    """All records, sorted as they are stored: what a list of numbers is inside a mixture."""

    @property
    def is_fixed(self) -> bool:
        """By the order of those before it."""
        return False

    def choose(self, source: Readable) -> Selection:
        """See Step.choose."""
        listed = source.listed
        return Selection.span(0, source.n_records) if listed is None else Selection.of(np.argsort(listed))


@dataclass(frozen=True, slots=True)
class Filter:
    """Records for which an expression is true."""

    expression: pc.Expression

    @property
    def is_fixed(self) -> bool:
        """By what the records hold."""
        return False

    def choose(self, source: Readable) -> Selection:
        """See Step.choose. Raises SchemaError for an unknown column, and as reading."""
        return matching(source, self.expression)

    def __reduce__(self) -> tuple[Any, ...]:
        return _filter, (zlib.compress(pickle.dumps(self.expression), 9),)  # 0.6 KB; uncompressed 2.2, most of it zeros


def _filter(compressed: bytes) -> Filter:
    return Filter(pickle.loads(zlib.decompress(compressed)))  # noqa: S301 -- part of a pickle itself
