"""Small packed data sets for the loader's tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.http_server import HttpFaultServer
from tests.support.records import N_REMOTE, SCHEMA, make_columns

import tiercache as tc
from tiercache.store import remote


@pytest.fixture
def no_hedges(monkeypatch):
    """No request is sent twice because it is late, as on a busy machine: for tests that count bytes."""
    monkeypatch.setattr(remote, "HEDGED_SHARE", 0.0)


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
