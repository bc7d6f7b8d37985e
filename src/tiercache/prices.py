"""Prices of storage: the dated table in prices.json, and the price tables of rule files.

Prices are in dollars, for months of 30 days and GB of 2^30 bytes, as the providers bill. The figures of prices.json
come from secondary sources and age; ``docs/reference/tiers.md`` explains them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

GB = float(1 << 30)
"""Bytes of a GB, in every price."""
Speed: TypeAlias = Literal["expedited", "standard", "bulk"]
SPEEDS: tuple[Speed, ...] = ("expedited", "standard", "bulk")
_FREE_SCHEMES = ("file", "memory")


@dataclass(frozen=True, slots=True)
class RestorePrice:
    """Price of restoring archived objects at one speed."""

    gb: float = 0.0  # dollars per GB
    per_1000: float = 0.0  # dollars per 1000 objects
    hours: float = 0.0  # most hours until the first byte can be read


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a storage class, in dollars."""

    name: str  # in the price table; "free"; or the tier that has its own table
    store_gb_month: float = 0.0
    put_1000: float = 0.0  # 1000 requests that write
    get_1000: float = 0.0  # 1000 requests that read
    transition_1000: float = 0.0  # 1000 changes into this class
    retrieve_gb: float = 0.0  # reading 1 GB, in addition to the requests
    egress_gb: float = 0.0  # 1 GB that leaves the provider's region
    min_days: float = 0.0  # minimum days that are billed
    min_bytes: int = 0  # minimum bytes for which an object is billed
    overhead_bytes: int = 0  # billed in addition to each object, at the price of this class
    # Speed -> price, for a class that must be restored before a read; otherwise empty.
    restore: Mapping[str, RestorePrice] = field(default_factory=dict)
    standard_overhead_bytes: int = 0  # billed in addition to each object, at the price of the standard class
    # Of the standard class, for standard_overhead_bytes and temporary copies of restored objects; None: store_gb_month.
    standard_gb_month: float | None = None
    # 1000 requests that begin a multipart upload into this class, or write a part; None: put_1000.
    standard_put_1000: float | None = None

    @property
    def temporary_gb_month(self) -> float:
        """Dollars for 1 GB and month in the standard class, where temporary copies and some overhead are billed."""
        return self.store_gb_month if self.standard_gb_month is None else self.standard_gb_month

    @property
    def part_1000(self) -> float:
        """Dollars per 1000 parts of multipart uploads."""
        return self.put_1000 if self.standard_put_1000 is None else self.standard_put_1000


FREE = Prices("free")
"""Prices of local paths."""

_DOLLARS = ("store_gb_month", "put_1000", "get_1000", "transition_1000", "retrieve_gb", "egress_gb")
_DAYS = ("min_days",)
_BYTES = ("min_bytes", "overhead_bytes", "standard_overhead_bytes")
_STANDARD = ("standard_gb_month", "standard_put_1000")
_KEYS = (*_DOLLARS, *_DAYS, *_BYTES, *_STANDARD, "restore")
_RESTORE_KEYS = ("gb", "per_1000", "hours")
_LIKE = "like"
_MOST = 1e15  # largest value of a price key, in dollars, days or bytes


@cache
def _built_in() -> dict[str, Any]:
    text = files("tiercache").joinpath("prices.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    data["prices"] = MappingProxyType({name: _parsed(name, given) for name, given in data["prices"].items()})
    return data


def price_table() -> tuple[str, Mapping[str, Prices]]:
    """Return the date of the built-in price table, and its prices by name ("aws:us-east-1:STANDARD")."""
    return _built_in()["dated"], _built_in()["prices"]


def price_notes() -> Sequence[str]:
    """Return the notes on the figures in the table, a sentence or two each."""
    notes: list[str] = _built_in()["notes"]
    return notes


def named_prices(name: str) -> Prices:
    """Return the prices with a name in the table. Raises ValueError, with similar names."""
    _, table = price_table()
    if name not in table:
        raise ValueError(f"no prices are called {name!r}; {_alternatives(name, table)}; or write a table of your own")
    return table[name]


def provider_prices(provider: str | None) -> Prices | None:
    """Return the prices of the standard class of "aws", "gcs" or "azure"; None for another provider, or None.

    The table has one region of each provider. Requests cost about the same in the others.
    """
    _, table = price_table()
    return next((prices for name, prices in table.items() if provider and name.startswith(f"{provider}:")), None)


def read_dollars(prices: Prices, n_requests: float, n_bytes: float) -> tuple[float, float]:
    """Return the dollars of reads: those of the requests, and those of egress if the bytes leave the region."""
    requests = prices.get_1000 * n_requests / 1000 + prices.retrieve_gb * n_bytes / GB
    return requests, prices.egress_gb * n_bytes / GB


def _alternatives(name: str, names: Collection[str]) -> str:
    near = get_close_matches(name, names, n=3, cutoff=0.7)
    return "did you mean " + " or ".join(map(repr, near)) if near else "there are " + ", ".join(names)


def parse_prices(name: str, given: Mapping[str, Any]) -> Prices:
    """Return the prices of a table with the keys of Prices. The key `like` names prices that give the missing values.

    Raises:
        ValueError: An unknown key, or an invalid value; the message names the key.
    """
    if _LIKE not in given:
        if "store_gb_month" not in given:
            raise ValueError("store_gb_month is missing: give it, or give `like`, the name of prices to start from")
        return _parsed(name, given)
    if not isinstance(given[_LIKE], str):
        raise ValueError(f"{_LIKE}: expected a name of prices, got {given[_LIKE]!r}")
    base = named_prices(given[_LIKE])
    changed = _values({key: value for key, value in given.items() if key != _LIKE})
    return replace(base, name=f"{base.name} ({name})", **changed)


def is_free(url: str) -> bool:
    """Return whether a URL is on this machine, where nothing is billed."""
    scheme, found, _ = url.partition("://")
    return not found or scheme.lower() in _FREE_SCHEMES


def _parsed(name: str, given: Mapping[str, Any]) -> Prices:
    values = _values(given)
    return Prices(name, **({"transition_1000": values.get("put_1000", 0.0)} | values))


def _values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked values of a table, by field of Prices."""
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"{key}: no such price; {_alternatives(key, _KEYS)}")
    parse = {"restore": lambda _, value: _restore(value)} | dict.fromkeys(_BYTES, _whole)
    return {key: parse.get(key, _number)(key, value) for key, value in given.items()}


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
        if unknown := [key for key in price if key not in _RESTORE_KEYS]:
            raise ValueError(f"{where}.{unknown[0]}: no such price; there are {', '.join(_RESTORE_KEYS)}")
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


# Size of the parts in which larger objects are copied.
PART_BYTES = 8 << 20

DAY_S = 86400.0
MONTH_DAYS = 30.0
RESTORE_DAYS = 3
"""Lifetime in days of a restored copy that is copied home: long enough to repeat a failed copy."""

Dollars = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Sizes of some copies; int64[n] each."""

    n_objects: NDArray[np.int64]  # number of objects
    n_bytes: NDArray[np.int64]  # total size
    smallest_bytes: NDArray[np.int64]  # size of the smallest object


def billed_bytes(prices: Prices, sizes: Sizes) -> NDArray[np.int64]:
    """Return the billed bytes: each object counts at least min_bytes, plus overhead_bytes per object; int64[n].

    For copies of several objects, of which only the sum and the smallest size are known, it is a lower bound.
    """
    raised = sizes.n_bytes + np.maximum(prices.min_bytes - sizes.smallest_bytes, 0)
    return np.maximum(raised, sizes.n_objects * prices.min_bytes) + sizes.n_objects * prices.overhead_bytes


def month_dollars(prices: Prices, sizes: Sizes) -> Dollars:
    """Return the storage cost per month: billed GB x store_gb_month, plus the overhead billed as standard storage.

    AWS ("Amazon S3 pricing", footnote on S3 Glacier Flexible Retrieval and Deep Archive): for each archived object 32
    KB are charged at the rate of its class, and 8 KB, its name and other metadata, at the rate of S3 Standard.
    """
    standard = sizes.n_objects * prices.standard_overhead_bytes / GB * prices.temporary_gb_month
    return billed_bytes(prices, sizes) / GB * prices.store_gb_month + standard


def early_dollars(prices: Prices, sizes: Sizes, age_s: NDArray[np.float64]) -> Dollars:
    """Return the early-deletion fee: the storage cost of the remaining part of min_days."""
    left_days = np.maximum(prices.min_days - np.maximum(age_s, 0.0) / DAY_S, 0.0)
    return month_dollars(prices, sizes) * left_days / MONTH_DAYS


def copy_dollars(src: Prices, dst: Prices, sizes: Sizes, *, leaves: bool, streams: bool) -> Dollars:
    """Return the cost to read copies from src and to write them to dst: requests, retrieval and egress.

    AWS ("Amazon S3 User Guide", "Multipart upload and pricing"): of an upload into S3 Glacier Flexible Retrieval or
    Deep Archive, CreateMultipartUpload and UploadPart are billed at the rates of S3 Standard, and only
    CompleteMultipartUpload at the rate of the class. For copies of several objects the number of parts is an upper
    bound.

    leaves: Whether the bytes leave the provider's region. streams: Whether they pass through this machine; then each
    part costs a GET and a PUT, and otherwise the store copies each object by one request.
    """
    per_gb = src.retrieve_gb + (src.egress_gb if leaves else 0.0)
    return _requests_dollars(src, dst, sizes, streams=streams) + sizes.n_bytes / GB * per_gb


def _requests_dollars(src: Prices, dst: Prices, sizes: Sizes, *, streams: bool) -> Dollars:
    if not streams:
        return sizes.n_objects * (src.get_1000 + dst.put_1000) / 1000
    n_more = np.maximum(sizes.n_bytes - 1, 0) // PART_BYTES  # parts beyond the first of each object
    n_large = np.minimum(sizes.n_objects, n_more)  # objects of several parts
    n_begun = np.where(n_large > 0, n_more + 2 * n_large, 0)  # requests that begin uploads or upload parts
    reads = (sizes.n_objects + n_more) * src.get_1000
    return np.asarray((reads + sizes.n_objects * dst.put_1000 + n_begun * dst.part_1000) / 1000, np.float64)


def restore_dollars(archive: Prices, speed: RestorePrice, n_bytes: NDArray[np.int64], days: float) -> Dollars:
    """Return the cost to restore each object for some days: retrieval, and a temporary copy in the standard class."""
    per_gb = speed.gb + archive.temporary_gb_month * days / MONTH_DAYS
    return n_bytes / GB * per_gb + speed.per_1000 / 1000


def reclass_dollars(src: Prices, dst: Prices, sizes: Sizes) -> Dollars:
    """Return the cost to change the storage class in place: one transition per object, and the retrieval.

    AWS bills a COPY as a PUT into the class that it writes, plus the retrieval from the class that it reads.
    """
    return sizes.n_objects * dst.transition_1000 / 1000 + sizes.n_bytes / GB * src.retrieve_gb


def restored_home_dollars(
    archive: Prices, speed: RestorePrice, home: Prices, n_bytes: NDArray[np.int64], *, urls: tuple[str, str]
) -> Dollars:
    """Return the cost to restore each archived object for RESTORE_DAYS, and to copy it home or change its class.

    urls: Of the archive tier and of the home tier.
    """
    sizes = Sizes(np.ones_like(n_bytes), n_bytes, n_bytes)
    dollars = restore_dollars(archive, speed, n_bytes, RESTORE_DAYS)
    if urls[0].rstrip("/") == urls[1].rstrip("/"):
        return dollars + reclass_dollars(archive, home, sizes)
    leaves, streams = leaves_and_streams(*urls, archive, home)
    return dollars + copy_dollars(archive, home, sizes, leaves=leaves, streams=streams)


def leaves_and_streams(src_url: str, dst_url: str, src: Prices | None, dst: Prices | None) -> tuple[bool, bool]:
    """Return whether copies between two tiers leave the provider's region, and whether they pass through this machine.

    If the prices name no region, a copy leaves it unless both tiers are in one bucket. A local disk is outside every
    region. Only S3 copies objects itself.
    """
    if src is None or dst is None:
        leaves = True
    elif region := region_of(src):
        leaves = region != region_of(dst)
    else:
        leaves = _bucket(src_url) != _bucket(dst_url)
    return leaves, leaves or not (_is_s3(src_url) and _is_s3(dst_url))


def _is_s3(url: str) -> bool:
    return url.lower().startswith("s3://")


def _bucket(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def break_even_days(once: Dollars, saving_month: Dollars) -> Dollars:
    """Return the days until the one-time cost is earned back; inf: never; 0 where nothing is paid and nothing lost."""
    days = np.full(len(once), np.inf)
    np.divide(once * MONTH_DAYS, saving_month, out=days, where=saving_month > 0)
    days[(once <= 0) & (saving_month == 0)] = 0.0
    return days


def region_of(prices: Prices) -> str:
    """Return provider and region of a name in the price table ("aws:us-east-1"); "" for any other name."""
    return prices.name.rpartition(":")[0]
