"""The circuit breaker of a failing disk: bypass it, ask again later, come back."""

from __future__ import annotations

from threading import Lock

from tiercache.waiting import SYSTEM_CLOCK, Clock

PROBE_AFTER_S = 30.0


class Breaker:
    """Says whether the cache's disk may be used. All methods are quick and safe from any thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, probe_after_s: float = PROBE_AFTER_S) -> None:
        self._clock, self._probe_after_s = clock, probe_after_s
        self._lock = Lock()
        self._probe_at_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the disk is being bypassed."""
        return self._probe_at_s is not None

    def allows(self) -> bool:
        """Whether to use the disk now. While it is bypassed one caller is let through every probe_after_s seconds."""
        if not self.is_open:
            return True
        with self._lock:
            now_s = self._clock.monotonic()
            probe_at_s = self._probe_at_s
            if probe_at_s is None:  # mended between the two looks
                return True
            if now_s >= probe_at_s:
                self._probe_at_s = now_s + self._probe_after_s
            return now_s >= probe_at_s

    def trip(self) -> None:
        """The disk failed."""
        with self._lock:
            self._probe_at_s = self._clock.monotonic() + self._probe_after_s

    def mend(self) -> None:
        """The disk worked."""
        with self._lock:
            self._probe_at_s = None
