"""Where a data set is read from, and through which cache."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tiercache.cache.cache import Cache
from tiercache.model import format_bytes
from tiercache.store import LocalStore, MemoryStore, Store, open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from tiercache.shard.cast import Casts

Verify = Literal["first", "always", "never"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a data set is read from and how: everything but which version and columns. Picklable.

    cache: None: Cache.default() for what is not local; False: none; a Cache: always that one; casts: of columns.
    """

    url: str
    cache: Cache | Literal[False] | None = None
    verify: Verify = "first"
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    casts: Casts = field(default_factory=dict)

    def open(self) -> Store:
        """The data set's own store."""
        return open_store(self.url, **self.storage_options)

    def cache_of(self, store: Store) -> Cache | None:
        """The cache that a store is read through here; None: it is read itself."""
        if isinstance(self.cache, Cache):
            return self.cache
        if self.cache is False or isinstance(store, LocalStore | MemoryStore):
            return None
        return _default_cache()

    def cached(self, store: Store) -> Store:
        """A store as it is read here: itself, or the cache round it."""
        cache = self.cache_of(store)
        return store if cache is None else cache.store(store)


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


def announce(url: str, dataset_id: str, shard_bytes: NDArray[np.int64], cache: Cache) -> None:
    """Warn, once in a process, of a data set that the cache cannot hold whole, with the arithmetic.

    If the data set fits, the cache warns later, when it has no room.

    shard_bytes: int64[n], of each shard. One that is larger than the cache is never cached: it is read by ranges.
    """
    limit_bytes, n_bytes = cache.limit_bytes, int(shard_bytes.sum())
    reason = (url, n_bytes, str(cache.path))
    if n_bytes <= limit_bytes:
        cache.expect(dataset_id, f"{url} ({format_bytes(n_bytes)} of shards)")
    if n_bytes <= limit_bytes or reason in _warned:
        return
    _warned.add(reason)
    fits = shard_bytes <= limit_bytes
    more_bytes = n_bytes - min(limit_bytes, int(shard_bytes[fits].sum()))
    larger = "" if fits.all() else f", {(~fits).sum():,} of {len(fits):,} shards because each is larger than all of it"
    warnings.warn(
        f"{url}: {format_bytes(n_bytes)} of shards, but the cache in {cache.path} holds {format_bytes(limit_bytes)}: "
        f"{format_bytes(more_bytes)} ({more_bytes / n_bytes:.0%}) will be fetched again in every epoch{larger}; "
        "a larger cache (TIERCACHE_CACHE_SIZE, or cache=Cache(path, size=...)) avoids that",
        RuntimeWarning,
        stacklevel=2,
    )
