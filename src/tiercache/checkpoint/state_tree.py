"""The state of a run as a tree of JSON values, and the tensors that it names.

Dicts, lists and JSON values are themselves in the tree. Everything else is an object with one key that starts with "$",
such as {"$tensor": "model.weight"} or {"$tuple": [1, 2]}. An object with state_dict() is stored as its state dict.
Nothing is pickled: a value of another type is refused with its place in the state.

torch is not imported here before a stored tensor is wanted: without torch, no value can be a tensor.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import Any, Literal, TypeAlias

import numpy as np

from tiercache.checkpoint.format import NON_FINITE, metric_json

Library: TypeAlias = Literal["torch", "numpy"]
FindTensor: TypeAlias = Callable[[str, Library], Any]
"""Returns the tensor of torch, or the array of NumPy, with a name."""

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""Name of each type in torch and NumPy by its name in safetensors."""

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_PAIRS = "complex128"  # which safetensors lacks: stored as pairs of float64
_HEADER_KEY = "__metadata__"  # of safetensors; no tensor may have this name
_ALLOWED = "dicts, lists, tuples, tensors, arrays, JSON values and objects with state_dict(); pickle is never used"
_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class TensorSource:
    value: Any  # tensor of torch, or array of NumPy, of any strides and device
    dtype: str  # by the name of safetensors
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class EncodedState:
    tree: Any
    tensors: Mapping[str, TensorSource]
    aliases: Mapping[str, str]  # further names of tensors that occur several times, such as tied weights


def encode_state(state: Mapping[str, Any]) -> EncodedState:
    """Return a state as a tree and its tensors, which are not copied."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a dict such as {{'model': model}}, got {type(state).__name__}")
    encoder = _Encoder()
    try:
        tree = encoder.encode(state, ())
    except RecursionError:
        raise ValueError("the state is nested too deep to be stored, or contains itself") from None
    return EncodedState(tree, encoder.tensors, encoder.aliases)


def state_text(tree: Any, **more: Any) -> bytes:
    """Return the text of a tree, as it is in the file of a checkpoint. more: Further keys beside the tree."""
    body = {"version": _VERSION, "state": tree} | more
    return json.dumps(body, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def parse_state(data: bytes) -> Any:
    """Return the tree in a text of state_text()."""
    body = json.loads(data)
    if not isinstance(body, dict) or body.get("version") != _VERSION or "state" not in body:
        raise ValueError(f"a state of version {_VERSION} was expected")
    return body["state"]


def decode_state(tree: Any, find: FindTensor) -> Any:
    """Return the state that a tree describes; objects with state_dict() are their state dicts.

    Args:
        tree: Tree that encode_state() returned.
        find: Function that returns the tensor or array with a name; it may be called several times for one name.

    Raises:
        ValueError: The tree is not valid.
    """
    if isinstance(tree, list):
        return [decode_state(value, find) for value in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next((key for key in tree if key.startswith("$")), None)
    if tag is None:
        return {key: decode_state(value, find) for key, value in tree.items()}
    decode = _DECODERS.get(tag)
    if decode is None:
        raise ValueError(f"the state has a value of the unknown kind {tag!r}: a later release of tiercache wrote it")
    return decode(tree[tag], tree, find)


def flat_bytes(tensor: Any) -> Any:
    """Return the values of a contiguous tensor of torch as uint8[n_bytes] over the same memory."""
    # The stride of a single item may be any number, even of a contiguous tensor; view() refuses all but 1.
    return tensor.detach().reshape(-1).as_strided((tensor.numel(),), (1,)).view(import_module("torch").uint8)


def memory_of(value: Any) -> memoryview:
    """Return the bytes of a contiguous tensor of the host, or of an array, as writable memory."""
    if isinstance(value, np.ndarray):
        return value.reshape(-1).view(np.uint8).data
    return memoryview(flat_bytes(value).numpy())


def children(node: Any) -> dict[Any, Any] | None:
    """Return the nodes below a dict, or a state dict, by key; None for another node."""
    if not isinstance(node, dict):
        return None
    if "$state_dict" in node:
        return children(node["$state_dict"])
    if "$dict" in node:
        return {decode_state(key, no_tensor): value for key, value in node["$dict"]}
    return None if any(key.startswith("$") for key in node) else node


def no_tensor(name: str, library: Library) -> Any:  # noqa: ARG001 - the signature of FindTensor
    raise ValueError(f"a key of a dict is the tensor {name!r}")


# -- encoding --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Encoder:
    """Collects the tensors of a tree. It keeps each of them, so that no address is used again before the end."""

    tensors: dict[str, TensorSource] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    _by_memory: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)  # arrays whose copies are in `tensors`

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._tensor(torch, value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if value is None or isinstance(value, np.generic | bool | int | float | str | bytes | bytearray | complex):
            return _plain(value, path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if torch is not None and (found := _torch_value(torch, value)) is not None:
            return found
        if isinstance(value, list):
            return [self.encode(one, (*path, number)) for number, one in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(one, (*path, number)) for number, one in enumerate(value)]}
        if isinstance(value, set | frozenset):
            return _key(value, path)
        if not isinstance(value, type) and callable(method := getattr(value, "state_dict", None)):
            return self.encode(method(), path)
        raise _refused(path, f"a {type(value).__module__}.{type(value).__qualname__}")

    def _mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> Any:
        node: Any
        if all(type(key) is str and not key.startswith("$") for key in value):
            node = {key: self.encode(one, (*path, key)) for key, one in value.items()}
        else:
            node = {"$dict": [[_key(key, path), self.encode(one, (*path, key))] for key, one in value.items()]}
        # Versions of the modules, by which load_state_dict() of torch converts the state of older ones.
        metadata = getattr(value, "_metadata", None)
        if isinstance(metadata, Mapping):
            return {"$state_dict": node, "metadata": self.encode(dict(metadata), (*path, "_metadata"))}
        return node

    def _tensor(self, torch: Any, value: Any, path: tuple[Any, ...]) -> Any:
        if hasattr(value, "device_mesh"):
            raise TypeError(
                f"{_place(path)} is sharded over several processes: save such a state with "
                "torch.distributed.checkpoint, to which tiercache gives a writer (tiercache.checkpoint.dcp)"
            )
        if special := special_kind(torch, value):
            raise _refused(path, special)
        if value.device.type == "meta":
            raise _refused(path, "a tensor on the device meta, which has no values")
        name = str(value.dtype).removeprefix("torch.")
        stored = torch.view_as_real(value.detach().resolve_conj()) if name == _PAIRS else value.detach()
        memory = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
        is_plain = value.nbytes > 0 and not (value.is_conj() or value.is_neg())
        return self._add("$tensor", name, stored, ("torch", *memory) if is_plain else None, path)

    def _array(self, value: np.ndarray[Any, Any], path: tuple[Any, ...]) -> Any:
        if isinstance(value, np.ma.MaskedArray):
            raise _refused(path, "a masked array (its .data and np.ma.getmaskarray() of it can be stored)")
        name = value.dtype.name
        if name not in (*BY_NAME, _PAIRS):
            hint = " (each field can be stored by itself)" if value.dtype.names else ""
            raise _refused(path, f"an array of type {value.dtype}{hint}")
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        stored = np.ascontiguousarray(native).view(np.float64).reshape(*value.shape, 2) if name == _PAIRS else native
        self._kept.append(value)  # `stored` may be a copy: then the memory of a temporary array would be used again
        memory = value.__array_interface__["data"][0], value.dtype.str, value.shape, value.strides
        return self._add("$array", name, stored, ("numpy", *memory) if value.nbytes else None, path)

    def _add(self, tag: str, name: str, stored: Any, memory: tuple[Any, ...] | None, path: tuple[Any, ...]) -> Any:
        """Add a tensor and return its node.

        name: Name of its type. memory: Description of its memory, equal for tensors that are the same; None for none.
        """
        dtype = BY_NAME.get("float64" if name == _PAIRS else name)
        if dtype is None:
            raise _refused(path, f"a tensor of type {name}, a type that the safetensors format lacks")
        key = self._free_name(path)
        first = key if memory is None else self._by_memory.setdefault(memory, key)
        if first == key:
            self.tensors[key] = TensorSource(stored, dtype, tuple(stored.shape), int(stored.nbytes))
        else:
            self.aliases[key] = first
        return {tag: key, "as": _PAIRS} if name == _PAIRS else {tag: key}

    def _free_name(self, path: tuple[Any, ...]) -> str:
        """Return the keys of a path joined by dots, with a number if another path has the same name."""
        joined = ".".join(str(one) for one in path).encode("utf-8", "replace").decode() or "tensor"
        name, number = joined, 1
        while name in self.tensors or name in self.aliases or name == _HEADER_KEY:
            number += 1
            name = f"{joined}#{number}"
        return name


def _plain(value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, Enum):  # would come back as its value
        raise _refused(path, f"the enum member {value!r}")
    if isinstance(value, np.generic):
        if value.dtype.name not in (*BY_NAME, _PAIRS):
            raise _refused(path, f"a scalar of type {value.dtype}")
        return {"$scalar": [value.dtype.name, _plain(value.item(), path)]}
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, complex):
        return {"$complex": [_plain(value.real, path), _plain(value.imag, path)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": metric_json(value)}
    return value


def _key(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the node of a dict's key, of a set, or of an element of a set: it decodes to a value with a hash."""
    torch = sys.modules.get("torch")
    if torch is not None and (found := _torch_value(torch, value)) is not None:
        return found
    if isinstance(value, tuple):
        return {"$tuple": [_key(one, path) for one in value]}
    if isinstance(value, set | frozenset):
        tag = "$set" if isinstance(value, set) else "$frozenset"
        return {tag: sorted((_key(one, path) for one in value), key=json.dumps)}
    if value is None or isinstance(value, np.generic | bool | int | float | str | bytes | complex):
        return _plain(value, path)
    raise _refused(path, f"a dict or a set with a key of type {type(value).__name__}")


def special_kind(torch: Any, value: Any) -> str:
    """Return what a tensor is whose values are not one block of plain numbers, such as "a sparse tensor"; or ""."""
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({value.layout}; its to_dense() can be stored)"
    if value.is_quantized:
        return "a quantized tensor (its int_repr(), scale and zero point can be stored)"
    has_parts = hasattr(value, "__tensor_flatten__")
    return f"a tensor of the special kind {type(value).__name__}" if has_parts else ""


def _torch_value(torch: Any, value: Any) -> Any:
    """Return the node of a value of torch that is no tensor; None for another value."""
    if isinstance(value, torch.Size):
        return {"$torch": ["size", list(value)]}
    if isinstance(value, torch.dtype):
        return {"$torch": ["dtype", str(value).removeprefix("torch.")]}
    return {"$torch": ["device", str(value)]} if isinstance(value, torch.device) else None


def _place(path: tuple[Any, ...]) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)


def _refused(path: tuple[Any, ...], what: str) -> TypeError:
    return TypeError(f"{_place(path)} is {what}, which a checkpoint cannot hold; it holds {_ALLOWED}")


# -- decoding --------------------------------------------------------------------------------------------------------


def _decode_state_dict(value: Any, node: Any, find: FindTensor) -> Any:
    state: Any = OrderedDict(decode_state(value, find))
    state._metadata = OrderedDict(decode_state(node["metadata"], find))  # noqa: SLF001 - where torch keeps it
    return state


def _decode_tensor(value: Any, node: Any, find: FindTensor) -> Any:
    tensor = find(value, "torch")
    return import_module("torch").view_as_complex(tensor.contiguous()) if node.get("as") == _PAIRS else tensor


def _decode_sharded(value: Any, _node: Any, find: FindTensor) -> Any:
    torch = import_module("torch")
    whole = torch.empty(value["size"], dtype=getattr(torch, DTYPES[value["dtype"]]))
    for offsets, sizes, part in value["parts"]:  # of a checkpoint of several ranks: dcp.py
        box = tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))
        whole[box] = decode_state(part, find)
    return whole


def _decode_array(value: Any, node: Any, find: FindTensor) -> Any:
    array = find(value, "numpy")
    return np.ascontiguousarray(array).view(np.complex128)[..., 0] if node.get("as") == _PAIRS else array


def _decode_torch(value: Any, _node: Any, _find: FindTensor) -> Any:
    torch, (kind, what) = import_module("torch"), value
    if kind == "size":
        return torch.Size(what)
    return torch.device(what) if kind == "device" else getattr(torch, what)


_DECODERS: Mapping[str, Callable[[Any, Any, FindTensor], Any]] = {
    "$dict": lambda value, _node, find: {decode_state(key, find): decode_state(one, find) for key, one in value},
    "$state_dict": _decode_state_dict,
    "$tensor": _decode_tensor,
    "$sharded": _decode_sharded,
    "$array": _decode_array,
    "$scalar": lambda value, _node, find: np.dtype(value[0]).type(decode_state(value[1], find)),
    "$tuple": lambda value, _node, find: tuple(decode_state(one, find) for one in value),
    "$set": lambda value, _node, find: {decode_state(one, find) for one in value},
    "$frozenset": lambda value, _node, find: frozenset(decode_state(one, find) for one in value),
    "$bytes": lambda value, _node, _find: base64.b64decode(value),
    "$float": lambda value, _node, _find: NON_FINITE[value],
    "$complex": lambda value, _node, find: complex(*(decode_state(one, find) for one in value)),
    "$torch": _decode_torch,
}
