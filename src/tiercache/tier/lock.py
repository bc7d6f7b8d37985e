"""Who moves things between the tiers of a home: one process at a time, on all machines.

The lock is a chain of numbered objects beside the home. Whoever puts the next number holds it; its holder alone
overwrites that object, to renew it. The newest number never vanishes, so two who take over at once put the same number,
and put_if_absent has one winner::

    _tiercache/tier.lock/<20 digits>     owner, process, machine; what is being dropped just now; released or not

Why not one object that is deleted when it has expired: 1. A and B see that C has expired. 2. A deletes C's lock and
puts its own. 3. B deletes what it takes for C's, which is A's, and puts its own. Both hold it.

Clocks of machines are not compared to decide that a holder is dead. A holder that renewed itself lately by our clock
lives. One whose process is gone from this machine is dead. Any other is watched for as long as a lock lives, and is
dead if it has not renewed itself by then.

No lock stops a process that sleeps between its last look at the lock and the deletion that the look allowed (a machine
that is suspended for days)::

    1. Z notes in its lock object what it is about to drop: (place, path) each. Z looks whether it still holds the lock.
    2. Z sleeps. N takes over, and reads in Z's object what Z may still drop.
    3. N lets none of these copies count as the one that stays, and tells its successors: for a week, or until Z's
       process is known to be gone. Z wakes up and deletes: N has dropped nothing for the sake of that copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from tiercache.catalog.files import make_folder, open_file, pid_namespace, start_time
from tiercache.errors import CommitConflict, NotFound, StoreError
from tiercache.points import reach
from tiercache.waiting import SYSTEM_CLOCK, SystemClock, pause, wait_for

if TYPE_CHECKING:
    from tiercache.store import Store
    from tiercache.waiting import Clock

LOCK_FOLDER = "_tiercache/tier.lock/"
LIFETIME_S = 120.0  # without a renewal
RENEW_S = 30.0
DOOMED_S = 7 * 86400.0
_ASK_S = 5.0  # between two looks at a lock that is being watched
_MOST_TRIES = 20
_NAME = re.compile(rf"{re.escape(LOCK_FOLDER)}([0-9]{{20}})")

# What this process holds: a lock object that names this process and is not among these is a leftover.
_held_here: set[str] = set()


class BootClock(SystemClock):
    """Time that goes on while the machine is suspended: a lock's does, and monotonic time does not."""

    def monotonic(self) -> float:
        """Seconds since the machine started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


BOOT_CLOCK = BootClock()


@dataclass(frozen=True, slots=True)
class Record:
    """A lock object.

    owner: unlike every other; boot, namespace, pid, started: its process; renewed_s: by its machine's clock.
    dropping: (place, path) of copies that are being deleted; doomed: (place, path, since_s) of those that earlier
    holders, of whom nobody knows that they are gone, may still delete.
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
    def of_this_process(cls) -> Record:
        """A new one."""
        pid = os.getpid()
        where = socket.gethostname(), boot_id(), pid_namespace(), pid, start_time(pid) or 0
        return cls(secrets.token_hex(16), *where, renewed_s=time.time())

    @classmethod
    def parse(cls, data: bytes) -> Record | None:
        """The record that encode() wrote; None: it is none, and nobody's."""
        try:
            body: dict[str, Any] = json.loads(data)
            body.pop("format")
            body["dropping"] = tuple((str(place), str(path)) for place, path in body["dropping"])
            body["doomed"] = tuple((str(place), str(path), float(since)) for place, path, since in body["doomed"])
            record = cls(**body)
            float(record.renewed_s)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return record

    def encode(self) -> bytes:
        """Its JSON."""
        return json.dumps({"format": 1, **asdict(self)}).encode() + b"\n"

    @property
    def runs(self) -> bool | None:
        """Whether its process runs, as far as this machine can tell; None: it cannot."""
        if self.boot != boot_id() or self.namespace != pid_namespace() or self.boot == "0":
            return None
        if start_time(self.pid) != self.started:
            return False
        return self.owner in _held_here if self.pid == os.getpid() else True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class TierLock:
    """The right to move what lies in the tiers of a home. `with TierLock(store):`, or take() and release().

    A thread renews it. check() before what must not be done twice: it asks the store. The lock inside guards the
    record, and is held while it is written. Safe from any thread.
    """

    def __init__(
        self,
        store: Store,
        *,
        folder: Path | None = None,
        lifetime_s: float = LIFETIME_S,
        renew_s: float | None = RENEW_S,
        clock: Clock = BOOT_CLOCK,
    ) -> None:
        """Nothing is asked yet.

        Args:
            store: of the home.
            folder: for a file that is locked on this machine beside it, so that who would lose here asks no store.
            lifetime_s: that a holder is believed to live without a renewal.
            renew_s: between two renewals; None: only renew() does it.
            clock: by which lifetimes are measured.
        """
        self._store, self._folder, self._clock = store, folder, clock
        self._lifetime_s, self._renew_s = lifetime_s, renew_s
        self._guard = Lock()
        self._number = 0
        self._record: Record | None = None
        self._renewed_s = 0.0
        self._fd: int | None = None
        self._stop = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> TierLock:
        self.take()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    # -- taking -----------------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Hold it from now on.

        Raises:
            CommitConflict: somebody else moves things; it says who.
            StoreError: the store's.
        """
        self._take_file()
        try:
            self._take_number()
            reach("tier_lock.taken")
            self._forget_older()
        except BaseException:
            self.release()
            raise
        if self._renew_s is not None:
            self._stop.clear()
            self._thread = Thread(target=self._keep, name="tiercache-tier-lock", daemon=True)
            self._thread.start()

    def _take_file(self) -> None:
        if self._folder is None:
            return
        make_folder(self._folder, 0o700)
        name = hashlib.sha256(self._store.url.encode()).hexdigest()[:16]
        path = self._folder / f"moving-{name}.lock"
        fd = open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise self._refusal(f"another process of this machine (lock {path}) is") from None
        except OSError:  # a file system without locks: the store's still holds
            os.close(fd)
            return
        self._fd = fd

    def _take_number(self) -> None:
        for _ in range(_MOST_TRIES):
            newest, before = self._newest()
            if newest:
                self._see_over(newest, before)
            mine = replace(Record.of_this_process(), doomed=_doomed_after(before, time.time()))
            started_s = self._clock.monotonic()
            _held_here.add(mine.owner)  # before it is there: another thread would take it for a leftover
            try:
                if self._put(newest + 1, mine):
                    self._number, self._record, self._renewed_s = newest + 1, mine, started_s
                    return
            finally:
                if self._record is None:
                    _held_here.discard(mine.owner)
        raise self._refusal("others, again and again, are")

    def _put(self, number: int, mine: Record) -> bool:
        """Put the next number; False: somebody else did, or it is not the newest.

        It may not be: 1. we saw k as the newest. 2. Others took and gave back k + 1 and k + 2, and forgot k + 1. 3. We
        put k + 1, which is free again.
        """
        if not (self._put_absent(number, mine) or self._is_at(number, mine)):
            return False
        if self._newest()[0] == number:
            return True
        if self._is_at(number, mine):
            self._store.delete([_key(number)])
        return False

    def _put_absent(self, number: int, mine: Record) -> bool:
        try:
            return self._store.put_if_absent(_key(number), mine.encode())
        except StoreError as error:
            if not error.facts.get("maybe_done"):
                raise
            return False

    def _is_at(self, number: int, mine: Record) -> bool:
        """Whether it is ours that is there: even a plain "no" may be about our own, which a first try wrote."""
        there = self._read(number)
        return there is not None and there[1] is not None and there[1].owner == mine.owner

    def _newest(self) -> tuple[int, Record | None]:
        """The newest number and its record; 0 where there is none. None: it cannot be read, or is gone."""
        matches = (_NAME.fullmatch(info.key) for info in self._store.list(LOCK_FOLDER))
        number = max((int(match[1]) for match in matches if match), default=0)
        there = self._read(number) if number else None
        return number, None if there is None else there[1]

    def _read(self, number: int) -> tuple[bytes, Record | None] | None:
        try:
            data = self._store.get(_key(number))
        except NotFound:
            return None
        return data, Record.parse(data)

    def _see_over(self, number: int, record: Record | None) -> None:
        """Return when the holder of a number holds it no more. Raises CommitConflict where it does."""
        if record is not None:
            if record.released or record.runs is False:
                return
            # Within the lifetime by our clock: it lives, or the clocks differ and who comes later will watch it.
            if abs(time.time() - record.renewed_s) <= self._lifetime_s:
                raise self._refusal(f"{record} is")
        first = self._read(number)
        if first is None:
            return  # forgotten by who has taken a later number
        ask_s = min(_ASK_S, self._lifetime_s / 4)
        wait_for(lambda: self._read(number) != first, self._lifetime_s, self._clock, longest_poll_s=ask_s)
        now = self._read(number)
        if now is not None and now != first and not (now[1] is not None and now[1].released):
            raise self._refusal("another process is" if now[1] is None else f"{now[1]} is")

    def _refusal(self, who: str) -> CommitConflict:
        return CommitConflict(
            f"expected to be alone, but {who} moving things between these tiers; try again when that is done",
            url=f"{self._store.url}/{LOCK_FOLDER.rstrip('/')}",
        )

    def _forget_older(self) -> None:
        older = [info.key for info in self._store.list(LOCK_FOLDER)]
        numbers = [key for key in older if (match := _NAME.fullmatch(key)) and int(match[1]) < self._number]
        with suppress(StoreError):
            if numbers:
                self._store.delete(numbers)

    # -- holding ----------------------------------------------------------------------------------------------------

    @property
    def doomed(self) -> dict[tuple[str, str], float]:
        """Copies that count for nothing, (place, path) -> since when: an earlier holder may still delete them."""
        record = self._record
        return {} if record is None else {(place, path): since for place, path, since in record.doomed}

    def check(self) -> None:
        """See that it is still held: not renewed for too long, or taken over, it is not.

        Raises:
            CommitConflict: it was lost. What was being done must not go on.
            StoreError: the store does not say.
        """
        if self._clock.monotonic() - self._renewed_s > self._lifetime_s / 2:
            self.renew()
        number, record = self._newest()
        mine = self._record
        if mine is None or number != self._number or record is None or record.owner != mine.owner:
            raise CommitConflict(
                f"the right to move was lost to {'nobody' if record is None else record} meanwhile: "
                "this process was stopped for too long, or the store could not be reached; nothing was lost, run again",
                url=self._store.url,
            )

    def announce(self, dropping: Iterable[tuple[str, str]]) -> None:
        """Say what is about to be deleted, (place, path) each, and see that the lock is still held. Raises as check().

        Said before it is looked, in this order: whoever takes over after the look has read what was said.
        """
        self._write(dropping=tuple(dropping))
        reach("tier_lock.announced")
        self.check()

    def renew(self) -> None:
        """Live on. Raises CommitConflict where it is not held, StoreError where it may not have been written."""
        self._write()

    def _write(self, **changes: Any) -> None:
        with self._guard:
            if self._record is None:
                raise CommitConflict("the right to move is not held", url=self._store.url)
            before_s = self._clock.monotonic()
            n_renewals = self._record.n_renewals + 1
            record = replace(self._record, renewed_s=time.time(), n_renewals=n_renewals, **changes)
            self._record = record  # should the answer be lost, it may be what is there
            self._store.put(_key(self._number), record.encode())
            self._renewed_s = before_s

    def _keep(self) -> None:
        while pause(self._renew_s or RENEW_S, SYSTEM_CLOCK, self._stop):
            try:
                self.renew()
            except BaseException:  # noqa: BLE001, S112 - a thread's top: check() finds a lock that was not renewed
                continue

    def release(self) -> None:
        """Give it back. Harmless when it is not held; a store that cannot be written leaves it to expire."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        mine = self._record
        try:
            if mine is not None:
                with suppress(StoreError, CommitConflict):
                    self._write(released=True, dropping=())
        finally:
            if mine is not None:
                _held_here.discard(mine.owner)
            self._record, self._number = None, 0
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)


def _key(number: int) -> str:
    return f"{LOCK_FOLDER}{number:020d}"


def _doomed_after(before: Record | None, now_s: float) -> tuple[tuple[str, str, float], ...]:
    """What its successor must not count on. before: the record of the holder before."""
    if before is None:
        return ()
    since: dict[tuple[str, str], float] = {}
    if not before.released and before.runs is not False:
        since = dict.fromkeys(before.dropping, now_s)
    for place, path, since_s in before.doomed:
        # A time that is still to come was given by a clock that was ahead.
        if now_s - min(since_s, now_s) < DOOMED_S:
            since.setdefault((place, path), min(since_s, now_s))
    return tuple((place, path, since_s) for (place, path), since_s in since.items())


def boot_id() -> str:
    """What tells this boot of this machine from every other; "0" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "0"
