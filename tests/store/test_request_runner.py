"""The execution of read requests: threads, hedges, deadlines of attempts, and the end of a call."""

from __future__ import annotations

import threading

import pytest
from tests.support.clock import FakeClock

from tiercache.errors import StoreError
from tiercache.stats import Counters
from tiercache.store.machine_limits import NO_LIMITS, MachineLimits, StoreLimits
from tiercache.store.request_runner import Gate, RequestRunner
from tiercache.store.retry import CallLimit, RetryPolicy
from tiercache.waiting import SYSTEM_CLOCK, wait_for

# The gates of these tests open after 60 s; a test that ends well has not waited for that.
GATE_S = 60


@pytest.fixture(autouse=True)
def _own_runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def make():
    """Runners of a store; close() of each at the end."""
    made = []

    def build(most_requests=16, clock=SYSTEM_CLOCK, limits=NO_LIMITS):
        counters = Counters("retries", "hedges")
        gate = Gate(MachineLimits("a store", limits), most_requests, clock)
        made.append(RequestRunner(gate, RetryPolicy(first_s=0.0, longest_s=0.0), most_requests, clock, counters))
        return made[-1], counters

    yield build
    for runner in made:
        runner.close()


def limit(clock=SYSTEM_CLOCK, **options):
    return CallLimit("s3://bucket/a", "get", clock=clock, **options)


def answer(value, n_bytes=1000):
    def send(attempt):
        attempt.received(n_bytes)
        return value

    return n_bytes, send


class Hanging:
    """A request whose first attempts hang until release(), and whose next one is answered."""

    def __init__(self, value, n_hanging=1):
        self.value, self.n_hanging = value, n_hanging
        self.n_attempts, self.gate, self._lock = 0, threading.Event(), threading.Lock()

    def __call__(self, attempt):
        with self._lock:
            self.n_attempts += 1
            hangs = self.n_attempts <= self.n_hanging
        if hangs:
            assert self.gate.wait(GATE_S)
        return self.value


def test_results_come_in_the_order_of_the_requests(make):
    runner, _ = make(most_requests=3)
    assert runner.run([answer(i) for i in range(20)], limit()) == list(range(20))
    assert runner.run([], limit()) == []


def test_a_request_that_hangs_is_hedged_and_the_second_answer_is_returned(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)
    assert runner.run([answer(0)] * 40, limit(clock))
    hanging, results = Hanging("answer"), []
    thread = threading.Thread(target=lambda: results.extend(runner.run([(1000, hanging)], limit(clock))))
    thread.start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    clock.advance(1)
    thread.join(GATE_S)
    assert results == ["answer"]
    assert not hanging.gate.is_set()
    assert (counters["hedges"], counters["retries"]) == (1, 0)
    hanging.gate.set()


def test_hedges_that_exceed_the_budget_wait_for_the_deadline_of_the_attempt(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)
    assert runner.run([answer(0)] * 20, limit(clock))
    hanging = [Hanging(i) for i in range(2)]
    for one, counted in zip(hanging, [(1, 0), (1, 1)], strict=True):
        results = []
        call = limit(clock)
        thread = threading.Thread(target=lambda one=one: results.extend(runner.run([(1000, one)], call)))  # noqa: B023
        thread.start()
        assert wait_for(lambda one=one: one.n_attempts, GATE_S)
        clock.advance(1)  # late
        threading.Event().wait(0.2)  # the caller looks at its requests
        clock.advance(2)  # beyond the deadline
        thread.join(GATE_S)
        assert (counters["hedges"], counters["retries"]) == counted, "of 22 requests, 5 % may be hedged"
        one.gate.set()


def test_a_request_without_a_byte_is_sent_again_although_nothing_was_observed(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)
    hanging = Hanging("answer", n_hanging=2)
    results = []
    thread = threading.Thread(target=lambda: results.extend(runner.run([(1000, hanging)], limit(clock))))
    thread.start()
    for n_attempts in (1, 2):
        assert wait_for(lambda n=n_attempts: hanging.n_attempts >= n, GATE_S)
        clock.advance(11)  # more than the first deadline, doubled once
    thread.join(GATE_S)
    assert results == ["answer"]
    assert (counters["retries"], counters["hedges"]) == (2, 0)
    hanging.gate.set()


def test_a_request_that_brings_bytes_is_neither_hedged_nor_sent_again(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)

    def send(attempt):
        for _ in range(100):
            clock.advance(4)
            attempt.received(10)
        return "slow"

    assert runner.run([(1000, send)], limit(clock, timeout_s=60)) == ["slow"]
    assert (counters["retries"], counters["hedges"]) == (0, 0)


def test_the_place_of_a_hanging_request_is_given_to_the_next_one(make):
    clock = FakeClock()
    runner, counters = make(most_requests=1, clock=clock)
    hanging, results = Hanging(0), []
    requests = [(1000, hanging), answer(1), answer(2)]
    thread = threading.Thread(target=lambda: results.extend(runner.run(requests, limit(clock))))
    thread.start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    clock.advance(6)
    thread.join(GATE_S)
    assert results == [0, 1, 2]
    assert counters["retries"] == 1
    hanging.gate.set()


def test_an_error_that_is_not_worth_repeating_ends_the_call_and_its_other_requests(make):
    runner, _ = make()
    hanging = Hanging(0)

    def refuse(attempt):
        raise StoreError("no", url="u")

    with pytest.raises(StoreError, match="no"):
        runner.run([(1000, hanging), (1000, refuse)], limit())
    hanging.gate.set()


def test_an_attempt_knows_that_its_call_has_ended(make):
    runner, _ = make()
    seen = []

    def send(attempt):
        seen.append(attempt)
        assert wait_for(lambda: attempt.is_over, GATE_S)

    with pytest.raises(StoreError, match="not done within"):
        runner.run([(1000, send)], limit(deadline_s=0.1))
    assert seen[0].is_over


def test_an_error_of_a_hedge_does_not_end_the_request(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)
    assert runner.run([answer(0)] * 40, limit(clock))
    failed, begun = threading.Event(), threading.Event()

    def send(attempt):
        if begun.is_set():
            failed.set()
            raise StoreError("the hedge failed", url="u")
        begun.set()
        assert failed.wait(GATE_S)
        return "answer"

    results = []
    thread = threading.Thread(target=lambda: results.extend(runner.run([(1000, send)], limit(clock))))
    thread.start()
    assert begun.wait(GATE_S)
    clock.advance(1)
    thread.join(GATE_S)
    assert results == ["answer"]
    assert counters["hedges"] == 1


@pytest.mark.parametrize("deadline_s", [None, 1000.0])
def test_closing_a_store_ends_calls_that_wait_for_threads(make, deadline_s):
    runner, _ = make(most_requests=1)
    gate, errors = threading.Event(), []
    begun = threading.Event()

    def call():
        def send(attempt):
            begun.set()
            assert gate.wait(GATE_S)

        try:
            runner.run([(1, send)] * 3, limit(deadline_s=deadline_s))
        except StoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(GATE_S)
    runner.close()
    assert wait_for(lambda: errors, GATE_S)
    gate.set()
    for thread in threads:
        thread.join(GATE_S)
    assert all("closed during" in str(error) and error.retryable for error in errors)


def test_time_in_which_other_calls_have_all_places_does_not_count(make):
    clock = FakeClock()
    runner, _ = make(most_requests=1, clock=clock)
    hanging = Hanging("first")
    first, second = [], []
    threads = [
        threading.Thread(target=lambda: first.extend(runner.run([(1000, hanging)], limit(clock, timeout_s=1e9)))),
        threading.Thread(target=lambda: second.extend(runner.run([answer("second")], limit(clock, timeout_s=1)))),
    ]
    threads[0].start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    threads[1].start()
    clock.advance(4)  # less than the deadline of the first attempt
    hanging.gate.set()
    for thread in threads:
        thread.join(GATE_S)
    assert (first, second) == (["first"], ["second"])


def test_no_more_requests_run_at_once_than_the_machine_may_send(make):
    limits = StoreLimits(max_requests=2)
    runners = [make(limits=limits)[0] for _ in range(2)]
    lock, running, most = threading.Lock(), [0], [0]

    def send(attempt):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.002)
        with lock:
            running[0] -= 1

    threads = [threading.Thread(target=runner.run, args=([(1000, send)] * 20, limit())) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GATE_S)
    assert 1 <= most[0] <= 2
