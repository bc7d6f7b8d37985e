"""Work on many copies: warming fetches what is missing of them, and verification compares them with their checksums."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from threading import Event
from typing import TypeAlias

from tiercache.cache.copy_file import UNIT_BYTES, bytes_of, charge_of, mask_of, open_part, read_checksum
from tiercache.cache.fetch import Fetch
from tiercache.cache.folder import NameLock, charge_bytes, try_shared
from tiercache.cache.names import CopySpec
from tiercache.cache.session import CacheSession
from tiercache.crash_points import crash_point
from tiercache.errors import StoreError
from tiercache.model import ByteRange, format_bytes
from tiercache.store import Store

PROGRESS_EVERY_S = 0.5

# -- warming -----------------------------------------------------------------------------------------------------------

Ranges: TypeAlias = "Mapping[str, Sequence[ByteRange]]"
"""Byte ranges that suffice, by key. An object without an entry is wanted whole."""


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """The progress of warming: requested copies and their bytes, present and in all.

    last: Key of the copy that was fetched last; "" at the start.
    """

    n_done: int
    n_wanted: int
    bytes_done: int
    bytes_wanted: int
    last: str = ""


@dataclass(frozen=True, slots=True)
class WarmReport:
    n_wanted: int
    n_fetched: int
    bytes_fetched: int


@dataclass(frozen=True, slots=True)
class RequestedCopy:
    """A copy of which ranges, ascending, are requested. missing_bytes: Bytes to fetch; None: all is present."""

    spec: CopySpec
    ranges: tuple[ByteRange, ...]
    missing_bytes: int | None

    @property
    def n_bytes(self) -> int:
        return sum(span.n_bytes for span in self.ranges)

    @property
    def is_whole(self) -> bool:
        return self.n_bytes == self.spec.n_bytes


@dataclass(frozen=True, slots=True)
class MissingCopies:
    """The requested copies, each once, in the order of the fetches, and the bytes that they will take of the limit."""

    requested: tuple[RequestedCopy, ...]
    need_bytes: int
    fits: bool

    @property
    def missing(self) -> list[RequestedCopy]:
        return [one for one in self.requested if one.missing_bytes is not None]

    @property
    def missing_bytes(self) -> int:
        return sum(one.missing_bytes or 0 for one in self.requested)


def find_missing(opened: CacheSession, specs: Sequence[CopySpec], ranges: Ranges) -> MissingCopies:
    """Return what is missing of the requested copies. It lists the folder twice, however many they are."""
    whole, in_part = (frozenset(opened.folder.names(kind)) for kind in ("", ".part"))
    requested: dict[str, RequestedCopy] = {}
    need_bytes = 0
    for spec in specs:
        if spec.name in requested:
            continue
        spans = tuple(ranges[spec.key]) if spec.key in ranges else (ByteRange(0, spec.n_bytes),)
        one = requested[spec.name] = _measured(
            opened, RequestedCopy(spec, spans, None), is_copy=spec.name in whole, has_part=spec.name in in_part
        )
        is_copy = one.is_whole or one.missing_bytes is None
        need_bytes += charge_bytes(spec.n_bytes) if is_copy else charge_of(mask_of(spans, spec.n_bytes), spec.n_bytes)
    found = MissingCopies(tuple(requested.values()), need_bytes, fits=True)
    return replace(found, fits=not found.missing or need_bytes <= opened.accounts.limit_bytes())


def _measured(opened: CacheSession, one: RequestedCopy, *, is_copy: bool, has_part: bool) -> RequestedCopy:
    spec = one.spec
    if is_copy and opened.folder.size_of(spec.name) == spec.n_bytes:
        return one
    if one.is_whole and not has_part:
        return replace(one, missing_bytes=spec.n_bytes)
    missing = mask_of(one.ranges, spec.n_bytes)
    part = open_part(opened.folder, spec.name, spec.n_bytes) if has_part else None
    if part is not None:
        with closing(part):
            missing &= ~part.mask()
    # A partial copy that has all units but no final name still counts as missing.
    if missing.any() or one.is_whole:
        return replace(one, missing_bytes=min(int(missing.sum()) * UNIT_BYTES, spec.n_bytes))
    return one


def warm_copies(
    opened: CacheSession,
    store: Store,
    copies: MissingCopies,
    *,
    jobs: int,
    on_progress: Callable[[WarmProgress], None] | None,
) -> WarmReport:
    """Fetch what is missing of the requested objects. On the first error, all fetches are cancelled."""
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, got {jobs}")
    if not copies.fits:
        raise _full(opened, copies.need_bytes)
    crash_point("warm.planned")
    missing, n_wanted = copies.missing, len(copies.requested)
    bytes_wanted = sum(one.n_bytes for one in copies.requested)
    n_done, bytes_done, last = n_wanted - len(missing), bytes_wanted - copies.missing_bytes, ""
    come_bytes = bytes_done
    names, running, stop = frozenset(one.spec.name for one in copies.requested), dict[Fetch, int](), Event()

    def tell() -> None:
        if on_progress is not None:
            nonlocal come_bytes
            come = sum(max(n_bytes - fetch.left_bytes(), 0) for fetch, n_bytes in running.copy().items())
            # A fetch that has ended is not among the running ones any more, and not among the done ones yet.
            come_bytes = max(come_bytes, min(bytes_done + come, bytes_wanted))
            on_progress(WarmProgress(n_done, n_wanted, come_bytes, bytes_wanted, last))

    def fetch(one: RequestedCopy) -> None:
        started = opened.fetch(one.spec, store, one.ranges, True)
        started.protected = names
        running[started] = one.missing_bytes or 0
        if stop.is_set():
            started.cancel.set()
        try:
            _wait(opened, started, one)
        finally:
            running.pop(started, None)

    pool = ThreadPoolExecutor(min(jobs, len(missing)) or 1, "tiercache-warm")
    try:
        tell()
        futures = {pool.submit(fetch, one): one for one in missing}
        while futures:
            done = wait(futures, PROGRESS_EVERY_S, FIRST_COMPLETED).done
            if not done:
                tell()
            for future in done:
                one = futures.pop(future)
                future.result()
                n_done, bytes_done, last = n_done + 1, bytes_done + (one.missing_bytes or 0), one.spec.key
                tell()
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for started in list(running):
            started.cancel.set()
        pool.shutdown()
        opened.forget_unread(lambda spec: spec.name in names)
    wanted = ((one, None if one.is_whole else one.ranges) for one in copies.requested)
    lost = [one.spec.source for one, ranges in wanted if not opened.is_cached(one.spec, ranges)]
    if lost:
        raise StoreError(
            f"{len(lost)} of {n_wanted} copies are missing again after warming", url=lost[0], retryable=True
        )
    return WarmReport(n_wanted, len(missing), copies.missing_bytes)


def _full(opened: CacheSession, need_bytes: int) -> StoreError:
    used, reserved, limit = opened.accounts.sums()
    usable = max(opened.evictor.usable_bytes(), 0)
    return StoreError(
        f"the cache has no space for {format_bytes(need_bytes)}: {format_bytes(used + reserved)} of "
        f"{format_bytes(limit)} are used, and the disk has {format_bytes(usable)} above min_free; evict or unpin "
        "copies, enlarge the cache, or request less",
        url=str(opened.folder.root),
        code="CacheFull",
    )


def _wait(opened: CacheSession, fetch: Fetch, one: RequestedCopy) -> None:
    has_left = False
    try:
        fetch.wait(one.ranges, None)
        file, has_left = fetch.claim()
        is_present = file is not None and file.covers(one.ranges)
        if file is not None:
            file.close()
    finally:
        if not has_left:
            fetch.leave()
    crash_point("warm.fetched")
    if not is_present:
        if fetch.cancel.is_set() or opened.breaker.is_open:
            reason = "the cache was closed" if fetch.cancel.is_set() else "the cache's disk fails"
            raise StoreError(f"not cached: {reason}", url=one.spec.source, retryable=True)
        raise _full(opened, charge_bytes(one.n_bytes))


# -- verification ------------------------------------------------------------------------------------------------------


class CopyState(StrEnum):
    OK = "ok"
    DAMAGED = "damaged"
    UNKNOWN = "unknown"
    """No record says what the copy should be; it is verified when it is next used."""


@dataclass(frozen=True, slots=True)
class CopyCheck:
    """The result for one copy.

    Attributes:
        n_bytes: Number of bytes that were read; for a partial copy, those of its units.
        where: Defects of the copy, as texts for the user.
    """

    name: str
    source: str
    n_bytes: int
    state: CopyState
    in_part: bool = False
    where: tuple[str, ...] = ()
    removed: bool = False


@dataclass(frozen=True, slots=True)
class VerifyReport:
    checked: tuple[CopyCheck, ...]

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.checked)

    @property
    def wrong(self) -> tuple[CopyCheck, ...]:
        return tuple(one for one in self.checked if one.state is CopyState.DAMAGED)

    @property
    def is_right(self) -> bool:
        return all(one.removed for one in self.wrong)


def verify_copies(
    opened: CacheSession,
    names: Sequence[str],
    *,
    jobs: int,
    repair: bool,
    on_progress: Callable[[CopyCheck], None] | None,
) -> VerifyReport:
    checks: list[CopyCheck] = []
    pool = ThreadPoolExecutor(jobs, "tiercache-verify")
    try:
        for one in pool.map(partial(_check_one, opened, repair), names):
            if one is not None:
                checks.append(one)
                if on_progress is not None:
                    on_progress(one)
    finally:
        pool.shutdown(cancel_futures=True)
    return VerifyReport(tuple(checks))


def _check_one(opened: CacheSession, repair: bool, name: str) -> CopyCheck | None:
    fd = opened.folder.open_copy(name)
    if fd is None:
        return _check_partial_copy(opened, name, repair=repair)
    try:
        try_shared(fd)  # prevents eviction during the check
        record = opened.folder.read_record(name)
        checked = _check_copy(fd, name, record)
        if not repair or record is None or checked.state is not CopyState.DAMAGED:
            return checked
        return replace(checked, removed=opened.remove_damage(record, fd))
    except OSError as error:
        return replace(checked, where=(*checked.where, f"it cannot be removed: {error}"))
    finally:
        os.close(fd)


def _check_copy(fd: int, name: str, record: CopySpec | None) -> CopyCheck:
    n_bytes = os.fstat(fd).st_size
    if record is None or record.crc32c is None:
        return CopyCheck(name, "" if record is None else record.source, 0, CopyState.UNKNOWN)
    defect = ""
    if n_bytes != record.n_bytes:
        defect = f"it has {n_bytes:,} bytes instead of {record.n_bytes:,}"
    else:
        crc, offset, _ = read_checksum(fd, n_bytes)
        if offset < n_bytes:
            defect = f"it cannot be read at offset {offset}"
        elif crc != record.crc32c:
            defect = f"its CRC-32C is {crc:08x}, expected {record.crc32c:08x}"
    if not defect:
        return CopyCheck(name, record.source, n_bytes, CopyState.OK)
    return CopyCheck(name, record.source, n_bytes, CopyState.DAMAGED, where=(defect,))


def _check_partial_copy(opened: CacheSession, name: str, *, repair: bool) -> CopyCheck | None:
    try:
        n_bytes = os.lstat(opened.folder.copy_path(f"{name}.part")).st_size
    except OSError:
        return None
    record = opened.folder.read_record(name)
    unknown = CopyCheck(name, "" if record is None else record.source, 0, CopyState.UNKNOWN, in_part=True)
    part = open_part(opened.folder, name, n_bytes)
    if part is None:  # of an earlier boot, or being created: the next fetch verifies it first
        return unknown
    with closing(part):
        wrong, n_read = part.wrong_units(), bytes_of(part.mask(), n_bytes)
    if not wrong:
        return replace(unknown, n_bytes=n_read, state=CopyState.OK)
    defect = f"{len(wrong)} units are damaged, the first at offset {wrong[0]}"
    checked = replace(unknown, n_bytes=n_read, state=CopyState.DAMAGED, where=(defect,))
    return _remove_partial_copy(opened, checked) if repair else checked


def _remove_partial_copy(opened: CacheSession, checked: CopyCheck) -> CopyCheck:
    lock = NameLock(opened.folder.locks / checked.name)
    try:
        if not lock.try_acquire():
            return checked
        opened.folder.remove_copy(checked.name)
        opened.accounts.remove([checked.name])
    except OSError as error:
        return replace(checked, where=(*checked.where, f"it cannot be removed: {error}"))
    finally:
        lock.release()
    return replace(checked, removed=True)
