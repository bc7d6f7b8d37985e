"""Wrong copies: put aside, compared with what comes in their place, reported, deleted; and a crash at every step."""

import errno
import json
import os
import time
from pathlib import Path

import pytest

from tiercache import crash_points
from tiercache.cache import quarantine
from tiercache.cache.folder import Folder
from tiercache.model import ByteRange
from tiercache.waiting import wait_for

# From Python 3.12 on: what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def files(world):
    return sorted((world.root / "cache" / "quarantine").iterdir())


def reports(world):
    return [json.loads(path.read_text()) for path in files(world) if path.suffix == ".json"]


@pytest.fixture
def store(world):
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    return store


def test_a_wrong_copy_is_never_served_again_and_the_report_says_where_it_differed(world, store):
    world.damage("a")
    assert store.verify_copy("a", world.identity("a")) is True
    assert world.copies() == []
    assert [path.suffix for path in files(world)] == [".bad", ".json"]
    world.fetch(store, "a")
    (report,) = reports(world)
    assert [path.suffix for path in files(world)] == [".json"]
    assert report["source"].endswith("/a")
    assert (report["first_offset"], report["last_offset"], report["n_bytes_differ"]) == (5000, 5000, 1)
    assert report["expected_crc32c"] == world.identity("a").crc32c != report["found_crc32c"]
    assert "1 bytes differed, from offset 5000" in report["verdict"]
    status = store.cache.status()
    assert (status["quarantined"], status["figures"]["quarantined"], status["reports"]) == (1, 1, [report])
    assert world.n_reads() == 2


def test_a_right_copy_stays_where_it_is(world, store):
    assert store.verify_copy("a", world.identity("a")) is False
    assert (files(world), store.cache.stats()["quarantined"], world.n_reads()) == ([], 0, 1)


@pytest.mark.parametrize("n_bytes", [0, 4096, 9_999])
def test_a_copy_that_was_cut_is_compared_too(world, store, n_bytes):
    path = world.copy("a")
    path.chmod(0o600)
    os.truncate(path, n_bytes)
    assert store.verify_copy("a", world.identity("a")) is True
    world.fetch(store, "a")
    assert f"{n_bytes:,} bytes instead of 10,000" in reports(world)[0]["verdict"]


def test_a_copy_that_cannot_be_read_is_put_aside_as_well(world, store, monkeypatch):
    really_read, copy = os.preadv, world.copy("a")

    def read(fd, buffers, offset):
        if os.fstat(fd).st_ino == inode:
            raise OSError(5, "input/output error")
        return really_read(fd, buffers, offset)

    inode = copy.stat().st_ino
    monkeypatch.setattr(os, "preadv", read)
    assert store.verify_copy("a", world.identity("a")) is True
    world.fetch(store, "a")
    (report,) = reports(world)
    assert "up to offset 0" in report["reason"]
    assert report["unreadable_at"] == 0


@pytest.mark.parametrize("call", ["open_copy", "lstat", "fstat"])
def test_a_wrong_copy_that_the_disk_does_not_let_us_look_at_is_served_no_more(world, store, monkeypatch, call):
    world.damage("a")
    place = Folder if call == "open_copy" else os
    really, copy = getattr(place, call), world.copy("a")
    failed = []

    def fail(*args, **options):
        is_ours = call == "open_copy" or (call == "lstat" and Path(args[0]) == copy) or call == "fstat"
        if is_ours and not failed:
            failed.append(args)
            raise OSError(errno.EIO, "broken disk")
        return really(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, call, fail)
        assert store.verify_copy("a", world.identity("a")) is True
    assert failed
    assert world.read(store, "a") in (None, world.data["a"])


def test_the_bytes_of_a_wrong_copy_count_until_its_last_reader_has_let_it_go(world, store, locks):
    cache = store.cache
    used = cache.stats()["bytes_used"]
    with store.open_local("a", world.identity("a")) as lease:
        assert lease.wait([ByteRange(0, 10_000)])
        world.damage("a")
        assert store.verify_copy("a", world.identity("a")) is True
        assert cache.status()["reserved_bytes"] == used
        world.fetch(store, "a")
        assert len(files(world)) == 1
        cache.stats()
        reserved = cache.status()["reserved_bytes"]
        # Where locks lie nobody can be seen to hold it; the free floor counts its blocks all the same.
        assert reserved == (used if locks == "locks hold" else 0)
    assert cache.status()["reserved_bytes"] == 0


def test_what_an_idle_process_still_counts_of_deleted_copies_is_room_for_the_others(world, store, locks):
    size = 5 * store.cache.stats()["bytes_used"] // 2  # of two copies, one of which is just coming
    lease = store.open_local("a", world.identity("a"))
    assert lease.wait([ByteRange(0, 10_000)])
    idle = store.cache._open().writing
    idle.publisher.remove(world.copy("a").name)
    other = world.store(world.cache(size, policy="lru"))
    world.put("b")
    world.fetch(other, "b")
    lease.close()
    world.fetch(other, "a")
    assert world.read(other, "b") == world.data["b"], "there is room for both"
    assert idle.accounts.sums()[1] == 0
    assert idle.accounts.limit_bytes() == size


def test_what_is_deleted_under_a_reader_counts_until_he_has_let_it_go(world, store, locks):
    cache = store.cache
    used = cache.stats()["bytes_used"]
    with store.open_local("a", world.identity("a")) as lease:
        assert lease.wait([ByteRange(0, 10_000)])
        cache._open().writing.publisher.remove(world.copy("a").name)
        status = cache.status()
        assert status["bytes_used"] == 0
        assert status["reserved_bytes"] == (used if locks == "locks hold" else 0)
    world.fetch(store, "a")
    assert wait_for(lambda: cache._open().writing.accounts.sums()[1] == 0, 60), "a miss looks whether it is gone"


def test_the_second_of_two_who_find_it_wrong_leaves_the_right_copy_alone(world, store):
    world.damage("a")
    writing = store.cache._open().writing
    fd = store.cache._open().folder.open_copy(world.copy("a").name)
    try:
        assert store.verify_copy("a", world.identity("a")) is True
        world.fetch(store, "a")
        name = world.copy("a").name
        assert writing.quarantine.take(name, fd, reason="late") is False
    finally:
        os.close(fd)
    assert world.copy("a").read_bytes() == world.data["a"]


def test_a_cache_that_closes_ends_what_still_waits(world, store):
    world.damage("a")
    store.verify_copy("a", world.identity("a"))
    store.cache.close()
    (report,) = reports(world)
    assert [path.suffix for path in files(world)] == [".json"]
    assert "not compared" in report["verdict"]


def test_many_wrong_copies_are_not_kept(world, monkeypatch):
    monkeypatch.setattr(quarantine, "MOST_COPIES", 2)
    store = world.store()
    for key in "abcd":
        world.put(key)
        world.fetch(store, key)
        world.damage(key)
        store.verify_copy(key, world.identity(key))
    assert [path.suffix for path in files(world)].count(".bad") == 2
    assert sum("too many" in report.get("verdict", "") for report in reports(world)) == 2


@pytest.mark.parametrize(("jump_s", "n_left"), [(0, 1), (40 * 86400, 0), (-40 * 86400, 0), (-3600, 1)])
def test_reports_are_kept_for_a_month_whatever_the_clock_does(world, store, monkeypatch, jump_s, n_left):
    world.damage("a")
    store.verify_copy("a", world.identity("a"))
    world.fetch(store, "a")
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + jump_s)
    store.cache._open().writing.quarantine.sweep()
    assert len(files(world)) == n_left


def test_no_more_reports_are_kept_than_a_person_will_read(world, store, monkeypatch):
    monkeypatch.setattr(quarantine, "MOST_REPORTS", 3)
    for i in range(5):
        (world.root / "cache" / "quarantine" / f"{'b' * 40}-{i}.json").write_text('{"compared": true}')
    store.cache._open().writing.quarantine.sweep()
    assert len(files(world)) == 3


STEPS = [f"quarantine.{step}" for step in ("noted", "moved", "unrecorded", "compared", "reported", "deleted")]


@pytest.mark.parametrize("step", STEPS)
def test_dying_at_any_step_leaves_nothing_that_needs_a_hand(world, store, step):
    identity = world.identity("a")
    world.damage("a")

    def die(point):
        if point == step:
            os._exit(9)

    pid = os.fork()
    if pid == 0:
        try:
            crash_points.set_hook(die)
            child = world.store(world.cache())
            child.verify_copy("a", identity)
            world.fetch(child, "a")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    store.cache.close()
    store = world.store(world.cache())
    store.verify_copy("a", identity)
    world.fetch(store, "a")
    store.cache._open().writing.quarantine.sweep()
    assert {path.suffix for path in files(world)} <= {".json"}
    assert world.copy("a").read_bytes() == world.data["a"]
    assert store.cache.status()["reserved_bytes"] == 0
    assert store.cache.verify().is_right
