"""Removal of checkpoints from all tiers at a user's request, without a rule and without a grace period.

Steps: 1. The pins and holds are read again; the objects are compared with the listing. 2. The placement forgets the
checkpoint, so that readers find no object rather than a location without one. 3. The completing object is deleted from
each tier, then the others. A killed removal leaves an incomplete checkpoint; the same removal deletes the rest.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.crash_points import crash_point
from tiercache.errors import StoreError, TierCacheError
from tiercache.tier.journal import JournalRow, PlannedObject
from tiercache.tier.model import KINDS
from tiercache.tier.move.copies import remove_empty_folders
from tiercache.tier.move.placement_updates import PlacementUpdates
from tiercache.tier.stores import unavailable_tiers

if TYPE_CHECKING:
    from tiercache.tier.inventory.groups import Inventory
    from tiercache.tier.move.checks import MoveContext


@dataclass(frozen=True, slots=True)
class Removal:
    """A checkpoint that was removed, or the reason why it was not. n_bytes: Size of its objects in all tiers."""

    path: str
    n_bytes: int
    tiers: tuple[str, ...]
    reason: str = ""


def remove_groups(context: MoveContext, inventory: Inventory, groups: Sequence[int]) -> list[Removal]:
    """Delete checkpoints from all tiers, one after another. Return what was done, in the order of the groups.

    A checkpoint stays if a pin or a hold protects it, or if an object has changed since the inventory. Nothing is
    deleted while a tier cannot be seen, because a copy in it would stay. A job that reads a checkpoint is not noticed.

    Args:
        context: Tiers, with the lock.
        inventory: Inventory of these tiers.
        groups: Numbers of checkpoints in the inventory.

    Raises:
        CommitConflict: The tier lock was lost to another process.
        StoreError: A tier cannot be seen.
    """
    unavailable = unavailable_tiers(context.file, context.stores, context.catalog)
    for tier, reason in unavailable.items():
        raise StoreError(
            f"nothing is removed while tier {tier} cannot be seen: {reason}", url=context.file.tier(tier).url
        )
    plan = f"rm-{secrets.token_hex(8)}"
    rows = [_row(context, inventory, group, plan, number) for number, group in enumerate(groups, start=1)]
    pins = context.pin_reasons(rows, context.clock())
    placements = PlacementUpdates(context)
    found = []
    for group, row in zip(groups, rows, strict=True):
        context.lock.check()
        reason = pins.get((row.plan, row.number), "")
        if group in inventory.snapshot.pinned:
            reason = reason or "it is pinned in its pin.json, or that file cannot be read"
        found.append(_remove(context, placements, row, reason))
    return found


def _row(context: MoveContext, inventory: Inventory, group: int, plan: str, number: int) -> JournalRow:
    """Return the removal in the form of a journal row: a delete of the objects of all tiers."""
    snapshot, file = inventory.snapshot, context.file
    objects: list[PlannedObject] = []
    tiers = snapshot.tier[snapshot.group == group]
    table = inventory.objects_of(np.full(len(tiers), group), tiers)
    for copy, tier in enumerate(tiers.tolist()):
        name = snapshot.tiers[tier]
        objects += [PlannedObject(*one)._replace(tier=name) for one in table.named(copy, copy + 1)]
    return JournalRow(
        plan=plan,
        number=number,
        path=snapshot.paths[group].as_py(),
        kind=KINDS[snapshot.kind[group]],
        action="delete",
        src=objects[0].tier,
        dst="",
        src_url=file.tier(objects[0].tier).url,
        dst_url="",
        home=file.home_tier.url,
        rules=file.sha256,
        rule="ckpt rm",
        state="begun",
        since_s=0.0,
        due_s=0.0,
        objects=tuple(objects),
        note="",
        changed_s=context.clock(),
    )


def _remove(context: MoveContext, placements: PlacementUpdates, row: JournalRow, reason: str) -> Removal:
    tiers = tuple(dict.fromkeys(obj.tier for obj in row.objects))
    try:
        reason = reason or _change_reason(context, row)
        if not reason:
            failed = placements.commit([(row, *placements.changes(row, {}, {}))])
            reason = failed[0][1] if failed else ""
        if not reason:
            crash_point("tier_removal.unplaced")
            # Moves of the path that wait would delete, or bring back, what is removed now.
            open_rows = [one for one in context.catalog.open_moves(context.file.home_tier.url) if one.path == row.path]
            context.catalog.write([], instead_of=[(one.plan, one.number) for one in open_rows])
            context.lock.announce(sorted({(context.file.tier(tier).url, row.path) for tier in tiers}))
            _delete(context, row, tiers)
    except TierCacheError as error:
        reason = str(error)
    return Removal(row.path, sum(obj.n_bytes for obj in row.objects), tiers, reason)


def _change_reason(context: MoveContext, row: JournalRow) -> str:
    """Return why the objects are not those of the inventory; "" if they are, or are gone."""
    for obj in row.objects:
        info = context.head(obj.tier, obj.key)
        if info is not None and (reason := context.change_reason(obj.tier, info, obj)):
            return reason
    for tier in {obj.tier for obj in row.objects}:
        keys = [obj.key for obj in row.objects if obj.tier == tier]
        if reason := context.extra_object_reason(tier, row.path, keys):
            return reason
    return ""


def _delete(context: MoveContext, row: JournalRow, tiers: Sequence[str]) -> None:
    by_tier = {tier: [obj for obj in row.objects if obj.tier == tier] for tier in tiers}
    for tier, objects in by_tier.items():
        context.transfer.delete_objects(tier, objects[-1:])
    crash_point("tier_removal.unmade")
    for tier, objects in by_tier.items():
        context.transfer.delete_objects(tier, objects[:-1])
        remove_empty_folders(context, row, tier)
    context.catalog.forget_group(row.path)
