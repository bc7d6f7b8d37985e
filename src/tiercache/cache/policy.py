"""Policies: a snapshot and a question in, a frozen decision out. Pure functions; deleting is not theirs.

`plan` gives up what is needed furthest from now (L. A. Belady, "A study of replacement algorithms for a virtual-storage
computer", IBM Systems Journal 5(2), 1966) and passes by what is needed later still. `s3fifo` is Yang et al., "FIFO
queues are all you need for cache eviction", SOSP 2023. The simulator (replay.py) runs on the same three pieces:
push_out(), Queues, and the functions of POLICIES.
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

# The next use of a copy that no plan names: later than what a plan does not see (NEVER).
UNPLANNED = NEVER + 1
# Yang et al., section 4.1: a tenth for what is new; two uses there earn a place in the main queue.
SMALL_SHARE = 0.1
USES_TO_STAY = 2
MOST_FREQ = 3
# Rows that are turned from arrays into Python at a time: most decisions need one victim.
_ROWS_AT_A_TIME = 64
_FEW_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The copies as a policy sees them: row i of every array is one copy. Nothing in it is changed.

    Attributes:
        charge_bytes: int64[n], what it takes.
        last_use: int64[n], a count that grows with every use, no two alike.
        main: bool[n], it stands in s3fifo's main queue, else in the small one.
        freq: int64[n], its uses since it came there.
        turn: int64[n], its place in the queue: the smallest is the head, no two alike.
        keep: bool[n], it may not be a victim: held by a person, of unknown source, or wanted by who asks.
        next_use: int64[n], bytes that a job still reads before it; 0: in use; UNPLANNED: no plan names it.
        limit_bytes: of the cache.
        has_evicted: whether it ever gave anything up.
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
class Ask:
    """What room is wanted for.

    need_bytes: must go before it fits; want_bytes: victims are named as far as this, where that is more; then: bytes
    that a job still reads before the use after the coming one; NEVER: no plan sees that use; UNPLANNED: no plan names
    what is to come at all.
    """

    need_bytes: int
    want_bytes: int = 0
    then: int = UNPLANNED


@dataclass(frozen=True, slots=True)
class Move:
    """A copy goes to the end of a queue, after the first n_before victims of the decision and before the next."""

    row: int
    main: bool
    freq: int
    n_before: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether room may be made, and how: rows of the snapshot in the order in which they go."""

    admit: bool
    victims: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()


REFUSED = Decision(admit=False)
Policy: TypeAlias = Callable[[Snapshot, Ask], Decision]
# (row or key, bytes, next use)
Candidate: TypeAlias = tuple[int, int, int]
# [row or key, bytes, freq]: lists, because their freq counts up while they stand in a queue.
Entry: TypeAlias = list[int]


def gives_way(next_use: int, then: int) -> bool:
    """Whether a copy may go for one whose use after the coming one is `then` away: it is needed later, or by nobody."""
    return next_use > then or next_use == UNPLANNED


def push_out(candidates: Iterable[Candidate], ask: Ask) -> tuple[int, ...] | None:
    """Who of the candidates, in their order, go for what is asked; None: not enough of them give way."""
    victims, freed_bytes, want_bytes = [], 0, max(ask.need_bytes, ask.want_bytes)
    for row, n_bytes, next_use in candidates:
        if freed_bytes >= want_bytes or not gives_way(next_use, ask.then):
            break
        victims.append(row)
        freed_bytes += n_bytes
    return tuple(victims) if freed_bytes >= ask.need_bytes else None


class Fifo:
    """A queue of entries: those of head, which is read as far as is needed, then those that were put in."""

    __slots__ = ("_head", "_tail", "n_bytes")

    def __init__(self, head: Iterable[Entry] = (), n_bytes: int = 0) -> None:
        """n_bytes: of all in the queue, and of those in it that head leaves out because they are kept."""
        self._head, self._tail, self.n_bytes = iter(head), deque[Entry](), n_bytes

    def put(self, entry: Entry) -> None:
        """Put an entry at the end."""
        self._tail.append(entry)
        self.n_bytes += entry[1]

    def take(self) -> Entry | None:
        """Take the entry at the head; None: there is none."""
        entry = next(self._head, None)
        if entry is None:
            if not self._tail:
                return None
            entry = self._tail.popleft()
        self.n_bytes -= entry[1]
        return entry


class Out(NamedTuple):
    """Who goes, and whether from the small queue: only then it becomes a ghost."""

    entry: Entry
    was_small: bool


@dataclass(slots=True)
class Queues:
    """The two queues of S3-FIFO. Who is used gets a higher freq in its entry; nothing moves until something must go.

    moved: what to tell of every entry that goes to the end of the main queue.
    """

    limit_bytes: int
    small: Fifo = field(default_factory=Fifo)
    main: Fifo = field(default_factory=Fifo)
    moved: Callable[[Entry], object] | None = None

    def evict(self) -> Out | None:
        """Take out who goes next; None: nobody can."""
        if self.main.n_bytes <= self.limit_bytes - small_limit_bytes(self.limit_bytes):
            while entry := self.small.take():
                if entry[2] < USES_TO_STAY:
                    return Out(entry, True)
                entry[2] = 0
                self._stay(entry)
        while entry := self.main.take():
            if entry[2] == 0:
                return Out(entry, False)
            entry[2] = min(entry[2], MOST_FREQ) - 1
            self._stay(entry)
        # Only where the main queue holds more than its share that is kept.
        entry = self.small.take()
        return None if entry is None else Out(entry, True)

    def _stay(self, entry: Entry) -> None:
        self.main.put(entry)
        if self.moved is not None:
            self.moved(entry)


def small_limit_bytes(limit_bytes: int) -> int:
    """The small queue's share of a cache of limit_bytes."""
    return int(limit_bytes * SMALL_SHARE)


def n_first_small(n_bytes: NDArray[np.int64], small_bytes: int) -> int:
    """How many of the first entries stay in the small queue at the first eviction; the others go to the main queue.

    Until then both fill up without a difference: who comes while the small queue has room stands there.
    n_bytes: int64[n], in the order in which they came.
    """
    before = np.cumsum(n_bytes) - n_bytes
    return int(np.searchsorted(before, small_bytes, side="left"))


# -- the policies ------------------------------------------------------------------------------------------------------


def resident(copies: Snapshot, ask: Ask) -> Decision:
    """Admit until full, then never replace: the best that can be done for one scan an epoch in an unknown order."""
    del copies
    return Decision(admit=ask.need_bytes <= 0)


def lru(copies: Snapshot, ask: Ask) -> Decision:
    """Least recently used first."""

    def order(rows: NDArray[np.int64]) -> Iterator[Candidate]:
        oldest_first = rows[np.argsort(copies.last_use[rows])]
        return ((row, n_bytes, UNPLANNED) for row, n_bytes, _ in _candidates(copies, oldest_first))

    return _decide(copies, ask, ~copies.keep, order)


def s3fifo(copies: Snapshot, ask: Ask) -> Decision:
    """A small queue for what is new, a main one for what is used again, ghosts of what went too early."""
    moves = _Moves()
    everything = np.ones(len(copies.keep), np.bool_)
    return _decide(copies, ask, ~copies.keep, lambda _: _queued(copies, everything, copies.limit_bytes, moves), moves)


def plan(copies: Snapshot, ask: Ask) -> Decision:
    """What no plan names goes first, as s3fifo says; then what is needed furthest from now; what is in use never.

    What is to come gets no room (it is read past the cache) where a copy would have to go that is needed before it is
    needed again itself: MIN with bypass. What no plan names takes no room from what one names.
    """
    named = copies.next_use != UNPLANNED
    may_go = ~copies.keep & (~named | ((copies.next_use > ask.then) & (copies.next_use > 0)))
    unnamed_bytes = int(copies.charge_bytes[~named].sum())
    moves = _Moves()

    def order(rows: NDArray[np.int64]) -> Iterator[Candidate]:
        return chain(_queued(copies, ~named, unnamed_bytes, moves), _furthest(copies, rows[named[rows]]))

    return _decide(copies, ask, may_go, order, moves)


POLICIES: dict[str, Policy] = {"plan": plan, "resident": resident, "s3fifo": s3fifo, "lru": lru}


def replaces(policy: str) -> bool:
    """Whether the policy ever makes room: if not, a full cache can say so without being asked for victims."""
    return POLICIES[policy] is not resident


# -- orders ---------------------------------------------------------------------------------------------------------


class _Moves:
    """Collects the moves that a queue makes, each with the number of candidates that it gave before."""

    def __init__(self) -> None:
        self.made: list[Move] = []
        self.n_given = 0

    def note(self, entry: Entry) -> None:
        self.made.append(Move(entry[0], True, entry[2], self.n_given))

    def before(self, n_victims: int) -> tuple[Move, ...]:
        """Those that were made before the last of n_victims went."""
        return tuple(move for move in self.made if move.n_before < n_victims)


def _decide(
    copies: Snapshot,
    ask: Ask,
    may_go: NDArray[np.bool_],
    order: Callable[[NDArray[np.int64]], Iterator[Candidate]],
    moves: _Moves | None = None,
) -> Decision:
    if ask.need_bytes <= 0 and ask.want_bytes <= 0:
        return Decision(admit=True)
    rows = np.flatnonzero(may_go)
    # Before the order is made: most refusals are seen here, in one sum.
    if int(copies.charge_bytes[rows].sum()) < ask.need_bytes:
        return REFUSED
    victims = push_out(order(rows), ask)
    if victims is None:
        return REFUSED
    return Decision(True, victims, () if moves is None else moves.before(len(victims)))


def _candidates(copies: Snapshot, rows: NDArray[np.int64]) -> Iterator[Candidate]:
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = rows[start : start + _ROWS_AT_A_TIME]
        yield from zip(part.tolist(), copies.charge_bytes[part].tolist(), copies.next_use[part].tolist(), strict=True)


def _furthest(copies: Snapshot, rows: NDArray[np.int64]) -> Iterator[Candidate]:
    """The copies of rows, furthest next use first. Sorting 25,000 takes 3 ms, finding the first of them 0.4."""
    use = copies.next_use[rows]
    if len(rows) > _FEW_ROWS:
        nth = len(rows) - _ROWS_AT_A_TIME
        first = use >= np.partition(use, nth)[nth]
        parts = (rows[first], rows[~first])
    else:
        parts = (rows, rows[:0])
    for part in parts:
        yield from _candidates(copies, part[np.lexsort((copies.turn[part], -copies.next_use[part]))])


def _entries(copies: Snapshot, rows: NDArray[np.int64]) -> Iterator[Entry]:
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = rows[start : start + _ROWS_AT_A_TIME]
        columns = (part.tolist(), copies.charge_bytes[part].tolist(), copies.freq[part].tolist())
        yield from map(list, zip(*columns, strict=True))


def _queued(copies: Snapshot, among: NDArray[np.bool_], limit_bytes: int, moves: _Moves) -> Iterator[Candidate]:
    """Who of the copies `among` goes next in a cache of limit_bytes by S3-FIFO, as long as anybody can."""
    rows = np.flatnonzero(among)
    rows = rows[np.argsort(copies.turn[rows])]
    small, main = rows[~copies.main[rows]], rows[copies.main[rows]]
    if not copies.has_evicted:
        n_small = n_first_small(copies.charge_bytes[small], small_limit_bytes(limit_bytes))
        late, small = small[n_small:], small[:n_small]
        main = np.concatenate((main, late))
        freqs = copies.freq[late].tolist()
        moves.made += [Move(row, True, freq, 0) for row, freq in zip(late.tolist(), freqs, strict=True)]
    queues = Queues(limit_bytes, _fifo(copies, small), _fifo(copies, main), moves.note)
    while (out := queues.evict()) is not None:
        moves.n_given += 1
        yield out.entry[0], out.entry[1], UNPLANNED


def _fifo(copies: Snapshot, rows: NDArray[np.int64]) -> Fifo:
    return Fifo(_entries(copies, rows[~copies.keep[rows]]), int(copies.charge_bytes[rows].sum()))
