"""The administrative operations of a cache: list copies, pin, unpin, evict, warm, and report the status."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tiercache.cache import poison
from tiercache.cache.evictor import delete_copy
from tiercache.cache.holders import Holder, command_of, holders_of
from tiercache.cache.machine import Owner, room
from tiercache.cache.record import Record
from tiercache.catalog import CopyRow
from tiercache.errors import StoreError, TierCacheError

if TYPE_CHECKING:
    from tiercache.cache.folder import Folder
    from tiercache.cache.opened import CacheSession
    from tiercache.cache.store import CachedStore
    from tiercache.cache.writing import WriteSession
    from tiercache.model import ShardIdentity


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached copy, whole or partial.

    Attributes:
        name: Name of the copy, a hash.
        source: URL without credentials, "" if unknown.
        n_bytes: Bytes that the copy takes of the size limit.
        pinned: Whether the copy is pinned.
        uses: Number of recorded uses.
        last_use: Sequence number of the last use, not a time.
        dataset_id: Identifier of the data set; None for an object of no data set.
        shard_id: Identifier of the shard; None for an object of no data set.
        used_s: Time of the last read or write in seconds since 1970, as the file system records it (see
            Folder.touched_s).
        in_part: Whether the copy is partial.
    """

    name: str
    source: str
    n_bytes: int
    pinned: bool
    uses: int
    last_use: int
    dataset_id: str | None = None
    shard_id: str | None = None
    used_s: float = 0.0
    in_part: bool = False


Selection: TypeAlias = Iterable[str] | Callable[[Entry], bool] | None


def entries(opened: CacheSession) -> list[Entry]:
    """Return all copies, whole and partial, least recently used first."""
    if opened.writing is None:
        rows = [
            CopyRow(name, charge, _record(opened, name), 0, 0) for name, charge in sorted(opened.folder.sizes().items())
        ]
    else:
        opened.writing.evictor.flush_uses()
        rows = opened.writing.accounts.rows()
    whole, parts = frozenset(opened.folder.names("")), frozenset(opened.folder.names(".part"))
    rows = [row for row in rows if row.name in whole or row.name in parts]
    return [_entry(opened, row, in_part=row.name not in whole) for row in rows]


def _record(opened: CacheSession, name: str) -> str:
    record = opened.folder.read_record(name)
    return "" if record is None else record.to_json()


def _entry(opened: CacheSession, row: CopyRow, *, in_part: bool) -> Entry:
    record = Record.from_json(row.record)
    entry = Entry(row.name, "", row.charge_bytes, opened.folder.is_pinned(row.name), row.uses, row.last_use)
    entry = replace(entry, used_s=opened.folder.touched_s(row.name), in_part=in_part)
    if record is None:
        return entry
    return replace(entry, source=record.source, dataset_id=record.dataset_id, shard_id=record.shard_id)


def selected(opened: CacheSession, selection: Selection) -> list[Entry]:
    """Return the entries that a selection names."""
    everything = entries(opened)
    if selection is None:
        return everything
    if callable(selection):
        return [entry for entry in everything if selection(entry)]
    names = set(selection)
    return [entry for entry in everything if entry.name in names]


def writable(opened: CacheSession) -> WriteSession:
    """Return the parts that change the cache.

    Raises:
        TierCacheError: The cache is read-only.
    """
    if opened.writing is None:
        raise TierCacheError(f"cache {opened.folder.root}: cannot be written", path=str(opened.folder.root))
    return opened.writing


def evict(opened: CacheSession, selection: Selection, target_bytes: int | None = None) -> int:
    """Delete copies, least recently used first, until the cache uses at most target_bytes; return the bytes freed."""
    chosen = selected(opened, selection)
    freed_bytes = _evict_without_books(opened, chosen, target_bytes or 0)
    if opened.waits_for_disk_space:
        return freed_bytes
    writing, names = writable(opened), {entry.name for entry in chosen}
    rows = [row for row in writing.accounts.rows() if row.name in names]
    need_bytes = math.inf if target_bytes is None else writing.accounts.sums()[0] - target_bytes
    return freed_bytes + (writing.evictor.evict(rows, need_bytes=need_bytes) if need_bytes > 0 else 0)


def _evict_without_books(opened: CacheSession, chosen: Sequence[Entry], target_bytes: int) -> int:
    """Delete copies while the disk is too full to open the accounts; return the bytes freed."""
    used_bytes, freed_bytes = sum(opened.folder.sizes().values()) if opened.waits_for_disk_space else 0, 0
    for entry in chosen:
        if not opened.waits_for_disk_space or used_bytes - freed_bytes <= target_bytes:
            break
        if entry.source and delete_copy(opened.folder, entry.name):
            freed_bytes += entry.n_bytes
            opened.retry_writing()
    return freed_bytes


def drop_objects(opened: CacheSession, sources: Sequence[str]) -> None:
    """Delete the copies of objects without identity at these URLs and below.

    A copy that is being read stays for now.
    """
    if opened.writing is None or not sources:
        return
    # One query for all URLs: the accounts are searched for their common prefix, as JSON encodes it.
    common = json.dumps(os.path.commonprefix(list(sources)))[1:-1]  # noqa: RUF071 - of strings, not of paths
    rows = [(row, Record.from_json(row.record)) for row in opened.writing.accounts.rows_with(common)]
    exact, below = set(sources), tuple(f"{source}/" for source in sources)

    def is_gone(record: Record | None) -> bool:
        if record is None or record.shard_id:
            return False
        return record.source in exact or record.source.startswith(below)

    opened.writing.evictor.evict(row for row, record in rows if is_gone(record))


def pin(opened: CacheSession, store: CachedStore, pairs: Sequence[tuple[str, ShardIdentity | None]]) -> None:
    """Pin copies that were just fetched."""
    writable(opened)
    for key, identity in pairs:
        wanted = store.wanted(key, identity)
        # The reader's lock settles the race with an evictor: the evictor sees the pin, or it took the copy before this
        # lock.
        lease = None if wanted is None else opened.hit(wanted.name, wanted.n_bytes)
        if wanted is None or lease is None:
            raise StoreError("evicted before it could be pinned", url=f"{store.url}/{key}", retryable=True)
        with lease:
            opened.folder.pin(wanted.name)


def unpin(opened: CacheSession, selection: Selection) -> int:
    """Unpin copies and return how many were pinned."""
    writable(opened)
    n_unpinned = sum(opened.folder.unpin(entry.name) for entry in selected(opened, selection) if entry.pinned)
    if selection is None:
        for name in opened.folder.names(".pin"):  # of copies that are quarantined and not fetched again yet
            opened.folder.unpin(name)
    return n_unpinned


def stats(opened: CacheSession, limit_bytes: int) -> dict[str, int]:
    """Return the values of Cache.stats."""
    if opened.writing is not None:
        with suppress(OSError):  # the folder was deleted; a folder that cannot be recreated holds nothing
            opened.writing.owners.ensure()
            opened.writing.quarantine.release_unused()
    used, _, limit = (0, 0, limit_bytes) if opened.writing is None else opened.writing.accounts.sums()
    if opened.writing is None:
        used = sum(opened.folder.sizes().values())
    sizes = opened.folder.sizes()
    pinned = sum(sizes[name] for name in opened.folder.names(".pin") if name in sizes)
    counts = {name: int(n) for name, n in opened.counters.snapshot().items()}
    return {"bytes_used": used, "limit_bytes": limit, "pinned_bytes": pinned} | counts


def status(opened: CacheSession, limit_bytes: int) -> dict[str, Any]:
    """Return stats() and the state of the folder and the disk. See Cache.status."""
    figures = stats(opened, limit_bytes)  # first, because it recreates a deleted folder
    disk = room(opened.folder.root)
    writing, folder = opened.writing, opened.folder
    n_copies = len(folder.names(""))
    return (
        figures
        | {
            "n_copies": n_copies,
            "n_parts": len(folder.sizes()) - n_copies,
            "reserved_bytes": 0 if writing is None else writing.accounts.sums()[1],
            "disk_free_bytes": disk.free_bytes,
            "disk_total_bytes": disk.total_bytes,
            "network_file_system": folder.network,
            "writable": writing is not None,
            "bypassed": writing is not None and writing.breaker.is_open,
            "holders": [asdict(holder) for holder in holders(opened)],
            "plans": [] if writing is None else writing.plans.labels(),
            "poisoned_now": {name: asdict(one) for name, one in poison.corrupt_sources(folder).items()},
            "reports": [] if writing is None else writing.quarantine.reports(),
        }
        | _of_all(opened)
    )


def _of_all(opened: CacheSession) -> dict[str, Any]:
    """Return the counters of all processes since the catalog was created."""
    if opened.writing is not None:
        opened.writing.evictor.flush_uses()
    figures = {} if opened.writing is None else opened.writing.accounts.figures()
    n_hits, n_misses = figures.get("hits", 0), figures.get("misses", 0)
    return {"figures": figures, "hit_ratio": n_hits / (n_hits + n_misses) if n_hits + n_misses else None}


def holders(opened: CacheSession) -> list[Holder]:
    """Return the processes that have the cache open or read copies, by process number.

    The copies that each process holds are known only if the system lists locks and the process that locked a copy still
    runs.
    """
    folder = opened.folder
    inodes = {}
    for name in folder.sizes():
        with suppress(OSError):
            inodes[name] = _inode(folder, name)
    found = {holder.pid: holder for holder in holders_of(folder.copies, inodes)}
    if opened.writing is not None:
        for owner in [Owner.parse(text) for text in opened.writing.owners.limits()]:
            if owner is not None and owner.runs():
                found.setdefault(owner.pid, Holder(owner.pid, command_of(owner.pid)))
    return [found[pid] for pid in sorted(found)]


def _inode(folder: Folder, name: str) -> int:
    try:
        return os.lstat(folder.copy_path(name)).st_ino
    except FileNotFoundError:
        return os.lstat(folder.copy_path(f"{name}.part")).st_ino
