"""Random sequences of everything that can happen to a cache, against a dict; locks and clocks that fail."""

import fcntl

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from tests.support.cache_machine import CacheMachine
from tests.support.clock import JumpingClock

from tiercache.cache import fetch

# From Python 3.12 on: a crash is a forked child's.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=6, stateful_step_count=20)


@pytest.mark.stress
@pytest.mark.timeout(3000)
def test_long_sequences_of_operations_keep_the_cache_correct():
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=600, stateful_step_count=60))


# -- locks that are never free, and clocks that jump -------------------------------------------------------------------


def refuse(fd, operation):
    raise BlockingIOError


def test_locks_that_are_never_free_only_delay_reads(world, monkeypatch):
    monkeypatch.setattr(fetch, "LOCK_WAIT_S", 0.05)
    monkeypatch.setattr(fetch, "SLOWEST_BYTES_S", 1e12)
    monkeypatch.setattr("tiercache.cache.eviction.SPACE_WAIT_S", 0.05)
    monkeypatch.setattr("tiercache.store.shared_files.BUSY_S", 0.05)
    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = world.cache("40KB", policy="lru")
    store = world.store(cache)
    for key in "abcab":
        world.put(key)
        data = world.read(store, key)
        assert data in (None, world.data[key])
    assert cache.status()["bytes_used"] <= 40_000


@pytest.mark.parametrize("forward_s", [-1e9, 1e9])
def test_a_jumping_clock_changes_neither_data_nor_copies(world, forward_s):
    cache = world.cache()
    store = world.store(cache)
    with JumpingClock() as clock:
        world.put("a")
        world.fetch(store, "a")
        clock.jump(forward_s)
        world.put("b")
        for key in "ab":
            world.fetch(store, key)
        cache.close()
        for key in "ab":
            world.fetch(store, key)
    assert world.n_reads() == 2
