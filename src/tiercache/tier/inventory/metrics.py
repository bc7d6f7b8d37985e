"""Metrics of checkpoints: from their names, and from small JSON files in their folders.

Files are read in parallel, and only if a rule uses a metric that the name does not contain.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo
from tiercache.tier.inventory.layouts import DECIMAL, NUMBER, OWN_TIME, SUFFIXES, WORD
from tiercache.tier.model import READABLE, RESTORED
from tiercache.tier.text_columns import ROWS_AT_A_TIME, match_regex, split_keys

if TYPE_CHECKING:
    from tiercache.store import Store
    from tiercache.tier.inventory.groups import Copies
    from tiercache.tier.inventory.listing import Listing
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores


# In ascending precedence. The first is Orbax's: a file "metrics" in a folder "metrics".
FILES = ("metrics/metrics", "metadata.json", "trainer_state.json", "metrics.json")
# The Trainer log of a long run has some MiB.
MAX_BYTES = 16 << 20
# Matches the keys of objects that read_metrics() may read.
MAY_HOLD = rf"(?:^|/)(?:{'|'.join(map(re.escape, FILES))})$"

_COUNTER = re.compile(rf"(?i)(?:^|[-_])(?:{WORD})[-_=]?[0-9]+(?=$|[-_])")
_METRIC = re.compile(
    rf"(?i)(?:^|(?<=[-_]))(?P<name>[a-z][\w@.]*?)(?:=(?P<number>{NUMBER})|[-_]?(?P<decimal>{DECIMAL}))(?=$|[-_])"
)
_SUFFIX = re.compile(rf"(?i){SUFFIXES}+$")
_OWN_TIME = re.compile(rf"{OWN_TIME}$")
# Keys of a Trainer log line that describe progress and are not metrics.
_NO_METRICS = ("step", "epoch", "total_flos")


def metrics_in_name(name: str) -> dict[str, float]:
    """Return the metrics in the name of a file or folder: "val_loss=1.9", "val_loss-1.9", "val_loss1.9".

    Counters (epoch, step and similar) are not metrics. Without "=", a value must have a decimal point.
    """
    found: dict[str, float] = {}
    for part in _COUNTER.split(_OWN_TIME.sub("", _SUFFIX.sub("", name))):
        for match in _METRIC.finditer(part):
            found |= _finite(match["name"], float(match["number"] or match["decimal"]))
    return found


def files_of(objects: Iterable[ObjectInfo]) -> tuple[ObjectInfo, ...]:
    """Return the objects of a checkpoint that may hold metrics, in the order of FILES.

    Of two with the same name, the one nearest to the top is used; objects above MAX_BYTES are left out.
    """
    found: dict[str, ObjectInfo] = {}
    for one in objects:
        name = _file_name(one.key)
        if name in FILES and (name not in found or one.key.count("/") < found[name].key.count("/")):
            found[name] = one
    return tuple(found[name] for name in FILES if name in found and found[name].n_bytes <= MAX_BYTES)


def _file_name(key: str) -> str:
    """Return the entry of FILES that the key ends with, or else its last segment."""
    parts = key.split("/")
    name = "/".join(parts[-2:])
    return name if name in FILES else parts[-1]


def read_metrics(store: Store, objects: Sequence[ObjectInfo]) -> dict[str, float]:
    """Return the metrics in the small files of a checkpoint; files that cannot be parsed are ignored.

    Reads at most four objects of at most MAX_BYTES each. Raises StoreError if a
    file exists and cannot be read now, so that the best checkpoints are unknown.
    """
    found: dict[str, float] = {}
    for one in files_of(objects):
        try:
            data, info = store.read_tail(one.key, MAX_BYTES)
        except NotFound:  # deleted since it was listed
            continue
        if info.n_bytes <= MAX_BYTES:
            found |= parse_metrics(_file_name(one.key), data)
    return found


def parse_metrics(name: str, data: bytes) -> dict[str, float]:
    """Return the metrics in the content of a file with this name; empty if it cannot be parsed."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(body, dict):
        return {}
    return _of_trainer(body) if name == "trainer_state.json" else dict(_numbers(body))


def _of_trainer(body: Mapping[str, Any]) -> dict[str, float]:
    """Return what Trainer logged at the step of the checkpoint. best_metric is ignored: it is the best value so far."""
    step, log = body.get("global_step"), body.get("log_history")
    found: dict[str, float] = {}
    for line in log if isinstance(log, list) else ():
        if isinstance(line, dict) and line.get("step") == step:
            found |= {name: value for name, value in _numbers(line) if name not in _NO_METRICS}
    return found


def _numbers(body: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield names and numbers of a table, and of nested tables as "table/name"; names in `metrics` get no prefix."""
    for name, value in body.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, one in inner:
            if isinstance(one, int | float) and not isinstance(one, bool):
                joined = key if name == "metrics" and key else f"{name}/{key}".rstrip("/")
                yield from _finite(joined, one).items()


def _finite(name: str, value: float) -> dict[str, float]:
    """Return the metric as a dict; empty if the value is not finite or too large."""
    try:
        number = float(value)
    except OverflowError:
        return {}
    return {name: number} if math.isfinite(number) else {}


def metrics_in_names(names: pa.Array, metrics: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the given metrics of each name, as metrics_in_name(): float64[n] each, NaN where there is none."""
    found = {name: np.full(len(names), np.nan) for name in metrics}
    rows = np.flatnonzero(match_regex(names, "|".join(map(re.escape, metrics))))
    for row, name in zip(rows.tolist(), names.take(pa.array(rows)).to_pylist(), strict=True):
        for metric, value in metrics_in_name(name).items():
            if metric in found:
                found[metric][row] = value
    return found


_THREADS = 16
_MAY_NAME = r"=|\d\.\d"


def used_metrics(file: RuleFile) -> tuple[tuple[str, ...], ...]:
    """Return the metrics that keep lists use, sorted.

    Each is a tuple of names; a run uses the first name that any of its checkpoints has.
    """
    keeps = [keep for rule in file.rules for keep in rule.keep.values()]
    return tuple(sorted({best.metrics for keep in keeps for best in keep.best}))


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointMetrics:
    columns: Mapping[str, NDArray[np.float64]]  # by name, of all groups; NaN where there is none
    unread: NDArray[np.int64]  # ascending: groups with files that may hold metrics, none of which can be read
    in_files: Mapping[int, frozenset[str]]  # by group: names of all metrics in its files, where these were read


def find_metrics(
    file: RuleFile, stores: Stores, listed: Listing, copies: Copies, paths: pa.Array, checkpoints: NDArray[np.int64]
) -> CheckpointMetrics:
    """Find the metrics that keep lists use, in the names and files of checkpoints. checkpoints: Numbers of groups.

    No file is read if no rule uses a metric, or if a checkpoint's name contains the first name of each metric. Raises
    StoreError if a file exists and cannot be read now, so that the best checkpoints are unknown.
    """
    used = used_metrics(file)
    names = sorted({name for some in used for name in some})
    columns = {name: np.full(len(paths), np.nan) for name in names}
    if not names:
        return CheckpointMetrics(columns, np.empty(0, np.int64), {})
    for groups in _parts(checkpoints):
        texts = paths.take(pa.array(groups))
        may_name = match_regex(texts, _MAY_NAME)
        last = split_keys(texts.filter(pa.array(may_name)))[2]
        for name, column in metrics_in_names(last, names).items():
            columns[name][groups[may_name]] = column
    lacking = checkpoints[np.isnan(np.array([columns[some[0]][checkpoints] for some in used])).any(axis=0)]
    copy_of = _copies_to_read(listed, copies, lacking)
    unread = [group for group, copy in copy_of.items() if copy is None]
    readable = {group: copy for group, copy in copy_of.items() if copy is not None}

    def read(group: int) -> Mapping[str, float] | None:
        copy = readable[group]
        start, end = copies.start[copy : copy + 2].tolist()
        rows = copies.row[start:end]
        rows = rows[_may_hold(listed, rows)]
        keys = listed.keys.take(pa.array(rows)).to_pylist()
        objects = [ObjectInfo(*one) for one in zip(keys, listed.n_bytes[rows].tolist(), strict=True)]
        store = stores.store(file.tiers[int(copies.tier[copy])].name)
        try:
            return read_metrics(store, objects)
        except StoreError as error:
            if error.retryable:
                raise
            return None

    in_files: dict[int, frozenset[str]] = {}
    interned: dict[frozenset[str], frozenset[str]] = {}  # a million checkpoints have equal sets
    with ThreadPoolExecutor(_THREADS, "tiercache-metrics") as pool:
        for group, metrics in zip(readable, pool.map(read, readable), strict=True):
            if metrics is None:
                unread.append(group)
                continue
            in_files[group] = interned.setdefault(frozenset(metrics), frozenset(metrics))
            for name, column in columns.items():
                if name in metrics and np.isnan(column[group]):  # a metric in the name has precedence
                    column[group] = metrics[name]
    return CheckpointMetrics(columns, np.array(sorted(unread), np.int64), in_files)


def _copies_to_read(listed: Listing, copies: Copies, groups: NDArray[np.int64]) -> dict[int, int | None]:
    """Return, by group with a metrics file, the first readable copy that has one; None: no such copy is readable."""
    is_asked_for = np.zeros(int(copies.group.max(initial=-1)) + 1, np.bool_)
    is_asked_for[groups] = True
    copy_of = np.repeat(np.arange(len(copies.group)), copies.n_objects)
    at = np.flatnonzero(is_asked_for[copies.group[copy_of]])
    at = np.concatenate([at[:0], *(some[_may_hold(listed, copies.row[some])] for some in _parts(at))])
    found: dict[int, int | None] = {}
    for copy in np.unique(copy_of[at]).tolist():
        group = int(copies.group[copy])
        if found.get(group) is None:
            found[group] = copy if copies.state[copy] in (READABLE, RESTORED) else None
    return found


def _may_hold(listed: Listing, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    return match_regex(listed.keys.take(pa.array(rows)), MAY_HOLD)


def _parts(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        yield rows[start : start + ROWS_AT_A_TIME]
