"""The clock, and the only poll of the code base; everything inside a process waits on conditions instead.

What another process, a file lock or a store must be asked about goes through wait_for(); the time between two attempts
goes through pause(). Both take the clock as an argument, so tests run them without waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Protocol, TypeVar

T = TypeVar("T")

SHORTEST_POLL_S = 0.001
LONGEST_POLL_S = 0.050


class Clock(Protocol):
    """Monotonic time and a way to let it pass. testing.FakeClock is one that does not wait."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""

    def sleep(self, duration_s: float, cancel: Event | None = None) -> None:
        """Let duration_s pass, less when cancel is set meanwhile."""


class SystemClock:
    """The clock of the machine."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def sleep(self, duration_s: float, cancel: Event | None = None) -> None:
        """Let duration_s pass, less when cancel is set meanwhile."""
        if cancel is not None:
            cancel.wait(max(duration_s, 0.0))
        else:
            time.sleep(max(duration_s, 0.0))


SYSTEM_CLOCK = SystemClock()


def wait_for(
    condition: Callable[[], T],
    deadline_s: float | None,
    clock: Clock = SYSTEM_CLOCK,
    *,
    longest_poll_s: float = LONGEST_POLL_S,
    cancel: Event | None = None,
) -> T:
    """Ask condition until it is true: its value then, or its last (false) value when time is up or cancel is set.

    The pause between two questions grows from 1 ms to longest_poll_s (50 ms; stores are asked less often). condition is
    asked at least once, and once more when the deadline has passed: a late scheduler never turns success into failure.

    Args:
        condition: the question; what it raises passes through.
        deadline_s: seconds from now, None for ever.
        clock: whose time it is.
        longest_poll_s: the longest pause in seconds.
        cancel: ends the wait early when set.
    """
    end_s = None if deadline_s is None else clock.monotonic() + deadline_s
    poll_s = SHORTEST_POLL_S
    while True:
        last_chance = end_s is not None and clock.monotonic() >= end_s
        answer = condition()
        if answer or last_chance or (cancel is not None and cancel.is_set()):
            return answer
        left_s = poll_s if end_s is None else end_s - clock.monotonic()
        clock.sleep(min(poll_s, left_s), cancel)
        poll_s = min(poll_s * 1.5, longest_poll_s)


def pause(duration_s: float, clock: Clock = SYSTEM_CLOCK, cancel: Event | None = None) -> bool:
    """Let duration_s pass between two attempts; returns False at once when cancel is set."""
    clock.sleep(duration_s, cancel)
    return cancel is None or not cancel.is_set()
