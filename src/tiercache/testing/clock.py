"""A clock that does not wait."""

from __future__ import annotations

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
