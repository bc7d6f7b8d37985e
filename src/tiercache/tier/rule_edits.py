"""Edits of a rule file: pins are appended as tables of their own, and removed. The rest of the text stays.

An edit is checked before it replaces the file: the new text must be a valid rule file that has exactly the intended
tables. The file is replaced atomically; a link to it stays a link.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tiercache.tier.rules import load_rule_file

Section: TypeAlias = Literal["pins"]

_SIGNS = re.compile(r"[*?\[{}]")
_TABLE = re.compile(r"^\s*\[")


def literal_glob(path: str) -> str:
    """Return the glob that matches exactly this path."""
    return _SIGNS.sub(lambda sign: f"[{sign[0]}]", path)


def add_tables(path: Path, section: Section, tables: Sequence[Mapping[str, object]]) -> None:
    """Append tables to a rule file.

    tables: Keys and values of each; a text, or a list of texts. Raises ValueError if the new file would not be valid.
    """
    text = path.read_text(encoding="utf-8")
    added = "".join(f"\n[[{section}]]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in one.items()) for one in tables)
    _replace(path, f"{text.rstrip()}\n{added}" if text.strip() else added.lstrip(), section, add=tables, remove=())


def remove_tables(path: Path, section: Section, tables: Sequence[Mapping[str, object]]) -> None:
    """Remove tables with exactly these keys and values from a rule file; each must be a `[[section]]` table.

    Raises ValueError if the new file would not be valid, or if a table cannot be found in the text.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    left = [dict(one) for one in tables]
    starts = [i for i, line in enumerate(lines) if _TABLE.match(line)] + [len(lines)]
    kept = lines[: starts[0]]
    for start, end in pairwise(starts):
        block, table = lines[start:end], None
        with suppress(tomllib.TOMLDecodeError):  # a bracket inside a longer value is no table
            table = tomllib.loads("".join(block)).get(section)
        if isinstance(table, list) and len(table) == 1 and table[0] in left:
            left.remove(table[0])
            # A comment at the end of the block belongs to the next table.
            at = len(block)
            while at > 0 and (not block[at - 1].strip() or block[at - 1].lstrip().startswith("#")):
                at -= 1
            kept += block[at:]
        else:
            kept += block
    if left:
        raise ValueError(f"{path}: no [[{section}]] table with {_shown(left[0])} was found: remove it by hand")
    _replace(path, "".join(kept), section, add=(), remove=tables)


def _replace(
    path: Path,
    text: str,
    section: Section,
    *,
    add: Sequence[Mapping[str, object]],
    remove: Sequence[Mapping[str, object]],
) -> None:
    """Replace the file by the text, if that is a valid rule file with the intended tables."""
    wanted: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    tables = [*wanted.get(section, []), *(dict(one) for one in add)]
    for one in remove:
        tables.remove(dict(one))
    found = tomllib.loads(text)
    if found != ({**wanted, section: tables} if tables else {k: v for k, v in wanted.items() if k != section}):
        raise ValueError(f"{path}: the edit would change other tables: write the [[{section}]] table by hand")
    target = Path(os.path.realpath(path))
    temp = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temp.write_text(text, encoding="utf-8")
        temp.chmod(target.stat().st_mode & 0o777)
        try:
            load_rule_file(temp)
        except ValueError as error:
            raise ValueError(str(error).replace(str(temp), str(path))) from error
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        temp.replace(target)
    finally:
        temp.unlink(missing_ok=True)


def _toml(value: object) -> str:
    """Return a text, or a list of texts, as TOML: JSON's strings without surrogates are TOML's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _shown(table: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {_toml(value)}" for key, value in table.items())
