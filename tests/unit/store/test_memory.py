"""Stores in memory."""

from __future__ import annotations

import uuid

import pytest
from tests.support.store_suite import StoreSuite

from tiercache.store import MemoryStore, memory, open_store


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def store(self):
        store = open_store(f"memory://{uuid.uuid4().hex}/some/folder")
        yield store
        memory._buckets.pop(store.name, None)

    def raw_put(self, store, key, data):
        info = MemoryStore(store.name).put(f"some/folder/{key}", data)
        _, kept = memory._buckets[store.name][f"some/folder/{key}"]
        assert kept.n_bytes == info.n_bytes

    def raw_get(self, store, key):
        return memory._buckets[store.name][f"some/folder/{key}"][0]


def test_memory_stores_of_one_name_share_their_objects():
    MemoryStore("shared").put("a/b", b"x")
    assert MemoryStore("shared", "a").get("b") == b"x"
    assert list(MemoryStore("other").list()) == []
    memory._buckets.pop("shared")
    memory._buckets.pop("other", None)
