"""Copies that somebody made by hand: recognised before a move would take them away, and held.

A user who needs an old checkpoint may copy it back with cp or aws s3 cp. The rules want it where the mover has put it,
and would delete that copy in the next run. Such a copy is recognised by three facts:

1. The catalog does not know its objects: the mover neither made them nor has ever compared them. (The mover records
   both sides of each copy that it makes, and forgets an object when it deletes it.)
2. Another tier has a verified copy of the group.
3. The bytes are equal. If they differ, somebody has written the group anew, and the rules apply to it.

Only copies that a plan takes away are compared, because comparing reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.catalog.tiers import CatalogEntry
from tiercache.tier.holds import put_hold
from tiercache.tier.move.transfer import is_md5
from tiercache.tier.stores import needs_restore

if TYPE_CHECKING:
    from tiercache.catalog.tiers import JournalRow, PlannedObject
    from tiercache.model import ObjectInfo
    from tiercache.tier.move.checks import MoveContext


def find_hand_copy(context: MoveContext, row: JournalRow) -> HandCopy | None:
    """Return a copy that a move takes away and that somebody made by hand; None: there is none. Raises StoreError."""
    if row.action not in ("move", "drop", "delete"):
        return None
    by_tier: dict[str, list[PlannedObject]] = {}
    for obj in row.objects:
        by_tier.setdefault(obj.tier or row.src, []).append(obj)
    for tier, objects in by_tier.items():
        if _is_unknown(context, tier, objects):
            for other in context.file.tiers:
                if found := _compare(context, tier, other.name, objects):
                    return HandCopy(tier, found)
    return None


@dataclass(frozen=True, slots=True)
class HandCopy:
    """A copy that somebody made by hand. entries: Catalog entries of its objects, by key, once it is held."""

    tier: str
    entries: Mapping[str, CatalogEntry]


def held_reason(copy: HandCopy | None) -> str:
    """Return why a move was not made that would take a copy away, for people."""
    where = "" if copy is None else f" in {copy.tier}"
    return f"its copy{where} was not made by tiercache: it is held for the time `hold`"


def hold_hand_copies(context: MoveContext, copies: Mapping[str, HandCopy]) -> None:
    """Hold groups, given by path, with copies that were made by hand, for the time `hold` of the rule file.

    The copies are recorded as verified afterwards, so that the rules apply to them like to any other copy when the hold
    has ended. Raises StoreError.
    """
    now_s, hold_s = context.clock(), context.file.tiering.hold_s
    tiers = dict.fromkeys(copy.tier for copy in copies.values())
    for tier in tiers if hold_s > 0 else ():
        paths = [path for path, copy in copies.items() if copy.tier == tier]
        why = f"its copy in {tier} was not made by tiercache"
        home = context.stores.store(context.file.home_tier.name)
        put_hold(home, paths, until_s=now_s + hold_s, now_s=now_s, why=why)
    context.catalog.record([(copy.tier, key, entry) for copy in copies.values() for key, entry in copy.entries.items()])


def _is_unknown(context: MoveContext, tier: str, objects: Sequence[PlannedObject]) -> bool:
    """Return whether the catalog has no entry of any of these objects. Without an ETag, nobody can tell."""
    entries = context.catalog.entries(tier, [obj.key for obj in objects])
    known = ((obj, entries.get(obj.key)) for obj in objects)
    return all(
        obj.etag is not None and (entry is None or (entry.n_bytes, entry.etag) != (obj.n_bytes, obj.etag))
        for obj, entry in known
    )


def _compare(
    context: MoveContext, tier: str, other: str, objects: Sequence[PlannedObject]
) -> dict[str, CatalogEntry] | None:
    """Return the entries of objects in a tier, if they equal verified copies in another tier."""
    verified = context.catalog.entries(other, [obj.key for obj in objects])
    if context.stores.same_url(other, tier) or len(verified) < len(objects):
        return None
    if not all(entry.is_verified for entry in verified.values()):
        return None
    infos = context.heads((name, obj.key) for name in (tier, other) for obj in objects)
    found = {}
    for obj in objects:
        info, entry = infos.info(tier, obj.key), verified[obj.key]
        if context.unconfirmed_reason(other, obj.key, infos.info(other, obj.key), entry):
            return None
        if info is None or not _is_equal(context, tier, info, entry):
            return None
        found[obj.key] = CatalogEntry(info.n_bytes, info.etag, entry.crc32c, written_s=entry.written_s)
    return found


def _is_equal(context: MoveContext, tier: str, info: ObjectInfo, verified: CatalogEntry) -> bool:
    if info.n_bytes != verified.n_bytes:
        return False
    if verified.crc32c is None:  # a copy that the server made
        return info.etag is not None and info.etag == verified.etag and is_md5(info.etag)
    if needs_restore(info):
        return False
    return context.transfer.checksum_of(tier, info) == verified.crc32c
