"""`Notices`: warnings that are given once per cache, however often and in however many threads the reason occurs."""

from __future__ import annotations

import warnings
from threading import Lock


class Notices:
    """Gives each kind of warning once. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._given: set[str] = set()
        self._expected: dict[str, str] = {}

    def copied(self) -> Notices:
        """Return a copy for a forked child, in which another thread's hold on the lock would never end."""
        found = Notices()
        found._given, found._expected = set(self._given), dict(self._expected)
        return found

    def expect(self, kind: str, subject: str) -> None:
        """Enable warn_expected() for this kind, with the subject of the warning."""
        with self._lock:
            self._expected[kind] = subject

    def is_expected(self, kind: str) -> bool:
        """Return whether warn_expected() would warn about this kind."""
        with self._lock:
            return kind in self._expected and kind not in self._given

    def warn_expected(self, kind: str, message: str) -> None:
        """Warn about the subject, unless this kind was given before or is not enabled."""
        with self._lock:
            subject = self._expected.get(kind)
        if subject is not None:
            self.warn(kind, f"{subject}: {message}")

    def warn(self, kind: str, message: str) -> None:
        """Give a warning, unless this kind was given before."""
        with self._lock:
            if kind in self._given:
                return
            self._given.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
