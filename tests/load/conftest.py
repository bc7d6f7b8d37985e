"""Small packed data sets for the loader's tests, and what their records are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiercache as tc

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


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """make(n, shard_size=..., block_size=...) packs n records to a local folder and gives its path."""

    def make(n: int, name: str = "data", **options: Any) -> Path:
        path = tmp_path / name
        with tc.Writer(path, schema=SCHEMA, **{"shard_size": "8KiB", "block_size": "1KiB", **options}) as writer:
            for first in range(0, n, 64):
                writer.write_batch(make_columns(min(64, n - first), first))
        return path

    return make
