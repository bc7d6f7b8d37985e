"""Small packed data sets for the loader's tests, and what their records are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.http_server import HttpFaultServer

import tiercache as tc
from tiercache.store import remote

N_REMOTE = 600

SCHEMA = {
    "id": "int64",
    "tokens": tc.Tensor("uint16", (6,)),
    "flag": "bool",
    "blob": "bytes",
    "text": "str",
    "boxes": tc.Ragged("float32", (None, 2)),
    "score": "float32?",
}


@pytest.fixture
def no_hedges(monkeypatch):
    """No request is sent twice because it is late, as on a busy machine: for tests that count bytes."""
    monkeypatch.setattr(remote, "HEDGED_SHARE", 0.0)


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


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A packed data set of N_REMOTE records as objects for an HTTP server."""
    path = tmp_path_factory.mktemp("remote") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(N_REMOTE))
    files = [file for file in path.rglob("*") if file.is_file()]
    return {f"data/{file.relative_to(path).as_posix()}": file.read_bytes() for file in files}


@pytest.fixture
def server(objects: dict[str, bytes]) -> Iterator[HttpFaultServer]:
    """An HTTP server that has them."""
    with HttpFaultServer(dict(objects)) as server:
        yield server
        # What is being read when an iterator is closed ends by itself: not when the server has gone, by many retries.
        for thread in threading.enumerate():
            if thread.name.startswith("tiercache-load"):
                thread.join(30)
