"""The tier lock: one process at a time, on all machines, moves data between the tiers of a home.

The lock is a numbered log beside the home (store/numbered_log.py). The process that puts the next number holds the
lock. Only the holder overwrites that object, to renew it. The newest number never vanishes, so two processes that take
over at once put the same number, and one of them wins::

    _tiercache/tier.lock/<20 digits>     owner, process, machine; what is being dropped just now; released or not

One object that is deleted when it has expired would not be enough: 1. A and B see that C has expired. 2. A deletes C's
lock and puts its own. 3. B deletes the object that it takes for C's lock, which is A's, and puts its own. Both hold the
lock.

Clocks of different machines are not compared to decide that a holder is dead. A holder whose last renewal is recent by
our clock is alive. A holder whose process is gone from this machine is dead. Any other holder is watched for the
lifetime of a lock, and is dead if it does not renew the lock by then.

No lock stops a process that sleeps between its last check of the lock and the deletion that the check allowed (a
machine that is suspended for days)::

    1. Z notes in its lock object what it is about to drop, as (URL, path) pairs. Z checks that it still holds the
       lock.
    2. Z sleeps. N takes over, and reads in Z's object what Z may still drop.
    3. N does not rely on any of these copies, and tells its successors: for a week, or until Z's process is known to be
       gone. Z wakes up and deletes: N has deleted nothing that relied on that copy.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from threading import Event, Lock, Thread
from typing import Any

from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, StoreError
from tiercache.store import Store
from tiercache.store.numbered_log import NumberedLog
from tiercache.store.shared_files import boot_id, pid_namespace, start_time
from tiercache.waiting import SYSTEM_CLOCK, Clock, SystemClock, pause, wait_for

LOCK_FOLDER = "_tiercache/tier.lock/"
LIFETIME_S = 120.0  # a lock without a renewal expires after this time
RENEW_S = 30.0
DOOMED_S = 7 * 86400.0
_ASK_S = 5.0  # between two reads of a lock that is being watched
_MOST_TRIES = 20

# Owners of the locks that this process holds: a lock object of this process with another owner is a leftover.
_held_here: set[str] = set()


class BootClock(SystemClock):
    """Clock that also advances while the machine is suspended, as lock lifetimes must; the monotonic clock does not."""

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


BOOT_CLOCK = BootClock()


@dataclass(frozen=True, slots=True)
class LockRecord:
    """Content of a lock object: a process, by host, boot, pid namespace, pid and start time, and what it does.

    Attributes:
        owner: Unique token of this lock.
        renewed_s: Last renewal, in seconds since the epoch, by the holder's clock.
        released: Whether the holder gave the lock back.
        dropping: (URL, path) pairs of copies that are being deleted.
        doomed: (URL, path, since_s) of copies that earlier holders, who may still run, may delete.
    """

    owner: str
    host: str
    boot: str
    namespace: int
    pid: int
    started: int
    renewed_s: float
    n_renewals: int = 0
    released: bool = False
    dropping: tuple[tuple[str, str], ...] = ()
    doomed: tuple[tuple[str, str, float], ...] = field(default=())

    @classmethod
    def of_this_process(cls) -> LockRecord:
        pid = os.getpid()
        where = socket.gethostname(), boot_id(), pid_namespace(), pid, start_time(pid) or 0
        return cls(secrets.token_hex(16), *where, renewed_s=time.time())

    @classmethod
    def parse(cls, data: bytes) -> LockRecord | None:
        try:
            body: dict[str, Any] = json.loads(data)
            body.pop("format")
            body["dropping"] = tuple((str(url), str(path)) for url, path in body["dropping"])
            body["doomed"] = tuple((str(url), str(path), float(since)) for url, path, since in body["doomed"])
            record = cls(**body)
            float(record.renewed_s)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return record

    def encode(self) -> bytes:
        return json.dumps({"format": 1, **asdict(self)}).encode() + b"\n"

    @property
    def runs(self) -> bool | None:
        """Whether the holder's process runs; None if this machine cannot tell.

        Another boot may be another machine, because the lock is in a store that machines share. (The owners of a cache
        folder are of this machine: there, a process of another boot is gone.)
        """
        if self.boot != boot_id() or self.namespace != pid_namespace() or self.boot == "0":
            return None
        if start_time(self.pid) != self.started:
            return False
        return self.owner in _held_here if self.pid == os.getpid() else True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class TierLock:
    """Lock on the tiers of a home. Use `with TierLock(store):`, or take() and release().

    A thread renews the lock. Call check(), which asks the store, before any step that two processes must not both make.
    A mutex guards the record while it is written. Thread-safe.
    """

    def __init__(
        self,
        store: Store,
        *,
        lifetime_s: float = LIFETIME_S,
        renew_s: float | None = RENEW_S,
        clock: Clock = BOOT_CLOCK,
    ) -> None:
        """Store the arguments; the store of the home is not asked yet.

        A lock expires after lifetime_s without a renewal. renew_s: None: only renew() renews it.
        """
        self._store, self._clock = store, clock
        self._log = NumberedLog(store, LOCK_FOLDER)
        self._lifetime_s, self._renew_s = lifetime_s, renew_s
        self._mutex = Lock()
        self._number = 0
        self._record: LockRecord | None = None
        self._renewed_s = 0.0
        self._stop = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> TierLock:
        self.take()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    # -- taking -----------------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Take the lock.

        Raises:
            CommitConflict: Another process holds the lock; the message names it.
            StoreError: The store failed.
        """
        try:
            self._take_number()
            crash_point("tier_lock.taken")
            with suppress(StoreError):  # the next holder deletes them
                self._log.delete(number for number in self._log.numbers() if number < self._number)
        except BaseException:
            self.release()
            raise
        if self._renew_s is not None:
            self._stop.clear()
            self._thread = Thread(target=self._keep, name="tiercache-tier-lock", daemon=True)
            self._thread.start()

    def _take_number(self) -> None:
        for _ in range(_MOST_TRIES):
            newest, before = self._newest()
            if newest:
                self._wait_until_free(newest, before)
            mine = replace(LockRecord.of_this_process(), doomed=_doomed_after(before, time.time()))
            started_s = self._clock.monotonic()
            _held_here.add(mine.owner)  # before the put, so that no other thread takes it for a leftover
            try:
                if self._log.put_newest(newest + 1, mine.encode()):
                    self._number, self._record, self._renewed_s = newest + 1, mine, started_s
                    return
            finally:
                if self._record is None:
                    _held_here.discard(mine.owner)
        raise self._refusal("others, again and again, are")

    def _newest(self) -> tuple[int, LockRecord | None]:
        number = max(self._log.numbers(), default=0)
        return number, LockRecord.parse(self._log.get(number) or b"")

    def _wait_until_free(self, number: int, record: LockRecord | None) -> None:
        if record is not None:
            if record.released or record.runs is False:
                return
            # Renewed within the lifetime by our clock: the holder is alive; or the clocks differ, and a later attempt
            # watches it.
            if abs(time.time() - record.renewed_s) <= self._lifetime_s:
                raise self._refusal(f"{record} is")
        first = self._log.get(number)
        if first is None:
            return  # deleted by the holder of a later number
        ask_s = min(_ASK_S, self._lifetime_s / 4)
        wait_for(lambda: self._log.get(number) != first, self._lifetime_s, self._clock, longest_poll_s=ask_s)
        data = self._log.get(number)
        now = None if data is None else LockRecord.parse(data)
        if data not in (None, first) and not (now is not None and now.released):
            raise self._refusal("another process is" if now is None else f"{now} is")

    def _refusal(self, who: str) -> CommitConflict:
        return CommitConflict(
            f"expected to be alone, but {who} moving things between these tiers; try again when that is done",
            url=f"{self._store.url}/{LOCK_FOLDER.rstrip('/')}",
        )

    # -- holding ----------------------------------------------------------------------------------------------------

    @property
    def doomed_copies(self) -> dict[tuple[str, str], float]:
        """Copies that must not be relied on, as (URL, path) -> since_s: an earlier holder may still delete them."""
        record = self._record
        return {} if record is None else {(url, path): since for url, path, since in record.doomed}

    def check(self) -> None:
        """Check that the lock is still held: another process may have taken it over.

        Raises:
            CommitConflict: The lock was lost; the caller must stop its work.
            StoreError: The store could not be asked.
        """
        if self._clock.monotonic() - self._renewed_s > self._lifetime_s / 2:
            self.renew()
        number, record = self._newest()
        mine = self._record
        if mine is None or number != self._number or record is None or record.owner != mine.owner:
            raise CommitConflict(
                f"the tier lock was lost to {'nobody' if record is None else record}: "
                "this process was stopped for too long, or the store could not be reached; nothing was lost, run again",
                url=self._store.url,
            )

    def announce(self, dropping: Iterable[tuple[str, str]]) -> None:
        """Record the (URL, path) pairs that are about to be deleted, and check the lock. Raises as check().

        The record is written before the check, so that a process that takes over after the check reads it.
        """
        self.renew(dropping=tuple(dropping))
        crash_point("tier_lock.announced")
        self.check()

    def renew(self, **changes: Any) -> None:
        """Renew the lock. Raises CommitConflict if it is not held, StoreError if the write may have failed."""
        with self._mutex:
            if self._record is None:
                raise CommitConflict("the tier lock is not held", url=self._store.url)
            before_s = self._clock.monotonic()
            n_renewals = self._record.n_renewals + 1
            record = replace(self._record, renewed_s=time.time(), n_renewals=n_renewals, **changes)
            self._record = record  # if the answer is lost, the store may have this record
            self._store.put(self._log.key(self._number), record.encode())
            self._renewed_s = before_s

    def _keep(self) -> None:
        while pause(self._renew_s or RENEW_S, SYSTEM_CLOCK, self._stop):
            try:
                self.renew()
            except BaseException:  # noqa: BLE001, S112 - top of a thread: check() notices a missing renewal
                continue

    def release(self) -> None:
        """Release the lock. Harmless if it is not held. If the store cannot be written, the lock expires."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        mine = self._record
        try:
            if mine is not None:
                with suppress(StoreError, CommitConflict):
                    self.renew(released=True, dropping=())
        finally:
            if mine is not None:
                _held_here.discard(mine.owner)
            self._record, self._number = None, 0


def _doomed_after(before: LockRecord | None, now_s: float) -> tuple[tuple[str, str, float], ...]:
    if before is None:
        return ()
    since: dict[tuple[str, str], float] = {}
    if not before.released and before.runs is not False:
        since = dict.fromkeys(before.dropping, now_s)
    for url, path, since_s in before.doomed:
        # A time in the future comes from a clock that was ahead.
        if now_s - min(since_s, now_s) < DOOMED_S:
            since.setdefault((url, path), min(since_s, now_s))
    return tuple((url, path, since_s) for (url, path), since_s in since.items())
