"""Warnings that are given once a cache, however often and in however many threads the reason occurs."""

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
        """The same for a forked child, where another thread's hold on the lock would never end."""
        found = Notices()
        found._given, found._expected = set(self._given), dict(self._expected)
        return found

    def expect(self, kind: str, subject: str) -> None:
        """Let warn_expected() warn of this kind, and say of what."""
        with self._lock:
            self._expected[kind] = subject

    def is_expected(self, kind: str) -> bool:
        """Whether warn_expected() would warn of this kind."""
        with self._lock:
            return kind in self._expected and kind not in self._given

    def warn_expected(self, kind: str, message: str) -> None:
        """Warn of the subject, unless this kind was given before, or nobody expects it."""
        with self._lock:
            subject = self._expected.get(kind)
        if subject is not None:
            self.warn(kind, f"{subject}: {message}")

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless this kind was given before."""
        with self._lock:
            if kind in self._given:
                return
            self._given.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
