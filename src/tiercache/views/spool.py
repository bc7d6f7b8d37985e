"""Large arrays passed to other processes of this machine by a file in the temporary folder.

A pickle names the file, and each process that reads the pickle maps the file, so that worker processes share its pages.
The process that wrote the file holds a shared flock on it, and removes it when the arrays are deleted or the process
ends. A killed process leaves its file behind without a lock; the next process that writes such a file then removes it.
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
    global _lock  # a thread of the parent may hold it for ever
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Spool:
    """File of some arrays, written on the first request for its ticket and removed with this object. Thread-safe."""

    def __init__(self) -> None:
        self._file: _File | None = None

    def ticket(self, arrays: Arrays) -> tuple[Any, ...] | None:
        """Return plain values by which `restore` finds the arrays; None if no file can be written.

        A forked child writes its own file, because the parent may remove its file at any time.

        Args:
            arrays: Arrays to pass on; the same ones in each call.
        """
        with _lock:  # two threads that pickle at once share one file
            if self._file is None or self._file.pid != os.getpid():
                _sweep()
                try:
                    self._file = _write(arrays)
                except OSError:  # a full disk makes pickles large, not wrong
                    return None
            return self._file.ticket


class _File:
    """File that this process has written and removes."""

    def __init__(self, path: Path, fd: int, ticket: tuple[Any, ...]) -> None:
        self.ticket = ticket
        self.pid = os.getpid()
        weakref.finalize(self, _remove, path, fd, self.pid)


def restore(ticket: tuple[Any, ...]) -> list[NDArray[np.int64] | None]:
    """Return the arrays of a ticket, mapped read-only; they stay valid after the file is removed.

    Raises:
        NotFound: The file is gone, or another file has its name.
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
        f"the file of a pickled selection of {n_records} records is gone: it exists on one machine, while the pickled "
        "data set exists. Keep that data set until its pickle has been read, or pickle its URL and record numbers",
        url=path,
    )


def _write(arrays: Arrays) -> _File:
    while True:
        fd, name = tempfile.mkstemp(prefix=PREFIX)
        path, token = Path(name), secrets.token_bytes(_TOKEN_BYTES)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            is_here = path.exists()  # False: another process swept it before it was locked
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
    """Close and remove the file; a forked child only closes its descriptor, because the file belongs to its parent."""
    os.close(fd)
    if pid == os.getpid():
        path.unlink(missing_ok=True)


def _sweep() -> None:
    """Remove the files of killed processes: no process holds a lock on them."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, already gone, or in use
            # O_NONBLOCK: opening a pipe of that name would block.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
