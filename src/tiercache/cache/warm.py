"""Warming: fetch what was asked for, a few at a time, and make sure that it is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING

from tiercache.cache.admin import writable
from tiercache.catalog import charge_bytes
from tiercache.errors import CacheFull, StoreError
from tiercache.model import ShardIdentity, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tiercache.cache.fetch import Fetch
    from tiercache.cache.opened import Opened, Writing
    from tiercache.cache.record import Wanted
    from tiercache.cache.store import CachedStore


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """How far warming is: copies and bytes that are here, of those asked for. last: key of the copy that just came."""

    n_done: int
    n_wanted: int
    bytes_done: int
    bytes_wanted: int
    last: str = ""


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What warming did: copies asked for, how many of them were fetched now, and their bytes."""

    n_wanted: int
    n_fetched: int
    bytes_fetched: int


def warm(
    opened: Opened,
    store: CachedStore,
    pairs: Sequence[tuple[str, ShardIdentity | None]],
    *,
    jobs: int,
    on_progress: Callable[[WarmProgress], None] | None = None,
) -> WarmReport:
    """Fetch what is missing of pairs. See Cache.warm."""
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, got {jobs}")
    writing = writable(opened)
    wanted = {}
    for key, identity in pairs:
        one = store.wanted(key, identity)
        if one is None:
            raise StoreError("cannot be cached: it has no ETag, version or date", url=f"{store.url}/{key}")
        wanted[one.name] = one
    missing = [one for one in wanted.values() if not _is_here(opened, one)]
    writing.accounts.reconcile()
    if missing:
        _check_room(writing, wanted, missing)
    round_ = _Round(writing, store, frozenset(wanted), missing)
    tell = on_progress or (lambda _: None)
    n_done, bytes_done = len(wanted) - len(missing), sum(w.n_bytes for w in wanted.values())
    bytes_wanted, bytes_done = bytes_done, bytes_done - sum(w.n_bytes for w in missing)
    tell(WarmProgress(n_done, len(wanted), bytes_done, bytes_wanted))
    for one in round_.run(jobs):
        n_done, bytes_done = n_done + 1, bytes_done + one.n_bytes
        tell(WarmProgress(n_done, len(wanted), bytes_done, bytes_wanted, one.key))
    lost = [one.source for one in wanted.values() if not _is_here(opened, one)]
    if lost:
        raise StoreError(
            f"{len(lost)} of {len(wanted)} copies are gone again after warming", url=lost[0], retryable=True
        )
    return WarmReport(len(wanted), round_.n_fetched, round_.bytes_fetched)


def _is_here(opened: Opened, wanted: Wanted) -> bool:
    lease = opened.look(wanted.name, wanted.n_bytes)
    if lease is None:
        return False
    lease.close()
    return True


def _check_room(writing: Writing, wanted: Mapping[str, Wanted], missing: Sequence[Wanted]) -> None:
    """Raise CacheFull before the first byte is fetched, where it is certain that not all will fit."""
    need_bytes = sum(charge_bytes(one.n_bytes) for one in missing)
    lack_bytes = writing.evictor.lack_bytes(need_bytes)
    freeable = writing.evictor.freeable_bytes(frozenset(wanted))
    if lack_bytes > freeable:
        raise _full(writing, need_bytes, freeable)


def _full(writing: Writing, need_bytes: int, freeable_bytes: int) -> CacheFull:
    used, reserved, limit = writing.accounts.sums()
    return CacheFull(
        f"cache {writing.folder.root}: {format_bytes(need_bytes)} more are asked for, but of {format_bytes(limit)} "
        f"{format_bytes(used + reserved)} are taken, {format_bytes(freeable_bytes)} of them can go, and the disk has "
        f"{format_bytes(max(writing.evictor.spare_bytes(), 0))} above its floor: evict some or enlarge the cache",
        need_bytes=need_bytes,
        freeable_bytes=freeable_bytes,
        limit_bytes=limit,
    )


class _Round:
    """The fetches of one call. Threads take copies from a queue and put what became of them into another."""

    def __init__(self, writing: Writing, store: CachedStore, names: frozenset[str], missing: Sequence[Wanted]) -> None:
        self._writing, self._store, self._names = writing, store, names
        self._todo: SimpleQueue[Wanted] = SimpleQueue()
        for one in missing:
            self._todo.put(one)
        self._n_missing = len(missing)
        self._done: SimpleQueue[tuple[Wanted, bool, BaseException | None]] = SimpleQueue()
        self._stop = Event()
        self._running: set[Fetch] = set()
        self.n_fetched = 0
        self.bytes_fetched = 0

    def run(self, jobs: int) -> Iterator[Wanted]:
        """Give each copy once it is here. On the first error, or when the caller stops, everything is cancelled."""
        threads = [
            Thread(target=self._work, name="tiercache-warm", daemon=True) for _ in range(min(jobs, self._n_missing))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(self._n_missing):
                wanted, fetched, error = self._done.get()
                if error is not None:
                    raise error
                if fetched:
                    self.n_fetched += 1
                    self.bytes_fetched += wanted.n_bytes
                yield wanted
        finally:
            self._stop.set()
            for fetch in list(self._running):
                fetch.cancel.set()
            for thread in threads:
                thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                wanted = self._todo.get_nowait()
            except Empty:
                return
            try:
                self._done.put((wanted, self._fetch(wanted), None))
            except BaseException as error:  # noqa: BLE001 - thread top: run() raises it
                self._stop.set()
                self._done.put((wanted, False, error))

    def _fetch(self, wanted: Wanted) -> bool:
        """Bring one copy here; False: somebody else did."""
        fetcher = self._writing.fetcher
        fetch = fetcher.join(wanted, self._store.inner)
        mine = fetch.take_up()
        if mine:
            fetch.spare = self._names
            self._running.add(fetch)
            try:
                fetcher.run(fetch)
            finally:
                self._running.discard(fetch)
        try:
            fetch.wait(None)
        finally:
            fd = fetch.claim()
        if fd < 0 and self._writing.breaker.is_open:
            raise StoreError("not cached: the cache's disk fails", url=wanted.source, retryable=True)
        if fd < 0:
            raise _full(self._writing, charge_bytes(wanted.n_bytes), 0)
        os.close(fd)
        return mine
