"""What a cache of some size and policy would do with a trace: pure, and fast enough for a million accesses.

The decisions are made by policy.py, as in the cache itself; here they only get their candidates from structures that
follow the trace (a queue, a heap) instead of from arrays of everything that is cached.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.runs import RUNS, next_positions
from tiercache.model import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tiercache.model import ReadingPlan


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Accesses in order. All columns int64[k].

    Attributes:
        names: a number for each object.
        n_bytes: of the object.
        job: a number for who reads it.
        clock: bytes that the job had read before, rising within a job.
    """

    names: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    job: NDArray[np.int64]
    clock: NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = [len(column) for column in (self.names, self.n_bytes, self.job, self.clock)]
        if len(set(lengths)) > 1:
            raise ValueError(f"names, n_bytes, job and clock of a trace are of one length, got {lengths}")

    @classmethod
    def of(
        cls, names: NDArray[np.int64], n_bytes: NDArray[np.int64] | int = 1, job: NDArray[np.int64] | int = 0
    ) -> Trace:
        """A trace without clocks: each job's goes on by what it reads."""
        names = np.asarray(names, np.int64)
        n_bytes = np.broadcast_to(np.asarray(n_bytes, np.int64), names.shape)
        job = np.broadcast_to(np.asarray(job, np.int64), names.shape)
        clock = np.empty_like(names)
        for one in np.unique(job):
            its = job == one
            clock[its] = np.cumsum(n_bytes[its]) - n_bytes[its]
        return cls(names, n_bytes, job, clock)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What came of a trace. served: bytes of each access that came from the cache, int64[k]; evicted: copies."""

    policy: str
    size_bytes: int
    hits: int
    misses: int
    bytes_hit: int
    bytes_fetched: int
    evicted: int
    served: NDArray[np.int64]

    @property
    def hit_ratio(self) -> float:
        """Share of the accesses; 0.0 for none."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def byte_hit_ratio(self) -> float:
        """Share of the bytes; 0.0 for none."""
        return self.bytes_hit / max(self.bytes_hit + self.bytes_fetched, 1)


def replay(trace: Trace, policy: str, size_bytes: int) -> Report:
    """Replay a trace.

    A million accesses take 1 to 4 s here; `plan` of several jobs 0.1 to 1 ms a miss.

    Args:
        trace: see there.
        policy: a name of POLICIES, or "belady": plan that admits everything. Both know the whole trace: one job by the
            order of accesses, several each by its own clock, as plan files tell it.
        size_bytes: of the cache, in the trace's unit.

    Raises:
        ValueError: there is no such policy.
    """
    if policy not in RUNS:
        raise ValueError(f"no policy is called {policy!r}; there are {', '.join(sorted(RUNS))}")
    hit = bytearray(len(trace))
    n_evicted = RUNS[policy](trace, size_bytes, hit)
    served = np.where(np.frombuffer(hit, np.bool_), trace.n_bytes, 0)
    return _report(policy, size_bytes, trace, served, n_evicted)


def _report(policy: str, size_bytes: int, trace: Trace, served: NDArray[np.int64], n_evicted: int) -> Report:
    n_hits, bytes_hit = int(((served == trace.n_bytes) & (served > 0)).sum()), int(served.sum())
    missed = int(trace.n_bytes.sum()) - bytes_hit
    return Report(policy, size_bytes, n_hits, len(trace) - n_hits, bytes_hit, missed, n_evicted, served)


def bound(trace: Trace, size_bytes: int) -> Report:
    """The fewest bytes that any cache of the size must fetch for the trace, whatever it knows and does.

    Belady's MIN with bypass on objects that may be cut anywhere: exact for objects of equal size of which a whole
    number fits, and below what can be reached for all others. hits counts the accesses that were served whole.
    """
    next_at = next_positions(trace.names).tolist()
    served = np.zeros(len(trace), np.int64)
    held: dict[int, list[int]] = {}  # name: [bytes, next position]
    heap: list[tuple[int, int]] = []
    free = size_bytes
    for i, (name, n_bytes) in enumerate(zip(trace.names.tolist(), trace.n_bytes.tolist(), strict=True)):
        old = held.pop(name, None)
        if old is not None:
            served[i] = min(old[0], n_bytes)
            free += old[0]
        at = next_at[i]
        if at == NEVER:
            continue
        free = _cut(held, heap, free, (n_bytes, at))
        keep = min(n_bytes, free)
        if keep > 0:
            held[name] = [keep, at]
            heapq.heappush(heap, (-at, name))
            free -= keep
    return _report("bound", size_bytes, trace, served, 0)


def _cut(held: dict[int, list[int]], heap: list[tuple[int, int]], free: int, new: tuple[int, int]) -> int:
    """Cut what is needed later than new (bytes, next position) until it has room; returns what is free then."""
    n_bytes, at = new
    while free < n_bytes and heap:
        late, name = heap[0]
        its = held.get(name)
        if its is None or its[1] != -late:
            heapq.heappop(heap)  # it was used since
        elif not -late > at:
            break
        else:
            cut = min(its[0], n_bytes - free)
            its[0] -= cut
            free += cut
            if not its[0]:
                del held[name]
                heapq.heappop(heap)
    return free


def trace_of_plans(jobs: Sequence[Sequence[ReadingPlan]], n_bytes: NDArray[np.int64]) -> Trace:
    """The trace of jobs that go on side by side at one speed, each through its epochs' plans in turn.

    n_bytes: int64[n_shards], of each shard.
    """
    rows = []
    for job, epochs in enumerate(jobs):
        began = 0
        for epoch in epochs:
            read = epoch.first < NEVER
            shards, first = epoch.shards[read], epoch.first[read]
            rows.append(np.stack([shards, n_bytes[shards], np.full(len(shards), job), began + first]))
            began += int(n_bytes[shards].sum())
    names, sizes, job_of, clock = np.concatenate(rows, axis=1) if rows else np.empty((4, 0), np.int64)
    order = np.argsort(clock, kind="stable")
    return Trace(names[order], sizes[order], job_of[order], clock[order])
