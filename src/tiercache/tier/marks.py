"""What tells a local tier from an empty folder of its name, whose disk is not mounted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache.errors import NotFound, StoreError
from tiercache.store import LocalFolder
from tiercache.store.urls import Location

if TYPE_CHECKING:
    from tiercache.catalog.tiers import TierCatalog
    from tiercache.store import Store
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import Tier, TierFile

MARK_KEY = "_tiercache/tier.id"


def read_mark(store: Store) -> str | None:
    """The mark of a tier's store; None: it has none. Raises StoreError."""
    try:
        return store.get(MARK_KEY).decode(errors="replace").strip()
    except NotFound:
        return None


def unlike(tier: str, store: Store, found: str | None, before: str | None) -> str:
    """Why a tier is not the one that was used before, by its marks then and now; "": it is, or was never used."""
    at = f"{store.url}/{MARK_KEY}"
    if before is None or found == before:
        return ""
    if found is None:
        return (
            f"{at}: expected {before}, found nothing: is the disk of tier {tier} mounted? If it is a new one, "
            f"write that text there"
        )
    return f"{at}: expected {before}, found {found}: another disk is mounted for tier {tier}"


def no_folder(tier: Tier) -> str:
    """What is to be said of a local tier whose folder is not there: it is listed as if it had nothing."""
    path = Path(Location.parse(tier.url).path)
    if not tier.is_local or path.exists():
        return ""
    return f"tiers.{tier.name}: there is no folder {path}: it counts as empty"


def absent(file: TierFile, stores: Stores, catalog: TierCatalog, emptied: Collection[str]) -> tuple[str, ...]:
    """Of each local tier that may lack what lies in it because its disk is not mounted, why. Nothing is written.

    emptied: names of tiers that have nothing by now, and had something.
    """
    return tuple(_absent(file, stores, catalog, emptied))


def _absent(file: TierFile, stores: Stores, catalog: TierCatalog, emptied: Collection[str]) -> Iterator[str]:
    for tier in file.tiers:
        store = stores.store(tier.name) if tier.is_local else None
        if not isinstance(store, LocalFolder):
            continue
        try:
            why = unlike(tier.name, store, read_mark(store), catalog.mark(tier.name))
        except StoreError as error:
            why = str(error)
        if why:
            yield f"tiers.{tier.name}: {why}"
        elif text := no_folder(tier):
            yield text
        elif tier.name in emptied:
            yield f"tiers.{tier.name}: {store.url} is empty, and copies were seen there: is its disk mounted?"
