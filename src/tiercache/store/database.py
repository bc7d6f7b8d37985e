"""One SQLite file that many processes share. If it is lost or damaged, the next process that opens it makes it anew."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from tiercache.crash_points import crash_point
from tiercache.store.private_files import PRIVATE, open_file, try_lock
from tiercache.waiting import SYSTEM_CLOCK, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


T = TypeVar("T")

BUSY_S = 10.0
# Codes by which SQLite says that the file is not, or no longer, our catalog. SQLITE_ERROR means "no such table".
_LOST = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_ERROR,
)
# Where flock is not enforced, a process that saw a new file empty may replace it, and its successor too.
_N_FILES = 4
_SUFFIXES = ("", "-wal", "-shm", "-journal")
# errno values of file errors. Other SQLite codes are bugs of ours, and stay SQLite errors.
_ERRNO = dict.fromkeys(_LOST, errno.EIO) | {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_AUTH: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_PROTOCOL: errno.EBUSY,
}


class Database:
    """A connection to one SQLite file, opened on first use, and again if the file was replaced or damaged.

    The file, and the files that SQLite puts beside it, have mode 0600 and are never opened through a link.

    run() holds the lock for one transaction; all else is quick. No connection is open while the process forks: SQLite
    keeps file locks per process, and a child would believe that it holds its parent's locks.
    """

    def __init__(
        self,
        path: Path,
        *,
        wal: bool,
        make_folder: Callable[[], object],
        prepare: Callable[[sqlite3.Connection], object],
        durable: bool = False,
    ) -> None:
        """Store the arguments; the file is not opened yet.

        wal: Write-ahead logging; otherwise a rollback journal. make_folder: Makes the folder of the file. prepare:
        Makes and fills the tables of a new file, inside one transaction. durable: Committed data survives a power
        failure.
        """
        self.path = path
        self._wal, self._durable = wal, durable
        self._make_folder, self._prepare = make_folder, prepare
        self._lock = RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._gave_up: tuple[float, sqlite3.DatabaseError] | None = None
        _databases.add(self)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return work(connection), run in one immediate transaction, which is rolled back if work raises.

        If the file is gone or damaged, work runs again on a new file.

        Raises:
            OSError: The file is busy for too long (EBUSY), the disk is full (ENOSPC), or the file cannot be read,
                written or made (EIO, EROFS, EACCES, or the system's error).
        """
        try:
            return self._run(work)
        except sqlite3.DatabaseError as error:
            number = _ERRNO.get(error.sqlite_errorcode & 0xFF) if hasattr(error, "sqlite_errorcode") else None
            if number is None:
                raise
            raise OSError(number, f"SQLite: {error}", str(self.path)) from error

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        came_s = SYSTEM_CLOCK.monotonic()
        with self._lock:
            # A thread that has waited here while another thread waited for the file in vain gives up at once. Otherwise
            # thirty threads would give up one after the other, BUSY_S apart.
            if self._gave_up is not None and came_s < self._gave_up[0]:
                raise self._gave_up[1]
            for _ in range(_N_FILES - 1):
                try:
                    return self._attempt(work)
                except sqlite3.DatabaseError as error:
                    code = error.sqlite_errorcode & 0xFF
                    if code == sqlite3.SQLITE_BUSY:
                        self._gave_up = SYSTEM_CLOCK.monotonic(), error
                    if code not in _LOST:
                        raise
                self.replace()
            return self._attempt(work)

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connected()
        connection.execute("BEGIN IMMEDIATE")
        try:
            answer = work(connection)
            crash_point("catalog.changed")
            connection.execute("COMMIT")
            crash_point("catalog.committed")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        return answer

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._inode == _inode(self.path):
            return self._connection
        self.close()
        self._make_folder()
        with self._door():
            self._guard_files()
            crash_point("catalog.guarded")
            # Before it is opened: if the file is replaced meanwhile (where flock is not enforced), the connection
            # counts as stale.
            self._inode = _inode(self.path)
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                self._set_up(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return connection

    def _guard_files(self) -> None:
        """Make the file with its mode, before SQLite makes it with the umask's, and remove links under its names.

        An empty file was emptied by somebody, or its maker was killed: the process that holds the lock file sees no
        other kind. It is replaced, not filled: setting WAL mode would wait for a lock of any process that still has it
        open.

        An existing file is not opened here: closing it would release the POSIX locks that another connection of this
        process holds on it. SQLite gives its other files the mode of the first.
        """
        for suffix in _SUFFIXES:
            path = Path(f"{self.path}{suffix}")
            with suppress(FileNotFoundError):
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    path.unlink()
                elif stat.S_IMODE(mode) != PRIVATE:
                    with suppress(PermissionError):  # a file system without modes
                        path.chmod(PRIVATE)
        with suppress(FileNotFoundError):
            if not self.path.lstat().st_size:
                self._remove_files()
        with suppress(FileExistsError):
            os.close(open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL))

    def _set_up(self, connection: sqlite3.Connection) -> None:
        # Usually not synced: after a power failure the machine has another boot id, and the owner rebuilds the tables.
        connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'OFF'}")
        _set_journal(connection, "WAL" if self._wal else "TRUNCATE")
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            self._prepare(connection)
            crash_point("catalog.prepared")
        connection.execute("COMMIT")

    @contextmanager
    def _door(self) -> Iterator[None]:
        """Hold the lock file: one process at a time opens or replaces the file, so no database meets an old log."""
        fd = open_file(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        try:
            wait_for(lambda: try_lock(fd), BUSY_S)
            yield
        finally:
            os.close(fd)

    def replace(self) -> None:
        """Remove the file, unless another process has done so since it was opened here. The next run() makes one."""
        damaged = self._inode or _inode(self.path)
        self.close()
        self._make_folder()
        with self._door():
            if damaged == _inode(self.path):
                self._remove_files()

    def _remove_files(self) -> None:
        for suffix in _SUFFIXES:
            with suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").unlink()
            if not suffix:
                crash_point("catalog.removed")

    def close(self) -> None:
        with self._lock:
            connection, self._connection, self._inode = self._connection, None, 0
            if connection is not None:
                connection.close()


def _set_journal(connection: sqlite3.Connection, mode: str) -> None:
    """Set the journal mode, waiting for other processes that do the same, because SQLite itself does not wait here."""
    busy: list[sqlite3.OperationalError] = []

    def is_set() -> bool:
        try:
            connection.execute(f"PRAGMA journal_mode={mode}")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            busy[:] = [error]
            return False
        return True

    if not wait_for(is_set, BUSY_S):
        raise busy[0]


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_fork_lock = RLock()
_held: list[Database] = []


def _before_fork() -> None:
    _fork_lock.acquire()
    for database in list(_databases):
        database._lock.acquire()  # noqa: SLF001 - of one file
        _held.append(database)
        database.close()


def _after_fork() -> None:
    # In the child too: the forking thread holds the locks, and only that thread lives on.
    while _held:
        _held.pop()._lock.release()  # noqa: SLF001 - of one file
    _fork_lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
