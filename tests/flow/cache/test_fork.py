"""A forked child opens its own session; a pickled cache is the same cache."""

import fcntl
import os
import pickle

import pytest
from tests.support.forks import in_child
from tests.support.stores import GateStore

from tiercache.model import ByteRange

# From Python 3.12 on: what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

WHOLE = [ByteRange(0, 10_000)]


def test_a_forked_child_opens_its_own_session(world):
    for key in "abc":
        world.put(key)
    cache = world.cache(policy="lru")
    store = world.store(cache)
    world.fetch(store, "a")

    def work():
        world.fetch(store, "a")
        world.fetch(store, "b")
        assert cache.stats()["bytes_used"] == 2 * 16_384
        assert cache._open().pid == os.getpid()
        assert cache.evict(lambda entry: entry.source.endswith("b")) == 16_384

    assert in_child(work)
    world.fetch(store, "c")
    assert cache.stats()["bytes_used"] == 2 * 16_384
    assert {entry.source[-1] for entry in cache.entries()} == {"a", "c"}


def test_the_end_of_a_forked_child_leaves_the_parents_lease_locked(world):
    identity = world.put("a")
    cache = world.cache()
    store = world.store(cache)
    with store.open_local("a", identity) as lease:
        assert lease.wait(WHOLE)
        assert in_child(lease.close)
        freed = cache.evict()
        assert freed == 0
        assert os.pread(lease.fd, 10_000, 0) == world.data["a"]


def test_a_forked_child_has_its_own_lock_on_an_inherited_lease(world):
    identity = world.put("a")
    store = world.store()
    ready, go_on = os.pipe(), os.pipe()
    lease = store.open_local("a", identity)
    assert lease.wait(WHOLE)
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"x")
        os.read(go_on[0], 1)
        os._exit(0 if os.pread(lease.fd, 10_000, 0) == world.data["a"] else 1)
    lease.close()
    os.read(ready[0], 1)
    copy = os.open(world.copy("a"), os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(go_on[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for fd in (copy, *ready, *go_on):
        os.close(fd)


def test_a_fork_during_a_fetch_leaves_the_fetch_to_the_parent(world):
    identity = world.put("a")
    world.put("b")
    gated = GateStore(world.inner)
    cache = world.cache()
    store = cache.store(gated)
    with gated.stop_at("before_read_into") as gate, store.open_local("a", identity) as lease:
        lease.prefetch(WHOLE)
        gate.wait_reached()

        def work():
            assert lease.wait(WHOLE) is False
            assert lease.present(WHOLE) is False
            lease.close()
            world.fetch(cache.store(world.inner), "b")

        assert in_child(work)
        gate.open()
        assert lease.wait(WHOLE)
        assert os.pread(lease.fd, 10_000, 0) == world.data["a"]


def test_a_pickled_store_is_the_same_cache(world):
    world.put("a")
    cache = world.cache()
    plain = cache.store(world.folder)
    with plain.open_local("a") as lease:
        assert lease.wait(WHOLE)
    copy = pickle.loads(pickle.dumps(plain))
    (world.root / "source" / "a").touch()
    assert (copy.cache.path, repr(copy.cache)) == (cache.path, repr(cache))
    with copy.open_local("a", world.identity("a")) as lease:
        assert lease.wait(WHOLE)
    copy.cache.close()
