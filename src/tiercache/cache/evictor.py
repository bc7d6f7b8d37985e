"""Room: reserved before a byte is fetched, made by evicting what the policy gives up."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.cache.locks import NameLock, try_exclusive
from tiercache.cache.machine import room
from tiercache.cache.policy import POLICIES, Policy, Resident, lru, replaces
from tiercache.catalog import Accounts, CopyRow, charge_bytes
from tiercache.model import parse_bytes
from tiercache.waiting import SYSTEM_CLOCK, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Set

    from tiercache.cache.folder import Folder
    from tiercache.stats import Counters

# The record beside a copy, a pin, a lock file, SQLite's journal: files that the accounts do not count.
SPARE_FILES = 8
# What is leased cannot go, and the policy does not know: each round goes further down its list.
MAX_ROUNDS = 3
# Copies deleted by hand, or by a process that died before it booked them out, leave the books too high. Before room is
# refused the folder is looked at again, but a full cache refuses often, and a look takes milliseconds.
LOOK_AGAIN_S = 60.0
# Making room takes milliseconds; who cannot have the lock by then goes on without.
ROOM_WAIT_S = 10.0


class Evictor:
    """Reserves room and deletes copies. Safe from any thread.

    One lock guards the uses that are not booked yet; the other is held while reserve() makes room, files deleted.
    """

    def __init__(
        self, folder: Folder, accounts: Accounts, counters: Counters, *, policy: str, free_floor: int | str
    ) -> None:
        self._folder, self._accounts, self._counters = folder, accounts, counters
        self._policy_name, self._free_floor = policy, free_floor
        self._policy: Policy = POLICIES[policy]
        self._uses_lock, self._room_lock = Lock(), Lock()
        self._uses: dict[str, int] = {}
        self._looked_s = SYSTEM_CLOCK.monotonic()

    # -- uses -------------------------------------------------------------------------------------------------------

    def note_use(self, name: str) -> int:
        """Remember a use, in order; returns how many copies have uses that are not booked yet."""
        with self._uses_lock:
            self._uses[name] = self._uses.pop(name, 0) + 1
            return len(self._uses)

    def flush_uses(self) -> None:
        """Book the uses."""
        with self._uses_lock:
            uses, self._uses = self._uses, {}
        if uses:
            self._accounts.add_uses(uses)

    # -- room -------------------------------------------------------------------------------------------------------

    def spare_bytes(self) -> int:
        """What the disk has free above the floor; less than nothing where it can take no more files."""
        disk = room(self._folder.root)
        if disk.n_free_files is not None and disk.n_free_files < SPARE_FILES:
            return -disk.total_bytes
        return disk.free_bytes - parse_bytes(self._free_floor, whole_bytes=disk.total_bytes)

    def lack_bytes(self, n_bytes: int) -> int:
        """How many bytes must go before a copy of n_bytes can be reserved; 0 or less: none."""
        return self._accounts.lack_bytes(n_bytes, spare_bytes=self.spare_bytes)

    def freeable_bytes(self, spare: Set[str]) -> int:
        """What the policy could give up at most, without spare."""
        return sum(row.charge_bytes for row in self._victims(self._policy, spare))

    def would_refuse(self, name: str, n_bytes: int) -> bool:
        """Whether there is certainly no room: the policy replaces nothing, and nobody is fetching that very copy."""
        if replaces(self._policy_name) or self._has_room(n_bytes):
            return False
        return not self._accounts.is_reserved(name)

    def _has_room(self, n_bytes: int) -> bool:
        if self.lack_bytes(n_bytes) <= 0:
            return True
        return self._look_again() and self.lack_bytes(n_bytes) <= 0

    def _look_again(self) -> bool:
        """Make the books agree with the files, if that was not done lately."""
        now_s = SYSTEM_CLOCK.monotonic()
        if now_s - self._looked_s < LOOK_AGAIN_S:
            return False
        self._looked_s = now_s
        self._accounts.reconcile()
        return True

    def reserve(self, name: str, n_bytes: int, *, spare: Set[str] = frozenset()) -> bool:
        """Reserve room for a copy, evicting what the policy gives up but none of spare; False: no room."""
        if self._accounts.reserve(name, n_bytes, spare_bytes=self.spare_bytes):
            return True
        self._look_again()
        with self._making_room():
            for _ in range(MAX_ROUNDS):
                if self._accounts.reserve(name, n_bytes, spare_bytes=self.spare_bytes):
                    return True
                if not self._free(self.lack_bytes(n_bytes), spare):
                    break
            return self._accounts.reserve(name, n_bytes, spare_bytes=self.spare_bytes)

    @contextmanager
    def _making_room(self) -> Iterator[None]:
        """One at a time, here and in other processes: two would pick the same victims, and one would find none left."""
        lock = NameLock(self._folder.locks / "room")
        with self._room_lock:
            try:
                wait_for(lock.try_take, ROOM_WAIT_S)
                yield
            finally:
                lock.give_back()

    def free_disk(self, n_bytes: int, *, spare: Set[str] = frozenset()) -> None:
        """Evict what the policy gives up for n_bytes, whatever the books say: the disk itself is full."""
        self._free(charge_bytes(n_bytes), spare)

    def shrink(self, need_bytes: int) -> None:
        """Evict least recently used copies for a limit that has become smaller, whatever the policy."""
        self.evict(self._victims(lru, frozenset()), need_bytes=need_bytes)

    def _free(self, need_bytes: int, spare: Set[str]) -> bool:
        """Evict in the policy's order until need_bytes are freed; nothing is touched where that cannot be reached."""
        if not replaces(self._policy_name):
            return False
        victims = self._victims(self._policy, spare)
        if sum(row.charge_bytes for row in victims) < need_bytes:
            return False
        return self.evict(victims, need_bytes=need_bytes) > 0

    def _victims(self, policy: Policy, spare: Set[str]) -> list[CopyRow]:
        """What the policy gives up, in its order: only what can be fetched again, and none of spare."""
        self.flush_uses()
        rows = {row.name: row for row in self._accounts.rows() if row.record and row.name not in spare}
        copies = [Resident(r.name, r.charge_bytes, r.last_use, self._folder.is_pinned(r.name)) for r in rows.values()]
        return [rows[name] for name in policy(copies)]

    # -- deleting ---------------------------------------------------------------------------------------------------

    def evict(self, rows: Iterable[CopyRow], *, need_bytes: float = math.inf) -> int:
        """Delete these copies, in order, until need_bytes are free; returns bytes freed.

        None that is pinned, leased, being fetched, or whose source is not on record.
        """
        gone, freed_bytes = [], 0
        for row in rows:
            if freed_bytes >= need_bytes:
                break
            if self._delete(row):
                gone.append(row.name)
                freed_bytes += row.charge_bytes
        if gone:
            self._accounts.remove(gone)
            self._counters.add("evicted", len(gone))
        return freed_bytes

    def _delete(self, row: CopyRow) -> bool:
        """Delete one copy if nobody holds it and it can be fetched again.

        Under its name's lock, so that no fetcher publishes between our looking and our deleting.
        """
        if not row.record:
            return False
        lock = NameLock(self._folder.locks / row.name)
        if not lock.try_take():
            return False
        try:
            fd = self._folder.open_copy(row.name)
            if fd is None:
                return not self._folder.has_copy(row.name)  # deleted by hand: it only has to be booked out
            try:
                # A pin is written under a reader's lock: after our lock it is there to be seen, or comes too late.
                if not try_exclusive(fd) or self._folder.is_pinned(row.name):
                    return False
                self._folder.remove_copy(row.name)
            finally:
                os.close(fd)
        finally:
            lock.give_back()
        return True
