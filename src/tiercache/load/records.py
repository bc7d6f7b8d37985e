"""Records and batches of a map-style data set.

Values of many shards joined, and records that carry the batch they were gathered as.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from tiercache.load.serving import Serving
from tiercache.shard.types import Column, Kind
from tiercache.shard.values import ColumnValues, as_records, gather_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.shard.types import Schema

Record = dict[str, Any]


def join(parts: Sequence[Sequence[ColumnValues]], places: Sequence[NDArray[np.int64]]) -> list[ColumnValues]:
    """Values of several reads as one: parts[k]'s values go to places[k], which together are 0..n-1, each once."""
    if len(parts) == 1:  # in the order asked for already: places of a single part are sorted
        return list(parts[0])
    n = sum(len(place) for place in places)
    return [_join_column([part[c] for part in parts], places, n) for c in range(len(parts[0]))]


def _join_column(parts: Sequence[ColumnValues], places: Sequence[NDArray[np.int64]], n: int) -> ColumnValues:
    first, values = parts[0], _room(parts[0].values, n)
    valid = None if first.valid is None else np.empty(n, np.bool_)
    for part, place in zip(parts, places, strict=True):
        if isinstance(values, list):
            for at, value in zip(place.tolist(), part.values, strict=True):
                values[at] = value
        else:
            values[place] = part.values
        if valid is not None:
            valid[place] = part.valid
    return ColumnValues(first.column, values, valid)


def _room(like: Any, n: int) -> Any:
    if isinstance(like, list):
        return [None] * n
    if isinstance(like, np.ndarray):
        return np.empty((n, *like.shape[1:]), like.dtype)
    return like.new_empty((n, *like.shape[1:]))  # bfloat16: a torch tensor


def none_of(schema: Schema) -> list[ColumnValues]:
    """The values of no records at all."""
    nowhere = np.empty(0, np.uint32)
    return [_none_of_column(column, nowhere) for column in schema.columns]


def _none_of_column(column: Column, nowhere: NDArray[np.uint32]) -> ColumnValues:
    if column.kind is Kind.ARROW:
        return ColumnValues(column, [], np.empty(0, np.bool_) if column.nullable else None)
    addresses = np.zeros((len(column.streams(0)), 1, 3), np.uint64)
    return gather_values(column, addresses, nowhere, nowhere, url="")


class Records(list[Record]):
    """A list of records that is made only when somebody looks; `columns` are the same rows, column by column.

    serving: the forms that a batch of them has.

    torch's fetcher gets one of these from `Dataset.__getitems__`. `tiercache.collate` hands the gathered batch on
    untouched, so the records are never made; any other collate function sees an ordinary list, which it may sort, cut
    and write to. Owned by one thread at a time, as lists are.
    """

    def __init__(self, columns: Sequence[ColumnValues], n_records: int, serving: Serving | None = None) -> None:
        super().__init__()
        self.columns = columns
        self.serving = Serving() if serving is None else serving
        self._n_unmade: int | None = n_records

    def _make(self) -> None:
        if self._n_unmade is not None:
            self._n_unmade = None
            self.extend(as_records(self.columns))

    @property
    def as_gathered(self) -> bool:
        """Whether `columns` are the records still: nobody has looked at one, and so nobody can have changed one."""
        return self._n_unmade is not None

    def __len__(self) -> int:
        return super().__len__() if self._n_unmade is None else self._n_unmade

    def __radd__(self, other: list[Any]) -> list[Any]:
        return [*other, *self]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(iter(self)),)


# Every other method of a list that sees or changes what is in it.
_LOOK = (
    *("__iter__", "__reversed__", "__getitem__", "__contains__", "__repr__", "copy", "count", "index"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__mul__", "__rmul__"),
    *("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert", "pop", "remove"),
    *("reverse", "sort"),
)


def _after_making(name: str) -> Callable[..., Any]:
    method = getattr(list, name)

    @wraps(method)
    def call(self: Records, /, *args: Any, **kwargs: Any) -> Any:
        self._make()
        return method(self, *args, **kwargs)

    return call


for _name in _LOOK:
    setattr(Records, _name, _after_making(_name))
