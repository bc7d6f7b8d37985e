"""Fetches and the threads that carry them out."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support.stores import GateStore

from tiercache.cache import fetch as fetch_module
from tiercache.cache import session
from tiercache.cache.eviction import Evictor
from tiercache.model import ByteRange
from tiercache.store.contract import WrapperStore
from tiercache.waiting import wait_for

UNIT = 4096
MIB = 1 << 20


class Held(WrapperStore):
    """Reads of keys in held stand still until they are let go."""

    def __init__(self, inner, held):
        super().__init__(inner)
        self.held, self.go, self.n_waiting = set(held), threading.Event(), 0

    def read_into(self, key, spans, **options):
        if key in self.held:
            self.n_waiting += 1
            assert self.go.wait(60)
        super().read_into(key, spans, **options)


def test_an_awaited_fetch_does_not_wait_for_prefetches(world):
    keys = [f"ahead-{i}" for i in range(6)]
    for key in [*keys, "urgent"]:
        world.put(key)
    source = Held(world.inner, keys)
    store = world.cache().store(source)
    for key in keys:
        store.prefetch(key, world.identity(key))
    assert wait_for(lambda: source.n_waiting == 4, 30), "no more than four at a time are fetched ahead"
    with store.open_local("urgent", world.identity("urgent")) as lease:
        assert lease.wait([ByteRange(0, 10_000)], deadline_s=30)
    assert source.n_waiting == 4
    source.go.set()


class Active(WrapperStore):
    """Reads of `held` stand still until they are let go. most: Reads of each key that ran at once."""

    def __init__(self, inner, held):
        super().__init__(inner)
        self.held, self.go = held, threading.Event()
        self.n_active, self.most, self._lock = {}, {}, threading.Lock()

    def read_into(self, key, spans, **options):
        with self._lock:
            self.n_active[key] = self.n_active.get(key, 0) + 1
            self.most[key] = max(self.most.get(key, 0), self.n_active[key])
        if key == self.held:
            assert self.go.wait(60)
        super().read_into(key, spans, **options)
        with self._lock:
            self.n_active[key] -= 1


def test_long_requests_for_a_copy_leave_the_bandwidth_to_an_older_fetch_that_is_awaited(world):
    for key in ("first", "second"):
        world.put(key, 32 * MIB)
    source = Active(world.inner, "first")
    store, whole = world.cache("200MB").store(source), [ByteRange(0, 32 * MIB)]
    with (
        store.open_local("first", world.identity("first")) as first,
        store.open_local("second", world.identity("second")) as second,
    ):
        first.prefetch(whole, urgent=True)
        assert wait_for(lambda: source.most.get("first") == fetch_module.N_REQUESTS_OF_FIRST, 30)
        assert second.wait(whole, deadline_s=30)
        assert source.most["second"] == 1
        source.go.set()
        assert first.wait(whole, deadline_s=30)


def test_a_queued_prefetch_gets_a_thread_when_a_reader_waits_for_it(world):
    keys = [f"ahead-{i}" for i in range(6)]
    for key in keys:
        world.put(key)
    source = Held(world.inner, keys[:4])
    store = world.cache().store(source)
    for key in keys:
        store.prefetch(key, world.identity(key))
    with store.open_local(keys[5], world.identity(keys[5])) as lease:
        assert lease.wait([ByteRange(0, 10_000)], deadline_s=30)
    source.go.set()


@pytest.mark.parametrize("n_given", [0, 1])
def test_a_fetch_uses_as_many_threads_as_the_system_allows(world, monkeypatch, n_given):
    """Else who waits would wait for a thread that never ran; and a part would be closed while helpers write to it."""
    identity = world.put("a", 20 * MIB)
    given = []

    class Scarce(threading.Thread):
        def start(self):
            if self.name == "tiercache-part":
                if len(given) >= n_given:
                    raise RuntimeError("can't start new thread")
                given.append(self)
            super().start()

    monkeypatch.setattr(fetch_module, "Thread", Scarce)
    store = world.store(world.cache("100MB"))
    assert world.read(store, "a", identity) == world.data["a"]
    assert len(given) == n_given


def test_reads_bypass_the_cache_if_no_thread_can_be_started(world, monkeypatch):
    identity = world.put("a")
    store = world.store()
    monkeypatch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no threads")))
    assert world.read(store, "a", identity) is None
    monkeypatch.undo()
    world.fetch(store, "a")


def test_refused_units_are_not_fetched_with_the_rest_of_a_small_file(world, monkeypatch):
    """Their reader reads them from the source: fetching them later transfers the same bytes again."""
    identity, blocker_identity = world.put("a", 60 * UNIT), world.put("blocker", 45 * UNIT)
    store = world.store(world.cache(70 * UNIT))
    refused, later = ByteRange(0, 50 * UNIT), ByteRange(55 * UNIT, 60 * UNIT)
    reserve, n_refused = Evictor.reserve, []
    with store.open_local("a", identity) as lease, store.open_local("blocker", blocker_identity) as blocker:
        assert blocker.wait([ByteRange(0, 45 * UNIT)], deadline_s=30)

        def request_when_refused(self, name, *args, **options):
            has_space = reserve(self, name, *args, **options)
            n_refused.append(not has_space)
            if sum(n_refused) == 2:  # with the rest and without it; now there is space, and another request
                blocker.close()
                lease.prefetch([later], urgent=True)
            return has_space

        monkeypatch.setattr(Evictor, "reserve", request_when_refused)
        assert not lease.wait([refused], deadline_s=30)
        for thread in threading.enumerate():
            if thread.name.startswith("tiercache-fetch"):
                thread.join(30)
        assert lease.present([later])
        assert not lease.present([ByteRange(0, UNIT)])


def test_bytes_that_were_prefetched_for_a_reader_are_a_miss_when_they_are_read_first(world):
    identity = world.put("a")
    cache = world.cache()
    store = world.store(cache)

    def figures():
        return [cache.stats()[name] for name in ("bytes_hit", "bytes_missed")]

    store.prefetch("a", identity)
    assert wait_for(lambda: store.is_cached("a", identity), 30)
    world.fetch(store, "a")
    assert figures() == [0, 10_000]
    store.prefetch("a", identity)
    world.fetch(store, "a")
    assert figures() == [10_000, 10_000]
    store.prefetch("b", world.put("b"))
    assert wait_for(lambda: store.is_cached("b", world.identity("b")), 30)
    other = world.cache()
    world.fetch(world.store(other), "b")
    assert other.stats()["bytes_hit"] == 10_000, "it was here before the other asked"


def test_a_reader_bypasses_a_cache_that_is_closed_while_it_waits(world):
    identity = world.put("a")
    cache = world.cache()
    gated = GateStore(world.inner)
    with (
        ThreadPoolExecutor(1) as pool,
        cache.store(gated).open_local("a", identity) as lease,
        gated.stop_at("before_read_into") as gate,
    ):
        answer = pool.submit(lease.wait, [ByteRange(0, 10_000)], deadline_s=30)
        gate.wait_reached()
        opened = cache._open()
        closing = threading.Thread(target=cache.close)
        closing.start()
        assert wait_for(lambda: opened._is_closed, 30)
        gate.open()
        assert answer.result() is False
        closing.join()


def test_a_prefetch_gives_its_thread_to_urgent_ranges_and_continues_after_them(world, monkeypatch):
    monkeypatch.setattr(session, "N_FETCHES", 1)
    monkeypatch.setattr(session, "N_MORE_URGENT", 1)
    world.put("ahead", 40 * MIB)  # five requests, of which four are in flight
    world.put("urgent-0")
    world.put("urgent-1")
    gates, reads, lock = {key: threading.Event() for key in ("ahead", "urgent-0", "urgent-1")}, [], threading.Lock()

    class Gated(WrapperStore):
        """Reads of a key stand still until its gate is open."""

        def read_into(self, key, spans, **options):
            with lock:
                reads.append(key)
            assert gates[key].wait(60)
            super().read_into(key, spans, **options)

    cache = world.cache("100MB")
    store = cache.store(Gated(world.inner))
    store.prefetch("ahead", world.identity("ahead"))
    assert wait_for(lambda: reads.count("ahead") == 4, 30)
    for key in ("urgent-0", "urgent-1"):  # the second one has no thread
        store.prefetch(key, world.identity(key), urgent_ranges=[ByteRange(0, 10_000)])
    gates["ahead"].set()
    assert wait_for(lambda: "urgent-1" in reads, 30)
    assert reads == ["ahead"] * 4 + ["urgent-0", "urgent-1"]
    for gate in gates.values():
        gate.set()
    for key in gates:
        with store.open_local(key, world.identity(key)) as lease:
            assert lease.wait([ByteRange(0, lease.n_bytes)], deadline_s=30)
    assert cache.stats()["bytes_fetched"] == 40 * MIB + 20_000  # nothing is fetched twice


def test_the_first_ranges_of_a_copy_are_fetched_only_if_all_of_it_has_room(world):
    store = world.store(world.cache(2 * MIB))
    world.put("small")
    for key, n_reads in (("large", 0), ("small", 1)):
        identity = world.put("large", 4 * MIB) if key == "large" else world.identity(key)
        store.prefetch(key, identity, urgent_ranges=[ByteRange(0, UNIT)])
        assert wait_for(lambda key=key, n_reads=n_reads: world.n_reads(key) == n_reads, 30)
