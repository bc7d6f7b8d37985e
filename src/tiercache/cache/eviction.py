"""Eviction: the policies, a simulator that calls them, and `Evictor`, which reserves space before a byte is fetched.

A policy is a pure function. `plan` evicts copies that no reading plan names, least recently used first, and then the
copy with the furthest next use; it does not admit a copy that is needed later still (L. A. Belady, "A study of
replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966, with bypass). `lru` evicts the
least recently used copy.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache.cache.accounts import FIGURES, Accounts
from tiercache.cache.copy_file import charge_of, keep_right_sections
from tiercache.cache.folder import DiskSpace, Folder, NameLock, disk_space, try_exclusive
from tiercache.cache.names import CopySpec, NameTable
from tiercache.cache.reading_plans import UNPLANNED, ReadingPlans, Uses
from tiercache.crash_points import crash_point
from tiercache.model import NEVER, format_bytes, parse_bytes
from tiercache.stats import Counters
from tiercache.store.shared_files import open_file
from tiercache.waiting import SYSTEM_CLOCK, wait_for

# -- policies ----------------------------------------------------------------------------------------------------------

# Second next use of a new copy that comes before every use, so that `plan` may evict any copy that is not in use.
BEFORE_ALL_USES = -1


@dataclass(frozen=True, slots=True, eq=False)
class CopyTable:
    """The copies as a policy sees them: row i of every array is one copy.

    Attributes:
        last_use: Sequence number of the last use; no two are equal.
        keep: Whether the copy must not be evicted: it is pinned, or wanted by the requester.
        next_use: Bytes that a job reads before the next use; 0: in use; UNPLANNED: no plan names the copy.
    """

    charge_bytes: NDArray[np.int64]
    last_use: NDArray[np.int64]
    keep: NDArray[np.bool_]
    next_use: NDArray[np.int64]


Policy: TypeAlias = Callable[[CopyTable, int], tuple[NDArray[np.bool_], tuple[NDArray[np.int64], ...]]]
"""Function that returns which copies may be evicted, and sort keys of their order, the last key first (np.lexsort).

Its second argument is the number of bytes that a job reads before the second next use of the new copy; NEVER: no plan
contains that use; UNPLANNED: no plan names the new copy; BEFORE_ALL_USES: space is needed for no copy in particular.
"""


def lru(copies: CopyTable, _use_after_next: int) -> tuple[NDArray[np.bool_], tuple[NDArray[np.int64], ...]]:
    return ~copies.keep, (copies.last_use,)


def plan(copies: CopyTable, use_after_next: int) -> tuple[NDArray[np.bool_], tuple[NDArray[np.int64], ...]]:
    """Evict the copy with the furthest next use first, unless it is in use or needed before the new one."""
    later = (copies.next_use > use_after_next) & (copies.next_use > 0)
    return ~copies.keep & (later | (copies.next_use == UNPLANNED)), (copies.last_use, -copies.next_use)


POLICIES: dict[str, Policy] = {"plan": plan, "lru": lru}


def choose_victims(
    policy: Policy, copies: CopyTable, need_bytes: int, *, want_bytes: int = 0, use_after_next: int = UNPLANNED
) -> NDArray[np.int64] | None:
    """Return the rows to evict, in order, for want_bytes if there are so many; None: fewer than need_bytes may go."""
    want_bytes = max(need_bytes, want_bytes)
    may_go, keys = policy(copies, use_after_next)
    rows = np.flatnonzero(may_go)
    if want_bytes <= 0:
        return rows[:0]
    if int(copies.charge_bytes[rows].sum()) < need_bytes:
        return None
    rows = rows[np.lexsort([key[rows] for key in keys])]
    n_victims = int(np.searchsorted(np.cumsum(copies.charge_bytes[rows]), want_bytes)) + 1
    return rows[:n_victims]


# -- simulator ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Accesses in order, int64[k] each. clock: Bytes that the job had read before."""

    names: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    job: NDArray[np.int64]
    clock: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)


def next_positions(names: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(names, kind="stable")
    after = np.full(len(names), NEVER, np.int64)
    same = names[order[1:]] == names[order[:-1]]
    after[order[:-1][same]] = order[1:][same]
    return after


class _Uses:
    """The next use of each object by each of several jobs, measured by the clock of the job."""

    def __init__(self, trace: Trace, row_of: NDArray[np.int64], n_rows: int) -> None:
        _, job_of = np.unique(trace.job, return_inverse=True)
        n_jobs = int(job_of.max(initial=-1)) + 1
        self._job, self._row, self._clock = job_of.tolist(), row_of.tolist(), trace.clock.tolist()
        self._next_at = next_positions(job_of * n_rows + row_of).tolist()
        self._next = np.full((n_jobs, n_rows), NEVER, np.int64)
        # In reverse order, so that the first use of each object is the one that remains.
        self._next[job_of[::-1], row_of[::-1]] = trace.clock[::-1]
        self._now = np.zeros(n_jobs, np.int64)

    def read(self, i: int) -> None:
        job, at = self._job[i], self._next_at[i]
        self._now[job] = self._clock[i]
        self._next[job, self._row[i]] = NEVER if at == NEVER else self._clock[at]

    def next_use(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes that a job reads before it needs each object, the nearest job counting: int64[len(rows)]."""
        later = self._next[:, rows]
        left = np.where(later == NEVER, NEVER, np.maximum(later - self._now[:, None], 1))
        nearest: NDArray[np.int64] = left.min(axis=0)
        return nearest


def simulate(trace: Trace, policy: str, size_bytes: int) -> NDArray[np.int64]:
    """Return the bytes of each access that a cache of size_bytes would serve, int64[k]. O(misses): 0.1 to 1 ms each."""
    names, row_of = np.unique(trace.names, return_inverse=True)
    uses = _Uses(trace, row_of, len(names))
    in_advance = int(size_bytes * WATERMARK_SHARE) if policy == "lru" else 0
    sizes, last_use = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    held = np.zeros(len(names), np.bool_)
    served = np.zeros(len(trace), np.int64)
    free = size_bytes
    for i, (row, n_bytes) in enumerate(zip(row_of.tolist(), trace.n_bytes.tolist(), strict=True)):
        uses.read(i)
        last_use[row] = i
        if held[row]:
            served[i] = n_bytes
            continue
        if n_bytes > free:
            rows = np.flatnonzero(held)
            copies = CopyTable(sizes[rows], last_use[rows], np.zeros(len(rows), np.bool_), uses.next_use(rows))
            chosen = choose_victims(
                POLICIES[policy],
                copies,
                n_bytes - free,
                want_bytes=n_bytes - free + in_advance,
                use_after_next=int(uses.next_use(np.array([row]))[0]),
            )
            if chosen is None or n_bytes > size_bytes:
                continue
            victims = rows[chosen]
            held[victims] = False
            free += int(sizes[victims].sum())
        held[row], sizes[row] = True, n_bytes
        free -= n_bytes
    return served


# -- evictor -----------------------------------------------------------------------------------------------------------

_ROW = np.dtype([("charge_bytes", np.int64), ("last_use", np.int64)])


class AccountsMirror:
    """The accounts in memory, updated by one caller at a time. names: Sorted; one object until they change."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._since = ("", 0)
        self.names, self.rows = NameTable.of_texts(()), np.empty(0, _ROW)

    def update(self) -> None:
        """Fetch the changes: one short transaction, and a millisecond if one of 25,000 copies changed."""
        self._since, is_whole, changed, gone = self._accounts.changes(self._since)
        if is_whole:
            self.names, self.rows = NameTable.of_texts(()), np.empty(0, _ROW)
        if gone:
            stay = ~self.mask_of(gone)
            self.names, self.rows = self.names.take(stay), self.rows[stay]
        if changed:
            rows = np.array([(row.charge_bytes, row.last_use) for row in changed], _ROW)
            self._set(NameTable.of_texts(row.name for row in changed), rows)

    def mask_of(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        mask = np.zeros(len(self.names), np.bool_)
        rows = self.names.rows_of(NameTable.of_texts(texts))
        mask[rows[rows >= 0]] = True
        return mask

    def _set(self, names: NameTable, rows: NDArray[np.void]) -> None:
        order = names.order()
        names, rows = names.take(order), rows[order]
        at = self.names.rows_of(names)
        is_known = at >= 0
        self.rows[at[is_known]] = rows[is_known]
        if not is_known.all():
            new = names.take(~is_known)
            places = self.names.places_of(new)
            self.names = self.names.insert(places, new)
            self.rows = np.insert(self.rows, places, rows[~is_known])


# Number of files that one more copy may need beside it (record, pin, lock file, SQLite's journal); the accounts do not
# count files.
MIN_FREE_FILES = 8
_NO_INODES = ("the disk has no free inodes: it holds as many files as it can, whatever bytes are free", "delete files")


def has_free_files(disk: DiskSpace) -> bool:
    return disk.n_free_files is None or disk.n_free_files >= MIN_FREE_FILES


# A leased copy cannot be evicted, and the policy does not know about leases. No copy is tried twice (20 us each), but a
# round reads the accounts and the plans (1 to 3 ms), so each round goes WIDER times further down the list: three rounds
# try a hundred leased copies, five try 65,536. The first round does not try all copies: if only one of 25,000 is
# leased, the next 16 are enough.
MAX_ROUNDS = 7
WIDER = 16
# lru frees some space in advance; plan frees exactly what is needed, because all its copies will be needed.
WATERMARK_SHARE = 0.01
# Freeing space takes milliseconds; a process that cannot get the lock in this time continues without it.
SPACE_WAIT_S = 10.0
# A process that holds the lock for longer was stopped (SIGSTOP, a paused container): for this time nobody waits for it.
STOPPED_S = 60.0


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
        with self._lock:
            self._datasets[dataset_id] = description

    def unwarned_dataset(self, dataset_id: str) -> str | None:
        with self._lock:
            return None if dataset_id in self._given else self._datasets.get(dataset_id)

    def warn(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self._given:
                return
            self._given.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class Evictor:
    """Reserves space, deletes copies, and says why there is no space. Safe from any thread.

    One lock guards the uses that are not written yet, one the accounts in memory; the third is held while reserve()
    frees space, including while files are deleted.
    """

    def __init__(
        self,
        folder: Folder,
        accounts: Accounts,
        counters: Counters,
        plans: ReadingPlans,
        notices: Notices,
        *,
        policy: str,
        min_free: int | str,
    ) -> None:
        self.folder, self.accounts, self.counters, self._plans, self._notices = (
            folder,
            accounts,
            counters,
            plans,
            notices,
        )
        self._policy, self._min_free = POLICIES[policy], min_free
        self._uses_lock, self._mirror_lock, self._space_lock = Lock(), Lock(), Lock()
        self._uses: dict[str, None] = {}
        self._reported = counters.snapshot()
        self._mirror = AccountsMirror(accounts)
        self._pins: set[str] | None = None
        self._waits_again_s = SYSTEM_CLOCK.monotonic()

    def note_use(self, name: str) -> int:
        with self._uses_lock:
            self._uses.pop(name, None)
            self._uses[name] = None
            return len(self._uses)

    def flush_uses(self) -> None:
        """Write the recorded uses and counters to the accounts."""
        with self._uses_lock:
            uses, self._uses = self._uses, {}
            counts, before = self.counters.snapshot(), self._reported
            self._reported = counts
        figures = {name: int(counts.get(name, 0) - before.get(name, 0)) for name in FIGURES}
        if uses:
            self.accounts.add_uses(uses)
        if any(figures.values()):
            self.accounts.add_figures(figures)

    # -- space ---------------------------------------------------------------------------------------------------------

    def usable_bytes(self) -> int:
        """Return the free disk space above the reserve; at most 0 if the disk can take no more files."""
        disk = disk_space(self.folder.root)
        usable_bytes = disk.free_bytes - parse_bytes(self._min_free, whole_bytes=disk.total_bytes)
        return usable_bytes if has_free_files(disk) else min(usable_bytes, 0)

    def lack_bytes(self, charge_bytes: int) -> int:
        return self.accounts.lack_bytes(charge_bytes, usable_bytes=self.usable_bytes)

    def would_refuse(self, name: str, charge_bytes: int) -> bool:
        """Return whether a reservation would certainly fail: the policy frees too little, and nobody fetches it now."""
        if self.lack_bytes(charge_bytes) <= 0:
            return False
        return not self.accounts.is_reserved(name) and (
            self._victims(name, self.lack_bytes(charge_bytes), {name}) is None
        )

    def reserve(self, name: str, charge_bytes: int, *, protected: Set[str] = frozenset()) -> bool:
        """Reserve space for a copy, and evict what the policy chooses except `protected`; False: there is none."""
        if self.accounts.reserve(name, charge_bytes, usable_bytes=self.usable_bytes):
            return True
        excluded, wider = {name, *protected}, 1
        with self._making_space():
            for _ in range(MAX_ROUNDS):
                if self.accounts.reserve(name, charge_bytes, usable_bytes=self.usable_bytes):
                    return True
                lack_bytes = self.lack_bytes(charge_bytes)  # none, if another process has just freed space
                if lack_bytes > 0 and not self._free(name, lack_bytes, excluded, wider):
                    return False
                wider *= WIDER
            return self.accounts.reserve(name, charge_bytes, usable_bytes=self.usable_bytes)

    @contextmanager
    def _making_space(self) -> Iterator[bool]:
        """Let one caller at a time free space, here and in other processes; yield whether it is the only one.

        Two would choose the same victims. After a long wait, a caller goes on without the lock.
        """
        lock = NameLock(self.folder.locks / "room")
        with self._space_lock:
            try:
                now_s = SYSTEM_CLOCK.monotonic()
                is_alone = wait_for(lock.try_acquire, SPACE_WAIT_S if now_s >= self._waits_again_s else 0.0)
                if not is_alone:
                    self._waits_again_s = now_s + SPACE_WAIT_S + STOPPED_S
                yield is_alone
            finally:
                lock.release()

    def free_disk(self, charge_bytes: int, *, protected: Set[str] = frozenset()) -> None:
        """Evict charge_bytes of copies that no plan names, whatever the accounts say: the disk itself is full."""
        with self._making_space():
            self._free("", charge_bytes, set(protected), 1)

    def shrink(self) -> None:
        if self._over_bytes() <= 0:
            return
        excluded: set[str] = set()
        wider = 1
        with self._making_space() as is_alone:
            while (need_bytes := self._over_bytes()) > 0:
                victims = self._victims("", 0, excluded, need_bytes * wider, BEFORE_ALL_USES) or {}
                stayed = self._carry_out(victims, need_bytes)
                # If every chosen copy was deleted, that is enough, or there are no more. And a copy that another
                # process is deleting looks like one in use, and stays in the accounts until that process is done.
                if not stayed or not is_alone:
                    return
                excluded |= stayed
                wider *= WIDER

    def _over_bytes(self) -> int:
        used, reserved, limit_bytes = self.accounts.sums()
        return used + reserved - limit_bytes

    # -- deciding ---------------------------------------------------------------------------------------------------

    def _free(self, name: str, need_bytes: int, excluded: set[str], wider: int) -> bool:
        """Evict need_bytes or nothing; copies that are in use are added to excluded. False: there is nothing to try."""
        until = need_bytes
        if self._policy is lru:
            until += int(self.accounts.limit_bytes() * WATERMARK_SHARE)
        victims = self._victims(name, need_bytes, excluded, max(until, need_bytes * wider))
        if not victims:
            return False
        excluded |= self._carry_out(victims, until)
        return True

    def _victims(
        self,
        name: str,
        need_bytes: int,
        excluded: Set[str],
        want_bytes: int = 0,
        use_after_next: int = UNPLANNED,
    ) -> dict[str, int] | None:
        """Return the charges of the victims by name, in order; None: too few may go. name "": for no certain copy."""
        with self._mirror_lock:
            names, copies, new = self._read_state(excluded, [name] if name else [])
            if name and new.next_use[0] != UNPLANNED:
                use_after_next = int(new.use_after_next[0])
            rows = choose_victims(
                self._policy, copies, need_bytes, want_bytes=want_bytes, use_after_next=use_after_next
            )
            if rows is None:
                return None
            return {names.text(row): int(copies.charge_bytes[row]) for row in rows.tolist()}

    def _read_state(self, excluded: Iterable[str], requested: Iterable[str]) -> tuple[NameTable, CopyTable, Uses]:
        self.flush_uses()
        mirror = self._mirror
        mirror.update()
        charge_bytes, last_use = (np.ascontiguousarray(mirror.rows[name]) for name in ("charge_bytes", "last_use"))
        keep = mirror.mask_of([*excluded, *self._pinned()])
        (next_use, _), uses = self._plans.uses(mirror.names, NameTable.of_texts(requested))
        return mirror.names, CopyTable(charge_bytes, last_use, keep, next_use), uses

    def _pinned(self) -> set[str]:
        if self._pins is None:
            self._pins = set(self.folder.names(".pin"))
        self._pins = {name for name in self._pins if self.folder.is_pinned(name)}
        return self._pins

    def _carry_out(self, victims: Mapping[str, int], until_bytes: int) -> set[str]:
        gone, stayed = self._delete_until(victims, until_bytes)
        if self._pins is not None:
            # A new set: another thread may be iterating over the old one.
            self._pins = self._pins | {name for name in stayed if self.folder.is_pinned(name)}
        for name in stayed:  # in use, so it is not the next to be tried again
            self.note_use(name)
        self._remove_rows(gone)
        return set(stayed)

    # -- messages ------------------------------------------------------------------------------------------------------

    def warn_full_disk(self) -> None:
        has_inodes = has_free_files(disk_space(self.folder.root))
        reason, remedy = ("the disk is full", "free disk space") if has_inodes else _NO_INODES
        self._notices.warn(
            "full",
            f"cache {self.folder.root}: {reason}; data that is not cached is fetched again in every epoch; {remedy}, "
            "or put the cache on another disk (TIERCACHE_CACHE_DIR)",
        )

    def warn_no_space(self, spec: CopySpec, need_bytes: int) -> None:
        """Warn once that an object has no space although its data set, which is open, could be cached as a whole."""
        dataset_id = "" if spec.identity is None else spec.identity.dataset_id
        dataset = self._notices.unwarned_dataset(dataset_id)
        if dataset is None:
            return
        used_bytes, reserved_bytes, limit_bytes = self.accounts.sums()
        usable_bytes = max(self.usable_bytes(), 0)
        if not has_free_files(disk_space(self.folder.root)):
            reason, remedy = _NO_INODES
            remedy += ", or put the cache on another disk (TIERCACHE_CACHE_DIR)"
        elif usable_bytes < need_bytes:
            reason = f"the disk has only {format_bytes(usable_bytes)} left above the cache's min_free"
            remedy = "free disk space, lower min_free=, or put the cache on another disk (TIERCACHE_CACHE_DIR)"
        else:
            used = f"{format_bytes(used_bytes + reserved_bytes)} of {format_bytes(limit_bytes)}"
            reason = f"{used} are used by copies that are pinned, in use or needed sooner"
            remedy = (
                "unpin or evict some of them (tiercache status lists them), or make the cache larger "
                "(TIERCACHE_CACHE_SIZE, or Cache(path, size=...))"
            )
        self._notices.warn(
            dataset_id,
            f"{dataset}: cache {self.folder.root} has no space: the next object needs {format_bytes(need_bytes)}, but "
            f"{reason}. Data that does not fit is not cached and is fetched again in every epoch; {remedy}",
        )

    # -- deleting ---------------------------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        self.folder.remove_copy(name)
        crash_point("corrupt.removed")
        self.accounts.remove([name])

    def remove_damage(self, name: str) -> None:
        """Make a damaged complete copy, whose lock is held, a partial one; or remove it if nothing of it is right."""
        record = self.folder.read_record(name)
        present = None if record is None else keep_right_sections(self.folder, record)
        if record is None or present is None:
            self.remove(name)
        else:
            self.accounts.set_charge(name, charge_of(present, record.n_bytes))
        self.counters.add("quarantined")

    def evict(self, charges: Mapping[str, int], *, need_bytes: float = math.inf) -> int:
        gone, _ = self._delete_until(charges, need_bytes)
        self._remove_rows(gone)
        return sum(charges[name] for name in gone)

    def _delete_until(self, charges: Mapping[str, int], need_bytes: float) -> tuple[list[str], list[str]]:
        gone: list[str] = []
        stayed: list[str] = []
        freed_bytes = 0
        for name, charge_bytes in charges.items():
            if freed_bytes >= need_bytes:
                break
            if delete_copy(self.folder, name):
                gone.append(name)
                freed_bytes += charge_bytes
            else:
                stayed.append(name)
        return gone, stayed

    def _remove_rows(self, gone: Sequence[str]) -> None:
        if gone:
            crash_point("evict.deleted")
            self.accounts.remove(gone)
            self.counters.add("evicted", len(gone))
            crash_point("evict.booked")


def delete_copy(folder: Folder, name: str) -> bool:
    """Delete a copy that is not in use, under the lock of its name, so that no fetch completes it meanwhile."""
    lock = NameLock(folder.locks / name)
    if _is_read(folder, name) or not lock.try_acquire():
        return False
    try:
        crash_point("evict.locked")
        fd = folder.open_copy(name)
        if fd is None:
            fd = folder.open_to_write(f"{name}.part")
        if fd is None:
            return folder.charge_of(name) is None  # deleted by hand: only the accounts must be updated
        try:
            # A pin is written under a reader's lock: after this lock, it is either visible or too late.
            if not try_exclusive(fd) or folder.is_pinned(name):
                return False
            folder.remove_copy(name)
            crash_point("evict.removed")
        finally:
            os.close(fd)
    finally:
        lock.release()
    return True


def _is_read(folder: Folder, name: str) -> bool:
    """Return whether a copy is in use: 20 us. Creating a lock file takes 1 ms, and thousands may be in use."""
    for file in (name, f"{name}.part"):
        with suppress(OSError):
            fd = open_file(folder.copy_path(file), os.O_RDONLY)
            try:
                return not try_exclusive(fd)
            finally:
                os.close(fd)
    return False
