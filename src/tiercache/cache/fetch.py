"""`CopyLease`, a reader's lease on a copy; `Fetch`, the requested units of one copy; and `FetchQueue`, its threads."""

from __future__ import annotations

import copy
import os
import sys
import weakref
from collections import deque
from contextlib import suppress
from threading import Condition, Event, Lock, Thread, current_thread
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.locks import try_shared
from tiercache.cache.partial import Mask, covers, mask_of, n_units
from tiercache.errors import CorruptShard, StoreError, TierCacheError
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    from tiercache.cache.names import CopySpec
    from tiercache.cache.partial import CopyFile
    from tiercache.store import Span, Store


N_FETCHES = 4
# Extra threads for urgent fetches. Without them, fetches that wait for another process would delay an urgent fetch for
# as long as they wait; and the first window of a shuffled epoch is a few blocks of each of many shards.
N_MORE_URGENT = 12
DEADLINE_S = 3600.0  # deadline of a wait without its own deadline, so that no wait is endless
JOIN_S = 30.0


class Fetch:
    """The fetch of one copy. The condition guards all state; no data is read or written while it is held.

    Leases request units while the fetch runs, and each waiting lease wakes as soon as its own units are present. Urgent
    units, those of the next batches, come first: a fetch without urgent units gives up its thread while the urgent
    fetches need more than the usual threads, and continues later. The fetch ends when no requested unit is missing; a
    later request needs a new fetch.

    A lease that joins is a user until it has a descriptor of its own, or leaves. Until the last user has gone, the
    fetch keeps a descriptor under a reader's lock, so that no evictor can remove the copy in between.

    Attributes:
        cancel: Event that stops the download.
        step: What the fetch does at the moment, for error messages.
        protected: Names of copies that must not be evicted for this fetch.
    """

    def __init__(self, spec: CopySpec, store: Store, queue: FetchQueue, keep: Callable[[], object]) -> None:
        self.spec, self.store = spec, store
        self.cancel = Event()
        self.step = "waiting for a free thread"
        self.protected: Set[str] = frozenset()
        self._queue, self._keep = queue, keep
        self._cache_reference: object = None
        self._changed = Condition()
        self._started = self._done = self._closed = self._is_queued = False
        self._n_users = 0
        self._handle: CopyFile | None = None
        self._error: BaseException | None = None
        self._requested, self._urgent, self._refused, self._present = np.zeros((4, n_units(spec.n_bytes)), bool)

    # -- for leases -------------------------------------------------------------------------------------------------

    def join(self) -> bool:
        """Become a user of this fetch; return False if the fetch has ended."""
        with self._changed:
            if not self._closed:
                self._n_users += 1
            return not self._closed

    def request(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> bool:
        """Request ranges, with priority if urgent; return False if the fetch has ended: the caller needs another."""
        mask = mask_of(ranges, self.spec.n_bytes)
        with self._changed:
            if self._closed:
                return False
            self._requested |= mask
            if urgent:
                self._urgent |= mask
            is_new = not self._started
            if is_new:
                self._started, self._cache_reference = True, self._keep()
                self._is_queued = True
        if is_new:
            self._queue.start(self, urgent=urgent)
        elif urgent:
            self._queue.prioritize(self)
        return True

    def try_start(self) -> bool:
        """Return whether the caller must run this fetch, because nobody has started it."""
        with self._changed:
            started, self._started = self._started, True
            return not started

    def wait(self, ranges: Sequence[ByteRange], deadline_s: float | None) -> None:
        """Wait until the ranges are present or cannot come; if they complete the copy, until it has its final name.

        Raises:
            StoreError: The deadline (None: DEADLINE_S) passed.
            TierCacheError: The error with which the fetch ended, unless the ranges came before.
        """
        mask = mask_of(ranges, self.spec.n_bytes)

        def is_settled() -> bool:
            if self._done or bool((self._refused & mask).any()):
                return True
            return self._covers(ranges) and not self._present.all()

        limit_s = DEADLINE_S if deadline_s is None else deadline_s
        with self._changed:
            if not self._changed.wait_for(is_settled, limit_s):
                raise StoreError(
                    f"not in the cache after {limit_s:g} s: {self.step}", url=self.spec.source, retryable=True
                )
            error = None if self._covers(ranges) and self._handle is not None else self._error
        if isinstance(error, TierCacheError):
            raise copy.copy(error) from error  # a copy for each waiting thread: a traceback belongs to one thread
        if error is not None:
            raise StoreError(f"caching it failed: {error!r}", url=self.spec.source) from error

    def _covers(self, ranges: Sequence[ByteRange]) -> bool:
        return covers(self._present, ranges, self.spec.n_bytes)

    def claim(self) -> tuple[CopyFile | None, bool]:
        """Return (a handle on the file, whether the caller is no user any more).

        The handle is None as long as nothing has come, and if nothing will come. All handles that a fetch returns share
        one lock, which lasts until the last of them is closed.
        """
        with self._changed:
            handle = None if self._handle is None else self._handle.dup()
            has_left = handle is not None or self._done
            if has_left:
                self._leave()
        return handle, has_left

    def leave(self) -> None:
        with self._changed:
            self._leave()

    def _leave(self) -> None:
        self._n_users -= 1
        self._drop_unused()

    @property
    def is_unused(self) -> bool:
        return not self._started and not self._n_users

    # -- for the thread that runs it -----------------------------------------------------------------------------------

    def set_file(self, handle: CopyFile, present: Mask) -> None:
        """Give this file to the leases and set the units that are present. The fetch takes ownership of the handle."""
        handle.keep_private()
        with self._changed:
            before, self._handle = self._handle, handle
            self._present = present.copy()
            self._changed.notify_all()
        if before is not None:
            before.close()

    def add_present(self, present: Mask) -> None:
        """Add units that are present by now, and wake the leases that wait for them."""
        with self._changed:
            self._present |= present
            self._changed.notify_all()

    def reset(self) -> None:
        """Mark all units as missing, so that they are fetched again. Leases keep the handles that they have."""
        with self._changed:
            handle, self._handle = self._handle, None
            self._present[:] = False
        if handle is not None:
            handle.close()

    def missing_units(self) -> tuple[Mask, Mask]:
        """Return the requested units that are neither present nor refused, and the urgent ones among them."""
        with self._changed:
            units = self._missing()
            return units, units & self._urgent

    def refused_units(self) -> Mask:
        with self._changed:
            return self._refused.copy()

    def should_yield(self) -> bool:
        """Return whether the fetch should give up its thread: nothing urgent is missing of it, but of other fetches."""
        return self._is_queued and self._queue.is_crowded and not self.missing_units()[1].any()

    def _missing(self) -> Mask:
        units: Mask = self._requested & ~self._present & ~self._refused
        return units

    def refuse(self, units: Mask) -> None:
        """Mark units that will not come because there is no space for them, and wake the leases that wait for them."""
        with self._changed:
            self._refused |= units
            self._changed.notify_all()

    def close_if_done(self) -> bool:
        """Close the fetch if no requested unit is missing; after that, no lease can request more."""
        with self._changed:
            is_done = not self._missing().any()
            self._closed = self._closed or is_done
            return is_done

    def abandon(self) -> None:
        with self._changed:
            self._closed = True

    def end(self, error: BaseException | None = None) -> None:
        """End the fetch, with an error if it failed, and wake all waiting leases."""
        with self._changed:
            self._done = self._closed = True
            self._error = error
            reference, self._cache_reference = self._cache_reference, None
            self._drop_unused()
            self._changed.notify_all()
        del reference  # possibly the last reference to the cache, whose finalizer must not run under the lock

    def _drop_unused(self) -> None:
        if self._done and not self._n_users and self._handle is not None:
            handle, self._handle = self._handle, None
            handle.close()


class FetchQueue:
    """Runs at most one fetch per name at a time in this process, on a few threads that exist while there is work.

    There are at most N_FETCHES threads, and N_MORE_URGENT extra ones for urgent fetches. The lock guards the table and
    the queues.

    The argument run carries out one fetch, or raises; it returns False if the fetch has yielded and must be run again
    (see Fetch.should_yield). The argument keep returns the cache: a running fetch keeps this reference, so that the
    garbage collector cannot close the cache in one of the fetch threads. The argument choose_store returns the
    store from which a fetch reads.
    """

    def __init__(
        self,
        run: Callable[[Fetch], bool],
        keep: Callable[[], object],
        choose_store: Callable[[CopySpec, Store], Store],
    ) -> None:
        self._run, self._keep, self._choose_store = run, keep, choose_store
        self._lock = Lock()
        self._table: dict[str, Fetch] = {}
        self._urgent: deque[Fetch] = deque()  # fetches with urgent units
        self._ahead: deque[Fetch] = deque()
        self._threads: set[Thread] = set()
        self._closed = False

    def join(self, spec: CopySpec, store: Store) -> Fetch:
        """Return the running fetch of a copy, or a new one, with the caller as a user."""
        with self._lock:
            fetch = self._table.get(spec.name)
            if fetch is not None and fetch.join():
                return fetch
            for name in [n for n, f in self._table.items() if f.is_unused]:
                del self._table[name]
            fetch = self._table[spec.name] = Fetch(spec, self._choose_store(spec, store), self, self._keep)
            fetch.join()
            return fetch

    def prefetch(self, spec: CopySpec, store: Store, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:
        """Request ranges of a copy for which nobody waits yet."""
        is_requested = False
        while not is_requested:  # the fetch may end between join() and request()
            fetch = self.join(spec, store)
            is_requested = fetch.request(ranges, urgent=urgent)
            fetch.leave()

    def is_fetching(self, name: str) -> bool:
        with self._lock:
            return name in self._table

    def abandon(self, name: str) -> None:
        """Let later requests for a name start a new fetch: the data of the current one is corrupt."""
        with self._lock:
            fetch = self._table.pop(name, None)
        if fetch is not None:
            fetch.abandon()

    def start(self, fetch: Fetch, *, urgent: bool) -> None:
        queue = self._urgent if urgent else self._ahead
        with self._lock:
            if not self._closed:
                queue.append(fetch)
                if self._have_thread():
                    return
                queue.remove(fetch)
        fetch.end()

    def _have_thread(self) -> bool:
        """Start a thread for queued work if the limits allow it; the caller holds the lock.

        Return False if no thread exists and none can be started.
        """
        if len(self._threads) < N_FETCHES + (N_MORE_URGENT if self._urgent else 0):
            thread = Thread(target=self._work, name="tiercache-fetch", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:
                self._threads.discard(thread)
        return bool(self._threads)

    def prioritize(self, fetch: Fetch) -> None:
        with self._lock:
            if fetch in self._ahead:
                self._ahead.remove(fetch)
                self._urgent.append(fetch)
                self._have_thread()

    @property
    def is_crowded(self) -> bool:
        """Whether urgent fetches have made the threads more than those of prefetches."""
        return len(self._threads) > N_FETCHES

    def _requeue(self, fetch: Fetch) -> None:
        """Run a fetch that has yielded again, before the prefetches that have not begun."""
        with self._lock:
            # Under the lock: prioritize() finds the fetch in a queue, or its units are seen to be urgent here.
            if not self._closed:
                if fetch.missing_units()[1].any():
                    self._urgent.append(fetch)
                else:
                    self._ahead.appendleft(fetch)
                return
        self._end(fetch)

    def _work(self) -> None:
        while True:
            with self._lock:
                # The extra threads take only urgent fetches.
                queue = self._urgent or (self._ahead if len(self._threads) <= N_FETCHES else None)
                if not queue:
                    self._threads.discard(current_thread())
                    return
                fetch = queue.popleft()
            self.run(fetch)

    def run(self, fetch: Fetch) -> None:
        """Run a fetch in the calling thread, and pass its result to all waiting leases."""
        error: BaseException | None = None
        try:
            if not self._run(fetch):
                self._requeue(fetch)
                return
        except BaseException as raised:  # noqa: BLE001 - top of a thread: passed to all waiting leases
            # The cache was closed during the wait: the lease bypasses the cache, as it does if its fetch had no thread
            # yet.
            error = None if self._closed and fetch.cancel.is_set() and isinstance(raised, StoreError) else raised
        self._end(fetch, error)

    def _end(self, fetch: Fetch, error: BaseException | None = None) -> None:
        try:
            fetch.end(error)  # first: a caller that finds no fetch in the table may rely on all its files being closed
        finally:
            with self._lock:
                if self._table.get(fetch.spec.name) is fetch:
                    del self._table[fetch.spec.name]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            queued, running = [*self._urgent, *self._ahead], list(self._table.values())
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


class CopyLease:
    """A lease on a copy, which is whole, partial, or comes with a fetch. See Lease.

    The lease never changes to another file: if a partial copy is given up, this lease does not get the missing units.
    Any thread may use the lease. After a fork, the child's lease has its own lock on the same descriptor number, and it
    fetches nothing: missing data is not available to it.
    """

    def __init__(
        self,
        n_bytes: int,
        file: CopyFile | None = None,
        *,
        join: Callable[[], Fetch] | None = None,
        on_lookup: Callable[[bool], object] | None = None,
    ) -> None:
        """Create a lease, which then owns file.

        Args:
            n_bytes: Size of the whole object.
            file: Open copy; None: nothing is cached yet.
            join: Function that returns the fetch of the missing data, of which this lease is then a user; None: nothing
                is missing.
            on_lookup: Callback that is called once, with whether the first requested ranges were already cached.
        """
        self._n_bytes, self._join, self._on_lookup = n_bytes, join, on_lookup
        self._fetch: Fetch | None = None
        self._is_user = False
        self._lock = Lock()
        self._pid = os.getpid()
        # Last: from here on close() works.
        self._file = file
        _leases.add(self)

    @property
    def fd(self) -> int:
        """Descriptor of the copy; -1 before any data is cached, and after close()."""
        return -1 if self._file is None else self._file.fd

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    @property
    def file(self) -> CopyFile | None:
        """Open copy, which belongs to the lease; None before any data is cached, and after close()."""
        return self._file

    @property
    def n_descriptors(self) -> int:
        """Number of descriptors: 1 for a copy that was whole when the lease was created, else 2, with the unit map."""
        return 1 if self._file is not None and not self._file.is_partial else 2

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        fetch = self._fetch
        if self._file is None and fetch is not None:
            self._claim(fetch)
        file = self._file
        return file is not None and file.covers(ranges)

    def read(self, spans: Sequence[Span]) -> bool:
        """Fill spans from a copy that was partial when the lease was created, each unit verified against the unit map.

        The result is False if the copy was whole, or the bytes are missing or corrupt; the contents of spans are then
        undefined. The file needs no name, so cached data can be read even after the copy was removed.
        """
        file = self._file
        return file is not None and file.is_partial and file.covers([span for span, _ in spans]) and file.read(spans)

    def prefetch(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:
        """Start to fetch missing ranges, or join the fetch that brings them."""
        if ranges and not self._look_up(ranges):
            self._request(ranges, urgent=urgent)

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        """Wait until these bytes are cached; return False if they will not come. deadline_s: None is one hour.

        They do not come if there is no space, the disk failed, the object is corrupt at its source, or the fetch
        belonged to the parent of a fork.

        Raises:
            StoreError: The source failed, or the deadline passed.
        """
        is_present = self._look_up(ranges)
        fetch = self._publishing_fetch() if is_present else self._request(ranges, urgent=True)
        if fetch is None:
            return is_present or self.present(ranges)
        try:
            fetch.wait(ranges, deadline_s)
            self._claim(fetch)
        except CorruptShard:
            is_present = False  # corrupt at its source: a reader that reads by ranges learns which block
        else:
            is_present = self.present(ranges)
        if not is_present and (any(span.n_bytes for span in ranges) or not self._n_bytes):
            self._join = None  # refused: asking again for each block would cost milliseconds each
        return is_present

    def _look_up(self, ranges: Sequence[ByteRange]) -> bool:
        """Return whether these bytes are cached, and report the first result to the callback."""
        is_present = self.present(ranges)
        on_lookup, self._on_lookup = self._on_lookup, None
        if on_lookup is not None:
            on_lookup(is_present)
        return is_present

    def _publishing_fetch(self) -> Fetch | None:
        """Return the fetch that is about to publish the copy, whose units are all present; None: there is none."""
        file, fetch = self._file, self._fetch
        is_complete = file is not None and file.is_partial and file.covers([ByteRange(0, self._n_bytes)])
        return fetch if is_complete and self._pid == os.getpid() else None

    def _request(self, ranges: Sequence[ByteRange], *, urgent: bool) -> Fetch | None:
        """Request ranges from the fetch of this copy, or from a new one; None: no fetch can bring them."""
        join = self._join
        if join is None or self._pid != os.getpid() or any(span.end > self._n_bytes for span in ranges):
            return None
        while True:
            fetch = self._fetch
            if fetch is not None and fetch.request(ranges, urgent=urgent):
                return fetch
            fetch = join()
            is_requested = fetch.request(ranges, urgent=urgent)
            self._follow(fetch)
            if is_requested:
                return fetch

    def _follow(self, fetch: Fetch) -> None:
        """Use this fetch from now on. The lease stays its user until the lease has a descriptor of its own."""
        with self._lock:
            before, was_user = self._fetch, self._is_user
            self._fetch, self._is_user = fetch, self._file is None
        if before is not None and was_user:
            before.leave()
        if not self._is_user:
            fetch.leave()

    def _claim(self, fetch: Fetch) -> None:
        """Take a handle on the file from a fetch, if this lease has none and the fetch has one by now."""
        with self._lock:
            if self._file is not None or self._fetch is not fetch or not self._is_user or self._pid != os.getpid():
                return
            self._file, has_left = fetch.claim()
            self._is_user = not has_left

    def close(self) -> None:
        with self._lock:
            file, fetch, is_user = self._file, self._fetch, self._is_user
            self._file, self._fetch, self._is_user, self._join = None, None, False, None
        if file is not None:
            file.close()
        if fetch is not None and is_user and self._pid == os.getpid():
            fetch.leave()

    def __enter__(self) -> CopyLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        # No _file: Ctrl-C came during construction. A closed lease is skipped: Python discards a Ctrl-C in here.
        if not is_exiting() and hasattr(self, "_file") and (self._file is not None or self._is_user):
            self.close()

    def _renew(self) -> None:
        """In a forked child, open the same file again under the same number, so that the child has its own lock."""
        self._lock = Lock()
        file = self._file
        if file is None:
            return
        # Without /proc the inherited descriptor is kept: its lock lasts as long as either process has it open.
        with suppress(OSError):
            own = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
            try_shared(own)
            os.dup2(own, file.fd, inheritable=False)
            os.close(own)


_leases: weakref.WeakSet[CopyLease] = weakref.WeakSet()


def _renew_all() -> None:
    for lease in list(_leases):
        lease._renew()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)
