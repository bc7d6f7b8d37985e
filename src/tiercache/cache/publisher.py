"""From "wanted" to "there": the steps of one fetch, in one process, beside all others."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache import poison
from tiercache.cache.download import Download
from tiercache.cache.growth import Growth
from tiercache.cache.lease import open_leased
from tiercache.cache.locks import NameLock
from tiercache.cache.machine import is_disk_full
from tiercache.cache.partial import Held, Part, hold_part, map_bytes
from tiercache.cache.sums import checksum_of
from tiercache.cache.units import Mask, n_units
from tiercache.catalog import charge_bytes
from tiercache.catalog.tables import BLOCK_BYTES
from tiercache.descriptors import too_many_open
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import format_bytes
from tiercache.points import reach
from tiercache.waiting import wait_for

if TYPE_CHECKING:
    from tiercache.cache.breaker import Breaker
    from tiercache.cache.evictor import Evictor
    from tiercache.cache.fetch import Fetch
    from tiercache.cache.folder import Folder
    from tiercache.cache.notices import Notices
    from tiercache.cache.owners import Owners
    from tiercache.cache.quarantine import Quarantine
    from tiercache.cache.record import Wanted
    from tiercache.catalog import Accounts
    from tiercache.stats import Counters

# Waiting for another process's fetch: a minute, and the time its bytes take at a slow 2 MB/s. Then we fetch too.
LOCK_WAIT_S = 60.0
SLOWEST_BYTES_S = 2e6
# A part that loses its name while it grows (where locks lie, or by somebody's hand) is begun again this often.
MAX_BEGINNINGS = 3


@dataclass(slots=True)
class Publisher:
    """Fetches copies and publishes them. run() is called by one thread a fetch, many at once.

    unrecorded: copies found without a record; they are checked before they are trusted, and get one.
    """

    folder: Folder
    owners: Owners
    accounts: Accounts
    evictor: Evictor
    quarantine: Quarantine
    breaker: Breaker
    notices: Notices
    counters: Counters
    unrecorded: set[str] = field(default_factory=set)

    def run(self, fetch: Fetch) -> None:
        """Bring what is asked of a fetch; what there is no room for, or the disk fails for, is refused.

        Raises:
            StoreError, CorruptShard: of the source.
        """
        try:
            try:
                self._run_locked(fetch)
            except OSError as error:
                if isinstance(error, StoreError) or not is_disk_full(error):
                    raise
                # A record, a name, the books: all that the downloads are not told of. What is there by now stays.
                self.evictor.free_disk(charge_bytes(fetch.wanted.n_bytes), spare=fetch.spare)
                self._run_locked(fetch)
        except StoreError:
            raise  # NotFound is an OSError too
        except OSError as error:
            self.disk_failed(error)
        else:
            self.breaker.mend()

    def disk_failed(self, error: Exception) -> None:
        """Bypass the cache for a while, and say so once; what a disk that is merely full holds can still be read."""
        if self.owners.is_closed:
            return  # closed under who was at work: nothing is wrong with the disk
        if is_disk_full(error):
            self.disk_is_full()
            return
        self.breaker.trip()
        what = too_many_open(error) or error
        self.notices.warn("disk", f"cache {self.folder.root}: {what}; reading past it until the disk works again")

    def disk_is_full(self) -> None:
        """Say so once."""
        self.notices.warn(
            "full",
            f"cache {self.folder.root}: the disk is full; reading past the cache, so that what it does not hold is "
            "fetched again in every epoch; free some of the disk, or put the cache on another (TIERCACHE_CACHE_DIR)",
        )

    def tell_of_no_room(self, wanted: Wanted, need_bytes: int) -> None:
        """Warn once of an opened data set that could be cached as a whole, but of which something has no room."""
        dataset_id = "" if wanted.identity is None else wanted.identity.dataset_id
        if not self.notices.is_expected(dataset_id):
            return
        used_bytes, reserved_bytes, limit_bytes = self.accounts.sums()
        spare_bytes = max(self.evictor.spare_bytes(), 0)
        if spare_bytes < need_bytes:
            why = f"the disk has only {format_bytes(spare_bytes)} left above the cache's free_floor"
            do = "free some of the disk, lower free_floor=, or put the cache on another disk (TIERCACHE_CACHE_DIR)"
        else:
            taken = f"{format_bytes(used_bytes + reserved_bytes)} of {format_bytes(limit_bytes)}"
            why = f"{taken} are taken by copies that are pinned, in use or needed sooner"
            do = (
                "unpin or evict some of them (tiercache status lists them), or make the cache larger "
                "(TIERCACHE_CACHE_SIZE, or Cache(path, size=...))"
            )
        self.notices.warn_expected(
            dataset_id,
            f"cache {self.folder.root} has no room: its next object needs {format_bytes(need_bytes)}, but {why}. What "
            f"does not fit is read past the cache, and fetched again in every epoch; {do}",
        )

    def _run_locked(self, fetch: Fetch) -> None:
        """One process fetches a name; the others watch its map, and take over when it is gone.

        Without the lock, after a long wait or where locks lie, some bytes are fetched twice and nothing else happens.
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
                    self._bring(fetch, lock)
                    return
        finally:
            lock.give_back()

    def _watch(self, fetch: Fetch, lock: NameLock) -> bool:
        """Whether we may fetch, or all that is asked for is there by somebody else's work; tell who waits."""
        if lock.try_take():
            return True
        fetch.step = f"waiting for {lock.holder()}"
        wanted = fetch.wanted
        fd = None if wanted.name in self.unrecorded else open_leased(self.folder, wanted.name, wanted.n_bytes)
        if fd is not None:
            _offer(fetch, Held(fd))
            return True
        held = hold_part(self.folder, wanted.name, wanted.n_bytes)
        if held is None:
            return False
        present = _offer(fetch, held)
        # What is all there will have its name in a moment.
        return not present.all() and not fetch.open_units()[0].any()

    # -- what is there already --------------------------------------------------------------------------------------

    def _bring(self, fetch: Fetch, lock: NameLock) -> None:
        """Serve from the copy that is there, or let its part grow; once more where the bytes were wrong."""
        if self._offer_copy(fetch):
            return
        found = 0
        for _ in range(2):
            wrong = self._grow(fetch, lock)
            if wrong is None:
                return
            found = wrong
        self._remember_poison(fetch.wanted, found)
        raise _wrong_sum(fetch.wanted, found)

    def _offer_copy(self, fetch: Fetch) -> bool:
        fd = self._existing(fetch.wanted)
        if fd is not None:
            _offer(fetch, Held(fd))
        return fd is not None and fetch.close_if_done()

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
        size = self.folder.size_of(wanted.name)
        if size not in (None, wanted.n_bytes):
            said = f"it had {size:,} bytes, {wanted.n_bytes:,} are right"
            self.quarantine.tell(wanted.name, wanted.n_bytes, reason="it was cut off", verdict=said)
            self.remove(wanted.name)

    def remove(self, name: str) -> None:
        """Remove a copy, or a part, that is not what its name says. Readers keep what they have open."""
        with self.quarantine.unlinking(name):
            self.folder.remove_copy(name)
            self.accounts.remove([name])
        self.unrecorded.discard(name)

    # -- what has to come -------------------------------------------------------------------------------------------

    def _grow(self, fetch: Fetch, lock: NameLock) -> int | None:
        """Let the part grow as long as something is asked for, and publish it when it is whole.

        Returns:
            None: the fetch is closed. Else the CRC-32C of a whole that is wrong, and gone.
        """
        for _ in range(MAX_BEGINNINGS):
            growth = Growth(self, fetch, lock)
            try:
                return self._let_grow(fetch, growth)
            except FileNotFoundError as error:
                if isinstance(error, StoreError):
                    growth.end(error)
                    raise
                fetch.forget()
                self.owners.ensure()
                growth.drop()
            except BaseException as error:
                growth.end(error)
                raise
            finally:
                growth.close()
            if self._offer_copy(fetch):  # where locks lie: by whoever took the part's name
                return None
        fetch.refuse(fetch.open_units()[0])  # somebody deletes parts as fast as we make them
        return None

    def _let_grow(self, fetch: Fetch, growth: Growth) -> int | None:
        """As _grow(), of one part."""
        download = Download(fetch, growth.part, growth.admit, self.counters, growth.present)
        while True:
            while fetch.open_units()[0].any():
                self._run_download(growth, download)
            if growth.is_whole():
                growth.note(0)
                wrong = self._publish(fetch, growth.part(), download.whole_sum())
                if wrong is not None:
                    fetch.forget()
                elif not fetch.close_if_done():
                    continue
                return wrong
            if fetch.close_if_done():
                growth.book()
                return None

    def _run_download(self, growth: Growth, download: Download) -> None:
        """Download; where the disk was full after all make room and try once more, then refuse what is missing."""
        fetch = growth.fetch
        for is_last in (False, True):
            try:
                download.run()
            except OSError as error:
                if isinstance(error, StoreError) or not is_disk_full(error):
                    raise
                if is_last:
                    fetch.refuse(fetch.open_units()[0])
                    self.disk_is_full()
                else:
                    self.evictor.free_disk(growth.reserved_bytes, spare=fetch.spare | {fetch.wanted.name})
            else:
                return

    # -- from part to copy ------------------------------------------------------------------------------------------

    def _publish(self, fetch: Fetch, part: Part, whole: int | None) -> int | None:
        """Check a part that is whole, give it its name, and book it; its CRC-32C, and it is gone, if it is wrong."""
        wanted = fetch.wanted
        if whole is None:
            whole = checksum_of(part.fd, wanted.n_bytes)
        if wanted.crc32c is not None and whole != wanted.crc32c:
            self.remove(wanted.name)
            self.accounts.release(wanted.name)
            return whole
        reach("publish.checked")
        part.seal(self.folder.rights.copy)
        reach("publish.sealed")
        was_first = self._enter(wanted, whole, part)
        if not was_first:  # where locks lie: then that copy is the one that is counted
            self._offer_copy(fetch)
        if self.quarantine.awaits(wanted.name):
            self.quarantine.compare(wanted.name)
        return None

    def _enter(self, wanted: Wanted, whole: int, part: Part | None = None) -> bool:
        """Write the record, then the name, then the books: after a crash in between whoever comes next puts it right.

        False: another copy had the name already.
        """
        record = wanted.record(whole)
        if part is None or self.folder.read_record(wanted.name) != record:
            self.folder.write_record(wanted.name, record)
            reach("publish.recorded")
        was_first = part is None or self.folder.give_name(part.fd, wanted.name)
        if part is not None:
            reach("publish.named")
            keep_map = wanted.identity is None  # no footer of its own says what its units should be
            part.forget_name(keep_map=keep_map)
            reach("publish.unparted")
        self.book(wanted, record.to_json(), self.charge_of_copy(wanted))
        reach("publish.booked")
        self.unrecorded.discard(wanted.name)
        return was_first

    def book(self, wanted: Wanted, record: str, charge: int) -> None:
        """Set a copy's row on the books.

        Where locks lie two processes may have let one part grow, and each reserved half of it: then all of it is
        reserved once more, and where there is no room for that it goes.
        """
        try:
            self.accounts.book(wanted.name, record, charge)
        except RuntimeError:
            if self.evictor.reserve(wanted.name, charge, spare=frozenset([wanted.name])):
                self.accounts.book(wanted.name, record, charge)
            else:
                self.remove(wanted.name)
                self.accounts.release(wanted.name)

    def charge_of_copy(self, wanted: Wanted) -> int:
        """What the whole copy takes, with its record, and its map where that is kept.

        What came in pieces may take some blocks beyond its size (folder.py). They are charged as far as there is
        certainly room for them: what was reserved for the map, where that goes.
        """
        least = charge_bytes(wanted.n_bytes)
        most = least + charge_bytes(map_bytes(wanted.n_bytes)) - BLOCK_BYTES
        if wanted.identity is None:
            return most
        return min(max(self.folder.charge_of(wanted.name) or 0, least), most)

    def _remember_poison(self, wanted: Wanted, found: int) -> None:
        self.counters.add("poisoned")
        if wanted.crc32c is not None:
            poison.remember(self.folder, wanted.name, poison.Poison(wanted.source, wanted.crc32c, found))


def _offer(fetch: Fetch, held: Held) -> Mask:
    """Let a fetch have a hold, taken over; what is there by it. A hold that nobody has would end with the process."""
    try:
        present = np.ones(n_units(fetch.wanted.n_bytes), bool) if held.presence is None else held.presence.mask()
    except BaseException:
        held.close()
        raise
    fetch.offer(held, present)
    return present


def _wrong_sum(wanted: Wanted, found: int) -> CorruptShard:
    expected = "?" if wanted.crc32c is None else f"{wanted.crc32c:08x}"
    return CorruptShard(
        f"bad at its source: fetched bytes have CRC-32C {found:08x}, twice, expected {expected}", url=wanted.source
    )
