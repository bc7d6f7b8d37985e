"""`Publisher`: carries out one fetch, from the request to the published copy, beside all other processes.

`PartialFetch` holds the reserved space and the partial copy of one fetch.
"""

from __future__ import annotations

import errno
import os
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache import corrupt_sources
from tiercache.cache.fetch.download import Download
from tiercache.cache.fetch.partial import CopyHandle, PartialCopy, charge_of, hold_part, map_bytes
from tiercache.cache.fetch.units import Mask, checksum_of, n_units
from tiercache.cache.lease import open_leased
from tiercache.cache.machine import NameLock, is_disk_full
from tiercache.catalog import charge_bytes
from tiercache.catalog.accounts import BLOCK_BYTES
from tiercache.crash_points import crash_point
from tiercache.errors import CorruptShard, ObjectChanged, StoreError
from tiercache.file_limit import emfile_message
from tiercache.model import format_bytes
from tiercache.waiting import wait_for

if TYPE_CHECKING:
    from tiercache.cache.evict.evictor import Evictor
    from tiercache.cache.fetch.download import Fetch
    from tiercache.cache.folder import Folder, Owners
    from tiercache.cache.machine import Breaker, Notices
    from tiercache.cache.names import CopySpec
    from tiercache.catalog import Accounts
    from tiercache.stats import Counters


class PartialFetch:
    """The reserved space and the partial copy of one fetch.

    Space is reserved before the first byte, and the accounts are settled at the end. admit() and part() are called with
    the lock of the download held, or before the download starts. The reservation covers the space beyond what the
    accounts already charge for the partial copy; a larger reservation replaces a smaller one.
    """

    def __init__(self, publisher: Publisher, fetch: Fetch, lock: NameLock) -> None:
        """Open the existing partial copy, if there is one, and offer it to the waiting leases. Raises OSError.

        Args:
            publisher: Publisher that runs the fetch.
            fetch: The fetch.
            lock: Lock of the name; on file systems where flock is not enforced, another process may hold it too.
        """
        self._publisher, self.fetch, self._lock = publisher, fetch, lock
        self._wanted = fetch.wanted
        self.reserved_bytes = 0
        self._booked_bytes = 0
        fetch.step = f"being fetched by process {os.getpid()}"
        self._part = PartialCopy.open(publisher.folder, self._wanted.name, self._wanted.n_bytes)
        self.present: Mask = np.zeros(n_units(self._wanted.n_bytes), bool)
        if self._part is not None:
            self.present = self._part.present
            self._begin(self._part)

    def _begin(self, part: PartialCopy) -> None:
        """Enter an existing partial copy in the accounts and offer it to readers; on an error it is closed."""
        try:
            self._make_known(part)
        except BaseException as error:
            with closing(part):  # for example, the disk is too full for the record; a later fetch starts again
                # Another process deletes these files, and drop() would not know this one.
                if isinstance(error, FileNotFoundError):
                    part.unlink_names(keep_map=False)
            raise

    def _make_known(self, part: PartialCopy) -> None:
        folder, name = self._publisher.folder, self._wanted.name
        if folder.read_record(name) is None:
            folder.write_record(name, self._wanted.record(self._wanted.crc32c))
            crash_point("fetch.recorded")
        # Committing releases the reservation. A partial copy that another process created is charged at its current
        # size; this happens on file systems where flock is not enforced.
        if part.present.any() and not self.reserved_bytes:
            self._booked_bytes = charge_of(part.present, part.n_bytes)
            self._publisher.book(self._wanted, self._record(), self._booked_bytes)
        self.fetch.set_file(part.hold(), part.present)

    def _record(self) -> str:
        return self._wanted.record(self._wanted.crc32c).to_json()

    def is_whole(self) -> bool:
        """Return whether all units are present by now."""
        if self._part is not None:
            self._part.look_again()
        return self._part is not None and bool(self.present.all())

    def admit(self, units: Mask) -> bool:
        """Reserve space for a partial copy of these units; return False if there is no space."""
        need_bytes = max(charge_of(units, self._wanted.n_bytes) - self._booked_bytes, 0)
        evictor, name = self._publisher.evictor, self._wanted.name
        self.note(need_bytes)
        if not evictor.reserve(name, need_bytes, spare=self.fetch.spare | {name}):
            self.note(self.reserved_bytes)
            self._publisher.warn_no_space(self._wanted, need_bytes)
            return False
        if not self.reserved_bytes:
            evictor.note_fetch(name)
        self.reserved_bytes = need_bytes
        crash_point("fetch.reserved")
        return True

    def note(self, n_bytes: int) -> None:
        """Note in the lock file how many bytes this fetch may still add, in case the accounts must be rebuilt."""
        self._lock.note({"owner": str(self._publisher.owners.me), "reserved_bytes": n_bytes})

    def part(self) -> PartialCopy:
        """Return the partial copy to write to; the first call creates it. Raises OSError."""
        part = self._part
        if part is None:
            folder, name, n_bytes = self._publisher.folder, self._wanted.name, self._wanted.n_bytes
            try:
                part = PartialCopy.create(folder, name, n_bytes)
            except FileExistsError:  # without enforced flock: another process has created one since the last check
                found = PartialCopy.open(folder, name, n_bytes)
                if found is None:
                    raise FileNotFoundError(errno.ENOENT, "gone as soon as it was made", name) from None
                part = found
            self._begin(part)
            self._part, self.present = part, part.present
        return part

    def book(self) -> None:
        """Set the charge of the partial copy in the accounts to its present size; one without units is removed."""
        self.note(0)  # first: after the commit, the note would be counted whenever the accounts are rebuilt
        if self._part is None or not self._part.has_name:  # another process found it corrupt and removed it
            self._publisher.accounts.release(self._wanted.name)
        elif self.present.any():
            self._publisher.book(self._wanted, self._record(), charge_of(self.present, self._wanted.n_bytes))
            crash_point("fetch.booked")
        else:
            self.drop()

    def drop(self) -> None:
        """Remove the partial copy and its charge.

        If it has lost its name, the name belongs to another file and is left alone.
        """
        self.note(0)
        self.fetch.reset()  # with our own handle open, the file would count as deleted but still in use
        if self._part is not None and self._part.has_name:
            self._publisher.remove(self._wanted.name)
        self._publisher.accounts.release(self._wanted.name)

    def end(self, error: BaseException) -> None:
        """After an error, keep what has come for a later fetch, unless the object has changed at its source."""
        with suppress(OSError):  # the first error is the one to report
            if isinstance(error, ObjectChanged):
                self.drop()
            else:
                self.book()

    def close(self) -> None:
        """Close the partial copy."""
        if self._part is not None:
            self._part.close()


# Wait for another process's fetch: one minute, plus the time for its bytes at a slow 2 MB/s. Then this process fetches
# too.
LOCK_WAIT_S = 60.0
SLOWEST_BYTES_S = 2e6
REMOVE_WAIT_S = 10.0
# How often a partial copy is started again after its name was removed while it grew: by another process on a file
# system where flock is not enforced, or by hand.
MAX_BEGINNINGS = 3


@dataclass(slots=True)
class Publisher:
    """Fetches copies and publishes them. run() is called by one thread per fetch, and by many threads at once.

    Attributes:
        unrecorded: Names of copies without a record. Each is verified before it is used, and then gets a record.
    """

    folder: Folder
    owners: Owners
    accounts: Accounts
    evictor: Evictor
    breaker: Breaker
    notices: Notices
    counters: Counters
    unrecorded: set[str] = field(default_factory=set)

    def run(self, fetch: Fetch) -> None:
        """Fetch the requested units. Units for which there is no space, or for which the disk fails, are refused.

        Raises:
            StoreError, CorruptShard: The source failed, or the object is corrupt at its source.
        """
        try:
            try:
                self._run_locked(fetch)
            except OSError as error:
                if isinstance(error, StoreError) or not is_disk_full(error):
                    raise
                # The disk was full for a record, a name or the accounts, which downloads do not handle. What was
                # fetched stays.
                self.evictor.free_disk(charge_bytes(fetch.wanted.n_bytes), spare=fetch.spare)
                self._run_locked(fetch)
        except StoreError:
            raise  # NotFound is also an OSError
        except OSError as error:
            self.disk_failed(error)
        else:
            self.breaker.mend()

    def disk_failed(self, error: Exception) -> None:
        """Bypass the cache for some time and warn once.

        If the disk is merely full, the cached copies can still be read.
        """
        if self.owners.is_closed:
            return  # the cache was closed during the fetch: the disk is all right
        if is_disk_full(error):
            self.disk_is_full()
            return
        self.breaker.trip()
        what = emfile_message(error) or error
        self.notices.warn("disk", f"cache {self.folder.root}: {what}; bypassing the cache until the disk works again")

    def disk_is_full(self) -> None:
        """Warn once that the disk is full."""
        self.notices.warn(
            "full",
            f"cache {self.folder.root}: the disk is full; data that is not cached is fetched again in every epoch; "
            "free disk space, or put the cache on another disk (TIERCACHE_CACHE_DIR)",
        )

    def warn_no_space(self, wanted: CopySpec, need_bytes: int) -> None:
        """Warn once that an object has no space although its data set, which is open, could be cached as a whole."""
        dataset_id = "" if wanted.identity is None else wanted.identity.dataset_id
        if not self.notices.is_expected(dataset_id):
            return
        used_bytes, reserved_bytes, limit_bytes = self.accounts.sums()
        spare_bytes = max(self.evictor.spare_bytes(), 0)
        if spare_bytes < need_bytes:
            why = f"the disk has only {format_bytes(spare_bytes)} left above the cache's min_free"
            do = "free disk space, lower min_free=, or put the cache on another disk (TIERCACHE_CACHE_DIR)"
        else:
            taken = f"{format_bytes(used_bytes + reserved_bytes)} of {format_bytes(limit_bytes)}"
            why = f"{taken} are used by copies that are pinned, in use or needed sooner"
            do = (
                "unpin or evict some of them (tiercache status lists them), or make the cache larger "
                "(TIERCACHE_CACHE_SIZE, or Cache(path, size=...))"
            )
        self.notices.warn_expected(
            dataset_id,
            f"cache {self.folder.root} has no space: the next object needs {format_bytes(need_bytes)}, but {why}. Data "
            f"that does not fit is not cached and is fetched again in every epoch; {do}",
        )

    def _run_locked(self, fetch: Fetch) -> None:
        """Fetch under the lock of the name. Other processes watch the unit map, and take over if this process ends.

        Without the lock (after a long wait, or on a file system where flock is not enforced), some bytes are fetched
        twice, and nothing else happens.
        """
        wanted = fetch.wanted
        self.owners.ensure()
        lock = NameLock(self.folder.locks / wanted.name)
        deadline_s = LOCK_WAIT_S + wanted.n_bytes / SLOWEST_BYTES_S
        try:
            while not fetch.close_if_done():
                is_there = wait_for(lambda: self._watch(fetch, lock), deadline_s, cancel=fetch.cancel)
                if fetch.cancel.is_set():
                    raise StoreError("cancelled", url=wanted.source, retryable=True)
                if not is_there or lock.is_held:
                    self._fetch(fetch, lock)
                    return
        finally:
            lock.release()

    def _watch(self, fetch: Fetch, lock: NameLock) -> bool:
        """Return whether this process may fetch, or another one has fetched all requested units.

        Waiting leases learn which units the other process has fetched.
        """
        if lock.try_acquire():
            return True
        fetch.step = f"waiting for {lock.holder()}"
        wanted = fetch.wanted
        fd = None if wanted.name in self.unrecorded else open_leased(self.folder, wanted.name, wanted.n_bytes)
        if fd is not None:
            _offer(fetch, CopyHandle(fd))
            return True
        held = hold_part(self.folder, wanted.name, wanted.n_bytes)
        if held is None:
            return False
        present = _offer(fetch, held)
        # A partial copy with all units gets its final name in a moment.
        return not present.all() and not fetch.missing_units()[0].any()

    # -- existing copies -----------------------------------------------------------------------------------------------

    def _fetch(self, fetch: Fetch, lock: NameLock) -> None:
        """Serve the request from an existing copy, or fetch what is missing, and once more if it was corrupt."""
        if self._offer_copy(fetch):
            return
        wanted, wrong = fetch.wanted, None
        for _ in range(2):
            wrong = self._fetch_missing(fetch, lock)
            if wrong is None:
                return
        self.counters.add("poisoned")
        expected = "?"
        if wanted.crc32c is not None:
            expected = f"{wanted.crc32c:08x}"
            corrupt = corrupt_sources.CorruptSource(wanted.source, wanted.crc32c, wrong)
            corrupt_sources.record_corrupt_source(self.folder, wanted.name, corrupt)
        raise CorruptShard(
            f"corrupt at its source: two fetches did not match the checksum (CRC-32C {wrong:08x}, expected {expected})",
            url=wanted.source,
        )

    def _offer_copy(self, fetch: Fetch) -> bool:
        fd = self._existing(fetch.wanted)
        if fd is not None:
            _offer(fetch, CopyHandle(fd))
        return fd is not None and fetch.close_if_done()

    def _existing(self, wanted: CopySpec) -> int | None:
        """Return a descriptor of the existing copy if it is valid; remove a corrupt one."""
        fd = open_leased(self.folder, wanted.name, wanted.n_bytes)
        if fd is None:
            self._remove_damaged(wanted)
            return None
        if wanted.name not in self.unrecorded:
            return fd
        try:
            whole = checksum_of(fd, wanted.n_bytes)
            if wanted.crc32c is None or whole == wanted.crc32c:
                self._commit(wanted, whole)
                return fd
            self.remove(wanted.name)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _remove_damaged(self, wanted: CopySpec) -> None:
        """Remove a copy of the wrong size: a power failure or a person truncated it."""
        if self.folder.size_of(wanted.name) not in (None, wanted.n_bytes):
            self.remove(wanted.name)
            self.counters.add("quarantined")

    def remove(self, name: str) -> None:
        """Remove a corrupt copy, whole or partial. Readers keep the files that they have open."""
        self.folder.remove_copy(name)
        crash_point("corrupt.removed")
        self.accounts.remove([name])
        self.unrecorded.discard(name)

    def remove_corrupt(self, name: str, fd: int) -> bool:
        """Remove the corrupt copy that fd is open on; return False if another process has done so.

        The race with another reader of the same copy: (1) both verify the file, (2) the other one removes it and a
        correct copy takes its name, (3) this one removes the correct copy. Therefore the copy is removed only while it
        is the file that was verified.

        Raises:
            OSError: The disk or the catalog failed; the copy may still be in place.
        """
        lock = NameLock(self.folder.locks / name)
        try:
            # Without the lock the result is the same, except for a second download.
            wait_for(lock.try_acquire, REMOVE_WAIT_S)
            try:
                is_same = os.path.samestat(os.lstat(self.folder.copy_path(name)), os.fstat(fd))
            except FileNotFoundError:
                is_same = False
            if is_same:
                self.remove(name)
                self.counters.add("quarantined")
            return is_same
        finally:
            lock.release()

    # -- download ------------------------------------------------------------------------------------------------------

    def _fetch_missing(self, fetch: Fetch, lock: NameLock) -> int | None:
        """Extend the partial copy while units are requested, and publish it when it is complete.

        Returns:
            None: The fetch is closed. Otherwise the CRC-32C of a complete file that was corrupt and is removed.
        """
        for _ in range(MAX_BEGINNINGS):
            growth = PartialFetch(self, fetch, lock)
            try:
                return self._fetch_into(fetch, growth)
            except FileNotFoundError as error:
                if isinstance(error, StoreError):
                    growth.end(error)
                    raise
                fetch.reset()
                self.owners.ensure()
                growth.drop()
            except BaseException as error:
                growth.end(error)
                raise
            finally:
                growth.close()
            if self._offer_copy(fetch):  # without enforced flock: a copy of the process that took the name
                return None
        fetch.refuse(fetch.missing_units()[0])  # another process deletes partial copies as fast as they are created
        return None

    def _fetch_into(self, fetch: Fetch, growth: PartialFetch) -> int | None:
        """Extend one partial copy; see _fetch_missing().

        If the disk is full, evict and retry once; then refuse the missing units.
        """
        download = Download(fetch, growth.part, growth.admit, self.counters, growth.present)
        while True:
            was_full = False
            while fetch.missing_units()[0].any():
                try:
                    download.run()
                    was_full = False
                except OSError as error:
                    if isinstance(error, StoreError) or not is_disk_full(error):
                        raise
                    if was_full:
                        fetch.refuse(fetch.missing_units()[0])
                        self.disk_is_full()
                    else:
                        self.evictor.free_disk(growth.reserved_bytes, spare=fetch.spare | {fetch.wanted.name})
                    was_full = not was_full
            if growth.is_whole():
                growth.note(0)
                wrong = self._publish(fetch, growth.part(), download.whole_sum())
                if wrong is not None:
                    fetch.reset()
                elif not fetch.close_if_done():
                    continue
                return wrong
            if fetch.close_if_done():
                growth.book()
                return None

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _publish(self, fetch: Fetch, part: PartialCopy, whole: int | None) -> int | None:
        """Verify a complete partial copy, give it its final name, and enter it in the accounts.

        Returns:
            None: The copy is published. Otherwise the CRC-32C of the file, which was corrupt and is removed.
        """
        wanted = fetch.wanted
        if whole is None:
            whole = checksum_of(part.fd, wanted.n_bytes)
        if wanted.crc32c is not None and whole != wanted.crc32c:
            self.remove(wanted.name)
            self.accounts.release(wanted.name)
            return whole
        crash_point("publish.checked")
        part.seal(self.folder.rights.copy)
        crash_point("publish.sealed")
        was_first = self._commit(wanted, whole, part)
        if not was_first:  # without enforced flock: the copy that has the name is the one that counts
            self._offer_copy(fetch)
        return None

    def _commit(self, wanted: CopySpec, whole: int, part: PartialCopy | None = None) -> bool:
        """Write the record, then the name, then the accounts, so that the next process can repair a crash in between.

        Returns:
            False: Another copy had the name already.
        """
        record = wanted.record(whole)
        if part is None or self.folder.read_record(wanted.name) != record:
            self.folder.write_record(wanted.name, record)
            crash_point("publish.recorded")
        was_first = part is None or self.folder.give_name(part.fd, wanted.name)
        if part is not None:
            crash_point("publish.named")
            keep_map = wanted.identity is None  # no footer inside contains the checksums of its units
            part.unlink_names(keep_map=keep_map)
            crash_point("publish.unparted")
        self.book(wanted, record.to_json(), self.charge_of_copy(wanted))
        crash_point("publish.booked")
        self.unrecorded.discard(wanted.name)
        return was_first

    def book(self, wanted: CopySpec, record: str, charge: int) -> None:
        """Set the charge of a copy in the accounts.

        On a file system where flock is not enforced, two processes may have extended one partial copy, and each may
        have reserved half of it. Then the whole charge is reserved once more; if there is no space, the copy is
        removed.
        """
        try:
            self.accounts.book(wanted.name, record, charge)
        except RuntimeError:
            if self.evictor.reserve(wanted.name, charge, spare=frozenset([wanted.name])):
                self.accounts.book(wanted.name, record, charge)
            else:
                self.remove(wanted.name)
                self.accounts.release(wanted.name)

    def charge_of_copy(self, wanted: CopySpec) -> int:
        """Return the disk space in bytes of a whole copy with its record, and with its map if that is kept.

        A file that was written in pieces may take some blocks beyond its size (folder.py). They are charged only up to
        the space that was reserved for the map, if the map is not kept.
        """
        least = charge_bytes(wanted.n_bytes)
        most = least + charge_bytes(map_bytes(wanted.n_bytes)) - BLOCK_BYTES
        if wanted.identity is None:
            return most
        return min(max(self.folder.charge_of(wanted.name) or 0, least), most)


def _offer(fetch: Fetch, held: CopyHandle) -> Mask:
    """Give a handle to a fetch, which then owns it, and return the units that are present.

    An error closes the handle.
    """
    try:
        present = np.ones(n_units(fetch.wanted.n_bytes), bool) if held.presence is None else held.presence.mask()
    except BaseException:
        held.close()
        raise
    fetch.set_file(held, present)
    return present
