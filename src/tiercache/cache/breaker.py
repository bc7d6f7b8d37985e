"""`Breaker`: a circuit breaker that bypasses a failing disk and tries it again later."""

from __future__ import annotations

from threading import Lock

from tiercache.waiting import SYSTEM_CLOCK, Clock

PROBE_AFTER_S = 30.0


class Breaker:
    """Decides whether the cache's disk may be used. All methods are quick and safe from any thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, probe_after_s: float = PROBE_AFTER_S) -> None:
        self._clock, self._probe_after_s = clock, probe_after_s
        self._lock = Lock()
        self._probe_at_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the disk is bypassed."""
        return self._probe_at_s is not None

    def allows(self) -> bool:
        """Return whether to use the disk now. While it is bypassed, one caller per probe_after_s seconds may try it."""
        if not self.is_open:
            return True
        with self._lock:
            now_s = self._clock.monotonic()
            probe_at_s = self._probe_at_s
            if probe_at_s is None:  # mend() ran between the two checks
                return True
            if now_s >= probe_at_s:
                self._probe_at_s = now_s + self._probe_after_s
            return now_s >= probe_at_s

    def trip(self) -> None:
        """Bypass the disk, after it failed."""
        with self._lock:
            self._probe_at_s = self._clock.monotonic() + self._probe_after_s

    def mend(self) -> None:
        """Use the disk again, after it worked."""
        with self._lock:
            self._probe_at_s = None
