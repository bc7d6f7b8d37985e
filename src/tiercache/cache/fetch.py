"""One fetch of one copy, joined by any number of leases; and the threads that fetch."""

from __future__ import annotations

import copy
import os
from collections import deque
from threading import Condition, Event, Lock, Thread, current_thread
from typing import TYPE_CHECKING

from tiercache.cache.inherit import close_private, keep_private
from tiercache.errors import StoreError, TierCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Set

    from tiercache.cache.record import Wanted
    from tiercache.store import Store

N_FETCHES = 4
DEADLINE_S = 3600.0  # of a wait that names none: nothing waits for ever
JOIN_S = 30.0


class Fetch:
    """A copy on its way. The condition guards everything; no I/O happens under it.

    places: leases that will take a descriptor of their own, or leave. The fetch keeps one, under a reader's lock from
    before the copy had its name, until the last of them did: nobody can evict in between. step: what it does,
    for people. spare: names that must not be evicted for it.
    """

    def __init__(
        self, wanted: Wanted, store: Store, start: Callable[[Fetch], None], keep: Callable[[], object]
    ) -> None:
        """start: queues it; keep: gives what must live as long as it runs."""
        self.wanted, self.store = wanted, store
        self._keep = keep
        self._kept: object = None
        self.cancel = Event()
        self.step = "waiting for a free thread"
        self.spare: Set[str] = frozenset()
        self._start = start
        self._changed = Condition()
        self._started = False
        self._done = False
        self._places = 0
        self._fd = -1
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done

    def join(self) -> bool:
        """Take a place; False: it has ended."""
        with self._changed:
            if not self._done:
                self._places += 1
            return not self._done

    def start(self) -> None:
        """See to it that it runs."""
        with self._changed:
            if self._started:
                return
            self._started, self._kept = True, self._keep()
        self._start(self)

    def take_up(self) -> bool:
        """Whether the caller is the one to run it."""
        with self._changed:
            started, self._started = self._started, True
            return not started

    def wait(self, deadline_s: float | None) -> None:
        """Wait until it has ended. Raises StoreError when deadline_s passes, or what the fetch ended with."""
        limit_s = DEADLINE_S if deadline_s is None else deadline_s
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, limit_s):
                raise StoreError(
                    f"not in the cache after {limit_s:g} s: {self.step}", url=self.wanted.source, retryable=True
                )
            error = self._error
        if isinstance(error, TierCacheError):
            raise copy.copy(error) from error  # a copy for each that waits: a traceback belongs to one thread
        if error is not None:
            raise StoreError(f"caching it failed: {error!r}", url=self.wanted.source) from error

    def end(self, fd: int, error: BaseException | None = None) -> None:
        """Wake all. fd: a descriptor under a reader's lock, taken over; -1: no copy."""
        with self._changed:
            self._done, self._error, self._fd = True, error, fd
            kept, self._kept = self._kept, None
            if fd >= 0:
                keep_private(fd)
            self._drop_unused()
            self._changed.notify_all()
        del kept  # perhaps the last hold on the cache, which then closes itself: not under the lock

    def claim(self) -> int:
        """Give up a place for a descriptor of one's own; -1: there is no copy.

        All these descriptors share one lock, which lasts until the last of them is closed.
        """
        with self._changed:
            fd = os.dup(self._fd) if self._fd >= 0 else -1
            self._places -= 1
            self._drop_unused()
        return fd

    def leave(self) -> None:
        """Give up a place."""
        with self._changed:
            self._places -= 1
            self._drop_unused()

    def _drop_unused(self) -> None:
        if self._done and not self._places and self._fd >= 0:
            close_private(self._fd)
            self._fd = -1

    @property
    def is_unused(self) -> bool:
        """Whether it was never started and nobody waits for it."""
        return not self._started and not self._places


class Fetcher:
    """At most one fetch of a name at a time in this process, on at most N_FETCHES threads that live while it has work.

    The lock guards table and queue. run(fetch) does the work: it returns a descriptor or -1, or raises. keep() gives
    the cache, which must not be closed by the garbage collector, in one of these threads, while they are at work.
    """

    def __init__(self, run: Callable[[Fetch], int], keep: Callable[[], object]) -> None:
        self._run, self._keep = run, keep
        self._lock = Lock()
        self._table: dict[str, Fetch] = {}
        self._queue: deque[Fetch] = deque()
        self._threads: set[Thread] = set()
        self._closed = False

    def join(self, wanted: Wanted, store: Store) -> Fetch:
        """The fetch of wanted that is under way or new, with a place in it taken."""
        with self._lock:
            fetch = self._table.get(wanted.name)
            if fetch is not None and fetch.join():
                return fetch
            for name in [n for n, f in self._table.items() if f.is_unused]:
                del self._table[name]
            fetch = self._table[wanted.name] = Fetch(wanted, store, self._enqueue, self._keep)
            fetch.join()
            return fetch

    def is_coming(self, name: str) -> bool:
        """Whether name is being fetched here."""
        with self._lock:
            return name in self._table

    def _enqueue(self, fetch: Fetch) -> None:
        with self._lock:
            if not self._closed:
                self._queue.append(fetch)
                if len(self._threads) < N_FETCHES:
                    thread = Thread(target=self._work, name="tiercache-fetch", daemon=True)
                    self._threads.add(thread)
                    thread.start()
                return
        fetch.end(-1)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads.discard(current_thread())
                    return
                fetch = self._queue.popleft()
            self.run(fetch)

    def run(self, fetch: Fetch) -> None:
        """Run a fetch that the caller has taken up, in the caller's thread; its end is told to all who wait."""
        fd, error = -1, None
        try:
            fd = self._run(fetch)
        except BaseException as raised:  # noqa: BLE001 - thread top: told to all who wait
            error = raised
        with self._lock:
            if self._table.get(fetch.wanted.name) is fetch:
                del self._table[fetch.wanted.name]
        fetch.end(fd, error)

    def close(self) -> None:
        """Cancel everything and wait until the threads have ended."""
        with self._lock:
            self._closed = True
            queued, running = list(self._queue), list(self._table.values())
            self._queue.clear()
            threads = list(self._threads)
        for fetch in running:
            fetch.cancel.set()
        for fetch in queued:
            fetch.end(-1)
        for thread in threads:
            if thread is not current_thread():
                thread.join(JOIN_S)
