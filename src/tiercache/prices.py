"""What storage costs: the dated table of prices.json, and tables that a rule file has of its own.

Dollars, months of 30 days, and GB of 2^30 bytes, as the providers bill them. The figures of prices.json are secondary
and age; what they mean is in ``docs/reference/tiers.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Protocol

GB = float(1 << 30)
"""Bytes of a GB in every price."""
SPEEDS = ("expedited", "standard", "bulk")
_FREE_SCHEMES = ("file", "memory")


@dataclass(frozen=True, slots=True)
class RestorePrice:
    """What it costs to have archived objects back at one speed.

    gb: dollars a GB; per_1000: dollars for 1,000 objects; hours: until the first byte can be read, at most.
    """

    gb: float = 0.0
    per_1000: float = 0.0
    hours: float = 0.0


@dataclass(frozen=True, slots=True)
class Prices:
    """What a storage class costs.

    Attributes:
        name: in the price table; "free"; or whose own table it is.
        store_gb_month: keeping 1 GB for a month.
        put_1000, get_1000: 1,000 requests that write, that read.
        transition_1000: 1,000 changes of class into this one.
        retrieve_gb: reading 1 GB, beyond the requests.
        egress_gb: 1 GB that leaves the provider's region.
        min_days: days that are paid at least.
        min_bytes: bytes that an object is billed as at least.
        overhead_bytes: bytes that are billed beside each object, at the price of the class.
        standard_overhead_bytes: bytes that are billed beside each object at the price of the standard class.
        standard_gb_month: keeping 1 GB in the standard class, for these bytes and for the temporary copy of a restored
            object; None: store_gb_month.
        standard_put_1000: 1,000 requests that begin a multipart upload into this class, or write a part of one; None:
            put_1000.
        restore: by speed, of a class that must be restored before it can be read; else empty.
    """

    name: str
    store_gb_month: float = 0.0
    put_1000: float = 0.0
    get_1000: float = 0.0
    transition_1000: float = 0.0
    retrieve_gb: float = 0.0
    egress_gb: float = 0.0
    min_days: float = 0.0
    min_bytes: int = 0
    overhead_bytes: int = 0
    restore: Mapping[str, RestorePrice] = field(default_factory=dict)
    standard_overhead_bytes: int = 0
    standard_gb_month: float | None = None
    standard_put_1000: float | None = None

    @property
    def temporary_gb_month(self) -> float:
        """Keeping 1 GB of what is billed at the standard class for a month."""
        return self.store_gb_month if self.standard_gb_month is None else self.standard_gb_month

    @property
    def part_1000(self) -> float:
        """1,000 parts of multipart uploads."""
        return self.put_1000 if self.standard_put_1000 is None else self.standard_put_1000


FREE = Prices("free")
"""What local paths cost."""

_DOLLARS = ("store_gb_month", "put_1000", "get_1000", "transition_1000", "retrieve_gb", "egress_gb", "min_days")
_BYTES = ("min_bytes", "overhead_bytes", "standard_overhead_bytes")
_STANDARD = ("standard_gb_month", "standard_put_1000")
_KEYS = (*_DOLLARS, *_BYTES, *_STANDARD, "restore")
_RESTORE_KEYS = ("gb", "per_1000", "hours")
_LIKE = "like"
_MOST = 1e15  # dollars, days or bytes


class Priced(Protocol):
    """What prices are asked for: a tier of a rule file."""

    @property
    def name(self) -> str:
        """Of the tier."""

    @property
    def url(self) -> str:
        """Where it is."""

    @property
    def prices(self) -> str | dict[str, Any] | None:
        """As the rule file has them."""


def price_table() -> tuple[str, Mapping[str, Prices]]:
    """The date of the table that comes with tiercache, and its prices by name ("aws:us-east-1:STANDARD")."""
    dated, _, table = _shipped()
    return dated, table


def price_notes() -> tuple[str, ...]:
    """What must be known of the figures in the table, a sentence or two each."""
    return _shipped()[1]


@cache
def _shipped() -> tuple[str, tuple[str, ...], Mapping[str, Prices]]:
    text = files("tiercache").joinpath("prices.json").read_text(encoding="utf-8")
    data = json.loads(text)
    table = {name: _parsed(name, given) for name, given in data["prices"].items()}
    return data["dated"], tuple(data["notes"]), MappingProxyType(table)


def named_prices(name: str) -> Prices:
    """The prices of a name in the table. Raises ValueError with the names that are near."""
    _, table = price_table()
    if name not in table:
        near = get_close_matches(name, table, n=3, cutoff=0.7)
        known = "did you mean " + " or ".join(map(repr, near)) if near else "there are " + ", ".join(table)
        raise ValueError(f"no prices are called {name!r}; {known}; or write a table of your own")
    return table[name]


def parse_prices(name: str, given: Mapping[str, Any]) -> Prices:
    """Prices from a table with the keys of Prices; with `like` what is not given is as there, provider and region too.

    Raises:
        ValueError: an unknown key, or a value that is no price; it names the key.
    """
    if _LIKE not in given:
        if "store_gb_month" not in given:
            raise ValueError("store_gb_month is missing: a table of prices has it, or `like`, a name to begin from")
        return _parsed(name, given)
    if not isinstance(given[_LIKE], str):
        raise ValueError(f"{_LIKE}: expected a name of prices, got {given[_LIKE]!r}")
    base = named_prices(given[_LIKE])
    restore = {speed: _written(price, _RESTORE_KEYS) for speed, price in base.restore.items()}
    start = _written(base, (*_DOLLARS, *_BYTES, *_STANDARD)) | {"restore": restore}
    return _parsed(f"{base.name} ({name})", start | {key: value for key, value in given.items() if key != _LIKE})


def prices_of(tier: Priced) -> Prices:
    """What the tier costs; FREE for a local path that says nothing else.

    Raises:
        ValueError: a remote tier without prices, an unknown name, or a table that is none; it names tier and key.
    """
    found = priced(tier)
    if found is None:
        raise ValueError(
            f"tiers.{tier.name}.prices: not given, and dollars are asked for: give a name of the price table"
            f' (`tiercache tier check --prices` prints it), such as "aws:us-east-1:STANDARD", or a table of your own'
        )
    return found


def priced(tier: Priced) -> Prices | None:
    """The same where dollars are optional: None for a remote tier that has no prices."""
    try:
        if isinstance(tier.prices, str):
            return named_prices(tier.prices)
        if tier.prices is not None:
            return parse_prices(f"tiers.{tier.name}", tier.prices)
    except ValueError as error:
        raise ValueError(f"tiers.{tier.name}.prices: {error}") from error
    return FREE if is_free(tier.url) else None


def is_free(url: str) -> bool:
    """Whether a URL is one of this machine, where nothing is billed."""
    scheme, found, _ = url.partition("://")
    return not found or scheme.lower() in _FREE_SCHEMES


def _parsed(name: str, given: Mapping[str, Any]) -> Prices:
    for key in given:
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            known = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(_KEYS)
            raise ValueError(f"{key}: no such price; {known}")
    values: dict[str, Any] = {key: _number(key, given[key]) for key in (*_DOLLARS, *_STANDARD) if key in given}
    values.setdefault("transition_1000", values.get("put_1000", 0.0))
    values |= {key: _whole(key, given[key]) for key in _BYTES if key in given}
    return Prices(name, **values, restore=_restore(given.get("restore", {})))


def _restore(given: object) -> Mapping[str, RestorePrice]:
    if not isinstance(given, Mapping):
        raise ValueError(f"restore: expected a table of speeds, got {given!r}")
    found = {}
    for speed, price in given.items():
        where = f"restore.{speed}"
        if speed not in SPEEDS:
            raise ValueError(f"{where}: no such speed; there are {', '.join(SPEEDS)}")
        if not isinstance(price, Mapping):
            raise ValueError(f"{where}: expected a table with {', '.join(_RESTORE_KEYS)}, got {price!r}")
        for key in price:
            if key not in _RESTORE_KEYS:
                raise ValueError(f"{where}.{key}: no such price; there are {', '.join(_RESTORE_KEYS)}")
        found[speed] = RestorePrice(**{key: _number(f"{where}.{key}", value) for key, value in price.items()})
    return found


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise ValueError(f"{key}: expected a number that is not negative, got {value!r}")
    return float(value)


def _whole(key: str, value: object) -> int:
    number = _number(key, value)
    if not number.is_integer():
        raise ValueError(f"{key}: expected whole bytes, got {value!r}")
    return int(number)


def _written(price: Prices | RestorePrice, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: getattr(price, key) for key in keys if getattr(price, key) is not None}
