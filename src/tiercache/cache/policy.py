"""Eviction policies: pure functions from a snapshot and a request to a frozen decision. They delete nothing.

`plan` evicts the copy with the furthest next use (L. A. Belady, "A study of replacement algorithms for a
virtual-storage computer", IBM Systems Journal 5(2), 1966), and does not admit a copy that is needed later still.
`s3fifo` is Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. The simulator
(cache/simulate.py) uses choose_victims(), Queues and, for several jobs, `plan` too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache.model import NEVER

# Next use of a copy that no plan names: later than a use that lies beyond the end of a plan (NEVER).
UNPLANNED = NEVER + 1
# Second next use of a new copy that comes before every use, so that `plan` may evict any copy that is not in use.
BEFORE_ALL_USES = -1
# Yang et al., section 4.1: the small queue for new entries is a tenth; two uses there move an entry to the main queue.
SMALL_SHARE = 0.1
USES_TO_STAY = 2
MOST_FREQ = 3
# Number of rows converted from arrays to Python objects at a time: most decisions need one victim.
_ROWS_AT_A_TIME = 64
_FEW_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class CopyTable:
    """The copies as a policy sees them: row i of every array is one copy. Immutable.

    Attributes:
        charge_bytes: Space that the copy takes.
        last_use: Sequence number of the last use; no two are equal.
        main: Whether the copy is in s3fifo's main queue, else in the small one.
        freq: Number of uses since the copy entered its queue.
        turn: Position in the queue; the smallest is the head, and no two are equal.
        keep: Whether the copy must not be evicted: it is pinned, of unknown source, or wanted by the requester.
        next_use: Bytes that a job reads before the next use; 0: in use; UNPLANNED: no plan names the copy.
        limit_bytes: Size limit of the cache.
        has_evicted: Whether the cache has ever evicted a copy.
    """

    charge_bytes: NDArray[np.int64]
    last_use: NDArray[np.int64]
    main: NDArray[np.bool_]
    freq: NDArray[np.int64]
    turn: NDArray[np.int64]
    keep: NDArray[np.bool_]
    next_use: NDArray[np.int64]
    limit_bytes: int
    has_evicted: bool


@dataclass(frozen=True, slots=True)
class SpaceRequest:
    """A request for space.

    Attributes:
        need_bytes: Bytes that must be freed before the new copy fits.
        want_bytes: Bytes up to which victims are chosen, if more than need_bytes.
        use_after_next: Bytes that a job reads before the second next use of the new copy; NEVER: no plan contains that
            use; UNPLANNED: no plan names the new copy; BEFORE_ALL_USES: space is needed for no copy in particular.
    """

    need_bytes: int
    want_bytes: int = 0
    use_after_next: int = UNPLANNED


@dataclass(frozen=True, slots=True)
class Requeue:
    """A copy moves to the end of a queue, after the first n_before victims of the decision and before the next."""

    row: int
    main: bool
    freq: int
    n_before: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the new copy is admitted, and the victims: rows of the snapshot in the order of eviction."""

    admit: bool
    victims: tuple[int, ...] = ()
    moves: tuple[Requeue, ...] = ()


REFUSED = Decision(admit=False)
Policy: TypeAlias = Callable[[CopyTable, SpaceRequest], Decision]
# (row or key, bytes, next use)
Candidate: TypeAlias = tuple[int, int, int]
# [row or key, bytes, freq]: lists, because freq grows while the entry is in a queue.
QueueEntry: TypeAlias = list[int]


def may_be_evicted_for(next_use: int, use_after_next: int) -> bool:
    """Return whether a copy with this next use may be evicted for a new copy with this second next use."""
    return next_use > use_after_next or next_use == UNPLANNED


def choose_victims(candidates: Iterable[Candidate], ask: SpaceRequest) -> tuple[int, ...] | None:
    """Return the candidates to evict for a request, in their order; None: too few of them may be evicted."""
    victims, freed_bytes, want_bytes = [], 0, max(ask.need_bytes, ask.want_bytes)
    for row, n_bytes, next_use in candidates:
        if freed_bytes >= want_bytes or not may_be_evicted_for(next_use, ask.use_after_next):
            break
        victims.append(row)
        freed_bytes += n_bytes
    return tuple(victims) if freed_bytes >= ask.need_bytes else None


class Fifo:
    """A queue of entries: first those of head, which is read lazily, then those that were put in."""

    __slots__ = ("_head", "_tail", "n_bytes")

    def __init__(self, head: Iterable[QueueEntry] = (), n_bytes: int = 0) -> None:
        """Create a queue. n_bytes is the size of all its entries, including kept ones that head leaves out."""
        self._head, self._tail, self.n_bytes = iter(head), deque[QueueEntry](), n_bytes

    def put(self, entry: QueueEntry) -> None:
        """Append an entry."""
        self._tail.append(entry)
        self.n_bytes += entry[1]

    def take(self) -> QueueEntry | None:
        """Remove and return the first entry; None: the queue is empty."""
        entry = next(self._head, None)
        if entry is None:
            if not self._tail:
                return None
            entry = self._tail.popleft()
        self.n_bytes -= entry[1]
        return entry


class QueueVictim(NamedTuple):
    """An evicted entry, and whether it came from the small queue: only then it becomes a ghost."""

    entry: QueueEntry
    was_small: bool


@dataclass(slots=True)
class Queues:
    """The queues of S3-FIFO in a cache of limit_bytes: `small` for new entries, `main` for those that were used again.

    A use increases the freq of its entry; entries move only when one must be evicted. on_move is called for every entry
    that goes to the end of the main queue.
    """

    limit_bytes: int
    small: Fifo = field(default_factory=Fifo)
    main: Fifo = field(default_factory=Fifo)
    on_move: Callable[[QueueEntry], object] | None = None

    def evict(self) -> QueueVictim | None:
        """Remove and return the next victim; None: no entry can be evicted."""
        if self.main.n_bytes <= self.limit_bytes - small_limit_bytes(self.limit_bytes):
            while entry := self.small.take():
                if entry[2] < USES_TO_STAY:
                    return QueueVictim(entry, True)
                entry[2] = 0
                self._stay(entry)
        while entry := self.main.take():
            if entry[2] == 0:
                return QueueVictim(entry, False)
            entry[2] = min(entry[2], MOST_FREQ) - 1
            self._stay(entry)
        # Reached only if kept copies fill more than the main queue's share.
        entry = self.small.take()
        return None if entry is None else QueueVictim(entry, True)

    def _stay(self, entry: QueueEntry) -> None:
        self.main.put(entry)
        if self.on_move is not None:
            self.on_move(entry)


def small_limit_bytes(limit_bytes: int) -> int:
    """Return the size of the small queue in a cache of limit_bytes."""
    return int(limit_bytes * SMALL_SHARE)


def n_first_small(n_bytes: NDArray[np.int64], small_bytes: int) -> int:
    """Return how many entries of these sizes, in the order of arrival, are in the small queue at the first eviction.

    The others go to the main queue. Until the first eviction, the queues make no difference.
    """
    before = np.cumsum(n_bytes) - n_bytes
    return int(np.searchsorted(before, small_bytes, side="left"))


# -- the policies ------------------------------------------------------------------------------------------------------


def resident(copies: CopyTable, ask: SpaceRequest) -> Decision:
    """Admit until the cache is full, then never evict: the best policy for one scan per epoch in an unknown order."""
    del copies
    return Decision(admit=ask.need_bytes <= 0)


def lru(copies: CopyTable, ask: SpaceRequest) -> Decision:
    """Evict the least recently used copy first."""

    def order(rows: NDArray[np.int64]) -> Iterator[Candidate]:
        oldest_first = rows[np.argsort(copies.last_use[rows])]
        return ((row, n_bytes, UNPLANNED) for row, n_bytes, _ in _candidates(copies, oldest_first))

    return _decide(copies, ask, ~copies.keep, order)


def s3fifo(copies: CopyTable, ask: SpaceRequest) -> Decision:
    """Evict by S3-FIFO: a small queue for new copies, a main queue for reused ones, ghosts of evicted new ones."""
    moves = _Moves()
    everything = np.ones(len(copies.keep), np.bool_)
    return _decide(copies, ask, ~copies.keep, lambda _: _queued(copies, everything, copies.limit_bytes, moves), moves)


def plan(copies: CopyTable, ask: SpaceRequest) -> Decision:
    """Evict copies that no plan names, by s3fifo; then the copy with the furthest next use; never one in use.

    The new copy is not admitted (and its reader bypasses the cache) if a copy would be evicted whose next use comes
    before the second use of the new one: Belady's MIN with bypass. A copy that no plan names never displaces one that a
    plan names.
    """
    named = copies.next_use != UNPLANNED
    may_go = ~copies.keep & (~named | ((copies.next_use > ask.use_after_next) & (copies.next_use > 0)))
    unnamed_bytes = int(copies.charge_bytes[~named].sum())
    moves = _Moves()

    def order(rows: NDArray[np.int64]) -> Iterator[Candidate]:
        return chain(_queued(copies, ~named, unnamed_bytes, moves), _furthest(copies, rows[named[rows]]))

    return _decide(copies, ask, may_go, order, moves)


POLICIES: dict[str, Policy] = {"plan": plan, "resident": resident, "s3fifo": s3fifo, "lru": lru}


def replaces(policy: str) -> bool:
    """Return whether the policy ever evicts: if not, a full cache can refuse without asking for victims."""
    return POLICIES[policy] is not resident


# -- orders ---------------------------------------------------------------------------------------------------------


class _Moves:
    """Collects the moves that a queue makes, each with the number of candidates that came before it."""

    def __init__(self) -> None:
        self.made: list[Requeue] = []
        self.n_given = 0

    def add(self, entry: QueueEntry) -> None:
        self.made.append(Requeue(entry[0], True, entry[2], self.n_given))


def _decide(
    copies: CopyTable,
    ask: SpaceRequest,
    may_go: NDArray[np.bool_],
    order: Callable[[NDArray[np.int64]], Iterator[Candidate]],
    moves: _Moves | None = None,
) -> Decision:
    if ask.need_bytes <= 0 and ask.want_bytes <= 0:
        return Decision(admit=True)
    rows = np.flatnonzero(may_go)
    # Checked before the order is computed: this sum decides most refusals.
    if int(copies.charge_bytes[rows].sum()) < ask.need_bytes:
        return REFUSED
    victims = choose_victims(order(rows), ask)
    if victims is None:
        return REFUSED
    made = () if moves is None else moves.made
    return Decision(True, victims, tuple(move for move in made if move.n_before < len(victims)))


def _candidates(copies: CopyTable, rows: NDArray[np.int64]) -> Iterator[Candidate]:
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = rows[start : start + _ROWS_AT_A_TIME]
        yield from zip(part.tolist(), copies.charge_bytes[part].tolist(), copies.next_use[part].tolist(), strict=True)


def _furthest(copies: CopyTable, rows: NDArray[np.int64]) -> Iterator[Candidate]:
    """Yield the copies of rows, furthest next use first. For 25,000, sorting takes 3 ms, finding the first 0.4 ms."""
    use = copies.next_use[rows]
    if len(rows) > _FEW_ROWS:
        nth = len(rows) - _ROWS_AT_A_TIME
        first = use >= np.partition(use, nth)[nth]
        parts = (rows[first], rows[~first])
    else:
        parts = (rows, rows[:0])
    for part in parts:
        yield from _candidates(copies, part[np.lexsort((copies.turn[part], -copies.next_use[part]))])


def _entries(copies: CopyTable, rows: NDArray[np.int64]) -> Iterator[QueueEntry]:
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = rows[start : start + _ROWS_AT_A_TIME]
        columns = (part.tolist(), copies.charge_bytes[part].tolist(), copies.freq[part].tolist())
        yield from map(list, zip(*columns, strict=True))


def _queued(copies: CopyTable, among: NDArray[np.bool_], limit_bytes: int, moves: _Moves) -> Iterator[Candidate]:
    """Yield the victims that S3-FIFO chooses among some copies, in a cache of limit_bytes, while there are any."""
    rows = np.flatnonzero(among)
    rows = rows[np.argsort(copies.turn[rows])]
    small, main = rows[~copies.main[rows]], rows[copies.main[rows]]
    if not copies.has_evicted:
        n_small = n_first_small(copies.charge_bytes[small], small_limit_bytes(limit_bytes))
        late, small = small[n_small:], small[:n_small]
        main = np.concatenate((main, late))
        freqs = copies.freq[late].tolist()
        moves.made += [Requeue(row, True, freq, 0) for row, freq in zip(late.tolist(), freqs, strict=True)]
    queues = Queues(limit_bytes, _fifo(copies, small), _fifo(copies, main), moves.add)
    while (out := queues.evict()) is not None:
        moves.n_given += 1
        yield out.entry[0], out.entry[1], UNPLANNED


def _fifo(copies: CopyTable, rows: NDArray[np.int64]) -> Fifo:
    return Fifo(_entries(copies, rows[~copies.keep[rows]]), int(copies.charge_bytes[rows].sum()))
