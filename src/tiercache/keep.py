"""Which checkpoints of a run stay: keep lists and pins, of which `checkpoint/` and `tier/` have the same idea.

The last checkpoints of a run are those that were written last, whatever their steps: a run that restarts at a lower
step goes on from them. Steps are compared as numbers, within the part of a run between two restarts. An incomplete
checkpoint is kept only by its age, so that it does not displace a complete one. If no checkpoint of a run has the
metric of a `best`, the keep list keeps all checkpoints of that run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiercache.model import parse_duration

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]

MAX_COUNT = 1 << 62  # checkpoints are counted as int64
_LONGEST_S = 10_000 * 365.0 * 86400.0
_BEST = re.compile(r"\s*(?P<metric>[^:]*[^:\s])\s*:\s*(?P<n>[0-9]+)\s*(?::\s*(?P<mode>min|max)\s*)?")


@dataclass(frozen=True, slots=True)
class BestMetric:
    """The n checkpoints with the lowest ("min") or the highest ("max") value of a metric."""

    metric: str
    n: int
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True, slots=True)
class KeepList:
    """A keep list. It keeps a checkpoint that any of its keys selects; None and (): the key is not given."""

    last: int | None = None
    every_steps: int | None = None
    every_s: float | None = None
    best: tuple[BestMetric, ...] = ()
    younger_s: float | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """A rule of retention; a checkpoint that any rule keeps is kept.

    The keys and their meaning are those of the keep lists of a rule file (docs/reference/tiers.md). Within a rule, a
    checkpoint that any of the keys selects is kept.

    Args:
        last: Number of checkpoints written last.
        every_steps: Number of steps; the first checkpoint at or after each multiple of it above 0 is kept.
        every: Duration with a unit, such as "6h"; the first checkpoint in each interval of this length is kept.
        best: Metric and number, such as "val_loss:2" or "accuracy:1:max", or several of them.
        younger_than: Duration with a unit, such as "7d"; checkpoints that were written within this time are kept.
        tier: "local" or "remote", the only tier to which the rule applies; None for both.

    Raises:
        ValueError: The rule has no key, or a value is wrong.
    """

    last: int | None = None
    every_steps: int | None = None
    every: str | None = None
    best: str | Sequence[str] = ()
    younger_than: str | None = None
    tier: Literal["local", "remote"] | None = None
    keep_list: KeepList = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tier not in (None, "local", "remote"):
            raise ValueError(f"Keep.tier: expected 'local', 'remote' or None, got {self.tier!r}")
        object.__setattr__(self, "keep_list", parse_keep_list(self._given(), "Keep"))

    def _given(self) -> dict[str, Any]:
        names = [one.name for one in fields(self) if one.name not in ("tier", "keep_list")]
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value != ()}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._given().items())


def encode_keeps(keeps: Sequence[Keep]) -> bytes:
    """Return the text of keep.json, which has no tiers: each tier has a file of its own."""
    return json.dumps({"keep": [keep._given() for keep in keeps]}).encode() + b"\n"  # noqa: SLF001 - of one file


def parse_keeps(data: bytes) -> tuple[Keep, ...]:
    """Return the rules in a text of keep.json; () if it cannot be read, as one of a later release."""
    try:
        return tuple(Keep(**given) for given in json.loads(data)["keep"])
    except (ValueError, TypeError, KeyError):
        return ()


# -- keep lists from their keys --------------------------------------------------------------------------------------


def parse_keep_list(given: Mapping[str, Any], where: str) -> KeepList:
    """Return the keep list of a table with the keys of a rule file, such as {"last": 3, "every": "6h"}.

    Args:
        given: Values by key.
        where: Position of the table, for messages.

    Raises:
        ValueError: The table is empty, or a key or a value is wrong; the message names the key.
    """
    keys = ", ".join(sorted(_KEYS))
    if not given:
        raise ValueError(f"{where}: is empty; its keys are {keys}")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {keys}"
            raise ValueError(f"{where}.{key}: no such key; {hint}")
        name, read = _KEYS[key]
        try:
            values[name] = read(value)
        except ValueError as error:
            raise ValueError(f"{where}.{key}: {error}") from None
    return KeepList(**values)


def _count(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise ValueError(f"expected an integer from 1 to 2^62, got {value!r}")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, str):
        raise ValueError(f"a duration needs a unit (s, m, h, d or w), as in '6h', got {value!r}")
    seconds = parse_duration(value)
    if not 0 < seconds <= _LONGEST_S:
        raise ValueError(f"expected a duration above 0 and up to 10,000 years, got {value!r}")
    return seconds


def _bests(value: object) -> tuple[BestMetric, ...]:
    given = value if isinstance(value, list | tuple) else (value,)
    if not given:
        raise ValueError("expected one or more values, got an empty list")
    return tuple(map(_one_best, given))


def _one_best(given: object) -> BestMetric:
    match = _BEST.fullmatch(given) if isinstance(given, str) else None
    if match is None or not 1 <= int(match["n"]) <= MAX_COUNT:
        raise ValueError(f"expected METRIC:N or METRIC:N:max, as in 'val_loss:2' or 'accuracy:1:max', got {given!r}")
    return BestMetric(match["metric"].strip(), int(match["n"]), "max" if match["mode"] == "max" else "min")


_KEYS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "last": ("last", _count),
    "every_steps": ("every_steps", _count),
    "every": ("every_s", _seconds),
    "best": ("best", _bests),
    "younger_than": ("younger_s", _seconds),
}


# -- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointColumns:
    """Checkpoints as columns of one length."""

    now_s: float  # time of the evaluation, in seconds since the epoch
    run: NDArray[np.int32]  # number of the run that a checkpoint belongs to
    step: NDArray[np.int64]  # step of the training run; negative: unknown
    created_s: NDArray[np.float64]  # when it was written
    complete: Flags
    metrics: Mapping[str, NDArray[np.float64]]  # by name; NaN where a checkpoint does not have the metric
    unread: Flags  # whether the metrics of a checkpoint are unknown because no file that may hold them can be read


@dataclass(frozen=True, slots=True, eq=False)
class KeepResult:
    """The result of a keep list for some groups, in the order of the rows."""

    named: Flags  # whether the list keeps the group
    unscored: Flags  # whether `best` cannot be evaluated for the group, so that the group is kept
    without: Flags  # whether the group lacks a metric of `best` that others of its run have: `best` ignores it
    unscored_by: tuple[str, ...] = ()  # metrics for which any group is unscored
    without_by: tuple[str, ...] = ()  # metrics that any group lacks


def evaluate_keep_list(checkpoints: CheckpointColumns, rows: Rows, keep: KeepList) -> KeepResult:
    """Return which of the groups a keep list keeps: the union of what its keys keep, evaluated per run.

    rows: Group numbers of checkpoints, unique, in any order.
    """
    named, unscored, without = (np.zeros(len(checkpoints.run), np.bool_) for _ in range(3))
    complete = rows[checkpoints.complete[rows]]
    if keep.last is not None or keep.every_steps is not None:
        written = _by_time(checkpoints, complete)
        if keep.last is not None:
            named[written[from_end(checkpoints.run[written]) < keep.last]] = True
        if keep.every_steps is not None:
            named[_first_of_steps(checkpoints, written, keep.every_steps)] = True
    if keep.every_s is not None:
        named[_first_of_stretches(checkpoints, complete, keep.every_s)] = True
    unscored_by: list[str] = []
    without_by: list[str] = []
    for best in keep.best:
        values, is_unscored = scores_of(checkpoints, complete, best.metric)
        named[_best(checkpoints, complete, values, best)] = True
        unsure = is_unscored | (np.isnan(values) & checkpoints.unread[complete])
        lacks = np.isnan(values) & ~unsure
        unscored[complete[unsure]], without[complete[lacks]] = True, True
        unscored_by += [best.metric] if unsure.any() else []
        without_by += [best.metric] if lacks.any() else []
    if keep.younger_s is not None:
        named[rows[checkpoints.now_s - checkpoints.created_s[rows] <= keep.younger_s]] = True
    return KeepResult(named[rows], unscored[rows], without[rows], tuple(unscored_by), tuple(without_by))


def scores_of(checkpoints: CheckpointColumns, complete: Rows, metric: str) -> tuple[NDArray[np.float64], Flags]:
    """Return a metric of complete checkpoints, NaN where there is none, and whether no group of their run has it."""
    everywhere = checkpoints.metrics.get(metric)
    values = np.full(len(complete), np.nan) if everywhere is None else everywhere[complete]
    _, run = np.unique(checkpoints.run[complete], return_inverse=True)
    return values, np.bincount(run, weights=~np.isnan(values))[run] == 0


def _by_time(checkpoints: CheckpointColumns, rows: Rows) -> Rows:
    """Sort rows by run and time of writing; by step where the times are equal."""
    return rows[np.lexsort((rows, checkpoints.step[rows], checkpoints.created_s[rows], checkpoints.run[rows]))]


def _begins(*columns: NDArray[np.generic]) -> Flags:
    """Return whether each row differs from the previous row in any column; bool[n]."""
    begins = np.ones(len(columns[0]), np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _from_start(run: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return, for each row of a sorted column, the number of earlier rows of its run; int64[n]."""
    starts = np.flatnonzero(_begins(run))
    positions = np.arange(len(run))
    return positions - np.repeat(starts, np.diff(np.append(starts, len(run))))


def from_end(run: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return, for each row of a sorted column, the number of later rows of its run; int64[n]."""
    return _from_start(run[::-1])[::-1]


def _first_of_steps(checkpoints: CheckpointColumns, written: Rows, every: int) -> Rows:
    """Return the first rows at or after each multiple above 0, counted anew after each restart. written: By time."""
    rows = written[checkpoints.step[written] >= 0]
    run, step = checkpoints.run[rows], checkpoints.step[rows]
    restarts = np.zeros(len(rows), np.int64)
    restarts[1:] = np.cumsum((run[1:] == run[:-1]) & (step[1:] < step[:-1]))
    return rows[_begins(run, restarts, step // every) & (step >= every)]


def _first_of_stretches(checkpoints: CheckpointColumns, rows: Rows, every_s: float) -> Rows:
    rows = rows[np.lexsort((rows, checkpoints.created_s[rows], checkpoints.run[rows]))]
    run, created_s = checkpoints.run[rows], checkpoints.created_s[rows]
    starts = np.flatnonzero(_begins(run))
    first_s = np.repeat(created_s[starts], np.diff(np.append(starts, len(rows))))
    return rows[_begins(run, np.floor((created_s - first_s) / every_s))]


def _best(checkpoints: CheckpointColumns, rows: Rows, values: NDArray[np.float64], best: BestMetric) -> Rows:
    """Return the best rows of each run. Among equal values, the higher step is better. values: Value of each row."""
    rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
    worse = values if best.mode == "min" else -values
    rows = rows[
        np.lexsort((-rows, -checkpoints.created_s[rows], -checkpoints.step[rows], worse, checkpoints.run[rows]))
    ]
    return rows[_from_start(checkpoints.run[rows]) < best.n]


# -- pins ------------------------------------------------------------------------------------------------------------

PIN_NAME = "pin.json"
UNREADABLE_PIN = f"its {PIN_NAME} cannot be read"
"""Reason of the pin of a checkpoint of which it cannot be known whether it is pinned: nothing is deleted."""


def encode_pin(why: str | None) -> bytes:
    """Return the text of pin.json. why: Reason of the pin, for people; None: the checkpoint is not pinned."""
    return json.dumps({"pinned": why is not None, "why": why or ""}).encode() + b"\n"


def parse_pin(data: bytes) -> str | None:
    """Return the reason of the pin in a text of pin.json; None if there is no pin.

    A text that cannot be read counts as a pin.
    """
    try:
        body = json.loads(data)
        is_pinned, why = body["pinned"], body.get("why", "")
    except (ValueError, TypeError, KeyError, AttributeError):
        return UNREADABLE_PIN
    if type(is_pinned) is not bool or not isinstance(why, str):
        return UNREADABLE_PIN
    return why if is_pinned else None
