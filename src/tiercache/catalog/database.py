"""One SQLite file that many processes share, and that may vanish or rot: it is then made anew by whoever opens it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from tiercache.waiting import wait_for

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


class Database:
    """A connection to one SQLite file, made when first needed and again when the file was replaced or damaged.

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
    ) -> None:
        """Remember where the file is.

        make_folder: makes its folder where that is gone; prepare: makes and fills the tables of a new file, inside one
        transaction.
        """
        self.path = path
        self._wal = wal
        self._make_folder, self._prepare = make_folder, prepare
        self._lock = RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        _databases.add(self)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What work(connection) returns, done in one immediate transaction; rolled back if it raises.

        Where the file turns out to be gone or damaged, work is done again, once, on a fresh one.

        Raises:
            sqlite3.Error: the file is busy for too long, or cannot be made.
        """
        with self._lock:
            try:
                return self._attempt(work)
            except sqlite3.DatabaseError as error:
                if (error.sqlite_errorcode & 0xFF) not in _LOST:
                    raise
            self.replace()
            return self._attempt(work)

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connected()
        connection.execute("BEGIN IMMEDIATE")
        try:
            answer = work(connection)
            connection.execute("COMMIT")
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
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                self._set_up(connection)
            except BaseException:
                connection.close()
                raise
            self._connection, self._inode = connection, _inode(self.path)
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        # Not synced: after a power loss the machine has another boot id, and the owner of the tables makes them anew.
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute(f"PRAGMA journal_mode={'WAL' if self._wal else 'TRUNCATE'}")
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            self._prepare(connection)
        connection.execute("COMMIT")

    @contextmanager
    def _door(self) -> Iterator[None]:
        """One process at a time opens or replaces the file, so that a database never meets its predecessor's log."""
        fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
                for suffix in ("", "-wal", "-shm", "-journal"):
                    with suppress(FileNotFoundError):
                        Path(f"{self.path}{suffix}").unlink()

    def close(self) -> None:
        """Close the connection; the next run() opens another."""
        with self._lock:
            connection, self._connection, self._inode = self._connection, None, 0
            if connection is not None:
                connection.close()


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
