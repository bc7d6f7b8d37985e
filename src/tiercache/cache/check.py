"""Verification: reads copies, compares them with their records, and removes corrupt ones."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from tiercache.cache.locks import NameLock, try_shared
from tiercache.cache.names import Record
from tiercache.cache.partial import bytes_of, open_part, read_checksum
from tiercache.errors import StoreError
from tiercache.shard.verify import verify_shard
from tiercache.store import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.cache.session import CacheSession

_MOST_FINDINGS = 4
_SHARD = ".tcs"  # a segment of a manifest also has an identity, but no blocks


class CopyState(StrEnum):
    OK = "ok"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"
    """No record says what the copy should be; it is verified when it is next used."""


@dataclass(frozen=True, slots=True)
class CopyCheck:
    """The result for one copy.

    Attributes:
        name: Name of the copy, a hash.
        source: URL without credentials, "" if unknown.
        n_bytes: Number of bytes that were read; for a partial copy, those of its units.
        state: Result.
        in_part: Whether the copy is partial.
        where: Defects of the copy, as texts for the user; empty if the copy is right.
        removed: Whether the copy was deleted.
    """

    name: str
    source: str
    n_bytes: int
    state: CopyState
    in_part: bool = False
    where: tuple[str, ...] = ()
    removed: bool = False


@dataclass(frozen=True, slots=True)
class CheckProgress:
    """The progress of a verification: copies that were read, copies in total, and the result for the last copy."""

    n_done: int
    n_all: int
    last: CopyCheck


@dataclass(frozen=True, slots=True)
class VerifyReport:
    checked: tuple[CopyCheck, ...]

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.checked)

    @property
    def wrong(self) -> tuple[CopyCheck, ...]:
        """The copies that are damaged or unreadable, including removed ones."""
        return tuple(one for one in self.checked if one.state in (CopyState.DAMAGED, CopyState.UNREADABLE))

    @property
    def is_right(self) -> bool:
        return all(one.removed for one in self.wrong)


def verify_copies(
    opened: CacheSession,
    names: Sequence[str],
    *,
    jobs: int,
    repair: bool,
    on_progress: Callable[[CheckProgress], None] | None,
) -> VerifyReport:
    checks: list[CopyCheck] = []
    pool = ThreadPoolExecutor(jobs, "tiercache-verify")
    try:
        for number, one in enumerate(pool.map(partial(_check_one, opened, repair), names), start=1):
            if one is not None:
                checks.append(one)
                if on_progress is not None:
                    on_progress(CheckProgress(number, len(names), one))
    finally:
        pool.shutdown(cancel_futures=True)
    return VerifyReport(tuple(checks))


def _check_one(opened: CacheSession, repair: bool, name: str) -> CopyCheck | None:
    """Return the result for a copy, removed if it is corrupt and repair is set; None: the copy is gone."""
    fd = opened.folder.open_copy(name)
    if fd is None:
        return _check_partial_copy(opened, name, repair=repair)
    try:
        try_shared(fd)  # prevents eviction during the check
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NOATIME)  # a check is not a use: the file keeps its time of access
        checked = _check_copy(fd, name, opened.folder.read_record(name))
        if checked.state is CopyState.DAMAGED and checked.source.endswith(_SHARD):
            checked = replace(checked, where=(*checked.where, *_findings(opened, name)))
        if not repair or checked.state in (CopyState.OK, CopyState.UNKNOWN):
            return checked
        return replace(checked, removed=opened.remove_corrupt(name, fd))
    except OSError as error:
        return replace(checked, where=(*checked.where, f"it cannot be removed: {error}"))
    finally:
        os.close(fd)


def _check_copy(fd: int, name: str, record: Record | None) -> CopyCheck:
    n_bytes = os.fstat(fd).st_size
    if record is None or record.crc32c is None:
        return CopyCheck(name, "" if record is None else record.source, 0, CopyState.UNKNOWN)
    state, defect = CopyState.DAMAGED, ""
    if n_bytes != record.n_bytes:
        defect = f"it has {n_bytes:,} bytes instead of {record.n_bytes:,}"
    else:
        crc, offset, _ = read_checksum(fd, n_bytes)
        if offset < n_bytes:
            state, defect = CopyState.UNREADABLE, f"it cannot be read at offset {offset}"
        elif crc != record.crc32c:
            defect = f"its CRC-32C is {crc:08x}, expected {record.crc32c:08x}"
    if not defect:
        return CopyCheck(name, record.source, n_bytes, CopyState.OK)
    return CopyCheck(name, record.source, n_bytes, state, where=(defect,))


def _findings(opened: CacheSession, name: str) -> list[str]:
    """Return which blocks of a cached shard are damaged, by the shard's own checksums."""
    defects: list[str] = []
    with closing(LocalFolder(opened.folder.copies)) as folder, suppress(StoreError):
        for one in islice(verify_shard(folder, name), _MOST_FINDINGS):
            places = [one.part, "" if one.block is None else f"block {one.block}", one.column or ""]
            defects.append(f"{', '.join(place for place in places if place)}: {one.message}")
    return defects


def _check_partial_copy(opened: CacheSession, name: str, *, repair: bool) -> CopyCheck | None:
    try:
        n_bytes = os.lstat(opened.folder.copy_path(f"{name}.part")).st_size
    except OSError:
        return None
    record = opened.folder.read_record(name)
    unknown = CopyCheck(name, "" if record is None else record.source, 0, CopyState.UNKNOWN, in_part=True)
    held = open_part(opened.folder, name, n_bytes)
    if held is None:  # of an earlier boot, or being created: the next fetch verifies it first
        return unknown
    try:
        wrong, n_read = held.wrong_units(), bytes_of(held.mask(), n_bytes)
    finally:
        held.close()
    if not wrong:
        return replace(unknown, n_bytes=n_read, state=CopyState.OK)
    defect = f"{len(wrong)} units are damaged, the first at offset {wrong[0]}"
    checked = replace(unknown, n_bytes=n_read, state=CopyState.DAMAGED, where=(defect,))
    return _remove_partial_copy(opened, checked) if repair else checked


def _remove_partial_copy(opened: CacheSession, checked: CopyCheck) -> CopyCheck:
    """Delete a corrupt partial copy. The next fetch starts it again."""
    lock = NameLock(opened.folder.locks / checked.name)
    try:
        if opened.writing is None or not lock.try_acquire():
            return checked
        opened.folder.remove_copy(checked.name)
        opened.writing.accounts.remove([checked.name])
    except OSError as error:
        return replace(checked, where=(*checked.where, f"it cannot be removed: {error}"))
    finally:
        lock.release()
    return replace(checked, removed=True)
