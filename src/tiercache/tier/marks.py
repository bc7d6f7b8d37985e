"""What tells a local tier from an empty folder of its name, whose disk is not mounted."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache.errors import NotFound, StoreError
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


def absence(tier: Tier, store: Store, catalog: TierCatalog) -> str:
    """Why a local tier may not be the one that was used before; "": it is, or was never used. Writes nothing.

    Raises StoreError.
    """
    if not tier.is_local:
        return ""
    found, before = read_mark(store), catalog.mark(tier.name)
    if found is None and before is None and _is_empty(store) and catalog.checksums(tier.name):
        return was_seen(store)
    return unlike(tier.name, store, found, before)


def absences(file: TierFile, stores: Stores, catalog: TierCatalog, *, but: Collection[str] = ()) -> dict[str, str]:
    """The tiers of which absence() says why, and those that cannot be asked, by name. Writes nothing.

    A local tier whose folder is not there and that this machine has never used is not among them: no_folder().
    but: names of tiers that are not asked.
    """
    found = {}
    for tier in file.tiers:
        if tier.name in but:
            continue
        try:
            why = absence(tier, stores.store(tier.name), catalog)
        except StoreError as error:
            why = str(error)
        if why:
            found[tier.name] = why
    return found


def recognised(tier: Tier, store: Store, catalog: TierCatalog, *, gets: bool) -> str:
    """As absence(); and a local tier that is used for the first time gets a mark, which is remembered.

    1. The disk of /mnt/archive is not mounted, and the folder is there. 2. Copies go into it, and are verified.
    3. Their sources are dropped. 4. The disk is mounted, and hides the copies. So each has a mark, which is known.

    gets: copies go into it now. Else, where nothing lies in it, or nothing can be written, there is no mark: an empty
    folder may be one whose disk is not mounted, and a mark in it would be of the wrong disk. Raises StoreError.
    """
    if not tier.is_local or catalog.mark(tier.name) is not None:
        return absence(tier, store, catalog)
    found = read_mark(store)
    if found is None:
        is_empty = _is_empty(store)
        if is_empty and catalog.checksums(tier.name):
            return was_seen(store)
        if is_empty and not gets:
            return ""
        try:
            store.put_if_absent(MARK_KEY, f"{secrets.token_hex(16)}\n".encode())
        except StoreError:
            if gets:
                raise
        found = read_mark(store)  # another's, where two came at once
    if found is not None:
        catalog.remember_mark(tier.name, found)
    return ""


def deletions_wait(missing: Mapping[str, str]) -> str:
    """Why no last copy is deleted while a tier may lack what lies in it; "": none may. missing: by tier, why or "".

    1. A group lies in a tier whose disk is not mounted, and elsewhere. 2. A rule deletes it, "from all tiers".
    3. What was asked, whether it is tagged, the newest, or used, was asked of what can be seen. So nothing goes.
    """
    found = next(((name, why) for name, why in missing.items() if why), None)
    if found is None:
        return ""
    return f"nothing is deleted while tier {found[0]} cannot be seen: {found[1]}"


def was_seen(store: Store) -> str:
    """What is to be said of a tier without a mark that has nothing by now, and had something."""
    return (
        f"{store.url} is empty, and copies were seen there: is its disk mounted? If it is, write any text to "
        f"{store.url}/{MARK_KEY}"
    )


def _is_empty(store: Store) -> bool:
    return next(iter(store.list()), None) is None


def no_folder(tier: Tier) -> str:
    """What is to be said of a local tier whose folder is not there: it is listed as if it had nothing."""
    path = Path(Location.parse(tier.url).path)
    if not tier.is_local or path.exists():
        return ""
    return f"tiers.{tier.name}: there is no folder {path}: it counts as empty"
