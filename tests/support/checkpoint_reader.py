"""Reads checkpoints with nothing of the library but the parser of the manifest and of the state: the tests' oracle."""

import sys
from importlib import import_module

import numpy as np

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.format import checkpoint_objects, list_names, manifest_key, parse_manifest
from tiercache.checkpoint.state_tree import decode_state, parse_state


def read_checkpoint(store, name):
    """The manifest and the state of a committed checkpoint; AssertionError where a byte is not what it says."""
    manifest = parse_manifest(store.get(manifest_key(name)), manifest_key(name))
    assert manifest.name == name
    data = {}
    for file in manifest.files:
        found = data[file.path] = store.get(f"{name}/{file.path}")
        assert (len(found), crc32c(found)) == (file.n_bytes, file.crc32c), f"{name}: {file.path} is wrong"
    tensors = {}
    # Without torch where the test has none: a process that forks must have no threads.
    load = import_module("safetensors.torch" if "torch" in sys.modules else "safetensors.numpy").load
    for path in {entry.file for entry in manifest.tensors.values()}:
        inside = load(data[path])
        names = {entry.offset: key for key, entry in manifest.tensors.items() if entry.file == path and key in inside}
        for key, entry in manifest.tensors.items():
            if entry.file == path:
                tensor = inside[key if key in inside else names[entry.offset]]
                values = data[path][entry.offset : entry.offset + entry.n_bytes]
                assert values == _bytes_of(tensor), f"{name}: {key} lies elsewhere"
                assert tuple(tensor.shape) == entry.shape
                tensors[key] = tensor
    tree = parse_state(data["state.json"])
    return manifest, decode_state(tree, lambda key, library: _as(library, tensors[key]))


def _bytes_of(tensor):
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    return tensor.contiguous().reshape(-1).view(import_module("torch").uint8).numpy().tobytes()


def _as(library, tensor):
    return tensor.numpy() if library == "numpy" and not isinstance(tensor, np.ndarray) else tensor


def newest(store):
    """The name of the checkpoint that was written last, or None."""
    return (list_names(store) or [None])[-1]


def leftovers(store):
    """Objects of checkpoint folders without a manifest, by folder."""
    return {
        name: [*found] for name, found in checkpoint_objects(store.list()).items() if "checkpoint.json" not in found
    }


def same(a, b):
    """Whether two states are equal bit by bit."""
    if hasattr(a, "untyped_storage"):
        return type(a) is type(b) and (a.dtype, a.shape) == (b.dtype, b.shape) and _bytes_of(a) == _bytes_of(b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)
