"""Metrics of checkpoints: from names, from small JSON files in the folder, and from Lightning's checkpoints.

Lightning's checkpoint is torch's zip file with a pickle, which is interpreted and never executed: under `callbacks`,
`ModelCheckpoint` stores the monitored metric and the scores of the best checkpoints by path. Files are read in
parallel, and only if a rule uses a metric that the name does not contain.
"""

from __future__ import annotations

import json
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import NotFound, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store import StoreFile
from tiercache.tier.inventory.layouts import DECIMAL, NUMBER, OWN_TIME, SUFFIXES, WORD
from tiercache.tier.model import READABLE, RESTORED
from tiercache.tier.text_columns import ROWS_AT_A_TIME, match_regex, split_keys

if TYPE_CHECKING:
    from tiercache.store import Store
    from tiercache.tier.inventory.groups import Copies
    from tiercache.tier.inventory.listing import Listing
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores


# Limits for the bytes read from one checkpoint: zip directory, pickle and scores.
_MAX_PICKLE_BYTES, _MAX_READ_BYTES = 32 << 20, 64 << 20
_BLOCK_BYTES = 256 << 10
_ZIP_SIGN = b"PK\x03\x04"
_SEPARATORS = re.compile(r"[/\\]")
_FORMATS = {"FloatStorage": "f", "DoubleStorage": "d", "HalfStorage": "e", "LongStorage": "q", "IntStorage": "i"}
# Exceptions of zipfile, pickletools and the interpreter for a damaged file, or one that is not a torch checkpoint.
_NO_CHECKPOINT = (
    zipfile.BadZipFile,
    ValueError,  # includes UnicodeDecodeError
    LookupError,
    TypeError,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,  # zipfile: an encrypted record
)


def read_scores(store: Store, key: str, n_bytes: int, name: str) -> Mapping[str, float]:
    """Return the scores of a checkpoint by metric; empty if the object is not a Lightning checkpoint.

    name: Name of the checkpoint's file or folder, by which its scores are found. Raises StoreError if the object is
    gone, cannot be read, or has changed since it was listed.
    """
    if n_bytes < len(_ZIP_SIGN):
        return {}
    file = _Blocks(store, key, n_bytes)
    if file.read(len(_ZIP_SIGN)) != _ZIP_SIGN:
        return {}
    try:
        with zipfile.ZipFile(file) as records:
            return dict(_scores(records, name))
    except _NO_CHECKPOINT:
        return {}


class _Blocks(StoreFile):
    """An object that is read in blocks, which are cached: at most _MAX_READ_BYTES of them."""

    def __init__(self, store: Store, key: str, n_bytes: int) -> None:
        super().__init__(store, key, n_bytes)
        self._blocks = dict[int, bytearray]()

    def fill(self, wanted: ByteRange, buffer: memoryview) -> None:
        numbers = range(wanted.start // _BLOCK_BYTES, -(-wanted.end // _BLOCK_BYTES))
        self._fetch([number for number in numbers if number not in self._blocks])
        start = wanted.start - numbers[0] * _BLOCK_BYTES
        buffer[:] = b"".join(self._blocks[number] for number in numbers)[start : start + wanted.n_bytes]

    def _fetch(self, numbers: list[int]) -> None:
        if (len(self._blocks) + len(numbers)) * _BLOCK_BYTES > _MAX_READ_BYTES:
            raise ValueError("the zip directory and the pickle are too large for a checkpoint of torch")
        ranges = [ByteRange(n * _BLOCK_BYTES, min((n + 1) * _BLOCK_BYTES, self.n_bytes)) for n in numbers]
        buffers = [bytearray(one.n_bytes) for one in ranges]
        if buffers:
            self.store.read_into(self.key, [(one, memoryview(b)) for one, b in zip(ranges, buffers, strict=True)])
        self._blocks.update(zip(numbers, buffers, strict=True))


# -- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The first number of a tensor: class and record of its storage, and the offset in it."""

    kind: str
    record: str
    offset: int


def _scores(records: zipfile.ZipFile, name: str) -> Iterator[tuple[str, float]]:
    """Yield metric and score of each callback that has the checkpoint of this name among its best."""
    pickles = [one for one in records.namelist() if one.endswith("/data.pkl")]
    start = pickles[0].removesuffix("data.pkl")
    body = _Interpreter().run(_record(records, f"{start}data.pkl", _MAX_PICKLE_BYTES))
    for state in _table(_table(body).get("callbacks")).values():
        metric, scores = _table(state).get("monitor"), _table(_table(state).get("best_k_models"))
        for path, score in scores.items():
            if isinstance(metric, str) and _SEPARATORS.split(path)[-1] == name:
                value = _number(records, start, score)
                if value is not None and math.isfinite(value):
                    yield metric, value


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(records: zipfile.ZipFile, start: str, score: object) -> float | None:
    if isinstance(score, int | float) and not isinstance(score, bool):
        return float(score)
    if not isinstance(score, _Tensor):
        return None
    order = ">" if f"{start}byteorder" in records.NameToInfo and _order(records, start) == b"big" else "<"
    data = _record(records, f"{start}data/{score.record}", _BLOCK_BYTES)
    if score.kind == "BFloat16Storage":  # the upper half of a float32
        (half,) = struct.unpack_from(f"{order}H", data, 2 * score.offset)
        return float(struct.unpack(">f", struct.pack(">I", half << 16))[0])
    code = f"{order}{_FORMATS[score.kind]}"
    return float(struct.unpack_from(code, data, struct.calcsize(code) * score.offset)[0])


def _order(records: zipfile.ZipFile, start: str) -> bytes:
    return _record(records, f"{start}byteorder", _BLOCK_BYTES).strip()


def _record(records: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    """Return a record of a torch file. Raises ValueError if it is compressed or too large."""
    info = records.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most_bytes:
        raise ValueError(f"{name}: expected at most {most_bytes} bytes, not compressed")
    return records.read(name)


# -- the pickle -------------------------------------------------------------------------------------------------------

# The placeholder for results of opcodes that are not interpreted.
_OTHER = object()
_MARK = object()
# Opcodes whose argument is not the value that they push.
_NO_VALUES = ("EXT1", "EXT2", "EXT4", "PERSID", "INST")


@dataclass(frozen=True, slots=True)
class _Name:
    """The name of a function or class in the pickle. It is never looked up."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    record: str


class _Interpreter:
    """Interprets a pickle: dicts with string keys, tuples, strings, numbers, and the positions of tensors in records.

    Each value is created once and then shared, so that memory is at most a few times the size of the pickle.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return the value of the pickle. Raises ValueError, LookupError or TypeError if the data is not a pickle."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self._memo[int(argument or 0)] = self._stack[-1]
            else:
                self._step(opcode, argument)
        return self._stack.pop()

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Pop the values that the opcode takes, and push as many as it leaves: its result, or a placeholder."""
        takes = opcode.stack_before
        items = self._to_mark() if pickletools.markobject in takes else []
        below = self._last(takes.index(pickletools.markobject) if pickletools.markobject in takes else len(takes))
        result = self._result(opcode.name, argument, below, items)
        self._stack += [result] * len(opcode.stack_after)

    def _result(self, name: str, argument: Any, below: list[Any], items: list[Any]) -> Any:
        """Return what an opcode leaves. items: Values that it takes above a mark; below: The others."""
        match name:
            case "MARK":
                return _MARK
            case "GET" | "BINGET" | "LONG_BINGET":
                return self._memo[argument]
            case "MEMOIZE":
                self._memo[len(self._memo)] = below[0]
                return below[0]
            case "EMPTY_DICT" | "DICT":
                return _with({}, items)
            case "SETITEM" | "SETITEMS":
                return _with(below[0], items or below[1:])
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(items or below)
            case "GLOBAL":
                return _Name(argument)
            case "STACK_GLOBAL":
                return _Name(" ".join(below))
            case "BINPERSID":
                return _storage(below[0])
            case "REDUCE":
                return _called(*below)
            case "APPEND" | "APPENDS" | "ADDITEMS" | "BUILD" | "DUP" | "READONLY_BUFFER":
                return below[0]
        is_value = isinstance(argument, int | float | str) and name not in _NO_VALUES
        return argument if is_value else _OTHER

    def _last(self, n: int) -> list[Any]:
        if len(self._stack) < n:
            raise ValueError("the pickle pops more values than are on the stack")
        values = self._stack[len(self._stack) - n :]
        del self._stack[len(self._stack) - n :]
        return values

    def _to_mark(self) -> list[Any]:
        """Pop and return the values above the last mark, and the mark."""
        n = next((n for n, value in enumerate(reversed(self._stack)) if value is _MARK), None)
        if n is None:
            raise ValueError("the pickle refers to a mark that is not on the stack")
        values = self._last(n)
        self._stack.pop()
        return values


def _with(target: Any, items: list[Any]) -> Any:
    """Add keys and values to the dict; keys that are not strings, and targets that are not dicts, are ignored."""
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str))
    return target


def _storage(identity: object) -> object:
    """Return the storage that torch identifies as ("storage", its class, its record, its device, its length)."""
    match identity:
        case ("storage", _Name(text), str(record), _, _):
            return _Storage(text.rpartition(" ")[2], record)
    return _OTHER


def _called(function: object, arguments: object) -> object:
    """Return the result of a function that torch calls in a pickle, if a score needs it."""
    match function, arguments:
        case _Name("torch._utils _rebuild_tensor_v2"), (_Storage(kind, record), int(offset), *_) if offset >= 0:
            return _Tensor(kind, record, offset)
        case _Name("collections OrderedDict"), ():
            return {}
    return _OTHER


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


def read_metrics(store: Store, objects: Sequence[ObjectInfo], path: str) -> dict[str, float]:
    """Return the metrics in the small files of a checkpoint; files that cannot be parsed are ignored.

    Reads at most four objects of at most MAX_BYTES each, and some blocks of a Lightning file. Raises StoreError if a
    file exists and cannot be read now, so that the best checkpoints are unknown.
    """
    found: dict[str, float] = {}
    for one in objects:
        is_part = one.key == f"{path}/{_LIGHTNING_PART}"
        if path.endswith(_LIGHTNING_FILE) and (one.key == path or is_part):
            with suppress(NotFound):
                # The score is stored under the name that the file was written with.
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
    """The metrics of checkpoints that keep lists use."""

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
            return read_metrics(store, objects, paths[group].as_py())
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
    """Return whether each of the listed objects may hold metrics."""
    return match_regex(listed.keys.take(pa.array(rows)), MAY_HOLD)


def _parts(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows in parts, so that temporary arrays stay small."""
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        yield rows[start : start + ROWS_AT_A_TIME]
