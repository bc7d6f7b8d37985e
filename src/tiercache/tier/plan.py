"""Plans: what the policy decided, with names and every object, and what lies where before and after.

plan_file.py has the file that a plan stands in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import Sizes, month_dollars
from tiercache.tier.model import (
    KINDS,
    Chosen,
    Decisions,
    Declined,
    Holding,
    Move,
    Plan,
    PlannedObject,
    PlannedTier,
    Refusal,
    Snapshot,
)
from tiercache.tier.plan_file import plan_lines, read_plan, write_plan

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.prices import Prices
    from tiercache.tierfile import TierFile

__all__ = ["Stock", "holdings", "plan_lines", "planned", "read_plan", "write_plan"]

# How long a move takes is a guess for people: of one machine, its network, and many objects at once.
_BYTES_A_SECOND = 200e6
_OBJECTS_A_SECOND = 100.0


class Stock(Protocol):
    """What there is (inventory.py): the snapshot, and the objects of its copies."""

    @property
    def snapshot(self) -> Snapshot:
        """What was decided upon."""

    def objects(self, group: int, tier: int) -> tuple[ObjectInfo, ...]:
        """Of a copy, those that make it whole last."""


# -- making ----------------------------------------------------------------------------------------------------------


def planned(decisions: Decisions, inventory: Stock, file: TierFile, prices: Sequence[Prices | None]) -> Plan:
    """The plan of what was decided upon an inventory. Its id comes from its contents: the same of the same."""
    snapshot = inventory.snapshot
    paths = _paths(snapshot, decisions)
    rate = min(_BYTES_A_SECOND, file.tiering.rate_bytes_s or _BYTES_A_SECOND)
    moves = tuple(
        _move(number, one, paths[one.group], inventory, rate) for number, one in enumerate(decisions.moves, start=1)
    )
    made_s = round(snapshot.now_s, 3)
    sizes = _sizes_in(snapshot)
    return Plan(
        id=_id(made_s, file.sha256, moves),
        made_s=made_s,
        rules=str(file.path),
        rules_sha256=file.sha256,
        tiers=tuple(
            PlannedTier(tier.name, tier.role, tier.url, tier.storage_class, "" if price is None else price.name)
            for tier, price in zip(file.tiers, prices, strict=True)
        ),
        moves=moves,
        refusals=tuple(_refusal(one, paths[one.group], snapshot, sizes) for one in decisions.refusals),
        before=holdings(snapshot, prices),
        after=holdings(snapshot, prices, decisions),
    )


def _paths(snapshot: Snapshot, decisions: Decisions) -> dict[int, str]:
    groups = [one.group for one in decisions.moves] + [one.group for one in decisions.refusals]
    wanted = np.unique(np.array(groups, np.int64))
    return dict(zip(wanted.tolist(), snapshot.paths.take(pa.array(wanted)).to_pylist(), strict=True))


def _move(number: int, one: Chosen, path: str, inventory: Stock, rate: float) -> Move:
    objects = tuple(
        PlannedObject(info.key, info.n_bytes, info.etag, info.modified_s, info.crc32c)
        for info in inventory.objects(one.group, one.src)
    )
    tiers = inventory.snapshot.tiers
    n_bytes = sum(info.n_bytes for info in objects) if one.action in ("move", "copy") else 0
    return Move(
        number=number,
        path=path,
        kind=KINDS[inventory.snapshot.kind[one.group]],
        action=one.action,
        src=tiers[one.src],
        dst=None if one.dst is None else tiers[one.dst],
        rule=one.rule,
        reason=one.reason,
        objects=objects,
        money=one.money,
        seconds=round(n_bytes / rate + len(objects) / _OBJECTS_A_SECOND, 3),
    )


def _sizes_in(snapshot: Snapshot) -> Callable[[int, int], int]:
    """Bytes of a group's copy in a tier; 0: it has none there."""
    starts = np.searchsorted(snapshot.group, np.arange(snapshot.n_groups + 1))

    def n_bytes(group: int, tier: int) -> int:
        copies = slice(starts[group], starts[group + 1])
        return int(snapshot.n_bytes[copies][snapshot.tier[copies] == tier].sum())

    return n_bytes


def _refusal(one: Declined, path: str, snapshot: Snapshot, n_bytes: Callable[[int, int], int]) -> Refusal:
    return Refusal(
        path=path,
        kind=KINDS[snapshot.kind[one.group]],
        action=one.action,
        src=snapshot.tiers[one.src],
        dst=None if one.dst is None else snapshot.tiers[one.dst],
        rule=one.rule,
        reason=one.reason,
        n_bytes=n_bytes(one.group, one.src),
    )


def _id(made_s: float, rules_sha256: str, moves: Sequence[Move]) -> str:
    digest = hashlib.sha256(f"{made_s} {rules_sha256}".encode())
    for move in moves:
        objects = [(one.key, one.n_bytes, one.etag) for one in move.objects]
        digest.update(repr((move.path, move.action, move.src, move.dst, objects)).encode(errors="surrogatepass"))
    return f"{datetime.fromtimestamp(made_s, UTC):%Y%m%dT%H%M%SZ}-{digest.hexdigest()[:12]}"


# -- what lies where -------------------------------------------------------------------------------------------------


def holdings(
    snapshot: Snapshot, prices: Sequence[Prices | None], decisions: Decisions | None = None
) -> Mapping[str, Holding]:
    """What lies in each tier, by name, and what it costs a month: now, or when all that was decided is done.

    prices: of each tier; what has none costs nothing.
    """
    copies, tiers = np.arange(snapshot.n_copies), snapshot.tier
    if decisions is not None:
        copies, tiers = _afterwards(snapshot, decisions.moves)
    found = {}
    for tier, (name, price) in enumerate(zip(snapshot.tiers, prices, strict=True)):
        sizes = Sizes.of(snapshot, copies[tiers == tier])
        dollars = 0.0 if price is None else float(month_dollars(price, sizes).sum())
        found[name] = Holding(int(sizes.n_bytes.sum()), int(sizes.n_objects.sum()), dollars)
    return found


def _afterwards(snapshot: Snapshot, moves: Sequence[Chosen]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Copies, and the tier of each, when moves are done. A copy in a new tier is what its source was."""
    at = np.full((len(snapshot.tiers), snapshot.n_groups), -1, np.int32)
    at[snapshot.tier, snapshot.group] = np.arange(snapshot.n_copies)
    groups = np.array([one.group for one in moves], np.int64)
    src = np.array([one.src for one in moves], np.int64)
    dst = np.array([-1 if one.dst is None else one.dst for one in moves], np.int64)
    brings = np.array([one.action in ("copy", "move", "reclass") for one in moves], np.bool_)
    leaves = np.array([one.action in ("move", "reclass", "drop") for one in moves], np.bool_)
    at[dst[brings], groups[brings]] = at[src[brings], groups[brings]]
    at[src[leaves], groups[leaves]] = -1
    at[:, groups[~brings & ~leaves]] = -1
    tiers, rows = np.nonzero(at >= 0)
    return at[tiers, rows].astype(np.int64), tiers.astype(np.int8)
