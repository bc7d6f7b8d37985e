"""Metrics of checkpoints: from a name, from small JSON files in the folder, and from Lightning's own file."""

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

# Later ones count more where two of them have a metric.
# The first is Orbax's: a file "metrics" in a folder "metrics".
FILES = ("metrics/metrics", "metadata.json", "trainer_state.json", "metrics.json")
# Trainer's log of a long run has some MiB.
MAX_BYTES = 16 << 20
# Lightning's checkpoints: a file, or a folder that FSDP has written with such a file in it.
_LIGHTNING_FILE, _LIGHTNING_PART = ".ckpt", "meta.pt"
# The keys of objects that read_metrics() reads; the path of their checkpoint is not looked at.
MAY_HOLD = (
    rf"(?:^|/)(?:{'|'.join(map(re.escape, FILES))})$|{re.escape(_LIGHTNING_FILE)}(?:/{re.escape(_LIGHTNING_PART)})?$"
)

_COUNTER = re.compile(rf"(?i)(?:^|[-_])(?:{WORD})[-_=]?[0-9]+(?=$|[-_])")
_METRIC = re.compile(
    rf"(?i)(?:^|(?<=[-_]))(?P<name>[a-z][\w@.]*?)(?:=(?P<number>{NUMBER})|[-_]?(?P<decimal>{DECIMAL}))(?=$|[-_])"
)
_SUFFIX = re.compile(rf"(?i){SUFFIXES}+$")
# Of a line of Trainer's log: where it was written, not how good the model was.
_NO_METRICS = ("step", "epoch", "total_flos")


def metrics_of(name: str) -> dict[str, float]:
    """Metrics that a file or folder is named by: "val_loss=1.9", "val_loss-1.9", "val_loss1.9".

    Counters (epoch, step and the like) are none; without "=" a value has a decimal point.
    """
    found: dict[str, float] = {}
    for (name_start, name_end), (start, end) in spans_of(name):
        found |= _finite(name[name_start:name_end], float(name[start:end]))
    return found


def spans_of(name: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of each metric in a name, and of the number behind it."""
    start, text = 0, _SUFFIX.sub("", name)
    ends = [(counter.start(), counter.end()) for counter in _COUNTER.finditer(text)]
    for end, next_start in [*ends, (len(text), len(text))]:
        for match in _METRIC.finditer(text[start:end]):
            named, number = match.span("name"), match.span("number" if match["number"] else "decimal")
            yield (start + named[0], start + named[1]), (start + number[0], start + number[1])
        start = next_start


def files_of(objects: Iterable[ObjectInfo]) -> tuple[ObjectInfo, ...]:
    """Those that may hold metrics of the checkpoint that these objects are, in the order of FILES.

    Of two with one name the one nearest to the top; none above MAX_BYTES.
    """
    found: dict[str, ObjectInfo] = {}
    for one in objects:
        name = _file_name(one.key)
        if name in FILES and (name not in found or one.key.count("/") < found[name].key.count("/")):
            found[name] = one
    return tuple(found[name] for name in FILES if name in found and found[name].n_bytes <= MAX_BYTES)


def _file_name(key: str) -> str:
    """The name of FILES that a key ends with, or else its last part."""
    parts = key.split("/")
    name = "/".join(parts[-2:])
    return name if name in FILES else parts[-1]


def read_metrics(store: Store, objects: Sequence[ObjectInfo], path: str) -> dict[str, float]:
    """Metrics in the small files among a checkpoint's objects; what cannot be understood has none.

    Reads at most four objects of at most MAX_BYTES each, and some blocks of one that Lightning has written.

    Args:
        store: where they lie.
        objects: the checkpoint's.
        path: the checkpoint's.

    Raises:
        StoreError: a file is there and cannot be read now: what is best is not known then.
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
        except NotFound:  # gone since it was listed
            continue
        if info.n_bytes <= MAX_BYTES:
            found |= parse_metrics(_file_name(one.key), data)
    return found


def parse_metrics(name: str, data: bytes) -> dict[str, float]:
    """Metrics in the text of a file of this name; none where it is something else."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(body, dict):
        return {}
    return _of_trainer(body) if name == "trainer_state.json" else dict(_numbers(body))


def _of_trainer(body: Mapping[str, Any]) -> dict[str, float]:
    """What Trainer logged at the step of the checkpoint. best_metric is that of the best so far, and left alone."""
    step, log = body.get("global_step"), body.get("log_history")
    found: dict[str, float] = {}
    for line in log if isinstance(log, list) else ():
        if isinstance(line, dict) and line.get("step") == step:
            found |= {name: value for name, value in _numbers(line) if name not in _NO_METRICS}
    return found


def _numbers(body: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers of a table, and of tables in it as "table/name", but for `metrics`, whose names are its own."""
    for name, value in body.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, one in inner:
            if isinstance(one, int | float) and not isinstance(one, bool):
                joined = key if name == "metrics" and key else f"{name}/{key}".rstrip("/")
                yield from _finite(joined, one).items()


def _finite(name: str, value: float) -> dict[str, float]:
    """The metric; none where it is no number that others can be compared with, or too large to be one."""
    try:
        number = float(value)
    except OverflowError:
        return {}
    return {name: number} if math.isfinite(number) else {}
