"""Writes and reads the file of a plan, one JSON object per line. docs/reference/tiers.md describes the keys.

The mover must execute exactly the plan that people have reviewed: the last line contains the SHA-256 of all lines
before it, so that a truncated or changed file is rejected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tiercache.model import OWN_FOLDER
from tiercache.store.contract import check_key
from tiercache.store.local import NewFile, open_folder, write_all
from tiercache.tier.model import Move, Plan, Refusal

FORMAT, VERSION = "tiercache-plan", 1

_WRITE_BYTES = 1 << 20
_PLAN, _MOVE, _REFUSAL = TypeAdapter(Plan), TypeAdapter(Move), TypeAdapter(Refusal)
_HEAD = ("path", "kind", "action", "src", "dst", "rule", "reason")


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a file, which replaces an existing file atomically.

    Raises ValueError if the plan has a figure that JSON cannot represent, and OSError.
    """
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
        row = {"line": "move", "number": move.number, **{name: getattr(move, name) for name in _HEAD}, **figures}
        yield row | {"objects": [one[:5] for one in move.objects]}
    for refusal in plan.refusals:
        yield {"line": "refused", **{name: getattr(refusal, name) for name in _HEAD}, "n_bytes": refusal.n_bytes}


def _line(row: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(row, allow_nan=False)}\n".encode()


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
                    moves.append(_checked(_MOVE.validate_python(row)))
                else:
                    refusals.append(_checked(_REFUSAL.validate_python(row)))
                digest.update(raw)
            if not is_whole:
                raise ValueError("the last line, with the checksum, is missing")
            if sorted(move.number for move in moves) != list(range(1, len(moves) + 1)):
                raise ValueError(f"expected {len(moves)} moves with the numbers from 1")
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


def _checked(row: Any) -> Any:
    """Return a move or refusal. Raises ValueError for keys that no planner writes."""
    if (row.dst is None) != (row.action == "delete"):
        raise ValueError(f"dst: expected a tier, or null for a delete, got {row.dst!r} for a {row.action}")
    keys = [one.key for one in row.objects] if isinstance(row, Move) else []
    for key in (row.path, *keys):
        if OWN_FOLDER in f"{check_key(key)}/":
            raise ValueError(f"{key!r} belongs to tiercache itself and is never moved")
        if key != row.path and not key.startswith(f"{row.path}/"):
            raise ValueError(f"objects: expected {row.path} or a key below it, got {key}")
    if keys and not all(0 <= one.n_bytes < 1 << 63 for one in row.objects):  # the journal stores int64
        raise ValueError("objects: a size is negative or above 2^63")
    return row
