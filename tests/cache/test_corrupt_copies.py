"""Wrong copies: never served again, counted, and fetched again; and a crash in between."""

import errno
import os
from pathlib import Path

import pytest

from tiercache import crash_points
from tiercache.cache.folder import Folder

# From Python 3.12 on: what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def store(world):
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    return store


def damage_bit(path):
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def damage_cut(path):
    path.chmod(0o600)
    os.truncate(path, 4096)


@pytest.mark.parametrize("damage", [damage_bit, damage_cut])
def test_a_wrong_copy_is_never_served_again_is_counted_and_fetched_again(world, store, damage):
    damage(world.copy("a"))
    assert store.verify_copy("a", world.identity("a")) is True
    assert world.copies() == []
    world.fetch(store, "a")
    status = store.cache.status()
    assert (status["quarantined"], status["figures"]["quarantined"], status["reserved_bytes"]) == (1, 1, 0)
    assert world.n_reads() == 2


def test_a_right_copy_stays_where_it_is(world, store):
    assert store.verify_copy("a", world.identity("a")) is False
    assert (store.cache.stats()["quarantined"], world.n_reads()) == (0, 1)


def test_a_wrong_copy_is_pinned_again_when_it_is_fetched_again(world, store):
    cache = store.cache
    cache.pin(store, [("a", world.identity("a"))])
    world.damage("a")
    assert store.verify_copy("a", world.identity("a")) is True
    cache.close()
    assert cache.stats()["pinned_bytes"] == 0
    world.fetch(store, "a")
    (entry,) = cache.entries()
    assert entry.pinned
    assert cache.stats()["pinned_bytes"] == entry.n_bytes


def test_a_copy_that_cannot_be_read_is_removed_as_well(world, store, monkeypatch):
    really_read, copy = os.preadv, world.copy("a")

    def read(fd, buffers, offset):
        if os.fstat(fd).st_ino == inode:
            raise OSError(5, "input/output error")
        return really_read(fd, buffers, offset)

    inode = copy.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read)
        assert store.verify_copy("a", world.identity("a")) is True
    world.fetch(store, "a")
    assert store.cache.stats()["quarantined"] == 1


@pytest.mark.parametrize("call", ["open_copy", "lstat", "fstat"])
def test_a_wrong_copy_that_the_disk_does_not_let_us_look_at_is_served_no_more(world, store, monkeypatch, call):
    world.damage("a")
    place = Folder if call == "open_copy" else os
    really, copy = getattr(place, call), world.copy("a")
    failed = []

    def fail(*args, **options):
        is_ours = call == "open_copy" or (call == "lstat" and Path(args[0]) == copy) or call == "fstat"
        if is_ours and not failed:
            failed.append(args)
            raise OSError(errno.EIO, "broken disk")
        return really(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, call, fail)
        assert store.verify_copy("a", world.identity("a")) is True
    assert failed
    assert world.read(store, "a") in (None, world.data["a"])


def test_the_second_of_two_who_find_it_wrong_leaves_the_right_copy_alone(world, store):
    world.damage("a")
    writing = store.cache._open().writing
    fd = store.cache._open().folder.open_copy(world.copy("a").name)
    try:
        assert store.verify_copy("a", world.identity("a")) is True
        world.fetch(store, "a")
        name = world.copy("a").name
        assert writing.publisher.remove_corrupt(name, fd) is False
    finally:
        os.close(fd)
    assert world.copy("a").read_bytes() == world.data["a"]


def test_dying_with_the_wrong_copy_removed_leaves_nothing_that_needs_a_hand(world, store):
    identity = world.identity("a")
    world.damage("a")

    def die(point):
        if point == "corrupt.removed":
            os._exit(9)

    pid = os.fork()
    if pid == 0:
        try:
            crash_points.set_hook(die)
            child = world.store(world.cache())
            child.verify_copy("a", identity)
            world.fetch(child, "a")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    store.cache.close()
    store = world.store(world.cache())
    store.verify_copy("a", identity)
    world.fetch(store, "a")
    assert world.copy("a").read_bytes() == world.data["a"]
    assert store.cache.status()["reserved_bytes"] == 0
    assert store.cache.verify().is_right
