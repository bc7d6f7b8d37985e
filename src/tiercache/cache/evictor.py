"""`Evictor`: reserves space before a byte is fetched, and evicts the copies that the policy chooses.

`AccountsMirror` keeps the accounts in memory as arrays; each update fetches only what has changed.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.accounts import FIGURES, Accounts, CopyRow
from tiercache.cache.disk import disk_space, is_disk_full
from tiercache.cache.locks import NameLock, try_exclusive
from tiercache.cache.names import NameTable
from tiercache.cache.policy import (
    BEFORE_ALL_USES,
    POLICIES,
    UNPLANNED,
    CopyTable,
    Decision,
    Policy,
    SpaceRequest,
    lru,
    may_be_evicted_for,
    replaces,
)
from tiercache.crash_points import crash_point
from tiercache.model import parse_bytes
from tiercache.store.private_files import open_file
from tiercache.waiting import SYSTEM_CLOCK, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Set

    from numpy.typing import NDArray

    from tiercache.cache.folder import Folder
    from tiercache.cache.reading_plans import ReadingPlans, Uses
    from tiercache.stats import Counters


_ROW = np.dtype(
    [
        ("charge_bytes", np.int64),
        ("last_use", np.int64),
        ("main", np.bool_),
        ("freq", np.int64),
        ("turn", np.int64),
        ("recorded", np.bool_),
    ]
)


class AccountsMirror:
    """The accounts in memory, updated by changes. Only one caller at a time; the lock of the evictor ensures that.

    Attributes:
        names: Names of the copies, sorted; the same object as before if no copy came or went.
        rows: The accounts of each copy; `recorded`: whether its source is known. The rest is as in policy.CopyTable.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._since = ("", 0)
        self.names, self.rows = NameTable.of_texts(()), np.empty(0, _ROW)
        self.has_evicted, self.limit_bytes = False, 0

    def update(self) -> None:
        """Fetch the changes: one short transaction, and a millisecond if one of 25,000 copies changed."""
        changes = self._accounts.changes(self._since)
        if changes.whole:
            self.names, self.rows = NameTable.of_texts(()), np.empty(0, _ROW)
        if changes.gone:
            stay = ~self.mask_of(changes.gone)
            if not stay.all():
                self.names, self.rows = self.names.take(stay), self.rows[stay]
        if changes.rows:
            self._set(changes.rows)
        self._since, self.has_evicted, self.limit_bytes = changes.since, changes.has_evicted, changes.limit_bytes

    def mask_of(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Return a mask of the copies with one of these names, which are given as 40 hexadecimal digits: bool[n]."""
        mask = np.zeros(len(self.names), np.bool_)
        rows = self.names.rows_of(NameTable.of_texts(texts))
        mask[rows[rows >= 0]] = True
        return mask

    def _set(self, changed: Sequence[CopyRow]) -> None:
        names, rows = NameTable.of_texts(row.name for row in changed), np.empty(len(changed), _ROW)
        rows[:] = [(r.charge_bytes, r.last_use, bool(r.main), r.freq, r.turn, r.record != "") for r in changed]
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
# A leased copy cannot be evicted, and the policy does not know about leases. No copy is tried twice (20 us each), but a
# round reads the accounts and the plans (1 to 3 ms), so each round goes WIDER times further down the list: three rounds
# try a hundred leased copies, five try 65,536. The first round does not try all copies: if only one of 25,000 is
# leased, the next 16 are enough.
MAX_ROUNDS = 7
WIDER = 16
# lru and s3fifo free some space in advance; plan frees exactly what is needed, because all its copies will be needed.
WATERMARK_SHARE = 0.01
# A copy that was fetched for a use within this share of the limit (in bytes of the job's reading) is not evicted.
# Loaders prefetch four shards; the whole cache must not be kept for them.
SOON_SHARE = 0.25
# At most this share of the limit is kept for uses that come soon. Otherwise, many jobs, or stalled ones, could keep the
# whole cache: no new copy would fit, and a smaller limit could not be enforced.
PROTECTED_SHARE = 0.5
# Copies that were deleted by hand, or by a process that died before it updated the accounts, leave the accounts too
# high. The folder is scanned again before space is refused, but at most this often: a full cache refuses often, and a
# scan takes milliseconds.
RECONCILE_INTERVAL_S = 60.0
# Freeing space takes milliseconds; a process that cannot get the lock in this time continues without it.
SPACE_WAIT_S = 10.0
# A process that holds the lock for longer was stopped (SIGSTOP, a paused container): for this time nobody waits for it.
STOPPED_S = 60.0


class Evictor:
    """Reserves space and deletes copies. Safe from any thread.

    One lock guards the uses that are not written to the accounts yet, one the accounts in memory; the third is held
    while reserve() frees space, including while files are deleted.
    """

    def __init__(
        self,
        folder: Folder,
        accounts: Accounts,
        counters: Counters,
        plans: ReadingPlans,
        *,
        policy: str,
        min_free: int | str,
    ) -> None:
        """Create an evictor. policy: A key of POLICIES. min_free: Disk space that stays free, in bytes or as "5%"."""
        self._folder, self._accounts, self._counters, self._plans = folder, accounts, counters, plans
        self._policy, self._min_free = POLICIES[policy], min_free
        self._evicts, self._uses_plans = replaces(policy), policy == "plan"
        self._uses_lock, self._mirror_lock, self._space_lock = Lock(), Lock(), Lock()
        self._uses: dict[str, int] = {}
        self._reported = counters.snapshot()
        self._mirror = AccountsMirror(accounts)
        self._pins: set[str] | None = None
        self._reconciled_s = self._waits_again_s = SYSTEM_CLOCK.monotonic()

    # -- uses -------------------------------------------------------------------------------------------------------

    def note_use(self, name: str, n: int = 1) -> int:
        """Record a use, in order; return the number of copies whose uses are not written to the accounts yet.

        n is 0 if the copy was fetched for this very use. The simulator and the authors of S3-FIFO count such a use as a
        miss: it updates the time of use, but not the frequency.
        """
        with self._uses_lock:
            self._uses[name] = self._uses.pop(name, 0) + n
            return len(self._uses)

    def flush_uses(self) -> None:
        """Write the recorded uses and counters to the accounts.

        On a full disk they are lost, so that eviction can continue.
        """
        with self._uses_lock:
            uses, self._uses = self._uses, {}
            counts, before = self._counters.snapshot(), self._reported
            self._reported = counts
        figures = {name: int(counts.get(name, 0) - before.get(name, 0)) for name in FIGURES}
        try:
            if uses:
                self._accounts.add_uses(uses)
            if any(figures.values()):
                self._accounts.add_figures(figures)
        except OSError as error:
            if not is_disk_full(error):
                raise

    # -- space ---------------------------------------------------------------------------------------------------------

    def usable_bytes(self) -> int:
        """Return the free disk space above the reserve; at most 0 if the disk can take no more files.

        Eviction frees files too.
        """
        disk = disk_space(self._folder.root)
        usable_bytes = disk.free_bytes - parse_bytes(self._min_free, whole_bytes=disk.total_bytes)
        if disk.n_free_files is not None and disk.n_free_files < MIN_FREE_FILES:
            return min(usable_bytes, 0)
        return usable_bytes

    def lack_bytes(self, charge_bytes: int) -> int:
        """Return how many bytes must be evicted before charge_bytes can be reserved; 0 or less: none."""
        return self._accounts.lack_bytes(charge_bytes, usable_bytes=self.usable_bytes)

    def freeable_bytes(self, requested: Set[str]) -> int:
        """Return the most bytes that the policy could evict for copies of these names, other than those copies."""
        if not self._evicts:
            return 0
        with self._mirror_lock:
            _, copies, new = self._read_state(requested, requested)
        if not self._uses_plans:
            return int(copies.charge_bytes[~copies.keep].sum())
        of_planned = np.where(new.next_use == UNPLANNED, UNPLANNED, new.use_after_next)
        use_after_next = int(of_planned.min(initial=UNPLANNED))
        next_use, n_bytes = (c[~copies.keep].tolist() for c in (copies.next_use, copies.charge_bytes))
        held = zip(n_bytes, next_use, strict=True)
        return sum(n for n, use in held if use > 0 and may_be_evicted_for(use, use_after_next))

    def would_refuse(self, name: str, charge_bytes: int) -> bool:
        """Return whether a reservation would certainly fail.

        That is the case if the policy frees too little, and no process is fetching this copy.
        """
        if self.lack_bytes(charge_bytes) <= 0 or (self._reconcile() and self.lack_bytes(charge_bytes) <= 0):
            return False
        if self._accounts.is_reserved(name):
            return False
        return not self._evicts or not self._decide(name, SpaceRequest(self.lack_bytes(charge_bytes)), {name})[2].admit

    def _reconcile(self) -> bool:
        """Make the accounts agree with the files, unless that was done recently."""
        now_s = SYSTEM_CLOCK.monotonic()
        if now_s - self._reconciled_s < RECONCILE_INTERVAL_S:
            return False
        self._reconciled_s = now_s
        self._accounts.reconcile()
        return True

    def reserve(self, name: str, charge_bytes: int, *, protected: Set[str] = frozenset()) -> bool:
        """Reserve space for a copy; evict what the policy chooses, except the names in protected.

        Return False if there is no space.
        """
        if self._accounts.reserve(name, charge_bytes, usable_bytes=self.usable_bytes):
            return True
        self._reconcile()
        excluded, wider = {name, *protected}, 1
        with self._making_space():
            for _ in range(MAX_ROUNDS):
                if self._accounts.reserve(name, charge_bytes, usable_bytes=self.usable_bytes):
                    return True
                lack_bytes = self.lack_bytes(charge_bytes)  # none, if another process has just freed space
                if lack_bytes > 0 and not self._free(name, lack_bytes, excluded, wider):
                    return False
                wider *= WIDER
            return self._accounts.reserve(name, charge_bytes, usable_bytes=self.usable_bytes)

    def note_fetch(self, name: str) -> None:
        """Count a fetch of a copy that was evicted recently."""
        if self._accounts.is_ghost(name):
            self._counters.add("evicted_early")

    @contextmanager
    def _making_space(self) -> Iterator[bool]:
        """Let one caller at a time free space, here and in other processes; yield whether the caller is the only one.

        Two callers would choose the same victims, and one would find none left. After a long wait, a caller continues
        without the lock.
        """
        lock = NameLock(self._folder.locks / "room")
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
        if self._evicts:
            with self._making_space():
                self._free("", charge_bytes, set(protected), 1)

    def shrink(self) -> None:
        """Evict until the cache fits a smaller limit, with any policy, as far as copies can be evicted."""
        if self._over_bytes() <= 0:
            return
        policy, wider = self._policy if self._evicts else lru, 1
        excluded: set[str] = set()
        with self._making_space() as is_alone:
            while (need_bytes := self._over_bytes()) > 0:
                request = SpaceRequest(0, need_bytes * wider, BEFORE_ALL_USES)
                stayed = self._carry_out(*self._decide("", request, excluded, policy), need_bytes)
                # If every chosen copy was deleted, that is enough, or there are no more. And a copy that another
                # process is deleting looks like one in use, and stays in the accounts until that process is done.
                if not stayed or not is_alone:
                    return
                excluded |= stayed
                wider *= WIDER

    def _over_bytes(self) -> int:
        used, reserved, limit_bytes = self._accounts.sums()
        return used + reserved - limit_bytes

    # -- deciding ---------------------------------------------------------------------------------------------------

    def _free(self, name: str, need_bytes: int, excluded: set[str], wider: int) -> bool:
        """Evict need_bytes for a copy; add copies that turn out to be in use to excluded.

        Return False if there is nothing to try.

        Nothing is deleted if need_bytes cannot be reached.
        """
        until = need_bytes
        if not self._uses_plans:
            until += int(self._accounts.limit_bytes() * WATERMARK_SHARE)
        names, copies, decision = self._decide(name, SpaceRequest(need_bytes, max(until, need_bytes * wider)), excluded)
        if decision.admit:
            excluded |= self._carry_out(names, copies, decision, until)
        return bool(decision.victims)

    def _decide(
        self, name: str, request: SpaceRequest, excluded: Set[str], policy: Policy | None = None
    ) -> tuple[NameTable, CopyTable, Decision]:
        """Return the policy's decision about space for a copy; the name "" stands for no copy in particular."""
        with self._mirror_lock:
            names, copies, new = self._read_state(excluded, [name] if name else [])
            if name:
                use_after_next = UNPLANNED if new.next_use[0] == UNPLANNED else int(new.use_after_next[0])
                request = replace(request, use_after_next=use_after_next)
            return names, copies, (policy or self._policy)(copies, request)

    def _read_state(self, excluded: Iterable[str], requested: Iterable[str]) -> tuple[NameTable, CopyTable, Uses]:
        """Return the names of all copies, the snapshot for the policy, and the next uses of the requested names."""
        self.flush_uses()
        mirror = self._mirror
        mirror.update()
        columns = {name: np.ascontiguousarray(mirror.rows[name]) for name in _ROW.names or ()}
        keep = mirror.mask_of([*excluded, *self._pinned()]) | ~columns.pop("recorded")
        (next_use, _), uses = self._plans.uses(mirror.names, NameTable.of_texts(requested))
        copies = CopyTable(
            **columns,
            keep=keep,
            next_use=next_use,
            limit_bytes=mirror.limit_bytes,
            has_evicted=mirror.has_evicted,
        )
        if not self._uses_plans:
            keep |= _needed_soon(copies)
        return mirror.names, copies, uses

    def _pinned(self) -> set[str]:
        """Return the names of pinned copies. A new pin of another process is noticed when its copy would be deleted."""
        if self._pins is None:
            self._pins = set(self._folder.names(".pin"))
        self._pins = {name for name in self._pins if self._folder.is_pinned(name)}
        return self._pins

    def _carry_out(self, names: NameTable, copies: CopyTable, decision: Decision, until_bytes: int) -> set[str]:
        """Evict the chosen victims until enough space is free; return those that could not be deleted."""
        rows = list(decision.victims)
        victims, sizes = [names.text(row) for row in rows], copies.charge_bytes[rows].tolist()
        tried: list[str] = []
        gone = self._delete_until(zip(victims, sizes, strict=True), until_bytes, tried)
        stayed = set(tried) - set(gone)
        moves = [(names.text(m.row), m.main, m.freq) for m in decision.moves if m.n_before < len(tried)]
        # A copy in use goes to the end of its queue: at the head, it would be tried again every time.
        queues = zip(victims, copies.main[rows].tolist(), copies.freq[rows].tolist(), strict=True)
        place = {name: (main, freq) for name, main, freq in [*queues, *moves] if name in stayed}
        held = [(name, *at) for name, at in place.items() if not self._folder.is_pinned(name)]
        if self._policy is not lru and (moves or held):
            self._accounts.requeue([*moves, *held])
        if self._pins is not None:
            # A new set: another thread may be iterating over the old one.
            self._pins = self._pins | {name for name in stayed if self._folder.is_pinned(name)}
        self._remove_rows(gone, evicted=True)
        return stayed

    # -- deleting ---------------------------------------------------------------------------------------------------

    def evict(self, rows: Iterable[CopyRow], *, need_bytes: float = math.inf) -> int:
        """Delete these copies, in order, until need_bytes are free; return the bytes freed.

        A copy is skipped if it is pinned, leased, being fetched, or has no recorded source.
        """
        charges = {row.name: row.charge_bytes for row in rows if row.record}
        gone = self._delete_until(charges.items(), need_bytes, [])
        self._remove_rows(gone, evicted=False)
        return sum(charges[name] for name in gone)

    def _delete_until(self, charges: Iterable[tuple[str, int]], need_bytes: float, tried: list[str]) -> list[str]:
        """Delete copies, in order, until need_bytes are free; return those deleted, and add all tried ones to tried."""
        gone, freed_bytes = [], 0
        for name, charge_bytes in charges:
            if freed_bytes >= need_bytes:
                break
            tried.append(name)
            if delete_copy(self._folder, name):
                gone.append(name)
                freed_bytes += charge_bytes
        return gone

    def _remove_rows(self, gone: list[str], *, evicted: bool) -> None:
        if gone:
            crash_point("evict.deleted")
            try:
                self._accounts.remove(gone, evicted=evicted)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self._reconciled_s = -math.inf  # the accounts stay too high: reconcile them as soon as possible
            self._counters.add("evicted", len(gone))
            crash_point("evict.booked")


def _needed_soon(copies: CopyTable) -> NDArray[np.bool_]:
    """Return a mask of the copies that a live plan reads now, and of those fetched for a use that comes soon: bool[n].

    Copies with the nearest uses are preferred, up to PROTECTED_SHARE. The mask is for policies that do not use plans. A
    loader prefetches, and its copies have no reader yet: of two concurrent jobs, each evicted what the other had
    prefetched, and both fetched it twice (docs/design/eviction.md).
    """
    next_use, limit_bytes = copies.next_use, copies.limit_bytes
    is_fresh = copies.last_use == copies.turn  # not used and not requeued since it came
    mask: NDArray[np.bool_] = (next_use == 0) | (is_fresh & (next_use <= limit_bytes * SOON_SHARE))
    rows = np.flatnonzero(mask)
    rows = rows[np.argsort(next_use[rows], kind="stable")]
    mask[rows[np.cumsum(copies.charge_bytes[rows]) > limit_bytes * PROTECTED_SHARE]] = False
    return mask


def delete_copy(folder: Folder, name: str) -> bool:
    """Delete a copy, whole or partial, unless it is in use; the caller updates the accounts.

    The lock of the name is held, so that no fetch publishes the copy between the check and the deletion.
    """
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
    """Return whether a copy is in use.

    It takes 20 us; creating a lock file takes 1 ms, and thousands of copies may be in use.
    """
    for file in (name, f"{name}.part"):
        with suppress(OSError):
            fd = open_file(folder.copy_path(file), os.O_RDONLY)
            try:
                return not try_exclusive(fd)
            finally:
                os.close(fd)
    return False
