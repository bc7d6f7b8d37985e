"""Uses of objects: reports beside data sets for their shards, and a log on this machine for all other objects.

A machine's report on a data set is ``_tiercache/usage/<machine>.json``. It is written at the start of a run, once an
hour, when the data set is closed and at process exit; and only if the data set is tracked. It costs one addition per
opened shard. A data set whose store cannot be written is read without reports.

The log has the single objects that this machine reads through `Cache` or `tiercache::`. Opening one appends a line, at
most once a minute per process and object. This costs about 100 us, needs no lock, and survives a killed process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fcntl import LOCK_UN, flock
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache import config
from tiercache.errors import NotFound, StoreError, TierCacheError
from tiercache.store import Store
from tiercache.store.access import plain_url
from tiercache.store.placement import LocationResolver
from tiercache.store.remote import cancel_calls_after
from tiercache.store.shared_files import make_folder, open_file, pid_namespace, start_time, try_lock
from tiercache.waiting import SYSTEM_CLOCK, Clock, pause, wait_for

USAGE_FOLDER = "_tiercache/usage/"
FORMAT_VERSION = 1
REPORT_S = 3600.0
AT_EXIT_S = 1.5  # limit of the last report, while the interpreter ends
# A report takes two requests. A process that holds the lock for longer was killed, and a forked child has its lock.
LOCK_S = 5.0
# A reader whose last report is newer than this reads now: one report may be late or lost.
IN_USE_S = 2.5 * REPORT_S
GONE_S = 7 * 86400.0  # a reader without a report for this time is gone
_SKEW_S = 60.0  # duration of a write, and normal difference between clocks
_numbers = itertools.count()
_PID = re.compile(r"[0-9]{1,10}")
_UNFIT = re.compile(r"[^A-Za-z0-9.-]+")


@dataclass(frozen=True, slots=True)
class ActiveReader:
    """A process that has a data set open. since_s: Start of reading. reads_all: Whether its run reads every shard."""

    since_s: float
    reported_s: float
    reads_all: bool = False


@dataclass(frozen=True, slots=True)
class UseReport:
    """Uses of one machine. Times are seconds since the epoch, by its own clock; read_reports() corrects a late clock.

    all_s: Last time that a run read every shard; 0: never. readers: By a name that identifies the process.
    """

    machine: str
    reported_s: float = 0.0
    all_s: float = 0.0
    readers: dict[str, ActiveReader] = field(default_factory=dict)
    shards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ShardUse:
    """Known use of n shards.

    last_use_s: float64[n], NaN if no use was reported. in_use: bool[n]. unreported: The report of a machine that reads
    the data set is overdue: then no shard counts as idle.
    """

    last_use_s: NDArray[np.float64]
    in_use: NDArray[np.bool_]
    unreported: bool


# -- for the planner ------------------------------------------------------------------------------------------------


def read_reports(store: Store) -> list[UseReport]:
    """Return the reports of all machines. An unreadable one counts as an overdue report. Raises StoreError."""
    found = []
    for info in store.list(USAGE_FOLDER):
        modified_s, machine = info.modified_s or 0.0, info.key.removeprefix(USAGE_FOLDER).removesuffix(".json")
        with suppress(NotFound):
            found.append(_by_store_clock(decode(store.get(info.key), machine, modified_s), modified_s))
    return found


def _by_store_clock(report: UseReport, modified_s: float) -> UseReport:
    """Return a report with its times shifted later, if the machine's clock is behind.

    The store knows the time of writing. Without the shift, a machine whose clock is a week behind would count as gone,
    and its shards as idle. Times are never shifted earlier: for a clock that is ahead, or a file that was copied with
    its date, a late time is the safe side.
    """
    behind_s = modified_s - max(report.reported_s, 0.0)
    if behind_s <= _SKEW_S:
        return report
    readers = {
        name: ActiveReader(one.since_s + behind_s, one.reported_s + behind_s, one.reads_all)
        for name, one in report.readers.items()
    }
    shards = {name: last_s + behind_s for name, last_s in report.shards.items()}
    return UseReport(report.machine, modified_s, report.all_s and report.all_s + behind_s, readers, shards)


def merge_reports(reports: Sequence[UseReport], names: pa.Array | pa.ChunkedArray, *, now_s: float) -> ShardUse:
    """Merge the reports on one data set. Pure. The result is in the order of `names`, the names of its shards."""
    n = len(names)
    last, in_use = np.full(n, np.nan), np.zeros(n, np.bool_)
    unreported = False
    text = names.cast(pa.large_string())
    for report in reports:
        active = [reader for reader in report.readers.values() if now_s - reader.reported_s <= IN_USE_S]
        unreported |= any(IN_USE_S < now_s - reader.reported_s <= GONE_S for reader in report.readers.values())
        if report.all_s:
            last = np.fmax(last, report.all_s)
        in_use |= any(reader.reads_all for reader in active)
        rows = pc.index_in(text, value_set=pa.array(list(report.shards), pa.large_string())).fill_null(-1)
        at = np.asarray(rows.to_numpy(), np.int64) if n else np.empty(0, np.int64)
        mine = np.flatnonzero(at >= 0)
        used_s = np.array(list(report.shards.values()), np.float64)[at[mine]]
        last[mine] = np.fmax(last[mine], used_s)
        if active:
            in_use[mine] |= used_s >= min(reader.since_s for reader in active)
    return ShardUse(last, in_use, unreported)


# -- the file -------------------------------------------------------------------------------------------------------


def encode(report: UseReport) -> bytes:
    body = {
        "format": "tiercache-usage",
        "version": FORMAT_VERSION,
        "machine": report.machine,
        "reported_s": report.reported_s,
        "all_s": report.all_s,
        "readers": {name: asdict(one) for name, one in report.readers.items()},
        "shards": report.shards,
    }
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def decode(data: bytes, machine: str, modified_s: float = 0.0) -> UseReport:
    """Return the report in a JSON text. For an unreadable or newer text, return an overdue reader of all shards.

    modified_s: Time of writing by the store's clock, in seconds since the epoch.
    """
    try:
        body: dict[str, Any] = json.loads(data)
        if body["version"] > FORMAT_VERSION:
            raise ValueError(f"a report of version {body['version']}")
        readers = {
            str(name): ActiveReader(float(one["since_s"]), float(one["reported_s"]), bool(one["reads_all"]))
            for name, one in body["readers"].items()
        }
        shards = {str(name): float(last_s) for name, last_s in body["shards"].items()}
        report = UseReport(machine, float(body["reported_s"]), float(body["all_s"]), readers, shards)
        times = [one for reader in readers.values() for one in (reader.since_s, reader.reported_s)]
        if not all(map(math.isfinite, [report.reported_s, report.all_s, *times, *shards.values()])):
            raise ValueError("times that no machine has")
        return report
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        lost = ActiveReader(modified_s, modified_s - IN_USE_S, reads_all=True)
        return UseReport(machine, modified_s, readers={"unreadable": lost})


def usage_key(machine: str) -> str:
    return f"{USAGE_FOLDER}{machine}.json"


def machine_name() -> str:
    """Return this machine's name in reports: its host name, and 8 hex digits that distinguish equal host names."""
    host = socket.gethostname()
    try:
        machine_id = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine_id = ""
    digits = hashlib.sha256(f"{machine_id}/{host}".encode()).hexdigest()[:8]
    return f"{_UNFIT.sub('-', host).strip('-.') or 'machine'}-{digits}"


# -- for readers ----------------------------------------------------------------------------------------------------


class UseRecorder:
    """Notes which shards of one data set this process opens, and reports them. Thread-safe; a forked child starts anew.

    The lock guards the notes. Reports are made outside it, one at a time per machine.
    """

    def __init__(
        self, resolver: LocationResolver, *, clock: Clock = SYSTEM_CLOCK, now_s: Callable[[], float] = time.time
    ) -> None:
        self._resolver, self._clock, self._now_s = resolver, clock, now_s
        self._number = next(_numbers)
        self._begin()

    def _begin(self) -> None:
        self._lock, self._reporting = threading.Lock(), threading.Lock()
        self._held: set[str] = set()  # opened at any time, or announced: may still be open
        self._since_s = 0.0  # start of reading; 0: not reading
        self._reads_all = self._has_failed = False
        self._stop: threading.Event | None = None  # stops the thread that reports once an hour
        self._pid = os.getpid()  # last: other threads of a forked child compare it before they use the new state

    def note(self, name: str) -> None:
        with self._started():
            self._held.add(name)

    def begin(self, keys: Iterable[str] | None) -> None:
        """Start the reports of a run on a tracked data set: one now, and one every hour.

        keys: Keys of the shards that the run reads, perhaps in workers, which report when they end. None: all shards.
        """
        with self._started():
            self._reads_all = self._reads_all or keys is None
            self._held.update(keys or ())
            if self._stop is not None:
                return
            stop = self._stop = threading.Event()
        weakref.finalize(self, stop.set).atexit = False
        threading.Thread(
            target=_report_hourly, args=(weakref.ref(self), stop, self._clock), name="tiercache-usage", daemon=True
        ).start()

    @contextmanager
    def _started(self) -> Iterator[None]:
        global _watching_pid
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            if not self._since_s:
                self._since_s = self._now_s()
                _counting.add(self)
                if _watching_pid != os.getpid():
                    _watching_pid = os.getpid()
                    # Finalize of multiprocessing, because its workers do not run atexit.
                    util.Finalize(None, _report_at_exit, exitpriority=100)
            yield

    def close(self) -> None:
        """Write the last report, if the data set is tracked. Repeatable; further reads start anew."""
        if self._pid != os.getpid() or not self._since_s:
            return
        stop, self._stop = self._stop, None
        if stop is not None:
            stop.set()
        with suppress(TierCacheError):
            if self._resolver.is_tracked or (
                self._resolver.is_tracked is None and self._resolver.placement_once() is not None
            ):
                self.report(is_last=True)
                return
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._held, self._since_s, self._reads_all = set(), 0.0, False

    def close_at_exit(self) -> None:
        """As close(), at process exit, for a short time: no request to a store that was not asked before, or failed."""
        if self._pid == os.getpid() and self._since_s and self._resolver.is_tracked and not self._has_failed:
            with cancel_calls_after(AT_EXIT_S):
                self.close()

    def report(self, *, is_last: bool = False) -> bool:
        """Add the uses so far to this machine's report. Return False if the store cannot be written.

        is_last: Whether this process stops reading.
        """
        with self._reporting:
            with self._lock:
                if not self._since_s:
                    return False  # closed while this call waited: a reader that is gone must not be in the report
                reader, held = ActiveReader(self._since_s, self._now_s(), self._reads_all), frozenset(self._held)
                if is_last:
                    self._forget()
            try:
                with _one_at_a_time(self._resolver.home.url):
                    self._add(reader, held, is_last=is_last)
            except (StoreError, OSError):
                self._has_failed = True
                return False
            self._has_failed = False
            return True

    def _add(self, reader: ActiveReader, held: frozenset[str], *, is_last: bool) -> None:
        """Update this machine's report, without readers whose process is gone. held: Shards that may be open."""
        store, machine, now_s = self._resolver.home, machine_name(), reader.reported_s
        try:
            before = decode(store.get(usage_key(machine)), machine)
        except NotFound:
            before = UseReport(machine)
        name = _name_of(self._number)
        readers = {other: one for other, one in before.readers.items() if other != name and _may_live(other)}
        if not is_last:
            readers[name] = reader
        shards = before.shards | dict.fromkeys(held, now_s)
        all_s = max(before.all_s, now_s if reader.reads_all else 0.0)
        store.put(usage_key(machine), encode(UseReport(machine, now_s, all_s, readers, shards)))


def _report_hourly(recorder: weakref.ref[UseRecorder], stop: threading.Event, clock: Clock) -> None:
    while not stop.is_set():
        found = recorder()
        if found is None:
            return
        found.report()
        del found  # so that the sleeping thread keeps nothing of the data set alive
        pause(REPORT_S, clock, stop)


# Recorders of this process, whose pid is _watching_pid.
_counting: weakref.WeakSet[UseRecorder] = weakref.WeakSet()
_watching_pid = 0


def _report_at_exit() -> None:
    for recorder in list(_counting):
        recorder.close_at_exit()


@contextmanager
def _one_at_a_time(url: str) -> Iterator[None]:
    fd = None
    try:
        with suppress(OSError, ValueError):
            folder = config.state_folder() / "locks"
            make_folder(folder, 0o700)
            name = hashlib.sha256(url.encode()).hexdigest()[:32]
            fd = opened = open_file(folder / f"usage-{name}", os.O_RDWR | os.O_CREAT)
            wait_for(lambda: try_lock(opened), LOCK_S)
        yield
    finally:
        if fd is not None:
            with suppress(OSError):
                flock(fd, LOCK_UN)  # explicitly: a forked child has the descriptor too, so closing does not unlock
            os.close(fd)


def _name_of(recorder: int) -> str:
    return f"{os.getpid()}-{start_time(os.getpid())}-{pid_namespace()}-{recorder}"


def _may_live(name: str) -> bool:
    """Return whether a reader's process may still exist. A process of another container counts as existing."""
    pid, started, namespace = (*name.split("-"), "", "", "")[:3]
    is_elsewhere = namespace != str(pid_namespace()) or not _PID.fullmatch(pid)
    return is_elsewhere or str(start_time(int(pid))) == started


# -- the log of uses of single objects ---------------------------------------------------------------------------------

FOLDER = "uses"
# Minimum time between two lines of a process on one object.
_AGAIN_S = 60.0
_MOST_REMEMBERED = 1 << 16
# Size at which a log is closed, and a new one begun. The planner reduces closed logs to one line per object.
_LOG_BYTES = 8 << 20
# A process may have opened a log just before it was closed, and may write its line shortly after.
_LATE_LINE_S = 60.0

Uses = dict[str, float]

_noted: dict[str, float] = {}


def record_use(url: str) -> None:
    """Note that this process opens the object at url now. Raises nothing, because the read must not fail."""
    now_s = time.time()
    if now_s - _noted.get(url, 0.0) < _AGAIN_S:
        return
    with suppress(OSError, ValueError):
        plain = plain_url(url)
        last_s = _noted.get(plain, 0.0)
        if len(_noted) >= _MOST_REMEMBERED:
            _noted.clear()
        if now_s - last_s < _AGAIN_S:  # noted under another spelling
            _noted[url] = last_s
            return
        _noted[url] = _noted[plain] = now_s
        _append(f"{json.dumps([round(now_s, 3), plain])}\n".encode())


def read_uses() -> Uses:
    """Return the last use of each object, by URL, from all logs in the state folder.

    Machines that share the folder each have their own logs in it. Raises OSError, ValueError.
    """
    found: Uses = {}
    reduced: Uses = {}
    closed: list[Path] = []
    for path in sorted((config.state_folder() / FOLDER).glob("*.log*")):
        # The name of a closed log has the time at which it was closed.
        closed_s = path.name.rpartition(".log.")[2]
        is_closed = closed_s.isdecimal() and time.time() - int(closed_s) / 1e9 > _LATE_LINE_S
        closed += [path] if is_closed else []
        for url, last_s in _lines(path):
            for uses in (found, reduced) if is_closed else (found,):
                uses[url] = max(uses.get(url, 0.0), last_s)
    if len(closed) > 1:
        with suppress(OSError):  # a folder that cannot be written: the next call reads all its logs again
            temp = closed[0].with_name(f"reduced-{os.getpid()}.tmp")
            lines = (f"{json.dumps([last_s, url])}\n" for url, last_s in reduced.items())
            temp.write_text("".join(lines), encoding="utf-8")
            temp.rename(closed[0])
            for path in closed[1:]:
                path.unlink(missing_ok=True)
    return found


def uses_under(uses: Uses, url: str) -> Uses:
    start = f"{plain_url(url).rstrip('/')}/"
    return {name.removeprefix(start): use for name, use in uses.items() if name.startswith(start)}


def _lines(path: Path) -> Iterator[tuple[str, float]]:
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, TypeError):
                last_s, url = json.loads(line)
                yield str(url), float(last_s)


def _append(line: bytes) -> None:
    folder = config.state_folder() / FOLDER
    path = folder / f"{_UNFIT.sub('-', socket.gethostname()) or 'machine'}.log"
    try:
        fd = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except FileNotFoundError:
        make_folder(folder, 0o700)
        fd = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line)
        n_bytes = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if n_bytes >= _LOG_BYTES:
        path.rename(f"{path}.{time.time_ns()}")
