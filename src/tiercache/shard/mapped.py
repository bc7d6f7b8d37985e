"""Single records of mapped shards: found and gathered for all shards at once, without asking one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native import gather
from tiercache._native.finder import BlockTable, RecordFinder
from tiercache.errors import CorruptShard
from tiercache.shard.cast import Served, cast_kind
from tiercache.shard.chunks import LOOK_AGAIN_S
from tiercache.shard.types import Column, Kind, Schema
from tiercache.shard.values import ColumnValues, gather_values

if TYPE_CHECKING:
    from tiercache._native.finder import Found
    from tiercache.shard.reader import ShardReader

Numbers: TypeAlias = npt.NDArray[np.int64]
# The other way names block and page or value, and has a bad copy fetched again.
_DAMAGE = (CorruptShard, gather.CorruptError, gather.CastError, OSError, UnicodeDecodeError)


class MappedRecords:
    """The fast way to records: none of its answers is that something is damaged.

    What it cannot give, a shard that is not here or a damaged value, it leaves to ShardReader.take(), which says why.
    It holds a table for each shard that it was given: for a value of a block some 50 bytes, a third of what the shard's
    footer takes. Safe from any thread, without locks; nothing is found in a forked child until it has called clear().

    Args:
        schema: the shards'.
        columns: which are read, indices in it.
        first_record: int64[n_shards + 1], the first record of each shard and the number of all; held.
        url: for errors.
        served: which of the columns are cast.
    """

    def __init__(
        self,
        schema: Schema,
        columns: Sequence[int],
        first_record: Numbers,
        url: str,
        served: Served | None = None,
    ) -> None:
        self._columns = tuple(columns)
        self._parts: list[_Part] = []
        n_streams = 0
        for number in columns:
            column = schema.columns[number]
            part = slice(n_streams, n_streams + len(column.streams(number)))
            other = (served or {}).get(column.name, column)
            self._parts.append(_part_of(column, other)(column, part, url, other))
            n_streams = part.stop
        self._names = [part.column.name for part in self._parts]
        self._has_arrow = any(part.column.kind is Kind.ARROW for part in self._parts)
        self._finder = RecordFinder(first_record, n_streams)
        self._pid = os.getpid()

    def __contains__(self, shard: int) -> bool:
        return shard in self._finder

    def table(self, reader: ShardReader) -> BlockTable | None:
        """A shard's table, for put(); None where the shard cannot be read this way, or not yet."""
        blocks, copy = None if self._has_arrow else reader.mapped(self._columns), reader.copy
        if blocks is None or copy is None:
            return None
        changed_ns = blocks.see_changes()  # first: a write after it leaves the file another ctime, and the table goes
        file = None if changed_ns is None else (copy.lease.fd, changed_ns, round(LOOK_AGAIN_S * 1e9))
        # The reader too is kept: what is checked by, and noted in, is its own.
        return BlockTable(reader.footer.block_first, blocks.addresses, blocks.checks, (blocks, reader, copy), file)

    def put(self, shard: int, table: BlockTable) -> None:
        """Read this shard's records by its table from now on."""
        self._finder.put(shard, table)

    def forget(self, shard: int) -> None:
        """Drop a shard's table, if it has one; reads that are under way keep it."""
        self._finder.forget(shard)

    def clear(self) -> None:
        """Drop all tables. In a forked child: the parent's leases are not its own."""
        self._finder.clear()
        self._pid = os.getpid()

    def take(self, records: Numbers) -> list[ColumnValues] | None:
        """Values of records by number in the data set, int64[n], n >= 1, by column; None: ask shard by shard.

        Raises:
            IndexError: a record that is not there.
            SchemaError: as gather_values.
        """
        found = self._finder.find(records) if self._pid == os.getpid() else None
        if found is None:
            return None
        try:
            return [part.many(found) for part in self._parts]
        except _DAMAGE:
            return None

    def record(self, number: int) -> dict[str, Any] | None:
        """One record by number in the data set: a value by column, None for a null; None: ask its shard.

        Raises as take.
        """
        found = self._finder.find_one(number) if self._pid == os.getpid() else None
        if found is None:
            return None
        try:
            return dict(zip(self._names, [part.one(found) for part in self._parts], strict=True))
        except _DAMAGE:
            return None


class _Part:
    """A column of any kind but ARROW. streams: which of the found ones are its own; served: the column, or its cast."""

    def __init__(self, column: Column, streams: slice, url: str, served: Column) -> None:
        self.column, self.served = column, served
        self._streams = streams
        self._url = url

    def many(self, found: Found) -> ColumnValues:
        """The values of all records that were found."""
        addresses, checks, block, row, _kept = found
        mine = None if checks is None else checks[self._streams]
        places = addresses[self._streams], block, row
        return gather_values(self.column, *places, url=self._url, checks=mine, served=self.served)

    def one(self, found: Found) -> Any:
        """The value of the one record that was found."""
        return self.many(found).record(0)


class _PlainPart(_Part):
    """A column whose gathered bytes are the values: gather_values without its 2 us for what these have not."""

    def __init__(self, column: Column, streams: slice, url: str, served: Column) -> None:
        super().__init__(column, streams, url, served)
        self._stream = streams.start
        self._how = cast_kind(gather.FIXED, column, served), column.row_bytes
        self._dtype, self._row_bytes = served.stored, served.row_bytes
        self._shape = tuple(d or 0 for d in column.shape)

    def many(self, found: Found) -> ColumnValues:
        n = len(found[3])
        return ColumnValues(self.served, np.ndarray((n, *self._shape), self._dtype, self._bytes(found, n)))

    def one(self, found: Found) -> Any:
        value = np.ndarray(self._shape, self._dtype, self._bytes(found, 1))
        return value if self._shape else value[()]

    def _bytes(self, found: Found, n: int) -> npt.NDArray[np.uint8]:
        addresses, checks, block, row, _kept = found
        stream = self._stream
        out = np.empty(n * self._row_bytes, np.uint8)
        check = None if checks is None else checks[stream]
        gather.gather(*self._how, addresses[stream], block, row, out, None, check)
        return out


class _ObjectsPart(_Part):
    """A column of bytes or text without nulls."""

    def __init__(self, column: Column, streams: slice, url: str, served: Column) -> None:
        super().__init__(column, streams, url, served)
        self._stream = streams.start
        self._gather: Callable[..., list[Any]] = gather.gather_str if column.kind is Kind.STR else gather.gather_bytes

    def many(self, found: Found) -> ColumnValues:
        return ColumnValues(self.column, self._objects(found))

    def one(self, found: Found) -> Any:
        return self._objects(found)[0]

    def _objects(self, found: Found) -> list[Any]:
        addresses, checks, block, row, _kept = found
        return self._gather(addresses[self._stream], block, row, None if checks is None else checks[self._stream])


def _part_of(column: Column, served: Column) -> type[_Part]:
    if column.nullable:
        return _Part
    if column.kind in (Kind.BYTES, Kind.STR, Kind.IMAGE):
        return _ObjectsPart
    fixed = column.kind in (Kind.SCALAR, Kind.TENSOR) and served.dtype not in ("bool", "bfloat16")
    return _PlainPart if fixed and column.row_bytes else _Part
