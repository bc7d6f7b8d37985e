"""The cache simulator: what a cache of a given size and policy would do with a trace of accesses, and the trace files.

The cache finds the candidates for eviction in arrays of all cached copies; here they come from structures that follow
the trace (a queue, a heap). Of evict/policy.py, `lru` and `plan` use choose_victims(), `s3fifo` uses the queues, and
`plan` calls plan() for traces of several jobs; `resident` uses nothing of it. Tests compare them with the policies. A
million accesses take 1 to 4 s.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tiercache.cache.accounts import GHOSTS_SHARE
from tiercache.cache.policy import (
    UNPLANNED,
    Candidate,
    CopyTable,
    Fifo,
    QueueEntry,
    Queues,
    SpaceRequest,
    choose_victims,
    n_first_small,
    plan,
    small_limit_bytes,
)
from tiercache.model import NEVER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from tiercache.model import ReadingPlan


# A function that sets hit[i] = 1 for each access that hits, and returns the number of evicted copies.
PolicySimulation: TypeAlias = "Callable[[Trace, int, bytearray], int]"


def _accesses(trace: Trace) -> Iterator[tuple[int, int, int]]:
    """Yield the position, name and bytes of each access."""
    return zip(range(len(trace)), trace.names.tolist(), trace.n_bytes.tolist(), strict=True)


def next_positions(names: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of the next access to each access's object, int64[k]; NEVER: there is none."""
    order = np.argsort(names, kind="stable")
    after = np.full(len(names), NEVER, np.int64)
    same = names[order[1:]] == names[order[:-1]]
    after[order[:-1][same]] = order[1:][same]
    return after


def _resident(trace: Trace, size_bytes: int, hit: bytearray) -> int:
    held: set[int] = set()
    free = size_bytes
    for i, name, n_bytes in _accesses(trace):
        if name in held:
            hit[i] = 1
        elif n_bytes <= free:
            held.add(name)
            free -= n_bytes
    return 0


def _lru(trace: Trace, size_bytes: int, hit: bytearray) -> int:
    held: dict[int, int] = {}  # least recently used first
    free, n_evicted = size_bytes, 0
    for i, name, n_bytes in _accesses(trace):
        if name in held:
            hit[i] = 1
            held[name] = held.pop(name)
            continue
        if n_bytes > free:
            victims = choose_victims(((who, n, UNPLANNED) for who, n in held.items()), SpaceRequest(n_bytes - free))
            if victims is None:
                continue
            free += sum(map(held.pop, victims))
            n_evicted += len(victims)
        held[name] = n_bytes
        free -= n_bytes
    return n_evicted


def _s3fifo(trace: Trace, size_bytes: int, hit: bytearray) -> int:
    held: dict[int, QueueEntry] = {}
    ghosts = _Ghosts(int(size_bytes * GHOSTS_SHARE))
    queues = Queues(size_bytes)
    free, n_evicted = size_bytes, 0
    for i, name, n_bytes in _accesses(trace):
        entry = held.get(name)
        if entry is not None:
            hit[i] = 1
            entry[2] += 1
            continue
        if n_bytes > size_bytes:
            continue
        was_ghost = ghosts.pop(name)
        if n_bytes > free and not n_evicted:
            entries = list(held.values())
            n_small = n_first_small(np.array([entry[1] for entry in entries]), small_limit_bytes(size_bytes))
            small, main = (Fifo(part, sum(e[1] for e in part)) for part in (entries[:n_small], entries[n_small:]))
            queues = Queues(size_bytes, small, main)
        while n_bytes > free and (out := queues.evict()) is not None:
            del held[out.entry[0]]
            free += out.entry[1]
            n_evicted += 1
            if out.was_small:
                ghosts.add(out.entry)
        held[name] = entry = [name, n_bytes, 0]
        (queues.main if was_ghost else queues.small).put(entry)
        free -= n_bytes
    return n_evicted


class _Ghosts:
    """The names of entries that were recently evicted from the small queue, bounded by their bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._bytes: dict[int, int] = {}
        self._free = most_bytes

    def pop(self, name: int) -> bool:
        n_bytes = self._bytes.pop(name, None)
        self._free += n_bytes or 0
        return n_bytes is not None

    def add(self, entry: QueueEntry) -> None:
        self._bytes[entry[0]] = entry[1]
        self._free -= entry[1]
        while self._free < 0:
            self._free += self._bytes.pop(next(iter(self._bytes)))


def _plan(trace: Trace, size_bytes: int, hit: bytearray) -> int:
    if len(np.unique(trace.job)) > 1:
        return _plan_of_jobs(trace, size_bytes, hit)
    next_at = next_positions(trace.names).tolist()
    held = _Furthest()
    free, n_evicted = size_bytes, 0
    for i, name, n_bytes in _accesses(trace):
        at = next_at[i]
        if held.use(name, at):
            hit[i] = 1
            continue
        if n_bytes > free:
            victims = None
            if n_bytes <= size_bytes:
                victims = choose_victims(held.candidates(), SpaceRequest(n_bytes - free, use_after_next=at))
            free += held.end(victims)
            if victims is None:
                continue
            n_evicted += len(victims)
        held.add(name, n_bytes, at)
        free -= n_bytes
    return n_evicted


class _Furthest:
    """Copies ordered by their next use, the furthest first, and then by their age, the oldest first."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, int, int]] = {}  # name: (next use, bytes, turn)
        self._heap: list[tuple[int, int, int]] = []  # (-next use, turn, name)
        self._shown: list[tuple[int, int, int]] = []
        self._n_turns = 0

    def add(self, name: int, n_bytes: int, at: int) -> None:
        self._n_turns += 1
        self._push(name, n_bytes, at, self._n_turns)

    def use(self, name: int, at: int) -> bool:
        """Record a use and the time of the next one; return False if the copy is not cached."""
        its = self._held.get(name)
        if its is not None:
            self._push(name, its[1], at, its[2])
        return its is not None

    def candidates(self) -> Iterator[Candidate]:
        """Yield all copies, the furthest next use first. The caller must call end() afterwards."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            late, turn, name = entry
            its = self._held.get(name)
            if its is not None and (its[0], its[2]) == (-late, turn):
                self._shown.append(entry)
                yield name, its[1], its[0]

    def end(self, victims: tuple[int, ...] | None) -> int:
        """Remove the victims and return their bytes; the other copies that candidates() yielded stay."""
        freed_bytes = sum(self._held.pop(name)[1] for name in victims or ())
        for entry in self._shown[len(victims or ()) :]:
            heapq.heappush(self._heap, entry)
        self._shown.clear()
        return freed_bytes

    def _push(self, name: int, n_bytes: int, at: int, turn: int) -> None:
        self._held[name] = (at, n_bytes, turn)
        heapq.heappush(self._heap, (-at, turn, name))


def _plan_of_jobs(trace: Trace, size_bytes: int, hit: bytearray) -> int:
    names, row_of = np.unique(trace.names, return_inverse=True)
    _, job_of = np.unique(trace.job, return_inverse=True)
    uses = _Uses(trace, row_of, job_of)
    n_bytes_of, held = np.zeros(len(names), np.int64), np.zeros(len(names), np.bool_)
    free, n_evicted = size_bytes, 0
    for i, (row, n_bytes) in enumerate(zip(row_of.tolist(), trace.n_bytes.tolist(), strict=True)):
        uses.read(i)
        if held[row]:
            hit[i] = 1
            continue
        if n_bytes > free:
            rows = np.flatnonzero(held)
            use_after_next = int(uses.next_use(np.array([row]))[0])
            zeros, none = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
            columns = (n_bytes_of[rows], zeros, none, zeros, np.arange(len(rows)), none, uses.next_use(rows))
            copies = CopyTable(*columns, size_bytes, True)
            decision = plan(copies, SpaceRequest(n_bytes - free, use_after_next=use_after_next))
            if not decision.admit or n_bytes > size_bytes:
                continue
            victims = rows[list(decision.victims)]
            held[victims] = False
            free += int(n_bytes_of[victims].sum())
            n_evicted += len(victims)
        held[row], n_bytes_of[row] = True, n_bytes
        free -= n_bytes
    return n_evicted


class _Uses:
    """The next use of each object by each of several jobs, measured by the clock of the job."""

    def __init__(self, trace: Trace, row_of: NDArray[np.int64], job_of: NDArray[np.int64]) -> None:
        n_rows, n_jobs = int(row_of.max(initial=-1)) + 1, int(job_of.max(initial=-1)) + 1
        self._job, self._row, self._clock = job_of, row_of, trace.clock
        self._next_at = next_positions(job_of * n_rows + row_of)
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


RUNS: dict[str, PolicySimulation] = {"plan": _plan, "resident": _resident, "s3fifo": _s3fifo, "lru": _lru}


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
        """Share of the accesses that hit; 0.0 without accesses."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def byte_hit_ratio(self) -> float:
        """Share of the bytes that hit; 0.0 without accesses."""
        return self.bytes_hit / max(self.bytes_hit + self.bytes_fetched, 1)


def simulate(trace: Trace, policy: str, size_bytes: int) -> SimulationReport:
    """Simulate a cache of size_bytes, in the unit of the trace, with a policy in POLICIES. Raises ValueError.

    "plan" knows the whole trace: it goes by the order of the accesses for a single job, and by the clock of each job,
    as plan files tell it, for several jobs. A million accesses take 1 to 4 s; `plan` with several jobs takes 0.1 to
    1 ms per miss.
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


def trace_of_plans(jobs: Sequence[Sequence[ReadingPlan]], n_bytes: NDArray[np.int64]) -> Trace:
    """Return the trace of jobs that run concurrently at one speed, each through the reading plans of its epochs.

    n_bytes is the size of each shard, int64[n_shards].
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


_FIELDS = 5


class Tracer:
    """Appends to a trace file. Safe from any thread and process: a line is one write of less than a page."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. It is the user's own: a link is followed, and the mode stays. Raises OSError."""
        # O_NONBLOCK: a pipe without a reader gives an error instead of a wait.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)

    def add(self, name: str, n_bytes: int, *, hit: bool) -> None:
        """Append an opening of a copy: 3 us. Raises OSError."""
        line = f"{time.time():.6f} {os.getpid()} {name} {n_bytes} {int(hit)}\n"
        os.write(self._fd, line.encode())

    def close(self) -> None:
        """Close the file. Must be called only once."""
        os.close(self._fd)


def read_trace(path: Path) -> Trace:
    """Return the trace of a file, in the order of time.

    Each process is a job; a last line that a crash cut off is skipped.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a trace; the message names the line.
    """
    text = path.read_text(encoding="ascii", errors="replace")
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    times, names, sizes, jobs = [], [], [], []
    for n, line in enumerate(lines, start=1):
        fields = line.split()
        try:
            if len(fields) != _FIELDS:
                raise ValueError(f"{len(fields)} fields")
            times.append(float(fields[0]))
            jobs.append(int(fields[1]))
            names.append(fields[2])
            sizes.append(int(fields[3]))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {n}: {error}; a line of a trace is 'seconds process name bytes hit', as "
                f"TIERCACHE_CACHE_TRACE writes it, got {line[:80]!r}"
            ) from None
    _, numbers = np.unique(np.array(names, dtype=str), return_inverse=True)
    order = np.argsort(np.array(times), kind="stable")
    columns = (numbers, np.array(sizes, np.int64), np.array(jobs, np.int64))
    return Trace.of(*(column.astype(np.int64)[order] for column in columns))
