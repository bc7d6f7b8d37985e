"""The clock, and the only functions that sleep: inside a process, threads wait on conditions, queues and events.

Code that queries another process, a file lock or a store repeatedly uses wait_for(). Retries use pause() between two
attempts. Both take the clock as an argument, so tests run them without waiting. fail_fast_if_unreachable() decides
whether calls wait for an endpoint. It is not in store/, because the command imports it for `--help`, which loads no
store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Protocol, TypeVar

T = TypeVar("T")

SHORTEST_POLL_S = 0.001
LONGEST_POLL_S = 0.050


class Clock(Protocol):
    """Monotonic time and a way to let it pass. testing.FakeClock is an implementation that does not wait."""

    def monotonic(self) -> float:
        """Return the seconds since a fixed moment."""

    def sleep(self, duration_s: float, cancel: Event | None = None) -> None:
        """Return after duration_s seconds, or when cancel is set."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, duration_s: float, cancel: Event | None = None) -> None:
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
    """Call condition until its result is true; return its last result.

    The result is false if the deadline passed or cancel was set. The pause between two calls grows from 1 ms to
    longest_poll_s. condition is called at least once, and once more after the deadline, so that a late scheduler never
    turns success into failure. Its exceptions pass through. deadline_s is counted from now.
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
    """Wait duration_s seconds between two attempts. Return False, without further waiting, if cancel is set."""
    clock.sleep(duration_s, cancel)
    return cancel is None or not cancel.is_set()


# Endpoints that have answered this process while fail_fast_if_unreachable() is active; None if it is not active.
_answering_endpoints: set[str] | None = None


@contextmanager
def fail_fast_if_unreachable() -> Iterator[None]:
    """Make a call fail at its first attempt if it cannot connect to an endpoint that has never answered this process.

    The command line uses it, because the user has probably mistyped the endpoint. A call to an endpoint that has
    answered before is retried, so a long command survives a restart of its store. Applies to all threads.
    """
    global _answering_endpoints
    before, _answering_endpoints = _answering_endpoints, set()
    try:
        yield
    finally:
        _answering_endpoints = before


def note_answer(endpoint: str) -> None:
    """Record that an endpoint answered, if fail_fast_if_unreachable() is active."""
    if _answering_endpoints is not None:
        _answering_endpoints.add(endpoint)


def must_fail_fast(endpoint: str) -> bool:
    """Return whether a call that could not connect to an endpoint must fail at once."""
    return _answering_endpoints is not None and endpoint not in _answering_endpoints
