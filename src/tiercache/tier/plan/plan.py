"""Makes a plan from decisions: its moves and refusals, its id, and the totals of tiers before and after.

Moves and refusals stay columns, whose elements are created on access: a million moves take 50 MB, and ten times as much
as objects.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import Sizes, break_even_days, month_dollars
from tiercache.tier.inventory.groups import copies_at
from tiercache.tier.inventory.listing import ObjectTable
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
    MoveCost,
    Plan,
    PlannedObject,
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

_LARGE = pa.large_string()
# Number of elements that an iteration creates at a time; a larger number is not faster.
ROWS_PER_PART = 1 << 14
# For the estimated duration of a move only, which people read: one machine and its network, many objects in parallel.
_BYTES_A_SECOND = 200e6
_OBJECTS_A_SECOND = 100.0

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
        for start, end in self.parts():
            yield from self.create(start, end)

    def __len__(self) -> int:
        return len(self.columns)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of successive parts that cover the sequence."""
        for start in range(0, len(self), ROWS_PER_PART):
            yield start, min(start + ROWS_PER_PART, len(self))

    def columns_with_names(self, start: int, end: int) -> dict[str, pa.Array]:
        """Return path, kind, action, src, dst (null: delete), rule and reason of rows from start to end, as texts."""
        columns, part = self.columns, slice(start, end)
        return {
            "path": self.paths.take(pa.array(columns.group[part])),
            "kind": _named(KINDS, self.kind[columns.group[part]]),
            **self.route(start, end),
            "reason": pa.array(columns.reason[part].tolist(), _LARGE).dictionary_encode(),
        }

    def route(self, start: int, end: int) -> dict[str, pa.DictionaryArray]:
        """Return action, src, dst (null: delete) and rule of rows from start to end."""
        columns, part = self.columns, slice(start, end)
        return {
            "action": _named(ACTIONS, columns.action[part]),
            "src": _named(self.tiers, columns.src[part]),
            "dst": _named((*self.tiers, None), columns.dst[part]),
            "rule": _named(self.rules, columns.rule[part]),
        }

    def heads(self, start: int, end: int) -> Iterator[tuple[str, Kind, Action, str, str | None, str, str]]:
        """Yield the columns with names row by row, as tuples."""
        path, *columns = self.columns_with_names(start, end).values()
        # to_pylist() of a dictionary column is slow.
        dictionaries: list[list[Any]] = [column.dictionary.to_pylist() for column in columns]
        numbers = zip(*(column.indices.to_numpy().tolist() for column in columns), strict=True)
        for name, row in zip(path.to_pylist(), numbers, strict=True):
            kind, action, src, dst, rule, reason = (of[number] for of, number in zip(dictionaries, row, strict=True))
            yield name, kind, action, src, dst, rule, reason


def _named(names: Sequence[str | None], numbers: NDArray[Any]) -> pa.DictionaryArray:
    """Return the names with these numbers; -1 is the last name."""
    return pa.DictionaryArray.from_arrays(numbers.astype(np.int32) % len(names), pa.array(names, _LARGE))


class RefusalTable(PlanTable[Refusal]):
    """The refusals of a plan."""

    __slots__ = ()

    def create(self, start: int, end: int) -> Iterator[Refusal]:
        """See PlanTable.create()."""
        rows = zip(self.heads(start, end), self.n_bytes[start:end].tolist(), strict=True)
        return (Refusal(*head, n_bytes) for head, n_bytes in rows)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MoveTable(PlanTable[Move]):
    """The moves of a plan, numbered from 1."""

    objects: ObjectTable  # of each move's copy in src
    rate_bytes_s: float  # assumed copy rate

    def create(self, start: int, end: int) -> Iterator[Move]:
        """See PlanTable.create()."""
        objects, part = self.objects.named(start, end), slice(start, end)
        days = [None if day == np.inf else day for day in self.break_even_days(start, end).tolist()]
        costs = zip(self.columns.once[part].tolist(), self.columns.saving_month[part].tolist(), days, strict=True)
        n_objects, seconds = np.diff(self.objects.start[start : end + 1]).tolist(), self.seconds(start, end).tolist()
        rows = zip(self.heads(start, end), costs, n_objects, seconds, strict=True)
        for number, (head, cost, n, one_s) in enumerate(rows, start=start + 1):
            planned = tuple(PlannedObject(*next(objects)) for _ in range(n))
            yield Move(number, *head, planned, MoveCost(*cost), one_s)

    def break_even_days(self, start: int, end: int) -> NDArray[np.float64]:
        """Return the days until break-even of each move from start to end; inf: never. float64[n]."""
        return break_even_days(self.columns.once[start:end], self.columns.saving_month[start:end])

    def seconds(self, start: int, end: int) -> NDArray[np.float64]:
        """Return the estimated duration of each move from start to end, in seconds; float64[n]."""
        part, n_objects = slice(start, end), np.diff(self.objects.start[start : end + 1])
        copied = np.where(np.isin(self.columns.action[part], (MOVE, COPY)), self.n_bytes[part], 0)
        return np.round(copied / self.rate_bytes_s + n_objects / _OBJECTS_A_SECOND, 3)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of successive parts; each has a limited number of objects, or a single move."""
        start = 0
        while start < len(self):
            most = np.searchsorted(self.objects.start, self.objects.start[start] + ROWS_PER_PART, side="right")
            end = max(start + 1, min(int(most) - 1, start + ROWS_PER_PART, len(self)))
            yield start, end
            start = end

    def totals(self) -> PlanTotals:
        """Return the totals of all moves."""
        columns = self.columns
        return PlanTotals(int(self.n_bytes.sum()), float(columns.once.sum()), float(columns.saving_month.sum()))

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the moves and of the identity of their objects."""
        digest, columns, objects = hashlib.sha256(), self.columns, self.objects
        for start, end in self.parts():
            part, row = slice(start, end), objects.row[slice(*objects.start[[start, end]].tolist())]
            moves = [self.paths.take(pa.array(columns.group[part])), columns.action[part], columns.src[part]]
            moves += [columns.dst[part], np.diff(objects.start[start : end + 1])]
            keys, etags = (texts.take(pa.array(row)) for texts in (objects.keys, objects.etags))
            for batch in (moves, [keys, etags.is_null(), etags.fill_null(""), objects.n_bytes[row]]):
                names = [str(number) for number in range(len(batch))]
                digest.update(pa.RecordBatch.from_arrays([pa.array(column) for column in batch], names).serialize())
        return digest.hexdigest()


def totals_by_route(moves: Sequence[Move]) -> dict[tuple[str, str, str, str | None], tuple[int, PlanTotals]]:
    """Return count and totals for each (rule, action, src, dst), in order of first appearance."""
    if isinstance(moves, MoveTable):
        columns = moves.route(0, len(moves))
        # As texts, because a rule may have the name of a watermark.
        route = [columns[name].cast(pa.string()) for name in ("rule", "action", "src", "dst")]
        figures = [moves.n_bytes, moves.columns.once, moves.columns.saving_month]
    else:
        rows = [(m.rule, m.action, m.src, m.dst, m.n_bytes, m.money.once, m.money.saving_month) for m in moves]
        *route, n_bytes, once, saving = zip(*rows, strict=True) if rows else [()] * 7
        figures = [np.array(n_bytes, np.int64), np.array(once, np.float64), np.array(saving, np.float64)]
    names = ["rule", "action", "src", "dst", "n_bytes", "cost", "saving", "row"]
    table = pa.table([*route, *figures, np.arange(len(moves))], names=names)
    sums = [("row", "min"), ("row", "count"), ("n_bytes", "sum"), ("cost", "sum"), ("saving", "sum")]
    found = table.group_by(names[:4]).aggregate(sums).sort_by("row_min")
    return {row[:4]: (row[5], PlanTotals(*row[6:])) for row in zip(*found.to_pydict().values(), strict=True)}


def make_plan(decisions: Decisions, inventory: Inventory, file: RuleFile, prices: Sequence[Prices | None]) -> Plan:
    """Return the plan for decisions about an inventory. Deterministic: the id is computed from the content.

    The plan keeps the inventory's listing alive.
    """
    snapshot, refusals = inventory.snapshot, decisions.refusals
    of_groups = {"paths": snapshot.paths, "kind": snapshot.kind, "tiers": snapshot.tiers}
    objects = inventory.objects_of(decisions.moves.group, decisions.moves.src)
    rate_bytes_s = min(_BYTES_A_SECOND, file.tiering.rate_bytes_s or _BYTES_A_SECOND)
    moves = MoveTable(
        decisions.moves,
        decisions.rules,
        objects.bytes_of_copies(),
        **of_groups,
        objects=objects,
        rate_bytes_s=rate_bytes_s,
    )
    at = copies_at(snapshot.group, snapshot.tier, refusals.group, refusals.src)
    refused_bytes = np.where(at < 0, 0, np.append(snapshot.n_bytes, 0)[at])
    made_s = round(snapshot.now_s, 3)
    digest = hashlib.sha256(f"{made_s} {file.sha256} {moves.digest()}".encode())
    return Plan(
        id=f"{datetime.fromtimestamp(made_s, UTC):%Y%m%dT%H%M%SZ}-{digest.hexdigest()[:12]}",
        made_s=made_s,
        rules=str(file.path),
        rules_sha256=file.sha256,
        tiers=tuple(
            PlannedTier(tier.name, tier.role, tier.url, tier.storage_class, "" if price is None else price.name)
            for tier, price in zip(file.tiers, prices, strict=True)
        ),
        moves=moves,
        refusals=RefusalTable(refusals, decisions.rules, refused_bytes, **of_groups),
        totals=moves.totals(),
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
