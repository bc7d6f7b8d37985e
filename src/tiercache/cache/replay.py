"""The simulator: what a cache of a given size and policy would do with a trace.

Pure, and fast enough for a million accesses.

policy.py makes the decisions, as in the cache itself; here, the candidates come from structures that follow the trace
(a queue, a heap) instead of arrays of all cached copies.
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
    """Accesses in order. All columns are int64[k].

    Attributes:
        names: Number of each object.
        n_bytes: Size of the object.
        job: Number of the job that reads the object.
        clock: Bytes that the job had read before, ascending within a job.
    """

    names: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    job: NDArray[np.int64]
    clock: NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = [len(column) for column in (self.names, self.n_bytes, self.job, self.clock)]
        if len(set(lengths)) > 1:
            raise ValueError(f"names, n_bytes, job and clock of a trace must have the same length, got {lengths}")

    @classmethod
    def of(
        cls, names: NDArray[np.int64], n_bytes: NDArray[np.int64] | int = 1, job: NDArray[np.int64] | int = 0
    ) -> Trace:
        """Return a trace without clocks: the clock of each job advances by the bytes that it reads."""
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
class SimulationReport:
    """The result of a simulation.

    Attributes:
        policy: Name of the policy.
        size_bytes: Size of the cache.
        hits: Number of accesses served by the cache.
        misses: Number of other accesses.
        bytes_hit: Bytes served by the cache.
        bytes_fetched: Bytes fetched from the store.
        evicted: Number of evicted copies.
        served: Bytes of each access that the cache served, int64[k].
    """

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
        """Share of the accesses that hit; 0.0 without accesses."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def byte_hit_ratio(self) -> float:
        """Share of the bytes that hit; 0.0 without accesses."""
        return self.bytes_hit / max(self.bytes_hit + self.bytes_fetched, 1)


def simulate(trace: Trace, policy: str, size_bytes: int) -> SimulationReport:
    """Simulate a cache on a trace.

    A million accesses take 1 to 4 s; `plan` with several jobs takes 0.1 to 1 ms per miss.

    Args:
        trace: Accesses in order.
        policy: A name in POLICIES, or "belady" (plan without bypass). Both know the whole trace. "plan" goes by the
            order of the accesses for a single job, and by the clock of each job, as plan files tell it, for several
            jobs; "belady" always goes by the order of the accesses.
        size_bytes: Size of the cache, in the unit of the trace.

    Raises:
        ValueError: There is no such policy.
    """
    if policy not in RUNS:
        raise ValueError(f"no policy is called {policy!r}; there are {', '.join(sorted(RUNS))}")
    hit = bytearray(len(trace))
    n_evicted = RUNS[policy](trace, size_bytes, hit)
    served = np.where(np.frombuffer(hit, np.bool_), trace.n_bytes, 0)
    return _report(policy, size_bytes, trace, served, n_evicted)


def _report(policy: str, size_bytes: int, trace: Trace, served: NDArray[np.int64], n_evicted: int) -> SimulationReport:
    n_hits, bytes_hit = int(((served == trace.n_bytes) & (served > 0)).sum()), int(served.sum())
    missed = int(trace.n_bytes.sum()) - bytes_hit
    return SimulationReport(policy, size_bytes, n_hits, len(trace) - n_hits, bytes_hit, missed, n_evicted, served)


def bound(trace: Trace, size_bytes: int) -> SimulationReport:
    """Return the fewest bytes that any cache of this size must fetch for the trace, whatever it knows and does.

    Belady's MIN with bypass, on objects that may be cut anywhere: exact for objects of equal size of which a whole
    number fits, and a lower bound that cannot be reached for all others. The result's hits counts the accesses that
    were served whole.
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
    """Shrink objects that are needed later than new (bytes, next position) until it fits; return the free bytes."""
    n_bytes, at = new
    while free < n_bytes and heap:
        late, name = heap[0]
        its = held.get(name)
        if its is None or its[1] != -late:
            heapq.heappop(heap)  # an outdated entry: the object was used since
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
    """Return the trace of jobs that run concurrently at one speed, each through the plans of its epochs.

    Args:
        jobs: Reading plans of each job, one per epoch.
        n_bytes: Size of each shard, int64[n_shards].
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
