"""The fault suite: a full epoch, with the cache and without it, while the store's requests go wrong.

The records must be exactly right and the run must end; the slowdown is printed and recorded as a property of the test.
`make test` runs each fault alone at 20 % of the requests and one mixture; `make stress` runs all mixtures and seeds.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from tests.support.http_server import HttpFault, HttpFaultServer, RandomFaults

import tiercache as tc
from tiercache.errors import StoreError

N_RECORDS, WIDTH = 3000, 1024
# The client gives up a connection without a byte after READ_S; a stall or silence lasts longer.
READ_S = 0.25
SHED = (("Retry-After", "0"),)
ALONE = {
    **{str(code): HttpFault("status", code, header=SHED) for code in (408, 425, 429, 500, 502, 503, 504, 522)},
    **{kind: HttpFault(kind) for kind in ("drop", "reset", "short", "long", "whole")},
    **{kind: HttpFault(kind) for kind in ("wrong_length", "wrong_bytes", "etag")},
    "reset at once": HttpFault("reset", n_bytes=0),
    "stall": HttpFault("stall", pause_s=4 * READ_S),
    "silence": HttpFault("silence", pause_s=4 * READ_S),
    "drip": HttpFault("drip", pause_s=0.002),
}


@pytest.fixture(scope="module")
def columns():
    """The records: incompressible bytes, and a column that is not read, so that the ranges of a window have gaps."""
    numbers = np.random.default_rng(1)
    both = (numbers.integers(0, 256, (N_RECORDS, WIDTH), np.uint8) for _ in range(2))
    return {"id": np.arange(N_RECORDS), **dict(zip(("value", "unread"), both, strict=True))}


def write_folder(path, columns, shard_size, block_size):
    tensor = tc.Tensor("uint8", (WIDTH,))
    schema = {"id": "int64", "value": tensor, "unread": tensor}
    with tc.Writer(path / "data", schema=schema, shard_size=shard_size, block_size=block_size) as writer:
        for start in range(0, N_RECORDS, 500):
            writer.write_batch({name: values[start : start + 500] for name, values in columns.items()})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, columns):
    return write_folder(tmp_path_factory.mktemp("faults"), columns, "1MiB", "256KiB")


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory, columns):
    """The same records in shards whose epoch takes about 200 requests."""
    return write_folder(tmp_path_factory.mktemp("faults"), columns, "64KiB", "32KiB")


def read_epoch(folder, columns, tmp_path, *, rule=None, cached):
    """Seconds, and statuses of the requests, of one shuffled epoch, of which every record is compared."""
    seen = np.zeros(N_RECORDS, np.int64)
    with HttpFaultServer(folder) as server:
        if rule is not None:
            server.when(rule)
        cache = tc.Cache(tmp_path / "cache", size="64MiB") if cached else False
        started_s = time.monotonic()
        try:
            options = {"read_timeout": READ_S}
            dataset = tc.Dataset(f"{server.url}/data", cache=cache, columns=["id", "value"], storage_options=options)
            try:
                loader = tc.DataLoader(dataset, batch_size=100, shuffle=True, options=tc.LoaderOptions(seed=1))
                for batch in loader:
                    ids = batch["id"].numpy()
                    np.testing.assert_array_equal(batch["value"].numpy(), columns["value"][ids])
                    seen[ids] += 1
            finally:
                dataset.close()
        finally:
            server.release()
            if cached:
                cache.close()
        assert (seen == 1).all()
        return time.monotonic() - started_s, [request.status for request in server.log]


def check_epoch(folder, columns, tmp_path, record_property, faults, rate, seed, cached):
    rule = RandomFaults(faults, rate, seed=seed)
    plain_s, plain = read_epoch(folder, columns, tmp_path / "plain", cached=cached)
    fault_s, faulted = read_epoch(folder, columns, tmp_path / "faults", rule=rule, cached=cached)
    assert rule.n_faults >= 1, "the test has shown nothing"
    text = f"{rule.n_faults} of {len(faulted)} requests went wrong ({len(plain)} without faults)"
    report = f"{text}: {fault_s:.2f} s instead of {plain_s:.2f} s"
    print(report)
    record_property("slowdown", report)


# The kinds of a status are one kind to a client; the mixtures have each of them, with the cache and without.
FEW = [("503", True), ("429", False), *((name, at % 2 == 0) for at, name in enumerate(list(ALONE)[8:]))]


@pytest.mark.parametrize(("name", "cached"), FEW)
def test_an_epoch_survives_each_fault_alone(folder, columns, tmp_path, record_property, name, cached):
    check_epoch(folder, columns, tmp_path, record_property, [ALONE[name]], 0.2, 1, cached)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_an_epoch_survives_a_mixture_of_faults(folder, columns, tmp_path, record_property, cached):
    check_epoch(folder, columns, tmp_path, record_property, [*ALONE.values()], 0.2, 2, cached)


@pytest.mark.stress
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("rate", [0.05, 0.2])
@pytest.mark.parametrize("seed", range(20))
def test_epochs_survive_random_mixtures(small_shards, columns, tmp_path, record_property, seed, rate, cached):
    check_epoch(small_shards, columns, tmp_path, record_property, [*ALONE.values()], rate, 100 + seed, cached)


def test_a_cache_that_was_warmed_under_faults_serves_an_epoch_without_the_server(folder, columns, tmp_path):
    rule = RandomFaults([fault for name, fault in ALONE.items() if name != "wrong_bytes"], 0.2, seed=5)
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        with HttpFaultServer(folder) as server:
            server.when(rule)
            dataset = tc.Dataset(f"{server.url}/data", cache=cache, storage_options={"read_timeout": READ_S})
            dataset.warm()
            server.release()
            server.when(lambda _method, _path: HttpFault("status", 404))
            seen = []
            for batch in tc.DataLoader(dataset, batch_size=100, shuffle=True):
                np.testing.assert_array_equal(batch["value"].numpy(), columns["value"][batch["id"].numpy()])
                seen += batch["id"].tolist()
            dataset.close()
        assert cache.verify().wrong == ()
    assert sorted(seen) == [*range(N_RECORDS)]
    assert rule.n_faults >= 1


@pytest.mark.parametrize(
    ("name", "cached"),
    [("503", True), ("reset", False), ("wrong_length", True), ("wrong_bytes", False), ("etag", True)],
)
def test_records_by_index_survive_faults(folder, columns, tmp_path, name, cached):
    rule = RandomFaults([ALONE[name]], 0.1, seed=4)
    cache = tc.Cache(tmp_path / "cache", size="64MiB") if cached else False
    with HttpFaultServer(folder) as server:
        server.when(rule)
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        for number in np.random.default_rng(2).permutation(N_RECORDS)[:50].tolist():
            record = dataset[number]
            assert record["id"] == number
            np.testing.assert_array_equal(record["value"], columns["value"][number])
        dataset.close()
        if cached:
            cache.close()
    assert rule.n_faults >= 1


@pytest.mark.parametrize(("status", "cached"), [(400, True), (403, False), (404, True), (416, False), (501, True)])
def test_a_status_that_is_an_answer_ends_the_run_with_an_error_that_names_the_object(
    folder, columns, tmp_path, status, cached
):
    def rule(_method, path):
        return HttpFault("status", status) if path.endswith("-000001.tcs") else None

    with pytest.raises((StoreError, tc.CorruptShard), match=r"-000001\.tcs"):
        read_epoch(folder, columns, tmp_path, rule=rule, cached=cached)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_a_shard_that_is_corrupt_at_its_source_ends_the_run(folder, columns, tmp_path, cached):
    def rule(_method, path):
        return HttpFault("wrong_bytes") if path.endswith("-000001.tcs") else None

    with pytest.raises(tc.CorruptShard, match=r"-000001\.tcs"):
        read_epoch(folder, columns, tmp_path, rule=rule, cached=cached)
