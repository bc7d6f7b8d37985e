"""Concurrent jobs under policies without plans: prefetched copies, leases, and the bytes fetched."""

from contextlib import ExitStack, closing

import numpy as np
import pytest

from tiercache.cache import eviction
from tiercache.cache.accounts import charge_bytes
from tiercache.cache.names import name_of_identity
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


class Side:
    """A job that fetches some shards ahead of what it reads, by a cache of its own on the shared folder."""

    n_ahead = 3

    def __init__(self, world, keys, seed):
        self.world, self.keys = world, keys
        self.cache = shards_cache(world, len(keys) // 4, policy="lru")
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


@pytest.mark.parametrize("policy", ["lru"])
def test_a_fully_leased_cache_refuses_in_three_rounds_without_trying_a_copy_twice(world, policy, monkeypatch):
    *keys, more = put_shards(world, 41)
    cache = shards_cache(world, 40, policy=policy)
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
        assert not cache._open().writing.evictor.reserve(name_of_identity(world.identity(more)), CHARGE)
    assert len(asked) == len(set(asked)) == 40
    assert len(looks) <= 4, "one, 16, the rest, and that there is nobody left"
