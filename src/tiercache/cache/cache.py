"""`Cache`, the public class of the local cache, and `CachedStore`, a store that reads another store through it.

The cache is one folder with one size limit, shared by any number of processes.

`DatasetSource` is the URL of a data set and the cache through which it is read.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, RLock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from tiercache import config
from tiercache.cache import admin, check
from tiercache.cache.admin import WarmOptions, WarmPlan, WarmProgress, WarmReport, plan_warm, warm
from tiercache.cache.folder import default_size_bytes
from tiercache.cache.machine import Breaker, Notices, room
from tiercache.cache.names import CopySpec, name_of_identity, name_of_object
from tiercache.cache.session import CacheOptions, CacheSession
from tiercache.catalog import tiers
from tiercache.deprecation import renamed_argument
from tiercache.model import OWN_FOLDER, ShardIdentity, format_bytes, parse_bytes
from tiercache.stats import Counters
from tiercache.store import Buffer, Lease, LocalStore, MemoryStore, Span, Store, Upload, check_key, open_store, redact
from tiercache.store.contract import WrapperStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from numpy.typing import NDArray

    from tiercache.cache.admin import Entry, Ranges
    from tiercache.cache.check import CheckProgress, VerifyReport
    from tiercache.cache.lease import CopyLease
    from tiercache.model import ByteRange, ObjectInfo, PublishedPlan, ReadingPlan
    from tiercache.shard.conversion import Casts


N_KNOWN = 4096


class CachedStore(WrapperStore):
    """A Store and a LocalStore around another Store. Reads use the cache; all other methods call the inner store.

    `counters` are those of the inner store; cache_hits and cache_misses of this store are added to them. All methods
    may be called from any thread; the lock guards the table of opened keys.

    Args:
        cache: Cache through which objects are read.
        inner: Store that holds the objects. close() closes it.
    """

    def __init__(self, cache: Cache, inner: Store) -> None:
        super().__init__(inner)
        self.cache = cache
        self._session = cache._while_reading  # noqa: SLF001 - of one file
        self._source = redact(inner.url).rstrip("/")
        self._lock = Lock()
        self._known: OrderedDict[str, CopySpec] = OrderedDict()

    def __repr__(self) -> str:
        return f"CachedStore({self.cache!r}, {self.inner!r})"

    def __reduce__(self) -> tuple[type[CachedStore], tuple[Cache, Store]]:
        return CachedStore, (self.cache, self.inner)

    # -- a LocalStore -----------------------------------------------------------------------------------------------

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """Return a lease on a copy, cached or still to be fetched; None: not admitted, read the object by ranges.

        Args:
            key: Key of the object.
            identity: Identity of a shard or segment; None for another object, whose attributes are then requested from
                the inner store.
        """
        if identity is None:
            self._note_use(key)
        wanted = self.wanted(key, identity)
        if wanted is None:
            return None
        return self.open_copy(wanted, self._tell)

    def open_copy(self, wanted: CopySpec, tell: Callable[[bool], object] = bool) -> CopyLease | None:
        """Return a lease on a copy, cached or still to be fetched; None: read the object from the inner store.

        Args:
            wanted: Copy to open; see wanted().
            tell: Callback that is called once, with True for a cache hit.
        """
        session = self._session()
        if session is None:
            tell(False)
            return None
        return session.open(wanted, self.inner, tell)

    def _note_use(self, key: str) -> None:
        """Count a read of an object that no manifest describes.

        A `Dataset` counts the reads of its shards itself. Reads of versions, segments and
        placements are not counted as uses of data.
        """
        if not key.startswith(OWN_FOLDER) and f"/{OWN_FOLDER}" not in key:
            tiers.record_use(f"{self._source}/{key}")

    def _tell(self, is_hit: bool) -> None:
        self.counters.add("cache_hits" if is_hit else "cache_misses")

    def fetch_ahead(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None = None) -> None:
        """Start to prefetch an object that a reader will open soon, and return at once.

        Args:
            key: Key of the object.
            identity: Identity of the object.
            ranges: Byte ranges of the object to fetch; None fetches the whole object.
        """
        wanted, session = self.wanted(key, identity), self._session()
        if wanted is not None and session is not None:
            session.fetch_ahead(wanted, self.inner, ranges)

    def is_cached(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Return whether these byte ranges of the object are cached now.

        A later open may still find that the copy was evicted, or that it is corrupt.

        Args:
            key: Key of the object.
            identity: Identity of the object.
            ranges: Byte ranges of the object; None stands for the whole object.
        """
        wanted, session = self.wanted(key, identity), self._session()
        return wanted is not None and session is not None and session.is_cached(wanted, ranges)

    def publish(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> PublishedPlan:
        """Publish the reading plan of this job to all processes that use the cache's folder.

        Args:
            names: Names of the copies (names.name_of_identity, as bytes), uint8[m, 20], in the order of plan.shards.
            plan: When the job reads each shard.

        Returns:
            The published plan, which the job advances and closes.
        """
        session = self._session()
        return _Unheard() if session is None else session.publish(names, plan) or _Unheard()

    def wanted(self, key: str, identity: ShardIdentity | None = None) -> CopySpec | None:
        """Return the specification of the copy of an object; None: nothing identifies the version of the object.

        Args:
            key: Key of the object.
            identity: Identity of a shard or segment; without it, the inner store is asked for the object's attributes.

        Raises:
            NotFound: The inner store has no such object.
        """
        if identity is not None:
            known = self._known.get(key)  # without computing the name, a hit takes a third less time
            if known is not None and known.identity == identity:
                return known
        check_key(key)
        source = f"{redact(self.url)}/{key}"
        if identity is not None:
            name = name_of_identity(identity)
            wanted = CopySpec(name, key, source, identity.n_bytes, identity.crc32c, identity)
        else:
            info = self.inner.head(key)
            object_name = name_of_object(source, info)
            if object_name is None:
                return None
            wanted = CopySpec(object_name, key, source, info.n_bytes, info.crc32c, etag=info.etag)
        with self._lock:
            self._known[key] = wanted
            if len(self._known) > N_KNOWN:
                self._known.popitem(last=False)
        return wanted

    def verify_copy(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """Verify the cached copy after a reader found it corrupt.

        Args:
            key: Key of the object.
            identity: Identity of a shard or segment; None for another object.

        Returns:
            True: The copy was corrupt and is removed; the caller opens the object again. False: The copy is what the
                source sent.
        """
        wanted, session = self.wanted(key, identity), self._session()
        return wanted is not None and (session is None or session.verify_copy(wanted))

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
        """See Store.read_into. The spans come from the cached copy of an object that was opened under key, if possible.

        The copy is used only if it has the ETag in if_match, or if the object has an identity and if_match is None.
        """
        with self._lock:
            wanted = self._known.get(key)
        guarded = wanted is not None and (if_match is not None and wanted.etag == if_match)
        is_ours = wanted is not None and (guarded or (if_match is None and wanted.identity is not None))
        if wanted is None or wanted.identity is None:
            self._note_use(key)
        if wanted is not None and is_ours and self.read_copy(wanted, spans):
            return
        self.inner.read_into(key, spans, if_match=if_match, deadline_s=deadline_s, cancel=cancel)

    def read_copy(self, wanted: CopySpec, spans: Sequence[Span]) -> bool:
        """Fill spans from a cached copy; return False if the copy is missing or corrupt.

        Args:
            wanted: Copy to read.
            spans: Byte ranges and their buffers. The buffers are undefined if the result is False.
        """
        session = self._session()
        return session is not None and session.read(wanted, spans)

    def get(self, key: str) -> bytes:
        """See Store.get. The inner store answers."""
        self._note_use(key)
        return self.inner.get(key)

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See Store.read_tail. The inner store answers."""
        self._note_use(key)
        return self.inner.read_tail(key, n_bytes)

    # -- writing ----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """See Store.put. The copy of the former object is evicted."""
        try:
            return self.inner.put(key, data)
        finally:
            self._drop([key])

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """See Store.put_if_absent. The copy of the former object is evicted."""
        try:
            return self.inner.put_if_absent(key, data)
        finally:
            self._drop([key])

    def create(self, key: str) -> Upload:
        """See Store.create.

        The copy of the former object is evicted at once; the new object has another ETag and name.
        """
        self._drop([key])
        return self.inner.create(key)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store.delete. The copies are evicted."""
        gone = list(keys)
        try:
            self.inner.delete(gone)
        finally:
            self._drop(gone)

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """See Store.copy. The copy of the former object at dst is evicted."""
        try:
            return self.inner.copy(src, dst)
        finally:
            self._drop([dst])

    def _drop(self, keys: list[str]) -> None:
        # A copy with an identity stays: its manifest defines its contents, whatever happens to the object under this
        # key.
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
        drop_objects(self.cache, [f"{redact(self.url)}/{key}" for key in keys])


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
    """A reading plan that could not be published. The job continues, and the cache evicts without the plan."""

    def advance(self, clock: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Cache:
    """A folder of cached copies with a size limit, shared by all processes that open it.

    The constructor opens the cache. A forked child process, or a use after close(), opens it again. close() and the end
    of the object release all files. All methods may be called from any thread; the lock guards only the opening.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | str,
        policy: str = "plan",
        min_free: int | str | None = None,
        shared: Literal["group"] | None = None,
        free_floor: int | str | None = None,
    ) -> None:
        """Open the cache in a folder of its own; create it if it does not exist.

        Args:
            path: Folder of the cache. It must be new, empty, or already a cache.
            size: Size limit: a number of bytes, a text such as "200GB", or a share of the disk such as "80%".
            policy: Eviction policy: "plan", "resident", "s3fifo" or "lru".
            min_free: Disk space that the cache always leaves free, such as "10GB" or a share of the disk. None: "5%".
            shared: "group" lets the members of the folder's group read the copies, and reads a folder that another user
                shares, whose contents are then trusted. None keeps the folder private, or as the mode of the folder
                says (docs/guide/cache.md).
            free_floor: Former name of min_free; deprecated.

        Raises:
            ValueError: The folder contains other files, or an argument is invalid.
            PermissionError: The folder belongs to another user; the message names the user and says what to do.
            OSError: The folder cannot be created.
        """
        given = renamed_argument("Cache", "free_floor", free_floor, "min_free", min_free)
        min_free = "5%" if given is None else cast("int | str", given)
        self._options = CacheOptions(Path(path).expanduser().absolute(), size, policy, min_free, shared)
        self.counters = Counters(*_COUNTERS)
        self._notices = Notices()
        self._reopening = Breaker()
        self._lock = RLock()
        self._opened: CacheSession | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        _caches.add(self)
        self._open()

    @classmethod
    def default(cls, *, path: str | os.PathLike[str] | None = None, size: str | None = None) -> Cache:
        """Return the cache that the configuration names; the same object for as long as anyone refers to it.

        If no size is configured, the cache keeps the size with which it was last opened. The first time, that is half
        of the free space of the disk.

        Args:
            path: Folder that replaces the configured one; None uses the configured folder.
            size: Size limit that replaces the configured one, as for the class; None uses the configured limit.
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
        """Folder of the cache, as an absolute path."""
        return self._options.path

    def store(self, inner: Store) -> CachedStore:
        """Return a store that reads `inner` through this cache.

        Args:
            inner: Store that holds the data. Closing the returned store closes it.
        """
        return CachedStore(self, inner)

    def close(self) -> None:
        """Stop all fetches and close all files.

        Existing leases stay valid; a later call of any method opens the cache again.
        """
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._opened, self._finalizer = None, None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> CacheSession:
        opened = self._opened
        if opened is not None and opened.pid == os.getpid():
            return opened
        with self._lock:
            if self._opened is None or self._opened.pid != os.getpid():
                if self._finalizer is not None:
                    self._finalizer.detach()  # belongs to the parent process
                self._opened = CacheSession(self._options, self.counters, self._notices, keep=weakref.ref(self))
                self._finalizer = weakref.finalize(self, self._opened.close)
                if self._opened.waits_for_disk_space:
                    self._reopening.trip()
            return self._opened

    def _while_reading(self) -> CacheSession | None:
        """Return the open cache, or None if it cannot be opened now: a cache must never stop a training.

        Opening fails in a forked process, or after close(), while the disk fails or the folder is missing.
        """
        opened = self._opened
        if opened is not None and opened.pid == os.getpid():
            if opened.waits_for_disk_space and self._reopening.allows():
                opened.retry_writing()
            return opened
        if not self._reopening.allows():
            return None
        try:
            opened = self._open()
        except (OSError, ValueError) as error:
            self._reopening.trip()
            self._notices.warn("open", f"cache {self.path}: cannot be opened ({error}); bypassing the cache")
            return None
        if not opened.waits_for_disk_space:
            self._reopening.mend()
        return opened

    def _renew_locks(self) -> None:
        """Replace the locks in a forked child: a thread of the parent may have held them during the fork."""
        self._lock, self._notices, self.counters = RLock(), self._notices.copied(), Counters(*_COUNTERS)
        self._reopening = Breaker()

    def expect(self, dataset_id: str, url: str) -> None:
        """Let the cache warn once if it has no space for an object of this data set, which would fit as a whole.

        Args:
            dataset_id: Identifier of the data set.
            url: Description of the data set for the warning.
        """
        self._notices.expect(dataset_id, url)

    # -- for users and the command line --------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Return the space that is used and the counters of this process.

        The keys are bytes_used, limit_bytes and pinned_bytes, and the counters: hits (the copy was cached before this
        process asked for it), misses, prefetched (misses for which this process had already fetched the data with
        fetch_ahead()), bytes_hit, bytes_fetched, evicted, evicted_early (evicted, and fetched again soon after),
        quarantined (corrupt copies, which were removed) and poisoned (objects that are corrupt at their source).
        """
        return admin.stats(self._open(), self.limit_bytes)

    @property
    def limit_bytes(self) -> int:
        """Size limit in bytes with which this object was opened.

        stats() returns the limit that holds for all processes.
        """
        opened = self._open()
        if opened.writing is not None:
            return opened.writing.limit_bytes
        return parse_bytes(self._options.size, whole_bytes=room(opened.folder.root).total_bytes)

    def status(self) -> dict[str, Any]:
        """Return stats() and further details for the command line and for monitoring.

        The further keys are path, policy, min_free, shared; n_copies, n_parts (partial copies), reserved_bytes,
        disk_free_bytes, disk_total_bytes, network_file_system, writable, bypassed (the disk fails, and reads bypass the
        cache); figures and hit_ratio (of all processes since the catalog was created); holders (see Holder); plans
        (label of each live reading plan) and poisoned_now (objects known to be corrupt at their source).
        """
        return admin.status(self._open(), self.limit_bytes) | {
            "path": str(self._options.path),
            "policy": self._options.policy,
            "min_free": self._options.min_free,
            "shared": self._options.shared,
        }

    def entries(self) -> list[Entry]:
        """Return all copies, least recently used first."""
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
        """Fetch the copies of the given objects that are not cached yet.

        A call that was interrupted can be repeated and continues. At the end, the call checks that every copy is still
        there.

        Args:
            store: Store of the objects: a cached store, or the store inside it.
            wanted: Pairs of key and identity of each object; the identity is None for an object of no data set.
            jobs: Number of fetches that run at the same time.
            ranges: Byte ranges that suffice, by key. An object without an entry is fetched whole.
            on_progress: Callback that the calling thread calls at the start and after each copy.

        Returns:
            The numbers of copies and bytes that were fetched.

        Raises:
            CacheFull: The copies do not fit beside those that are pinned, leased or kept by the policy. If that is
                certain at the start, nothing is fetched.
            StoreError, CorruptShard: The store failed, or an object is corrupt at its source.
        """
        options = WarmOptions(jobs, on_progress, ranges)
        return warm(self._open(), self._cached(store), list(wanted), options=options)

    def plan_warm(
        self, store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]], *, ranges: Ranges = _WHOLE
    ) -> WarmPlan:
        """Return what warm() would fetch, in that order, and whether the space suffices.

        The arguments are those of warm().

        Raises:
            StoreError: The store failed.
        """
        return plan_warm(self._open(), self._cached(store), list(wanted), ranges)

    def pin(self, store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]], *, jobs: int = 4) -> WarmReport:
        """Fetch copies as warm() does, and pin them: a pinned copy is never evicted.

        Args:
            store: Store of the objects: a cached store, or the store inside it.
            wanted: Pairs of key and identity, as for warm().
            jobs: Number of fetches that run at the same time.

        Raises:
            CacheFull, StoreError, CorruptShard: See Cache.warm.
        """
        pairs = list(wanted)
        report = self.warm(store, pairs, jobs=jobs)
        admin.pin(self._open(), self._cached(store), pairs)
        return report

    def unpin(self, selection: admin.Selection = None) -> int:
        """Unpin copies and return how many were pinned.

        Args:
            selection: Names of copies, a predicate on Entry, or None for all copies.
        """
        return admin.unpin(self._open(), selection)

    def evict(self, selection: admin.Selection = None, *, target_bytes: int | None = None) -> int:
        """Delete copies, except those that are pinned, leased or of unknown source; return the number of bytes freed.

        Args:
            selection: Names of copies, a predicate on Entry, or None for all copies.
            target_bytes: Size in bytes of the whole cache at which eviction stops, least recently used copies first;
                None deletes all selected copies.
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
    ) -> VerifyReport:
        """Read every copy, whole or partial, and compare it with its recorded checksums.

        Args:
            names: Names of the copies to verify (see entries()); None verifies all copies.
            repair: Whether to remove corrupt copies. They are fetched again when they are next used.
            store: Store from which the removed copies are fetched again at once (a cached store, or the store
                inside it). It requires repair=True.
            jobs: Number of copies that are read at the same time.
            on_progress: Callback that the calling thread calls after each copy.

        Raises:
            ValueError: jobs is less than 1, or store is given without repair=True.
        """
        if store is not None and not repair:
            raise ValueError("verify(store=...) fetches corrupt copies again, which requires repair=True")
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
        min_free=options.min_free,
        shared=options.shared,
    )


def drop_objects(cache: Cache, sources: Sequence[str]) -> None:
    """Evict the copies of objects without identity at some URLs and below them.

    Args:
        cache: Cache that has the copies.
        sources: URLs without credentials.
    """
    session = cache._while_reading()  # noqa: SLF001 - of one file
    if session is not None:
        admin.drop_objects(session, sources)


_caches: weakref.WeakSet[Cache] = weakref.WeakSet()
_defaults: weakref.WeakValueDictionary[tuple[object, ...], Cache] = weakref.WeakValueDictionary()
_defaults_lock = RLock()


def _renew_all() -> None:
    global _defaults_lock
    _defaults_lock = RLock()
    for cache in list(_caches):
        cache._renew_locks()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)


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
