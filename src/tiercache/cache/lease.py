"""A reader's hold on a cached copy: whole, in part, or still to come."""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.cache.locks import try_shared
from tiercache.cache.verified import read_held
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.cache.fetch import Fetch
    from tiercache.cache.folder import Folder
    from tiercache.cache.partial import Held
    from tiercache.store import Span


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
    """A Lease on a copy, which is here, here in part, or comes with a fetch.

    The file behind it never becomes another one: where a part is given up, what is missing of it does not come by this
    lease. Any thread may use it. After a fork the child's lease has a lock of its own under the same descriptor; it
    asks for nothing more there: what is not here is not to be had by it.
    """

    def __init__(
        self,
        n_bytes: int,
        held: Held | None = None,
        *,
        join: Callable[[], Fetch] | None = None,
        tell: Callable[[bool], object] | None = None,
    ) -> None:
        """Take over held.

        Args:
            n_bytes: of the whole object.
            held: None: nothing of it is here.
            join: gives the fetch that brings what is missing, with a place in it taken; None: nothing is missing.
            tell: told once, True where the first ranges asked for are here already.
        """
        self._n_bytes, self._join, self._tell = n_bytes, join, tell
        self._fetch: Fetch | None = None
        self._has_place = False
        self._lock = Lock()
        self._pid = os.getpid()
        self._fd, self._presence = (-1, None) if held is None else (held.fd, held.presence)  # last: then it can close
        _leases.add(self)

    @property
    def fd(self) -> int:
        """The descriptor; -1 before anything is here and after close()."""
        return self._fd

    @property
    def n_bytes(self) -> int:
        """Size of the whole object."""
        return self._n_bytes

    @property
    def is_whole(self) -> bool:
        """Whether all of it was here when the lease was made."""
        return self._fd >= 0 and self._presence is None

    @property
    def n_descriptors(self) -> int:
        """One; two, with the map of the units that are here, of what was not whole when the lease was made."""
        return 1 if self.is_whole else 2

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        """Whether these bytes are here."""
        fetch = self._fetch
        if self._fd < 0 and fetch is not None:
            self._settle(fetch)
        presence = self._presence
        if self._fd < 0:
            return False
        if presence is None:
            return all(wanted.end <= self._n_bytes for wanted in ranges)
        return presence.covers(ranges)

    def read(self, spans: Sequence[Span]) -> bool:
        """Fill spans from what was a part when the lease was taken, each unit held against its map.

        False: it was whole, or these bytes are not here, or wrong; then spans are undefined. It needs no name, so that
        what is here can be read after the copy was removed.
        """
        fd, presence = self._fd, self._presence
        if fd < 0 or presence is None or not presence.covers([wanted for wanted, _ in spans]):
            return False
        return read_held(fd, presence, spans)

    def want(self, ranges: Sequence[ByteRange]) -> None:
        """Start fetching what is missing, or join who is."""
        if ranges and not self._is_settled(ranges):
            self._ask(ranges, urgent=False)

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        """Wait until these bytes are here; False: they will not be.

        No room, a disk fault, a source that is bad, or the fetch was a forked parent's.

        Raises:
            StoreError: the source failed, or deadline_s passed.
        """
        is_here = self._is_settled(ranges)
        fetch = self._ending() if is_here else self._ask(ranges, urgent=True)
        if fetch is None:
            return is_here or self.present(ranges)
        try:
            fetch.wait(ranges, deadline_s)
            self._settle(fetch)
        except CorruptShard:
            is_here = False  # bad at its source: whoever reads it by ranges hears which block
        else:
            is_here = self.present(ranges)
        if not is_here and (any(wanted.n_bytes for wanted in ranges) or not self._n_bytes):
            self._join = None  # refused: asking again, block by block, would cost each of them milliseconds
        return is_here

    def _is_settled(self, ranges: Sequence[ByteRange]) -> bool:
        """Whether these bytes are here; the first answer is told."""
        is_here = self.present(ranges)
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(is_here)
        return is_here

    def _ending(self) -> Fetch | None:
        """The fetch that is about to give a part its name: all bytes are here, and are being checked as a whole."""
        presence, fetch = self._presence, self._fetch
        is_all_here = presence is not None and presence.covers([ByteRange(0, self._n_bytes)])
        return fetch if is_all_here and self._pid == os.getpid() else None

    def _ask(self, ranges: Sequence[ByteRange], *, urgent: bool) -> Fetch | None:
        """Ask the fetch of this copy, or the next one; None: nobody brings these."""
        join = self._join
        if join is None or self._pid != os.getpid() or any(wanted.end > self._n_bytes for wanted in ranges):
            return None
        while True:
            fetch = self._fetch
            if fetch is not None and fetch.ask(ranges, urgent=urgent):
                return fetch
            fetch = join()
            is_asked = fetch.ask(ranges, urgent=urgent)
            self._take(fetch)
            if is_asked:
                return fetch

    def _take(self, fetch: Fetch) -> None:
        """Make this the fetch that is asked from now on; the place in it is kept while we have no hold on the file."""
        with self._lock:
            before, had_place = self._fetch, self._has_place
            self._fetch, self._has_place = fetch, self._fd < 0
        if before is not None and had_place:
            before.leave()
        if not self._has_place:
            fetch.leave()

    def _settle(self, fetch: Fetch) -> None:
        """Take our own hold on the file from a fetch, if we have none and it has one by now."""
        with self._lock:
            if self._fd >= 0 or self._fetch is not fetch or not self._has_place or self._pid != os.getpid():
                return
            held, is_over = fetch.claim()
            if held is not None:
                self._presence, self._fd = held.presence, held.fd
            self._has_place = not is_over

    def close(self) -> None:
        """Give the copy back."""
        with self._lock:
            fd, presence, fetch, had_place = self._fd, self._presence, self._fetch, self._has_place
            self._fd, self._presence, self._fetch, self._has_place = -1, None, None, False
            self._join = None
        if fd >= 0:
            os.close(fd)  # never LOCK_UN: closing ends this hold and no other
        if presence is not None:
            presence.close()
        if fetch is not None and had_place and self._pid == os.getpid():
            fetch.leave()

    def __enter__(self) -> CopyLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Without _fd Ctrl-C struck while it was made; a closed one is left alone, since Python drops a Ctrl-C in here.
        if hasattr(self, "_fd") and (self._fd >= 0 or self._has_place or self._presence is not None):
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
