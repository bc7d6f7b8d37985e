"""One epoch's way from windows to batches: a planner thread, threads that wait and decode, and the ring that gathers.

The planner (Python) brings windows into memory and pushes their rows to the ring (C threads), which gathers batches
ahead of the consumer. A window is dropped when its last batch was taken, and only then the next but one is loaded: two
windows of each stream are in memory at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np

from tiercache._native import gather
from tiercache._native.assembly import Taker
from tiercache._native.ring import CLOSED, END, FAILED, Ring, Slot
from tiercache.errors import CorruptShard, TierCacheError
from tiercache.load.assemble import BadValueError, Batch, valid_mask
from tiercache.load.faults import bad_cast, bad_value
from tiercache.load.fittings import Fittings
from tiercache.load.memory import BatchMemory, keep_freed_memory
from tiercache.load.planner import Shared, plan
from tiercache.load.serving import Serving
from tiercache.load.streams import gather_streams
from tiercache.load.window import Threads, loading_pool
from tiercache.shard.blocks import describe
from tiercache.shard.cast import served_columns

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from tiercache.load.coming import Begun, Coming
    from tiercache.load.damage import Damage, Place
    from tiercache.load.publishing import Publishing
    from tiercache.load.share import Share
    from tiercache.load.source import Source
    from tiercache.load.window import Loaded
    from tiercache.stats import Counters, Waits

# Batches ahead: more hide longer stalls of the consumer. But what is ahead should still be in the processor's last
# cache (32 MiB here, which the records pass through as well) when it is read, with what the consumer has of it. As a
# large batch is gathered by all threads together, two ahead keep them busy: batches of 5 MiB came at 1.05 times the
# speed of three ahead, those of 3 MiB at the same, with less processor time; those of 128 KiB came at 1,600 thousand
# samples/s with 4 ahead and 2,900 with 32.
MAX_DEPTH, MIN_DEPTH = 32, 2
CACHE_BYTES = 8 << 20
# A planner that reads footers when the pipeline is closed is not waited for any longer: it ends by itself. At the end
# of an epoch it makes the next one ready, which the next one's planner waits for, and its consumer need not.
PLANNER_END_S, PLANNER_NEXT_S = 1.0, 0.005

_is_slot = cast("Callable[[object], TypeGuard[Slot]]", Slot.__instancecheck__)
_live: weakref.WeakSet[Pipeline] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Resources:
    """What a pipeline may use: threads that gather, bytes of batches ahead, bytes of memory for the whole process."""

    n_threads: int
    memory_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a pipeline does: a rank's share of an epoch of a source, and how columns are served.

    first_batch: of the share, from which on it is served; memory: for decoded batches; fittings: for the next epoch's
    pipeline; both kept from epoch to epoch by whoever begins the epochs; said: what the run has warned of; begun: how
    this epoch begins, if the one before makes that ready; coming: the epoch that may follow; damage: what is passed by,
    None: damage is an error; publishing: the epoch's plan, None: nobody knows what comes.
    """

    source: Source
    share: Share
    counters: Counters
    waits: Waits
    first_batch: int = 0
    serving: Serving = field(default_factory=Serving)
    memory: BatchMemory = field(default_factory=BatchMemory)
    fittings: Fittings = field(default_factory=Fittings)
    said: set[str] = field(default_factory=set)
    begun: Future[Begun | None] | None = None
    coming: Coming | None = None
    damage: Damage | None = None
    publishing: Publishing | None = None


class Pipeline:
    """Batches of one epoch, in order.

    All methods may be called from any thread: `take` holds a lock, and `close` lets go of the windows under it. Closing
    happens by itself at the end, at an error, when the last reference goes, and at interpreter exit.
    """

    def __init__(self, work: Work, resources: Resources) -> None:
        self._work = work
        fitted = work.fittings.of(work.source, work.serving)
        self._assembler = fitted.assembler
        sizes = fitted.sizes(work.share.batch_size, work.share.n_records)
        if self._assembler.bytes_streams:
            keep_freed_memory()
        self._ring = Ring(
            self._assembler.streams,
            batch_rows=sizes.rows,
            depth=_depth(max(sizes.expected_bytes, sizes.about_bytes), resources.memory_bytes),
            n_threads=resources.n_threads,
            slot_bytes=sizes.expected_bytes,
        )
        self._shared = Shared()
        self._pool = loading_pool(resources.n_threads)
        threads = Threads(self._pool, self._shared.stop, resources.n_threads, resources.limit_bytes)
        self._memory_bytes = resources.memory_bytes
        self._ahead: deque[Slot | Exception] = deque(maxlen=1)  # taken from the ring, not handed out yet
        self._waited: deque[Slot | int] = deque(maxlen=1)  # as well: there for a moment, longer where Ctrl-C struck
        self._n_skipped = 0
        self.replaced: dict[int, Place] = {}  # rows of the batch that take() gave last, and what stands there
        self._pid = os.getpid()
        self._is_closed = False
        self._taking = threading.RLock()
        odd = (self._waited, self._shared.mended)
        self._taker = Taker(
            self._ring, self._assembler.entries, self._shared.pieces, odd, self._taking, work.waits.bins
        )
        self.damaged_shard: int | None = None  # which one take() found damaged, once it raised CorruptShard
        # The thread holds no reference to this object, so that dropping the last one outside closes it.
        self._planner = threading.Thread(
            target=plan, args=(work, self._ring, self._shared, threads), name="tiercache-plan", daemon=True
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
        if self.inherited:  # the lock may have been another thread's, which is not here to give it back
            self._stop(CLOSED, timeout_s)
            return None
        with self._taking:
            return self._take(timeout_s)

    @property
    def take_ready(self) -> Callable[[], Batch | None] | None:
        """Gives the next batch if it is ready and there is nothing unusual about it; None: take() knows.

        What take() does for most batches, in one native call: that takes the consumer's thread 1 us less here, and 2
        where reading the last batch has pushed interpreter and objects out of the processor's first cache. Where it
        raises MemoryError, or RuntimeError, torch's, a batch is lost: close the pipeline.
        """
        return self._taker.take_ready if self._assembler.is_native else None

    def close(self) -> None:
        """End threads and give windows back; batches that were taken stay good. Repeatable.

        A read that is under way at a store ends by itself, later. Nothing is done in a forked child, where no thread
        is left and any lock may be held for ever.
        """
        if self._is_closed or self.inherited:
            return
        with contextlib.suppress(InvalidStateError):  # done before
            self._shared.stop.set_result(None)
            self._work.share.close()  # once: when this is dropped, another pipeline may have gone on with the share
        self._ring.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._planner is not threading.current_thread() and self._planner.is_alive():
            self._planner.join(PLANNER_NEXT_S if self._shared.ended else PLANNER_END_S)
        with self._taking:  # the lists of a batch are filled from the windows
            self._ahead.clear()
            self._waited.clear()
            self._ring.forget()
            self._shared.pieces.clear()
        _live.discard(self)
        self._is_closed = not self._planner.is_alive()  # one that ends later may leave something to be dropped

    @property
    def n_taken(self) -> int:
        """Batches of the share before the next one that take() gives: of one that Ctrl-C lost, only the ring knows."""
        return self._work.first_batch + self._ring.figures()["batches"] - len(self._ahead) - len(self._waited)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: without threads, good for nothing."""
        return self._pid != os.getpid()

    def figures(self) -> dict[str, float]:
        """samples, batches, bytes_served and skipped (records replaced) of take(); gather_ns of all threads."""
        ring = self._ring.figures()
        return {
            "samples": self._taker.samples,
            "batches": self._taker.batches,
            "bytes_served": self._taker.n_bytes,
            "skipped": self._n_skipped,
            "gather_ns": ring["gather_ns"],
        }

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        # While the interpreter exits, module globals may be None already; atexit has closed what is live.
        if not is_exiting() and hasattr(self, "_planner"):
            self.close()

    def _take(self, timeout_s: float) -> Batch | None:
        try:
            slot = self._next_filled(timeout_s) if self._assembler.bytes_streams else self._next_slot(timeout_s)
        except (OSError, gather.CorruptError, gather.CastError) as error:
            raise self._failed(error) from error
        except MemoryError:
            self._lose()
            raise
        if isinstance(slot, int):
            self._stop(slot, timeout_s)
            return None
        try:
            batch = self._assembler.batch(slot)
        except (OSError, BadValueError) as error:
            raise self._failed(error) from error
        except (MemoryError, RuntimeError):  # the second is torch's
            self._lose()
            raise
        if self._assembler.object_columns:
            batch = self._with_objects(batch, slot)
        self.replaced = self._replaced(slot.first_row, slot.first_row + slot.n_rows) if self._shared.mended else {}
        self._n_skipped += len(self.replaced)
        self._taker.count(slot)
        return batch

    def _lose(self) -> None:
        """End: a batch is lost, and going on would serve the next one as if nothing had been."""
        self.close()

    def _replaced(self, start: int, stop: int) -> dict[int, Place]:
        """Which rows of the sequence were replaced, counted from the first of these, and by which record."""
        found: dict[int, Place] = {}
        mended = self._shared.mended
        for first, piece in list(mended):  # the planner appends at any time
            rows = piece.replaced[np.searchsorted(piece.replaced, start - first) :]
            rows = rows[: np.searchsorted(rows, stop - first)]
            found.update((first + row - start, piece.place(row)) for row in rows.tolist())
        while mended and mended[0][0] + mended[0][1].n_rows <= stop:
            mended.popleft()
        return found

    def _next_slot(self, timeout_s: float) -> Slot | int:
        """The next slot of the ring, or a status."""
        if not self._waited:
            slot = self._ring.take(0.0)
            if not isinstance(slot, int):
                self._work.waits.add_none()
                return slot
            start_s = time.perf_counter()
            try:
                # In C from the ring into the deque: Ctrl-C in the wait is heard after it, and loses no batch.
                self._waited.extend(map(self._ring.take, (timeout_s,)))
            finally:
                self._work.waits.add(time.perf_counter() - start_s)
        return self._waited.popleft()

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
                # In C from the ring into the deque, and only then begun, or when its lists are asked for: Ctrl-C here
                # loses the batch before this one, which was taken, and not this one too.
                self._ahead.extend(filter(_is_slot, map(self._ring.take, (0.0,))))
                for coming in filter(_is_slot, tuple(self._ahead)):
                    self._started(coming)
            except (OSError, gather.CorruptError, gather.CastError, MemoryError) as error:
                # In its place in the order, for the slot if that came; its frames would hold this pipeline.
                self._ahead.append(error.with_traceback(None))
        return found

    def _started(self, slot: Slot | int) -> Slot | int:
        if not isinstance(slot, int):
            for stream in self._assembler.bytes_streams:
                slot.start_bytes(stream)
        return slot

    def _stop(self, status: int, timeout_s: float) -> None:
        if status == END or (status == CLOSED and self._shared.ended):  # again, where Ctrl-C struck before it was heard
            self._shared.ended = True
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
            values = [_value(loaded, block, row, index) for loaded, block, row in places]
            batch[name] = self._assembler.filled(name, values)
            if f"{name}.valid" in self._assembler.order:
                batch[f"{name}.valid"] = valid_mask(values)
        return {name: batch[name] for name in self._assembler.order}

    def _places(self, start: int, stop: int) -> Any:
        """(window, block in it, row in the block) of rows [start, stop) of the sequence."""
        for end, pushed in list(self._shared.pieces):  # the planner appends at any time
            first = end - pushed.n_rows
            lo, hi = max(start, first), min(stop, end)
            if lo < hi:
                block, row = pushed.places(lo - first, hi - first)
                yield from ((*pushed.joined.find(b), r) for b, r in zip(block.tolist(), row.tolist(), strict=True))

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
        # More than this one, where Ctrl-C lost some: they were taken, and never counted.
        n_uncounted = self._ring.figures()["batches"] - self._taker.batches
        stop = self._taker.rows + (1 + n_uncounted) * self._work.share.batch_size
        served = served_columns(source.schema, self._work.serving.cast if isinstance(error, gather.CastError) else {})
        for loaded, block, row in self._places(self._taker.rows, stop):
            misfit = bad_cast(source.schema, served, loaded, block, row) if served else None
            if misfit is not None:
                return misfit
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
                        place=_stored_place(loaded, block, row),
                    )
            wrong = bad_value(source.schema, loaded, block, row)
            if wrong is not None:
                wrong.facts["place"] = _stored_place(loaded, block, row)
                return wrong
        return CorruptShard(text, url=source.url)


def _value(loaded: Loaded, block: int, row: int, index: int) -> object:
    """As Loaded.value."""
    try:
        return loaded.value(block, row, index)
    except CorruptShard as error:  # Arrow looks at a column of a block as a whole
        error.facts["place"] = *_stored_place(loaded, block, row)[:2], None
        raise


def _stored_place(loaded: Loaded, block: int, row: int) -> Place:
    return int(loaded.window.shards[block]), int(loaded.window.blocks[block]), row


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
    return max(MIN_DEPTH, min(MAX_DEPTH, min(CACHE_BYTES, memory_bytes) // max(batch_bytes, 1)))


@atexit.register
def _close_all() -> None:
    # Planner threads are daemons: left running, they would wake in a half-dead interpreter.
    for pipeline in list(_live):
        pipeline.close()
