"""A process that dies at each step of fetch and eviction: the next one needs no hand."""

import os

import pytest

from tiercache.cache.folder import Folder
from tiercache.catalog import Accounts
from tiercache.model import ByteRange
from tiercache.testing import Fault, FaultStore

# From Python 3.12 on: what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

FETCH_STEPS = [
    (Accounts, "reserve"),
    (Folder, "new_temp"),
    (Folder, "write_record"),
    (Folder, "publish"),
    (Accounts, "publish"),
]
EVICT_STEPS = [(Folder, "remove_copy"), (Folder, "_remove"), (Accounts, "remove")]


def die_at(monkeypatch, step, when):
    owner, name = step
    work = getattr(owner, name)

    def dying(*args, **kwargs):
        if when == "after":
            work(*args, **kwargs)
        os._exit(9)

    monkeypatch.setattr(owner, name, dying)


def in_dying_child(monkeypatch, step, when, work):
    pid = os.fork()
    if pid == 0:
        try:
            die_at(monkeypatch, step, when)
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def assert_clean(world, cache):
    """Files and books agree, and nothing is left over."""
    root = world.root / "cache"
    status = cache.status()
    assert world.temps() == []
    assert list((root / "locks").iterdir()) == []
    names = {path.name for path in (root / "copies").iterdir()}
    copies = {name for name in names if "." not in name}
    assert names - copies == {f"{name}.json" for name in copies}
    assert (status["bytes_used"], status["reserved_bytes"]) == (12_288 * len(copies), 0)
    assert len(list((root / "owners").iterdir())) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", FETCH_STEPS, ids=lambda step: step[1])
def test_dying_in_a_fetch_leaves_nothing_for_the_next_process(world, monkeypatch, step, when):
    identity = world.put("a")
    cache = world.cache()

    def fetch():
        with world.store(cache).open_local("a", identity) as lease:
            lease.wait([ByteRange(0, 1)])

    in_dying_child(monkeypatch, step, when, fetch)
    cache.close()
    assert_clean(world, cache)
    world.fetch(world.store(cache), "a")
    assert_clean(world, cache)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", FETCH_STEPS, ids=lambda step: step[1])
def test_dying_in_a_fetch_does_not_hinder_a_process_that_lives(world, monkeypatch, step, when):
    identity = world.put("a")
    cache = world.cache("25KB")

    def fetch():
        with world.store(cache).open_local("a", identity) as lease:
            lease.wait([ByteRange(0, 1)])

    in_dying_child(monkeypatch, step, when, fetch)
    world.put("b")
    for key in "ab":
        world.fetch(world.store(cache), key)
    assert world.temps() == []
    assert (cache.status()["bytes_used"], cache.status()["reserved_bytes"]) == (2 * 12_288, 0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", EVICT_STEPS, ids=lambda step: step[1])
def test_dying_in_an_eviction_leaves_nothing_for_the_next_process(world, monkeypatch, step, when):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    in_dying_child(monkeypatch, step, when, cache.evict)
    cache.close()
    assert_clean(world, cache)
    world.fetch(world.store(cache), "a")


def test_errors_of_the_source_leave_nothing_either(world):
    world.put("a")
    cache = world.cache()
    store = cache.store(FaultStore(world.inner, [Fault("read_into", times=2, retryable=False)]))
    with store.open_local("a", world.identity("a")) as lease, pytest.raises(Exception, match="scripted"):
        lease.wait([ByteRange(0, 1)])
    assert_clean(world, cache)
