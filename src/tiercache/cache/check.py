"""Verification: reads copies, compares them with their records, and repairs corrupt ones."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from tiercache.cache.fetch.partial import hold_part, wrong_units
from tiercache.cache.fetch.units import bytes_of, read_checksum
from tiercache.cache.machine import NameLock, try_shared
from tiercache.cache.names import CopySpec, Record
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ByteRange, ShardIdentity
from tiercache.shard.read.verify import verify_shard
from tiercache.store import LocalFolder, redact

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.cache.cache import CachedStore
    from tiercache.cache.fetch.partial import CopyHandle
    from tiercache.cache.session import CacheSession

_MOST_FINDINGS = 4
_SHARD = ".tcs"  # a segment of a manifest also has an identity, but no blocks


class CopyState(StrEnum):
    """The result of verifying a copy."""

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
        state: Result; see State.
        in_part: Whether the copy is partial.
        where: Defects of the copy, as texts for the user; empty if the copy is right.
        removed: Whether the copy was deleted.
        repaired: Whether the copy was also fetched again, and is right now.
    """

    name: str
    source: str
    n_bytes: int
    state: CopyState
    in_part: bool = False
    where: tuple[str, ...] = ()
    removed: bool = False
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class CheckProgress:
    """The progress of a verification: copies that were read, copies in total, and the result for the last copy."""

    n_done: int
    n_all: int
    last: CopyCheck


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The results for all copies, by name."""

    checked: tuple[CopyCheck, ...]

    @property
    def n_bytes(self) -> int:
        """Number of bytes that were read."""
        return sum(one.n_bytes for one in self.checked)

    @property
    def wrong(self) -> tuple[CopyCheck, ...]:
        """The copies that are damaged or unreadable, including repaired ones."""
        return tuple(one for one in self.checked if one.state in (CopyState.DAMAGED, CopyState.UNREADABLE))

    @property
    def is_right(self) -> bool:
        """Whether no corrupt copy is left in the cache."""
        return all(one.removed for one in self.wrong)


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """The arguments of Cache.verify."""

    jobs: int = 4
    repair: bool = False
    store: CachedStore | None = None
    names: frozenset[str] | None = None
    on_progress: Callable[[CheckProgress], None] | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be 1 or more, got {self.jobs}")


def check(opened: CacheSession, options: CheckOptions) -> VerifyReport:
    """Verify the copies. See Cache.verify."""
    here = opened.folder.sizes().keys()
    names = sorted(here if options.names is None else here & options.names)
    found: list[CopyCheck] = []
    pool = ThreadPoolExecutor(options.jobs, "tiercache-verify")
    try:
        mender = _Repairer(opened, options.store) if options.repair else None
        for number, one in enumerate(pool.map(lambda name: _check_one(opened, name, mender), names)):
            if one is not None:
                found.append(one)
                if options.on_progress is not None:
                    options.on_progress(CheckProgress(number + 1, len(names), one))
    finally:
        pool.shutdown(cancel_futures=True)
    return VerifyReport(tuple(found))


def _check_one(opened: CacheSession, name: str, mender: _Repairer | None) -> CopyCheck | None:
    """Return the result for a copy, repaired if a mender is given; None: the copy is gone."""
    fd = opened.folder.open_copy(name)
    if fd is None:
        return _check_part(opened, name, mender)
    try:
        try_shared(fd)  # prevents eviction during the check
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NOATIME)  # a check is not a use: the file keeps its time of access
        record = opened.folder.read_record(name)
        checked = _check_copy(fd, name, record)
        if checked.state is CopyState.DAMAGED and checked.source.endswith(_SHARD):
            checked = replace(checked, where=(*checked.where, *_findings(opened, name)))
        if mender is None or checked.state in (CopyState.OK, CopyState.UNKNOWN):
            return checked
        return mender.repair(checked, fd, record)
    finally:
        os.close(fd)


def _check_copy(fd: int, name: str, record: Record | None) -> CopyCheck:
    """Return the result for a whole copy."""
    n_bytes = os.fstat(fd).st_size
    if record is None or record.crc32c is None:
        return CopyCheck(name, "" if record is None else record.source, 0, CopyState.UNKNOWN)
    right = CopyCheck(name, record.source, n_bytes, CopyState.OK)
    if n_bytes != record.n_bytes:
        said = f"it has {n_bytes:,} bytes instead of {record.n_bytes:,}"
        return replace(right, state=CopyState.DAMAGED, where=(said,))
    whole, offset, _ = read_checksum(fd, n_bytes)
    if offset < n_bytes:
        return replace(right, state=CopyState.UNREADABLE, where=(f"it cannot be read at offset {offset}",))
    if whole != record.crc32c:
        said = f"its CRC-32C is {whole:08x}, expected {record.crc32c:08x}"
        return replace(right, state=CopyState.DAMAGED, where=(said,))
    return right


def _findings(opened: CacheSession, name: str) -> list[str]:
    """Return which blocks of a cached shard are damaged, by the shard's own checksums."""
    found: list[str] = []
    with closing(LocalFolder(opened.folder.copies)) as folder, suppress(StoreError):
        for one in islice(verify_shard(folder, name), _MOST_FINDINGS):
            places = [one.part, "" if one.block is None else f"block {one.block}", one.column or ""]
            found.append(f"{', '.join(place for place in places if place)}: {one.message}")
    return found


def _check_part(opened: CacheSession, name: str, mender: _Repairer | None) -> CopyCheck | None:
    try:
        n_bytes = os.lstat(opened.folder.copy_path(f"{name}.part")).st_size
    except OSError:
        return None
    record = opened.folder.read_record(name)
    unknown = CopyCheck(name, "" if record is None else record.source, 0, CopyState.UNKNOWN, in_part=True)
    held = hold_part(opened.folder, name, n_bytes)
    if held is None:  # of an earlier boot, or being created: the next fetch verifies it first
        return unknown
    try:
        wrong, n_read = _wrong_units(held)
    finally:
        held.close()
    if not wrong:
        return replace(unknown, n_bytes=n_read, state=CopyState.OK)
    said = f"{len(wrong)} units are damaged, the first at offset {wrong[0]}"
    checked = replace(unknown, n_bytes=n_read, state=CopyState.DAMAGED, where=(said,))
    return checked if mender is None else mender.drop_part(checked)


def _wrong_units(held: CopyHandle) -> tuple[list[int], int]:
    """Return the offsets of the corrupt units of a partial copy, and the number of bytes that are present."""
    presence = held.presence
    if presence is None:
        return [], 0
    return wrong_units(held.fd, presence), bytes_of(presence.mask(), presence.n_bytes)


class _Repairer:
    """Removes corrupt copies, and fetches them again if it has the store that they came from."""

    def __init__(self, opened: CacheSession, store: CachedStore | None) -> None:
        self._opened, self._store = opened, store

    def repair(self, checked: CopyCheck, fd: int, record: Record | None) -> CopyCheck:
        """Remove a corrupt copy and fetch it again; a step that failed is described in `where`."""
        try:
            removed = self._opened.remove_corrupt(checked.name, fd)
        except OSError as error:
            return replace(checked, where=(*checked.where, f"it cannot be removed: {error}"))
        if not removed or record is None or self._store is None:
            return replace(checked, removed=removed)
        try:
            verdict = self._fetch(self._store, checked.name, record)
        except (StoreError, CorruptShard, OSError) as error:
            verdict = f"it could not be fetched again: {error}"
        done = verdict is None
        return replace(checked, removed=True, repaired=done, where=(*checked.where, *([] if done else [str(verdict)])))

    def _fetch(self, store: CachedStore, name: str, record: Record) -> str | None:
        """Fetch a copy again; return None if it is right now, else the reason."""
        prefix = f"{redact(store.url)}/"
        if not record.source.startswith(prefix):
            return f"it came from another store than {store.url}"
        wanted = wanted_of(store, record.source.removeprefix(prefix), record)
        if wanted is None or wanted.name != name:
            return "the object has changed at its source since"
        lease = self._opened.open(wanted, store.inner)
        if lease is None:
            return "the cache has no space for it"
        with lease:
            if not lease.wait([ByteRange(0, wanted.n_bytes)]):
                return "it is corrupt at its source too, or the cache has no space for it"
        return None

    def drop_part(self, checked: CopyCheck) -> CopyCheck:
        """Delete a corrupt partial copy. The next fetch starts it again."""
        writing = self._opened.writing
        lock = NameLock(self._opened.folder.locks / checked.name)
        try:
            if writing is None or not lock.try_acquire():
                return checked
            self._opened.folder.remove_copy(checked.name)
            writing.accounts.remove([checked.name])
        except OSError as error:
            return replace(checked, where=(*checked.where, f"it cannot be removed: {error}"))
        finally:
            lock.release()
        return replace(checked, removed=True)


def wanted_of(store: CachedStore, key: str, record: Record) -> CopySpec | None:
    """Return the specification with which the copy of a record can be fetched again."""
    if record.dataset_id is None or record.shard_id is None or record.crc32c is None:
        return store.wanted(key)
    return store.wanted(key, ShardIdentity(record.dataset_id, record.shard_id, record.n_bytes, record.crc32c))
