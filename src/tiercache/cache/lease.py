"""`CopyLease`: a reader's lease on a copy that is whole, partial, or still to be fetched."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import weakref
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.cache.locks import try_shared
from tiercache.cache.partial import read_verified
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.cache.fetch import Fetch
    from tiercache.cache.folder import Folder
    from tiercache.cache.partial import CopyHandle, UnitMap
    from tiercache.store import Span


def open_leased(folder: Folder, name: str, n_bytes: int) -> int | None:
    """Open a copy under a reader's lock; None: it is missing, being evicted, or has another size.

    The race with eviction: (1) the reader opens the file, (2) the evictor locks and unlinks it, (3) the reader locks a
    file without a name. Its data is still valid, but no process accounts for its bytes; so a file without a name is a
    miss.
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
    """A lease on a copy, which is whole, partial, or comes with a fetch. See Lease.

    The lease never changes to another file: if a partial copy is given up, this lease does not get the missing units.
    Any thread may use the lease. After a fork, the child's lease has its own lock on the same descriptor number, and it
    fetches nothing: missing data is not available to it.
    """

    def __init__(
        self,
        n_bytes: int,
        handle: CopyHandle | None = None,
        *,
        join: Callable[[], Fetch] | None = None,
        on_lookup: Callable[[bool], object] | None = None,
    ) -> None:
        """Create a lease, which then owns handle.

        Args:
            n_bytes: Size of the whole object.
            handle: Open copy; None: nothing is cached yet.
            join: Function that returns the fetch of the missing data, of which this lease is then a user; None: nothing
                is missing.
            on_lookup: Callback that is called once, with whether the first requested ranges were already cached.
        """
        self._n_bytes, self._join, self._on_lookup = n_bytes, join, on_lookup
        self._fetch: Fetch | None = None
        self._is_user = False
        self._lock = Lock()
        self._pid = os.getpid()
        # Last: from here on close() works.
        self._fd, self._presence = (-1, None) if handle is None else (handle.fd, handle.presence)
        _leases.add(self)

    @property
    def fd(self) -> int:
        """Descriptor of the copy; -1 before any data is cached, and after close()."""
        return self._fd

    @property
    def n_bytes(self) -> int:
        """Size of the whole object in bytes."""
        return self._n_bytes

    @property
    def presence(self) -> UnitMap | None:
        """Unit map of a copy that was partial when the lease was created."""
        return self._presence

    @property
    def n_descriptors(self) -> int:
        """Number of descriptors: 1 for a copy that was whole when the lease was created, else 2, with the unit map."""
        return 1 if self._fd >= 0 and self._presence is None else 2

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        """Return whether these bytes are cached."""
        fetch = self._fetch
        if self._fd < 0 and fetch is not None:
            self._claim(fetch)
        presence = self._presence
        if self._fd < 0:
            return False
        return all(span.end <= self._n_bytes for span in ranges) if presence is None else presence.covers(ranges)

    def read(self, spans: Sequence[Span]) -> bool:
        """Fill spans from a copy that was partial when the lease was created, each unit verified against the unit map.

        The result is False if the copy was whole, or the bytes are missing or corrupt; the contents of spans are then
        undefined. The file needs no name, so cached data can be read even after the copy was removed.
        """
        fd, presence = self._fd, self._presence
        if fd < 0 or presence is None or not presence.covers([span for span, _ in spans]):
            return False
        return read_verified(fd, presence, spans)

    def prefetch(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:
        """Start to fetch missing ranges, or join the fetch that brings them."""
        if ranges and not self._look_up(ranges):
            self._request(ranges, urgent=urgent)

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        """Wait until these bytes are cached; return False if they will not come. deadline_s: None is one hour.

        They do not come if there is no space, the disk failed, the object is corrupt at its source, or the fetch
        belonged to the parent of a fork.

        Raises:
            StoreError: The source failed, or the deadline passed.
        """
        is_present = self._look_up(ranges)
        fetch = self._publishing_fetch() if is_present else self._request(ranges, urgent=True)
        if fetch is None:
            return is_present or self.present(ranges)
        try:
            fetch.wait(ranges, deadline_s)
            self._claim(fetch)
        except CorruptShard:
            is_present = False  # corrupt at its source: a reader that reads by ranges learns which block
        else:
            is_present = self.present(ranges)
        if not is_present and (any(span.n_bytes for span in ranges) or not self._n_bytes):
            self._join = None  # refused: asking again for each block would cost milliseconds each
        return is_present

    def _look_up(self, ranges: Sequence[ByteRange]) -> bool:
        """Return whether these bytes are cached, and report the first result to the callback."""
        is_present = self.present(ranges)
        on_lookup, self._on_lookup = self._on_lookup, None
        if on_lookup is not None:
            on_lookup(is_present)
        return is_present

    def _publishing_fetch(self) -> Fetch | None:
        """Return the fetch that is about to publish the copy, whose units are all present; None: there is none."""
        presence, fetch = self._presence, self._fetch
        is_complete = presence is not None and presence.covers([ByteRange(0, self._n_bytes)])
        return fetch if is_complete and self._pid == os.getpid() else None

    def _request(self, ranges: Sequence[ByteRange], *, urgent: bool) -> Fetch | None:
        """Request ranges from the fetch of this copy, or from a new one; None: no fetch can bring them."""
        join = self._join
        if join is None or self._pid != os.getpid() or any(span.end > self._n_bytes for span in ranges):
            return None
        while True:
            fetch = self._fetch
            if fetch is not None and fetch.request(ranges, urgent=urgent):
                return fetch
            fetch = join()
            is_requested = fetch.request(ranges, urgent=urgent)
            self._follow(fetch)
            if is_requested:
                return fetch

    def _follow(self, fetch: Fetch) -> None:
        """Use this fetch from now on. The lease stays its user until the lease has a descriptor of its own."""
        with self._lock:
            before, was_user = self._fetch, self._is_user
            self._fetch, self._is_user = fetch, self._fd < 0
        if before is not None and was_user:
            before.leave()
        if not self._is_user:
            fetch.leave()

    def _claim(self, fetch: Fetch) -> None:
        """Take a handle on the file from a fetch, if this lease has none and the fetch has one by now."""
        with self._lock:
            if self._fd >= 0 or self._fetch is not fetch or not self._is_user or self._pid != os.getpid():
                return
            handle, has_left = fetch.claim()
            if handle is not None:
                self._presence, self._fd = handle.presence, handle.fd
            self._is_user = not has_left

    def close(self) -> None:
        """Close the descriptors and leave the fetch."""
        with self._lock:
            fd, presence, fetch, is_user = self._fd, self._presence, self._fetch, self._is_user
            self._fd, self._presence, self._fetch, self._is_user = -1, None, None, False
            self._join = None
        if fd >= 0:
            os.close(fd)  # never LOCK_UN, which would end the lock of all duplicates
        if presence is not None:
            presence.close()
        if fetch is not None and is_user and self._pid == os.getpid():
            fetch.leave()

    def __enter__(self) -> CopyLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        # No _fd: Ctrl-C came during construction. A closed lease is skipped, because Python discards a Ctrl-C in here.
        if not is_exiting() and hasattr(self, "_fd") and (self._fd >= 0 or self._is_user or self._presence is not None):
            self.close()

    def _renew(self) -> None:
        """In a forked child, open the same file again under the same number, so that the child has its own lock."""
        self._lock = Lock()
        if self._fd < 0:
            return
        # Without /proc the inherited descriptor is kept: its lock lasts as long as either process has it open.
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            try_shared(own)
            os.dup2(own, self._fd, inheritable=False)
            os.close(own)


_leases: weakref.WeakSet[CopyLease] = weakref.WeakSet()


def _renew_all() -> None:
    for lease in list(_leases):
        lease._renew()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)
