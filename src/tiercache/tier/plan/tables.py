"""The moves and refusals of a plan over columns: a million moves take 50 MB, and ten times as much as objects.

An object is created for a row only on access.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import break_even_days
from tiercache.tier.inventory.listing import ObjectTable
from tiercache.tier.model import (
    ACTIONS,
    AT_A_TIME,
    COPY,
    KINDS,
    MOVE,
    Action,
    Kind,
    LazySequence,
    Move,
    MoveColumns,
    MoveCost,
    PlannedObject,
    Refusal,
)

FREE = MoveCost(break_even_days=0.0)
# For the estimated duration of a move only, which people read; assumes many objects in parallel.
_OBJECTS_A_SECOND = 100.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PlanTable(LazySequence[T], Generic[T]):
    """Rows of a plan.

    Attributes:
        columns: Columns of the rows.
        rules: Names of rules and watermarks, see Decisions.
        n_bytes: int64[n], size of each group's copy in src; 0: there is none.
        paths: Paths of all groups.
        kind: Kinds of all groups.
        tiers: Names of the tiers.
    """

    columns: MoveColumns
    rules: Sequence[str]
    n_bytes: NDArray[np.int64]
    paths: pa.Array
    kind: NDArray[np.uint8]
    tiers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.columns)

    def path(self, start: int, end: int) -> pa.Array:
        """Return the paths of rows from start to end."""
        return self.paths.take(pa.array(self.columns.group[start:end]))

    def heads(self, start: int, end: int) -> Iterator[tuple[Kind, Action, str, str | None, str, str]]:
        """Yield (kind, action, src, dst, rule, reason) of each row from start to end, with names."""
        part, names = slice(start, end), (*self.tiers, None)  # dst -1 (none) indexes the last entry
        return zip(
            [KINDS[number] for number in self.kind[self.columns.group[part]].tolist()],
            [ACTIONS[number] for number in self.columns.action[part].tolist()],
            [self.tiers[tier] for tier in self.columns.src[part].tolist()],
            [names[tier] for tier in self.columns.dst[part].tolist()],
            [self.rules[rule] for rule in self.columns.rule[part].tolist()],
            self.columns.reason[part].tolist(),
            strict=True,
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RefusalTable(PlanTable[Refusal]):
    """The refusals of a plan."""

    def create(self, start: int, end: int) -> Iterator[Refusal]:
        """See LazySequence.create()."""
        rows = zip(
            self.path(start, end).to_pylist(), self.heads(start, end), self.n_bytes[start:end].tolist(), strict=True
        )
        return (Refusal(path, *head, n_bytes) for path, head, n_bytes in rows)


class Sums(NamedTuple):
    """Totals of some moves: bytes, and costs in US dollars."""

    n_bytes: int
    once: float
    saving_month: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MoveTable(PlanTable[Move]):
    """The moves of a plan, numbered from 1.

    Attributes:
        objects: Objects of each move's copy in src.
        rate_bytes_s: Assumed copy rate, in bytes per second.
    """

    objects: ObjectTable
    rate_bytes_s: float

    def create(self, start: int, end: int) -> Iterator[Move]:
        """See LazySequence.create()."""
        objects, part = self.objects.named(start, end), slice(start, end)
        days = self.break_even_days(start, end).tolist()
        costs = zip(self.columns.once[part].tolist(), self.columns.saving_month[part].tolist(), days, strict=True)
        n_objects, seconds = np.diff(self.objects.start[start : end + 1]).tolist(), self.seconds(start, end).tolist()
        rows = zip(self.path(start, end).to_pylist(), self.heads(start, end), costs, n_objects, seconds, strict=True)
        for number, (path, head, (once, saving, day), n, one_s) in enumerate(rows, start=start + 1):
            money = MoveCost(once, saving, None if day == np.inf else day) if once or saving else FREE
            yield Move(number, path, *head, tuple(PlannedObject(*next(objects)) for _ in range(n)), money, one_s)

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
            most = np.searchsorted(self.objects.start, self.objects.start[start] + AT_A_TIME, side="right")
            end = max(start + 1, min(int(most) - 1, start + AT_A_TIME, len(self)))
            yield start, end
            start = end

    def is_finite(self) -> bool:
        """Whether all figures are finite or absent, so that JSON can represent them."""
        times = self.objects.modified_s[self.objects.row]
        finite = np.isfinite(self.columns.once).all() and np.isfinite(self.columns.saving_month).all()
        return bool(finite and not np.isinf(times).any())

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the moves and of the identity of their objects."""
        digest = hashlib.sha256()
        for start, end in self.parts():
            ways, rows = slice(start, end), slice(*self.objects.start[[start, end]].tolist())
            row = self.objects.row[rows]
            for texts in (
                self.path(start, end),
                self.objects.keys.take(pa.array(row)),
                self.objects.etags.take(pa.array(row)),
            ):
                for part in _content(texts):
                    digest.update(part)
            for column in (self.columns.action, self.columns.src, self.columns.dst, np.diff(self.objects.start)):
                digest.update(np.ascontiguousarray(column[ways]).data)
            digest.update(self.objects.n_bytes[row].data)
        return digest.hexdigest()


def total_moves(moves: Sequence[Move]) -> Sums:
    """Return the total bytes and costs of all moves."""
    if isinstance(moves, MoveTable):
        # Summed in order, so that the result equals the sum over the objects to the last digit.
        dollars = (sum(column.tolist()) for column in (moves.columns.once, moves.columns.saving_month))
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
    columns = moves.columns
    # A rule may have the name of a watermark; both count as one then.
    number_of = np.array([moves.rules.index(name) for name in moves.rules], np.int64)
    code = ((number_of[columns.rule] * 256 + columns.action) * 256 + columns.src) * 256 + columns.dst
    _, first, number, count = np.unique(code, return_index=True, return_inverse=True, return_counts=True)
    dollars = (np.bincount(number, c, len(first)).tolist() for c in (columns.once, columns.saving_month))
    once, saving = dollars
    n_bytes = np.zeros(len(first), np.int64)
    np.add.at(n_bytes, number, moves.n_bytes)
    found_by_way: dict[tuple[str, str, str, str | None], tuple[int, Sums]] = {}
    for i in np.argsort(first).tolist():
        _, action, src, dst, rule, _ = next(moves.heads(int(first[i]), int(first[i]) + 1))
        found_by_way[rule, action, src, dst] = int(count[i]), Sums(int(n_bytes[i]), once[i], saving[i])
    return found_by_way


def paths_of(moves: Sequence[Move], kind: int) -> pa.Array:
    """Return the paths of the moves of one kind (FILE, SHARD or CHECKPOINT)."""
    if isinstance(moves, MoveTable):
        group = moves.columns.group
        return moves.paths.take(pa.array(group[moves.kind[group] == kind]))
    return pa.array([move.path for move in moves if move.kind == KINDS[kind]], pa.large_string())


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
