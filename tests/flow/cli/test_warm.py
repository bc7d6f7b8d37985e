"""The verbs warm and pin: selection, order, columns, and the cost of planning."""

import json
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tiercache.cache import Cache
from tiercache.data.dataset import Dataset
from tiercache.load.loader import DataLoader
from tiercache.load.loader_options import LoaderOptions
from tiercache.model import ShardInfo
from tiercache.shard.schema import Schema
from tiercache.shard.versions import commit, latest, read_shards
from tiercache.store import MemoryStore, open_store


def shards_of(url):
    with closing(open_store(url)) as store:
        return read_shards(store, latest(store))


def cached(tiercache, cache, url):
    """Names of the shards that are in the cache, by evict's dry run."""
    events = tiercache("evict", url, *cache, "--dry-run", "--json").events
    return {e["source"].removeprefix(f"{url}/") for e in events[:-1] if e["source"].endswith(".tcs")}


def names(table, shards):
    known = table.names.to_pylist()
    return [known[i] for i in shards]


class TestWhatATrainingReads:
    def test_warm_fetches_first_what_the_loader_reads_first(self, tiercache, data_set, cache):
        flags = "--seed", "7", "--limit", "1B"
        tiercache("warm", data_set, *cache, *flags)
        dataset = Dataset(str(data_set), columns=["path"])
        loader = DataLoader(dataset, batch_size=1, shuffle=True, options=LoaderOptions(seed=7, shuffle_group_bytes=1))
        first = next(iter(loader))["path"][0]
        number = dataset[list(range(20))]["path"].index(first)
        table = shards_of(data_set)
        shard = int(np.searchsorted(table.first_record, number, side="right")) - 1
        assert cached(tiercache, cache, data_set) == set(names(table, [shard]))
        dataset.close()

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--rank", "0/2"], "--rank needs --seed"),
            (["--seed", "1", "--rank", "2/2"], "--rank takes RANK/RANKS"),
            (["--pin", "--columns", "x"], "--pin keeps whole copies"),
            (["--limit", "105%"], "--limit: "),
            (["--seed", "1", "--placement", "far"], "--placement must be sticky or global"),
        ],
    )
    def test_conflicting_flags_are_usage_errors(self, tiercache, data_set, cache, flags, message):
        assert message in tiercache("warm", data_set, *cache, *flags, code=2).err


class TestColumns:
    @pytest.fixture
    def wide(self, tiercache, tmp_path):
        """A data set of which one column is small."""
        rows = [{"small": i, "large": os.urandom(2000).hex()} for i in range(400)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tiercache("pack", tmp_path / "a.jsonl", tmp_path / "wide", "--shard-size", "400KB", "--block-size", "100KB")
        return tmp_path / "wide"

    def test_a_projection_is_fetched_in_part_and_only_once(self, tiercache, wide, cache):
        whole = tiercache("warm", wide, *cache, "--dry-run", "--json").events[-1]["bytes"]
        would = tiercache("warm", wide, *cache, "--columns", "small", "--dry-run", "--json").events[-1]
        done = tiercache("warm", wide, *cache, "--columns", "small", "--json").events[-1]
        assert would["bytes"] == done["bytes"] < whole / 5
        assert done["fetched"] == would["fetched"] > 1
        again = tiercache("warm", wide, *cache, "--columns", "small", "--json").events[-1]
        assert (again["fetched"], again["bytes_fetched"]) == (0, 0)
        assert tiercache("status", *cache, "--json").events[-1]["bytes_used"] < whole / 3

    def test_an_unknown_column_is_an_error(self, tiercache, wide, cache):
        assert "no such column" in tiercache("warm", wide, *cache, "--columns", "x", code=1).err


def test_an_object_corrupt_at_its_source_ends_with_4(tiercache, data_set, cache):
    bad = sorted((data_set / "shards").iterdir())[1]
    data = bytearray(bad.read_bytes())
    data[100] ^= 1
    bad.chmod(0o600)
    bad.write_bytes(data)
    for _ in range(2):
        assert str(bad) in tiercache("warm", data_set, *cache, "-j", "1", code=4).err
    n_shards = len(list(bad.parent.iterdir()))
    assert tiercache("warm", data_set, *cache, "--exclude", bad.name, "--json").events[-1]["objects"] == n_shards


def test_a_dry_run_says_whether_the_data_fits(tiercache, data_set, tmp_path):
    small = "--cache", str(tmp_path / "small"), "--cache-size", "20KB"
    would = tiercache("warm", data_set, *small, "--dry-run", "--json").events[-1]
    assert (would["fits"], would["fetched"]) == (False, would["objects"])
    assert "; the cache has not enough space for them\n" in tiercache("warm", data_set, *small, "--dry-run").out


class TestPlanningCost:
    """What is missing is found by two listings and a few statements, and one lstat for each copy that is there."""

    @pytest.mark.parametrize("room", [2.0, 0.5])  # for all shards, and not
    def test_planning_makes_no_system_call_or_statement_per_shard(self, tmp_path, monkeypatch, room):
        few, many = (self.calls_of_a_plan(tmp_path, n, room, monkeypatch) for n in (50, 500))
        assert sorted(call for call in many if call != "lstat") == sorted(call for call in few if call != "lstat")
        assert many.count("lstat") - few.count("lstat") <= 50 - 5
        assert many.count("scandir") <= 4

    def calls_of_a_plan(self, tmp_path, n_shards, room, monkeypatch):
        store = MemoryStore(f"plan-{n_shards}-{tmp_path.name}")
        n_bytes = 1 << 19
        infos = [
            ShardInfo(f"shards/{i:06d}.tcs", f"{i:032x}", 100, n_bytes, i, n_bytes - 200, 168) for i in range(n_shards)
        ]
        version = commit(store, infos, schema=Schema.of({"x": "int64"}), mode="create")
        objects = read_shards(store, version).objects(version.dataset_id, np.arange(n_shards))
        folder = tmp_path / f"cache-{n_shards}"
        with Cache(folder, size="1GiB") as cache:
            for key, identity in objects[::10]:  # copies that are here, and booked at the next opening
                put_copy(cache, cache.store(store).spec_of(key, identity))
        with Cache(folder, size=int(room * n_shards * n_bytes)) as cache:
            cache.find_missing(cache.store(store), objects)
            calls = counted_calls(cache, monkeypatch)
            plan = cache.find_missing(cache.store(store), objects)
            monkeypatch.undo()
        assert (len(plan.missing), plan.fits) == (n_shards - len(objects[::10]), room > 1)
        return calls


def put_copy(cache, wanted):
    """A copy with a size and no bytes."""
    path = cache.path / "copies" / wanted.name
    path.touch()
    os.truncate(path, wanted.n_bytes)
    Path(f"{path}.json").write_text(wanted.to_json(wanted.crc32c))


def counted_calls(cache, monkeypatch):
    """A list that system calls on files, and SQL, are added to from now on."""
    calls = []
    for name in ("open", "stat", "lstat", "scandir", "listdir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))
    database = cache._open().accounts._database
    database.run(lambda db: db.set_trace_callback(lambda sql: calls.append(" ".join(sql.split()[:4]))))
    return calls
