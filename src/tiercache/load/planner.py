"""The planner thread: it loads windows and pushes their rows to the ring until the epoch ends.

The planner is at most one piece ahead of the piece that is served. At the end of the epoch it prepares the start of
the next one (`epoch.NextEpoch`).
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
from tiercache.load.epoch import cancel_loads, interleaved
from tiercache.load.prefetch import (
    ArrayPiece,
    JoinedWindows,
    LoadedWindow,
    MemoryPressure,
    PagePrefetcher,
    WindowLoad,
)
from tiercache.order import RowRun

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tiercache._native.ring import Ring
    from tiercache.load.pipeline import PipelineInputs
    from tiercache.load.prefetch import AnyPiece, LoadThreads
    from tiercache.order import Window


# Locations of rows: a run whose rows are computed as they are gathered, or block and row, uint32[n] each.
Rows: TypeAlias = "RowRun | tuple[NDArray[np.uint32], NDArray[np.uint32]]"

# Bytes to prefetch ahead of the windows, in shards of the largest size: fetches overlap with reading, and the rest of
# the cache stays free.
SHARDS_AHEAD = 4


@dataclass(frozen=True, slots=True, eq=False)
class PushedRows:
    """Rows that the ring has: a run of the first window, or block (numbered through the windows) and row, uint32[n]."""

    rows: Rows
    joined: JoinedWindows

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.rows.n_rows if isinstance(self.rows, RowRun) else len(self.rows[1])

    def locations(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return block and row of the rows [lo, hi)."""
        return self.rows.find(lo, hi) if isinstance(self.rows, RowRun) else (self.rows[0][lo:hi], self.rows[1][lo:hi])

    def as_plan(self, layouts: NDArray[np.uint64] | None) -> Plan:
        """Return the rows in the form that the ring takes."""
        joined, checks = self.joined, self.joined.checks_for(self.n_rows)
        if isinstance(self.rows, RowRun):
            return Plan.from_finder(joined.addresses, self.rows, joined, checks, layouts)
        return Plan(joined.addresses, *self.rows, joined, checks, layouts)


@dataclass(slots=True)
class PlannerState:
    """State shared by the planner and the consumer.

    Attributes:
        pushed: Pushed rows, oldest first, with the row of the sequence after their last one.
        replaced_pieces: Pieces with replaced records, with the row of the sequence before their first one.
        error: Error that stopped the planner.
        stop: Future that is done when the planner must end, so that it can be waited for together with a window.
        ended: Whether the consumer has taken the last batch.
    """

    pushed: deque[tuple[int, PushedRows]] = field(default_factory=deque)
    replaced_pieces: deque[tuple[int, ArrayPiece]] = field(default_factory=deque)
    error: Exception | None = None
    stop: Future[None] = field(default_factory=Future)
    ended: bool = False


def run_planner(work: PipelineInputs, ring: Ring, shared: PlannerState, threads: LoadThreads) -> None:
    """Run the planner thread: push each piece of the epoch, then prepare the start of the next epoch."""
    is_planned = False
    try:
        if work.publisher is not None:
            work.publisher.begin(work.share, work.first_batch)
        planner = _Planner(work, ring, shared, threads)
        planner.push_all()
        ring.finish()
        is_planned = True  # Later errors concern the next epoch, which raises them itself.
        if work.next_epoch is not None and planner.has_room():
            planner.drop_windows()
            work.next_epoch.prepare(threads, planner.pressure, planner.ahead_bytes)
    except CancelledError:  # close() was called while a window was loaded.
        ring.finish(failed=True)
    except Exception as error:  # noqa: BLE001 -- top of a thread: the consumer raises it in its place in the order
        if not is_planned and not shared.stop.done():
            shared.error = error
        ring.finish(failed=True)
    finally:
        # The pipeline was closed before it used the prepared start, which may not be ready yet.
        if work.epoch_start is not None:
            cancel_loads(work.epoch_start)


class _Planner:
    """The planner of one epoch: the windows that it holds, and the rows that it has pushed.

    ahead_bytes: stored bytes of shards to prefetch ahead of the windows.
    """

    def __init__(self, work: PipelineInputs, ring: Ring, shared: PlannerState, threads: LoadThreads) -> None:
        self._work = work
        self._ring = ring
        self._shared = shared
        self._threads = threads
        self._pushed_rows = self._last_rows = 0  # rows pushed so far; rows of the last push
        self._windows: dict[int, LoadedWindow] = {}  # by the window's id; each holds its window
        self._loading: dict[int, WindowLoad] = {}  # started by the epoch before
        self._joined: JoinedWindows | None = None
        self._served_windows: tuple[Window, ...] = ()  # the windows of the last push
        self.ahead_bytes = SHARDS_AHEAD * work.setup.largest_bytes
        self._near = PagePrefetcher(threads, work.setup.stored_bytes)
        self.pressure = MemoryPressure(work.source.is_mapped, threads.limit_bytes)

    def push_all(self) -> None:
        """Push every piece. Raises CancelledError if the ring is closed meanwhile."""
        for piece in self._pieces():
            if isinstance(piece, ArrayPiece) and len(piece.replaced):
                self._shared.replaced_pieces.append((self._pushed_rows, piece))
            if self.pressure.fits(piece):
                self._push(piece)
                continue
            for part in self.pressure.slices(piece):
                self._push(part)
                if "pressure" not in self._work.warned and self.pressure.has_measured and not self.pressure.fits(piece):
                    self._warn()

    def has_room(self) -> bool:
        """Wait until all rows but those of the last push are served. False: closed before the end of the epoch."""
        has_room = self._ring.wait_room(1)
        self._advance()
        return (has_room or self._shared.ended) and (self._shared.ended or not self._shared.stop.done())

    def drop_windows(self) -> None:
        """Drop all windows: the ring holds those whose rows are not served yet."""
        self._windows.clear()
        self._joined = None

    def _pieces(self) -> Iterator[AnyPiece]:
        start_s = time.perf_counter()
        epoch_start = None if self._work.epoch_start is None else self._threads.result(self._work.epoch_start)
        if epoch_start is not None:
            self._loading = {id(load.window): load for load in epoch_start.loading}
            pieces = epoch_start.pieces
        else:
            pieces = self._work.share.pieces(self._work.first_batch)
        for piece in pieces:
            self._count("plan_s", start_s)
            yield piece
            start_s = time.perf_counter()

    def _push(self, part: AnyPiece) -> None:
        """Load the windows that a part needs and that are missing, and push its rows."""
        missing = self._drop_other_windows(part)
        rows = None
        if not self._is_work(missing):  # computed while the piece before is served; else while windows are decoded
            rows = self._rows(part)
        if not self._ring.wait_room(1):  # Also within a window: its rows in served order take 8 bytes each.
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
        # Prefetch its pages before a row of it is requested, while the window before is served.
        is_first, served = not self._pushed_rows, (*self._served_windows, *part.windows)
        for read in self._near.prefetch_pages(new, served) if not is_first else ():
            self._threads.result(read)
        self._count("load_s", start_s)
        pushed = PushedRows(rows, joined)
        self._last_rows = pushed.n_rows
        self._pushed_rows += self._last_rows
        self._shared.pushed.append((self._pushed_rows, pushed))
        if not self._ring.push(pushed.as_plan(self._work.setup.layouts)):
            raise CancelledError
        if is_first:  # The first batch does not wait for its whole window.
            self._near.prefetch_pages(new, served, is_served=True)
            if self._work.publisher is not None:
                self._work.publisher.complete()
        self._served_windows = part.windows

    def _advance(self) -> None:
        """Tell the cache that all rows but those of the last push are served, so that it may evict their shards."""
        if self._work.publisher is not None:
            self._work.publisher.advance(self._work.first_batch, self._pushed_rows - self._last_rows)

    def _drop_other_windows(self, part: AnyPiece) -> list[tuple[Window, NDArray[np.bool_]]]:
        """Drop the windows that the part does not need, before more memory is used; return the missing ones."""
        still_needed: dict[int, LoadedWindow] = {}
        missing = []
        for window, needed in zip(part.windows, part.needed, strict=True):
            loaded = self._windows.get(id(window))
            if loaded is not None and loaded.covers(needed):
                still_needed[id(window)] = loaded
            else:
                missing.append((window, needed))
        self._windows = still_needed
        if missing:
            self._joined = None
        return missing

    def _is_work(self, missing: list[tuple[Window, NDArray[np.bool_]]]) -> bool:
        is_mapped = self._work.source.is_mapped
        # their reading and decoding is under way
        missing = [pair for pair in missing if id(pair[0]) not in self._loading]
        return any(not is_mapped(shard) for window, needed in missing for shard in set(window.shards[needed].tolist()))

    def _begin(self, missing: list[tuple[Window, NDArray[np.bool_]]]) -> list[WindowLoad]:
        unasked = [pair for pair in missing if id(pair[0]) not in self._loading]
        if unasked and self._work.source.can_prefetch:
            self._prefetch(unasked)
        loading = []
        for window, needed in missing:
            load = self._loading.pop(id(window), None)
            if load is None:
                load = WindowLoad(self._work.source, window, needed, self._threads.executor, self._threads.n_threads)
            loading.append(load)
        return loading

    def _prefetch(self, missing: list[tuple[Window, NDArray[np.bool_]]]) -> None:
        """Prefetch shards: those of the windows first, because later shards must not be fetched before them."""
        work = self._work
        own = interleaved([list(dict.fromkeys(window.shards[needed].tolist())) for window, needed in missing])
        ahead = work.share.shards_ahead(work.first_batch, self._pushed_rows, self.ahead_bytes)
        # Near the end of an epoch the shards of the next epoch come next.
        if work.next_epoch is not None and int(work.source.shard_bytes[ahead].sum()) < self.ahead_bytes:
            ahead += work.next_epoch.shards_ahead(self.ahead_bytes)
        work.source.prefetch([*dict.fromkeys([*own, *ahead])])

    def _finish(self, loading: list[WindowLoad]) -> list[LoadedWindow]:
        new = []
        try:
            for load in loading:
                loaded = load.finish(self._threads)
                self._windows[id(loaded.window)] = loaded
                self.pressure.record_usage(loaded)
                new.append(loaded)
        finally:
            for load in loading:
                load.cancel()
        return new

    def _join(self, part: AnyPiece) -> JoinedWindows:
        windows = tuple(self._windows[id(window)] for window in part.windows)
        if self._joined is None or self._joined.windows != windows:
            self._joined = JoinedWindows(windows)
        return self._joined

    def _rows(self, part: AnyPiece) -> Rows:
        """Return the part's rows as they are stored."""
        run = part.run if self._work.source.selects_all else None
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
        """Warn that blocks are read again and again."""
        self._work.warned.add("pressure")
        warnings.warn(self.pressure.explain(self._work.source.url), RuntimeWarning, stacklevel=2)
