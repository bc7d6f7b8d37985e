"""`CacheSession`, the cache as one process has it open: it looks copies up, and runs fetches."""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from threading import Lock, Thread, current_thread

import numpy as np
import numpy.typing as npt

from tiercache.cache.accounts import Accounts, Owners
from tiercache.cache.copy_file import CopyFile, is_right_copy, open_map, open_part, open_whole, read_all
from tiercache.cache.eviction import POLICIES, Evictor, Notices
from tiercache.cache.fetch import CopyLease, Fetch
from tiercache.cache.folder import Folder, NameLock, charge_bytes, disk_space, is_disk_full, network_file_system
from tiercache.cache.names import CopySpec
from tiercache.cache.reading_plans import ReadingPlans
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ByteRange, PublishedPlan, ReadingPlan, format_bytes, parse_bytes
from tiercache.peers.readers import PeerOptions, Peers
from tiercache.stats import Counters
from tiercache.store import Span, Store
from tiercache.store.shared_files import emfile_message
from tiercache.waiting import SYSTEM_CLOCK, Clock, wait_for

N_FETCHES = 4
# Extra threads for urgent fetches. Without them, fetches that wait for another process would delay an urgent fetch for
# as long as they wait; and the first window of a shuffled epoch is a few blocks of each of many shards.
N_MORE_URGENT = 12
JOIN_S = 30.0
PROBE_AFTER_S = 30.0
REMOVE_WAIT_S = 10.0
USES_PER_FLUSH = 1024
# Copies whose fetched and unread bytes are remembered. A prefetch runs a few hundred shards ahead at most.
MOST_UNREAD = 4096


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


def cut_out(have: Sequence[ByteRange], ranges: Iterable[ByteRange]) -> tuple[list[ByteRange], int]:
    """Return the disjoint ranges `have` without the bytes of `ranges`, and the number of bytes that this removed."""
    left, n_bytes = list(have), 0
    for span in ranges:
        if not left:
            break
        kept: list[ByteRange] = []
        for one in left:
            start, end = max(one.start, span.start), min(one.end, span.end)
            if start >= end:
                kept.append(one)
                continue
            n_bytes += end - start
            kept += [ByteRange(*rest) for rest in ((one.start, start), (end, one.end)) if rest[0] < rest[1]]
        left = kept
    return left, n_bytes


@dataclass(frozen=True, slots=True)
class CacheOptions:
    path: Path
    size: int | str
    policy: str = "plan"
    min_free: int | str = "5%"
    peers: PeerOptions | None = None

    @property
    def limit_bytes(self) -> int:
        # A new folder on a full disk may not exist.
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        return parse_bytes(self.size, whole_bytes=disk_space(existing).total_bytes)

    def __post_init__(self) -> None:
        parse_bytes(self.size, whole_bytes=1)
        parse_bytes(self.min_free, whole_bytes=1)
        if self.policy not in POLICIES:
            raise ValueError(f"no policy is called {self.policy!r}; there are {', '.join(sorted(POLICIES))}")


class CacheSession:
    """An open cache in one process. Safe from any thread; the lock guards the table of fetches and their queues.

    At most one fetch per name runs at a time in this process, on a few threads that exist while there is work:
    N_FETCHES, and N_MORE_URGENT extra ones for urgent fetches.
    """

    def __init__(
        self, options: CacheOptions, counters: Counters, notices: Notices, *, keep: Callable[[], object]
    ) -> None:
        """Open the folder, sweep it, and register this process. Raises ValueError or OSError.

        keep: Returns the cache, which a running fetch keeps: the garbage collector must not close it in a fetch thread.
        """
        self.pid = os.getpid()
        # Names of copies that this process reads past the cache: they are corrupt, here or at their source.
        self._uncached: set[str] = set()
        # Partial copies that a reader found corrupt although the disk holds what the source sent.
        self._suspected: set[str] = set()
        # Ranges that were fetched for readers here, and not read since.
        self._unread: OrderedDict[str, tuple[CopySpec, list[ByteRange]]] = OrderedDict()
        self._unread_lock = Lock()
        self._lock = Lock()
        self._fetches: dict[str, Fetch] = {}
        self._urgent: deque[Fetch] = deque()  # fetches with urgent units that have no thread yet
        self._ahead: deque[Fetch] = deque()
        self._threads: set[Thread] = set()
        self._is_closed = False
        self._keep, self._notices, self.counters = keep, notices, counters
        self.breaker = Breaker()
        self.folder = Folder(options.path)
        self.limit_bytes = options.limit_bytes
        self.peers = None if options.peers is None else Peers(options.peers, self.folder.id)
        network = network_file_system(options.path)
        if network is not None:
            notices.warn(
                "network",
                f"cache {options.path}: is on {network}; a local disk is faster, and each machine needs a folder of "
                "its own (TIERCACHE_CACHE_DIR)",
            )
        self.owners = Owners(self.folder)
        self.accounts = Accounts(self.folder.catalog, self.owners)
        self.plans = ReadingPlans(self.folder, self.owners)
        self.evictor = Evictor(
            self.folder,
            self.accounts,
            self.counters,
            self.plans,
            self._notices,
            policy=options.policy,
            min_free=options.min_free,
        )
        try:
            self._sweep()
            smallest = self.accounts.register(self.limit_bytes)
            self.folder.remember_size(self.limit_bytes)
            if smallest < self.limit_bytes:
                self._notices.warn(
                    "limit",
                    f"cache {self.folder.root}: opened with size {format_bytes(self.limit_bytes)}, but another process "
                    f"has it open with {format_bytes(smallest)}; the smaller limit applies",
                )
            self.evictor.shrink()
        except BaseException:
            self._leave_folder()
            raise

    def _sweep(self) -> None:
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
        """Remove useless files beside a copy, or without one, unless the copy is being completed at this moment.

        A pin stays: it holds for the copy when that is fetched again.
        """
        lock = NameLock(self.folder.locks / name)
        if not lock.try_acquire():
            return
        try:
            is_whole = self.folder.size_of(name) is not None
            if is_whole or not (self.folder.has_file(f"{name}.part") and self.folder.has_file(f"{name}.map")):
                record = self.folder.read_record(name)
                self.folder.remove_part(name, keep_map=is_whole and record is not None and not record.has_checksums)
            if self.folder.charge_of(name) is None and not self.accounts.is_reserved(name):
                self.folder.remove_record(name)
                self.accounts.remove([name])  # a partial copy without a map was in the accounts
        finally:
            lock.release()

    def close(self) -> None:
        """Stop the fetches, withdraw the plans, write the uses, and leave the folder; in a forked child, do nothing."""
        if self.pid != os.getpid():
            return
        with self._lock:
            self._is_closed = True
            queued, running = [*self._urgent, *self._ahead], list(self._fetches.values())
            self._urgent.clear()
            self._ahead.clear()
            threads = list(self._threads)
        for fetch in running:
            fetch.cancel.set()
        for fetch in queued:
            fetch.end()
        for thread in threads:
            if thread is not current_thread():
                thread.join(JOIN_S)
        self._leave_folder()
        if self.peers is not None:
            self.peers.close()

    def _leave_folder(self) -> None:
        self.plans.close()
        for last in (self.evictor.flush_uses, self.accounts.unregister):
            with suppress(OSError):
                last()
        self.accounts.close()
        self.owners.close()

    def disk_failed(self, error: Exception) -> None:
        """Bypass the cache for some time and warn once. If the disk is merely full, the copies can still be read."""
        if self.owners.is_closed:
            return  # the cache was closed during the fetch: the disk is all right
        if is_disk_full(error):
            self.evictor.warn_full_disk()
            return
        self.breaker.trip()
        reason = emfile_message(error) or error
        self._notices.warn(
            "disk", f"cache {self.folder.root}: {reason}; bypassing the cache until the disk works again"
        )

    # -- cached copies -------------------------------------------------------------------------------------------------

    def hit(self, name: str, n_bytes: int) -> CopyLease | None:
        """Return a lease on a whole copy; None: a miss. SQLite is used only once in USES_PER_FLUSH copies."""
        if name in self._uncached:
            return None
        try:
            file = open_whole(self.folder, name, n_bytes)
        except OSError as error:
            self.disk_failed(error)
            return None
        if file is None:
            return None
        if self.breaker.is_open:
            self.breaker.reset()
        lease = CopyLease(n_bytes, file, note_read=partial(self._note_read, name))
        self._note_use(name)
        return lease

    def _note_use(self, name: str) -> None:
        try:
            if self.evictor.note_use(name) >= USES_PER_FLUSH:
                self.evictor.flush_uses()
        except OSError as error:
            self.disk_failed(error)

    def _open_part(self, spec: CopySpec) -> CopyFile | None:
        if spec.name in self._uncached:
            return None
        try:
            return open_part(self.folder, spec.name, spec.n_bytes)
        except OSError as error:
            self.disk_failed(error)
            return None

    def is_cached(self, spec: CopySpec, ranges: Sequence[ByteRange] | None = None) -> bool:
        if self.folder.size_of(spec.name) == spec.n_bytes:
            return True
        file = None if ranges is None else self._open_part(spec)
        if file is None or ranges is None:
            return False
        try:
            return file.covers(ranges)
        finally:
            file.close()

    def read(self, spec: CopySpec, spans: Sequence[Span]) -> bool:
        """Fill spans from the cached copy; return False if it is missing, or if it is corrupt (it is then removed)."""
        lease = self.hit(spec.name, spec.n_bytes)
        if lease is None and (part := self._open_part(spec)) is not None:
            lease = CopyLease(spec.n_bytes, part)
        if lease is None:
            return False
        with lease:
            if not lease.present([span for span, _ in spans]):
                return False
            if spec.has_checksums:
                return all(read_all(lease.fd, buffer, span.start) for span, buffer in spans)
            is_partial = lease.n_descriptors == 2
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
        checked = self._with_map(spec, lease)
        if checked is None:
            return True
        try:
            return checked.are_right(ranges)
        finally:
            checked.close()

    def open(self, spec: CopySpec, store: Store) -> CopyLease | None:
        """Return a lease on a copy that is cached or will be fetched; None: bypass the cache."""
        if spec.name not in self._uncached and self.breaker.allows():
            lease = self.hit(spec.name, spec.n_bytes)
            if lease is not None:
                return lease
            part = self._open_part(spec)
            if part is not None:
                self._note_use(spec.name)
            if part is not None or self._admits(spec, spec.n_bytes):
                note_read = partial(self._note_read, spec.name)
                return CopyLease(spec.n_bytes, part, start_fetch=partial(self.fetch, spec, store), note_read=note_read)
        return None

    def _note_fetched(self, spec: CopySpec, span: ByteRange) -> None:
        with self._unread_lock:
            _, have = self._unread.pop(spec.name, (spec, []))
            self._unread[spec.name] = spec, [*cut_out(have, [span])[0], span]
            if len(self._unread) > MOST_UNREAD:
                self._unread.popitem(last=False)

    def _note_read(self, name: str, n_bytes: int, ranges: Callable[[], Sequence[ByteRange]]) -> int:
        """See Lease.note_read."""
        fetched_bytes = 0
        if name in self._unread:
            read = ranges()
            with self._unread_lock:
                spec, have = self._unread.pop(name, (None, []))
                left, fetched_bytes = cut_out(have, read)
                if spec is not None and left:
                    self._unread[name] = spec, left
        fetched_bytes = min(fetched_bytes, n_bytes)
        self.counters.add("bytes_hit", n_bytes - fetched_bytes)
        self.counters.add("bytes_missed", fetched_bytes)
        return fetched_bytes

    def forget_unread(self, is_meant: Callable[[CopySpec], bool]) -> None:
        """Let later reads of these copies, which were not fetched for those reads, count as reads from the cache."""
        with self._unread_lock:
            for name in [name for name, (spec, _) in self._unread.items() if is_meant(spec)]:
                del self._unread[name]

    def publish_plan(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> PublishedPlan | None:
        try:
            return self.plans.publish(names, plan)
        except OSError as error:
            if is_disk_full(error):  # data without space is warned about
                return None
            self._notices.warn("plan", f"cache {self.folder.root}: a reading plan cannot be published ({error})")
            return None

    # -- fetches -------------------------------------------------------------------------------------------------------

    def fetch_ahead(
        self,
        spec: CopySpec,
        store: Store,
        ranges: Sequence[ByteRange] | None = None,
        *,
        urgent_ranges: Sequence[ByteRange] | None = None,
    ) -> None:
        """Start to fetch what is missing of ranges; see CachedStore.prefetch. It is not recorded as a use."""
        if spec.name in self._uncached or not self.breaker.allows():
            return
        if self.is_cached(spec, ranges if urgent_ranges is None else urgent_ranges):
            return
        ranges = [ByteRange(0, spec.n_bytes)] if ranges is None else ranges
        if self._admits(spec, sum(span.n_bytes for span in ranges)):
            is_urgent = urgent_ranges is not None
            self.fetch(spec, store, ranges if urgent_ranges is None else urgent_ranges, is_urgent).leave()

    def _admits(self, spec: CopySpec, n_bytes: int) -> bool:
        need_bytes = charge_bytes(n_bytes)
        try:
            self.owners.ensure()  # a deleted folder cannot be asked for its free space
            with self._lock:
                is_fetching = spec.name in self._fetches
            if is_fetching or not self.evictor.would_refuse(spec.name, need_bytes):
                return True
            limit_bytes = self.accounts.limit_bytes()
            if spec.identity is not None:
                self.evictor.warn_no_space(spec, need_bytes)
            elif need_bytes > limit_bytes:
                self._notices.warn(
                    "too-large",
                    f"cache {self.folder.root}: {spec.source} ({format_bytes(n_bytes)}) is larger than the whole "
                    f"cache ({format_bytes(limit_bytes)}): it is not cached and is fetched on every read, like all "
                    "larger objects; a larger cache (TIERCACHE_CACHE_SIZE, or Cache(path, size=...)) avoids that",
                )
        except FileNotFoundError:
            return False  # the folder was deleted since ensure(); the next call creates it again
        except OSError as error:
            self.disk_failed(error)
        return False

    def fetch(self, spec: CopySpec, store: Store, ranges: Sequence[ByteRange], is_urgent: bool) -> Fetch:
        """Return the fetch that brings ranges of a copy, with the caller as a user; it may have ended without them."""
        with self._lock:
            fetch = self._fetches.get(spec.name)
            if fetch is not None and fetch.request(ranges, urgent=is_urgent):
                if is_urgent and fetch in self._ahead:
                    self._ahead.remove(fetch)
                    self._urgent.append(fetch)
                    self._have_thread()
                return fetch
            if self.peers is not None and spec.has_checksums:
                store = self.peers.store_for(spec.name, spec.key, spec.n_bytes, store)
            note_fetched = partial(self._note_fetched, spec)
            fetch = Fetch(spec, store, self.evictor, self._is_crowded, self._is_first, note_fetched)
            fetch.request(ranges, urgent=is_urgent)
            if not self._is_closed:
                queue = self._urgent if is_urgent else self._ahead
                queue.append(fetch)
                if self._have_thread():
                    fetch.keeps, self._fetches[spec.name] = self._keep(), fetch
                    return fetch
                queue.remove(fetch)
        fetch.end()
        return fetch

    def _have_thread(self) -> bool:
        """Start a thread for queued work if the limits allow it; return whether there is any thread."""
        if len(self._threads) < N_FETCHES + (N_MORE_URGENT if self._urgent else 0):
            thread = Thread(target=self._work, name="tiercache-fetch", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:
                self._threads.discard(thread)
        return bool(self._threads)

    def _is_crowded(self) -> bool:
        return len(self._threads) > N_FETCHES

    def _is_first(self, fetch: Fetch) -> bool:
        """Return whether no older fetch has urgent units left."""
        with self._lock:
            older = list(takewhile(lambda one: one is not fetch, self._fetches.values()))
        return not any(one.missing_units()[1].any() for one in older)

    def _work(self) -> None:
        while True:
            with self._lock:
                # The extra threads take only urgent fetches.
                queue = self._urgent or (self._ahead if len(self._threads) <= N_FETCHES else None)
                if not queue:
                    self._threads.discard(current_thread())
                    return
                fetch = queue.popleft()
            self._run(fetch)

    def _run(self, fetch: Fetch) -> None:
        failure: BaseException | None = None
        try:
            if not self._is_over(fetch):
                return
        except BaseException as error:  # noqa: BLE001 - top of a thread: passed to all waiting leases
            # If the cache was closed during the wait, the lease bypasses the cache, as it does if its fetch had no
            # thread yet.
            is_cancelled = self._is_closed and fetch.cancel.is_set() and isinstance(error, StoreError)
            failure = None if is_cancelled else error
        try:
            fetch.end(failure)  # first: a caller that finds no fetch may rely on all its files being closed
        finally:
            with self._lock:
                if self._fetches.get(fetch.spec.name) is fetch:
                    del self._fetches[fetch.spec.name]

    def _is_over(self, fetch: Fetch) -> bool:
        try:
            is_done = fetch.run()
        except CorruptShard:
            self.counters.add("poisoned")
            self._uncached.add(fetch.spec.name)
            raise
        except StoreError:
            raise  # NotFound is also an OSError
        except OSError as error:
            self.disk_failed(error)
            return True
        self.breaker.reset()
        return is_done or not self._requeue(fetch)

    def _requeue(self, fetch: Fetch) -> bool:
        """Run a fetch that has yielded again, before the prefetches that have not begun; False: the cache is closed."""
        with self._lock:
            # Under the lock: fetch() finds it in a queue, or its units are seen to be urgent here.
            if not self._is_closed:
                if fetch.missing_units()[1].any():
                    self._urgent.append(fetch)
                else:
                    self._ahead.appendleft(fetch)
            return not self._is_closed

    # -- corrupt copies ------------------------------------------------------------------------------------------------

    def remove_if_corrupt(self, spec: CopySpec) -> bool:
        """Remove what is wrong of a copy that a reader found corrupt; return False if it is what the source sent.

        If the disk does not allow the check, the copy is removed, or at least not served by this process again.
        """
        try:
            fd = self.folder.open_copy(spec.name)
            if fd is None:
                return self._remove_partial_if_corrupt(spec)
            try:
                record = self.folder.read_record(spec.name)
                expected = spec if spec.crc32c is not None or record is None else record
                if is_right_copy(fd, expected):
                    return False
                self.remove_damage(expected, fd)
            finally:
                os.close(fd)
        except OSError:
            self._discard(spec.name)
        return True

    def remove_damage(self, spec: CopySpec, fd: int) -> bool:
        """Remove the wrong sections of the corrupt copy that fd is open on, or all of it if they are not known.

        Returns False if another process has done so. Raises OSError.

        The race: (1) two readers verify the file, (2) one removes its wrong sections, and a fetch replaces them, or all
            of it, and a correct copy takes its name, (3) the other removes the correct copy. Therefore the file is
            compared and verified again under the lock.
        """
        lock = NameLock(self.folder.locks / spec.name)
        try:
            wait_for(lock.try_acquire, REMOVE_WAIT_S)
            try:
                is_same = os.path.samestat(os.lstat(self.folder.copy_path(spec.name)), os.fstat(fd))
            except FileNotFoundError:
                is_same = False
            is_corrupt = is_same and not is_right_copy(fd, spec)
            if is_corrupt and lock.is_held:
                self.evictor.remove_damage(spec.name)
            elif is_corrupt:  # a stopped process has the lock
                self.evictor.remove(spec.name)
                self.counters.add("quarantined")
            return is_corrupt
        finally:
            lock.release()

    def _remove_partial_if_corrupt(self, spec: CopySpec) -> bool:
        """Remove a partial copy that a reader found corrupt; return True if the object can be opened again.

        If the disk holds what the source sent, the transfer may have failed, so the copy is fetched once more. If it is
        corrupt again, so is the object at its source: this process reads it past the cache.
        """
        part = self._open_part(spec)
        if part is None:
            return True
        try:
            wrong = part.wrong_units()
        finally:
            part.close()
        is_corrupt_at_source = not wrong and spec.name in self._suspected
        self._suspected.discard(spec.name)
        if self.peers is not None and not wrong:
            self.peers.report_corrupt(spec.name, spec.source)  # fetched once more, from the origin
        if is_corrupt_at_source:
            self.counters.add("poisoned")
            self._uncached.add(spec.name)
        elif not wrong:
            self._suspected.add(spec.name)
        else:
            self.counters.add("quarantined")
        with self._lock:
            fetch = self._fetches.pop(spec.name, None)
        if fetch is not None:
            fetch.abandon()
        self._discard(spec.name)
        return not is_corrupt_at_source

    def _discard(self, name: str) -> None:
        """Remove a corrupt copy. If it cannot be removed, this process never serves it again."""
        try:
            self.evictor.remove(name)
        except OSError as error:
            self._notices.warn("discard", f"cache {self.folder.root}: a corrupt copy cannot be removed: {error}")
            self._uncached.add(name)
