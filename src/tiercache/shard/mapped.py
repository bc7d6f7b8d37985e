"""MappedRecords: reads single records of mapped shards, with one native call that finds them in all shards at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native import gather
from tiercache._native.finder import BlockTable, RecordFinder
from tiercache.errors import CorruptShard
from tiercache.shard.cast import ServedColumns, cast_kind
from tiercache.shard.chunks import STAT_INTERVAL_S
from tiercache.shard.types import Column, Kind, Schema
from tiercache.shard.values import ColumnValues, gather_values

if TYPE_CHECKING:
    from tiercache._native.finder import Found
    from tiercache.shard.reader import ShardReader

Numbers: TypeAlias = npt.NDArray[np.int64]
# The slow path reads again after these errors, names the block and the page or value, and has a bad copy fetched again.
_DAMAGE = (CorruptShard, gather.CorruptError, gather.CastError, OSError, UnicodeDecodeError)


class MappedRecords:
    """The fast path for single records. It never reports damage.

    If a shard is not mapped or a value is damaged, the methods return None, and the caller uses ShardReader.take(),
    which raises the error. The object holds a table for each shard: about 50 bytes per block and stream, a third of the
    footer's size. Thread-safe without locks. In a forked child process nothing is found until clear() is called.

    Args:
        schema: Schema of the shards.
        columns: Indices of the columns to read in the schema.
        first_record: int64[n_shards + 1], first record of each shard and the total; this object keeps a reference.
        url: URL for errors.
        served: Columns that are cast, as they are served.
    """

    def __init__(
        self,
        schema: Schema,
        columns: Sequence[int],
        first_record: Numbers,
        url: str,
        served: ServedColumns | None = None,
    ) -> None:
        self._columns = tuple(columns)
        self._parts: list[_ColumnGatherer] = []
        n_streams = 0
        for number in columns:
            column = schema.columns[number]
            part = slice(n_streams, n_streams + len(column.streams(number)))
            other = (served or {}).get(column.name, column)
            self._parts.append(_gatherer_class(column, other)(column, part, url, other))
            n_streams = part.stop
        self._names = [part.column.name for part in self._parts]
        self._has_arrow = any(part.column.kind is Kind.ARROW for part in self._parts)
        self._finder = RecordFinder(first_record, n_streams)
        self._pid = os.getpid()

    def __contains__(self, shard: int) -> bool:
        return shard in self._finder

    def table(self, reader: ShardReader) -> BlockTable | None:
        """Return the table of a shard for put(); None if the shard cannot be read through a mapping (yet)."""
        blocks, copy = None if self._has_arrow else reader.mapped_blocks(self._columns), reader.local_copy
        if blocks is None or copy is None:
            return None
        changed_ns = (
            blocks.reset_if_written()
        )  # before `checks`: a later write changes the ctime and so discards the table
        file = None if changed_ns is None else (copy.lease.fd, changed_ns, round(STAT_INTERVAL_S * 1e9))
        # The table keeps the reader too, which owns the checksums and the flags of checked pages.
        return BlockTable(
            reader.footer.block_first, blocks.addresses, blocks.pending_checks, (blocks, reader, copy), file
        )

    def put(self, shard: int, table: BlockTable) -> None:
        """Use this table for the shard's records from now on."""
        self._finder.put(shard, table)

    def forget(self, shard: int) -> None:
        """Drop the table of a shard, if there is one; reads in progress keep it."""
        self._finder.forget(shard)

    def clear(self) -> None:
        """Drop all tables. A forked child process must call this, because the leases belong to the parent."""
        self._finder.clear()
        self._pid = os.getpid()

    def take(self, records: Numbers) -> list[ColumnValues] | None:
        """Return the values of records by column; None if the caller must read shard by shard.

        Args:
            records: Numbers of the records in the data set, int64[n], n >= 1.

        Raises:
            IndexError: A record does not exist.
            SchemaError: See gather_values.
        """
        found = self._finder.find(records) if self._pid == os.getpid() else None
        if found is None:
            return None
        try:
            return [part.many(found) for part in self._parts]
        except _DAMAGE:
            return None

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the values of a record by column name, None for a null; None if the caller must read its shard.

        Raises as take().
        """
        found = self._finder.find_one(number) if self._pid == os.getpid() else None
        if found is None:
            return None
        try:
            return dict(zip(self._names, [part.one(found) for part in self._parts], strict=True))
        except _DAMAGE:
            return None


class _ColumnGatherer:
    """Gathers a column of any kind but ARROW. streams: The column's streams among those that the finder returns."""

    def __init__(self, column: Column, streams: slice, url: str, served: Column) -> None:
        self.column, self.served = column, served
        self._streams = streams
        self._url = url

    def many(self, found: Found) -> ColumnValues:
        """Return the values of all records that were found."""
        addresses, checks, block, row, _kept = found
        mine = None if checks is None else checks[self._streams]
        places = addresses[self._streams], block, row
        return gather_values(self.column, *places, url=self._url, checks=mine, served=self.served)

    def one(self, found: Found) -> Any:
        """Return the value of the single record that was found."""
        return self.many(found).record(0)


class _FixedGatherer(_ColumnGatherer):
    """Gathers a column whose gathered bytes are the values; saves the 2 us of gather_values for other columns."""

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


class _ObjectGatherer(_ColumnGatherer):
    """Gathers a column of bytes or text without nulls."""

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


def _gatherer_class(column: Column, served: Column) -> type[_ColumnGatherer]:
    if column.nullable:
        return _ColumnGatherer
    if column.kind in (Kind.BYTES, Kind.STR, Kind.IMAGE):
        return _ObjectGatherer
    fixed = column.kind in (Kind.SCALAR, Kind.TENSOR) and served.dtype not in ("bool", "bfloat16")
    return _FixedGatherer if fixed and column.row_bytes else _ColumnGatherer
