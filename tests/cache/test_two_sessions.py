"""Random operations by two sessions of one folder, against a dict that shares no code with the cache."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tiercache._native.checksum import crc32c
from tiercache.cache import Cache, eviction
from tiercache.cache.eviction import POLICIES
from tiercache.errors import StoreError
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store import MemoryStore
from tiercache.waiting import wait_for

SIZES = {"a": 1, "b": 4096, "c": 5000, "d": 9000, "e": 16_000, "f": 30_000}
BLOCK = 4096
LIMIT = 14 * BLOCK
DATA = {key: random.Random(key).randbytes(n) for key, n in SIZES.items()}
IDENTITIES = {key: ShardIdentity("d" * 32, key, len(data), crc32c(data)) for key, data in DATA.items()}
keys = st.sampled_from(sorted(SIZES))
holders = st.sampled_from([0, 1])


def charge(key):
    """Blocks of the copy, and one of its record; while it comes its map takes one more."""
    return -(-SIZES[key] // BLOCK) * BLOCK + BLOCK


class CacheStates(RuleBasedStateMachine):
    """The model: which keys are held by a lease, which are pinned. What is cached is asked of the folder, by name."""

    def __init__(self):
        super().__init__()
        # Copies are lost here all the time; a cache in service looks at its folder less often.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(eviction, "RECONCILE_INTERVAL_S", 0.0)

    @initialize(policies=st.tuples(*[st.sampled_from(list(POLICIES))] * 2))
    def open(self, policies):
        self.root = Path(tempfile.mkdtemp())
        self.source = MemoryStore(f"states-{self.root.name}")
        for key, data in DATA.items():
            self.source.put(key, data)
        self.policies = policies
        self.caches = [Cache(self.root / "c", size=LIMIT, policy=p, min_free=0) for p in policies]
        self.leases = {}
        self.pinned = set()
        self.evictable = set()

    def store(self, holder):
        return self.caches[holder].store(self.source)

    def settle(self):
        """Who waits has the bytes before the copy is booked: let the fetches end."""
        for cache in self.caches:
            assert wait_for(lambda cache=cache: not cache._open().writing.fetcher._table, 60)

    def cached(self):
        self.settle()
        entries = self.caches[0].entries()
        assert not any(entry.in_part for entry in entries)
        return {e.source.rpartition("/")[2] for e in entries}

    @rule(holder=holders, key=keys)
    def read(self, holder, key):
        lease = self.store(holder).open_local(key, IDENTITIES[key])
        held = lease is not None and lease.wait([ByteRange(0, SIZES[key])])
        if held:
            assert os.pread(lease.fd, 1 << 20, 0) == DATA[key]
        if lease is not None:
            lease.close()
        assert (key in self.cached()) == held

    @rule(holder=holders, key=keys)
    def hold(self, holder, key):
        if key in self.leases:
            self.leases.pop(key).close()
            return
        lease = self.store(holder).open_local(key, IDENTITIES[key])
        if lease is not None and lease.wait([ByteRange(0, SIZES[key])]):
            self.leases[key] = lease
        elif lease is not None:
            lease.close()

    @rule(holder=holders, wanted=st.sets(keys, min_size=1, max_size=3))
    def warm(self, holder, wanted):
        try:
            self.caches[holder].warm(self.source, [(k, IDENTITIES[k]) for k in wanted], jobs=2)
        except StoreError as error:
            if error.code != "CacheFull":
                raise
            # What is asked for could fit only if what must stay left it room.
            stays = self.pinned | set(self.leases)
            assert sum(charge(k) for k in wanted | stays) > LIMIT - 2 * BLOCK, "two may come at a time, each with a map"
        else:
            assert wanted <= self.cached()

    @rule(holder=holders, key=keys)
    def pin(self, holder, key):
        try:
            self.caches[holder].pin(self.source, [(key, IDENTITIES[key])])
        except StoreError as error:
            if error.code != "CacheFull":
                raise
            assert key not in self.pinned
        else:
            self.pinned.add(key)

    @rule(holder=holders, key=keys)
    def unpin(self, holder, key):
        n_unpinned = self.caches[holder].unpin(lambda entry: entry.source.endswith(f"/{key}"))
        assert n_unpinned == (key in self.pinned)
        self.pinned.discard(key)

    @rule(holder=holders, chosen=st.sets(keys))
    def evict(self, holder, chosen):
        before = self.cached()
        freed = self.caches[holder].evict(lambda entry: entry.source.rpartition("/")[2] in chosen)
        gone = (before & chosen) - self.pinned - set(self.leases)
        assert freed == sum(charge(k) for k in gone)
        assert self.cached() == before - gone

    @rule(holder=holders)
    def close(self, holder):
        self.caches[holder].close()

    @rule()
    def lose_the_catalog(self):
        for path in (self.root / "c").glob("catalog.sqlite*"):
            path.unlink()

    @rule(key=keys)
    def lose_a_copy(self, key):
        for entry in self.caches[0].entries():
            # One that is leased lives on without a name: the model would have to know two copies of a key.
            if entry.source.endswith(f"/{key}") and not entry.pinned and key not in self.leases:
                (self.root / "c" / "copies" / entry.name).unlink()

    @invariant()
    def budget_contents_and_pins_hold(self):
        if not hasattr(self, "root"):
            return
        self.settle()
        copies = self.root / "c" / "copies"
        # The record of a copy that was deleted by hand stays until the cache is opened again.
        existing = {p.name for p in copies.iterdir() if len(p.name) == 40} | {p.stem for p in copies.glob("*.part")}
        everything = [p for p in copies.iterdir() if p.suffix != ".pin" and p.name[:40] in existing]
        assert sum(-(-p.stat().st_size // BLOCK) * BLOCK for p in everything) <= LIMIT
        files = [p for p in everything if len(p.name) == 40]
        assert {p.read_bytes() for p in files} <= set(DATA.values())
        assert len({p.read_bytes() for p in files}) == len(files)
        assert self.pinned <= self.cached()
        for key, lease in self.leases.items():
            assert os.pread(lease.fd, 1 << 20, 0) == DATA[key]

    @precondition(lambda self: hasattr(self, "root"))
    @invariant()
    def books_agree_with_the_files(self):
        used, reserved, _ = self.caches[0]._open().writing.accounts.sums()
        on_disk = sum(charge(key) for key in self.cached())
        assert used >= on_disk
        assert reserved == 0

    def teardown(self):
        self.patch.undo()
        if hasattr(self, "root"):
            for lease in self.leases.values():
                lease.close()
            for cache in self.caches:
                cache.close()
            shutil.rmtree(self.root)


TestCacheStates = CacheStates.TestCase
TestCacheStates.settings = settings(max_examples=12, stateful_step_count=25)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
class TestManyCacheStates(CacheStates.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=40)
