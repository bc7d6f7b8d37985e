"""A reader's hold on a cached copy, there already or still to come."""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.cache.locks import try_shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.cache.fetch import Fetch
    from tiercache.cache.folder import Folder
    from tiercache.model import ByteRange


def open_leased(folder: Folder, name: str, n_bytes: int) -> int | None:
    """A descriptor of the copy under a reader's lock; None: not there, being evicted, or not of that size.

    The race with eviction: (1) we open the file, (2) the evictor locks and unlinks it, (3) we get the lock on a file
    without a name. It would still be right, but nobody counts its bytes any more; so a file without a name is a miss.
    """
    fd = folder.open_copy(name)
    if fd is None:
        return None
    try:
        if try_shared(fd):
            status = os.fstat(fd)
            if status.st_nlink and status.st_size == n_bytes and stat.S_ISREG(status.st_mode):
                return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


class CopyLease:
    """A Lease on a copy. The copy is there from the start, or comes with a fetch that the lease has joined.

    Any thread may use it. After a fork the child's lease has a lock of its own under the same descriptor; one whose
    fetch was still running is not to be had in the child: wait() returns False there.
    """

    def __init__(self, n_bytes: int, *, fd: int = -1, fetch: Fetch | None = None) -> None:
        """Take over fd, which is locked for reading, or the place that was taken in fetch."""
        self._n_bytes, self._fd, self._fetch = n_bytes, fd, fetch
        self._lock = Lock()
        self._pid = os.getpid()
        _leases.add(self)

    @property
    def fd(self) -> int:
        """The descriptor; -1 before the copy is here and after close()."""
        return self._fd

    @property
    def n_bytes(self) -> int:
        """Size of the whole object."""
        return self._n_bytes

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        """Whether the copy is here and holds the ranges."""
        fetch = self._fetch
        if fetch is not None and self._pid == os.getpid() and fetch.is_done:
            self._settle(fetch)
        return self._fd >= 0 and all(wanted.end <= self._n_bytes for wanted in ranges)

    def want(self, ranges: Sequence[ByteRange]) -> None:
        """Start fetching the copy, or join who is. Copies are fetched whole."""
        fetch = self._fetch
        if fetch is not None and ranges and self._pid == os.getpid():
            fetch.start()

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        """Wait until the copy is here; False: it will not be (no room, disk fault, the fetch was a forked parent's).

        Raises:
            StoreError: the source failed, or deadline_s passed.
            CorruptShard: the source's bytes are, twice, not what the identity says.
        """
        fetch = self._fetch
        if fetch is not None and self._pid == os.getpid():
            fetch.start()
            fetch.wait(deadline_s)
            self._settle(fetch)
        return self.present(ranges)

    def _settle(self, fetch: Fetch) -> None:
        """Take our own descriptor from a finished fetch."""
        with self._lock:
            if self._fetch is fetch:
                self._fetch = None
                self._fd = fetch.claim()

    def close(self) -> None:
        """Give the copy back."""
        with self._lock:
            fd, fetch, self._fd, self._fetch = self._fd, self._fetch, -1, None
        if fd >= 0:
            os.close(fd)  # never LOCK_UN: closing ends this hold and no other
        if fetch is not None and self._pid == os.getpid():
            fetch.leave()

    def __enter__(self) -> CopyLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _renew(self) -> None:
        """In a forked child: open the same file anew, under the same number, so that the lock is the child's own."""
        self._lock = Lock()
        if self._fd < 0:
            return
        with contextlib.suppress(
            OSError
        ):  # without /proc: the inherited hold is kept, and lasts as long as either process
            own = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            try_shared(own)
            os.dup2(own, self._fd, inheritable=False)
            os.close(own)


_leases: weakref.WeakSet[CopyLease] = weakref.WeakSet()


def _renew_all() -> None:
    for lease in list(_leases):
        lease._renew()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)
