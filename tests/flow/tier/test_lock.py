"""The tier lock admits one process at a time, whoever dies, sleeps or reads an old listing."""

import subprocess
import sys
import time
from dataclasses import replace
from threading import Thread

import pytest
from tests.support.clock import FakeClock
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.tier_moves import HookAt

from tiercache.errors import CommitConflict, StoreError
from tiercache.store import MemoryStore
from tiercache.tier.lock import DOOMED_S, LOCK_FOLDER, LockRecord, TierLock
from tiercache.waiting import SystemClock, wait_for


@pytest.fixture
def store(tmp_path):
    return MemoryStore(tmp_path.as_posix().strip("/").replace("/", "-"))


def lock_of(store, **options):
    return TierLock(store, **{"renew_s": None, "lifetime_s": 60.0, "clock": FakeClock(), **options})


def key(number):
    return f"{LOCK_FOLDER}{number:020d}"


def numbers(store):
    return sorted(int(info.key[len(LOCK_FOLDER) :]) for info in store.list(LOCK_FOLDER))


def foreign(**changes):
    """Return the lock object of a process on another machine."""
    return replace(LockRecord.of_this_process(), boot="another", host="elsewhere", **changes)


class RenewingClock(FakeClock):
    """A clock on which the holder renews the lock while another process waits."""

    def __init__(self, renew):
        super().__init__()
        self._renew = renew

    def sleep(self, duration_s, cancel=None):
        super().sleep(duration_s, cancel)
        self._renew()


def test_of_many_processes_that_race_for_the_lock_one_wins(store):
    won, lost = [], []

    def come():
        lock = lock_of(store)
        try:
            lock.take()
            won.append(lock)
        except CommitConflict:
            lost.append(lock)

    threads = [Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    won[0].check()
    won[0].release()


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_at_once(store):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    store.put(key(3), replace(LockRecord.of_this_process(), pid=child.pid, started=1, renewed_s=time.time()).encode())
    clock = FakeClock()
    with lock_of(store, clock=clock):
        assert clock.slept == []
        assert numbers(store) == [4]


@pytest.mark.parametrize("late_s", [3600, -3600])
def test_a_holder_with_another_clock_is_alive_if_it_renews_the_lock_while_it_is_watched(store, late_s):
    holder = foreign(renewed_s=time.time() - late_s)
    store.put(key(1), holder.encode())
    clock = RenewingClock(lambda: store.put(key(1), replace(holder, n_renewals=len(clock.slept)).encode()))
    with pytest.raises(CommitConflict, match="elsewhere"):
        lock_of(store, clock=clock).take()


@pytest.mark.parametrize("late_s", [3600, -3600])
def test_the_lock_of_a_holder_that_stops_renewing_is_taken(store, late_s):
    store.put(key(1), foreign(renewed_s=time.time() - late_s).encode())
    clock = FakeClock()
    with lock_of(store, clock=clock) as lock:
        assert sum(clock.slept) > 59
        lock.check()


def test_an_unreadable_lock_object_is_taken_over_if_it_does_not_change(store):
    store.put(key(1), b"\xff")
    with lock_of(store) as lock:
        lock.check()


def test_a_deleted_number_is_not_used_again(store):
    """1. B saw k. 2. k + 1 was taken, released and deleted, k + 2 is held. 3. B puts k + 1, which is free."""
    store.put(key(1), foreign(renewed_s=0.0).encode())
    holders = []

    def others_come():
        if not holders:
            with lock_of(store):
                pass
            holders.append(lock_of(store))
            holders[0].take()

    with pytest.raises(CommitConflict):
        lock_of(store, clock=RenewingClock(others_come)).take()
    assert numbers(store) == [3]
    holders[0].check()
    holders[0].release()


def test_a_holder_that_lost_the_lock_notices(store):
    with lock_of(store) as lock:
        store.put(key(2), foreign(renewed_s=time.time()).encode())
        with pytest.raises(CommitConflict, match="was lost to process"):
            lock.check()
        with pytest.raises(CommitConflict):
            lock.announce([("s3://a", "f")])


def test_check_renews_a_lock_that_is_due(store):
    clock = FakeClock()
    with lock_of(store, clock=clock) as lock:
        clock.advance(50)
        lock.check()
        assert LockRecord.parse(store.get(key(1))).n_renewals == 1


def test_check_fails_if_the_lock_cannot_be_renewed(store):
    faulty, clock = FaultStore(store), FakeClock()
    with lock_of(faulty, clock=clock) as lock:
        clock.advance(50)
        faulty.add(Fault("put"))
        with pytest.raises(StoreError):
            lock.check()


def test_a_thread_renews_the_lock(store):
    with lock_of(store, renew_s=0.005, clock=SystemClock()):
        assert wait_for(lambda: LockRecord.parse(store.get(key(1))).n_renewals > 2, 10.0)


def test_a_lost_answer_when_the_lock_is_taken_is_read_back(store):
    faulty = FaultStore(store, [Fault("put_if_absent", kind=FaultKind.LOST_RESPONSE)])
    with lock_of(faulty) as lock:
        lock.check()


@pytest.mark.parametrize("verb", ["list", "get", "put_if_absent"])
def test_a_failing_store_leaves_no_lock_behind(store, verb):
    store.put(key(1), foreign(released=True, renewed_s=0.0).encode())
    faulty = FaultStore(store, [Fault(verb)])
    with pytest.raises(StoreError):
        lock_of(faulty).take()
    with lock_of(store) as lock:
        lock.check()


def test_copies_that_a_sleeping_holder_may_delete_are_unreliable(store):
    store.put(key(1), foreign(renewed_s=0.0, dropping=(("s3://a", "f"),)).encode())
    with lock_of(store) as lock:
        assert list(lock.doomed_copies) == [("s3://a", "f")]
    with lock_of(store) as lock:  # the next after that hears of it too
        assert list(lock.doomed_copies) == [("s3://a", "f")]


def test_copies_that_a_dead_process_was_deleting_are_reliable(store):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = replace(LockRecord.of_this_process(), pid=child.pid, started=1, dropping=(("s3://a", "f"),))
    store.put(key(1), dead.encode())
    with lock_of(store) as lock:
        assert lock.doomed_copies == {}


def test_a_copy_is_unreliable_for_a_week(store):
    doomed = (("s3://a", "old", time.time() - DOOMED_S - 1), ("s3://a", "new", time.time() - DOOMED_S + 60))
    store.put(key(1), foreign(renewed_s=0.0, released=True, doomed=doomed).encode())
    with lock_of(store) as lock:
        assert list(lock.doomed_copies) == [("s3://a", "new")]


def test_deletions_are_announced_before_the_lock_is_checked(store):
    said = []
    with lock_of(store) as lock:
        hook = HookAt("tier_lock.announced", do=lambda: said.append(LockRecord.parse(store.get(key(1))).dropping))
        with hook:
            lock.announce([("s3://a", "f")])
    assert said == [(("s3://a", "f"),)]
