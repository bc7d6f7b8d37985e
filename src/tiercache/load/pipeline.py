"""One epoch's way from windows to batches: a planner thread, threads that wait and decode, and the ring that gathers.

The planner (Python) brings windows into memory and pushes their rows to the ring (C threads), which gathers batches
ahead of the consumer. A window is dropped when its last batch was taken, and only then the next but one is loaded: two
windows are in memory at a time.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache._native import gather
from tiercache._native.ring import CLOSED, END, FAILED, Plan, Ring
from tiercache.errors import CorruptShard, TierCacheError
from tiercache.load.assemble import Assembler, BadValueError, Batch, gather_streams, slot_bytes, valid_mask
from tiercache.load.plan import Piece, pieces
from tiercache.load.window import Loaded, load_window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache._native.ring import Slot
    from tiercache.load.source import Source
    from tiercache.order import EpochOrder, RankPlan
    from tiercache.stats import Counters, Waits

# Batches ahead: more hide longer stalls of the consumer. But what is ahead should still be in the processor's last
# cache when it is read: here batches of 3 MiB came at 1,140 thousand samples/s with 4 ahead and 670 with 16, those of
# 128 KiB at 1,600 with 4 and 2,900 with 32.
MAX_DEPTH, CACHED_DEPTH, MIN_DEPTH = 32, 4, 2
CACHE_BYTES = 12 << 20
# Threads that wait for stores: their time is the network's, so they are more than the cores.
MIN_LOAD_THREADS = 4
# What is brought near ahead of the windows, in shards of the largest size: fetches overlap with reading, the cache
# stays free for the rest.
SHARDS_AHEAD = 4

_live: weakref.WeakSet[Pipeline] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Resources:
    """What a pipeline may use: threads that gather, bytes of batches ahead."""

    n_threads: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a pipeline does: a source's epoch in an order, a rank's share of it."""

    source: Source
    order: EpochOrder
    ranks: RankPlan
    counters: Counters
    waits: Waits


@dataclass(slots=True)
class _Shared:
    """What planner and consumer share. pieces: pushed, oldest first, with the sequence's row after their last."""

    pieces: deque[tuple[int, Piece, Loaded]] = field(default_factory=deque)
    error: Exception | None = None
    closing: bool = False


class Pipeline:
    """Batches of one epoch, in order.

    Take() is one consumer's; close() anyone's, and it happens by itself at the end, at an error, when the last
    reference goes, and at interpreter exit.
    """

    def __init__(self, work: Work, resources: Resources) -> None:
        self._work = work
        self._assembler = Assembler(work.source.schema)
        self._stored_columns = work.source.stored_columns
        streams = gather_streams(work.source.schema)
        expected_bytes = slot_bytes(streams, work.ranks.batch_size)
        self._ring = Ring(
            streams,
            batch_rows=work.ranks.batch_size,
            depth=_depth(max(expected_bytes, _stored_batch_bytes(work)), resources.memory_bytes),
            n_threads=resources.n_threads,
            slot_bytes=expected_bytes,
        )
        self._shared = _Shared()
        self._pool = ThreadPoolExecutor(max(MIN_LOAD_THREADS, resources.n_threads), "tiercache-load")
        self._taken_rows = self._n_batches = self._n_bytes = 0
        # The thread holds no reference to this object, so that dropping the last one outside closes it.
        self._planner = threading.Thread(
            target=_plan, args=(work, self._ring, self._shared, self._pool), name="tiercache-plan", daemon=True
        )
        self._planner.start()
        _live.add(self)

    def take(self, timeout_s: float = -1.0) -> Batch | None:
        """The next batch; None at the end of the epoch.

        Raises:
            TierCacheError: a shard is corrupt, a store failed; each batch before it was served.
            TimeoutError: timeout_s (negative: none) passed.
            RuntimeError: closed, or called in a forked child.
        """
        start_s = time.perf_counter()
        try:
            slot = self._ring.take(timeout_s)
            self._work.waits.add(time.perf_counter() - start_s)
            if isinstance(slot, int):
                self._stop(slot, timeout_s)
                return None
            batch = self._assembler.batch(slot)
        except (OSError, BadValueError) as error:
            if isinstance(error, TierCacheError | TimeoutError):
                raise
            found = self._explain(error)
            self.close()
            raise found from error
        if self._assembler.object_columns:
            batch = self._with_objects(batch, slot)
        self._taken_rows += slot.n_rows
        self._n_batches += 1
        self._n_bytes += slot.n_bytes
        done = self._shared.pieces
        while done and done[0][0] <= self._taken_rows:
            done.popleft()
        return batch

    def close(self) -> None:
        """End threads and give windows back; batches that were taken stay good. Repeatable."""
        self._shared.closing = True
        self._ring.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._planner is not threading.current_thread():
            self._planner.join(timeout=10)
        self._shared.pieces.clear()
        _live.discard(self)

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

    def _stop(self, status: int, timeout_s: float) -> None:
        if status == END:
            self.close()
            return
        if status == FAILED and self._shared.error is not None:
            error = self._shared.error
            self.close()
            raise error
        if status == CLOSED:
            raise RuntimeError("this iterator is closed, or was made before a fork: call iter(loader) again")
        raise TimeoutError(f"no batch within {timeout_s} s")

    def _with_objects(self, batch: Batch, slot: Slot) -> Batch:
        """The batch with its ARROW columns, in the schema's order."""
        places = list(self._places(slot.first_row, slot.first_row + slot.n_rows))
        for name, index in self._assembler.object_columns:
            column = self._stored_columns[index]
            values = [loaded.value(block, row, column) for loaded, block, row in places]
            batch[name] = values
            if f"{name}.valid" in self._assembler.order:
                batch[f"{name}.valid"] = valid_mask(values)
        return {name: batch[name] for name in self._assembler.order}

    def _places(self, start: int, stop: int) -> Any:
        """(window, block, row) of rows [start, stop) of the sequence."""
        for end, piece, loaded in self._shared.pieces:
            first = end - len(piece.row)
            for row in range(max(start, first), min(stop, end)):
                yield loaded, int(piece.block[row - first]), int(piece.row[row - first])

    def _explain(self, error: OSError | BadValueError) -> TierCacheError:
        """The block that could not be read, found by reading the batch's rows one by one."""
        text = error.strerror if isinstance(error, OSError) else str(error)
        source = self._work.source
        streams = gather_streams(source.schema)
        names = [column.name for column in source.schema.columns for _ in column.streams(0)]
        stop = self._taken_rows + self._work.ranks.batch_size
        for loaded, block, row in self._places(self._taken_rows, stop):
            for number, (kind, width) in enumerate(streams):
                if not _readable(loaded.addresses[number], int(kind), int(width), block, row):
                    blocks = loaded.held[loaded.holder[block]]
                    return CorruptShard(
                        f"{text}",
                        url=blocks.url,
                        block=blocks.blocks[loaded.position[block]],
                        column=names[number],
                    )
        return CorruptShard(f"{text}", url=source.url)


def _readable(addresses: NDArray[np.uint64], kind: int, width: int, block: int, row: int) -> bool:
    """Whether one row of one stream can be read."""
    place = (np.array([block], np.uint32), np.array([row], np.uint32))
    try:
        if kind in (gather.FIXED, gather.BITS):
            gather.gather(kind, width, addresses, *place, bytearray(max(width, 1)))
        else:
            gather.gather_bytes(addresses, *place)
    except OSError:
        return False
    return True


def _depth(batch_bytes: int, memory_bytes: int) -> int:
    """How many batches to gather ahead."""
    wanted = max(CACHED_DEPTH, min(MAX_DEPTH, CACHE_BYTES // batch_bytes))
    return max(MIN_DEPTH, min(wanted, memory_bytes // batch_bytes))


def _stored_batch_bytes(work: Work) -> int:
    """About what a batch takes as stored: the measure for columns whose records differ in length."""
    n_records = int(work.source.shard_records.sum())
    return int(work.source.shard_bytes.sum()) // max(n_records, 1) * work.ranks.batch_size


def _plan(work: Work, ring: Ring, shared: _Shared, pool: ThreadPoolExecutor) -> None:
    """The planner thread: push each piece of the epoch, at most one window ahead of the one that is served."""
    try:
        _push_pieces(work, ring, shared, pool)
        ring.finish()
    except CancelledError:  # close() while a window was being loaded
        ring.finish(failed=True)
    except Exception as error:  # noqa: BLE001 -- a thread's top: the consumer raises it in its place in the order
        if not shared.closing:
            shared.error = error
        ring.finish(failed=True)


def _push_pieces(work: Work, ring: Ring, shared: _Shared, pool: ThreadPoolExecutor) -> None:
    loaded: Loaded | None = None
    pushed_rows = 0
    shard_bytes = int(work.source.shard_bytes.max(initial=1))
    start_s = time.perf_counter()
    for piece in pieces(work.order, work.ranks):
        work.counters.add("plan_s", time.perf_counter() - start_s)
        if loaded is None or not loaded.covers(piece):
            loaded = None  # before the next is loaded: its memory may be needed
            if not ring.wait_room(1):
                return
            start_s = time.perf_counter()
            ahead = work.order.shards_ahead(piece.window.start, SHARDS_AHEAD * shard_bytes)
            work.source.prefetch([int(shard) for shard in ahead])
            loaded = load_window(work.source, piece.window, piece.wanted, pool)
            work.counters.add("load_s", time.perf_counter() - start_s)
        pushed_rows += len(piece.row)
        shared.pieces.append((pushed_rows, piece, loaded))
        if not ring.push(Plan(loaded.addresses, piece.block, piece.row, loaded)):
            return
        start_s = time.perf_counter()


@atexit.register
def _close_all() -> None:
    # Planner threads are daemons: left running, they would wake in a half-dead interpreter.
    for pipeline in list(_live):
        pipeline.close()
