"""Trying again, and waiting."""

from __future__ import annotations

from threading import Event

import pytest
from tests.support.clock import FakeClock

from tiercache.errors import StoreError
from tiercache.store.retry import CallLimit, RetryPolicy, stop_retries_when, with_retries
from tiercache.waiting import SystemClock, pause, wait_for


def failing(n_times, **facts):
    calls = []

    def attempt():
        calls.append(1)
        if len(calls) <= n_times:
            raise StoreError("no", url="u", **facts)
        return len(calls)

    return attempt, calls


def limit(clock, **options):
    return CallLimit("u", "read", clock=clock, **options)


def test_pauses_grow_are_drawn_and_bounded():
    policy = RetryPolicy(first_s=0.1, longest_s=1.0)
    for n_failed, most_s in ((1, 0.1), (2, 0.2), (4, 0.8), (5, 1.0), (50, 1.0)):
        drawn = [policy.pause_s(n_failed) for _ in range(50)]
        assert all(0 <= s <= most_s for s in drawn)
        assert len(set(drawn)) > 10


def test_only_what_is_retryable_and_surely_not_done_is_tried_again():
    for facts in ({"retryable": False}, {"retryable": True, "maybe_done": True}):
        attempt, calls = failing(1, **facts)
        with pytest.raises(StoreError):
            with_retries(attempt, RetryPolicy(), limit(FakeClock()))
        assert len(calls) == 1
    attempt, calls = failing(3, retryable=True)
    assert with_retries(attempt, RetryPolicy(), limit(FakeClock())) == 4


def test_attempts_total_time_and_deadline_end_it():
    for policy, options, most_s in (
        (RetryPolicy(n_attempts=3), {}, 1e9),
        (RetryPolicy(n_attempts=10**6), {"timeout_s": 20.0}, 20.0),
        (RetryPolicy(n_attempts=10**6), {"deadline_s": 7.0}, 7.0),
    ):
        clock = FakeClock()
        attempt, calls = failing(10**9, retryable=True)
        with pytest.raises(StoreError):
            with_retries(attempt, policy, limit(clock, **options))
        assert sum(clock.slept) <= most_s
        assert len(calls) == len(clock.slept) + 1


def test_a_set_stop_event_ends_a_pause_at_once():
    call = limit(FakeClock())
    attempt, calls = failing(10**9, retryable=True)

    def stopping():
        if len(calls) == 2:
            call.stop.set()
        return attempt()

    with pytest.raises(StoreError, match="no"):
        with_retries(stopping, RetryPolicy(first_s=9, longest_s=9), call)
    assert len(calls) == 3


def test_wait_for_returns_what_the_condition_gives_and_backs_off_to_50_ms():
    clock = FakeClock()
    answers = iter([None, "", 0, *[False] * 20, "there"])
    assert wait_for(lambda: next(answers), 60, clock) == "there"
    assert clock.slept[0] == pytest.approx(0.001)
    assert clock.slept == sorted(clock.slept)
    assert max(clock.slept) == pytest.approx(0.050)


def test_wait_for_gives_up_at_its_deadline_after_a_last_look():
    clock = FakeClock()
    start_s = clock.monotonic()
    asked = []
    assert wait_for(lambda: asked.append(clock.monotonic() - start_s), 0.2, clock) is None
    assert asked[0] == 0
    assert asked[-1] == pytest.approx(0.2)
    assert wait_for(lambda: "yes", 0, clock) == "yes"
    assert wait_for(lambda: asked.clear() or "", -1, clock) == ""


def test_wait_for_stops_when_cancelled_and_passes_errors_on():
    cancel = Event()
    cancel.set()
    assert wait_for(lambda: False, None, FakeClock(), cancel=cancel) is False
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda: 1 / 0, 1, FakeClock())


def test_the_system_clock_passes_time_and_a_set_event_stops_it():
    clock, cancel = SystemClock(), Event()
    before_s = clock.monotonic()
    assert pause(0.01, clock)
    assert clock.monotonic() - before_s >= 0.01
    cancel.set()
    assert not pause(60, clock, cancel)


def test_what_nobody_wants_any_more_is_asked_once():
    unwanted, asked = Event(), []

    def attempt():
        asked.append(1)
        unwanted.set()
        raise StoreError("away", url="u", retryable=True)

    with stop_retries_when(unwanted):
        limit = CallLimit("u", "get", clock=FakeClock())
    with pytest.raises(StoreError, match="away"):
        with_retries(attempt, RetryPolicy(), limit)
    assert len(asked) == 1
