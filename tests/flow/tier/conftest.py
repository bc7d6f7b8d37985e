"""What the tiers' tests share: the servers, and a store in memory."""

from __future__ import annotations

import pytest
from tests.s3_fixtures import s3_server

from tiercache.demo.s3_server import S3Server
from tiercache.store import MemoryStore

__all__ = ["s3_server"]


@pytest.fixture(scope="session")
def moto_server():
    with S3Server(kind="moto") as server:
        yield server


@pytest.fixture
def store(request) -> MemoryStore:
    store = MemoryStore(f"tier-{request.node.name}")
    yield store
    store.delete([info.key for info in store.list()])
