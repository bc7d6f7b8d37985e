"""One version of a data set, open for reading: its stores and cache, its segments and shards.

`DatasetLocation` says how a data set is opened.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, TypeVar
from weakref import WeakMethod, WeakValueDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.cache import CachedStore, WarmProgress
from tiercache.cache.cache import Cache
from tiercache.cache.names import NAME_BYTES, name_of_identity, names_of
from tiercache.errors import CorruptShard
from tiercache.model import (
    NEVER,
    ByteRange,
    PublishedPlan,
    ReadingPlan,
    ShardIdentity,
    SourcePart,
    format_bytes,
)
from tiercache.order.window import BlockSizes
from tiercache.shard import reader as shard_reader
from tiercache.shard.blocks import Blocks, Verify
from tiercache.shard.footer import Footer
from tiercache.shard.reader import MAX_RECENT, FooterCache, MappedRecords, OpenShard, RecentBlocks, ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.source import block_ranges, column_ranges, fetch_footer
from tiercache.shard.values import Casts, ColumnValues, empty_values, join_values, served_columns
from tiercache.shard.versions import ShardTable, Version, as_arrow, find_version, open_latest, read_shards
from tiercache.store import LocalStore, MemoryStore, Store, open_store
from tiercache.store.placement import check_readable, follow_placement
from tiercache.store.remote import call_threads
from tiercache.store.uses import UseRecorder


@dataclass(frozen=True, slots=True)
class DatasetLocation:
    """The URL of a data set and how it is read: everything except the version and the columns. Picklable.

    cache None: Cache.default() for a data set that is not local; False: no cache.
    """

    url: str
    cache: Cache | Literal[False] | None = None
    verify: Verify = "first"
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    casts: Casts = field(default_factory=dict)

    def open(self) -> Store:
        return open_store(self.url, **self.storage_options)

    def cache_of(self, store: Store) -> Cache | None:
        """Return the cache through which a store is read; None: the store is read directly."""
        if isinstance(self.cache, Cache):
            return self.cache
        if self.cache is False or isinstance(store, LocalStore | MemoryStore):
            return None
        return _default_cache()

    def cached(self, store: Store) -> Store:
        cache = self.cache_of(store)
        return store if cache is None else cache.store(store)


def _default_cache() -> Cache | None:
    """Return the configured cache; None, with a warning, if its folder cannot be used: nobody named this cache."""
    try:
        return Cache.default()
    except OSError as error:
        warnings.warn(
            f"the cache cannot be used, so every epoch is fetched again: {error}; set TIERCACHE_CACHE_DIR to a "
            "writable folder, or pass cache=False",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


# The combinations of data set, size and cache that were warned about: once per process is enough.
_warned: set[tuple[str, int, str]] = set()


def warn_if_larger(url: str, dataset_id: str, shard_bytes: NDArray[np.int64], cache: Cache) -> None:
    """Warn once per process about a data set that the cache cannot hold whole."""
    limit_bytes, n_bytes = cache.limit_bytes, int(shard_bytes.sum())
    reason = (url, n_bytes, str(cache.path))
    if n_bytes <= limit_bytes:
        cache.warn_if_too_small(dataset_id, f"{url} ({format_bytes(n_bytes)} of shards)")
    if n_bytes <= limit_bytes or reason in _warned:
        return
    _warned.add(reason)
    fits = shard_bytes <= limit_bytes
    more_bytes = n_bytes - min(limit_bytes, int(shard_bytes[fits].sum()))
    larger = "" if fits.all() else f", {(~fits).sum():,} of {len(fits):,} shards because each exceeds the whole cache"
    warnings.warn(
        f"{url}: {format_bytes(n_bytes)} of shards, but the cache in {cache.path} holds {format_bytes(limit_bytes)}: "
        f"{format_bytes(more_bytes)} ({more_bytes / n_bytes:.0%}) will be fetched again in every epoch{larger}; "
        "a larger cache (TIERCACHE_CACHE_SIZE, or cache=Cache(path, size=...)) avoids that",
        RuntimeWarning,
        stacklevel=2,
    )


class CopyNames:
    """The names of the copies of a version's shards and segments, each computed once (2 us). Safe from any thread."""

    def __init__(self, version: Version, table: ShardTable) -> None:
        self._dataset_id = version.dataset_id
        self._segments = version.segments
        self._table = table
        self._names = np.zeros((len(table), NAME_BYTES), np.uint8)  # zeros: not computed yet

    def of_shards(self, shards: NDArray[np.int64]) -> NDArray[np.uint8]:
        unknown = shards[~self._names[shards].any(axis=1)]
        if len(unknown):
            self._names[unknown] = names_of(self._dataset_id, *self._table.identities(unknown))
        return self._names[shards]

    def planned(self, plan: ReadingPlan) -> tuple[NDArray[np.uint8], ReadingPlan]:
        """Return the names of a reading plan's rows, and the plan, both with the segments, which are always in use."""
        n = len(self._segments)
        identities = [segment.identity(self._dataset_id) for segment in self._segments]
        segments = np.array([list(bytes.fromhex(name_of_identity(one))) for one in identities], np.uint8)
        whole = ReadingPlan(
            plan.owner,
            np.concatenate([plan.shards, len(self._table) + np.arange(n)]),
            np.concatenate([plan.first, np.zeros(n, np.int64)]),
            np.concatenate([plan.last, np.full(n, NEVER - 1)]),
            np.concatenate([plan.first_later, np.full(n, NEVER)]),
            plan.reader,
        )
        return np.concatenate([self.of_shards(plan.shards), segments.reshape(-1, NAME_BYTES)]), whole


class VersionStores:
    """Stores through which one process reads a data set. Safe from any thread and in a forked child.

    inner is the data set's own store; placed redirects reads of moved shards, as the placement log says; store is the
    cache around placed, or placed itself. uses reports which shards this process reads, if the data set is tracked.
    """

    def __init__(self, location: DatasetLocation) -> None:
        self.inner = location.open()
        self.placed = follow_placement(self.inner, location.storage_options, location.cached)
        self.cache = location.cache_of(self.inner)
        self.store: Store = self.placed if self.cache is None else self.cache.store(self.placed)
        self.uses = UseRecorder(self.placed.resolver)

    @property
    def _has_moved(self) -> bool:
        """Whether any shard is away from home, as far as is known."""
        return bool(self.placed.resolver.known_placement)

    def is_local(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None) -> bool:
        """Return whether ranges of a shard (None: all of it) are on this machine, in a folder or in the cache."""
        if isinstance(self.store, CachedStore):
            return self.store.is_cached(key, identity, ranges)
        if self._has_moved:
            return self._is_at_a_disk(key, identity)
        return isinstance(self.inner, LocalStore | MemoryStore)

    def _is_at_a_disk(self, key: str, identity: ShardIdentity) -> bool:
        is_home = isinstance(self.inner, LocalStore) and not self.placed.is_remote(key)
        return is_home or self.placed.resolver.local_copy(key, identity.n_bytes) is not None

    @property
    def has_cache(self) -> bool:
        return isinstance(self.store, CachedStore)

    @property
    def sends_requests(self) -> bool:
        """Whether reads send requests to a store, because there is no cache."""
        return self.fetcher is None and not isinstance(self.inner, LocalStore | MemoryStore)

    @property
    def fetcher(self) -> CachedStore | None:
        """Cached store that prefetches shards; None if nothing is read through a cache."""
        store = self.store if self.cache is not None else self.placed.remote_store
        return store if isinstance(store, CachedStore) else None

    def is_worth_fetching(self, key: str, identity: ShardIdentity) -> bool:
        return not self._has_moved or not self._is_at_a_disk(key, identity)

    def remove_if_corrupt(self, key: str, identity: ShardIdentity) -> bool:
        return isinstance(self.store, LocalStore) and self.store.remove_if_corrupt(key, identity)

    def prepare_reading(
        self, keys: pa.ChunkedArray, identity: Callable[[int], ShardIdentity], *, reads_all: bool
    ) -> None:
        def is_cached(i: int) -> bool:
            return isinstance(self.store, CachedStore) and self.store.is_cached(keys[i].as_py(), identity(i))

        check_readable(self.placed, keys, is_cached)
        if self.placed.resolver.is_tracked:
            self.uses.begin(None if reads_all else keys.to_pylist())

    def figures(self) -> dict[str, float]:
        """Return the counters of this process: requests, bytes_fetched, retries, ..., and dollars."""
        counters = self.placed.figures()
        return {
            "requests": counters.get("requests", 0),
            "bytes_fetched": counters.get("bytes_read", 0),
            **{name: counters.get(name, 0) for name in ("retries", "hedges", "throttled", "dollars", "egress_dollars")},
        }

    def close(self) -> None:
        """Report the counted uses and release connections. The object may be used again."""
        self.uses.close()
        self.store.close()


def _open_newest(stores: VersionStores) -> tuple[Version, ShardTable]:
    """Return the newest version and its shards. From a remote store, the placement is read at the same time."""
    if isinstance(stores.inner, LocalStore | MemoryStore):
        return open_latest(stores.store)
    with call_threads(1, "tiercache-placement") as pool:
        # The run that needs the placement reads it again after an error.
        pool.submit(stores.placed.resolver.placement_once)
        return open_latest(stores.store)


def _open_shard(
    stores: VersionStores,
    table: ShardTable,
    dataset_id: str,
    footers: FooterCache,
    past_cache: bool,  # open a shard at its source unless the cache already holds it
    shard: int,
    **how: Any,
) -> ShardReader:
    store, info = stores.store, table.info(shard)
    identity = info.identity(dataset_id)
    if past_cache and isinstance(store, CachedStore) and not store.is_cached(info.name, identity):
        store = store.inner
    stores.uses.note(info.name)
    local = stores.placed.resolver.local_copy(info.name, identity.n_bytes)
    return ShardReader(local or store, info.name, info=info, identity=identity, footer=footers.take(shard), **how)


# Shards of which blocks or records are read in parallel: the time is round trips.
READ_THREADS = 16
# Footers of a shard group are small, and read before the first batch: up to this many take one round trip of a store.
FOOTER_THREADS = 64
# Number of shards whose block sizes are kept: those of a shard take a few KiB; a shard group has a few dozen shards.
MAX_KEPT_SIZES = 4096
# How often a shard is read again after its bytes did not match their checksums: from a new copy, then from the store,
# after the cache has given up the object.
SHARD_READS_AGAIN = 5
T = TypeVar("T")
logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class VersionSpec:
    location: DatasetLocation
    version: int
    columns: tuple[str, ...]

    def open(self) -> OpenedVersion:
        return OpenedVersion(self.location, self.version, self.columns)


class OpenedVersion:
    """One version of a data set with some of its columns: all access to its shards. Safe from any thread.

    After a fork the child opens its own shards. Nothing of a shard is read before it is needed. schema has the stored
    types of the served columns.
    """

    fill_ratio: float | None = None  # see Leaf

    def __init__(self, location: DatasetLocation, version: int | str | None, columns: Sequence[str] | None) -> None:
        stores = VersionStores(location)
        if version is None:
            manifest, table = _open_newest(stores)
        else:
            manifest = find_version(stores.store, version)
            table = read_shards(stores.store, manifest)
        self._begin(location, stores, manifest, table, columns)

    def _begin(
        self,
        location: DatasetLocation,
        stores: VersionStores,
        manifest: Version,
        table: ShardTable,
        columns: Sequence[str] | None,
    ) -> None:
        self.location, self.stores, self.manifest, self.table = location, stores, manifest, table
        self.inner, self.cache, self.store = stores.inner, stores.cache, stores.store
        self._dataset_id = self.manifest.dataset_id
        self.stored_schema: Schema = self.manifest.schema
        self.n_records = int(self.table.first_record[-1])
        self._names = CopyNames(self.manifest, self.table)
        # Live objects of this and other versions with any columns: joined views of one version share its open shards.
        self._kin: WeakValueDictionary[tuple[Any, ...], OpenedVersion] = WeakValueDictionary()
        self._keepers: list[WeakMethod[Callable[[], None]]] = []
        if self.cache is not None:
            warn_if_larger(self.url, self._dataset_id, np.asarray(self.table.n_bytes), self.cache)
        self._serve(self.stored_schema.names if columns is None else columns)

    def _serve(self, columns: Sequence[str], *, past_cache: bool = False) -> None:
        self.schema: Schema = self.stored_schema.select(columns)
        self._block_sizes: dict[int, BlockSizes] = {}
        self._ranges: dict[int, tuple[ByteRange, ...] | None] = {}  # of the served columns; None: the whole shard
        self.stored_columns = tuple(self.stored_schema.index(name) for name in self.schema.names)
        self.spec = self._make_spec()
        self._served = served_columns(self.schema, self.location.casts)
        self._mapped = MappedRecords(
            self.stored_schema, self.stored_columns, self.table.first_record, self.url, self._served
        )
        self._footers = FooterCache()
        self._recent: RecentBlocks = deque(maxlen=MAX_RECENT)
        self._readers = shard_reader.ReaderPool(self._opener(past_cache), self._mapped)

    def _opener(self, past_cache: bool) -> Callable[[int], OpenShard]:
        """Return a function that opens a shard by its number.

        It is not a bound method: the reference cycle would keep descriptors open until the garbage collector runs.
        """
        opened = (self.stores, self.table, self._dataset_id, self._footers, past_cache)
        how: dict[str, Any] = {"verify": self.location.verify, "served": self._served, "recent": self._recent}
        return partial(_open_shard, *opened, **how)

    def _make_spec(self) -> LeafSpec:
        return VersionSpec(self.location, self.manifest.number, self.schema.names)

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def stored(self) -> OpenedVersion:
        return self

    @property
    def part(self) -> SourcePart:
        """The version as a state names it; a resumed run compares the fingerprint."""
        return SourcePart(self._dataset_id, self.manifest.number, self.manifest.fingerprint)

    def block_sizes(self, shards: Sequence[int]) -> list[BlockSizes]:
        """Return the block sizes of each of these shards, read from their footers in parallel. Raises as `load`."""
        known = self._block_sizes  # local reference: another thread may replace the attribute
        missing = [shard for shard in dict.fromkeys(shards) if shard not in known]
        if len(known) + len(missing) > MAX_KEPT_SIZES:
            self._block_sizes = known = {shard: known[shard] for shard in shards if shard in known}
            self._ranges = {shard: self._ranges.get(shard) for shard in known}
        if missing:
            n_threads = READ_THREADS if isinstance(self.inner, LocalStore) else FOOTER_THREADS
            # A thread may open a local copy.
            n_threads = min(n_threads, max(self._readers.capacity // 4, 1), len(missing))
            with call_threads(n_threads, "tiercache-footer") as pool:
                known.update(zip(missing, pool.map(self._read_block_sizes, missing), strict=True))
        return [known[shard] for shard in shards]

    def block_elements(self, shard: int) -> NDArray[np.int64]:
        """Return the elements of each block of the only served column, which is ragged: int64[n_blocks]."""
        footer = self._footer(shard)
        self._block_sizes[shard] = self._sizes_of_footer(shard, footer)
        (column,) = self.stored_columns
        (values, *_) = footer.schema.columns[column].streams(column)
        buffers = footer.chunks["first_buffer"][:, column] + np.uint64(values.values_buffer)
        found: NDArray[np.int64] = footer.buffers[buffers, 1].astype(np.int64) // values.width_bytes
        return found

    def load_shapes(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """Return blocks of the only served column, which is ragged; only the shapes may be read."""
        (column,) = self.stored_columns
        return self._read(shard, lambda reader: reader.load_shapes(blocks, column))

    def load_blocks(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """Return blocks with the served columns; their shard stays open for some time.

        Raises NotFound and StoreError; or CorruptShard if fetching damaged bytes again did not help.
        """
        return self._read(shard, lambda reader: reader.load_blocks(blocks, self.stored_columns))

    def count_read(self, shard: int, loaded: Blocks) -> dict[str, int]:
        """Count blocks that were just loaded as read; return their stored bytes by where these came from.

        The keys are "store" (bytes that were fetched for this, or read past the cache), and "cache", "disk" (a local
        folder) or "memory" (memory://).
        """
        n_bytes = loaded.stored_bytes
        if not loaded.is_cached:
            if self.cache is not None:
                self.cache.counters.add("bytes_missed", n_bytes)
            return {"memory" if self.cache is None and isinstance(self.inner, MemoryStore) else "store": n_bytes}
        store_bytes = self._readers.get(shard).count_read(loaded) if shard in self._readers else 0
        return {"store": store_bytes, "cache" if self.stores.has_cache else "disk": n_bytes - store_bytes}

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """Return a block as Arrow arrays of the served columns, completely checked. Raises as `load`."""

        def read(reader: OpenShard) -> list[pa.Array]:
            loaded = reader.load_blocks([block], self.stored_columns)
            return [loaded.array(0, column) for column in self.stored_columns]

        return self._read(shard, read)

    def record(self, number: int) -> dict[str, Any] | None:
        """Return a record by its number, as a dict of values by column; None if its shard is not mapped. IndexError."""
        return self._mapped.record(number)

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """Return the values of records, int64[n], by column: of mapped shards at once, of others one by one."""
        if not len(records):
            return empty_values(self.schema, self._served)
        found = self._mapped.take(records)
        if found is not None:
            return found
        of_record = np.searchsorted(self.table.first_record, records, side="right") - 1
        shards = np.unique(of_record).tolist()
        # More shards than may be open at once would evict each other.
        if len(shards) <= self._readers.capacity and all(map(self._readers.map_shard, shards)):
            found = self._mapped.take(records)
            if found is not None:
                return found
        places = [np.flatnonzero(of_record == shard) for shard in shards]
        rows = [records[where] - self.table.first_record[shard] for shard, where in zip(shards, places, strict=True)]
        if len(shards) < 2 or isinstance(self.inner, LocalStore):
            return join_values(list(map(self._take, shards, rows)), places)
        # In parallel: as for footers, the time is round trips.
        with call_threads(min(READ_THREADS, len(shards)), "tiercache-records") as pool:
            return join_values(list(pool.map(self._take, shards, rows)), places)

    def _take(self, shard: int, rows: NDArray[np.int64]) -> list[ColumnValues]:
        return self._read(shard, lambda reader: reader.take(rows, self.stored_columns))

    def publish_plan(self, plan: ReadingPlan) -> PublishedPlan | None:
        """See Storage.publish_plan. The mapped segments stay in use as long as the plan is published."""
        if not isinstance(self.store, CachedStore) or self.cache is None:
            return None
        has_room = int(self.table.n_bytes.sum()) <= self.cache.limit_bytes
        published = self.store.publish_plan(*self._names.planned(plan))
        return published if has_room else shard_reader.ReleasingPlan(published, self._readers, plan)

    def prefetch_shards(self, shards: Sequence[int]) -> None:
        fetcher = self.stores.fetcher
        if fetcher is None:
            return
        # An open shard requests what it needs itself. If the cache refused an open shard, the shard is read by ranges
        # to its end: fetching it as a whole once there is room would transfer the part that was already read a second
        # time.
        unopened = [shard for shard in dict.fromkeys(shards) if shard not in self._readers]
        objects = self.table.objects(self._dataset_id, np.array(unopened, np.int64))
        for shard, (key, identity) in zip(unopened, objects, strict=True):
            if self.stores.is_worth_fetching(key, identity):
                fetcher.prefetch(key, identity, self._ranges.get(shard))

    def prefetch_blocks(self, shard: int, blocks: Sequence[int]) -> None:
        """See Storage.prefetch_blocks. Does nothing for a shard whose footer has not been read."""
        fetcher = self.stores.fetcher
        if fetcher is None:
            return
        if shard in self._readers:
            self._readers.get(shard).prefetch_blocks(blocks, self.stored_columns)
            return
        footer, (key, identity) = self._footers.get(shard), self._object(shard)
        if footer is not None and self.stores.is_worth_fetching(key, identity):
            # The reader that opens the copy checks its footer, which therefore comes with the blocks.
            urgent = block_ranges(footer, self.table.info(shard), blocks, self.stored_columns)
            fetcher.prefetch(key, identity, self._ranges.get(shard), urgent_ranges=urgent)

    def is_mapped(self, shard: int) -> bool:
        """Whether the shard is open and its served columns are mapped in the form in which they are served."""
        return shard in self._readers and self._readers.get(shard).is_mapped(self.stored_columns)

    def remove_if_corrupt(self, shard: int) -> bool:
        """Remove a shard's local copy if it is corrupt. Returns True if it was: the caller loads the shard again."""
        key, identity = self._object(shard)
        was_removed = self.stores.remove_if_corrupt(key, identity)
        self._readers.drop(shard)  # even if the copy is right: it may be newer than the opened one
        if was_removed:
            logger.warning("%s: the local copy of %s was corrupt and is fetched again", self.url, key)
        return was_removed

    def is_local(self, shard: int) -> bool:
        """Whether the served columns of the shard are on this machine: in a local folder or in the cache."""
        key, identity = self._object(shard)
        is_open = self.stores.has_cache and self.is_mapped(shard)
        return is_open or self.stores.is_local(key, identity, self._ranges.get(shard))

    def prepare_reading(self, shards: NDArray[np.int64]) -> None:
        keys = self.table.names.take(as_arrow(shards))
        reads_all = len(shards) == len(self.table)
        self.stores.prepare_reading(keys, lambda i: self._object(int(shards[i]))[1], reads_all=reads_all)
        if isinstance(self.store, CachedStore):
            self.store.forget_unread(self._dataset_id)

    def at_version(self, number: int) -> OpenedVersion:
        """Return another version with the same columns. Raises NotFound, or SchemaError if it lacks a column."""
        names = self.schema.names
        return self._shared((number, names), lambda: OpenedVersion(self.location, number, names))

    def with_columns(self, columns: Sequence[str], *, past_cache: bool = False) -> OpenedVersion:
        """Return the same version with other columns and its own open shards. Raises SchemaError.

        past_cache: Shards that are not cached bypass the cache, because caching them would evict others.
        """

        def make() -> OpenedVersion:
            other = copy.copy(self)
            other._serve(columns, past_cache=past_cache)  # noqa: SLF001 -- of this class
            return other

        return self._shared((tuple(columns), past_cache), make)

    def _shared(self, key: tuple[Any, ...], make: Callable[[], OpenedVersion]) -> OpenedVersion:
        found = self._kin.get(key)
        return self._kin.setdefault(key, make()) if found is None else found

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        if self.cache is not None:
            objects = self.table.objects(self._dataset_id, np.array(shards, np.int64))
            ranges = self._ranges_of(shards)
            self.cache.warm(self.store, objects, jobs=jobs, ranges=ranges, on_progress=on_progress)

    def close(self) -> None:
        """Release shards and connections; shards in use stay valid until they are released."""
        for release in filter(None, (one() for one in self._keepers)):
            release()  # first: a prefetching loader would open shards again, on a closed store
        self._readers.clear()
        self._recent.clear()
        self.stores.close()

    def on_close(self, release: Callable[[], None]) -> None:
        """See Storage.on_close. Of two calls at once, one may be lost: its loader keeps blocks until it is deleted."""
        self._keepers = [*(one for one in self._keepers if one() is not None), WeakMethod(release)]

    def _read_block_sizes(self, shard: int) -> BlockSizes:
        return self._sizes_of_footer(shard, self._footer(shard))

    def _sizes_of_footer(self, shard: int, footer: Footer) -> BlockSizes:
        if self.stores.has_cache:
            self._ranges[shard] = column_ranges(footer, self.table.info(shard), self.stored_columns)
        return BlockSizes(footer.block_records.astype(np.int64), footer.block_raw_bytes.astype(np.int64))

    def _footer(self, shard: int) -> Footer:
        if isinstance(self.store, CachedStore) and shard not in self._readers:
            info = self.table.info(shard)
            identity = info.identity(self._dataset_id)
            if not self.store.is_cached(info.name, identity, [ByteRange(info.footer_offset, info.n_bytes)]):
                # The order of a shard group needs all footers of the group. A few KiB for each one now are cheaper than
                # fetching each shard completely before the first batch.
                store = self.store.store_for(info.name, identity, self.stores.placed.by_ranges)
                try:
                    footer = fetch_footer(store, info.name, info)
                except CorruptShard:
                    if not self.store.report_corrupt(info.name, identity):
                        raise
                    footer = fetch_footer(self.stores.placed.by_ranges, info.name, info)
                self._footers.put(shard, footer)
                return footer
        return self._read(shard, lambda reader: reader.footer)

    def _ranges_of(self, shards: Sequence[int]) -> dict[str, tuple[ByteRange, ...]]:
        """Return the ranges of the served columns by shard key, for shards not served whole. Reads missing footers."""
        found: dict[str, tuple[ByteRange, ...]] = {}
        is_all = len(self.stored_columns) == len(self.stored_schema)
        for first in range(0, 0 if is_all else len(shards), MAX_KEPT_SIZES):
            some = shards[first : first + MAX_KEPT_SIZES]
            self.block_sizes(some)
            for shard in some:
                ranges = self._ranges.get(shard)
                if ranges is not None:
                    found[self.table.info(shard).name] = ranges
        return found

    def _object(self, shard: int) -> tuple[str, ShardIdentity]:
        return self.table.objects(self._dataset_id, np.array([shard], np.int64))[0]

    def _read(self, shard: int, read: Callable[[OpenShard], T]) -> T:
        """Return the result of read(reader); after CorruptShard, again: from a new copy, then from the store."""
        for _ in range(SHARD_READS_AGAIN):
            reads_store = False
            try:
                reader = self._readers.get(shard)
                reads_store = reader.local_copy is None
                return read(reader)
            except CorruptShard:
                if not self.remove_if_corrupt(shard) and self.cache is None and not reads_store:
                    raise  # a retry would read the same bytes of a local file
        return read(self._readers.get(shard))


@dataclass(frozen=True, slots=True, eq=False)
class ShardSizes:
    """The shards of a leaf that has no `ShardTable`. Attributes as there."""

    n_records: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    first_record: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.n_records)


class LeafSpec(Protocol):
    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def version(self) -> int: ...

    def open(self) -> Leaf: ...


class Leaf(Protocol):
    """Records in shards and blocks: an `OpenedVersion`, which says what the methods do, or a `PackedVersion` over one.

    All methods may be called from any thread. stored: The version whose shards are read, with the same numbers.
    fill_ratio: Share of the positions of packed rows that are not padding; None for other records.
    """

    stored_schema: Schema
    schema: Schema

    @property
    def stored(self) -> OpenedVersion: ...

    @property
    def table(self) -> ShardTable | ShardSizes: ...

    @property
    def spec(self) -> LeafSpec: ...

    @property
    def part(self) -> SourcePart: ...

    @property
    def fill_ratio(self) -> float | None: ...

    def block_sizes(self, shards: Sequence[int], /) -> list[BlockSizes]: ...

    def load_blocks(self, shard: int, blocks: Sequence[int], /) -> Blocks: ...

    def count_read(self, shard: int, loaded: Blocks, /) -> dict[str, int]: ...

    def is_mapped(self, shard: int, /) -> bool: ...

    def prefetch_blocks(self, shard: int, blocks: Sequence[int], /) -> None: ...

    def record(self, number: int, /) -> dict[str, Any] | None: ...

    def values(self, records: NDArray[np.int64], /) -> list[ColumnValues]: ...

    def at_version(self, number: int, /) -> Leaf: ...

    def with_columns(self, columns: Sequence[str], /) -> Leaf: ...


ShardsOfLeaf: TypeAlias = "tuple[Leaf, NDArray[np.int64], NDArray[np.int64]]"
ShardsOfVersion: TypeAlias = "tuple[OpenedVersion, NDArray[np.int64], NDArray[np.int64]]"


def distinct(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sorted distinct numbers of shards or leaves. The first np.unique() of a process takes 6 ms."""
    return np.flatnonzero(np.bincount(numbers))


class Storage:
    """The stored shards of `Records`, whose shard numbers the methods take. Safe from any thread."""

    def __init__(
        self, leaves: tuple[Leaf, ...], leaf_shards: NDArray[np.int64], shard_records: NDArray[np.int64]
    ) -> None:
        self._leaves, self._leaf_shards, self._shard_records = leaves, leaf_shards, shard_records
        self.versions = tuple({id(leaf.stored): leaf.stored for leaf in leaves}.values())

    @property
    def has_cache(self) -> bool:
        return any(version.stores.has_cache for version in self.versions)

    @property
    def can_prefetch(self) -> bool:
        """Whether prefetch_shards() can fetch anything; if not, no caller needs to compute the shards for it."""
        return any(version.stores.fetcher is not None for version in self.versions)

    @property
    def sends_requests(self) -> bool:
        """Whether Records.load_blocks() sends requests to a store, because there is no cache."""
        return any(version.stores.sends_requests for version in self.versions)

    def locate(self, shard: int) -> tuple[Leaf, int]:
        leaf = int(self._leaf_shards.searchsorted(shard, side="right")) - 1
        return self._leaves[leaf], int(shard - self._leaf_shards[leaf])

    def by_leaf(self, shards: Any) -> list[ShardsOfLeaf]:
        """Return (leaf, indices of its shards, their numbers there) for each leaf that has any of the shards."""
        shards = np.asarray(shards, np.int64)
        leaves = np.searchsorted(self._leaf_shards, shards, side="right") - 1
        found = []
        for leaf in distinct(leaves).tolist():
            where = np.flatnonzero(leaves == leaf)
            found.append((self._leaves[leaf], where, shards[where] - self._leaf_shards[leaf]))
        return found

    def _by_version(self, shards: Any) -> list[ShardsOfVersion]:
        """Return the same with the leaves of each stored version joined: a number there may then be repeated."""
        by_version: dict[int, list[ShardsOfLeaf]] = {}
        for group in self.by_leaf(shards):
            by_version.setdefault(id(group[0].stored), []).append(group)
        return [
            (groups[0][0].stored, np.concatenate([g[1] for g in groups]), np.concatenate([g[2] for g in groups]))
            for groups in by_version.values()
        ]

    def is_mapped(self, shard: int) -> bool:
        """Whether Records.load_blocks() of any block of the shard only maps it, as far as is known without looking."""
        leaf, number = self.locate(shard)
        return leaf.is_mapped(number)

    def is_local(self, shard: int) -> bool:
        """Whether the served columns of the shard are on this machine, so that load() needs no network."""
        leaf, number = self.locate(shard)
        return leaf.stored.is_local(number)

    def count_read(self, shard: int, loaded: Blocks) -> dict[str, int]:
        """See OpenedVersion.count_read."""
        leaf, number = self.locate(shard)
        return leaf.count_read(number, loaded)

    def remove_if_corrupt(self, shard: int) -> bool:
        leaf, number = self.locate(shard)
        return leaf.stored.remove_if_corrupt(number)

    def publish_plan(self, plan: ReadingPlan) -> PublishedPlan | None:
        """Tell the caches when shards are read, until the result is closed; None: no cache. Raises OSError.

        All leaves of a version share one plan, because there may be many.
        """
        if len(self._leaves) == 1:
            return self.versions[0].publish_plan(plan)
        found: list[PublishedPlan] = []
        try:
            for version, where, shards in self._by_version(plan.shards):
                one = version.publish_plan(plan_of(plan, where, shards))
                if one is not None:
                    found.append(one)
        except BaseException:  # the plans published so far have no other owner that could withdraw them
            PublishedPlans(tuple(found)).close()
            raise
        return PublishedPlans(tuple(found))

    def prepare_reading(self, shards: NDArray[np.int64]) -> None:
        """Check that a run can read these shards. Raises ArchivedShards with all shards that must be restored."""
        for version, _, numbers in self._by_version(shards[self._shard_records[shards] > 0]):
            version.prepare_reading(distinct(numbers))

    def prefetch_shards(self, shards: Sequence[int]) -> None:
        """Start to fetch these shards to this machine, in this order; returns at once."""
        for leaf, _, numbers in self.by_leaf([shard for shard in shards if self._shard_records[shard]]):
            leaf.stored.prefetch_shards(numbers.tolist())

    def prefetch_blocks(self, shard: int, blocks: Sequence[int]) -> None:
        """Start to fetch blocks that are loaded next, before whole shards, if the cache admits the shard."""
        leaf, number = self.locate(shard)
        leaf.prefetch_blocks(number, blocks)

    def warm(self, *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None) -> None:
        for leaf, _, numbers in self.by_leaf(np.flatnonzero(self._shard_records)):
            leaf.stored.warm(numbers.tolist(), jobs=jobs, on_progress=on_progress)

    def figures(self) -> Mapping[str, float]:
        """Return the sums of VersionStores.figures()."""
        sums: Counter[str] = Counter()
        for version in self.versions:
            sums.update(version.stores.figures())
        return sums

    def on_close(self, release: Callable[[], None]) -> None:
        """Call a method that releases prefetched blocks when a version is closed. Its object is referenced weakly."""
        for version in self.versions:
            version.on_close(release)

    def close(self) -> None:
        for version in self.versions:
            version.close()


@dataclass(frozen=True, slots=True)
class PublishedPlans:
    every: tuple[PublishedPlan, ...]

    def advance(self, clock: int) -> None:
        for one in self.every:
            one.advance(clock)

    def close(self) -> None:
        """See PublishedPlan.close; closes all of them, even if one raises."""
        with ExitStack() as closing:
            for one in reversed(self.every):
                closing.callback(one.close)


def plan_of(plan: ReadingPlan, where: NDArray[np.int64], numbers: NDArray[np.int64]) -> ReadingPlan:
    """Return the rows of a plan at `where` for one version, with its shard numbers. The clock stays that of the job.

    A shard that several rows name is in use from its first to its last use.
    """
    shards, at = np.unique(numbers, return_inverse=True)
    first, first_later = np.full(len(shards), NEVER), np.full(len(shards), NEVER)
    last = np.full(len(shards), -1, np.int64)
    np.minimum.at(first, at, plan.first[where])
    np.minimum.at(first_later, at, plan.first_later[where])
    np.maximum.at(last, at, np.where(plan.last[where] == NEVER, -1, plan.last[where]))
    last = np.where(first == NEVER, NEVER, last)
    return replace(plan, shards=shards, first=first, last=last, first_later=first_later)
