"""Archived shards are found when a run is planned: the first iter() names them, the time, the cost and the command."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.moved_shards import Moved, N, ServedStore, by_loader, by_record

import tiercache as tc
from tiercache.errors import ArchivedShards
from tiercache.store import LocalFolder, MemoryStore, placement_log
from tiercache.store.placement import check_readable
from tiercache.store.placement_log import PlacementRow

ALL = list(range(N))
GONE = HttpFault("status", 403, body=b"<Error><Code>InvalidObjectState</Code><Message>archived</Message></Error>")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "data"
    Moved(folder, LocalFolder(folder))
    return folder


class World:
    """A data set in a local folder, some shards of which are archived behind an HTTP server."""

    def __init__(self, packed, home, cold: HttpFaultServer) -> None:
        self.cold = cold
        self.moved = Moved(packed, LocalFolder(home))
        self.archived: set[str] = set()
        cold.when(lambda method, path: GONE if method == "GET" and path[len("/far/") :] in self.archived else None)

    def archive(self, keys, **how) -> None:
        """Move shards to where they must be restored before they can be read."""
        how = {"state": "archived", "storage_class": "GLACIER", **how}
        self.moved.move(list(keys), ServedStore(self.cold, "far"), **how)
        self.archived |= set(keys)

    def dataset(self, **how) -> tc.Dataset:
        return tc.Dataset(self.moved.store.url, **{"cache": False, **how})

    def asked(self) -> list[tuple[str, str | None]]:
        return [(seen.path.removeprefix("/far/"), seen.range) for seen in self.cold.log if seen.method == "GET"]


@pytest.fixture
def world(packed, tmp_path):
    with HttpFaultServer() as cold:
        yield World(packed, tmp_path / "home", cold)


def loaders(dataset):
    """A loader of each path that a loader can take."""
    return {
        "native": lambda: tc.DataLoader(dataset, batch_size=16, shuffle=True),
        "sampled": lambda: tc.DataLoader(dataset, batch_size=16, sampler=list(range(len(dataset)))),
        "torch": lambda: tc.DataLoader(dataset, batch_size=16, collate_fn=list),
    }


@pytest.mark.parametrize("path", ["native", "sampled", "torch"])
def test_the_first_iter_names_all_that_must_be_restored_first(world, path):
    gone = world.moved.keys[1:3]
    world.archive(gone)
    dataset = world.dataset()
    loader = loaders(dataset)[path]()
    world.cold.log.clear()
    with pytest.raises(ArchivedShards, match=r"2 shards that this run reads .* are archived") as caught:
        iter(loader)
    error = caught.value
    infos = [info for info in world.moved.infos if info.name in gone]
    assert error.names == tuple(gone)
    assert error.n_bytes == sum(info.n_bytes for info in infos)
    assert error.command == f"tiercache tier get {' '.join(f'{world.moved.store.url}/{key}' for key in gone)} --wait"
    assert error.command in str(error)
    assert error.exit_code == 5
    assert pickle.loads(pickle.dumps(error)).names == tuple(gone)
    assert sorted(world.asked()) == [(key, "bytes=0-0") for key in gone]  # nothing of it was read yet
    dataset.close()


def test_after_a_restore_the_same_loader_continues(world):
    world.archive(world.moved.keys)
    dataset = world.dataset()
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=3))
    with pytest.raises(ArchivedShards):
        iter(loader)
    world.archived.clear()  # for some days, where they lie
    ids = [i for batch in loader for i in batch["id"].tolist()]
    assert sorted(ids) == ALL
    fresh = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=3))
    assert [i for batch in fresh for i in batch["id"].tolist()] == ids
    dataset.close()


def test_a_run_without_archived_shards_begins(world):
    keys = world.moved.keys
    world.archive(keys[2:])
    first = sum(info.n_records for info in world.moved.infos[:2])
    dataset = world.dataset()
    for view in (dataset.take(first), dataset.select(np.arange(first)[::-1]), dataset.take(5) + dataset.take(first)):
        assert {i for batch in tc.DataLoader(view, batch_size=16) for i in batch["id"].tolist()} == set(range(first))
    with pytest.raises(ArchivedShards) as caught:
        iter(tc.DataLoader(dataset.take(first + 1), batch_size=16))
    assert caught.value.names == (keys[2],)
    with pytest.raises(ArchivedShards) as caught:
        iter(tc.DataLoader(dataset.take(first) + dataset.skip(first), batch_size=16))
    assert caught.value.names == tuple(keys[2:])
    dataset.close()


def test_cached_shards_need_no_restore(world, tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB", min_free="0%") as cache:
        dataset = world.dataset(cache=cache)
        dataset.warm()
        world.archive(world.moved.keys)
        again = world.dataset(cache=cache)
        assert by_loader(again) == ALL
        assert world.asked() == []
        dataset.close()
        again.close()


def test_shards_still_at_home_during_grace_need_no_restore(world):
    world.archive(world.moved.keys, drop=False)
    dataset = world.dataset()
    assert by_loader(dataset) == ALL
    assert by_record(dataset) == ALL
    dataset.close()


def test_the_message_names_some_of_many_archived_shards_and_the_error_all(world):
    dataset = world.dataset()
    names = [f"shards/{n}.tcs" for n in range(50)]
    rows = {
        key: PlacementRow(key, f"{world.cold.url}/far", state="archived", storage_class="DEEP_ARCHIVE", n_bytes=1 << 30)
        for key in names
    }
    placement_log.commit_placement(world.moved.store, rows)
    world.archived |= set(names)
    world.cold.objects.update({f"far/{key}": b"x" for key in names})
    with pytest.raises(ArchivedShards) as caught:
        check_readable(dataset._source.leaves[0].stores.placed, pa.chunked_array([names]), lambda i: False)
    assert caught.value.names == tuple(names)
    assert "and 42 more" in str(caught.value)
    assert caught.value.command == f"tiercache tier get {world.moved.store.url} --wait"
    dataset.close()


def test_a_shard_that_cannot_be_asked_for_another_reason_is_not_called_archived(world):
    world.archive(world.moved.keys[:1])
    world.cold.when(lambda method, path: HttpFault("status", 403, body=b"forbidden"))
    dataset = world.dataset()
    loader = iter(tc.DataLoader(dataset, batch_size=16))
    with pytest.raises(tc.StoreError, match="403"):
        next(loader)
    dataset.close()


def test_an_untracked_data_set_costs_one_request_for_the_marker(packed, tmp_path):
    moved = Moved(packed, MemoryStore(f"{tmp_path.name}", "data"))
    dataset = tc.Dataset(moved.store.url)
    loader = tc.DataLoader(dataset, batch_size=N)
    before = dataset._source.leaves[0].inner.counters["requests"]
    dataset._source.storage.prepare_reading(np.arange(len(moved.keys)))
    assert dataset._source.leaves[0].inner.counters["requests"] - before == 1
    assert by_loader(dataset) == ALL
    del loader
    dataset.close()
    moved.store.delete([info.key for info in moved.store.list()])
