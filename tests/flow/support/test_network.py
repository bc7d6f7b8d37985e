"""Slow and lossy networks, and an epoch in them."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from tests.support import ROOT
from tests.support.http_server import HttpFaultServer
from tests.support.network import DelayingProxy, why_no_network

import tiercache as tc
from tiercache.store import open_store

EPOCH = """
import json, sys
from tests.support.network import enter_network
import tiercache as tc
from tests.support.http_server import HttpFaultServer

folder, cache, network = json.loads(sys.argv[1])
enter_network(**network)
with HttpFaultServer(folder) as server:
    dataset = tc.Dataset(f"{server.url}/data", cache=tc.Cache(cache, size="64MiB") if cache else False)
    ids = []
    for batch in tc.DataLoader(dataset, batch_size=50, shuffle=True):
        ids += batch["id"].tolist()
        assert (batch["x"] == batch["id"][:, None] % 251).all()
    dataset.close()
print(json.dumps(sorted(ids)))
"""
N_RECORDS = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("network")
    ids = np.arange(N_RECORDS)
    schema = {"id": "int64", "x": tc.Tensor("uint8", (512,))}
    with tc.Writer(path / "data", schema=schema, shard_size="128KiB", compression="none") as writer:
        writer.write_batch({"id": ids, "x": np.repeat((ids % 251).astype(np.uint8)[:, None], 512, axis=1)})
    return path


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(
    "network",
    [{"bytes_per_s": 20e6}, {"delay_s": 0.002, "loss": 0.01, "bytes_per_s": 20e6}],
    ids=["narrow", "narrow, slow and lossy"],
)
def test_an_epoch_is_right_in_a_bad_network(folder, tmp_path, warm_python, network, cached):
    reason = why_no_network(**network)
    if reason:
        pytest.skip(reason)
    argument = json.dumps([str(folder), str(tmp_path / "cache") if cached else None, network])
    done = warm_python.run(["-c", EPOCH, argument], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [*range(N_RECORDS)]


def test_an_epoch_is_right_behind_a_proxy_that_delays(folder):
    with HttpFaultServer(folder) as server, DelayingProxy(server.url, delay_s=0.005, bytes_per_s=20e6) as proxy:
        dataset = tc.Dataset(f"{proxy.url}/data", cache=False)
        loader = tc.DataLoader(dataset, batch_size=50, shuffle=True)
        assert sorted(i for batch in loader for i in batch["id"].tolist()) == [*range(N_RECORDS)]
        dataset.close()


def test_the_proxy_delays_each_direction_and_limits_the_rate():
    with (
        HttpFaultServer({"a": bytes(100_000)}) as server,
        DelayingProxy(server.url, delay_s=0.05, bytes_per_s=1e6) as proxy,
    ):
        store = open_store(proxy.url)
        started_s = time.monotonic()
        assert store.get("a") == bytes(100_000)
        assert time.monotonic() - started_s >= 0.2, "a round trip, and 100 kB at 1 MB/s"
        store.close()


def test_the_proxy_closes_a_connection_whose_server_is_gone():
    with HttpFaultServer() as server:
        url = server.url
    with DelayingProxy(url, delay_s=0) as proxy:
        store = open_store(proxy.url, timeout=0.3)
        with pytest.raises(tc.StoreError):
            store.get("a")
        store.close()
