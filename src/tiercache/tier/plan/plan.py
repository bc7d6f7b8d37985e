"""Makes a plan from decisions, and reads and writes its file. docs/reference/tiers.md describes the keys of the file.

The mover must execute exactly the plan that people have reviewed: the last line contains the SHA-256 of all lines
before it, so that a truncated or changed file is rejected. Lines are formatted from columns by Arrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.model import OWN_FOLDER
from tiercache.store.contract import check_key
from tiercache.store.posix import UnpublishedFile, open_folder, write_all
from tiercache.tier.costs import Sizes, month_dollars
from tiercache.tier.inventory.groups import copies_at
from tiercache.tier.inventory.listing import NO_CRC
from tiercache.tier.model import (
    COPY,
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
    Refusal,
    Snapshot,
    TierTotals,
)
from tiercache.tier.plan.tables import MoveTable, PlanTable, RefusalTable, total_moves

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.inventory.groups import Inventory
    from tiercache.tier.rules import RuleFile


HEAD_KEYS = ("kind", "action", "src", "dst", "rule", "reason")

# Characters that json.dumps() escapes by number: all except printable ASCII.
_ESCAPED = "[^ -~]"
_MOST_HEADS = 10_000
_LARGE = pa.large_string()


def _move_blocks(moves: MoveTable) -> Iterator[memoryview]:
    """Yield blocks of whole lines, with line ends; the caller owns each block."""
    heads = _Heads()
    for start, end in moves.parts():
        yield _bytes(_move_lines(moves, start, end, heads))


def _refusal_blocks(refusals: RefusalTable) -> Iterator[memoryview]:
    """Yield blocks of whole lines, with line ends; the caller owns each block."""
    heads = _Heads()
    for start, end in refusals.parts():
        lines = _joined(
            '{"line": "refused", "path": ',
            _quoted(refusals.path(start, end)),
            heads.column(refusals, start, end),
            ', "n_bytes": ',
            _numbers(refusals.n_bytes[start:end]),
            "}\n",
        )
        yield _bytes(lines)


def _move_lines(moves: MoveTable, start: int, end: int, heads: _Heads) -> pa.Array:
    part, starts, days = slice(start, end), moves.objects.start[start : end + 1], moves.break_even_days(start, end)
    objects = pa.LargeListArray.from_arrays(pa.array(starts - starts[0]), _objects(moves, start, end))
    return _joined(
        '{"line": "move", "id": ',
        _numbers(np.arange(start + 1, end + 1)),
        ', "path": ',
        _quoted(moves.path(start, end)),
        heads.column(moves, start, end),
        ', "n_objects": ',
        _numbers(np.diff(starts)),
        ', "n_bytes": ',
        _numbers(moves.n_bytes[part]),
        ', "cost": ',
        _numbers(moves.columns.once[part]),
        ', "saving_month": ',
        _numbers(moves.columns.saving_month[part]),
        ', "break_even_days": ',
        _numbers(days, days == np.inf),
        ', "seconds": ',
        _numbers(moves.seconds(start, end)),
        ', "objects": [',
        pc.binary_join(objects, pa.scalar(", ", _LARGE)),
        "]}\n",
    )


def _objects(moves: MoveTable, start: int, end: int) -> pa.Array:
    """Format the objects of moves from start to end, each as a JSON list."""
    pieces, part = moves.objects, slice(*moves.objects.start[[start, end]].tolist())
    row, crc32c = pieces.row[part], pieces.crc32c[part]
    modified_s = pieces.modified_s[row]
    return _joined(
        "[",
        _quoted(pieces.keys.take(pa.array(row))),
        ", ",
        _numbers(pieces.n_bytes[row]),
        ", ",
        _quoted(pieces.etags.take(pa.array(row))),
        ", ",
        _numbers(modified_s, np.isnan(modified_s)),
        ", ",
        _numbers(crc32c, crc32c == NO_CRC),
        "]",
    )


class _Heads(dict[tuple[Any, ...], str]):
    """Cache of the part of a line between path and figures, by the values of HEAD_KEYS, which many lines share."""

    def __missing__(self, values: tuple[Any, ...]) -> str:
        if len(self) > _MOST_HEADS:
            self.clear()
        found = self[values] = f", {json.dumps(dict(zip(HEAD_KEYS, values, strict=True)))[1:-1]}"
        return found

    def column(self, rows: PlanTable[Any], start: int, end: int) -> pa.Array:
        """Return the column for rows from start to end."""
        return pa.array([self[values] for values in rows.heads(start, end)], _LARGE)


def _joined(*columns: pa.Array | str) -> pa.Array:
    parts = [pa.scalar(column, _LARGE) if isinstance(column, str) else column for column in columns]
    return pc.binary_join_element_wise(*parts, pa.scalar("", _LARGE))


def _quoted(texts: pa.Array) -> pa.Array:
    """Format texts as JSON strings; null for missing texts."""
    texts = texts.cast(_LARGE)
    # Every ETag contains quotes, so quotes are escaped here and not in the slow path below.
    plain = pc.replace_substring(pc.replace_substring(texts, "\\", r"\\"), '"', r"\"")
    quoted = _joined('"', plain, '"').fill_null("null")
    escaped = pc.match_substring_regex(texts, _ESCAPED).fill_null(False)
    if not pc.any(escaped).as_py():
        return quoted
    instead = [json.dumps(text) for text in texts.filter(escaped).to_pylist()]
    return pc.replace_with_mask(quoted, escaped, pa.array(instead, _LARGE))


def _numbers(column: NDArray[Any], none: NDArray[np.bool_] | None = None) -> pa.Array:
    """Format finite numbers as JSON; null where `none` is true."""
    return pa.array(column, mask=none).cast(_LARGE).fill_null("null")


def _bytes(lines: pa.Array) -> memoryview:
    _, offsets, data = lines.buffers()
    ends = np.frombuffer(offsets, np.int64)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(data)[int(ends[0]) : int(ends[-1])]


FORMAT, VERSION = "tiercache-plan", 1

_WRITE_BYTES = 1 << 20
_TOO_LARGE = 1 << 63  # the journal stores int64
_TIER_KEYS = ("url", "role", "storage_class", "prices")
_MOVE_KEYS = ("path", *HEAD_KEYS)
_REFUSAL_KEYS = (*_MOVE_KEYS, "n_bytes")
_HOLDING_KEYS = ("n_bytes", "n_objects", "dollars_month")
_OBJECT_KEYS = ("key", "n_bytes", "etag", "modified_s", "crc32c")

T = TypeVar("T")

# -- writing ---------------------------------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan's file, without line ends."""
    for block in _blocks(plan):
        yield from bytes(block).decode().splitlines()


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a file, which replaces an existing file atomically. Raises OSError."""
    with open_folder(path.absolute().parent, [], make=True) as folder_fd:
        new = UnpublishedFile(folder_fd)
        try:
            at, some = 0, bytearray()
            for block in _blocks(plan):
                some += block
                if len(some) >= _WRITE_BYTES:
                    write_all(new.fd, memoryview(some), at)
                    at, some = at + len(some), bytearray()
            write_all(new.fd, memoryview(some), at)
            new.publish(path.name)
        finally:
            new.close()


def _blocks(plan: Plan) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the file, in blocks of whole lines."""
    digest = hashlib.sha256()
    for block in chain([_line(_header(plan))], _lines_of_moves(plan.moves), _lines_of_refusals(plan.refusals)):
        digest.update(block)
        yield block
    yield _line({**_summary(plan), "sha256": digest.hexdigest()})


def _line(row: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(row, allow_nan=False)}\n".encode()


def _header(plan: Plan) -> dict[str, Any]:
    tiers = {tier.name: {key: getattr(tier, key) for key in _TIER_KEYS} for tier in plan.tiers}
    made = datetime.fromtimestamp(plan.made_s, UTC).isoformat(timespec="milliseconds")
    return {"format": FORMAT, "version": VERSION, "id": plan.id, "made": made} | {
        "rules": plan.rules,
        "rules_sha256": plan.rules_sha256,
        "tiers": tiers,
    }


def _lines_of_moves(moves: Sequence[Move]) -> Iterator[bytes | memoryview]:
    # Figures that JSON cannot represent take the slow path, where json.dumps() raises for them.
    if isinstance(moves, MoveTable) and moves.is_finite():
        return _move_blocks(moves)
    return (_line(_move_row(move)) for move in moves)


def _lines_of_refusals(refusals: Sequence[Refusal]) -> Iterator[bytes | memoryview]:
    if isinstance(refusals, RefusalTable):
        return _refusal_blocks(refusals)
    return (_line(_refusal_row(one)) for one in refusals)


def _refusal_row(one: Refusal) -> dict[str, Any]:
    return {"line": "refused"} | {key: getattr(one, key) for key in _REFUSAL_KEYS}


def _move_row(move: Move) -> dict[str, Any]:
    return {
        "line": "move",
        "id": move.number,
        **{key: getattr(move, key) for key in _MOVE_KEYS},
        "n_objects": len(move.objects),
        "n_bytes": move.n_bytes,
        "cost": move.money.once,
        "saving_month": move.money.saving_month,
        "break_even_days": move.money.break_even_days,
        "seconds": move.seconds,
        "objects": [[one.key, one.n_bytes, one.etag, one.modified_s, one.crc32c] for one in move.objects],
    }


def _summary(plan: Plan) -> dict[str, Any]:
    def held(by_tier: Mapping[str, TierTotals]) -> dict[str, Any]:
        return {name: {key: getattr(one, key) for key in _HOLDING_KEYS} for name, one in by_tier.items()}

    sums_of = total_moves(plan.moves)
    return {
        "line": "summary",
        "before": held(plan.before),
        "after": held(plan.after),
        "n_moves": len(plan.moves),
        "n_bytes": sums_of.n_bytes,
        "cost": sums_of.once,
        "saving_month": sums_of.saving_month,
    }


# -- reading ---------------------------------------------------------------------------------------------------------


def read_plan(path: Path) -> Plan:
    """Read the plan from a file.

    Raises:
        ValueError: The file is not a plan, has another version, was truncated or changed, or has an invalid line. The
            message contains the line, what was expected and what was found.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return _Reader(path).plan(file)


class _Reader:
    """Reads the lines of one file. number: Number of the current line."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0

    def plan(self, lines: Iterator[bytes]) -> Plan:
        first = next(lines, b"")
        header, digest = self.header(first), hashlib.sha256(first)
        moves: list[Move] = []
        refusals: list[Refusal] = []
        for raw in lines:
            row = self.row(raw)
            what = row.get("line")
            if what == "summary":
                return self.whole(header, moves, refusals, (row, digest.hexdigest(), next(lines, b"")))
            digest.update(raw)
            if what == "move":
                moves.append(self.move(row))
            elif what == "refused":
                refusals.append(self.refusal(row))
            else:
                raise self.wrong(f'expected "line" to be "move", "refused" or "summary", got {what!r}')
        raise ValueError(
            f"{self.path}: the plan ends at line {self.number} without its summary: it was cut; make a new plan"
        )

    def header(self, raw: bytes) -> Mapping[str, Any]:
        row = self.row(raw)
        if row.get("format") != FORMAT:
            raise self.wrong(f'expected "format": "{FORMAT}", got {row.get("format")!r}: this is not a plan')
        if row.get("version") != VERSION:
            raise self.wrong(f"expected a plan of version {VERSION}, got {row.get('version')!r}: make a new plan")
        return row

    def whole(
        self,
        header: Mapping[str, Any],
        moves: Sequence[Move],
        refusals: Sequence[Refusal],
        end: tuple[Mapping[str, Any], str, bytes],
    ) -> Plan:
        row, sha256, more = end
        if more:
            raise self.wrong("expected the summary to be the last line: the plan was changed; make a new plan")
        if row.get("sha256") != sha256:
            found = f"its lines have SHA-256 {sha256}, and its summary says {row.get('sha256')!r}"
            raise ValueError(f"{self.path}: the plan was changed since it was made: {found}; make a new plan")
        if self.field(row, "n_moves", int) != len(moves) or len({move.number for move in moves}) != len(moves):
            raise self.wrong(f"expected {row['n_moves']} moves with a number each, got {len(moves)}")
        return Plan(
            id=self.field(header, "id", str),
            made_s=self.made(header),
            rules=self.field(header, "rules", str),
            rules_sha256=self.field(header, "rules_sha256", str),
            tiers=tuple(self.tiers(header)),
            moves=tuple(moves),
            refusals=tuple(refusals),
            before=self.held(row, "before"),
            after=self.held(row, "after"),
        )

    def row(self, raw: bytes) -> Mapping[str, Any]:
        self.number += 1
        try:
            row = json.loads(raw, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise self.wrong(
                f"expected a JSON object, got {raw[:60]!r}: it was cut or changed; make a new plan"
            ) from error
        return self.table(row)

    def table(self, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(f"expected a JSON object, got {repr(value)[:60]}")
        return value

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: line {self.number}: {what}")

    def field(self, row: Mapping[str, Any], key: str, kind: type[T]) -> T:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, (float, int) if kind is float else kind):
            raise self.wrong(f"{key}: expected {kind.__name__}, got {value!r}")
        if isinstance(value, int) and kind is int and not 0 <= value < _TOO_LARGE:
            raise self.wrong(f"{key}: expected an integer from 0 to 2^63 - 1, got {value}")
        try:
            return kind(value)  # type: ignore[call-arg]
        except OverflowError as error:
            raise self.wrong(f"{key}: expected {kind.__name__}, got a number that is too large") from error

    def maybe(self, row: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
        return None if row.get(key) is None else self.field(row, key, kind)

    def one_of(self, row: Mapping[str, Any], key: str, values: Sequence[Any]) -> Any:
        if row.get(key) not in values:
            raise self.wrong(f"{key}: expected one of {', '.join(values)}, got {row.get(key)!r}")
        return row[key]

    def made(self, header: Mapping[str, Any]) -> float:
        text = self.field(header, "made", str)
        try:
            return datetime.fromisoformat(text).timestamp()
        except ValueError as error:
            raise self.wrong(f"made: expected a time such as 2027-01-31T12:00:00.000+00:00, got {text!r}") from error

    def tiers(self, header: Mapping[str, Any]) -> Iterator[PlannedTier]:
        for name, given in self.field(header, "tiers", dict).items():
            row = self.table(given)
            role, url = self.field(row, "role", str), self.field(row, "url", str)
            yield PlannedTier(name, role, url, self.maybe(row, "storage_class", str), self.field(row, "prices", str))

    def held(self, row: Mapping[str, Any], key: str) -> dict[str, TierTotals]:
        return {name: self.holding(self.table(one)) for name, one in self.field(row, key, dict).items()}

    def holding(self, row: Mapping[str, Any]) -> TierTotals:
        n_bytes, n_objects = (self.field(row, key, int) for key in ("n_bytes", "n_objects"))
        return TierTotals(n_bytes, n_objects, self.field(row, "dollars_month", float))

    def way(self, row: Mapping[str, Any]) -> tuple[str, Kind, Action, str, str | None]:
        kind, action = self.one_of(row, "kind", KINDS), self.one_of(row, "action", get_args(Action))
        dst = self.maybe(row, "dst", str)
        if (dst is None) != (action == "delete"):
            raise self.wrong(f"dst: expected a tier, or null for a delete, got {dst!r} for a {action}")
        return self.key("path", self.field(row, "path", str)), kind, action, self.field(row, "src", str), dst

    def key(self, where: str, text: str) -> str:
        """Return the text as a key of a tier.

        Raises ValueError for tiercache's own keys, and for text that UTF-8 cannot encode.
        """
        try:
            text.encode()
            if OWN_FOLDER in f"{text}/":
                raise ValueError(f"{text!r} belongs to tiercache itself and is never moved")
            return check_key(text)
        except ValueError as error:
            raise self.wrong(f"{where}: {error}") from error

    def move(self, row: Mapping[str, Any]) -> Move:
        move = Move(
            self.field(row, "id", int),
            *self.way(row),
            rule=self.field(row, "rule", str),
            reason=self.field(row, "reason", str),
            objects=tuple(self.object(one) for one in self.field(row, "objects", list)),
            money=MoveCost(
                self.field(row, "cost", float),
                self.field(row, "saving_month", float),
                self.maybe(row, "break_even_days", float),
            ),
            seconds=self.field(row, "seconds", float),
        )
        if (len(move.objects), move.n_bytes) != (row.get("n_objects"), row.get("n_bytes")):
            said = f"{row.get('n_objects')} objects of {row.get('n_bytes')} bytes"
            raise self.wrong(f"objects: expected {said}, got {len(move.objects)} of {move.n_bytes}")
        for one in move.objects:
            if one.key != move.path and not one.key.startswith(f"{move.path}/"):
                raise self.wrong(f"objects: expected {move.path} or a key below it, got {one.key}")
        return move

    def object(self, values: object) -> PlannedObject:
        if not isinstance(values, list) or len(values) != len(_OBJECT_KEYS):
            raise self.wrong(f"objects: expected [key, n_bytes, etag, modified_s, crc32c], got {values!r}")
        named = dict(zip(_OBJECT_KEYS, values, strict=True))
        return PlannedObject(
            self.key("objects", self.field(named, "key", str)),
            self.field(named, "n_bytes", int),
            self.maybe(named, "etag", str),
            self.maybe(named, "modified_s", float),
            self.maybe(named, "crc32c", int),
        )

    def refusal(self, row: Mapping[str, Any]) -> Refusal:
        texts = self.field(row, "rule", str), self.field(row, "reason", str)
        return Refusal(*self.way(row), *texts, n_bytes=self.field(row, "n_bytes", int))


def _no_number(name: str) -> NoReturn:
    """Reject NaN and infinity, which Python's parser accepts and JSON does not have."""
    raise ValueError(f"{name} is not a number in JSON")


__all__ = ["holdings", "make_plan", "plan_lines", "read_plan", "write_plan"]

# For the estimated duration of a move only, which people read; one machine and its network.
_BYTES_A_SECOND = 200e6


def make_plan(decisions: Decisions, inventory: Inventory, file: RuleFile, prices: Sequence[Prices | None]) -> Plan:
    """Return the plan for decisions about an inventory. Deterministic: the id is computed from the content.

    Moves and refusals stay columns, whose elements are created on access; the plan keeps the inventory's listing alive.
    """
    snapshot, moves, refusals = inventory.snapshot, decisions.moves, decisions.refusals
    of_groups = {"paths": snapshot.paths, "kind": snapshot.kind, "tiers": snapshot.tiers}
    pieces = inventory.pieces(moves.group, moves.src)
    rate_bytes_s = min(_BYTES_A_SECOND, file.tiering.rate_bytes_s or _BYTES_A_SECOND)
    table = MoveTable(
        moves,
        decisions.rules,
        pieces.bytes_of_copies(),
        **of_groups,
        objects=pieces,
        rate_bytes_s=rate_bytes_s,
    )
    at = copies_at(snapshot.group, snapshot.tier, refusals.group, refusals.src)
    refused_bytes = np.where(at < 0, 0, np.append(snapshot.n_bytes, 0)[at])
    made_s = round(snapshot.now_s, 3)
    return Plan(
        id=_id(made_s, file.sha256, table),
        made_s=made_s,
        rules=str(file.path),
        rules_sha256=file.sha256,
        tiers=tuple(
            PlannedTier(tier.name, tier.role, tier.url, tier.storage_class, "" if price is None else price.name)
            for tier, price in zip(file.tiers, prices, strict=True)
        ),
        moves=table,
        refusals=RefusalTable(refusals, decisions.rules, refused_bytes, **of_groups),
        before=holdings(snapshot, prices),
        after=holdings(snapshot, prices, decisions),
    )


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


def _afterwards(snapshot: Snapshot, moves: MoveColumns) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return the copies after the moves, and the tier of each. A new copy has the properties of its source."""
    at = np.full((len(snapshot.tiers), snapshot.n_groups), -1, np.int32)
    at[snapshot.tier, snapshot.group] = np.arange(snapshot.n_copies, dtype=np.int32)
    groups, src, dst = moves.group, moves.src, moves.dst
    brings = np.isin(moves.action, (COPY, MOVE, RECLASS))
    takes = np.isin(moves.action, (MOVE, RECLASS, DROP))
    at[dst[brings], groups[brings]] = at[src[brings], groups[brings]]
    at[src[takes], groups[takes]] = -1
    at[:, groups[~brings & ~takes]] = -1
    tiers, rows = np.nonzero(at >= 0)
    return at[tiers, rows].astype(np.int64), tiers.astype(np.int8)
