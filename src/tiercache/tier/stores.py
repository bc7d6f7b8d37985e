"""The stores of a rule file's tiers, opened on first use; the state of a copy; and what movers leave in tiers.

A mount marker is an object that tells a local tier from the empty mount point of a disk that is not mounted. A hold is
a pin with an end, kept beside the home, so that every mover of every machine sees it: `tiercache tier get` writes one
for what it brings back. Each hold is one object, which is never changed::

    _tiercache/holds/<32 hex digits>.json      paths, until_s, made_s, why

The newest hold of a path counts, also if it has ended: `tiercache tier get PATTERN --hold 0s` ends a hold. A run of the
mover removes the holds that no longer matter.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock
from typing import Any

from tiercache.distribution import install_command
from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo
from tiercache.store import CloudStore, LocalFolder, Store, open_store
from tiercache.store.access import ParsedUrl
from tiercache.store.archive import S3StorageClasses, has_boto3
from tiercache.store.placement_log import lead_to_home
from tiercache.store.remote import call_threads
from tiercache.tier.journal import TierCatalog
from tiercache.tier.rules import RuleFile, Tier
from tiercache.tier.snapshot import ARCHIVED, READABLE, RESTORED, RESTORING, STANDARD

# Classes whose objects must be restored before a read. For INTELLIGENT_TIERING, the object's restore field tells.
CLASSES_TO_RESTORE = ("GLACIER", "DEEP_ARCHIVE")

_ONGOING = re.compile(r'ongoing-request="(true|false)"')
_EXPIRY = re.compile(r'expiry-date="([^"]+)"')


def state_of(info: ObjectInfo, now_s: float | None = None) -> int:
    """Return READABLE, ARCHIVED, RESTORING or RESTORED for an object of a store's head() or list().

    The store's restore field (`x-amz-restore`) decides; the storage class decides only without such a field. now_s:
    Time at which an expired restored copy is ARCHIVED; None: ignore expiry.
    """
    restore = info.restore or ""
    if (ongoing := _ONGOING.search(restore)) is not None:
        if ongoing[1] == "true":
            return RESTORING
        until_s = restored_until(info)
        return ARCHIVED if now_s is not None and until_s is not None and until_s <= now_s else RESTORED
    if "archive-status" in restore or info.storage_class in CLASSES_TO_RESTORE:
        return ARCHIVED
    return READABLE


def needs_restore(info: ObjectInfo) -> bool:
    return state_of(info) in (ARCHIVED, RESTORING)


def restored_until(info: ObjectInfo) -> float | None:
    match = _EXPIRY.search(info.restore or "")
    if match is None:
        return None
    try:
        return parsedate_to_datetime(match[1]).timestamp()
    except ValueError:
        return None


class Stores:
    """The stores of a rule file's tiers, by name, each opened on first use. Safe from any thread.

    Use it as a context manager, or call close(). The lock guards the tables; opening a store sends no request.
    """

    def __init__(
        self,
        file: RuleFile,
        *,
        stores: Mapping[str, Store] | None = None,
        s3_classes: Mapping[str, S3StorageClasses] | None = None,
    ) -> None:
        """Open no store yet.

        stores: Tier name to a store that replaces the one at its URL; the caller closes it. Such a tier has
        storage classes only if `s3_classes` contains it.
        """
        self.file = file
        self._given, self._given_s3_classes = dict(stores or {}), dict(s3_classes or {})
        self._lock = Lock()
        self._stores: dict[str, Store] = {}
        self._s3_classes: dict[str, S3StorageClasses | None] = {}
        self._locations: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            opened: list[Store | S3StorageClasses] = [*self._stores.values()]
            opened += [client for client in self._s3_classes.values() if client is not None]
            self._stores.clear()
            self._s3_classes.clear()
        for store in opened:
            store.close()

    def store(self, name: str) -> Store:
        given = self._given.get(name)
        if given is not None:
            return given
        tier = self.file.tier(name)
        with self._lock:
            store = self._stores.get(name)
            if store is None:
                store = self._stores[name] = open_store(tier.url, **tier.storage_options)
            return store

    def s3_classes(self, name: str) -> S3StorageClasses | None:
        """Return the client for storage classes, restores and batches; None: the tier is not on S3, or no boto3.

        Raises ValueError if the tier has a storage class, but is not S3 or boto3 is missing.
        """
        if name in self._given or name in self._given_s3_classes:
            return self._given_s3_classes.get(name)
        tier, store = self.file.tier(name), self.store(name)
        with self._lock:
            if name not in self._s3_classes:
                self._s3_classes[name] = _s3_classes(tier, store)
            return self._s3_classes[name]

    def head(self, name: str, key: str) -> ObjectInfo:
        client = self.s3_classes(name)
        return self.store(name).head(key) if client is None else client.head(key)

    def listing(self, name: str, prefix: str = "") -> Iterator[ObjectInfo]:
        """List the objects of a tier below a folder, unordered; of tiers with one URL, each its own: see tier_of()."""
        client = self.s3_classes(name)
        found = self.store(name).list(prefix) if client is None else client.list(prefix)
        sharing = self.sharing(name)
        if len(sharing) == 1:
            return found
        return (info for info in found if self.tier_of(sharing, info) == name)

    def sharing(self, name: str) -> tuple[str, ...]:
        return tuple(tier.name for tier in self.file.tiers if tier.name == name or self.same_url(tier.name, name))

    def tier_of(self, sharing: Sequence[str], info: ObjectInfo) -> str:
        """Return which of the tiers with one URL an object belongs to: the tier with its storage class.

        If none has its class, it belongs to the tier without a class of its own, or else to the first.
        """
        by_class = {self.class_of(name): name for name in reversed(sharing)}
        return by_class.get(info.storage_class or STANDARD) or by_class.get(STANDARD) or sharing[0]

    def class_of(self, name: str) -> str:
        return self.file.tier(name).storage_class or STANDARD

    def same_url(self, first: str, second: str) -> bool:
        return first == second or self._location(first) == self._location(second)

    def same_endpoint(self, first: str, second: str) -> bool:
        src, dst = self.s3_classes(first), self.s3_classes(second)
        return src is not None and dst is not None and dst.can_copy_from(src)

    def _location(self, name: str) -> tuple[str, ...]:
        if name not in self._locations:  # cached, because the mover needs it for every object
            store = self.store(name)
            if isinstance(store, CloudStore):
                found: tuple[str, ...] = ("cloud", *store.identity)
            elif isinstance(store, LocalFolder):
                found = ("local", os.path.realpath(store.root))
            else:
                found = ("other", ParsedUrl.parse(self.file.tier(name).url).full.rstrip("/"))
            self._locations[name] = found
        return self._locations[name]

    def capacity(self, name: str) -> int | None:
        tier = self.file.tier(name)
        location = ParsedUrl.parse(tier.url)
        if tier.capacity is None or location.scheme:
            return tier.capacity_bytes(None)
        return tier.capacity_bytes(_disk_bytes(location.path))


def _s3_classes(tier: Tier, store: Store) -> S3StorageClasses | None:
    is_s3 = isinstance(store, CloudStore) and store.cloud == "s3"
    if isinstance(store, CloudStore) and is_s3 and has_boto3():
        return S3StorageClasses(store)
    if tier.storage_class is not None:
        reason = f"needs boto3, which is not installed: {install_command('archive')}"
        reason = reason if is_s3 else f"only S3 has storage classes, and {tier.url!r} is not S3"
        raise ValueError(f"tiers.{tier.name}.storage_class: {reason}")
    return None


def _disk_bytes(path: str) -> int:
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would fail where a folder may not be read
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).total
    except OSError as error:
        raise StoreError(f"the size of its disk cannot be read ({error.strerror})", url=path) from error


def lead_readers_home(stores: Stores, catalog: TierCatalog) -> None:
    """Let a marker in each tier lead readers without the rule file to the home, whose placement has what was moved.

    A tier that may not be mounted gets none: it would hide that its folder is empty.
    """
    home = stores.file.home_tier
    for tier in stores.file.tiers:
        if not stores.same_url(tier.name, home.name):
            with suppress(StoreError, ValueError):  # a tier that cannot be opened or written: the moves report it
                if not unavailable_reason(tier, stores.store(tier.name), catalog):
                    lead_to_home(stores.store(tier.name), home.url)


MOUNT_MARKER_KEY = "_tiercache/tier.id"


def read_mount_marker(store: Store) -> str | None:
    try:
        return store.get(MOUNT_MARKER_KEY).decode(errors="replace").strip()
    except NotFound:
        return None


def unavailable_reason(tier: Tier, store: Store, catalog: TierCatalog) -> str:
    """Return why a local tier may be unmounted or another disk; "": it is as before, or was never used. Writes nothing.

    Raises StoreError.
    """
    if not tier.is_local:
        return ""
    found, before = read_mount_marker(store), catalog.mount_marker(tier.name)
    at = f"{store.url}/{MOUNT_MARKER_KEY}"
    if before is None:
        if found is None and _is_empty(store) and catalog.has_entries(tier.name):
            how = f"is its disk mounted? If it is, write any text to {at}"
            return f"{store.url} is empty, although it held copies before: {how}"
        return ""
    if found is None:
        return (
            f"{at}: expected {before}, found no such object: is the disk of tier {tier.name} mounted? If the disk is "
            f"new, write that text into the object"
        )
    return "" if found == before else f"{at}: expected {before}, found {found}: another disk is mounted for {tier.name}"


def unavailable_tiers(
    file: RuleFile, stores: Stores, catalog: TierCatalog, *, but: Collection[str] = ()
) -> dict[str, str]:
    """Return the reason for each tier that may be unmounted, or cannot be reached. Writes nothing."""
    found = {}
    for tier in file.tiers:
        if tier.name in but:
            continue
        try:
            reason = unavailable_reason(tier, stores.store(tier.name), catalog)
        except StoreError as error:
            reason = str(error)
        if reason:
            found[tier.name] = reason
    return found


def ensure_mount_marker(tier: Tier, store: Store, catalog: TierCatalog, *, gets: bool) -> str:
    """Return why a local tier may be unavailable, or "".

    On first use, create its marker and remember it in the catalog. The race that the marker prevents:

    1. The disk of /mnt/archive is not mounted, but the mount point exists.
    2. The mover copies groups into the mount point, verifies the copies, and drops the sources.
    3. The disk is mounted and hides the copies.

    gets: Whether the mover is about to copy into the tier. Otherwise an empty or read-only tier gets no marker: the
    folder may be the mount point of an unmounted disk, and a marker in it would identify the wrong disk. Raises
    StoreError.
    """
    reason = unavailable_reason(tier, store, catalog)
    if reason or not tier.is_local or catalog.mount_marker(tier.name) is not None:
        return reason
    found = read_mount_marker(store)
    if found is None:
        if not gets and _is_empty(store):
            return ""
        try:
            store.put_if_absent(MOUNT_MARKER_KEY, f"{secrets.token_hex(16)}\n".encode())
        except StoreError:
            if gets:
                raise
        found = read_mount_marker(store)  # another process may have created it first
    if found is not None:
        catalog.record_mount_marker(tier.name, found)
    return ""


def deletion_block_reason(unavailable: Mapping[str, str]) -> str:
    """Return why nothing may be deleted while a tier is unavailable; "": none is. unavailable: Reason by tier, or "".

    A rule would delete a group from all tiers although its pin, its use and whether it is the newest were computed
    without its copy in the unmounted tier.
    """
    for name, reason in unavailable.items():
        if reason:
            return f"nothing is deleted while tier {name} cannot be seen: {reason}"
    return ""


def _is_empty(store: Store) -> bool:
    return next(iter(store.list()), None) is None


def missing_folder_message(tier: Tier) -> str:
    path = Path(ParsedUrl.parse(tier.url).path)
    if not tier.is_local or path.exists():
        return ""
    return f"tiers.{tier.name}: there is no folder {path}: it counts as empty"


HOLDS_FOLDER = "_tiercache/holds/"
FORMAT, VERSION = "tiercache-hold", 1
# A million paths of 100 characters; a longer object was not written here.
_MOST_BYTES = 128 << 20
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Hold:
    """A pin with an end. paths: Of groups. key: Of its object, below the home."""

    paths: tuple[str, ...]
    until_s: float
    made_s: float
    why: str
    key: str = ""

    @property
    def reason(self) -> str:
        until = datetime.fromtimestamp(self.until_s, UTC)
        return f"held until {until:%Y-%m-%dT%H:%MZ}: {self.why}"


class Holds:
    def __init__(self, holds: Iterable[Hold], now_s: float) -> None:
        self._now_s = now_s
        self._all = sorted(holds, key=lambda hold: (hold.made_s, hold.key))
        self._newest: dict[str, Hold] = {path: hold for hold in self._all for path in hold.paths}

    def __bool__(self) -> bool:
        return bool(self._newest)

    def of(self, path: str) -> Hold | None:
        hold = self._newest.get(path)
        return hold if hold is not None and hold.until_s > self._now_s else None

    def in_force(self) -> dict[str, Hold]:
        return {path: hold for path, hold in self._newest.items() if hold.until_s > self._now_s}

    @property
    def recalled(self) -> frozenset[str]:
        """Paths of all holds, also of those that have ended: a machine has recalled these groups."""
        return frozenset(self._newest)

    def obsolete(self, keep: Collection[str] = ()) -> tuple[str, ...]:
        """Return the keys of holds whose removal changes nothing. keep: Paths whose newest hold stays in any case."""
        shadowed = {
            path
            for hold in self._all
            for path in (hold.paths if hold.until_s > self._now_s else ())
            if self._newest[path] is not hold
        }
        needed = {*shadowed, *keep}
        stay = {hold.key for path, hold in self._newest.items() if hold.until_s > self._now_s or path in needed}
        return tuple(hold.key for hold in self._all if hold.key not in stay)


def put_hold(store: Store, paths: Iterable[str], *, until_s: float, now_s: float, why: str) -> Hold:
    hold = Hold(tuple(sorted(set(paths))), until_s, now_s, why, f"{HOLDS_FOLDER}{secrets.token_hex(16)}.json")
    store.put(hold.key, encode_hold(hold))
    return hold


def read_holds(store: Store, now_s: float, keys: Sequence[str] | None = None) -> Holds:
    """Return the holds of a home. keys: Keys of the holds, if they were listed already.

    Raises StoreError if the store failed, or if a hold cannot be read: then nobody knows what it protects.
    """

    def read(key: str) -> Hold | None:
        with suppress(NotFound):  # removed since it was listed
            return decode_hold(store.get(key), key, url=store.url)
        return None

    if keys is None:
        keys = [info.key for info in store.list(HOLDS_FOLDER)]
    with call_threads(_THREADS, "tiercache-holds") as pool:
        return Holds([hold for hold in pool.map(read, keys) if hold is not None], now_s)


def remove_obsolete_holds(store: Store, now_s: float, *, keep: Collection[str] = ()) -> None:
    """Remove the holds that no longer matter. Only the holder of the tier lock may call this. Raises StoreError.

    keep: Paths of groups with more than one copy. Their holds stay, because they alone tell a machine whose catalog
    lacks one of the copies that another machine has recalled it.
    """
    if obsolete := read_holds(store, now_s).obsolete(keep):
        store.delete(obsolete)


def encode_hold(hold: Hold) -> bytes:
    facts = {"made_s": hold.made_s, "until_s": hold.until_s, "why": hold.why, "paths": hold.paths}
    return json.dumps({"format": FORMAT, "version": VERSION, **facts}).encode() + b"\n"


def decode_hold(data: bytes, key: str, *, url: str) -> Hold:
    try:
        body: dict[str, Any] = json.loads(data[: _MOST_BYTES + 1])
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise ValueError(f"expected {FORMAT} {VERSION}, found {body['format']} {body['version']}")
        paths = tuple(map(str, body["paths"]))
        hold = Hold(paths, float(body["until_s"]), float(body["made_s"]), str(body["why"]), key)
        if not math.isfinite(hold.made_s) or not 0 <= hold.until_s < _NEVER_S:
            raise ValueError("times that no clock has")
        return hold
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        message = f"this hold cannot be read, so what it protects is unknown: restore or remove it ({error})"
        raise StoreError(message, url=f"{url}/{key}") from error


_NEVER_S = 1e11  # the year 5138: a later time has no date
