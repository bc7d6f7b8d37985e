"""The planner: brings windows into memory and pushes their rows to the ring, as long as an epoch has any.

A thread of its own, which goes at most one piece ahead of the one that is served. What has to be read or decoded for a
piece is begun before the piece's rows are computed, so that neither waits for the other.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tiercache._native.ring import Plan
from tiercache.load.ahead import Ahead
from tiercache.load.coming import drop
from tiercache.load.mending import Mended
from tiercache.load.pressure import Pressure
from tiercache.load.share import OrderShare, interleaved
from tiercache.load.window import Joined, Loaded, Loading
from tiercache.order import RowRun

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tiercache._native.ring import Ring
    from tiercache.load.coming import Begun
    from tiercache.load.pipeline import Work
    from tiercache.load.plan import Piece
    from tiercache.load.pressure import Slice
    from tiercache.load.window import Threads
    from tiercache.order import Window

# Where rows lie: a run that is found as it is gathered, or block and row, uint32[n] each.
Rows: TypeAlias = "RowRun | tuple[NDArray[np.uint32], NDArray[np.uint32]]"

# What is brought near ahead of the windows, in shards of the largest size: fetches overlap with reading, the cache
# stays free for the rest.
SHARDS_AHEAD = 4


@dataclass(frozen=True, slots=True, eq=False)
class Pushed:
    """Rows that the ring has: a run of the first window, or block (through the windows' blocks) and row, uint32[n]."""

    rows: Rows
    joined: Joined

    @property
    def n_rows(self) -> int:
        """Of them."""
        return self.rows.n_rows if isinstance(self.rows, RowRun) else len(self.rows[1])

    def places(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Block and row of the rows [lo, hi)."""
        return self.rows.find(lo, hi) if isinstance(self.rows, RowRun) else (self.rows[0][lo:hi], self.rows[1][lo:hi])

    def as_plan(self, forms: NDArray[np.uint64] | None) -> Plan:
        """What the ring takes."""
        joined, checks = self.joined, self.joined.checks_for(self.n_rows)
        if isinstance(self.rows, RowRun):
            return Plan.of_run(joined.addresses, self.rows, joined, checks, forms)
        return Plan(joined.addresses, *self.rows, joined, checks, forms)


@dataclass(slots=True)
class Shared:
    """What planner and consumer share.

    pieces: pushed, oldest first, with the sequence's row after their last; mended: pieces in which records were
    replaced, with the sequence's row before their first; stop: done when the planner shall end, so
    that it can be waited for beside a window; ended: the consumer has had the last batch; forms: what lists of bytes
    may refer to, kept as long as they are filled.
    """

    pieces: deque[tuple[int, Pushed]] = field(default_factory=deque)
    mended: deque[tuple[int, Mended]] = field(default_factory=deque)
    error: Exception | None = None
    stop: Future[None] = field(default_factory=Future)
    ended: bool = False
    forms: NDArray[np.uint64] | None = None


def plan(work: Work, ring: Ring, shared: Shared, threads: Threads) -> None:
    """The planner thread: push each piece of the epoch, then make the next epoch's beginning ready."""
    is_planned = False
    try:
        if work.publishing is not None and isinstance(work.share, OrderShare):
            work.publishing.begin(work.share, work.first_batch)
        planner = _Planner(work, ring, shared, threads)
        planner.push_all()
        ring.finish()
        is_planned = True  # what goes wrong from here on is of the next epoch, and is heard of when that comes
        if work.coming is not None and planner.has_room():
            planner.let_go()
            work.coming.prepare(threads, planner.pressure, planner.ahead_bytes)
    except CancelledError:  # close() while a window was being loaded
        ring.finish(failed=True)
    except Exception as error:  # noqa: BLE001 -- a thread's top: the consumer raises it in its place in the order
        if not is_planned and not shared.stop.done():
            shared.error = error
        ring.finish(failed=True)
    finally:
        if work.begun is not None:  # closed before it was needed, perhaps before it was there
            drop(work.begun)


class _Planner:
    """One epoch's planner: what it holds, and what it has pushed.

    ahead_bytes: of shards to be brought near ahead of the windows.
    """

    def __init__(self, work: Work, ring: Ring, shared: Shared, threads: Threads) -> None:
        self._work = work
        self._ring = ring
        self._shared = shared
        self._threads = threads
        self._pushed_rows = self._last_rows = 0  # pushed last
        self._held: dict[int, Loaded] = {}  # by the window's id: each holds its window
        self._loading: dict[int, Loading] = {}  # begun by the epoch before
        self._joined: Joined | None = None
        self._serving: tuple[Window, ...] = ()  # of what was pushed last
        fitted = work.fittings.of(work.source, work.serving)
        self.ahead_bytes = SHARDS_AHEAD * fitted.largest_bytes
        self._near = Ahead(threads, fitted.stored_bytes)
        self.pressure = Pressure(work.source.is_at_hand, threads.limit_bytes)
        shared.forms = fitted.forms

    def push_all(self) -> None:
        """Push every piece. Raises CancelledError where the ring is closed meanwhile."""
        for piece in self._pieces():
            if piece.batch_rows is not None and not self._ring.push_sizes(piece.batch_rows):
                raise CancelledError
            served: object = piece
            if isinstance(served, Mended):
                self._shared.mended.append((self._pushed_rows, served))
            if self.pressure.fits(piece):
                self._push(piece)
                continue
            for part in self.pressure.slices(piece):
                self._push(part)
                if "pressure" not in self._work.said and self.pressure.is_told and not self.pressure.fits(piece):
                    self._warn()

    def has_room(self) -> bool:
        """Wait until all but what was pushed last is served. False: closed before the end of the epoch."""
        has_room = self._ring.wait_room(1)
        self._advance()
        return (has_room or self._shared.ended) and (self._shared.ended or not self._shared.stop.done())

    def let_go(self) -> None:
        """Hold nothing any more: what is not served yet, the ring holds."""
        self._held.clear()
        self._joined = None

    def _pieces(self) -> Iterator[Piece]:
        start_s = time.perf_counter()
        begun: Begun | None = None if self._work.begun is None else self._threads.result(self._work.begun)
        if begun is not None:
            self._loading = {id(loading.window): loading for loading in begun.loading}
        found = self._work.share.pieces(self._work.first_batch) if begun is None else begun.pieces
        if self._shared.stop.done():  # a share that was closed before pieces() was called would wait for ever
            raise CancelledError
        for piece in found:
            self._count("plan_s", start_s)
            yield piece
            start_s = time.perf_counter()

    def _push(self, part: Piece | Slice) -> None:
        """Load what a part needs and is not here, and push its rows."""
        missing = self._let_go_of_others(part)
        rows = None
        if not self._is_work(missing):  # computed while the piece before is served; else while windows are decoded
            rows = self._rows(part)
        if not self._ring.wait_room(1):  # within a window too: its rows in served order take 8 bytes each
            raise CancelledError
        self._advance()
        start_s = time.perf_counter()
        loading = self._begin(missing)
        self._count("load_s", start_s)
        if rows is None:
            rows = self._rows(part)
        start_s = time.perf_counter()
        new = self._finish(loading)
        joined = self._join(part)
        # Near before a row of it is asked for, while the window before is served.
        is_first, serving = not self._pushed_rows, (*self._serving, *part.windows)
        for read in self._near.bring_near(new, serving) if not is_first else ():
            self._threads.result(read)
        self._count("load_s", start_s)
        pushed = Pushed(rows, joined)
        self._last_rows = pushed.n_rows
        self._pushed_rows += self._last_rows
        self._shared.pieces.append((self._pushed_rows, pushed))
        if not self._ring.push(pushed.as_plan(self._shared.forms)):
            raise CancelledError
        if is_first:  # the first batch does not wait for its whole window
            self._near.bring_near(new, serving, is_served=True)
            if self._work.publishing is not None:
                self._work.publishing.complete()
        self._serving = part.windows

    def _advance(self) -> None:
        """All but what was pushed last is served: the cache may take back what was read for it."""
        if self._work.publishing is not None:
            self._work.publishing.advance(self._work.first_batch, self._pushed_rows - self._last_rows)

    def _let_go_of_others(self, part: Piece | Slice) -> list[tuple[Window, NDArray[np.bool_]]]:
        """Hold only what the part needs, before more is loaded: its memory may be needed. What is missing."""
        kept: dict[int, Loaded] = {}
        missing = []
        for window, wanted in zip(part.windows, part.wanted, strict=True):
            loaded = self._held.get(id(window))
            if loaded is not None and loaded.covers(wanted):
                kept[id(window)] = loaded
            else:
                missing.append((window, wanted))
        self._held = kept
        if missing:
            self._joined = None
        return missing

    def _is_work(self, missing: list[tuple[Window, NDArray[np.bool_]]]) -> bool:
        is_at_hand = self._work.source.is_at_hand
        missing = [pair for pair in missing if id(pair[0]) not in self._loading]  # what is work of those is under way
        return any(not is_at_hand(shard) for window, wanted in missing for shard in set(window.shards[wanted].tolist()))

    def _begin(self, missing: list[tuple[Window, NDArray[np.bool_]]]) -> list[Loading]:
        unasked = [pair for pair in missing if id(pair[0]) not in self._loading]
        if unasked and self._work.source.is_fetched:
            self._prefetch(unasked)
        return [self._loading_of(window, wanted) for window, wanted in missing]

    def _loading_of(self, window: Window, wanted: NDArray[np.bool_]) -> Loading:
        begun = self._loading.pop(id(window), None)
        if begun is not None:
            return begun
        return Loading(self._work.source, window, wanted, self._threads.executor, self._threads.n_threads)

    def _prefetch(self, missing: list[tuple[Window, NDArray[np.bool_]]]) -> None:
        """Have shards brought near: those of the windows first, what comes after must not be fetched before them."""
        work = self._work
        own = interleaved([list(dict.fromkeys(window.shards[wanted].tolist())) for window, wanted in missing])
        ahead = work.share.shards_ahead(work.first_batch, self._pushed_rows, self.ahead_bytes)
        # Towards the end of an epoch the next one's begin is what comes then.
        if work.coming is not None and int(work.source.shard_bytes[ahead].sum()) < self.ahead_bytes:
            ahead += work.coming.shards_ahead(self.ahead_bytes)
        work.source.prefetch([*dict.fromkeys([*own, *ahead])])

    def _finish(self, loading: list[Loading]) -> list[Loaded]:
        new = []
        try:
            for one in loading:
                loaded = one.finish(self._threads)
                self._held[id(loaded.window)] = loaded
                self.pressure.learn(loaded)
                new.append(loaded)
        finally:
            for one in loading:
                one.cancel()
        return new

    def _join(self, part: Piece | Slice) -> Joined:
        windows = tuple(self._held[id(window)] for window in part.windows)
        if self._joined is None or self._joined.windows != windows:
            self._joined = Joined(windows)
        return self._joined

    def _rows(self, part: Piece | Slice) -> Rows:
        """The part's rows, as they are stored."""
        run = part.run if self._work.source.is_whole else None
        if run is not None:
            return run
        start_s = time.perf_counter()
        block, row = part.rows()
        shards = [window.shards for window in part.windows]
        blocks = [window.blocks for window in part.windows]
        if len(shards) > 1:
            shards, blocks = [np.concatenate(shards)], [np.concatenate(blocks)]
        row = self._work.source.stored_rows(shards[0], blocks[0], block, row)
        self._count("plan_s", start_s)
        return block, row

    def _count(self, name: str, start_s: float) -> None:
        self._work.counters.add(name, time.perf_counter() - start_s)

    def _warn(self) -> None:
        """Say that blocks are read again and again."""
        self._work.said.add("pressure")
        warnings.warn(self.pressure.explain(self._work.source.url), RuntimeWarning, stacklevel=2)
