"""What is read from below the hot tier is copied there: once, in the background, whole, and as far as it has room."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.forks import in_a_fork
from tests.support.http_server import HttpFaultServer
from tests.support.stores import CountingStore
from tests.tier.moved import Moved, N, ServedStore, by_loader, by_record

import tiercache as tc
from tiercache._native.checksum import crc32c
from tiercache.model import ShardIdentity
from tiercache.store import LocalFolder, MemoryStore
from tiercache.testing import Fault, FaultKind, FaultStore
from tiercache.tier.placement import log, reading
from tiercache.tier.placement.reading import HotTier, Promoter, hot_folder
from tiercache.tier.placement.resolver import LocationResolver, _same_service, tier_above

ALL = list(range(N))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "data"
    Moved(folder, LocalFolder(folder))
    return folder


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine whose rule file names one hot tier."""
    monkeypatch.setenv("TIERCACHE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    write_rules(tmp_path)
    return tmp_path


def write_rules(folder: Path, capacity: str = "1GB") -> None:
    (folder / "tiercache.toml").write_text(
        f'[tiers.hot]\nrole = "hot"\nurl = "{folder}/nvme"\ncapacity = "{capacity}"\n'
        f'[tiers.standard]\nrole = "standard"\nurl = "{folder}/home"\n'
    )


class World:
    """A data set at home, all of whose shards were moved to `cold`, and are promoted to `hot` when they are read."""

    def __init__(self, packed: Path, folder: Path, *, promote: str | None = None, **row) -> None:
        self.hot = LocalFolder(folder / "nvme" / "data")
        self.cold = LocalFolder(folder / "cold")
        self.moved = Moved(packed, LocalFolder(folder / "home" / "data"))
        self.moved.move(self.moved.keys, self.cold, promote=self.hot.url if promote is None else promote, **row)

    @property
    def here(self) -> set[str]:
        return {info.key for info in self.hot.list()}

    def read(self, way=by_loader) -> None:
        dataset = tc.Dataset(self.moved.store.url)
        assert way(dataset) == ALL
        assert dataset.source.access.tiers._promoter.wait(30)
        dataset.close()


@pytest.mark.parametrize("way", [by_loader, by_record])
def test_what_is_read_is_copied_whole_to_the_hot_tier_and_read_there_from_then_on(packed, tmp_path, way):
    world = World(packed, tmp_path)
    world.read(way) if way is by_loader else _read_known(world)
    assert world.here == set(world.moved.keys)
    for key in world.moved.keys:
        assert world.hot.get(key) == world.cold.get(key)
    shutil.rmtree(world.cold.root)
    dataset = tc.Dataset(world.moved.store.url)
    assert by_loader(dataset) == ALL
    dataset.close()


def _read_known(world: World) -> None:
    """By records, of a data set that knows by the time it reads them that they were moved."""
    dataset = tc.Dataset(world.moved.store.url)
    for _ in range(2):  # the first opening finds out
        assert by_record(dataset) == ALL
        dataset.source._readers.clear()
    assert dataset.source.access.tiers._promoter.wait(30)
    dataset.close()


def test_one_record_brings_its_own_shard_only(packed, tmp_path):
    world = World(packed, tmp_path)
    dataset = tc.Dataset(world.moved.store.url)
    dataset.source.prepare_reading(np.arange(0))
    assert dataset[N - 1]["id"] == N - 1
    assert dataset.source.access.tiers._promoter.wait(30)
    dataset.close()
    assert world.here == {world.moved.keys[-1]}


def test_as_far_as_the_hot_tier_has_room(packed, tmp_path):
    world = World(packed, tmp_path)
    first = world.moved.infos[0].n_bytes
    other = tmp_path / "nvme" / "other"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x" * 5000)
    write_rules(tmp_path, f"{5000 + first + 4000}")
    world.read()
    assert len(world.here) == 1
    assert sum(info.n_bytes for info in world.hot.list()) <= first + 4000


def test_no_further_than_the_placement_allows(packed, tmp_path):
    world = World(packed, tmp_path, hot_bytes=100)
    world.read()
    assert world.here == set()


@pytest.mark.parametrize("where", ["elsewhere", "nvme/../escaped", "nvmeish/data"])
def test_a_folder_that_this_machines_rules_do_not_name_is_not_written_to(packed, tmp_path, where):
    world = World(packed, tmp_path, promote=f"{tmp_path}/{where}")
    world.read()
    assert not (tmp_path / where).exists()
    assert world.here == set()


def test_a_machine_without_a_rule_file_promotes_nothing(packed, tmp_path):
    (tmp_path / "tiercache.toml").unlink()
    world = World(packed, tmp_path)
    world.read()
    assert world.here == set()
    (tmp_path / "tiercache.toml").write_text("[tiers.hot]\nrole = 'warm'\n")
    world.read()
    assert world.here == set()


def test_hot_folders_are_found_by_the_rule_file(tmp_path):
    assert hot_folder(f"{tmp_path}/nvme/data/deep") == HotTier(f"{tmp_path}/nvme", 1_000_000_000)
    assert hot_folder(f"{tmp_path}/nvme") == HotTier(f"{tmp_path}/nvme", 1_000_000_000)
    assert hot_folder(f"{tmp_path}/home/data") is None


def test_a_place_is_opened_by_the_options_that_this_machines_rules_have_for_its_tier(tmp_path):
    rules = '[tiers.archive]\nurl = "s3://cold/train"\nstorage_options = { region = "xx-1", anon = true }\n'
    (tmp_path / "tiercache.toml").write_text(rules)
    places = LocationResolver(MemoryStore("options-home"), {})
    found = places.store_at(log.PlacementRow("a", "s3://cold/train/data", n_bytes=1))
    other = places.store_at(log.PlacementRow("a", "s3://cold/training/data", n_bytes=1))
    assert found._options.config["region"] == "xx-1"
    assert other._options.config.get("region") != "xx-1"
    assert tier_above("s3://cold/train") == tier_above("s3://cold/train/data/")
    places.close()


@pytest.mark.parametrize(
    ("home", "place", "are_shown"),
    [
        ("s3://a/x", "s3://b/y", True),
        ("http://a.org/x", "http://a.org/y", True),
        ("http://a.org/x", "http://b.org/x", False),
        ("s3://a/x", "gs://a/x", False),
        ("s3://a/x", "/nvme/x", False),
        ("zip://x.zip::http://a.org/y", "zip://x.zip::http://b.org/y", False),
    ],
)
def test_options_of_the_home_are_shown_to_no_other_server(home, place, are_shown):
    assert _same_service(place, home) is are_shown


def test_of_several_processes_one_copies(packed, tmp_path):
    world = World(packed, tmp_path)

    def child() -> int:
        world.read()
        return 0

    for _ in range(3):
        assert in_a_fork(child) == 0
    world.read()
    assert world.here == set(world.moved.keys)
    assert [p.name for p in (tmp_path / "nvme").rglob("*") if p.name.startswith(".")] == []


def test_what_the_cache_has_fetched_is_not_fetched_twice(packed, tmp_path):
    with HttpFaultServer() as server, tc.Cache(tmp_path / "cache", size="64MiB", min_free="0%") as cache:
        moved = Moved(packed, LocalFolder(tmp_path / "home" / "data"))
        served = ServedStore(server, "cold")
        hot = LocalFolder(tmp_path / "nvme" / "data")
        moved.move(moved.keys, served, promote=hot.url)
        dataset = tc.Dataset(moved.store.url, cache=cache)
        assert by_loader(dataset) == ALL
        assert dataset.source.access.tiers._promoter.wait(30)
        dataset.close()
        assert {info.key for info in hot.list()} == set(moved.keys)
        sent = sum(seen.n_bytes for seen in server.log if seen.method == "GET")
        assert sent <= sum(2 * info.n_bytes - info.footer_offset for info in moved.infos)
        served.on_source_closed()


# -- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def one(tmp_path):
    """An object that was moved, as its Promoter sees it."""
    home, cold = MemoryStore(f"{tmp_path.name}-home"), MemoryStore(f"{tmp_path.name}-cold")
    data = bytes(range(256)) * 100
    cold.put("a.tcs", data)
    identity = ShardIdentity("0" * 32, "1" * 32, len(data), crc32c(data))
    hot = LocalFolder(tmp_path / "nvme")
    row = log.PlacementRow("a.tcs", cold.url, n_bytes=len(data), crc32c=identity.crc32c, promote=hot.url)
    log.commit_placement(home, {"a.tcs": row})
    places = LocationResolver(home, {})
    places.look()
    yield places, row, identity, cold, hot
    for store in (home, cold):
        store.delete([info.key for info in store.list()])


def test_bytes_that_are_not_what_the_data_set_says_are_not_kept(one):
    places, row, identity, cold, hot = one
    wrong = FaultStore(cold, [Fault("read_into", kind=FaultKind.BIT_FLIP)])
    promoter = Promoter(places, lambda: wrong)
    assert not promoter.copy(row, identity)
    assert list(hot.list()) == []
    assert promoter.copy(row, identity)
    assert hot.get("a.tcs") == cold.get("a.tcs")


def test_a_store_that_fails_leaves_nothing_and_stops_nobody(one):
    places, _row, identity, cold, hot = one
    promoter = Promoter(places, lambda: FaultStore(cold, [Fault("read_into")]))
    promoter.offer("a.tcs", identity)
    assert promoter.wait(30)
    assert list(hot.list()) == []
    promoter.close()
    promoter = Promoter(places, lambda: cold)
    promoter.offer("a.tcs", identity)
    assert promoter.wait(30)
    assert [info.key for info in hot.list()] == ["a.tcs"]


def test_it_is_offered_often_and_copied_once(one):
    places, _row, identity, cold, hot = one
    counting = CountingStore(cold)
    promoter = Promoter(places, lambda: counting)
    for _ in range(50):
        promoter.offer("a.tcs", identity)
    assert promoter.wait(30)
    promoter.offer("a.tcs", identity)
    promoter.offer("unknown", identity)
    assert promoter.wait(30)
    assert counting.n_calls("read_into") == 1
    assert [info.key for info in hot.list()] == ["a.tcs"]


def test_closing_stops_it_and_keeps_no_half_copy(one):
    places, row, identity, cold, hot = one
    promoter = Promoter(places, lambda: cold)
    promoter._closed.set()
    assert not promoter.copy(row, identity)
    assert list(hot.list()) == []
    promoter.close()
    assert promoter.copy(row, identity)


def test_processes_that_copy_to_one_tier_keep_one_account_of_its_room(one):
    places, row, identity, cold, hot = one
    two = HotTier(hot.url, 2 * identity.n_bytes)
    promoters = [Promoter(places, lambda: cold, lambda url: two) for _ in range(2)]
    rows = [replace(row, key=f"{n}.tcs") for n in range(3)]
    for one_of_them in rows:
        cold.put(one_of_them.key, cold.get("a.tcs"))
    assert [promoters[n % 2].copy(rows[n], identity) for n in range(3)] == [True, True, False]
    assert sum(info.n_bytes for info in hot.list()) == two.limit_bytes


def test_what_others_have_put_into_a_tier_counts_after_a_while(one, monkeypatch):
    places, row, identity, cold, hot = one
    promoter = Promoter(places, lambda: cold, lambda url: HotTier(hot.url, 2 * identity.n_bytes))
    assert promoter.copy(row, identity)
    hot.delete(["a.tcs"])
    hot.put("theirs", bytes(2 * identity.n_bytes))
    monkeypatch.setattr(reading, "LOOK_S", 0.0)
    assert not promoter.copy(row, identity)


def test_a_disk_that_is_nearly_full_gets_no_copy(one, monkeypatch):
    places, row, identity, cold, hot = one
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=usage.total // 25))
    assert not Promoter(places, lambda: cold).copy(row, identity)
    assert list(hot.list()) == []
