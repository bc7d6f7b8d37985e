"""Counters and wait-time histograms that many threads add to and anyone may read."""

from __future__ import annotations

import threading
from bisect import bisect_left

# Upper edges of the histogram's bins in seconds: 1 us to 1000 s, ten to a decade, so a percentile is right within 26 %.
_EDGES_S = tuple(10 ** (exponent / 10) for exponent in range(-60, 31))


class Counters:
    """Named sums. All methods are safe from any thread; each holds the lock for one addition or one copy."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = dict.fromkeys(names, 0)

    def add(self, name: str, n: float = 1) -> None:
        """Add n to the sum called name."""
        with self._lock:
            self._sums[name] = self._sums.get(name, 0) + n

    def __getitem__(self, name: str) -> float:
        with self._lock:
            return self._sums.get(name, 0)

    def snapshot(self) -> dict[str, float]:
        """All sums, of one instant."""
        with self._lock:
            return dict(self._sums)


class Waits:
    """A histogram of waiting times. One thread adds; any thread reads (figures may then be one addition apart).

    bins: how many waits each has. What was there already counts in the first one: native code does that by itself.
    """

    def __init__(self) -> None:
        self.bins = [0] * (len(_EDGES_S) + 1)
        self.total_s = 0.0

    @property
    def n_waits(self) -> int:
        """All that were counted."""
        return sum(self.bins)

    def add(self, wait_s: float) -> None:
        """Count one wait."""
        self.bins[bisect_left(_EDGES_S, wait_s)] += 1
        self.total_s += wait_s

    def add_none(self) -> None:
        """Count something that was there already: what a wait of 0 s is, without looking at the clock."""
        self.bins[0] += 1

    def quantile(self, share: float) -> float:
        """Upper edge in seconds of the bin that the share (0 to 1) of waits ends in; 0.0 when nothing was counted."""
        bins = list(self.bins)
        seen, want = 0, share * sum(bins)
        for edge_s, count in zip(_EDGES_S, bins, strict=False):
            seen += count
            if count and seen >= want:
                return edge_s
        return _EDGES_S[-1] if any(bins) else 0.0

    def snapshot(self) -> dict[str, float]:
        """p50, p95, p99, total in seconds and the number of waits."""
        return {
            "p50": self.quantile(0.50),
            "p95": self.quantile(0.95),
            "p99": self.quantile(0.99),
            "total": self.total_s,
            "n": self.n_waits,
        }
