"""`Fetch`, the fetch of one copy from the first request to its final name; `CopyLease`, a reader's lease on a copy."""

from __future__ import annotations

import copy
import os
import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence, Set
from contextlib import closing, suppress
from dataclasses import replace
from threading import Condition, Event, Lock, Thread

import numpy as np

from tiercache.cache.copy_file import (
    LITTLE_BYTES,
    REQUEST_BYTES,
    UNIT_BYTES,
    CopyFile,
    Mask,
    bytes_of,
    charge_of,
    continue_part,
    covers,
    create_part,
    map_bytes,
    mask_of,
    n_units,
    next_request,
    open_part,
    open_whole,
    to_fetch,
)
from tiercache.cache.eviction import Evictor
from tiercache.cache.folder import BLOCK_BYTES, COPY_MODE, NameLock, charge_bytes, is_disk_full, try_shared
from tiercache.cache.names import CopySpec, name_of_object
from tiercache.crash_points import crash_point
from tiercache.errors import CorruptShard, ObjectChanged, StoreError, TierCacheError
from tiercache.model import ByteRange
from tiercache.peers.readers import PeerSource
from tiercache.store import Span, Store
from tiercache.store.contract import Receive, read_unpinned
from tiercache.store.remote import cancel_calls_when, is_cancelled
from tiercache.store.shared_files import set_mode
from tiercache.waiting import SYSTEM_CLOCK, wait_for

# Requests of one copy at once: without urgent units, and of the oldest copy that has some. The others then have one.
N_REQUESTS_IN_FLIGHT, N_REQUESTS_OF_FIRST = 4, 8
FIRST_RUN_BYTES = 2 << 20  # longest range of the first requests of a copy that a reader waits for
DEADLINE_S = 3600.0  # deadline of a wait without its own deadline, so that no wait is endless
# Wait for another process's fetch: one minute, plus the time for its bytes at a slow 2 MB/s. Then this process reads
# past the cache.
LOCK_WAIT_S = 60.0
SLOWEST_BYTES_S = 2e6
# How often a partial copy is started again after somebody deleted the folder while it grew.
MAX_BEGINNINGS = 3
# How often a waiting thread looks whether its calls are cancelled.
_LOOK_EVERY_S = 0.1


class Fetch:
    """The fetch of one copy: leases request ranges of it, and one thread of the session runs it.

    Each waiting lease wakes as soon as its own units are present. Urgent units come first: a fetch without urgent units
    gives up its thread while the urgent fetches need more than the usual threads, and continues later. The fetch ends
    when no requested unit is missing; a later request needs a new fetch.

    A lease that requests is a user until it has a descriptor of its own, or leaves. Until the last user has gone, the
    fetch keeps a descriptor under a reader's lock, so that no evictor can remove the copy in between.

    The condition guards what leases and the fetch share; no data is read or written while it is held. run() holds the
    lock of the name, which excludes other processes, and shares its transfer with some helper threads under `_lock`.
    The reservation covers the space beyond what the accounts charge for the partial copy already.

    Attributes:
        step: What the fetch does at the moment, for error messages.
        protected: Names of copies that must not be evicted for this fetch.
        keeps: Object that lives until the fetch has ended: the cache, which no fetch thread may be the last to have.
    """

    def __init__(
        self,
        spec: CopySpec,
        store: Store,
        evictor: Evictor,
        is_crowded: Callable[[], bool],
        is_first: Callable[[Fetch], bool],
        on_fetched: Callable[[ByteRange], object],
    ) -> None:
        """on_fetched: Is called with each fetched range, from any thread, before a reader can see it."""
        self.spec, self.store, self._on_fetched = spec, store, on_fetched
        self.cancel = Event()
        self.step = "waiting for a free thread"
        self.protected: Set[str] = frozenset()
        self.keeps: object = None
        self._evictor, self._is_crowded, self._is_first = evictor, is_crowded, is_first
        self._folder, self._accounts = evictor.folder, evictor.accounts
        # shared with leases
        self._changed = Condition()
        self._done = self._closed = False
        self._n_users = 0
        self._file: CopyFile | None = None
        self._error: BaseException | None = None
        self._requested, self._urgent, self._refused, self._present = np.zeros((4, n_units(spec.n_bytes)), bool)
        self._awaited = self._no_units()  # units for which a lease waits now, or has waited
        # of the transfer
        self._lock = Lock()
        self._name_lock = NameLock(self._folder.locks / spec.name)
        self._part: CopyFile | None = None
        self._reserved_bytes = self._charged_bytes = 0
        self._admitted, self._assigned = self._no_units(), self._no_units()
        self._transfer_error: BaseException | None = None
        self._arriving: dict[int, int] = {}  # bytes that have come of each running request, by its first byte
        self._helpers: list[Thread] = []

    def _no_units(self) -> Mask:
        return np.zeros(n_units(self.spec.n_bytes), bool)

    # -- for leases -------------------------------------------------------------------------------------------------

    def request(self, ranges: Sequence[ByteRange], *, urgent: bool) -> bool:
        """Request ranges, with priority if urgent, and become a user; False: the fetch has ended, start another."""
        mask = mask_of(ranges, self.spec.n_bytes)
        with self._changed:
            if self._closed:
                return False
            self._n_users += 1
            self._requested |= mask
            if urgent:
                self._urgent |= mask
            return True

    def wait(self, ranges: Sequence[ByteRange], deadline_s: float | None) -> None:
        """Wait until the ranges are present or cannot come; if they complete the copy, until it has its final name.

        Raises StoreError after the deadline (None: DEADLINE_S), or the error with which the fetch ended.
        """
        mask = mask_of(ranges, self.spec.n_bytes)

        def is_settled() -> bool:
            if self._done or bool((self._refused & mask).any()):
                return True
            return self._covers(ranges) and not self._present.all()

        limit_s = DEADLINE_S if deadline_s is None else deadline_s
        end_s = SYSTEM_CLOCK.monotonic() + limit_s
        with self._changed:
            self._awaited |= mask
            # In steps, because a thread whose calls are cancelled must not wait on.
            while not self._changed.wait_for(is_settled, min(limit_s, _LOOK_EVERY_S)):
                if is_cancelled():
                    raise StoreError("waiting for the cache: cancelled", url=self.spec.source, retryable=True)
                if SYSTEM_CLOCK.monotonic() >= end_s:
                    raise StoreError(
                        f"not in the cache after {limit_s:g} s: {self.step}", url=self.spec.source, retryable=True
                    )
            error = None if self._covers(ranges) and self._file is not None else self._error
        if isinstance(error, TierCacheError):
            raise copy.copy(error) from error  # a copy for each waiting thread: a traceback belongs to one thread
        if error is not None:
            raise StoreError(f"caching it failed: {error!r}", url=self.spec.source) from error

    def _covers(self, ranges: Sequence[ByteRange]) -> bool:
        return covers(self._present, ranges, self.spec.n_bytes)

    def claim(self) -> tuple[CopyFile | None, bool]:
        """Return (a view of the file, whether the caller is no user any more). None: nothing has come, or will come."""
        with self._changed:
            file = None if self._file is None else self._file.dup()
            has_left = file is not None or self._done
            if has_left:
                self._leave()
        return file, has_left

    def leave(self) -> None:
        with self._changed:
            self._leave()

    def _leave(self) -> None:
        self._n_users -= 1
        self._drop_unused_file()

    def _drop_unused_file(self) -> None:
        if self._done and not self._n_users and self._file is not None:
            file, self._file = self._file, None
            file.close()

    # -- for the session -----------------------------------------------------------------------------------------------

    def missing_units(self) -> tuple[Mask, Mask]:
        """Return the requested units that are neither present nor refused, and the urgent ones among them."""
        with self._changed:
            units = self._missing()
            return units, units & self._urgent

    def _missing(self) -> Mask:
        units: Mask = self._requested & ~self._present & ~self._refused
        return units

    def left_bytes(self) -> int:
        """Return the number of requested bytes that have not come yet."""
        return max(bytes_of(self.missing_units()[0], self.spec.n_bytes) - sum(self._arriving.copy().values()), 0)

    def abandon(self) -> None:
        """Let the next request start another fetch: what this one has is corrupt."""
        with self._changed:
            self._closed = True

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._done = self._closed = True
            self._error = error
            kept, self.keeps = self.keeps, None
            self._drop_unused_file()
            self._changed.notify_all()
        del kept  # possibly the last reference to the cache, whose finalizer must not run under the condition

    def run(self) -> bool:
        """Fetch the requested units. Units for which there is no space are refused. False: it yielded, run it again.

        If the disk is full, copies are evicted and the fetch is repeated once; what was fetched stays.

        Raises:
            StoreError, CorruptShard: The source failed, or the object is corrupt at its source.
            OSError: The disk failed.
        """
        try:
            return self._run_locked()
        except OSError as error:
            if isinstance(error, StoreError) or not is_disk_full(error):
                raise
            self._evictor.free_disk(charge_bytes(self.spec.n_bytes), protected=self.protected | {self.spec.name})
            return self._run_locked()

    # -- what leases see -----------------------------------------------------------------------------------------------

    def _offer(self, file: CopyFile) -> Mask:
        """Give a file, which the fetch then owns, to the leases; return its present units. An error closes the file."""
        try:
            present = file.mask()
        except BaseException:
            file.close()
            raise
        file.keep_private()
        with self._changed:
            before, self._file = self._file, file
            self._present = present.copy()
            self._changed.notify_all()
        if before is not None:
            before.close()
        return present

    def _withdraw(self) -> None:
        with self._changed:
            file, self._file = self._file, None
            self._present[:] = False
        if file is not None:
            file.close()

    def _refuse(self, units: Mask) -> None:
        with self._changed:
            self._refused |= units
            self._changed.notify_all()

    def _close_if_done(self) -> bool:
        with self._changed:
            is_done = not self._missing().any()
            self._closed = self._closed or is_done
            return is_done

    def _should_yield(self) -> bool:
        """Return whether to give up the thread: nothing urgent is missing of this fetch, but of other fetches."""
        return self._is_crowded() and not self.missing_units()[1].any()

    # -- under the lock of the name ------------------------------------------------------------------------------------

    def _run_locked(self) -> bool:
        """Fetch under the lock of the name; return False if the fetch has yielded.

        Other processes watch the unit map, and take over if this one ends. One that waits too long reads past the
        cache.
        """
        spec = self.spec
        self._accounts.owners.ensure()
        try:
            while not self._close_if_done():
                deadline_s = LOCK_WAIT_S + spec.n_bytes / SLOWEST_BYTES_S
                is_over = wait_for(self._has_lock_or_units, deadline_s, cancel=self.cancel)
                if self.cancel.is_set():
                    raise StoreError("cancelled", url=spec.source, retryable=True)
                if self._name_lock.is_held:
                    return self._fetch()
                if not is_over:
                    self._refuse(self.missing_units()[0])
            return True
        finally:
            self._name_lock.release()

    def _has_lock_or_units(self) -> bool:
        """Return whether this process may fetch, or another one has fetched all requested units. Leases see these."""
        if self._name_lock.try_acquire():
            return True
        spec = self.spec
        self.step = f"waiting for {self._name_lock.holder()}"
        whole = open_whole(self._folder, spec.name, spec.n_bytes)
        if whole is not None:
            self._offer(whole)
            return True
        part = open_part(self._folder, spec.name, spec.n_bytes)
        if part is None:
            return False
        present = self._offer(part)
        # A partial copy with all units gets its final name in a moment.
        return not present.all() and not self.missing_units()[0].any()

    def _fetch(self) -> bool:
        """Serve the requests from a copy, or fetch what is missing, again if it was corrupt. False: it yielded."""
        spec, crc = self.spec, None
        whole = open_whole(self._folder, spec.name, spec.n_bytes)
        if whole is not None:
            self._offer(whole)
            return self._close_if_done()
        if self._folder.size_of(spec.name) not in (None, spec.n_bytes):  # a power failure or a person truncated it
            self._evictor.remove_damage(spec.name)
        for _ in range(2):
            crc = self._extend_part()
            if crc is None:
                return self._close_if_done()
            if isinstance(self.store, PeerSource):
                self.store.report_corrupt()
        raise CorruptShard(
            f"corrupt at its source: two fetches did not match the checksum (CRC-32C {crc:08x}, expected "
            f"{spec.crc32c or 0:08x})",
            url=spec.source,
        )

    def _extend_part(self) -> int | None:
        """Extend the partial copy while units are requested, and complete it when all units are present.

        Returns None, or the CRC-32C of a complete file that was corrupt and is removed.
        """
        for _ in range(MAX_BEGINNINGS):
            self.step = f"being fetched by process {os.getpid()}"
            self._reserved_bytes = self._charged_bytes = 0
            try:
                self._open_part()
                self._admitted = self._present_units()
                return self._transfer_and_complete()
            except FileNotFoundError as error:
                if isinstance(error, StoreError):
                    self._keep_units(error)
                    raise
                self._accounts.owners.ensure()
                self._remove_part()
            except BaseException as error:
                self._keep_units(error)
                raise
            finally:
                part, self._part = self._part, None
                if part is not None:
                    part.close()
        self._refuse(self.missing_units()[0])
        return None

    def _transfer_and_complete(self) -> int | None:
        while True:
            while self.missing_units()[0].any() and not self._should_yield():
                self._transfer()
            if self._part is not None and self._part.present.all():
                crc = self._part.checksum()
                if not self._complete(self._part, crc):
                    self._withdraw()
                    return crc
                if self._close_if_done():
                    return None
            elif self._close_if_done() or self._should_yield():
                self._update_charge()
                return None

    def _complete(self, part: CopyFile, crc: int) -> bool:
        """Verify a partial copy with all units, name it and book it; return False if it is corrupt and removed.

        The record is written first, then the name, then the accounts, so that the next process can repair a crash.
        """
        folder, spec = self._folder, self.spec
        if spec.crc32c is not None and crc != spec.crc32c:
            self._evictor.remove(spec.name)
            self._accounts.release(spec.name)
            return False
        crash_point("complete.checked")
        set_mode(part.fd, COPY_MODE)  # from here on nobody can open the file for writing
        crash_point("complete.sealed")
        folder.write_record(replace(spec, section_sums=part.section_sums()), crc)
        crash_point("complete.recorded")
        folder.give_name(part.fd, spec.name)
        crash_point("complete.named")
        # If the object has no checksums inside, its map has those of its units.
        folder.unlink_part(spec.name, part.fd, keep_map=not spec.has_checksums)
        crash_point("complete.unparted")
        # A file that was written in pieces may take some blocks beyond its size (see Folder). They are charged only up
        # to the space that was reserved for the map, if the map is not kept.
        least = charge_bytes(spec.n_bytes)
        most = least + charge_bytes(map_bytes(spec.n_bytes)) - BLOCK_BYTES
        charge = min(max(folder.charge_of(spec.name) or 0, least), most) if spec.has_checksums else most
        self._accounts.set_charge(spec.name, charge)
        crash_point("complete.booked")
        return True

    # -- the partial copy and its space --------------------------------------------------------------------------------

    def _open_part(self, *, create: bool = False) -> None:
        """Open (or create) the partial copy, if there is one, enter it in the accounts, and offer it to the leases."""
        folder, spec = self._folder, self.spec
        part = continue_part(folder, spec.name, spec.n_bytes)
        if part is None and create:
            part = create_part(folder, spec.name, spec.n_bytes)
        if part is None:
            return
        try:
            if folder.read_record(spec.name) is None:
                folder.write_record(spec, spec.crc32c)
                crash_point("fetch.recorded")
            if part.present.any() and not self._reserved_bytes:
                self._charged_bytes = charge_of(part.present, part.n_bytes)
                self._accounts.set_charge(spec.name, self._charged_bytes)
            self._offer(part.hold())
        except BaseException as error:
            with closing(part):  # for example, the disk is too full for the record; a later fetch starts again
                # The folder was deleted by hand: _remove_part() would not know these files.
                if isinstance(error, FileNotFoundError):
                    folder.unlink_part(spec.name, part.fd, keep_map=False)
            raise
        self._part = part

    def _present_units(self) -> Mask:
        return self._no_units() if self._part is None else self._part.present.copy()

    def _admit(self, units: Mask) -> None:
        """Reserve space for requested units, and with them the rest of the file if it is small; or refuse them.

        Refused units are not part of the rest: their reader reads them from the source.
        """
        if not units.any():
            return
        with self._changed:
            refused = self._refused.copy()
        for more in (to_fetch(self._admitted, units, self.spec.n_bytes) & ~refused, units):
            if self._reserve(self._admitted | more):
                self._admitted |= more
                return
        self._refuse(units)

    def _reserve(self, units: Mask) -> bool:
        name = self.spec.name
        need_bytes = max(charge_of(units, self.spec.n_bytes) - self._charged_bytes, 0)
        if not self._evictor.reserve(name, need_bytes, protected=self.protected | {name}):
            self._evictor.warn_no_space(self.spec, need_bytes)
            return False
        self._reserved_bytes = need_bytes
        crash_point("fetch.reserved")
        return True

    def _update_charge(self) -> None:
        """Set the charge of the partial copy in the accounts to its present size; one without units is removed."""
        if self._part is None or not self._part.has_name:  # a reader found it corrupt and removed it
            self._accounts.release(self.spec.name)
        elif self._part.present.any():
            self._accounts.set_charge(self.spec.name, charge_of(self._part.present, self.spec.n_bytes))
            crash_point("fetch.booked")
        else:
            self._remove_part()

    def _remove_part(self) -> None:
        """Remove the partial copy and its charge. If it has lost its name, the name belongs to another file."""
        self._withdraw()  # with our own view open, the file would count as deleted but still in use
        if self._part is not None and self._part.has_name:
            self._evictor.remove(self.spec.name)
        self._accounts.release(self.spec.name)

    def _keep_units(self, error: BaseException) -> None:
        """After an error, keep what has come for a later fetch, unless the object has changed at its source."""
        with suppress(OSError):  # the first error is the one to report
            if isinstance(error, ObjectChanged):
                self._remove_part()
            else:
                self._update_charge()

    # -- transfer ---------------------------------------------------------------------------------------------------

    def _transfer(self) -> None:
        self._transfer_error = None
        self._assigned = self._present_units()  # units that an earlier transfer lost are assigned again
        while (ranges := self._next_ranges()) is not None:
            self._transfer_in_thread(ranges)
            # Even after an error: the helpers write to the partial copy, which is closed afterwards.
            while self._helpers:
                self._helpers.pop().join()
            if self._transfer_error is not None:
                raise self._transfer_error

    def _transfer_in_thread(self, ranges: list[ByteRange] | None = None) -> None:
        try:
            with cancel_calls_when(self.cancel):
                ranges = self._next_ranges() if ranges is None else ranges
                while ranges is not None:
                    self._transfer_ranges(ranges)
                    ranges = self._next_ranges()
        except BaseException as error:  # noqa: BLE001 - top of a thread: _transfer() raises the first error
            with self._lock:
                self._transfer_error = self._transfer_error or error

    def _next_ranges(self) -> list[ByteRange] | None:
        """Return the ranges of the next request, urgent units first; None: none is left, a thread failed, or yields."""
        n_bytes = self.spec.n_bytes
        if self._should_yield():
            return None
        with self._lock:
            if self._transfer_error is not None:
                return None
            units, urgent = self.missing_units()
            self._admit(units & ~self._admitted)
            todo = self._admitted & ~self._assigned
            # A small rest is fetched in one request, urgent or not: a second request would take longer than its bytes.
            # A reader may wait for a footer, which lies behind all urgent blocks.
            awaited = urgent & todo & self._awaited
            first = awaited if awaited.any() else urgent & todo
            first = todo if bytes_of(todo, n_bytes) <= LITTLE_BYTES else first
            run_bytes = self._run_bytes()
            ranges = next_request(first, n_bytes, gaps=todo, run_bytes=run_bytes) or next_request(
                todo, n_bytes, run_bytes=run_bytes
            )
            self._assigned |= mask_of(ranges, n_bytes)
            if ranges and self._part is None:
                self._open_part(create=True)
            if (self._admitted & ~self._assigned).any():
                self._start_helper(is_long=len(ranges) == 1 and ranges[0].n_bytes >= FIRST_RUN_BYTES)
            return ranges or None

    def _start_helper(self, *, is_long: bool) -> None:
        """Start a thread for what is left, unless there are enough. Units may be requested at any time.

        Long requests beside those of an older fetch, whose bytes are read before, would only make it slower.
        """
        n_requests = N_REQUESTS_IN_FLIGHT
        if is_long and self._urgent.any():
            n_requests = N_REQUESTS_OF_FIRST if self._is_first(self) else 1
        self._helpers = [helper for helper in self._helpers if helper.is_alive()]
        if len(self._helpers) < n_requests - 1:
            helper = Thread(target=self._transfer_in_thread, name="tiercache-part", daemon=True)
            with suppress(RuntimeError):  # no more threads are allowed; the existing ones do all the work
                helper.start()
                self._helpers.append(helper)

    def _run_bytes(self) -> int:
        """Return the longest range of a request. Requests share the bandwidth, and a reader waits for the first one.

        So all of them together have at most as much as the copy has, or the first little of it.
        """
        if not self._urgent.any():
            return REQUEST_BYTES
        share_units = int(self._present.sum()) // N_REQUESTS_OF_FIRST
        return min(max(share_units * UNIT_BYTES, FIRST_RUN_BYTES), REQUEST_BYTES)

    def _transfer_ranges(self, ranges: Sequence[ByteRange]) -> None:
        part = self._part
        if part is None:
            raise RuntimeError("_next_ranges() has opened the partial copy")
        starts = [span.start for span in ranges]
        positions = list(starts)
        disk_errors: list[OSError] = []

        def receive(offset: int, data: memoryview) -> None:
            number = bisect_right(starts, offset) - 1
            span = ranges[number]
            expected = offset if offset == span.start else positions[number]  # a range may begin again
            if offset != expected or offset + data.nbytes > span.end:
                raise ValueError(f"expected byte {positions[number]} of {span}, got {data.nbytes} bytes from {offset}")
            try:
                part.write(offset, data)
            except OSError as error:
                disk_errors.append(error)
                raise
            positions[number] = offset + data.nbytes
            self._arriving[starts[0]] = sum(positions) - sum(starts)

        try:
            if self.spec.n_bytes:  # an empty object has nothing to read
                self._read(ranges, receive, disk_errors)
        finally:
            self._arriving.pop(starts[0], None)
        for span, position in zip(ranges, positions, strict=True):
            if position != span.end:
                raise ValueError(f"{span}: received only {position - span.start} bytes")
            self._on_fetched(span)
            part.mark_present(span)
        self._evictor.counters.add("bytes_fetched", sum(span.n_bytes for span in ranges))
        with self._changed:
            self._present |= part.present
            self._changed.notify_all()

    def _read(self, ranges: Sequence[ByteRange], receive: Receive, disk_errors: Sequence[OSError]) -> None:
        """Read from the source, in the version that was named. disk_errors: Those of receive."""
        spec = self.spec
        try:
            self.store.read_pieces(spec.key, ranges, receive, if_match=spec.if_match, cancel=self.cancel)
        except ObjectChanged:
            if not spec.has_checksums:
                raise
            # The checksums of the shard tell whether the bytes are right.
            spans = [(span, memoryview(bytearray(span.n_bytes))) for span in ranges]
            read_unpinned(self.store, spec.key, spans, cancel=self.cancel)
            for span, data in spans:
                receive(span.start, data)
        except OSError as error:
            if isinstance(error, StoreError) or error in disk_errors:
                raise
            # a network error that the store did not convert
            raise StoreError(f"reading failed: {error}", url=spec.source, retryable=True) from error
        if spec.identity is None and spec.if_match is None:
            # Without a strong ETag as a guard, the object must have the same attributes after the read.
            info = self.store.head(spec.key)
            if name_of_object(spec.source, info) != spec.name:
                raise ObjectChanged(url=spec.source, expected=spec.etag, found=info.etag)


class CopyLease:
    """A lease on a copy, which is whole, partial, or comes with a fetch. See Lease. Any thread may use it.

    The lease never changes to another file: if a partial copy is given up, this lease does not get the missing units.
    After a fork, the child's lease has its own lock on the same descriptor number, and it fetches nothing.
    """

    def __init__(
        self,
        n_bytes: int,
        file: CopyFile | None = None,
        *,
        start_fetch: Callable[[Sequence[ByteRange], bool], Fetch] | None = None,
        note_read: Callable[[int, Callable[[], Sequence[ByteRange]]], int] = lambda _n_bytes, _ranges: 0,
    ) -> None:
        """Create a lease, which then owns file; None: nothing is cached yet.

        start_fetch: Returns the fetch of ranges (urgent or not), of which this lease is then a user; None: nothing is
            missing.
        note_read: See Lease.note_read.
        """
        self._n_bytes, self._start_fetch, self.note_read = n_bytes, start_fetch, note_read
        self._fetch: Fetch | None = None
        self._is_user = False
        self._lock = Lock()
        self._pid = os.getpid()
        # Last: from here on close() works.
        self._file = file
        _leases.add(self)

    @property
    def fd(self) -> int:
        return -1 if self._file is None else self._file.fd

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    @property
    def file(self) -> CopyFile | None:
        return self._file

    @property
    def n_descriptors(self) -> int:
        return 1 if self._file is not None and not self._file.is_partial else 2

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        if self._file is None and self._fetch is not None:
            self._claim(self._fetch)
        file = self._file
        return file is not None and file.covers(ranges)

    def read(self, spans: Sequence[Span]) -> bool:
        """Fill spans from a copy that was partial when the lease was created, each unit verified against the unit map.

        False: the copy was whole, or the bytes are missing or corrupt. The file needs no name: it may have been
            removed.
        """
        file = self._file
        return file is not None and file.is_partial and file.covers([span for span, _ in spans]) and file.read(spans)

    def prefetch(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:
        if ranges and not self.present(ranges):
            self._request(ranges, urgent=urgent)

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        """Wait until these bytes are cached; return False if they will not come. deadline_s: None is one hour.

        They do not come if there is no space, the disk failed, the object is corrupt at its source, or the fetch
        belonged to the parent of a fork. Raises StoreError if the source failed, or the deadline passed.
        """
        is_present = self.present(ranges)
        fetch = self._completing_fetch() if is_present else self._request(ranges, urgent=True)
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
            self._start_fetch = None  # refused: asking again for each block would cost milliseconds each
        return is_present

    def _completing_fetch(self) -> Fetch | None:
        """Return the fetch that is about to give the copy its final name; None: there is none."""
        file, fetch = self._file, self._fetch
        is_complete = file is not None and file.is_partial and file.covers([ByteRange(0, self._n_bytes)])
        return fetch if is_complete and self._pid == os.getpid() else None

    def _request(self, ranges: Sequence[ByteRange], *, urgent: bool) -> Fetch | None:
        """Request ranges from the fetch of this copy, as a user until this has a descriptor; None: none can come."""
        start_fetch = self._start_fetch
        if start_fetch is None or self._pid != os.getpid() or any(span.end > self._n_bytes for span in ranges):
            return None
        fetch = start_fetch(ranges, urgent)
        with self._lock:
            before, was_user = self._fetch, self._is_user
            self._fetch, self._is_user = fetch, self._file is None
        if before is not None and was_user:
            before.leave()
        if not self._is_user:
            fetch.leave()
        return fetch

    def _claim(self, fetch: Fetch) -> None:
        with self._lock:
            if self._file is not None or self._fetch is not fetch or not self._is_user or self._pid != os.getpid():
                return
            self._file, has_left = fetch.claim()
            self._is_user = not has_left

    def close(self) -> None:
        with self._lock:
            file, fetch, is_user = self._file, self._fetch, self._is_user
            self._file, self._fetch, self._is_user, self._start_fetch = None, None, False, None
        if file is not None:
            file.close()
        if fetch is not None and is_user and self._pid == os.getpid():
            fetch.leave()

    def __enter__(self) -> CopyLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting():
            self.close()

    def _renew(self) -> None:
        """In a forked child, open the same file again under the same number, so that the child has its own lock."""
        self._lock = Lock()
        file = self._file
        if file is None:
            return
        # Without /proc the inherited descriptor is kept: its lock lasts as long as either process has it open.
        with suppress(OSError):
            own = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
            try_shared(own)
            os.dup2(own, file.fd, inheritable=False)
            os.close(own)


_leases: weakref.WeakSet[CopyLease] = weakref.WeakSet()


def _renew_all() -> None:
    for lease in list(_leases):
        lease._renew()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_all)
