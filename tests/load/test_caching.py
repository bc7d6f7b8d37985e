"""Which cache a data set is read through, and what is said of one that cannot do its work."""

from __future__ import annotations

import shutil

import pytest

import tiercache as tc
from tiercache.testing.http_server import HttpFaultServer

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
    with tc.Cache(tmp_path / "cache", size=3000, free_floor="0%") as cache:
        with pytest.warns(RuntimeWarning, match=r"KiB of shards, but the cache in .* holds 2.9 KiB: .* KiB \(\d\d%\)"):
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        again = tc.Dataset(f"{server.url}/data", cache=cache)
        assert again[N - 1]["id"] == N - 1
        dataset.close()
        again.close()


def test_a_data_set_that_fits_is_not_warned_of(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="1MB", free_floor="0%") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        assert dataset[5]["id"] == 5
        dataset.close()


def test_a_default_cache_that_cannot_be_made_is_warned_of_and_done_without(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="no cache.*TIERCACHE_CACHE_DIR"):
        dataset = tc.Dataset(f"{server.url}/data")
    assert dataset[5]["id"] == 5
    dataset.close()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        tc.Cache(tmp_path / "file" / "cache", size="1MB")


def test_the_loaders_figures_survive_the_caches_folder(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="1MB", free_floor="0%") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, batch_size=100)
        seen = []
        for batch in loader:
            seen += batch["id"].tolist()
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert seen == list(range(N))
        assert loader.stats()["samples"] == N
        dataset.close()
