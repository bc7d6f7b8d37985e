"""Large arrays for other processes of this machine: a file in the temporary folder, owned by who made it.

A pickle names the file, and whoever reads the pickle maps it, so that worker processes share its pages. Who made the
file holds a shared flock on it, and removes it when the arrays go or the process ends. A process that was killed
leaves its file behind without the lock, which is how the next one that makes such a file knows that it may go.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import NotFound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Sequence[NDArray[np.int64] | None]

PREFIX = "tiercache-selection-"
_TOKEN_BYTES = 16

_lock = threading.Lock()


def _after_fork() -> None:
    global _lock  # a thread that the fork has left behind may hold it for ever
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Spool:
    """The file of some arrays, made when its ticket is first asked for; it goes with this object. For any thread."""

    def __init__(self) -> None:
        self._file: _File | None = None

    def ticket(self, arrays: Arrays) -> tuple[Any, ...] | None:
        """What `restore` finds the arrays by, plain values; None: no file can be written.

        arrays: the same ones each time. A forked child makes a file of its own: its parent's may go at any time.
        """
        with _lock:  # of two threads that pickle at once the second takes the file of the first
            if self._file is None or self._file.pid != os.getpid():
                _sweep()
                try:
                    self._file = _write(arrays)
                except OSError:  # a full disk makes pickles large, not wrong
                    return None
            return self._file.ticket


class _File:
    """A file that this process has made, and removes."""

    def __init__(self, path: Path, fd: int, ticket: tuple[Any, ...]) -> None:
        self.ticket = ticket
        self.pid = os.getpid()
        weakref.finalize(self, _remove, path, fd, self.pid)


def restore(ticket: tuple[Any, ...]) -> list[NDArray[np.int64] | None]:
    """The arrays that a ticket stands for, mapped read-only; they stay good when the file goes.

    Raises:
        NotFound: the file is gone, or is another one.
    """
    path, token, lengths = ticket
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _gone(path, lengths) from error
    try:
        n_bytes = _TOKEN_BYTES + sum(8 * n for n in lengths if n is not None)
        if os.fstat(fd).st_size != n_bytes or os.pread(fd, _TOKEN_BYTES, 0) != token:
            raise _gone(path, lengths)
        memory = mmap.mmap(fd, n_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    arrays: list[NDArray[np.int64] | None] = []
    offset = _TOKEN_BYTES
    for n in lengths:
        arrays.append(None if n is None else np.frombuffer(memory, np.int64, n, offset))
        offset += 0 if n is None else 8 * n
    return arrays


def _gone(path: str, lengths: Sequence[int | None]) -> NotFound:
    n_records = lengths[-1] or "many"
    return NotFound(
        f"the file of a pickled selection of {n_records} records is gone: it lives as long as the data set that was "
        "pickled, and on its machine; keep that one until its pickle has been read, or pickle what it is made of",
        url=path,
    )


def _write(arrays: Arrays) -> _File:
    while True:
        fd, name = tempfile.mkstemp(prefix=PREFIX)
        path, token = Path(name), secrets.token_bytes(_TOKEN_BYTES)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            is_here = path.exists()  # else it was swept between being made and being locked
            with open(fd, "wb", closefd=False) as file:
                file.write(token)
                for array in arrays if is_here else ():
                    if array is not None:
                        file.write(array.data)
        except BaseException:
            _remove(path, fd, os.getpid())
            raise
        if is_here:
            return _File(path, fd, (name, token, tuple(None if array is None else len(array) for array in arrays)))
        os.close(fd)


def _remove(path: Path, fd: int, pid: int) -> None:
    """Let go of the file; a forked child closes its descriptor only, for the file is its parent's."""
    os.close(fd)
    if pid == os.getpid():
        path.unlink(missing_ok=True)


def _sweep() -> None:
    """Remove the files of processes that were killed: nobody holds a lock on them."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, gone meanwhile, or in use
            # Whatever lies there by that name: a pipe would be waited for.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
