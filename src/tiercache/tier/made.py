"""Sequences of what is kept as columns: an element is made when somebody looks at it, and forgotten with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")

# Elements that are there at a time while all are walked; more are no faster.
AT_A_TIME = 1 << 14


class Made(Sequence[T], Generic[T]):
    """A tuple but for its memory: equal to any sequence of equal elements. Immutable; safe from any thread."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    @abstractmethod
    def made(self, start: int, end: int) -> Iterator[T]:
        """The elements from start to end, which are in range."""

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...

    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        if not isinstance(at, slice):
            place = range(len(self))[at]  # numpy's integers too, as of a tuple
            return next(self.made(place, place + 1))
        start, end, step = at.indices(len(self))
        if step == 1:
            return tuple(self.made(start, max(start, end)))
        return tuple(self[i] for i in range(start, end, step))

    def __iter__(self) -> Iterator[T]:
        for start, end in self.parts():
            yield from self.made(start, end)

    def parts(self) -> Iterator[tuple[int, int]]:
        """All of it, a part at a time."""
        for start in range(0, len(self), AT_A_TIME):
            yield start, min(start + AT_A_TIME, len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return repr(tuple(self))
