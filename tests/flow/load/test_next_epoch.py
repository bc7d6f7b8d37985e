"""The next epoch: asked for and begun before this one ends, taken where it comes as expected, dropped where not."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
from tests.support.cache_world import open_below
from tests.support.records import N_REMOTE as N
from tests.support.records import SCHEMA, check_batch, ids_of, join_loading, make_columns

import tiercache as tc
from tiercache.data.opened_version import OpenedVersion
from tiercache.load.epoch import RunState, make_share
from tiercache.load.planner import NextEpoch
from tiercache.load.windows import loading_pool

OPTIONS = {"seed": 2, "shuffle_window_bytes": "2KiB", "shuffle_group_bytes": "9KiB"}


def first_blocks(dataset, epoch):
    """The blocks of the first window of an epoch: (shard, block)."""
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
    loader.set_epoch(epoch)
    share = make_share(dataset._source, loader.native_rank, 16, False, RunState.from_dict(loader.state_dict()))
    (window,), _ = (piece := next(share.pieces(0))).windows, piece.needed
    return set(zip(window.shards.tolist(), window.blocks.tolist(), strict=True))


@pytest.fixture
def loads(monkeypatch):
    """(shard, its blocks, a weak reference to what was loaded) of each load from now on."""
    found, load = [], OpenedVersion.load_blocks

    def seen(self, shard, blocks):
        found.append((shard, list(blocks), None))
        loaded = load(self, shard, blocks)
        found.append((shard, [], weakref.ref(loaded)))
        return loaded

    monkeypatch.setattr(OpenedVersion, "load_blocks", seen)
    return found


def n_blocks_of(loads):
    return sum(len(blocks) for _, blocks, _ in loads)


def alive(loads):
    return [loaded for _, _, loaded in loads if loaded is not None and loaded() is not None]


def wait_until(is_so):
    end_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end_s
        threading.Event().wait(0.01)


def test_the_first_shards_of_the_next_epoch_are_requested_before_the_last_batch_is_taken(server, tmp_path):
    data_bytes = sum(len(data) for key, data in server.objects.items() if "/shards/" in key)
    with tc.Cache(tmp_path / "cache", size=data_bytes // 2, min_free=0) as cache:
        with pytest.warns(RuntimeWarning, match="will be fetched again"):
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        names = dataset._source.leaves[0].table
        needed = {names.info(shard).name.rsplit("/", 1)[1] for shard, _ in first_blocks(dataset, 1)}
        dataset.close()
        for path in (tmp_path / "cache").rglob("*.shard"):
            path.unlink()
        loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
        announced = []
        prefetch = OpenedVersion.prefetch_shards

        def seen(self, shards):
            announced.append([self.table.info(shard).name.rsplit("/", 1)[1] for shard in shards])
            prefetch(self, shards)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OpenedVersion, "prefetch_shards", seen)
            iterator = iter(loader)
            n_batches = len(loader)
            for _ in range(n_batches - 1):
                next(iterator)
            # All but the last batch: what comes next was announced in time, after what this epoch still needed.
            wait_until(lambda: any(needed <= set(names) for names in announced[-2:]))
            next(iterator)
            assert next(iterator, None) is None
        iterator.close()
        dataset.close()


def test_a_run_of_one_epoch_reads_nothing_from_a_store_for_a_second_one(server, loads):
    dataset = tc.Dataset(f"{server.url}/data", cache=False)
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1))
    tables = dataset._source.block_sizes(range(len(dataset._source.shard_records)))
    n_blocks = sum(len(table.records) for table in tables)
    assert sorted(i for ids in ids_of(loader) for i in ids) == list(range(N))
    join_loading()
    assert n_blocks_of(loads) == n_blocks
    ids_of(loader)  # now epochs follow one another
    join_loading()
    assert n_blocks_of(loads) == 3 * n_blocks
    dataset.close()


@pytest.mark.parametrize(("streams", "compression"), [(1, "none"), (4, "zstd:3")])
def test_the_prepared_start_is_what_the_next_epoch_serves(make_dataset, streams, compression):
    dataset = tc.Dataset(make_dataset(400, compression=compression))
    options = tc.LoaderOptions(**OPTIONS, shuffle_streams=streams)
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=options)
    epochs = []
    for _ in range(4):
        epochs.append(ids_of(loader))
        join_loading()
    for epoch, found in enumerate(epochs):
        fresh = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=options)
        fresh.set_epoch(epoch)
        assert ids_of(fresh) == found


def test_the_next_epoch_does_not_wait_for_a_preparation_that_did_not_begin(make_dataset):
    dataset = tc.Dataset(make_dataset(100))
    loader = tc.DataLoader(dataset, batch_size=10, shuffle=True)
    gate = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tiercache.load.planner.loading_pool", lambda n, **options: (gate.wait(30), loading_pool(n, **options))[1]
        )
        iterator = iter(loader)
        start_s = time.monotonic()
        assert sorted(i for batch in iterator for i in check_batch(batch)) == list(range(100))
        assert time.monotonic() - start_s < 20  # and not the gate's 30 s
        following = iter(loader)  # nor is iter()
        gate.set()
        assert sorted(i for batch in following for i in check_batch(batch)) == list(range(100))


def test_a_prepared_first_window_is_freed_after_it_was_served(make_dataset, loads):
    loader = tc.DataLoader(
        tc.Dataset(make_dataset(600, compression="zstd:3")),
        batch_size=16,
        shuffle=True,
        options=tc.LoaderOptions(seed=1, shuffle_window_bytes="16KiB"),
    )
    n_batches = len(ids_of(loader))
    join_loading()
    first = alive(loads)
    assert first
    iterator = iter(loader)
    for _ in range(n_batches - 1):
        next(iterator)
    wait_until(lambda: not any(blocks() is not None for blocks in first))
    iterator.close()


@pytest.mark.parametrize("view", ["itself", "select", "joined", "mixed"])
def test_a_prepared_epoch_is_dropped_when_the_data_set_is_closed(make_dataset, tmp_path, view, loads):
    dataset = tc.Dataset(make_dataset(300))
    with tc.Writer(tmp_path / "other", schema=SCHEMA) as writer:
        writer.write_batch(make_columns(100, 300))
    other = tc.Dataset(tmp_path / "other")
    shown = {
        "itself": lambda: dataset,
        "select": lambda: dataset.select(range(7, 250)),
        "joined": lambda: dataset + other,
        "mixed": lambda: tc.mix([dataset, other], weights=[0.5, 0.5]),
    }[view]()
    loader = tc.DataLoader(shown, batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1))
    found = ids_of(loader)
    join_loading()
    assert alive(loads)
    shown.close()
    assert not alive(loads)
    assert len(ids_of(loader)) == len(found)  # it may be used again


def test_closing_the_data_set_during_loading_leaves_no_shard_open(make_dataset, monkeypatch):
    path = make_dataset(600)
    dataset = tc.Dataset(path)
    begun, loaded, forgetting, go_on = [], [], threading.Event(), threading.Event()
    load, forget, n_shards = OpenedVersion.load_blocks, NextEpoch.on_source_closed, len(dataset._source.shard_records)

    def slow(self, shard, blocks):
        begun.append(shard)
        if len(begun) > n_shards:  # for the next epoch
            loaded.append(shard)
            assert go_on.wait(30)
        return load(self, shard, blocks)

    def seen(self):
        forgetting.set()
        forget(self)

    monkeypatch.setattr(OpenedVersion, "load_blocks", slow)
    monkeypatch.setattr(NextEpoch, "on_source_closed", seen)
    options = tc.LoaderOptions(seed=2, shuffle_window_bytes="all", shuffle_group_bytes="all")
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=options)
    assert sum(len(batch["id"]) for batch in loader) == 600
    wait_until(lambda: loaded)
    planner = next(thread for thread in threading.enumerate() if thread.name == "tiercache-plan")
    closing = threading.Thread(target=dataset.close)
    closing.start()
    assert forgetting.wait(30)
    go_on.set()
    closing.join(30)
    planner.join(30)
    assert len(loaded) == 1 < n_shards  # the others are not begun
    assert open_below(path) == []
