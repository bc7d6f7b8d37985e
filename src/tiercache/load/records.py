"""Lists of records that keep the columns from which they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, SupportsIndex

from tiercache.load.serving import OutputSpec
from tiercache.load.tuples import record_tuple
from tiercache.shard.read.values import ColumnValues, as_records
from tiercache.shard.schema import Schema

Record = dict[str, Any]


def served_records(columns: Sequence[ColumnValues], serving: OutputSpec) -> list[Any]:
    """Return each record of some columns as the data set serves it: a dict, or a tuple if the settings have names."""
    records = as_records(columns)
    if serving.names is None:
        return records
    schema = Schema([found.column for found in columns])
    return [record_tuple(record, serving.names, schema) for record in records]


class LazyRecords(list[Any]):
    """A list of records that is filled at the first access; `columns` holds the same rows by column.

    serving: How a batch of the records is served.

    `Dataset.__getitems__` returns such a list to torch's fetcher. `tiercache.collate` uses `columns`, so the records
    are never made. Any other collate function sees an ordinary list, which it may sort, slice and change. One thread at
    a time owns the list.
    """

    def __init__(self, columns: Sequence[ColumnValues], n_records: int, serving: OutputSpec | None = None) -> None:
        super().__init__()
        self.columns = columns
        self.serving = OutputSpec() if serving is None else serving
        self._n_unmade: int | None = n_records

    def _make(self) -> None:
        if self._n_unmade is not None:
            self._n_unmade = None
            self.extend(served_records(self.columns, self.serving))

    @property
    def as_gathered(self) -> bool:
        """Whether `columns` still equal the records: no record was accessed, so none can have been changed."""
        return self._n_unmade is not None

    def __len__(self) -> int:
        return super().__len__() if self._n_unmade is None else self._n_unmade

    def __radd__(self, other: list[Any]) -> list[Any]:
        return [*other, *self]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(iter(self)),)


# All other list methods that read or change the contents.
_LOOK = (
    *("__iter__", "__reversed__", "__getitem__", "__contains__", "__repr__", "copy", "count", "index"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__mul__", "__rmul__"),
    *("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert", "pop", "remove"),
    *("reverse", "sort"),
)


def _after_making(name: str) -> Callable[..., Any]:
    method = getattr(list, name)

    @wraps(method)
    def call(self: LazyRecords, /, *args: Any, **kwargs: Any) -> Any:
        self._make()
        return method(self, *args, **kwargs)

    return call


for _name in _LOOK:
    setattr(LazyRecords, _name, _after_making(_name))
