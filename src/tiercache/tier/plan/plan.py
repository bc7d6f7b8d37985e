"""Makes a plan from decisions: its moves and refusals, its id, and the totals of tiers before and after.

Moves and refusals stay columns, whose elements are created on access: a million moves take 50 MB, and ten times as much
as objects.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import Sizes, month_dollars
from tiercache.tier.inventory.groups import copies_at
from tiercache.tier.inventory.listing import ObjectTable
from tiercache.tier.journal import PlannedObject
from tiercache.tier.model import (
    ACTIONS,
    COPY,
    DELETE,
    DROP,
    KINDS,
    MOVE,
    RECLASS,
    Action,
    Decisions,
    Kind,
    Move,
    MoveColumns,
    Plan,
    PlannedTier,
    PlanTotals,
    Refusal,
    Snapshot,
    TierTotals,
)

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.inventory.groups import Inventory
    from tiercache.tier.rules import RuleFile

# Number of elements that an iteration creates at a time: a checkpoint may have thousands of objects.
ROWS_PER_PART = 256

T = TypeVar("T", Move, Refusal)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PlanTable(Sequence[T], Generic[T]):
    """Rows of a plan, which creates its elements on access. Immutable; safe from any thread."""

    columns: MoveColumns
    rules: Sequence[str]  # names of rules and watermarks, see Decisions
    n_bytes: NDArray[np.int64]  # size of each group's copy in src; 0: there is none
    paths: pa.Array  # of all groups, as kind
    kind: NDArray[np.uint8]
    tiers: tuple[str, ...]

    @abstractmethod
    def create(self, start: int, end: int) -> Iterator[T]:
        """Create the elements from start to end; both are in range."""

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...

    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        rows = range(len(self))[at]  # accepts numpy integers and negative indices, as a tuple does
        if isinstance(rows, int):
            return next(self.create(rows, rows + 1))
        if rows.step == 1:
            return tuple(self.create(rows.start, max(rows.start, rows.stop)))
        return tuple(self[row] for row in rows)

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), ROWS_PER_PART):
            yield from self.create(start, min(start + ROWS_PER_PART, len(self)))

    def __len__(self) -> int:
        return len(self.columns)

    def heads(self, start: int, end: int) -> Iterator[tuple[str, Kind, Action, str, str | None, str, str]]:
        """Yield path, kind, action, src, dst (None: delete), rule and reason of rows from start to end."""
        columns, part = self.columns, slice(start, end)
        destinations = (*self.tiers, None)  # -1 is the last one
        rows = zip(
            self.paths.take(pa.array(columns.group[part])).to_pylist(),
            self.kind[columns.group[part]].tolist(),
            *(column[part].tolist() for column in (columns.action, columns.src, columns.dst, columns.rule)),
            columns.reason[part].tolist(),
            strict=True,
        )
        for path, kind, action, src, dst, rule, reason in rows:
            yield path, KINDS[kind], ACTIONS[action], self.tiers[src], destinations[dst], self.rules[rule], reason


class RefusalTable(PlanTable[Refusal]):
    """The refusals of a plan."""

    __slots__ = ()

    def create(self, start: int, end: int) -> Iterator[Refusal]:
        rows = zip(self.heads(start, end), self.n_bytes[start:end].tolist(), strict=True)
        return (Refusal(*head, n_bytes) for head, n_bytes in rows)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MoveTable(PlanTable[Move]):
    """The moves of a plan, numbered from 1."""

    objects: ObjectTable  # of each move's copy in src

    def create(self, start: int, end: int) -> Iterator[Move]:
        objects, part = self.objects.named(start, end), slice(start, end)
        figures = (self.columns.once[part].tolist(), self.columns.saving_month[part].tolist())
        n_objects = np.diff(self.objects.start[start : end + 1]).tolist()
        rows = zip(self.heads(start, end), n_objects, *figures, strict=True)
        for number, (head, n, cost, saving_month) in enumerate(rows, start=start + 1):
            yield Move(number, *head, tuple(PlannedObject(*next(objects)) for _ in range(n)), cost, saving_month)


def totals_by_route(moves: Sequence[Move]) -> dict[tuple[str, str, str, str | None], tuple[int, PlanTotals]]:
    """Return count and totals for each (rule, action, src, dst), in order of first appearance."""
    if isinstance(moves, MoveTable):
        heads = moves.heads(0, len(moves))
        figures = (moves.n_bytes.tolist(), moves.columns.once.tolist(), moves.columns.saving_month.tolist())
        rows = (
            ((rule, action, src, dst), *row)
            for (_, _, action, src, dst, rule, _), *row in zip(heads, *figures, strict=True)
        )
    else:
        rows = (((m.rule, m.action, m.src, m.dst), m.n_bytes, m.cost, m.saving_month) for m in moves)
    found: dict[tuple[str, str, str, str | None], list[float]] = {}
    for route, n_bytes, cost, saving_month in rows:
        sums = found.setdefault(route, [0, 0, 0.0, 0.0])
        for i, amount in enumerate((1, n_bytes, cost, saving_month)):
            sums[i] += amount
    return {route: (int(n), PlanTotals(int(n_bytes), *of)) for route, (n, n_bytes, *of) in found.items()}


def make_plan(decisions: Decisions, inventory: Inventory, file: RuleFile, prices: Sequence[Prices | None]) -> Plan:
    """Return the plan for decisions about an inventory, with a new id. It keeps the inventory's listing alive."""
    snapshot, refusals = inventory.snapshot, decisions.refusals
    of_groups = (snapshot.paths, snapshot.kind, snapshot.tiers)
    objects = inventory.objects_of(decisions.moves.group, decisions.moves.src)
    n_bytes, columns = objects.bytes_of_copies(), decisions.moves
    at = copies_at(snapshot.group, snapshot.tier, refusals.group, refusals.src)
    refused_bytes = np.where(at < 0, 0, np.append(snapshot.n_bytes, 0)[at])
    made_s = round(snapshot.now_s, 3)
    return Plan(
        id=f"{datetime.fromtimestamp(made_s, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(6)}",
        made_s=made_s,
        rules=str(file.path),
        rules_sha256=file.sha256,
        tiers=tuple(
            PlannedTier(tier.name, tier.role, tier.url, tier.storage_class, "" if price is None else price.name)
            for tier, price in zip(file.tiers, prices, strict=True)
        ),
        moves=MoveTable(columns, decisions.rules, n_bytes, *of_groups, objects),
        refusals=RefusalTable(refusals, decisions.rules, refused_bytes, *of_groups),
        totals=PlanTotals(int(n_bytes.sum()), float(columns.once.sum()), float(columns.saving_month.sum())),
        before=holdings(snapshot, prices),
        after=holdings(snapshot, prices, decisions),
        exceeded=decisions.exceeded,
    )


def holdings(
    snapshot: Snapshot, prices: Sequence[Prices | None], decisions: Decisions | None = None
) -> Mapping[str, TierTotals]:
    """Return the totals of each tier by name: at present, or after the decisions are executed.

    prices: Prices of each tier; a tier without prices costs nothing.
    """
    copies, tiers = np.arange(snapshot.n_copies), snapshot.tier
    if decisions is not None:
        copies, tiers = _copies_afterwards(snapshot, decisions.moves)
    found = {}
    for tier, (name, price) in enumerate(zip(snapshot.tiers, prices, strict=True)):
        sizes = Sizes.of(snapshot, copies[tiers == tier])
        dollars = 0.0 if price is None else float(month_dollars(price, sizes).sum())
        found[name] = TierTotals(int(sizes.n_bytes.sum()), int(sizes.n_objects.sum()), dollars)
    return found


def _copies_afterwards(snapshot: Snapshot, moves: MoveColumns) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return the copies after the moves, and the tier of each. A new copy has the properties of its source."""
    at = np.full((len(snapshot.tiers), snapshot.n_groups), -1, np.int32)
    at[snapshot.tier, snapshot.group] = np.arange(snapshot.n_copies, dtype=np.int32)
    groups, src, dst = moves.group, moves.src, moves.dst
    brings = np.isin(moves.action, (COPY, MOVE, RECLASS))
    takes = np.isin(moves.action, (MOVE, RECLASS, DROP))
    deletes = moves.action == DELETE
    at[dst[brings], groups[brings]] = at[src[brings], groups[brings]]
    at[src[takes], groups[takes]] = -1
    at[:, groups[deletes]] = -1
    tiers, rows = np.nonzero(at >= 0)
    return at[tiers, rows].astype(np.int64), tiers.astype(np.int8)
