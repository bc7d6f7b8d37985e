"""From "wanted" to "published": the steps of one fetch, in one process, against all others."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache.cache.download import Download, checksum_of
from tiercache.cache.inherit import close_private, keep_private
from tiercache.cache.lease import open_leased
from tiercache.cache.locks import NameLock, try_shared
from tiercache.errors import CorruptShard, NotFound, ObjectChanged, StoreError
from tiercache.waiting import wait_for

if TYPE_CHECKING:
    from tiercache.cache.breaker import Breaker
    from tiercache.cache.evictor import Evictor
    from tiercache.cache.fetch import Fetch
    from tiercache.cache.folder import Folder
    from tiercache.cache.notices import Notices
    from tiercache.cache.owners import Owners
    from tiercache.cache.record import Wanted
    from tiercache.catalog import Accounts
    from tiercache.stats import Counters
    from tiercache.store import Store

# Waiting for another process's fetch: a minute, and the time its bytes take at a slow 2 MB/s. Then we fetch too.
LOCK_WAIT_S = 60.0
SLOWEST_BYTES_S = 2e6
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True)
class Publisher:
    """Fetches copies and publishes them. run() is called by one thread a fetch, many at once.

    unrecorded: copies found without a record; they are checked before they are trusted, and get one.
    """

    folder: Folder
    owners: Owners
    accounts: Accounts
    evictor: Evictor
    breaker: Breaker
    notices: Notices
    counters: Counters
    unrecorded: set[str] = field(default_factory=set)

    def run(self, fetch: Fetch) -> int:
        """A descriptor of the copy under a reader's lock; -1: there is no room for it, or the disk fails.

        Raises:
            StoreError, CorruptShard: of the source.
        """
        try:
            fd = self._run_locked(fetch)
        except StoreError:
            raise  # NotFound is an OSError too
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                self._disk_is_full()  # what it holds can be read all the same
            else:
                self.disk_failed(error)
            return -1
        if fd >= 0:
            self.breaker.mend()
        return fd

    def disk_failed(self, error: Exception) -> None:
        """Bypass the cache for a while, and say so once."""
        self.breaker.trip()
        self.notices.warn("disk", f"cache {self.folder.root}: {error}; reading past it until the disk works again")

    def _disk_is_full(self) -> None:
        self.notices.warn("full", f"cache {self.folder.root}: the disk is full; reading past the cache")

    def _run_locked(self, fetch: Fetch) -> int:
        wanted = fetch.wanted
        self.owners.ensure()
        lock = NameLock(self.folder.locks / wanted.name)
        deadline_s = LOCK_WAIT_S + wanted.n_bytes / SLOWEST_BYTES_S

        def ours_or_there() -> bool:
            if lock.try_take():
                return True
            fetch.step = f"waiting for {lock.holder()}"
            return self.folder.has_copy(wanted.name)

        try:
            # Whether it was got does not matter for what follows: without it the copy is fetched twice, published once.
            wait_for(ours_or_there, deadline_s, cancel=fetch.cancel)
            fd = self._existing(wanted)
            return self._fetch(fetch) if fd is None else fd
        finally:
            lock.give_back()

    def _existing(self, wanted: Wanted) -> int | None:
        """The copy that is there, if it is right; a wrong one is removed."""
        fd = open_leased(self.folder, wanted.name, wanted.n_bytes)
        if fd is None:
            self._remove_damaged(wanted)
            return None
        if wanted.name not in self.unrecorded:
            return fd
        try:
            whole = checksum_of(fd, wanted.n_bytes)
            if wanted.crc32c is None or whole == wanted.crc32c:
                self._enter(wanted, whole)
                return fd
            self.remove(wanted.name)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _remove_damaged(self, wanted: Wanted) -> None:
        """Remove a copy of another size than its name says: cut off by a power failure, or by somebody's hand."""
        if self.folder.size_of(wanted.name) not in (None, wanted.n_bytes):
            self.remove(wanted.name)

    def remove(self, name: str) -> None:
        """Remove a copy that is not what its name says. Readers keep what they have open."""
        self.folder.remove_copy(name)
        self.accounts.remove([name])
        self.unrecorded.discard(name)

    def _fetch(self, fetch: Fetch) -> int:
        """Reserve, download, publish; once more where the disk was full after all."""
        wanted = fetch.wanted
        for _ in range(2):
            if not self.evictor.reserve(wanted.name, wanted.n_bytes, spare=fetch.spare):
                return -1
            try:
                return self._download(fetch)
            except OSError as error:
                if isinstance(error, StoreError) or error.errno not in _FULL:
                    raise
            finally:
                self.accounts.release(wanted.name)
            self.evictor.free_disk(wanted.n_bytes, spare=fetch.spare)
        self._disk_is_full()
        return -1

    def _download(self, fetch: Fetch) -> int:
        """Fetch into a new file, check it and give it its name; the file is gone again after every failure."""
        wanted = fetch.wanted
        fd, temp = self.folder.new_temp(wanted.name, self.owners.me)
        keep_private(fd)
        try:
            os.ftruncate(fd, wanted.n_bytes)  # from its size a lost catalog knows what was reserved
            fetch.step = f"being fetched by process {os.getpid()}"
            whole = self._checked(fetch, fd)
            os.fchmod(fd, 0o444)
            lease_fd = os.open(temp, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                # Before it has its name, so that nobody can evict it before its readers have it.
                try_shared(lease_fd)
                # Where locks lie somebody else may have been first: then that copy is the one that is counted.
                other_fd = None if self._enter(wanted, whole, temp) else self._existing(wanted)
            except BaseException:
                os.close(lease_fd)
                raise
            if other_fd is None:
                return lease_fd
            os.close(lease_fd)
            return other_fd
        finally:
            close_private(fd)
            with suppress(FileNotFoundError):
                Path(temp).unlink()

    def _enter(self, wanted: Wanted, whole: int, temp: str | None = None) -> bool:
        """Write the record, then the name, then the books: after a crash in between whoever comes next puts it right.

        False: another copy had the name already.
        """
        record = wanted.record(whole)
        self.folder.write_record(wanted.name, record)
        was_first = temp is None or self.folder.publish(temp, wanted.name)
        self.accounts.publish(wanted.name, record.to_json(), wanted.n_bytes)
        self.unrecorded.discard(wanted.name)
        return was_first

    def _checked(self, fetch: Fetch, fd: int) -> int:
        """Download until the bytes are what they should be, at most twice; returns their checksum."""
        try:
            return self._attempt(fetch, fd)
        except (NotFound, ObjectChanged):
            raise
        except (StoreError, CorruptShard) as error:
            if fetch.cancel.is_set() or (isinstance(error, StoreError) and error.retryable):
                raise  # the back end has tried again already
        return self._attempt(fetch, fd)

    def _attempt(self, fetch: Fetch, fd: int) -> int:
        wanted, store = fetch.wanted, fetch.store
        whole = Download(wanted, store, fd, fetch.cancel).run()
        self.counters.add("bytes_fetched", wanted.n_bytes)
        if wanted.crc32c is not None and whole != wanted.crc32c:
            raise CorruptShard(
                f"fetched bytes have CRC-32C {whole:08x}, expected {wanted.crc32c:08x}", url=wanted.source
            )
        if wanted.identity is None and wanted.if_match is None:
            _check_unchanged(wanted, store)
        return whole


def _check_unchanged(wanted: Wanted, store: Store) -> None:
    """Where no strong ETag could guard the reading, the object must look the same after it."""
    info = store.head(wanted.key)
    if (info.n_bytes, info.etag) != (wanted.n_bytes, wanted.etag):
        raise ObjectChanged(url=wanted.source, expected=wanted.etag, found=info.etag)
