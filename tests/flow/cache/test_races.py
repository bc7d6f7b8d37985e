"""Concurrent threads and processes: one download if flock works, correct data in any case."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support.faults import Fault, FaultStore
from tests.support.stores import GateStore

from tiercache.cache import fetch
from tiercache.cache.folder import NameLock
from tiercache.errors import StoreError
from tiercache.model import ByteRange

N = 8


def test_all_threads_that_wait_for_a_failing_download_get_the_error(world):
    identity = world.put("a")
    # A thread that begins to wait after the first failure asks the store again: each such request fails too.
    gated = GateStore(FaultStore(world.inner, [Fault("read_into", times=N)]))
    store = world.cache().store(gated)
    whole = [ByteRange(0, 10_000)]
    leases = [store.open_local("a", identity) for _ in range(N)]

    def wait(lease):
        with lease, pytest.raises(StoreError, match="scripted") as caught:
            lease.wait(whole)
        return caught.value

    with ThreadPoolExecutor(N) as pool, gated.stop_at("before_read_into") as gate:
        errors = [pool.submit(wait, lease) for lease in leases]
        gate.wait_reached()
        gate.open()
        assert len({id(error.result()) for error in errors}) == N


def test_two_sessions_of_one_folder_download_once_if_flock_works(world):
    """As two processes would: flock is between open files, not processes."""
    identity = world.put("a")
    gated = GateStore(world.inner)
    stores = [world.cache().store(gated), world.cache().store(gated)]
    whole = [ByteRange(0, 10_000)]
    with gated.stop_at("before_read_into") as gate:
        first, second = (store.open_local("a", identity) for store in stores)
        first.prefetch(whole)
        gate.wait_reached()
        second.prefetch(whole)
        with pytest.raises(StoreError, match=f"waiting for process {os.getpid()}"):
            second.wait(whole, deadline_s=0.2)
        gate.open()
    for lease in (first, second):
        with lease:
            assert lease.wait(whole)
            assert os.pread(lease.fd, 10_000, 0) == world.data["a"]
    assert world.n_reads() == 1
    assert len(world.copies()) == 1
    assert world.caches[0].stats()["bytes_used"] == 16_384


def test_reads_during_evictions_return_correct_data(world):
    keys = [f"s{i}" for i in range(6)]
    for key in keys:
        world.put(key, 50_000)
    cache = world.cache("170KB", policy="lru")
    store = world.store(cache)

    def read(number):
        key = keys[number * 7 % len(keys)]
        found = world.read(store, key)
        return found is None or found == world.data[key]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(120)))
    cache.close()
    assert sum(path.stat().st_size for path in world.copies()) <= 170_000


def test_a_reader_reads_past_the_cache_if_the_holder_of_the_lock_never_ends(world, monkeypatch):
    from tiercache.cache.names import name_of_identity

    monkeypatch.setattr(fetch, "LOCK_WAIT_S", 0.05)
    identity = world.put("a")
    cache = world.cache()
    stuck = NameLock(world.root / "cache" / "locks" / name_of_identity(identity))
    assert stuck.try_acquire()
    store = world.store(cache)
    assert world.read(store, "a") is None
    stuck.release()
    world.fetch(store, "a")
