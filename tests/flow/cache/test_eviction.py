"""Which copies are evicted, and which never are."""

from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from tiercache.cache import eviction
from tiercache.cache.eviction import Trace, simulate
from tiercache.cache.folder import charge_bytes
from tiercache.cache.names import name_of_identity
from tiercache.model import ByteRange, ReadingPlan

WHOLE = [ByteRange(0, 10_000)]


def test_a_copy_unlinked_before_it_was_locked_is_a_miss(world, monkeypatch):
    """The evictor comes between open() and flock(): the reader must not keep a file that nobody counts."""
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    folder = store.cache._open().folder
    really_open = folder.open_copy

    def open_and_lose(name):
        fd = really_open(name)
        if fd is not None:
            Path(folder.copy_path(name)).unlink()
        return fd

    monkeypatch.setattr(folder, "open_copy", open_and_lose)
    with store.open_local("a", world.identity("a")) as lease:
        assert lease.fd == -1


# -- by plan -----------------------------------------------------------------------------------------------------------

SHARD_BYTES = 40_000
CHARGE = charge_bytes(SHARD_BYTES)


def name_rows(world, keys):
    names = [name_of_identity(world.identity(key)) for key in keys]
    return np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, 20)


def put_shards(world, keys):
    for key in keys:
        world.put(key, SHARD_BYTES)


def publish(world, cache, uses):
    """A plan: by key (first, last, then)."""
    first, last, then = (np.array(column, np.int64) for column in zip(*uses.values(), strict=True))
    return world.store(cache).publish_plan(
        name_rows(world, uses), ReadingPlan("test", np.arange(len(uses)), first, last, then)
    )


def cached(cache):
    return {entry.source[-1] for entry in cache.entries()}


def shards_cache(world, n_shards, **options):
    """A cache that has room for n_shards and what their maps take while they come."""
    return world.cache(n_shards * CHARGE + 3 * 4096, **options)


def test_plan_evicts_the_copy_that_is_needed_last(world):
    put_shards(world, "abcd")
    cache = shards_cache(world, 3)
    store = world.store(cache)
    with closing(publish(world, cache, {"a": (0, 1, 30), "b": (1, 2, 90), "c": (2, 3, 60), "d": (3, 4, 50)})) as plan:
        for clock, key in enumerate("abc", start=1):
            world.fetch(store, key)
            plan.advance(clock)
        world.fetch(store, "d")
        assert cached(cache) == {"a", "c", "d"}


def test_two_processes_keep_the_copies_that_the_other_needs_soon(world):
    put_shards(world, "abc")
    mine, yours = shards_cache(world, 2), shards_cache(world, 2)
    with closing(publish(world, yours, {"a": (5, 6, 7), "b": (500, 501, 502)})):
        for key in "ab":
            world.fetch(world.store(yours), key)
        with closing(publish(world, mine, {"c": (0, 1, 100)})):
            world.fetch(world.store(mine), "c")
        assert cached(mine) == {"a", "c"}


# -- by queues ---------------------------------------------------------------------------------------------------------


def test_lru_frees_a_hundredth_of_the_cache_at_once(world):
    n_small = 120
    for i in range(n_small + 1):
        world.put(f"s{i:03}", 4096)
    cache = world.cache(n_small * 8192 + 4096, policy="lru")
    store = world.store(cache)
    for i in range(n_small + 1):
        world.fetch(store, f"s{i:03}")
    assert 2 <= cache.stats()["evicted"] <= 4


def test_the_next_copy_is_evicted_if_the_first_is_leased(world):
    put_shards(world, "abcd")
    for policy in ("lru", "plan"):
        cache = shards_cache(world, 3, name=policy, policy=policy)
        store = world.store(cache)
        for key in "abc":
            world.fetch(store, key)
        with store.open_local("a", world.identity("a")) as lease:
            assert lease.wait([ByteRange(0, SHARD_BYTES)])
            cache._open().evictor._uses.clear()
            world.fetch(store, "d")
        assert cached(cache) == {"a", "c", "d"}


def test_a_copy_pinned_by_another_process_is_not_evicted(world):
    put_shards(world, "abcd")
    mine, yours = shards_cache(world, 3, policy="lru"), shards_cache(world, 3, policy="lru")
    store = world.store(mine)
    for key in "abc":
        world.fetch(store, key)
    mine._open().evictor._pinned()
    yours.pin(world.store(yours), [("a", world.identity("a"))])
    mine._open().evictor._uses.clear()
    world.fetch(store, "d")
    assert "a" in cached(mine)
    yours.unpin()
    for key in "bc":
        world.fetch(store, key)
    world.fetch(store, "d")
    assert "a" not in cached(mine)


def test_the_cache_has_the_hits_that_the_simulator_predicts(world, monkeypatch):
    monkeypatch.setattr(eviction, "WATERMARK_SHARE", 0.0)
    keys = [f"k{i:02}" for i in range(40)]
    for key in keys:
        world.put(key, 4096)
    order = np.random.default_rng(5).zipf(1.3, 150) % 40
    sizes = np.full(len(order), 8192)
    size = 20 * 8192 + 4096  # and the map of one that comes
    cache = world.cache(size, policy="lru")
    store = world.store(cache)
    hits = []
    for i in order.tolist():
        before = cache.counters["bytes_hit"]
        world.read(store, keys[i])
        hits.append(cache.counters["bytes_hit"] > before)
        cache._open().evictor.flush_uses()  # not in batches: the simulator knows the order of every use
    expected = simulate(Trace(order, sizes, order * 0, order * 0), "lru", size) > 0
    assert hits == expected.tolist()


def test_a_fully_leased_cache_refuses_in_three_rounds_without_trying_a_copy_twice(world, monkeypatch):
    *keys, more = [f"s{number:02}" for number in range(41)]
    put_shards(world, [*keys, more])
    cache = shards_cache(world, 40, policy="lru")
    store = world.store(cache)
    for key in keys:
        world.fetch(store, key)
    looks, asked = [], []
    really_look, really_delete = eviction.Evictor._read_state, eviction.delete_copy
    with ExitStack() as leases:
        for key in keys:
            leases.enter_context(store.open_local(key, world.identity(key)))
        monkeypatch.setattr(eviction.Evictor, "_read_state", lambda *args: looks.append(1) or really_look(*args))
        monkeypatch.setattr(eviction, "delete_copy", lambda f, name: asked.append(name) or really_delete(f, name))
        charge = charge_bytes(SHARD_BYTES)
        assert not cache._open().evictor.reserve(name_of_identity(world.identity(more)), charge)
    assert len(asked) == len(set(asked)) == 40
    assert len(looks) <= 4, "one, 16, the rest, and that there is nobody left"
