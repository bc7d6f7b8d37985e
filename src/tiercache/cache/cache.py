"""`Cache`, the public class of the local cache, and `CachedStore`, a store that reads another store through it.

The cache is one folder with one size limit, shared by any number of processes.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock, RLock
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from tiercache import config
from tiercache.cache.accounts import FIGURES
from tiercache.cache.eviction import Notices
from tiercache.cache.fetch import CopyLease
from tiercache.cache.folder import default_size_bytes, disk_space, is_disk_full
from tiercache.cache.many_copies import (
    CopyCheck,
    MissingCopies,
    Ranges,
    VerifyReport,
    WarmProgress,
    WarmReport,
    find_missing,
    verify_copies,
    warm_copies,
)
from tiercache.cache.names import CopySpec, copy_spec
from tiercache.cache.session import Breaker, CacheOptions, CacheSession
from tiercache.errors import StoreError
from tiercache.model import OWN_FOLDER, ByteRange, PublishedPlan, ReadingPlan, ShardIdentity
from tiercache.peers.readers import PeerOptions
from tiercache.stats import Counters
from tiercache.store import Lease, Span, Store, redact, uses
from tiercache.store.contract import WrapperStore
from tiercache.store.remote import is_cancelled

T = TypeVar("T")

MOST_SPECS = 4096


class CachedStore(WrapperStore):
    """A Store and a LocalStore around another Store. Reads use the cache; all other methods call the inner store.

    `counters` are those of the inner store. The lock guards the table of opened keys.
    """

    def __init__(self, cache: Cache, inner: Store) -> None:
        super().__init__(inner)
        self.cache = cache
        self._session = cache._session_or_none  # noqa: SLF001 - of one file
        self._inner_url = redact(inner.url).rstrip("/")
        self._lock = Lock()
        self._specs: OrderedDict[str, CopySpec] = OrderedDict()

    def __repr__(self) -> str:
        return f"CachedStore({self.cache!r}, {self.inner!r})"

    def __reduce__(self) -> tuple[type[CachedStore], tuple[Cache, Store]]:
        return CachedStore, (self.cache, self.inner)

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """Return a lease on a copy, cached or still to be fetched; None: not admitted, read the object by ranges."""
        if identity is None:
            self._note_use(key)
        spec = self.spec_of(key, identity)
        return None if spec is None else self.open_copy(spec)

    def open_copy(self, spec: CopySpec) -> CopyLease | None:
        """Return a lease as open_local() does."""
        session = self._session()
        return None if session is None else session.open(spec, self.inner)

    def _note_use(self, key: str) -> None:
        """Count a read of an object that no manifest describes: a `Dataset` counts those of its shards itself."""
        if not key.startswith(OWN_FOLDER) and f"/{OWN_FOLDER}" not in key:
            uses.record_use(f"{self._inner_url}/{key}")

    def prefetch(
        self,
        key: str,
        identity: ShardIdentity,
        ranges: Sequence[ByteRange] | None = None,
        *,
        urgent_ranges: Sequence[ByteRange] | None = None,
    ) -> None:
        """Start to prefetch ranges (None: all) of an object that a reader will open soon, if there is space for them.

        urgent_ranges: Ranges to fetch now, before everything else that is prefetched; `ranges` then only decides
            whether
            there is space.
        """
        spec, session = self.spec_of(key, identity), self._session()
        if spec is not None and session is not None:
            session.fetch_ahead(spec, self.inner, ranges, urgent_ranges=urgent_ranges)

    def is_cached(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Return whether these byte ranges (None: all) are cached now. They may be evicted, or corrupt, later."""
        spec, session = self.spec_of(key, identity), self._session()
        return spec is not None and session is not None and session.is_cached(spec, ranges)

    def forget_unread(self, dataset_id: str) -> None:
        """Let reads by a new reader of this data set count as from the cache, if the bytes were fetched before."""
        session = self._session()
        if session is not None:
            session.forget_unread(lambda spec: spec.identity is not None and spec.identity.dataset_id == dataset_id)

    def publish_plan(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> PublishedPlan:
        """Publish the reading plan of this job, which advances and closes it, to all users of the cache's folder.

        names: Names of the copies, uint8[m, 20], in the order of plan.shards.
        """
        session = self._session()
        published = None if session is None else session.publish_plan(names, plan)
        return published or _UnpublishedPlan()

    def spec_of(self, key: str, identity: ShardIdentity | None = None) -> CopySpec | None:
        """Return copy_spec() of an object of the inner store, which is remembered for reads by key."""
        if identity is not None:
            spec = self._specs.get(key)  # without computing the name, a hit takes a third less time
            if spec is not None and spec.identity == identity:
                return spec
        spec = copy_spec(self.inner, key, identity)
        if spec is None:
            return None
        with self._lock:
            self._specs[key] = spec
            if len(self._specs) > MOST_SPECS:
                self._specs.popitem(last=False)
        return spec

    def remove_if_corrupt(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """Remove what is wrong of a copy that a reader found corrupt; return False if it is what the source sent."""
        spec, session = self.spec_of(key, identity), self._session()
        return spec is not None and (session is None or session.remove_if_corrupt(spec))

    def read_into(
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        """See Store.read_into. The spans come from the cached copy of an object that was opened under key, if possible.

        The copy must have the ETag in if_match, or the object an identity and if_match is None.
        """
        with self._lock:
            spec = self._specs.get(key)
        if spec is None or spec.identity is None:
            self._note_use(key)
        if spec is not None:
            is_same = spec.identity is not None if if_match is None else spec.etag == if_match
            if is_same and self.read_copy(spec, spans):
                return
        self.inner.read_into(key, spans, if_match=if_match, cancel=cancel)

    def read_copy(self, spec: CopySpec, spans: Sequence[Span]) -> bool:
        """Fill spans from a cached copy; return False if it is missing or corrupt: the buffers are then undefined."""
        session = self._session()
        return session is not None and session.read(spec, spans)

    def is_right(self, key: str, lease: Lease, ranges: Sequence[ByteRange]) -> bool:
        """Return whether cached ranges are what the source sent, or have no checksums; for readers that map the file.

        key: Key of an object without identity, under which open_local() returned the lease.
        """
        with self._lock:
            spec = self._specs.get(key)
        session = self._session()
        if spec is None or session is None or not isinstance(lease, CopyLease):
            return True
        return session.is_right(spec, lease, ranges)

    def store_for(self, key: str, identity: ShardIdentity, store: Store) -> Store:
        """Return the store from which ranges are read past the cache: the peers, and behind them `store`."""
        session = self._session() if self.cache._options.peers is not None else None  # noqa: SLF001 - of one file
        spec = None if session is None or session.peers is None else self.spec_of(key, identity)
        if spec is None or session is None or session.peers is None:
            return store
        return session.peers.store_for(spec.name, key, spec.n_bytes, store)

    def report_corrupt(self, key: str, identity: ShardIdentity) -> bool:
        """Say that ranges read past the cache are corrupt; False: they did not come from peers."""
        spec, session = self.spec_of(key, identity), self._session()
        if spec is None or session is None or session.peers is None:
            return False
        return session.peers.report_corrupt(spec.name, spec.source)

    def around(self, method: str, key: str, call: Callable[[], T]) -> T:
        """Count reads as uses."""
        if method in ("get", "read_tail"):
            self._note_use(key)
        return call()


class _UnpublishedPlan:
    """A reading plan that could not be published. The job continues, and the cache evicts without the plan."""

    def advance(self, clock: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached copy, whole or partial.

    Attributes:
        name: Name of the copy, a hash.
        source: URL without credentials, "" if unknown.
        n_bytes: Bytes that the copy takes of the size limit.
        pinned: Whether the copy is pinned.
        last_use: Sequence number of the last use, not a time.
        dataset_id, shard_id: Identifiers; None for an object of no data set.
        in_part: Whether the copy is partial.
    """

    name: str
    source: str
    n_bytes: int
    pinned: bool
    last_use: int
    dataset_id: str | None = None
    shard_id: str | None = None
    in_part: bool = False


Selection: TypeAlias = Iterable[str] | Callable[[Entry], bool] | None
_WHOLE: Ranges = MappingProxyType({})


class Cache:
    """A folder of cached copies with a size limit, shared by all processes that open it.

    The constructor opens the cache. A forked child process, or a use after close(), opens it again. All methods may be
    called from any thread; the lock guards only the opening.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | str,
        policy: str = "plan",
        min_free: int | str = "5%",
        peers: str | Sequence[str] | None = None,
        peers_token: str | None = None,
        peers_ca: str | os.PathLike[str] | None = None,
    ) -> None:
        """Open the cache in a folder of its own; create it if it does not exist.

        Args:
            path: Folder of the cache. It must be new, empty, or already a cache.
            size: Size limit: a number of bytes, a text such as "200GB", or a share of the disk such as "80%".
            policy: Eviction policy: "plan" (evicts what the running jobs read last) or "lru".
            min_free: Disk space that the cache always leaves free, such as "10GB" or a share of the disk.
            peers: Machines that run `tiercache serve` (docs/guide/peers.md): a list of addresses, or a text:
                "dns:NAME:PORT" or "slurm". Shards that one of them has, or fetches, are read from it. None:
                every shard is read from its store.
            peers_token: Token that these machines demand. None: none.
            peers_ca: File of certificates (PEM) that are trusted for them; they are then reached by TLS. None: plain
                HTTP.

        Raises:
            ValueError: The folder contains other files, or an argument is invalid.
            PermissionError: The folder belongs to another user; the message names the user and says what to do.
            OSError: The folder cannot be created or written. If the disk is full, reads bypass the cache for a while.
        """
        ca_file = None if peers_ca is None else str(Path(peers_ca).expanduser().absolute())
        machines = PeerOptions.parse(peers, peers_token, ca_file)
        self.__setstate__(CacheOptions(Path(path).expanduser().absolute(), size, policy, min_free, machines))

    def __getstate__(self) -> CacheOptions:
        return self._options

    def __setstate__(self, options: CacheOptions) -> None:
        self._options = options
        self.counters = Counters(*FIGURES)
        self._notices = Notices()
        self._reopening = Breaker()
        self._lock = RLock()
        self._opened: CacheSession | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        _caches.add(self)
        try:
            self._open()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._bypass(error)

    @classmethod
    def default(
        cls,
        *,
        path: str | os.PathLike[str] | None = None,
        size: str | None = None,
        peers: Literal[False] | None = None,
    ) -> Cache:
        """Return the cache that the configuration names; the same object for as long as anyone refers to it.

        If no size is configured, the cache keeps the size with which it was last opened. The first time, that is half
        of the free space of the disk.

        Args:
            path: Folder that replaces the configured one; None uses the configured folder.
            size: Size limit that replaces the configured one, as for the class; None uses the configured limit.
            peers: False reads nothing from peers; None uses the configured peers.
        """
        settings = config.read_settings(cache_dir=path, cache_size=size)
        folder = Path(settings.cache_dir).expanduser().absolute()
        limit: int | str | None = settings.cache_size
        policy = settings.cache_policy
        machines: dict[str, Any] = {}
        if peers is None:
            machines = {"peers": settings.peers, "peers_token": settings.peers_token, "peers_ca": settings.peers_ca}
        key = (str(folder), limit, policy, *machines.values())
        with _defaults_lock:
            cache = _defaults.get(key)
            if cache is None:
                if limit is None:
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    limit = default_size_bytes(folder, disk_space(folder).free_bytes // 2)
                cache = _defaults[key] = cls(folder, size=limit, policy=policy, **machines)
        return cache

    def __repr__(self) -> str:
        options = self._options
        return f"Cache({str(options.path)!r}, size={options.size!r}, policy={options.policy!r})"

    @property
    def path(self) -> Path:
        """Folder of the cache, as an absolute path."""
        return self._options.path

    @property
    def folder_id(self) -> str:
        """Random id of the folder, by which a server recognises the readers of its own machine; "" if unknown."""
        return self._open().folder.id

    def store(self, inner: Store) -> CachedStore:
        """Return a store that reads `inner` through this cache.

        Args:
            inner: Store that holds the data. Closing the returned store closes it.
        """
        return CachedStore(self, inner)

    def close(self) -> None:
        """Stop all fetches and close all files. Leases stay valid; a later call of any method opens the cache again."""
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
            return self._opened

    def _session_or_none(self) -> CacheSession | None:
        """Return the open cache, or None if it cannot be opened now: a cache must never stop a training.

        Raises:
            StoreError: The cache is closed, and what this thread does is not needed any more: it must not open the
                cache
                again behind the back of the caller that has closed it.
        """
        opened = self._opened
        if opened is not None and opened.pid == os.getpid():
            return opened
        if is_cancelled():
            raise StoreError("cancelled: the cache was closed", url=str(self.path), retryable=True)
        if not self._reopening.allows():
            return None
        try:
            opened = self._open()
        except (OSError, ValueError) as error:
            self._bypass(error)
            return None
        self._reopening.reset()
        return opened

    def _bypass(self, error: Exception) -> None:
        self._reopening.trip()
        self._notices.warn("open", f"cache {self.path}: cannot be opened ({error}); bypassing the cache")

    def _renew_locks(self) -> None:
        """Replace the locks in a forked child: a thread of the parent may have held them during the fork."""
        self._lock, self._notices, self.counters = RLock(), self._notices.copied(), Counters(*FIGURES)
        self._reopening = Breaker()

    def warn_if_too_small(self, dataset_id: str, description: str) -> None:
        """Let the cache warn once if it has no space for an object of this data set, which would fit as a whole.

        Args:
            dataset_id: Identifier of the data set.
            description: Name of the data set and its size.
        """
        self._notices.add_dataset(dataset_id, description)

    # -- for users and the command line --------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Return the space that the folder uses, and the counters of this process.

        The keys are bytes_used, limit_bytes and pinned_bytes, and the counters: bytes_hit (read from copies that were
        cached before this process asked for the bytes), bytes_missed (read after they were fetched for the reader, or
        past the cache), bytes_fetched, evicted, quarantined (corrupt copies, which were removed) and poisoned (objects
        that are corrupt at their source). With peers also peer_requests, peer_bytes (received from them),
        peer_failures, peer_corrupt (copies of which a peer sent corrupt bytes) and peer_not_served (requests for data
        sets that a peer does not serve).
        """
        opened = self._open()
        with suppress(OSError):  # the folder was deleted; a folder that cannot be recreated holds nothing
            opened.owners.ensure()
        used_bytes, _, limit_bytes = opened.accounts.sums()
        sizes = opened.folder.sizes()
        pinned_bytes = sum(sizes[name] for name in opened.folder.names(".pin") if name in sizes)
        counts = self.counters.snapshot() | ({} if opened.peers is None else opened.peers.counters.snapshot())
        facts = {"bytes_used": used_bytes, "limit_bytes": limit_bytes, "pinned_bytes": pinned_bytes}
        return facts | {name: int(n) for name, n in counts.items()}

    @property
    def limit_bytes(self) -> int:
        """Size limit in bytes of this object; stats() has that of all processes."""
        return self._options.limit_bytes

    def status(self) -> dict[str, Any]:
        """Return stats() of this process, and further details for the command line and for monitoring.

        Of the folder, which all processes share: n_copies, n_parts (partial copies), reserved_bytes, disk_free_bytes,
        disk_total_bytes; figures (the counters, summed over all processes since the catalog was created) and their
        hit_ratio; holders (pid and command of each process that has the cache open); plans (label of each live reading
        plan). Of this
        process: path, policy, min_free and bypassed (the disk fails, and reads bypass the cache).
        """
        opened = self._open()
        facts: dict[str, Any] = {**self.stats()}  # first, because it recreates a deleted folder
        folder = opened.folder
        disk, n_copies = disk_space(folder.root), len(folder.names(""))
        opened.evictor.flush_uses()
        figures = opened.accounts.figures()
        read_bytes = figures["bytes_hit"] + figures["bytes_missed"]
        return facts | {
            "n_copies": n_copies,
            "n_parts": len(folder.sizes()) - n_copies,
            "reserved_bytes": opened.accounts.sums()[1],
            "disk_free_bytes": disk.free_bytes,
            "disk_total_bytes": disk.total_bytes,
            "bypassed": opened.breaker.is_open,
            "holders": [{"pid": pid, "command": command} for pid, command in opened.owners.processes()],
            "plans": opened.plans.labels(),
            "figures": figures,
            "hit_ratio": figures["bytes_hit"] / read_bytes if read_bytes else None,
            "path": str(self._options.path),
            "policy": self._options.policy,
            "min_free": self._options.min_free,
        }

    def entries(self) -> list[Entry]:
        """Return all copies, least recently used first."""
        opened = self._open()
        folder = opened.folder
        opened.evictor.flush_uses()
        whole, in_part = frozenset(folder.names("")), frozenset(folder.names(".part"))
        entries = []
        for row in opened.accounts.rows():
            if row.name not in whole and row.name not in in_part:
                continue
            spec = folder.read_record(row.name)
            identity = None if spec is None else spec.identity
            entries.append(
                Entry(
                    row.name,
                    "" if spec is None else spec.source,
                    row.charge_bytes,
                    folder.is_pinned(row.name),
                    row.last_use,
                    None if identity is None else identity.dataset_id,
                    None if identity is None else identity.shard_id,
                    row.name not in whole,
                )
            )
        return entries

    def _selected(self, selection: Selection) -> list[Entry]:
        entries = self.entries()
        if selection is None:
            return entries
        if callable(selection):
            return [entry for entry in entries if selection(entry)]
        names = set(selection)
        return [entry for entry in entries if entry.name in names]

    def warm(
        self,
        store: Store,
        wanted: Iterable[tuple[str, ShardIdentity | None]],
        *,
        jobs: int = 4,
        ranges: Ranges = _WHOLE,
        on_progress: Callable[[WarmProgress], None] | None = None,
    ) -> WarmReport:
        """Fetch the copies of the given objects that are not cached yet. A repeated call continues.

        Args:
            store: Store of the objects: a cached store, or the store inside it.
            wanted: Pairs of key and identity of each object; the identity is None for an object of no data set.
            jobs: Number of fetches that run at the same time.
            ranges: Byte ranges that suffice, by key. An object without an entry is fetched whole.
            on_progress: Callback that the calling thread calls at the start, twice a second, and after each copy.

        Returns:
            The numbers of copies and bytes that were fetched.

        Raises:
            StoreError: The copies do not fit beside those that are pinned, leased or kept by the policy. If they are
                larger than the whole cache, nothing is fetched.
            StoreError, CorruptShard: The store failed, or an object is corrupt at its source.
        """
        opened = self._open()
        opened.accounts.reconcile()
        missing = find_missing(opened, _copy_specs(store, wanted), ranges)
        inner = store.inner if isinstance(store, CachedStore) else store
        return warm_copies(opened, inner, missing, jobs=jobs, on_progress=on_progress)

    def find_missing(
        self, store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]], *, ranges: Ranges = _WHOLE
    ) -> MissingCopies:
        """Return what warm() would fetch, in that order, and whether it fits the cache.

        Args:
            store: Store of the objects: a cached store, or the store inside it.
            wanted: Pairs of key and identity of each object; the identity is None for an object of no data set.
            ranges: Byte ranges that suffice, by key. An object without an entry is fetched whole.
        """
        return find_missing(self._open(), _copy_specs(store, wanted), ranges)

    def pin(self, store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]], *, jobs: int = 4) -> WarmReport:
        """Fetch copies as warm() does, with its errors, and pin them: a pinned copy is never evicted.

        Args:
            store: Store of the objects: a cached store, or the store inside it.
            wanted: Pairs of key and identity of each object; the identity is None for an object of no data set.
            jobs: Number of fetches that run at the same time.
        """
        pairs = list(wanted)
        report = self.warm(store, pairs, jobs=jobs)
        opened = self._open()
        for spec in _copy_specs(store, pairs):
            # The reader's lock settles the race with an evictor: the evictor sees the pin, or it took the copy before
            # this lock.
            lease = opened.hit(spec.name, spec.n_bytes)
            if lease is None:
                raise StoreError("evicted before it could be pinned", url=f"{store.url}/{spec.key}", retryable=True)
            with lease:
                opened.folder.pin(spec.name)
        return report

    def unpin(self, selection: Selection = None) -> int:
        """Unpin copies and return how many were pinned.

        Args:
            selection: Names of copies, a predicate on Entry, or None for all copies.
        """
        opened = self._open()
        n_unpinned = sum(opened.folder.unpin(entry.name) for entry in self._selected(selection) if entry.pinned)
        if selection is None:
            for name in opened.folder.names(".pin"):  # of corrupt copies that are not fetched again yet
                opened.folder.unpin(name)
        return n_unpinned

    def evict(self, selection: Selection = None, *, target_bytes: int | None = None) -> int:
        """Delete copies, except those that are pinned, leased or of unknown source; return the number of bytes freed.

        Args:
            selection: Names of copies, a predicate on Entry, or None for all copies.
            target_bytes: Size in bytes of the whole cache at which eviction stops, least recently used copies first;
                None deletes all selected copies.
        """
        opened, names = self._open(), {entry.name for entry in self._selected(selection)}
        charges = {row.name: row.charge_bytes for row in opened.accounts.rows() if row.name in names}
        need_bytes = math.inf if target_bytes is None else opened.accounts.sums()[0] - target_bytes
        return opened.evictor.evict(charges, need_bytes=need_bytes) if need_bytes > 0 else 0

    def verify(
        self,
        *,
        names: Iterable[str] | None = None,
        repair: bool = False,
        jobs: int = 4,
        on_progress: Callable[[CopyCheck], None] | None = None,
    ) -> VerifyReport:
        """Read every copy, whole or partial, and compare it with its recorded checksums.

        Args:
            names: Names of the copies to verify (see entries()); None verifies all copies.
            repair: Whether to remove the wrong sections of corrupt copies, or all of a copy that is partial or has no
                right section. They are fetched again by warm(), or when the copy is next used.
            jobs: Number of copies that are read at the same time.
            on_progress: Callback that the calling thread calls after each copy.

        Raises:
            ValueError: jobs is less than 1.
        """
        if jobs < 1:
            raise ValueError(f"jobs must be 1 or more, got {jobs}")
        opened = self._open()
        existing = opened.folder.sizes().keys()
        chosen = sorted(existing if names is None else existing & frozenset(names))
        return verify_copies(opened, chosen, jobs=jobs, repair=repair, on_progress=on_progress)


def _copy_specs(store: Store, wanted: Iterable[tuple[str, ShardIdentity | None]]) -> list[CopySpec]:
    specs, spec_of = [], store.spec_of if isinstance(store, CachedStore) else partial(copy_spec, store)
    for key, identity in wanted:
        spec = spec_of(key, identity)
        if spec is None:
            raise StoreError("cannot be cached: it has no ETag, version or date", url=f"{store.url}/{key}")
        specs.append(spec)
    return specs


_caches: weakref.WeakSet[Cache] = weakref.WeakSet()
_defaults: weakref.WeakValueDictionary[tuple[object, ...], Cache] = weakref.WeakValueDictionary()
_defaults_lock = RLock()


def _renew_all() -> None:
    global _defaults_lock
    _defaults_lock = RLock()
    for cache in list(_caches):
        cache._renew_locks()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)
