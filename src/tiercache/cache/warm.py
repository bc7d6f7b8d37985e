"""Warming: fetches copies in advance, several at a time, and checks that they are present."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tiercache.cache.admin import writable
from tiercache.cache.partial import charge_of, hold_part
from tiercache.cache.units import UNIT_BYTES, mask_of, n_units
from tiercache.catalog import charge_bytes
from tiercache.errors import CacheFull, StoreError
from tiercache.model import ByteRange, format_bytes
from tiercache.points import crash_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tiercache.cache.fetch import Fetch
    from tiercache.cache.opened import CacheSession
    from tiercache.cache.record import CopySpec
    from tiercache.cache.store import CachedStore
    from tiercache.cache.units import Mask
    from tiercache.cache.writing import WriteSession
    from tiercache.model import ShardIdentity


Ranges: TypeAlias = "Mapping[str, Sequence[ByteRange]]"
"""Byte ranges that suffice, by key. An object without an entry is wanted whole."""


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """The progress of warming.

    Attributes:
        n_done: Number of requested copies that are present.
        n_wanted: Number of requested copies.
        bytes_done: Bytes of the requested copies that are present.
        bytes_wanted: Bytes of the requested copies.
        last: Key of the copy that was just fetched; "" at the start.
    """

    n_done: int
    n_wanted: int
    bytes_done: int
    bytes_wanted: int
    last: str = ""


@dataclass(frozen=True, slots=True)
class WarmOptions:
    """The options of warming.

    Attributes:
        jobs: Number of fetches that run at the same time.
        on_progress: Callback after every copy.
        ranges: See Ranges.
    """

    jobs: int = 4
    on_progress: Callable[[WarmProgress], None] | None = None
    ranges: Ranges = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WarmReport:
    """The result of warming.

    Attributes:
        n_wanted: Number of requested copies.
        n_fetched: Number of copies that were fetched by this call.
        bytes_fetched: Bytes of those copies.
    """

    n_wanted: int
    n_fetched: int
    bytes_fetched: int


@dataclass(frozen=True, slots=True)
class WarmGoal:
    """A copy that must be present after warming.

    Attributes:
        wanted: Specification of the copy.
        ranges: Byte ranges that suffice, ascending; None: the whole object.
    """

    wanted: CopySpec
    ranges: tuple[ByteRange, ...] | None = None

    @property
    def n_bytes(self) -> int:
        """Number of requested bytes."""
        return sum(wanted.n_bytes for wanted in self.whole_or_ranges)

    @property
    def whole_or_ranges(self) -> tuple[ByteRange, ...]:
        """The requested byte ranges."""
        return (ByteRange(0, self.wanted.n_bytes),) if self.ranges is None else self.ranges


@dataclass(frozen=True, slots=True)
class MissingCopy:
    """A goal that is not present.

    Attributes:
        goal: The goal.
        n_bytes: Bytes to fetch.
        charge_bytes: Bytes that the fetch adds to the used space.
    """

    goal: WarmGoal
    n_bytes: int
    charge_bytes: int


@dataclass(frozen=True, slots=True)
class WarmPlan:
    """The requested copies, each once, and what is missing of them, in the order of the fetches.

    Attributes:
        goals: The requested copies.
        missing: The goals that are not present.
        freeable_bytes: Bytes that the policy could evict, other than requested copies; 0 if the free space suffices.
        fits: Whether there is enough space, or eviction can free enough.
    """

    goals: tuple[WarmGoal, ...]
    missing: tuple[MissingCopy, ...]
    freeable_bytes: int
    fits: bool

    @property
    def wanted_bytes(self) -> int:
        """Total bytes of the requested copies."""
        return sum(goal.n_bytes for goal in self.goals)

    @property
    def missing_bytes(self) -> int:
        """Bytes to fetch."""
        return sum(missing.n_bytes for missing in self.missing)

    @property
    def need_bytes(self) -> int:
        """Bytes that the fetches add to the used space."""
        return sum(missing.charge_bytes for missing in self.missing)


def plan_warm(
    opened: CacheSession, store: CachedStore, pairs: Sequence[tuple[str, ShardIdentity | None]], ranges: Ranges
) -> WarmPlan:
    """Return what is missing of the requested objects.

    It scans the folder and the accounts once, however many there are.

    Raises:
        StoreError: An object cannot be cached, or the store failed when it was asked for the attributes of an object.
    """
    goals: dict[str, WarmGoal] = {}
    for key, identity in pairs:
        one = store.wanted(key, identity)
        if one is None:
            raise StoreError("cannot be cached: it has no ETag, version or date", url=f"{store.url}/{key}")
        goals[one.name] = WarmGoal(one, tuple(ranges[key]) if key in ranges else None)
    here = _Here(opened)
    missing = tuple(lack for goal in goals.values() if (lack := here.lack(goal)) is not None)
    plan = WarmPlan(tuple(goals.values()), missing, freeable_bytes=0, fits=not missing)
    if not missing or opened.writing is None:
        return plan
    evictor = opened.writing.evictor
    lack_bytes = evictor.lack_bytes(plan.need_bytes)
    freeable_bytes = evictor.freeable_bytes(goals.keys()) if lack_bytes > 0 else 0
    return replace(plan, freeable_bytes=freeable_bytes, fits=lack_bytes <= freeable_bytes)


class _Here:
    """A listing of the folder, used instead of one system call per copy."""

    def __init__(self, opened: CacheSession) -> None:
        self._opened = opened
        self._names = frozenset(opened.folder.names(""))
        self._parts = frozenset(opened.folder.names(".part"))
        # Copies that must be verified before they are served.
        self._doubted = frozenset() if opened.writing is None else frozenset(opened.writing.publisher.unrecorded)

    def lack(self, goal: WarmGoal) -> MissingCopy | None:
        """Return what is missing of a goal; None: nothing."""
        name, n_bytes = goal.wanted.name, goal.wanted.n_bytes
        if name in self._names and (name not in self._doubted or _is_here(self._opened, goal)):
            return None
        if goal.ranges is None and name not in self._parts:
            return MissingCopy(goal, n_bytes, charge_bytes(n_bytes))
        present = self._present(name, n_bytes)
        missing = mask_of(goal.whole_or_ranges, n_bytes) & ~present
        if goal.ranges is not None and not missing.any():
            return None
        # A partial copy that has all units but no final name still counts as missing.
        return MissingCopy(goal, min(int(missing.sum()) * UNIT_BYTES, n_bytes), _charge(goal, present))

    def _present(self, name: str, n_bytes: int) -> Mask:
        """Return the units of a partial copy that are present."""
        held = hold_part(self._opened.folder, name, n_bytes) if name in self._parts else None
        present = np.zeros(n_units(n_bytes), bool) if held is None or held.presence is None else held.presence.mask()
        if held is not None:
            held.close()
        return present


def _charge(goal: WarmGoal, present: Mask) -> int:
    """Return the bytes that a goal adds to the used space when the units in `present` are cached."""
    n_bytes, before = goal.wanted.n_bytes, charge_of(present, goal.wanted.n_bytes)
    if goal.ranges is None:
        return max(charge_bytes(n_bytes) - before, 0)
    return charge_of(mask_of(goal.ranges, n_bytes) | present, n_bytes) - before


def warm(
    opened: CacheSession,
    store: CachedStore,
    pairs: Sequence[tuple[str, ShardIdentity | None]],
    *,
    options: WarmOptions,
) -> WarmReport:
    """Fetch what is missing of the requested objects. See Cache.warm."""
    if options.jobs < 1:
        raise ValueError(f"jobs must be 1 or more, got {options.jobs}")
    writing = writable(opened)
    writing.accounts.reconcile()
    plan = plan_warm(opened, store, pairs, options.ranges)
    if not plan.fits:
        raise _full(writing, plan.need_bytes, plan.freeable_bytes)
    plan = _without_cut_copies(opened, plan)
    crash_point("warm.planned")
    round_ = _Round(writing, store, plan)
    _run(round_, plan, options)
    lost = [goal.wanted.source for goal in plan.goals if not _is_here(opened, goal)]
    if lost:
        raise StoreError(
            f"{len(lost)} of {len(plan.goals)} copies are missing again after warming", url=lost[0], retryable=True
        )
    return WarmReport(len(plan.goals), round_.n_fetched, round_.bytes_fetched)


def _without_cut_copies(opened: CacheSession, plan: WarmPlan) -> WarmPlan:
    """Return the plan with truncated copies, and files that are not regular, added to the missing ones.

    Checking the size takes 2 us per copy, so a plan that is only displayed skips it.
    """
    missing = {one.goal.wanted.name for one in plan.missing}
    found = list(plan.missing)
    for goal in plan.goals:
        name, n_bytes = goal.wanted.name, goal.wanted.n_bytes
        if name not in missing and opened.folder.size_of(name) not in (n_bytes, None):
            found.append(MissingCopy(goal, n_bytes, charge_bytes(n_bytes)))
    return replace(plan, missing=tuple(found))


def _run(round_: _Round, plan: WarmPlan, options: WarmOptions) -> None:
    tell = options.on_progress or (lambda _: None)
    n_wanted, bytes_wanted = len(plan.goals), plan.wanted_bytes
    n_done, bytes_done = n_wanted - len(plan.missing), bytes_wanted - plan.missing_bytes
    tell(WarmProgress(n_done, n_wanted, bytes_done, bytes_wanted))
    for one in round_.run(options.jobs):
        n_done, bytes_done = n_done + 1, bytes_done + one.n_bytes
        tell(WarmProgress(n_done, n_wanted, bytes_done, bytes_wanted, one.goal.wanted.key))


def _is_here(opened: CacheSession, goal: WarmGoal) -> bool:
    if goal.ranges is not None and opened.is_cached(goal.wanted, goal.ranges):
        return True
    lease = opened.look(goal.wanted.name, goal.wanted.n_bytes)
    if lease is None:
        return False
    lease.close()
    return True


def _full(writing: WriteSession, need_bytes: int, freeable_bytes: int) -> CacheFull:
    used, reserved, limit = writing.accounts.sums()
    return CacheFull(
        f"cache {writing.folder.root}: {format_bytes(need_bytes)} more are needed, but of {format_bytes(limit)}, "
        f"{format_bytes(used + reserved)} are used, {format_bytes(freeable_bytes)} of which can be evicted, and the "
        f"disk has {format_bytes(max(writing.evictor.spare_bytes(), 0))} above free_floor; evict or unpin copies, "
        "enlarge the cache, or request less",
        need_bytes=need_bytes,
        freeable_bytes=freeable_bytes,
        limit_bytes=limit,
    )


class _Round:
    """The fetches of one call. Threads take copies from one queue and put the results into another."""

    def __init__(self, writing: WriteSession, store: CachedStore, plan: WarmPlan) -> None:
        self._writing, self._store = writing, store
        self._names = frozenset(goal.wanted.name for goal in plan.goals)
        self._todo: SimpleQueue[MissingCopy] = SimpleQueue()
        for missing in plan.missing:
            self._todo.put(missing)
        self._n_missing = len(plan.missing)
        self._done: SimpleQueue[tuple[MissingCopy, bool, BaseException | None]] = SimpleQueue()
        self._stop = Event()
        self._running: set[Fetch] = set()
        self.n_fetched = 0
        self.bytes_fetched = 0

    def run(self, jobs: int) -> Iterator[MissingCopy]:
        """Yield each missing copy once it is present.

        On the first error, or when the caller stops, all fetches are cancelled.
        """
        threads = [
            Thread(target=self._work, name="tiercache-warm", daemon=True) for _ in range(min(jobs, self._n_missing))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(self._n_missing):
                missing, fetched, error = self._done.get()
                if error is not None:
                    raise error
                if fetched:
                    self.n_fetched += 1
                    self.bytes_fetched += missing.n_bytes
                yield missing
        finally:
            self._stop.set()
            for fetch in list(self._running):
                fetch.cancel.set()
            for thread in threads:
                thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                missing = self._todo.get_nowait()
            except Empty:
                return
            try:
                self._done.put((missing, self._fetch(missing.goal), None))
            except BaseException as error:  # noqa: BLE001 - top of a thread: run() raises it
                self._stop.set()
                self._done.put((missing, False, error))

    def _fetch(self, goal: WarmGoal) -> bool:
        """Fetch the requested part of one copy; return False if another thread or process fetched it."""
        wanted, ranges = goal.wanted, goal.whole_or_ranges
        fetch, mine = self._join(wanted, ranges)
        try:
            if mine:
                self._run(fetch)
            fetch.wait(ranges, None)
        finally:
            held, has_left = fetch.claim()
            if not has_left:
                fetch.leave()
            is_here = held is not None and (held.presence is None or held.presence.covers(ranges))
            if held is not None:
                held.close()
        crash_point("warm.fetched")
        if not is_here and fetch.cancel.is_set():
            raise StoreError("not cached: the cache was closed", url=wanted.source, retryable=True)
        if not is_here and self._writing.breaker.is_open:
            raise StoreError("not cached: the cache's disk fails", url=wanted.source, retryable=True)
        if not is_here:
            raise _full(self._writing, charge_bytes(goal.n_bytes), 0)
        return mine

    def _join(self, wanted: CopySpec, ranges: Sequence[ByteRange]) -> tuple[Fetch, bool]:
        """Return a fetch that includes the ranges, with a place in it taken, and whether the caller must run it."""
        while True:
            fetch = self._writing.fetcher.join(wanted, self._store.inner)
            mine = fetch.try_start()
            if fetch.request(ranges, urgent=True):
                return fetch, mine
            fetch.leave()  # it ended after join()

    def _run(self, fetch: Fetch) -> None:
        fetch.spare = self._names
        self._running.add(fetch)
        try:
            self._writing.fetcher.run(fetch)
        finally:
            self._running.discard(fetch)
