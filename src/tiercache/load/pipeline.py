"""One epoch's way from windows to batches: a planner thread, threads that wait and decode, and the ring that gathers.

The planner (Python) brings windows into memory and pushes their rows to the ring (C threads), which gathers batches
ahead of the consumer. A window is dropped when its last batch was taken, and only then the next but one is loaded: two
windows are in memory at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache._native import gather
from tiercache._native.ring import CLOSED, END, FAILED, Plan, Ring
from tiercache.errors import CorruptShard, TierCacheError
from tiercache.load.ahead import Ahead
from tiercache.load.assemble import Assembler, BadValueError, Batch, valid_mask
from tiercache.load.faults import bad_value
from tiercache.load.memory import BatchMemory
from tiercache.load.plan import Piece, pieces
from tiercache.load.serving import Serving
from tiercache.load.streams import form_table, gather_streams, slot_bytes
from tiercache.load.window import Loaded, Threads, load_window
from tiercache.shard.blocks import describe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache._native.ring import Slot
    from tiercache.load.coming import Begun, Coming
    from tiercache.load.source import Source
    from tiercache.order import EpochOrder, RankPlan
    from tiercache.stats import Counters, Waits

# Batches ahead: more hide longer stalls of the consumer. But what is ahead should still be in the processor's last
# cache (32 MiB here) when it is read, with what the consumer has of it: beside a plain C gather in the same run batches
# of 3 MiB came at 1.08 times its speed with 3 ahead and at 0.89 with 4, those of 5 MiB at 1.06 and 0.82; those of
# 128 KiB at 1,600 thousand samples/s with 4 and 2,900 with 32.
MAX_DEPTH, CACHED_DEPTH, MIN_DEPTH = 32, 3, 2
CACHE_BYTES = 12 << 20
# Threads that wait for stores: their time is the network's, so they are more than the cores.
MIN_LOAD_THREADS = 4
# A planner that reads footers when the pipeline is closed is not waited for any longer: it ends by itself.
PLANNER_END_S = 1.0
# What is brought near ahead of the windows, in shards of the largest size: fetches overlap with reading, the cache
# stays free for the rest.
SHARDS_AHEAD = 4

_live: weakref.WeakSet[Pipeline] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Resources:
    """What a pipeline may use: threads that gather, bytes of batches ahead, bytes of memory for the whole process."""

    n_threads: int
    memory_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a pipeline does: a source's epoch in an order, a rank's share of it, and how columns are served.

    memory: for decoded batches, kept from epoch to epoch by whoever begins the epochs; begun: how this epoch begins, if
    the one before made that ready; coming: the epoch that may follow.
    """

    source: Source
    order: EpochOrder
    ranks: RankPlan
    counters: Counters
    waits: Waits
    serving: Serving = field(default_factory=Serving)
    memory: BatchMemory = field(default_factory=BatchMemory)
    begun: Begun | None = None
    coming: Coming | None = None


@dataclass(slots=True)
class _Shared:
    """What planner and consumer share.

    pieces: pushed, oldest first, with the sequence's row after their last; stop: done when the planner shall end, so
    that it can be waited for beside a window; forms: what lists of bytes may refer to, kept as long as they are filled.
    """

    pieces: deque[tuple[int, Piece, Loaded]] = field(default_factory=deque)
    error: Exception | None = None
    stop: Future[None] = field(default_factory=Future)
    forms: NDArray[np.uint64] | None = None


class Pipeline:
    """Batches of one epoch, in order.

    All methods may be called from any thread: `take` holds a lock, and `close` lets go of the windows under it. Closing
    happens by itself at the end, at an error, when the last reference goes, and at interpreter exit.
    """

    def __init__(self, work: Work, resources: Resources) -> None:
        self._work = work
        self._assembler = Assembler(work.source.schema, work.serving)
        self._stored_columns = work.source.stored_columns
        streams = gather_streams(work.source.schema, work.serving)
        batch_rows = min(work.ranks.batch_size, max(work.ranks.n_records, 1))
        expected_bytes = slot_bytes(streams, batch_rows)
        self._ring = Ring(
            streams,
            batch_rows=batch_rows,
            depth=_depth(max(expected_bytes, _stored_bytes(work, batch_rows)), resources.memory_bytes),
            n_threads=resources.n_threads,
            slot_bytes=expected_bytes,
        )
        self._shared = _Shared()
        n_loading = max(MIN_LOAD_THREADS, resources.n_threads)
        self._pool = ThreadPoolExecutor(n_loading, "tiercache-load")
        threads = Threads(self._pool, self._shared.stop, resources.n_threads, resources.limit_bytes)
        self._memory_bytes = resources.memory_bytes
        self._ahead: deque[Slot | Exception] = deque(maxlen=1)  # taken from the ring, not handed out yet
        self._taken_rows = self._n_batches = self._n_bytes = 0
        self._pid = os.getpid()
        self._taking = threading.RLock()
        self.damaged_shard: int | None = None  # which one take() found damaged, once it raised CorruptShard
        # The thread holds no reference to this object, so that dropping the last one outside closes it.
        self._planner = threading.Thread(
            target=_plan, args=(work, self._ring, self._shared, threads), name="tiercache-plan", daemon=True
        )
        _live.add(self)
        self._planner.start()

    def take(self, timeout_s: float = -1.0) -> Batch | None:
        """The next batch; None at the end of the epoch.

        Raises:
            TierCacheError: a shard is corrupt, a store failed; each batch before it was served.
            Exception: whatever else made the planner fail, as it was raised.
            TimeoutError: timeout_s (negative: none) passed.
            RuntimeError: closed, or called in a forked child.
        """
        with self._taking:
            return self._take(timeout_s)

    def close(self) -> None:
        """End threads and give windows back; batches that were taken stay good. Repeatable.

        A read that is under way at a store ends by itself, later. Nothing is done in a forked child, where no thread
        is left and any lock may be held for ever.
        """
        if self.inherited:
            return
        with contextlib.suppress(InvalidStateError):  # done before
            self._shared.stop.set_result(None)
        self._ring.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._planner is not threading.current_thread() and self._planner.is_alive():
            self._planner.join(PLANNER_END_S)
        with self._taking:  # the lists of a batch are filled from the windows
            self._ahead.clear()
            self._ring.forget()
            self._shared.pieces.clear()
        _live.discard(self)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: without threads, good for nothing."""
        return self._pid != os.getpid()

    def figures(self) -> dict[str, float]:
        """samples, batches and bytes_served of take(); gather_ns of all threads."""
        ring = self._ring.figures()
        return {
            "samples": self._taken_rows,
            "batches": self._n_batches,
            "bytes_served": self._n_bytes,
            "gather_ns": ring["gather_ns"],
        }

    def __del__(self) -> None:
        if hasattr(self, "_planner"):
            self.close()

    def _take(self, timeout_s: float) -> Batch | None:
        try:
            slot = self._next_filled(timeout_s) if self._assembler.bytes_streams else self._next_slot(timeout_s)
        except (OSError, gather.CorruptError) as error:
            raise self._failed(error) from error
        except MemoryError:
            self.close()  # its batch is lost: going on would serve the next one as if nothing had been
            raise
        if isinstance(slot, int):
            self._stop(slot, timeout_s)
            return None
        try:
            batch = self._assembler.batch(slot)
        except (OSError, BadValueError) as error:
            raise self._failed(error) from error
        if self._assembler.object_columns:
            batch = self._with_objects(batch, slot)
        self._taken_rows += slot.n_rows
        self._n_batches += 1
        self._n_bytes += slot.n_bytes
        done = self._shared.pieces
        while done and done[0][0] <= self._taken_rows:
            done.popleft()
        return batch

    def _next_slot(self, timeout_s: float) -> Slot | int:
        """The next slot of the ring, or a status."""
        slot = self._ring.take(0.0)
        if not isinstance(slot, int):
            self._work.waits.add_none()
            return slot
        start_s = time.perf_counter()
        try:
            return self._ring.take(timeout_s)
        finally:
            self._work.waits.add(time.perf_counter() - start_s)

    def _next_filled(self, timeout_s: float) -> Slot | int:
        """As _next_slot. While the consumer reads this batch, threads fill the lists of the next one."""
        found: Slot | int | Exception
        if self._ahead:
            self._work.waits.add_none()
            found = self._ahead.popleft()
        else:
            found = self._started(self._next_slot(timeout_s))
        if isinstance(found, Exception):
            try:
                raise found
            finally:
                del found  # kept, it would be a cycle by its traceback
        if not isinstance(found, int) and 2 * found.n_bytes <= self._memory_bytes:
            try:
                coming: Slot | int | Exception = self._started(self._ring.take(0.0))
            except (OSError, gather.CorruptError, MemoryError) as error:
                coming = error.with_traceback(None)  # in its place in the order; its frames would hold this pipeline
            if not isinstance(coming, int):
                self._ahead.append(coming)
        return found

    def _started(self, slot: Slot | int) -> Slot | int:
        if not isinstance(slot, int):
            for stream in self._assembler.bytes_streams:
                slot.start_bytes(stream)
        return slot

    def _stop(self, status: int, timeout_s: float) -> None:
        if status == END:
            self.close()
            return
        if status == FAILED and self._shared.error is not None:
            error, self._shared.error = self._shared.error, None  # kept, it would be a cycle by its traceback
            self.close()
            raise error
        if status in (CLOSED, FAILED):  # FAILED without an error: the planner heard of close() before the ring did
            raise RuntimeError("this iterator is closed, or was made before a fork: call iter(loader) again")
        raise TimeoutError(f"no batch within {timeout_s} s")

    def _with_objects(self, batch: Batch, slot: Slot) -> Batch:
        """The batch with its ARROW columns, in the schema's order."""
        places = list(self._places(slot.first_row, slot.first_row + slot.n_rows))
        for name, index in self._assembler.object_columns:
            column = self._stored_columns[index]
            values = [loaded.value(block, row, column) for loaded, block, row in places]
            batch[name] = self._assembler.filled(name, values)
            if f"{name}.valid" in self._assembler.order:
                batch[f"{name}.valid"] = valid_mask(values)
        return {name: batch[name] for name in self._assembler.order}

    def _places(self, start: int, stop: int) -> Any:
        """(window, block, row) of rows [start, stop) of the sequence."""
        for end, piece, loaded in list(self._shared.pieces):  # the planner appends at any time
            first = end - len(piece.row)
            for row in range(max(start, first), min(stop, end)):
                yield loaded, int(piece.block[row - first]), int(piece.row[row - first])

    def _failed(self, error: OSError | ValueError) -> TierCacheError:
        found = self._explain(error)
        self.close()
        return found

    def _explain(self, error: OSError | ValueError) -> TierCacheError:
        """The block that could not be read, found by reading the batch's rows one by one."""
        text = str(error.strerror if isinstance(error, OSError) else error)
        source = self._work.source
        streams = gather_streams(source.schema)
        names = [column.name for column in source.schema.columns for _ in column.streams(0)]
        stop = self._taken_rows + self._work.ranks.batch_size
        for loaded, block, row in self._places(self._taken_rows, stop):
            loaded.held[loaded.holder[block]].forget_checks()  # the file may have been damaged since
            checks = loaded.checks
            for number, (kind, width) in enumerate(streams):
                check = None if checks is None else checks[number]
                fault = _fault((int(kind), int(width), loaded.addresses[number], check), block, row)
                if fault is not None:
                    blocks = loaded.held[loaded.holder[block]]
                    self.damaged_shard = int(loaded.window.shards[block])
                    return CorruptShard(
                        fault,
                        url=blocks.url,
                        block=blocks.blocks[loaded.position[block]],
                        column=names[number],
                    )
            wrong = bad_value(source.schema, loaded, block, row)
            if wrong is not None:
                return wrong
        return CorruptShard(text, url=source.url)


def _fault(stream: tuple[int, int, NDArray[np.uint64], NDArray[np.uint64] | None], block: int, row: int) -> str | None:
    """What is wrong with one row of a stream (kind, width, addresses, checks), None if it can be served."""
    kind, width, addresses, _ = stream
    place = (np.array([block], np.uint32), np.array([row], np.uint32))
    try:
        found = gather.locate(*stream, *place)
        if found is not None:
            return describe(found[1])
        if kind in (gather.FIXED, gather.BITS):
            gather.gather(kind, width, addresses, *place, bytearray(max(width, 1)))
        else:
            gather.gather_bytes(addresses, *place)
    except OSError as error:
        return str(error.strerror)
    return None


def _depth(batch_bytes: int, memory_bytes: int) -> int:
    """How many batches to gather ahead."""
    wanted = max(CACHED_DEPTH, min(MAX_DEPTH, CACHE_BYTES // max(batch_bytes, 1)))
    return max(MIN_DEPTH, min(wanted, memory_bytes // max(batch_bytes, 1)))


def _stored_bytes(work: Work, n_rows: int) -> int:
    """About what so many records take as stored: the measure for columns whose records differ in length."""
    return int(work.source.shard_bytes.sum()) // max(work.ranks.n_records, 1) * n_rows


def _plan(work: Work, ring: Ring, shared: _Shared, threads: Threads) -> None:
    """The planner thread: push each piece of the epoch, at most one window ahead of the one that is served."""
    is_planned = False
    try:
        _push_pieces(work, ring, shared, threads)
        ring.finish()
        is_planned = True  # what goes wrong from here on is of the next epoch, and is heard of when that comes
        if work.coming is not None and not shared.stop.done():
            work.coming.prepare(threads)
    except CancelledError:  # close() while a window was being loaded
        ring.finish(failed=True)
    except Exception as error:  # noqa: BLE001 -- a thread's top: the consumer raises it in its place in the order
        if not is_planned and not shared.stop.done():
            shared.error = error
        ring.finish(failed=True)


def _push_pieces(work: Work, ring: Ring, shared: _Shared, threads: Threads) -> None:
    begun = work.begun
    loaded = begun.loaded if begun else None
    pushed_rows = 0
    forms = shared.forms = form_table(work.source.schema, work.serving)
    shard_bytes = int(work.source.shard_bytes.max(initial=1))
    near = Ahead(threads, int(work.source.shard_bytes.sum()))
    start_s = time.perf_counter()
    for piece in begun.pieces if begun else pieces(work.order, work.ranks):
        work.counters.add("plan_s", time.perf_counter() - start_s)
        if loaded is not None and not loaded.covers(piece):
            loaded = None  # before the next is loaded: its memory may be needed
        if not ring.wait_room(1):  # within a window too: its rows in served order take 8 bytes each
            return
        if loaded is None:
            start_s = time.perf_counter()
            ahead = work.order.shards_ahead(piece.window.start, SHARDS_AHEAD * shard_bytes)
            # The window's own first: what comes after must not be fetched before them.
            work.source.prefetch([*dict.fromkeys(piece.window.shards[piece.wanted].tolist()), *ahead.tolist()])
            loaded = load_window(work.source, piece.window, piece.wanted, threads)
            # Near before a row of it is asked for, while the window before is served.
            for read in near.bring_near(loaded) if pushed_rows else ():
                threads.result(read)
            work.counters.add("load_s", time.perf_counter() - start_s)
        is_first, pushed_rows = pushed_rows == 0, pushed_rows + len(piece.row)
        shared.pieces.append((pushed_rows, piece, loaded))
        if not ring.push(Plan(loaded.addresses, piece.block, piece.row, loaded, loaded.checks, forms)):
            return
        if is_first:  # the first batch does not wait for its whole window
            near.bring_near(loaded)
        start_s = time.perf_counter()


@atexit.register
def _close_all() -> None:
    # Planner threads are daemons: left running, they would wake in a half-dead interpreter.
    for pipeline in list(_live):
        pipeline.close()
