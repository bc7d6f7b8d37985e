"""Numbered logs: one writer wins each number, and the newest is found from any number, with and without a listing."""

from threading import Thread

import pytest
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.stores import GateStore

from tiercache.errors import StoreError
from tiercache.store import MemoryStore
from tiercache.store.numbered_log import NumberedLog


@pytest.fixture
def store(tmp_path):
    made = MemoryStore(f"numbered-{tmp_path.name}")
    yield made
    made.delete([info.key for info in made.list()])


def log_of(store, **options):
    return NumberedLog(store, "log/", ".x", **options)


def test_one_of_racing_writers_gets_each_number(store):
    won = []

    def write(name):
        won.extend((n, name) for n in range(1, 20) if log_of(store).put_newest(n, name))

    threads = [Thread(target=write, args=(name,)) for name in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [n for n, _ in won]
    assert len(numbers) == len(set(numbers))
    assert all(log_of(store).get(n) == name for n, name in won)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_the_newest_is_found_from_any_number(store, start):
    log = log_of(store)
    assert log.newest(start) is None
    for n in (3, 4, 5):
        store.put(log.key(n), b"%d" % n)
    store.put("log/other", b"")
    assert (log.newest(start), log.numbers()) == ((5, b"5"), [3, 4, 5])


def test_without_a_listing_deleted_numbers_are_skipped(store):
    faulty = FaultStore(store, [Fault("list", status=403, retryable=False, times=99)])
    log = log_of(faulty)
    for n in (30, 31):
        store.put(log.key(n), b"%d" % n)
    assert (log.highest(), log.newest(5), log.newest(0)) == (None, (31, b"31"), None)


def test_a_store_that_answers_every_request_is_refused(store):
    class Answering(MemoryStore):
        def get(self, key):
            return key.encode()

    with pytest.raises(StoreError, match=r"log/99999999999999999999\.x: .* the server answers every request") as caught:
        log_of(Answering(store.name)).newest(1)
    assert not caught.value.retryable


def test_forbidden_counts_as_missing_only_if_nothing_was_listed(store):
    faulty = FaultStore(store, [Fault("get", status=403, retryable=False, times=99)])
    assert log_of(faulty, hides_missing=True).get(1) is None
    with pytest.raises(StoreError):
        log_of(faulty, hides_missing=True).get(1, is_listed=True)
    with pytest.raises(StoreError):
        log_of(faulty).get(1)


def test_a_lost_answer_is_resolved_by_reading_back(store):
    log = log_of(FaultStore(store, [Fault("put_if_absent", kind=FaultKind.LOST_RESPONSE)]))
    assert log.put(1, b"mine")
    log_of(store).put(2, b"others")
    log = log_of(FaultStore(store, [Fault("put_if_absent", kind=FaultKind.LOST_RESPONSE)]))
    assert not log.put(2, b"mine")


def test_a_put_that_cannot_be_read_back_may_be_done(store):
    log = log_of(FaultStore(store, [Fault("put_if_absent", kind=FaultKind.LOST_RESPONSE), Fault("get")]))
    with pytest.raises(StoreError) as failed:
        log.put(1, b"mine")
    assert failed.value.maybe_done


def test_a_late_writer_withdraws_its_number(store):
    gated = GateStore(store)
    gate = gated.stop_at("before_put_if_absent", log_of(store).key(1))
    results = []
    late = Thread(target=lambda: results.append(log_of(gated).put_newest(1, b"late")))
    late.start()
    with gate:
        gate.wait_reached()
        log_of(store).put(1, b"early")
        log_of(store).put(2, b"early")
        log_of(store).delete([1])
    late.join()
    assert (results, log_of(store).numbers()) == ([False], [2])
