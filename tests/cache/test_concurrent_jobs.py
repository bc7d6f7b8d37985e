"""Concurrent jobs under policies without plans: prefetched copies, leases, and the bytes fetched."""

from contextlib import ExitStack, closing

import numpy as np
import pytest

from tiercache.cache import evictor
from tiercache.cache.accounts import charge_bytes
from tiercache.cache.names import name_of_identity
from tiercache.cache.simulate import Trace, simulate
from tiercache.model import NEVER, ReadingPlan
from tiercache.waiting import wait_for

SHARD_BYTES = 40_000
CHARGE = charge_bytes(SHARD_BYTES)
MAP_BYTES = 4096


def put_shards(world, n):
    keys = [f"s{number:02}" for number in range(n)]
    for key in keys:
        world.put(key, SHARD_BYTES)
    return keys


def shards_cache(world, n_shards, **options):
    """A cache that has room for n_shards and what their maps take while they come."""
    return world.cache(n_shards * CHARGE + 4 * MAP_BYTES, **options)


def publish(world, cache, keys, then):
    """Let it be known that a job reads keys, one after another, and each again after `then` bytes of its clock."""
    names = [name_of_identity(world.identity(key)) for key in keys]
    rows = np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, 20)
    first = np.arange(len(keys), dtype=np.int64) * SHARD_BYTES
    plan = ReadingPlan("test", np.arange(len(keys)), first, first + SHARD_BYTES, np.asarray(then, np.int64))
    return world.store(cache).publish(rows, plan)


def prefetch(world, store, key):
    """Fetch ahead, to the end."""
    store.prefetch(key, world.identity(key))
    fetcher, name = store.cache._open().writing.fetcher, name_of_identity(world.identity(key))
    assert wait_for(lambda: not fetcher.is_fetching(name), 60)


def row_of(cache, world, key):
    writing = cache._open().writing
    writing.evictor.flush_uses()
    return next(row for row in writing.accounts.rows() if row.name == name_of_identity(world.identity(key)))


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_prefetched_copies_are_not_evicted_for_another_job(world, policy):
    first, *others = put_shards(world, 9)
    mine, yours = shards_cache(world, 4, policy=policy), shards_cache(world, 4, policy=policy)
    with closing(publish(world, yours, [others[-1], first], [NEVER, NEVER])) as plan:
        prefetch(world, world.store(yours), first)
        for key in others[:6]:
            world.fetch(world.store(mine), key)
        assert world.store(yours).is_cached(first, world.identity(first))
        plan.advance(2 * SHARD_BYTES)  # read, and not needed again
        for key in others[:6]:
            world.fetch(world.store(mine), key)
        assert not world.store(yours).is_cached(first, world.identity(first))


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_copies_prefetched_for_a_distant_use_can_be_evicted(world, policy):
    keys = put_shards(world, 12)
    cache = shards_cache(world, 4, policy=policy)
    store = world.store(cache)
    with closing(publish(world, cache, keys, [NEVER] * 12)):
        for key in keys[8:]:  # warmed, say
            prefetch(world, store, key)
        world.fetch(store, keys[2])
        assert cache.stats()["evicted"] > 0


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_copies_needed_soon_keep_at_most_their_share_of_the_cache(world, policy):
    *keys, more = put_shards(world, 9)
    cache = shards_cache(world, 8, policy=policy)
    store = world.store(cache)
    with ExitStack() as plans:
        for first in range(0, 8, 2):  # jobs that stand still, each before what was fetched ahead for it
            plans.enter_context(closing(publish(world, cache, keys[first : first + 2], [NEVER, NEVER])))
        for key in keys:
            prefetch(world, store, key)
        world.fetch(store, more)
        assert store.is_cached(more, world.identity(more))
        smaller = shards_cache(world, 4, policy=policy)
        stats = smaller.stats()
        assert 2 * CHARGE <= stats["bytes_used"] <= stats["limit_bytes"] == 4 * CHARGE + 4 * MAP_BYTES


def test_the_opening_of_a_prefetched_copy_is_not_a_second_use(world):
    (key,) = put_shards(world, 1)
    cache = shards_cache(world, 4, policy="s3fifo")
    prefetch(world, world.store(cache), key)
    world.fetch(world.store(cache), key)
    assert row_of(cache, world, key).freq == 0
    world.fetch(world.store(cache), key)
    assert row_of(cache, world, key).freq == 1


class Side:
    """A job that fetches some shards ahead of what it reads, by a cache of its own on the shared folder."""

    n_ahead = 3

    def __init__(self, world, keys, seed):
        self.world, self.keys = world, keys
        self.cache = shards_cache(world, len(keys) // 4, policy="s3fifo")
        self.store = world.store(self.cache)
        rng = np.random.default_rng(seed)
        self.epochs = [rng.permutation(len(keys)).tolist() for _ in range(3)]
        self.n_past = 0

    def read(self, epoch):
        """Reads the epoch; yields the number of each shard when it was read."""
        order, later = self.epochs[epoch], [*self.epochs, []][epoch + 1]
        then = [(len(order) + later.index(i)) * SHARD_BYTES if later else NEVER for i in order]
        with closing(publish(self.world, self.cache, [self.keys[i] for i in order], then)) as plan:
            for at, number in enumerate(order):
                for ahead in order[at : at + 1 + self.n_ahead]:
                    prefetch(self.world, self.store, self.keys[ahead])
                self.n_past += self.world.read(self.store, self.keys[number]) is None
                plan.advance((at + 1) * SHARD_BYTES)
                yield number


def test_two_prefetching_jobs_fetch_what_the_simulator_predicts(world):
    keys = put_shards(world, 48)
    sides = [Side(world, keys, seed) for seed in (1, 2)]
    read = [
        number
        for epoch in range(3)
        for pair in zip(*[side.read(epoch) for side in sides], strict=True)
        for number in pair
    ]
    fetched = world.n_reads() + sum(side.n_past for side in sides)
    trace = Trace.of(np.array(read), CHARGE, np.tile([0, 1], len(read) // 2))
    report = simulate(trace, "s3fifo", len(keys) // 4 * CHARGE)
    assert fetched == pytest.approx(report.misses, rel=0.05)


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_a_fully_leased_cache_refuses_in_three_rounds_without_trying_a_copy_twice(world, policy, monkeypatch):
    *keys, more = put_shards(world, 41)
    cache = shards_cache(world, 40, policy=policy)
    store = world.store(cache)
    for key in keys:
        world.fetch(store, key)
    looks, asked = [], []
    really_look, really_delete = evictor.Evictor._read_state, evictor.delete_copy
    with ExitStack() as leases:
        for key in keys:
            leases.enter_context(store.open_local(key, world.identity(key)))
        monkeypatch.setattr(evictor.Evictor, "_read_state", lambda *args: looks.append(1) or really_look(*args))
        monkeypatch.setattr(evictor, "delete_copy", lambda f, name: asked.append(name) or really_delete(f, name))
        assert not cache._open().writing.evictor.reserve(name_of_identity(world.identity(more)), CHARGE)
    assert len(asked) == len(set(asked)) == 40
    assert len(looks) <= 4, "one, 16, the rest, and that there is nobody left"


def test_a_leased_victim_moves_to_the_end_of_its_queue(world):
    keys = put_shards(world, 4)
    cache = shards_cache(world, 3, policy="s3fifo")
    store = world.store(cache)
    for key in keys[:3]:
        world.fetch(store, key)
    before = row_of(cache, world, keys[0])
    with store.open_local(keys[0], world.identity(keys[0])):
        cache._open().writing.evictor._uses.clear()
        world.fetch(store, keys[3])
    after = row_of(cache, world, keys[0])
    assert (after.main, after.freq) == (before.main, before.freq)
    assert after.turn > before.turn
