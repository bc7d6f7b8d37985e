"""Metrics of a checkpoint: from its name, from small JSON files in its folder, and from Lightning's file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tiercache.errors import NotFound
from tiercache.tier.layouts import DECIMAL, NUMBER, SUFFIXES, WORD
from tiercache.tier.lightning import read_scores

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.store import Store

# In ascending precedence. The first is Orbax's: a file "metrics" in a folder "metrics".
FILES = ("metrics/metrics", "metadata.json", "trainer_state.json", "metrics.json")
# The Trainer log of a long run has some MiB.
MAX_BYTES = 16 << 20
# Lightning's checkpoints: a file, or (FSDP) a folder that contains such a part.
_LIGHTNING_FILE, _LIGHTNING_PART = ".ckpt", "meta.pt"
# Matches the keys of objects that read_metrics() may read, without regard to the checkpoint's path.
MAY_HOLD = (
    rf"(?:^|/)(?:{'|'.join(map(re.escape, FILES))})$|{re.escape(_LIGHTNING_FILE)}(?:/{re.escape(_LIGHTNING_PART)})?$"
)

_COUNTER = re.compile(rf"(?i)(?:^|[-_])(?:{WORD})[-_=]?[0-9]+(?=$|[-_])")
_METRIC = re.compile(
    rf"(?i)(?:^|(?<=[-_]))(?P<name>[a-z][\w@.]*?)(?:=(?P<number>{NUMBER})|[-_]?(?P<decimal>{DECIMAL}))(?=$|[-_])"
)
_SUFFIX = re.compile(rf"(?i){SUFFIXES}+$")
# Keys of a Trainer log line that describe progress and are not metrics.
_NO_METRICS = ("step", "epoch", "total_flos")


def metrics_in_name(name: str) -> dict[str, float]:
    """Return the metrics in the name of a file or folder: "val_loss=1.9", "val_loss-1.9", "val_loss1.9".

    Counters (epoch, step and similar) are not metrics. Without "=", a value must have a decimal point.
    """
    found: dict[str, float] = {}
    for (name_start, name_end), (start, end) in spans_of(name):
        found |= _finite(name[name_start:name_end], float(name[start:end]))
    return found


def spans_of(name: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield the (start, end) of each metric in a name, and of its number."""
    start, text = 0, _SUFFIX.sub("", name)
    ends = [(counter.start(), counter.end()) for counter in _COUNTER.finditer(text)]
    for end, next_start in [*ends, (len(text), len(text))]:
        for match in _METRIC.finditer(text[start:end]):
            named, number = match.span("name"), match.span("number" if match["number"] else "decimal")
            yield (start + named[0], start + named[1]), (start + number[0], start + number[1])
        start = next_start


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


def read_metrics(store: Store, objects: Sequence[ObjectInfo], path: str) -> dict[str, float]:
    """Return the metrics in the small files of a checkpoint; files that cannot be parsed are ignored.

    Reads at most four objects of at most MAX_BYTES each, and some blocks of a Lightning file.

    Args:
        store: Store of the checkpoint.
        objects: Objects of the checkpoint.
        path: Path of the checkpoint.

    Raises:
        StoreError: A file exists and cannot be read now, so that the best checkpoints are unknown.
    """
    found: dict[str, float] = {}
    for one in objects:
        is_part = one.key == f"{path}/{_LIGHTNING_PART}"
        if path.endswith(_LIGHTNING_FILE) and (one.key == path or is_part):
            with suppress(NotFound):
                found |= read_scores(store, one.key, one.n_bytes, path.rpartition("/")[2])
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
