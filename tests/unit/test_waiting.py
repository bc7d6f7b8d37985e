"""Polling of a condition, and the clock of the machine."""

from __future__ import annotations

from threading import Event

import pytest
from tests.support.clock import FakeClock

from tiercache.waiting import SystemClock, pause, wait_for


def test_wait_for_returns_the_result_of_the_condition_and_backs_off_to_50_ms():
    clock = FakeClock()
    answers = iter([None, "", 0, *[False] * 20, "there"])
    assert wait_for(lambda: next(answers), 60, clock) == "there"
    assert clock.slept[0] == pytest.approx(0.001)
    assert clock.slept == sorted(clock.slept)
    assert max(clock.slept) == pytest.approx(0.050)


def test_wait_for_calls_the_condition_once_more_after_the_deadline():
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


def test_a_set_event_ends_a_sleep_of_the_system_clock():
    clock, cancel = SystemClock(), Event()
    before_s = clock.monotonic()
    assert pause(0.01, clock)
    assert clock.monotonic() - before_s >= 0.01
    cancel.set()
    assert not pause(60, clock, cancel)
