"""Coalescing of ranges: the requests that read a set of wanted ranges at the lowest cost. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class RequestCosts:
    """Costs and limits of range requests. The defaults are those of an object store with 16 or more requests in flight.

    Attributes:
        request_s: Cost of one more request in seconds. With many requests in flight, this is less than their latency.
        bytes_per_s: Bandwidth in bytes per second, at which unwanted bytes are read.
        max_gap_bytes: Maximum length of a gap between two wanted ranges that one request may read, in bytes.
        max_bytes: Maximum length of a request in bytes, at least 1.
    """

    request_s: float = 0.0005
    bytes_per_s: float = 125e6
    max_gap_bytes: int = 64 << 10
    max_bytes: int = 8 << 20

    @property
    def gap_bytes(self) -> int:
        """Maximum length of a gap that may be read and costs less than a request, in bytes."""
        affordable = self.request_s * self.bytes_per_s
        if affordable > self.max_gap_bytes:
            return self.max_gap_bytes
        return max(-int(-affordable // 1) - 1, 0)  # strictly less: at equal cost, fewer bytes are better


def cheapest_ranges(wanted: Sequence[ByteRange], costs: RequestCosts) -> list[ByteRange]:
    """Return the set of ranges that reads all wanted ranges at the lowest cost.

    The cost is the number of requests times request_s, plus the time to read the gaps between wanted ranges. A gap is
    read if that costs less than a request and the gap is at most max_gap_bytes long.

    Args:
        wanted: Ranges in any order. They may overlap, touch or be empty.
        costs: Costs and limits of the requests.

    Returns:
        Ranges in ascending order, without overlap, of 1 to max_bytes bytes each. A wanted range longer than max_bytes
        that has no near neighbours is split into nearly equal parts.
    """
    result: list[ByteRange] = []
    cluster: list[ByteRange] = []
    for run in _merged(wanted):
        if cluster and run.start - cluster[-1].end > costs.gap_bytes:
            result += _cover(cluster, costs)
            cluster = []
        cluster.append(run)
    return result + (_cover(cluster, costs) if cluster else [])


def _merged(wanted: Sequence[ByteRange]) -> list[ByteRange]:
    """Return the union of the ranges as ascending ranges that do not touch."""
    runs: list[ByteRange] = []
    for span in sorted((span for span in wanted if span.n_bytes), key=lambda span: span.start):
        if runs and span.start <= runs[-1].end:
            runs[-1] = ByteRange(runs[-1].start, max(runs[-1].end, span.end))
        else:
            runs.append(span)
    return runs


def _cover(runs: Sequence[ByteRange], costs: RequestCosts) -> list[ByteRange]:
    """Return the cheapest ranges for runs between which each gap costs less than a request."""
    start, end = runs[0].start, runs[-1].end
    if end - start <= costs.max_bytes:
        return [ByteRange(start, end)]  # each split would add a request and save less than its cost
    if len(runs) == 1:
        step = -(-(end - start) // -(-(end - start) // costs.max_bytes))
        return [ByteRange(at, min(at + step, end)) for at in range(start, end, step)]
    return _cover_long(runs, costs)


def _cover_long(runs: Sequence[ByteRange], costs: RequestCosts) -> list[ByteRange]:
    """Return the cheapest ranges for a cluster that is longer than one request.

    A request that ends within a run can be extended to its full length or to the end of the run at no cost. So there is
    a cheapest set whose requests either end with a run, or have the full length and end within a run. `first` are all
    positions at which such a request may begin. The costs are computed from the last position to the first: the cost of
    a request up to the end of run j, and of all that follows, is a constant plus `tail_s[j]`.
    """
    starts, ends = [run.start for run in runs], [run.end for run in runs]
    # gap_s[j]: time to read the gaps before run j.
    gap_s = list(
        accumulate(
            ((after - end) / costs.bytes_per_s for end, after in zip(ends, starts[1:], strict=False)), initial=0.0
        )
    )
    tail_s = np.full(len(runs), np.inf)
    best: dict[int, tuple[float, int, int]] = {}  # first position -> (cost from there, end of its request, next first)
    for at in _first_positions(starts, ends, costs.max_bytes):
        number = bisect_right(starts, at) - 1
        n_ends = bisect_right(ends, at + costs.max_bytes)  # the runs before this number can be read to their end
        choices: list[tuple[float, int, int]] = []
        if n_ends > number:
            last = number + int(np.argmin(tail_s[number:n_ends])) if n_ends < len(runs) else len(runs) - 1
            following = starts[last + 1] if last + 1 < len(runs) else -1
            after_s = best[following][0] if following >= 0 else 0.0
            choices.append((costs.request_s + gap_s[last] - gap_s[number] + after_s, ends[last], following))
        full = at + costs.max_bytes
        if n_ends < len(runs) and starts[n_ends] < full:
            cost_s = costs.request_s + gap_s[n_ends] - gap_s[number] + best[full][0]
            choices.append((cost_s, full, full))
        best[at] = min(choices)
        if at == starts[number] and number:
            tail_s[number - 1] = gap_s[number - 1] + best[at][0]
    result, at = [], starts[0]
    while at >= 0:
        _, end, following = best[at]
        result.append(ByteRange(at, end))
        at = following
    return result


def _first_positions(starts: Sequence[int], ends: Sequence[int], max_bytes: int) -> list[int]:
    """Return the starts of all runs and all ends of full requests within runs, from the last position to the first."""
    positions = set(starts)
    for start in starts:
        at = start + max_bytes
        while at not in positions:
            number = bisect_left(ends, at)  # the first run that ends at or after this position
            if number == len(ends) or not starts[number] < at < ends[number]:
                break
            positions.add(at)
            at += max_bytes
    return sorted(positions, reverse=True)
