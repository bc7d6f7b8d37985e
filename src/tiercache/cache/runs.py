"""The simulation of each policy on a trace, access by access, for replay.py.

The functions of policy.py make the decisions.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tiercache.cache.policy import (
    UNPLANNED,
    Candidate,
    Fifo,
    QueueEntry,
    Queues,
    Snapshot,
    SpaceRequest,
    choose_victims,
    n_first_small,
    plan,
    small_limit_bytes,
)
from tiercache.catalog import GHOSTS_SHARE
from tiercache.model import NEVER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tiercache.cache.replay import Trace

# A function that sets hit[i] = 1 for each access that hits, and returns the number of evicted copies.
PolicySimulation: TypeAlias = "Callable[[Trace, int, bytearray], int]"


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
    for i, (name, n_bytes) in enumerate(zip(trace.names.tolist(), trace.n_bytes.tolist(), strict=True)):
        if name in held:
            hit[i] = 1
        elif n_bytes <= free:
            held.add(name)
            free -= n_bytes
    return 0


def _lru(trace: Trace, size_bytes: int, hit: bytearray) -> int:
    held: dict[int, int] = {}  # least recently used first
    free, n_evicted = size_bytes, 0
    for i, (name, n_bytes) in enumerate(zip(trace.names.tolist(), trace.n_bytes.tolist(), strict=True)):
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
    for i, (name, n_bytes) in enumerate(zip(trace.names.tolist(), trace.n_bytes.tolist(), strict=True)):
        entry = held.get(name)
        if entry is not None:
            hit[i] = 1
            entry[2] += 1
            continue
        if n_bytes > size_bytes:
            continue
        was_ghost = ghosts.pop(name)
        if n_bytes > free and not n_evicted:
            queues = _after_first_fill(list(held.values()), size_bytes)
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


def _after_first_fill(entries: list[QueueEntry], size_bytes: int) -> Queues:
    n_small = n_first_small(np.array([entry[1] for entry in entries]), small_limit_bytes(size_bytes))
    small, main = entries[:n_small], entries[n_small:]
    return Queues(size_bytes, Fifo(small, sum(e[1] for e in small)), Fifo(main, sum(e[1] for e in main)))


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
    return _plan_of_one(trace, size_bytes, hit, bypass=True)


def _belady(trace: Trace, size_bytes: int, hit: bytearray) -> int:
    return _plan_of_one(trace, size_bytes, hit, bypass=False)


def _plan_of_one(trace: Trace, size_bytes: int, hit: bytearray, *, bypass: bool) -> int:
    columns = (trace.names.tolist(), trace.n_bytes.tolist(), next_positions(trace.names).tolist())
    held = _Furthest()
    free, n_evicted = size_bytes, 0
    for i, (name, n_bytes, at) in enumerate(zip(*columns, strict=True)):
        if held.use(name, at):
            hit[i] = 1
            continue
        if n_bytes > free:
            victims = None
            if n_bytes <= size_bytes:
                victims = choose_victims(held.candidates(), SpaceRequest(n_bytes - free, then=at if bypass else -1))
            free += held.end(victims)
            if victims is None:
                continue
            n_evicted += len(victims)
        held.add(name, n_bytes, at)
        free -= n_bytes
    return n_evicted


class _Furthest:
    """Copies ordered by their next use, the furthest first."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, int]] = {}  # name: (next use, bytes)
        self._heap: list[tuple[int, int]] = []
        self._shown: list[tuple[int, int]] = []

    def add(self, name: int, n_bytes: int, at: int) -> None:
        self._held[name] = (at, n_bytes)
        heapq.heappush(self._heap, (-at, name))

    def use(self, name: int, at: int) -> bool:
        """Record a use and the time of the next one; return False if the copy is not cached."""
        its = self._held.get(name)
        if its is not None:
            self.add(name, its[1], at)
        return its is not None

    def candidates(self) -> Iterator[Candidate]:
        """Yield all copies, the furthest next use first. The caller must call end() afterwards."""
        while self._heap:
            pair = heapq.heappop(self._heap)
            late, name = pair
            its = self._held.get(name)
            if its is not None and its[0] == -late:
                self._shown.append(pair)
                yield name, its[1], its[0]

    def end(self, victims: tuple[int, ...] | None) -> int:
        """Remove the victims and return their bytes; the other copies that candidates() yielded stay."""
        freed_bytes = sum(self._held.pop(name)[1] for name in victims or ())
        for pair in self._shown[len(victims or ()) :]:
            heapq.heappush(self._heap, pair)
        self._shown.clear()
        return freed_bytes


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
            then = int(uses.next_use(np.array([row]))[0])
            copies = _snapshot(n_bytes_of[rows], uses.next_use(rows), size_bytes)
            decision = plan(copies, SpaceRequest(n_bytes - free, then=then))
            if not decision.admit or n_bytes > size_bytes:
                continue
            victims = rows[list(decision.victims)]
            held[victims] = False
            free += int(n_bytes_of[victims].sum())
            n_evicted += len(victims)
        held[row], n_bytes_of[row] = True, n_bytes
        free -= n_bytes
    return n_evicted


def _snapshot(n_bytes: NDArray[np.int64], next_use: NDArray[np.int64], size_bytes: int) -> Snapshot:
    n = len(n_bytes)
    nothing, none = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    return Snapshot(n_bytes, nothing, none, nothing, np.arange(n), none, next_use, size_bytes, True)


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


RUNS: dict[str, PolicySimulation] = {
    "plan": _plan,
    "resident": _resident,
    "s3fifo": _s3fifo,
    "lru": _lru,
    "belady": _belady,
}
