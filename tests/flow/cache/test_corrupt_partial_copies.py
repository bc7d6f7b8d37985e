"""Corrupt partial copies, copies without checksums inside, pins, and the trace of openings."""

from contextlib import suppress

import pytest
from tests.support.faults import Fault, FaultStore

from tiercache.errors import StoreError
from tiercache.model import ByteRange

UNIT = 4096
MIB = 1 << 20


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


@pytest.mark.parametrize("harm", ["rot", "cut"])
def test_a_pin_outlives_a_corrupt_copy(world, harm):
    """And holds what is fetched in its place, even after the folder was opened again."""
    identity = world.put("a")
    cache = world.cache()
    cache.pin(world.inner, [("a", identity)])
    copy = world.copy("a")
    copy.chmod(0o600)
    if harm == "rot":
        copy.write_bytes(bytes(10_000))
        assert world.store(cache).remove_if_corrupt("a", identity) is True
    else:
        copy.write_bytes(b"short")
        with world.store(cache).open_local("a", identity) as lease:  # (what is found is removed by who fetches it)
            lease.prefetch([ByteRange(0, 1)])
        source = FaultStore(world.inner, [Fault("read_into", times=2)])
        cache.close()
        with cache.store(source).open_local("a", identity) as lease, suppress(StoreError):
            lease.wait([ByteRange(0, 1)], deadline_s=30)
    cache.close()
    again = world.cache()
    world.fetch(world.store(again), "a")
    assert [entry.pinned for entry in again.entries()] == [True]
    assert again.unpin() == 1


def test_unpinning_all_copies_removes_pins_of_missing_copies(world):
    identity = world.put("a")
    cache = world.cache()
    cache.pin(world.inner, [("a", identity)])
    world.copy("a").chmod(0o600)
    world.copy("a").write_bytes(bytes(10_000))
    assert world.store(cache).remove_if_corrupt("a", identity) is True
    assert cache.unpin() == 0
    world.fetch(world.store(cache), "a")
    assert [entry.pinned for entry in cache.entries()] == [False]
