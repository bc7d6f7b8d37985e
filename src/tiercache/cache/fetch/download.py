"""`Fetch`, the requested units of one copy; `Fetcher`, the threads of fetches; `Download`, the transfer."""

from __future__ import annotations

import copy
from collections import deque
from threading import Condition, Event, Lock, Thread, current_thread
from typing import TYPE_CHECKING

import numpy as np

from tiercache._native.checksum import combine
from tiercache.cache.fetch.partial import PartialCopy
from tiercache.cache.fetch.units import (
    LITTLE_BYTES,
    PIECE_BYTES,
    UNIT_BYTES,
    Mask,
    bytes_of,
    covers,
    first_piece,
    mask_of,
    n_units,
    to_fetch,
)
from tiercache.cache.names import name_of_object
from tiercache.errors import NotFound, ObjectChanged, StoreError, TierCacheError
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    from tiercache.cache.fetch.partial import CopyHandle
    from tiercache.cache.names import CopySpec
    from tiercache.stats import Counters
    from tiercache.store import Store


N_FETCHES = 4
# Extra threads for fetches that a reader waits for. Without them, four prefetches of whole shards, or four fetches that
# wait for another process, would delay such a fetch for as long as they take.
N_MORE_AWAITED = 4
DEADLINE_S = 3600.0  # deadline of a wait without its own deadline, so that no wait is endless
JOIN_S = 30.0


class Fetch:
    """The download of one copy. The condition guards all state; no I/O happens while it is held.

    Leases request units while the fetch runs, and each waiting lease wakes as soon as its own units are present. The
    fetch ends when no requested unit is missing; a later request needs a new fetch.

    A lease that joins holds a place until it has a descriptor of its own, or leaves. Until the last place is given up,
    the fetch keeps a descriptor under a reader's lock, so that no evictor can remove the copy in between.

    Attributes:
        cancel: Event that stops the download.
        step: What the fetch does at the moment, for error messages.
        spare: Names of copies that must not be evicted for this fetch.
    """

    def __init__(self, wanted: CopySpec, store: Store, queue: Fetcher, keep: Callable[[], object]) -> None:
        """Create a fetch that is not queued yet.

        Args:
            wanted: Copy to fetch.
            store: Store that holds the object.
            queue: Fetcher that runs this fetch.
            keep: Function that returns the object that must stay alive while the fetch runs.
        """
        self.wanted, self.store = wanted, store
        self.cancel = Event()
        self.step = "waiting for a free thread"
        self.spare: Set[str] = frozenset()
        self._queue, self._keep = queue, keep
        self._kept: object = None
        self._changed = Condition()
        self._started = self._done = self._closed = False
        self._places = 0
        self._held: CopyHandle | None = None
        self._error: BaseException | None = None
        n = n_units(wanted.n_bytes)
        self._asked, self._urgent, self._refused = (np.zeros(n, bool) for _ in range(3))
        self._present = np.zeros(n, bool)

    # -- for leases -------------------------------------------------------------------------------------------------

    def join(self) -> bool:
        """Take a place in this fetch; return False if the fetch has ended."""
        with self._changed:
            if not self._closed:
                self._places += 1
            return not self._closed

    def request(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> bool:
        """Request ranges, with priority if urgent.

        Return False if the fetch has ended and the caller needs another one.
        """
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
            self._queue.prioritize(self)
        return True

    def try_start(self) -> bool:
        """Return whether the caller must run this fetch, because nobody has started it."""
        with self._changed:
            started, self._started = self._started, True
            return not started

    def wait(self, ranges: Sequence[ByteRange], deadline_s: float | None) -> None:
        """Wait until the ranges are present or cannot come.

        If they complete the copy, wait until it has its final name.

        Args:
            ranges: Byte ranges of the object.
            deadline_s: Longest wait in seconds; None: DEADLINE_S.

        Raises:
            StoreError: The deadline passed.
            TierCacheError: The error with which the fetch ended, unless the ranges came before.
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
            raise copy.copy(error) from error  # a copy for each waiting thread: a traceback belongs to one thread
        if error is not None:
            raise StoreError(f"caching it failed: {error!r}", url=self.wanted.source) from error

    def _covers(self, ranges: Sequence[ByteRange]) -> bool:
        return covers(self._present, ranges, self.wanted.n_bytes)

    def claim(self) -> tuple[CopyHandle | None, bool]:
        """Return (a handle on the file, whether the caller's place is given up).

        The handle is None as long as nothing has come, and if nothing will come. All handles that a fetch returns share
        one lock, which lasts until the last of them is closed.
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
        """Whether the fetch was never started and no lease has a place in it."""
        return not self._started and not self._places

    # -- for the thread that runs it -----------------------------------------------------------------------------------

    def set_file(self, held: CopyHandle, present: Mask) -> None:
        """Give this file to the leases and set the units that are present. The fetch takes ownership of the handle."""
        held.keep_private()
        with self._changed:
            before, self._held = self._held, held
            self._present = present.copy()
            self._changed.notify_all()
        if before is not None:
            before.close()

    def see(self, present: Mask) -> None:
        """Add units that are present by now, and wake the leases that wait for them."""
        with self._changed:
            self._present |= present
            self._changed.notify_all()

    def reset(self) -> None:
        """Mark all units as missing, so that they are fetched again. Leases keep the handles that they have."""
        with self._changed:
            held, self._held = self._held, None
            self._present[:] = False
        if held is not None:
            held.close()

    def missing_units(self) -> tuple[Mask, Mask]:
        """Return the requested units that are neither present nor refused, and the urgent ones among them."""
        with self._changed:
            units = self._asked & ~self._present & ~self._refused
            return units, units & self._urgent

    def refuse(self, units: Mask) -> None:
        """Mark units that will not come because there is no space for them, and wake the leases that wait for them."""
        with self._changed:
            self._refused |= units
            self._changed.notify_all()

    def close_if_done(self) -> bool:
        """Close the fetch if no requested unit is missing; after that, no lease can request more."""
        with self._changed:
            is_done = not (self._asked & ~self._present & ~self._refused).any()
            self._closed = self._closed or is_done
            return is_done

    def abandon(self) -> None:
        """Close the fetch for new requests. The requests so far are still served."""
        with self._changed:
            self._closed = True

    def end(self, error: BaseException | None = None) -> None:
        """End the fetch, with an error if it failed, and wake all waiting leases."""
        with self._changed:
            self._done = self._closed = True
            self._error = error
            kept, self._kept = self._kept, None
            self._drop_unused()
            self._changed.notify_all()
        del kept  # possibly the last reference to the cache, whose finalizer must not run under the lock

    def _drop_unused(self) -> None:
        if self._done and not self._places and self._held is not None:
            held, self._held = self._held, None
            held.close()


class Fetcher:
    """Runs at most one fetch per name at a time in this process, on a few threads that exist while there is work.

    There are at most N_FETCHES threads, and N_MORE_AWAITED extra ones for fetches that a lease waits for. The lock
    guards the table and the queues.

    The argument run carries out one fetch, or raises. The argument keep returns the cache: a running fetch keeps this
    reference, so that the garbage collector cannot close the cache in one of the fetch threads.
    """

    def __init__(self, run: Callable[[Fetch], None], keep: Callable[[], object]) -> None:
        self._run, self._keep = run, keep
        self._lock = Lock()
        self._table: dict[str, Fetch] = {}
        self._awaited: deque[Fetch] = deque()  # fetches that a lease waits for; the fetches in _ahead are prefetches
        self._ahead: deque[Fetch] = deque()
        self._threads: set[Thread] = set()
        self._closed = False

    def join(self, wanted: CopySpec, store: Store) -> Fetch:
        """Return the running fetch of a copy, or a new one, with a place in it taken."""
        with self._lock:
            fetch = self._table.get(wanted.name)
            if fetch is not None and fetch.join():
                return fetch
            for name in [n for n, f in self._table.items() if f.is_unused]:
                del self._table[name]
            fetch = self._table[wanted.name] = Fetch(wanted, store, self, self._keep)
            fetch.join()
            return fetch

    def prefetch(self, wanted: CopySpec, store: Store, ranges: Sequence[ByteRange]) -> None:
        """Request ranges of a copy for which nobody waits."""
        is_requested = False
        while not is_requested:  # the fetch may end between join() and request()
            fetch = self.join(wanted, store)
            is_requested = fetch.request(ranges)
            fetch.leave()

    def is_fetching(self, name: str) -> bool:
        """Return whether this process fetches the copy now."""
        with self._lock:
            return name in self._table

    def abandon(self, name: str) -> None:
        """Let later requests for a name start a new fetch: the data of the current one is corrupt."""
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
        """Start a thread for queued work if the limits allow it.

        Return False if no thread exists and none can be started.

        The caller holds the lock.
        """
        if len(self._threads) < N_FETCHES + (N_MORE_AWAITED if self._awaited else 0):
            thread = Thread(target=self._work, name="tiercache-fetch", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:
                self._threads.discard(thread)
        return bool(self._threads)

    def prioritize(self, fetch: Fetch) -> None:
        """Move a queued prefetch to the fetches that a lease waits for."""
        with self._lock:
            if fetch in self._ahead:
                self._ahead.remove(fetch)
                self._awaited.append(fetch)
                self._have_thread()

    def _work(self) -> None:
        while True:
            with self._lock:
                # The extra threads take only fetches that a lease waits for.
                queue = self._awaited or (self._ahead if len(self._threads) <= N_FETCHES else None)
                if not queue:
                    self._threads.discard(current_thread())
                    return
                fetch = queue.popleft()
            self.run(fetch)

    def run(self, fetch: Fetch) -> None:
        """Run a fetch in the calling thread, and pass its result to all waiting leases."""
        error: BaseException | None = None
        try:
            self._run(fetch)
        except BaseException as raised:  # noqa: BLE001 - top of a thread: passed to all waiting leases
            # The cache was closed during the wait: the lease bypasses the cache, as it does if its fetch had no thread
            # yet.
            error = None if self._closed and fetch.cancel.is_set() and isinstance(raised, StoreError) else raised
        try:
            fetch.end(error)  # first: a caller that finds no fetch in the table may rely on all its files being closed
        finally:
            with self._lock:
                if self._table.get(fetch.wanted.name) is fetch:
                    del self._table[fetch.wanted.name]

    def close(self) -> None:
        """Cancel all fetches and wait until the threads have ended."""
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


N_PIECES_IN_FLIGHT = 4


class Download:
    """The transfer of one fetch into one partial copy, for as long as units are requested.

    Threads share the unit masks under the lock; each thread has a buffer of at most PIECE_BYTES. New requests are
    admitted, under the lock, by the thread that takes the next piece.
    """

    def __init__(
        self,
        fetch: Fetch,
        part: Callable[[], PartialCopy],
        admit: Callable[[Mask], bool],
        counters: Counters,
        present: Mask,
    ) -> None:
        """Create a transfer that has not started.

        Args:
            fetch: Fetch that says which units are requested, and is told which have come.
            part: Function that returns the partial copy to write to. The first call creates it, under the lock.
            admit: Function that reserves space for a mask of all units admitted so far; it returns False if there is no
                space.
            counters: Counters whose bytes_fetched is increased.
            present: Units that are present at the start.
        """
        self._fetch, self._part, self._admit, self._counters = fetch, part, admit, counters
        self._wanted = fetch.wanted
        self._present = present.copy()
        self._admitted = present.copy()
        self._taken = present.copy()
        self._lock = Lock()
        self._error: BaseException | None = None
        # CRC-32C and length of each piece that was written as a whole, by offset
        self._sums: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        """Fetch the requested units until none is left, or until space for them is refused.

        Raises:
            StoreError: The source failed.
            OSError: The disk failed.
        """
        self._error, self._taken = None, self._present.copy()  # units that an earlier run took but lost are taken again
        while (ranges := self._take()) is not None:
            left_bytes = UNIT_BYTES * int((self._admitted & ~self._taken).sum())
            helpers: list[Thread] = []
            try:
                self._start(min(N_PIECES_IN_FLIGHT - 1, -(-left_bytes // PIECE_BYTES)), helpers)
                self._work(ranges)
            finally:
                # Even after an error: the helpers write to the partial copy, which is closed afterwards.
                for helper in helpers:
                    helper.join()
            if self._error is not None:
                raise self._error

    def _start(self, n_helpers: int, helpers: list[Thread]) -> None:
        """Start helper threads and append them to helpers."""
        for _ in range(n_helpers):
            helper = Thread(target=self._work, name="tiercache-part", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # the system allows no more threads; the existing ones do all the work
                return
            helpers.append(helper)

    def whole_sum(self) -> int | None:
        """Return the CRC-32C of the whole file from its pieces.

        None if other processes wrote some of it: it must be read back.
        """
        whole = offset = 0
        while offset in self._sums and (offset < self._wanted.n_bytes or not offset):
            piece_sum, n_bytes = self._sums[offset]
            whole = combine(whole, piece_sum, n_bytes)
            offset += n_bytes
            if not n_bytes:
                break
        return whole if offset == self._wanted.n_bytes else None

    def _work(self, ranges: list[ByteRange] | None = None) -> None:
        try:
            buffer = np.empty(min(PIECE_BYTES, n_units(self._wanted.n_bytes) * UNIT_BYTES), np.uint8)
            ranges = self._take() if ranges is None else ranges
            while ranges is not None:
                self._fetch_ranges(ranges, buffer)
                ranges = self._take()
        except BaseException as error:  # noqa: BLE001 - top of a thread: run() raises the first error
            with self._lock:
                self._error = self._error or error

    def _take(self) -> list[ByteRange] | None:
        """Return the ranges of the next request, urgent units first; None: nothing is left, or a thread failed."""
        n_bytes = self._wanted.n_bytes
        with self._lock:
            if self._error is not None:
                return None
            units, urgent = self._fetch.missing_units()
            self._grow(units & ~self._admitted)
            todo = self._admitted & ~self._taken
            # A small rest is fetched in one request, urgent or not: a second request would take longer than its bytes.
            first = todo if bytes_of(todo, n_bytes) <= LITTLE_BYTES else urgent & todo
            ranges = first_piece(first, n_bytes) or first_piece(todo, n_bytes)
            self._taken |= mask_of(ranges, n_bytes)
            if ranges:
                self._part()  # created here, under the lock, so that there is only one
            return ranges or None

    def _grow(self, units: Mask) -> None:
        """Admit requested units, and with them the rest of the file if it is small."""
        if not units.any():
            return
        for more in (to_fetch(self._admitted, units, self._wanted.n_bytes), units):
            if self._admit(self._admitted | more):
                self._admitted |= more
                return
        self._fetch.refuse(units)

    def _fetch_ranges(self, ranges: Sequence[ByteRange], buffer: np.ndarray) -> None:
        """Fetch ranges into the buffer, one after another, and write them to the partial copy."""
        part = self._part()  # _take() has created it
        position = 0
        spans = []
        for wanted in ranges:
            spans.append((wanted, buffer[position : position + wanted.n_bytes]))
            position += wanted.n_bytes
        if position:  # an empty object has nothing to read
            self._read([(wanted, data.data) for wanted, data in spans])
        for wanted, data in spans:
            piece_sum = part.write(wanted.start, data)
            if piece_sum is not None:
                self._sums[wanted.start] = piece_sum, wanted.n_bytes
        with self._lock:
            self._present |= mask_of(ranges, self._wanted.n_bytes)
        self._counters.add("bytes_fetched", position)
        self._fetch.see(part.present)

    def _read(self, spans: list[tuple[ByteRange, memoryview]]) -> None:
        """Read from the source, in the version that was named; retry once if that may help."""
        wanted, store, cancel = self._wanted, self._fetch.store, self._fetch.cancel
        for is_last in (False, True):
            try:
                store.read_into(wanted.key, spans, if_match=wanted.if_match, cancel=cancel)
                break
            except (NotFound, ObjectChanged):
                raise
            except StoreError as error:
                if is_last or error.retryable or cancel.is_set():
                    raise  # the store has already retried
            except OSError as error:  # a network error that the store did not convert, not one of the cache's disk
                raise StoreError(f"reading failed: {error}", url=wanted.source, retryable=True) from error
        if wanted.identity is None and wanted.if_match is None:
            # Without a strong ETag as a guard, the object must have the same attributes after the read.
            info = store.head(wanted.key)
            if name_of_object(wanted.source, info) != wanted.name:
                raise ObjectChanged(url=wanted.source, expected=wanted.etag, found=info.etag)
