"""`DatasetSource`: the URL of a data set, and the cache through which it is read."""

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

    from tiercache.shard.conversion import Casts


Verify = Literal["first", "always", "never"]


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """The URL of a data set and how it is read: everything except the version and the columns. Picklable.

    Attributes:
        url: URL of the data set.
        cache: A Cache; None uses Cache.default() for a data set that is not local; False uses no cache.
        verify: When pages are checked against their checksums.
        storage_options: Options of the store.
        casts: Casts of columns.
    """

    url: str
    cache: Cache | Literal[False] | None = None
    verify: Verify = "first"
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    casts: Casts = field(default_factory=dict)

    def open(self) -> Store:
        """Open the store of the data set, without a cache."""
        return open_store(self.url, **self.storage_options)

    def cache_of(self, store: Store) -> Cache | None:
        """Return the cache through which a store is read; None: the store is read directly."""
        if isinstance(self.cache, Cache):
            return self.cache
        if self.cache is False or isinstance(store, LocalStore | MemoryStore):
            return None
        return _default_cache()

    def cached(self, store: Store) -> Store:
        """Return the store with the cache around it, or the store itself if no cache applies."""
        cache = self.cache_of(store)
        return store if cache is None else cache.store(store)


def _default_cache() -> Cache | None:
    """Return the configured cache; None, with a warning, if its folder cannot be used.

    The user did not ask for this cache by name, so the failure is not an error.
    """
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
    """Warn once per process about a data set that the cache cannot hold as a whole.

    If the data set fits, the cache itself warns later, when it has no space.

    Args:
        url: URL of the data set.
        dataset_id: Identifier of the data set.
        shard_bytes: Size of each shard in bytes, int64[n]. A shard larger than the cache is never cached; it is read by
            ranges.
        cache: Cache through which the data set is read.
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
    larger = "" if fits.all() else f", {(~fits).sum():,} of {len(fits):,} shards because each exceeds the whole cache"
    warnings.warn(
        f"{url}: {format_bytes(n_bytes)} of shards, but the cache in {cache.path} holds {format_bytes(limit_bytes)}: "
        f"{format_bytes(more_bytes)} ({more_bytes / n_bytes:.0%}) will be fetched again in every epoch{larger}; "
        "a larger cache (TIERCACHE_CACHE_SIZE, or cache=Cache(path, size=...)) avoids that",
        RuntimeWarning,
        stacklevel=2,
    )
