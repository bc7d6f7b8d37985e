"""The rule file: its tiers, rules, pins and mover options, checked when it is read and frozen afterwards.

The tables stand in ``tiercache.toml`` beside the settings, or in a file that the caller names.
``docs/reference/tiers.md`` lists all keys. Each error message names the file and the key; a TOML syntax error names
the line. An attribute's name states its unit; the key of the file is its alias: `idle = "30d"` becomes `idle_s`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tiercache import config
from tiercache.keep import KeepList, parse_keep_list
from tiercache.model import parse_bytes, parse_duration
from tiercache.prices import FREE, Prices, is_free, named_prices, parse_prices
from tiercache.tier.checkpoint_names import UserLayout, layout_pattern
from tiercache.tier.snapshot import STANDARD
from tiercache.tier.text_columns import translate_globs

_LONGEST_S = 10_000 * 365.0 * 86400.0


def read_seconds(value: object) -> float:
    """Return the seconds of a duration such as "30d", or of a number of seconds. Raises ValueError.

    A rule file may not contain a number of seconds: see _built().
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a duration such as '30d' or '12h', got {value!r}")
    try:
        seconds = parse_duration(value)
    except OverflowError:  # an integer of hundreds of digits
        seconds = math.inf
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError(f"expected a duration from 0 to 10,000 years, got {value!r}")
    return seconds


def read_capacity(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a size such as '2TB' or a percentage such as '80%', got {value!r}")
    parse_bytes(value, whole_bytes=1)
    return str(value)


def read_texts(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"expected a string or a list of strings, none of them empty, got {value!r}")
    return tuple(texts)


def require_values(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("expected one or more values, got an empty list")
    return values


def read_globs(value: object) -> tuple[str, ...]:
    globs = read_texts(value)
    for glob in globs:
        if glob.startswith("/") or "//" in glob or "\\" in glob:
            raise ValueError(
                f"a glob matches paths below a tier's URL: no '/' at its start, no '//' and no '\\', got {glob!r}"
            )
    translate_globs(globs)
    return globs


def read_layouts(value: object) -> tuple[str, ...]:
    patterns = read_texts(value)
    for pattern in patterns:
        layout_pattern(pattern)
    return patterns


def read_moment(value: object) -> float:
    """Return the seconds since the epoch of a time, or of the end of a date.

    A time without an offset is in UTC. Raises ValueError.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LONGEST_S:
        return float(value)
    found = value
    if isinstance(value, str):
        with suppress(ValueError):
            is_date = len(value) == len("2027-06-30")
            found = date.fromisoformat(value) if is_date else datetime.fromisoformat(value)
    if isinstance(found, date) and not isinstance(found, datetime):
        return datetime.combine(found, time(), UTC).timestamp() + timedelta(days=1).total_seconds()
    if not isinstance(found, datetime):
        raise ValueError(f"expected a date or time such as 2027-06-30 or 2027-06-30T12:00:00Z, got {value!r}")
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


HOME_NAME = "standard"

Seconds: TypeAlias = Annotated[float, BeforeValidator(read_seconds)]
PositiveSeconds: TypeAlias = Annotated[float, BeforeValidator(read_seconds), Field(gt=0)]
Globs: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(read_globs), AfterValidator(require_values)]

_URLS_WITHOUT_USERS = ("s3:", "gs:", "http:", "https:")


class RuleTable(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        populate_by_name=True,
        hide_input_in_errors=True,  # storage options may contain a secret
    )


class Tier(RuleTable):
    name: str  # name in the rule file
    url: str  # URL or absolute path below which the tier's objects lie
    storage_class: str | None = None  # S3 storage class of new copies; None: the store's default class
    prices: str | dict[str, Any] | None = None  # name in the price table, or a table of prices; None: not given
    # Size, or percentage of the disk, as written in the file; None: unlimited.
    capacity: Annotated[str, BeforeValidator(read_capacity)] | None = None
    # Options of the store; never shown, since they may contain secrets.
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)

    @property
    def is_local(self) -> bool:
        """Whether the tier is a folder of a file system that is mounted on this machine."""
        return "://" not in self.url or self.url.lower().startswith("file://")

    @property
    def is_percentage(self) -> bool:
        return self.capacity is not None and self.capacity.strip().endswith("%")

    @property
    def known_prices(self) -> Prices | None:
        """Prices of the tier; FREE for a local path without prices; None: unknown."""
        if isinstance(self.prices, str):
            return named_prices(self.prices)
        if self.prices is not None:
            return parse_prices(f"tiers.{self.name}", self.prices)
        return FREE if is_free(self.url) else None

    def capacity_bytes(self, disk_bytes: int | None) -> int | None:
        """Return the capacity in bytes; None: unlimited. disk_bytes: Size of the disk, for a capacity in percent.

        Raises ValueError if the capacity is a percentage and disk_bytes is None.
        """
        if self.capacity is None:
            return None
        if self.is_percentage and disk_bytes is None:
            raise ValueError(f"tiers.{self.name}.capacity: the size of the disk is unknown, got {self.capacity}")
        return parse_bytes(self.capacity, whole_bytes=disk_bytes)

    @field_validator("prices", mode="before")
    @classmethod
    def _valid_prices(cls, prices: object) -> object:
        if isinstance(prices, str):
            named_prices(prices)
        elif isinstance(prices, dict):
            parse_prices("", prices)
        elif prices is not None:
            raise ValueError(f"expected a name of the price table or a table of prices, got {prices!r}")
        return prices

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        if not url:
            raise ValueError("a tier needs a URL or path")
        if "\0" in url:
            raise ValueError("a URL or path cannot contain a NUL character")
        user, found, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
        if ":" in user or (found and url.lower().startswith(_URLS_WITHOUT_USERS)):
            raise ValueError("a URL must not contain credentials: put them into the environment")
        return url

    @model_validator(mode="after")
    def _check_capacity(self) -> Tier:
        if self.is_percentage and not self.is_local:
            raise ValueError(
                f"capacity: only a local tier may have a percentage; expected a size, got {self.capacity!r}"
            )
        return self


class Rule(RuleTable):
    """A rule: to which tier the objects that it matches belong."""

    name: str = Field(min_length=1)
    match: Globs
    exclude: Annotated[tuple[str, ...], BeforeValidator(read_globs)] = Field(default=(), validation_alias="except")
    # Names of files (or, with a slash at the end, of folders) that are a checkpoint each: "model_{step}.pt".
    checkpoint: Annotated[tuple[str, ...], BeforeValidator(read_layouts)] = ()
    to: str | None = None
    idle_s: Seconds | None = Field(default=None, validation_alias="idle")
    keep: Mapping[str, KeepList] = Field(default_factory=dict)  # keep list of each tier, the fastest tier first
    then: str | None = None
    after_s: Seconds | None = Field(default=None, validation_alias="after")
    delete_after_s: PositiveSeconds | None = Field(default=None, validation_alias="delete_after")
    # Size, or percentage of the bytes that the rule matches, that one run deletes without `--yes`, as in the file.
    max_delete: Annotated[str, BeforeValidator(read_capacity)] = "50%"

    @model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        if self.keep and (self.to is not None or self.idle_s is not None):
            key = "to" if self.to is not None else "idle"
            raise ValueError(f"{key}: cannot be combined with keep lists: write two rules")
        if self.to is None and self.idle_s is not None:
            raise ValueError("idle: is a condition of `to`, and the rule has no `to`")
        if self.then is not None and not self.keep:
            raise ValueError("then: needs a keep list; without one, write `to`")
        if self.after_s is not None and self.to is None and self.then is None:
            raise ValueError("after: needs `to` or `then`, and the rule has neither")
        if self.delete_after_s is not None and self.delete_after_s <= (self.after_s or 0):
            raise ValueError("delete_after: is not longer than `after`: objects would be deleted and never moved")
        if self.delete_after_s is None and "max_delete" in self.model_fields_set:
            raise ValueError("max_delete: needs `delete_after`: this rule deletes nothing")
        return self


class Pin(RuleTable):
    match: Globs  # globs of paths
    # End of the pin, in seconds since the epoch; None: the pin does not expire.
    until_s: Annotated[float, BeforeValidator(read_moment)] | None = Field(default=None, validation_alias="until")
    why: str = ""  # reason, for people


class TieringOptions(RuleTable):
    """Options of the mover."""

    grace_s: Seconds = Field(default=86400.0, validation_alias="grace")


class RuleFile(RuleTable):
    path: Path  # path of the file
    sha256: str  # SHA-256 of the file's bytes, in hex; "": there is no file, see is_from_file
    tiers: tuple[Tier, ...] = Field(min_length=1)  # tiers, the fastest first
    rules: tuple[Rule, ...] = ()  # rules, in the order of the file; the first that matches an object applies
    pins: tuple[Pin, ...] = ()
    tiering: TieringOptions = TieringOptions()

    def tier(self, name: str) -> Tier:
        return self.tiers[self.index(name)]

    def index(self, name: str) -> int:
        names = [tier.name for tier in self.tiers]
        if name not in names:
            raise ValueError(f"{self.path}: no tier is called {name!r}; there are {', '.join(names)}")
        return names.index(name)

    @property
    def is_from_file(self) -> bool:
        """Whether it was read from a file. False: it was made for one URL, its only tier, and `path` does not exist."""
        return bool(self.sha256)

    @property
    def layouts(self) -> tuple[UserLayout, ...]:
        return tuple(
            UserLayout(pattern, rule.match, rule.exclude) for rule in self.rules for pattern in rule.checkpoint
        )

    @property
    def prices(self) -> tuple[Prices | None, ...]:
        """Prices of each tier; None: unknown."""
        return tuple(tier.known_prices for tier in self.tiers)

    @property
    def home_tier(self) -> Tier:
        """The tier with the versions of data sets, the placements and the lock: "standard", or else the first."""
        return next((tier for tier in self.tiers if tier.name == HOME_NAME), self.tiers[0])


T = TypeVar("T", bound=RuleTable)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MOST_TIERS = 100
_KEEP = "keep_"
_NOT_SHOWN = ("storage_options", "prices", "url")
# Attributes that are durations, which need a unit: the writer of `delete_after = 30` may mean days, not seconds.
_DURATIONS = ("idle_s", "after_s", "delete_after_s", "grace_s")
# Types of pydantic errors whose message shows the value already, or that have no value.
_COMPLETE = ("value_error", "missing")


def load_rule_file(path: Path | None = None, *, start: Path | None = None) -> RuleFile:
    """Read a rule file. path: None: the tiercache.toml that applies to the folder start, or to the working folder.

    Raises ValueError, which names the file and the key, or the line of a syntax error.
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
    known = (*config.TIER_SECTIONS, *config.SETTINGS)
    for key in tables:
        if key not in known:
            raise ValueError(f"{key}: {_unknown(key, known)}")
        if key in config.SETTINGS and path.name != config.FILE_NAME:
            raise ValueError(f"{key}: settings are read from a {config.FILE_NAME} only, or from the environment")
    if not tables.get("tiers"):
        raise ValueError("tiers: no tier is given; write [tiers.NAME] tables with a url, the fastest first")
    tiers = _tiers(tables["tiers"], path.parent)
    rules: list[Rule] = []
    for where, given in _list(tables, "rules"):
        rules.append(_rule(given, where, tiers))
        if rules[-1].name in [rule.name for rule in rules[:-1]]:
            raise ValueError(f"{where}.name: another rule is called {rules[-1].name!r}")
    return RuleFile(
        path=path,
        sha256=sha256,
        tiers=tiers,
        rules=tuple(rules),
        pins=tuple(_built(Pin, given, where) for where, given in _list(tables, "pins")),
        tiering=_built(TieringOptions, tables.get("tiering", {}), "tiering"),
    )


def _tiers(given: object, folder: Path) -> tuple[Tier, ...]:
    found: list[Tier] = []
    for name, table in _table(given, "tiers").items():
        where = f"tiers.{name}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: the name of a tier must consist of letters, digits, '_' and '-'")
        values = dict(_table(table, where))
        tier = _built(Tier, values, where, name=name)
        if "://" not in tier.url:
            tier = tier.model_copy(update={"url": os.path.normpath(folder / Path(tier.url).expanduser())})
        for other in found:
            _check_pair(other, tier)
        found.append(tier)
    if len(found) > _MOST_TIERS:
        raise ValueError(f"tiers: expected at most {_MOST_TIERS}, got {len(found)}")
    return tuple(found)


def _check_pair(other: Tier, tier: Tier) -> None:
    """Raise ValueError for tiers inside one another: each would list the other's objects."""
    where = f"tiers.{tier.name}"
    location, other_location = _location(tier), _location(other)
    if location == other_location:
        if (tier.storage_class or STANDARD) == (other.storage_class or STANDARD):
            raise ValueError(
                f"{where}.url: tiers.{other.name} has the same URL:"
                " two tiers with one URL need different storage classes"
            )
    elif f"{location}/".startswith(f"{other_location}/") or f"{other_location}/".startswith(f"{location}/"):
        raise ValueError(f"{where}.url: must not lie inside tiers.{other.name}.url, nor contain it")


def _location(tier: Tier) -> str:
    if not tier.is_local:
        return tier.url.rstrip("/")
    text = tier.url
    path = unquote("/" + text.partition("://")[2].partition("/")[2]) if "://" in text else text
    return os.path.normpath(path).rstrip("/")


def _rule(given: object, where: str, tiers: Sequence[Tier]) -> Rule:
    values = dict(_table(given, where))
    names = [tier.name for tier in tiers]
    keep: dict[str, KeepList] = {}
    for key in [key for key in values if key.startswith(_KEEP)]:
        table = values.pop(key)
        name = key.removeprefix(_KEEP)
        _check_tier(name, f"{where}.{key}", names)
        keep[name] = parse_keep_list(_table(table, f"{where}.{key}"), f"{where}.{key}")
    values.setdefault("name", where)
    rule = _built(Rule, values, where, keep={name: keep[name] for name in names if name in keep})
    if rule.to is not None:
        _check_tier(rule.to, f"{where}.to", names)
        if rule.to == names[0]:
            raise ValueError(f"{where}.to: {rule.to!r} is the first tier, so that there is no tier to move from")
    if rule.then is not None:
        _check_tier(rule.then, f"{where}.then", names)
        last = list(rule.keep)[-1]
        if names.index(rule.then) <= names.index(last):
            raise ValueError(f"{where}.then: tier {rule.then!r} is not colder than {last!r}, which has a keep list")
    return rule


def _check_tier(given: str, where: str, names: Sequence[str]) -> None:
    if given not in names:
        raise ValueError(f"{where}: no tier is called {given!r}; {_near(given, names)}")


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
    fields = model.model_fields.items()
    return {(f.validation_alias if isinstance(f.validation_alias, str) else name): name for name, f in fields}


def _built(model: type[T], given: object, where: str, **resolved: object) -> T:
    """Build a model from a table and from values that are not keys of the table.

    Raises ValueError, which names the key.
    """
    values = dict(_table(given, where))
    keys = [key for key in _keys(model) if key not in resolved]
    for key in values:
        if key not in keys:
            raise ValueError(f"{where}.{key}: {_unknown(key, keys)}")
    try:
        found = model.model_validate({**values, **resolved})
    except ValidationError as error:
        raise ValueError(_message(error, where)) from error
    for key in [key for key, name in _keys(model).items() if name in _DURATIONS and values.get(key)]:
        if not isinstance(values[key], str):
            raise ValueError(
                f'{where}.{key}: a duration needs a unit (s, m, h, d or w): write {key} = "{values[key]}d" for days, '
                f'or "{values[key]}s" for seconds, got {values[key]!r}'
            )
    return found


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
