"""A clock that does not wait, and one that jumps."""

from __future__ import annotations

import time
from threading import Event, Lock


class FakeClock:
    """Time passes only when somebody sleeps. slept: the lengths of all sleeps in seconds; safe from any thread."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._lock = Lock()
        self._now_s = now_s
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Its time."""
        with self._lock:
            return self._now_s

    def sleep(self, duration_s: float, cancel: Event | None = None) -> None:
        """Let duration_s pass at once; nothing when cancel is set."""
        if cancel is not None and cancel.is_set():
            return
        self.advance(duration_s)
        with self._lock:
            self.slept.append(duration_s)

    def advance(self, duration_s: float) -> None:
        """Let time pass from outside."""
        with self._lock:
            self._now_s += max(duration_s, 0.0)


class JumpingClock:
    """The wall clock of this process while entered: time.time() and time.time_ns() can be set back and forward.

    Monotonic time goes on as it does, and so do the times that the kernel gives to files: as on a machine whose clock
    somebody sets. For one entered object at a time; threads see the jump at once.
    """

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._time, self._time_ns = time.time, time.time_ns

    def jump(self, forward_s: float) -> None:
        """Set the clock forward, or back where it is negative."""
        self.ahead_s += forward_s

    def __enter__(self) -> JumpingClock:
        self._time, self._time_ns = time.time, time.time_ns
        time.time = lambda: self._time() + self.ahead_s
        time.time_ns = lambda: self._time_ns() + int(self.ahead_s * 1e9)
        return self

    def __exit__(self, *exc: object) -> None:
        time.time, time.time_ns = self._time, self._time_ns
