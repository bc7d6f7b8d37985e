"""Reads a rule file: finds it, builds its models, and resolves roles, paths and defaults. Each error names its key."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pydantic import ValidationError

from tiercache import config
from tiercache.prices import prices_of
from tiercache.tierfile.models import ROLES, KeepList, Pin, Rule, RuleFile, RuleTable, Tag, Tier, TieringOptions

T = TypeVar("T", bound=RuleTable)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MOST_TIERS = 100
_KEEP = "keep_"
_NOT_SHOWN = ("storage_options", "prices", "url")
# Keys of earlier releases, and how to replace them.
_REPLACED = {
    "tiering.uncounted": 'it was removed: write idle_by = "mtime" into each rule that may use the modification time'
    " of objects whose uses are not recorded",
    "tiering.small": "it was removed: a move must pay back within max_break_even, which includes minimum sizes;"
    " to allow other moves, write even_if_dearer = true into the rule",
    "tiering.early": "it was removed: a move must pay back within max_break_even, which includes early-deletion fees;"
    " to allow other moves, write even_if_dearer = true into the rule",
}
# Types of pydantic errors whose message shows the value already, or that have no value.
_COMPLETE = ("value_error", "missing")


def load_rule_file(path: Path | None = None, *, start: Path | None = None) -> RuleFile:
    """Read a rule file.

    Args:
        path: Path of the file; None: the tiercache.toml that applies to start.
        start: Folder in which the search begins; None: the working folder.

    Raises:
        ValueError: There is no file, it is not TOML, or it has a wrong key or value. The message names the file and the
            key, or the line of a syntax error.
    """
    here = Path.cwd() if start is None else start.absolute()
    found = config.find_file(here) if path is None else path.absolute()
    if found is None:
        raise ValueError(
            f"no {config.FILE_NAME} in {here}, in a folder above it or in the user's configuration folder:"
            " write one with [tiers.NAME] tables, or name a file with --rules"
        )
    data = config.read_file(found)
    tables = config.parse_toml(found, data)
    try:
        return _file(tables, found, hashlib.sha256(data).hexdigest())
    except ValueError as error:
        raise ValueError(f"{found}: {error}") from error


def _file(tables: Mapping[str, Any], path: Path, sha256: str) -> RuleFile:
    known = (*config.TIER_SECTIONS, *config.Settings.model_fields)
    for key in tables:
        if key not in known:
            raise ValueError(f"{key}: {_unknown(key, known)}")
    if not tables.get("tiers"):
        raise ValueError("tiers: no tier is given; write [tiers.NAME] tables with role and url, the fastest first")
    tiers = _tiers(tables["tiers"], path.parent)
    tags = tuple(_built(Tag, given, where) for where, given in _list(tables, "tags"))
    rules: list[Rule] = []
    for where, given in _list(tables, "rules"):
        rules.append(_rule(given, where, tiers, tags))
        if rules[-1].name in [rule.name for rule in rules[:-1]]:
            raise ValueError(f"{where}.name: another rule is called {rules[-1].name!r}")
    tiering = _built(TieringOptions, tables.get("tiering", {}), "tiering")
    if tiering.state_dir is not None:
        tiering = tiering.model_copy(update={"state_dir": path.parent / tiering.state_dir})
    if "max_break_even_s" in tiering.model_fields_set:
        for tier in tiers:
            _priced_for_break_even(tier)
    return RuleFile(
        path=path,
        sha256=sha256,
        tiers=tiers,
        rules=tuple(rules),
        pins=tuple(_built(Pin, given, where) for where, given in _list(tables, "pins")),
        tags=tags,
        tiering=tiering,
    )


def _priced_for_break_even(tier: Tier) -> None:
    try:
        prices_of(tier)
    except ValueError as error:
        raise ValueError(f"tiering.max_break_even: {error}") from error


def _tiers(given: object, folder: Path) -> tuple[Tier, ...]:
    found: list[Tier] = []
    for name, table in _table(given, "tiers").items():
        where = f"tiers.{name}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: the name of a tier must consist of letters, digits, '_' and '-'")
        values = dict(_table(table, where))
        if "role" not in values and name not in ROLES:
            raise ValueError(
                f"{where}.role: is missing: write one of {', '.join(ROLES)}, or use one as the tier's name"
            )
        values.setdefault("role", name)
        tier = _built(Tier, values, where, name=name)
        tier = tier.model_copy(update={"url": _resolved(tier, folder)})
        _check_order(found, tier)
        _check_place(found, tier)
        found.append(tier)
    if len(found) > _MOST_TIERS:
        raise ValueError(f"tiers: expected at most {_MOST_TIERS}, got {len(found)}")
    return tuple(found)


def _resolved(tier: Tier, folder: Path) -> str:
    """Return the tier's URL; a relative path is resolved against the folder of the rule file."""
    if "://" in tier.url:
        return tier.url
    return os.path.normpath(folder / Path(tier.url).expanduser())


def _check_order(before: Sequence[Tier], tier: Tier) -> None:
    for other in before:
        if ROLES.index(other.role) > ROLES.index(tier.role):
            raise ValueError(
                f"tiers.{tier.name}: stands after the colder tier tiers.{other.name} ({other.role}):"
                " write the tiers in order, from the fastest to the coldest"
            )


def _check_place(before: Sequence[Tier], tier: Tier) -> None:
    """Raise ValueError where one tier lies inside another: each would list the other's objects as its own."""
    place = _place(tier)
    for other in before:
        elsewhere = _place(other)
        if place == elsewhere:
            if (tier.storage_class or "STANDARD") == (other.storage_class or "STANDARD"):
                raise ValueError(
                    f"tiers.{tier.name}.url: tiers.{other.name} has the same URL:"
                    " two tiers with one URL need different storage classes"
                )
        elif place.startswith(elsewhere.rstrip("/") + "/") or elsewhere.startswith(place.rstrip("/") + "/"):
            raise ValueError(f"tiers.{tier.name}.url: must not lie inside tiers.{other.name}.url, nor contain it")


def _place(tier: Tier) -> str:
    if not tier.is_local:
        return tier.url.rstrip("/")
    text = tier.url
    return os.path.normpath(unquote("/" + text.partition("://")[2].partition("/")[2]) if "://" in text else text)


def _rule(given: object, where: str, tiers: Sequence[Tier], tags: Sequence[Tag]) -> Rule:
    values = dict(_table(given, where))
    names = [tier.name for tier in tiers]
    keep: dict[str, KeepList] = {}
    for key in [key for key in values if key.startswith(_KEEP)]:
        table = values.pop(key)
        name = _one_tier(key.removeprefix(_KEEP), f"{where}.{key}", tiers)
        if name in keep:
            raise ValueError(f"{where}.{key}: tier {name!r} has a keep list already")
        if not _table(table, f"{where}.{key}"):
            raise ValueError(f"{where}.{key}: is empty; its keys are {', '.join(sorted(_keys(KeepList)))}")
        if empty := [inner for inner, value in table.items() if value == []]:
            raise ValueError(f"{where}.{key}.{empty[0]}: expected one or more values, got an empty list")
        keep[name] = _built(KeepList, table, f"{where}.{key}")
        _check_tags(keep[name].tags, f"{where}.{key}", tags)
    values.setdefault("name", where)
    rule = _built(Rule, values, where, keep={name: keep[name] for name in names if name in keep})
    update: dict[str, Any] = {}
    if rule.to is not None:
        update["to"] = to = _one_tier(rule.to, f"{where}.to", tiers)
        update["sources"] = _sources(rule.sources, to, where, tiers)
    if rule.then is not None:
        update["then"] = then = _one_tier(rule.then, f"{where}.then", tiers)
        last = list(rule.keep)[-1]
        if names.index(then) <= names.index(last):
            raise ValueError(f"{where}.then: tier {then!r} is not colder than {last!r}, which has a keep list")
    return rule.model_copy(update=update)


def _check_tags(names: Sequence[str], where: str, tags: Sequence[Tag]) -> None:
    """Raise ValueError for a tag that no [[tags]] table defines: the rule would delete what the tag was to keep."""
    given = sorted({name for tag in tags for name in tag.tags})
    for name in names:
        if name not in given:
            known = _near(name, given) if given else "there is no [[tags]] table: write one with match and tags"
            raise ValueError(f"{where}.tags: no [[tags]] table defines the tag {name!r}; {known}")


def _sources(given: Sequence[str], to: str, where: str, tiers: Sequence[Tier]) -> tuple[str, ...]:
    names = [tier.name for tier in tiers]
    before = names[: names.index(to)]
    if not before:
        raise ValueError(f"{where}.to: {to!r} is the first tier, so that there is no tier to move from")
    if not given:
        return tuple(before)
    chosen = {name for one in given for name in _some_tiers(one, f"{where}.from", tiers)}
    for name in chosen.difference(before):
        raise ValueError(f"{where}.from: tier {name!r} must stand before {to!r}, the tier in `to`")
    return tuple(name for name in before if name in chosen)


def _some_tiers(given: str, where: str, tiers: Sequence[Tier]) -> list[str]:
    """Return the tier of this name, or else all tiers of this role."""
    names = [tier.name for tier in tiers]
    found = [name for name in names if name == given] or [tier.name for tier in tiers if tier.role == given]
    if not found:
        raise ValueError(f"{where}: no tier is called {given!r} or has that role; {_near(given, names)}")
    return found


def _one_tier(given: str, where: str, tiers: Sequence[Tier]) -> str:
    found = _some_tiers(given, where, tiers)
    if len(found) > 1:
        raise ValueError(f"{where}: several tiers have the role {given!r}: name one of {', '.join(found)}")
    return found[0]


def _list(tables: Mapping[str, Any], section: str) -> list[tuple[str, object]]:
    """Return the tables of a section, each with its position in messages, counted from 1: ("rules[1]", table)."""
    given = tables.get(section, [])
    if not isinstance(given, list):
        raise ValueError(f"{section}: expected [[{section}]] tables, in double brackets")
    return [(f"{section}[{i}]", table) for i, table in enumerate(given, start=1)]


def _table(given: object, where: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected a table, got {given!r}")
    return given


def _keys(model: type[RuleTable]) -> dict[str, str]:
    """Return a dict from each key of the file to the attribute of the model."""
    fields = model.model_fields.items()
    return {(f.validation_alias if isinstance(f.validation_alias, str) else name): name for name, f in fields}


def _built(model: type[T], given: object, where: str, **resolved: object) -> T:
    """Build a model from a table and from values that are not keys of the table.

    Raises ValueError, which names the key.
    """
    values = _table(given, where)
    keys = [key for key in _keys(model) if key not in resolved]
    for key in values:
        if key not in keys:
            raise ValueError(f"{where}.{key}: {_REPLACED.get(f'{where}.{key}') or _unknown(key, keys)}")
    try:
        return model.model_validate({**values, **resolved})
    except ValidationError as error:
        raise ValueError(_message(error, where)) from error


def _message(error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    text = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # an error about the whole table: its text begins with the key
        return f"{where}.{text}"
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{where}.{key}: is missing"
    got = "" if first["type"] in _COMPLETE or key in _NOT_SHOWN else f", got {first['input']!r}"
    return f"{where}.{key}: {text}{got}"


def _unknown(key: str, known: Sequence[str]) -> str:
    return f"no such key; {_near(key, known)}"


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}"
