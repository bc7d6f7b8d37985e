"""The execution of calls: retries, time limits, threads, hedges, and the end of a call."""

from __future__ import annotations

import threading

import pytest
from tests.support.clock import FakeClock

from tiercache.errors import StoreError
from tiercache.stats import Counters
from tiercache.store.remote import (
    CallLimit,
    RequestRunner,
    RequestTimes,
    RetryPolicy,
    call_threads,
    cancel_calls_when,
    wait_for_answer,
    with_retries,
)
from tiercache.waiting import SYSTEM_CLOCK, wait_for

# The gates of these tests open after 60 s; a test that ends well has not waited for that.
GATE_S = 60


@pytest.fixture
def make():
    """Runners of a store; close() of each at the end."""
    made = []

    def build(n_requests=16, clock=SYSTEM_CLOCK, **options):
        counters = Counters("retries", "hedges")
        made.append(RequestRunner(n_requests, RetryPolicy(first_s=0.0, longest_s=0.0), clock, counters, **options))
        return made[-1], counters

    yield build
    for runner in made:
        runner.close()


def limit(clock=SYSTEM_CLOCK, **options):
    how = {"timeout_s": None, "endpoint": lambda: "s3://bucket/a", "counters": Counters("retries", "throttled")}
    return CallLimit("s3://bucket/a", "get", clock=clock, **how | options)


def answer(value):
    def send(attempt):
        attempt.received()
        return value

    return send


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


class Silent:
    """An answer that does not come, and is awaited until somebody cancels it."""

    def __init__(self, ended=None):
        self.is_awaited, self.ended, self.error = threading.Event(), ended or threading.Event(), None

    def wait(self, timeout_s):
        self.is_awaited.set()
        return self.ended.wait(timeout_s)

    def result(self):
        self.is_awaited.set()
        assert self.ended.wait(GATE_S)
        if self.error is not None:
            raise self.error

    def cancel(self, error):
        self.error = error
        self.ended.set()


def test_a_request_that_hangs_is_hedged_and_the_second_answer_is_returned(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)
    assert runner.run([answer(0)] * 40, limit(clock))
    hanging, results = Hanging("answer"), []
    thread = threading.Thread(target=lambda: results.extend(runner.run([hanging], limit(clock))))
    thread.start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    clock.advance(1)
    thread.join(GATE_S)
    assert results == ["answer"]
    assert not hanging.gate.is_set()
    assert (counters["hedges"], counters["retries"]) == (1, 0)
    hanging.gate.set()


def test_a_request_gets_more_attempts_the_longer_it_is_silent():
    times = RequestTimes()
    assert not times.take_hedge(4.9, 1), "nothing is known yet"
    assert times.take_hedge(5.1, 1)
    assert not times.take_hedge(9.9, 2)
    assert times.take_hedge(10.1, 2)
    times.n_requests = 40
    for _ in range(100):
        times.note_answer(0.3)
    assert not times.take_hedge(0.2, 1)
    assert [times.take_hedge(0.4, 1) for _ in range(3)] == [True, True, False], "of 40 requests, 5 %"
    assert times.take_hedge(2.5, 1), "8 times as long"
    assert not times.take_hedge(2.5, 2)
    assert times.take_hedge(4.9, 2)


def test_a_request_that_brings_bytes_is_not_hedged(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)

    def send(attempt):
        for _ in range(100):
            clock.advance(4)
            attempt.received()
        return "slow"

    assert runner.run([send], limit(clock, timeout_s=60)) == ["slow"]
    assert (counters["retries"], counters["hedges"]) == (0, 0)


def pass_time(clock, duration_s):
    """Let time pass in steps, at each of which the callers look at their requests."""
    for _ in range(int(duration_s)):
        clock.advance(1)
        threading.Event().wait(0.06)


def test_a_request_whose_bytes_are_queued_behind_those_of_others_is_not_repeated(make):
    """A proxy with deep buffers sends one answer after the other."""
    clock, call_counters = FakeClock(), Counters("retries", "throttled")
    runner, counters = make(clock=clock, stall_s=5)
    both, first_sent = threading.Barrier(2), threading.Event()

    def send_first(attempt):
        attempt.expects(100)
        both.wait(GATE_S)
        for _ in range(10):
            pass_time(clock, 2)
            attempt.received(10)
        first_sent.set()

    def send_second(attempt):
        attempt.expects(100)
        both.wait(GATE_S)
        if not wait_for_answer(Silent(first_sent)):
            attempt.received(100)
        return "second"

    calls = [limit(clock, timeout_s=8, counters=call_counters) for _ in range(2)]
    first = threading.Thread(target=runner.run, args=([send_first], calls[0]))
    first.start()
    assert runner.run([send_second], calls[1]) == ["second"]
    first.join(GATE_S)
    assert (counters["hedges"], call_counters["retries"]) == (0, 0)


def test_a_request_is_late_once_all_bytes_that_may_be_queued_before_it_have_come(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)
    both, hanging, n_before = threading.Barrier(2), Hanging("answer"), []

    def send_first(attempt):
        attempt.expects(100)
        both.wait(GATE_S)
        pass_time(clock, 1)
        for n_bytes in (50, 40, 60):
            pass_time(clock, 3)
            n_before.append(counters["hedges"])
            attempt.received(n_bytes)
        pass_time(clock, 2)

    def send_second(attempt):
        if not hanging.n_attempts:
            attempt.expects(100)
            both.wait(GATE_S)
        return hanging(attempt)

    results = []
    first = threading.Thread(target=runner.run, args=([send_first], limit(clock)))
    second = threading.Thread(target=lambda: results.extend(runner.run([send_second], limit(clock))))
    first.start()
    second.start()
    second.join(GATE_S)
    assert results == ["answer"]
    assert (n_before, counters["hedges"]) == ([0, 0, 0], 1)
    hanging.gate.set()
    first.join(GATE_S)


def test_an_attempt_that_stalls_is_interrupted_and_repeated(make):
    clock, call_counters, silent = FakeClock(), Counters("retries", "throttled"), Silent()
    runner, counters = make(clock=clock, hedges=False, stall_s=20)

    def send(_attempt):
        return "answer" if silent.ended.is_set() else wait_for_answer(silent)

    results = []
    call = limit(clock, counters=call_counters)
    thread = threading.Thread(target=lambda: results.extend(runner.run([send], call)))
    thread.start()
    assert silent.is_awaited.wait(GATE_S)
    clock.advance(21)
    thread.join(GATE_S)
    assert results == ["answer"]
    assert (counters["hedges"], call_counters["retries"]) == (0, 1)
    assert "no answer, or no further byte, from s3://bucket/a for 20 s" in str(silent.error)


def test_the_place_of_a_hanging_request_is_given_to_the_next_one(make):
    clock = FakeClock()
    runner, counters = make(n_requests=1, clock=clock)
    hanging, results = Hanging(0), []
    requests = [hanging, answer(1), answer(2)]
    thread = threading.Thread(target=lambda: results.extend(runner.run(requests, limit(clock))))
    thread.start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    clock.advance(6)
    thread.join(GATE_S)
    assert results == [0, 1, 2]
    assert counters["hedges"] == 1
    hanging.gate.set()


def test_an_error_that_is_not_worth_repeating_ends_the_call_and_its_other_requests(make):
    runner, _ = make()
    hanging = Hanging(0)

    def refuse(attempt):
        raise StoreError("no", url="u")

    with pytest.raises(StoreError, match="no"):
        runner.run([hanging, refuse], limit())
    hanging.gate.set()


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
    thread = threading.Thread(target=lambda: results.extend(runner.run([send], limit(clock))))
    thread.start()
    assert begun.wait(GATE_S)
    clock.advance(1)
    thread.join(GATE_S)
    assert results == ["answer"]
    assert counters["hedges"] == 1


@pytest.mark.parametrize("deadline_s", [None, 1000.0])
def test_closing_a_store_ends_calls_that_wait_for_threads(make, deadline_s):
    runner, _ = make(n_requests=1)
    gate, errors = threading.Event(), []
    begun = threading.Event()

    def call():
        def send(attempt):
            begun.set()
            assert gate.wait(GATE_S)

        try:
            runner.run([send] * 3, limit(deadline_s=deadline_s))
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
    runner, _ = make(n_requests=1, clock=clock)
    hanging = Hanging("first")
    first, second = [], []
    threads = [
        threading.Thread(target=lambda: first.extend(runner.run([hanging], limit(clock, timeout_s=1e9)))),
        threading.Thread(target=lambda: second.extend(runner.run([answer("second")], limit(clock, timeout_s=1)))),
    ]
    threads[0].start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    threads[1].start()
    clock.advance(4)  # less than the first attempt may be silent
    hanging.gate.set()
    for thread in threads:
        thread.join(GATE_S)
    assert (first, second) == (["first"], ["second"])


def test_no_more_requests_run_at_once_than_allowed(make):
    runner, _ = make(n_requests=2)
    lock, running, most = threading.Lock(), [0], [0]

    def send(attempt):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.002)
        with lock:
            running[0] -= 1

    threads = [threading.Thread(target=runner.run, args=([send] * 20, limit())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GATE_S)
    assert 1 <= most[0] <= 2


def test_a_write_is_awaited_although_its_time_is_over_and_never_hedged(make):
    clock = FakeClock()
    runner, counters = make(clock=clock)
    hanging, results = Hanging("written"), []
    call = limit(clock, timeout_s=1)
    thread = threading.Thread(target=lambda: results.extend(runner.run([hanging], call, is_write=True)))
    thread.start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    clock.advance(100)
    threading.Event().wait(0.2)  # the caller looks at its requests
    assert not results
    hanging.gate.set()
    thread.join(GATE_S)
    assert (results, counters["hedges"], hanging.n_attempts) == (["written"], 0, 1)


def test_a_first_wait_of_5_s_is_reported_once_for_all_calls_and_again_after_progress(make, caplog):
    clock = FakeClock()
    runner, _ = make(clock=clock)
    hanging, progress = [Hanging(i, n_hanging=99) for i in range(3)], threading.Event()
    calls = [limit(clock, timeout_s=1e9, endpoint=lambda: "http://e") for _ in hanging]
    threads = [
        threading.Thread(target=runner.run, args=([one], call)) for one, call in zip(hanging, calls, strict=True)
    ]
    for thread, one in zip(threads, hanging, strict=True):
        thread.start()
        assert wait_for(lambda one=one: one.n_attempts, GATE_S)
    clock.advance(4.9)
    progress.wait(0.2)
    assert not caplog.records
    clock.advance(0.2)
    assert wait_for(lambda: caplog.records and all(call.is_reported for call in calls), GATE_S)
    assert len(caplog.records) == 1
    assert "has waited 5 s for http://e" in caplog.text
    for call in calls:
        call.progressed()
    clock.advance(5.1)
    assert wait_for(lambda: len(caplog.records) > 1 and all(call.is_reported for call in calls), GATE_S)
    assert len(caplog.records) == 2
    for thread, one in zip(threads, hanging, strict=True):
        one.gate.set()
        thread.join(GATE_S)


@pytest.mark.parametrize(("usual_s", "quiet_s", "reported_s"), [(0.1, 1.9, 2.1), (3.0, 5.9, 6.1)])
def test_a_wait_is_reported_only_if_it_is_unusual_for_the_store(make, caplog, usual_s, quiet_s, reported_s):
    clock = FakeClock()
    runner, _ = make(clock=clock)
    for _ in range(20):
        runner.run([lambda _attempt: clock.advance(usual_s)], limit(clock), hedges=False)
    hanging, call = Hanging(0, n_hanging=99), limit(clock, timeout_s=1e9)
    thread = threading.Thread(target=runner.run, args=([hanging], call), kwargs={"hedges": False})
    thread.start()
    assert wait_for(lambda: hanging.n_attempts, GATE_S)
    clock.advance(quiet_s)
    threading.Event().wait(0.2)  # the caller looks at its requests
    assert not caplog.records
    clock.advance(reported_s - quiet_s)
    assert wait_for(lambda: caplog.records and call.is_reported, GATE_S)  # the mark comes just before the line
    assert len(caplog.records) == 1
    hanging.gate.set()
    thread.join(GATE_S)


@pytest.mark.parametrize("end", ["cancelled", "closed", "answered", "refused"])
def test_the_end_of_a_request_or_of_its_call_interrupts_the_attempts_that_run(make, end):
    clock, cancel, silent = FakeClock(), threading.Event(), Silent()
    runner, _ = make(clock=clock)

    def send(_attempt):
        return "answer" if silent.is_awaited.is_set() else wait_for_answer(silent)

    def refuse(_attempt):
        assert silent.is_awaited.wait(GATE_S)
        raise StoreError("no", url="u")

    results = []

    def call():
        try:
            results.extend(runner.run([send, refuse] if end == "refused" else [send], limit(clock, cancel=cancel)))
        except StoreError as error:
            results.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    assert silent.is_awaited.wait(GATE_S)
    if end == "cancelled":
        cancel.set()
    elif end == "closed":
        runner.close()
    elif end == "answered":  # by a hedge
        clock.advance(6)
    assert silent.ended.wait(GATE_S)
    thread.join(GATE_S)
    expected = {"cancelled": "get: cancelled", "closed": "the store was closed", "answered": "answer", "refused": "no"}
    assert len(results) == 1
    assert expected[end] in results[0]


def test_an_exception_in_the_block_of_call_threads_cancels_their_calls(make):
    runner, _ = make()
    silent = Silent()
    with pytest.raises(KeyboardInterrupt), call_threads(1, "test") as pool:  # noqa: PT012
        future = pool.submit(lambda: runner.run([lambda _attempt: wait_for_answer(silent)], limit()))
        assert silent.is_awaited.wait(GATE_S)
        raise KeyboardInterrupt
    assert "get: cancelled" in str(future.exception(GATE_S))
    assert silent.ended.is_set()


# Retries


def test_a_cancelled_call_is_not_retried():
    unwanted, asked = threading.Event(), []

    def attempt():
        asked.append(1)
        unwanted.set()
        raise StoreError("away", url="u", retryable=True)

    with cancel_calls_when(unwanted):
        call = limit(FakeClock())
    with pytest.raises(StoreError, match="away"):
        with_retries(attempt, RetryPolicy(), call)
    assert len(asked) == 1
