"""Any other URL through fsspec."""

from __future__ import annotations

import threading
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from tests.support.store_suite import StoreSuite

from tiercache.errors import StoreError
from tiercache.store import FsspecStore, open_store


class TestFsspecMemory(StoreSuite):
    @pytest.fixture
    def store(self):
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
        store = FsspecStore("memory://bucket/folder", "memory://bucket/folder", {})
        yield store
        store.close()
        memory.store.clear()

    def raw_put(self, store, key, data):
        fsspec.filesystem("memory").pipe_file(f"/bucket/folder/{key}", data)

    def raw_get(self, store, key):
        return fsspec.filesystem("memory").store[f"/bucket/folder/{key}"].getvalue()


class Told(MemoryFileSystem):
    """A file system with an option `timeout` of its own, whose info() waits at a gate."""

    protocol = "told"
    cachable = False
    gate = threading.Event()
    told: ClassVar[list[object]] = []

    def __init__(self, timeout=None, **options):
        super().__init__(**options)
        self.told.append(timeout)

    def info(self, path, **options):
        self.gate.wait(60)
        return super().info(path, **options)


@pytest.mark.parametrize("url", ["told://folder", "dir::told://folder"])
def test_timeout_limits_calls_to_any_url_and_the_file_systems_own_is_given_by_protocol(monkeypatch, url):
    monkeypatch.setitem(known_implementations, "told", {"class": f"{__name__}.Told"})
    Told.gate.clear()
    Told.told.clear()
    store = open_store(url, timeout="0.3s", told={"timeout": 7})
    with pytest.raises(StoreError, match=r"0\.3 s") as caught:
        store.head("a")
    Told.gate.set()
    store.close()
    assert caught.value.retryable
    assert Told.told == [7]
    with pytest.raises(ValueError, match="timeout"):
        open_store(url, timeout="soon")
