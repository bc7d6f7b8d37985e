"""Readers follow moved shards: between any stores, during an epoch, through caches and in workers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.moved_shards import WAYS, Moved, N, ServedStore, by_arrow, by_loader, by_record
from tests.support.records import check_batch
from tests.support.stores import CountingStore
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache.errors import ArchivedShards, NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store import LocalFolder, MemoryStore, placement_log
from tiercache.store.placement import (
    LocationResolver,
    RedirectingLocalStore,
    follow_placement,
    is_same_service,
    options_of,
)
from tiercache.store.placement_log import PlacementRow

ALL = list(range(N))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "data"
    Moved(folder, LocalFolder(folder))
    return folder


@pytest.fixture
def stores(tmp_path, request):
    """Return a function of kind and name that makes a store, and the storage options that open it by its URL."""
    memories, opened = [], []

    def make(kind: str, name: str):
        if kind == "s3":
            server = request.getfixturevalue("s3_server")
            store = server.store(f"{tmp_path.name}/{name}")
            opened.append(store)
            return store, server.storage_options
        if kind == "memory":
            store = MemoryStore(f"{tmp_path.name}-{name}", "data")
            memories.append(store)
            return store, {}
        return LocalFolder(tmp_path / name), {}

    yield make
    for store in memories:
        store.delete([info.key for info in store.list()])
    for store in opened:
        store.close()


@pytest.fixture
def cache(tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB", min_free="0%") as cache:
        yield cache


PAIRS = [
    ("local", "memory"),
    ("memory", "local"),
    pytest.param("s3", "local", marks=pytest.mark.s3),
    pytest.param("local", "s3", marks=pytest.mark.s3),
]


@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize(("home", "place"), PAIRS)
def test_moved_shards_are_read_from_their_current_location(packed, stores, cache, home, place, is_cached, monkeypatch):
    (home_store, options), (place_store, place_options) = stores(home, "home"), stores(place, "cold")
    for name, value in _environment(place_options if home != place else {}).items():
        monkeypatch.setenv(name, value)
    moved = Moved(packed, home_store)
    moved.move(moved.keys[::2], place_store)
    for way in WAYS.values():
        dataset = tc.Dataset(home_store.url, cache=cache if is_cached else False, storage_options=options)
        assert way(dataset) == ALL
        dataset.close()


def _environment(options) -> dict[str, str]:
    names = {
        "endpoint": "AWS_ENDPOINT_URL",
        "region": "AWS_REGION",
        "access_key_id": "AWS_ACCESS_KEY_ID",
        "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    }
    return {names[key]: value for key, value in options.items()}


def test_all_shards_may_move_away_and_come_back(packed, tmp_path):
    for name, way in WAYS.items():
        moved = Moved(packed, LocalFolder(tmp_path / name / "home"))
        cold = LocalFolder(tmp_path / name / "cold")
        moved.move(moved.keys, cold)
        dataset = tc.Dataset(moved.store.url)
        assert way(dataset) == ALL, name
        moved.move(moved.keys, moved.store, src=cold)
        again = tc.Dataset(moved.store.url)
        for one in (dataset, again):
            assert way(one) == ALL, name
            one.close()


# -- while it is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("home", "place"), [("local", "memory"), ("memory", "local")])
def test_shards_that_move_during_an_epoch_are_read_to_its_end(packed, stores, home, place):
    (home_store, _), (place_store, _) = stores(home, "home"), stores(place, "cold")
    moved = Moved(packed, home_store)
    dataset = tc.Dataset(home_store.url, cache=False)
    loader = tc.DataLoader(dataset, batch_size=8, shuffle=True, options=tc.LoaderOptions(shuffle_window_bytes="8KiB"))
    ids = []
    for number, batch in enumerate(loader):
        ids += check_batch(batch)
        if number == 2:
            moved.move(moved.keys, place_store)
    assert sorted(ids) == ALL
    assert by_loader(dataset) == ALL
    dataset.close()


def test_a_read_by_etag_continues_at_the_new_location(tmp_path, stores):
    (home, _), (cold, _) = stores("memory", "home"), stores("memory", "cold")
    data = bytes(range(200))
    home.put("a", data)
    store = follow_placement(home, {})
    tail, info = store.read_tail("a", 4)
    assert tail == data[-4:]
    cold.put("a", data)
    placement_log.commit_placement(home, {"a": PlacementRow("a", cold.url, n_bytes=200)})
    home.delete(["a"])
    for _ in range(3):
        buffer = bytearray(10)
        store.read_into("a", [(ByteRange(50, 60), memoryview(buffer))], if_match=info.etag)
        assert bytes(buffer) == data[50:60]
    assert store.get("a") == data
    assert store.head("a").n_bytes == 200


def test_an_object_that_was_replaced_in_place_is_reported_as_changed(stores):
    home, _ = stores("memory", "home")
    home.put("a", b"first")
    store = follow_placement(home, {})
    etag = store.head("a").etag
    home.put("a", b"other")
    with pytest.raises(ObjectChanged):
        store.read_into("a", [(ByteRange(0, 5), memoryview(bytearray(5)))], if_match=etag)


def test_an_object_of_another_size_at_the_new_location_is_not_read(stores):
    (home, _), (cold, _) = stores("memory", "home"), stores("memory", "cold")
    cold.put("a", b"longer than it was")
    placement_log.commit_placement(home, {"a": PlacementRow("a", cold.url, n_bytes=5)})
    with pytest.raises(ObjectChanged, match=r"expected the moved object, found a different one.*expected 5 bytes"):
        follow_placement(home, {}).get("a")


def test_an_unreadable_placement_leaves_the_original_error(stores):
    home, _ = stores("memory", "home")
    placement_log.start_tracking(home)
    home.put(placement_log.placement_key(1), b"garbage")
    with pytest.raises(NotFound, match="home/data/a"):
        follow_placement(home, {}).get("a")


def test_objects_of_tiercache_are_never_redirected(stores):
    home, _ = stores("memory", "home")
    counting = CountingStore(home)
    with pytest.raises(NotFound):
        follow_placement(counting, {}).get("_tiercache/versions/1.json")
    assert len(counting.calls) == 1


# -- what it costs --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(packed):
    objects = {f"home/{info.key}": LocalFolder(packed).get(info.key) for info in LocalFolder(packed).list()}
    with HttpFaultServer(objects) as server:
        yield server


def test_the_counters_include_reads_from_other_locations(server):
    with HttpFaultServer() as cold:
        moved = Moved(None, ServedStore(server, "home"))
        moved.move(moved.keys, ServedStore(cold, "far"))
        dataset = tc.Dataset(f"{server.url}/home", cache=False)
        loader = tc.DataLoader(dataset, batch_size=16)
        assert sum(len(batch["id"]) for batch in loader) == N
        assert loader.stats()["bytes_fetched"] > sum(info.n_bytes for info in moved.infos) * 0.8
        dataset.close()


def test_a_cache_fetches_a_moved_shard_once(server, cache, stores):
    with HttpFaultServer() as cold:
        moved = Moved(None, ServedStore(server, "home"))
        dataset = tc.Dataset(f"{server.url}/home", cache=cache)
        assert by_loader(dataset) == ALL
        dataset.close()
        moved.move(moved.keys, ServedStore(cold, "far"))
        before = len(cold.log)
        again = tc.Dataset(f"{server.url}/home", cache=cache)
        assert by_loader(again) == ALL
        assert len(cold.log) == before  # all of it was here, by identity
        again.close()


def test_remote_shards_of_a_local_home_are_read_through_the_default_cache(packed, tmp_path):
    with HttpFaultServer() as cold:
        moved = Moved(packed, LocalFolder(tmp_path / "home"))
        moved.move(moved.keys, ServedStore(cold, "far"))
        for n_epochs in (1, 2):
            dataset = tc.Dataset(moved.store.url)
            assert by_arrow(dataset) == ALL
            for _ in range(n_epochs):
                assert by_loader(dataset) == ALL
            assert isinstance(dataset._source.leaves[0].stores.placed, RedirectingLocalStore)
            dataset.close()
        sent = sum(seen.n_bytes for seen in cold.log if seen.method == "GET")
        assert sent <= sum(2 * info.n_bytes - info.footer_offset for info in moved.infos)


# -- workers --------------------------------------------------------------------------------------------------------


def _as_it_is(batch):
    return batch


@pytest.mark.parametrize(
    ("method", "is_known"),
    [("fork", False), ("fork", True), pytest.param("spawn", False, marks=pytest.mark.stress)],
)
def test_workers_find_moved_shards(packed, tmp_path, method, is_known):
    moved = Moved(packed, LocalFolder(tmp_path / "home"))
    dataset = tc.Dataset(moved.store.url)
    if is_known:
        moved.move(moved.keys, LocalFolder(tmp_path / "cold"))
        assert by_loader(dataset) == ALL
    loader = TorchLoader(
        dataset,
        batch_size=10,
        num_workers=2,
        collate_fn=_as_it_is,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    if not is_known:
        moved.move(moved.keys, LocalFolder(tmp_path / "cold"))
    for _ in range(2):
        assert [int(record["id"]) for records in loader for record in records] == ALL
    dataset.close()


WRONG_URLS = [
    "file://elsewhere/data",
    "nosuchscheme://a/b",
    "http://user:hunter2@127.0.0.1:9/x?y=1",
    "s3://u:hunter2@b",
]


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_location_that_cannot_be_opened_is_an_error_without_credentials(packed, tmp_path, url):
    moved = Moved(packed, LocalFolder(tmp_path / "home"))
    moved.move(moved.keys[:1], LocalFolder(tmp_path / "cold"))
    info = moved.infos[0]
    placement_log.commit_placement(moved.store, {info.name: PlacementRow(info.name, url, n_bytes=info.n_bytes)})
    with closing(tc.Dataset(moved.store.url)) as dataset:
        with pytest.raises(StoreError, match="names a location that cannot be opened") as caught:
            by_loader(dataset)
        assert "hunter2" not in str(caught.value)


# -- archived -------------------------------------------------------------------------------------------------------

ARCHIVED = HttpFault("status", 403, body=b"<Error><Code>InvalidObjectState</Code><Message>archived</Message></Error>")


def test_reading_an_archived_shard_reports_that_it_must_be_restored(server, tmp_path):
    with HttpFaultServer() as cold:
        moved = Moved(None, ServedStore(server, "home"))
        dataset = tc.Dataset(f"{server.url}/home", cache=False)
        moved.move(moved.keys, ServedStore(cold, "far"), state="archived", storage_class="GLACIER")
        cold.when(lambda method, path: ARCHIVED if method == "GET" else None)
        with pytest.raises(
            ArchivedShards, match=r"is archived \(storage class GLACIER\) and must be restored"
        ) as caught:
            dataset[0]
        assert caught.value.names == (moved.keys[0],)
        assert caught.value.command == f"tiercache tier get {server.url}/home/{moved.keys[0]} --wait"
        assert caught.value.command in str(caught.value)
        cold.when(lambda method, path: None)
        assert by_record(dataset) == ALL
        dataset.close()


def test_a_shard_that_was_restored_to_home_during_the_read_is_read_there(server):
    with HttpFaultServer() as cold:
        moved = Moved(None, ServedStore(server, "home"))
        far = ServedStore(cold, "far")
        moved.move(moved.keys, far, state="archived", storage_class="GLACIER")
        dataset = tc.Dataset(f"{server.url}/home", cache=False)
        dataset._source.leaves[0].stores.placed.resolver.placement_once()
        moved.move(moved.keys, moved.store, src=far, drop=False)
        cold.when(lambda method, path: ARCHIVED if method == "GET" else None)
        assert by_loader(dataset) == ALL
        dataset.close()


# -- options of other places -------------------------------------------------------------------------------------------


def test_a_location_is_opened_with_the_storage_options_of_its_tier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rules = '[tiers.archive]\nurl = "s3://cold/train"\nstorage_options = { region = "xx-1", anon = true }\n'
    (tmp_path / "tiercache.toml").write_text(rules)
    places = LocationResolver(MemoryStore("options-home"), {})
    found = places.store_at(placement_log.PlacementRow("a", "s3://cold/train/data", n_bytes=1))
    other = places.store_at(placement_log.PlacementRow("a", "s3://cold/training/data", n_bytes=1))
    assert found.options.config["region"] == "xx-1"
    assert other.options.config.get("region") != "xx-1"
    assert options_of("s3://cold/train") == options_of("s3://cold/train/data/") != {}
    assert options_of("s3://cold/training") == options_of("s3://cold/train/../train") == {}
    places.close()


def test_options_of_the_home_are_sent_to_no_other_server():
    for home, place, are_sent in (
        ("s3://a/x", "s3://b/y", True),
        ("http://a.org/x", "http://a.org/y", True),
        ("http://a.org/x", "http://b.org/x", False),
        ("s3://a/x", "gs://a/x", False),
        ("s3://a/x", "/nvme/x", False),
        ("zip://x.zip::http://a.org/y", "zip://x.zip::http://b.org/y", False),
    ):
        assert is_same_service(place, home) is are_sent, (home, place)
