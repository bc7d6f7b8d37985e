"""The administrative operations of a cache: list copies, pin, unpin, evict, warm, and report the status."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tiercache.cache.corrupt_sources import corrupt_sources
from tiercache.cache.evict.evictor import delete_copy
from tiercache.cache.fetch.partial import charge_of, hold_part
from tiercache.cache.fetch.units import UNIT_BYTES, mask_of, n_units
from tiercache.cache.machine import Holder, Owner, command_of, holders_of, room
from tiercache.cache.names import Record
from tiercache.catalog import CopyRow, charge_bytes
from tiercache.crash_points import crash_point
from tiercache.errors import CacheFull, StoreError, TierCacheError
from tiercache.model import ByteRange, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tiercache.cache.cache import CachedStore
    from tiercache.cache.fetch.download import Fetch
    from tiercache.cache.fetch.units import Mask
    from tiercache.cache.folder import Folder
    from tiercache.cache.names import CopySpec
    from tiercache.cache.session import CacheSession, WriteSession
    from tiercache.model import ShardIdentity


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached copy, whole or partial.

    Attributes:
        name: Name of the copy, a hash.
        source: URL without credentials, "" if unknown.
        n_bytes: Bytes that the copy takes of the size limit.
        pinned: Whether the copy is pinned.
        uses: Number of recorded uses.
        last_use: Sequence number of the last use, not a time.
        dataset_id: Identifier of the data set; None for an object of no data set.
        shard_id: Identifier of the shard; None for an object of no data set.
        used_s: Time of the last read or write in seconds since 1970, as the file system records it (see
            Folder.touched_s).
        in_part: Whether the copy is partial.
    """

    name: str
    source: str
    n_bytes: int
    pinned: bool
    uses: int
    last_use: int
    dataset_id: str | None = None
    shard_id: str | None = None
    used_s: float = 0.0
    in_part: bool = False


Selection: TypeAlias = Iterable[str] | Callable[[Entry], bool] | None


def entries(opened: CacheSession) -> list[Entry]:
    """Return all copies, whole and partial, least recently used first."""
    if opened.writing is None:
        rows = [
            CopyRow(name, charge, _record(opened, name), 0, 0) for name, charge in sorted(opened.folder.sizes().items())
        ]
    else:
        opened.writing.evictor.flush_uses()
        rows = opened.writing.accounts.rows()
    whole, parts = frozenset(opened.folder.names("")), frozenset(opened.folder.names(".part"))
    rows = [row for row in rows if row.name in whole or row.name in parts]
    return [_entry(opened, row, in_part=row.name not in whole) for row in rows]


def _record(opened: CacheSession, name: str) -> str:
    record = opened.folder.read_record(name)
    return "" if record is None else record.to_json()


def _entry(opened: CacheSession, row: CopyRow, *, in_part: bool) -> Entry:
    record = Record.from_json(row.record)
    entry = Entry(row.name, "", row.charge_bytes, opened.folder.is_pinned(row.name), row.uses, row.last_use)
    entry = replace(entry, used_s=opened.folder.touched_s(row.name), in_part=in_part)
    if record is None:
        return entry
    return replace(entry, source=record.source, dataset_id=record.dataset_id, shard_id=record.shard_id)


def selected(opened: CacheSession, selection: Selection) -> list[Entry]:
    """Return the entries that a selection names."""
    everything = entries(opened)
    if selection is None:
        return everything
    if callable(selection):
        return [entry for entry in everything if selection(entry)]
    names = set(selection)
    return [entry for entry in everything if entry.name in names]


def writable(opened: CacheSession) -> WriteSession:
    """Return the parts that change the cache.

    Raises:
        TierCacheError: The cache is read-only.
    """
    if opened.writing is None:
        raise TierCacheError(f"cache {opened.folder.root}: cannot be written", path=str(opened.folder.root))
    return opened.writing


def evict(opened: CacheSession, selection: Selection, target_bytes: int | None = None) -> int:
    """Delete copies, least recently used first, until the cache uses at most target_bytes; return the bytes freed."""
    chosen = selected(opened, selection)
    freed_bytes = _evict_without_books(opened, chosen, target_bytes or 0)
    if opened.waits_for_disk_space:
        return freed_bytes
    writing, names = writable(opened), {entry.name for entry in chosen}
    rows = [row for row in writing.accounts.rows() if row.name in names]
    need_bytes = math.inf if target_bytes is None else writing.accounts.sums()[0] - target_bytes
    return freed_bytes + (writing.evictor.evict(rows, need_bytes=need_bytes) if need_bytes > 0 else 0)


def _evict_without_books(opened: CacheSession, chosen: Sequence[Entry], target_bytes: int) -> int:
    """Delete copies while the disk is too full to open the accounts; return the bytes freed."""
    used_bytes, freed_bytes = sum(opened.folder.sizes().values()) if opened.waits_for_disk_space else 0, 0
    for entry in chosen:
        if not opened.waits_for_disk_space or used_bytes - freed_bytes <= target_bytes:
            break
        if entry.source and delete_copy(opened.folder, entry.name):
            freed_bytes += entry.n_bytes
            opened.retry_writing()
    return freed_bytes


def drop_objects(opened: CacheSession, sources: Sequence[str]) -> None:
    """Delete the copies of objects without identity at these URLs and below.

    A copy that is being read stays for now.
    """
    if opened.writing is None or not sources:
        return
    # One query for all URLs: the accounts are searched for their common prefix, as JSON encodes it.
    common = json.dumps(os.path.commonprefix(list(sources)))[1:-1]  # noqa: RUF071 - of strings, not of paths
    rows = [(row, Record.from_json(row.record)) for row in opened.writing.accounts.rows_with(common)]
    exact, below = set(sources), tuple(f"{source}/" for source in sources)

    def is_gone(record: Record | None) -> bool:
        if record is None or record.shard_id:
            return False
        return record.source in exact or record.source.startswith(below)

    opened.writing.evictor.evict(row for row, record in rows if is_gone(record))


def pin(opened: CacheSession, store: CachedStore, pairs: Sequence[tuple[str, ShardIdentity | None]]) -> None:
    """Pin copies that were just fetched."""
    writable(opened)
    for key, identity in pairs:
        wanted = store.wanted(key, identity)
        # The reader's lock settles the race with an evictor: the evictor sees the pin, or it took the copy before this
        # lock.
        lease = None if wanted is None else opened.hit(wanted.name, wanted.n_bytes)
        if wanted is None or lease is None:
            raise StoreError("evicted before it could be pinned", url=f"{store.url}/{key}", retryable=True)
        with lease:
            opened.folder.pin(wanted.name)


def unpin(opened: CacheSession, selection: Selection) -> int:
    """Unpin copies and return how many were pinned."""
    writable(opened)
    n_unpinned = sum(opened.folder.unpin(entry.name) for entry in selected(opened, selection) if entry.pinned)
    if selection is None:
        for name in opened.folder.names(".pin"):  # of corrupt copies that are not fetched again yet
            opened.folder.unpin(name)
    return n_unpinned


def stats(opened: CacheSession, limit_bytes: int) -> dict[str, int]:
    """Return the values of Cache.stats."""
    if opened.writing is not None:
        with suppress(OSError):  # the folder was deleted; a folder that cannot be recreated holds nothing
            opened.writing.owners.ensure()
    used, _, limit = (0, 0, limit_bytes) if opened.writing is None else opened.writing.accounts.sums()
    if opened.writing is None:
        used = sum(opened.folder.sizes().values())
    sizes = opened.folder.sizes()
    pinned = sum(sizes[name] for name in opened.folder.names(".pin") if name in sizes)
    counts = {name: int(n) for name, n in opened.counters.snapshot().items()}
    return {"bytes_used": used, "limit_bytes": limit, "pinned_bytes": pinned} | counts


def status(opened: CacheSession, limit_bytes: int) -> dict[str, Any]:
    """Return stats() and the state of the folder and the disk. See Cache.status."""
    figures = stats(opened, limit_bytes)  # first, because it recreates a deleted folder
    disk = room(opened.folder.root)
    writing, folder = opened.writing, opened.folder
    n_copies = len(folder.names(""))
    return (
        figures
        | {
            "n_copies": n_copies,
            "n_parts": len(folder.sizes()) - n_copies,
            "reserved_bytes": 0 if writing is None else writing.accounts.sums()[1],
            "disk_free_bytes": disk.free_bytes,
            "disk_total_bytes": disk.total_bytes,
            "network_file_system": folder.network,
            "writable": writing is not None,
            "bypassed": writing is not None and writing.breaker.is_open,
            "holders": [asdict(holder) for holder in holders(opened)],
            "plans": [] if writing is None else writing.plans.labels(),
            "poisoned_now": {name: asdict(one) for name, one in corrupt_sources(folder).items()},
        }
        | _of_all(opened)
    )


def _of_all(opened: CacheSession) -> dict[str, Any]:
    """Return the counters of all processes since the catalog was created."""
    if opened.writing is not None:
        opened.writing.evictor.flush_uses()
    figures = {} if opened.writing is None else opened.writing.accounts.figures()
    n_hits, n_misses = figures.get("hits", 0), figures.get("misses", 0)
    return {"figures": figures, "hit_ratio": n_hits / (n_hits + n_misses) if n_hits + n_misses else None}


def holders(opened: CacheSession) -> list[Holder]:
    """Return the processes that have the cache open or read copies, by process number.

    The copies that each process holds are known only if the system lists locks and the process that locked a copy still
    runs.
    """
    folder = opened.folder
    inodes = {}
    for name in folder.sizes():
        with suppress(OSError):
            inodes[name] = _inode(folder, name)
    found = {holder.pid: holder for holder in holders_of(folder.copies, inodes)}
    if opened.writing is not None:
        for owner in [Owner.parse(text) for text in opened.writing.owners.limits()]:
            if owner is not None and owner.runs():
                found.setdefault(owner.pid, Holder(owner.pid, command_of(owner.pid)))
    return [found[pid] for pid in sorted(found)]


def _inode(folder: Folder, name: str) -> int:
    try:
        return os.lstat(folder.copy_path(name)).st_ino
    except FileNotFoundError:
        return os.lstat(folder.copy_path(f"{name}.part")).st_ino


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
        f"disk has {format_bytes(max(writing.evictor.spare_bytes(), 0))} above min_free; evict or unpin copies, "
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
