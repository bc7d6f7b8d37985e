"""Random sequences of everything that can happen to a cache, against a dict; locks and clocks that fail."""

import fcntl
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.cache.state_machine_world import KEYS, LIMITS, SIZES, MachineWorld, random_bytes
from tests.support.clock import JumpingClock

from tiercache.cache import download
from tiercache.cache.eviction import POLICIES
from tiercache.cache.names import name_of_identity
from tiercache.errors import NotFound, TierCacheError
from tiercache.model import ByteRange

# From Python 3.12 on: a crash is a forked child's.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

keys = st.sampled_from(KEYS)
fractions = st.floats(0, 1, allow_nan=False)


class CacheMachine(RuleBasedStateMachine):
    """Rules over one folder; MachineWorld has the oracle."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.world = MachineWorld()
        self.held = self.world.held

    def teardown(self) -> None:
        for lease, _, _ in self.held:
            lease.close()
        self.world.close()

    def cache(self, number: int):
        return self.world.caches[number % len(self.world.caches)]

    def known(self, key: str, number: int):
        """(identity, bytes) that some manifest names; None: none does."""
        known = self.world.identities[key]
        return known[number % len(known)] if known else None

    # -- the source -------------------------------------------------------------------------------------------------

    @initialize(sizes=st.lists(st.sampled_from(SIZES), min_size=len(KEYS), max_size=len(KEYS)))
    def fill(self, sizes):
        for key, n_bytes in zip(KEYS, sizes, strict=True):
            self.world.put(key, random_bytes(0, n_bytes))

    @rule(key=keys, seed=st.integers(0, 3), n_bytes=st.sampled_from(SIZES))
    def replace_at_the_source(self, key, seed, n_bytes):
        self.world.put(key, random_bytes(seed, n_bytes))

    @rule(key=keys)
    def delete_at_the_source(self, key):
        self.world.delete(key)

    @rule(number=st.integers(0, 9), key=keys, seed=st.integers(0, 3), n_bytes=st.sampled_from(SIZES))
    def put_through_the_cache(self, number, key, seed, n_bytes):
        data = random_bytes(seed, n_bytes)
        self.cache(number).store(self.world.source).put(key, data)
        self.world.put(key, data)

    # -- reading ----------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 9), key=keys, version=st.integers(0, 3))
    def read_whole(self, number, key, version):
        known = self.known(key, version)
        if known is not None:
            self.world.read(self.cache(number), key, *known, ByteRange(0, len(known[1])))

    @rule(number=st.integers(0, 9), key=keys, version=st.integers(0, 3), a=fractions, b=fractions)
    def read_a_range(self, number, key, version, a, b):
        known = self.known(key, version)
        if known is not None:
            start, end = sorted(int(x * len(known[1])) for x in (a, b))
            self.world.read(self.cache(number), key, *known, ByteRange(start, end))

    @rule(number=st.integers(0, 9), key=keys)
    def read_without_identity(self, number, key):
        found = self.world.read_object(self.cache(number), key)
        assert found == self.world.objects.get(key)

    @rule(target=leases, number=st.integers(0, 9), key=keys)
    def open_a_lease(self, number, key):
        known = self.known(key, -1)
        name = None if known is None else name_of_identity(known[0])
        if known is None or name in self.world.rotten or self.world.objects.get(key) != known[1]:
            return None
        lease = self.cache(number).store(self.world.source).open_local(key, known[0])
        wanted = [ByteRange(0, len(known[1]))]
        if lease is None or not lease.wait(wanted, deadline_s=60):
            return lease and lease.close()
        self.held.append((lease, known[1], name))
        return self.held[-1]

    @rule(held=leases)
    def read_by_a_lease(self, held):
        if held in self.held and held[0] not in self.world.rotten_leases:
            assert os.pread(held[0].fd, len(held[1]), 0) == held[1]

    @rule(held=consumes(leases))
    def close_a_lease(self, held):
        if held in self.held:
            self.held.remove(held)
            held[0].close()

    @rule(number=st.integers(0, 9), key=keys, version=st.integers(0, 3))
    def prefetch(self, number, key, version):
        known = self.known(key, version)
        if known is not None:
            self.cache(number).store(self.world.source).prefetch(key, known[0])

    # -- what people do ---------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 9), chosen=st.sets(keys))
    def evict(self, number, chosen):
        self.cache(number).evict(lambda entry: entry.source.rpartition("/")[2] in chosen)

    @rule(number=st.integers(0, 9), chosen=st.sets(keys, min_size=1), pin=st.booleans())
    def warm_or_pin(self, number, chosen, pin):
        pairs = [(key, self.known(key, -1)[0]) for key in sorted(chosen) if self.known(key, -1)]
        cache = self.cache(number)
        try:
            (cache.pin if pin else cache.warm)(self.world.source, pairs, jobs=2)
        except (NotFound, TierCacheError):
            pins = {path.stem for path in (self.world.folder / "copies").glob("*.pin")}
            self.world.pins |= pins & {name_of_identity(identity) for _, identity in pairs}
            return
        if pin:
            self.world.pins |= {name_of_identity(identity) for _, identity in pairs}

    @rule(number=st.integers(0, 9))
    def unpin(self, number):
        self.cache(number).unpin()
        self.world.pins.clear()

    # -- opening, closing, dying ------------------------------------------------------------------------------------

    @rule(size=st.sampled_from(LIMITS), policy=st.sampled_from(list(POLICIES)))
    def open_another(self, size, policy):
        if len(self.world.caches) < 3:
            self.world.open_cache(size, policy)
            self.world.books_are_old = False

    @rule(number=st.integers(0, 9), size=st.sampled_from(LIMITS), policy=st.sampled_from(list(POLICIES)))
    def reopen(self, number, size, policy):
        self.world.caches.pop(number % len(self.world.caches)).close()
        self.world.open_cache(size, policy)
        self.world.books_are_old = False

    @rule(number=st.integers(0, 9))
    def close_and_use_again(self, number):
        self.cache(number).close()

    @rule(key=keys, size=st.sampled_from(LIMITS))
    def die_in_mid_work(self, key, size):
        """A process that ends without a word: its reservation, its owner file, its half-fetched part."""
        known = self.known(key, -1)
        pid = os.fork()
        if pid == 0:
            try:
                cache = self.world.open_cache(size, "lru")
                if known is not None:
                    lease = cache.store(self.world.source).open_local(key, known[0])
                    if lease is not None:
                        lease.prefetch([ByteRange(0, len(known[1]))])
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        self.world.books_are_old = True

    # -- what befalls a folder --------------------------------------------------------------------------------------

    @rule()
    def somebody_lays_files_into_it(self):
        self.world.plant()

    @rule(at=fractions)
    def somebody_deletes_a_file(self, at):
        files = self.world.files()
        if files:
            path = files[int(at * (len(files) - 1))]
            path.unlink()
            self.world.touched.add(path.name.partition(".")[0])
            self.world.pins.discard(path.name.partition(".")[0])
            self.world.books_are_old = True

    @rule(at=fractions, where=fractions)
    def a_bit_turns(self, at, where):
        files = [path for path in self.world.files() if path.suffix != ".pin" and not path.is_symlink()]
        if files:
            self.world.turn_a_bit(files[int(at * (len(files) - 1))], where)
            self.world.books_are_old = True

    @rule(kind=st.sampled_from(["gone", "rubbish", "empty", "emptied"]))
    def the_catalog_is_lost(self, kind):
        catalog = self.world.folder / "catalog.sqlite"
        if kind == "gone":
            catalog.unlink(missing_ok=True)
        elif kind == "emptied" and catalog.exists():
            os.truncate(catalog, 0)  # the same file: others have it open, and lock it
        elif catalog.exists():
            other = catalog.with_name("other")
            other.write_bytes(b"rubbish" * 999 if kind == "rubbish" else b"")
            other.replace(catalog)
        self.world.books_are_old = True

    @rule(hours=st.sampled_from([-9000, -1, 1, 9000]))
    def the_clock_jumps(self, hours):
        self.world.clock.jump(hours * 3600.0)

    @invariant()
    def nothing_is_wrong(self):
        for _, _, name in self.held:
            assert name in self.world.touched or self.world.has(name), f"{name[:8]} is being read, and is gone"
        assert self.world.problems() == []


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=6, stateful_step_count=20)


@pytest.mark.stress
@pytest.mark.timeout(3000)
def test_long_sequences_of_operations_keep_the_cache_correct():
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=600, stateful_step_count=60))


# -- locks that are never free, and clocks that jump -------------------------------------------------------------------


def refuse(fd, operation):
    raise BlockingIOError


def test_locks_that_are_never_free_only_delay_reads(world, monkeypatch):
    monkeypatch.setattr(download, "LOCK_WAIT_S", 0.05)
    monkeypatch.setattr(download, "SLOWEST_BYTES_S", 1e12)
    monkeypatch.setattr("tiercache.cache.eviction.SPACE_WAIT_S", 0.05)
    monkeypatch.setattr("tiercache.store.database.BUSY_S", 0.05)
    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = world.cache("40KB", policy="lru")
    store = world.store(cache)
    for key in "abcab":
        world.put(key)
        data = world.read(store, key)
        assert data in (None, world.data[key])
    assert cache.status()["bytes_used"] <= 40_000


@pytest.mark.parametrize("forward_s", [-1e9, 1e9])
def test_a_jumping_clock_changes_neither_data_nor_copies(world, forward_s):
    cache = world.cache()
    store = world.store(cache)
    with JumpingClock() as clock:
        world.put("a")
        world.fetch(store, "a")
        clock.jump(forward_s)
        world.put("b")
        for key in "ab":
            world.fetch(store, key)
        cache.close()
        for key in "ab":
            world.fetch(store, key)
    assert world.n_reads() == 2
