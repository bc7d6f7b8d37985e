"""Decisions about requests: which are late, which are hedged, how many run at once, and how long a back-off lasts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.store.pacing import Backoff, ConcurrencyLimit, RequestTimes, pay

KIB, MIB = 1 << 10, 1 << 20


def observed(durations_s, n_bytes=MIB):
    times = RequestTimes()
    for duration_s in durations_s:
        times.end(times.begin(n_bytes, 0.0, is_hedge=False), duration_s, is_observed=True)
    return times


def test_a_request_is_late_after_the_p95_of_requests_of_its_size():
    times = observed([0.1] * 95 + [1.0] * 5 + [0.1] * 20)
    assert times.late_after_s(MIB) == pytest.approx(0.1)
    assert observed([0.1] * 50 + [1.0] * 50).late_after_s(MIB) == pytest.approx(1.0)
    assert observed([0.001] * 20).late_after_s(MIB) == pytest.approx(0.05), "never sooner"


def test_an_unknown_size_is_judged_by_the_nearest_known_one():
    times = observed([0.1] * 20)
    assert times.late_after_s(KIB) == pytest.approx(0.1)
    assert times.late_after_s(4 * MIB) == pytest.approx(0.4), "a request takes at most in proportion longer"
    assert RequestTimes().late_after_s(MIB) is None
    assert observed([0.1] * 9).late_after_s(MIB) is None


def test_the_deadline_follows_the_p95_has_a_floor_and_doubles():
    assert observed([1.0] * 20).deadline_s(MIB, 0) == pytest.approx(8.0)
    assert observed([0.01] * 20).deadline_s(MIB, 0) == pytest.approx(2.0)
    assert RequestTimes().deadline_s(MIB, 0) == pytest.approx(5.0)
    assert observed([0.01] * 20).deadline_s(MIB, 3) == pytest.approx(16.0)


def test_a_late_request_is_hedged_unless_it_brings_bytes():
    times = observed([0.1] * 40)
    late, progressing = (times.begin(MIB, 0.0, is_hedge=False) for _ in range(2))
    progressing.quiet_since_s = 0.95
    assert not times.grant_hedge(progressing, 1.0)
    assert times.grant_hedge(late, 1.0)


def test_nothing_is_hedged_while_many_requests_are_late():
    times = observed([0.1] * 1000)
    running = [times.begin(MIB, 0.0, is_hedge=False) for _ in range(16)]
    for request in running[4:]:
        request.quiet_since_s = 1.0
    assert times.grant_hedge(running[0], 1.05), "a quarter is late"
    running[4].quiet_since_s = 0.0
    assert times.is_store_slow(1.05)
    assert not times.grant_hedge(running[1], 1.05)
    for request in running[:5]:
        times.end(request, 1.05, is_observed=False)
    assert not times.is_store_slow(1.05)


steps = st.lists(
    st.tuples(st.sampled_from(["begin", "end", "lost", "hedge"]), st.integers(0, 30), st.floats(0.0, 2.0)), max_size=400
)


@given(steps, st.integers(0, 60))
def test_at_no_time_are_more_than_5_percent_of_the_requests_hedged(steps, n_before):
    times = observed([0.1] * n_before)
    now_s, running, n_started, n_hedged = 0.0, [], n_before, 0
    for step, which, wait_s in steps:
        now_s += wait_s
        if step == "begin":
            running.append(times.begin(MIB, now_s, is_hedge=False))
            n_started += 1
        elif running and step in ("end", "lost"):
            times.end(running.pop(which % len(running)), now_s, is_observed=step == "end")
        elif running and times.grant_hedge(running[which % len(running)], now_s):
            n_hedged += 1
            running.append(times.begin(MIB, now_s, is_hedge=True))
        assert n_hedged <= 0.05 * n_started


# Requests at once


def simulate(limit, knee, n_rounds, request_s=0.1):
    """Serve requests by a store whose throughput grows up to `knee` requests at once."""
    now_s = 0.0
    for _ in range(n_rounds):
        for _ in range(limit.value):
            limit.note_full()
            now_s += request_s / min(limit.value, knee)
            limit.note_answer(MIB, now_s)


@pytest.mark.parametrize(("knee", "least", "most"), [(4, 16, 25), (16, 16, 25), (24, 20, 40), (1000, 64, 64)])
def test_the_limit_finds_the_knee(knee, least, most):
    limit = ConcurrencyLimit(64)
    simulate(limit, knee, 100)
    assert least <= limit.value <= most


def test_the_limit_rises_again_after_the_store_has_become_faster():
    limit = ConcurrencyLimit(64)
    simulate(limit, 10, 50)
    assert limit.value < 30
    simulate(limit, 1000, 200)
    assert limit.value == 64


def test_a_round_with_fewer_requests_than_allowed_does_not_raise_the_limit():
    limit = ConcurrencyLimit(64)
    for i in range(1000):
        limit.note_answer(MIB, i * 0.01)
    assert limit.value == 16


def test_throttled_requests_of_one_round_halve_the_limit_once():
    limit = ConcurrencyLimit(64)
    for _ in range(10):
        limit.note_throttled(1.0)
    assert limit.value == 8
    limit.note_answer(MIB, 1.0)
    for i in range(8):
        limit.note_answer(MIB, 1.1 + i)
    limit.note_throttled(20.0)
    assert limit.value == 4


@given(
    st.lists(st.tuples(st.sampled_from(["full", "answer", "throttled"]), st.floats(0, 1)), max_size=300),
    st.integers(1, 64),
)
def test_the_limit_stays_in_its_bounds(steps, most):
    limit, now_s = ConcurrencyLimit(most), 0.0
    for step, wait_s in steps:
        now_s += wait_s
        if step == "full":
            limit.note_full()
        elif step == "answer":
            limit.note_answer(MIB, now_s)
        else:
            before = limit.value
            limit.note_throttled(now_s)
            assert limit.value <= before
        assert 1 <= limit.value <= most


# Back-off and bandwidth


def test_a_back_off_doubles_while_the_store_goes_on_throttling_and_begins_anew_later():
    backoff, now_s, lengths = Backoff(), 100.0, []
    for _ in range(10):
        backoff = backoff.throttled(now_s, was_answered=False)
        lengths.append(backoff.length_s)
        now_s = backoff.until_s + 0.01
    assert lengths[:4] == pytest.approx([0.05, 0.1, 0.2, 0.4])
    assert lengths[-1] == pytest.approx(5.0)
    assert backoff.throttled(backoff.until_s, was_answered=True).length_s == pytest.approx(0.05)
    assert backoff.throttled(backoff.until_s + 60, was_answered=False).length_s == pytest.approx(0.05)


def test_requests_that_were_sent_before_a_back_off_do_not_lengthen_it():
    backoff = Backoff().throttled(100.0, was_answered=False)
    assert backoff.throttled(100.01, was_answered=False) == backoff


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.floats(0, 1e6))
def test_no_state_of_an_earlier_boot_makes_a_process_wait_longer_than_5_s(until_s, length_s, now_s):
    assert 0 <= Backoff(until_s, length_s).left_s(now_s) <= 5.0


@given(st.lists(st.tuples(st.integers(1, MIB), st.floats(0, 0.5)), min_size=1, max_size=200))
def test_bytes_never_come_faster_than_the_bandwidth(received):
    bytes_per_s, now_s, paid_until_s, total = 1e6, 1000.0, 0.0, 0
    for n_bytes, idle_s in received:
        now_s += idle_s
        paid_until_s, wait_s = pay(paid_until_s, n_bytes, bytes_per_s, now_s)
        now_s += wait_s
        total += n_bytes
        assert total <= bytes_per_s * (now_s - 1000.0 + 0.1) * (1 + 1e-9) + 1
