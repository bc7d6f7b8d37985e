"""Data sets that lie elsewhere: what is fetched is counted at the server, in and out of this process."""

from __future__ import annotations

import collections
import itertools
import json
import warnings

import numpy as np
import pytest
from tests.support import ROOT
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.records import N_REMOTE as N
from tests.support.records import SCHEMA, check_batch, make_columns
from tests.support.warm_python import WarmPython
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache.prices import named_prices
from tiercache.store import CloudStore, open_store

READ_AN_EPOCH = """
import json, sys
import tiercache as tc
url, cache, options = json.loads(sys.argv[1])
dataset = tc.Dataset(url, cache=tc.Cache(cache, size="64MiB"), storage_options=options)
loader = tc.DataLoader(dataset, batch_size=32, shuffle=True, options=tc.LoaderOptions(seed=2))
loader.set_epoch(1)
ids = [i for batch in loader for i in batch["id"].tolist()]
print(json.dumps({"ids": ids, **loader.stats()}))
"""


def shard_requests(server: HttpFaultServer) -> list[str]:
    return [seen.path for seen in server.log if "/shards/" in seen.path or "/segments/" in seen.path]


def ids_of(loader) -> list[int]:
    return list(itertools.chain(*map(check_batch, loader)))


def read_in_a_new_process(python: WarmPython, url: str, cache, options: dict[str, object]) -> dict[str, object]:
    argument = json.dumps([url, str(cache), options])
    done = python.run(["-c", READ_AN_EPOCH, argument], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_warm_epoch_in_a_new_process_asks_the_server_for_no_shard_footer_or_segment(server, tmp_path, warm_python):
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, batch_size=32, shuffle=True, options=tc.LoaderOptions(seed=2))
        assert sorted(ids_of(loader)) == list(range(N))
        cold = loader.stats()
        second = ids_of(loader)
        dataset.close()
    n_shards = len(dataset._source.leaves[0].table)
    assert cold["bytes_fetched"] >= sum(len(data) for key, data in server.objects.items() if "/shards/" in key)
    assert {path for path in shard_requests(server) if "/shards/" in path} == {
        f"/{key}" for key in server.objects if "/shards/" in key
    }
    server.log.clear()
    warm = read_in_a_new_process(warm_python, f"{server.url}/data", tmp_path / "cache", {})
    assert warm["ids"] == second
    assert shard_requests(server) == []
    assert warm["hit_ratio"] == 1
    assert n_shards > 1
    assert warm["bytes_from"]["cache"] + warm["bytes_from"]["memory"] > 0


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_figures_of_an_epoch_say_how_many_of_its_bytes_came_from_the_store_and_the_cache(server, tmp_path, shuffle):
    def run_epoch():
        ids_of(loader)
        stats = loader.stats()
        here = stats["epoch"]["bytes_from"]
        return stats, here["store"], here["cache"] + here["memory"]

    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, batch_size=32, shuffle=shuffle, options=tc.LoaderOptions(seed=2))
        stats, n_bytes, from_cache = run_epoch()
        assert (from_cache, stats["epoch"]["hit_ratio"]) == (0, 0)
        assert 0 < n_bytes < cache.stats()["bytes_fetched"]
        assert run_epoch()[1:] == (0, n_bytes)
        stats, *later = run_epoch()
        assert later == [0, n_bytes]
        assert (stats["epoch"]["hit_ratio"], stats["hit_ratio"]) == (1, pytest.approx(2 / 3))
        assert (stats["epoch"]["samples"], stats["samples"]) == (N, 3 * N)
        assert stats["bottleneck"].split()[0] != "store"
        dataset.close()
        assert cache.status()["hit_ratio"] >= 2 / 3


def test_bytes_that_were_warmed_in_this_process_come_from_the_cache(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        dataset.warm()
        loader = tc.DataLoader(dataset, batch_size=32)
        ids_of(loader)
        assert loader.stats()["epoch"]["hit_ratio"] == 1
        dataset.close()


def test_bytes_that_reads_by_index_fetched_before_the_loader_began_come_from_the_cache(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        for i in range(N):
            dataset[i]
        loader = tc.DataLoader(dataset, batch_size=32)
        ids_of(loader)
        assert loader.stats()["epoch"]["hit_ratio"] == 1
        assert loader.stats()["epoch"]["bytes_from"]["store"] == 0
        dataset.close()


def test_bytes_that_a_full_cache_refuses_come_from_the_store_in_each_epoch(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="8KiB") as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, batch_size=32)
        for _ in range(2):
            ids_of(loader)
        assert loader.stats()["epoch"]["hit_ratio"] == 0
        assert loader.stats()["epoch"]["bytes_from"]["store"] > 0
        assert cache.status()["hit_ratio"] == 0
        dataset.close()


@pytest.mark.usefixtures("no_hedges")
def test_each_shard_is_fetched_once_in_a_cold_epoch_and_its_footer_once_more(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        ids_of(tc.DataLoader(dataset, batch_size=32, shuffle=True))
        sent = sum(seen.n_bytes for seen in server.log if "/shards/" in seen.path)
        dataset.close()
    infos = list(dataset._source.leaves[0].table.infos())
    assert sent == sum(info.n_bytes + (info.n_bytes - info.footer_offset) for info in infos)


def test_without_a_cache_blocks_are_read_by_ranges(server):
    dataset = tc.Dataset(f"{server.url}/data", cache=False, columns=["id"])
    loader = tc.DataLoader(dataset, batch_size=32, shuffle=True)
    assert sorted(i for batch in loader for i in batch["id"].tolist()) == list(range(N))
    assert loader.stats()["hit_ratio"] is None
    sent = sum(seen.n_bytes for seen in server.log if "/shards/" in seen.path)
    assert sent < sum(len(data) for key, data in server.objects.items() if "/shards/" in key)
    dataset.close()


def test_a_shard_that_is_gone_is_an_error_that_names_it_after_every_batch_before_it(server):
    dataset = tc.Dataset(f"{server.url}/data", cache=False)
    name = dataset._source.leaves[0].table.info(3).name
    del server.objects[f"data/{name}"]
    options = tc.LoaderOptions(shuffle_window_bytes="1KiB", shuffle_group_bytes="1KiB")
    served: list[int] = []
    with pytest.raises(tc.NotFound, match=name.split("/")[1]):
        served.extend(i for batch in tc.DataLoader(dataset, batch_size=4, options=options) for i in check_batch(batch))
    assert served == list(range(len(served)))
    assert len(served) >= int(dataset._source.leaves[0].table.first_record[3]) - 4
    dataset.close()


@pytest.mark.s3
def test_workers_forked_after_the_parent_has_read_from_s3_name_forkserver(s3_server):
    url, options = f"{s3_server.url}/load/forked", s3_server.storage_options
    with tc.Writer(url, schema=SCHEMA, shard_size="8KiB", block_size="1KiB", storage_options=options) as writer:
        writer.write_batch(make_columns(100))
    dataset = tc.Dataset(url, cache=False, storage_options=options)
    assert dataset[3]["id"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word on forking: this is the case itself
        loader = TorchLoader(
            dataset, batch_size=20, num_workers=2, collate_fn=tc.collate, multiprocessing_context="fork", timeout=60
        )
        with pytest.raises(RuntimeError, match='multiprocessing_context="forkserver"'):
            ids_of(loader)
    assert dataset[4]["id"] == 4
    dataset.close()


@pytest.mark.timeout(600)  # processes that are spawned import torch anew
@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.stress)])
def test_torchs_workers_fetch_each_shard_once_between_them(server, tmp_path, method):
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        server.log.clear()
        stride = np.arange(N).reshape(-1, 4).T.reshape(-1)  # all workers want all shards at once
        loader = TorchLoader(
            dataset, 30, sampler=stride.tolist(), num_workers=2, multiprocessing_context=method, collate_fn=tc.collate
        )
        assert ids_of(loader) == stride.tolist()
        sent: collections.Counter[str] = collections.Counter()
        for seen in server.log:
            if "/shards/" in seen.path:
                sent[seen.path] += seen.n_bytes
        dataset.close()
    assert sent == {f"/{key}": len(data) for key, data in server.objects.items() if "/shards/" in key}


def read_an_epoch(server, cache):
    dataset = tc.Dataset(f"{server.url}/data", cache=cache)
    loader = tc.DataLoader(dataset, batch_size=32, shuffle=True, options=tc.LoaderOptions(seed=2))
    assert sum(len(batch["id"]) for batch in loader) == N
    stats = loader.stats()
    dataset.close()
    return stats


def test_retries_and_throttled_requests_of_a_run_are_reported(server, tmp_path):
    seen = []

    def rule(method, path):
        if "/shards/" in path:
            seen.append(path)
            return {1: HttpFault("status", 503), 2: HttpFault("reset", n_bytes=10)}.get(len(seen))
        return None

    server.when(rule)
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        stats = read_an_epoch(server, cache)
    assert stats["throttled"] == 1
    assert stats["retries"] >= 2
    assert stats["requests"] >= len(seen)
    assert (stats["dollars"], stats["egress_dollars"]) == (0.0, 0.0), "nobody bills for this server"


def test_the_price_of_the_requests_is_reported_in_dollars(server, tmp_path, monkeypatch):
    monkeypatch.setattr(CloudStore, "provider", property(lambda _self: "aws", lambda _self, _value: None))
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        stats = read_an_epoch(server, cache)
    prices = named_prices("aws:us-east-1:STANDARD")
    assert stats["dollars"] == pytest.approx(stats["requests"] * prices.get_1000 / 1000)
    assert stats["egress_dollars"] == pytest.approx(stats["bytes_fetched"] * prices.egress_gb / (1 << 30))


def test_the_server_tells_who_bills_the_requests():
    for url, options, provider in (
        ("s3://bucket", {}, "aws"),
        ("s3://bucket", {"endpoint": "http://127.0.0.1:9000"}, None),
        ("s3://bucket", {"endpoint": "https://s3.eu-west-1.amazonaws.com"}, "aws"),
        ("gs://bucket", {}, "gcs"),
        ("az://container", {"account_name": "mine"}, "azure"),
        ("https://server/folder", {}, None),
        ("memory://x", {}, None),
    ):
        assert open_store(url, **options).provider == provider, (url, options)
