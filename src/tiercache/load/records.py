"""Records of a map-style data set that carry the batch they were gathered as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, SupportsIndex

from tiercache.load.serving import Serving
from tiercache.load.tuples import record_tuple
from tiercache.shard.types import Schema
from tiercache.shard.values import ColumnValues, as_records

Record = dict[str, Any]


def served_records(columns: Sequence[ColumnValues], serving: Serving) -> list[Any]:
    """Each record of some columns, as a data set gives it: a dict, or a tuple where that is asked for."""
    records = as_records(columns)
    if serving.names is None:
        return records
    schema = Schema([found.column for found in columns])
    return [record_tuple(record, serving.names, schema) for record in records]


class Records(list[Any]):
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
            self.extend(served_records(self.columns, self.serving))

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
