"""Stores through which a data set is read: its own store, the placement of its shards, and the cache around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiercache.cache import CachedStore
from tiercache.model import ByteRange
from tiercache.shard.read.shard_reader import ShardReader
from tiercache.store import LocalStore, MemoryStore, Store
from tiercache.tier.placed import follow_placement
from tiercache.tier.reading import TieredReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pyarrow as pa

    from tiercache.cache.place import DatasetSource
    from tiercache.model import ShardIdentity
    from tiercache.shard.read.reader_pool import FooterCache
    from tiercache.shard.versions.segments import ShardTable


class VersionStores:
    """Joined stores through which one process reads a data set. Safe from any thread and in a forked child.

    Attributes:
        inner: The data set's own store.
        placed: Store that redirects reads of moved shards, as the placement log says.
        cache: Cache of the data set; None if it is read without a cache.
        store: Store to read from: the cache around `placed`, or `placed` itself.
        tiers: State of the tiers: counts uses of shards, and promotes shards to the hot tier.
    """

    def __init__(self, place: DatasetSource) -> None:
        self.inner = place.open()
        self.placed = follow_placement(self.inner, place.storage_options, place.cached)
        self.cache = place.cache_of(self.inner)
        self.store: Store = self.placed if self.cache is None else self.cache.store(self.placed)
        self.tiers = TieredReader(self.placed, self.store)

    def is_local(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None) -> bool:
        """Return whether bytes of a shard are on this machine, in a folder or in the cache.

        Args:
            key: Key of the shard.
            identity: Identity of the shard.
            ranges: Byte ranges in question; None: the whole shard.
        """
        if isinstance(self.store, CachedStore):
            return self.store.is_here(key, identity, ranges)
        if self.tiers.has_moved:
            return self._is_at_a_disk(key, identity)
        return isinstance(self.inner, LocalStore | MemoryStore)

    def _is_at_a_disk(self, key: str, identity: ShardIdentity) -> bool:
        """Return whether a shard lies in a local folder that is not a cache."""
        is_home = isinstance(self.inner, LocalStore) and not self.tiers.is_remote(key)
        return is_home or self.tiers.local_copy(key, identity) is not None

    @property
    def fetcher(self) -> CachedStore | None:
        """Cached store that prefetches shards; None if nothing is read through a cache."""
        store = self.store if self.cache is not None else self.tiers.far()
        return store if isinstance(store, CachedStore) else None

    def is_worth_fetching(self, key: str, identity: ShardIdentity) -> bool:
        """Return whether prefetching a shard is useful: it does not lie in a local folder."""
        return not self.tiers.has_moved or not self._is_at_a_disk(key, identity)

    def verify_copy(self, key: str, identity: ShardIdentity) -> bool:
        """Verify the local copy of a shard that was found to be corrupt.

        Returns:
            Whether a local copy was to blame; it is no longer read.
        """
        healed = self.tiers.reject_local_copy(key, identity)
        return (isinstance(self.store, LocalStore) and self.store.verify_copy(key, identity)) or healed

    def prepare_reading(
        self, keys: pa.ChunkedArray, identity: Callable[[int], ShardIdentity], *, reads_all: bool
    ) -> None:
        """Prepare a run that reads these shards; see TieredReader.prepare_reading.

        Args:
            keys: Keys of the shards.
            identity: Function that returns the identity of the i-th of these shards.
            reads_all: Whether these are all shards of the data set.
        """

        def is_cached(i: int) -> bool:
            return isinstance(self.store, CachedStore) and self.store.is_here(keys[i].as_py(), identity(i))

        self.tiers.prepare_reading(keys, is_cached, reads_all=reads_all)

    def figures(self) -> dict[str, float]:
        """Return the counters of this process: requests, bytes_fetched, cache_hits, cache_misses."""
        counters = self.placed.figures()
        stats = self.cache.counters.snapshot() if self.cache is not None else {}
        return {
            "requests": counters.get("requests", 0),
            "bytes_fetched": counters.get("bytes_read", 0),
            "cache_hits": stats.get("hits", 0),
            "cache_misses": stats.get("misses", 0),
        }

    def close(self) -> None:
        """Report the counted uses and release connections. The object may be used again."""
        self.tiers.close()
        self.store.close()


@dataclass(frozen=True, slots=True)
class ShardOpener:
    """Opens shards of one version.

    Attributes:
        store: Store to read through.
        tiers: Reading state of the tiers.
        table: Shards of the version.
        dataset_id: Id of the data set.
        footers: Footers that have already been read.
    """

    store: Store
    tiers: TieredReader
    table: ShardTable
    dataset_id: str
    footers: FooterCache

    def open(self, shard: int, **how: Any) -> ShardReader:
        """Open a shard through the cache, if there is one."""
        return self._open_through(self.store, shard, **how)

    def open_past_cache(self, shard: int, **how: Any) -> ShardReader:
        """Open a shard at its source unless the cache already holds it."""
        store, info = self.store, self.table.info(shard)
        if isinstance(store, CachedStore) and not store.is_here(info.name, info.identity(self.dataset_id)):
            store = store.inner
        return self._open_through(store, shard, **how)

    def _open_through(self, store: Store, shard: int, **how: Any) -> ShardReader:
        info = self.table.info(shard)
        identity, footer = info.identity(self.dataset_id), self.footers.take(shard)
        near = self.tiers.opened(info.name, identity)
        return ShardReader(near or store, info.name, info=info, identity=identity, footer=footer, **how)
