"""The frozen content of a rule file: durations in seconds, sizes in bytes, lists as tuples, tiers by name.

An attribute's name states its unit; the key of the file is its alias: `idle = "30d"` becomes `idle_s`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

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

from tiercache.model import parse_bytes
from tiercache.prices import named_prices, parse_prices
from tiercache.tierfile.values import (
    read_bytes,
    read_capacity,
    read_fraction,
    read_globs,
    read_moment,
    read_path,
    read_rate,
    read_seconds,
    read_texts,
    require_values,
)

Role: TypeAlias = Literal["hot", "standard", "archive"]
Kind: TypeAlias = Literal["file", "shard", "checkpoint"]
ROLES: tuple[Role, ...] = ("hot", "standard", "archive")

Seconds: TypeAlias = Annotated[float, BeforeValidator(read_seconds)]
SomeSeconds: TypeAlias = Annotated[float, BeforeValidator(read_seconds), Field(gt=0)]
Bytes: TypeAlias = Annotated[int, BeforeValidator(read_bytes)]
Share: TypeAlias = Annotated[float, BeforeValidator(read_fraction)]
Texts: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(read_texts)]
Globs: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(read_globs), AfterValidator(require_values)]

MOST = 1 << 62  # largest count in a rule file: the planner stores counts as int64

_BEST = re.compile(r"\s*(?P<metric>[^:]*[^:\s])\s*:\s*(?P<n>[0-9]+)\s*(?::\s*(?P<mode>min|max)\s*)?")
# Attributes of a rule that are conditions of `to`, and their keys in messages.
_CONDITIONS = {"sources": "from", "idle_s": "idle", "age_s": "age", "uses_below": "uses_below"}
_URLS_WITHOUT_USERS = ("s3:", "gs:", "http:", "https:")


class RuleTable(BaseModel):
    """Base class of the tables of a rule file: frozen, and without unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        populate_by_name=True,
        hide_input_in_errors=True,  # storage options may contain a secret
    )


class Tier(RuleTable):
    """A storage location that holds copies: a local folder or a URL.

    Attributes:
        name: Name in the rule file.
        role: "hot", "standard" or "archive".
        url: URL or absolute path below which the tier's objects lie.
        storage_class: S3 storage class of new copies; None: the store's default class.
        prices: Name in the price table, or a table of prices; None: not given.
        capacity: Size, or percentage of the disk, as written in the file; None: unlimited.
        high: Fraction of the capacity above which the planner sends copies down.
        low: Fraction of the capacity at which the planner stops.
        storage_options: Options of the store; never shown, since they may contain secrets.
    """

    name: str
    role: Role
    url: str
    storage_class: str | None = None
    prices: str | dict[str, Any] | None = None
    capacity: Annotated[str, BeforeValidator(read_capacity)] | None = None
    high: Share = 0.9
    low: Share = 0.75
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)

    @property
    def is_local(self) -> bool:
        """Whether the tier is a folder of a file system that is mounted on this machine."""
        return "://" not in self.url or self.url.lower().startswith("file://")

    @property
    def is_percentage(self) -> bool:
        """Whether the capacity is a percentage of a disk."""
        return self.capacity is not None and self.capacity.strip().endswith("%")

    def capacity_bytes(self, disk_bytes: int | None) -> int | None:
        """Return the capacity in bytes; None: unlimited.

        Args:
            disk_bytes: Size of the whole disk, for a capacity in percent.

        Raises:
            ValueError: The capacity is a percentage and disk_bytes is None.
        """
        if self.capacity is None:
            return None
        if self.is_percentage and disk_bytes is None:
            raise ValueError(f"tiers.{self.name}.capacity: the size of the disk is unknown, got {self.capacity}")
        return parse_bytes(self.capacity, whole_bytes=disk_bytes)

    @field_validator("prices", mode="before")
    @classmethod
    def _known_prices(cls, prices: object) -> object:
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
    def _fits(self) -> Tier:
        if self.low >= self.high:
            raise ValueError(f"low: must be below high, got {self.low:.0%} and {self.high:.0%}")
        if self.is_percentage and not self.is_local:
            raise ValueError(
                f"capacity: only a local tier may have a percentage; expected a size, got {self.capacity!r}"
            )
        return self


class BestMetric(RuleTable):
    """The n checkpoints with the lowest ("min") or the highest ("max") value of a metric.

    Attributes:
        metrics: Names of the metric; the first name that any checkpoint of a run has is used for that run.
        n: Number of checkpoints to keep.
        mode: Whether the lowest or the highest values are the best.
    """

    metrics: Annotated[Texts, AfterValidator(require_values)] = Field(validation_alias="metric")
    n: int = Field(ge=1, le=MOST)
    mode: Literal["min", "max"] = "min"


def read_bests(value: object) -> tuple[object, ...]:
    """Parse "val_loss:2", "accuracy:1:max", a table with the keys of Best, or a list of these. Raises ValueError."""
    return tuple(_best(one) for one in (value if isinstance(value, list | tuple) else (value,)))


def _best(given: object) -> object:
    if isinstance(given, BestMetric):
        return given
    if isinstance(given, dict):
        return _best_of(given)
    match = _BEST.fullmatch(given) if isinstance(given, str) else None
    if match is None or not 1 <= int(match["n"]) <= MOST:
        raise ValueError(f"expected METRIC:N or METRIC:N:max, as in 'val_loss:2' or 'accuracy:1:max', got {given!r}")
    return BestMetric(
        metrics=(match["metric"].strip(),), n=int(match["n"]), mode="max" if match["mode"] == "max" else "min"
    )


def _best_of(given: dict[str, object]) -> BestMetric:
    try:
        return BestMetric.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, text = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{key}: {text}; expected a table as {{ metric = ['val_loss', 'eval_loss'], n = 2, mode = 'min' }}"
        ) from error


class KeepList(RuleTable):
    """A keep list: the checkpoints that stay in a tier. It keeps a checkpoint that any of its keys selects."""

    last: int | None = Field(default=None, ge=1, le=MOST)
    every_steps: int | None = Field(default=None, ge=1, le=MOST)
    every_s: SomeSeconds | None = Field(default=None, validation_alias="every")
    best: Annotated[tuple[BestMetric, ...], BeforeValidator(read_bests)] = ()
    tags: Texts = ()
    younger_s: SomeSeconds | None = Field(default=None, validation_alias="younger")


class Rule(RuleTable):
    """A rule: to which tier the objects that it matches belong.

    Attributes:
        sources: Names of the tiers from which `to` takes copies.
        keep: Keep list of each tier, the fastest tier first.
        idle_by: "mtime": use the modification time as the time of the last use of objects whose uses are not recorded.
        even_if_dearer: Whether the rule's moves may cost more than they save.
    """

    name: str = Field(min_length=1)
    match: Globs
    exclude: Annotated[tuple[str, ...], BeforeValidator(read_globs)] = Field(default=(), validation_alias="except")
    kind: Kind | None = None
    larger_than_bytes: Bytes | None = Field(default=None, validation_alias="larger_than")
    smaller_than_bytes: Bytes | None = Field(default=None, validation_alias="smaller_than")
    to: str | None = None
    sources: Texts = Field(default=(), validation_alias="from")
    idle_s: Seconds | None = Field(default=None, validation_alias="idle")
    age_s: Seconds | None = Field(default=None, validation_alias="age")
    uses_below: int | None = Field(default=None, ge=1, le=MOST)
    idle_by: Literal["use", "mtime"] = "use"
    even_if_dearer: bool = False
    promote: Literal["never", "on_access"] = "never"
    keep: Mapping[str, KeepList] = Field(default_factory=dict)
    then: str | None = None
    after_s: Seconds | None = Field(default=None, validation_alias="after")
    delete_after_s: SomeSeconds | None = Field(default=None, validation_alias="delete_after")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        """Check that the rule has `to` with conditions, or keep lists with `then`, and no key without effect."""
        conditions = [key for name, key in _CONDITIONS.items() if getattr(self, name)]
        if self.keep and (self.to is not None or conditions):
            key = "to" if self.to is not None else conditions[0]
            raise ValueError(f"{key}: cannot be combined with keep lists: write two rules")
        if self.keep and self.kind not in (None, "checkpoint"):
            raise ValueError(f"kind: keep lists apply to checkpoints only, and this rule is for kind {self.kind!r}")
        if self.to is None and conditions:
            raise ValueError(f"{conditions[0]}: is a condition of `to`, and the rule has no `to`")
        if self.idle_by != "use" and self.idle_s is None and self.uses_below is None:
            raise ValueError("idle_by: needs `idle` or `uses_below`, and the rule has neither")
        if self.even_if_dearer and self.to is None and not self.keep:
            raise ValueError("even_if_dearer: needs `to` or a keep list: this rule moves nothing")
        if self.then is not None and not self.keep:
            raise ValueError("then: needs a keep list; without one, write `to` and `age`")
        if self.after_s is not None and self.then is None:
            raise ValueError("after: needs `then`, and the rule has no `then`")
        larger, smaller = self.larger_than_bytes, self.smaller_than_bytes
        if larger is not None and smaller is not None and larger >= smaller:
            raise ValueError(f"larger_than: must be below smaller_than, got {larger} and {smaller} bytes")
        return self


class Pin(RuleTable):
    """Globs of objects that no rule may move.

    Attributes:
        match: Globs of paths.
        until_s: End of the pin, in seconds since the epoch; None: the pin does not expire.
        why: Reason, for people.
    """

    match: Globs
    until_s: Annotated[float, BeforeValidator(read_moment)] | None = Field(default=None, validation_alias="until")
    why: str = ""


class Tag(RuleTable):
    """Tags for the checkpoints that match the globs."""

    match: Globs
    tags: Annotated[Texts, AfterValidator(require_values)]


class TieringOptions(RuleTable):
    """Options of the planner and the mover. state_dir: None: config.state_folder()."""

    grace_s: Seconds = Field(default=86400.0, validation_alias="grace")
    quiet_period_s: Seconds = Field(default=600.0, validation_alias="settle")
    reader_timeout_s: Seconds = Field(default=604800.0, validation_alias="silence")
    max_break_even_s: Seconds = Field(default=365 * 86400.0, validation_alias="max_break_even")
    jobs: int = Field(default=8, ge=1, le=1024)
    rate_bytes_s: Annotated[int, BeforeValidator(read_rate)] | None = Field(default=None, validation_alias="rate")
    gone: Annotated[tuple[str, ...], BeforeValidator(read_globs)] = ()
    state_dir: Annotated[Path, BeforeValidator(read_path)] | None = None


class RuleFile(RuleTable):
    """A rule file.

    Attributes:
        path: Path of the file.
        sha256: SHA-256 of the file's bytes, in hex.
        tiers: Tiers, the fastest first.
        rules: Rules, in the order of the file; the first that matches an object applies.
        pins: Pins.
        tags: Tags of checkpoints.
        tiering: Options of the planner and the mover.
    """

    path: Path
    sha256: str
    tiers: tuple[Tier, ...] = Field(min_length=1)
    rules: tuple[Rule, ...] = ()
    pins: tuple[Pin, ...] = ()
    tags: tuple[Tag, ...] = ()
    tiering: TieringOptions = TieringOptions()

    def tier(self, name: str) -> Tier:
        """Return the tier of this name. Raises ValueError, which lists the names of all tiers."""
        return self.tiers[self.index(name)]

    def index(self, name: str) -> int:
        """Return the number of a tier, 0 for the fastest. Raises ValueError, which lists the names of all tiers."""
        names = [tier.name for tier in self.tiers]
        if name not in names:
            raise ValueError(f"{self.path}: no tier is called {name!r}; there are {', '.join(names)}")
        return names.index(name)

    @property
    def home(self) -> Tier:
        """The home tier: the first standard tier, or else the first tier.

        It holds the versions of data sets, the placements and the lock.
        """
        return next((tier for tier in self.tiers if tier.role == "standard"), self.tiers[0])
