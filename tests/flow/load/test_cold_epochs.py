"""The requests of a cold epoch and their order, as a store records them, and what a batch waits for."""

from __future__ import annotations

import math
import threading
from contextlib import closing

import numpy as np
import pytest
from tests.support.http_server import HttpFaultServer

import tiercache as tc
from tiercache.data import opened_version
from tiercache.load.planner import SHARDS_AHEAD
from tiercache.shard.versions import latest, read_shards
from tiercache.store import LocalFolder, MemoryStore
from tiercache.store.contract import WrapperStore
from tiercache.waiting import wait_for

N, BLOCK_RECORDS, SHARD_BLOCKS = 3072, 16, 8
RECORD_BYTES = 8192 + 8
BLOCK_BYTES = BLOCK_RECORDS * RECORD_BYTES
N_SHARDS = N // (BLOCK_RECORDS * SHARD_BLOCKS)


class ScriptedStore(WrapperStore):
    """Records the ranges that are read of shards. Once budget_bytes were read, further reads wait until `go` is set."""

    def __init__(self, inner, budget_bytes=math.inf):
        super().__init__(inner)
        self.budget_bytes, self.n_bytes = budget_bytes, 0
        self.reads, self.go, self.is_held = [], threading.Event(), False
        self._lock = threading.Lock()

    def read_into(self, key, spans, **options):
        if key.startswith("shards/"):
            with self._lock:
                self.reads.append((key, [span for span, _ in spans]))
                self.is_held = self.n_bytes >= self.budget_bytes
                self.n_bytes += sum(span.n_bytes for span, _ in spans)
            if self.is_held:
                assert self.go.wait(60)
        super().read_into(key, spans, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    url = f"memory://{tmp_path_factory.mktemp('cold').name}"
    rng = np.random.default_rng(0)
    sizes = {"shard_size": SHARD_BLOCKS * BLOCK_BYTES, "block_size": BLOCK_BYTES, "compression": "none"}
    with tc.Writer(url, schema={"x": tc.Tensor("uint8", (8192,)), "id": "int64"}, **sizes) as writer:
        for first in range(0, N, 128):
            x = rng.integers(0, 255, (128, 8192), dtype=np.uint8)
            writer.write_batch({"x": x, "id": np.arange(first, first + 128)})
    return url


@pytest.fixture
def cold(packed, tmp_path, monkeypatch):
    """Function that opens the data set through a new cache, or none, over a scripted store, and makes a loader."""
    opened = []

    def make(budget_bytes=math.inf, *, cached=True, columns=None, shuffle=True, **options):
        store = ScriptedStore(MemoryStore(packed.removeprefix("memory://")), budget_bytes)
        monkeypatch.setattr(opened_version.DatasetLocation, "open", lambda _: store)
        cache = tc.Cache(tmp_path / "cache", size="1GB", min_free=0) if cached else False
        dataset = tc.Dataset("s3://scripted/data", cache=cache, columns=columns)
        sizes = {"shuffle_group_bytes": "9MiB", "shuffle_window_bytes": "9MiB"} | options.pop("sizes", {})
        options = tc.LoaderOptions(seed=1, memory_bytes=1, **sizes)
        loader = tc.DataLoader(dataset, BLOCK_RECORDS, shuffle=shuffle, options=options, timeout=60)
        opened.append((store, dataset, cache))
        return store, loader

    yield make
    for store, dataset, cache in opened:
        store.go.set()
        dataset.close()
        if cache:
            cache.close()


def is_footer(spans) -> bool:
    return sum(span.n_bytes for span in spans) < 8192


def blocks_of(batch) -> int:
    """Return the number of blocks whose records a batch has."""
    return len({int(i) // BLOCK_RECORDS for i in batch["id"]})


@pytest.mark.parametrize("cached", [True, False])
def test_the_first_shuffled_batch_waits_only_for_the_blocks_of_its_slice(cold, cached, monkeypatch):
    monkeypatch.setattr("tiercache.load.pieces.SLICE_BYTES", 1)
    # The store holds back everything beyond the 16 blocks of the first batch, and the footers.
    budget_bytes = BLOCK_RECORDS * BLOCK_BYTES + N_SHARDS * 4096
    store, loader = cold(budget_bytes, cached=cached, sizes={"shuffle_group_bytes": "all"})
    batches = iter(loader)
    first = next(batches)
    store.go.set()
    ids = [*first["id"].tolist(), *(i for batch in batches for i in batch["id"].tolist())]
    assert 1 < blocks_of(first) <= BLOCK_RECORDS
    assert sorted(ids) == list(range(N))


@pytest.mark.parametrize("cached", [True, False])
def test_stored_order_is_served_as_its_blocks_arrive_with_the_footers_of_its_first_shards(cold, cached, monkeypatch):
    monkeypatch.setattr("tiercache.load.pieces.FIRST_PART_BYTES", 4 * BLOCK_BYTES)
    monkeypatch.setattr("tiercache.order.epoch_order.MAX_STORED_GROUP_SHARDS", 4)
    # The store holds back everything beyond the four blocks of the first part, and four footers.
    store, loader = cold(4 * BLOCK_BYTES, cached=cached, shuffle=False)
    batches = iter(loader)
    ids = [i for _ in range(4) for i in next(batches)["id"].tolist()]
    n_footers = len({key for key, spans in store.reads if is_footer(spans)})
    store.go.set()
    ids += [i for batch in batches for i in batch["id"].tolist()]
    assert n_footers <= 8 < N_SHARDS
    assert ids == list(range(N))


def test_the_blocks_of_the_first_slice_are_the_first_reads_after_the_footers(cold, monkeypatch):
    monkeypatch.setattr("tiercache.load.pieces.SLICE_BYTES", 1)
    store, loader = cold(sizes={"shuffle_group_bytes": "all"})
    with closing(iter(loader)) as batches:
        first = next(batches)
        n_shards = len({int(i) // (BLOCK_RECORDS * SHARD_BLOCKS) for i in first["id"]})
        footers, following = store.reads[:N_SHARDS], store.reads[N_SHARDS : N_SHARDS + n_shards]
    assert len({key for key, _ in footers}) == N_SHARDS
    assert all(is_footer(spans) for _, spans in footers)
    assert len({key for key, _ in following}) == n_shards  # one read of each shard: its blocks and its footer
    n_bytes = sum(span.n_bytes for _, spans in following for span in spans)
    assert n_bytes <= blocks_of(first) * BLOCK_BYTES + n_shards * 8192


def test_the_first_blocks_of_the_next_group_are_requested_while_a_group_is_served(cold):
    n_group = 9 * (1 << 20) // (SHARD_BLOCKS * BLOCK_BYTES)
    assert n_group > SHARDS_AHEAD
    store, loader = cold(sizes={"shuffle_window_bytes": "4MiB"})
    with closing(iter(loader)) as batches:
        for _ in range(24):  # three quarters of the first window
            next(batches)

        def next_group():
            """Keys of the second group's shards, as far as their footers were read, and the reads of their blocks."""
            with store._lock:
                reads = list(store.reads)
            keys = list(dict.fromkeys(key for key, spans in reads if is_footer(spans)))[n_group : 2 * n_group]
            return keys, [(key, spans) for key, spans in reads if key in keys and not is_footer(spans)]

        # From here on the consumer stands still.
        assert wait_for(lambda: len({key for key, _ in next_group()[1]}) == n_group, 60)
        first_reads = [spans for _, spans in next_group()[1][:n_group]]
    n_bytes = sum(span.n_bytes for spans in first_reads for span in spans)
    # The blocks of its first window and the footers. On a busy machine, a read that begins late also has blocks that
    # were requested meanwhile.
    assert n_bytes <= 1.5 * (4 << 20)


SMALL_WINDOWS = {"shuffle_group_bytes": "9MiB", "shuffle_window_bytes": "1MiB"}
WINDOW_BYTES = 1 << 20


def test_without_a_cache_the_next_windows_are_loaded_while_a_window_is_awaited(cold, monkeypatch):
    monkeypatch.setattr("tiercache.load.planner.LOAD_AHEAD_BYTES", 2 * WINDOW_BYTES)
    # The store answers requests for the bytes of five windows, and holds back the others. So the second window comes
    # although the two after it are requested beside it, and on a loaded machine some of the next one before its last.
    footers = N_SHARDS * 4096
    store, loader = cold(5 * WINDOW_BYTES + footers, cached=False, sizes=SMALL_WINDOWS)
    batches = iter(loader)
    ids = [i for _ in range(16) for i in next(batches)["id"].tolist()]  # those of two windows
    # The windows that were served and the awaited one have two windows at most.
    assert wait_for(lambda: store.n_bytes >= 4.5 * WINDOW_BYTES, 60)
    requested_bytes = store.n_bytes
    store.go.set()
    ids += [i for batch in batches for i in batch["id"].tolist()]
    assert requested_bytes <= 8 * WINDOW_BYTES + footers  # five, the awaited one, and two ahead
    assert sorted(ids) == list(range(N))


class Rounds:
    """Holds each request of a cold start until all requests of its round have come, so that none may wait for another.

    The hint is the first round. The second are the versions, the segment and the tracking marker, which may come with
    the hint; the third are the footers.
    """

    def __init__(self, footers):
        self.footers, self.problems, self.n_blocks = footers, [], 0
        self.arrived, self.changed = {"hint": set(), "version": set(), "footer": set()}, threading.Condition()

    def __call__(self, path, headers):
        with self.changed:
            name, n_expected = self._round(path, headers)
            if name is None:
                self.n_blocks += 1
                return
            self.arrived[name].add(path)
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: len(self.arrived[name]) >= n_expected, timeout=60):
                self.problems.append(f"{path} waited for the other requests of its round: {self.arrived}")

    def _round(self, path, headers):
        if path.endswith("_tiercache/latest"):
            return "hint", 1
        if "_tiercache/" in path:
            return "version", 4
        offset = int(headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        return ("footer", len(self.footers)) if offset == self.footers[path.partition("shards/")[2]] else (None, 0)


@pytest.mark.parametrize("cached", [True, False])
def test_a_cold_start_takes_three_round_trips_before_its_blocks(tmp_path, cached):
    with tc.Writer(tmp_path / "ds", shard_size="32KiB", block_size="32KiB", compression="none") as writer:
        writer.write_batch({"x": np.arange(4 * 4096).reshape(-1, 1024)})
    store = LocalFolder(tmp_path / "ds")
    table = read_shards(store, latest(store))
    infos = [table.info(i) for i in range(len(table))]
    assert len(infos) == 4
    rounds = Rounds({info.name.removeprefix("shards/"): info.footer_offset for info in infos})
    cache = tc.Cache(tmp_path / "cache", size="1GB", min_free=0) if cached else False
    with HttpFaultServer(tmp_path) as server:
        server.admit(rounds)
        with closing(tc.Dataset(f"{server.url}/ds", cache=cache)) as dataset:
            assert len(next(iter(tc.DataLoader(dataset, 2, timeout=300)))["x"]) == 2
    assert rounds.problems == []
    assert [len(paths) for paths in rounds.arrived.values()] == [1, 4, 4]
    assert rounds.n_blocks
    if cache:
        cache.close()
