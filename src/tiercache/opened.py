"""One version of a data set, open for reading: store, cache, segments and shards joined.

What the loader knows a data set by.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from tiercache.cache import Cache, CachedStore
from tiercache.errors import CorruptShard
from tiercache.model import ReadPlan, ShardIdentity, format_bytes
from tiercache.order import BlockTable
from tiercache.shard.manifest import latest, read_shards, read_version
from tiercache.shard.mapped import MappedRecords
from tiercache.shard.opening import read_footer_alone
from tiercache.shard.reader import ShardReader
from tiercache.store import LocalStore, MemoryStore, Store, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.shard.blocks import Blocks
    from tiercache.shard.layout import Footer
    from tiercache.shard.segments import ShardTable
    from tiercache.shard.types import Schema
    from tiercache.shard.values import ColumnValues
    from tiercache.shard.versions import Version

# Open shards: each costs two descriptors and a mapping. Of the usual 1,024 descriptors this leaves half to the user.
MAX_READERS = 256
# Footers of a group are read side by side: their time is round trips.
FOOTER_THREADS = 16
# Block tables are some KiB each; a group has a few dozen shards.
MAX_TABLES = 4096

T = TypeVar("T")
Verify = Literal["first", "always", "never"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a data set is read from and how: everything but which version and columns. Picklable.

    cache: None: Cache.default() for what is not local; False: none; a Cache: always that one.
    """

    url: str
    cache: Cache | Literal[False] | None = None
    verify: Verify = "first"
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> tuple[Store, Store, Cache | None]:
        """The data set's own store, the store to read through (the same, or the cache round it), and the cache."""
        inner = open_store(self.url, **self.storage_options)
        if isinstance(self.cache, Cache):
            return inner, self.cache.store(inner), self.cache
        if self.cache is False or isinstance(inner, LocalStore | MemoryStore):
            return inner, inner, None
        cache = _default_cache()
        return inner, inner if cache is None else cache.store(inner), cache


class OpenedVersion:
    """One version of a data set with a choice of columns; implements load.source.Source.

    Safe from any thread; after a fork the child opens its own shards. Nothing of a shard is read before it is asked
    for.
    """

    def __init__(self, place: Place, version: int | None, columns: Sequence[str] | None) -> None:
        self.place = place
        self.inner, self.store, self.cache = place.open()
        self.manifest: Version = latest(self.store) if version is None else read_version(self.store, version)
        self.stored_schema: Schema = self.manifest.schema
        self._schema = self.stored_schema if columns is None else self.stored_schema.select(columns)
        self.table: ShardTable = read_shards(self.store, self.manifest)
        if self.cache is not None:
            _warn_if_larger(self.url, int(self.table.n_bytes.sum()), self.cache)
        # A function of its own, not a method: a cycle would keep descriptors open until the collector comes by.
        self._mapped = MappedRecords(self.stored_schema, self.stored_columns, self.table.first_record, self.url)
        opener = partial(_open_shard, self.store, self.table, self.dataset_id, place.verify)
        self._readers = _Readers(opener, self._mapped)
        self._tables: dict[int, BlockTable] = {}

    @property
    def url(self) -> str:
        """The data set's, without credentials."""
        return self.inner.url

    @property
    def dataset_id(self) -> str:
        """Of the data set, the same for all its versions."""
        return self.manifest.dataset_id

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.number

    @property
    def fingerprint(self) -> str:
        """Of the version's contents; what resume checks against."""
        return self.manifest.fingerprint

    @property
    def schema(self) -> Schema:
        """The columns that are served, in order."""
        return self._schema

    @cached_property
    def stored_columns(self) -> tuple[int, ...]:
        """Their indices in the shards' schema."""
        return tuple(self.stored_schema.index(name) for name in self._schema.names)

    @property
    def shard_records(self) -> NDArray[np.int64]:
        """Records of each shard, int64[n_shards]."""
        return self.table.n_records

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Stored bytes of each shard, int64[n_shards]."""
        return self.table.n_bytes

    def identity(self, shard: int) -> ShardIdentity:
        """What the cache keeps the shard's copy by."""
        return self.table.info(shard).identity(self.dataset_id)

    def block_tables(self, shards: Sequence[int]) -> list[BlockTable]:
        """The blocks of each of these shards, from their footers, read side by side. Raises as `load`."""
        missing = [shard for shard in dict.fromkeys(shards) if shard not in self._tables]
        if len(self._tables) + len(missing) > MAX_TABLES:
            self._tables = {shard: self._tables[shard] for shard in shards if shard in self._tables}
        with ThreadPoolExecutor(min(FOOTER_THREADS, max(len(missing), 1)), "tiercache-footer") as pool:
            self._tables.update(zip(missing, pool.map(self._read_table, missing), strict=True))
        return [self._tables[shard] for shard in shards]

    def load(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """Blocks of a shard in memory, the columns that are served.

        Raises:
            NotFound, StoreError: the store.
            CorruptShard: damaged bytes, which fetching them again did not cure.
        """
        return self._read(shard, lambda reader: reader.load(blocks, self.stored_columns))

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """A block as Arrow arrays, the columns that are served, wholly checked. Raises as `load`."""

        def read(reader: ShardReader) -> list[pa.Array]:
            loaded = reader.load([block], self.stored_columns)
            return [loaded.array(0, column) for column in self.stored_columns]

        return self._read(shard, read)

    def record(self, number: int) -> dict[str, Any] | None:
        """A record by its number in the data set: a value by column; None: it is not mapped, ask with `take_mapped`.

        Raises IndexError for one that is not there.
        """
        return self._mapped.record(number)

    def take_mapped(self, records: NDArray[np.int64]) -> list[ColumnValues] | None:
        """Values of records by their numbers in the data set, int64[n], n >= 1, by column.

        None: not all of them can be had from mapped shards; ask shard by shard, with `take`. Raises as `load`, and
        IndexError for a record that is not there.
        """
        found = self._mapped.take(records)
        if found is None:
            shards = np.unique(np.searchsorted(self.table.first_record, records, side="right") - 1)
            # More than can be open at once would push each other out.
            if len(shards) <= MAX_READERS and all(map(self._readers.map, shards.tolist())):
                found = self._mapped.take(records)
        return found

    def take(self, shards: Sequence[int], rows: Sequence[NDArray[np.int64]]) -> list[list[ColumnValues]]:
        """Values of some rows of each of these shards, by column. Raises as `load`."""
        if len(shards) < 2 or isinstance(self.inner, LocalStore):
            return [self._take(shard, within) for shard, within in zip(shards, rows, strict=True)]
        # Their time is round trips, as that of footers.
        with ThreadPoolExecutor(min(FOOTER_THREADS, len(shards)), "tiercache-records") as pool:
            return list(pool.map(self._take, shards, rows))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Tell the cache what comes, and start fetching what is not here."""
        if not isinstance(self.store, CachedStore):
            return
        coming = [shard for shard in dict.fromkeys(shards) if shard not in self._readers]
        wanted = tuple((self.table.info(shard).name, self.identity(shard)) for shard in coming)
        self.store.announce(ReadPlan(f"{os.getpid()}", wanted))
        for key, identity in wanted:
            self.store.fetch_ahead(key, identity)

    def is_at_hand(self, shard: int) -> bool:
        """Whether the shard is open, and what is served of it lies in a mapping as it is."""
        return shard in self._readers and self._readers.get(shard).stays_mapped(self.stored_columns)

    def heal(self, shard: int) -> bool:
        """Drop a shard's copy from the cache if it is not what the source sent; True: it was, load it again."""
        store = self.store
        healed = isinstance(store, LocalStore) and store.distrust(self.table.info(shard).name, self.identity(shard))
        self._readers.drop(shard)  # also if the copy is right: it may not be the one that was opened, but a newer one
        return healed

    def at_version(self, number: int) -> OpenedVersion:
        """The same choice of another version. Raises NotFound, SchemaError (a column is not there)."""
        return OpenedVersion(self.place, number, self._schema.names)

    def figures(self) -> dict[str, float]:
        """requests, bytes_fetched, cache_hits, cache_misses so far, of this process."""
        counters = self.inner.counters.snapshot()
        stats = self.cache.counters.snapshot() if self.cache is not None else {}
        return {
            "requests": counters.get("requests", 0),
            "bytes_fetched": counters.get("bytes_read", 0),
            "cache_hits": stats.get("hits", 0),
            "cache_misses": stats.get("misses", 0),
        }

    def close(self) -> None:
        """Give shards and connections back; shards in use stay good until they are dropped."""
        self._readers.clear()
        self.store.close()

    def _take(self, shard: int, rows: NDArray[np.int64]) -> list[ColumnValues]:
        return self._read(shard, lambda reader: reader.take(rows, self.stored_columns))

    def _read_table(self, shard: int) -> BlockTable:
        footer = self._footer(shard)
        return BlockTable(footer.block_records.astype(np.int64), footer.block_raw_bytes.astype(np.int64))

    def _footer(self, shard: int) -> Footer:
        if isinstance(self.store, CachedStore) and shard not in self._readers:
            info = self.table.info(shard)
            if not self.store.is_here(info.name, self.identity(shard)):
                # A group's order needs all its footers: some KiB each now, not each shard whole before the first batch.
                return read_footer_alone(self.inner, info.name, info)
        return self._read(shard, lambda reader: reader.footer)

    def _read(self, shard: int, read: Callable[[ShardReader], T]) -> T:
        """What read gives; once more where the cache's copy was to blame, or may be another than the one read."""
        try:
            return read(self._readers.get(shard))
        except CorruptShard:
            if not self.heal(shard) and self.cache is None:
                raise  # nobody replaces what was read
        return read(self._readers.get(shard))


def _default_cache() -> Cache | None:
    """The configured cache; None, with a warning, where its folder cannot be had: nobody has asked for it by name."""
    try:
        return Cache.default()
    except OSError as error:
        warnings.warn(
            f"no cache, so that every epoch is fetched again: {error}; name a folder that can be written by "
            "TIERCACHE_CACHE_DIR, or say cache=False",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


# (data set, its bytes, cache) that were warned of: once is enough, however often it is opened.
_warned: set[tuple[str, int, str]] = set()


def _warn_if_larger(url: str, n_bytes: int, cache: Cache) -> None:
    """Warn, once in a process, of a data set that the cache cannot hold whole, with the arithmetic."""
    limit_bytes = cache.limit_bytes
    reason = (url, n_bytes, str(cache.path))
    if n_bytes <= limit_bytes or reason in _warned:
        return
    _warned.add(reason)
    more_bytes = n_bytes - limit_bytes
    warnings.warn(
        f"{url}: {format_bytes(n_bytes)} of shards, but the cache in {cache.path} holds {format_bytes(limit_bytes)}: "
        f"{format_bytes(more_bytes)} ({more_bytes / n_bytes:.0%}) will be fetched again in every epoch; a larger cache "
        "(TIERCACHE_CACHE_SIZE, or cache=Cache(path, size=...)) avoids that",
        RuntimeWarning,
        stacklevel=2,
    )


def _open_shard(store: Store, table: ShardTable, dataset_id: str, verify: Verify, shard: int) -> ShardReader:
    info = table.info(shard)
    return ShardReader(store, info.name, info=info, identity=info.identity(dataset_id), verify=verify)


class _Readers:
    """Open shards, the least recently used dropped first; whoever reads by `mapped` passes by here, and does not count.

    The lock is never held while a shard is opened: threads open shards side by side, and two that want the same one
    wait for the first at its gate.
    """

    def __init__(self, opener: Callable[[int], ShardReader], mapped: MappedRecords) -> None:
        self._opener = opener
        self._mapped = mapped
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._gates: dict[int, threading.Lock] = {}
        self._mapped.clear()
        self._pid = os.getpid()  # last: whoever sees it takes the lock, which must not be the parent's any more

    def __contains__(self, shard: int) -> bool:
        return self._pid == os.getpid() and shard in self._open

    def get(self, shard: int) -> ShardReader:
        # In a forked child the parent's leases are not ours, and its lock may be held for ever.
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            reader = self._open.get(shard)
            if reader is not None:
                self._open.move_to_end(shard)
                return reader
            gate = self._gates.setdefault(shard, threading.Lock())
        with gate:
            with self._lock:
                reader = self._open.get(shard)
            if reader is None:
                reader = self._opener(shard)
                self._keep(shard, reader)
        return reader

    def map(self, shard: int) -> bool:
        """Let records of a shard be found in its mapping, which is kept as long as its reader.

        False: it has none, or is damaged: whoever asks the shard itself hears how, and may heal it.
        """
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
            if self._open.get(shard) is reader:
                self._mapped.put(shard, table)
        return True

    def drop(self, shard: int) -> None:
        if self._pid == os.getpid():
            with self._lock:
                self._open.pop(shard, None)
                self._mapped.forget(shard)

    def clear(self) -> None:
        if self._pid == os.getpid():
            with self._lock:
                self._open.clear()
                self._mapped.clear()

    def _keep(self, shard: int, reader: ShardReader) -> None:
        with self._lock:
            self._gates.pop(shard, None)
            self._open[shard] = reader
            while len(self._open) > MAX_READERS:
                oldest, _ = self._open.popitem(last=False)  # dropped, not closed: another thread may be reading from it
                self._mapped.forget(oldest)
