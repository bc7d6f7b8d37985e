"""The cache: one folder, one budget, any number of processes."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from tiercache import config
from tiercache.cache import admin
from tiercache.cache.folder import default_size_bytes
from tiercache.cache.machine import room
from tiercache.cache.notices import Notices
from tiercache.cache.opened import CacheOptions, Opened
from tiercache.cache.store import CachedStore
from tiercache.cache.warm import WarmProgress, WarmReport, warm
from tiercache.model import ShardIdentity, parse_bytes
from tiercache.stats import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tiercache.cache.admin import Entry
    from tiercache.cache.lease import CopyLease
    from tiercache.cache.record import Wanted
    from tiercache.store import Store

_COUNTERS = ("hits", "misses", "evicted", "bytes_fetched")


class Cache:
    """A folder of cached copies under one budget, shared by all processes that open it.

    It is opened at once, and again when it is used in another process or after close(). That gives everything back, and
    so does the end of the object. All methods may be called from any thread. The lock guards the opening only.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, size: int | str, policy: str = "plan", free_floor: str = "5%"
    ) -> None:
        """Open or make the cache in a folder of its own.

        Args:
            path: the folder; it must be empty, new, or a cache already.
            size: budget in bytes, "200GB", or "80%" of the disk.
            policy: "plan", "resident" or "lru".
            free_floor: what always stays free of the disk: "5%", "10GB".

        Raises:
            ValueError: something else lies in the folder, or an argument that cannot be.
            OSError: the folder cannot be made.
        """
        self._options = CacheOptions(Path(path).expanduser().absolute(), size, policy, free_floor)
        self.counters = Counters(*_COUNTERS)
        self._notices = Notices()
        self._lock = RLock()
        self._opened: Opened | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        _caches.add(self)
        self._open()

    @classmethod
    def default(cls, *, path: str | os.PathLike[str] | None = None, size: str | None = None) -> Cache:
        """The cache that the configuration names, or path and size where given; one object while anybody has it.

        Without a configured size it may use half of what the disk had free when it was made.
        """
        settings = config.load(cache_dir=path, cache_size=size)
        folder = Path(settings.cache_dir).expanduser().absolute()
        limit: int | str
        if settings.cache_size is None:
            folder.mkdir(parents=True, exist_ok=True)
            limit = default_size_bytes(folder, room(folder).free_bytes // 2)
        else:
            limit = settings.cache_size
        with _defaults_lock:
            cache = _defaults.get((str(folder), limit))
            if cache is None:
                cache = _defaults[str(folder), limit] = cls(folder, size=limit)
        return cache

    def __repr__(self) -> str:
        options = self._options
        return f"Cache({str(options.path)!r}, size={options.size!r}, policy={options.policy!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._options,)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._options.path

    def store(self, inner: Store) -> CachedStore:
        """inner, read through this cache."""
        return CachedStore(self, inner)

    def close(self) -> None:
        """Stop fetches and give files back. Leases stay valid. The cache may be used again: it opens itself."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._opened, self._finalizer = None, None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> Opened:
        opened = self._opened
        if opened is not None and opened.pid == os.getpid():
            return opened
        with self._lock:
            if self._opened is None or self._opened.pid != os.getpid():
                if self._finalizer is not None:
                    self._finalizer.detach()  # the parent's
                self._opened = Opened(self._options, self.counters, self._notices, keep=weakref.ref(self))
                self._finalizer = weakref.finalize(self, self._opened.close)
            return self._opened

    def _renew_locks(self) -> None:
        """In a forked child, where a thread of the parent may have held them."""
        self._lock, self._notices, self.counters = RLock(), Notices(), Counters(*_COUNTERS)

    # -- for CachedStore --------------------------------------------------------------------------------------------

    def open(self, wanted: Wanted, store: Store) -> CopyLease | None:
        """A lease on a copy, there or to come; None: read past the cache."""
        return self._open().open(wanted, store)

    def fetch_ahead(self, wanted: Wanted, store: Store) -> None:
        """Start fetching a copy that will be wanted."""
        self._open().fetch_ahead(wanted, store)

    def has_copy(self, wanted: Wanted) -> bool:
        """Whether a copy is there; it may be gone, or found to be wrong, when it is opened."""
        return self._open().folder.has_copy(wanted.name)

    def peek(self, wanted: Wanted) -> CopyLease | None:
        """A lease on a copy that is there."""
        return self._open().hit(wanted.name, wanted.n_bytes)

    def distrust(self, wanted: Wanted) -> bool:
        """Check a copy against its checksum; a wrong one is removed. True: it was wrong, or is gone."""
        return admin.distrust(self._open(), wanted)

    def drop_objects(self, sources: Sequence[str]) -> None:
        """Evict copies of objects without identity."""
        admin.drop_objects(self._open(), sources)

    # -- for people -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """bytes_used, limit_bytes, pinned_bytes, and hits, misses, evicted, bytes_fetched of this process."""
        return admin.stats(self._open(), self.limit_bytes)

    @property
    def limit_bytes(self) -> int:
        """Most bytes that it may hold, as it was opened; stats() has what holds beside other processes."""
        opened = self._open()
        if opened.writing is not None:
            return opened.writing.limit_bytes
        return parse_bytes(self._options.size, whole_bytes=room(opened.folder.root).total_bytes)

    def status(self) -> dict[str, Any]:
        """stats() and what else a person may ask: path, policy, copies, reserved bytes, free disk, what is wrong."""
        return admin.status(self._open(), self.limit_bytes) | {
            "path": str(self._options.path),
            "policy": self._options.policy,
            "free_floor": self._options.free_floor,
        }

    def entries(self) -> list[Entry]:
        """All copies, least recently used first."""
        return admin.entries(self._open())

    def warm(
        self,
        store: Store,
        wanted: Iterable[tuple[str, ShardIdentity | None]],
        *,
        jobs: int = 4,
        on_progress: Callable[[WarmProgress], None] | None = None,
    ) -> WarmReport:
        """Fetch copies of the wanted objects of store (a cached one or its inner) that are not here, jobs at a time.

        Interrupted, it goes on where it stopped. It ends with a look at every copy.

        Raises:
            CacheFull: they do not fit beside what is pinned, leased, or kept by the policy. Where that is certain from
                the start nothing was fetched.
            StoreError, CorruptShard: of the source.
        """
        return warm(self._open(), self._cached(store), list(wanted), jobs=jobs, on_progress=on_progress)

    def pin(self, store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]], *, jobs: int = 4) -> WarmReport:
        """Warm and hold: pinned copies are never evicted. Raises as warm()."""
        pairs = list(wanted)
        report = self.warm(store, pairs, jobs=jobs)
        admin.pin(self._open(), self._cached(store), pairs)
        return report

    def unpin(self, selection: admin.Selection = None) -> int:
        """Let copies go; returns how many were pinned. selection: names, a predicate on Entry, or None for all."""
        return admin.unpin(self._open(), selection)

    def evict(self, selection: admin.Selection = None) -> int:
        """Delete copies but those that are pinned, leased, or of unknown source; returns bytes freed.

        selection: names, a predicate on Entry, or None for all.
        """
        return admin.evict(self._open(), selection)

    def _cached(self, store: Store) -> CachedStore:
        return store if isinstance(store, CachedStore) else self.store(store)


def _rebuild(options: CacheOptions) -> Cache:
    return Cache(options.path, size=options.size, policy=options.policy, free_floor=options.free_floor)


_caches: weakref.WeakSet[Cache] = weakref.WeakSet()
_defaults: weakref.WeakValueDictionary[tuple[str, int | str], Cache] = weakref.WeakValueDictionary()
_defaults_lock = RLock()


def _renew_all() -> None:
    global _defaults_lock
    _defaults_lock = RLock()
    for cache in list(_caches):
        cache._renew_locks()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)
