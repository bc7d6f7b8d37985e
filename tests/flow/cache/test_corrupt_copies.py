"""A corrupt copy, whole or partial, is never served again, is counted, and is fetched again; and verification."""

import json
import mmap
import os

import pytest
from tests.support.cache_world import turn

from tiercache.cache.many_copies import CopyState
from tiercache.model import ByteRange

UNIT = 4096
MIB = 1 << 20


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


@pytest.mark.parametrize("n_bytes", [10_000, UNIT])
def test_the_second_reader_of_a_corrupt_copy_does_not_remove_its_replacement(world, n_bytes):
    """Which is the same file where some of the copy was right."""
    identity = world.put("a", n_bytes)
    store = world.store()
    world.fetch(store, "a")
    turn(world.copy("a"), 3000)
    opened, spec = store.cache._open(), store.spec_of("a", identity)
    fd = opened.folder.open_copy(spec.name)
    try:
        assert store.remove_if_corrupt("a", identity) is True
        world.fetch(store, "a")
        assert opened.remove_damage(spec, fd) is False
    finally:
        os.close(fd)
    assert world.copy("a").read_bytes() == world.data["a"]


# -- only what is wrong is fetched again --

LARGE_BYTES = 8 * MIB + 1000
SECTION_BYTES = 9 * UNIT  # a 256th of the object, in whole units


def cut_to(path, n_bytes):
    path.chmod(0o600)
    os.truncate(path, n_bytes)
    path.chmod(0o400)


@pytest.mark.parametrize(
    ("damage", "found_by", "wrong_bytes"),
    [
        (lambda path: turn(path, 3 * MIB), "reader", SECTION_BYTES),
        (lambda path: turn(path, 3 * MIB), "verification", SECTION_BYTES),
        (lambda path: [turn(path, at) for at in (5, 6 * MIB)], "reader", 2 * SECTION_BYTES),
        (lambda path: turn(path, LARGE_BYTES - 1), "verification", SECTION_BYTES),
        (lambda path: cut_to(path, LARGE_BYTES - 70_000), "nobody", 70_000 + SECTION_BYTES),
        (lambda path: cut_to(path, LARGE_BYTES - 70_000), "verification", 70_000 + SECTION_BYTES),
    ],
    ids=["a block", "a block, verified", "two blocks", "the footer", "cut off", "cut off, verified"],
)
@pytest.mark.parametrize("has_identity", [True, False])
def test_warm_fetches_only_the_wrong_sections_of_a_corrupt_copy(world, damage, found_by, wrong_bytes, has_identity):
    identity = world.put("a", LARGE_BYTES) if has_identity else world.put("a", LARGE_BYTES) and None
    cache = world.cache("100MB")
    store = world.store(cache)
    cache.pin(store, [("a", identity)])
    whole_bytes = world.inner.bytes_read
    damage(world.copy("a"))
    if found_by == "reader":
        assert store.remove_if_corrupt("a", identity)
    elif found_by == "verification":
        assert cache.verify(repair=True).is_right
    cache.warm(store, [("a", identity)])
    assert 0 < world.inner.bytes_read - whole_bytes <= wrong_bytes
    assert world.copy("a").read_bytes() == world.data["a"]
    assert cache.verify().wrong == ()
    assert [entry.pinned for entry in cache.entries()] == [True]
    assert cache.stats()["quarantined"] == 1


def test_a_reader_that_has_the_corrupt_copy_open_sees_the_right_bytes_when_they_have_come(world):
    identity = world.put("a", LARGE_BYTES)
    store = world.store(world.cache("100MB"))
    world.fetch(store, "a")
    with store.open_local("a", identity) as lease, mmap.mmap(lease.fd, LARGE_BYTES, prot=mmap.PROT_READ) as mapped:
        turn(world.copy("a"), 3 * MIB)
        assert store.remove_if_corrupt("a", identity)
        world.fetch(store, "a")
        assert mapped[:] == world.data["a"]


def test_a_copy_whose_section_checksums_are_lost_is_fetched_whole(world):
    identity = world.put("a", LARGE_BYTES)
    store = world.store(world.cache("100MB"))
    world.fetch(store, "a")
    turn(world.copy("a"), 3 * MIB)
    record = world.copy("a").with_suffix(".json")
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"section_sums": facts["section_sums"][8:]}))
    assert store.remove_if_corrupt("a", identity)
    assert (world.copies(), world.parts()) == ([], [])
    world.fetch(store, "a")
    assert world.inner.bytes_read == 2 * LARGE_BYTES


# -- partial copies, and copies without checksums inside --


def wait(lease, *ranges):
    return lease.wait([ByteRange(*r) for r in ranges], deadline_s=30)


def test_a_partial_copy_that_a_reader_finds_corrupt_is_fetched_once_more_and_then_bypassed(world):
    identity = world.put("a", 4 * MIB)
    cache = world.cache("100MB")
    store = world.store(cache)

    def read():
        with store.open_local("a", identity) as lease:
            return wait(lease, (0, UNIT))

    assert read()
    assert store.remove_if_corrupt("a", identity) is True
    assert world.parts() == []
    assert read()
    assert store.remove_if_corrupt("a", identity) is False
    assert store.open_local("a", identity) is None
    assert cache.stats()["poisoned"] == 1


def test_a_partial_copy_damaged_on_disk_does_not_count_as_corrupt_at_its_source(world):
    identity = world.put("a", 4 * MIB)
    cache = world.cache("100MB")
    store = world.store(cache)
    for _ in range(3):
        with store.open_local("a", identity) as lease:
            assert wait(lease, (0, UNIT))
        (part,) = [path for path in world.parts() if path.suffix == ".part"]
        with part.open("r+b") as file:
            file.write(b"rot")
        assert store.remove_if_corrupt("a", identity) is True
    assert (cache.stats()["poisoned"], cache.stats()["quarantined"]) == (0, 3)


@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_without_checksums_inside_is_verified_by_its_unit_map(world, whole):
    n_bytes = 10_000 if whole else 4 * MIB
    world.put("a", n_bytes)
    cache = world.cache("100MB")
    store = world.store(cache)
    etag = store.head("a").etag
    with store.open_local("a") as lease:
        assert wait(lease, (5000, 9000))
    n_reads = world.n_reads()

    def read():
        data = bytearray(3000)
        store.read_into("a", [(ByteRange(5500, 8500), memoryview(data))], if_match=etag)
        return bytes(data) == world.data["a"][5500:8500]

    assert read()
    assert world.n_reads() == n_reads
    path = world.copy("a") if whole else next(p for p in world.parts() if p.suffix == ".part")
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(6000)
        file.write(b"rot")
    assert read()
    assert world.n_reads() == n_reads + 1
    assert world.copies() == []
    assert cache.stats()["quarantined"] == 1


def test_a_pin_outlives_a_corrupt_copy(world):
    """And holds what is fetched in its place, even after the folder was opened again."""
    identity = world.put("a", UNIT)
    cache = world.cache()
    cache.pin(world.inner, [("a", identity)])
    world.damage("a", at=0)
    assert world.store(cache).remove_if_corrupt("a", identity) is True
    cache.close()
    again = world.cache()
    world.fetch(world.store(again), "a")
    assert [entry.pinned for entry in again.entries()] == [True]
    assert again.unpin() == 1


def test_unpinning_all_copies_removes_pins_of_missing_copies(world):
    identity = world.put("a", UNIT)
    cache = world.cache()
    cache.pin(world.inner, [("a", identity)])
    world.damage("a", at=0)
    assert world.store(cache).remove_if_corrupt("a", identity) is True
    assert cache.unpin() == 0
    world.fetch(world.store(cache), "a")
    assert [entry.pinned for entry in cache.entries()] == [False]


# -- verification --


@pytest.fixture
def checked(world):
    store = world.store()
    for key in "abc":
        world.put(key)
        world.fetch(store, key)
    return store


def states(report):
    return {one.source.rpartition("/")[2]: one.state for one in report.checked}


@pytest.mark.parametrize("jobs", [1, 4])
def test_verify_accepts_correct_copies(world, checked, jobs):
    seen = []
    report = checked.cache.verify(jobs=jobs, on_progress=seen.append)
    assert report.is_right
    assert (len(report.checked), report.n_bytes, report.wrong) == (3, 30_000, ())
    assert seen == list(report.checked)


def test_verify_names_a_corrupt_copy_and_leaves_it_in_place(world, checked):
    turn(world.copy_of("b"), 7000)
    cut = world.copy_of("c")
    cut.chmod(0o600)
    os.truncate(cut, 5000)
    report = checked.cache.verify()
    assert states(report) == {"a": CopyState.OK, "b": CopyState.DAMAGED, "c": CopyState.DAMAGED}
    assert not report.is_right
    said = {one.source[-1]: one.where[0] for one in report.wrong}
    assert f"expected {world.identity('b').crc32c:08x}" in said["b"]
    assert said["c"] == "it has 5,000 bytes instead of 10,000"
    assert len(world.copies()) == 3


def test_a_copy_without_a_record_has_an_unknown_state(world, checked):
    path = world.copy_of("a")
    path.with_name(f"{path.name}.json").unlink()
    report = checked.cache.verify()
    assert [one.state for one in report.checked if not one.source] == [CopyState.UNKNOWN]
    assert report.is_right


def test_repair_removes_the_copy_and_the_next_reader_fetches_it(world, checked):
    turn(world.copy_of("b"), 7000)
    with pytest.raises(ValueError, match="jobs must be 1 or more"):
        checked.cache.verify(jobs=0)
    (one,) = checked.cache.verify(repair=True).wrong
    assert (one.removed, len(world.copies())) == (True, 2)
    assert checked.cache.stats()["quarantined"] == 1
    world.fetch(checked, "b")
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
