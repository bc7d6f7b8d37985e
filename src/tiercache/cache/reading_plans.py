"""Plan files: what each job of this machine will read next, so that the cache keeps the copies that are needed soonest.

A file `plans/OWNER.RANDOM.plan` holds one ReadingPlan as a table sorted by the names of copies::

    0   8  magic
    8   8  m, rows of the table
    16  8  clock of the job: stored bytes of shards read since its epoch began; the owner updates it
    24  8  length in bytes of the label after the table
    32 16  hash of the reader, see model.ReadingPlan; 0: none
    48 16  0
    64  44 m  name (20 bytes), first, last, first_later (int64 each, see model.ReadingPlan)
        .. label: description of the job, for messages

The owner keeps the file locked. When the lock and the owner are gone, the plan is void, and any process may sweep it.

A withdrawn plan that was read to its end, or not begun (that of the next epoch), becomes OWNER.RANDOM.left: its
reader's next reads are known until that reader publishes another plan, for at most LEFT_S. Of two ranks, one ends its
epoch first, and its copies would be evicted for the other. Measured: with a cache of a quarter of their data set, both
fetched 0.78 of it per epoch instead of 0.75; two jobs one after the other, with a cache of half of it, 0.98 instead of
0.5.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock, RLock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiercache.cache.accounts import Owners
from tiercache.cache.folder import Folder, close_private, is_locked, keep_private, try_exclusive
from tiercache.cache.names import NAME_BYTES, NameTable
from tiercache.crash_points import crash_point
from tiercache.model import NEVER, PublishedPlan, ReadingPlan
from tiercache.store.local import write_all
from tiercache.store.shared_files import open_file

_MAGIC = b"tcplan\x00\x01"
_HEADER = struct.Struct("<8sQQQ16s16x")
_CLOCK_AT = 16
_CLOCK = struct.Struct("<Q")
_ROW = np.dtype([("name", np.uint8, NAME_BYTES), ("first", "<i8"), ("last", "<i8"), ("first_later", "<i8")])
_SUFFIX, _TEMP_SUFFIX, _LEFT_SUFFIX = ".plan", ".new", ".left"
_NOBODY = bytes(16)
# Ranks end an epoch, and start the next one in new processes, within seconds of each other.
LEFT_S = 60.0
# Next use of a copy that no plan names: later than a use that lies beyond the end of a plan (NEVER).
UNPLANNED = NEVER + 1


class Uses(NamedTuple):
    next_use: NDArray[np.int64]
    use_after_next: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PlanTable:
    """A plan by names of copies, sorted; first, last and first_later are int64[m] as in a ReadingPlan."""

    names: NameTable
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    first_later: NDArray[np.int64]
    label: str = ""
    reader: bytes = _NOBODY

    @classmethod
    def of(cls, names: NDArray[np.uint8], plan: ReadingPlan) -> PlanTable:
        """Return the table of a plan, with the names of the copies of plan.shards, uint8[m, 20], each once."""
        copies = NameTable.of(names)
        order = copies.order()
        copies = copies.take(order)
        columns = (plan.first, plan.last, plan.first_later)
        first, last, first_later = (np.asarray(column, np.int64)[order] for column in columns)
        starts = np.flatnonzero(copies.is_new())
        if len(starts) < len(copies):
            copies = copies.take(starts)
            first, first_later = np.minimum.reduceat(first, starts), np.minimum.reduceat(first_later, starts)
            # The copy is in use until the last of its shards was read; NEVER stands for shards that this epoch does not
            # read.
            last = np.maximum.reduceat(np.where(last == NEVER, -1, last), starts)
            last = np.where(first == NEVER, NEVER, last)
        reader = blake2b(plan.reader.encode(), digest_size=len(_NOBODY)).digest() if plan.reader else _NOBODY
        return cls(copies, first, last, first_later, plan.owner, reader)

    @property
    def end(self) -> int:
        """Clock at which the whole plan was read, except copies in use as long as the plan lives (NEVER - 1)."""
        return int(np.where(self.last >= NEVER - 1, 0, self.last).max(initial=0))

    def uses(self, rows: NDArray[np.int64], clock: int) -> Uses:
        """Return the next use of each row and the second next one, in bytes that the job still reads: int64[n] each.

        0: the copy is in use; NEVER: the plan contains no such use; UNPLANNED: for rows of -1.
        """
        unplanned = rows < 0
        if unplanned.all():
            return _unplanned(len(rows))
        first, last, first_later = self.first[rows], self.last[rows], self.first_later[rows]
        is_over = (first == NEVER) | (clock >= last)
        later = np.where(first_later == NEVER, NEVER, np.maximum(first_later - clock, 1))
        next_use = np.where(is_over, later, np.maximum(first - clock, 0))
        use_after_next = np.where(is_over, NEVER, later)
        next_use[unplanned] = use_after_next[unplanned] = UNPLANNED
        return Uses(next_use, use_after_next)


def _unplanned(n: int) -> Uses:
    column = np.full(n, UNPLANNED, np.int64)
    return Uses(column, column)


def encode(table: PlanTable) -> bytes:
    rows = np.empty(len(table.names), _ROW)
    rows["name"] = table.names.raw
    rows["first"], rows["last"], rows["first_later"] = table.first, table.last, table.first_later
    label = table.label.encode()
    return _HEADER.pack(_MAGIC, len(rows), 0, len(label), table.reader) + rows.tobytes() + label


def decode(data: bytes) -> PlanTable | None:
    if len(data) < _HEADER.size:
        return None
    magic, m, _, n_label, reader = _HEADER.unpack_from(data)
    end = _HEADER.size + m * _ROW.itemsize
    if magic != _MAGIC or len(data) != end + n_label:
        return None
    rows = np.frombuffer(data, _ROW, m, _HEADER.size)
    # A user with write permission may write invalid values: they must not overflow later computations.
    first, last, first_later = (
        np.clip(rows[column].astype(np.int64), 0, NEVER) for column in ("first", "last", "first_later")
    )
    return PlanTable(NameTable.of(rows["name"]), first, last, first_later, data[end:].decode(errors="replace"), reader)


_NO_USES = np.empty(0, np.int64)
_NOTHING = PlanTable(NameTable.of(np.empty((0, NAME_BYTES), np.uint8)), _NO_USES, _NO_USES, _NO_USES)


class ReadingPlans:
    """The live plans of a folder. Safe from any thread; the lock guards the known plans.

    A thread may still be active when the cache is closed: the planner of a loader's next epoch. It still gets results,
        but nothing that it does then stays open or published.
    """

    def __init__(self, folder: Folder, owners: Owners) -> None:
        self._folder, self._owners = folder, owners
        self._lock = Lock()
        self._read: dict[str, _OpenPlan] = {}
        self._published: weakref.WeakSet[PlanFile] = weakref.WeakSet()
        self._is_closed = False
        with self._lock, suppress(OSError):
            self._refresh()

    def publish(self, names: NDArray[np.uint8], plan: ReadingPlan) -> PublishedPlan:
        """Publish the reading plan of this job to all users of the folder. Raises OSError, ValueError."""
        lengths = [len(column) for column in (plan.shards, names, plan.first, plan.last, plan.first_later)]
        if len(set(lengths)) > 1:
            raise ValueError(f"shards, names, first, last and first_later must have one length, got {lengths}")
        published = PlanFile(self._folder, str(self._owners.me), PlanTable.of(names, plan))
        with self._lock:
            is_late = self._is_closed
            if not is_late:
                self._published.add(published)
        if is_late:
            published.close()
        return published

    def uses(self, *tables: NameTable) -> list[Uses]:
        """Return the next two uses of each copy, over all live plans, for each table of names; see PlanTable.uses().

        The rows of the first table are remembered for repeated calls with that object.
        """
        with self._live() as plans:
            return [_merged([plan.uses(names, keep=names is tables[0]) for plan in plans], names) for names in tables]

    def labels(self) -> list[str]:
        with self._live():
            return sorted(plan.table.label for file, plan in self._read.items() if file.endswith(_SUFFIX))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True  # first: a plan published from now on is in no list
            published = list(self._published)
            self._close_read()
        for one in published:
            one.close()

    # -- live plans ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _live(self) -> Iterator[list[_OpenPlan]]:
        with self._lock:
            try:
                yield self._refresh()
            finally:
                if self._is_closed:
                    self._close_read()

    def _close_read(self) -> None:
        while self._read:
            close_private(self._read.popitem()[1].fd)

    def _refresh(self) -> list[_OpenPlan]:
        try:
            with os.scandir(self._folder.plans) as entries:
                files = {entry.name for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            files = set()  # the folder was deleted
        for file in self._read.keys() - files:
            close_private(self._read.pop(file).fd)
        for file in files:
            if file.endswith(_TEMP_SUFFIX):
                if not self._owners.alive(file.split(".")[0]):
                    self._sweep(file)
            elif file.endswith(_SUFFIX):
                self._open_or_sweep(file)
        readers = {plan.table.reader for file, plan in self._read.items() if file.endswith(_SUFFIX)}
        for file in files:
            if file.endswith(_LEFT_SUFFIX):
                self._open_or_sweep_left(file, readers)
        return list(self._read.values())

    def _open_or_sweep(self, file: str) -> None:
        plan = self._read.get(file)
        if plan is None:
            with suppress(OSError):  # withdrawn meanwhile, or unreadable: not a plan
                plan = self._read[file] = _OpenPlan.open(self._folder, file)
        if plan is None or is_locked(f"{self._folder.plans}/{file}"):
            return
        close_private(self._read.pop(file).fd)
        self._sweep(file)

    def _open_or_sweep_left(self, file: str, readers: set[bytes]) -> None:
        plan = self._read.get(file)
        with suppress(OSError):
            plan = self._read[file] = plan or _OpenPlan.open(self._folder, file)
            if plan.table.reader not in readers and abs(time.time() - os.fstat(plan.fd).st_mtime) < LEFT_S:
                return
        self._read.pop(file, None)
        if plan is not None:
            close_private(plan.fd)
        self._sweep(file)

    def _sweep(self, file: str) -> None:
        with suppress(OSError):  # a failing disk: the plan is void all the same
            self._folder.remove_file("plans", file)
        crash_point("plan.swept")


def _merged(plans: list[Uses], names: NameTable) -> Uses:
    if not plans:
        return _unplanned(len(names))
    next_use, use_after_next = plans[0]
    for other in plans[1:]:
        # The second smallest of four uses: either the later one of the two next uses, or a second next one.
        second_next = np.minimum(use_after_next, other.use_after_next)
        use_after_next = np.minimum(second_next, np.maximum(next_use, other.next_use))
        next_use = np.minimum(next_use, other.next_use)
    return Uses(next_use, use_after_next)


class _OpenPlan:
    """An open plan file of any process. The clock is read, not mapped, so that a truncated file cannot raise SIGBUS."""

    def __init__(self, fd: int, table: PlanTable) -> None:
        self.fd, self.table = fd, table
        self._names: NameTable | None = None
        self._rows = _NO_USES

    @classmethod
    def open(cls, folder: Folder, file: str) -> _OpenPlan:
        """Open a plan file. Raises OSError. An invalid file gives an empty table, and is swept after its owner."""
        fd = open_file(folder.plans / file, os.O_RDONLY)
        try:
            table = decode(os.pread(fd, os.fstat(fd).st_size, 0)) or _NOTHING
        except BaseException:
            os.close(fd)
            raise
        return cls(keep_private(fd), table)

    def uses(self, names: NameTable, *, keep: bool) -> Uses:
        rows = self._rows if self._names is names else self.table.names.rows_of(names)
        if keep:
            self._names, self._rows = names, rows
        return self.table.uses(rows, _clock_of(self.fd))


def _clock_of(fd: int) -> int:
    data = os.pread(fd, _CLOCK.size, _CLOCK_AT)
    (clock,) = _CLOCK.unpack(data) if len(data) == _CLOCK.size else (0,)
    return min(int(clock), NEVER)


class PlanFile:
    """A plan file of this process. Safe from any thread.

    The garbage collector may close the plan in a thread that is writing its clock: then the plan is withdrawn after the
    write, because otherwise another file could get the descriptor's number before it.
    """

    def __init__(self, folder: Folder, owner: str, table: PlanTable) -> None:
        stem = f"{owner}.{secrets.token_hex(4)}"
        temp, file = folder.plans / f"{stem}{_TEMP_SUFFIX}", f"{stem}{_SUFFIX}"
        fd = keep_private(open_file(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        try:
            try_exclusive(fd)
            write_all(fd, memoryview(encode(table)), 0)
            crash_point("plan.written")
            temp.rename(folder.plans / file)
            crash_point("plan.named")
        except BaseException:
            close_private(fd)
            for path in (temp, folder.plans / file):  # under either name, it would live as long as this process
                with suppress(OSError):
                    path.unlink()
            raise
        self._fd, self._pid = fd, os.getpid()
        self._lock = RLock()
        self._is_writing = self._is_over = False
        left_at = None if table.reader == _NOBODY else table.end
        self._finalizer = weakref.finalize(self, _withdraw, folder, file, fd, self._pid, left_at)

    def advance(self, clock: int) -> None:
        """Write the clock of the job: eight bytes into the page cache."""
        if os.getpid() != self._pid:
            return  # a forked child: a thread of the parent may hold the lock for ever
        with self._lock:
            if self._is_writing or not self._finalizer.alive:
                return
            try:
                self._is_writing = True
                with suppress(OSError):  # an outdated clock only makes the plan less precise
                    os.pwrite(self._fd, _CLOCK.pack(clock), _CLOCK_AT)
            finally:
                self._is_writing = False
                if self._is_over:
                    self._finalizer()

    def close(self) -> None:
        if os.getpid() == self._pid:
            with self._lock:
                self._is_over = True
                if not self._is_writing:
                    self._finalizer()


def _withdraw(folder: Folder, file: str, fd: int, pid: int, left_at: int | None) -> None:
    """Delete the plan file, or leave it behind at clock 0 or from left_at on (None: never), and close it."""
    if os.getpid() != pid:
        return  # a forked child: the file belongs to the parent, and the descriptor is closed already
    try:
        with suppress(OSError):
            if left_at is not None and not 0 < _clock_of(fd) < left_at:
                os.utime(fd)
                (folder.plans / file).rename((folder.plans / file).with_suffix(_LEFT_SUFFIX))
            else:
                folder.remove_file("plans", file)
        crash_point("plan.withdrawn")
    finally:
        close_private(fd)
