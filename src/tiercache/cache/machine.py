"""The machine as the cache needs it: file locks and fork-safe descriptors, lock holders, disk space, process identity.

Locks only save bandwidth: all results are correct on file systems where flock is not enforced. A descriptor that is
inherited through fork shares its lock with the parent: close() keeps the parent's lock, LOCK_UN would release it.
`Breaker` bypasses a failing disk, `Notices` gives each warning once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import warnings
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.catalog.database import open_file, pid_namespace, read_text, start_time
from tiercache.waiting import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from collections.abc import Mapping


_private: set[int] = set()


def keep_private(fd: int) -> int:
    """Register fd as private to this process, and return it."""
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
        with contextlib.suppress(OSError):
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
                taken = try_exclusive(fd)
                # The last holder may have removed the file between open() and flock(): then the lock is on a file
                # without a name.
                current = os.fstat(fd).st_nlink > 0
            except BaseException:
                os.close(fd)
                raise
            if taken and current:
                self._fd = keep_private(fd)
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, 0)
                self.note({})
                return True
            os.close(fd)
            if not taken:
                return False

    def note(self, facts: Mapping[str, object]) -> None:
        """Write facts about the holder into the lock file. Does nothing while the lock is not held."""
        if self._fd is not None:
            text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **facts})
            # a full disk: the note only serves messages and the rebuilding of lost accounts
            with contextlib.suppress(OSError):
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
            with contextlib.suppress(OSError):
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


def locked_inodes() -> dict[int, set[int]] | None:
    """Return the processes that hold a flock, by inode, for all file systems; None: the system does not list locks.

    A lock lasts until the last descriptor and the last mapping of its file are closed, in any process; the listed
    process is the one that took the lock. Locks of other containers are not listed.
    """
    try:
        text = _LOCKS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    holders: dict[int, set[int]] = defaultdict(set)
    for line in text.splitlines():
        # "1: FLOCK  ADVISORY  READ 9846 fe:00:11280417 0 EOF"; a process that waits for a lock has "->" before the
        # kind.
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK":
            inode = fields[5].rpartition(":")[2]
            if fields[4].isdigit() and inode.isdigit():
                holders[int(inode)].add(int(fields[4]))
    return dict(holders)


def holders_of(folder: Path, inodes: Mapping[str, int]) -> list[Holder]:
    """Return the processes that hold files of a folder, by process number.

    An inode number may also occur on another disk, and on some file systems /proc/locks and stat() number the disks
    differently; so the open files of each process are checked.

    Args:
        folder: Folder of the files.
        inodes: Inode of each file, by name.
    """
    locks = locked_inodes() or {}
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


# statfs(2) types of file systems whose locks, links or mappings other machines share. FUSE often is one and cannot be
# told apart.
_NETWORK = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x65735546: "FUSE",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x01021997: "9P",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
}
_STATFS_BYTES = 512  # larger than struct statfs on any platform


@dataclass(frozen=True, slots=True)
class Room:
    """The space on a disk.

    Attributes:
        free_bytes: Free space for this user.
        total_bytes: Size of the file system.
        n_free_files: Number of free inodes; None if the file system has no fixed number.
    """

    free_bytes: int
    total_bytes: int
    n_free_files: int | None


def room(path: Path) -> Room:
    """Return the space for files of this user on the disk of path."""
    status = os.statvfs(path)
    n_free_files = status.f_favail if status.f_files else None
    return Room(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, n_free_files)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, or this user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def network_file_system(path: Path) -> str | None:
    """Return the name of the network file system of path; None: a local file system."""
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if not hasattr(library, "statfs") or library.statfs(os.fsencode(path), buffer) != 0:
        return None
    # On Linux, f_type is the first member, a long; on other systems the numbers in the table do not occur there.
    return _NETWORK.get(ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF)


def host_name() -> str:
    """Return the name of this machine, with only characters that are safe in a file name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:100] or "host"


@cache
def boot_id() -> str:
    """Return an identifier of the current boot of this machine; "0" if the system provides none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")[:16]
    except OSError:
        return "0"


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a temporary file or a reservation: one open cache in one process. Never reused."""

    boot: str
    namespace: int
    pid: int
    started: int
    nonce: str

    @classmethod
    def of_this_process(cls) -> Owner:
        """Return a new owner."""
        pid = os.getpid()
        return cls(boot_id(), pid_namespace(), pid, start_time(pid) or 0, secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Return the owner that str() wrote; None: the text is not an owner."""
        match = re.fullmatch(r"([0-9a-f]{1,16})-(\d+)-(\d+)-(\d+)-([0-9a-f]{8})", text)
        return match and cls(match[1], int(match[2]), int(match[3]), int(match[4]), match[5])

    def __str__(self) -> str:
        return f"{self.boot}-{self.namespace}-{self.pid}-{self.started}-{self.nonce}"

    def runs(self) -> bool | None:
        """Return whether the owner's process runs; None: it cannot be determined from here (another container)."""
        if self.boot != boot_id():
            return False
        if self.namespace != pid_namespace():
            return None
        return start_time(self.pid) == self.started


PROBE_AFTER_S = 30.0


class Breaker:
    """Decides whether the cache's disk may be used. All methods are quick and safe from any thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, probe_after_s: float = PROBE_AFTER_S) -> None:
        self._clock, self._probe_after_s = clock, probe_after_s
        self._lock = Lock()
        self._probe_at_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the disk is bypassed."""
        return self._probe_at_s is not None

    def allows(self) -> bool:
        """Return whether to use the disk now. While it is bypassed, one caller per probe_after_s seconds may try it."""
        if not self.is_open:
            return True
        with self._lock:
            now_s = self._clock.monotonic()
            probe_at_s = self._probe_at_s
            if probe_at_s is None:  # mend() ran between the two checks
                return True
            if now_s >= probe_at_s:
                self._probe_at_s = now_s + self._probe_after_s
            return now_s >= probe_at_s

    def trip(self) -> None:
        """Bypass the disk, after it failed."""
        with self._lock:
            self._probe_at_s = self._clock.monotonic() + self._probe_after_s

    def mend(self) -> None:
        """Use the disk again, after it worked."""
        with self._lock:
            self._probe_at_s = None


class Notices:
    """Gives each kind of warning once. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._given: set[str] = set()
        self._expected: dict[str, str] = {}

    def copied(self) -> Notices:
        """Return a copy for a forked child, in which another thread's hold on the lock would never end."""
        found = Notices()
        found._given, found._expected = set(self._given), dict(self._expected)
        return found

    def expect(self, kind: str, subject: str) -> None:
        """Enable warn_expected() for this kind, with the subject of the warning."""
        with self._lock:
            self._expected[kind] = subject

    def is_expected(self, kind: str) -> bool:
        """Return whether warn_expected() would warn about this kind."""
        with self._lock:
            return kind in self._expected and kind not in self._given

    def warn_expected(self, kind: str, message: str) -> None:
        """Warn about the subject, unless this kind was given before or is not enabled."""
        with self._lock:
            subject = self._expected.get(kind)
        if subject is not None:
            self.warn(kind, f"{subject}: {message}")

    def warn(self, kind: str, message: str) -> None:
        """Give a warning, unless this kind was given before."""
        with self._lock:
            if kind in self._given:
                return
            self._given.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
