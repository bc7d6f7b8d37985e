"""CachedStore passes the conformance suites of stores, and what it adds."""

import pytest
from tests.support.store_suite import LocalStoreSuite, StoreSuite

from tiercache.cache import Cache
from tiercache.errors import ObjectChanged
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store import LocalFolder


class TestCachedStore(StoreSuite, LocalStoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        with Cache(tmp_path / "cache", size="1GB", min_free=0) as cache:
            yield cache.store(LocalFolder(tmp_path / "source"))

    def raw_put(self, store, key, data):
        path = store.inner.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_get(self, store, key):
        return (store.inner.root / key).read_bytes()

    def test_a_copy_of_another_size_than_the_identity_is_a_miss(self, store):
        """What the identity names may still come, so the lease is given; what comes is checked, and then known."""
        self.raw_put(store, "l", b"x" * 100)
        identity = ShardIdentity("d" * 32, "5" * 32, n_bytes=99, crc32c=0)
        with store.open_local("l", identity) as lease:
            assert not lease.wait([ByteRange(0, 99)])
        assert store.open_local("l", identity) is None


def read(store, key, start, end, **options):
    data = bytearray(end - start)
    store.read_into(key, [(ByteRange(start, end), memoryview(data))], **options)
    return bytes(data)


def test_ranges_are_read_from_the_cached_copy(world):
    world.put("a")
    store = world.store()
    assert read(store, "a", 5, 10) == world.data["a"][5:10]
    world.fetch(store, "a")
    n_reads = world.n_reads()
    assert read(store, "a", 5, 10) == world.data["a"][5:10]
    assert world.n_reads() == n_reads


def test_ranges_beyond_the_copy_raise_the_error_of_the_inner_store(world):
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    with pytest.raises(Exception, match="10001"):
        read(store, "a", 0, 10_001)


def test_a_copy_is_read_only_if_it_has_the_given_etag(world):
    world.put("a")
    store = world.store()
    with store.open_local("a") as lease:
        assert lease.wait([ByteRange(0, 1)])
    etag = store.head("a").etag
    n_reads = world.n_reads()
    assert read(store, "a", 0, 3, if_match=etag) == world.data["a"][:3]
    assert world.n_reads() == n_reads
    with pytest.raises(ObjectChanged):
        read(store, "a", 0, 3, if_match='"other"')


def test_an_object_larger_than_the_cache_bypasses_it_with_one_warning(world):
    world.put("large", 300_000)
    world.put("larger", 400_000)
    world.put("a")
    cache = world.cache(200_000)
    store = world.store(cache)
    with store.open_local("a") as lease:
        assert lease.wait([ByteRange(0, 1)])
    with pytest.warns(RuntimeWarning, match=r"/large \(293.0 KiB\).* cache \(195.3 KiB\).*larger cache"):
        assert store.open_local("large") is None
    for key in ("large", "larger"):
        assert store.open_local(key) is None
        assert read(store, key, 1000, 290_000) == world.data[key][1000:290_000]
    assert len(world.copies()) == 1, "nothing was evicted for what cannot be had"
    assert cache.stats()["evicted"] == 0
