"""Sequences that create their elements from columns on access, so that a million elements need no object each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")

# Number of elements that an iteration creates at a time; a larger number is not faster.
AT_A_TIME = 1 << 14


class LazySequence(Sequence[T], Generic[T]):
    """A sequence that behaves as a tuple and creates its elements on access. Immutable; safe from any thread."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    @abstractmethod
    def create(self, start: int, end: int) -> Iterator[T]:
        """Create the elements from start to end; both are in range."""

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...

    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        if not isinstance(at, slice):
            place = range(len(self))[at]  # accepts numpy integers and negative indices, as a tuple does
            return next(self.create(place, place + 1))
        start, end, step = at.indices(len(self))
        if step == 1:
            return tuple(self.create(start, max(start, end)))
        return tuple(self[i] for i in range(start, end, step))

    def __iter__(self) -> Iterator[T]:
        for start, end in self.parts():
            yield from self.create(start, end)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of successive parts that cover the sequence."""
        for start in range(0, len(self), AT_A_TIME):
            yield start, min(start + AT_A_TIME, len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return repr(tuple(self))
