"""Counters and histograms of waiting times, shared between threads."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left

# Upper edges of the bins in seconds: 1 us to 1000 s, ten per decade, so a percentile is accurate to 26 %.
_EDGES_S = tuple(10 ** (exponent / 10) for exponent in range(-60, 31))


# One lock guards all counters, so that a forked child can replace it: another thread of the parent may have held it.
# Re-entrant, because the garbage collector may run a finalizer that counts in the thread that holds it.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Counters:
    """Named sums. All methods may be called from any thread and after a fork; each is one addition or one copy.

    Args:
        names: Names of the sums that exist from the start; add() creates others.
        total: Counters to which everything is added too.
    """

    def __init__(self, *names: str, total: Counters | None = None) -> None:
        self._total = total
        self._sums: dict[str, float] = dict.fromkeys(names, 0)

    def add(self, name: str, n: float = 1) -> None:
        """Add n to the sum with this name."""
        with _lock:
            self._sums[name] = self._sums.get(name, 0) + n
        if self._total is not None:
            self._total.add(name, n)

    def __getitem__(self, name: str) -> float:
        with _lock:
            return self._sums.get(name, 0)

    def snapshot(self) -> dict[str, float]:
        """Return all sums as of one instant."""
        with _lock:
            return dict(self._sums)


class WaitHistogram:
    """Histogram of waiting times. One thread adds; any thread may read, and may miss the addition in progress.

    Attributes:
        bins: Number of waits in each bin. The first bin also counts items that needed no wait; native code adds those.
        total_s: Sum of all waits in seconds.
    """

    def __init__(self) -> None:
        self.bins = [0] * (len(_EDGES_S) + 1)
        self.total_s = 0.0

    @property
    def n_waits(self) -> int:
        """Return the number of waits counted."""
        return sum(self.bins)

    def add(self, wait_s: float) -> None:
        """Count one wait of wait_s seconds."""
        self.bins[bisect_left(_EDGES_S, wait_s)] += 1
        self.total_s += wait_s

    def add_zero(self) -> None:
        """Count an item that needed no wait, without reading the clock."""
        self.bins[0] += 1

    def quantile(self, q: float) -> float:
        """Return the upper edge, in seconds, of the bin that contains a quantile; 0.0 if nothing was counted.

        Args:
            q: The quantile, from 0 to 1.
        """
        bins = list(self.bins)
        seen, want = 0, q * sum(bins)
        for edge_s, count in zip(_EDGES_S, bins, strict=False):
            seen += count
            if count and seen >= want:
                return edge_s
        return _EDGES_S[-1] if any(bins) else 0.0

    def snapshot(self) -> dict[str, float]:
        """Return p50, p95, p99 and total in seconds, and n, the number of waits."""
        return {
            "p50": self.quantile(0.50),
            "p95": self.quantile(0.95),
            "p99": self.quantile(0.99),
            "total": self.total_s,
            "n": self.n_waits,
        }
