"""A corrupt copy is never served again, is counted, and is fetched again."""

import errno
import os
from pathlib import Path

import pytest

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
def test_a_corrupt_copy_is_removed_counted_and_fetched_again(world, store, damage):
    damage(world.copy("a"))
    assert store.remove_if_corrupt("a", world.identity("a")) is True
    assert world.copies() == []
    world.fetch(store, "a")
    status = store.cache.status()
    assert (status["quarantined"], status["figures"]["quarantined"], status["reserved_bytes"]) == (1, 1, 0)
    assert world.n_reads() == 2


def test_a_correct_copy_that_a_reader_doubts_stays(world, store):
    assert store.remove_if_corrupt("a", world.identity("a")) is False
    assert (store.cache.stats()["quarantined"], world.n_reads()) == (0, 1)


def test_an_unreadable_copy_is_removed(world, store, monkeypatch):
    really_read, copy = os.preadv, world.copy("a")

    def read(fd, buffers, offset):
        if os.fstat(fd).st_ino == inode:
            raise OSError(5, "input/output error")
        return really_read(fd, buffers, offset)

    inode = copy.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read)
        assert store.remove_if_corrupt("a", world.identity("a")) is True
    world.fetch(store, "a")
    assert store.cache.stats()["quarantined"] == 1


@pytest.mark.parametrize("call", ["open_copy", "lstat", "fstat"])
def test_a_corrupt_copy_that_the_disk_does_not_let_us_check_is_not_served(world, store, monkeypatch, call):
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
        assert store.remove_if_corrupt("a", world.identity("a")) is True
    assert failed
    assert world.read(store, "a") in (None, world.data["a"])


def test_the_second_reader_of_a_corrupt_copy_does_not_remove_its_replacement(world, store):
    world.damage("a")
    writing = store.cache._open()
    fd = store.cache._open().folder.open_copy(world.copy("a").name)
    try:
        assert store.remove_if_corrupt("a", world.identity("a")) is True
        world.fetch(store, "a")
        name = world.copy("a").name
        assert writing.remove_corrupt(name, fd) is False
    finally:
        os.close(fd)
    assert world.copy("a").read_bytes() == world.data["a"]
