"""The stores of a rule file's tiers, opened once and listed with classes and restore states; and a copy's state."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo
from tiercache.store import CloudStore, LocalFolder, Store, open_store
from tiercache.store.archive import ArchiveStore, S3Archive, has_boto3
from tiercache.store.urls import Location
from tiercache.tier.model import ARCHIVED, HERE, RESTORED, RESTORING

if TYPE_CHECKING:
    from tiercache.tierfile import Tier, TierFile

STANDARD = "STANDARD"
# What must be restored before it can be read. Of INTELLIGENT_TIERING only what has sunk: `restore` says so.
RESTORED_FIRST = ("GLACIER", "DEEP_ARCHIVE")

_ONGOING = re.compile(r'ongoing-request="(true|false)"')
_EXPIRY = re.compile(r'expiry-date="([^"]+)"')


def state_of(info: ObjectInfo, now_s: float | None = None) -> int:
    """HERE, ARCHIVED, RESTORING or RESTORED: the one place where what a store says becomes a state.

    The store's word on restoring (`x-amz-restore`) counts, the class alone only where there is no such word.

    Args:
        info: of a store's head() or list().
        now_s: seconds since the epoch; a restored copy that has expired by then is ARCHIVED. None: as it was said.
    """
    said = info.restore or ""
    if (ongoing := _ONGOING.search(said)) is not None:
        if ongoing[1] == "true":
            return RESTORING
        until_s = restored_until(info)
        return ARCHIVED if now_s is not None and until_s is not None and until_s <= now_s else RESTORED
    if "archive-status" in said or info.storage_class in RESTORED_FIRST:
        return ARCHIVED
    return HERE


def restored_until(info: ObjectInfo) -> float | None:
    """When a restored copy goes, in seconds since the epoch; None where nothing is said of it."""
    match = _EXPIRY.search(info.restore or "")
    if match is None:
        return None
    try:
        return parsedate_to_datetime(match[1]).timestamp()
    except ValueError:
        return None


class Stores:
    """The stores of a rule file's tiers, by name; each is opened when it is first asked for. Safe from any thread.

    Use as a context manager, or close(). The lock guards the tables; opening asks nothing of a store.
    """

    def __init__(
        self,
        file: TierFile,
        *,
        stores: Mapping[str, Store] | None = None,
        archives: Mapping[str, ArchiveStore] | None = None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            file: the rule file.
            stores: tier -> a store to take in place of opening its URL; it is not closed here. Such a tier has an
                archive only where `archives` has one.
            archives: tier -> its archive, likewise.
        """
        self.file = file
        self._given, self._given_archives = dict(stores or {}), dict(archives or {})
        self._lock = Lock()
        self._stores: dict[str, Store] = {}
        self._archives: dict[str, S3Archive | None] = {}
        self._places: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what was opened here. The stores may be used again after it."""
        with self._lock:
            opened: list[Store | S3Archive] = [*self._stores.values()]
            opened += [archive for archive in self._archives.values() if archive is not None]
            self._stores.clear()
            self._archives.clear()
        for store in opened:
            store.close()

    def store(self, name: str) -> Store:
        """The store of a tier.

        Raises:
            ValueError: no such tier, or a URL that cannot be.
        """
        given = self._given.get(name)
        if given is not None:
            return given
        tier = self.file.tier(name)
        with self._lock:
            store = self._stores.get(name)
            if store is None:
                store = self._stores[name] = open_store(tier.url, **tier.storage_options)
            return store

    def archive(self, name: str) -> ArchiveStore | None:
        """What does classes, restores and batches in a tier; None where it is not S3, or boto3 is missing.

        Raises:
            ValueError: the tier has a storage class, and is not S3 or boto3 is missing.
        """
        if name in self._given or name in self._given_archives:
            return self._given_archives.get(name)
        tier, store = self.file.tier(name), self.store(name)
        with self._lock:
            if name not in self._archives:
                self._archives[name] = _archive(tier, store)
            return self._archives[name]

    def head(self, name: str, key: str) -> ObjectInfo:
        """What an object is, with its class, restore state and checksum where the store says them. Raises NotFound."""
        archive = self.archive(name)
        return self.store(name).head(key) if archive is None else archive.head(key)

    def listing(self, name: str, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects of a tier below a folder ("": all), with class and restore state; in no promised order.

        Of tiers that share a URL, each lists those of its own class only: see tier_of().
        """
        archive = self.archive(name)
        found = self.store(name).list(prefix) if archive is None else archive.list(prefix)
        sharing = self.sharing(name)
        if len(sharing) == 1:
            return found
        return (info for info in found if self.tier_of(sharing, info) == name)

    def sharing(self, name: str) -> tuple[str, ...]:
        """Names of the tiers that have this tier's URL, itself among them, in the file's order."""
        return tuple(tier.name for tier in self.file.tiers if tier.name == name or self.same_place(tier.name, name))

    def tier_of(self, sharing: Sequence[str], info: ObjectInfo) -> str:
        """Which of the tiers with one URL an object is in: the one of its class.

        Where none has its class: the one without a class of its own, else the first.
        """
        by_class = {self.class_of(name): name for name in reversed(sharing)}
        return by_class.get(info.storage_class or STANDARD) or by_class.get(STANDARD) or sharing[0]

    def class_of(self, name: str) -> str:
        """The class that copies in a tier have: "STANDARD" where the file names none."""
        return self.file.tier(name).storage_class or STANDARD

    def same_place(self, first: str, second: str) -> bool:
        """Whether two tiers have one URL: a move between them changes the class, and copies nothing."""
        return first == second or self._known_place(first) == self._known_place(second)

    def same_endpoint(self, first: str, second: str) -> bool:
        """Whether the server itself can copy from the first tier to the second."""
        src, dst = self.archive(first), self.archive(second)
        return src is not None and dst is not None and dst.can_copy_from(src)

    def _known_place(self, name: str) -> tuple[str, ...]:
        """Asked for every object that is copied, and the same for all."""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = self._place(name)
        return place

    def _place(self, name: str) -> tuple[str, ...]:
        store = self.store(name)
        if isinstance(store, CloudStore):
            return ("cloud", *store.identity)
        if isinstance(store, LocalFolder):
            return ("local", os.path.realpath(store.root))
        return ("other", Location.parse(self.file.tier(name).url).full.rstrip("/"))

    def capacity(self, name: str) -> int | None:
        """Bytes that may lie in a tier; None: no limit. A share is of the disk that a local path is on."""
        tier = self.file.tier(name)
        place = Location.parse(tier.url)
        if tier.capacity is None or place.scheme:
            return tier.capacity_bytes(None)
        return tier.capacity_bytes(_disk_bytes(place.path))


def _archive(tier: Tier, store: Store) -> S3Archive | None:
    where = f"tiers.{tier.name}"
    if not isinstance(store, CloudStore) or store.cloud != "s3":
        if tier.storage_class is not None:
            raise ValueError(f"{where}.storage_class: only S3 has storage classes, {tier.url!r} is none")
        return None
    if not has_boto3():
        if tier.storage_class is not None:
            raise ValueError(
                f"{where}.storage_class: boto3 changes classes and is not installed: pip install 'tiercache[archive]'"
            )
        return None
    return S3Archive.of(store)


def _disk_bytes(path: str) -> int:
    """Size of the disk that a path is on, or will be on."""
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would fail where a folder may not be read
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).total
    except OSError as error:
        raise StoreError(f"the size of its disk cannot be had ({error.strerror})", url=path) from error
