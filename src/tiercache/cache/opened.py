"""What one process has of an open cache: owner file, accounts, fetch threads. A forked child makes its own."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.cache.breaker import Breaker
from tiercache.cache.evictor import Evictor
from tiercache.cache.fetch import Fetcher
from tiercache.cache.folder import Folder
from tiercache.cache.lease import CopyLease, open_leased
from tiercache.cache.locks import NameLock
from tiercache.cache.machine import boot_id, room
from tiercache.cache.owners import Owners
from tiercache.cache.policy import POLICIES
from tiercache.cache.publisher import Publisher
from tiercache.catalog import Accounts
from tiercache.model import ByteRange, format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tiercache.cache.notices import Notices
    from tiercache.cache.record import Wanted
    from tiercache.stats import Counters
    from tiercache.store import Store

USES_PER_FLUSH = 1024


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How a cache was asked for. size: bytes, "200GB" or "80%" of the disk; free_floor: what stays free of the disk."""

    path: Path
    size: int | str
    policy: str = "plan"
    free_floor: str = "5%"

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for what cannot be."""
        parse_bytes(self.size, whole_bytes=1)
        parse_bytes(self.free_floor, whole_bytes=1)
        if self.policy not in POLICIES:
            raise ValueError(f"no policy is called {self.policy!r}; there are {', '.join(sorted(POLICIES))}")


class Writing:
    """The parts of an open cache that need a folder that can be written."""

    def __init__(
        self, folder: Folder, options: CacheOptions, counters: Counters, notices: Notices, *, keep: Callable[[], object]
    ) -> None:
        self.limit_bytes = parse_bytes(options.size, whole_bytes=room(folder.root).total_bytes)
        self.folder, self.notices = folder, notices
        self.owners = Owners(folder, self.limit_bytes)
        me = str(self.owners.me)
        self.accounts = Accounts(folder.catalog, me, self.owners, wal=folder.network is None, boot=boot_id())
        self.evictor = Evictor(folder, self.accounts, counters, policy=options.policy, free_floor=options.free_floor)
        self.breaker = Breaker()
        self.publisher = Publisher(folder, self.owners, self.accounts, self.evictor, self.breaker, notices, counters)
        self.fetcher = Fetcher(self.publisher.run, keep)

    def sweep(self) -> None:
        """Put right what others left: files of the dead, records without copies, books that disagree with the files."""
        self.owners.bury_all()
        self.accounts.reconcile()
        self.publisher.unrecorded |= self.accounts.unrecorded()
        sizes = self.folder.sizes()
        for name in {*self.folder.names(".json"), *self.folder.names(".pin")} - sizes.keys():
            self._sweep_beside(name)
        for path in self.folder.locks.iterdir():
            lock = NameLock(path)
            if lock.try_take():
                lock.give_back()

    def _sweep_beside(self, name: str) -> None:
        """Remove record and pin of a copy that is not there, unless it is just being published."""
        lock = NameLock(self.folder.locks / name)
        if lock.try_take():
            try:
                if not self.folder.has_copy(name) and not self.accounts.is_reserved(name):
                    self.folder.remove_record(name)
                    self.folder.unpin(name)
            finally:
                lock.give_back()

    def keep_to_limit(self) -> None:
        """Register the limit; give up what a smaller one than before has no room for."""
        smallest = self.accounts.register(self.limit_bytes)
        if smallest < self.limit_bytes:
            self.notices.warn(
                "limit",
                f"cache {self.folder.root}: opened with {format_bytes(self.limit_bytes)}, but another process keeps it "
                f"to {format_bytes(smallest)}; the smaller limit holds",
            )
        used, reserved, limit = self.accounts.sums()
        if used + reserved > limit:
            self.evictor.shrink(used + reserved - limit)

    def close(self) -> None:
        """Stop the fetches, book the uses, give the owner file up."""
        self.fetcher.close()
        with suppress(OSError, sqlite3.Error):
            self.evictor.flush_uses()
            self.accounts.unregister()
        self.accounts.close()
        self.owners.close()


class Opened:
    """An open cache in one process. writing: None where the folder can only be read: then only hits are served."""

    def __init__(
        self, options: CacheOptions, counters: Counters, notices: Notices, *, keep: Callable[[], object]
    ) -> None:
        """Open the folder, sweep it, and register. keep: see Fetcher.

        Raises:
            ValueError, OSError: it cannot be a cache's folder.
        """
        self.pid = os.getpid()
        self._distrusted: set[str] = set()
        self.folder = Folder(options.path)
        self.notices, self.counters = notices, counters
        self.writing: Writing | None = None
        if self.folder.network:
            notices.warn(
                "network",
                f"cache {options.path}: lies on {self.folder.network}, which other machines share; using the folder "
                f"{self.folder.root.name} of this machine alone. A local disk is faster",
            )
        try:
            self.writing = self._open_writing(options, keep)
        except (OSError, sqlite3.Error) as error:
            if not (self.folder.copies).is_dir():
                raise
            notices.warn("read-only", f"cache {options.path}: cannot be written ({error}); serving what it holds")

    def _open_writing(self, options: CacheOptions, keep: Callable[[], object]) -> Writing:
        writing = Writing(self.folder, options, self.counters, self.notices, keep=keep)
        try:
            writing.sweep()
            writing.keep_to_limit()
        except BaseException:
            writing.close()
            raise
        return writing

    def hit(self, name: str, n_bytes: int) -> CopyLease | None:
        """A lease on a copy that is there; None: a miss. No SQLite but a flush after every USES_PER_FLUSH copies."""
        writing = self.writing
        lease = self.look(name, n_bytes)
        if lease is not None and writing is not None:
            try:
                if writing.evictor.note_use(name) >= USES_PER_FLUSH:
                    writing.evictor.flush_uses()
            except (OSError, sqlite3.Error) as error:
                writing.publisher.disk_failed(error)
        return lease

    def look(self, name: str, n_bytes: int) -> CopyLease | None:
        """As hit(), but no use of the copy."""
        writing = self.writing
        if name in self._distrusted or (writing is not None and name in writing.publisher.unrecorded):
            return None
        try:
            fd = open_leased(self.folder, name, n_bytes)
        except OSError as error:
            if writing is not None:
                writing.publisher.disk_failed(error)
            return None
        if fd is None:
            return None
        if writing is not None and writing.breaker.is_open:
            writing.breaker.mend()
        return CopyLease(n_bytes, fd=fd)

    def discard(self, name: str) -> None:
        """Remove a copy that is wrong; where it cannot be removed it is never served by this process again."""
        try:
            if self.writing is not None:
                self.writing.publisher.remove(name)
                return
        except (OSError, sqlite3.Error) as error:
            self.notices.warn("discard", f"cache {self.folder.root}: a damaged copy cannot be removed: {error}")
        self._distrusted.add(name)

    def open(self, wanted: Wanted, store: Store) -> CopyLease | None:
        """A lease on a copy, there or to come; None: read past the cache."""
        writing = self.writing
        lease = None
        if writing is None or writing.breaker.allows():
            lease = self.hit(wanted.name, wanted.n_bytes)
            if lease is None and writing is not None and self._admits(writing, wanted):
                lease = CopyLease(wanted.n_bytes, fetch=writing.fetcher.join(wanted, store))
        self.counters.add("hits" if lease is not None and lease.fd >= 0 else "misses")
        return lease

    def fetch_ahead(self, wanted: Wanted, store: Store) -> None:
        """Start fetching a copy that is not here, if it is admitted. Nobody waits for it, and it counts as no use."""
        writing = self.writing
        if writing is None or not writing.breaker.allows() or self.folder.has_copy(wanted.name):
            return
        if self._admits(writing, wanted):
            with CopyLease(wanted.n_bytes, fetch=writing.fetcher.join(wanted, store)) as lease:
                lease.want([ByteRange(0, wanted.n_bytes)])

    def _admits(self, writing: Writing, wanted: Wanted) -> bool:
        try:
            writing.owners.ensure()  # of a deleted folder one cannot ask how much room it has
            coming = writing.fetcher.is_coming(wanted.name) or wanted.name in writing.publisher.unrecorded
            return coming or not writing.evictor.would_refuse(wanted.name, wanted.n_bytes)
        except (OSError, sqlite3.Error) as error:
            writing.publisher.disk_failed(error)
            return False

    def close(self) -> None:
        """Give everything back. In a forked child: nothing, it is the parent's."""
        if self.writing is not None and self.pid == os.getpid():
            self.writing.close()
