"""Retries: attempts, pauses and limits."""

from __future__ import annotations

from threading import Event

import pytest
from tests.support.clock import FakeClock

from tiercache.errors import StoreError
from tiercache.store.retry import CallLimit, RetryPolicy, stop_retries_when, with_retries


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


def test_pauses_are_random_and_bounded_by_growing_limits():
    policy = RetryPolicy(first_s=0.1, longest_s=1.0)
    for n_failed, most_s in ((1, 0.1), (2, 0.2), (4, 0.8), (5, 1.0), (50, 1.0)):
        drawn = [policy.pause_s(n_failed) for _ in range(50)]
        assert all(0 <= s <= most_s for s in drawn)
        assert len(set(drawn)) > 10


def test_only_retryable_errors_without_effect_are_retried():
    for facts in ({"retryable": False}, {"retryable": True, "maybe_done": True}):
        attempt, calls = failing(1, **facts)
        with pytest.raises(StoreError):
            with_retries(attempt, RetryPolicy(), limit(FakeClock()))
        assert len(calls) == 1
    attempt, calls = failing(3, retryable=True)
    assert with_retries(attempt, RetryPolicy(), limit(FakeClock())) == 4


def test_attempts_timeout_and_deadline_limit_retries():
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


def test_an_unwanted_call_is_not_retried():
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
