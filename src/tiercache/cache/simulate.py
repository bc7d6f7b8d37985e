"""The cache simulator: what a cache of a given size would do with a trace of accesses, by the policies of the cache."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.eviction import POLICIES, WATERMARK_SHARE, CopyTable, choose_victims
from tiercache.model import NEVER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Accesses in order: number and size of the object, number of the job that reads it, and the clock of the job.

    All columns are int64[k]. The clock is the bytes that the job had read before, ascending within a job.
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
    """The result of a simulation; served: Bytes of each access that the cache served, int64[k]."""

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
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def byte_hit_ratio(self) -> float:
        return self.bytes_hit / max(self.bytes_hit + self.bytes_fetched, 1)


def _accesses(trace: Trace) -> Iterator[tuple[int, int, int]]:
    return zip(range(len(trace)), trace.names.tolist(), trace.n_bytes.tolist(), strict=True)


def next_positions(names: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of the next access to each access's object, int64[k]; NEVER: there is none."""
    order = np.argsort(names, kind="stable")
    after = np.full(len(names), NEVER, np.int64)
    same = names[order[1:]] == names[order[:-1]]
    after[order[:-1][same]] = order[1:][same]
    return after


class _Uses:
    """The next use of each object by each of several jobs, measured by the clock of the job."""

    def __init__(self, trace: Trace, row_of: NDArray[np.int64], n_rows: int) -> None:
        _, job_of = np.unique(trace.job, return_inverse=True)
        n_jobs = int(job_of.max(initial=-1)) + 1
        self._job, self._row, self._clock = job_of.tolist(), row_of.tolist(), trace.clock.tolist()
        self._next_at = next_positions(job_of * n_rows + row_of).tolist()
        self._next = np.full((n_jobs, n_rows), NEVER, np.int64)
        # In reverse order, so that the first use of each object is the one that remains.
        self._next[job_of[::-1], row_of[::-1]] = trace.clock[::-1]
        self._now = np.zeros(n_jobs, np.int64)

    def read(self, i: int) -> None:
        """Advance the clock of the job of access i."""
        job, at = self._job[i], self._next_at[i]
        self._now[job] = self._clock[i]
        self._next[job, self._row[i]] = NEVER if at == NEVER else self._clock[at]

    def next_use(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes that a job reads before it needs each object, the nearest job counting: int64[len(rows)]."""
        later = self._next[:, rows]
        left = np.where(later == NEVER, NEVER, np.maximum(later - self._now[:, None], 1))
        nearest: NDArray[np.int64] = left.min(axis=0)
        return nearest


def simulate(trace: Trace, policy: str, size_bytes: int) -> SimulationReport:
    """Simulate a cache of size_bytes, in the unit of the trace, with a policy in POLICIES. Raises ValueError.

    "plan" knows what each job of the trace reads, as plan files tell it. A miss in a full cache takes 0.1 to 1 ms.
    """
    if policy not in POLICIES:
        raise ValueError(f"no policy is called {policy!r}; there are {', '.join(sorted(POLICIES))}")
    names, row_of = np.unique(trace.names, return_inverse=True)
    uses = _Uses(trace, row_of, len(names))
    in_advance = int(size_bytes * WATERMARK_SHARE) if policy == "lru" else 0
    sizes, last_use = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    held = np.zeros(len(names), np.bool_)
    served = np.zeros(len(trace), np.int64)
    free, n_evicted = size_bytes, 0
    for i, (row, n_bytes) in enumerate(zip(row_of.tolist(), trace.n_bytes.tolist(), strict=True)):
        uses.read(i)
        last_use[row] = i
        if held[row]:
            served[i] = n_bytes
            continue
        if n_bytes > free:
            rows = np.flatnonzero(held)
            copies = CopyTable(sizes[rows], last_use[rows], np.zeros(len(rows), np.bool_), uses.next_use(rows))
            chosen = choose_victims(
                POLICIES[policy],
                copies,
                n_bytes - free,
                want_bytes=n_bytes - free + in_advance,
                use_after_next=int(uses.next_use(np.array([row]))[0]),
            )
            if chosen is None or n_bytes > size_bytes:
                continue
            victims = rows[chosen]
            held[victims] = False
            free += int(sizes[victims].sum())
            n_evicted += len(victims)
        held[row], sizes[row] = True, n_bytes
        free -= n_bytes
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
    heap: list[tuple[int, int]] = []  # (- next position, name); outdated entries of objects that were used since
    free = size_bytes
    for i, name, n_bytes in _accesses(trace):
        old = held.pop(name, None)
        if old is not None:
            served[i] = min(old[0], n_bytes)
            free += old[0]
        at = next_at[i]
        if at == NEVER:
            continue
        while free < n_bytes and heap:  # shrink objects that are needed later
            late, other = heap[0]
            its = held.get(other)
            if its is None or its[1] != -late:
                heapq.heappop(heap)
            elif -late <= at:
                break
            else:
                cut = min(its[0], n_bytes - free)
                its[0] -= cut
                free += cut
                if not its[0]:
                    del held[other]
                    heapq.heappop(heap)
        keep = min(n_bytes, free)
        if keep > 0:
            held[name] = [keep, at]
            heapq.heappush(heap, (-at, name))
            free -= keep
    return _report("bound", size_bytes, trace, served, 0)
