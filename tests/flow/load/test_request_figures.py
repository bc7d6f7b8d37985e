"""What a run asked of its store: requests, retries, throttled requests and dollars, in the loader and in the cache."""

from __future__ import annotations

import pytest
from tests.support.http_server import HttpFault
from tests.support.records import N_REMOTE as N

import tiercache as tc
from tiercache.prices import named_prices
from tiercache.store import CloudStore, open_store


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
