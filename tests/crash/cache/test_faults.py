"""A fault of source, disk or folder makes reads slower, not wrong."""

import errno
import fcntl
import os
import shutil
import sqlite3
import subprocess
import warnings

import numpy as np
import pytest
from tests.support.cache_world import turn
from tests.support.clock import FakeClock
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.folder_check import Expected, FolderCheck
from tests.support.stores import GateStore

from tiercache.cache import cache as cache_module
from tiercache.cache import copy_file, session
from tiercache.cache.accounts import Accounts, Owners
from tiercache.cache.folder import Folder, NameLock
from tiercache.cache.session import Breaker
from tiercache.errors import StoreError
from tiercache.model import ByteRange, ReadingPlan
from tiercache.store.shared_files import pid_namespace
from tiercache.waiting import wait_for

WHOLE = [ByteRange(0, 10_000)]


def faulty(world, *faults, **options):
    source = FaultStore(world.inner, list(faults))
    return source, world.cache(**options).store(source)


# -- the source --


def test_bytes_with_a_wrong_checksum_are_fetched_once_more(world):
    world.put("a")
    source, store = faulty(world, Fault("read_into", kind=FaultKind.BIT_FLIP))
    world.fetch(store, "a")
    assert len(source.faulted_calls) == 1
    assert world.n_reads() == 2


def test_an_object_corrupt_at_its_source_is_not_cached_nor_fetched_again(world):
    world.put("a")
    source, store = faulty(world, Fault("read_into", kind=FaultKind.BIT_FLIP, times=9))
    assert world.read(store, "a") is None
    assert world.read(store, "a") is None
    assert (len(source.faulted_calls), world.copies(), world.parts()) == (2, [], [])
    status = store.cache.status()
    assert (status["reserved_bytes"], status["poisoned"]) == (0, 1)


@pytest.mark.parametrize("retryable", [True, False])
def test_a_failed_fetch_leaves_no_files(world, retryable):
    identity = world.put("a")
    cache = world.cache()
    store = cache.store(FaultStore(world.inner, [Fault("read_into", times=2, retryable=retryable)]))
    with store.open_local("a", identity) as lease, pytest.raises(Exception, match="scripted"):
        lease.wait(WHOLE, deadline_s=60)
    assert cache.status()["reserved_bytes"] == 0
    cache.close()
    cache.stats()
    cache.close()
    assert FolderCheck(world.root / "cache", Expected({})).problems() == []
    world.fetch(world.store(cache), "a")


def test_the_check_of_a_folder_reports_what_it_is_asked_to_find(world):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    (copy,) = world.copies()
    cache.close()
    root = world.root / "cache"
    check = FolderCheck(root, Expected({copy.name: world.data["a"]}))
    assert check.problems() == check.crash_problems() == []
    (root / "copies" / f"{'0' * 40}.part").write_bytes(b"left behind")
    assert len([*check.leftover_files()]) == 1
    turn(root / "copies" / copy.name, 17)
    assert [*check.wrong_bytes()] == check.crash_problems()[:1] != []
    (root / "copies" / copy.name).unlink()
    assert [*check.wrong_accounts()]
    assert [*FolderCheck(root, Expected({copy.name: world.data["a"]}, pins=[copy.name])).lost_pinned()]


def test_an_object_that_changes_during_its_fetch_is_not_published(world):
    world.put("a", 20 << 20)
    _, store = faulty(world, Fault("read_into", nth=2, kind=FaultKind.REPLACED), size="100MB")
    with store.open_local("a") as lease, pytest.raises(StoreError):
        lease.wait([ByteRange(0, 20 << 20)])
    assert world.copies() == []


# -- the disk --


def fail_writes(monkeypatch, code, times):
    """Let the next `times` writes of fetched bytes fail."""
    really_write = copy_file.write_all
    left = [times]

    def write(fd, data, offset):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        really_write(fd, data, offset)

    monkeypatch.setattr(copy_file, "write_all", write)


def test_a_failing_disk_is_bypassed_probed_and_used_again(world, monkeypatch):
    for key in "ab":
        world.put(key)
    cache = world.cache()
    store = world.store(cache)
    clock = FakeClock()
    writing = cache._open()
    writing.breaker = Breaker(clock)
    world.fetch(store, "a")
    fail_writes(monkeypatch, errno.EIO, 2)
    with pytest.warns(RuntimeWarning, match="bypassing the cache"):
        assert world.read(store, "b") is None
    assert cache.status()["bypassed"]
    assert world.read(store, "a") is None
    clock.advance(31)
    assert world.read(store, "b") is None  # the probe meets the second failure
    clock.advance(31)
    world.fetch(store, "b")
    world.fetch(store, "a")
    assert not cache.status()["bypassed"]


def full(kind):
    if kind == "quota":
        return OSError(errno.EDQUOT, "quota exceeded")
    if kind == "disk":
        return OSError(errno.ENOSPC, "no space")
    return OSError(errno.ENOSPC, "SQLite: database or disk is full")


STEPS = {
    "the lock": (NameLock, "try_acquire", "disk"),
    "the part": (Folder, "new_file", "quota"),
    "the bytes": (copy_file, "write_all", "disk"),
    "the record": (Folder, "write_record", "disk"),
    "the name": (Folder, "give_name", "disk"),
    "reserving": (Accounts, "reserve", "catalog"),
    "booking": (Accounts, "set_charge", "catalog"),
}


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_is_full_at_any_step_evicts_once_and_is_then_bypassed(world, monkeypatch, step, times):
    """With one warning, and whatever is here is served all the same; when there is room again all is as before."""
    for key in "abc":
        world.put(key)
    cache = world.cache(policy="lru")
    store = world.store(cache)
    world.fetch(store, "a")
    place, name, kind = STEPS[step]
    really, left = getattr(place, name), [times]

    def fail(*args, **options):
        if left[0] > 0:
            left[0] -= 1
            raise full(kind)
        return really(*args, **options)

    monkeypatch.setattr(place, name, fail)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [world.read(store, key) for key in "bcb"]
        # Who waits has its bytes before the copy has its name, and the fetch fails after that.
        wait_for(lambda: not cache._open()._fetches, 60)
    if times == 1:
        assert found == [world.data[key] for key in "bcb"]
    assert all(data in (None, world.data[key]) for data, key in zip(found, "bcb", strict=True))
    # A copy that only lacks its name, or its row, is served as the part that it is: nothing is read past the cache.
    assert len(told) == (None in found), [str(one.message) for one in told]
    assert all("disk is full" in str(one.message) for one in told)
    assert left[0] < times
    assert not cache.status()["bypassed"]
    left[0] = 0
    for key in "abc":
        world.fetch(store, key)
    cache.close()
    assert cache.status()["reserved_bytes"] == 0
    assert cache.verify().is_right


# -- the folder --


def test_a_folder_deleted_during_a_fetch_costs_at_most_a_second_download(world):
    world.put("a", 20 << 20)
    gated = GateStore(world.inner)
    cache = world.cache("100MB")
    store = cache.store(gated)
    with gated.stop_at("before_read_into") as gate, store.open_local("a", world.identity("a")) as lease:
        lease.prefetch([ByteRange(0, 20 << 20)])
        gate.wait_reached()
        shutil.rmtree(world.root / "cache")
        gate.open()
        if lease.wait([ByteRange(0, 20 << 20)]):
            assert os.pread(lease.fd, 20 << 20, 0) == world.data["a"]
    world.fetch(store, "a")
    assert not cache.status()["bypassed"]
    assert len(world.copies()) == 1


def test_opening_removes_the_files_of_dead_processes_only(world):
    world.cache()
    root = world.root / "cache"
    namespace, dead = pid_namespace(), subprocess.Popen(["true"])
    dead.wait()
    stale = [root / below / f".x.json.{namespace}-{dead.pid}-0123abcd" for below in ("", *Folder.BELOW)]
    old = root / "copies" / f".x.json.{namespace}-{os.getpid()}-0123abcd"
    alive = root / "copies" / f".y.json.{namespace}-{os.getpid()}-0123abcd"
    elsewhere = root / "plans" / f".x.json.{namespace + 1}-1-0123abcd"
    orphan, stranger = root / "copies" / f"{'c' * 40}.json", root / ".mine"
    for path in (*stale, old, alive, elsewhere, orphan, stranger):
        path.write_text("x")
    os.utime(old, (0, 0))
    world.cache()
    assert [path.exists() for path in (*stale, old, orphan)] == [False] * (len(stale) + 2)
    assert [path.exists() for path in (alive, elsewhere, stranger)] == [True] * 3


@pytest.mark.filterwarnings("default")
def test_a_network_file_system_gives_a_warning(world, monkeypatch):
    monkeypatch.setattr(session, "network_file_system", lambda path: "NFS")
    world.put("a")
    with pytest.warns(RuntimeWarning, match="is on NFS; .*each machine needs a folder of its own"):
        store = world.store(world.cache())
    world.fetch(store, "a")


@pytest.mark.parametrize("error", [None, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_whose_locks_do_not_exclude_is_refused(world, monkeypatch, error):
    def flock(fd, operation):
        if error is not None:
            raise OSError(error, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="file locks do not work on this file system"):
        world.cache()


def test_without_hard_links_copies_are_renamed_into_place(world, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    world.fetch(store, "a")
    assert world.n_reads() == 1


def test_a_busy_catalog_makes_reads_bypass_the_cache(world, monkeypatch):
    from tiercache.store import shared_files

    monkeypatch.setattr(shared_files, "BUSY_S", 0.05)
    world.put("a")
    cache = world.cache()
    store = world.store(cache)
    other = sqlite3.connect(world.root / "cache" / "catalog.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.warns(RuntimeWarning, match="locked"):
        assert world.read(store, "a") is None
    other.execute("ROLLBACK")
    other.close()


def test_a_cache_that_cannot_be_reopened_is_bypassed_and_tried_again(world, monkeypatch):
    world.put("a")
    cache = world.cache()
    clock = FakeClock()
    cache._reopening = Breaker(clock)
    store = world.store(cache)
    world.fetch(store, "a")
    cache.close()

    def fail(*args, **options):
        raise OSError(errno.EIO, "broken disk")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "CacheSession", fail)
        with pytest.warns(RuntimeWarning, match="cannot be opened"):
            assert world.read(store, "a") is None
        assert not store.is_cached("a", world.identity("a"))  # a second warning would be an error here
        store.prefetch("a", world.identity("a"))
        store.publish_plan(np.zeros((0, 20), np.uint8), ReadingPlan("me", *np.zeros((4, 0), np.int64))).close()
        buffer = memoryview(bytearray(10_000))
        store.read_into("a", [(ByteRange(0, 10_000), buffer)])
        assert bytes(buffer) == world.data["a"]
    assert world.read(store, "a") is None, "it is not tried with every read"
    clock.advance(31)
    world.fetch(store, "a")


def test_a_cache_opened_on_a_full_disk_is_written_once_there_is_space(world, monkeypatch):
    world.put("a")
    world.put("b")
    world.fetch(world.store(), "a")
    world.caches.pop().close()
    really_make = Owners._make

    def refuse(self):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Owners, "_make", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be opened"):
        cache = world.cache()
    store = world.store(cache)
    assert world.read(store, "b") is None
    monkeypatch.setattr(Owners, "_make", really_make)
    cache._reopening.reset()
    world.fetch(store, "b")
