"""The next epoch: asked for and begun before this one ends, taken where it comes as expected, dropped where not."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from tests.cache.conftest import open_below
from tests.load.conftest import N_REMOTE as N
from tests.load.conftest import SCHEMA, check_batch, ids_of, make_columns

import tiercache as tc
from tiercache.load.planner import NextEpoch
from tiercache.load.prefetch import loading_pool
from tiercache.opened_version import OpenedVersion

SOURCE = SimpleNamespace(is_cached=False)
OPTIONS = {"seed": 2, "shuffle_window_bytes": "2KiB", "shuffle_group_bytes": "9KiB"}


def shards_asked_for(server):
    return [seen.path.rsplit("/", 1)[1] for seen in server.log if "/shards/" in seen.path]


def first_shards(dataset, epoch, **options):
    """Names of the shards of the first window of an epoch."""
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS, **options))
    loader.set_epoch(epoch)
    with_next = loader._native
    loader.state_dict()
    iterator = iter(loader)
    piece = next(iterator._work.share.pieces(0))
    iterator.close()
    assert with_next is loader._native
    source = dataset.source
    return {
        source.table.info(shard).name.rsplit("/", 1)[1]
        for window, wanted in zip(piece.windows, piece.wanted, strict=True)
        for shard in window.shards[wanted].tolist()
    }


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
        wanted = first_shards(dataset, 1)
        dataset.close()
        for path in (tmp_path / "cache").rglob("*.shard"):
            path.unlink()
        loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
        announced = []
        prefetch = OpenedVersion.prefetch

        def seen(self, shards):
            announced.append([self.table.info(shard).name.rsplit("/", 1)[1] for shard in shards])
            prefetch(self, shards)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OpenedVersion, "prefetch", seen)
            iterator = iter(loader)
            n_batches = len(loader)
            for _ in range(n_batches - 1):
                next(iterator)
            # All but the last batch: what comes next was announced in time, after what this epoch still needed.
            wait_until(lambda: any(wanted <= set(names) for names in announced[-2:]))
            next(iterator)
            assert next(iterator, None) is None
        iterator.close()
        dataset.close()


def test_shards_that_the_cache_has_lost_are_fetched_for_the_next_epoch_before_it_comes(server, tmp_path):
    data_bytes = sum(len(data) for key, data in server.objects.items() if "/shards/" in key)
    with tc.Cache(tmp_path / "cache", size=data_bytes // 2, min_free=0) as cache:
        with pytest.warns(RuntimeWarning, match="will be fetched again"):
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
        ids_of(loader)
        iterator = iter(loader)
        for _ in range(len(loader)):
            next(iterator)
        coming = iterator._work.coming
        wait_until(lambda: coming._ready is not None and coming._ready.done())
        begun = coming._ready.result()
        assert begun is not None
        assert begun.loading  # two epochs came one after the other: a third is expected
        blocks = {
            place
            for one in begun.loading
            for place in zip(one.window.shards.tolist(), one.window.blocks.tolist(), strict=True)
        }
        wait_until(lambda: all(future.done() for one in begun.loading for _, future in one._work))
        again = []
        load = OpenedVersion.load

        def seen(self, shard, which):
            again.extend((shard, block) for block in which)
            return load(self, shard, which)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OpenedVersion, "load", seen)
            assert next(iterator, None) is None
            third = iter(loader)
            check_batch(next(third))
            third.close()
        assert blocks
        assert not blocks & set(again)
        dataset.close()


def test_a_run_of_one_epoch_reads_nothing_from_a_store_for_a_second_one(server):
    dataset = tc.Dataset(f"{server.url}/data", cache=False)
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1))
    loads = []
    load = OpenedVersion.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenedVersion, "load", lambda self, *what: (loads.append(what), load(self, *what))[1])
        iterator = iter(loader)
        assert sorted(i for batch in iterator for i in check_batch(batch)) == list(range(N))
        iterator._pipeline._planner.join(30)
        n_first = len(loads)
        assert len(set(map(str, loads))) == n_first
        iterator = iter(loader)  # now epochs follow one another
        for _ in iterator:
            pass
        iterator._pipeline._planner.join(30)
        begun = loader._native._coming._ready.result(30)
        wait_until(lambda: all(future.done() for one in begun.loading for _, future in one._work))
        assert len(loads) > 2 * n_first
    dataset.close()


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("compression", ["none", "zstd:3"])
def test_what_was_made_ready_is_what_the_next_epoch_serves(make_dataset, streams, compression):
    dataset = tc.Dataset(make_dataset(400, compression=compression))
    options = tc.LoaderOptions(**OPTIONS, streams=streams)
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=options)
    epochs, prepared = [], []
    for _ in range(4):
        iterator = iter(loader)
        prepared.append(iterator._work.begun is not None)
        epochs.append([check_batch(batch) for batch in iterator])
        iterator._pipeline._planner.join(30)
    assert prepared == [False, True, True, True]
    for epoch, found in enumerate(epochs):
        fresh = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=options)
        fresh.set_epoch(epoch)
        assert ids_of(fresh) == found


@pytest.mark.parametrize("given", [False, True])
def test_the_next_epoch_is_made_ready_without_a_seed_as_long_as_nobody_else_draws(make_dataset, given):
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2) if given else None
    loader = tc.DataLoader(tc.Dataset(make_dataset(200)), batch_size=16, shuffle=True, generator=generator)

    def serve(n_epochs):
        prepared = []
        for _ in range(n_epochs):
            iterator = iter(loader)
            ready = iterator._work.begun
            prepared.append(ready is not None and ready.result() is not None)
            assert sorted(i for batch in iterator for i in check_batch(batch)) == list(range(200))
            iterator._pipeline._planner.join(30)
        return prepared

    assert serve(3) == [False, True, True]
    reseed = torch.manual_seed if generator is None else generator.manual_seed
    for seed in range(2):
        reseed(seed)
        assert serve(1) == [False]
    # The epochs before were not foreseen, so nothing was loaded ahead; the second of these is, and so the third is.
    assert serve(3) == [False, True, True]


def test_an_epoch_that_nobody_can_foresee_is_not_loaded_ahead(make_dataset):
    dataset = tc.Dataset(make_dataset(400, compression="zstd:3"))
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True)
    loads = []
    load = OpenedVersion.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenedVersion, "load", lambda self, *what: (loads.append(what), load(self, *what))[1])
        for epoch in range(4):
            torch.manual_seed(epoch)
            if epoch == 2:
                loads.clear()
            iterator = iter(loader)
            assert sorted(i for batch in iterator for i in check_batch(batch)) == list(range(400))
            iterator._pipeline._planner.join(30)
    tables = dataset.source.block_tables(range(len(dataset.source.shard_records)))
    assert sum(len(blocks) for _, blocks in loads) == 2 * sum(len(table.records) for table in tables)


def test_blocks_are_not_loaded_again_where_the_next_epoch_was_begun(make_dataset):
    dataset = tc.Dataset(make_dataset(400, compression="zstd:3"))
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1))
    loads = []
    load = OpenedVersion.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenedVersion, "load", lambda self, *what: (loads.append(what), load(self, *what))[1])
        for _ in range(3):
            iterator = iter(loader)
            assert sorted(i for batch in iterator for i in check_batch(batch)) == list(range(400))
            iterator._pipeline._planner.join(30)
    n_blocks = sum(len(blocks) for _, blocks in loads)
    tables = dataset.source.block_tables(range(len(dataset.source.shard_records)))
    assert n_blocks <= 4 * sum(len(table.records) for table in tables)  # three epochs, and the beginning of a fourth


def test_an_epoch_that_ends_before_anybody_began_the_next_is_not_waited_for(make_dataset):
    dataset = tc.Dataset(make_dataset(100))
    loader = tc.DataLoader(dataset, batch_size=10, shuffle=True)
    gate = threading.Event()
    begin = NextEpoch._begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NextEpoch, "_begin", lambda self, *what: (gate.wait(30), begin(self, *what))[1])
        iterator = iter(loader)
        start_s = time.monotonic()
        assert sorted(i for batch in iterator for i in check_batch(batch)) == list(range(100))
        assert time.monotonic() - start_s < 20  # and not the gate's 30 s
        following = iter(loader)  # nor is iter()
        gate.set()
        assert sorted(i for batch in following for i in check_batch(batch)) == list(range(100))


def test_another_epoch_than_the_next_begins_afresh(make_dataset):
    dataset = tc.Dataset(make_dataset(200))
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
    ids_of(loader)
    loader.set_epoch(7)
    found = ids_of(loader)
    fresh = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
    fresh.set_epoch(7)
    assert ids_of(fresh) == found


def test_what_is_forgotten_while_it_is_made_ready_is_not_taken():
    class Share:
        def pieces(self, _):
            coming.on_source_closed()
            return iter(())

    coming = NextEpoch(SOURCE, "state", lambda _: Share(), is_expected=True)
    coming.prepare(None, None, 0)
    taken = coming.take(SOURCE, "state")
    assert (taken.share, taken.begun) == (coming.share, None)
    coming.prepare(None, None, 0)  # too late
    assert coming.take(SOURCE, "state").begun is None
    assert NextEpoch(SOURCE, "state", lambda _: Share(), is_expected=True).take("other", "state") is None


def test_the_future_of_a_beginning_that_failed_says_nothing():
    class Share:
        def pieces(self, _):
            raise tc.StoreError("away", url="u")

    coming = NextEpoch(SOURCE, "state", lambda _: Share(), is_expected=True)
    coming.prepare(None, None, 0)
    ready = coming.take(SOURCE, "state").begun
    assert isinstance(ready, Future)
    assert ready.result(0) is None


def test_epochs_follow_one_another_when_one_is_left_early(make_dataset):
    dataset = tc.Dataset(make_dataset(300))
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
    for _ in range(3):
        for batch in itertools.islice(loader, 3):
            check_batch(batch)
    assert loader.state_dict()["epoch"] == 2
    assert sorted(i for ids in ids_of(loader) for i in ids) == list(range(300))


def loading_of(loader):
    """What the loader has begun of the next epoch."""
    ready = loader._native._coming._ready
    return ready.result(30).loading


def test_the_first_window_of_an_epoch_that_was_made_ready_goes_when_it_is_served(make_dataset):
    loader = tc.DataLoader(
        tc.Dataset(make_dataset(600, compression="zstd:3")),
        batch_size=16,
        shuffle=True,
        options=tc.LoaderOptions(seed=1, shuffle_window_bytes="16KiB"),
    )
    iterator = iter(loader)
    n_batches = len(list(iterator))
    iterator._pipeline._planner.join(30)
    first = [weakref.ref(future.result(30)) for one in loading_of(loader) for _, future in one._work]
    assert first
    iterator = iter(loader)
    for _ in range(n_batches - 1):
        next(iterator)
    wait_until(lambda: not any(blocks() is not None for blocks in first))
    iterator.close()


@pytest.mark.parametrize("when", ["before it is served", "before it is made ready", "never asked for"])
def test_what_was_begun_of_an_epoch_that_is_left_is_not_loaded(make_dataset, when, monkeypatch):
    dataset = tc.Dataset(make_dataset(600, compression="zstd:3"))
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1, threads=1))
    gate, begun, left = threading.Event(), threading.Event(), threading.Event()
    load, begin = OpenedVersion.load, NextEpoch._begin
    futures = []

    def slow(self, *what):
        assert gate.wait(30)
        return load(self, *what)

    def made_ready(self, *what):
        monkeypatch.setattr("tiercache.load.prefetch.MIN_PART_BYTES", 1)
        monkeypatch.setattr("tiercache.load.prefetch.MAX_PART_BYTES", 1 << 10)  # many parts
        monkeypatch.setattr(OpenedVersion, "load", slow)
        found = begin(self, *what)
        futures.extend(future for one in found.loading for _, future in one._work)
        begun.set()
        assert when != "before it is made ready" or left.wait(30)
        return found

    monkeypatch.setattr(NextEpoch, "_begin", made_ready)
    iterator = iter(loader)
    for _ in iterator:
        pass
    assert begun.wait(30)
    if when == "never asked for":
        planner = iterator._pipeline._planner
        del loader, iterator
        planner.join(30)
    else:
        iter(loader).close()
    left.set()
    assert len(futures) > 8
    n_threads = 4  # which had begun some
    wait_until(lambda: sum(future.cancelled() for future in futures) >= len(futures) - n_threads)
    gate.set()


def test_planning_one_loader_s_next_epoch_waits_for_no_other_s():
    gate = threading.Event()
    slow = NextEpoch(SOURCE, "state", lambda _: gate.wait(30), is_expected=True)
    thread = threading.Thread(target=lambda: slow.share)
    thread.start()
    other = NextEpoch(SOURCE, "state", lambda _: "share", is_expected=True)
    other_thread = threading.Thread(target=lambda: other.share, daemon=True)
    other_thread.start()
    other_thread.join(10)
    assert not other_thread.is_alive()
    gate.set()
    thread.join()


@pytest.mark.parametrize("view", ["itself", "select", "joined", "mixed"])
def test_what_was_made_ready_goes_when_the_data_set_is_closed(make_dataset, tmp_path, view):
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
    iterator = iter(loader)
    found = [check_batch(batch) for batch in iterator]
    iterator._pipeline._planner.join(30)
    begun = [weakref.ref(one) for one in loading_of(loader)]
    assert begun
    shown.close()
    assert not any(one() is not None for one in begun)
    assert len(ids_of(loader)) == len(found)  # it may be used again


def test_a_data_set_that_is_closed_while_the_next_epoch_is_begun_loads_nothing_for_it(server):
    dataset = tc.Dataset(f"{server.url}/data", cache=False)
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(**OPTIONS))
    ids_of(loader)
    loads, load, after = [], OpenedVersion.load, []

    def closing(n_threads):
        dataset.close()
        after.append(len(loads))
        return loading_pool(n_threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenedVersion, "load", lambda self, *what: (loads.append(what), load(self, *what))[1])
        patch.setattr("tiercache.load.planner.loading_pool", closing)
        iterator = iter(loader)  # epochs follow one another by now
        for _ in iterator:
            pass
        iterator._pipeline._planner.join(30)
        wait_until(lambda: not any(one.name.startswith("tiercache-load") for one in threading.enumerate()))
    assert after
    assert len(loads) == after[0]


def test_a_data_set_that_is_closed_while_its_next_epoch_is_loaded_leaves_no_shard_open(make_dataset, monkeypatch):
    path = make_dataset(600)
    dataset = tc.Dataset(path)
    loading, loaded, forgetting, go_on = threading.Event(), [], threading.Event(), threading.Event()
    map_shards, load, forget = NextEpoch._load_at_hand, OpenedVersion.load, NextEpoch.on_source_closed

    def beginning(self, window):
        loading.set()
        map_shards(self, window)

    def slow(self, shard, blocks):
        if loading.is_set() and threading.current_thread().name == "tiercache-plan":
            loaded.append(shard)
            assert go_on.wait(30)
        return load(self, shard, blocks)

    def seen(self):
        forgetting.set()
        forget(self)

    monkeypatch.setattr(NextEpoch, "_load_at_hand", beginning)
    monkeypatch.setattr(OpenedVersion, "load", slow)
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
    assert len(loaded) == 1 < len(dataset.source.shard_records)  # the others are not begun
    assert open_below(path) == []
