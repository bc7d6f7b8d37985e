"""Makes a plan from decisions: names, every object of each move, and the totals of each tier before and after.

plan_file.py reads and writes the file of a plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tiercache.tier.copies import copies_at
from tiercache.tier.costs import Sizes, month_dollars
from tiercache.tier.decided import CostColumns, MoveColumns
from tiercache.tier.model import Decisions, MoveDecision, Plan, PlannedTier, Snapshot, TierTotals
from tiercache.tier.moves import MoveTable, ObjectTable, RefusalTable
from tiercache.tier.plan_file import plan_lines, read_plan, write_plan
from tiercache.tier.wishes import COPY, DROP, MOVE, RECLASS

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.prices import Prices
    from tiercache.tierfile import RuleFile

__all__ = ["Stock", "holdings", "make_plan", "plan_lines", "read_plan", "write_plan"]

# For the estimated duration of a move only, which people read; one machine and its network.
_BYTES_A_SECOND = 200e6


class Stock(Protocol):
    """The inventory as the planner uses it (inventory.py)."""

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot behind the decisions."""

    def objects(self, group: int, tier: int) -> tuple[ObjectInfo, ...]:
        """Return the objects of a copy, the objects that complete it last."""


@runtime_checkable
class Columns(Protocol):
    """A Stock that returns the objects of many copies as columns."""

    def pieces(self, groups: NDArray[np.int64], tiers: NDArray[np.int8]) -> ObjectTable:
        """Return the objects of each group's copy in the tier at the same index."""


# -- making a plan ---------------------------------------------------------------------------------------------------


def make_plan(decisions: Decisions, inventory: Stock, file: RuleFile, prices: Sequence[Prices | None]) -> Plan:
    """Return the plan for decisions about an inventory. Deterministic: the id is computed from the content.

    Moves and refusals stay columns, whose elements are created on access; the plan keeps the inventory's listing alive.
    """
    snapshot = inventory.snapshot
    moves = _moves(decisions, inventory, file)
    made_s = round(snapshot.now_s, 3)
    ways = MoveColumns.of(decisions.refusals)
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
        refusals=RefusalTable(ways, _bytes_in(snapshot, ways), snapshot.paths, snapshot.kind, snapshot.tiers),
        before=holdings(snapshot, prices),
        after=holdings(snapshot, prices, decisions),
    )


def _moves(decisions: Decisions, inventory: Stock, file: RuleFile) -> MoveTable:
    ways, snapshot = MoveColumns.of(decisions.moves), inventory.snapshot
    if isinstance(inventory, Columns):
        pieces = inventory.pieces(ways.group, ways.src)
    else:
        pairs = zip(ways.group.tolist(), ways.src.tolist(), strict=True)
        pieces = ObjectTable.of([inventory.objects(group, tier) for group, tier in pairs])
    return MoveTable(
        ways=ways,
        dollars=CostColumns.of(decisions.moves),
        pieces=pieces,
        n_bytes=pieces.bytes_of_copies(),
        paths=snapshot.paths,
        kind=snapshot.kind,
        tiers=snapshot.tiers,
        rate_bytes_s=min(_BYTES_A_SECOND, file.tiering.rate_bytes_s or _BYTES_A_SECOND),
    )


def _bytes_in(snapshot: Snapshot, ways: MoveColumns) -> NDArray[np.int64]:
    """Return the size of each decision's copy in src; 0: there is no copy. int64[n]."""
    at = copies_at(snapshot.group, snapshot.tier, ways.group, ways.src)
    return np.where(at < 0, 0, np.append(snapshot.n_bytes, 0)[at])


def _id(made_s: float, rules_sha256: str, moves: MoveTable) -> str:
    digest = hashlib.sha256(f"{made_s} {rules_sha256} {moves.digest()}".encode())
    return f"{datetime.fromtimestamp(made_s, UTC):%Y%m%dT%H%M%SZ}-{digest.hexdigest()[:12]}"


# -- totals of tiers -------------------------------------------------------------------------------------------------


def holdings(
    snapshot: Snapshot, prices: Sequence[Prices | None], decisions: Decisions | None = None
) -> Mapping[str, TierTotals]:
    """Return the totals of each tier by name: at present, or after the decisions are executed.

    prices: Prices of each tier; a tier without prices costs nothing.
    """
    copies, tiers = np.arange(snapshot.n_copies), snapshot.tier
    if decisions is not None:
        copies, tiers = _afterwards(snapshot, decisions.moves)
    found = {}
    for tier, (name, price) in enumerate(zip(snapshot.tiers, prices, strict=True)):
        sizes = Sizes.of(snapshot, copies[tiers == tier])
        dollars = 0.0 if price is None else float(month_dollars(price, sizes).sum())
        found[name] = TierTotals(int(sizes.n_bytes.sum()), int(sizes.n_objects.sum()), dollars)
    return found


def _afterwards(snapshot: Snapshot, moves: Sequence[MoveDecision]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return the copies after the moves, and the tier of each. A new copy has the properties of its source."""
    at = np.full((len(snapshot.tiers), snapshot.n_groups), -1, np.int32)
    at[snapshot.tier, snapshot.group] = np.arange(snapshot.n_copies, dtype=np.int32)
    ways = MoveColumns.of(moves)
    groups, src, dst = ways.group, ways.src, ways.dst
    brings = np.isin(ways.action, (COPY, MOVE, RECLASS))
    opened_versions = np.isin(ways.action, (MOVE, RECLASS, DROP))
    at[dst[brings], groups[brings]] = at[src[brings], groups[brings]]
    at[src[opened_versions], groups[opened_versions]] = -1
    at[:, groups[~brings & ~opened_versions]] = -1
    tiers, rows = np.nonzero(at >= 0)
    return at[tiers, rows].astype(np.int64), tiers.astype(np.int8)
