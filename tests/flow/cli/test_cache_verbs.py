"""The verbs warm, evict and status."""

import pytest


def used(tiercache, cache):
    return tiercache("status", *cache, "--json").events[-1]["bytes_used"]


def test_warming_fetches_what_is_missing_and_only_that(tiercache, data_set, cache):
    would = tiercache("warm", data_set, *cache, "--dry-run", "--json").events[-1]
    assert would["fetched"] == would["objects"] > 3
    first = tiercache("warm", data_set, *cache, "--json").events[-1]
    assert (first["fetched"], first["bytes_fetched"]) == (would["objects"], would["bytes"])
    second = tiercache("warm", data_set, *cache, "--json").events[-1]
    assert (second["fetched"], second["bytes_fetched"]) == (0, 0)
    assert tiercache("warm", data_set, *cache, "--dry-run").out == "would fetch 0 objects, 0 B\n"
    assert "are in the cache, 0 B of them fetched now" in tiercache("warm", data_set, *cache).out


def test_warm_fails_if_the_data_does_not_fit(tiercache, data_set, tmp_path):
    cache = "--cache", str(tmp_path / "small"), "--cache-size", "10KB"
    done = tiercache("warm", data_set, *cache, code=1)
    assert done.err.startswith("tiercache: error: ")
    tiercache("warm", data_set, *cache, "--pin", code=1)


@pytest.mark.parametrize(
    "verb", [["status"], ["evict", "--all", "--yes"], ["verify", "--cached"], ["verify", "--repair"]]
)
def test_verbs_on_a_missing_cache_folder_name_it_and_do_not_create_it(tiercache, verb, tmp_path):
    missing = tmp_path / "missing"
    assert str(missing) in tiercache(*verb, "--cache", missing, code=1).err
    assert not missing.exists()


def test_evict_needs_a_scope_and_a_confirmation(tiercache, data_set, cache):
    tiercache("warm", data_set, *cache)
    assert "evict takes a URL or --all" in tiercache("evict", *cache, code=2).err
    assert "evict takes a URL or --all" in tiercache("evict", data_set, "--all", *cache, code=2).err
    assert "standard input is not a terminal; give --yes" in tiercache("evict", data_set, *cache, code=2).err
    before = used(tiercache, cache)
    would = tiercache("evict", data_set, *cache, "--dry-run", "--json").events
    assert would[-1]["copies"] == len(would) - 1 > 3
    assert used(tiercache, cache) == before > 0
    done = tiercache("evict", data_set, *cache, "--yes", "--json").events[-1]
    assert (done["copies"], done["bytes"], done["left"]) == (would[-1]["copies"], before, 0)
    assert used(tiercache, cache) == 0


def test_evict_removes_only_the_named_data_set(tiercache, data_set, photos, cache, tmp_path):
    tiercache("pack", photos, tmp_path / "other")
    for url in (data_set, tmp_path / "other"):
        tiercache("warm", url, *cache)
    tiercache("evict", data_set, *cache, "-y")
    assert [e["url"] for e in tiercache("status", *cache, "--json").events[:-1]] == [str(tmp_path / "other")]
    tiercache("evict", tmp_path / "other", *cache, "-y", "--include", "*.tcs")
    assert tiercache("status", *cache, "--json").events[0]["copies"] == 1  # the segment
    tiercache("evict", "--all", *cache, "-y")
    assert used(tiercache, cache) == 0


def test_pinned_copies_stay_unless_their_eviction_is_asked_for(tiercache, data_set, cache):
    tiercache("warm", data_set, *cache, "--pin", "--dry-run")
    assert used(tiercache, cache) == 0
    pinned = tiercache("warm", data_set, *cache, "--pin", "--json").events[-1]
    assert tiercache("status", *cache, "--json").events[-1]["pinned_bytes"] == used(tiercache, cache) > 0
    assert tiercache("evict", "--all", *cache, "-y", "--json").events[-1]["copies"] == 0
    assert used(tiercache, cache) > 0
    evicted = tiercache("evict", data_set, *cache, "-y", "--json").events[-1]
    assert (evicted["copies"], evicted["pinned"]) == (0, pinned["objects"])
    assert f"; {pinned['objects']} pinned copies stayed" in tiercache("evict", data_set, *cache, "-y").out
    assert (
        tiercache("evict", data_set, *cache, "--pinned", "--dry-run", "--json").events[-1]["copies"]
        == pinned["objects"]
    )
    assert tiercache("evict", data_set, *cache, "--pinned", "-y", "--json").events[-1]["copies"] == pinned["objects"]
    assert used(tiercache, cache) == 0


def test_the_configured_cache_is_used(tiercache, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "configured"))
    tiercache("pack", photos, "memory://test-cli-configured")
    tiercache("warm", "memory://test-cli-configured")
    assert tiercache("status", "--json").events[-1]["path"] == str(tmp_path / "configured")
    assert "cache_size: not a size" in tiercache("status", "--cache-size", "x", code=2).err
    monkeypatch.setenv("TIERCACHE_CACHE_SIZE", "x")
    assert "TIERCACHE_CACHE_SIZE: cache_size: not a size" in tiercache("status", code=2).err
