"""Selections of evict, facts of status, and verify --cached with repair."""

import json
import os

import pytest

from tiercache.cache import Cache
from tiercache.cli.cache import summary_of
from tiercache.data.dataset import Dataset
from tiercache.load.numpy_loader import NumpyLoader
from tiercache.store import open_store


@pytest.fixture
def warmed(tiercache, data_set, cache, tmp_path):
    """The copies of a data set that is in the cache, largest first."""
    tiercache("warm", data_set, *cache)
    copies = [p for p in (tmp_path / "cache" / "copies").iterdir() if "." not in p.name]
    return sorted(copies, key=lambda path: path.stat().st_size)[::-1]


def damage(path, offset=100):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


class TestEvict:
    def test_target_size_evicts_no_more_than_needed(self, tiercache, cache, warmed):
        used = tiercache("status", *cache, "--json").events[-1]["bytes_used"]
        largest = max(path.stat().st_size for path in warmed) + 8192
        target = used // 2
        would = tiercache("evict", "--all", *cache, "--target-size", str(target), "--dry-run", "--json").events[-1]
        done = tiercache("evict", "--all", *cache, "--target-size", str(target), "--yes", "--json").events[-1]
        assert (done["copies"], done["bytes"], done["left"]) == (would["copies"], would["bytes"], 0)
        left = tiercache("status", *cache, "--json").events[-1]["bytes_used"]
        assert left == done["bytes_used"] <= target < left + largest
        again = tiercache("evict", "--all", *cache, "--target-size", str(target), "--yes")
        assert again.out == "evicted 0 copies, 0 B\n"

    def test_copies_in_use_stay_and_the_exit_code_is_3(self, tiercache, data_set, cache, warmed, tmp_path):
        with Cache(tmp_path / "cache", size="100MB") as held:
            store = held.store(open_store(str(data_set)))
            dataset = Dataset(str(data_set), cache=held)
            dataset[0]
            done = tiercache("evict", "--all", *cache, "--yes", code=3)
            assert "in use stayed" in done.out
            dataset.close()
            store.close()
        assert tiercache("evict", "--all", *cache, "--yes", "--json").events[-1]["left"] == 0

    def test_invalid_ages_and_sizes_are_usage_errors(self, tiercache, data_set, cache):
        tiercache("warm", data_set, *cache)
        for flag in ("--target-size",):
            assert f"{flag}: not a" in tiercache("evict", "--all", *cache, flag, "x", code=2).err


class TestStatus:
    def test_the_table_has_a_column_for_partial_copies(self, tiercache, cache, tmp_path):
        rows = [{"small": i, "large": os.urandom(2000).hex()} for i in range(200)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tiercache("pack", tmp_path / "a.jsonl", tmp_path / "wide", "--block-size", "100KB")
        tiercache("warm", tmp_path / "wide", *cache, "--columns", "small")
        row, summary = tiercache("status", *cache, "--json").events
        assert (row["parts"], summary["n_parts"]) == (1, 1)
        assert tiercache("status", *cache).out.splitlines()[0].split() == [
            *("data", "set", "copies", "in", "part", "size", "pinned")
        ]
        evicted = tiercache("evict", "--all", *cache, "--yes", "--json").events[-1]
        assert evicted["copies"] == row["copies"] + row["parts"]
        assert tiercache("status", *cache, "--json").events[-1]["bytes_used"] == 0

    def test_hits_of_all_processes_are_summed(self, tiercache, data_set, cache, warmed, tmp_path):
        for _ in range(2):
            with Cache(tmp_path / "cache", size="100MB") as used:
                dataset = Dataset(str(data_set), cache=used)
                list(NumpyLoader(dataset, batch_size=20))
                dataset.close()
        done = tiercache("status", *cache, "--json").events[-1]
        assert (done["bytes_missed"], done["hit_ratio"]) == (0, 1)
        assert done["bytes_hit"] > 0
        assert " read came from the cache, " in tiercache("status", *cache).out

    def test_the_summary_names_what_is_being_fetched_and_what_is_corrupt_at_its_source(self):
        sizes = {"bytes_used": 5, "limit_bytes": 10, "pinned_bytes": 0, "reserved_bytes": 2}
        figures = {"bytes_hit": 3, "bytes_missed": 1, "bytes_fetched": 7, "poisoned": 1}
        assert summary_of({"path": "/c", "hit_ratio": 0.75, "figures": figures, **sizes}) == (
            "/c: 5 B of 10 B, 0 B pinned; 2 B being fetched; 75.0% of 4 B read came from the cache, 7 B fetched; "
            "1 corrupt at their source"
        )


class TestVerify:
    def test_a_damaged_copy_is_named_and_stays_without_repair(self, tiercache, data_set, cache, warmed):
        damage(warmed[0])
        copy, summary = tiercache("verify", *cache, "--json", code=4).events
        assert (copy["event"], copy["name"], copy["state"]) == ("copy", warmed[0].name, "damaged")
        assert copy["source"].startswith(str(data_set))
        assert (summary["damaged"], summary["removed"]) == (1, 0)
        assert warmed[0].exists()
        assert "1 corrupt" in tiercache("verify", data_set, *cache, code=4).out

    @pytest.mark.parametrize("with_url", [True, False])
    def test_repair_removes_a_damaged_copy(self, tiercache, data_set, cache, warmed, with_url):
        damage(warmed[0])
        url = [data_set] if with_url else []
        done = tiercache("verify", *url, *cache, "--repair")
        assert done.out.endswith(": 1 corrupt, 1 of them removed\n")
        assert not warmed[0].exists()
        assert tiercache("verify", *cache, "--json").events[-1]["damaged"] == 0
        events = tiercache("status", *cache, "--json").events
        assert events[-1]["quarantined"] == 1
        assert "1 corrupt and removed" in tiercache("status", *cache).out

    def test_flags_of_verify_for_stores_are_usage_errors(self, tiercache, data_set, cache):
        assert "verify needs a URL, or --cached" in tiercache("verify", code=2).err
        assert (
            "--sample, --at, --decode and --engine ray apply to data sets"
            in tiercache("verify", *cache, "--sample", "5%", code=2).err
        )
