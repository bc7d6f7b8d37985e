"""flock(2), without waiting. Locks save bandwidth; nothing is wrong where a file system only pretends to lock."""

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
    """Take a reader's lock; False: somebody has it exclusively."""
    return _try(fd, fcntl.LOCK_SH)


def try_exclusive(fd: int) -> bool:
    """Take the exclusive lock; False: somebody reads or has it."""
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
    """The right to fetch or evict one copy: a lock file beside the copies, gone again when it is given back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def try_take(self) -> bool:
        """Take it if nobody has it."""
        while True:
            fd = open_file(self.path, os.O_RDWR | os.O_CREAT)
            try:
                taken = try_exclusive(fd)
                # Its last holder may have removed the file between open() and flock(): then this is a lock on nothing.
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
        """Let whoever reads the file know more of its holder. Nothing where it is not held."""
        if self._fd is not None:
            text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **facts})
            with contextlib.suppress(OSError):  # a full disk: what is noted is for messages, and for lost books
                # In one write, over all of the note before, so that nobody reads half of each.
                os.pwrite(self._fd, text.ljust(_NOTE_BYTES).encode(), 0)

    @property
    def is_held(self) -> bool:
        """Whether we have it."""
        return self._fd is not None

    def holder(self) -> str:
        """Who has it, for people."""
        try:
            note = json.loads(read_text(self.path))
            return f"process {note['pid']} on {note['host']} (lock {self.path})"
        except (OSError, ValueError, KeyError, TypeError):
            return f"another process (lock {self.path})"

    def give_back(self) -> None:
        """Remove the file and the lock. Harmless when it is not held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            close_private(fd)
