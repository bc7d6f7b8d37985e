"""The policy's decisions as columns: a million moves take 50 MB here, and ten times as much as objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiercache.tier.made import LazySequence
from tiercache.tier.model import KINDS, Action, Kind, MoveCost, MoveDecision, MoveRejection
from tiercache.tier.view import Rows
from tiercache.tier.wishes import ACTIONS, Texts

FREE = MoveCost(break_even_days=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class MoveColumns:
    """Columns of moves or refusals; row i of every column is one.

    Attributes:
        group: int64[n], number of the group.
        action: int8[n], indices of ACTIONS.
        src: int8[n], source tier.
        dst: int8[n], destination tier; -1: none.
        rule: int16[n], indices of `rules`; negative: counted from the end.
        text: object[n], reason.
        rules: Names of rules and watermarks.
    """

    group: Rows
    action: NDArray[np.int8]
    src: NDArray[np.int8]
    dst: NDArray[np.int8]
    rule: NDArray[np.int16]
    text: Texts
    rules: Sequence[str]

    def __len__(self) -> int:
        return len(self.group)

    @classmethod
    def of(cls, some: Sequence[MoveDecision] | Sequence[MoveRejection]) -> MoveColumns:
        """Return the columns of a sequence of decisions, without a copy if it is kept as columns."""
        if isinstance(some, MoveDecisionTable | MoveRejectionTable):
            return some.ways
        names = sorted({one.rule for one in some})
        text = np.empty(len(some), np.object_)
        text[:] = [one.reason for one in some]
        return cls(
            group=np.array([one.group for one in some], np.int64),
            action=np.array([ACTIONS.index(one.action) for one in some], np.int8),
            src=np.array([one.src for one in some], np.int8),
            dst=np.array([-1 if one.dst is None else one.dst for one in some], np.int8),
            rule=np.array([names.index(one.rule) for one in some], np.int16),
            text=text,
            rules=names,
        )

    def named(self, start: int, end: int) -> Iterator[tuple[int, Action, int, int | None, str, str]]:
        """Yield (group, action, src, dst, rule, reason) of each row from start to end."""
        part = slice(start, end)
        return zip(
            self.group[part].tolist(),
            [ACTIONS[action] for action in self.action[part].tolist()],
            self.src[part].tolist(),
            [None if dst < 0 else dst for dst in self.dst[part].tolist()],
            [self.rules[rule] for rule in self.rule[part].tolist()],
            self.text[part].tolist(),
            strict=True,
        )

    def worded(
        self, kind: NDArray[np.uint8], tiers: tuple[str, ...], part: tuple[int, int]
    ) -> Iterator[tuple[Kind, Action, str, str | None, str, str]]:
        """Yield (kind, action, src, dst, rule, reason) of each row of a part, with tiers by name.

        kind: Kind of the groups of these rows.
        """
        rows, names = slice(*part), (*tiers, None)  # dst -1 (none) indexes the last entry
        return zip(
            [KINDS[number] for number in kind.tolist()],
            [ACTIONS[number] for number in self.action[rows].tolist()],
            [tiers[tier] for tier in self.src[rows].tolist()],
            [names[tier] for tier in self.dst[rows].tolist()],
            [self.rules[rule] for rule in self.rule[rows].tolist()],
            self.text[rows].tolist(),
            strict=True,
        )


@dataclass(frozen=True, slots=True, eq=False)
class CostColumns:
    """Costs of moves; float64[n] each.

    Attributes:
        once: One-time cost, in US dollars.
        saving_month: Savings per month, in US dollars.
        days: Days until break-even; inf: never.
    """

    once: NDArray[np.float64]
    saving_month: NDArray[np.float64]
    days: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Set all columns to zero for moves without cost and savings: they break even at once."""
        free = (self.once == 0) & (self.saving_month == 0)
        for name, column in (("once", self.once), ("saving_month", self.saving_month), ("days", self.days)):
            object.__setattr__(self, name, np.where(free, 0.0, column))

    @classmethod
    def of(cls, moves: Sequence[MoveDecision]) -> CostColumns:
        """Return the columns of a sequence of decisions, without a copy if it is kept as columns."""
        if isinstance(moves, MoveDecisionTable):
            return moves.dollars
        days = [np.inf if one.money.break_even_days is None else one.money.break_even_days for one in moves]
        columns: tuple[list[Any], ...] = ([m.money.once for m in moves], [m.money.saving_month for m in moves], days)
        return cls(*(np.array(column, np.float64) for column in columns))

    def rows(self, start: int, end: int) -> Iterator[tuple[float, float, float | None]]:
        """Yield (once, saving_month, days) of each row from start to end; days None: never."""
        days = [None if day == np.inf else day for day in self.days[start:end].tolist()]
        return zip(self.once[start:end].tolist(), self.saving_month[start:end].tolist(), days, strict=True)

    def made(self, start: int, end: int) -> Iterator[MoveCost]:
        """Yield the costs of rows from start to end as objects."""
        return (MoveCost(*row) if row[0] or row[1] else FREE for row in self.rows(start, end))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MoveDecisionTable(LazySequence[MoveDecision]):
    """A sequence of decided moves over columns."""

    ways: MoveColumns
    dollars: CostColumns

    def __len__(self) -> int:
        return len(self.ways)

    def create(self, start: int, end: int) -> Iterator[MoveDecision]:
        """See Made.made."""
        for columns, money in zip(self.ways.named(start, end), self.dollars.made(start, end), strict=True):
            yield MoveDecision(*columns, money)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MoveRejectionTable(LazySequence[MoveRejection]):
    """A sequence of rejected moves over columns."""

    ways: MoveColumns

    def __len__(self) -> int:
        return len(self.ways)

    def create(self, start: int, end: int) -> Iterator[MoveRejection]:
        """See Made.made."""
        return (MoveRejection(*columns) for columns in self.ways.named(start, end))
