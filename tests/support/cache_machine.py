"""The state machine of the cache: everything that can happen to a folder, against a dict."""

import os
import random
import shutil
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from tests.support.folder_check import Expected, FolderCheck

from tiercache._native.checksum import crc32c
from tiercache.cache import Cache
from tiercache.cache.eviction import POLICIES
from tiercache.cache.fetch import CopyLease
from tiercache.cache.names import name_of_identity
from tiercache.errors import CorruptShard, NotFound, ObjectChanged, StoreError, TierCacheError
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store import LocalFolder
from tiercache.waiting import wait_for

KEYS = ("a", "b", "c", "d", "e")
SIZES = (0, 1, 4096, 9_000, 70_000)
LIMITS = (60_000, 200_000, 2_000_000)
WAIT_S = 30.0


class MachineWorld:
    """One example: made in a folder of its own, removed by close().

    objects: what the source holds now; identities: what a manifest said of each key, newest last, with the bytes that
    it meant. touched: copies that the machine itself laid its hands on. Bytes that it has turned are in rotten: a
    reader that meets them says so, as a shard's reader does, and must then get right ones. held: leases, with the bytes
    and the name of their copies; rotten_leases: those on files in which a bit has turned, whatever has their names now.
    """

    def __init__(self) -> None:
        warnings.simplefilter("ignore", RuntimeWarning)  # notices: two sizes, a damaged copy that cannot be removed
        self.root = Path(tempfile.mkdtemp(prefix="tiercache-machine-"))
        self.folder = self.root / "cache"
        self.source = LocalFolder(self.root / "source")
        self.objects: dict[str, bytes] = {}
        self.identities: dict[str, list[tuple[ShardIdentity, bytes]]] = {key: [] for key in KEYS}
        self.caches: list[Cache] = []
        self.pins: set[str] = set()
        self.rotten: set[str] = set()
        self.touched: set[str] = set()
        self.books_are_old = False
        self.excess_bytes = 0
        self.limit_bytes: int | None = None
        self.held: list[tuple[CopyLease, bytes, str]] = []
        self.rotten_leases: set[CopyLease] = set()
        self.open_cache(LIMITS[-1], "lru")

    def close(self) -> None:
        for cache in self.caches:
            cache.close()
        shutil.rmtree(self.root)

    # -- the source -------------------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes) -> None:
        self.source.put(key, data)
        self.objects[key] = data
        identity = ShardIdentity("d" * 32, key.encode().hex(), len(data), crc32c(data))
        if identity not in [known for known, _ in self.identities[key]]:
            self.identities[key].append((identity, data))

    def delete(self, key: str) -> None:
        self.source.delete([key])
        self.objects.pop(key, None)

    def expected_data(self) -> dict[str, bytes]:
        pairs = [pair for known in self.identities.values() for pair in known]
        named = {name_of_identity(identity): data for identity, data in pairs}
        return {name: data for name, data in named.items() if name not in self.rotten}

    # -- caches -----------------------------------------------------------------------------------------------------

    def open_cache(self, size: int, policy: str) -> Cache:
        cache = Cache(self.folder, size=size, policy=policy, min_free="0%")
        self.caches.append(cache)
        return cache

    def quiet(self) -> None:
        """Wait until nothing is being fetched: nobody waits for what was fetched ahead.

        Each cache gives back itself what it had reserved for deleted files that were still held, when it is next used.
        """

        def is_quiet() -> bool:
            used = [cache for cache in self.caches if cache._opened is not None] or self.caches[:1]
            if any(cache._opened._threads for cache in used if cache._opened):
                return False
            [cache.status() for cache in used]
            return not self.look().reserved()

        assert wait_for(is_quiet, WAIT_S), "something stays reserved"

    def read(self, cache: Cache, key: str, identity: ShardIdentity, data: bytes, wanted: ByteRange) -> None:
        """Read as a shard's reader does: what is wrong is distrusted, and read once more.

        Nothing comes where the source has other bytes by now and no copy of the old ones is left.
        """
        for is_last in (False, True):
            found = self._read_once(cache, key, identity, wanted)
            if found is None:
                assert self.objects.get(key) != data or is_last, "the source has it, and it was not to be had"
                return
            if found == data[wanted.start : wanted.end]:
                return
            name = name_of_identity(identity)
            is_past = self.objects.get(key) != data
            assert name in self.rotten or is_past, f"{key}: wrong bytes that nobody turned"
            cache.store(self.source).remove_if_corrupt(key, identity)
            self.rotten.discard(name)
            if is_last:
                assert is_past, f"{key}: wrong bytes again"

    def _read_once(self, cache: Cache, key: str, identity: ShardIdentity, wanted: ByteRange) -> bytes | None:
        store = cache.store(self.source)
        try:
            lease = store.open_local(key, identity)
            if lease is not None:
                with lease:
                    lease.prefetch([wanted])
                    if lease.wait([wanted], deadline_s=WAIT_S):
                        return os.pread(lease.fd, wanted.n_bytes, wanted.start)
            buffer = bytearray(wanted.n_bytes)
            store.read_into(key, [(wanted, memoryview(buffer))])
            return bytes(buffer)
        except (NotFound, ObjectChanged, CorruptShard, StoreError):
            return None

    def read_object(self, cache: Cache, key: str) -> bytes | None:
        """An object of no data set, whole; None: it is not there.

        It has no checksums of its own, so who reads it by the lease's descriptor reads what lies there; the store holds
        what it reads against the map.
        """
        store = cache.store(self.source)
        try:
            lease = store.open_local(key)
            info = store.head(key)
        except NotFound:
            return None
        wanted, data = ByteRange(0, info.n_bytes), bytearray(info.n_bytes)
        with nullcontext() if lease is None else lease:
            if lease is not None:
                lease.wait([wanted], deadline_s=WAIT_S)
            store.read_into(key, [(wanted, memoryview(data))], if_match=info.etag)
        return bytes(data)

    # -- by hand ----------------------------------------------------------------------------------------------------

    def files(self) -> list[Path]:
        copies = self.folder / "copies"
        return sorted(copies.iterdir()) if copies.is_dir() else []

    def has(self, name: str) -> bool:
        """Whether a copy, whole or in part, lies there."""
        return any((self.folder / "copies" / file).is_file() for file in (name, f"{name}.part"))

    def turn_a_bit(self, path: Path, at: float) -> None:
        data = bytearray(path.read_bytes())
        if not data:
            return
        path.chmod(0o600)
        data[min(int(at * len(data)), len(data) - 1)] ^= 1
        path.write_bytes(data)
        if path.suffix == "":
            path.chmod(0o400)
        name = path.name.partition(".")[0]
        self.touched.add(name)
        self.rotten.add(name)
        self.rotten_leases |= {lease for lease, _, of in self.held if of == name}

    # -- what holds at any time -------------------------------------------------------------------------------------

    def breaches(self, look: FolderCheck) -> list[str]:
        """More than the limit is only what was there before it, and it cannot grow.

        What opened the folder with a smaller limit has evicted all that is not pinned, held, or nobody's. What was laid
        there by hand, or is booked anew from the files, counts whenever somebody looks.
        """
        taken_bytes, limit_bytes = look.charged_bytes()
        excess_bytes, before_bytes = max(taken_bytes - (limit_bytes or taken_bytes), 0), self.excess_bytes
        is_new_limit, self.excess_bytes, self.limit_bytes = limit_bytes != self.limit_bytes, excess_bytes, limit_bytes
        if self.books_are_old or excess_bytes <= before_bytes:
            return []
        could_go = look.evictable({name for _, _, name in self.held})
        if is_new_limit and not could_go:
            return []
        return [f"{excess_bytes} bytes over the limit, {before_bytes} before; {sorted(could_go)} could go"]

    def look(self) -> FolderCheck:
        return FolderCheck(self.folder, Expected(self.expected_data(), None, self.pins, self.rotten))

    def problems(self) -> list[str]:
        self.quiet()
        look = self.look()
        found = [*look.wrong_bytes(), *self.breaches(look)]
        if not self.books_are_old:
            found += look.wrong_accounts()
        return found


def random_bytes(seed: int, n_bytes: int) -> bytes:
    return random.Random(f"{seed}/{n_bytes}").randbytes(n_bytes)


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
        files = [path for path in self.world.files() if path.suffix != ".pin"]
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

    @invariant()
    def nothing_is_wrong(self):
        for _, _, name in self.held:
            assert name in self.world.touched or self.world.has(name), f"{name[:8]} is being read, and is gone"
        assert self.world.problems() == []
