"""Plans: the exact moves of a run, with every object, made from decisions and kept in a file.

Moves and refusals of a new plan stay columns, whose elements are created on access: a million moves take 50 MB, and ten
times as much as objects. A plan file has one JSON object per line, see docs/reference/tiers.md. The mover must execute
exactly the plan that people have reviewed: the last line has the SHA-256 of all lines before it, so that a truncated or
changed file is rejected.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from tiercache.prices import Prices, month_dollars
from tiercache.store.local import NewFile, open_folder, write_all
from tiercache.tier.inventory import Inventory
from tiercache.tier.journal import PlannedObject
from tiercache.tier.listing import ObjectTable, copies_at
from tiercache.tier.rules import RuleFile
from tiercache.tier.snapshot import (
    ACTIONS,
    COPY,
    DELETE,
    DROP,
    KINDS,
    MOVE,
    RECLASS,
    Action,
    Decisions,
    ExceededLimit,
    Kind,
    MoveColumns,
    Snapshot,
)


@dataclass(frozen=True, slots=True)
class Move:
    """A move of a plan, with names and with every object of the copy in src, completing objects last."""

    number: int  # within the plan
    path: str
    kind: Kind
    action: Action
    src: str
    dst: str | None  # None: delete
    rule: str  # name of the rule, or of the watermark
    reason: str
    objects: tuple[PlannedObject, ...]
    cost: float = 0.0  # one-time cost in US dollars: requests, retrieval, egress and early-deletion fee
    saving_month: float = 0.0  # US dollars of storage saved per month; negative: the move makes storage dearer

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.objects)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A move that a rule proposes and that is not planned, with the reason. n_bytes: Size of the copy in src."""

    path: str
    kind: Kind
    action: Action
    src: str
    dst: str | None
    rule: str
    reason: str
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PlannedTier:
    """A tier as it was when the plan was made: `tier apply` stops if the rule file has changed it since."""

    name: str
    url: str
    storage_class: str | None = None
    prices: str = ""


@dataclass(frozen=True, slots=True)
class TierTotals:
    n_bytes: int = 0
    n_objects: int = 0
    dollars_month: float = 0.0


@dataclass(frozen=True, slots=True)
class PlanTotals:
    n_bytes: int = 0
    cost: float = 0.0
    saving_month: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The exact moves to execute. docs/reference/tiers.md describes the plan file."""

    id: str  # computed from the content
    made_s: float  # time of the snapshot, in seconds since the epoch
    rules: str  # path of the rule file
    rules_sha256: str  # of the rule file, in hex
    tiers: tuple[PlannedTier, ...]  # those of the rule file
    moves: Sequence[Move]  # in execution order
    refusals: Sequence[Refusal] = ()
    totals: PlanTotals = field(default_factory=PlanTotals)
    before: Mapping[str, TierTotals] = field(default_factory=dict)  # by name of the tier
    after: Mapping[str, TierTotals] = field(default_factory=dict)
    exceeded: tuple[ExceededLimit, ...] = ()  # rules whose deletions a person must confirm


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
        return tuple(self[row] for row in rows)

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), ROWS_PER_PART):
            yield from self.create(start, min(start + ROWS_PER_PART, len(self)))

    def __len__(self) -> int:
        return len(self.columns)

    def heads(self, start: int, end: int) -> Iterator[tuple[str, Kind, Action, str, str | None, str, str]]:
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
            PlannedTier(tier.name, tier.url, tier.storage_class, "" if price is None else price.name)
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
        sizes = snapshot.sizes(copies[tiers == tier])
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


FORMAT, VERSION = "tiercache-plan", 1

_WRITE_BYTES = 1 << 20
_PLAN, _MOVE, _REFUSAL = TypeAdapter(Plan), TypeAdapter(Move), TypeAdapter(Refusal)
HEAD = ("path", "kind", "action", "src", "dst", "rule", "reason")


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a file, atomically. Raises ValueError if it has a figure that JSON cannot represent."""
    with open_folder(path.absolute().parent, [], make=True) as folder_fd:
        new = NewFile(folder_fd)
        try:
            at, some, digest = 0, bytearray(), hashlib.sha256()
            for row in _rows(plan):
                some += _line(row)
                if len(some) >= _WRITE_BYTES:
                    digest.update(some)
                    write_all(new.fd, memoryview(some), at)
                    at, some = at + len(some), bytearray()
            digest.update(some)
            some += _line({"line": "end", "sha256": digest.hexdigest()})
            write_all(new.fd, memoryview(some), at)
            new.set_name(path.name)
        finally:
            new.close()


def _rows(plan: Plan) -> Iterator[dict[str, Any]]:
    yield {"format": FORMAT, "version": VERSION, **asdict(replace(plan, moves=(), refusals=()))}
    for move in plan.moves:
        figures = {"cost": move.cost, "saving_month": move.saving_month}
        row = {"line": "move", "number": move.number, **{name: getattr(move, name) for name in HEAD}, **figures}
        yield row | {"objects": [one[:5] for one in move.objects]}
    for refusal in plan.refusals:
        yield {"line": "refused", **{name: getattr(refusal, name) for name in HEAD}, "n_bytes": refusal.n_bytes}


def _line(row: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(row, allow_nan=False)}\n".encode()


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises ValueError, with the line, if it is not a whole and unchanged plan of this version."""
    moves: list[Move] = []
    refusals: list[Refusal] = []
    number = 1
    with path.open("rb") as lines:
        try:
            first = next(lines, b"")
            plan, digest, is_whole = _plan(_parsed(first)), hashlib.sha256(first), False
            for raw in lines:
                number += 1
                row = _parsed(raw)
                if is_whole:
                    raise ValueError("expected the line with the checksum to be the last one")
                kind = row.pop("line", None)
                if kind == "end":
                    is_whole = True
                    if row.get("sha256") != digest.hexdigest():
                        raise ValueError(f"the lines have SHA-256 {digest.hexdigest()}, and this one says {row}")
                elif kind == "move":
                    moves.append(_MOVE.validate_python(row))
                else:
                    refusals.append(_REFUSAL.validate_python(row))
                digest.update(raw)
            if not is_whole:
                raise ValueError("the last line, with the checksum, is missing")
        except ValidationError as error:
            one = error.errors(include_url=False)[0]
            what = f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {repr(one['input'])[:60]}"
            raise ValueError(f"{path}: line {number}: {what}: the plan was changed; make a new one") from error
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}: the plan was cut or changed; make a new one") from error
    return replace(plan, moves=tuple(moves), refusals=tuple(refusals))


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {raw[:60]!r}")
    return row


def _plan(row: dict[str, Any]) -> Plan:
    if row.pop("format", None) != FORMAT:
        raise ValueError("this is not a plan")
    if (version := row.pop("version", None)) != VERSION:
        raise ValueError(f"expected a plan of version {VERSION}, got {version!r}")
    return _PLAN.validate_python(row)
