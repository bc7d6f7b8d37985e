"""What the policy decided, in columns: a million moves are 50 MB here, and ten times that as objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiercache.tier.made import Made
from tiercache.tier.model import KINDS, Action, Chosen, Declined, Kind, Money
from tiercache.tier.view import Rows
from tiercache.tier.wishes import ACTIONS, Texts

FREE = Money(break_even_days=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """What is moved or refused; row i of every column is one.

    Attributes:
        group: int64[n].
        action: int8[n], numbers of ACTIONS.
        src, dst: int8[n], tiers; dst: -1: none.
        rule: int16[n], numbers in rules, from the end where negative.
        text: object[n], why.
        rules: names of what may ask for a move.
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
    def of(cls, some: Sequence[Chosen] | Sequence[Declined]) -> Ways:
        """The columns of these, as they are kept or made of them."""
        if isinstance(some, Choices | Refused):
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
        """(group, action, src, dst, rule, reason) of each row from start to end."""
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
        """(kind, action, src, dst, rule, reason) of each row of a part, for people. kind: of these rows."""
        rows, names = slice(*part), (*tiers, None)  # -1 is none, the last
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
class Dollars:
    """What moves cost once and save a month, and days until that is earned back (inf: never); float64[n] each."""

    once: NDArray[np.float64]
    saving_month: NDArray[np.float64]
    days: NDArray[np.float64]

    def __post_init__(self) -> None:
        """What costs and saves nothing is earned back at once."""
        free = (self.once == 0) & (self.saving_month == 0)
        for name, column in (("once", self.once), ("saving_month", self.saving_month), ("days", self.days)):
            object.__setattr__(self, name, np.where(free, 0.0, column))

    @classmethod
    def of(cls, moves: Sequence[Chosen]) -> Dollars:
        """The columns of these, as they are kept or made of them."""
        if isinstance(moves, Choices):
            return moves.dollars
        days = [np.inf if one.money.break_even_days is None else one.money.break_even_days for one in moves]
        columns: tuple[list[Any], ...] = ([m.money.once for m in moves], [m.money.saving_month for m in moves], days)
        return cls(*(np.array(column, np.float64) for column in columns))

    def rows(self, start: int, end: int) -> Iterator[tuple[float, float, float | None]]:
        """(once, saving_month, days; None: never) of each row from start to end."""
        days = [None if day == np.inf else day for day in self.days[start:end].tolist()]
        return zip(self.once[start:end].tolist(), self.saving_month[start:end].tolist(), days, strict=True)

    def made(self, start: int, end: int) -> Iterator[Money]:
        """The objects of rows from start to end."""
        return (Money(*row) if row[0] or row[1] else FREE for row in self.rows(start, end))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Choices(Made[Chosen]):
    """Moves."""

    ways: Ways
    dollars: Dollars

    def __len__(self) -> int:
        return len(self.ways)

    def made(self, start: int, end: int) -> Iterator[Chosen]:
        """Those from start to end."""
        for columns, money in zip(self.ways.named(start, end), self.dollars.made(start, end), strict=True):
            yield Chosen(*columns, money)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Refused(Made[Declined]):
    """Moves that are asked for and not made."""

    ways: Ways

    def __len__(self) -> int:
        return len(self.ways)

    def made(self, start: int, end: int) -> Iterator[Declined]:
        """Those from start to end."""
        return (Declined(*columns) for columns in self.ways.named(start, end))
