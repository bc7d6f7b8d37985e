"""ShardReader, an open shard read by blocks or by single records; and the pool of the open shards of a data set."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from tiercache._native import gather
from tiercache._native.record_finder import BlockTable, RecordFinder
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import PublishedPlan, ReadingPlan, ShardIdentity, ShardInfo
from tiercache.shard.blocks import STAT_INTERVAL_S, Blocks, Chunks, Ids, Verify, check_verify, chunk_ids
from tiercache.shard.footer import Footer
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.shard.source import ByteSource, LocalCopy, check_identity, grouped_columns, read_footer
from tiercache.shard.values import ColumnValues, ServedColumns, block_values, cast_kind, gather_values
from tiercache.store.contract import Store
from tiercache.store.shared_files import max_shard_descriptors, raise_limit

if TYPE_CHECKING:
    from tiercache._native.record_finder import FoundRecords  # a name of the stub only


# Blocks that single records of a store were read from, by shard, block and columns: so many, each of at most this size.
MAX_RECENT, MAX_RECENT_BYTES = 8, 8 << 20
RecentBlocks: TypeAlias = "deque[tuple[tuple[bytes, tuple[int, ...], tuple[int, ...]], Blocks]]"


class OpenShard(Protocol):
    """An open shard as a `ReaderPool` keeps it: a `ShardReader`, or a file of another library's layout."""

    @property
    def local_copy(self) -> LocalCopy | None: ...

    @property
    def n_descriptors(self) -> int: ...

    @property
    def footer(self) -> Footer: ...

    def load_blocks(self, blocks: Sequence[int], columns: Sequence[int], /) -> Blocks: ...

    def load_shapes(self, blocks: Sequence[int], column: int, /) -> Blocks: ...

    def count_read(self, loaded: Blocks, /) -> int: ...

    def prefetch_blocks(self, blocks: Sequence[int], columns: Sequence[int], /) -> None: ...

    def is_mapped(self, columns: Sequence[int], /) -> bool: ...

    def mapped_blocks(self, columns: Sequence[int], /) -> Blocks | None: ...

    def take(self, rows: npt.ArrayLike, columns: Sequence[int], /) -> list[ColumnValues]: ...


class ShardReader:
    """An open shard. Thread-safe without locks; usable in a forked child process if its store is.

    After close(), the end of the last read releases the lease. Blocks that are still in use keep the mapping, which
    pins the local copy without a file descriptor until they are dropped.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        info: ShardInfo | None = None,
        identity: ShardIdentity | None = None,
        verify: Verify = "first",
        served: ServedColumns | None = None,
        footer: Footer | None = None,
        recent: RecentBlocks | None = None,
    ) -> None:
        """Open a shard: one ranged request if info is given, at most two otherwise.

        served: Columns that take() casts. footer: Footer that was read earlier; saves the request if there is no local
        copy, whose own footer must be checked. recent: Blocks that take() read last, of all shards of a data set.
        """
        check_verify(verify)
        self._verify = verify
        self._byte_source = ByteSource(store, key, identity)
        self.url = self._byte_source.url
        try:
            if footer is None or self._byte_source.local_copy is not None:
                footer, _ = read_footer(self._byte_source, info)
            self.footer = footer
            check_identity(self.footer, info, identity, self.url)
        except BaseException:
            self._byte_source.close()
            raise
        self._chunks = Chunks(self._byte_source, self.footer, verify)
        self._served = served or {}
        self._prefetched: frozenset[int] = frozenset()  # columns that need no further call of prefetch_columns()
        self._kept: Blocks | None = None  # the last result of mapped_blocks()
        self._grouped: Blocks | None = None  # of the columns whose chunks lie together, for take()
        self._recent: RecentBlocks = deque(maxlen=MAX_RECENT) if recent is None else recent
        self._closed = False

    @property
    def schema(self) -> Schema:
        return self.footer.schema

    @property
    def n_records(self) -> int:
        return self.footer.n_records

    @property
    def local_copy(self) -> LocalCopy | None:
        return self._byte_source.local_copy

    @property
    def n_descriptors(self) -> int:
        copy = self._byte_source.local_copy
        return 0 if copy is None else copy.lease.n_descriptors

    def load_blocks(self, blocks: Sequence[int], columns: Sequence[int]) -> Blocks:
        """Load blocks and columns, by their numbers, checked and decoded. Raises CorruptShard and StoreError.

        Raw chunks of a local copy stay in the mapping; their pages are checked when they are first read: by the caller
        of the gather (Blocks.pending_checks), by block_values, or by Blocks.array.
        """
        self._check_open()
        is_kept = self._kept_of(columns) is not None or self._chunks.can_keep_blocks(columns)
        whole = self.mapped_blocks(columns) if is_kept else None
        return self._load(blocks, columns) if whole is None else whole.select(blocks)

    def count_read(self, loaded: Blocks) -> int:
        """Count loaded blocks as read from the local copy; return how many of their bytes were fetched for that."""
        copy = self._byte_source.local_copy
        if copy is None:
            return 0
        return copy.lease.note_read(
            loaded.stored_bytes, lambda: self._chunks.ranges(self._ids(loaded.blocks, loaded.columns))
        )

    def prefetch_blocks(self, blocks: Sequence[int], columns: Sequence[int]) -> None:
        """Start fetching blocks, which are loaded next, into the local copy, if there is one. Returns at once."""
        self._chunks.prefetch_blocks(blocks, columns)

    def load_shapes(self, blocks: Sequence[int], column: int) -> Blocks:
        """Load blocks of a ragged column, of which only the shapes may be read: only these are fetched."""
        self._check_open()
        ids = self._ids(blocks, [column])
        if self._chunks.is_cached(ids):
            return self.load_blocks(blocks, [column])
        shapes = next(stream for stream in self.schema.columns[column].streams(column) if stream.role == "shape")
        loaded = self._chunks.load_buffer(ids, shapes.values_buffer)
        return Blocks(self.footer, self.url, tuple(map(int, blocks)), (int(column),), loaded)

    def is_mapped(self, columns: Sequence[int]) -> bool:
        """Return whether all blocks of these columns are read in place, in the mapping of a local copy."""
        self._check_open()
        if self._kept_of(columns) is not None:
            return True  # the kept blocks hold the lease, so the copy cannot disappear
        return self._chunks.are_mapped(self._ids(range(self.footer.n_blocks), columns))

    def mapped_blocks(self, columns: Sequence[int]) -> Blocks | None:
        """Return all blocks of these columns in the mapping of a local copy; None if they are not all mapped.

        The result is kept until a call with other columns: computing it again costs 0.4 ms per shard and epoch.
        """
        self._check_open()
        kept, copy = self._kept_of(columns), self._byte_source.local_copy
        if kept is not None and copy is not None:
            copy.map_file()  # raises if the file has been truncated
            return kept
        blocks = range(self.footer.n_blocks)
        if not blocks or self._verify == "always" or not self._chunks.are_mapped(self._ids(blocks, columns)):
            return None
        found = self._load(blocks, columns)
        if not found.is_cached:  # another thread closed the reader
            return None
        self._kept = found
        if self._closed:  # close() may have run before the assignment
            self._kept = None
        return found

    def take(self, rows: npt.ArrayLike, columns: Sequence[int]) -> list[ColumnValues]:
        """Return the values of single records, in the order of rows; of raw columns, only the needed pages are read."""
        self._check_open()
        numbers = np.asarray(rows, np.int64).reshape(-1)
        requested = list(dict.fromkeys(map(int, columns)))
        if not self._prefetched.issuperset(requested) and self._chunks.prefetch_columns(requested):
            self._prefetched = self._prefetched.union(requested)
        of_row = np.searchsorted(self.footer.block_first, numbers.astype(np.uint64), side="right") - 1
        row = numbers - self.footer.block_first[of_row].astype(np.int64)
        blocks, position = np.unique(of_row, return_inverse=True)
        position = position.reshape(-1)
        grouped = grouped_columns(self.footer, requested)
        single = [c for c in requested if c not in grouped]
        whole = self._chunks.whole_columns(blocks, single, position, row)
        paged = [c for c in single if c not in whole]
        found: dict[int, ColumnValues] = {}
        for chosen in filter(None, (grouped, whole, paged)):
            if chosen is grouped:
                loaded_blocks, place = self._load_grouped(chosen), of_row
            elif chosen is whole:
                loaded_blocks, place = self._load_whole(blocks, chosen), position
            else:
                loaded = self._chunks.load_rows(blocks, chosen, position, row)
                loaded_blocks = Blocks(self.footer, self.url, tuple(blocks.tolist()), tuple(chosen), loaded)
                place = position
            places = place.astype(np.uint32), row.astype(np.uint32)
            found |= zip(chosen, block_values(loaded_blocks, chosen, *places, self._served), strict=True)
        return [found[int(c)] for c in columns]

    def _load_grouped(self, columns: list[int]) -> Blocks:
        """Return all blocks of columns whose chunks lie together: one request for each shard, not for each record."""
        found = self._grouped
        if found is None or found.columns != tuple(columns):
            found = self._load(range(self.footer.n_blocks), columns)
            self._grouped = found if self._is_kept(found) else None
        return found

    def _load_whole(self, blocks: npt.NDArray[np.int64], columns: list[int]) -> Blocks:
        """Return blocks for single rows. The last ones that a store sent are kept: the next row may lie there too."""
        key = self.footer.shard_id, tuple(blocks.tolist()), tuple(columns)
        found = next((kept for of, kept in list(self._recent) if of == key), None)
        if found is None:
            found = self._load(blocks.tolist(), columns)
            if self._is_kept(found):
                self._recent.append((key, found))
        return found

    def _is_kept(self, found: Blocks) -> bool:
        return not found.is_cached and self._verify != "always" and found.private_bytes <= MAX_RECENT_BYTES

    def _kept_of(self, columns: Sequence[int]) -> Blocks | None:
        kept = self._kept
        return kept if kept is not None and kept.columns == tuple(columns) else None

    def _load(self, blocks: Sequence[int], columns: Sequence[int]) -> Blocks:
        loaded = self._chunks.load_whole(self._ids(blocks, columns))
        return Blocks(self.footer, self.url, tuple(map(int, blocks)), tuple(map(int, columns)), loaded)

    def _ids(self, blocks: Sequence[int], columns: Sequence[int]) -> Ids:
        return chunk_ids(blocks, columns, len(self.schema))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.url}: the reader is closed")

    def close(self) -> None:
        self._closed = True
        self._kept = self._grouped = None
        self._byte_source.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# A shuffle group has about a hundred shards with footers of a few KiB to 100 KiB each. A footer that does not fit is
# read again, which is one more request for a shard that is read by ranges.
LIMIT_BYTES = 32 << 20


class FooterCache:
    """Footers by shard number; each is taken once. Thread-safe without a lock, which a fork could leave locked.

    Concurrent threads may miscount the bytes; put() counts them again before it refuses a footer.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._kept: dict[int, Footer] = {}
        self._n_bytes = 0

    def put(self, shard: int, footer: Footer) -> None:
        if self._n_bytes + footer.nbytes > self._limit_bytes:
            self._n_bytes = sum(kept.nbytes for kept in list(self._kept.values()))
        if shard not in self._kept and self._n_bytes + footer.nbytes <= self._limit_bytes:
            self._kept[shard] = footer
            self._n_bytes += footer.nbytes

    def get(self, shard: int) -> Footer | None:
        return self._kept.get(shard)

    def take(self, shard: int) -> Footer | None:
        footer = self._kept.pop(shard, None)
        if footer is not None:
            self._n_bytes = max(self._n_bytes - footer.nbytes, 0)
        return footer


Numbers: TypeAlias = npt.NDArray[np.int64]
# The slow path reads again after these errors, names the block and the page or value, and has a bad copy fetched again.
_DAMAGE = (CorruptShard, gather.CorruptError, gather.CastError, OSError, UnicodeDecodeError)


class MappedRecords:
    """The fast path for single records. It never reports damage.

    If a shard is not mapped or a value is damaged, the methods return None, and the caller uses ShardReader.take(),
    which raises the error. The object holds a table for each shard: about 50 bytes per block and stream, a third of the
    footer's size. Thread-safe without locks. In a forked child process nothing is found until clear() is called.
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

    def table(self, reader: OpenShard) -> BlockTable | None:
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
        self._finder.put(shard, table)

    def forget(self, shard: int) -> None:
        self._finder.forget(shard)

    def clear(self) -> None:
        """Drop all tables. A forked child process must call this, because the leases belong to the parent."""
        self._finder.clear()
        self._pid = os.getpid()

    def take(self, records: Numbers) -> list[ColumnValues] | None:
        """Return the values of records, int64[n], by column; None if the caller must read shard by shard."""
        found = self._finder.find(records) if self._pid == os.getpid() else None
        if found is None:
            return None
        try:
            return [part.many(found) for part in self._parts]
        except _DAMAGE:
            return None

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the values of a record by column name, None for a null; None if the caller must read its shard."""
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

    def many(self, found: FoundRecords) -> ColumnValues:
        addresses, checks, block, row, _kept = found
        mine = None if checks is None else checks[self._streams]
        places = addresses[self._streams], block, row
        return gather_values(self.column, *places, url=self._url, checks=mine, served=self.served)

    def one(self, found: FoundRecords) -> Any:
        return self.many(found).record(0)


class _FixedGatherer(_ColumnGatherer):
    """Gathers a column whose gathered bytes are the values; saves the 2 us of gather_values for other columns."""

    def __init__(self, column: Column, streams: slice, url: str, served: Column) -> None:
        super().__init__(column, streams, url, served)
        self._stream = streams.start
        self._how = cast_kind(gather.FIXED, column, served), column.row_bytes
        self._dtype, self._row_bytes = served.stored, served.row_bytes
        self._shape = tuple(d or 0 for d in column.shape)

    def many(self, found: FoundRecords) -> ColumnValues:
        n = len(found[3])
        return ColumnValues(self.served, np.ndarray((n, *self._shape), self._dtype, self._bytes(found, n)))

    def one(self, found: FoundRecords) -> Any:
        value = np.ndarray(self._shape, self._dtype, self._bytes(found, 1))
        return value if self._shape else value[()]

    def _bytes(self, found: FoundRecords, n: int) -> npt.NDArray[np.uint8]:
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

    def many(self, found: FoundRecords) -> ColumnValues:
        return ColumnValues(self.column, self._objects(found))

    def one(self, found: FoundRecords) -> Any:
        return self._objects(found)[0]

    def _objects(self, found: FoundRecords) -> list[Any]:
        addresses, checks, block, row, _kept = found
        return self._gather(addresses[self._stream], block, row, None if checks is None else checks[self._stream])


def _gatherer_class(column: Column, served: Column) -> type[_ColumnGatherer]:
    if column.nullable:
        return _ColumnGatherer
    if column.kind in (Kind.BYTES, Kind.STR, Kind.IMAGE):
        return _ObjectGatherer
    fixed = column.kind in (Kind.SCALAR, Kind.TENSOR) and served.dtype not in ("bool", "bfloat16")
    return _FixedGatherer if fixed and column.row_bytes else _ColumnGatherer


# Largest number of open shards of one data set. Each holds a footer (some KiB to 100 KiB) and a mapping.
# max_shard_descriptors() limits the file descriptors of all data sets of the process together.
MAX_READERS = 1024


class ReleasingPlan:
    """A published reading plan that also closes each shard of a pool after its last read.

    An open shard is pinned in the cache: in a small cache the pinned shards would leave no room for others.
    """

    def __init__(self, published: PublishedPlan, readers: ReaderPool, plan: ReadingPlan) -> None:
        self._published = published
        self._readers = readers
        order = np.argsort(plan.last, kind="stable")
        self._shards, self._last = plan.shards[order], plan.last[order]
        self._n_done = 0

    def advance(self, clock: int) -> None:
        self._published.advance(clock)
        n_done = int(np.searchsorted(self._last, clock, side="right"))
        for shard in self._shards[self._n_done : n_done].tolist():
            self._readers.drop(shard)
        self._n_done = max(n_done, self._n_done)

    def close(self) -> None:
        self._published.close()


class ReaderPool:
    """LRU pool of the open shards of a data set. Thread-safe. Reads through `mapped` do not count as uses.

    The lock is not held while a shard is opened: threads open different shards in parallel, and a second thread that
    wants the same shard waits at a lock for this shard. All pools of the process share one limit of file descriptors;
    when it is reached, the pool that holds most of them drops shards.
    """

    def __init__(self, opener: Callable[[int], OpenShard], mapped: MappedRecords) -> None:
        self._opener = opener
        self._mapped = mapped
        self._begin()
        _of_process[id(self)] = self

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[OpenShard, int]] = OrderedDict()  # reader and its number of descriptors
        self.n_descriptors = 0
        self._gates: dict[int, threading.Lock] = {}
        self._mapped.clear()
        self._pid = os.getpid()  # last: a thread that sees the new pid takes the lock, which must be the new one

    def __contains__(self, shard: int) -> bool:
        return self._pid == os.getpid() and shard in self._open

    @property
    def capacity(self) -> int:
        return min(MAX_READERS, max_shard_descriptors())

    def get(self, shard: int) -> OpenShard:
        """Return the reader of a shard, and open the shard if necessary. Raises as ShardReader."""
        # In a forked child process the leases belong to the parent, and the copied lock may be locked forever.
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            found = self._open.get(shard)
            if found is not None:
                self._open.move_to_end(shard)
                return found[0]
            gate = self._gates.setdefault(shard, threading.Lock())
        with gate:
            with self._lock:
                found = self._open.get(shard)
            if found is not None:
                return found[0]
            reader = self._open_shard(shard)
            self._keep(shard, reader)
        return reader

    def _open_shard(self, shard: int) -> OpenShard:
        try:
            return self._opener(shard)
        except StoreError as error:
            # Other files of the process use the descriptors that were meant for open shards: close half of the shards.
            if not error.details.get("too_many_open") or not (raise_limit() or _drop_half()):
                raise
        return self._opener(shard)

    def map_shard(self, shard: int) -> bool:
        """Read the shard's records through its mapping while its reader stays open. False: none, or damage."""
        if shard in self._mapped:
            return True
        try:
            reader = self.get(shard)
            table = self._mapped.table(reader)
        except CorruptShard:
            return False
        if table is None:
            return False
        with self._lock:
            if self._open.get(shard, (None,))[0] is reader:
                self._mapped.put(shard, table)
        return True

    def drop(self, shard: int) -> None:
        if self._pid == os.getpid():
            with self._lock:
                self._forget(shard)

    def drop_oldest(self) -> bool:
        """Remove the least recently used shard (after a fork, all of the parent). Returns False if none is open."""
        if self._pid != os.getpid():
            self._begin()
            return True
        with self._lock:
            oldest = next(iter(self._open), None)
            if oldest is not None:
                self._forget(oldest)
        return oldest is not None

    def clear(self) -> None:
        if self._pid == os.getpid():
            with self._lock:
                self._open.clear()
                self.n_descriptors = 0
                self._mapped.clear()

    def _forget(self, shard: int) -> None:
        # The reader is dropped and not closed, because another thread may be reading from it.
        _, n_descriptors = self._open.pop(shard, (None, 0))
        self.n_descriptors -= n_descriptors
        self._mapped.forget(shard)

    def _keep(self, shard: int, reader: OpenShard) -> None:
        with self._lock:
            self._gates.pop(shard, None)
            self._open[shard] = reader, reader.n_descriptors
            self.n_descriptors += self._open[shard][1]
            while len(self._open) > MAX_READERS:
                self._forget(next(iter(self._open)))
        n_descriptors = sum(readers.n_descriptors for readers in _all())
        raise_limit(n_descriptors)
        _drop_to(max_shard_descriptors())


# The pools of all data sets of this process, by id(): valuerefs() copies a dict in one step, whatever other threads
# add. There is no lock, because a fork could leave it locked.
_of_process: WeakValueDictionary[int, ReaderPool] = WeakValueDictionary()


def _all() -> list[ReaderPool]:
    return [readers for found in _of_process.valuerefs() if (readers := found()) is not None]


def _drop_to(n_descriptors: int) -> bool:
    """Drop shards until all pools together hold at most n_descriptors. Returns whether any shard was dropped."""
    has_dropped = False
    while sum(readers.n_descriptors for readers in _all()) > n_descriptors:
        if not max(_all(), key=lambda readers: readers.n_descriptors).drop_oldest():
            break
        has_dropped = True
    return has_dropped


def _drop_half() -> bool:
    return _drop_to(sum(readers.n_descriptors for readers in _all()) // 2)
