"""The size limit: space is reserved before bytes, never exceeded, and released."""

import errno

import pytest
from tests.support.stores import GateStore

from tiercache.cache import Cache
from tiercache.cache import eviction as evictor_module
from tiercache.cache.eviction import POLICIES
from tiercache.cache.folder import DiskSpace, NameLock
from tiercache.errors import StoreError
from tiercache.model import ByteRange
from tiercache.waiting import wait_for

# What 100,000 bytes take of the budget: 25 blocks, and one for the record; in part, one for the map too.
CHARGE = 26 * 4096
CHARGE_IN_PART = 27 * 4096


def test_space_is_reserved_before_the_first_byte(world):
    first, second = world.put("a", 100_000), world.put("b", 100_000)
    gated = GateStore(world.inner)
    cache = world.cache("150KB", policy="lru")
    store = cache.store(gated)
    with gated.stop_at("before_read_into", "a") as gate, store.open_local("a", first) as lease:
        lease.prefetch([ByteRange(0, 1)])
        gate.wait_reached()
        assert cache.status()["reserved_bytes"] == CHARGE_IN_PART
        assert store.open_local("b", second) is None
        gate.open()
        assert lease.wait([ByteRange(0, 1)])
    # Who waits has the bytes before they are booked.
    assert wait_for(lambda: cache.status()["reserved_bytes"] == 0, 60)


def test_the_cache_keeps_min_free_disk_space(world, monkeypatch):
    world.put("a", 100_000)
    store = world.store(world.cache(min_free="10%"))
    monkeypatch.setattr(evictor_module, "disk_space", lambda path: DiskSpace(190_000, 1_000_000, 1000))
    assert world.read(store, "a") is None
    monkeypatch.setattr(evictor_module, "disk_space", lambda path: DiskSpace(100_000 + CHARGE_IN_PART, 1_000_000, 1000))
    world.fetch(store, "a")


@pytest.mark.parametrize("policy", ["plan", "lru"])
def test_copies_are_evicted_for_new_ones_on_a_disk_without_inodes(world, monkeypatch, policy):
    store = world.store(world.cache("1MB", policy=policy))
    for key in "abcdef":
        world.put(key)
        world.fetch(store, key)

    def room_of_few_files(path):  # as on a disk that holds 18 files of ours
        return DiskSpace(1 << 40, 1 << 41, 18 - 2 * len(world.copies()))

    monkeypatch.setattr(evictor_module, "disk_space", room_of_few_files)
    for key in "gh":
        world.put(key)
        world.fetch(store, key)
    assert 3 <= len(world.copies()) <= 6, "some had to go, and not all"


def test_a_disk_without_free_inodes_is_not_called_full(world, monkeypatch):
    cache = world.cache()
    monkeypatch.setattr(evictor_module, "disk_space", lambda path: DiskSpace(1 << 40, 1 << 41, 3))
    with pytest.warns(RuntimeWarning, match="the disk has no free inodes: .*; delete files, or put the cache"):
        cache._session_or_none().disk_failed(OSError(errno.ENOSPC, "No space left on device"))


def test_the_smaller_limit_of_two_processes_applies_with_one_warning(world):
    for key in "abc":
        world.put(key, 100_000)
    large = world.cache("1MB", policy="lru")
    small = world.cache("250KB")
    store = world.store(large)
    for key in "abc":
        world.fetch(store, key)
    assert large.stats()["bytes_used"] <= 250_000
    with pytest.warns(RuntimeWarning, match="the smaller limit"):
        world.cache("2MB")
    assert large.stats()["limit_bytes"] == 250_000
    small.close()
    assert large.stats()["limit_bytes"] == 1_000_000
    world.fetch(store, "c")


def a_large_one_and_two(world):
    """A store whose cache has a, more than the others together, then b and c; and the identity of a."""
    store = world.store(world.cache("1MB", policy="lru"))
    for key, n_bytes in (("a", 200_000), ("b", 10_000), ("c", 10_000)):
        world.put(key, n_bytes)
        world.fetch(store, key)
    return store, world.identity("a")


@pytest.mark.parametrize("policy", POLICIES)
def test_opening_with_a_smaller_size_evicts_other_copies_than_leased_ones(world, policy):
    store, identity = a_large_one_and_two(world)
    with store.open_local("a", identity):
        cache = world.cache("100KB", policy=policy)
        assert {entry.source[-1] for entry in cache.entries()} == {"a"}


def test_shrinking_beside_another_eviction_takes_the_first_victims(world, monkeypatch):
    # What the other one is deleting looks as if it were read, and is on the books until he is done: going on to others
    # gave up a fifth of a cache that was to lose a tenth.
    monkeypatch.setattr(evictor_module, "SPACE_WAIT_S", 0.05)
    store, identity = a_large_one_and_two(world)
    other = NameLock(store.cache.path / "locks" / "room")
    assert other.try_acquire()
    with store.open_local("a", identity):
        cache = world.cache("100KB", policy="lru")
        assert {entry.source[-1] for entry in cache.entries()} == {"a", "b", "c"}
        other.release()
        cache = world.cache("99KB", policy="lru")
        assert {entry.source[-1] for entry in cache.entries()} == {"a"}


def test_warm_is_refused_before_a_byte_is_fetched_if_the_data_does_not_fit(world):
    pairs = [(key, world.put(key, 100_000)) for key in "abc"]
    cache = world.cache("250KB", policy="lru")
    with pytest.raises(StoreError, match=r"no space for 312\.0 KiB: 0 B of 244\.1 KiB are used") as caught:
        cache.warm(world.inner, pairs)
    assert caught.value.code == "CacheFull"
    assert world.n_reads() == 0


def test_warm_evicts_other_copies_but_no_requested_ones(world):
    cache = world.cache("250KB", policy="lru")
    pairs = {key: (key, world.put(key, 100_000)) for key in "abcd"}
    store = world.store(cache)
    world.fetch(store, "a")
    world.fetch(store, "b")
    cache.warm(store, [pairs["a"], pairs["c"]])
    assert {entry.source[-1] for entry in cache.entries()} == {"a", "c"}
    assert world.n_reads("a") == 1


def test_concurrent_evictions_do_not_refuse_each_other(world):
    cache = world.cache("450KB", policy="lru")
    store = world.store(cache)
    keys = [f"s{i}" for i in range(12)]
    for key in keys:
        world.put(key, 100_000)
    for first in (0, 4, 8, 0, 4, 8):
        wanted = [(key, world.identity(key)) for key in keys[first : first + 4]]
        assert cache.warm(store, wanted, jobs=4).n_fetched == 4


@pytest.mark.parametrize(
    "arguments",
    [
        *({"size": size} for size in ("huge", -1, "120%", 1 << 63)),
        *({"size": 1, "min_free": size} for size in ("x", "9999999999TB")),
        {"size": 1, "policy": "best"},
    ],
)
def test_invalid_arguments_are_errors(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"size|policy|negative|shared"):
        Cache(tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


def test_a_process_stopped_during_eviction_is_waited_for_once(world, monkeypatch):
    store = world.store(world.cache("250KB"))
    waits = []

    def wait(condition, deadline_s, **_):
        waits.append(deadline_s)
        return condition()

    monkeypatch.setattr(evictor_module, "wait_for", wait)
    stopped = NameLock(store.cache.path / "locks" / "room")
    assert stopped.try_acquire()
    for key in "abcde":
        world.put(key, 100_000)
        world.fetch(store, key)
    stopped.release()
    expected = [evictor_module.SPACE_WAIT_S, 0.0, 0.0]
    assert waits == expected
