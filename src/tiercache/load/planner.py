"""The planner thread: it loads windows and pushes their rows to the ring until the epoch ends.

The planner is at most one piece ahead of the piece that is served. The blocks of later windows are requested before, in
the order in which they are needed (`Lookahead`). At the end of the epoch the planner prepares the start of the next one
(`NextEpoch`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache._native.ring import Plan, Ring
from tiercache.data.output_spec import OutputSpec
from tiercache.data.records import Records
from tiercache.errors import TierCacheError
from tiercache.load.batch import BatchMemory, PinnedMemory, PipelineSetup
from tiercache.load.corrupt import CorruptionMap
from tiercache.load.epoch import MakeShare, OrderShare, ReadingPlanPublisher, RunState, interleaved
from tiercache.load.pieces import AnyPiece, ArrayPiece, blocks_by_shard, is_worth_slicing, shards_of, start_slices
from tiercache.load.windows import (
    JoinedWindows,
    LoadedWindow,
    LoadThreads,
    MemoryPressure,
    PagePrefetcher,
    WindowLoad,
    loading_pool,
)
from tiercache.order.window import AnyWindow, RowRun
from tiercache.stats import Counters, WaitHistogram
from tiercache.store.remote import cancel_calls_when


@dataclass(frozen=True, slots=True)
class PipelineInputs:
    """Inputs of a pipeline: a rank's share of an epoch of a source, and how columns are served.

    memory: reused memory of decoded batches; warned: keys of the warnings that the run has given; publisher: None if a
    sampler decides the order; pinned: pinned memory in which this stage leaves its batches.
    """

    setup: PipelineSetup
    share: OrderShare
    counters: Counters
    waits: WaitHistogram
    first_batch: int = 0
    memory: BatchMemory = field(default_factory=BatchMemory)
    warned: set[str] = field(default_factory=set)
    epoch_start: Future[EpochStart | None] | None = None
    next_epoch: NextEpoch | None = None
    corruption: CorruptionMap | None = None
    publisher: ReadingPlanPublisher | None = None
    pinned: PinnedMemory | None = None

    @property
    def source(self) -> Records:
        return self.setup.source

    @property
    def output_spec(self) -> OutputSpec:
        return self.setup.output_spec

    @property
    def batch_rows(self) -> int:
        return max(min(self.share.rank_plan.batch_size, self.share.rank_plan.n_records), 1)


# Shards per call of prefetch(): some ms if each is looked up in a cache. drop_preparation() waits for at most one call.
_SHARDS_A_STEP = 16


@dataclass(frozen=True, slots=True, eq=False)
class EpochStart:
    """The prepared start of an epoch, for one pipeline. loading: windows of the first piece."""

    pieces: Iterator[AnyPiece]
    loading: tuple[WindowLoad, ...]


def cancel_loads(ready: Future[EpochStart | None]) -> None:
    """Cancel the loads of a prepared start: now, or as soon as it is ready. May be called repeatedly."""
    ready.add_done_callback(_cancel)


def _cancel(ready: Future[EpochStart | None]) -> None:
    epoch_start = ready.result()
    for load in epoch_start.loading if epoch_start is not None else ():
        load.cancel()


class NextEpoch:
    """The epoch after the current one. The planner prepares it, and the engine takes it if the run continues there.

    Args:
        make_share: Function that returns a rank's share of an epoch. It must not refer to the loader, which would then
            live too long.
        is_expected: Whether this run has gone from one epoch to the next before. If not, no store is read for the next
            epoch.
    """

    def __init__(self, source: Records, state: RunState, make_share: MakeShare, *, is_expected: bool) -> None:
        self._source = source
        self._state = state
        self._make_share = make_share
        self._is_expected = is_expected
        self._lock = threading.Lock()
        self._ready: Future[EpochStart | None] | None = None  # None: no planner has begun to prepare it
        self._share: OrderShare | None = None
        # Set to stop the loads of the next epoch, so that closing the data set does not wait for them.
        self._unwanted = threading.Event()
        # Held during each step of the preparation. drop_preparation() waits for the current step, so no step begins
        # after the caller closes the cache or the store. Re-entrant, because the garbage collector may call it in a
        # thread that is within a step.
        self._step = threading.RLock()
        self._is_over = False  # taken or forgotten: nothing more is prepared
        self._pid = os.getpid()

    @property
    def share(self) -> OrderShare:
        """The rank's share of the next epoch, planned at the first access; two threads would plan the same share."""
        # Not a cached_property: until Python 3.12 its lock is shared by all instances, and a forked child may inherit
        # it locked.
        if self._share is None:
            self._share = self._make_share(self._state)
        return self._share

    def shards_ahead(self, n_bytes: int) -> list[int]:
        return self.share.shards_ahead(0, 0, n_bytes)

    def prepare(self, threads: LoadThreads, pressure: MemoryPressure, ahead_bytes: int) -> None:
        """Prepare the start: plan the epoch, prefetch its first shards, and begin to load its first windows.

        The windows take memory like any next window. Data that is not on this machine is loaded only if epochs are
        known to follow one another: a run of a single epoch would fetch it for nothing.

        ahead_bytes: stored bytes of shards to prefetch.
        """
        with self._lock:
            if self._is_over:
                return
            ready = self._ready = Future()
        epoch_start = None
        try:
            with contextlib.suppress(Exception):  # it is raised when the epoch itself is read
                epoch_start = self._begin(threads, pressure, ahead_bytes)
        finally:
            ready.set_result(epoch_start)

    def take(self, source: Records, state: RunState) -> tuple[OrderShare, Future[EpochStart | None] | None] | None:
        """Return the epoch, once, if the loader continues there; None if elsewhere, or in a forked child."""
        if self._pid != os.getpid():  # another thread may have held the lock at the fork
            return None
        ready = self._end()
        if source is not self._source or state != self._state:
            self._drop(ready)
            return None
        return self.share, ready

    def on_source_closed(self) -> None:
        self.drop_preparation()

    def drop_preparation(self) -> None:
        """End the preparation and release its blocks: a local copy may be replaced, or the data set is closed.

        The epoch may still begin: it is then planned anew.
        """
        if self._pid != os.getpid():
            return
        self._drop(self._end())

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pid") and self._pid == os.getpid():
            self._drop(self._end())

    def _drop(self, ready: Future[EpochStart | None] | None) -> None:
        if ready is not None:  # None: no planner has begun it, or it is taken
            self._unwanted.set()  # Also stops loads that are being submitted now and that no one can cancel yet.
            with self._step:
                cancel_loads(ready)

    def _end(self) -> Future[EpochStart | None] | None:
        with self._lock:
            self._is_over = True
            ready, self._ready = self._ready, None
        return ready

    def _begin(self, threads: LoadThreads, pressure: MemoryPressure, ahead_bytes: int) -> EpochStart | None:
        rest = self.share.pieces(0)
        # Reads footers. drop_preparation() does not wait for that, because a store may be slow.
        with cancel_calls_when(self._unwanted):
            first = next(rest, None)
        if first is None:
            return None
        pieces = itertools.chain([first], rest)
        if first.run is None or self._source.selection is not None:
            first.rows()
        pairs = list(zip(first.windows, first.needed, strict=True))
        shards = interleaved([shards_of(*pair) for pair in pairs])
        if self._source.storage.can_prefetch:
            for shard, blocks in itertools.chain.from_iterable(blocks_by_shard(*pair) for pair in pairs):
                with self._a_step():
                    self._source.storage.prefetch_blocks(shard, blocks)
            near = [*dict.fromkeys([*shards, *self.shards_ahead(ahead_bytes)])]
            for start in range(0, len(near), _SHARDS_A_STEP):
                with self._a_step():
                    self._source.storage.prefetch_shards(near[start : start + _SHARDS_A_STEP])
        with self._a_step():
            if not pressure.fits(first) or not (self._is_expected or all(map(self._source.storage.is_local, shards))):
                return EpochStart(pieces, ())
            # An executor of its own, because the current epoch shuts its executor down at its end.
            executor = loading_pool(threads.n_threads, sends_requests=self._source.storage.sends_requests)
            loading = [
                WindowLoad(self._source, *pair, executor, threads.n_threads, unwanted=self._unwanted) for pair in pairs
            ]
            executor.shutdown(wait=False)
        for one in loading:
            is_left = True
            while is_left:
                with self._a_step():
                    is_left = one.map_next_shard()
        return EpochStart(pieces, tuple(loading))

    @contextlib.contextmanager
    def _a_step(self) -> Iterator[None]:
        with self._step:
            if self._unwanted.is_set():
                raise CancelledError
            yield


# A window with its needed blocks, bool[n_blocks].
WindowBlocks: TypeAlias = "tuple[AnyWindow, NDArray[np.bool_]]"

# Locations of rows: a run whose rows are computed as they are gathered, or block and row, uint32[n] each.
Rows: TypeAlias = "RowRun | tuple[NDArray[np.uint32], NDArray[np.uint32]]"

# Bytes to prefetch ahead of the windows, in shards of the largest size: fetches overlap with reading, and the rest of
# the cache stays free. At least one set of windows is prefetched.
SHARDS_AHEAD = 4

# Pieces that are planned ahead at most. A window of many rows is many pieces, which need no further block.
PIECES_AHEAD = 16

# Bytes of the next windows that are loaded while a window is awaited, where a store is read without a cache: its
# requests would otherwise stop at each border of windows, for as long as the last ones and the next first ones take.
LOAD_AHEAD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class PushedRows:
    """Rows that the ring has: a run of the first window, or block (numbered through the windows) and row, uint32[n]."""

    rows: Rows
    joined: JoinedWindows

    @property
    def n_rows(self) -> int:
        return self.rows.n_rows if isinstance(self.rows, RowRun) else len(self.rows[1])

    def locations(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        return self.rows.find(lo, hi) if isinstance(self.rows, RowRun) else (self.rows[0][lo:hi], self.rows[1][lo:hi])

    def as_plan(self, layouts: NDArray[np.uint64] | None) -> Plan:
        joined, checks = self.joined, self.joined.checks_for(self.n_rows)
        if isinstance(self.rows, RowRun):
            return Plan.from_finder(joined.addresses, self.rows, joined, checks, layouts)
        return Plan(joined.addresses, *self.rows, joined, checks, layouts)


@dataclass(slots=True)
class PlannerState:
    """State shared by the planner and the consumer.

    pushed: rows, oldest first, with the row of the sequence after their last one; replaced_pieces: with the row before
    their first one; stop: done when the planner must end, so that it can be waited for together with a window;
    unwanted: set then, to end what the planner reads.
    """

    pushed: deque[tuple[int, PushedRows]] = field(default_factory=deque)
    replaced_pieces: deque[tuple[int, ArrayPiece]] = field(default_factory=deque)
    error: Exception | None = None
    stop: Future[None] = field(default_factory=Future)
    unwanted: threading.Event = field(default_factory=threading.Event)
    ended: bool = False


def run_planner(inputs: PipelineInputs, rings: list[Ring], shared: PlannerState, threads: LoadThreads) -> None:
    """Run the planner's thread. rings: The ring, in a list: a thread refers to its arguments as long as it runs."""
    ring, next_epoch = rings.pop(), None
    try:
        if inputs.publisher is not None:
            inputs.publisher.begin(inputs.share, inputs.first_batch)
        planner = _Planner(inputs, ring, shared, threads)
        with cancel_calls_when(shared.unwanted):
            planner.push_all()
        ring.finish()
        next_epoch = inputs.next_epoch if planner.has_room() else None
        pressure, ahead_bytes = planner.pressure, planner.ahead_bytes
    except CancelledError:  # close() was called while a window was loaded.
        ring.finish(failed=True)
    except Exception as error:  # noqa: BLE001 -- top of a thread: the consumer raises it in its place in the order
        if not shared.stop.done():
            shared.error = error
        ring.finish(failed=True)
    finally:
        # The pipeline was closed before it used the prepared start, which may not be ready yet.
        if inputs.epoch_start is not None:
            cancel_loads(inputs.epoch_start)
    if next_epoch is not None:
        # The consumer may end meanwhile: the ring's memory is the next ring's, and windows are held by the ring.
        del planner, ring
        next_epoch.prepare(threads, pressure, ahead_bytes)


class Lookahead:
    """The pieces of an epoch, planned some windows ahead of the piece that is pushed. Iterate once.

    Planning a piece may read footers. An error of a later piece is raised in its place in the order.
    """

    def __init__(self, pieces: Iterator[AnyPiece]) -> None:
        self._pieces = pieces
        self._planned: deque[tuple[AnyPiece, int]] = deque()  # with the bytes of the windows that begin with the piece
        self._windows: set[int] = set()  # ids of the windows of the piece that was planned last
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[AnyPiece]:
        while self._planned or self._plan() is not None:
            yield self._planned.popleft()[0]
        if self._error is not None:
            raise self._error

    def extend(self, n_bytes: int) -> list[WindowBlocks]:
        """Plan pieces until their windows, beside those of the last yielded piece, have n_bytes.

        Blocks count as decoded: their stored sizes are not known here. So compressed data is planned less far ahead.

        Returns the windows that were planned now, each with its needed blocks.
        """
        found: list[WindowBlocks] = []
        while sum(ahead_bytes for _, ahead_bytes in self._planned) < n_bytes and len(self._planned) < PIECES_AHEAD:
            new = self._plan()
            if new is None:
                break
            found += new
        return found

    def _plan(self) -> list[WindowBlocks] | None:
        if self._error is not None:
            return None
        try:
            piece = next(self._pieces, None)
        except (TierCacheError, OSError, ValueError) as error:
            self._error = error
            return None
        if piece is None:
            return None
        new = [pair for pair in zip(piece.windows, piece.needed, strict=True) if id(pair[0]) not in self._windows]
        self._windows = set(map(id, piece.windows))
        self._planned.append((piece, sum(int(window.block_bytes[needed].sum()) for window, needed in new)))
        return new


class _Planner:
    """The planner of one epoch. ahead_bytes: stored bytes of shards to prefetch ahead of the windows."""

    def __init__(self, inputs: PipelineInputs, ring: Ring, shared: PlannerState, threads: LoadThreads) -> None:
        self._inputs = inputs
        self._source = inputs.source
        self._ring = ring
        self._shared = shared
        self._threads = threads
        self._pushed_rows = self._last_rows = 0  # rows pushed so far; rows of the last push
        # Bytes of the blocks of all pushes, and of the next one. No more is requested ahead, because it shares the
        # bandwidth and the processor with what a reader waits for. At the start of an epoch, where windows are small,
        # the second one would wait for the requests of several that are far larger: 4 s of an epoch of 8 s.
        self._begun_bytes = 0
        self._windows: dict[int, LoadedWindow] = {}  # by the window's id; each holds its window
        self._loading: dict[int, WindowLoad] = {}  # started ahead, here or by the epoch before; by the window's id
        self._joined: JoinedWindows | None = None
        self._served_windows: tuple[AnyWindow, ...] = ()  # the windows of the last push
        # Whether the ring holds rows of these windows only: then the next windows are the second set in memory.
        self._is_one_set = False
        self._requested: dict[int, AnyWindow] = {}  # windows whose blocks are requested ahead, by id
        # Windows of whose shards only blocks are requested: the shards are not requested as a whole yet.
        self._requested_by_blocks: list[WindowBlocks] = []
        self.ahead_bytes = SHARDS_AHEAD * inputs.setup.largest_bytes
        self._near = PagePrefetcher(threads, inputs.setup.stored_bytes)
        self.pressure = MemoryPressure(inputs.source.storage.is_mapped, threads.limit_bytes)

    def push_all(self) -> None:
        lookahead = Lookahead(self._pieces())
        try:
            for piece in lookahead:
                if isinstance(piece, ArrayPiece) and len(piece.replaced):
                    self._shared.replaced_pieces.append((self._pushed_rows, piece))
                if not self.pressure.fits(piece):
                    self._push_under_pressure(piece, lookahead)
                elif not self._pushed_rows and not self._loading and is_worth_slicing(piece) and self._is_remote(piece):
                    for piece_slice in start_slices(piece, self._inputs.share.rank_plan.batch_size):
                        self._push(piece_slice, lookahead)
                        self._request_shards()
                else:
                    self._push(piece, lookahead)
                if self._source.storage.can_prefetch:
                    self._request_next_windows(lookahead)
        finally:
            for load in self._loading.values():  # after an error
                load.cancel()

    def _push_under_pressure(self, piece: AnyPiece, lookahead: Lookahead) -> None:
        for piece_slice in self.pressure.slices(piece):
            for window, needed in zip(piece_slice.windows, piece_slice.needed, strict=True):
                if id(window) in self._windows and not self._windows[id(window)].covers(needed):
                    del self._windows[id(window)]
            self._push(piece_slice, lookahead)
            self._is_one_set = False  # the blocks of each slice are a set of their own
            if "pressure" not in self._inputs.warned and not self.pressure.fits(piece):
                self._inputs.warned.add("pressure")  # Blocks are read again and again.
                warnings.warn(self.pressure.explain(self._source.url), RuntimeWarning, stacklevel=2)

    def _is_remote(self, piece: AnyPiece) -> bool:
        is_local = self._source.storage.is_local
        pairs = zip(piece.windows, piece.needed, strict=True)
        return not all(is_local(shard) for window, needed in pairs for shard in shards_of(window, needed))

    def has_room(self) -> bool:
        """Wait until all rows but those of the last push are served. False: closed before the end of the epoch."""
        has_room = self._ring.wait_room(1)
        self._advance()
        return (has_room or self._shared.ended) and (self._shared.ended or not self._shared.stop.done())

    def _pieces(self) -> Iterator[AnyPiece]:
        start_s = time.perf_counter()
        epoch_start = None if self._inputs.epoch_start is None else self._threads.result(self._inputs.epoch_start)
        if epoch_start is not None:
            self._loading = {id(load.window): load for load in epoch_start.loading}
            pieces = epoch_start.pieces
        else:
            pieces = self._inputs.share.pieces(self._inputs.first_batch)
        for piece in pieces:
            self._count("plan_s", start_s)
            yield piece
            start_s = time.perf_counter()

    def _push(self, piece: AnyPiece, lookahead: Lookahead) -> None:
        missing = self._drop_other_windows(piece)
        self._begun_bytes += sum(int(window.block_bytes[needed].sum()) for window, needed in missing)
        rows = None
        if not self._must_load(missing):  # computed while the piece before is served; else while windows are decoded
            rows = self._rows(piece)
        loading = self._start_loads(missing) if self._is_one_set else None
        if not self._ring.wait_room(1):  # Also within a window: its rows in served order take 8 bytes each.
            for load in loading or ():
                load.cancel()
            raise CancelledError
        self._advance()
        if loading is None:
            loading = self._start_loads(missing)
        if self._pushed_rows and self._source.storage.sends_requests:
            self._load_ahead(lookahead)
        if rows is None:
            rows = self._rows(piece)
        start_s = time.perf_counter()
        new = self._finish(loading)
        joined = self._join(piece)
        # Prefetch its pages before a row of it is requested, while the window before is served.
        is_first, served = not self._pushed_rows, (*self._served_windows, *piece.windows)
        for read in self._near.prefetch_pages(new, served) if not is_first else ():
            self._threads.result(read)
        self._count("load_s", start_s)
        pushed = PushedRows(rows, joined)
        self._last_rows = pushed.n_rows
        self._pushed_rows += self._last_rows
        self._shared.pushed.append((self._pushed_rows, pushed))
        if not self._ring.push(pushed.as_plan(self._inputs.setup.layouts)):
            raise CancelledError
        if is_first:  # The first batch does not wait for its whole window.
            self._near.prefetch_pages(new, served)
            if self._inputs.publisher is not None:
                self._inputs.publisher.complete()
        self._is_one_set = is_first or self._served_windows == piece.windows
        self._served_windows = piece.windows

    def _advance(self) -> None:
        """Tell the cache that all rows but those of the last push are served, so that it may evict their shards."""
        if self._inputs.publisher is not None:
            self._inputs.publisher.advance(self._inputs.first_batch, self._pushed_rows - self._last_rows)

    def _drop_other_windows(self, piece: AnyPiece) -> list[WindowBlocks]:
        """Drop the windows that a piece does not need, before memory is used; return those that lack needed blocks."""
        still_needed: dict[int, LoadedWindow] = {}
        missing = []
        for window, needed in zip(piece.windows, piece.needed, strict=True):
            loaded = self._windows.get(id(window))
            if loaded is not None:
                still_needed[id(window)] = loaded
            if loaded is None or not loaded.covers(needed):
                missing.append((window, needed))
        self._windows = still_needed
        if missing:
            self._joined = None
        return missing

    def _must_load(self, missing: list[WindowBlocks]) -> bool:
        """Whether threads must read or decode blocks of these windows, and nothing has started that."""
        is_mapped = self._source.storage.is_mapped
        # their reading and decoding is under way
        missing = [pair for pair in missing if id(pair[0]) not in self._loading]
        return any(not is_mapped(shard) for window, needed in missing for shard in set(window.shards[needed].tolist()))

    def _start_loads(self, missing: list[WindowBlocks]) -> list[WindowLoad]:
        """Return the loads of the missing windows; start those that nothing has started."""
        start_s = time.perf_counter()
        new = [pair for pair in missing if id(pair[0]) not in self._loading]
        self._request_blocks(new)
        self._requested_by_blocks += new
        loading = []
        for window, needed in missing:
            load = self._loading.pop(id(window), None)
            if load is None:
                base, threads = self._windows.get(id(window)), self._threads
                load = WindowLoad(self._source, window, needed, threads.executor, threads.n_threads, base=base)
            loading.append(load)
        self._count("load_s", start_s)
        return loading

    def _load_ahead(self, lookahead: Lookahead) -> None:
        limit_bytes = min(LOAD_AHEAD_BYTES, self.pressure.spare_bytes, self._begun_bytes)
        for window, needed in lookahead.extend(limit_bytes):
            if int(window.block_bytes[needed].sum()) <= limit_bytes:
                threads = self._threads
                self._loading[id(window)] = WindowLoad(
                    self._source, window, needed, threads.executor, threads.n_threads
                )

    def _request_blocks(self, windows: list[WindowBlocks]) -> None:
        """Request the blocks of windows, unless that was done ahead: before everything that is only prefetched."""
        if self._source.storage.can_prefetch:
            for window, needed in windows:
                if self._requested.pop(id(window), None) is None:
                    for shard, blocks in blocks_by_shard(window, needed):
                        self._source.storage.prefetch_blocks(shard, blocks)

    def _request_next_windows(self, lookahead: Lookahead) -> None:
        """Request the blocks of the next windows, in the order in which they are needed, and then their shards.

        All blocks of the windows before have come, so these requests delay only the windows themselves.
        """
        new = lookahead.extend(min(self.ahead_bytes, self._begun_bytes))
        self._request_blocks(new)
        self._requested |= {id(window): window for window, _ in new}
        self._requested_by_blocks += new
        self._request_shards()

    def _request_shards(self) -> None:
        windows, self._requested_by_blocks, inputs = self._requested_by_blocks, [], self._inputs
        if not windows or not inputs.source.storage.can_prefetch:
            return
        own = interleaved([shards_of(*pair) for pair in windows])
        ahead_bytes = min(self.ahead_bytes, self._begun_bytes)
        ahead = inputs.share.shards_ahead(inputs.first_batch, self._pushed_rows, ahead_bytes)
        # Near the end of an epoch the shards of the next epoch come next.
        if inputs.next_epoch is not None and int(inputs.source.shard_bytes[ahead].sum()) < ahead_bytes:
            ahead += inputs.next_epoch.shards_ahead(ahead_bytes)
        inputs.source.storage.prefetch_shards([*dict.fromkeys([*own, *ahead])])

    def _finish(self, loading: list[WindowLoad]) -> list[LoadedWindow]:
        new = []
        try:
            for load in loading:
                loaded = load.finish(self._threads)
                self._windows[id(loaded.window)] = loaded
                self.pressure.record_usage(loaded)
                for source, n_bytes in loaded.bytes_from.items():
                    self._inputs.counters.add(f"bytes_from_{source}", n_bytes)
                new.append(loaded)
        finally:
            for load in loading:
                load.cancel()
        return new

    def _join(self, piece: AnyPiece) -> JoinedWindows:
        windows = tuple(self._windows[id(window)] for window in piece.windows)
        if self._joined is None or self._joined.windows != windows:
            self._joined = JoinedWindows(windows)
        return self._joined

    def _rows(self, piece: AnyPiece) -> Rows:
        run = piece.run if self._source.selection is None else None
        if run is not None:
            return run
        start_s = time.perf_counter()
        block, row = piece.rows()
        shards = [window.shards for window in piece.windows]
        blocks = [window.blocks for window in piece.windows]
        if len(shards) > 1:
            shards, blocks = [np.concatenate(shards)], [np.concatenate(blocks)]
        row = self._source.stored_rows(shards[0], blocks[0], block, row)
        self._count("plan_s", start_s)
        return block, row

    def _count(self, name: str, start_s: float) -> None:
        self._inputs.counters.add(name, time.perf_counter() - start_s)
