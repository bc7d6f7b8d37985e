"""Data sets as the cache sees them: `DatasetSource`, the names of copies, and the warning that one does not fit."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tiercache.cache.cache import Cache
from tiercache.cache.names import NAME_BYTES, name_of_identity
from tiercache.model import NEVER, ReadingPlan, format_bytes
from tiercache.store import LocalStore, MemoryStore, Store, open_store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from tiercache.shard.conversion import Casts
    from tiercache.shard.versions.manifest import Version
    from tiercache.shard.versions.segments import ShardTable


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
    """Warn once per process about a data set, of shards of these sizes (int64[n]), that the cache cannot hold whole.

    If the data set fits, the cache itself warns later, when it has no space.
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


class CopyNames:
    """The names of the copies of one version's shards and segments.

    Each name is computed once and takes 2 us. Safe from any thread.
    """

    def __init__(self, version: Version, table: ShardTable) -> None:
        self._dataset_id = version.dataset_id
        self._segments = version.segments
        self._table = table
        self._names = np.zeros((len(table), NAME_BYTES), np.uint8)  # zeros: not computed yet

    def of_shards(self, shards: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the names of the copies of these shards, uint8[m, 20]."""
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
            np.concatenate([plan.then, np.full(n, NEVER)]),
            plan.reader,
        )
        return np.concatenate([self.of_shards(plan.shards), segments.reshape(-1, NAME_BYTES)]), whole


def names_of(
    dataset_id: str, shard_ids: Sequence[str], n_bytes: Sequence[int], sums: Sequence[int]
) -> NDArray[np.uint8]:
    """Return the names of the copies of a data set's shards, uint8[n, 20], each as name_of_identity returns it."""
    # The text that json.dumps writes: ids are hexadecimal, so nothing needs escaping. With ShardIdentity, a name takes
    # 7 us.
    begin = json.dumps(["identity", dataset_id])[:-1]
    rows = zip(shard_ids, n_bytes, sums, strict=True)
    digests = [blake2b(f'{begin}, "{i}", "{n}", "{c}"]'.encode(), digest_size=NAME_BYTES).digest() for i, n, c in rows]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, NAME_BYTES)
