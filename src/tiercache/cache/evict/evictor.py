"""`Evictor`: reserves space before a byte is fetched, and evicts the copies that the policy chooses.

`AccountsMirror` keeps the accounts in memory as arrays; each update fetches only what has changed.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.evict.policy import (
    POLICIES,
    UNPLANNED,
    Decision,
    Policy,
    Snapshot,
    SpaceRequest,
    lru,
    may_be_evicted_for,
    replaces,
)
from tiercache.cache.machine import NameLock, is_disk_full, room, try_exclusive
from tiercache.cache.names import Names
from tiercache.catalog import FIGURES, Accounts, CopyRow
from tiercache.catalog.database import open_file
from tiercache.crash_points import crash_point
from tiercache.model import parse_bytes
from tiercache.waiting import SYSTEM_CLOCK, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Set

    from numpy.typing import NDArray

    from tiercache.cache.evict.reading_plans import ReadingPlans, Uses
    from tiercache.cache.folder import Folder
    from tiercache.stats import Counters


_ROW = np.dtype(
    [
        ("charge_bytes", np.int64),
        ("last_use", np.int64),
        ("turn", np.int64),
        ("freq", np.int64),
        ("main", np.bool_),
        ("recorded", np.bool_),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class AccountsSnapshot:
    """All copies at one moment, sorted by name. Immutable.

    Attributes:
        names: Names of the copies; the same object as before if no copy came or went.
        recorded: Whether the source of the copy is known, bool[n]. The other columns are those of policy.Snapshot.
    """

    names: Names
    charge_bytes: NDArray[np.int64]
    last_use: NDArray[np.int64]
    turn: NDArray[np.int64]
    freq: NDArray[np.int64]
    main: NDArray[np.bool_]
    recorded: NDArray[np.bool_]
    has_evicted: bool
    limit_bytes: int

    def among(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Return a mask of the copies with one of these names, which are given as 40 hexadecimal digits: bool[n]."""
        mask = np.zeros(len(self.names), np.bool_)
        rows = self.names.rows_of(Names.of_texts(texts))
        mask[rows[rows >= 0]] = True
        return mask


class AccountsMirror:
    """The accounts in memory, updated by changes. Only one caller at a time; the lock of the evictor ensures that."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._since = ("", 0)
        self._names, self._rows = Names.of_texts(()), np.empty(0, _ROW)

    def look(self) -> AccountsSnapshot:
        """Return the accounts now: one short transaction, and a millisecond if one of 25,000 copies changed."""
        changes = self._accounts.changes(self._since)
        if changes.whole:
            self._names, self._rows = Names.of_texts(()), np.empty(0, _ROW)
        if changes.gone:
            self._drop([*changes.gone])
        if changes.rows:
            self._set(changes.rows)
        self._since = changes.since
        columns = {name: np.ascontiguousarray(self._rows[name]) for name in _ROW.names or ()}
        return AccountsSnapshot(
            self._names, **columns, has_evicted=changes.has_evicted, limit_bytes=changes.limit_bytes
        )

    def _drop(self, gone: Sequence[str]) -> None:
        rows = self._names.rows_of(Names.of_texts(gone))
        stay = np.ones(len(self._names), np.bool_)
        stay[rows[rows >= 0]] = False
        if not stay.all():
            self._names, self._rows = self._names.take(stay), self._rows[stay]

    def _set(self, changed: Sequence[CopyRow]) -> None:
        names, rows = Names.of_texts(row.name for row in changed), np.empty(len(changed), _ROW)
        rows[:] = [(r.charge_bytes, r.last_use, r.turn, r.freq, bool(r.main), r.record != "") for r in changed]
        order = names.order()
        names, rows = names.take(order), rows[order]
        at = self._names.rows_of(names)
        here = at >= 0
        self._rows[at[here]] = rows[here]
        if not here.all():
            new = names.take(~here)
            places = self._names.places_of(new)
            self._names = self._names.insert(places, new)
            self._rows = np.insert(self._rows, places, rows[~here])


# Number of files that one more copy may need beside it (record, pin, lock file, SQLite's journal); the accounts do not
# count files.
SPARE_FILES = 8
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
SPARED_SHARE = 0.5
# Copies that were deleted by hand, or by a process that died before it updated the accounts, leave the accounts too
# high. The folder is scanned again before space is refused, but at most this often: a full cache refuses often, and a
# scan takes milliseconds.
RECONCILE_INTERVAL_S = 60.0
# Freeing space takes milliseconds; a process that cannot get the lock in this time continues without it.
ROOM_WAIT_S = 10.0
# A process that holds the lock for longer was stopped (SIGSTOP, a paused container): for this time nobody waits for it.
STOPPED_S = 60.0


@dataclass(frozen=True, slots=True)
class EvictorOptions:
    """The settings of an evictor.

    Attributes:
        policy: Name of the policy, a key of POLICIES.
        min_free: Disk space that stays free, in bytes or as a share such as "5%".
    """

    policy: str
    min_free: int | str


class Evictor:
    """Reserves space and deletes copies. Safe from any thread.

    One lock guards the uses that are not written to the accounts yet, one the accounts in memory; the third is held
    while reserve() frees space, including while files are deleted.
    """

    def __init__(
        self, folder: Folder, accounts: Accounts, counters: Counters, plans: ReadingPlans, rules: EvictorOptions
    ) -> None:
        self._folder, self._accounts, self._counters, self._plans = folder, accounts, counters, plans
        self._rules, self._policy = rules, POLICIES[rules.policy]
        self._uses_lock, self._look_lock, self._room_lock = Lock(), Lock(), Lock()
        self._uses: dict[str, int] = {}
        self._booked = counters.snapshot()
        self._shelf = AccountsMirror(accounts)
        self._pins: set[str] | None = None
        self._looked_s = self._waits_again_s = SYSTEM_CLOCK.monotonic()

    # -- uses -------------------------------------------------------------------------------------------------------

    def note_use(self, name: str, n: int = 1) -> int:
        """Record a use, in order; return the number of copies whose uses are not written to the accounts yet.

        Args:
            name: Name of the copy.
            n: Number of uses; 0 if the copy was fetched for this very use. The simulator and the authors of S3-FIFO
                count such a use as a miss: it updates the time of use, but not the frequency.
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
            counts, before = self._counters.snapshot(), self._booked
            self._booked = counts
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

    def spare_bytes(self) -> int:
        """Return the free disk space above the reserve; at most 0 if the disk can take no more files.

        Eviction frees files too.
        """
        disk = room(self._folder.root)
        spare_bytes = disk.free_bytes - parse_bytes(self._rules.min_free, whole_bytes=disk.total_bytes)
        if disk.n_free_files is not None and disk.n_free_files < SPARE_FILES:
            return min(spare_bytes, 0)
        return spare_bytes

    def lack_bytes(self, charge_bytes: int) -> int:
        """Return how many bytes must be evicted before charge_bytes can be reserved; 0 or less: none."""
        return self._accounts.lack_bytes(charge_bytes, spare_bytes=self.spare_bytes)

    def freeable_bytes(self, wanted: Set[str]) -> int:
        """Return the most bytes that the policy could evict for copies of these names, other than those copies."""
        if not replaces(self._rules.policy):
            return 0
        with self._look_lock:
            _, copies, (coming, after) = self._look(wanted, wanted)
        if self._rules.policy != "plan":
            return int(copies.charge_bytes[~copies.keep].sum())
        then = int(np.where(coming == UNPLANNED, UNPLANNED, after).min(initial=UNPLANNED))
        next_use, n_bytes = (c[~copies.keep].tolist() for c in (copies.next_use, copies.charge_bytes))
        return sum(n for n, use in zip(n_bytes, next_use, strict=True) if use > 0 and may_be_evicted_for(use, then))

    def would_refuse(self, name: str, charge_bytes: int) -> bool:
        """Return whether a reservation would certainly fail.

        That is the case if the policy frees too little, and no process is fetching this copy.
        """
        if self._has_room(charge_bytes) or self._accounts.is_reserved(name):
            return False
        if not replaces(self._rules.policy):
            return True
        return not self._decide(name, SpaceRequest(self.lack_bytes(charge_bytes)), {name})[1].admit

    def _has_room(self, charge_bytes: int) -> bool:
        if self.lack_bytes(charge_bytes) <= 0:
            return True
        return self._look_again() and self.lack_bytes(charge_bytes) <= 0

    def _look_again(self) -> bool:
        """Make the accounts agree with the files, unless that was done recently."""
        now_s = SYSTEM_CLOCK.monotonic()
        if now_s - self._looked_s < RECONCILE_INTERVAL_S:
            return False
        self._looked_s = now_s
        self._accounts.reconcile()
        return True

    def reserve(self, name: str, charge_bytes: int, *, spare: Set[str] = frozenset()) -> bool:
        """Reserve space for a copy; evict what the policy chooses, except the names in spare.

        Return False if there is no space.
        """
        return self._reserve_here(name, charge_bytes) or self._reserve_by_force(name, charge_bytes, spare)

    def note_fetch(self, name: str) -> None:
        """Count a fetch of a copy that was evicted recently."""
        if self._accounts.is_ghost(name):
            self._counters.add("evicted_early")

    def _reserve_here(self, name: str, charge_bytes: int) -> bool:
        return self._accounts.reserve(name, charge_bytes, spare_bytes=self.spare_bytes)

    def _reserve_by_force(self, name: str, charge_bytes: int, spare: Set[str]) -> bool:
        self._look_again()
        kept, wider = {name, *spare}, 1
        with self._making_room():
            for _ in range(MAX_ROUNDS):
                if self._reserve_here(name, charge_bytes):
                    return True
                lack_bytes = self.lack_bytes(charge_bytes)  # none, if another process has just freed space
                if lack_bytes > 0 and not self._free(name, lack_bytes, kept, wider):
                    return False
                wider *= WIDER
            return self._reserve_here(name, charge_bytes)

    @contextmanager
    def _making_room(self) -> Iterator[bool]:
        """Let one caller at a time free space, here and in other processes; yield whether the caller is the only one.

        Two callers would choose the same victims, and one would find none left. After a long wait, a caller continues
        without the lock.
        """
        lock = NameLock(self._folder.locks / "room")
        with self._room_lock:
            try:
                now_s = SYSTEM_CLOCK.monotonic()
                is_alone = wait_for(lock.try_acquire, ROOM_WAIT_S if now_s >= self._waits_again_s else 0.0)
                if not is_alone:
                    self._waits_again_s = now_s + ROOM_WAIT_S + STOPPED_S
                yield is_alone
            finally:
                lock.release()

    def free_disk(self, charge_bytes: int, *, spare: Set[str] = frozenset()) -> None:
        """Evict charge_bytes of copies that no plan names, whatever the accounts say: the disk itself is full."""
        if replaces(self._rules.policy):
            with self._making_room():
                self._free("", charge_bytes, set(spare), 1)

    def shrink(self) -> None:
        """Evict until the cache fits a smaller limit, with any policy, as far as copies can be evicted."""
        if self._over_bytes() <= 0:
            return
        policy, wider = self._policy if replaces(self._rules.policy) else lru, 1
        kept: set[str] = set()
        with self._making_room() as is_alone:
            while (need_bytes := self._over_bytes()) > 0:
                books, decision = self._decide("", SpaceRequest(0, need_bytes * wider, then=-1), kept, policy)
                stayed = self._carry_out(books, decision, need_bytes)
                # If every chosen copy was deleted, that is enough, or there are no more. And a copy that another
                # process is deleting looks like one in use, and stays in the accounts until that process is done.
                if not stayed or not is_alone:
                    return
                kept |= stayed
                wider *= WIDER

    def _over_bytes(self) -> int:
        used, reserved, limit_bytes = self._accounts.sums()
        return used + reserved - limit_bytes

    # -- deciding ---------------------------------------------------------------------------------------------------

    def _free(self, name: str, need_bytes: int, kept: set[str], wider: int) -> bool:
        """Evict need_bytes for a copy; add copies that turn out to be in use to kept.

        Return False if there is nothing to try.

        Nothing is deleted if need_bytes cannot be reached.
        """
        until = need_bytes
        if self._rules.policy != "plan":
            until += int(self._accounts.limit_bytes() * WATERMARK_SHARE)
        books, decision = self._decide(name, SpaceRequest(need_bytes, max(until, need_bytes * wider)), kept)
        if decision.admit:
            kept |= self._carry_out(books, decision, until)
        return bool(decision.victims)

    def _decide(
        self, name: str, ask: SpaceRequest, kept: Set[str], policy: Policy | None = None
    ) -> tuple[AccountsSnapshot, Decision]:
        """Return the policy's decision about space for a copy; the name "" stands for no copy in particular."""
        with self._look_lock:
            books, copies, (coming, after) = self._look(kept, [name] if name else [])
            if name:
                ask = SpaceRequest(
                    ask.need_bytes, ask.want_bytes, UNPLANNED if coming[0] == UNPLANNED else int(after[0])
                )
            return books, (policy or self._policy)(copies, ask)

    def _look(self, kept: Iterable[str], wanted: Iterable[str]) -> tuple[AccountsSnapshot, Snapshot, Uses]:
        """Return the accounts, the snapshot for the policy, and the next uses of the names in wanted."""
        self.flush_uses()
        books = self._shelf.look()
        keep = books.among([*kept, *self._pinned()]) | ~books.recorded
        (next_use, _), uses = self._plans.uses(books.names, Names.of_texts(wanted))
        if self._rules.policy != "plan":
            keep |= _wanted_soon(books, next_use)
        columns = (books.charge_bytes, books.last_use, books.main, books.freq, books.turn)
        return books, Snapshot(*columns, keep, next_use, books.limit_bytes, books.has_evicted), uses

    def _pinned(self) -> set[str]:
        """Return the names of pinned copies. A new pin of another process is noticed when its copy would be deleted."""
        if self._pins is None:
            self._pins = set(self._folder.names(".pin"))
        self._pins = {name for name in self._pins if self._folder.is_pinned(name)}
        return self._pins

    def _carry_out(self, books: AccountsSnapshot, decision: Decision, until_bytes: int) -> set[str]:
        """Evict the chosen victims until enough space is free; return those that could not be deleted."""
        rows = list(decision.victims)
        names, sizes = [books.names.text(row) for row in rows], books.charge_bytes[rows].tolist()
        tried: list[str] = []
        gone = self._delete_until(zip(names, sizes, strict=True), until_bytes, tried)
        stayed = set(tried) - set(gone)
        moves = [(books.names.text(m.row), m.main, m.freq) for m in decision.moves if m.n_before < len(tried)]
        # A copy in use goes to the end of its queue: at the head, it would be tried again every time.
        queues = zip(names, books.main[rows].tolist(), books.freq[rows].tolist(), strict=True)
        place = {name: (main, freq) for name, main, freq in [*queues, *moves] if name in stayed}
        held = [(name, *at) for name, at in place.items() if not self._folder.is_pinned(name)]
        if self._policy is not lru and (moves or held):
            self._accounts.requeue([*moves, *held])
        if self._pins is not None:
            # A new set: another thread may be iterating over the old one.
            self._pins = self._pins | {name for name in stayed if self._folder.is_pinned(name)}
        self._book_out(gone, evicted=True)
        return stayed

    # -- deleting ---------------------------------------------------------------------------------------------------

    def evict(self, rows: Iterable[CopyRow], *, need_bytes: float = math.inf) -> int:
        """Delete these copies, in order, until need_bytes are free; return the bytes freed.

        A copy is skipped if it is pinned, leased, being fetched, or has no recorded source.
        """
        charges = {row.name: row.charge_bytes for row in rows if row.record}
        gone = self._delete_until(charges.items(), need_bytes, [])
        self._book_out(gone, evicted=False)
        return sum(charges[name] for name in gone)

    def _delete_until(self, charges: Iterable[tuple[str, int]], need_bytes: float, tried: list[str]) -> list[str]:
        """Delete copies, in order, until need_bytes are free; return those that were deleted.

        All that were tried go to tried.
        """
        gone, freed_bytes = [], 0
        for name, charge_bytes in charges:
            if freed_bytes >= need_bytes:
                break
            tried.append(name)
            if delete_copy(self._folder, name):
                gone.append(name)
                freed_bytes += charge_bytes
        return gone

    def _book_out(self, gone: list[str], *, evicted: bool) -> None:
        if gone:
            crash_point("evict.deleted")
            try:
                self._accounts.remove(gone, evicted=evicted)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self._looked_s = -math.inf  # the accounts stay too high until they can be written: then reconcile them
            self._counters.add("evicted", len(gone))
            crash_point("evict.booked")


def _wanted_soon(books: AccountsSnapshot, next_use: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask of the copies that a live plan reads now, and of those fetched for a use that comes soon: bool[n].

    Copies with the nearest uses are preferred, up to SPARED_SHARE. The mask is for policies that do not use plans. A
    loader prefetches, and its copies have no reader yet: of two concurrent jobs, each evicted what the other had
    prefetched, and both fetched it twice (docs/design/eviction.md).
    """
    is_fresh = books.last_use == books.turn  # not used and not requeued since it came
    wanted: NDArray[np.bool_] = (next_use == 0) | (is_fresh & (next_use <= books.limit_bytes * SOON_SHARE))
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(next_use[rows], kind="stable")]
    wanted[rows[np.cumsum(books.charge_bytes[rows]) > books.limit_bytes * SPARED_SHARE]] = False
    return wanted


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
