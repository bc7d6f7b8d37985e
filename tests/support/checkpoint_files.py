"""Writes checkpoints as the layout says, without the code that saves them: for tests of what reads and deletes them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.format import (
    METRICS_NAME,
    STATE_NAME,
    Manifest,
    StoredFile,
    TensorEntry,
    TensorSpec,
    checkpoint_name,
    encode_manifest,
    lay_out_file,
    manifest_key,
    metric_json,
)
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
    commit: bool = True,
    n_files: int = 2,
    edit_tree: Callable[[Any], Any] = lambda tree: tree,
) -> str:
    """Write one checkpoint and return its name. edit_tree: Changes the tree of the state before it is written."""
    created_s = START_S + 60.0 * step if created_s is None else created_s
    name = checkpoint_name(step, created_s, nonce)
    encoded = encode_state({"step": step} if state is None else state)
    specs = {key: TensorSpec(key, one.dtype, one.shape, one.n_bytes) for key, one in encoded.tensors.items()}
    files, entries = [], {}
    for number, keys in enumerate(filter(None, (list(specs)[i::n_files] for i in range(n_files))), start=1):
        layout = lay_out_file(specs[key] for key in keys)
        data = layout.header + b"".join(bytes_of(encoded.tensors[key].value) for key in layout.offsets)
        path = f"tensors-{number:05d}-of-{n_files:05d}.safetensors"
        for key, offset in layout.offsets.items():
            entries[key] = TensorEntry(path, offset, specs[key].n_bytes, specs[key].dtype, specs[key].shape)
        files.append(put_file(store, name, path, data))
    for alias, key in encoded.aliases.items():
        entries[alias] = entries[key]
    files.append(put_file(store, name, STATE_NAME, state_text(edit_tree(encoded.tree))))
    body = json.dumps({key: metric_json(value) for key, value in (metrics or {}).items()}).encode()
    files.append(put_file(store, name, METRICS_NAME, body))
    manifest = Manifest(name, step, created_s, tuple(files), entries, dict(metrics or {}), note)
    if commit:
        assert store.put_if_absent(manifest_key(name), encode_manifest(manifest))
    return name


def put_file(store: Store, name: str, path: str, data: bytes) -> StoredFile:
    """Put one file of a checkpoint and return its entry."""
    store.put(f"{name}/{path}", data)
    return StoredFile(path, len(data), crc32c(data))
