"""Records that follow from their number, in a column of each kind, and the check of batches of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

import tiercache as tc

N_REMOTE = 600  # records of the fixture `server`

SCHEMA = {
    "id": "int64",
    "tokens": tc.Tensor("uint16", (6,)),
    "flag": "bool",
    "blob": "bytes",
    "text": "str",
    "boxes": tc.Ragged("float32", (None, 2)),
    "score": "float32?",
}


def make_columns(n: int, first: int = 0) -> dict[str, Any]:
    """N records, each of which follows from its id."""
    ids = np.arange(first, first + n)
    return {
        "id": ids.astype(np.int64),
        "tokens": ((ids[:, None] * 7 + np.arange(6)) % 65536).astype(np.uint16),
        "flag": ids % 3 == 0,
        "blob": [bytes([i % 251]) * (i % 11) for i in ids],
        "text": [f"text {i}" for i in ids],
        "boxes": [np.full((i % 4, 2), i, np.float32) for i in ids],
        "score": [None if i % 5 == 0 else float(i) / 2 for i in ids],
    }


def check_batch(batch: dict[str, Any]) -> list[int]:
    """Every column of a batch against the ids in it; the ids."""
    ids = batch["id"].tolist()
    expected = [make_columns(1, i) for i in ids]
    assert batch["tokens"].tolist() == [e["tokens"][0].tolist() for e in expected]
    assert batch["flag"].tolist() == [bool(e["flag"][0]) for e in expected]
    assert batch["blob"] == [e["blob"][0] for e in expected]
    assert batch["text"] == [e["text"][0] for e in expected]
    assert [b.tolist() for b in batch["boxes"]] == [e["boxes"][0].tolist() for e in expected]
    assert batch["score.valid"].tolist() == [e["score"][0] is not None for e in expected]
    valid = batch["score.valid"]
    assert batch["score"][valid].tolist() == [e["score"][0] for e in expected if e["score"][0] is not None]
    return ids


def ids_of(loader: Any) -> list[list[int]]:
    """The ids of each batch, every column checked."""
    return [check_batch(batch) for batch in loader]


def join_loading() -> None:
    """Wait for what is read when an iterator has gone: it ends by itself, and opens shards and caches anew."""
    for name in ("tiercache-plan", "tiercache-load"):  # the one starts the others
        for thread in threading.enumerate():
            if thread.name.startswith(name):
                thread.join(30)


def append_records(writer: tc.Writer, first: int, n: int) -> None:
    """Records that follow from their number."""
    ids = np.arange(first, first + n)
    writer.write_batch({"id": ids, "values": np.sin(ids[:, None] * np.arange(1, 18)).astype("float32")})


def replace_bytes(folder: Path, old: bytes, new: bytes) -> None:
    """Write other bytes over those of the one file that has them."""
    (file,) = [path for path in folder.rglob("*") if path.is_file() and old in path.read_bytes()]
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(old, new))
