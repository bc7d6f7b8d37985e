"""Partial copies: all processes use the units that are present, and a missing unit is fetched once."""

import errno
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support.faults import Fault, FaultStore
from tests.support.folder_check import allocated_bytes
from tests.support.stores import GateStore

import tiercache as tc
from tiercache.cache import copy_file
from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store import LocalFolder
from tiercache.store.contract import WrapperStore

UNIT = 4096
MIB = 1 << 20


def wait(lease, *ranges):
    return lease.wait([ByteRange(*r) for r in ranges], deadline_s=30)


def let_end(cache):
    """Wait until nothing is being fetched: a reader goes on before its part is on the books."""
    while cache._open()._fetches:
        pass


def test_only_requested_units_are_fetched_reserved_and_kept(world):
    identity = world.put("a", 4 * MIB)
    cache = world.cache("100MB")
    with world.store(cache).open_local("a", identity) as lease:
        assert wait(lease, (MIB, MIB + 1), (3 * MIB, 3 * MIB + UNIT))
        assert not lease.present([ByteRange(0, 1)])
        assert lease.present([ByteRange(MIB, MIB + UNIT)])
        let_end(cache)
        assert os.pread(lease.fd, 10, MIB) == world.data["a"][MIB : MIB + 10]
    cache.close()
    assert cache.stats()["bytes_fetched"] == 2 * UNIT
    assert cache.stats()["bytes_used"] <= 2 * UNIT + 4 * UNIT  # two of the map, one for the record
    with world.store(cache).open_local("a", identity) as lease:
        assert wait(lease, (MIB, MIB + UNIT))


def test_a_copy_written_in_pieces_is_charged_with_its_extent_block(world):
    identity = world.put("a", MIB)
    cache = world.cache("100MB")
    with world.store(cache).open_local("a", identity) as lease:
        for start in range(0, 32 * UNIT, 2 * UNIT):
            assert wait(lease, (start, start + UNIT))
            os.fdatasync(lease.fd)  # as the kernel does by itself when memory is short
        assert wait(lease, (0, MIB))
        let_end(cache)
    (copy,) = world.copies()
    if copy.stat().st_blocks * 512 == MIB:
        pytest.skip("this file system lists them elsewhere")
    assert cache.stats()["bytes_used"] >= allocated_bytes(cache.path / "copies")
    cache._open().accounts.reconcile()
    assert cache.stats()["bytes_used"] == allocated_bytes(cache.path / "copies")


def test_a_reader_waits_for_its_own_bytes_only(world):
    identity = world.put("a", 20 * MIB)
    gated = GateStore(world.inner)
    store = world.cache("100MB").store(gated)
    gates = [gated.stop_at("before_read_into") for _ in range(3)]
    with store.open_local("a", identity) as whole, store.open_local("a", identity) as tail:
        whole.prefetch([ByteRange(0, 20 * MIB)])
        for gate in gates:
            gate.wait_reached()
        # Three of three pieces are held up; the reader of the last bytes is served as soon as the third goes on.
        gates[2].open()
        late = [g for g in gates if g is not gates[2]]
        done = ThreadPoolExecutor(1)
        ranges = [(0, 1), (8 * MIB, 8 * MIB + 1), (20 * MIB - 1, 20 * MIB)]
        assert any(done.submit(lambda r=r: try_wait(tail, r)).result() for r in ranges)
        assert not whole.present([ByteRange(0, 20 * MIB)])
        for gate in late:
            gate.open()
        assert wait(whole, (0, 20 * MIB))
        done.shutdown()
    assert len(world.copies()) == 1


def try_wait(lease, wanted):
    try:
        return lease.wait([ByteRange(*wanted)], deadline_s=0.5)
    except StoreError:
        return False


def test_awaited_units_are_fetched_before_prefetched_ones(world):
    identity = world.put("a", 64 * MIB)
    order = []

    class Watch(WrapperStore):
        def read_into(self, key, spans, **options):
            order.append(min(span.start for span, _ in spans))
            return super().read_into(key, spans, **options)

    gated = GateStore(Watch(world.inner))
    store = world.cache("200MB").store(gated)
    gates = [gated.stop_at("before_read_into") for _ in range(4)]
    with store.open_local("a", identity) as lease:
        lease.prefetch([ByteRange(0, 64 * MIB)])
        for gate in gates:
            gate.wait_reached()
        asker = threading.Thread(target=wait, args=(lease, (64 * MIB - UNIT, 64 * MIB)))
        asker.start()
        fetch = lease._fetch
        while not fetch.missing_units()[1].any():
            pass
        for gate in gates:
            gate.open()
        asker.join()
        assert wait(lease, (0, 64 * MIB))
    assert order.index(64 * MIB - UNIT) == 4
    assert len(order) <= 20  # the first requests of a copy that is read are short


def test_an_interrupted_download_is_continued(world):
    identity = world.put("a", 40 * MIB)
    source = FaultStore(world.inner, [Fault("read_into", nth=4, times=9)])
    cache = world.cache("100MB")
    with cache.store(source).open_local("a", identity) as lease, pytest.raises(StoreError, match="scripted"):
        wait(lease, (0, 40 * MIB))
    came = int(cache.stats()["bytes_fetched"])
    assert 0 < came < 40 * MIB
    cache.close()
    other = world.cache("100MB")
    world.fetch(world.store(other), "a")
    assert came + other.stats()["bytes_fetched"] == 40 * MIB
    assert world.parts() == []
    assert other.stats()["bytes_used"] == 40 * MIB + UNIT


def test_the_partial_copy_of_a_changed_object_is_not_continued(world):
    world.put("a", 4 * MIB)
    store = world.store(world.cache("100MB"))
    with store.open_local("a") as lease:
        assert wait(lease, (0, 1))
        world.put("a", 4 * MIB + 1)
        with pytest.raises((StoreError, ObjectChanged)):
            wait(lease, (2 * MIB, 2 * MIB + 1))
        assert not lease.present([ByteRange(2 * MIB, 2 * MIB + 1)])
    assert world.parts() == []


def test_ranges_without_space_are_refused_and_the_rest_is_served(world):
    identity = world.put("a", 2 * MIB)
    other = world.put("b", 2 * MIB)
    cache = world.cache("3MiB", policy="lru")
    store = world.store(cache)
    with store.open_local("a", identity) as lease:
        assert wait(lease, (0, UNIT))
        cache.pin(world.inner, [("b", other)])
        assert not wait(lease, (0, 2 * MIB))
        assert lease.present([ByteRange(0, UNIT)])
    let_end(cache)
    assert cache.status()["reserved_bytes"] == 0
    assert 2 * MIB < cache.stats()["bytes_used"] <= 3 * MIB


def test_a_partial_copy_on_a_full_disk_keeps_its_units(world, monkeypatch):
    identity = world.put("a", 2 * MIB)
    cache = world.cache("100MB")
    store = world.store(cache)
    with store.open_local("a", identity) as lease:
        assert wait(lease, (0, UNIT))
        write = copy_file.write_all

        def refuse(fd, data, offset):
            if len(data) >= UNIT:
                raise OSError(errno.ENOSPC, "full")
            write(fd, data, offset)

        monkeypatch.setattr(copy_file, "write_all", refuse)
        with pytest.warns(RuntimeWarning, match="disk is full"):
            assert (wait(lease, (MIB, MIB + UNIT)), let_end(cache)) == (False, None)
        monkeypatch.setattr(copy_file, "write_all", write)
        assert os.pread(lease.fd, UNIT, 0) == world.data["a"][:UNIT]
    world.fetch(store, "a")
    assert cache.stats()["bytes_fetched"] == 2 * MIB
    assert cache.status()["reserved_bytes"] == 0


@pytest.mark.parametrize("promise", ["in order", "complete", "within the range"])
def test_bytes_of_a_store_that_breaks_its_promise_are_not_marked_as_present(world, promise):
    identity = world.put("a", 4 * MIB)

    class Breaking(WrapperStore):
        def read_pieces(self, key, ranges, receive, **options):
            (span,) = ranges
            data = memoryview(world.data["a"])[span.start : span.end]
            if promise == "in order":
                receive(span.start + UNIT, data[UNIT:])
            elif promise == "complete":
                receive(span.start, data[:UNIT])
            else:
                receive(span.start, memoryview(bytes(span.n_bytes + 1)))

    cache = world.cache("100MB")
    with cache.store(Breaking(world.inner)).open_local("a", identity) as lease:
        with pytest.raises(StoreError, match="ValueError"):
            wait(lease, (0, 2 * UNIT))
        assert not lease.present([ByteRange(0, 1)])
    assert cache.stats()["bytes_used"] == 0


def test_only_unused_partial_copies_are_evicted(world):
    identity = world.put("a", 2 * MIB)
    cache = world.cache("100MB")
    with world.store(cache).open_local("a", identity) as lease:
        assert wait(lease, (0, UNIT))
        let_end(cache)
        assert cache.evict() == 0
    assert cache.evict() > 0
    assert world.parts() == []
    assert cache.stats()["bytes_used"] == 0


# -- between processes --


class Log(WrapperStore):
    """Writes a line into a file, which all processes share, for every range that is read."""

    def __init__(self, inner, log):
        super().__init__(inner)
        self.log = log

    def read_into(self, key, spans, **options):
        fd = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{sum(span.n_bytes for span, _ in spans)}\n".encode())
        os.close(fd)
        return super().read_into(key, spans, **options)


def read_in_pieces(path, source, log, identity, number, barrier):
    """In a child: read all of a shard, beginning somewhere else than the others; ends with 0 if all was right."""
    data = (source / "a").read_bytes()
    n_pieces = 16
    with tc.Cache(path, size="200MB", min_free=0) as cache:
        barrier.wait()
        right = True
        with cache.store(Log(LocalFolder(source), log)).open_local("a", identity) as lease:
            for step in range(n_pieces):
                start = (number * 4 + step) % n_pieces * len(data) // n_pieces
                end = start + len(data) // n_pieces
                right &= lease.wait([ByteRange(start, end)], deadline_s=60)
                right &= os.pread(lease.fd, end - start, start) == data[start:end]
    os._exit(0 if right else 1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes_that_read_one_shard_fetch_each_byte_about_once(world):
    identity = world.put("a", 32 * MIB)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    arguments = world.root / "cache", world.root / "source", world.root / "log", identity
    children = [context.Process(target=read_in_pieces, args=(*arguments, number, barrier)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
        child.close()
    fetched = sum(map(int, (world.root / "log").read_text().split()))
    assert fetched == 32 * MIB
    assert len(world.copies()) == 1
    assert world.cache("200MB").stats()["bytes_used"] == 32 * MIB + UNIT
