"""The public class: warm, pin, entries, stats, status, evict, and the default cache."""

import gc
import os
import threading
from dataclasses import replace

import pytest
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.stores import GateStore

from tiercache.cache import Cache
from tiercache.cache.folder import DiskSpace
from tiercache.errors import CorruptShard, NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.store.contract import WrapperStore
from tiercache.store.remote import cancel_calls_when


def pairs_of(world, n=5, n_bytes=10_000):
    return [(f"s{i}", world.put(f"s{i}", n_bytes)) for i in range(n)]


@pytest.mark.parametrize("jobs", [1, 3, 20])
def test_warm_fetches_missing_copies_and_reports_progress(world, jobs):
    pairs = pairs_of(world)
    cache = world.cache()
    world.fetch(world.store(cache), "s2")
    seen = []
    report = cache.warm(world.inner, [*pairs, pairs[0]], jobs=jobs, on_progress=seen.append)
    assert (report.n_wanted, report.n_fetched, report.bytes_fetched) == (5, 4, 40_000)
    assert [*dict.fromkeys(p.n_done for p in seen)] == [1, 2, 3, 4, 5]
    shown = [p.bytes_done for p in seen]
    assert (sorted(shown), shown[0], shown[-1]) == (shown, 10_000, 50_000)
    assert {p.last for p in seen} == {"", "s0", "s1", "s3", "s4"}
    assert cache.warm(world.inner, pairs).n_fetched == 0
    assert world.n_reads() == 5


def test_the_progress_of_warm_advances_while_a_copy_is_fetched(world):
    identity, has_advanced = world.put("a", 4 << 20), threading.Event()

    class Slow(WrapperStore):
        def read_pieces(self, key, ranges, receive, **options):
            for span in ranges:
                data = memoryview(world.data[key])[span.start : span.end]
                half = span.n_bytes // 2
                receive(span.start, data[:half])
                assert has_advanced.wait(60)
                receive(span.start + half, data[half:])

    seen = []

    def see(progress):
        seen.append((progress.n_done, progress.bytes_done))
        if progress.bytes_done:
            has_advanced.set()

    world.cache("100MB").warm(Slow(world.inner), [("a", identity)], on_progress=see)
    assert (seen[0], seen[-1]) == ((0, 0), (1, 4 << 20))
    assert (0, 2 << 20) in seen


def test_warm_raises_for_missing_and_corrupt_objects(world):
    pairs = pairs_of(world)
    with pytest.raises(CorruptShard):
        world.cache().warm(FaultStore(world.inner, [Fault("read_into", kind=FaultKind.BIT_FLIP, times=9)]), pairs)
    (world.root / "source" / "s3").unlink()
    with pytest.raises(NotFound):
        world.cache().warm(world.inner, pairs)


def test_an_interrupted_warm_cancels_its_fetches_and_leaves_no_thread(world):
    pairs = pairs_of(world)
    gated = GateStore(world.inner)

    def interrupt(progress):
        if progress.n_done:
            gate.open()
            raise KeyboardInterrupt

    with gated.stop_at("before_read_into", "s4") as gate, pytest.raises(KeyboardInterrupt):
        world.cache().warm(gated, pairs, jobs=2, on_progress=interrupt)
    assert not [t for t in threading.enumerate() if t.name.startswith("tiercache")]
    assert world.parts() == []
    assert world.cache().warm(world.inner, pairs).n_wanted == 5


def test_warm_checks_at_the_end_that_every_copy_is_present(world):
    pairs = pairs_of(world)

    def delete_one(progress):
        if progress.n_done == 5:
            world.copies()[0].unlink()

    with pytest.raises(StoreError, match="1 of 5 copies are missing"):
        world.cache().warm(world.inner, pairs, on_progress=delete_one)


def test_pin_fetches_copies_and_protects_them_from_eviction(world):
    pairs = pairs_of(world, 2)
    cache = world.cache()
    assert cache.pin(world.inner, pairs[:1]).n_fetched == 1
    assert cache.pin(world.inner, pairs[:1]).n_fetched == 0
    assert [entry.pinned for entry in cache.entries()] == [True]
    cache.close()
    assert [entry.pinned for entry in cache.entries()] == [True]
    assert cache.unpin(lambda entry: False) == 0
    assert cache.unpin() == 1


def test_stats_has_the_documented_keys(world):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    stats = cache.stats()
    assert stats == {
        "bytes_used": 16_384,
        "limit_bytes": 10_000_000,
        "pinned_bytes": 0,
        "evicted": 0,
        "bytes_fetched": 10_000,
        "bytes_hit": 0,
        "bytes_missed": 10_000,
        "quarantined": 0,
        "poisoned": 0,
    }
    status = cache.status()
    assert (status["path"], status["policy"], status["n_copies"]) == (str(world.root / "cache"), "plan", 1)


def test_a_thread_whose_work_is_not_needed_any_more_does_not_open_a_closed_cache_again(world):
    identity, cache, unwanted = world.put("a"), world.cache(), threading.Event()
    store = world.store(cache)
    world.fetch(store, "a")
    with cancel_calls_when(unwanted):
        unwanted.set()
        store.open_local("a", identity).close()  # the cache is open
        cache.close()
        with pytest.raises(StoreError, match="the cache was closed"):
            store.open_local("a", identity)
        assert list((world.root / "cache" / "owners").iterdir()) == []
    store.open_local("a", identity).close()


def test_a_closed_cache_opens_again_when_used_and_its_leases_stay_valid(world):
    identity = world.put("a")
    cache = world.cache()
    store = world.store(cache)
    with store.open_local("a", identity) as lease:
        assert lease.wait([ByteRange(0, 10_000)])
        cache.close()
        cache.close()
        assert os.pread(lease.fd, 10_000, 0) == world.data["a"]
    assert list((world.root / "cache" / "owners").iterdir()) == []
    world.fetch(store, "a")
    assert world.n_reads() == 1


def test_a_cache_without_references_closes_itself(world):
    cache = Cache(world.root / "cache", size="1MB", min_free=0)
    owners = world.root / "cache" / "owners"
    assert len(list(owners.iterdir())) == 1
    del cache
    gc.collect()
    assert list(owners.iterdir()) == []


def test_the_default_cache_uses_the_configured_folder_and_size(world, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(world.root / "mine"))
    monkeypatch.setenv("TIERCACHE_CACHE_SIZE", "123KB")
    cache = Cache.default()
    assert (cache.path, cache.stats()["limit_bytes"]) == (world.root / "mine", 123_000)
    assert Cache.default() is cache
    other = Cache.default(path=world.root / "other", size="5KB")
    assert (other.path, other.stats()["limit_bytes"]) == (world.root / "other", 5_000)


def test_the_default_size_is_half_of_the_disk_space_that_was_free_at_creation(world, monkeypatch):
    from tiercache.cache import cache as cache_module

    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(world.root / "mine"))
    monkeypatch.delenv("TIERCACHE_CACHE_SIZE")
    monkeypatch.setattr(cache_module, "disk_space", lambda path: DiskSpace(1_000_000, 2_000_000, None))
    cache = Cache.default()
    assert cache.stats()["limit_bytes"] == 500_000
    cache.close()
    del cache
    gc.collect()
    monkeypatch.setattr(cache_module, "disk_space", lambda path: DiskSpace(10, 2_000_000, None))
    assert Cache.default().stats()["limit_bytes"] == 500_000


def test_warming_cached_copies_needs_no_space(world):
    pairs = pairs_of(world)
    cache = world.cache()
    cache.warm(world.inner, pairs)
    cache.close()
    full = world.cache(min_free="100%")
    assert full.warm(world.inner, pairs).n_fetched == 0
    assert full.pin(world.inner, pairs).n_fetched == 0


def test_status_sums_the_counters_of_all_processes(world):
    world.put("a")
    first, second = world.cache(), world.cache()
    for cache in (first, second, second):
        world.fetch(world.store(cache), "a")
    first.close()
    status = second.status()
    figures = [status["figures"][name] for name in ("bytes_hit", "bytes_missed", "bytes_fetched")]
    assert (figures, status["hit_ratio"]) == ([20_000, 10_000, 10_000], 2 / 3)
    assert (status["bytes_hit"], status["bytes_missed"]) == (20_000, 0), "of this process"
    assert world.cache(name="new").status()["hit_ratio"] is None


def test_a_new_reader_of_a_data_set_changes_no_figures_of_other_data_sets(world):
    store = world.store()
    world.put("a")
    mine = world.identity("a")
    other = replace(mine, dataset_id="e" * 32)
    everything = [ByteRange(0, mine.n_bytes)]
    with store.open_local("a", mine) as lease, store.open_local("a", other) as other_lease:
        assert lease.wait(everything)
        assert other_lease.wait(everything)
        store.forget_unread(mine.dataset_id)
        assert lease.note_read(mine.n_bytes, lambda: everything) == 0
        assert other_lease.note_read(mine.n_bytes, lambda: everything) == mine.n_bytes
