"""A writer that ends by Ctrl-C, in a fork, or with its process writes all records or no shard."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiercache.errors import StoreError
from tiercache.shard import shard_file
from tiercache.shard import writer as shard_writer
from tiercache.shard.schema import Schema
from tiercache.shard.shard_file import BlockCutter, ShardFile, UploadQueue
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore

SCHEMA = Schema.of({"x": "int64"})
OPTIONS = ShardOptions(block_bytes=1024, compression="none")
DEADLINE_S = 60


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(f"ends-{request.node.name}")


HAND_OVERS = [
    (shard_writer.RecordBuffer, "take"),
    (BlockCutter, "end_block"),
    (BlockCutter, "add"),
    (ShardFile, "add_block"),
    (UploadQueue, "send"),
]


@pytest.mark.parametrize(("owner", "name"), HAND_OVERS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("by", ["write", "batch"])
def test_ctrl_c_in_the_middle_of_a_write_breaks_the_writer(store, monkeypatch, owner, name, by):
    monkeypatch.setattr(shard_file, "PART_BYTES", 2048)
    store.min_part_bytes = 2048
    before, calls = getattr(owner, name), []

    def struck(*given):
        found = before(*given)
        calls.append(name)
        raise KeyboardInterrupt
        return found

    def write():
        for i in range(1000):
            writer.write({"x": i})
        if by == "batch":
            writer.write_batch({"x": np.arange(1000)})

    writer = ShardWriter(store, SCHEMA, OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        if name == "add" and by == "write":
            patch.setattr(shard_writer.RecordBuffer, "cuts_exactly", False)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert calls
    with pytest.raises(ValueError, match="only abort"):
        writer.finish()
    writer.abort()
    assert list(store.list()) == []


class Stubborn(MemoryStore):
    """Its uploads can neither be filled nor dropped."""

    def create(self, key):
        upload = super().create(key)

        def refuse(*given):
            raise StoreError("first" if given else "second", url=self.url)

        upload.put_part = upload.abort = refuse
        return upload


def test_an_error_of_the_abort_does_not_hide_the_first_error():
    with pytest.raises(StoreError, match="first"), ShardWriter(Stubborn("ends-stubborn"), SCHEMA, OPTIONS) as writer:
        writer.write({"x": 1})


def test_an_abort_that_was_interrupted_can_be_repeated(store, monkeypatch):
    writer = ShardWriter(store, SCHEMA, ShardOptions(shard_bytes=3000, block_bytes=1024))
    writer.write_batch({"x": np.arange(5000)})
    with monkeypatch.context() as patch:

        def struck(self):
            raise KeyboardInterrupt

        patch.setattr(shard_file._UploadThread, "join", struck)
        with pytest.raises(KeyboardInterrupt):
            writer.abort()
    with pytest.raises(ValueError, match="only abort"):
        writer.write({"x": 1})
    writer.abort()
    assert list(store.list()) == []


def test_a_process_that_exits_without_close_leaves_no_data_set(tmp_path):
    script = Path(__file__).with_name("exit_while_writing.py")
    folder = tmp_path / "d"
    ended = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == (
        f"tiercache: error: {folder}: a Writer with 40 records was not closed, so nothing was committed: "
        "use `with`, or call close()\n"
    )
    assert list(LocalFolder(folder).list()) == []


class Faulty(MemoryStore):
    """The n-th of its calls that belong to uploads fails."""

    min_part_bytes = 2048

    def __init__(self, name, n):
        super().__init__(name)
        self.n = n

    def count(self):
        self.n -= 1
        if self.n == -1:
            raise StoreError("it failed", url=self.url)

    def create(self, key):
        self.count()
        upload = super().create(key)
        put_part, complete = upload.put_part, upload.complete
        upload.put_part = lambda *given: (self.count(), put_part(*given))
        upload.complete = lambda **given: (self.count(), complete(**given))
        return upload


@pytest.mark.parametrize("n", range(14))
def test_an_error_of_any_store_call_is_raised_and_leaves_no_object(monkeypatch, n):
    monkeypatch.setattr(shard_file, "PART_BYTES", 2048)
    store = Faulty("ends-faulty", n)

    def write():
        with ShardWriter(store, SCHEMA, ShardOptions(shard_bytes=5000, block_bytes=1024, compression="none")) as writer:
            for i in range(2000):
                writer.write({"x": i})

    with pytest.raises(StoreError, match="it failed"):
        write()
    assert list(store.list()) == []
