"""Mount markers: an object that tells a local tier from the empty mount point of a disk that is not mounted."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache.errors import NotFound, StoreError
from tiercache.store.options import ParsedUrl

if TYPE_CHECKING:
    from tiercache.catalog.tiers import TierCatalog
    from tiercache.store import Store
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import RuleFile, Tier

MARKER_KEY = "_tiercache/tier.id"


def read_marker(store: Store) -> str | None:
    """Return the content of a tier's mount marker; None: there is none. Raises StoreError."""
    try:
        return store.get(MARKER_KEY).decode(errors="replace").strip()
    except NotFound:
        return None


def marker_mismatch(tier: str, store: Store, found: str | None, before: str | None) -> str:
    """Return why a tier's marker differs from the remembered one; "": it is the same, or none was remembered."""
    at = f"{store.url}/{MARKER_KEY}"
    if before is None or found == before:
        return ""
    if found is None:
        return (
            f"{at}: expected {before}, found no such object: is the disk of tier {tier} mounted? If the disk is new, "
            f"write that text into the object"
        )
    return f"{at}: expected {before}, found {found}: another disk is mounted for tier {tier}"


def unavailable_reason(tier: Tier, store: Store, catalog: TierCatalog) -> str:
    """Return why a local tier may be unmounted or another disk; "": it is as before, or was never used. Writes nothing.

    Raises StoreError.
    """
    if not tier.is_local:
        return ""
    found, before = read_marker(store), catalog.mark(tier.name)
    if found is None and before is None and _is_empty(store) and catalog.checksums(tier.name):
        return was_seen(store)
    return marker_mismatch(tier.name, store, found, before)


def unavailable_tiers(
    file: RuleFile, stores: Stores, catalog: TierCatalog, *, but: Collection[str] = ()
) -> dict[str, str]:
    """Return the reason for each tier that may be unmounted, or that cannot be reached, by name. Writes nothing.

    A local tier that this machine has never used and whose folder does not exist is not included; for it see
    missing_folder_message().

    Args:
        file: Rule file.
        stores: Stores of its tiers.
        catalog: Catalog of this machine.
        but: Names of tiers that are not checked.
    """
    found = {}
    for tier in file.tiers:
        if tier.name in but:
            continue
        try:
            why = unavailable_reason(tier, stores.store(tier.name), catalog)
        except StoreError as error:
            why = str(error)
        if why:
            found[tier.name] = why
    return found


def ensure_marker(tier: Tier, store: Store, catalog: TierCatalog, *, gets: bool) -> str:
    """Return what absence() returns; on first use, create the marker of a local tier and remember it in the catalog.

    The race that the marker prevents:

    1. The disk of /mnt/archive is not mounted, but the mount point exists.
    2. The mover copies groups into the mount point, and verifies the copies.
    3. The mover drops the sources.
    4. The disk is mounted and hides the copies.

    Args:
        tier: Tier of the rule file.
        store: Store of the tier.
        catalog: Catalog of this machine.
        gets: Whether the mover is about to copy into the tier. Otherwise an empty or read-only tier gets no marker: the
            folder may be the mount point of an unmounted disk, and a marker in it would identify the wrong disk.

    Raises:
        StoreError: The store fails, or the marker cannot be written although the mover is about to copy into the tier.
    """
    if not tier.is_local or catalog.mark(tier.name) is not None:
        return unavailable_reason(tier, store, catalog)
    found = read_marker(store)
    if found is None:
        is_empty = _is_empty(store)
        if is_empty and catalog.checksums(tier.name):
            return was_seen(store)
        if is_empty and not gets:
            return ""
        try:
            store.put_if_absent(MARKER_KEY, f"{secrets.token_hex(16)}\n".encode())
        except StoreError:
            if gets:
                raise
        found = read_marker(store)  # another process may have created it first
    if found is not None:
        catalog.remember_mark(tier.name, found)
    return ""


def deletion_block_reason(missing: Mapping[str, str]) -> str:
    """Return why nothing may be deleted while a tier may be unmounted; "": no tier is.

    The race that this prevents:

    1. A group has a copy in an unmounted tier and a copy elsewhere.
    2. A rule deletes the group from all tiers.
    3. Its tags, its use and whether it is the newest were computed without the unmounted copy.

    missing: Reason, or "", by tier.
    """
    found = next(((name, why) for name, why in missing.items() if why), None)
    if found is None:
        return ""
    return f"nothing is deleted while tier {found[0]} cannot be seen: {found[1]}"


def was_seen(store: Store) -> str:
    """Return the message for a tier without a marker that is empty although copies in it are known."""
    return (
        f"{store.url} is empty, although it held copies before: is its disk mounted? If it is, write any text to "
        f"{store.url}/{MARKER_KEY}"
    )


def _is_empty(store: Store) -> bool:
    return next(iter(store.list()), None) is None


def missing_folder_message(tier: Tier) -> str:
    """Return the message for a local tier whose folder does not exist, and which is listed as empty; "": it exists."""
    path = Path(ParsedUrl.parse(tier.url).path)
    if not tier.is_local or path.exists():
        return ""
    return f"tiers.{tier.name}: there is no folder {path}: it counts as empty"
