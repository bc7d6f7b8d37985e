"""One fetch of one copy: what any number of leases ask of it, and what has come; and the threads that fetch."""

from __future__ import annotations

import copy
from collections import deque
from threading import Condition, Event, Lock, Thread, current_thread
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.units import Mask, covers, mask_of, n_units
from tiercache.errors import StoreError, TierCacheError
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    from tiercache.cache.partial import Held
    from tiercache.cache.record import Wanted
    from tiercache.store import Store

N_FETCHES = 4
# Threads beside these for what somebody waits for: four fetches ahead of whole shards, or four that watch another
# process fetch, would hold it up for as long as they take.
N_MORE_AWAITED = 4
DEADLINE_S = 3600.0  # of a wait that names none: nothing waits for ever
JOIN_S = 30.0


class Fetch:
    """A copy on its way. The condition guards everything; no I/O happens under it.

    Units are asked for while it runs, and whoever waits is woken as soon as his own are there. It ends when nothing is
    left that was asked for; then a new one has to be made.

    places: leases that will take a descriptor of their own, or leave. The fetch keeps one, under a reader's lock, until
    the last of them did: nobody can evict in between. step: what it does, for people. spare: names that must not be
    evicted for it.
    """

    def __init__(self, wanted: Wanted, store: Store, queue: Fetcher, keep: Callable[[], object]) -> None:
        """queue: what runs it; keep: gives what must live as long as it runs."""
        self.wanted, self.store = wanted, store
        self.cancel = Event()
        self.step = "waiting for a free thread"
        self.spare: Set[str] = frozenset()
        self._queue, self._keep = queue, keep
        self._kept: object = None
        self._changed = Condition()
        self._started = self._done = self._closed = False
        self._places = 0
        self._held: Held | None = None
        self._error: BaseException | None = None
        n = n_units(wanted.n_bytes)
        self._asked, self._urgent, self._refused = (np.zeros(n, bool) for _ in range(3))
        self._present = np.zeros(n, bool)

    # -- for leases -------------------------------------------------------------------------------------------------

    def join(self) -> bool:
        """Take a place; False: it has ended."""
        with self._changed:
            if not self._closed:
                self._places += 1
            return not self._closed

    def ask(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> bool:
        """See to it that ranges come, before others if that is urgent; False: it has ended, ask another one."""
        mask = mask_of(ranges, self.wanted.n_bytes)
        with self._changed:
            if self._closed:
                return False
            self._asked |= mask
            if urgent:
                self._urgent |= mask
            is_new = not self._started
            if is_new:
                self._started, self._kept = True, self._keep()
        if is_new:
            self._queue.start(self, urgent=urgent)
        elif urgent:
            self._queue.hurry(self)
        return True

    def take_up(self) -> bool:
        """Whether the caller is the one to run it."""
        with self._changed:
            started, self._started = self._started, True
            return not started

    def wait(self, ranges: Sequence[ByteRange], deadline_s: float | None) -> None:
        """Wait until ranges are there or will not come; of a copy that is whole with them, until it has its name.

        Raises:
            StoreError: deadline_s passed.
            TierCacheError: what the fetch ended with, unless ranges came before.
        """
        mask = mask_of(ranges, self.wanted.n_bytes)

        def has_come() -> bool:
            if self._done or bool((self._refused & mask).any()):
                return True
            return self._covers(ranges) and not self._present.all()

        limit_s = DEADLINE_S if deadline_s is None else deadline_s
        with self._changed:
            if not self._changed.wait_for(has_come, limit_s):
                raise StoreError(
                    f"not in the cache after {limit_s:g} s: {self.step}", url=self.wanted.source, retryable=True
                )
            error = None if self._covers(ranges) and self._held is not None else self._error
        if isinstance(error, TierCacheError):
            raise copy.copy(error) from error  # a copy for each that waits: a traceback belongs to one thread
        if error is not None:
            raise StoreError(f"caching it failed: {error!r}", url=self.wanted.source) from error

    def _covers(self, ranges: Sequence[ByteRange]) -> bool:
        return covers(self._present, ranges, self.wanted.n_bytes)

    def claim(self) -> tuple[Held | None, bool]:
        """(a hold of one's own, whether the place was given up for it); None: nothing has come, or nothing will.

        All these holds share one lock, which lasts until the last of them is closed.
        """
        with self._changed:
            held = None if self._held is None else self._held.dup()
            is_over = held is not None or self._done
            if is_over:
                self._places -= 1
                self._drop_unused()
        return held, is_over

    def leave(self) -> None:
        """Give up a place."""
        with self._changed:
            self._places -= 1
            self._drop_unused()

    @property
    def is_unused(self) -> bool:
        """Whether it was never started and nobody waits for it."""
        return not self._started and not self._places

    # -- for whoever runs it ----------------------------------------------------------------------------------------

    def offer(self, held: Held, present: Mask) -> None:
        """Let the leases have this file, taken over, and know what is there of it, from now on."""
        held.keep_private()
        with self._changed:
            before, self._held = self._held, held
            self._present = present.copy()
            self._changed.notify_all()
        if before is not None:
            before.close()

    def see(self, present: Mask) -> None:
        """Say which units are there by now."""
        with self._changed:
            self._present |= present
            self._changed.notify_all()

    def forget(self) -> None:
        """What was there is not any more: it has to come again. Leases that have it may keep it."""
        with self._changed:
            held, self._held = self._held, None
            self._present[:] = False
        if held is not None:
            held.close()

    def open_units(self) -> tuple[Mask, Mask]:
        """What is asked for, not refused, and not there; and what of it is urgent."""
        with self._changed:
            units = self._asked & ~self._present & ~self._refused
            return units, units & self._urgent

    def refuse(self, units: Mask) -> None:
        """These units will not come: there is no room for them."""
        with self._changed:
            self._refused |= units
            self._changed.notify_all()

    def close_if_done(self) -> bool:
        """End it, if nothing is left that was asked for; nobody can ask for more after that."""
        with self._changed:
            is_done = not (self._asked & ~self._present & ~self._refused).any()
            self._closed = self._closed or is_done
            return is_done

    def abandon(self) -> None:
        """Let nobody ask for more; who waits is served to the end."""
        with self._changed:
            self._closed = True

    def end(self, error: BaseException | None = None) -> None:
        """Wake all; nothing more will come."""
        with self._changed:
            self._done = self._closed = True
            self._error = error
            kept, self._kept = self._kept, None
            self._drop_unused()
            self._changed.notify_all()
        del kept  # perhaps the last hold on the cache, which then closes itself: not under the lock

    def _drop_unused(self) -> None:
        if self._done and not self._places and self._held is not None:
            held, self._held = self._held, None
            held.close()


class Fetcher:
    """At most one fetch of a name at a time in this process, on a few threads that live while it has work.

    Those are N_FETCHES at most, and N_MORE_AWAITED beside them for what somebody waits for.

    The lock guards table and queue. run(fetch) does the work, or raises. keep() gives the cache, which must not be
    closed by the garbage collector, in one of these threads, while they are at work.
    """

    def __init__(self, run: Callable[[Fetch], None], keep: Callable[[], object]) -> None:
        self._run, self._keep = run, keep
        self._lock = Lock()
        self._table: dict[str, Fetch] = {}
        self._awaited: deque[Fetch] = deque()  # somebody waits for these; for those ahead nobody does yet
        self._ahead: deque[Fetch] = deque()
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
            fetch = self._table[wanted.name] = Fetch(wanted, store, self, self._keep)
            fetch.join()
            return fetch

    def is_coming(self, name: str) -> bool:
        """Whether name is being fetched here."""
        with self._lock:
            return name in self._table

    def abandon(self, name: str) -> None:
        """Let whoever wants name from now on have another fetch: what this one has was found to be wrong."""
        with self._lock:
            fetch = self._table.pop(name, None)
        if fetch is not None:
            fetch.abandon()

    def start(self, fetch: Fetch, *, urgent: bool) -> None:
        """Run a fetch as soon as a thread is free."""
        queue = self._awaited if urgent else self._ahead
        with self._lock:
            if not self._closed:
                queue.append(fetch)
                if self._have_thread():
                    return
                queue.remove(fetch)
        fetch.end()

    def _have_thread(self) -> bool:
        """Start a thread for what is queued, if another may be; False: there is none, and the system gives none.

        The lock is held.
        """
        if len(self._threads) < N_FETCHES + (N_MORE_AWAITED if self._awaited else 0):
            thread = Thread(target=self._work, name="tiercache-fetch", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:
                self._threads.discard(thread)
        return bool(self._threads)

    def hurry(self, fetch: Fetch) -> None:
        """Run a fetch before those that nobody waits for yet."""
        with self._lock:
            if fetch in self._ahead:
                self._ahead.remove(fetch)
                self._awaited.append(fetch)
                self._have_thread()

    def _work(self) -> None:
        while True:
            with self._lock:
                # Who is there for what is awaited leaves what is not to the others.
                queue = self._awaited or (self._ahead if len(self._threads) <= N_FETCHES else None)
                if not queue:
                    self._threads.discard(current_thread())
                    return
                fetch = queue.popleft()
            self.run(fetch)

    def run(self, fetch: Fetch) -> None:
        """Run a fetch that the caller has taken up, in the caller's thread; its end is told to all who wait."""
        error: BaseException | None = None
        try:
            self._run(fetch)
        except BaseException as raised:  # noqa: BLE001 - thread top: told to all who wait
            # Closed under who waits: he reads past the cache, as those do whose fetch had no thread yet.
            error = None if self._closed and fetch.cancel.is_set() and isinstance(raised, StoreError) else raised
        try:
            fetch.end(error)  # first: who finds nothing in the table may count on it that nothing is held any more
        finally:
            with self._lock:
                if self._table.get(fetch.wanted.name) is fetch:
                    del self._table[fetch.wanted.name]

    def close(self) -> None:
        """Cancel everything and wait until the threads have ended."""
        with self._lock:
            self._closed = True
            queued, running = [*self._awaited, *self._ahead], list(self._table.values())
            self._awaited.clear()
            self._ahead.clear()
            threads = list(self._threads)
        for fetch in running:
            fetch.cancel.set()
        for fetch in queued:
            fetch.end()
        for thread in threads:
            if thread is not current_thread():
                thread.join(JOIN_S)
