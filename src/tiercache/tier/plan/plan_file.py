"""Writes and reads the file of a plan, one JSON object per line. docs/reference/tiers.md describes the keys.

The mover must execute exactly the plan that people have reviewed: the last line contains the SHA-256 of all lines
before it, so that a truncated or changed file is rejected. Lines are formatted from columns by Arrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tiercache.model import OWN_FOLDER
from tiercache.store.contract import check_key
from tiercache.store.posix import UnpublishedFile, open_folder, write_all
from tiercache.tier.inventory.listing import NO_CRC
from tiercache.tier.model import (
    Action,
    ExceededLimit,
    Kind,
    Move,
    MoveCost,
    Plan,
    PlannedObject,
    PlannedTier,
    PlanTotals,
    Refusal,
    TierTotals,
)
from tiercache.tier.plan.plan import MoveTable, PlanTable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FORMAT, VERSION = "tiercache-plan", 1

_WRITE_BYTES = 1 << 20
# Characters that json.dumps() escapes by number: all except printable ASCII.
_ESCAPED = "[^ -~]"
_LARGE = pa.large_string()

# -- writing ---------------------------------------------------------------------------------------------------------


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan of make_plan() to a file, which replaces an existing file atomically.

    Raises ValueError if the plan has a figure that JSON cannot represent, and OSError.
    """
    with open_folder(path.absolute().parent, [], make=True) as folder_fd:
        new = UnpublishedFile(folder_fd)
        try:
            at, some = 0, bytearray()
            for block in plan_blocks(plan):
                some += block
                if len(some) >= _WRITE_BYTES:
                    write_all(new.fd, memoryview(some), at)
                    at, some = at + len(some), bytearray()
            write_all(new.fd, memoryview(some), at)
            new.publish(path.name)
        finally:
            new.close()


def plan_blocks(plan: Plan) -> Iterator[ReadableBuffer]:
    """Yield the bytes of the file of a plan of make_plan(), in blocks of whole lines."""
    digest = hashlib.sha256()
    for block in _blocks_before_summary(plan):
        digest.update(block)
        yield block
    summary = {
        "line": "summary",
        "before": {name: asdict(of) for name, of in plan.before.items()},
        "after": {name: asdict(of) for name, of in plan.after.items()},
        "n_moves": len(plan.moves),
        **asdict(plan.totals),
        **({"exceeded": [asdict(one) for one in plan.exceeded]} if plan.exceeded else {}),
        "sha256": digest.hexdigest(),
    }
    yield _line(summary)


def _blocks_before_summary(plan: Plan) -> Iterator[ReadableBuffer]:
    tiers = {tier.name: {k: v for k, v in asdict(tier).items() if k != "name"} for tier in plan.tiers}
    made = datetime.fromtimestamp(plan.made_s, UTC).isoformat(timespec="milliseconds")
    header = {"format": FORMAT, "version": VERSION, "id": plan.id, "made": made, "rules": plan.rules}
    yield _line(header | {"rules_sha256": plan.rules_sha256, "tiers": tiers})
    moves, refusals = plan.moves, plan.refusals
    if not isinstance(moves, MoveTable) or not isinstance(refusals, PlanTable):
        raise TypeError("only a plan of make_plan() can be written")
    for start, end in moves.parts():
        yield _bytes(_move_lines(moves, start, end))
    for start, end in refusals.parts():
        head, n_bytes = _head("refused", refusals, start, end), _numbers(refusals.n_bytes[start:end])
        yield _bytes(_joined(*head, ', "n_bytes": ', n_bytes, "}\n"))


def _line(row: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(row, allow_nan=False)}\n".encode()


def _move_lines(moves: MoveTable, start: int, end: int) -> pa.Array:
    part, starts, days = slice(start, end), moves.objects.start[start : end + 1], moves.break_even_days(start, end)
    objects = pa.LargeListArray.from_arrays(pa.array(starts - starts[0]), _objects(moves, start, end))
    columns = {
        "id": _numbers(np.arange(start + 1, end + 1)),
        "n_objects": _numbers(np.diff(starts)),
        "n_bytes": _numbers(moves.n_bytes[part]),
        "cost": _numbers(moves.columns.once[part]),
        "saving_month": _numbers(moves.columns.saving_month[part]),
        "break_even_days": _numbers(days, days == np.inf),
        "seconds": _numbers(moves.seconds(start, end)),
        "objects": _joined("[", pc.binary_join(objects, pa.scalar(", ", _LARGE)), "]"),
    }
    named = [text for name, column in columns.items() for text in (f', "{name}": ', column)]
    return _joined(*_head("move", moves, start, end), *named, "}\n")


def _head(kind_of_line: str, rows: PlanTable[Any], start: int, end: int) -> list[pa.Array | str]:
    """Return the columns and texts of the first part of lines, which moves and refusals share."""
    named = rows.columns_with_names(start, end).items()
    texts = (text for name, column in named for text in (f', "{name}": ', _quoted(column)))
    return [f'{{"line": "{kind_of_line}"', *texts]


def _objects(moves: MoveTable, start: int, end: int) -> pa.Array:
    """Format the objects of moves from start to end, each as a JSON list."""
    table, part = moves.objects, slice(*moves.objects.start[[start, end]].tolist())
    row, crc32c = table.row[part], table.crc32c[part]
    modified_s = table.modified_s[row]
    return _joined(
        "[",
        _quoted(table.keys.take(pa.array(row))),
        ", ",
        _numbers(table.n_bytes[row]),
        ", ",
        _quoted(table.etags.take(pa.array(row))),
        ", ",
        _numbers(modified_s, np.isnan(modified_s)),
        ", ",
        _numbers(crc32c, crc32c == NO_CRC),
        "]",
    )


def _joined(*columns: pa.Array | str) -> pa.Array:
    parts = [pa.scalar(column, _LARGE) if isinstance(column, str) else column for column in columns]
    return pc.binary_join_element_wise(*parts, pa.scalar("", _LARGE))


def _quoted(texts: pa.Array) -> pa.Array:
    """Format texts as JSON strings; null for missing texts."""
    if pa.types.is_dictionary(texts.type):
        return _quoted(texts.dictionary).take(texts.indices)
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
    """Format numbers as JSON; null where `none` is true. Raises ValueError for a number that is not finite."""
    if not np.isfinite(column if none is None else column[~none]).all():
        raise ValueError("a figure of the plan is infinite or no number, which JSON cannot represent")
    return pa.array(column, mask=none).cast(_LARGE).fill_null("null")


def _bytes(lines: pa.Array) -> memoryview:
    _, offsets, data = lines.buffers()
    ends = np.frombuffer(offsets, np.int64)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(data)[int(ends[0]) : int(ends[-1])]


# -- reading ---------------------------------------------------------------------------------------------------------


def _tier_key(text: str) -> str:
    if OWN_FOLDER in f"{text}/":
        raise ValueError(f"{text!r} belongs to tiercache itself and is never moved")
    return check_key(text)


Count = Annotated[int, Field(ge=0, lt=1 << 63)]  # the journal stores int64
Key = Annotated[str, AfterValidator(_tier_key)]


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Start(_Line):
    format: Any = None
    version: Any = None


class _TierLine(_Line):
    role: str
    url: str
    storage_class: str | None
    prices: str


class _Header(_Line):
    id: str
    made: datetime
    rules: str
    rules_sha256: str
    tiers: dict[str, _TierLine]


class _RefusedLine(_Line):
    line: Literal["refused"]
    path: Key
    kind: Kind
    action: Action
    src: str
    dst: str | None
    rule: str
    reason: str
    n_bytes: Count

    def head(self) -> tuple[str, Kind, Action, str, str | None, str, str]:
        if (self.dst is None) != (self.action == "delete"):
            expected = f"expected a tier, or null for a delete, got {self.dst!r} for a {self.action}"
            raise ValueError(f"dst: {expected}")
        return self.path, self.kind, self.action, self.src, self.dst, self.rule, self.reason

    def refusal(self) -> Refusal:
        return Refusal(*self.head(), self.n_bytes)


class _MoveLine(_RefusedLine):
    line: Literal["move"]  # type: ignore[assignment]
    id: Count
    n_objects: Count
    cost: float
    saving_month: float
    break_even_days: float | None
    seconds: float
    objects: list[tuple[Key, Count, str | None, float | None, Count | None]]

    def move(self) -> Move:
        objects = tuple(PlannedObject(*one) for one in self.objects)
        money = MoveCost(self.cost, self.saving_month, self.break_even_days)
        move = Move(self.id, *self.head(), objects, money, self.seconds)
        if (len(objects), move.n_bytes) != (self.n_objects, self.n_bytes):
            expected = f"{self.n_objects} objects of {self.n_bytes} bytes"
            raise ValueError(f"objects: expected {expected}, got {len(objects)} of {move.n_bytes}")
        for one in objects:
            if one.key != move.path and not one.key.startswith(f"{move.path}/"):
                raise ValueError(f"objects: expected {move.path} or a key below it, got {one.key}")
        return move


class _Summary(_Line):
    line: Literal["summary"]
    before: dict[str, TierTotals]
    after: dict[str, TierTotals]
    n_moves: Count
    n_bytes: Count
    cost: float
    saving_month: float
    exceeded: tuple[ExceededLimit, ...] = ()
    sha256: str


AnyLine = Annotated[_MoveLine | _RefusedLine | _Summary, Field(discriminator="line")]
_START, _HEADER = TypeAdapter(_Start), TypeAdapter(_Header)
_LINE: TypeAdapter[_MoveLine | _RefusedLine | _Summary] = TypeAdapter(AnyLine)

L = TypeVar("L")


def read_plan(path: Path) -> Plan:
    """Read the plan from a file.

    Raises ValueError if the file is not a plan, has another version, was truncated or changed, or has an invalid line;
    the message contains the line, what was expected and what was found. Raises OSError if the file cannot be read.
    """
    moves: list[Move] = []
    refusals: list[Refusal] = []
    number = 1
    with path.open("rb") as lines:
        try:
            first = next(lines, b"")
            header, digest = _header(first), hashlib.sha256(first)
            for raw in lines:
                number += 1
                line = _parsed(_LINE, raw)
                if isinstance(line, _Summary):
                    end = line
                    break
                digest.update(raw)
                if isinstance(line, _MoveLine):
                    moves.append(line.move())
                else:
                    refusals.append(line.refusal())
            else:
                raise ValueError("the plan ends here without its summary: it was cut; make a new plan")
            if next(lines, b""):
                raise ValueError("expected the summary to be the last line: the plan was changed; make a new plan")
            if end.sha256 != digest.hexdigest():
                found = f"its lines have SHA-256 {digest.hexdigest()}, and its summary says {end.sha256!r}"
                raise ValueError(f"the plan was changed since it was made: {found}; make a new plan")
            if end.n_moves != len(moves) or len({move.number for move in moves}) != len(moves):
                raise ValueError(f"expected {end.n_moves} moves with a number each, got {len(moves)}")
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
    return Plan(
        id=header.id,
        made_s=header.made.timestamp(),
        rules=header.rules,
        rules_sha256=header.rules_sha256,
        tiers=tuple(PlannedTier(name, **dict(tier)) for name, tier in header.tiers.items()),
        moves=tuple(moves),
        refusals=tuple(refusals),
        totals=PlanTotals(end.n_bytes, end.cost, end.saving_month),
        before=end.before,
        after=end.after,
        exceeded=end.exceeded,
    )


def _header(raw: bytes) -> _Header:
    start = _parsed(_START, raw)
    if start.format != FORMAT:
        raise ValueError(f'expected "format": "{FORMAT}", got {start.format!r}: this is not a plan')
    if start.version != VERSION:
        raise ValueError(f"expected a plan of version {VERSION}, got {start.version!r}: make a new plan")
    return _parsed(_HEADER, raw)


def _parsed(model: TypeAdapter[L], raw: bytes) -> L:
    """Parse a line. Raises ValueError, which names the key, what was expected and what was found."""
    try:
        return model.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            reason = f"expected a JSON object, got {raw[:60]!r}: it was cut or changed; make a new plan"
            raise ValueError(reason) from error
        keys = ".".join(str(key) for key in first["loc"] if key not in ("move", "refused", "summary"))
        text = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{keys}: {text}, got {repr(first['input'])[:60]}".removeprefix(": ")) from error


__all__ = ["plan_blocks", "read_plan", "write_plan"]
