"""Uploads in the background: order, bounded memory, forks and abandoned writers."""

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from tests.support.forks import in_a_fork

from tiercache.shard import shard_file as shard_file
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema, Tensor
from tiercache.shard.shard_file import UploadQueue
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.contract import Upload
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore

PART_BYTES = 4096
SCHEMA = Schema.of({"x": "int64"})
DEADLINE_S = 20


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(shard_file, "_SLACK_BYTES", 1024)


class Gated(MemoryStore):
    """Its uploads stop before each part until the gate is open."""

    min_part_bytes = PART_BYTES

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()
        self.n_parts = 0

    def create(self, key: str) -> Upload:
        upload = super().create(key)
        put_part = upload.put_part

        def put(number: int, data: memoryview) -> None:
            self.reached.set()
            assert self.gate.wait(DEADLINE_S)
            self.n_parts += 1
            put_part(number, data)

        upload.put_part = put  # type: ignore[method-assign]
        return upload


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[Gated]:
    made = Gated(f"uploading-{request.node.name}")
    yield made
    made.gate.set()


def upload_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tiercache-upload"]


def options(**others: int) -> ShardOptions:
    return ShardOptions(block_bytes=1024, compression="none", **others)


def test_the_writer_continues_during_an_upload_and_parts_stay_in_order(store: Gated) -> None:
    store.gate.clear()
    with ShardWriter(store, SCHEMA, options()) as writer:
        for i in range(1200):  # 9600 bytes: a part that is stuck, one that waits, and a beginning
            writer.write({"x": i})
        assert store.reached.wait(DEADLINE_S)
        assert store.n_parts == 0
        store.gate.set()
        writer.write_batch({"x": np.arange(1200, 5000)})
    (info,) = writer.finish()
    assert store.n_parts > 5
    assert ShardReader(store, info.name, info=info).take(range(5000), [0])[0].values.tolist() == list(range(5000))


def test_the_queue_holds_one_part_in_transit_and_two_waiting(store: Gated) -> None:
    store.gate.clear()
    uploads = UploadQueue(store)
    upload, taken = uploads.begin("a"), threading.Event()

    def fourth() -> None:
        uploads.send(upload, 3, np.empty(PART_BYTES, np.uint8), PART_BYTES)
        taken.set()

    for number in range(3):
        uploads.send(upload, number, np.empty(PART_BYTES, np.uint8), PART_BYTES)
        assert store.reached.wait(DEADLINE_S)  # the first is under way, so that two can wait
    helper = threading.Thread(target=fourth)
    helper.start()
    assert not taken.wait(0.1)
    store.gate.set()
    assert taken.wait(DEADLINE_S)
    helper.join()
    uploads.abort()


def test_abort_discards_waiting_parts_and_shards(store: Gated) -> None:
    writer = ShardWriter(store, SCHEMA, options(shard_bytes=3000))
    writer.write_batch({"x": np.arange(2000)})
    store.gate.clear()
    opener = threading.Timer(0.05, store.gate.set)  # abort() waits for the part that is under way
    opener.start()
    writer.write_batch({"x": np.arange(400)})
    writer.abort()
    opener.join()
    assert list(store.list()) == []
    writer.abort()


def test_an_abandoned_writer_ends_its_thread(store: Gated) -> None:
    writer = ShardWriter(store, SCHEMA, options())
    writer.write_batch({"x": np.arange(2000)})
    (thread,) = upload_threads()
    del writer
    gc.collect()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_cannot_continue_the_writer_or_delete_its_parents_shards(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def child() -> int:
        refused = 0
        for call in (writer.finish, lambda: writer.write_batch({"x": np.arange(100_000)})):
            try:
                call()
            except ValueError:
                refused += 1
        writer.abort()
        return 40 + refused

    store = LocalFolder(tmp_path)
    with ShardWriter(store, SCHEMA, options(shard_bytes=3000)) as writer:
        writer.write_batch({"x": np.arange(2000)})
        assert in_a_fork(child) == 42
        writer.write_batch({"x": np.arange(2000, 2500)})
    infos = writer.finish()
    assert sum(info.n_records for info in infos) == 2500
    assert {info.key for info in store.list()} == {info.name for info in infos}


def test_a_chunk_that_is_longer_than_a_part_is_sent_in_parts(store: Gated) -> None:
    schema = Schema.of({"t": Tensor("uint8", (3 * PART_BYTES + 5,)), "n": "int8"})
    rows = np.random.default_rng(0).integers(0, 256, (7, 3 * PART_BYTES + 5), np.uint8)
    with ShardWriter(store, schema, options()) as writer:
        for n, row in enumerate(rows):
            writer.write({"t": row, "n": n})
    (info,) = writer.finish()
    assert store.n_parts >= 21
    np.testing.assert_array_equal(ShardReader(store, info.name, info=info).take(range(7), [0])[0].values, rows)
