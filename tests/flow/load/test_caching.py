"""Which cache a data set is read through, and what is said of one that cannot do its work."""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from tests.support.http_server import HttpFaultServer
from tests.support.records import join_loading

import tiercache as tc
from tiercache.load.windows import WindowLoad

N = 1000


@pytest.fixture
def server(tmp_path):
    with tc.Writer(
        tmp_path / "data", schema={"id": "int64"}, shard_size="4KiB", block_size="1KiB", compression="none"
    ) as writer:
        writer.write_batch({"id": list(range(N))})
    objects = {f"data/{f.relative_to(tmp_path / 'data')}": f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with HttpFaultServer(objects) as server:
        yield server


def test_a_data_set_larger_than_its_cache_is_warned_of_once_with_the_arithmetic(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size=6000, min_free="0%") as cache:
        with pytest.warns(RuntimeWarning, match=r"KiB of shards, but the cache in .* holds 5.9 KiB: .* KiB \(\d\d%\)"):
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        again = tc.Dataset(f"{server.url}/data", cache=cache)
        assert again[N - 1]["id"] == N - 1
        dataset.close()
        again.close()


def told_of_no_room(told) -> list[str]:
    """Messages that say so, of all that was said."""
    return [str(one.message) for one in told if "no space" in str(one.message) or "disk is full" in str(one.message)]


def read_through(cache: tc.Cache, server: HttpFaultServer) -> None:
    """Two epochs of a loader, and records of the data set opened again."""
    dataset = tc.Dataset(f"{server.url}/data", cache=cache)
    loader = tc.DataLoader(dataset, batch_size=100, shuffle=True)
    for _ in range(2):
        assert sorted(i for batch in loader for i in batch["id"].tolist()) == list(range(N))
    dataset.close()
    again = tc.Dataset(f"{server.url}/data", cache=cache)
    assert again[N - 1]["id"] == N - 1
    again.close()


def test_a_loader_whose_cache_may_take_nothing_of_the_disk_says_so_once(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="1MB", min_free="100%") as cache:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read_through(cache, server)
        (said,) = told_of_no_room(told)
        assert cache.entries() == []
    for fact in (f"{server.url}/data", str(tmp_path / "cache"), "only 0 B left", "min_free", "TIERCACHE_CACHE_DIR"):
        assert fact in said
    assert "taken" not in said
    assert "pinned" not in said


def test_a_loader_whose_cache_is_held_by_others_says_so_once(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="100KB", min_free="0%") as cache:
        held = tc.store.MemoryStore("held")
        held.put("large", bytes(85_000))
        cache.pin(held, [("large", None)])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read_through(cache, server)
        (said,) = told_of_no_room(told)
    for fact in (f"{server.url}/data", str(tmp_path / "cache"), "97.7 KiB", "pinned", "TIERCACHE_CACHE_SIZE"):
        assert fact in said
    assert "min_free" not in said


def test_a_loader_whose_disk_is_full_says_so_once(server, tmp_path, monkeypatch):
    written = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if "/copies/" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with tc.Cache(tmp_path / "cache", size="1MB", min_free="0%") as cache:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read_through(cache, server)
        (said,) = told_of_no_room(told)
    assert str(tmp_path / "cache") in said


def test_a_default_cache_that_cannot_be_made_is_warned_of_and_done_without(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cache cannot be used.*TIERCACHE_CACHE_DIR"):
        dataset = tc.Dataset(f"{server.url}/data")
    assert dataset[5]["id"] == 5
    dataset.close()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        tc.Cache(tmp_path / "file" / "cache", size="1MB")


def test_shards_larger_than_the_cache_are_read_past_it_and_the_warning_counts_them(server, tmp_path):
    n_shards = len([key for key in server.objects if "/shards/" in key])
    with tc.Cache(tmp_path / "cache", size=3000, min_free="0%") as cache:
        said = rf"\(100%\) will be fetched .* every epoch, {n_shards} of {n_shards} shards because each"
        with pytest.warns(RuntimeWarning, match=said):
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, batch_size=100, shuffle=True)
        assert sorted(i for batch in loader for i in batch["id"].tolist()) == list(range(N))
        assert cache.entries() == []
        dataset.close()


def test_two_windows_are_the_most_that_is_in_memory_of_a_data_set_larger_than_its_cache(tmp_path, monkeypatch):
    with tc.Writer(
        tmp_path / "data", schema={"id": "int64"}, shard_size="2KiB", block_size="1KiB", compression="zstd:3"
    ) as writer:
        writer.write_batch({"id": np.random.default_rng(1).permutation(6 * N)})
    windows, most, finish = [], 0, WindowLoad.finish

    def seen(loading, threads):
        loaded = finish(loading, threads)
        windows.append([weakref.ref(blocks) for blocks in loaded.block_groups])
        return loaded

    monkeypatch.setattr(WindowLoad, "finish", seen)
    options = tc.LoaderOptions(seed=1, shuffle_group_bytes="16KiB", shuffle_window_bytes="4KiB", memory_bytes=1)
    objects = {f"data/{f.relative_to(tmp_path / 'data')}": f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with HttpFaultServer(objects) as server, tc.Cache(tmp_path / "cache", size=20_000, min_free="0%") as cache:
        with pytest.warns(RuntimeWarning, match="will be fetched again in every epoch"):
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, batch_size=64, shuffle=True, options=options)
        for _ in range(2):
            ids = []
            for batch in loader:
                ids += batch["id"].tolist()
                most = max(most, sum(any(blocks() is not None for blocks in refs) for refs in list(windows)))
            assert sorted(ids) == list(range(6 * N))
        del loader
        join_loading()  # the next epoch's begin, which it has begun to read
        dataset.close()
    assert len(windows) > 20
    assert most == 2
