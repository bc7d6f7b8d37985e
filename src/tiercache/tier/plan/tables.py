"""Decisions, moves and refusals as columns: a million moves take 50 MB here, and ten times as much as objects.

An object is created for a row only on access.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.model import ObjectInfo
from tiercache.tier.inventory.listing import NO_CRC, keys_of
from tiercache.tier.model import (
    AT_A_TIME,
    KINDS,
    Action,
    Kind,
    LazySequence,
    Move,
    MoveCost,
    MoveDecision,
    MoveRejection,
    PlannedObject,
    Refusal,
)
from tiercache.tier.plan.proposals import ACTIONS, COPY, MOVE, Rows, Texts

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


# For the estimated duration of a move only, which people read; assumes many objects in parallel.
_OBJECTS_A_SECOND = 100.0


@dataclass(frozen=True, slots=True, eq=False)
class ObjectTable:
    """The objects of some copies, as row numbers of columns that contain other objects too.

    Attributes:
        start: int64[n + 1], offsets of each copy's objects in row and crc32c.
        row: int64[m], row of each object in the columns below.
        crc32c: int64[m], NO_CRC where it is unknown.
        keys: large_string[k].
        etags: large_string[k], null where there is none.
        n_bytes: int64[k].
        modified_s: float64[k], NaN where it is unknown.
    """

    start: NDArray[np.int64]
    row: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    keys: pa.Array
    etags: pa.Array
    n_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]

    @classmethod
    def of(cls, copies: Sequence[Sequence[ObjectInfo]]) -> ObjectTable:
        """Return the columns of these objects, given per copy."""
        infos = [info for copy in copies for info in copy]
        return cls(
            start=np.cumsum([0, *map(len, copies)]),
            row=np.arange(len(infos)),
            crc32c=np.array([NO_CRC if info.crc32c is None else info.crc32c for info in infos], np.int64),
            keys=keys_of(infos),
            etags=pa.array([info.etag for info in infos], pa.large_string()),
            n_bytes=np.array([info.n_bytes for info in infos], np.int64),
            modified_s=np.array([np.nan if i.modified_s is None else i.modified_s for i in infos], np.float64),
        )

    def bytes_of_copies(self) -> NDArray[np.int64]:
        """Return the total size of each copy's objects; int64[n]."""
        sums = np.concatenate([[0], np.cumsum(self.n_bytes[self.row])])
        return np.asarray(sums[self.start[1:]] - sums[self.start[:-1]], np.int64)

    def named(self, start: int, end: int) -> Iterator[tuple[str, int, str | None, float | None, int | None]]:
        """Yield (key, n_bytes, etag, modified_s, crc32c) of each object of the copies from start to end."""
        part = slice(*self.start[[start, end]].tolist())
        row = self.row[part]
        return zip(
            self.keys.take(pa.array(row)).to_pylist(),
            self.n_bytes[row].tolist(),
            self.etags.take(pa.array(row)).to_pylist(),
            [None if time_s != time_s else time_s for time_s in self.modified_s[row].tolist()],
            [None if crc == NO_CRC else crc for crc in self.crc32c[part].tolist()],
            strict=True,
        )


# path, kind, action, src, dst, rule, reason
Named: TypeAlias = tuple[str, Kind, Action, str, str | None, str, str]


class Sums(NamedTuple):
    """Totals of some moves: bytes, and costs in US dollars."""

    n_bytes: int
    once: float
    saving_month: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MoveTable(LazySequence[Move]):
    """The moves of a plan, numbered from 1.

    Attributes:
        ways: Decisions, as columns.
        dollars: Costs, as columns.
        pieces: Objects of each move's copy in src.
        n_bytes: int64[n], total size of the objects.
        paths: Paths of all groups.
        kind: Kinds of all groups.
        tiers: Names of the tiers.
        rate_bytes_s: Assumed copy rate, in bytes per second.
    """

    ways: MoveColumns
    dollars: CostColumns
    pieces: ObjectTable
    n_bytes: NDArray[np.int64]
    paths: pa.Array
    kind: NDArray[np.uint8]
    tiers: tuple[str, ...]
    rate_bytes_s: float

    def __len__(self) -> int:
        return len(self.ways)

    def create(self, start: int, end: int) -> Iterator[Move]:
        """See Made.made."""
        objects = self.pieces.named(start, end)
        n_objects, seconds = np.diff(self.pieces.start[start : end + 1]).tolist(), self.seconds(start, end).tolist()
        columns = self.named(start, end), self.dollars.made(start, end), n_objects, seconds
        for number, (named, money, n, one_s) in enumerate(zip(*columns, strict=True), start=start + 1):
            some = tuple(PlannedObject(*next(objects)) for _ in range(n))
            yield Move(number, *named, some, money, one_s)

    def named(self, start: int, end: int) -> Iterator[Named]:
        """Yield the columns of moves from start to end, with names."""
        return _named(self.ways, self.paths, self.kind, self.tiers, (start, end))

    def seconds(self, start: int, end: int) -> NDArray[np.float64]:
        """Return the estimated duration of each move from start to end, in seconds; float64[n]."""
        part, n_objects = slice(start, end), np.diff(self.pieces.start[start : end + 1])
        copied = np.where(np.isin(self.ways.action[part], (MOVE, COPY)), self.n_bytes[part], 0)
        return np.round(copied / self.rate_bytes_s + n_objects / _OBJECTS_A_SECOND, 3)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of successive parts; each has a limited number of objects, or a single move."""
        start = 0
        while start < len(self):
            most = np.searchsorted(self.pieces.start, self.pieces.start[start] + AT_A_TIME, side="right")
            end = max(start + 1, min(int(most) - 1, start + AT_A_TIME, len(self)))
            yield start, end
            start = end

    def is_finite(self) -> bool:
        """Whether all figures are finite or absent, so that JSON can represent them."""
        dollars, times = self.dollars, self.pieces.modified_s[self.pieces.row]
        finite = np.isfinite(dollars.once).all() and np.isfinite(dollars.saving_month).all()
        return bool(finite and not np.isnan(dollars.days).any() and not np.isinf(times).any())

    def paths_of(self, kind: int) -> pa.Array:
        """Return the paths of the moves of one kind (FILE, SHARD or CHECKPOINT)."""
        group = self.ways.group
        return self.paths.take(pa.array(group[self.kind[group] == kind]))

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the moves and of the identity of their objects."""
        digest = hashlib.sha256()
        for start, end in self.parts():
            ways, rows = slice(start, end), slice(*self.pieces.start[[start, end]].tolist())
            row = self.pieces.row[rows]
            for texts in (
                self.paths.take(pa.array(self.ways.group[ways])),
                self.pieces.keys.take(pa.array(row)),
                self.pieces.etags.take(pa.array(row)),
            ):
                for part in _content(texts):
                    digest.update(part)
            for column in (self.ways.action, self.ways.src, self.ways.dst, np.diff(self.pieces.start)):
                digest.update(np.ascontiguousarray(column[ways]).data)
            digest.update(self.pieces.n_bytes[row].data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RefusalTable(LazySequence[Refusal]):
    """The refusals of a plan. Columns as in Moves.

    n_bytes: int64[n], size of the copy in src; 0: there is none.
    """

    ways: MoveColumns
    n_bytes: NDArray[np.int64]
    paths: pa.Array
    kind: NDArray[np.uint8]
    tiers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ways)

    def create(self, start: int, end: int) -> Iterator[Refusal]:
        """See Made.made."""
        sizes = self.n_bytes[start:end].tolist()
        return (Refusal(*one, n_bytes) for one, n_bytes in zip(self.named(start, end), sizes, strict=True))

    def named(self, start: int, end: int) -> Iterator[Named]:
        """Yield the columns of refusals from start to end, with names."""
        return _named(self.ways, self.paths, self.kind, self.tiers, (start, end))


def total_moves(moves: Sequence[Move]) -> Sums:
    """Return the total bytes and costs of all moves."""
    if isinstance(moves, MoveTable):
        # Summed in order, so that the result equals the sum over the objects to the last digit.
        dollars = (sum(column.tolist()) for column in (moves.dollars.once, moves.dollars.saving_month))
        return Sums(int(moves.n_bytes.sum()), *dollars)
    once, saving_month = (sum(getattr(move.money, name) for move in moves) for name in ("once", "saving_month"))
    return Sums(sum(move.n_bytes for move in moves), once, saving_month)


def totals_by_route(moves: Sequence[Move]) -> dict[tuple[str, str, str, str | None], tuple[int, Sums]]:
    """Return count and totals for each (rule, action, src, dst), in order of first appearance."""
    if not isinstance(moves, MoveTable):
        found: dict[tuple[str, str, str, str | None], list[Move]] = {}
        for move in moves:
            found.setdefault((move.rule, move.action, move.src, move.dst), []).append(move)
        return {way: (len(some), total_moves(some)) for way, some in found.items()}
    ways, dollars = moves.ways, moves.dollars
    # A rule may have the name of a watermark; both count as one then.
    number_of = np.array([ways.rules.index(name) for name in ways.rules], np.int64)
    code = ((number_of[ways.rule] * 256 + ways.action) * 256 + ways.src) * 256 + ways.dst
    _, first, number, count = np.unique(code, return_index=True, return_inverse=True, return_counts=True)
    once, saving = (np.bincount(number, column, len(first)).tolist() for column in (dollars.once, dollars.saving_month))
    n_bytes = np.zeros(len(first), np.int64)
    np.add.at(n_bytes, number, moves.n_bytes)
    found_by_way: dict[tuple[str, str, str, str | None], tuple[int, Sums]] = {}
    for i in np.argsort(first).tolist():
        _, _, action, src, dst, rule, _ = next(moves.named(int(first[i]), int(first[i]) + 1))
        found_by_way[rule, action, src, dst] = int(count[i]), Sums(int(n_bytes[i]), once[i], saving[i])
    return found_by_way


def paths_of(moves: Sequence[Move], kind: int) -> pa.Array:
    """Return the paths of the moves of one kind (FILE, SHARD or CHECKPOINT)."""
    if isinstance(moves, MoveTable):
        return moves.paths_of(kind)
    return pa.array([move.path for move in moves if move.kind == KINDS[kind]], pa.large_string())


def _named(
    ways: MoveColumns, paths: pa.Array, kind: NDArray[np.uint8], tiers: tuple[str, ...], part: tuple[int, int]
) -> Iterator[Named]:
    group = ways.group[slice(*part)]
    texts = paths.take(pa.array(group)).to_pylist()
    return ((path, *words) for path, words in zip(texts, ways.worded(kind[group], tiers, part), strict=True))


def _content(texts: pa.Array) -> Iterator[bytes | memoryview]:
    """Yield bytes that identify the texts: the validity of each, the lengths, and all bytes."""
    whole = texts.fill_null("").cast(pa.large_string())
    yield np.asarray(texts.is_valid().to_numpy(zero_copy_only=False), np.bool_).tobytes()
    _, offsets, data = whole.buffers()
    if len(whole):
        ends = np.frombuffer(offsets, np.int64)[whole.offset : whole.offset + len(whole) + 1]
        yield np.diff(ends).tobytes()
        if data is not None:
            yield memoryview(data)[int(ends[0]) : int(ends[-1])]
