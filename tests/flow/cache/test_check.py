"""Verification of copies against their records, and repair."""

import os

import pytest
from tests.support.cache_world import turn

from tiercache.cache.many_copies import CopyState
from tiercache.model import ByteRange


@pytest.fixture
def store(world):
    store = world.store()
    for key in "abc":
        world.put(key)
        world.fetch(store, key)
    return store


def states(report):
    return {one.source.rpartition("/")[2]: one.state for one in report.checked}


@pytest.mark.parametrize("jobs", [1, 4])
def test_verify_accepts_correct_copies(world, store, jobs):
    seen = []
    report = store.cache.verify(jobs=jobs, on_progress=seen.append)
    assert report.is_right
    assert (len(report.checked), report.n_bytes, report.wrong) == (3, 30_000, ())
    assert seen == list(report.checked)


def test_verify_names_a_corrupt_copy_and_leaves_it_in_place(world, store):
    turn(world.copy_of("b"), 7000)
    cut = world.copy_of("c")
    cut.chmod(0o600)
    os.truncate(cut, 5000)
    report = store.cache.verify()
    assert states(report) == {"a": CopyState.OK, "b": CopyState.DAMAGED, "c": CopyState.DAMAGED}
    assert not report.is_right
    said = {one.source[-1]: one.where[0] for one in report.wrong}
    assert f"expected {world.identity('b').crc32c:08x}" in said["b"]
    assert said["c"] == "it has 5,000 bytes instead of 10,000"
    assert len(world.copies()) == 3


def test_an_unreadable_copy_is_reported_differently_from_a_damaged_one(world, store, monkeypatch):
    really_read, inode = os.preadv, world.copy_of("b").stat().st_ino

    def read(fd, buffers, offset):
        if os.fstat(fd).st_ino == inode:
            raise OSError(5, "input/output error")
        return really_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    (one,) = store.cache.verify().wrong
    assert (one.state, one.where) == (CopyState.UNREADABLE, ("it cannot be read at offset 0",))


def test_a_copy_without_a_record_has_an_unknown_state(world, store):
    path = world.copy_of("a")
    path.with_name(f"{path.name}.json").unlink()
    report = store.cache.verify()
    assert [one.state for one in report.checked if not one.source] == [CopyState.UNKNOWN]
    assert report.is_right


def test_repair_removes_the_copy_and_the_next_reader_fetches_it(world, store):
    turn(world.copy_of("b"), 7000)
    (one,) = store.cache.verify(repair=True).wrong
    assert (one.removed, len(world.copies())) == (True, 2)
    assert store.cache.stats()["quarantined"] == 1
    world.fetch(store, "b")
    assert len(world.copies()) == 3


def test_verify_checks_each_unit_of_a_partial_copy(world):
    n_bytes = 4 << 20
    world.put("a", n_bytes)
    store = world.store()
    with store.open_local("a", world.identity("a")) as lease:
        assert lease.wait([ByteRange(0, 9000), ByteRange(1 << 20, (1 << 20) + 5)])
    store.cache.close()
    (one,) = store.cache.verify().checked
    assert (one.state, one.in_part, one.n_bytes) == (CopyState.OK, True, 4 * 4096)
    (part,) = (p for p in world.parts() if p.suffix == ".part")
    turn(part, (1 << 20) + 3)
    (one,) = store.cache.verify().wrong
    assert one.where == (f"1 units are damaged, the first at offset {1 << 20}",)
    (one,) = store.cache.verify(repair=True).wrong
    assert (one.removed, world.parts()) == (True, [])
    assert store.cache.stats()["bytes_used"] == 0
    world.fetch(store, "a")


def test_invalid_arguments_are_errors(world, store):
    with pytest.raises(ValueError, match="jobs must be 1 or more"):
        store.cache.verify(jobs=0)
