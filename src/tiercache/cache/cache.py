"""The cache: one folder, one budget, any number of processes."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from tiercache import config
from tiercache.cache import admin, check
from tiercache.cache.breaker import Breaker
from tiercache.cache.folder import default_size_bytes
from tiercache.cache.machine import room
from tiercache.cache.notices import Notices
from tiercache.cache.opened import CacheOptions, Opened
from tiercache.cache.store import CachedStore
from tiercache.cache.warm import WarmOptions, WarmPlan, WarmProgress, WarmReport, plan_warm, warm
from tiercache.model import ShardIdentity, parse_bytes
from tiercache.stats import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.admin import Entry
    from tiercache.cache.check import CheckProgress, Report
    from tiercache.cache.lease import CopyLease
    from tiercache.cache.record import Wanted
    from tiercache.cache.warm import Ranges
    from tiercache.model import ByteRange, Following, ReadingPlan
    from tiercache.store import Span, Store

# Nothing is wanted in part.
_WHOLE: Ranges = MappingProxyType({})
_COUNTERS = (
    "hits",
    "misses",
    "prefetched",
    "evicted",
    "bytes_fetched",
    "bytes_hit",
    "evicted_early",
    "quarantined",
    "poisoned",
)


class _Unheard:
    """A plan that could not be published: the job reads on, and the cache decides without it."""

    def advance(self, clock: int) -> None:
        """Nobody hears it."""

    def close(self) -> None:
        """Nothing to withdraw."""


class Cache:
    """A folder of cached copies under one budget, shared by all processes that open it.

    It is opened at once, and again when it is used in another process or after close(). That gives everything back, and
    so does the end of the object. All methods may be called from any thread. The lock guards the opening only.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | str,
        policy: str = "plan",
        free_floor: str = "5%",
        shared: Literal["group"] | None = None,
    ) -> None:
        """Open or make the cache in a folder of its own.

        Args:
            path: the folder; it must be empty, new, or a cache already.
            size: budget in bytes, "200GB", or "80%" of the disk.
            policy: "plan", "resident", "s3fifo" or "lru".
            free_floor: what always stays free of the disk: "5%", "10GB".
            shared: "group": others of the folder's group may read what is here, and a folder that another user shares
                is read, and trusted. None: private, or as the folder's mode says (docs/guide/cache.md).

        Raises:
            ValueError: something else lies in the folder, or an argument that cannot be.
            PermissionError: the folder is another user's; the message says whose, and what to do.
            OSError: the folder cannot be made.
        """
        self._options = CacheOptions(Path(path).expanduser().absolute(), size, policy, free_floor, shared)
        self.counters = Counters(*_COUNTERS)
        self._notices = Notices()
        self._reopening = Breaker()
        self._lock = RLock()
        self._opened: Opened | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        _caches.add(self)
        self._open()

    @classmethod
    def default(cls, *, path: str | os.PathLike[str] | None = None, size: str | None = None) -> Cache:
        """The cache that the configuration names, or path and size where given; one object while anybody has it.

        Without a configured size it keeps to the one it was last opened with, at first half of what the disk has free.
        """
        settings = config.load(cache_dir=path, cache_size=size)
        folder = Path(settings.cache_dir).expanduser().absolute()
        limit: int | str | None = settings.cache_size
        policy, shared = settings.cache_policy, settings.cache_shared
        key = (str(folder), limit, policy, shared)
        with _defaults_lock:
            cache = _defaults.get(key)
            if cache is None:
                if limit is None:
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    limit = default_size_bytes(folder, room(folder).free_bytes // 2, shared=shared)
                cache = _defaults[key] = cls(folder, size=limit, policy=policy, shared=shared)
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
                if self._opened.waits_for_room:
                    self._reopening.trip()
            return self._opened

    def _while_reading(self) -> Opened | None:
        """As _open(), for the steps of a training, which no cache may end: None where it cannot be opened (again).

        That is a process that was forked, or a cache that was closed, while its disk fails or its folder is taken away.
        """
        opened = self._opened
        if opened is not None and opened.pid == os.getpid():
            if opened.waits_for_room and self._reopening.allows():
                opened.write_after_all()
            return opened
        if not self._reopening.allows():
            return None
        try:
            opened = self._open()
        except (OSError, ValueError) as error:
            self._reopening.trip()
            self._notices.warn("open", f"cache {self.path}: cannot be opened ({error}); reading past it")
            return None
        if not opened.waits_for_room:
            self._reopening.mend()
        return opened

    def _renew_locks(self) -> None:
        """In a forked child, where a thread of the parent may have held them."""
        self._lock, self._notices, self.counters = RLock(), self._notices.copied(), Counters(*_COUNTERS)
        self._reopening = Breaker()

    def expect(self, dataset_id: str, url: str) -> None:
        """Warn, once, when something of this data set has no room, though the cache could hold all of it."""
        self._notices.expect(dataset_id, url)

    # -- for CachedStore --------------------------------------------------------------------------------------------

    def open(self, wanted: Wanted, store: Store, tell: Callable[[bool], object] = bool) -> CopyLease | None:
        """A lease on a copy, there or to come; None: read past the cache. tell: told once whether it is a hit."""
        opened = self._while_reading()
        if opened is None:
            tell(False)
            return None
        return opened.open(wanted, store, tell)

    def fetch_ahead(self, wanted: Wanted, store: Store, ranges: Sequence[ByteRange] | None = None) -> None:
        """Start fetching what will be wanted of a copy; None: all of it."""
        opened = self._while_reading()
        if opened is not None:
            opened.fetch_ahead(wanted, store, ranges)

    def is_here(self, wanted: Wanted, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Whether these ranges of a copy (None: all) are there; it may be gone, or found wrong, when it is opened."""
        opened = self._while_reading()
        return opened is not None and opened.is_here(wanted, ranges)

    def publish(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> Following:
        """Let all who use the folder know when this job reads which copies; names: uint8[m, 20]. See cache/plans.py."""
        opened = self._while_reading()
        if opened is not None:
            try:
                published = opened.publish(names, plan)
                if published is not None:
                    return published
            except OSError as error:
                self._notices.warn("plan", f"cache {self.path}: a reading plan cannot be published ({error})")
        return _Unheard()

    def read(self, wanted: Wanted, spans: Sequence[Span]) -> bool:
        """Fill spans from what is there of a copy; False: it is not there, or is wrong."""
        opened = self._while_reading()
        return opened is not None and opened.read(wanted, spans)

    def distrust(self, wanted: Wanted) -> bool:
        """Check a copy against its checksum; a wrong one is put into quarantine. True: it was wrong, or is gone."""
        opened = self._while_reading()
        return opened is None or check.distrust(opened, wanted)

    def drop_objects(self, sources: Sequence[str]) -> None:
        """Evict copies of objects without identity at these URLs (redacted) and below."""
        opened = self._while_reading()
        if opened is not None:
            admin.drop_objects(opened, sources)

    # -- for people -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """bytes_used, limit_bytes, pinned_bytes, and what this process counted.

        That is hits (what was here before this process asked for it), misses, prefetched (those misses that its own
        fetch_ahead() had brought by then), bytes_hit, bytes_fetched, evicted, evicted_early (fetched again soon after),
        quarantined (found to be wrong) and poisoned (wrong at their source).
        """
        return admin.stats(self._open(), self.limit_bytes)

    @property
    def limit_bytes(self) -> int:
        """Most bytes that it may hold, as it was opened; stats() has what holds beside other processes."""
        opened = self._open()
        if opened.writing is not None:
            return opened.writing.limit_bytes
        return parse_bytes(self._options.size, whole_bytes=room(opened.folder.root).total_bytes)

    def status(self) -> dict[str, Any]:
        """stats() and what else a person may ask.

        path, policy, free_floor, shared; n_copies, n_parts, reserved_bytes, disk_free_bytes, disk_total_bytes,
        network_file_system, writable, bypassed; figures and hit_ratio of all processes since the catalog was made;
        holders (see Holder); plans: who reads, by each plan that lives; poisoned_now and reports: what is known to be
        bad at its source, and what was found to be wrong here.
        """
        return admin.status(self._open(), self.limit_bytes) | {
            "path": str(self._options.path),
            "policy": self._options.policy,
            "free_floor": self._options.free_floor,
            "shared": self._options.shared,
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
        ranges: Ranges = _WHOLE,
        on_progress: Callable[[WarmProgress], None] | None = None,
    ) -> WarmReport:
        """Fetch copies of the wanted objects of store (a cached one or its inner) that are not here, jobs at a time.

        Interrupted, it goes on where it stopped. It ends with a look at every copy. Of objects that ranges names, by
        key, only these are fetched.

        Raises:
            CacheFull: they do not fit beside what is pinned, leased, or kept by the policy. Where that is certain from
                the start nothing was fetched.
            StoreError, CorruptShard: of the source.
        """
        options = WarmOptions(jobs, on_progress, ranges)
        return warm(self._open(), self._cached(store), list(wanted), options=options)

    def plan_warm(
        self, store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]], *, ranges: Ranges = _WHOLE
    ) -> WarmPlan:
        """What warm() would fetch, in its order, and whether there is room for it. Raises StoreError of the source."""
        return plan_warm(self._open(), self._cached(store), list(wanted), ranges)

    def pin(self, store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]], *, jobs: int = 4) -> WarmReport:
        """Warm and hold: pinned copies are never evicted. Raises as warm()."""
        pairs = list(wanted)
        report = self.warm(store, pairs, jobs=jobs)
        admin.pin(self._open(), self._cached(store), pairs)
        return report

    def unpin(self, selection: admin.Selection = None) -> int:
        """Let copies go; returns how many were pinned. selection: names, a predicate on Entry, or None for all."""
        return admin.unpin(self._open(), selection)

    def evict(self, selection: admin.Selection = None, *, target_bytes: int | None = None) -> int:
        """Delete copies but those that are pinned, leased, or of unknown source; returns bytes freed.

        Args:
            selection: names, a predicate on Entry, or None for all.
            target_bytes: go on only until the cache holds no more than this, least recently used first; None: all go.
        """
        return admin.evict(self._open(), selection, target_bytes)

    def verify(
        self,
        *,
        names: Iterable[str] | None = None,
        repair: bool = False,
        store: Store | None = None,
        jobs: int = 4,
        on_progress: Callable[[CheckProgress], None] | None = None,
    ) -> Report:
        """Read every copy, and every copy in part, and compare it with what is on record of it, jobs at a time.

        Args:
            names: of the copies that are meant (see entries()); None: all.
            repair: put what is wrong into quarantine: it is fetched again when it is next used.
            store: fetch what came from this store (a cached one or its inner) again at once.
            jobs: how many copies are read at a time.
            on_progress: called in the calling thread after each copy.

        Raises:
            ValueError: a number of jobs that cannot be, or a store without repair.
        """
        if store is not None and not repair:
            raise ValueError("verify(store=...) fetches wrong copies again: it needs repair=True")
        cached = None if store is None else self._cached(store)
        chosen = None if names is None else frozenset(names)
        return check.check(self._open(), check.CheckOptions(jobs, repair, cached, chosen, on_progress))

    def _cached(self, store: Store) -> CachedStore:
        return store if isinstance(store, CachedStore) else self.store(store)


def _rebuild(options: CacheOptions) -> Cache:
    return Cache(
        options.path,
        size=options.size,
        policy=options.policy,
        free_floor=options.free_floor,
        shared=options.shared,
    )


_caches: weakref.WeakSet[Cache] = weakref.WeakSet()
_defaults: weakref.WeakValueDictionary[tuple[object, ...], Cache] = weakref.WeakValueDictionary()
_defaults_lock = RLock()


def _renew_all() -> None:
    global _defaults_lock
    _defaults_lock = RLock()
    for cache in list(_caches):
        cache._renew_locks()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)
