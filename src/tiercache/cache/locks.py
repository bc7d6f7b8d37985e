"""File locks, fork-safe descriptors, and the owners: each open cache of each process.

A descriptor that is inherited through fork shares its lock with the parent: close() keeps the parent's lock, LOCK_UN
would release it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.cache.names import NAME
from tiercache.crash_points import crash_point
from tiercache.store.shared_files import open_file, pid_namespace, read_text, start_time

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiercache.cache.folder import Folder


_private: set[int] = set()


def keep_private(fd: int) -> int:
    """Let forked children close fd, and return it. The descriptor must be closed with close_private()."""
    _private.add(fd)
    return fd


def close_private(fd: int) -> None:
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
        return self._fd is not None

    def holder(self) -> str:
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


# -- owners ------------------------------------------------------------------------------------------------------------


@cache
def boot_id() -> str:
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
        pid = os.getpid()
        return cls(boot_id(), pid_namespace(), pid, start_time(pid) or 0, secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
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


_open_here: set[str] = set()


class Owners:
    """This process as an owner, and the state of the other owners. Safe from any thread.

    It also answers the questions of the accounts about the folder (`accounts.CacheFiles`).
    """

    def __init__(self, folder: Folder, limit_bytes: int) -> None:
        """Create the owner file. Raises OSError if the folder is not writable."""
        self._folder, self._limit_bytes, self._lock = folder, limit_bytes, Lock()
        self.me = Owner.of_this_process()
        self.is_closed = False
        self._fd = self._make()
        _open_here.add(str(self.me))

    def _make(self) -> int:
        fd = open_file(self._folder.owners / str(self.me), os.O_RDWR | os.O_CREAT)
        try:
            crash_point("owner.made")
            try_exclusive(fd)
            crash_point("owner.locked")
            os.pwrite(fd, json.dumps({"limit_bytes": self._limit_bytes}).encode(), 0)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                self._folder.remove_file("owners", str(self.me))
            raise
        crash_point("owner.written")
        return keep_private(fd)

    def ensure(self) -> None:
        """Recreate the folder and the owner file if they were deleted. Raises OSError after close()."""
        # Two fetches may find it deleted: the second would close the file that the first has just locked.
        with self._lock:
            if self.is_closed:  # called during a close: another file may have this descriptor number now
                raise OSError(errno.EBADF, f"cache {self._folder.root} is closed")
            self._folder.ensure()
            if not os.fstat(self._fd).st_nlink:
                fd, self._fd = self._fd, self._make()
                close_private(fd)

    def alive(self, text: str) -> bool:
        """Return whether the process of an owner still has the cache open.

        The process number, start time and boot decide if they can be compared; otherwise (another container) the lock
        of the owner file decides.
        """
        owner = Owner.parse(text)
        if owner is None:
            return False
        if owner.pid == self.me.pid and owner.started == self.me.started and owner.namespace == self.me.namespace:
            return text in _open_here
        runs = owner.runs()
        return is_locked(self._folder.owners / text) if runs is None else runs

    def remove_files_of(self, text: str) -> None:
        """Remove the file of a dead owner. Its partial copies stay: the next fetch of each continues there."""
        with suppress(FileNotFoundError):
            crash_point("owner.buried")
            if Owner.parse(text) is not None:
                self._folder.remove_file("owners", text)

    def remove_files_of_dead(self) -> None:
        for text in [file.name for file in self._folder.owners.iterdir()]:
            if not self.alive(text):
                self.remove_files_of(text)

    def other_machine(self) -> str | None:
        """Return an owner that runs on another machine, or in an earlier boot of this one; None: there is none."""
        for file in self._folder.owners.iterdir():
            owner = Owner.parse(file.name)
            if owner is not None and owner.boot != boot_id() and is_locked(file):
                return file.name
        return None

    def processes(self) -> list[tuple[int, str]]:
        running = [owner for owner in map(Owner.parse, self.limits()) if owner is not None and owner.runs()]
        return [(pid, command_of(pid)) for pid in sorted({owner.pid for owner in running})]

    def limits(self) -> dict[str, int]:
        limits = {str(self.me): self._limit_bytes}
        with suppress(FileNotFoundError):
            for file in self._folder.owners.iterdir():
                with suppress(OSError, ValueError, KeyError, TypeError):
                    note = json.loads(read_text(file))
                    if self.alive(file.name):
                        limits[file.name] = int(note["limit_bytes"])
        return limits

    def running_fetches(self) -> list[tuple[str, str, int]]:
        """Return (owner, name, bytes) of what each fetch may still add, as its lock file says.

        A fetch writes this note before it reserves, and clears it before it commits. Notes of dead owners are included.
        """
        fetches: list[tuple[str, str, int]] = []
        with suppress(OSError):
            for file in self._folder.locks.iterdir():
                # Not the lock of a fetch, or released meanwhile.
                with suppress(OSError, ValueError, KeyError, TypeError):
                    note = json.loads(read_text(file))
                    fetch = str(note["owner"]), file.name, int(note["reserved_bytes"])
                    if fetch[2] > 0 and NAME.fullmatch(file.name):
                        fetches.append(fetch)
        return fetches

    def charge_of(self, name: str) -> int | None:
        return self._folder.charge_of(name)

    def charges(self) -> dict[str, int]:
        return self._folder.sizes()

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
        _open_here.discard(str(self.me))
        with suppress(OSError):
            self._folder.remove_file("owners", str(self.me))
        close_private(self._fd)


_LONGEST_COMMAND = 200


def command_of(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.replace("\0", " ").strip()[:_LONGEST_COMMAND]
