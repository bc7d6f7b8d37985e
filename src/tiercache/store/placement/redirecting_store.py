"""The redirecting store: a home whose objects are read from their current location, transparently for the reader."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow.compute as pc

from tiercache.errors import ArchivedShards
from tiercache.model import ByteRange, ObjectInfo, ShardIdentity, format_bytes
from tiercache.prices import provider_prices, read_dollars
from tiercache.store import Lease, LocalFolder, LocalStore, Span, Store
from tiercache.store.contract import Receive, WrapperStore
from tiercache.store.placement.resolver import LocationResolver, ObjectLocation, is_remote
from tiercache.store.placement.uses import UseRecorder

if TYPE_CHECKING:
    import pyarrow as pa

    from tiercache.store.placement.log import Placement, PlacementRow


# Restores of archived shards are queried in parallel, because the time is round trips.
ASKING_THREADS = 16
# Most names in a message and its command. For more shards the command restores all below the URL. The error has all.
_SHOWN = 8

Cached: TypeAlias = Callable[[Store], Store]


def as_it_is(store: Store) -> Store:
    """Return the store itself, without a cache around it."""
    return store


def follow_placement(home: Store, options: Mapping[str, Any], cached: Cached = as_it_is) -> RedirectingStore:
    """Return a store that follows the placement of a home: a LocalStore where the home is one.

    options: Storage options of the home. cached: Wraps a store in the cache, for the remote objects of a local home.
    """
    resolver = LocationResolver(home, options)
    return RedirectingLocalStore(resolver, cached) if isinstance(home, LocalStore) else RedirectingStore(resolver)


class RedirectingStore(WrapperStore):
    """Store whose reads follow the placement; all other calls go to the home.

    The placement is read when an object is missing. `counters` are those of the home; `figures()` includes the other
    locations.
    """

    def __init__(self, resolver: LocationResolver) -> None:
        super().__init__(resolver.home)
        self.resolver = resolver

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.resolver,)

    @property
    def by_ranges(self) -> RedirectingStore:
        """The same store for reads by ranges only, without local files or a cache."""
        return self

    def figures(self) -> dict[str, float]:
        """Return the counters (requests, bytes_read, ...), summed over the home and the other locations.

        dollars is the price of the requests, and egress_dollars what the bytes cost if they leave the region; both are
        0 for stores whose provider is unknown.
        """
        sums: dict[str, float] = {"dollars": 0.0, "egress_dollars": 0.0}
        for store in self.resolver.stores():
            counters = store.counters.snapshot()
            prices = provider_prices(store.provider)
            if prices is not None:
                dollars, egress = read_dollars(prices, counters.get("requests", 0), counters.get("bytes_read", 0))
                counters |= {"dollars": dollars, "egress_dollars": egress}
            for name, figure in counters.items():
                sums[name] = sums.get(name, 0) + figure
        return sums

    # -- reading ----------------------------------------------------------------------------------------------------

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """See Store.read_into. An ETag means the object as it was opened, wherever it has moved since."""

        def read(found: ObjectLocation) -> None:
            etag = self._etag_at(found, key, if_match)
            found.store.read_into(key, spans, if_match=etag, deadline_s=deadline_s, cancel=cancel)

        self.resolver.follow(key, read, if_match)

    def read_pieces(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        receive: Receive,
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """See Store.read_pieces, and read_into() for the ETag."""

        def read(found: ObjectLocation) -> None:
            etag = self._etag_at(found, key, if_match)
            found.store.read_pieces(key, ranges, receive, if_match=etag, deadline_s=deadline_s, cancel=cancel)

        self.resolver.follow(key, read, if_match)

    def _etag_at(self, found: ObjectLocation, key: str, if_match: str | None) -> str | None:
        """Return the ETag that the object must have where it is now; None without a condition."""
        if if_match is None:
            return None
        return self.resolver.etag_of(key, if_match) if found.info is None else found.info.etag

    def head(self, key: str) -> ObjectInfo:
        return self.resolver.follow(key, lambda found: found.info or found.store.head(key))

    def get(self, key: str) -> bytes:
        return self.resolver.follow(key, lambda found: found.store.get(key))

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        return self.resolver.follow(key, lambda found: found.store.read_tail(key, n_bytes))

    def close(self) -> None:
        self.resolver.close()


class RedirectingLocalStore(RedirectingStore):
    """A local home: its own files are opened directly, remote objects are read through the cache."""

    def __init__(self, resolver: LocationResolver, cached: Cached) -> None:
        super().__init__(resolver)
        self._cached = cached
        self._remote_store: Store | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.resolver, self._cached)

    @property
    def by_ranges(self) -> RedirectingStore:
        """The same store for reads by ranges only, without local files or a cache."""
        return RedirectingStore(self.resolver)

    @property
    def remote_store(self) -> Store:
        """Store for remote objects, through the cache if there is one. It follows the placement too."""
        store = self._remote_store
        if store is None:
            store = self._remote_store = self._cached(self.by_ranges)
        return store

    def is_remote(self, key: str) -> bool:
        """Return whether the known placement has key in a remote store, for which a cache pays off."""
        row = self.resolver.row(key) if self.resolver.has_remote else None
        return row is not None and is_remote(row.url)

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """Return a lease on the file, or on the cached copy of a remote object; None if it is read by ranges."""

        def open_at(found: ObjectLocation) -> Lease | None:
            is_cached = found.row is not None and is_remote(found.row.url)
            store = self.remote_store if is_cached else found.store
            return store.open_local(key, identity) if isinstance(store, LocalStore) else None

        return self.resolver.follow(key, open_at)

    def remove_if_corrupt(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """See LocalStore.remove_if_corrupt. Returns False for a file of this home, which is the object itself."""
        if not self.is_remote(key):
            return False
        store = self.remote_store
        return isinstance(store, LocalStore) and store.remove_if_corrupt(key, identity)


# -- check before a run ---------------------------------------------------------------------------------------------


def check_readable(store: RedirectingStore, keys: pa.ChunkedArray, is_here: Callable[[int], bool]) -> None:
    """Raise ArchivedShards if some of these objects must be restored first; the error has all names.

    Uses the placement that was read when the data set was opened, or reads it now. For objects that the placement
    calls archived, the store is asked for one byte each, because they may have been restored.
    is_here: Whether object i is on this machine already.
    """
    placement = store.resolver.placement_once()
    needed = () if placement is None else _archived(store, placement, keys, is_here)
    if needed and (newer := store.resolver.refresh()) is not placement and newer is not None:
        needed = _archived(store, newer, keys, is_here)  # they may have been restored to the home since
    if needed:
        names, n_bytes, url = [row.key for row in needed], sum(row.n_bytes for row in needed), store.url
        what = [f"{url.rstrip('/')}/{name}" for name in names] if len(names) <= _SHOWN else [url]
        command = shlex.join(["tiercache", "tier", "get", *what, "--wait"])
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise ArchivedShards(
            f"{url}: {len(names)} shards that this run reads ({format_bytes(n_bytes)}) are archived and must be "
            f"restored first; this command shows cost and duration, and restores them: {command}\n({shown})",
            names=names,
            url=url,
            n_bytes=n_bytes,
            command=command,
        )


def _archived(
    store: RedirectingStore, placement: Placement, keys: pa.ChunkedArray, is_here: Callable[[int], bool]
) -> tuple[PlacementRow, ...]:
    if not len(placement):
        return ()
    at = placement.row_numbers(keys)
    archived = pc.equal(placement.rows["state"], "archived").to_numpy()
    rows = [placement.row(int(at[i])) for i in np.flatnonzero(at >= 0).tolist() if archived[at[i]] and not is_here(i)]
    with ThreadPoolExecutor(min(ASKING_THREADS, max(len(rows), 1)), "tiercache-archived") as pool:
        can_read = list(pool.map(store.resolver.can_be_read, rows))
    return tuple(row for row, can in zip(rows, can_read, strict=True) if not can)


# -- one opened data set -----------------------------------------------------------------------------------------------


class TieredReader:
    """How one process reads one data set whose shards may be moved. Thread-safe, and fork-safe.

    It queries no store before a run begins, or before a shard is missing from its known location; read_placement() does
    so earlier.
    """

    def __init__(self, store: RedirectingStore) -> None:
        self._store, self._resolver = store, store.resolver
        self._recorder = UseRecorder(self._resolver)

    def read_placement(self) -> None:
        """Read the placement now, so that no later request waits for it. Raises as LocationResolver.placement_once."""
        self._resolver.placement_once()

    def opened(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """Count an opened shard. Return a local folder, other than the home, that has it; None if there is none."""
        self._recorder.note(key)
        return self.local_copy(key, identity) if self.has_moved else None

    @property
    def has_moved(self) -> bool:
        """Whether any object is away from home, as far as is known."""
        return bool(self._resolver.known_placement)

    def local_copy(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """Return a folder of this machine, other than the home, that has the shard; None if there is none."""
        return self._resolver.local_copy(key, identity.n_bytes)

    def is_remote(self, key: str) -> bool:
        """Return whether a shard of a local home is in a remote store."""
        return isinstance(self._store, RedirectingLocalStore) and self._store.is_remote(key)

    def remote_store(self) -> Store | None:
        """Return the store that reads the moved shards of a local home through the cache; None if there are none."""
        if isinstance(self._store, RedirectingLocalStore) and self._resolver.has_remote:
            return self._store.remote_store
        return None

    def prepare_reading(self, keys: pa.ChunkedArray, is_here: Callable[[int], bool], *, reads_all: bool) -> None:
        """Prepare for a run that reads these shards, and check that they can be read. See check_readable."""
        check_readable(self._store, keys, is_here)
        if self._resolver.is_tracked:
            self._recorder.begin(None if reads_all else keys.to_pylist())

    def close(self) -> None:
        self._recorder.close()
