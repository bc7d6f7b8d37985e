"""`CacheSession`: the cache as one process has it open, and `WriteSession`, the parts that change its folder.

Hits need only the folder; evictor, fetch runner, fetch threads and accounts exist only if the folder is writable. A
forked child opens its own session.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.cache.accounts import Accounts, charge_bytes
from tiercache.cache.download import run_fetch
from tiercache.cache.eviction import POLICIES, Evictor
from tiercache.cache.fetch import CopyLease, FetchQueue
from tiercache.cache.folder import Folder, disk_space, is_disk_full, network_file_system
from tiercache.cache.locks import NameLock, Owners, boot_id
from tiercache.cache.partial import (
    CopyFile,
    bytes_of,
    open_map,
    open_part,
    open_whole,
    read_all,
    read_checksum,
)
from tiercache.cache.reading_plans import ReadingPlans
from tiercache.crash_points import crash_point
from tiercache.errors import TierCacheError
from tiercache.model import ByteRange, format_bytes, parse_bytes
from tiercache.peers.readers import PeerOptions, Peers
from tiercache.store.shared_files import emfile_message
from tiercache.waiting import SYSTEM_CLOCK, Clock, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.names import CopySpec
    from tiercache.model import PublishedPlan, ReadingPlan
    from tiercache.stats import Counters
    from tiercache.store import Span, Store


PROBE_AFTER_S = 30.0


class Breaker:
    """Decides whether the cache's disk may be used. All methods are quick and safe from any thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, probe_after_s: float = PROBE_AFTER_S) -> None:
        self._clock, self._probe_after_s = clock, probe_after_s
        self._lock = Lock()
        self._probe_at_s: float | None = None

    @property
    def is_open(self) -> bool:
        return self._probe_at_s is not None

    def allows(self) -> bool:
        """Return whether to use the disk now. While it is bypassed, one caller per probe_after_s seconds may try it."""
        if not self.is_open:
            return True
        with self._lock:
            now_s = self._clock.monotonic()
            probe_at_s = self._probe_at_s
            if probe_at_s is None:  # reset() ran between the two checks
                return True
            if now_s >= probe_at_s:
                self._probe_at_s = now_s + self._probe_after_s
            return now_s >= probe_at_s

    def trip(self) -> None:
        with self._lock:
            self._probe_at_s = self._clock.monotonic() + self._probe_after_s

    def reset(self) -> None:
        with self._lock:
            self._probe_at_s = None


class Notices:
    """Gives each kind of warning once. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._given: set[str] = set()
        self._datasets: dict[str, str] = {}

    def copied(self) -> Notices:
        """Return a copy for a forked child, in which another thread's hold on the lock would never end."""
        notices = Notices()
        notices._given, notices._datasets = set(self._given), dict(self._datasets)
        return notices

    def add_dataset(self, dataset_id: str, description: str) -> None:
        """Let the cache warn once, as kind dataset_id, when it has no space for this data set."""
        with self._lock:
            self._datasets[dataset_id] = description

    def unwarned_dataset(self, dataset_id: str) -> str | None:
        """Return the description of a data set about which no warning was given yet; None: there is none."""
        with self._lock:
            return None if dataset_id in self._given else self._datasets.get(dataset_id)

    def warn(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self._given:
                return
            self._given.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


REMOVE_WAIT_S = 10.0


class WriteSession:
    """The parts of an open cache that require a writable folder.

    Attributes:
        uncached: Names of copies that this process reads past the cache: they are corrupt, here or at their source.
    """

    def __init__(
        self,
        folder: Folder,
        options: CacheOptions,
        counters: Counters,
        notices: Notices,
        uncached: set[str],
        *,
        keep: Callable[[], object],
        peers: Peers | None = None,
    ) -> None:
        self.limit_bytes = parse_bytes(options.size, whole_bytes=disk_space(folder.root).total_bytes)
        self.folder, self.counters, self.notices, self.uncached = folder, counters, notices, uncached
        self.owners = Owners(folder, self.limit_bytes)
        self.accounts = Accounts(folder.catalog, str(self.owners.me), self.owners, boot=boot_id())
        self.plans = ReadingPlans(folder, self.owners)
        self.evictor = Evictor(
            folder, self.accounts, counters, self.plans, policy=options.policy, min_free=options.min_free
        )
        self.breaker = Breaker()
        self.fetcher = FetchQueue(partial(run_fetch, self), keep, self._source_of)
        self._peers = peers

    def _source_of(self, spec: CopySpec, store: Store) -> Store:
        """Return the store from which a copy is fetched: its peers, and behind them the store that the reader names."""
        if self._peers is None or spec.identity is None:
            return store
        return self._peers.store_for(spec.name, spec.key, spec.n_bytes, store)

    def sweep(self) -> None:
        """Remove the files of dead processes and records without copies, and make the accounts agree with the files."""
        self.owners.remove_files_of_dead()
        self.folder.sweep_temp_files()
        self.accounts.reconcile()
        sizes = self.folder.sizes()
        beside = {name for kind in (".json", ".map") for name in self.folder.names(kind)}
        doubtful = (beside - sizes.keys()) | set(self.folder.names(".part"))
        for name in doubtful:
            self._sweep_beside(name)
        if doubtful:
            self.accounts.reconcile()
        for path in self.folder.locks.iterdir():
            lock = NameLock(path)
            if lock.try_acquire():
                lock.release()

    def _sweep_beside(self, name: str) -> None:
        """Remove useless files beside a copy, or without one, unless the copy is being published at this moment.

        These are a partial copy whose copy is complete, its unit map if that is not kept, a partial copy or a unit map
        alone, and the record of a missing copy. A pin stays: it holds for the copy when that is fetched again.
        """
        lock = NameLock(self.folder.locks / name)
        if lock.try_acquire():
            try:
                is_whole = self.folder.has_copy(name)
                if is_whole or not self.folder.has_part(name):
                    record = self.folder.read_record(name)
                    self.folder.remove_part(name, keep_map=is_whole and record is not None and record.shard_id is None)
                if self.folder.charge_of(name) is None and not self.accounts.is_reserved(name):
                    self.folder.remove_record(name)
                    self.accounts.remove([name])  # a partial copy without a map was in the accounts
            finally:
                lock.release()

    def keep_to_limit(self) -> None:
        smallest = self.accounts.register(self.limit_bytes)
        self.folder.remember_size(self.limit_bytes)
        if smallest < self.limit_bytes:
            self.notices.warn(
                "limit",
                f"cache {self.folder.root}: opened with size {format_bytes(self.limit_bytes)}, but another process has "
                f"it open with {format_bytes(smallest)}; the smaller limit applies",
            )
        self.evictor.shrink()

    def close(self) -> None:
        """Stop the fetches, withdraw the plans, write the recorded uses, and remove the owner file."""
        self.fetcher.close()
        self.plans.close()
        for last in (self.evictor.flush_uses, self.accounts.unregister):
            with suppress(OSError):
                last()
        self.accounts.close()
        self.owners.close()

    # -- faults --------------------------------------------------------------------------------------------------------

    def disk_failed(self, error: Exception) -> None:
        """Bypass the cache for some time and warn once. If the disk is merely full, the copies can still be read."""
        if self.owners.is_closed:
            return  # the cache was closed during the fetch: the disk is all right
        if is_disk_full(error):
            self.disk_is_full()
            return
        self.breaker.trip()
        reason = emfile_message(error) or error
        self.notices.warn("disk", f"cache {self.folder.root}: {reason}; bypassing the cache until the disk works again")

    def disk_is_full(self) -> None:
        self.notices.warn(
            "full",
            f"cache {self.folder.root}: the disk is full; data that is not cached is fetched again in every epoch; "
            "free disk space, or put the cache on another disk (TIERCACHE_CACHE_DIR)",
        )

    def warn_no_space(self, spec: CopySpec, need_bytes: int) -> None:
        """Warn once that an object has no space although its data set, which is open, could be cached as a whole."""
        dataset_id = "" if spec.identity is None else spec.identity.dataset_id
        dataset = self.notices.unwarned_dataset(dataset_id)
        if dataset is None:
            return
        used_bytes, reserved_bytes, limit_bytes = self.accounts.sums()
        usable_bytes = max(self.evictor.usable_bytes(), 0)
        if usable_bytes < need_bytes:
            reason = f"the disk has only {format_bytes(usable_bytes)} left above the cache's min_free"
            remedy = "free disk space, lower min_free=, or put the cache on another disk (TIERCACHE_CACHE_DIR)"
        else:
            used = f"{format_bytes(used_bytes + reserved_bytes)} of {format_bytes(limit_bytes)}"
            reason = f"{used} are used by copies that are pinned, in use or needed sooner"
            remedy = (
                "unpin or evict some of them (tiercache status lists them), or make the cache larger "
                "(TIERCACHE_CACHE_SIZE, or Cache(path, size=...))"
            )
        self.notices.warn(
            dataset_id,
            f"{dataset}: cache {self.folder.root} has no space: the next object needs {format_bytes(need_bytes)}, but "
            f"{reason}. Data that does not fit is not cached and is fetched again in every epoch; {remedy}",
        )

    # -- corrupt copies ------------------------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        """Remove a corrupt copy, whole or partial. Readers keep the files that they have open."""
        self.folder.remove_copy(name)
        crash_point("corrupt.removed")
        self.accounts.remove([name])

    def remove_corrupt(self, name: str, fd: int) -> bool:
        """Remove the corrupt copy that fd is open on; return False if another process has done so. Raises OSError.

        The race with another reader of the same copy: (1) both verify the file, (2) the other one removes it and a
        correct copy takes its name, (3) this one removes the correct copy. Therefore the copy is removed only while it
        is the file that was verified.
        """
        lock = NameLock(self.folder.locks / name)
        try:
            # Without the lock the result is the same, except for a second download.
            wait_for(lock.try_acquire, REMOVE_WAIT_S)
            try:
                is_same = os.path.samestat(os.lstat(self.folder.copy_path(name)), os.fstat(fd))
            except FileNotFoundError:
                is_same = False
            if is_same:
                self.remove(name)
                self.counters.add("quarantined")
            return is_same
        finally:
            lock.release()


USES_PER_FLUSH = 1024
# Limit of remembered prefetches whose copies were not opened yet. A prefetch runs a few hundred shards ahead at most.
MOST_PREFETCHED = 65_536


@dataclass(frozen=True, slots=True)
class CacheOptions:
    path: Path
    size: int | str
    policy: str = "plan"
    min_free: int | str = "5%"
    peers: PeerOptions | None = None

    def __post_init__(self) -> None:
        parse_bytes(self.size, whole_bytes=1)
        parse_bytes(self.min_free, whole_bytes=1)
        if self.policy not in POLICIES:
            raise ValueError(f"no policy is called {self.policy!r}; there are {', '.join(sorted(POLICIES))}")


class CacheSession:
    """An open cache in one process. A forked child opens its own.

    Attributes:
        writing: The parts that change the cache; None if the folder can only be read. Then only hits are served.
        waits_for_disk_space: Whether the folder could not be opened for writing because the disk was full.
        peers: Other machines from which copies are fetched; None: all are fetched from their stores.
    """

    def __init__(
        self, options: CacheOptions, counters: Counters, notices: Notices, *, keep: Callable[[], object]
    ) -> None:
        """Open the folder, sweep it, and register this process. keep: See FetchQueue.

        Raises:
            ValueError, OSError: The folder cannot be used as a cache.
        """
        self.pid = os.getpid()
        self._uncached: set[str] = set()  # see WriteSession
        # Partial copies that a reader found corrupt although the disk holds what the source sent.
        self._suspected: set[str] = set()
        self._prefetched: dict[str, bool] = {}  # requested by prefetch() and not opened since
        self.folder = Folder(options.path)
        self.peers = None if options.peers is None else Peers(options.peers, self.folder.id)
        self.notices, self.counters = notices, counters
        self._open_to_write = partial(self._open_writing, options, keep)
        self.writing: WriteSession | None = None
        self.waits_for_disk_space = False
        self._network = network_file_system(options.path)
        if self._network is not None:
            notices.warn(
                "network",
                f"cache {options.path}: is on {self._network}; a local disk is faster, and each machine needs a folder "
                "of its own (TIERCACHE_CACHE_DIR)",
            )
        try:
            self.writing = self._open_to_write()
        except OSError as error:
            if not self.folder.copies.is_dir():
                raise
            notices.warn("read-only", f"cache {options.path}: cannot be written ({error}); no copies are added")
            self.waits_for_disk_space = is_disk_full(error)

    def retry_writing(self) -> None:
        """Try again to open the cache for writing, after the disk was full when it was opened first."""
        with suppress(OSError):
            self.writing = self._open_to_write()
            self.waits_for_disk_space = False

    def _open_writing(self, options: CacheOptions, keep: Callable[[], object]) -> WriteSession:
        writing = WriteSession(
            self.folder, options, self.counters, self.notices, self._uncached, keep=keep, peers=self.peers
        )
        try:
            if self._network is not None and (owner := writing.owners.other_machine()):
                raise ValueError(
                    f"{self.folder.root}: a process of another machine has this cache open ({owner}): each machine "
                    "needs a folder of its own (TIERCACHE_CACHE_DIR, or Cache(path, ...))"
                )
            writing.sweep()
            writing.keep_to_limit()
        except BaseException:
            writing.close()
            raise
        return writing

    def writable(self) -> WriteSession:
        """Return the parts that change the cache. Raises TierCacheError if it is read-only."""
        if self.writing is None:
            raise TierCacheError(f"cache {self.folder.root}: cannot be written", path=str(self.folder.root))
        return self.writing

    # -- cached copies -------------------------------------------------------------------------------------------------

    def hit(self, name: str, n_bytes: int) -> CopyLease | None:
        """Return a lease on a whole copy; None: a miss. SQLite is used only once in USES_PER_FLUSH copies."""
        lease = self.look_up(name, n_bytes)
        if lease is not None:
            self._note_use(name)
        return lease

    def _note_use(self, name: str) -> None:
        writing = self.writing
        if writing is None:
            return
        try:
            if writing.evictor.note_use(name) >= USES_PER_FLUSH:
                writing.evictor.flush_uses()
        except OSError as error:
            writing.disk_failed(error)

    def look_up(self, name: str, n_bytes: int) -> CopyLease | None:
        """Return a lease like hit(), without recording a use of the copy."""
        writing = self.writing
        if name in self._uncached:
            return None
        try:
            file = open_whole(self.folder, name, n_bytes)
        except OSError as error:
            self._disk_failed(error)
            return None
        if file is None:
            return None
        if writing is not None and writing.breaker.is_open:
            writing.breaker.reset()
        return CopyLease(n_bytes, file)

    def _open_part(self, spec: CopySpec) -> CopyFile | None:
        if spec.name in self._uncached:
            return None
        try:
            return open_part(self.folder, spec.name, spec.n_bytes)
        except OSError as error:
            self._disk_failed(error)
            return None

    def _disk_failed(self, error: Exception) -> None:
        if self.writing is not None:
            self.writing.disk_failed(error)

    def is_cached(self, spec: CopySpec, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Return whether these ranges of a copy (None: the whole copy) are cached, without recording a use."""
        if self.folder.size_of(spec.name) == spec.n_bytes:
            return True
        handle = None if ranges is None else self._open_part(spec)
        if handle is None or ranges is None:
            return False
        try:
            return handle.covers(ranges)
        finally:
            handle.close()

    def read(self, spec: CopySpec, spans: Sequence[Span]) -> bool:
        """Fill spans from the cached copy; return False if it is missing, or if it is corrupt (it is then removed).

        The copy of an object without identity has no checksums inside; each unit is verified against the unit map.
        """
        lease = self.hit(spec.name, spec.n_bytes)
        if lease is None and (handle := self._open_part(spec)) is not None:
            lease = CopyLease(spec.n_bytes, handle)
        if lease is None:
            return False
        with lease:
            if not lease.present([span for span, _ in spans]):
                return False
            if spec.identity is not None:
                return all(read_all(lease.fd, buffer, span.start) for span, buffer in spans)
            file = lease.file
            is_partial = file is not None and file.is_partial
            checked = self._with_map(spec, lease)
            try:
                if checked is not None and checked.read(spans):
                    return True
            finally:
                if checked is not None:
                    checked.close()
        if is_partial:
            self._remove_partial_if_corrupt(spec)
        else:
            self.remove_if_corrupt(spec)
        return False

    def _with_map(self, spec: CopySpec, lease: CopyLease) -> CopyFile | None:
        """Return another view of the file of a lease, with the checksums of its units; None: there are none."""
        file = None if lease.file is None else lease.file.dup()
        if file is None or file.is_partial:
            return file
        try:
            checked = open_map(self.folder, spec.name, file.fd, spec.n_bytes)
        except BaseException:
            file.close()
            raise
        if checked is None:
            file.close()
        return checked

    def is_right(self, spec: CopySpec, lease: CopyLease, ranges: Sequence[ByteRange]) -> bool:
        """Return whether cached ranges of a lease are what the source sent, as far as there are checksums of units."""
        checked = self._with_map(spec, lease)
        if checked is None:
            return True
        try:
            return checked.are_right(ranges)
        finally:
            checked.close()

    # -- fetches -------------------------------------------------------------------------------------------------------

    def open(self, spec: CopySpec, store: Store, on_lookup: Callable[[bool], object] = bool) -> CopyLease | None:
        """Return a lease on a copy that is cached or will be fetched; None: bypass the cache.

        on_lookup is called once, with True for a hit. A partial copy counts as a hit or a miss when its reader asks for
        the first ranges.
        """
        writing = self.writing
        if spec.name not in self._uncached and (writing is None or writing.breaker.allows()):
            lease = self.hit(spec.name, spec.n_bytes)
            if lease is not None:
                self._count(spec, on_lookup, spec.n_bytes)
                return lease
            handle = self._open_part(spec)
            join = None if writing is None else partial(writing.fetcher.join, spec, store)
            if handle is not None:
                self._note_use(spec.name)
                count = partial(self._count_partial, spec, on_lookup, handle)
                return CopyLease(spec.n_bytes, handle, join=join, on_lookup=count)
            if writing is not None and self._admits(writing, spec):
                self._count(spec, on_lookup, 0)
                return CopyLease(spec.n_bytes, join=join)
        self._count(spec, on_lookup, 0)
        return None

    def _count_partial(
        self, spec: CopySpec, on_lookup: Callable[[bool], object], handle: CopyFile, is_present: bool
    ) -> None:
        self._count(spec, on_lookup, bytes_of(handle.mask(), spec.n_bytes) if is_present else 0)

    def _count(self, spec: CopySpec, on_lookup: Callable[[bool], object], hit_bytes: int) -> None:
        """Count a hit of hit_bytes, or a miss if that is 0. An empty copy is a hit if its file exists.

        A copy that this process prefetched for this opening came from the store: it counts as a miss that took no time.
        """
        is_present, is_ours = hit_bytes > 0 or spec.n_bytes == 0, self._prefetched.pop(spec.name, False)
        is_hit = is_present and not is_ours
        if is_present and is_ours:
            self.counters.add("prefetched")
        if is_hit:
            self.counters.add("hits")
            self.counters.add("bytes_hit", hit_bytes)
        else:
            self.counters.add("misses")
        on_lookup(is_hit)

    def prefetch(
        self,
        spec: CopySpec,
        store: Store,
        ranges: Sequence[ByteRange] | None = None,
        *,
        urgent_ranges: Sequence[ByteRange] | None = None,
    ) -> None:
        """Start to fetch what is missing of ranges (None: of the whole copy). It is not recorded as a use.

        urgent_ranges: See CachedStore.prefetch.
        """
        writing = self.writing
        if writing is None or spec.name in self._uncached or not writing.breaker.allows():
            return
        if self.is_cached(spec, ranges if urgent_ranges is None else urgent_ranges):
            return
        ranges = [ByteRange(0, spec.n_bytes)] if ranges is None else list(ranges)
        if self._admits(writing, spec, sum(span.n_bytes for span in ranges)):
            if len(self._prefetched) >= MOST_PREFETCHED:
                self._prefetched.clear()
            self._prefetched[spec.name] = True
            writing.fetcher.prefetch(
                spec, store, ranges if urgent_ranges is None else urgent_ranges, urgent=urgent_ranges is not None
            )

    def _admits(self, writing: WriteSession, spec: CopySpec, need_bytes: int | None = None) -> bool:
        """Return whether a fetch may find space; None stands for the whole copy. Warn once if there is none."""
        need_bytes = spec.n_bytes if need_bytes is None else need_bytes
        try:
            writing.owners.ensure()  # a deleted folder cannot be asked for its free space
            if writing.fetcher.is_fetching(spec.name):
                return True
            if not writing.evictor.would_refuse(spec.name, charge_bytes(need_bytes)):
                return True
            limit_bytes = writing.accounts.limit_bytes()
            if spec.identity is not None:
                writing.warn_no_space(spec, charge_bytes(need_bytes))
            elif charge_bytes(need_bytes) > limit_bytes:
                self.notices.warn(
                    "too-large",
                    f"cache {self.folder.root}: {spec.source} ({format_bytes(need_bytes)}) is larger than the whole "
                    f"cache ({format_bytes(limit_bytes)}): it is not cached and is fetched on every read, like all "
                    "larger objects; a larger cache (TIERCACHE_CACHE_SIZE, or Cache(path, size=...)) avoids that",
                )
        except FileNotFoundError:
            return False  # the folder was deleted since ensure(); the next call creates it again
        except OSError as error:
            writing.disk_failed(error)
        return False

    def publish(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> PublishedPlan | None:
        """Publish a reading plan to all users of the folder; return None if the folder cannot be written."""
        try:
            return None if self.writing is None else self.writing.plans.publish(names, plan)
        except OSError as error:
            self.notices.warn("plan", f"cache {self.folder.root}: a reading plan cannot be published ({error})")
            return None

    # -- corrupt copies ------------------------------------------------------------------------------------------------

    def discard(self, name: str) -> None:
        """Remove a corrupt copy. If it cannot be removed, this process never serves it again."""
        try:
            if self.writing is not None:
                self.writing.remove(name)
                return
        except OSError as error:
            self.notices.warn("discard", f"cache {self.folder.root}: a corrupt copy cannot be removed: {error}")
        self._uncached.add(name)

    def remove_if_corrupt(self, spec: CopySpec) -> bool:
        """Check a copy that a reader found corrupt, and remove it if it is; return False if it is what the source sent.

        If the disk does not allow the check, the copy is removed too, or at least not served by this process again.
        """
        try:
            fd = self.folder.open_copy(spec.name)
            if fd is None:
                return self._remove_partial_if_corrupt(spec)
            try:
                record = self.folder.read_record(spec.name)
                expected = spec.crc32c if spec.crc32c is not None or record is None else record.crc32c
                crc, offset, _ = read_checksum(fd, spec.n_bytes)
                if offset == spec.n_bytes == os.fstat(fd).st_size and crc == expected:
                    return False
                self.remove_corrupt(spec.name, fd)
            finally:
                os.close(fd)
        except OSError:
            self.discard(spec.name)
        return True

    def remove_corrupt(self, name: str, fd: int) -> bool:
        """Remove the corrupt copy that fd is open on; return False if it is gone, or the folder is read-only.

        In a read-only folder, this process does not serve the copy any more.
        """
        if self.writing is None:
            self.discard(name)
            return False
        return self.writing.remove_corrupt(name, fd)

    def _remove_partial_if_corrupt(self, spec: CopySpec) -> bool:
        """Remove a partial copy that a reader found corrupt; return True if the object can be opened again.

        A partial copy has no checksum of the whole. If the disk holds what the source sent, the transfer may have
        failed, so the copy is fetched once more. If the reader finds it corrupt again, the object is corrupt at its
        source: the result is False, and this process reads the object past the cache.
        """
        handle = self._open_part(spec)
        if handle is None:
            return True
        try:
            wrong = handle.wrong_units()
        finally:
            handle.close()
        is_corrupt_at_source = not wrong and spec.name in self._suspected
        self._suspected.discard(spec.name)
        if self.peers is not None and not wrong:
            self.peers.distrust(spec.name)  # fetched once more, from the origin
        if is_corrupt_at_source:
            self.counters.add("poisoned")
            self._uncached.add(spec.name)
        elif not wrong:
            self._suspected.add(spec.name)
        else:
            self.counters.add("quarantined")
        if self.writing is not None:
            self.writing.fetcher.abandon(spec.name)
        self.discard(spec.name)
        return not is_corrupt_at_source

    def close(self) -> None:
        """Close the parts that write, and the connections to peers. In a forked child they are the parent's."""
        if self.pid == os.getpid():
            if self.writing is not None:
                self.writing.close()
            if self.peers is not None:
                self.peers.close()
