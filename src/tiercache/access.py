"""Through what a data set is read: its own store, where its shards lie by now, and the cache round them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiercache.cache import CachedStore
from tiercache.model import ByteRange
from tiercache.shard.reader import ShardReader
from tiercache.store import LocalStore, MemoryStore, Store
from tiercache.tier.placed import placed
from tiercache.tier.reading import TieredReading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pyarrow as pa

    from tiercache.cache.place import Place
    from tiercache.model import ShardIdentity
    from tiercache.shard.footers import Footers
    from tiercache.shard.segments import ShardTable


class Access:
    """The stores that one process reads a data set through, joined. Safe from any thread, and in a forked child.

    Attributes:
        inner: the data set's own store.
        placed: the same, following its placement.
        cache: None: it is read without one.
        store: what is read from: placed, or the cache round it.
        tiers: what counts uses, and copies to the hot tier.
    """

    def __init__(self, place: Place) -> None:
        self.inner = place.open()
        self.placed = placed(self.inner, place.storage_options, place.cached)
        self.cache = place.cache_of(self.inner)
        self.store: Store = self.placed if self.cache is None else self.cache.store(self.placed)
        self.tiers = TieredReading(self.placed, self.store)

    def is_near(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None) -> bool:
        """Whether these bytes of a shard, None: all, lie on this machine: in a folder, or in the cache."""
        if isinstance(self.store, CachedStore):
            return self.store.is_here(key, identity, ranges)
        if self.tiers.has_moved:
            return self._is_at_a_disk(key, identity)
        return isinstance(self.inner, LocalStore | MemoryStore)

    def _is_at_a_disk(self, key: str, identity: ShardIdentity) -> bool:
        """Whether a shard lies in a folder of this machine that is no cache."""
        is_home = isinstance(self.inner, LocalStore) and not self.tiers.is_far(key)
        return is_home or self.tiers.near(key, identity) is not None

    @property
    def fetcher(self) -> CachedStore | None:
        """What brings shards near before they are read; None: nothing goes through a cache."""
        store = self.store if self.cache is not None else self.tiers.far()
        return store if isinstance(store, CachedStore) else None

    def is_worth_fetching(self, key: str, identity: ShardIdentity) -> bool:
        """Whether the fetcher should bring a shard near: it is not in a folder of this machine by now."""
        return not self.tiers.has_moved or not self._is_at_a_disk(key, identity)

    def distrust(self, key: str, identity: ShardIdentity) -> bool:
        """Hear that a shard was found to be wrong. True: a copy here was to blame, which is read no more."""
        healed = self.tiers.distrust(key, identity)
        return (isinstance(self.store, LocalStore) and self.store.distrust(key, identity)) or healed

    def make_ready(self, keys: pa.ChunkedArray, identity: Callable[[int], ShardIdentity], *, reads_all: bool) -> None:
        """Hear that a run begins that reads these shards, and see that it can: as TieredReading.make_ready.

        identity: of shard i of them.
        """

        def is_cached(i: int) -> bool:
            return isinstance(self.store, CachedStore) and self.store.is_here(keys[i].as_py(), identity(i))

        self.tiers.make_ready(keys, is_cached, reads_all=reads_all)

    def figures(self) -> dict[str, float]:
        """requests, bytes_fetched, cache_hits, cache_misses so far, of this process."""
        counters = self.placed.figures()
        stats = self.cache.counters.snapshot() if self.cache is not None else {}
        return {
            "requests": counters.get("requests", 0),
            "bytes_fetched": counters.get("bytes_read", 0),
            "cache_hits": stats.get("hits", 0),
            "cache_misses": stats.get("misses", 0),
        }

    def close(self) -> None:
        """Report what was used, and give connections back. It may be used again."""
        self.tiers.close()
        self.store.close()


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens shards of one version. store: through which; footers: those that were read before."""

    store: Store
    tiers: TieredReading
    table: ShardTable
    dataset_id: str
    footers: Footers

    def open(self, shard: int, **how: Any) -> ShardReader:
        """Through the cache, if there is one."""
        return self._open_through(self.store, shard, **how)

    def open_past_cache(self, shard: int, **how: Any) -> ShardReader:
        """From where it lies, unless the cache has it."""
        store, info = self.store, self.table.info(shard)
        if isinstance(store, CachedStore) and not store.is_here(info.name, info.identity(self.dataset_id)):
            store = store.inner
        return self._open_through(store, shard, **how)

    def _open_through(self, store: Store, shard: int, **how: Any) -> ShardReader:
        info = self.table.info(shard)
        identity, footer = info.identity(self.dataset_id), self.footers.take(shard)
        near = self.tiers.opened(info.name, identity)
        return ShardReader(near or store, info.name, info=info, identity=identity, footer=footer, **how)
