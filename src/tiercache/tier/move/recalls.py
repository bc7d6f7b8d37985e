"""Recalls that a killed process has left half done: a run of the mover finishes them, or removes their parts.

`tiercache tier get` copies with the mover's own steps, so that the journal has each of its moves. A move that was begun
and did not end has left parts in its destination, where no rule wants them and no plan completes them::

    held         the hold of the recall is in force: the copy is made complete (finish_recalls)
    not held     nobody waits for it any more: the parts are removed, if the copy that they were made from is whole
                 (remove_ended_recalls, before the inventory is taken: a part looks like a group that was written anew)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tiercache.errors import CommitConflict, StoreError, TierCacheError
from tiercache.store import LocalFolder
from tiercache.tier.holds import read_holds
from tiercache.tier.move.checks import ApplyResult, MoveContext, StoppedMove
from tiercache.tier.move.executor import apply_plan
from tiercache.tier.recall import RULE, plan_recall
from tiercache.tier.stores import unavailable_tiers
from tiercache.tier.text_columns import index_in

if TYPE_CHECKING:
    from tiercache.catalog.tiers import JournalRow, PlannedObject
    from tiercache.prices import Prices
    from tiercache.tier.inventory.groups import Inventory
    from tiercache.tier.move.checks import Progress


def remove_ended_recalls(context: MoveContext) -> ApplyResult:
    """Remove the parts of recalls that were broken off and whose hold has ended. Raises StoreError, CommitConflict."""
    rows = _begun(context)
    if not rows:
        return ApplyResult()
    holds = read_holds(context.stores.store(context.file.home_tier.name), context.clock())
    unavailable = unavailable_tiers(context.file, context.stores, context.catalog)
    stopped: list[StoppedMove] = []
    for row in rows:
        if holds.of(row.path) is None and unavailable.keys().isdisjoint({row.src, row.dst}):
            try:
                _remove_parts(context, row)
            except CommitConflict:
                raise  # the lock was lost: all work must stop
            except TierCacheError as error:
                stopped.append(StoppedMove(row.number, str(error), row.path, row.plan))
    return ApplyResult(stopped=tuple(stopped))


def finish_recalls(
    context: MoveContext,
    inventory: Inventory,
    prices: Sequence[Prices | None],
    *,
    unavailable: Mapping[str, str],
    on_progress: Callable[[Progress], object] | None = None,
) -> ApplyResult:
    """Finish the recalls that were broken off and are held.

    inventory: Present contents of the tiers. prices, unavailable: See plan_recall(). Raises as apply_plan().
    """
    rows, snapshot, result = _begun(context), inventory.snapshot, ApplyResult()
    groups = index_in(pa.array([row.path for row in rows], pa.large_string()), snapshot.paths).tolist()
    held: dict[str, set[int]] = {}
    for row, group in zip(rows, groups, strict=True):
        if group in snapshot.held and row.dst in snapshot.tiers:
            held.setdefault(row.dst, set()).add(group)
    for to, found in held.items():
        wanted = np.array(sorted(found), np.int64)
        plan = plan_recall(inventory, context.file, context.stores, prices, wanted, to=to, unavailable=unavailable)
        result = result.followed_by(apply_plan(context, plan.copies, on_progress=on_progress))
    return result


def _begun(context: MoveContext) -> list[JournalRow]:
    rows = context.catalog.open_moves(context.file.home_tier.url, "begun")
    return [row for row in rows if row.rule == RULE and row.action == "copy"]


def _remove_parts(context: MoveContext, row: JournalRow) -> None:
    """Remove what a recall has copied, if all of what it was copied from is there, and the parts equal it."""
    tiers = {tier.name: tier.url for tier in context.file.tiers}
    if (tiers.get(row.src), tiers.get(row.dst)) != (row.src_url, row.dst_url):
        return
    keys = [obj.key for obj in row.objects]
    heads = context.heads((tier, key) for tier in (row.src, row.dst) for key in keys)
    sources, copies = (context.catalog.entries(tier, keys) for tier in (row.src, row.dst))
    parts: list[PlannedObject] = []
    for obj in row.objects:
        info, source = heads.info(row.dst, obj.key), heads.info(row.src, obj.key)
        if source is None or source.n_bytes != obj.n_bytes:
            return
        if info is not None:
            # A part need not be in the catalog, which is written when a batch of copies is complete.
            crc = context.checksum_of(row.src, source, sources.get(obj.key))
            if crc is None or crc != context.checksum_of(row.dst, info, copies.get(obj.key)):
                return
            parts.append(obj._replace(etag=info.etag, modified_s=info.modified_s))
    note = "the recall was broken off, and its hold has ended"
    if len(parts) < len(keys):  # a whole copy stays: the rules apply to it
        context.lock.check()
        context.transfer.delete_objects(row.dst, parts)
        store = context.stores.store(row.dst)
        if isinstance(store, LocalFolder) and row.kind == "checkpoint":
            with suppress(StoreError):  # the objects are gone; an empty folder is only cosmetic
                store.remove_empty(row.path)
        context.catalog.forget((row.dst, obj.key) for obj in parts)
    context.catalog.write([replace(row, state="cancelled", note=note, changed_s=context.clock())])
