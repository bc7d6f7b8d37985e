"""Verification of copies against their records, and repair."""

import os
from contextlib import closing

import numpy as np
import pytest
from tests.cache.conftest import turn
from tests.support.faults import Fault, FaultKind, FaultStore

import tiercache as tc
from tiercache.cache.check import CopyState
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
    assert [(p.n_done, p.n_all) for p in seen] == [(1, 3), (2, 3), (3, 3)]


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


def test_repair_removes_a_corrupt_copy_and_fetches_it_from_the_store(world, store):
    turn(world.copy_of("b"), 7000)
    turn(world.copy_of("c"), 10)
    report = store.cache.verify(repair=True, store=world.inner)
    assert report.is_right
    assert all(one.repaired for one in report.wrong)
    assert {p.read_bytes() for p in world.copies()} == set(world.data.values())
    assert store.cache.stats()["quarantined"] == 2
    assert store.cache.verify().wrong == ()


def test_repair_without_a_store_only_removes_the_copy(world, store):
    turn(world.copy_of("b"), 7000)
    (one,) = store.cache.verify(repair=True).wrong
    assert (one.removed, one.repaired, len(world.copies())) == (True, False, 2)
    world.fetch(store, "b")
    assert len(world.copies()) == 3


def test_verify_reports_a_copy_that_cannot_be_fetched_again(world, store):
    turn(world.copy_of("b"), 7000)
    (world.root / "source" / "b").unlink()
    (one,) = store.cache.verify(repair=True, store=world.inner).wrong
    assert (one.removed, one.repaired) == (True, False)
    assert "could not be fetched again" in one.where[-1]
    turn(world.copy_of("c"), 7000)
    (one,) = store.cache.verify(repair=True, store=tc.store.MemoryStore("other")).wrong
    assert "another store" in one.where[-1]


def test_verify_reports_an_object_that_is_corrupt_at_its_source(world, store):
    turn(world.copy_of("b"), 7000)
    bad = FaultStore(world.inner, [Fault("read_into", kind=FaultKind.BIT_FLIP, times=9)])
    (one,) = store.cache.verify(repair=True, store=bad).wrong
    assert (one.removed, one.repaired) == (True, False)
    assert "at its source" in one.where[-1]


def test_an_object_without_identity_is_repaired_unless_it_has_changed(world):
    world.put("a")
    world.put("b")
    store = world.store()
    for key in "ab":
        with store.open_local(key) as lease:
            assert lease.wait([ByteRange(0, 10_000)])
    turn(world.copy_of("a"), 1)
    turn(world.copy_of("b"), 1)
    (world.root / "source" / "b").write_bytes(b"new")
    found = {one.source[-1]: one for one in store.cache.verify(repair=True, store=world.inner).wrong}
    assert found["a"].repaired
    assert not found["b"].repaired
    assert "changed at its source" in found["b"].where[-1]


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


def test_verify_names_the_damaged_block_of_a_shard(world, tmp_path):
    with tc.Writer(tmp_path / "set", shard_size="64KB", block_size="16KB", compression="none") as writer:
        writer.write_batch({"id": np.arange(20_000), "x": np.random.default_rng(0).random(20_000)})
    cache = world.cache()
    with closing(tc.Dataset(str(tmp_path / "set"), cache=cache)) as dataset:
        dataset.warm()
    path = max(world.copies(), key=lambda p: p.stat().st_size)
    turn(path, 20_000)
    (one,) = cache.verify().wrong
    assert any("block" in text for text in one.where[1:]), one.where


def test_invalid_arguments_are_errors(world, store):
    with pytest.raises(ValueError, match="jobs must be 1 or more"):
        store.cache.verify(jobs=0)
    with pytest.raises(ValueError, match="repair=True"):
        store.cache.verify(store=world.inner)
