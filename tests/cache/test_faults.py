"""Whatever is wrong with source, disk or folder makes reading slower, never wrong."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from tiercache.cache import download, opened, publisher
from tiercache.cache import folder as folder_module
from tiercache.cache.breaker import Breaker
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ByteRange
from tiercache.testing import FakeClock, Fault, FaultKind, FaultStore

WHOLE = [ByteRange(0, 10_000)]


def faulty(world, *faults, **options):
    source = FaultStore(world.inner, list(faults))
    return source, world.cache(**options).store(source)


# -- the source --


def test_bytes_with_a_wrong_checksum_are_fetched_once_more(world):
    world.put("a")
    source, store = faulty(world, Fault("read_into", kind=FaultKind.BIT_FLIP))
    world.fetch(store, "a")
    assert len(source.struck) == 1
    assert world.n_reads() == 2


def test_bytes_that_are_wrong_twice_are_an_error_and_never_published(world):
    world.put("a")
    _, store = faulty(world, Fault("read_into", kind=FaultKind.BIT_FLIP, times=2))
    with pytest.raises(CorruptShard, match="expected"):
        world.read(store, "a")
    assert (world.copies(), world.temps()) == ([], [])
    assert store.cache.status()["reserved_bytes"] == 0
    world.fetch(store, "a")


def test_a_short_object_is_fetched_once_more_and_then_an_error(world):
    identity = world.put("a")
    (world.root / "source" / "a").write_bytes(world.data["a"][:9_999])
    store = world.store()
    with store.open_local("a", identity) as lease, pytest.raises(StoreError):
        lease.wait(WHOLE)
    assert world.n_reads() == 2
    assert (world.copies(), world.temps()) == ([], [])


def test_a_failing_store_is_its_own_error_and_the_next_try_may_work(world):
    world.put("a")
    _, store = faulty(world, Fault("read_into"))
    with pytest.raises(StoreError, match="scripted"):
        world.read(store, "a")
    world.fetch(store, "a")


def test_one_failing_part_of_many_fails_the_fetch(world):
    world.put("a", 60 << 20)
    _, store = faulty(world, Fault("read_into", nth=4), size="100MB")
    with pytest.raises(StoreError, match="scripted"):
        world.read(store, "a")
    assert (world.copies(), world.temps()) == ([], [])


def test_an_object_that_changes_between_its_parts_is_never_published(world):
    world.put("a", 20 << 20)
    _, store = faulty(world, Fault("read_into", nth=2, kind=FaultKind.REPLACED), size="100MB")
    with store.open_local("a") as lease, pytest.raises(StoreError):
        lease.wait([ByteRange(0, 1)])
    assert (world.copies(), world.temps()) == ([], [])


# -- the disk --


def fail_writes(monkeypatch, code, times):
    """Let the next `times` writes of fetched bytes fail."""
    really_write = download.write_all
    left = [times]

    def write(fd, data, offset):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        really_write(fd, data, offset)

    monkeypatch.setattr(download, "write_all", write)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_evicts_and_tries_once_more(world, monkeypatch, code):
    store = world.store(world.cache(policy="lru"))
    for key in "ab":
        world.put(key)
    world.fetch(store, "a")
    fail_writes(monkeypatch, code, 1)
    world.fetch(store, "b")
    assert {entry.source[-1] for entry in store.cache.entries()} == {"b"}


def test_a_disk_that_stays_full_is_read_past_with_one_warning(world, monkeypatch):
    for key in "ab":
        world.put(key)
    store = world.store()
    fail_writes(monkeypatch, errno.ENOSPC, 4)
    with pytest.warns(RuntimeWarning, match="disk is full"):
        assert world.read(store, "a") is None
    assert world.read(store, "b") is None  # a second warning would be an error here
    assert (world.copies(), world.temps(), store.cache.status()["reserved_bytes"]) == ([], [], 0)
    world.fetch(store, "a")


def test_a_disk_too_full_for_a_new_file_still_serves_hits(world, monkeypatch):
    for key in "ab":
        world.put(key)
    store = world.store()
    world.fetch(store, "a")

    def refuse(*args):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(store.cache._open().folder, "new_temp", refuse)
    with pytest.warns(RuntimeWarning, match="disk is full"):
        assert world.read(store, "b") is None
    world.fetch(store, "a")
    assert not store.cache.status()["bypassed"]


def test_a_failing_disk_is_bypassed_probed_and_used_again(world, monkeypatch):
    for key in "ab":
        world.put(key)
    cache = world.cache()
    store = world.store(cache)
    clock = FakeClock()
    writing = cache._open().writing
    writing.breaker = writing.publisher.breaker = Breaker(clock)
    world.fetch(store, "a")
    fail_writes(monkeypatch, errno.EIO, 2)
    with pytest.warns(RuntimeWarning, match="reading past it"):
        assert world.read(store, "b") is None
    assert cache.status()["bypassed"]
    assert world.read(store, "a") is None
    clock.advance(31)
    assert world.read(store, "b") is None  # the probe meets the second failure
    clock.advance(31)
    world.fetch(store, "b")
    world.fetch(store, "a")
    assert not cache.status()["bypassed"]


@pytest.mark.parametrize("damage", ["cut", "grown", "emptied"])
def test_a_copy_of_the_wrong_size_is_a_miss_and_replaced(world, damage):
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    copy = world.copy("a")
    copy.chmod(0o644)
    copy.write_bytes({"cut": world.data["a"][:5000], "grown": world.data["a"] + b"x", "emptied": b""}[damage])
    world.fetch(store, "a")
    assert world.n_reads() == 2
    world.fetch(store, "a")
    assert world.n_reads() == 2


# -- the folder --


@pytest.mark.parametrize("damage", ["deleted", "garbage", "empty", "torn", "other tables"])
def test_a_lost_catalog_is_made_anew_from_the_files(world, damage):
    world.put("a")
    world.put("b")
    cache = world.cache()
    store = world.store(cache)
    cache.pin(store, [("a", world.identity("a"))])
    before = cache.stats()["bytes_used"]
    catalog = world.root / "cache" / "catalog.sqlite"
    if damage == "other tables":
        cache._open().writing.accounts._database.run(lambda db: db.execute("DROP TABLE copies"))
    elif damage == "deleted":
        for path in (world.root / "cache").glob("catalog.sqlite*"):
            path.unlink()
    else:
        cache.close()
        content = {"garbage": b"no database" * 1000, "empty": b"", "torn": catalog.read_bytes()[:5000]}[damage]
        catalog.write_bytes(content)
    assert cache.stats()["bytes_used"] == before
    (entry,) = cache.entries()
    assert (entry.pinned, entry.source[-1]) == (True, "a")
    world.fetch(store, "b")
    assert cache.stats()["bytes_used"] == 2 * before


def test_a_folder_that_is_deleted_under_us_is_made_and_filled_again(world):
    world.put("a")
    cache = world.cache()
    store = world.store(cache)
    world.fetch(store, "a")
    shutil.rmtree(world.root / "cache")
    world.fetch(store, "a")
    assert world.n_reads() == 2
    world.fetch(store, "a")
    assert world.n_reads() == 2
    assert cache.stats()["bytes_used"] == 12_288
    cache.close()
    world.fetch(store, "a")
    assert world.n_reads() == 2


def test_files_of_dead_processes_are_swept_at_opening_and_those_of_living_ones_stay(world):
    world.put("a")
    cache = world.cache()
    copies = world.root / "cache" / "copies"
    me = cache._open().writing.owners.me
    dead = copies / f"{'a' * 40}.0123456789abcdef-1-99-5-00000000.00000000.tmp"
    alive = copies / f"{'b' * 40}.{me}.00000000.tmp"
    orphan = copies / f"{'c' * 40}.json"
    for path in (dead, alive, orphan):
        path.write_text("x")
    world.cache()
    assert [path.exists() for path in (dead, alive, orphan)] == [False, True, False]


def test_books_of_an_earlier_boot_are_made_anew(world, monkeypatch):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    accounts = cache._open().writing.accounts
    accounts._database.run(lambda db: db.execute("UPDATE copies SET charge_bytes = 5"))
    accounts._database.run(lambda db: db.execute("UPDATE meta SET value = 'earlier' WHERE key = 'boot'"))
    cache.close()
    assert cache.entries()[0].n_bytes == 12_288


READ_ONLY = """
import os, sys, warnings
from tiercache.cache import Cache
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store import LocalFolder
# What is imported late cannot be read by everybody everywhere.
Cache(sys.argv[4], size="1MB").store(LocalFolder(sys.argv[2])).close()
os.setgid(65534)
os.setuid(65534)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store = Cache(sys.argv[1], size="1MB").store(LocalFolder(sys.argv[2]))
    with store.open_local("a", ShardIdentity("d" * 32, "61", 10000, int(sys.argv[3]))) as lease:
        assert lease.wait([ByteRange(0, 10000)]) and len(os.pread(lease.fd, 10000, 0)) == 10000
    assert store.open_local("b", ShardIdentity("d" * 32, "62", 10000, 0)) is None
    assert len(store.cache.entries()) == 1 and store.cache.stats()["bytes_used"] == 12288
print([str(w.message) for w in caught])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else_serves_hits_and_is_read_past_for_the_rest(world):
    identity = world.put("a")
    world.put("b")
    world.fetch(world.store(), "a")
    world.caches[0].close()
    for parent in (world.root, *world.root.parents):
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    arguments = [str(world.root / "cache"), str(world.root / "source"), str(identity.crc32c), str(world.root / "first")]
    done = subprocess.run([sys.executable, "-c", READ_ONLY, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written") == 1
    assert done.stdout.count("cache ") == 1


def test_a_network_file_system_gets_a_folder_a_host_no_wal_and_a_warning(world, monkeypatch):
    monkeypatch.setattr(folder_module, "network_file_system", lambda path: "NFS")
    monkeypatch.setattr(folder_module, "host_name", lambda: "node7")
    world.put("a")
    with pytest.warns(RuntimeWarning, match="lies on NFS"):
        cache = world.cache()
    world.fetch(world.store(cache), "a")
    world.fetch(world.store(cache), "a")
    assert world.n_reads() == 1
    host = world.root / "cache" / "host-node7"
    assert len(list((host / "copies").iterdir())) == 2
    assert not list(host.glob("catalog.sqlite-wal"))


def test_without_hard_links_copies_are_renamed_into_place(world, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    world.fetch(store, "a")
    assert world.n_reads() == 1


def test_a_busy_catalog_makes_reading_go_past_the_cache(world, monkeypatch):
    import sqlite3

    from tiercache.catalog import database

    monkeypatch.setattr(database, "BUSY_S", 0.05)
    world.put("a")
    cache = world.cache()
    store = world.store(cache)
    other = sqlite3.connect(world.root / "cache" / "catalog.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.warns(RuntimeWarning, match="locked"):
        assert world.read(store, "a") is None
    other.execute("ROLLBACK")
    other.close()


def test_the_modules_that_wait_for_other_processes_have_deadlines():
    assert 0 < publisher.LOCK_WAIT_S < 600
    assert opened.USES_PER_FLUSH > 1


def test_a_deleted_folder_is_empty_to_those_who_ask_and_is_made_again(world):
    world.put("a")
    cache = world.cache()
    store = world.store(cache)
    world.fetch(store, "a")
    shutil.rmtree(world.root / "cache")
    assert cache.stats()["misses"] == 1
    assert cache.entries() == []
    assert cache.status()["n_copies"] == 0
    shutil.rmtree(world.root / "cache")
    world.fetch(store, "a")
    assert not cache.status()["bypassed"]
    assert len(world.copies()) == 1
