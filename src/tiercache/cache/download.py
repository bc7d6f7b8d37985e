"""Fetches, from the request to the published copy: `run_fetch()` carries one out, `Download` transfers the bytes.

Each fetch runs under the lock of the name, which it shares with no other process.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import closing, suppress
from threading import Lock, Thread
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.accounts import BLOCK_BYTES, charge_bytes
from tiercache.cache.folder import COPY_MODE, is_disk_full
from tiercache.cache.locks import NameLock
from tiercache.cache.names import name_of_object
from tiercache.cache.partial import (
    LITTLE_BYTES,
    REQUEST_BYTES,
    UNIT_BYTES,
    CopyFile,
    Mask,
    PartialCopy,
    UnitWriter,
    bytes_of,
    charge_of,
    map_bytes,
    mask_of,
    n_units,
    next_request,
    open_part,
    open_whole,
    to_fetch,
)
from tiercache.crash_points import crash_point
from tiercache.errors import CorruptShard, NotFound, ObjectChanged, StoreError
from tiercache.store.contract import read_unpinned
from tiercache.store.shared_files import set_mode
from tiercache.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tiercache.cache.fetch import Fetch
    from tiercache.cache.names import CopySpec
    from tiercache.cache.session import WriteSession
    from tiercache.model import ByteRange
    from tiercache.store.contract import Receive


N_REQUESTS_IN_FLIGHT = 4


class Download:
    """The transfer of one fetch into its partial copy: reserves space, reads missing units, and corrects the accounts.

    Space is reserved before the first byte. The reservation covers the space beyond what the accounts already charge
    for the partial copy; a larger reservation replaces a smaller one. Threads share the unit masks and the partial
    copy under the lock. New units are admitted, under the lock, by the thread that takes the next ranges.

    Attributes:
        part: The partial copy; None: it is created with the first request.
    """

    def __init__(self, writing: WriteSession, fetch: Fetch, lock: NameLock) -> None:
        """Open the existing partial copy, if there is one, and offer it to the waiting leases. Raises OSError."""
        self._writing, self._fetch, self._name_lock = writing, fetch, lock
        self._spec = fetch.spec
        self._reserved_bytes = self._charged_bytes = 0
        self._lock = Lock()
        self._error: BaseException | None = None
        fetch.step = f"being fetched by process {os.getpid()}"
        self.part = PartialCopy.open(writing.folder, self._spec.name, self._spec.n_bytes)
        if self.part is not None:
            self._adopt(self.part)
        self._admitted = self._present().copy()

    def _present(self) -> Mask:
        return np.zeros(n_units(self._spec.n_bytes), bool) if self.part is None else self.part.present

    def _adopt(self, part: PartialCopy) -> None:
        """Enter a partial copy in the accounts and offer it to readers; on an error it is closed."""
        folder, spec = self._writing.folder, self._spec
        try:
            if folder.read_record(spec.name) is None:
                folder.write_record(spec.name, spec.record(spec.crc32c))
                crash_point("fetch.recorded")
            if part.present.any() and not self._reserved_bytes:
                self._charged_bytes = charge_of(part.present, part.n_bytes)
                self._writing.accounts.set_charge(spec.name, self._charged_bytes)
            self._fetch.set_file(part.hold(), part.present)
        except BaseException as error:
            with closing(part):  # for example, the disk is too full for the record; a later fetch starts again
                # The folder was deleted by hand: remove_partial_copy() would not know these files.
                if isinstance(error, FileNotFoundError):
                    part.unlink_names(keep_map=False)
            raise

    # -- transfer ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Fetch the requested units until none is left, space for them is refused, or the fetch yields.

        If the disk is full, copies are evicted and the transfer is repeated once; then the missing units are refused.

        Raises:
            StoreError: The source failed.
            OSError: The disk failed.
        """
        was_full = False
        while self._fetch.missing_units()[0].any() and not self._fetch.should_yield():
            try:
                self._transfer()
                was_full = False
            except OSError as error:
                if isinstance(error, StoreError) or not is_disk_full(error):
                    raise
                if was_full:
                    self._fetch.refuse(self._fetch.missing_units()[0])
                    self._writing.disk_is_full()
                else:
                    protected = self._fetch.protected | {self._spec.name}
                    self._writing.evictor.free_disk(self._reserved_bytes, protected=protected)
                was_full = not was_full

    def _transfer(self) -> None:
        self._error = None
        self._assigned = self._present().copy()  # units that an earlier transfer lost are assigned again
        while (ranges := self._next_ranges()) is not None:
            left_bytes = UNIT_BYTES * int((self._admitted & ~self._assigned).sum())
            helpers: list[Thread] = []
            try:
                for _ in range(min(N_REQUESTS_IN_FLIGHT - 1, -(-left_bytes // REQUEST_BYTES))):
                    helper = Thread(target=self._work, name="tiercache-part", daemon=True)
                    with suppress(RuntimeError):  # no more threads are allowed; the existing ones do all the work
                        helper.start()
                        helpers.append(helper)
                self._work(ranges)
            finally:
                # Even after an error: the helpers write to the partial copy, which is closed afterwards.
                for helper in helpers:
                    helper.join()
            if self._error is not None:
                raise self._error

    def _work(self, ranges: list[ByteRange] | None = None) -> None:
        try:
            ranges = self._next_ranges() if ranges is None else ranges
            while ranges is not None:
                self._fetch_ranges(ranges)
                ranges = self._next_ranges()
        except BaseException as error:  # noqa: BLE001 - top of a thread: _transfer() raises the first error
            with self._lock:
                self._error = self._error or error

    def _next_ranges(self) -> list[ByteRange] | None:
        """Return the ranges of the next request, urgent units first.

        None: nothing is left, a thread failed, or the fetch yields.
        """
        n_bytes = self._spec.n_bytes
        if self._fetch.should_yield():
            return None
        with self._lock:
            if self._error is not None:
                return None
            units, urgent = self._fetch.missing_units()
            self._admit(units & ~self._admitted)
            todo = self._admitted & ~self._assigned
            # A small rest is fetched in one request, urgent or not: a second request would take longer than its bytes.
            first = todo if bytes_of(todo, n_bytes) <= LITTLE_BYTES else urgent & todo
            ranges = next_request(first, n_bytes, gaps=todo) or next_request(todo, n_bytes)
            self._assigned |= mask_of(ranges, n_bytes)
            if ranges and self.part is None:
                folder, name = self._writing.folder, self._spec.name
                # After a full disk, the one that was created first is there.
                part = PartialCopy.open(folder, name, n_bytes) or PartialCopy.create(folder, name, n_bytes)
                self._adopt(part)
                self.part = part
            return ranges or None

    def _admit(self, units: Mask) -> None:
        """Reserve space for requested units, and with them the rest of the file if it is small; or refuse them.

        Refused units are not part of the rest: their reader reads them from the source.
        """
        if not units.any():
            return
        for more in (to_fetch(self._admitted, units, self._spec.n_bytes) & ~self._fetch.refused_units(), units):
            if self._reserve(self._admitted | more):
                self._admitted |= more
                return
        self._fetch.refuse(units)

    def _reserve(self, units: Mask) -> bool:
        need_bytes = max(charge_of(units, self._spec.n_bytes) - self._charged_bytes, 0)
        evictor, name = self._writing.evictor, self._spec.name
        self.note_reservation(need_bytes)
        if not evictor.reserve(name, need_bytes, protected=self._fetch.protected | {name}):
            self.note_reservation(self._reserved_bytes)
            self._writing.warn_no_space(self._spec, need_bytes)
            return False
        self._reserved_bytes = need_bytes
        crash_point("fetch.reserved")
        return True

    def _fetch_ranges(self, ranges: Sequence[ByteRange]) -> None:
        """Fetch ranges into the partial copy. Their bytes are written and checksummed as they arrive."""
        part = self.part
        if part is None:
            raise RuntimeError("_next_ranges() has created the partial copy")
        writers = {span.start: UnitWriter(part, span) for span in ranges}
        if self._spec.n_bytes:  # an empty object has nothing to read
            self._read(ranges, writers)
        for span in ranges:
            writers[span.start].finish()
        self._writing.counters.add("bytes_fetched", sum(span.n_bytes for span in ranges))
        self._fetch.add_present(part.present)

    def _read(self, ranges: Sequence[ByteRange], writers: Mapping[int, UnitWriter]) -> None:
        """Read from the source, in the version that was named; retry once if that may help."""
        spec, cancel = self._spec, self._fetch.cancel
        starts = sorted(writers)
        disk_errors: list[OSError] = []

        def receive(offset: int, data: memoryview) -> None:
            try:
                writers[starts[bisect_right(starts, offset) - 1]].receive(offset, data)
            except OSError as error:
                disk_errors.append(error)
                raise

        for is_last in (False, True):
            try:
                self._read_pieces(ranges, receive)
                break
            except (NotFound, ObjectChanged):
                raise
            except StoreError as error:
                if is_last or error.retryable or cancel.is_set():
                    raise  # the store has repeated a retryable error itself; any other error is tried once more
            except OSError as error:
                if error in disk_errors:
                    raise
                # a network error that the store did not convert
                raise StoreError(f"reading failed: {error}", url=spec.source, retryable=True) from error
        if spec.identity is None and spec.if_match is None:
            # Without a strong ETag as a guard, the object must have the same attributes after the read.
            info = self._fetch.store.head(spec.key)
            if name_of_object(spec.source, info) != spec.name:
                raise ObjectChanged(url=spec.source, expected=spec.etag, found=info.etag)

    def _read_pieces(self, ranges: Sequence[ByteRange], receive: Receive) -> None:
        """Read from the source once. See Store.read_pieces."""
        spec, store, cancel = self._spec, self._fetch.store, self._fetch.cancel
        try:
            store.read_pieces(spec.key, ranges, receive, if_match=spec.if_match, cancel=cancel)
        except ObjectChanged:
            if spec.identity is None:
                raise
            # The checksums of the shard tell whether the bytes are right.
            spans = [(span, memoryview(bytearray(span.n_bytes))) for span in ranges]
            read_unpinned(store, spec.key, spans, cancel=cancel)
            for span, data in spans:
                receive(span.start, data)

    # -- end --------------------------------------------------------------------------------------------------------

    def note_reservation(self, n_bytes: int) -> None:
        """Write to the lock file how many bytes this fetch may still add, in case the accounts must be rebuilt."""
        self._name_lock.note({"owner": str(self._writing.owners.me), "reserved_bytes": n_bytes})

    def update_charge(self) -> None:
        """Set the charge of the partial copy in the accounts to its present size; one without units is removed."""
        # First: after the commit, the entry would be counted whenever the accounts are rebuilt.
        self.note_reservation(0)
        if self.part is None or not self.part.has_name:  # a reader found it corrupt and removed it
            self._writing.accounts.release(self._spec.name)
        elif self.part.present.any():
            self._writing.accounts.set_charge(self._spec.name, charge_of(self.part.present, self._spec.n_bytes))
            crash_point("fetch.booked")
        else:
            self.remove_partial_copy()

    def remove_partial_copy(self) -> None:
        """Remove the partial copy and its charge. If it has lost its name, the name belongs to another file."""
        self.note_reservation(0)
        self._fetch.reset()  # with our own handle open, the file would count as deleted but still in use
        if self.part is not None and self.part.has_name:
            self._writing.remove(self._spec.name)
        self._writing.accounts.release(self._spec.name)

    def fail(self, error: BaseException) -> None:
        """After an error, keep what has come for a later fetch, unless the object has changed at its source."""
        with suppress(OSError):  # the first error is the one to report
            if isinstance(error, ObjectChanged):
                self.remove_partial_copy()
            else:
                self.update_charge()

    def close(self) -> None:
        if self.part is not None:
            self.part.close()


# Wait for another process's fetch: one minute, plus the time for its bytes at a slow 2 MB/s. Then this process reads
# past the cache.
LOCK_WAIT_S = 60.0
SLOWEST_BYTES_S = 2e6
# How often a partial copy is started again after somebody deleted the folder while it grew.
MAX_BEGINNINGS = 3


def run_fetch(writing: WriteSession, fetch: Fetch) -> bool:
    """Fetch the requested units. Units for which there is no space, or for which the disk fails, are refused.

    One thread calls it for each fetch, and many threads at once.

    Returns:
        False: The fetch has yielded to urgent ones, and must be run again.

    Raises:
        StoreError, CorruptShard: The source failed, or the object is corrupt at its source.
    """
    is_done = True
    try:
        try:
            is_done = _run_locked(writing, fetch)
        except OSError as error:
            if isinstance(error, StoreError) or not is_disk_full(error):
                raise
            # The disk was full for a record, a name or the accounts, which downloads do not handle. What was fetched
            # stays.
            writing.evictor.free_disk(charge_bytes(fetch.spec.n_bytes), protected=fetch.protected)
            is_done = _run_locked(writing, fetch)
    except StoreError:
        raise  # NotFound is also an OSError
    except OSError as error:
        writing.disk_failed(error)
    else:
        writing.breaker.reset()
    return is_done


def _run_locked(writing: WriteSession, fetch: Fetch) -> bool:
    """Fetch under the lock of the name; return False if the fetch has yielded.

    Other processes watch the unit map, and take over if this process ends. A process that waits too long, because the
    holder was stopped, reads past the cache.
    """
    spec = fetch.spec
    writing.owners.ensure()
    lock = NameLock(writing.folder.locks / spec.name)
    deadline_s = LOCK_WAIT_S + spec.n_bytes / SLOWEST_BYTES_S
    try:
        while not fetch.close_if_done():
            is_over = wait_for(lambda: _watch(writing, fetch, lock), deadline_s, cancel=fetch.cancel)
            if fetch.cancel.is_set():
                raise StoreError("cancelled", url=spec.source, retryable=True)
            if lock.is_held:
                return _fetch(writing, fetch, lock)
            if not is_over:
                fetch.refuse(fetch.missing_units()[0])
        return True
    finally:
        lock.release()


def _watch(writing: WriteSession, fetch: Fetch, lock: NameLock) -> bool:
    """Return whether this process may fetch, or another one has fetched all requested units.

    Waiting leases learn which units the other process has fetched.
    """
    if lock.try_acquire():
        return True
    fetch.step = f"waiting for {lock.holder()}"
    spec = fetch.spec
    whole = open_whole(writing.folder, spec.name, spec.n_bytes)
    if whole is not None:
        _offer(fetch, whole)
        return True
    part = open_part(writing.folder, spec.name, spec.n_bytes)
    if part is None:
        return False
    present = _offer(fetch, part)
    # A partial copy with all units gets its final name in a moment.
    return not present.all() and not fetch.missing_units()[0].any()


def _fetch(writing: WriteSession, fetch: Fetch, lock: NameLock) -> bool:
    """Serve the request from an existing copy, or fetch what is missing, and once more if it was corrupt.

    Returns False if the fetch has yielded.
    """
    if _offer_copy(writing, fetch):
        return True
    spec, crc = fetch.spec, None
    for _ in range(2):
        crc = _fetch_missing(writing, fetch, lock)
        if crc is None:
            return fetch.close_if_done()
    writing.counters.add("poisoned")
    writing.uncached.add(spec.name)
    raise CorruptShard(
        f"corrupt at its source: two fetches did not match the checksum (CRC-32C {crc:08x}, expected "
        f"{spec.crc32c or 0:08x})",
        url=spec.source,
    )


def _offer_copy(writing: WriteSession, fetch: Fetch) -> bool:
    spec = fetch.spec
    whole = open_whole(writing.folder, spec.name, spec.n_bytes)
    if whole is not None:
        _offer(fetch, whole)
        return fetch.close_if_done()
    if writing.folder.size_of(spec.name) not in (None, spec.n_bytes):  # a power failure or a person truncated it
        writing.remove(spec.name)
        writing.counters.add("quarantined")
    return False


def _offer(fetch: Fetch, file: CopyFile) -> Mask:
    """Give a file to a fetch, which then owns it, and return the units that are present. An error closes the file."""
    try:
        present = file.mask()
    except BaseException:
        file.close()
        raise
    fetch.set_file(file, present)
    return present


def _fetch_missing(writing: WriteSession, fetch: Fetch, lock: NameLock) -> int | None:
    """Extend the partial copy while units are requested, and publish it when it is complete.

    Returns:
        None: The fetch is closed or has yielded. Otherwise the CRC-32C of a complete file that was corrupt and is
            removed.
    """
    for _ in range(MAX_BEGINNINGS):
        download = Download(writing, fetch, lock)
        try:
            return _run_download(writing, fetch, download)
        except FileNotFoundError as error:
            if isinstance(error, StoreError):
                download.fail(error)
                raise
            fetch.reset()
            writing.owners.ensure()
            download.remove_partial_copy()
        except BaseException as error:
            download.fail(error)
            raise
        finally:
            download.close()
    fetch.refuse(fetch.missing_units()[0])
    return None


def _run_download(writing: WriteSession, fetch: Fetch, download: Download) -> int | None:
    """Extend one partial copy; see _fetch_missing()."""
    while True:
        download.run()
        part = download.part
        if part is not None and part.present.all():
            download.note_reservation(0)
            crc = part.checksum()
            if not _publish(writing, fetch.spec, part, crc):
                fetch.reset()
                return crc
            if fetch.close_if_done():
                return None
        elif fetch.close_if_done() or fetch.should_yield():
            download.update_charge()
            return None


def _publish(writing: WriteSession, spec: CopySpec, part: PartialCopy, crc: int) -> bool:
    """Verify a complete partial copy, give it its final name, and enter it in the accounts.

    The record is written first, then the name, then the accounts, so that the next process can repair a crash in
    between. crc: CRC-32C of the file.

    Returns:
        False: The file is corrupt and was removed.
    """
    folder = writing.folder
    if spec.crc32c is not None and crc != spec.crc32c:
        writing.remove(spec.name)
        writing.accounts.release(spec.name)
        return False
    crash_point("publish.checked")
    set_mode(part.fd, COPY_MODE)  # from here on nobody can open the file for writing
    crash_point("publish.sealed")
    record = spec.record(crc)
    if folder.read_record(spec.name) != record:
        folder.write_record(spec.name, record)
        crash_point("publish.recorded")
    folder.give_name(part.fd, spec.name)
    crash_point("publish.named")
    part.unlink_names(keep_map=spec.identity is None)  # no footer inside contains the checksums of its units
    crash_point("publish.unparted")
    # A file that was written in pieces may take some blocks beyond its size (folder.py). They are charged only up to
    # the space that was reserved for the map, if the map is not kept.
    least = charge_bytes(spec.n_bytes)
    most = least + charge_bytes(map_bytes(spec.n_bytes)) - BLOCK_BYTES
    charge = most if spec.identity is None else min(max(folder.charge_of(spec.name) or 0, least), most)
    writing.accounts.set_charge(spec.name, charge)
    crash_point("publish.booked")
    return True
