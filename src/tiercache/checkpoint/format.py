"""Format of stored checkpoints: their names, the manifest that commits one, its objects, and safetensors files.

::

    step-000000000100.20261129T193324123Z-7f3a9c/    step, time of the save's start (UTC, ms), 6 random hex digits
        tensors-00001-of-00004.safetensors           tensors; several files, written and uploaded in parallel
        state.json                                   everything that is not a tensor
        metrics.json                                 metrics, also in the manifest; the tier engine reads this file
        pin.json                                     the pin; replaced as a whole, not in the manifest
        checkpoint.json                              the manifest, put if absent and last: it commits the checkpoint
    _tiercache/metrics/step-....json                 metrics, which stay when the folder is moved or archived
    _tiercache/keep.json                             rules of retention of the last program that saved, for `ckpt ls`
    run.json                                         random id that the URL and its local folder share

A checkpoint exists if it has a manifest. Names sort by step; the newest checkpoint is the one that was written last.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tiercache._native.checksum import crc32c
from tiercache.distribution import __version__
from tiercache.errors import CorruptCheckpoint, UnsupportedFormat
from tiercache.model import OWN_FOLDER, ObjectInfo
from tiercache.store.contract import Store, check_key

FORMAT = 1
SOFTWARE = f"tiercache {__version__}"
MANIFEST_NAME = "checkpoint.json"
STATE_NAME = "state.json"
METRICS_NAME = "metrics.json"
RUN_NAME = "run.json"
"""File of a store, and of the local folder with copies of its checkpoints, with the same random id."""
KEEP_KEY = f"{OWN_FOLDER}keep.json"
"""Object of a store, or of the local folder, with the rules of retention that the last program had for it."""
_NAME = re.compile(r"step-([0-9]{12,18})\.([0-9]{8}T[0-9]{9}Z)-([0-9a-f]{6})")
_TEXT = re.compile(r"[^\0]{1,200}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_STEPS = 10**18 - 1
_MOST = 2**63 - 1
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class StoredFile:
    path: str
    n_bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Location of a stored tensor."""

    file: str  # as StoredFile.path
    offset: int  # of its first byte in the file
    n_bytes: int  # of its values: row-major, little-endian
    dtype: str  # by the name of safetensors, such as "BF16"
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a committed checkpoint.

    Attributes:
        name: Name of the checkpoint, which is the name of its folder.
        step: Step of the training run.
        created_s: Time at which the save began, in seconds since the Unix epoch; whole milliseconds.
        files: All files except the manifest itself and pin.json.
        tensors: Tensors by name.
        metrics: Metrics by name; a value may be infinite or NaN.
        note: JSON value of the user; None if there is none.
        software: Name and release of the software that wrote the checkpoint.
        format: Format version.
    """

    name: str
    step: int
    created_s: float
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: Any = None
    software: str = SOFTWARE
    format: int = FORMAT

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    def file(self, path: str) -> StoredFile:
        for file in self.files:
            if file.path == path:
                return file
        raise CorruptCheckpoint("the manifest does not list this file", url=self.name, part=path)


# -- names -----------------------------------------------------------------------------------------------------------


def checkpoint_name(step: int, created_s: float, nonce: str) -> str:
    if type(step) is not int or not 0 <= step <= _MOST_STEPS:
        raise ValueError(f"step is an integer from 0 to 10^18 - 1, got {step!r}")
    created = _EPOCH + timedelta(milliseconds=round(created_s * 1000))
    name = f"step-{step:012d}.{created:%Y%m%dT%H%M%S}{created.microsecond // 1000:03d}Z-{nonce}"
    if parse_name(name) is None:
        raise ValueError(f"nonce is six hex digits, got {nonce!r}")
    return name


def parse_name(name: str) -> tuple[int, float] | None:
    """Return the step and the time (seconds since the Unix epoch) in a checkpoint's name; None for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    try:
        created = datetime.strptime(f"{match[2][:-4]}{match[2][-4:-1]}000+0000", "%Y%m%dT%H%M%S%f%z")
    except ValueError:  # month 13
        return None
    return int(match[1]), round((created - _EPOCH) / timedelta(milliseconds=1)) / 1000


def written_order(name: str) -> tuple[float, str]:
    """Return the sort key by which names sort from the checkpoint written first to the one written last."""
    parsed = parse_name(name)
    if parsed is None:
        raise ValueError(f"not the name of a checkpoint: {name!r}")
    return parsed[1], name


def metrics_key(name: str) -> str:
    """Return the key of the metrics of a checkpoint that stay at the URL when its folder is moved or archived."""
    return f"{OWN_FOLDER}metrics/{name}.json"


def name_of_metrics(key: str) -> str:
    """Return the name of the checkpoint whose metrics have this key; "" for another key."""
    name = key.removeprefix(f"{OWN_FOLDER}metrics/").removesuffix(".json")
    return name if parse_name(name) is not None and key == metrics_key(name) else ""


def encode_metrics(metrics: Mapping[str, float]) -> bytes:
    return json.dumps({name: metric_json(value) for name, value in metrics.items()}, allow_nan=False).encode("ascii")


def parse_metrics(data: bytes) -> dict[str, float] | None:
    """Return the metrics in a JSON text; None if it is none."""
    try:
        return {str(name): _metric_of(value) for name, value in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def manifest_key(name: str) -> str:
    return f"{name}/{MANIFEST_NAME}"


# -- listing ---------------------------------------------------------------------------------------------------------


def checkpoint_objects(objects: Iterable[ObjectInfo]) -> dict[str, dict[str, ObjectInfo]]:
    """Return the objects of each checkpoint folder, committed or not, by folder and path; written first to last."""
    found: dict[str, dict[str, ObjectInfo]] = {}
    for info in objects:
        folder, _, path = info.key.partition("/")
        if path and _NAME.fullmatch(folder):
            found.setdefault(folder, {})[path] = info
    return {name: found[name] for name in sorted(filter(parse_name, found), key=written_order)}


def list_names(store: Store) -> list[str]:
    return [name for name, objects in checkpoint_objects(store.list()).items() if MANIFEST_NAME in objects]


# -- manifest --------------------------------------------------------------------------------------------------------


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the canonical text of a manifest: JSON in ASCII with sorted keys and without spaces, then a newline.

    Its key "crc32c" is the checksum of the text without that key and without the newline.

    Raises:
        ValueError, TypeError: The note is not a JSON value.
    """
    body = {
        "format": manifest.format,
        "needs_to_read": [],
        "name": manifest.name,
        "step": manifest.step,
        "created_ms": round(manifest.created_s * 1000),
        "software": manifest.software,
        "files": [{"path": one.path, "bytes": one.n_bytes, "crc32c": one.crc32c} for one in manifest.files],
        "tensors": {
            name: {"file": one.file, "offset": one.offset, "bytes": one.n_bytes, "dtype": one.dtype, "shape": one.shape}
            for name, one in manifest.tensors.items()
        },
        "metrics": {name: metric_json(value) for name, value in manifest.metrics.items()},
        "note": manifest.note,
    }
    return _canonical(body | {"crc32c": crc32c(_canonical(body))}) + b"\n"


def parse_manifest(data: bytes, url: str) -> Manifest:
    """Return the manifest that a text describes; keys that a later release added are ignored.

    Args:
        data: Text of the manifest.
        url: URL of the manifest, for messages.

    Raises:
        CorruptCheckpoint: The text is not the one that was written.
        UnsupportedFormat: A later release wrote the checkpoint.
    """
    try:
        body = json.loads(data)
        if not isinstance(body, dict):
            raise TypeError(f"a manifest is a JSON object, got {type(body).__name__}")
        is_canonical = _canonical(body) + b"\n" == data
        stated = body.pop("crc32c", None)
        if not is_canonical or type(stated) is not int or crc32c(_canonical(body)) != stated:
            raise CorruptCheckpoint("the text does not match its CRC-32C", url=url, part="manifest")
        found = _count(body, "format")
        if found > FORMAT:
            message = f"the checkpoint has format {found}, which a later release of tiercache wrote: upgrade tiercache"
            raise UnsupportedFormat(message, url=url, found=found, supported=FORMAT)
        if needed := body["needs_to_read"]:
            message = f"reading the checkpoint needs {', '.join(map(str, needed))}: upgrade tiercache"
            raise UnsupportedFormat(message, url=url, found=found, supported=FORMAT)
        return _manifest_of(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"cannot be read: {error!r}", url=url, part="manifest") from error


def metric_json(value: float) -> float | str:
    """Return the JSON form of a metric: a number, or the text "NaN", "Infinity" or "-Infinity", which JSON lacks."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _manifest_of(body: Mapping[str, Any]) -> Manifest:
    name, step, created_s = _text(body, "name"), _count(body, "step"), _count(body, "created_ms") / 1000
    if parse_name(name) != (step, created_s):
        raise ValueError(f"step {step} and time {created_s} are not those of the name {name!r}")
    # check_key(): the files stay below the checkpoint's folder
    files = tuple(
        StoredFile(check_key(_text(one, "path")), _count(one, "bytes"), _count(one, "crc32c")) for one in body["files"]
    )
    sizes = {one.path: one.n_bytes for one in files}
    if len(sizes) != len(files):
        raise ValueError("a file occurs twice")
    tensors = {tensor_name: _tensor_of(one) for tensor_name, one in body["tensors"].items()}
    for tensor_name, tensor in tensors.items():
        if tensor.offset + tensor.n_bytes > sizes.get(tensor.file, -1):
            raise ValueError(f"tensor {tensor_name!r} does not lie inside its file {tensor.file!r}")
    metrics = {metric: _metric_of(value) for metric, value in body["metrics"].items()}
    return Manifest(name, step, created_s, files, tensors, metrics, body["note"], _text(body, "software"))


def _tensor_of(body: Mapping[str, Any]) -> TensorEntry:
    shape = body["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= _MOST for size in shape):
        raise ValueError(f"shape is a list of sizes, got {shape!r}")
    n_bytes, dtype = _count(body, "bytes"), _text(body, "dtype")
    if n_bytes != math.prod(shape) * _ITEM_BYTES.get(dtype, 0) and dtype in _ITEM_BYTES:
        raise ValueError(f"a tensor of shape {shape} and type {dtype} cannot have {n_bytes} bytes")
    return TensorEntry(_text(body, "file"), _count(body, "offset"), n_bytes, dtype, tuple(shape))


def _metric_of(value: object) -> float:
    if isinstance(value, str):
        return NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a metric is a number, got {value!r}")
    return value


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body[name]
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(f"{name} is an integer from 0 to 2^63 - 1, got {value!r}")
    return value


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body[name]
    if not isinstance(value, str) or not _TEXT.fullmatch(value):
        raise ValueError(f"{name} has the invalid value {value!r}")
    return value


# -- what a user gives ---------------------------------------------------------------------------------------------


def metric_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as numbers. Raises TypeError or ValueError, with the name, if a value is none."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics is a dict such as {{'loss': 0.5}}, got {type(metrics).__name__}")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a metric is a text, got {name!r}")
        try:
            if isinstance(value, str | bytes):
                raise TypeError("a text is no number")
            number = float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            # RuntimeError: a tensor of several values
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"the metric {name!r} is a number, got {type(value).__name__} {value!r:.60}: {error}") from None
        found[name] = value if type(value) is int else number
    return found


def json_copy(note: Any) -> Any:
    """Return a JSON value that later changes do not reach. Raises TypeError or ValueError if it is none."""

    def plain(value: Any) -> Any:
        if callable(getattr(value, "tolist", None)):  # a number, an array or a tensor
            return value.tolist()
        raise TypeError(f"it contains a {type(value).__name__}")

    try:
        return json.loads(json.dumps(note, allow_nan=False, default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"note is a JSON value, such as a dict of texts and numbers: {error}") from None


# -- safetensors files -----------------------------------------------------------------------------------------------
#
# A file is the size of the header (u64, little-endian), the header (JSON, padded with spaces) and the values without
# gaps: https://github.com/huggingface/safetensors. Headers are padded so that the values begin at a page: files are
# written with direct I/O and mapped. Tensors are sorted by the size of their items, so that each of them is aligned.

PAGE_BYTES = 4096
# Files of a state, unless there are fewer tensors: smaller ones cost requests, larger ones are few parallel streams.
MIN_FILE_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 30
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_METADATA = "__metadata__"
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 1),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, type and shape of a tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A safetensors file without its values.

    Attributes:
        header: First bytes of the file, of whole pages.
        offsets: Position of the first byte of each tensor in the file, by name; ascending and without gaps.
        n_bytes: Size of the file.
    """

    header: bytes
    offsets: Mapping[str, int]
    n_bytes: int


def lay_out_file(tensors: Iterable[TensorSpec]) -> FileLayout:
    """Return the layout of a file that contains these tensors; equal tensors in the same order give equal layouts."""
    ordered = sorted(tensors, key=lambda one: -_ITEM_BYTES[one.dtype])
    starts, position = dict[str, int](), 0
    for one in ordered:
        starts[one.name] = position
        position += one.n_bytes
    entries = {
        one.name: {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [starts[one.name], starts[one.name] + one.n_bytes],
        }
        for one in ordered
    }
    text = json.dumps({_METADATA: {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=True).encode(
        "ascii"
    )
    padded_bytes = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    header = (padded_bytes - 8).to_bytes(8, "little") + text.ljust(padded_bytes - 8, b" ")
    return FileLayout(header, {name: padded_bytes + start for name, start in starts.items()}, padded_bytes + position)


def distribute(tensors: Sequence[TensorSpec], n_streams: int) -> list[list[TensorSpec]]:
    """Return the tensors of each file: files of similar size, each of whole tensors."""
    total_bytes = sum(one.n_bytes for one in tensors)
    n_files = max(1, math.ceil(total_bytes / MAX_FILE_BYTES), min(n_streams, total_bytes // MIN_FILE_BYTES))
    files: list[list[TensorSpec]] = [[] for _ in range(n_files)]
    sizes = [0] * n_files
    for one in sorted(tensors, key=lambda one: -one.n_bytes):
        smallest = min(range(n_files), key=sizes.__getitem__)
        files[smallest].append(one)
        sizes[smallest] += one.n_bytes
    return [file for file in files if file]


def header_bytes(start: bytes) -> int:
    """Return the size of a file's header, including the 8 bytes of its size, from the file's first 8 bytes."""
    stated = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= stated <= _MOST_HEADER_BYTES:
        raise ValueError(f"not a safetensors file: a header of {stated} bytes")
    return 8 + stated


def parse_header(header: bytes, n_bytes: int) -> dict[str, tuple[TensorSpec, int]]:
    """Return each tensor of a file and its position in the file, by name."""
    try:
        body = json.loads(header[8:])
        found = {name: _spec_of(name, entry, len(header)) for name, entry in body.items() if name != _METADATA}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: {error!r}") from error
    end = len(header)
    for spec, offset in sorted(found.values(), key=lambda one: (one[1], one[0].n_bytes)):
        if offset != end:
            raise ValueError(f"tensor {spec.name!r} begins at byte {offset}, not at the end of the one before ({end})")
        end += spec.n_bytes
    if end != n_bytes:
        raise ValueError(f"the header describes {end} bytes, the file has {n_bytes}")
    return found


def _spec_of(name: str, entry: Mapping[str, Any], base: int) -> tuple[TensorSpec, int]:
    (start, end), shape, item_bytes = entry["data_offsets"], tuple(entry["shape"]), _ITEM_BYTES.get(entry["dtype"])
    if not all(type(one) is int and one >= 0 for one in (start, end, *shape)):
        raise ValueError(f"tensor {name!r} has impossible sizes")
    if end < start or (item_bytes is not None and math.prod(shape) * item_bytes != end - start):
        raise ValueError(f"tensor {name!r} of shape {shape} and type {entry['dtype']} cannot have {end - start} bytes")
    return TensorSpec(name, str(entry["dtype"]), shape, end - start), base + start
