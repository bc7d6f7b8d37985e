"""Stores beside a dict."""

from __future__ import annotations

import tempfile
import uuid
from contextlib import contextmanager

from hypothesis import settings
from tests.support.store_machine import store_machine

from tiercache.store import FsspecStore, LocalFolder, MemoryStore, memory


@contextmanager
def local():
    with tempfile.TemporaryDirectory() as folder:
        yield LocalFolder(folder)


@contextmanager
def in_memory():
    store = MemoryStore(uuid.uuid4().hex, "x/y")
    yield store
    memory._buckets.pop(store.name)


@contextmanager
def fsspec_local():
    with tempfile.TemporaryDirectory() as folder:
        store = FsspecStore(f"file://{folder}", f"file://{folder}", {})
        yield store
        store.close()


QUICK = settings(max_examples=15, stateful_step_count=20)
TestLocalBesideADict = store_machine(local).TestCase
TestMemoryBesideADict = store_machine(in_memory).TestCase
TestFsspecBesideADict = store_machine(fsspec_local).TestCase
for case in (TestLocalBesideADict, TestMemoryBesideADict, TestFsspecBesideADict):
    case.settings = QUICK
