"""Non-blocking flock(2).

Locks only save bandwidth: all results are correct on file systems where flock is not enforced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from typing import TYPE_CHECKING

from tiercache.cache.inherit import close_private, keep_private
from tiercache.catalog.files import open_file, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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
