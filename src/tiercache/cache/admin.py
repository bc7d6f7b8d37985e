"""What people ask of a cache: what is here, hold it, let it go, delete it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tiercache.cache.download import checksum_of
from tiercache.cache.machine import room
from tiercache.cache.record import Record, Wanted
from tiercache.catalog import CopyRow, charge_bytes
from tiercache.errors import StoreError, TierCacheError

if TYPE_CHECKING:
    from tiercache.cache.opened import Opened, Writing
    from tiercache.cache.store import CachedStore
    from tiercache.model import ShardIdentity


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached copy. name: its own, a hash; source: URL without credentials, "" where unknown.

    n_bytes: what it takes of the budget; last_use: a count, not a time; dataset_id: None for objects of no data set.
    """

    name: str
    source: str
    n_bytes: int
    pinned: bool
    uses: int
    last_use: int
    dataset_id: str | None = None
    shard_id: str | None = None


Selection: TypeAlias = Iterable[str] | Callable[[Entry], bool] | None


def entries(opened: Opened) -> list[Entry]:
    """All copies, least recently used first."""
    if opened.writing is None:
        rows = [
            CopyRow(name, charge_bytes(n_bytes), _record(opened, name), 0, 0)
            for name, n_bytes in sorted(opened.folder.sizes().items())
        ]
    else:
        opened.writing.evictor.flush_uses()
        rows = opened.writing.accounts.rows()
    return [_entry(opened, row) for row in rows if opened.folder.has_copy(row.name)]


def _record(opened: Opened, name: str) -> str:
    record = opened.folder.read_record(name)
    return "" if record is None else record.to_json()


def _entry(opened: Opened, row: CopyRow) -> Entry:
    record = Record.from_json(row.record)
    entry = Entry(row.name, "", row.charge_bytes, opened.folder.is_pinned(row.name), row.uses, row.last_use)
    if record is None:
        return entry
    return replace(entry, source=record.source, dataset_id=record.dataset_id, shard_id=record.shard_id)


def selected(opened: Opened, selection: Selection) -> list[Entry]:
    """The entries that a selection names."""
    everything = entries(opened)
    if selection is None:
        return everything
    if callable(selection):
        return [entry for entry in everything if selection(entry)]
    names = set(selection)
    return [entry for entry in everything if entry.name in names]


def writable(opened: Opened) -> Writing:
    """The parts that change the cache.

    Raises:
        TierCacheError: it can only be read.
    """
    if opened.writing is None:
        raise TierCacheError(f"cache {opened.folder.root}: cannot be written", path=str(opened.folder.root))
    return opened.writing


def evict(opened: Opened, selection: Selection) -> int:
    """Delete copies; returns bytes freed."""
    writing = writable(opened)
    names = {entry.name for entry in selected(opened, selection)}
    return writing.evictor.evict(row for row in writing.accounts.rows() if row.name in names)


def drop_objects(opened: Opened, sources: Sequence[str]) -> None:
    """Delete copies of objects without identity; one that is being read stays until the policy takes it."""
    if opened.writing is None:
        return
    gone = set(sources)
    rows = [(row, Record.from_json(row.record)) for row in opened.writing.accounts.rows()]
    opened.writing.evictor.evict(r for r, record in rows if record and not record.shard_id and record.source in gone)


def pin(opened: Opened, store: CachedStore, pairs: Sequence[tuple[str, ShardIdentity | None]]) -> None:
    """Hold copies that were just warmed."""
    writable(opened)
    for key, identity in pairs:
        wanted = store.wanted(key, identity)
        # Under a reader's lock: an evictor either sees the pin, or has taken the copy before we had it.
        lease = None if wanted is None else opened.hit(wanted.name, wanted.n_bytes)
        if wanted is None or lease is None:
            raise StoreError("evicted before it could be pinned", url=f"{store.url}/{key}", retryable=True)
        with lease:
            opened.folder.pin(wanted.name)


def unpin(opened: Opened, selection: Selection) -> int:
    """Let copies go; returns how many were pinned."""
    writable(opened)
    return sum(opened.folder.unpin(entry.name) for entry in selected(opened, selection) if entry.pinned)


def distrust(opened: Opened, wanted: Wanted) -> bool:
    """Check a copy against its checksum and remove it if it is wrong. True: it is not here (any more)."""
    fd = opened.folder.open_copy(wanted.name)
    if fd is None:
        return True
    record = opened.folder.read_record(wanted.name)
    expected = wanted.crc32c if wanted.crc32c is not None or record is None else record.crc32c
    try:
        if os.fstat(fd).st_size == wanted.n_bytes and checksum_of(fd, wanted.n_bytes) == expected:
            return False
    except OSError as error:
        # Cannot be read: as bad as wrong.
        if isinstance(error, StoreError):
            raise
    finally:
        os.close(fd)
    opened.discard(wanted.name)
    return True


def stats(opened: Opened, limit_bytes: int) -> dict[str, int]:
    """The figures of interface.md."""
    if opened.writing is not None:
        with suppress(OSError):  # somebody deleted the folder: what cannot be made again holds nothing
            opened.writing.owners.ensure()
    used, _, limit = (0, 0, limit_bytes) if opened.writing is None else opened.writing.accounts.sums()
    if opened.writing is None:
        used = sum(charge_bytes(n_bytes) for n_bytes in opened.folder.sizes().values())
    sizes = opened.folder.sizes()
    pinned = sum(charge_bytes(sizes[name]) for name in opened.folder.names(".pin") if name in sizes)
    counts = {name: int(n) for name, n in opened.counters.snapshot().items()}
    return {"bytes_used": used, "limit_bytes": limit, "pinned_bytes": pinned} | counts


def status(opened: Opened, limit_bytes: int) -> dict[str, Any]:
    """stats() and the state of folder and disk."""
    figures = stats(opened, limit_bytes)  # first: it makes a deleted folder again
    disk = room(opened.folder.root)
    reserved = 0 if opened.writing is None else opened.writing.accounts.sums()[1]
    return figures | {
        "n_copies": len(opened.folder.sizes()),
        "reserved_bytes": reserved,
        "disk_free_bytes": disk.free_bytes,
        "disk_total_bytes": disk.total_bytes,
        "network_file_system": opened.folder.network,
        "writable": opened.writing is not None,
        "bypassed": opened.writing is not None and opened.writing.breaker.is_open,
    }
