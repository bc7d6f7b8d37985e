"""The parts of a state of many ranks: what torch's Metadata says of them, as state.json and back.

A part is a tensor, or a box of one, that a rank has stored. Values that are not tensors are nodes of the tree of the
state, as `Checkpoints.save()` writes it, so that either program reads what the other wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.layout import Manifest, StoredFile, TensorEntry
from tiercache.checkpoint.state_tree import DTYPES, flat_bytes, state_text

# Each part of a tensor has a checksum for every so many bytes: a rank that reads a range checks what it reads.
BLOCK_BYTES = 1 << 20

_DTYPE_NAMES = {name: key for key, name in DTYPES.items()}
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor, or a part of one, that a rank has stored.

    Attributes:
        name: Name in the manifest.
        entry: Place of its values.
        blocks: CRC-32C of each BLOCK_BYTES of its values.
        file: File that contains it.
    """

    name: str
    entry: TensorEntry
    blocks: tuple[int, ...]
    file: StoredFile


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A value that is not a tensor: its node in the state, and the tensors to which the node refers."""

    node: Any
    parts: tuple[StoredPart, ...]


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, which can be written."""
    if not tensor.numel():
        return memoryview(b"")
    values: Any = flat_bytes(tensor).numpy()
    return memoryview(values)


def block_checksums(data: memoryview) -> tuple[int, ...]:
    """Return the CRC-32C of each BLOCK_BYTES of the values of a part."""
    return tuple(crc32c(data[start : start + BLOCK_BYTES]) for start in range(0, data.nbytes, BLOCK_BYTES))


def dtype_name(fqn: str, dtype: torch.dtype) -> str:
    """Return the name of a dtype in a safetensors file. Raises TypeError, with the key, if the format lacks it."""
    name = _DTYPE_NAMES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise TypeError(f"{fqn} is a tensor of type {dtype}, which the safetensors format does not have")
    return name


def encode_metadata(
    metadata: Metadata, stored: Mapping[MetadataIndex, Any], blocks: Mapping[str, Sequence[int]]
) -> bytes:
    """Return the text of state.json: the tree of the state, as of Checkpoints.save(), and checksums of the parts.

    Raises:
        ValueError: A part is missing, or the planner's own data cannot be stored.
    """
    nodes: dict[str, Any] = {}
    for fqn, found in metadata.state_dict_metadata.items():
        if isinstance(found, TensorStorageMetadata):
            nodes[fqn] = _tensor_node(fqn, found, stored)
        else:
            nodes[fqn] = stored[MetadataIndex(fqn)].node
    paths = metadata.planner_data
    if paths is not None and not (isinstance(paths, Mapping) and paths.keys() >= nodes.keys()):
        raise ValueError(
            f"the planner has data of its own ({type(paths).__name__}), which a checkpoint cannot hold; it holds the "
            "paths of keys, as DefaultSavePlanner has them"
        )
    tree = _dict_node(nodes) if paths is None else _tree_of({tuple(paths[fqn]): node for fqn, node in nodes.items()})
    checksums = {"bytes": BLOCK_BYTES, "crc32c": {name: list(crcs) for name, crcs in blocks.items()}}
    body = json.loads(state_text(tree)) | {"blocks": checksums, "is_flat": paths is None}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def _tree_of(nodes: Mapping[tuple[str | int, ...], Any]) -> Any:
    """Return the tree that has each node at its path, in which a number is an index of a list."""
    if () in nodes:
        return nodes[()]
    below: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for (key, *rest), node in nodes.items():
        below.setdefault(key, {})[tuple(rest)] = node
    found = {key: _tree_of(part) for key, part in below.items()}
    if found and all(isinstance(key, int) for key in found):
        return [found[number] for number in range(len(found))]
    return _dict_node(found)


def _dict_node(nodes: Mapping[Any, Any]) -> Any:
    return {"$dict": [list(item) for item in nodes.items()]} if any(k.startswith("$") for k in nodes) else dict(nodes)


def _tensor_node(fqn: str, found: TensorStorageMetadata, stored: Mapping[MetadataIndex, Any]) -> Any:
    parts: list[Any] = []
    for chunk in found.chunks:
        part = stored.get(MetadataIndex(fqn, chunk.offsets))
        if not isinstance(part, StoredPart):
            raise ValueError(f"no rank has stored {fqn} at {tuple(chunk.offsets)}")
        parts.append([list(chunk.offsets), list(chunk.sizes), {"$tensor": part.name}])
    if len(parts) == 1 and parts[0][1] == list(found.size):
        return parts[0][2]
    return {"$sharded": {"dtype": dtype_name(fqn, found.properties.dtype), "size": list(found.size), "parts": parts}}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint contains, in the terms of torch.

    Attributes:
        metadata: Sizes, types and parts of the tensors, and keys of other values.
        parts: Name in the manifest of each part of a tensor.
        values: Node of each other value in the state, by key.
    """

    metadata: Metadata
    parts: Mapping[MetadataIndex, str]
    values: Mapping[str, Any]


def contents_of(tree: Any, manifest: Manifest, *, is_flat: bool) -> Contents:
    """Return the contents of a checkpoint from its state, whether torch's planners or Checkpoints.save() wrote it.

    is_flat: Whether the planner that wrote it kept nested dicts as one value each.
    """
    leaves = (((key,), node) for key, node in items_of(tree) or ()) if is_flat else _leaves(tree, ())
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    parts, values = dict[MetadataIndex, str](), dict[str, Any]()
    paths = {}
    for path, node in leaves:
        fqn = ".".join(map(str, path))
        paths[fqn] = path
        facts = _sharded_facts(node, manifest)
        if facts is None:
            found[fqn], values[fqn] = BytesStorageMetadata(), node
            continue
        properties = TensorProperties(getattr(torch, DTYPES[facts["dtype"]]))
        found[fqn] = tensor = TensorStorageMetadata(properties, torch.Size(facts["size"]), [])
        for offsets, sizes, part in facts["parts"]:
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            parts[MetadataIndex(fqn, offsets)] = part["$tensor"]
    metadata = Metadata(found, planner_data=None if is_flat else paths, storage_data=parts)
    return Contents(metadata, parts, values)


def _sharded_facts(node: Any, manifest: Manifest) -> Any:
    """Return type, size and parts of a node that is a tensor; None for another node."""
    if not isinstance(node, dict):
        return None
    if "$tensor" in node and "as" not in node:
        name = node["$tensor"]
        entry = manifest.tensors[name]
        shape = list(entry.shape)
        return {"dtype": entry.dtype, "size": shape, "parts": [[[0] * len(shape), shape, node]]}
    return node.get("$sharded")


def _leaves(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the nodes of a state that torch's planners regard as one value each, with their paths."""
    if (items := items_of(node)) is not None:
        for key, value in items:
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, list) and not _is_value(node):
        for number, value in enumerate(node):
            yield from _leaves(value, (*path, number))
    else:
        yield path, node


def items_of(node: Any) -> Iterable[Sequence[Any]] | None:
    """Return keys and nodes of a dict in the state; None for another node."""
    if not isinstance(node, dict):
        return None
    if "$state_dict" in node:
        return items_of(node["$state_dict"])
    if "$dict" in node:
        return node["$dict"]  # type: ignore[no-any-return]
    return None if any(key.startswith("$") for key in node) else node.items()


def _is_value(node: list[Any]) -> bool:
    """Return whether torch's planners keep a list as one value: it contains neither tensors nor dicts."""
    for one in node:
        if items_of(one) is not None or (isinstance(one, dict) and ("$tensor" in one or "$sharded" in one)):
            return False
        if isinstance(one, list) and not _is_value(one):
            return False
    return True
