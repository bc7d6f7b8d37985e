"""What processes of a machine share: files of a private folder, the limit of open files, and an SQLite file.

Files of a private folder are never opened through a symbolic link, and have the requested permissions. Their names and
texts identify processes.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import resource
import secrets
import sqlite3
import stat
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import RLock
from typing import TypeVar

from tiercache.crash_points import crash_point
from tiercache.waiting import SYSTEM_CLOCK, wait_for

# Without O_NONBLOCK, a named pipe under one of our names would block open() for ever. Regular files ignore the flag.
SAFE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
PRIVATE = 0o600
NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_RIGHTS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_LONGEST_TEXT_BYTES = 1 << 20


def open_file(path: str | os.PathLike[str], flags: int, mode: int = PRIVATE) -> int:
    """Return a descriptor that is closed at exec. A file that O_CREAT makes has exactly `mode`.

    A link in the place of a file that is to be made is removed: it holds no data. Raises ELOOP if a link would be read.
    """
    try:
        fd = os.open(path, flags | SAFE_FLAGS, mode)
    except OSError as error:
        if error.errno != errno.ELOOP or not flags & os.O_CREAT:
            raise
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            raise
        Path(path).unlink()
        fd = os.open(path, flags | SAFE_FLAGS, mode)
    if flags & os.O_CREAT:
        try:
            set_mode(fd, mode)
        except BaseException:
            os.close(fd)
            raise
    return fd


def set_mode(fd: int, mode: int) -> None:
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno not in _NO_RIGHTS:
                raise


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether path is a real folder; False: nothing is there. Raises NotADirectoryError for a link or a file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        what = "a symbolic link, which is never followed" if stat.S_ISLNK(mode) else "not a folder"
        raise NotADirectoryError(errno.ENOTDIR, f"{what}: remove it, and it is made again", str(path))
    return True


def make_folder(path: Path, mode: int) -> bool:
    """Make a folder with exactly this mode, and its parents. Return False if it exists. Raises as is_folder()."""
    if is_folder(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return not is_folder(path)
    fd = open_folder(path)
    try:
        set_mode(fd, mode)
    finally:
        os.close(fd)
    return True


def open_folder(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> int:
    """Return a descriptor of a folder. A link to a folder is an error."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | SAFE_FLAGS, dir_fd=dir_fd)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a small file, at most 1 MiB of it. Bytes that are not UTF-8 are replaced. Raises OSError."""
    fd = open_file(path, os.O_RDONLY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.read(fd, _LONGEST_TEXT_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def link_whole(path: Path, text: str, mode: int = PRIVATE) -> None:
    """Write a complete file, unless the name is taken."""
    temp = _temp_beside(path, text, mode)
    try:
        os.link(temp, path, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        temp.rename(path)
    finally:
        with suppress(FileNotFoundError):
            temp.unlink()


def replace_whole(path: Path, text: str | bytes, mode: int = PRIVATE) -> None:
    """Write a complete file, replacing the old one; a link of that name is replaced, not followed."""
    temp = _temp_beside(path, text, mode)
    try:
        temp.rename(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temp.unlink()
        raise


@cache
def boot_id() -> str:
    """Return 16 hex digits of the id of this boot of the machine; "0" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")[:16]
    except OSError:
        return "0"


def pid_namespace() -> int:
    """Return the id of this process's pid namespace, which differs between containers; 0 if unknown."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def start_time(pid: int) -> int | None:
    """Return the start time of a process, in ticks since boot: with the pid it identifies a process for ever.

    None if there is no such process. A zombie counts as dead: it holds nothing any more.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may contain anything
    return None if fields[0] in "ZX" else int(fields[19])


def maker_of(file: str) -> tuple[int, int] | None:
    """Return (pid namespace, pid) of the writer of a temporary file; None if the name is not a temporary one."""
    match = re.fullmatch(r"\..+\.(\d+)-(\d+)-[0-9a-f]{8}", file)
    return match and (int(match[1]), int(match[2]))


def _temp_beside(path: Path, text: str | bytes, mode: int) -> Path:
    temp = path.with_name(f".{path.name}.{pid_namespace()}-{os.getpid()}-{secrets.token_hex(4)}")
    fd = open_file(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
    except BaseException:
        with suppress(FileNotFoundError):
            temp.unlink()
        raise
    return temp


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without flock
        return True
    return True


# -- the limit of open files belongs to the process, whose data sets, loaders and own files share it ------------------

# Maximum to which the soft limit is raised. Some programs loop over all possible descriptors when they start a child,
# and in many containers the hard limit is 1,048,576.
MAX_SOFT_LIMIT = 65_536


def _limits() -> tuple[int, int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_SOFT_LIMIT if soft == resource.RLIM_INFINITY else soft
    hard = MAX_SOFT_LIMIT if hard == resource.RLIM_INFINITY else hard
    return soft, max(soft, min(hard, MAX_SOFT_LIMIT))


def max_shard_descriptors() -> int:
    """Return the number of descriptors for all open shards of this process; the other half is left to the user."""
    return _limits()[1] // 2


def raise_limit(n_descriptors: float = math.inf) -> bool:
    """Raise the soft limit to the hard limit if open shards may use fewer than n_descriptors; return whether it was.

    Many systems set a soft limit of 1,024 because select(2) cannot use larger descriptors. Child processes inherit it.
    """
    soft, highest = _limits()
    if soft >= highest or n_descriptors <= soft // 2:
        return False
    with suppress(ValueError, OSError):  # macOS refuses more than OPEN_MAX, whatever the hard limit is
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return True
    return False


def emfile_message(error: BaseException) -> str:
    """Return a message with the limits and how to raise them if the error is EMFILE; "" for any other error."""
    if not isinstance(error, OSError) or error.errno != errno.EMFILE:
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else hard
    return (
        f"too many open files: this process has reached its limit of {soft} descriptors (the hard limit is {shown}); "
        f"raise it with `ulimit -n {max(4096, 4 * soft)}` before the program starts (the hard limit may need the "
        "administrator), or close files that are not needed"
    )


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
# Space that SQLite may need to open a file and to change it: its index of the log (32 KiB), and some pages.
_SPACE_BYTES = 128 << 10
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

    Its files have mode 0600 and are never opened through a link. run() holds the lock for one transaction. No
    connection is open while the process forks: SQLite keeps file locks per process, and a child would believe that it
    holds its parent's. wal: Write-ahead logging; otherwise a rollback journal. prepare: Makes and fills the tables of a
    new file, inside one transaction. durable: Committed data survives a power failure. catch_up: Makes existing tables
    agree with what they describe. While the disk is full, work runs on tables in memory that prepare has filled. When
    the disk has space again, catch_up corrects the file; the tables in memory are lost. None: a full disk is an error.
    """

    def __init__(
        self,
        path: Path,
        *,
        wal: bool,
        make_folder: Callable[[], object],
        prepare: Callable[[sqlite3.Connection], object],
        durable: bool = False,
        catch_up: Callable[[sqlite3.Connection], object] | None = None,
    ) -> None:
        self.path = path
        self._wal, self._durable = wal, durable
        self._make_folder, self._prepare, self._catch_up = make_folder, prepare, catch_up
        self._lock = RLock()
        self._connection: sqlite3.Connection | None = None
        self._memory: sqlite3.Connection | None = None
        self._inode = 0
        self._gave_up: tuple[float, sqlite3.DatabaseError] | None = None
        _databases.add(self)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return work(connection), run in one immediate transaction; again on a new file if this one is gone.

        Raises OSError if the file is busy for too long (EBUSY), the disk is full (ENOSPC, EDQUOT), or the file cannot
        be used.
        """
        came_s = SYSTEM_CLOCK.monotonic()
        with self._lock:
            try:
                return self._run_on_file(work, came_s)
            except OSError as error:
                if self._catch_up is None or error.errno not in DISK_FULL:
                    raise
            if self._memory is None:
                self._memory = self._open(":memory:")
            return self._attempt(work, self._memory)

    def _run_on_file(self, work: Callable[[sqlite3.Connection], T], came_s: float) -> T:
        try:
            if self._memory is not None and self._catch_up is not None:
                self._check_space()
                self._run(self._catch_up, came_s)
                self._forget_memory()
            return self._run(work, came_s)
        except sqlite3.DatabaseError as error:
            number = _ERRNO.get(error.sqlite_errorcode & 0xFF) if hasattr(error, "sqlite_errorcode") else None
            if number is None:
                raise
            raise OSError(number, f"SQLite: {error}", str(self.path)) from error

    def _run(self, work: Callable[[sqlite3.Connection], T], came_s: float) -> T:
        # A thread that has waited here while another thread waited for the file in vain gives up at once. Otherwise
        # thirty threads would give up one after the other, BUSY_S apart.
        if self._gave_up is not None and came_s < self._gave_up[0]:
            raise self._gave_up[1]
        for _ in range(_N_FILES - 1):
            try:
                return self._attempt(work, self._connected())
            except sqlite3.DatabaseError as error:
                code = error.sqlite_errorcode & 0xFF
                if code == sqlite3.SQLITE_BUSY:
                    self._gave_up = SYSTEM_CLOCK.monotonic(), error
                if code not in _LOST:
                    raise
            self._check_space()  # many errors of SQLite may mean a full disk, which does not allow a new file either
            self.replace()
        return self._attempt(work, self._connected())

    def _check_space(self) -> None:
        """Raise OSError (ENOSPC, EDQUOT) if the disk has no space for SQLite's files."""
        self._make_folder()
        with self._door() as fd:
            try:
                os.posix_fallocate(fd, 0, _SPACE_BYTES)
            finally:
                os.ftruncate(fd, 0)

    def _attempt(self, work: Callable[[sqlite3.Connection], T], connection: sqlite3.Connection) -> T:
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
        self._disconnect()
        self._make_folder()
        with self._door():
            self._guard_files()
            crash_point("catalog.guarded")
            # Before it is opened: if the file is replaced meanwhile (where flock is not enforced), the connection
            # counts as stale.
            self._inode = _inode(self.path)
            self._connection = self._open(self.path)
        return self._connection

    def _open(self, path: Path | str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _guard_files(self) -> None:
        """Make the file with its mode, before SQLite makes it with the umask's, and remove links under its names.

        An empty file was emptied, or its maker was killed. It is replaced, not filled: setting WAL mode would wait for
        any process that still has it open. An existing file is not opened here: closing it would release the POSIX
        locks that another connection of this process holds. SQLite gives its other files the mode of the first.
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
    def _door(self) -> Iterator[int]:
        """Hold the lock file: one process at a time opens or replaces the file, so no database meets an old log."""
        fd = open_file(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        try:
            wait_for(lambda: try_lock(fd), BUSY_S)
            yield fd
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

    def _disconnect(self) -> None:
        connection, self._connection, self._inode = self._connection, None, 0
        if connection is not None:
            connection.close()

    def close(self) -> None:
        with self._lock:
            self._disconnect()
            self._forget_memory()

    def _forget_memory(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


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
