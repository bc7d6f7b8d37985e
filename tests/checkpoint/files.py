"""Writes checkpoints as the layout says, without the code that saves them: for tests of what reads and deletes them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.layout import (
    METRICS_NAME,
    STATE_NAME,
    Manifest,
    StoredFile,
    TensorEntry,
    checkpoint_name,
    encode_manifest,
    key_of,
    manifest_key,
    metric_json,
    reference_key,
    shared_path,
    tensor_digest,
)
from tiercache.checkpoint.safetensors_file import TensorSpec, lay_out_file
from tiercache.checkpoint.staging import SHARED_NAME
from tiercache.checkpoint.state_tree import encode_state, state_text
from tiercache.store import Store

START_S = 1_800_000_000.0


def bytes_of(value: Any) -> bytes:
    """The values of a tensor, or of an array, row by row."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    import torch

    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_checkpoint(
    store: Store,
    step: int,
    state: Mapping[str, Any] | None = None,
    *,
    created_s: float | None = None,
    nonce: str = "00c0de",
    metrics: Mapping[str, float] | None = None,
    note: Any = None,
    share: bool = False,
    commit: bool = True,
    n_files: int = 2,
    edit_tree: Callable[[Any], Any] = lambda tree: tree,
) -> str:
    """Write one checkpoint and return its name.

    share: Put each tensor into a shared file of its own. edit_tree: Changes the tree of the state before it is written.
    """
    created_s = START_S + 60.0 * step if created_s is None else created_s
    name = checkpoint_name(step, created_s, nonce)
    encoded = encode_state({"step": step} if state is None else state)
    specs = {key: TensorSpec(key, one.dtype, one.shape, one.n_bytes) for key, one in encoded.tensors.items()}
    files, entries = [], {}
    groups = [[key] for key in specs] if share else [list(specs)[i::n_files] for i in range(n_files)]
    for number, keys in enumerate(filter(None, groups), start=1):
        inside = {SHARED_NAME: keys[0]} if share else {key: key for key in keys}
        layout = lay_out_file(replace(specs[key], name=name_inside) for name_inside, key in inside.items())
        values = {key: bytes_of(encoded.tensors[key].value) for key in keys}
        data = layout.header + b"".join(values[inside[name_inside]] for name_inside in layout.offsets)
        path, digest = f"tensors-{number:05d}-of-{n_files:05d}.safetensors", None
        if share:
            spec = specs[keys[0]]
            digest = tensor_digest(spec.dtype, spec.shape, [memoryview(values[keys[0]])])
            path = shared_path(digest)
        for name_inside, offset in layout.offsets.items():
            spec = specs[inside[name_inside]]
            entries[spec.name] = TensorEntry(path, offset, spec.n_bytes, spec.dtype, spec.shape, digest)
        if path not in [one.path for one in files]:
            files.append(put_file(store, name, path, data))
    for alias, key in encoded.aliases.items():
        entries[alias] = entries[key]
    files.append(put_file(store, name, STATE_NAME, state_text(edit_tree(encoded.tree))))
    body = json.dumps({key: metric_json(value) for key, value in (metrics or {}).items()}).encode()
    files.append(put_file(store, name, METRICS_NAME, body))
    manifest = Manifest(name, step, created_s, tuple(files), entries, dict(metrics or {}), note)
    if commit:
        assert store.put_if_absent(manifest_key(name), encode_manifest(manifest))
        if any(entry.digest for entry in entries.values()):
            store.put(reference_key(name), encode_manifest(manifest))
    return name


def put_file(store: Store, name: str, path: str, data: bytes) -> StoredFile:
    """Put one file of a checkpoint and return its entry."""
    store.put(key_of(name, path), data)
    return StoredFile(path, len(data), crc32c(data))
