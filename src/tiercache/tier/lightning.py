"""Scores in Lightning's checkpoints: torch's zip files with a pickle, which is interpreted and never executed.

`ModelCheckpoint` stores in a checkpoint, under `callbacks`, the metric that it monitors and the scores of the best
checkpoints by path, including this checkpoint. `current_score` is not used: with several callbacks it may belong to an
earlier checkpoint. A score is a number, or a tensor whose value is in a record of the zip file. A renamed checkpoint is
not found among the paths, and has no score.

The interpreter supports the few opcodes that create dicts, tuples, strings and numbers. It imports and calls nothing:
other opcodes produce placeholders, and functions that the pickle names stay strings.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiercache.model import ByteRange
from tiercache.store import StoreFile

if TYPE_CHECKING:
    from tiercache.store import Store

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

    Args:
        store: Store of the object.
        key: Key of the object.
        n_bytes: Size of the object, as listed.
        name: Name of the checkpoint's file or folder, by which its scores are found.

    Raises:
        NotFound: The object no longer exists.
        StoreError: The object cannot be read, or has changed since it was listed.
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

_PUSHES_ARGUMENT = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
    ]
)
_PUSHES_OTHER = frozenset(
    [
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "EMPTY_LIST",
        "EMPTY_SET",
        "EXT1",
        "EXT2",
        "EXT4",
        "NEXT_BUFFER",
    ]
)
# Opcodes that pop this number of values and push a placeholder.
_TAKES = {"NEWOBJ": 2, "NEWOBJ_EX": 3}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DROPS_TO_MARK = frozenset(["APPENDS", "ADDITEMS", "POP_MARK"])
_OTHER_OF_MARK = frozenset(["LIST", "FROZENSET", "INST", "OBJ"])
_WITHOUT_EFFECT = frozenset(["PROTO", "FRAME", "READONLY_BUFFER"])


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
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHES_ARGUMENT:
            stack.append(argument)
        elif name in _PUSHES_OTHER:
            stack.append(_OTHER)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        else:
            self._make(name, argument)

    def _make(self, name: str, argument: Any) -> None:
        """Run an opcode that creates dicts or tuples, or pass it on to _call()."""
        stack = self._stack
        if name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "DICT":
            stack.append(_with({}, self._to_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else self._last(2)
            _with(stack[-1], items)
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in _TUPLES:
            stack.append(tuple(self._last(_TUPLES[name])))
        else:
            self._call(name, argument)

    def _call(self, name: str, argument: Any) -> None:
        """Run an opcode that names a function or class, or would call it."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            module, function = self._last(2)
            stack.append(_Name(f"{module} {function}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = self._last(2)
            stack.append(_called(function, arguments))
        else:
            self._skip(name)

    def _skip(self, name: str) -> None:
        """Run an opcode whose result is not needed: it leaves a placeholder on the stack."""
        stack = self._stack
        if name in _TAKES:
            self._last(_TAKES[name])
            stack.append(_OTHER)
        elif name in _OTHER_OF_MARK:
            self._to_mark()
            stack.append(_OTHER)
        elif name in _DROPS_TO_MARK:
            self._to_mark()
        elif name in ("APPEND", "BUILD", "POP"):
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "PERSID":
            stack.append(_OTHER)
        elif name not in _WITHOUT_EFFECT:
            raise ValueError(f"an opcode that torch does not write: {name}")

    def _last(self, n: int) -> list[Any]:
        if len(self._stack) < n:
            raise ValueError("the pickle pops more values than are on the stack")
        taken = self._stack[len(self._stack) - n :]
        del self._stack[len(self._stack) - n :]
        return taken

    def _to_mark(self) -> list[Any]:
        """Pop and return the values above the last mark, and the mark."""
        n = next((n for n, value in enumerate(reversed(self._stack)) if value is _MARK), None)
        if n is None:
            raise ValueError("the pickle refers to a mark that is not on the stack")
        taken = self._last(n)
        self._stack.pop()
        return taken


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
