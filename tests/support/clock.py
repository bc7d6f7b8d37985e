"""A clock that does not wait, and a wall clock that jumps."""

from __future__ import annotations

import time
from threading import Event, Lock


class FakeClock:
    """A clock whose time advances only in sleep() and advance(). All methods may be called from any thread.

    Args:
        now_s: Time at the start, in seconds.

    Attributes:
        slept: Durations of all sleeps, in seconds.
    """

    def __init__(self, now_s: float = 1000.0) -> None:
        self._lock = Lock()
        self._now_s = now_s
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Return the current time in seconds."""
        with self._lock:
            return self._now_s

    def sleep(self, duration_s: float, cancel: Event | None = None) -> None:
        """Advance the time by duration_s and return at once; do nothing if cancel is set."""
        if cancel is not None and cancel.is_set():
            return
        self.advance(duration_s)
        with self._lock:
            self.slept.append(duration_s)

    def advance(self, duration_s: float) -> None:
        """Advance the time by duration_s without recording a sleep."""
        with self._lock:
            self._now_s += max(duration_s, 0.0)


class JumpingClock:
    """A context in which time.time() and time.time_ns() of this process can be set forward and back.

    Monotonic time and the kernel's file times are not affected, as on a machine whose clock is set. Only one instance
    may be entered at a time. All threads see a jump at once.
    """

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._time, self._time_ns = time.time, time.time_ns

    def jump(self, forward_s: float) -> None:
        """Set the clock forward by forward_s seconds, or back if negative."""
        self.ahead_s += forward_s

    def __enter__(self) -> JumpingClock:
        self._time, self._time_ns = time.time, time.time_ns
        time.time = lambda: self._time() + self.ahead_s
        time.time_ns = lambda: self._time_ns() + int(self.ahead_s * 1e9)
        return self

    def __exit__(self, *exc: object) -> None:
        time.time, time.time_ns = self._time, self._time_ns
