"""File locks and fork-safe descriptors, the lock of a name, and the processes that hold locks.

Locks only save bandwidth: all results are correct on file systems where flock is not enforced. A descriptor that is
inherited through fork shares its lock with the parent: close() keeps the parent's lock, LOCK_UN would release it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache.store.private_files import open_file, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping


_private: set[int] = set()


def keep_private(fd: int) -> int:
    """Let forked children close fd, and return it. The descriptor must be closed with close_private()."""
    _private.add(fd)
    return fd


def close_private(fd: int) -> None:
    """Close a descriptor that keep_private() has registered."""
    # Deregistered first: a fork in between leaves the child one descriptor too many; in the other order, the child
    # could close another file.
    _private.discard(fd)
    os.close(fd)


def _close_inherited() -> None:
    while _private:
        with suppress(OSError):
            os.close(_private.pop())


os.register_at_fork(after_in_child=_close_inherited)


_NOTE_BYTES = 512
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


def try_shared(fd: int) -> bool:
    """Take a reader's lock; return False if another descriptor has the exclusive lock."""
    return _try(fd, fcntl.LOCK_SH)


def try_exclusive(fd: int) -> bool:
    """Take the exclusive lock; return False if another descriptor has a lock."""
    return _try(fd, fcntl.LOCK_EX)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def is_locked(path: str | Path) -> bool:
    """Return whether another descriptor has the exclusive lock of a file; False if the file cannot be opened."""
    try:
        fd = open_file(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_shared(fd)
    finally:
        os.close(fd)


class NameLock:
    """The lock to fetch or evict one copy: a lock file, which is removed when the lock is released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        while True:
            fd = open_file(self.path, os.O_RDWR | os.O_CREAT)
            try:
                is_free = try_exclusive(fd)
                # The last holder may have removed the file between open() and flock(): then the lock is on a file
                # without a name.
                has_name = os.fstat(fd).st_nlink > 0
            except BaseException:
                os.close(fd)
                raise
            if is_free and has_name:
                self._fd = keep_private(fd)
                with suppress(OSError):
                    os.ftruncate(fd, 0)
                self.note({})
                return True
            os.close(fd)
            if not is_free:
                return False

    def note(self, facts: Mapping[str, object]) -> None:
        """Write facts about the holder into the lock file. Does nothing while the lock is not held."""
        if self._fd is not None:
            text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **facts})
            with suppress(OSError):  # a full disk: the note only serves messages and the rebuilding of lost accounts
                # One write over the whole former note, so that no reader sees a mixture of two notes.
                os.pwrite(self._fd, text.ljust(_NOTE_BYTES).encode(), 0)

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def holder(self) -> str:
        """Return a description of the process that holds the lock, for messages."""
        try:
            note = json.loads(read_text(self.path))
            return f"process {note['pid']} on {note['host']} (lock {self.path})"
        except (OSError, ValueError, KeyError, TypeError):
            return f"another process (lock {self.path})"

    def release(self) -> None:
        """Release the lock and remove its file. Harmless if the lock is not held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                self.path.unlink()
            close_private(fd)


_LOCKS = Path("/proc/locks")
_LONGEST_COMMAND = 200


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has the cache open or reads copies.

    Attributes:
        pid: Process number.
        command: Command line of the process, "" if unknown.
        names: Names of the copies that the process holds, as far as they can be determined.
    """

    pid: int
    command: str
    names: tuple[str, ...] = ()


def locked_inodes() -> dict[int, set[int]]:
    """Return the processes that hold a flock, by inode, for all file systems; empty if the system lists no locks.

    A lock lasts until the last descriptor and the last mapping of its file are closed, in any process; the listed
    process is the one that took the lock. Locks of other containers are not listed.
    """
    holders: dict[int, set[int]] = defaultdict(set)
    with suppress(OSError):
        for line in _LOCKS.read_text(encoding="ascii", errors="replace").splitlines():
            # "1: FLOCK  ADVISORY  READ 9846 fe:00:11280417 0 EOF"; a process that waits for a lock has "->" before the
            # kind.
            fields = line.split()
            if len(fields) >= 6 and fields[1] == "FLOCK":
                inode = fields[5].rpartition(":")[2]
                if fields[4].isdigit() and inode.isdigit():
                    holders[int(inode)].add(int(fields[4]))
    return dict(holders)


def holders_of(folder: Path, inodes: Mapping[str, int]) -> list[Holder]:
    """Return the processes that hold the files with these inodes, by process number.

    An inode number may also occur on another disk, and on some file systems /proc/locks and stat() number the disks
    differently; so the open files of each process are checked for the folder.
    """
    locks = locked_inodes()
    held: dict[int, list[str]] = defaultdict(list)
    for name, inode in sorted(inodes.items()):
        for pid in locks.get(inode, ()):
            held[pid].append(name)
    prefix = f"{os.path.realpath(folder)}/"
    return [Holder(pid, command_of(pid), tuple(names)) for pid, names in sorted(held.items()) if _opens(pid, prefix)]


def _opens(pid: int, prefix: str) -> bool:
    """Return whether a process has a file under prefix open or mapped; True if that cannot be determined."""
    process = Path(f"/proc/{pid}")
    try:
        for link in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed during the scan
                if str(link.readlink()).startswith(prefix):
                    return True
        return prefix in (process / "maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another user's process; or it ended, and a child holds the lock that it took
        return True


def command_of(pid: int) -> str:
    """Return the command line of a process, "" if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.replace("\0", " ").strip()[:_LONGEST_COMMAND]
