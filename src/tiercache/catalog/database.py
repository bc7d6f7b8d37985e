"""One SQLite file that many processes share, and that may vanish or rot: it is then made anew by whoever opens it."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import stat
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from tiercache.catalog.files import PRIVATE, open_file
from tiercache.points import reach
from tiercache.waiting import SYSTEM_CLOCK, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

BUSY_S = 10.0
# What SQLite says when the file is not (or no longer) the catalog that was opened; ERROR is "no such table".
_LOST = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_ERROR,
)
# Where locks lie, a file that was just made may be replaced by who saw it empty, and its successor too.
_N_FILES = 4
_SUFFIXES = ("", "-wal", "-shm", "-journal")
# What goes wrong with the file, in the system's words. Other codes are mistakes of ours and stay SQLite's errors.
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
    """A connection to one SQLite file, made when first needed and again when the file was replaced or damaged.

    The file and what SQLite puts beside it are 0600 and never reached through a link.

    run() holds the lock for one transaction; everything else is quick. There is no open connection while the process
    forks: SQLite keeps file locks by process, and a child would believe that it holds what its parent holds.
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
        """Remember where the file is.

        make_folder: makes its folder where that is gone; prepare: makes and fills the tables of a new file, inside one
        transaction; durable: what was committed outlives a loss of power.
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
        """What work(connection) returns, done in one immediate transaction; rolled back if it raises.

        Where the file turns out to be gone or damaged, work is done again on a fresh one.

        Raises:
            OSError: the file is busy for too long (EBUSY), its disk is full (ENOSPC), or it cannot be read, written or
                made (EIO, EROFS, EACCES, or what the system said).
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
            # Who has waited here while another thread waited for the file in vain has waited long enough: thirty
            # threads would else give up one after the other, BUSY_S apart.
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
            reach("catalog.changed")
            connection.execute("COMMIT")
            reach("catalog.committed")
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
            reach("catalog.guarded")
            # Before it is opened: of a file that is replaced meanwhile (where locks lie) the connection is a stale one.
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
        """Make the file with its rights, before SQLite would with the umask's; clear away links under its names.

        An empty file is one that somebody emptied, or that died in our hands: who is at the door sees no other. It is
        not filled but replaced: who still has it open holds a lock on it that making a WAL of it would wait for.

        A file that is there is not opened here: closing it would take away the POSIX locks that another connection of
        this process holds on it. SQLite gives its other files the rights of the first.
        """
        for suffix in _SUFFIXES:
            path = Path(f"{self.path}{suffix}")
            with suppress(FileNotFoundError):
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    path.unlink()
                elif stat.S_IMODE(mode) != PRIVATE:
                    with suppress(PermissionError):  # a file system that keeps no rights
                        path.chmod(PRIVATE)
        with suppress(FileNotFoundError):
            if not self.path.lstat().st_size:
                self._remove_files()
        with suppress(FileExistsError):
            os.close(open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL))

    def _set_up(self, connection: sqlite3.Connection) -> None:
        # Mostly not synced: after a power loss the machine has another boot id, and the owner makes the tables anew.
        connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'OFF'}")
        _set_journal(connection, "WAL" if self._wal else "TRUNCATE")
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            self._prepare(connection)
            reach("catalog.prepared")
        connection.execute("COMMIT")

    @contextmanager
    def _door(self) -> Iterator[None]:
        """One process at a time opens or replaces the file, so that a database never meets its predecessor's log."""
        fd = open_file(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        try:
            wait_for(lambda: _try_lock(fd), BUSY_S)
            yield
        finally:
            os.close(fd)

    def replace(self) -> None:
        """Remove the file, unless somebody has done so since it was opened here; the next run() makes another."""
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
                reach("catalog.removed")

    def close(self) -> None:
        """Close the connection; the next run() opens another."""
        with self._lock:
            connection, self._connection, self._inode = self._connection, None, 0
            if connection is not None:
                connection.close()


def _set_journal(connection: sqlite3.Connection, mode: str) -> None:
    """Set how the file is kept whole. Where locks lie others may be at the same: here SQLite itself does not wait."""
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


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: SQLite's own still hold
        return True
    return True


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
    # In the child too: the thread that forked holds the locks, and it is the one that lives on.
    while _held:
        _held.pop()._lock.release()  # noqa: SLF001 - of one file
    _fork_lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
