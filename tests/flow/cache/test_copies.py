"""Hits and misses, leases, records, and the names of copies."""

import os

import pytest
from tests.support.stores import Gate, GateStore

from tiercache.cache.names import CopySpec, name_of_object
from tiercache.errors import NotFound
from tiercache.model import ByteRange, ObjectInfo


def test_a_lease_has_no_descriptor_until_data_is_cached(world):
    identity = world.put("a")
    gated = GateStore(world.inner)
    store = world.cache().store(gated)
    whole = [ByteRange(0, 10_000)]
    with gated.stop_at("before_read_into") as gate, store.open_local("a", identity) as lease:
        assert (lease.present(whole), lease.n_bytes, lease.fd) == (False, 10_000, -1)
        lease.prefetch(whole)
        gate.wait_reached()
        assert not lease.present(whole)
        gate.open()
        assert lease.wait(whole)
        assert lease.present(whole)
        assert not lease.present([ByteRange(0, 10_001)])


def test_a_fetch_continues_after_its_lease_is_closed(world):
    identity = world.put("a")
    gated = GateStore(world.inner)
    cache = world.cache()
    store = cache.store(gated)
    with gated.stop_at("before_read_into") as gate:
        lease = store.open_local("a", identity)
        lease.prefetch([ByteRange(0, 1)])
        gate.wait_reached()
        lease.close()
        lease.close()
    with store.open_local("a", identity) as other:
        assert other.wait([ByteRange(0, 10_000)])
    assert world.n_reads() == 1


def test_a_wait_ends_at_its_deadline_and_names_the_holder_of_the_lock(world):
    identity = world.put("a")
    gated = GateStore(world.inner)
    store = world.cache().store(gated)
    gate: Gate
    with gated.stop_at("before_read_into") as gate, store.open_local("a", identity) as lease:
        lease.prefetch([ByteRange(0, 1)])
        gate.wait_reached()
        with pytest.raises(Exception, match=f"not in the cache after 0.01 s: being fetched by process {os.getpid()}"):
            lease.wait([ByteRange(0, 1)], deadline_s=0.01)
        gate.open()
        assert lease.wait([ByteRange(0, 1)])


def test_the_same_shard_of_two_mirrors_is_one_copy(world):
    identity = world.put("one/a")
    (world.root / "source" / "two").mkdir()
    (world.root / "source" / "two" / "b").write_bytes(world.data["one/a"])
    store = world.store()
    world.fetch(store, "one/a")
    assert world.read(store, "two/b", identity) == world.data["one/a"]
    assert world.n_reads() == 1
    assert len(world.copies()) == 1


def test_an_object_without_identity_is_cached_under_its_etag(world):
    world.put("a")
    store = world.store()
    for n_reads, n_bytes in ((1, 10_000), (1, 10_000), (2, 12_000)):
        if n_bytes != len(world.data["a"]):
            world.put("a", n_bytes)
        with store.open_local("a") as lease:
            assert lease.wait([ByteRange(0, lease.n_bytes)])
            assert os.pread(lease.fd, 20_000, 0) == world.data["a"]
        assert world.n_reads() == n_reads


def test_opening_a_missing_object_raises_not_found(world):
    store = world.store()
    with pytest.raises(NotFound):
        store.open_local("nothing")
    world.put("a")
    identity = world.identity("a")
    (world.root / "source" / "a").unlink()
    with store.open_local("a", identity) as lease, pytest.raises(NotFound):
        lease.wait([ByteRange(0, 1)])
    assert world.parts() == []


def test_an_object_without_etag_version_or_date_is_not_cached():
    assert name_of_object("s3://b/k", ObjectInfo("k", 5)) is None
    assert name_of_object("s3://b/k", ObjectInfo("k", 5, etag='"1"')) is not None


def test_records_contain_no_credentials(world, monkeypatch):
    world.put("a")
    world.inner.url = "http://user:secret@host/data?token=secret"
    world.fetch(world.store(), "a")
    world.caches[0].close()
    written = b"".join(p.read_bytes() for p in world.root.glob("cache/**/*") if p.is_file() and "." in p.name)
    assert b"host/data" in written
    assert b"secret" not in written


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 0}', '{"format": 1, "source": "x"}', "\0" * 300, '{"format']
)
def test_an_invalid_record_reads_as_none(text):
    assert CopySpec.from_json("a" * 40, text) is None


def test_hits_write_to_sqlite_only_in_batches(world, monkeypatch):
    world.put("a")
    cache = world.cache()
    store = world.store(cache)
    world.fetch(store, "a")
    statements = []
    database = cache._open().accounts._database
    database.run(lambda db: db.set_trace_callback(statements.append))
    statements.clear()
    for _ in range(10):
        world.fetch(store, "a")
    assert statements == []
    cache.entries()
    assert any("last_use" in statement for statement in statements)
    database.run(lambda db: db.set_trace_callback(None))
