"""Warnings that are given once a cache, however often and in however many threads the reason occurs."""

from __future__ import annotations

import warnings
from threading import Lock


class Notices:
    """Gives each kind of warning once. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._given: set[str] = set()

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless this kind was given before."""
        with self._lock:
            if kind in self._given:
                return
            self._given.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
