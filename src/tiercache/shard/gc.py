"""Garbage collection of a data set: removes what no version needs and no live writer will need.

::

    1. shards, segments, versions and the records of packings are listed
    2. versions are deleted, if that was asked for, and the records of packings that are old
    3. the versions that are there now are read; what they name is needed
    4. of the objects listed in step 1, those are removed that are old, are not needed, and have no live writer

A version that is committed later than step 3 needs shards of its own writer, and segments of its base, which was the
newest version then, because the number of a version is taken for ever. So only a writer's own objects need the age: a
writer is live while any object that it has written is younger, and a packing while any of its records is. Ages are by
the clock of the store.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo
from tiercache.shard.packings import list_packings
from tiercache.shard.versions import (
    SEGMENTS_FOLDER,
    SHARDS_FOLDER,
    SegmentRef,
    Version,
    check_writable,
    latest,
    list_versions,
    read_segments,
    read_tags,
    read_version,
    version_key,
    version_log,
)
from tiercache.store import CloudStore, LocalFolder, Store, placement_log
from tiercache.store.archive import S3StorageClasses, has_boto3
from tiercache.store.contract import unwrapped
from tiercache.store.numbered_log import is_forbidden
from tiercache.store.remote import call_threads

_OWN_FOLDERS = (SHARDS_FOLDER, "_tiercache/")
_SHARD = re.compile(rf"({SHARDS_FOLDER}[^/]+)-[0-9]+\.tcs")
_SEGMENT = re.compile(rf"{SEGMENTS_FOLDER}[0-9a-f]{{32}}\.arrow")
_THREADS = 16


@dataclass(frozen=True)
class GcReport:
    """What `gc` removed, or would remove.

    Attributes:
        versions: Numbers of the deleted versions.
        shards: Keys of shards that no version needs.
        segments: Keys of lists of shards that no version needs.
        uploads: Keys of the objects whose unfinished uploads or temporary files were removed.
        packings: Keys of the packings that were not finished, whose records were removed.
        n_bytes: Bytes of the shards, segments and temporary files. The store does not say how many an upload has.
        n_young: Number of shards and segments that no version needs yet, and that a live writer may commit.
        elsewhere: Keys of shards that no version needs and that were moved to other tiers: gc leaves them.
        uploads_unknown: Reason why unfinished uploads were not looked for; "" if they were.
    """

    versions: tuple[int, ...] = ()
    shards: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()
    packings: tuple[str, ...] = ()
    n_bytes: int = 0
    n_young: int = 0
    elsewhere: tuple[str, ...] = ()
    uploads_unknown: str = ""


def collect_garbage(
    store: Store, *, older_than_s: float, keep_versions: int | None = None, dry_run: bool = False
) -> GcReport:
    """Remove what no version of a data set needs, and return what it was. See GcReport.

    older_than_s: Objects younger than this stay. keep_versions: Number of the newest versions that stay; of the others,
    those with a tag and those younger than older_than_s stay too. None: all stay.

    Raises NotFound, CorruptShard, UnsupportedFormat, StoreError; nothing was removed then, unless the store failed.
    """
    if keep_versions is not None and keep_versions < 1:
        raise ValueError(f"keep_versions must be 1 or more: the newest version is never deleted; got {keep_versions}")
    if older_than_s < 0:
        raise ValueError(f"older_than must not be negative, got {older_than_s:g} s")
    check_writable(latest(store), store.url)
    placement = _placement_of(store)
    until_s = _now_s(store, dry_run=dry_run) - older_than_s

    shards = [info for info in store.list(SHARDS_FOLDER) if _SHARD.fullmatch(info.key)]
    segments = [info for info in store.list(SEGMENTS_FOLDER) if _SEGMENT.fullmatch(info.key)]
    listed = {n: info for n, info in version_log(store).listed().items() if info.n_bytes}
    undated = next((i for i in (*shards, *segments, *listed.values()) if i.modified_s is None), None)
    if undated is not None:
        message = (
            "the store does not say when it was written, so nobody knows whether its writer is live: gc removed nothing"
        )
        raise StoreError(message, url=store.url_of(undated.key))

    _, promised = _packings(store, until_s)  # before the versions are read: a packing may commit in between

    tagged = {tag.number for tag in read_tags(store)}
    doomed = plan_deletions(listed, tagged, keep_versions, until_s)
    kept = _read_all(store, [number for number in listed if number not in doomed])
    needed = _Needed(store)
    needed.add(kept.values())
    deleted = doomed if dry_run else _delete_versions(store, doomed)

    left, promised_now = _packings(store, until_s)  # again, because one of them may go on since
    promised |= promised_now
    if not dry_run:  # before the shards that they name, so that no packing goes on with shards that are gone
        for place, keys in left.values():
            place.delete(keys)
        # Those that were committed, also by a packing that had read these records, or put back, since the listing.
        needed.add(_read_all(store, [number for number in list_versions(store) if number not in kept]).values())
    n_promised = len(promised - needed.shards)
    old_shards, young_shards = plan_removals(shards, needed.shards | promised, until_s, writer_of=_writer)
    old_segments, young_segments = plan_removals(segments, needed.segments, until_s, writer_of=lambda key: key)
    moved = _moved(placement)
    elsewhere = sorted(key for key in moved if _SHARD.fullmatch(key) and key not in needed.shards)
    old_shards = [info for info in old_shards if info.key not in moved]
    removed = [*old_shards, *old_segments]
    uploads, n_upload_bytes, unknown = _remove_unfinished(store, until_s, dry_run=dry_run)
    if not dry_run:
        store.delete([info.key for info in removed])
    return GcReport(
        versions=tuple(deleted),
        shards=tuple(info.key for info in old_shards),
        segments=tuple(info.key for info in old_segments),
        uploads=tuple(uploads),
        packings=tuple(left),
        n_bytes=sum(info.n_bytes for info in removed) + n_upload_bytes,
        n_young=len(young_shards) + len(young_segments) + n_promised,
        elsewhere=tuple(elsewhere),
        uploads_unknown=unknown,
    )


def plan_deletions(
    listed: Mapping[int, ObjectInfo], tagged: Collection[int], keep_versions: int | None, until_s: float
) -> list[int]:
    """Return the versions to delete: older than until_s, without a tag, and not among the newest keep_versions."""
    older = sorted(listed)[:-keep_versions] if keep_versions is not None else []
    return [n for n in older if n not in tagged and (listed[n].modified_s or 0.0) <= until_s]


def plan_removals(
    listed: Sequence[ObjectInfo], needed: Collection[str], until_s: float, *, writer_of: Callable[[str], str]
) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    """Return the objects that are not needed: those to remove, and those whose writer may be live.

    A writer is live if any of its objects, needed or not, is younger than until_s.
    """
    newest_s: dict[str, float] = {}
    for info in listed:
        writer = writer_of(info.key)
        newest_s[writer] = max(newest_s.get(writer, 0.0), info.modified_s or 0.0)
    unneeded = [info for info in listed if info.key not in needed]
    old = [info for info in unneeded if newest_s[writer_of(info.key)] <= until_s]
    young = [info for info in unneeded if newest_s[writer_of(info.key)] > until_s]
    return old, young


def _writer(key: str) -> str:
    """Return the writer's part of a shard's key: all before the number, or before the numbers of `drop`."""
    return key.partition("-")[0]


def _packings(store: Store, until_s: float) -> tuple[dict[str, tuple[Store, list[str]]], set[str]]:
    """Return the keys of the records of packings older than until_s, and the shards that the records of others name.

    The records of a packing that splits its source into several data sets are in the folder above them.
    """
    left: dict[str, tuple[Store, list[str]]] = {}
    promised: set[str] = set()
    above = unwrapped(store).parent()
    for place, name in ((store, ""), above) if above is not None else ((store, ""),):
        try:
            for records in list_packings(place):
                mine = [info.name for part, info in records.shards if part == name]
                if records.modified_s > until_s:
                    promised.update(mine)
                elif mine or not name:
                    left[records.key] = place, [info.key for info in records.objects]
        except StoreError as error:
            if not (name and is_forbidden(error)):
                raise
    return left, promised


def _now_s(store: Store, *, dry_run: bool) -> float:
    """Return the time by the store's clock, from an object that is written for it. Dry: by this machine's clock."""
    if dry_run:
        return time.time()
    key = f"_tiercache/gc-{secrets.token_hex(8)}"
    store.put(key, b"")
    try:
        now_s = store.head(key).modified_s
    finally:
        store.delete([key])
    if now_s is None:
        message = (
            "the store does not say when an object was written, so the age of nothing is known: gc removed nothing"
        )
        raise StoreError(message, url=store.url)
    return now_s


def _placement_of(store: Store) -> placement_log.Placement | None:
    """Return the placement of the data set; None: no shard was ever moved. Raises StoreError if this is no home."""
    found = placement_log.follow_marker(store)
    if isinstance(found, str):
        message = f"this folder is a tier of the data set at {found}, whose versions are there: run gc on that URL"
        raise StoreError(message, url=store.url)
    return found


def _moved(placement: placement_log.Placement | None) -> set[str]:
    return set() if placement is None else set(placement.rows["key"].to_pylist())


def _read_all(store: Store, numbers: Sequence[int]) -> dict[int, Version]:
    """Return versions by number, without those that were deleted since they were listed."""

    def read(number: int) -> Version | None:
        with suppress(NotFound):
            return read_version(store, number)
        return None

    with call_threads(min(_THREADS, max(len(numbers), 1)), "tiercache-gc") as pool:
        return {v.number: v for v in pool.map(read, numbers) if v is not None}


@dataclass
class _Needed:
    """Keys of what versions name. Each segment is read once, however many versions share it."""

    store: Store
    segments: set[str] = field(default_factory=set)
    shards: set[str] = field(default_factory=set)

    def add(self, versions: Iterable[Version]) -> None:
        refs: dict[str, dict[str, SegmentRef]] = {}
        for version in versions:
            for ref in version.segments:
                if ref.key not in self.segments:
                    refs.setdefault(version.dataset_id, {})[ref.key] = ref
        for dataset_id, by_key in refs.items():
            for table in read_segments(self.store, dataset_id, list(by_key.values())):
                self.shards.update(table["name"].to_pylist())
            self.segments.update(by_key)


def _delete_versions(store: Store, numbers: Sequence[int]) -> list[int]:
    """Delete versions, and return which. A version that got a tag meanwhile is put back."""
    texts = {}
    for number in numbers:
        texts[number] = store.get(version_key(number))
        store.put(version_key(number), b"")
    tagged = {tag.number for tag in read_tags(store)} if texts else set()
    for number in tagged & texts.keys():
        store.put(version_key(number), texts.pop(number))
    return list(texts)


def _remove_unfinished(store: Store, until_s: float, *, dry_run: bool) -> tuple[list[str], int, str]:
    """Remove unfinished uploads, or temporary files, that began before until_s.

    Return the keys that they were for, the bytes, and why they could not be looked for ("" if they could).
    """
    inner = unwrapped(store)
    if isinstance(inner, LocalFolder):
        found = [
            i for folder in _OWN_FOLDERS for i in inner.temporary_files(folder) if (i.modified_s or 0.0) <= until_s
        ]
        if not dry_run:
            inner.remove_temporary(found)
        return [info.key for info in found], sum(info.n_bytes for info in found), ""
    if not isinstance(inner, CloudStore):
        return [], 0, ""
    if inner.cloud != "s3" or not has_boto3():
        reason = "needs boto3" if inner.cloud == "s3" else "this kind of store does not list them"
        return [], 0, f"{reason}; a lifecycle rule of the bucket removes them"
    classes = S3StorageClasses(inner)
    try:
        uploads = [
            upload
            for upload in classes.unfinished_uploads()
            if upload.started_s <= until_s and upload.key.startswith(_OWN_FOLDERS)
        ]
        for upload in uploads if not dry_run else ():
            classes.abort(upload.key, upload.upload_id)
    finally:
        classes.close()
    return [upload.key for upload in uploads], 0, ""
