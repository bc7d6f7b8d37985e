"""Loads one checkpoint: from which copy, into which memory, and after a comparison of keys with the caller's objects.

Tensors of modules, optimizers and plain containers are filled in place where their type, shape and memory allow it, so
that the bytes are read from the disk into their final memory. load_state_dict() then finds its own tensors and copies
nothing. Everything is compared before the first byte is read: an error leaves the objects as they are.

Files are read in pieces by several threads; each piece is added to the checksum of its file while it is in the
processor's cache. Files of a remote store come through the cache of this machine, which keeps what has arrived: an
interrupted load continues there, and processes of one machine share one download.
"""

from __future__ import annotations

import os
import sys
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from threading import Event
from typing import Any, TypeAlias

import numpy as np

from tiercache._native.checksum import combine, crc32c
from tiercache.cache.copy_file import read_all
from tiercache.checkpoint.format import FORMAT, STATE_NAME, Manifest, StoredFile, TensorEntry
from tiercache.checkpoint.run_stores import CheckpointCopy, archived_error
from tiercache.checkpoint.state_tree import (
    DTYPES,
    Library,
    children,
    decode_state,
    memory_of,
    no_tensor,
    parse_state,
    special_kind,
)
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, TierCacheError, UnsupportedFormat
from tiercache.model import ByteRange
from tiercache.store import Lease, LocalStore, Span, Store
from tiercache.store.placement import is_archived

_NAMED = 10  # keys of each kind in a message
_OR_NONE = ", or None, in whose place the loaded value is put"
# Values that a load replaces.
_SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray, np.generic)
_VALUES = (*_SCALARS, list, tuple, set, frozenset, Mapping)
_TAGS: Mapping[str, Library] = {"$tensor": "torch", "$array": "numpy"}


class LoadedState(dict[str, Any]):
    """The state of a loaded checkpoint, and which checkpoint it is of.

    Attributes:
        name: Name of the checkpoint.
        step: Step of the training run.
        url: URL of the copy that was read.
        metrics: Metrics by name.
        note: JSON value that was saved with it.
    """

    def __init__(self, state: Mapping[str, Any], manifest: Manifest, url: str) -> None:
        super().__init__(state)
        self.name, self.step, self.url = manifest.name, manifest.step, url
        self.metrics, self.note = manifest.metrics, manifest.note


def load_nearest(
    copies: Sequence[CheckpointCopy],
    cached: Callable[[Store], Store],
    *,
    into: Any = None,
    map_location: Any = None,
    strict: bool = True,
) -> LoadedState:
    """Load a checkpoint from its nearest readable copy. cached: Function that returns a cache of a store."""
    failure: TierCacheError | None = None
    archived: CheckpointCopy | None = None
    for copy in copies:
        if copy.is_archived:
            archived = archived or copy
            continue
        if copy.is_unseen:
            failure = StoreError(f"cannot be loaded: {copy.problem}", url=copy.url)
            continue
        if copy.manifest is None or copy.problem:
            if not copy.is_committed:
                continue
            failure = CorruptCheckpoint(copy.problem, url=copy.url)
        else:
            try:
                state = _load_copy(cached(copy.store), copy.manifest, into, map_location, strict=strict)
                return LoadedState(state, copy.manifest, copy.url)
            except CorruptCheckpoint as error:
                failure = error
            except StoreError as error:
                if is_archived(error):
                    archived = archived or copy
                    continue
                failure = error
        warnings.warn(f"{failure}: this copy is skipped", RuntimeWarning, stacklevel=3)
    if archived is not None:
        raise archived_error(archived)
    raise failure or NotFound(f"no copy of {copies[0].name} is complete", url=copies[0].url)


def _load_copy(store: Store, manifest: Manifest, into: Any, map_location: Any, *, strict: bool) -> Any:
    if map_location is not None:
        _check_device(map_location)
    with CopyReader(store, manifest) as reader:
        url = f"{store.url}/{manifest.name}"
        try:
            tree = parse_state(reader.small_file(STATE_NAME))
        except ValueError as error:
            raise CorruptCheckpoint(f"the state cannot be read: {error}", url=url, part=STATE_NAME) from error
        tensors = _Tensors(manifest, url)
        if into is None:
            tensors.want(tree)
            tensors.read(reader)
            return decode_state(tree, lambda name, library: _moved(tensors.find(name, library), map_location))
        plan = _IntoPlan(tensors)
        plan.add(tree, into, (), is_top=True)
        plan.check(manifest.name, strict=strict)
        tensors.read(reader)
        for apply in plan.actions:
            apply()
        return into


def _check_device(device: Any) -> None:
    try:
        import_module("torch").empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"map_location={device!r} is not one device of this machine, such as 'cpu': {error}") from None


def _moved(value: Any, device: Any) -> Any:
    return value if device is None or isinstance(value, np.ndarray) else value.to(device)


class _Tensors:
    """The memory of the wanted tensors: new memory, or that of the caller's objects.

    Names that share a stored tensor get memory of their own. If two stored tensors belong into one memory, because
    weights are tied now that were not, only the first is read into it.
    """

    def __init__(self, manifest: Manifest, url: str) -> None:
        self._manifest, self._url = manifest, url
        self._found: dict[str, Any] = {}
        self._first: dict[tuple[str, int], str] = {}
        self._used: list[tuple[int, int, tuple[str, int]]] = []  # memory of the caller: start, end and stored tensor

    def entry(self, name: str) -> TensorEntry:
        entry = self._manifest.tensors.get(name)
        if entry is None:
            raise CorruptCheckpoint("the state names a tensor that the manifest lacks", url=self._url, part=name)
        if entry.dtype not in DTYPES:
            message = f"tensor {name!r} has the type {entry.dtype}, which this release does not know: upgrade tiercache"
            raise UnsupportedFormat(message, url=self._url, found=self._manifest.format, supported=FORMAT)
        return entry

    def want(self, node: Any, places: Mapping[str, Any] | None = None) -> None:
        """Provide memory for the tensors of a node. places: Memory of the caller by name of the tensor, as usable()."""
        for name, library in tensor_names(node):
            entry, given = self.entry(name), (places or {}).get(name)
            if given is not None and self._is_used(entry, given):
                given = None  # load_state_dict() copies it
            self._found[name] = _new(entry, library) if given is None else given
            if entry.n_bytes:
                self._first.setdefault((entry.file, entry.offset), name)

    def _is_used(self, entry: TensorEntry, given: Any) -> bool:
        """Return whether another stored tensor is read into a part of this memory; note the memory if not."""
        start = np.frombuffer(memory_of(given), np.uint8).ctypes.data if entry.n_bytes else 0
        stored, end = (entry.file, entry.offset), start + entry.n_bytes
        number = bisect_right(self._used, (start, end, stored))
        near = self._used[max(number - 1, 0) : number + 1]
        if any(start < last and first < end and stored != other for first, last, other in near):
            return True
        self._used.insert(number, (start, end, stored))
        return False

    def find(self, name: str, library: Library) -> Any:  # noqa: ARG002 - the signature of FindTensor
        return self._found[name]

    def read(self, reader: CopyReader) -> None:
        """Fill the memory. Raises as CopyReader.fill()."""
        reader.fill({place: memory_of(self._found[name]) for place, name in self._first.items()})
        for name, value in self._found.items():
            entry = self.entry(name)
            if entry.n_bytes and (first := self._first[entry.file, entry.offset]) != name:
                into, source = memory_of(value), memory_of(self._found[first])
                if not np.shares_memory(into, source):  # tied weights
                    into[:] = source


def tensor_names(node: Any) -> Iterator[tuple[str, Library]]:
    """Yield the name of each tensor in a tree of state_tree.py, and the library whose tensor it was."""
    if isinstance(node, list):
        for one in node:
            yield from tensor_names(one)
    elif isinstance(node, dict):
        for tag, library in _TAGS.items():
            if tag in node:
                yield node[tag], library
                return
        for one in node.values():
            yield from tensor_names(one)


def _new(entry: TensorEntry, library: Library) -> Any:
    if library == "torch":
        torch = import_module("torch")
        return torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype]))
    return np.empty(entry.shape, numpy_dtype(entry.dtype))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's type of a type of safetensors. Raises ValueError if it has none."""
    try:
        return np.dtype(DTYPES[name])
    except TypeError as error:
        raise ValueError(f"NumPy does not have the type {DTYPES[name]}: import ml_dtypes before the load") from error


def usable(entry: TensorEntry, library: Library, value: Any) -> bool:
    """Return whether the bytes of a stored tensor can be read straight into the memory of a value."""
    if isinstance(value, np.ndarray):
        same = library == "numpy" and value.dtype.isnative and value.dtype.name == DTYPES[entry.dtype]
        return same and value.shape == entry.shape and value.flags.c_contiguous and value.flags.writeable
    torch = sys.modules.get("torch")
    if torch is None or library != "torch" or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if value.device.type != "cpu" or value.layout is not torch.strided or value.is_conj() or value.is_neg():
        return False
    has_type = str(value.dtype).removeprefix("torch.") == DTYPES[entry.dtype]
    return has_type and tuple(value.shape) == entry.shape and value.is_contiguous()


# -- into the caller's objects -----------------------------------------------------------------------------------------

Path = tuple[Any, ...]


@dataclass(slots=True)
class _IntoPlan:
    """How a tree goes into the caller's objects: differences, wanted tensors, and what is done after the read."""

    tensors: _Tensors
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    unfillable: list[str] = field(default_factory=list)
    actions: list[Callable[[], object]] = field(default_factory=list)
    known: list[str] = field(default_factory=list)  # keys of the saved state, if `into` has another one

    def add(self, node: Any, target: Any, path: Path, *, is_top: bool = False) -> None:
        """Plan one object: a container is filled entry by entry, an object by its load_state_dict()."""
        if isinstance(target, dict):
            self._add_dict(node, target, path, is_top=is_top)
        elif is_top:
            raise TypeError(f"into is a dict such as {{'model': model}}, got {type(target).__name__}")
        elif callable(getattr(target, "load_state_dict", None)):
            self._add_object(node, target, path)
        else:
            raise TypeError(
                f"into{_indexed(path)} cannot be filled: expected a module, an optimizer, another object with"
                f" load_state_dict(), a tensor, an array, a dict, or a value such as None, which is replaced, got"
                f" {type(target).__name__}"
            )

    def _add_dict(self, node: Any, target: dict[Any, Any], path: Path, *, is_top: bool) -> None:
        saved = children(node)
        if saved is None:
            self._note_shape(node, "a dict", path)
            return
        if not is_top:  # at the top, the caller names what is wanted
            self.unexpected += [_dotted((*path, key)) for key in saved if key not in target]
        for key, value in target.items():
            if key not in saved:
                self.missing.append(_dotted((*path, key)))
                self.known = [*map(str, saved)] if is_top else self.known
            elif isinstance(value, dict) or callable(getattr(value, "load_state_dict", None)):
                self.add(saved[key], value, (*path, key))
            elif is_tensor(value):
                self._add_tensor(saved[key], value, (*path, key))
            elif _holds_objects(value):
                raise TypeError(
                    f"into{_indexed((*path, key))} cannot be filled: it is a {type(value).__name__} of objects or"
                    " parameters; save and load them as a dict, such as dict(enumerate(objects)), or put None in its"
                    " place to get a new value"
                )
            elif _is_value(value):
                self._add_value(saved[key], target, key)
            else:
                self.add(saved[key], value, (*path, key))  # raises TypeError

    def _note_shape(self, node: Any, wanted: object, path: Path) -> None:
        shape = _shape(node, self.tensors)
        found = "a dict" if children(node) is not None else "no tensor" if shape is None else [*shape]
        self.misshaped.append(f"{_dotted(path)}: {found} in the checkpoint, {wanted} in the object")

    def _add_value(self, node: Any, target: dict[Any, Any], key: Any) -> None:
        self.tensors.want(node)

        def replace() -> None:
            target[key] = decode_state(node, self.tensors.find)

        self.actions.append(replace)

    def _add_tensor(self, node: Any, target: Any, path: Path) -> None:
        _refuse_sharded([target], path)
        if reason := unfillable(target):
            self.unfillable.append(f"{_dotted(path)} is {reason}")
            return
        if _shape(node, self.tensors) != tuple(target.shape):
            self._note_shape(node, [*target.shape], path)
            return
        self.tensors.want(node, self._place(node, target))

        def copy() -> None:
            value = decode_state(node, self.tensors.find)
            if isinstance(target, np.ndarray):
                if value is not target:
                    target[...] = value if isinstance(value, np.ndarray) else _as_array(value)
            else:
                torch = import_module("torch")
                with torch.no_grad():
                    target.copy_(value if isinstance(value, torch.Tensor) else torch.from_numpy(value))

        self.actions.append(copy)

    def _add_object(self, node: Any, target: Any, path: Path) -> None:
        torch = sys.modules.get("torch")
        is_module = torch is not None and isinstance(target, torch.nn.Module)
        place: dict[str, Any] = {}
        dropped: set[Any] = set()
        if is_module or (torch is not None and isinstance(target, torch.optim.Optimizer)):
            current = target.state_dict()
            _refuse_sharded(current.values(), path)
            if is_module:
                dropped = self._compare_module(node, current, path)
            else:
                self._compare_optimizer(node, current, path)
            self._find_places(node, current, place)
        kept = _without(node, dropped)
        self.tensors.want(kept, place)

        def apply_state() -> None:
            state = decode_state(kept, self.tensors.find)
            if is_module:
                target.load_state_dict(state, strict=False)  # _compare_module() has found all differences
            else:
                target.load_state_dict(state)

        self.actions.append(apply_state)

    def _compare_module(self, node: Any, current: Mapping[str, Any], path: Path) -> set[Any]:
        """Note the differences of a module, and return the keys of the checkpoint that it cannot take."""
        saved = children(node)
        if saved is None:
            self._note_shape(node, "a module", path)
            return set()
        missing = [key for key in current if key not in saved]
        unexpected = [key for key in saved if key not in current]
        self.missing += [_dotted((*path, key)) for key in missing]
        self.unexpected += [_dotted((*path, key)) for key in unexpected]
        dropped = set(unexpected)
        for key, value in current.items():
            if key not in saved or not is_tensor(value):
                continue
            if reason := unfillable(value):
                self.unfillable.append(f"{_dotted((*path, key))} is {reason}")
                dropped.add(key)
            elif _shape(saved[key], self.tensors) != tuple(value.shape):
                self._note_shape(saved[key], [*value.shape], (*path, key))
                dropped.add(key)
        return dropped

    def _compare_optimizer(self, node: Any, current: Mapping[str, Any], path: Path) -> None:
        """Note other numbers of parameters, which load_state_dict() refuses after the models were filled."""
        saved = (children(node) or {}).get("param_groups")
        if isinstance(saved, list):
            found = [len((children(group) or {}).get("params", ())) for group in saved]
            mine = [len(group["params"]) for group in current.get("param_groups", ())]
            if found != mine:
                self.misshaped.append(
                    f"{_dotted(path)}: parameter groups of {found} parameters in the checkpoint, {mine} in the object"
                )

    def _find_places(self, node: Any, current: Any, place: dict[str, Any]) -> None:
        """Collect the tensors of an object's present state into which stored tensors can be read."""
        if is_tensor(current):
            place.update(self._place(node, current))
            return
        if isinstance(current, Mapping):
            saved = children(node) or {}
            for key, value in current.items():
                if key in saved:
                    self._find_places(saved[key], value, place)

    def _place(self, node: Any, value: Any) -> dict[str, Any]:
        for tag, library in _TAGS.items():
            if isinstance(node, dict) and tag in node and "as" not in node:
                name = node[tag]
                return {name: value} if usable(self.tensors.entry(name), library, value) else {}
        return {}

    def check(self, name: str, *, strict: bool) -> None:
        if not (self.missing or self.unexpected or self.misshaped or self.unfillable):
            return
        lines = [
            _line("missing in the checkpoint", self.missing),
            _line("unexpected: in the checkpoint only", self.unexpected),
            _line("of another shape", self.misshaped),
            _line("cannot be filled", self.unfillable),
            _line("keys of the saved state", self.known),
        ]
        text = "\n".join(filter(None, [f"{name} does not fit into=:", *lines]))
        if strict:
            raise ValueError(f"{text}\nNothing was loaded. load(..., strict=False) loads everything that fits.")
        warnings.warn(f"{text}\nEverything else is loaded (strict=False).", RuntimeWarning, stacklevel=5)


def _refuse_sharded(values: Iterable[Any], path: Path) -> None:
    if any(hasattr(value, "device_mesh") for value in values):
        raise TypeError(
            f"into{_indexed(path)} is sharded over several processes: load it with"
            " torch.distributed.checkpoint, to which tiercache gives a reader (tiercache.checkpoint.dcp)"
        )


def _holds_objects(value: Any) -> bool:
    """Return whether a container, which load() replaces, has parameters or objects that its owner expects filled."""
    if not isinstance(value, (list, tuple, Mapping)):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return any(
        callable(getattr(one, "load_state_dict", None)) or getattr(one, "requires_grad", False) or _holds_objects(one)
        for one in inner
    )


def _is_value(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(value, _VALUES) or (torch is not None and isinstance(value, (torch.dtype, torch.device)))


def unfillable(value: Any) -> str:
    """Return what a tensor or an array is whose memory nothing can be copied into, and what to do; "" for others."""
    if isinstance(value, np.ndarray):
        return "" if value.flags.writeable else f"a read-only array: give a copy(){_OR_NONE}"
    if special := special_kind(import_module("torch"), value):
        return f"{special}: give a dense tensor{_OR_NONE}"
    if value.device.type == "meta":
        return "a tensor on the device meta, without memory: call module.to_empty(device=...), or give another tensor"
    return ""


def _as_array(value: Any) -> Any:
    """Return the array of a tensor of the host; types that NumPy lacks, such as bfloat16, become float64."""
    return (value.double() if value.is_floating_point() and value.element_size() < 4 else value).numpy()


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def _without(node: Any, dropped: set[Any]) -> Any:
    if not dropped:
        return node
    if "$state_dict" in node:
        return {**node, "$state_dict": _without(node["$state_dict"], dropped)}
    if "$dict" in node:
        return {"$dict": [pair for pair in node["$dict"] if decode_state(pair[0], no_tensor) not in dropped]}
    return {key: value for key, value in node.items() if key not in dropped}


def _shape(node: Any, tensors: _Tensors) -> tuple[int, ...] | None:
    """Return the shape of a stored tensor; None if the node is no tensor."""
    for tag in _TAGS:
        if isinstance(node, dict) and tag in node:
            shape = tensors.entry(node[tag]).shape
            return shape[:-1] if "as" in node else shape  # complex128 is stored as pairs
    if isinstance(node, dict) and "$sharded" in node:
        return tuple(node["$sharded"]["size"])
    return None


def _dotted(path: Path) -> str:
    texts = (f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in path)
    return "".join(texts).removeprefix(".") or "the state"


def _indexed(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _line(what: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    separator = "\n    " if any(":" in key for key in keys) else ", "
    return f"  {what} ({len(keys)}): {separator.join(keys[:_NAMED])}{more}"


# -- reading ---------------------------------------------------------------------------------------------------------

# Threads that read; each has one piece in work. A piece is long enough for the full speed of a store's requests.
READ_THREADS = 8
PIECE_BYTES = 16 << 20
# Files that are open at a time: a checkpoint of many ranks has thousands.
_OPEN_FILES = 64
# Bytes that are read from a file and then added to the checksum: they fit the second cache of a core.
_STEP_BYTES = 1 << 20

Destinations: TypeAlias = Mapping[tuple[str, int], memoryview]
"""Writable memory by file and offset of a tensor, as in TensorEntry."""


Target: TypeAlias = memoryview | int
"""Memory for consecutive bytes of a file, or the number of bytes of which only the checksum is wanted."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a file, and the targets of its bytes, in order and without gaps."""

    start: int
    targets: tuple[Target, ...]

    @property
    def range(self) -> ByteRange:
        return ByteRange(self.start, self.start + sum(map(_length, self.targets)))


def _length(target: Target) -> int:
    return target if isinstance(target, int) else target.nbytes


class CopyReader:
    """Reads files of a checkpoint from one store, and compares them with the manifest. Use it as a context manager."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self._cancel = Event()
        self._cleanup = ExitStack()
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tiercache-load")

    def __enter__(self) -> CopyReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancel.set()
        self._pool.shutdown(cancel_futures=True)
        self._cleanup.close()

    def url(self, file: StoredFile) -> str:
        return f"{self.store.url}/{self.manifest.name}/{file.path}"

    def small_file(self, path: str) -> bytes:
        file = self.manifest.file(path)
        data = bytearray(file.n_bytes)
        self._read_files([(file, [_Piece(0, (memoryview(data),))] if data else [])])
        return bytes(data)

    def fill(self, destinations: Destinations) -> None:
        """Fill the memory of tensors. Files with one of them are read whole, because checksums are those of files."""
        memory: dict[str, dict[int, memoryview]] = {}
        for (path, offset), part in destinations.items():
            memory.setdefault(path, {})[offset] = part
        self._read_files(
            [(file, _pieces(file, memory[file.path])) for file in self.manifest.files if file.path in memory]
        )

    def verify(self) -> list[str]:
        """Read all files and return what differs from the manifest, one text for each wrong file."""
        problems = []
        for file in self.manifest.files:
            try:
                self._read_files([(file, _pieces(file, {}))])
            except CorruptCheckpoint as error:
                problems.append(error.message)
        return problems

    def _read_files(self, files: Iterable[tuple[StoredFile, Sequence[_Piece]]]) -> None:
        """Read the pieces of files in parallel, and compare the checksums. A limited number of files is open."""
        running: deque[tuple[_OpenFile, StoredFile, Sequence[_Piece], list[Future[int]]]] = deque()
        try:
            for file, pieces in files:
                if len(running) >= _OPEN_FILES:
                    self._check(*running.popleft())
                source = self._source(file)
                source.prefetch(pieces)
                running.append((source, file, pieces, [self._pool.submit(source.read, piece) for piece in pieces]))
            while running:
                self._check(*running.popleft())
        finally:
            for _, _, _, reads in running:
                for read in reads:
                    read.cancel()

    def _check(
        self, source: _OpenFile, file: StoredFile, pieces: Sequence[_Piece], reads: Sequence[Future[int]]
    ) -> None:
        """Wait until the pieces of a file are read, and compare its checksum."""
        try:
            is_right = self._crc_of(pieces, [read.result() for read in reads]) == file.crc32c
            if not is_right and not self._is_right_now(source, file, pieces):
                message = "the bytes differ from those that were written (CRC-32C)"
                raise CorruptCheckpoint(message, url=self.url(file))
        except NotFound as error:
            raise CorruptCheckpoint(f"a file is missing: {error.message}", url=error.url) from error
        source.close()

    @staticmethod
    def _crc_of(pieces: Sequence[_Piece], sums: Sequence[int]) -> int:
        crc = 0
        for piece, crc_of_piece in zip(pieces, sums, strict=True):
            crc = combine(crc, crc_of_piece, piece.range.n_bytes)
        return crc

    def _is_right_now(self, source: _OpenFile, file: StoredFile, pieces: Sequence[_Piece]) -> bool:
        """Read a file once more if its cached copy was corrupt, and is removed now."""
        if not source.remove_if_corrupt():
            return False
        again = self._source(file)
        return self._crc_of(pieces, [again.read(piece) for piece in pieces]) == file.crc32c

    def _source(self, file: StoredFile) -> _OpenFile:
        try:
            source = _OpenFile(self.store, f"{self.manifest.name}/{file.path}", file.n_bytes, self._cancel)
        except NotFound as error:
            raise CorruptCheckpoint("the file is missing", url=self.url(file)) from error
        self._cleanup.callback(source.close)
        if source.n_bytes != file.n_bytes:
            message = f"the file has {source.n_bytes} bytes, and the manifest states {file.n_bytes}"
            raise CorruptCheckpoint(message, url=self.url(file))
        return source


@dataclass(slots=True)
class _OpenFile:
    """A file to be read: a lease on a local file or cached copy, or a store that is read by ranges."""

    store: Store
    key: str
    n_bytes: int
    cancel: Event
    lease: Lease | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.store, LocalStore):
            self.lease = self.store.open_local(self.key)
            if self.lease is not None:
                self.n_bytes = self.lease.n_bytes

    def close(self) -> None:
        if self.lease is not None:
            self.lease.close()

    def prefetch(self, pieces: Sequence[_Piece]) -> None:
        """Start to fetch what will be read and is not local, in the order of the file."""
        if self.lease is not None:
            missing = [piece.range for piece in pieces if not self.lease.present([piece.range])]
            self.lease.prefetch(missing)

    def remove_if_corrupt(self) -> bool:
        return isinstance(self.store, LocalStore) and self.store.remove_if_corrupt(self.key)

    def read(self, piece: _Piece) -> int:
        """Fill the memory of a piece and return the CRC-32C of its bytes."""
        whole = piece.range
        if self.cancel.is_set():
            raise StoreError("the load was cancelled", url=self.store.url)
        lease, crc, offset = self.lease, 0, whole.start
        if lease is None or not lease.wait([whole]):
            buffers = [*_buffers(piece.targets, whole.n_bytes)]
            self.store.read_into(self.key, list(_spans(offset, buffers)), cancel=self.cancel)
            for buffer in buffers:
                crc = crc32c(buffer, crc)
            return crc
        lease.note_read(whole.n_bytes, lambda: [whole])
        # The threads read one descriptor at several offsets, so that the kernel's own read-ahead sees no sequence.
        os.posix_fadvise(lease.fd, whole.start, whole.n_bytes, os.POSIX_FADV_WILLNEED)
        for buffer in _buffers(piece.targets, _STEP_BYTES):
            if not read_all(lease.fd, buffer, offset):
                raise CorruptCheckpoint(f"cannot be read from byte {offset} on", url=f"{self.store.url}/{self.key}")
            crc = crc32c(buffer, crc)
            offset += buffer.nbytes
        return crc


def _spans(start: int, buffers: Iterable[memoryview]) -> Iterator[Span]:
    for buffer in buffers:
        yield ByteRange(start, start + buffer.nbytes), buffer
        start += buffer.nbytes


def _cut(targets: Iterable[Target], most_bytes: int) -> Iterator[list[Target]]:
    """Yield targets in runs of at most most_bytes."""
    run: list[Target] = []
    used = 0
    for target in targets:
        done, n_bytes = 0, _length(target)
        while done < n_bytes:
            n = min(n_bytes - done, most_bytes - used)
            run.append(n if isinstance(target, int) else target[done : done + n])
            done, used = done + n, used + n
            if used == most_bytes:
                yield run
                run, used = [], 0
    if run:
        yield run


def _buffers(targets: Iterable[Target], step_bytes: int) -> Iterator[memoryview]:
    """Yield memory for consecutive bytes; bytes without memory get scratch memory, used again after step_bytes."""
    scratch = memoryview(b"")
    for run in _cut(targets, step_bytes):
        used = 0
        for target in run:
            if isinstance(target, int):
                scratch = scratch or memoryview(bytearray(step_bytes))
                yield scratch[used : used + target]
                used += target
            else:
                yield target


def _pieces(file: StoredFile, memory: Mapping[int, memoryview]) -> list[_Piece]:
    """Cut a file into pieces, whose targets are the memory of the wanted tensors, given by their offsets."""
    targets: list[Target] = []
    position = 0
    for offset, part in sorted(memory.items(), key=lambda one: one[0]):
        if offset < position:
            raise CorruptCheckpoint(f"two tensors overlap at byte {offset}", url=file.path, part="manifest")
        targets += [offset - position, part]
        position = offset + part.nbytes
    targets.append(file.n_bytes - position)
    pieces = [tuple(run) for run in _cut(targets, PIECE_BYTES)]
    return [_Piece(number * PIECE_BYTES, piece) for number, piece in enumerate(pieces)]
