"""What the tiers' tests share: a store in memory."""

from __future__ import annotations

import pytest

from tiercache.store import MemoryStore


@pytest.fixture
def store(request):
    store = MemoryStore(f"tier-{request.node.name}")
    yield store
    store.delete([info.key for info in store.list()])
