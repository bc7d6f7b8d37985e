"""Recalls: groups brought back to a faster tier, by name, whatever tier they are in.

::

    plan_recall()      where each group can be copied from now, what must be restored first, cost and time
    hold_groups()      a hold protects the groups from the next runs of the mover
    request_restore()  where an archive needs restores, and wait_restored()
    apply_plan()       the mover's own steps: copy, verify, journal, placement

A recall copies; the copy in the colder tier stays, so that the next move down transfers no bytes. It may be killed at
any instant: the same command continues, because each step is one of the mover's, and what exists is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.crash_points import crash_point
from tiercache.errors import StoreError
from tiercache.keep import Flags, Rows
from tiercache.prices import RESTORE_DAYS, Prices, Speed, restored_home_dollars
from tiercache.store.remote import call_threads
from tiercache.tier.inventory import Inventory
from tiercache.tier.plans import Plan, make_plan
from tiercache.tier.policy import CapacityLedger, SnapshotIndex, propose_move, refuse, refuse_unavailable, with_costs
from tiercache.tier.rules import RuleFile
from tiercache.tier.snapshot import (
    ARCHIVED,
    COPY,
    DROP,
    MOVE,
    READABLE,
    RECLASS,
    RESTORED,
    RESTORING,
    SHARD,
    Decisions,
    MoveColumns,
)
from tiercache.tier.stores import CLASSES_TO_RESTORE, Stores, put_hold, state_of
from tiercache.waiting import SYSTEM_CLOCK, Clock, wait_for

A = TypeVar("A")
B = TypeVar("B")

_N_THREADS = 16
_LONGEST_POLL_S = 60.0
RULE = "tier get"  # name of the rule in plans and in the journal
_SHARD_REASON = "shards are read from {home} or through the cache: recall them to {home}, and warm the cache"
_NOT_WHOLE = "no copy of it is whole: it is being written, or objects of it are missing"


@dataclass(frozen=True, slots=True)
class RecallPlan:
    paths: tuple[str, ...]  # of all selected groups that are, or will be, in their tier
    here: tuple[str, ...]  # of groups that are in their tier already
    copies: Plan  # moves that can be made now, and refusals
    later: Plan  # moves that can be made when their sources are restored
    restore: RestorePlan | None  # None: no object must be restored first
    cost: float | None  # dollars, with the restores that are not requested yet; None if a price is unknown
    hours: float | None  # most hours until the last object can be read, by the price table; None if it does not say

    @property
    def n_bytes(self) -> int:
        return self.copies.totals.n_bytes + self.later.totals.n_bytes

    @property
    def is_done(self) -> bool:
        return not self.copies.moves and not self.later.moves


def plan_recall(
    inventory: Inventory,
    file: RuleFile,
    stores: Stores,
    prices: Sequence[Prices | None],
    groups: NDArray[np.int64],
    *,
    to: str | None = None,
    speed: Speed = "standard",
    unavailable: Mapping[str, str] | None = None,
) -> RecallPlan:
    """Plan the recall of some groups. Asks the tiers about objects that must be restored; changes nothing.

    groups: Numbers in the snapshot. to: Name of the destination tier; None: the first tier, for shards always the home
    tier. unavailable: Reason by tier that may be unmounted. Raises ValueError as destination(), or if an archive has no
    such speed, and StoreError if a tier could not be asked.
    """
    index = SnapshotIndex.of(inventory.snapshot, file, prices)
    dst = destination(file, to)
    home = file.index(file.home_tier.name)
    refused: list[MoveColumns] = []
    here: list[NDArray[np.int64]] = []
    groups = _refuse_immovable(index, groups, dst, here, refused)
    is_shard = index.snapshot.kind[groups] == SHARD
    # Placements lead all machines to shards, so that a copy in a tier of this machine would have no reader.
    elsewhere = groups[is_shard] if to is not None and dst != home else groups[:0]
    refuse(
        MoveColumns.of(elsewhere, COPY, _any_source(index, elsewhere), dst, 0, ""),
        refused,
        np.ones(len(elsewhere), np.bool_),
        _SHARD_REASON.format(home=file.home_tier.name),
    )
    moves, cold = [], []
    for tier, rows in ((home, groups[is_shard & ~np.isin(groups, elsewhere)]), (dst, groups[~is_shard])):
        of_tier = _Selected(index, tier, rows)
        here.append(of_tier.here)
        moves.append(of_tier.moves)
        refused.append(of_tier.not_whole)
        cold.append(of_tier.cold)
    frozen = refuse_unavailable(index, MoveColumns.concat(cold), refused, unavailable or {})
    restored, frozen, restore = _split_restored(index, inventory, stores, frozen, speed)
    wanted = refuse_unavailable(index, MoveColumns.concat(moves), refused, unavailable or {})
    wanted = with_costs(index, MoveColumns.concat([wanted, restored]))
    ledger = CapacityLedger(index, [stores.capacity(tier.name) for tier in file.tiers])
    admitted = wanted.take(ledger.admit(wanted, refused))
    frozen = frozen.take(ledger.admit(frozen, refused))
    if restore is not None:
        keys = {*_keys(inventory, frozen)}
        objects = tuple(one for one in restore.objects if one.key in keys)
        restore = replace(restore, objects=objects) if objects else None
    copies = make_plan(Decisions(admitted, MoveColumns.concat(refused), (RULE,)), inventory, file, prices)
    later = make_plan(Decisions(frozen, rules=(RULE,)), inventory, file, prices)
    found = np.unique(np.concatenate([*here, admitted.group, frozen.group]).astype(np.int64))
    cost, hours = _cost(index, admitted, restore), 0.0 if restore is None else restore.hours
    return RecallPlan(_paths(index, found), _paths(index, np.concatenate(here)), copies, later, restore, cost, hours)


def _refuse_immovable(
    index: SnapshotIndex, groups: Rows, dst: int, here: list[Rows], refused: list[MoveColumns]
) -> Rows:
    snapshot, mask = index.snapshot, np.isin(groups, [*index.snapshot.immovable])
    rows, lies = groups[mask], index.at[:, groups[mask]] >= 0
    is_here = lies[dst] & (lies.sum(axis=0) == 1)
    here.append(rows[is_here])
    moves = MoveColumns.of(rows[~is_here], COPY, _any_source(index, rows[~is_here]), dst, 0, "")
    reasons = [snapshot.immovable[group] for group in moves.group.tolist()]
    refused.append(replace(moves, reason=np.array(reasons, np.object_)))
    return groups[~mask]


def destination(file: RuleFile, to: str | None) -> int:
    """Return the number of a tier; None: the first. Raises ValueError if its objects must be restored to be read."""
    if to is None:
        return 0
    number = file.index(to)
    if file.tiers[number].storage_class in CLASSES_TO_RESTORE:
        raise ValueError(f"tier {file.tiers[number].name!r} has objects that must be restored: recall to a faster tier")
    return number


class _Selected:
    """The selected groups of one destination, by what must be done. Each column has one row for each group.

    here: Groups whose copy there is whole and permanently readable. moves: Copies that can be made now. not_whole:
    Groups of which no copy is whole, refused. cold: Groups whose whole copies must be restored first, with the tier.
    """

    def __init__(self, index: SnapshotIndex, dst: int, rows: Rows) -> None:
        snapshot = index.snapshot
        state = np.append(snapshot.state, ARCHIVED)  # index -1 (no copy) is the last entry
        is_here = index.whole[dst, rows] & (state[index.at[dst, rows]] == READABLE)
        self.here, rows = rows[is_here], rows[~is_here]
        # A copy in dst that must be restored is no source, unless its class changes in place.
        sources = index.whole[:, rows].copy()
        sources[dst] = False
        has_source = sources.any(axis=0)
        none = rows[~has_source]
        text = np.full(len(none), _NOT_WHOLE, np.object_)
        self.not_whole = replace(MoveColumns.of(none, COPY, _any_source(index, none), dst, 0, ""), reason=text)
        rows, sources = rows[has_source], sources[:, has_source]
        is_open = (sources & index.readable[:, rows]).any(axis=0)
        reason = np.full(int(is_open.sum()), "brought back", np.object_)
        open_sources = sources[:, is_open] & index.readable[:, rows[is_open]]
        moves, _ = propose_move(index, rows[is_open], open_sources, dst, (0, reason))
        # A copy leaves the colder copy where it is; a change of class cannot.
        moves = replace(moves, action=np.where(moves.action == MOVE, COPY, moves.action).astype(np.int8))
        self.moves = moves.take(moves.action != DROP)
        rows, sources = rows[~is_open], sources[:, ~is_open]
        running = sources & (state[index.at[:, rows]] == RESTORING)
        src = np.argmax(np.where(running.any(axis=0), running, sources), axis=0)
        self.cold = MoveColumns.of(rows, COPY, src.astype(np.int8), dst, 0, "restored first")


def _any_source(index: SnapshotIndex, rows: Rows) -> NDArray[np.int8]:
    lies: Flags = index.at[:, rows] >= 0
    return np.asarray(np.argmax(lies, axis=0), np.int8)


def _split_restored(
    index: SnapshotIndex, inventory: Inventory, stores: Stores, cold: MoveColumns, speed: Speed
) -> tuple[MoveColumns, MoveColumns, RestorePlan | None]:
    """Return the groups that can be copied by now, those that must be restored first, and the plan of these restores.

    The listing may not say what was restored: S3 alone has that in listings. So each object is asked for.
    """
    if not len(cold):
        return cold, cold, None
    keys, tiers = _keys(inventory, cold), index.file.tiers
    row = np.repeat(np.arange(len(cold)), np.diff(inventory.objects_of(cold.group, cold.src).start))
    archived = [(tiers[src].name, key) for src, key in zip(cold.src[row].tolist(), keys, strict=True)]
    to = tiers[int(cold.dst[0])].name
    plan = plan_restore(index.file, stores, archived, index.prices, speed=speed, to=to)
    waiting = {one.key for one in plan.objects if one.state != RESTORED}
    is_open = np.ones(len(cold), np.bool_)
    is_open[row[[key in waiting for key in keys]]] = False
    restored, left = cold.take(is_open), cold.take(~is_open)
    action = np.where(index.same_url[restored.src, restored.dst], RECLASS, COPY).astype(np.int8)
    reason = np.full(len(restored), "its archived copy was restored", np.object_)
    return replace(restored, action=action, reason=reason), left, plan if waiting else None


def _keys(inventory: Inventory, moves: MoveColumns) -> list[str]:
    objects = inventory.objects_of(moves.group, moves.src)
    found: list[str] = objects.keys.take(pa.array(objects.row)).to_pylist()
    return found


def _cost(index: SnapshotIndex, moves: MoveColumns, restore: RestorePlan | None) -> float | None:
    tiers = {*moves.src.tolist(), *moves.dst.tolist()}
    if any(index.prices[tier] is None for tier in tiers) or (restore is not None and restore.cost is None):
        return None
    return float(moves.once.sum()) + (0.0 if restore is None or restore.cost is None else restore.cost)


def _paths(index: SnapshotIndex, rows: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(index.snapshot.paths.take(pa.array(rows)).to_pylist())


def hold_groups(stores: Stores, paths: Sequence[str], *, hold_s: float, now_s: float, why: str = "recalled") -> None:
    if paths:
        put_hold(stores.store(stores.file.home_tier.name), paths, until_s=now_s + hold_s, now_s=now_s, why=why)
    crash_point("tier_recall.held")


# -- restores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ArchivedObject:
    tier: str
    key: str
    n_bytes: int
    state: int
    storage_class: str | None = None


@dataclass(frozen=True, slots=True)
class RestorePlan:
    objects: tuple[ArchivedObject, ...]
    speed: Speed
    cost: float | None  # dollars for requests that are not made yet, and the copy; None if a price is unknown
    hours: float | None  # most hours until the last object can be read; None if the price table does not say


def plan_restore(
    file: RuleFile,
    stores: Stores,
    archived: Sequence[tuple[str, str]],
    prices: Sequence[Prices | None],
    *,
    to: str,
    speed: Speed = "standard",
) -> RestorePlan:
    """Plan the restore of some objects, as far as they are not readable. Asks for each of them.

    archived: Tier and key of each object. prices: Of each tier; None where they are unknown. to: Name of the tier to
    which the objects are copied afterwards.

    Raises NotFound if an object is gone, ValueError if the storage class has no such speed, StoreError if a tier could
    not be asked.
    """

    def ask(pair: tuple[str, str]) -> ArchivedObject:
        info = stores.head(*pair)
        return ArchivedObject(*pair, info.n_bytes, state_of(info), info.storage_class)

    objects = [one for one in _in_parallel(ask, archived) if one.state != READABLE]
    by_name = dict(zip((tier.name for tier in file.tiers), prices, strict=True))
    return RestorePlan(tuple(objects), speed, *_estimate(file, objects, by_name, speed, to))


def _estimate(
    file: RuleFile, objects: Sequence[ArchivedObject], prices: Mapping[str, Prices | None], speed: Speed, to: str
) -> tuple[float | None, float | None]:
    """Return `cost` and `hours` of the plan of a restore."""
    cost: float | None = 0.0
    hours: float | None = 0.0
    for name in {one.tier: None for one in objects}:
        archive, target = prices[name], prices[to]
        price = None if archive is None else archive.restore.get(speed)
        if archive is not None and archive.restore and price is None:
            speeds = ", ".join(archive.restore)
            raise ValueError(f"tiers.{name}: {archive.name} has no speed {speed!r} for restores; it has {speeds}")
        n_bytes = np.array([o.n_bytes for o in objects if (o.tier, o.state) == (name, ARCHIVED)], np.int64)
        if {one.state for one in objects if one.tier == name} != {RESTORED}:
            hours = None if price is None or hours is None else max(hours, price.hours)
        if len(n_bytes) and cost is not None:
            if archive is None or price is None or target is None:
                cost = None
            else:
                urls = file.tier(name).url, file.tier(to).url
                cost += float(restored_home_dollars(archive, price, target, n_bytes, urls=urls).sum())
    return cost, hours


def request_restore(stores: Stores, plan: RestorePlan) -> None:
    """Request the restore of all objects without a request, and extend restored copies. Repeatable.

    Raises the first StoreError, .unable where a store cannot restore at all. Requests made before it stand: call again.
    """

    def request(one: ArchivedObject) -> None:
        if one.state == RESTORING:
            return
        archive = stores.s3_classes(one.tier)
        if archive is None:
            url = stores.store(one.tier).url
            raise StoreError(f"{one.key}: the tier {one.tier} cannot restore", url=url, unable=True)
        takes_days = one.storage_class in CLASSES_TO_RESTORE
        archive.restore(one.key, days=RESTORE_DAYS if takes_days else None, speed=plan.speed)

    _in_parallel(request, plan.objects)


def wait_restored(
    stores: Stores,
    plan: RestorePlan,
    *,
    clock: Clock = SYSTEM_CLOCK,
    deadline_s: float | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> tuple[ArchivedObject, ...]:
    """Wait until all objects of a plan can be read. Return those that cannot at the deadline.

    The stores are asked at most once a minute, about 16 of the missing objects. on_progress: Receives the number of
    readable objects, and of all objects. Raises NotFound if an object is gone, StoreError (.archived) if one is neither
    restored nor being restored.
    """
    waiting = [one for one in plan.objects if one.state != RESTORED]

    def is_done() -> bool:
        while waiting:
            some = waiting[:_N_THREADS]
            answers = _in_parallel(lambda one: _is_restored(stores, one), some)
            left = [one for one, done in zip(some, answers, strict=True) if not done]
            waiting[: len(some)] = left
            if on_progress is not None:
                on_progress(len(plan.objects) - len(waiting), len(plan.objects))
            if left:
                return False
        return True

    wait_for(is_done, deadline_s, clock, longest_poll_s=_LONGEST_POLL_S)
    return tuple(waiting)


def _is_restored(stores: Stores, one: ArchivedObject) -> bool:
    state = state_of(stores.head(one.tier, one.key))
    if state == ARCHIVED:
        message = "it is neither restored nor being restored: request it again: tiercache tier get"
        raise StoreError(message, url=f"{stores.store(one.tier).url}/{one.key}", archived=True)
    return state != RESTORING


def _in_parallel(work: Callable[[A], B], items: Sequence[A]) -> list[B]:
    with call_threads(_N_THREADS, "tiercache-restore") as pool:
        return list(pool.map(work, items))
