"""The pipeline of one epoch, from windows to batches: a planner thread, load threads and the gather ring.

The planner (Python) loads windows and pushes their rows to the ring (C threads), which gathers batches ahead of the
consumer. A window is dropped when its last batch was taken; only then the window after the next is loaded.

`StageQueue` and `StagePipeline` are what stages in threads of their own have in common, which change batches some ahead
and in order: decoding (decode.py) and the user's functions in worker processes (transform_workers.py).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeGuard, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tiercache._native import gather
from tiercache._native.ring import CLOSED, END, FAILED, BatchTaker, Ring, Slot
from tiercache.data.output_spec import length_error, record_number, replace_nulls
from tiercache.data.packing import PackedBlocks
from tiercache.errors import CorruptShard, SchemaError, TierCacheError
from tiercache.load.batch import Batch, Bytes, InvalidValueError, gather_streams, keep_freed_memory
from tiercache.load.loader_options import Resources
from tiercache.load.pieces import RecordLocation
from tiercache.load.planner import PipelineInputs, PlannerState, run_planner
from tiercache.load.windows import LoadedWindow, LoadThreads, loading_pool
from tiercache.shard.blocks import damage_message
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.shard.values import served_columns

# Batches ahead: more batches hide longer stalls of the consumer. But batches ahead should still be in the processor's
# last-level cache (32 MiB here, shared with the records and the consumer's data) when they are read. All threads gather
# a large batch together, so two ahead keep them busy. Measured: batches of 5 MiB came 1.05 times as fast with two ahead
# as with three; batches of 128 KiB came at 1,600 thousand samples/s with 4 ahead and at 2,900 with 32.
MAX_DEPTH, MIN_DEPTH = 32, 2

CACHE_BYTES = 8 << 20

# Closing waits this long for a planner that reads footers, which then ends by itself. At the end of an epoch the
# planner prepares the next epoch: the next planner waits for that, but the consumer does not.
PLANNER_END_S, PLANNER_NEXT_S = 1.0, 0.005

# What a ring raises in place of a batch that could not be gathered.
_GATHER_ERRORS = (OSError, gather.CorruptError, gather.CastError, gather.TooLongError)

CLOSED_MESSAGE = "this iterator is closed, or was made before a fork: call iter(loader) again"

_is_slot = cast("Callable[[object], TypeGuard[Slot]]", Slot.__instancecheck__)

_live: weakref.WeakSet[SelfClosing] = weakref.WeakSet()


class SelfClosing(ABC):
    """Base of pipelines and their processes: they close themselves when their last reference is dropped and at exit.

    Threads of such an object must not refer to it.
    """

    _pid = -1

    def _register(self) -> None:
        """Let this object close itself from now on. To be called before its threads start."""
        self._pid = os.getpid()
        _live.add(self)

    def _unregister(self) -> None:
        _live.discard(self)

    @property
    def is_forked_copy(self) -> bool:
        return self._pid != os.getpid()

    @abstractmethod
    def close(self) -> None:
        """End the threads; batches that were taken stay valid. May be called repeatedly."""

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        # During interpreter exit, module globals may be None; atexit has closed all live objects before.
        if not is_exiting() and self._pid != -1:
            self.close()


class ClosingPipeline(SelfClosing):
    """The batches of one epoch, in order, as one stage makes them.

    corrupt_shard: Shard that take() found corrupt before it raised CorruptShard; an undecodable image does not set it.
    runs_in_caller: Whether take() runs the user's functions, which belong in the consumer's thread.
    """

    corrupt_shard: int | None = None
    runs_in_caller = False
    fast_take: Callable[[], Batch | None] | None = None

    @abstractmethod
    def take(self, timeout_s: float = -1.0) -> Any:
        """Return the next batch; None at the end of the epoch. See Pipeline.take."""

    @property
    def is_closed(self) -> bool:
        return self not in _live

    @property
    @abstractmethod
    def n_taken(self) -> int:
        """Number of the next batch that take() returns, counted in the share."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Return the counters of the batches that take() returned. See Pipeline.figures."""


class Pipeline(ClosingPipeline):
    """The batches of one epoch, in order.

    All methods may be called from any thread. `take` holds a lock, and `close` drops the windows under it. The pipeline
    closes itself at the end of the epoch, at an error, when its last reference is dropped, and at interpreter exit.
    """

    def __init__(self, inputs: PipelineInputs, resources: Resources) -> None:
        self._inputs = inputs
        self._assembler = inputs.setup.assembler
        slot_bytes, about_bytes = inputs.setup.slot_bytes(inputs.batch_rows)
        if self._assembler.bytes_streams:
            keep_freed_memory()
        depth = max(MIN_DEPTH, min(MAX_DEPTH, min(CACHE_BYTES, resources.memory_bytes) // max(about_bytes, 1)))
        memory: Bytes | None = None
        if inputs.pinned is not None:
            if inputs.setup.pads:  # padding may take as much again; slots are not enlarged within an epoch
                slot_bytes = max(slot_bytes, 2 * about_bytes)
            memory, slot_bytes = inputs.pinned.lend_arena(
                inputs.pinned.slot_bytes(slot_bytes), depth + inputs.pinned.n_held
            )
        self._ring = Ring(
            self._assembler.streams,
            batch_rows=inputs.batch_rows,
            depth=depth,
            n_threads=resources.n_threads,
            slot_bytes=slot_bytes,
            memory=memory,
        )
        del memory  # the ring keeps it as long as it is used
        self._shared = PlannerState()
        self._pool = loading_pool(resources.n_threads, sends_requests=inputs.source.storage.sends_requests)
        threads = LoadThreads(self._pool, self._shared.stop, resources.n_threads, resources.limit_bytes)
        self._memory_bytes = resources.memory_bytes
        self._ahead: deque[Slot | Exception] = deque(maxlen=1)  # taken from the ring, not handed out yet
        # Result of the last wait for the ring. take() removes it at once, so it holds something only if Ctrl-C struck
        # between the two steps.
        self._waited: deque[Slot | int] = deque(maxlen=1)
        self._n_replaced = 0
        # replaced rows of the batch that take() returned last, and the locations of their replacements
        self.replaced: dict[int, RecordLocation] = {}
        self._is_closed = False
        self._taking = threading.RLock()
        slow_if_any = (self._waited, self._shared.replaced_pieces)
        self._taker = BatchTaker(
            self._ring, self._assembler.entries, self._shared.pushed, slow_if_any, self._taking, inputs.waits.bins
        )
        # The thread holds no reference to this object, so that dropping the last outside reference closes it.
        self._planner = threading.Thread(
            target=run_planner, args=(inputs, [self._ring], self._shared, threads), name="tiercache-plan", daemon=True
        )
        self._register()
        self._planner.start()

    def take(self, timeout_s: float = -1.0) -> Batch | None:
        """Return the next batch; None at the end of the epoch. A negative timeout_s waits without a limit.

        Errors come after all batches before them. RuntimeError: the pipeline is closed, or a forked child called.
        """
        # Another thread of the parent may have held the lock, and that thread does not exist in the child.
        if self.is_forked_copy:
            self._stop(CLOSED, timeout_s)
            return None
        with self._taking:
            return self._take(timeout_s)

    @property
    def fast_take(self) -> Callable[[], Batch | None] | None:  # type: ignore[override]
        """Function that returns the next batch if it is ready and an ordinary one; None: call take().

        It does the work of take() in one native call, which saves the consumer's thread 1 us here, and 2 us if the last
        batch has evicted the interpreter from the processor's first-level cache. If it raises MemoryError or torch's
        RuntimeError, a batch is lost: close the pipeline.
        """
        return self._taker.take_ready if self._assembler.is_native else None

    def close(self) -> None:
        """End the threads and drop the windows; batches that were taken stay valid. May be called repeatedly.

        A read from a store that is under way is cancelled. In a forked child close() does nothing: the child
        has no such threads, and any lock may be held for ever.
        """
        if self._is_closed or self.is_forked_copy:
            return
        with contextlib.suppress(InvalidStateError):  # The pipeline was closed before.
            self._shared.stop.set_result(None)
        self._shared.unwanted.set()
        self._ring.close()
        if self._inputs.pinned is not None:
            self._inputs.pinned.note_largest(self._ring.figures()["largest"])
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._planner is not threading.current_thread() and self._planner.is_alive():
            self._planner.join(PLANNER_NEXT_S if self._shared.ended else PLANNER_END_S)
        with self._taking:  # take() fills a batch's lists from the windows under this lock.
            self._ahead.clear()
            self._waited.clear()
            self._ring.forget()
            self._shared.pushed.clear()
        self._unregister()
        self._is_closed = not self._planner.is_alive()  # A planner that ends later may leave something to drop.

    @property
    def n_taken(self) -> int:
        """The ring counts a batch that Ctrl-C lost; no other counter does."""
        return self._inputs.first_batch + self._ring.figures()["batches"] - len(self._ahead) - len(self._waited)

    def figures(self) -> dict[str, float]:
        """Return the counters of take(). skipped: replaced records."""
        ring = self._ring.figures()
        return {
            "samples": self._taker.samples,
            "batches": self._taker.batches,
            "bytes_served": self._taker.n_bytes,
            "skipped": self._n_replaced,
            "gather_ns": ring["gather_ns"],
        }

    def _take(self, timeout_s: float) -> Batch | None:
        try:
            slot = self._next_filled(timeout_s) if self._assembler.bytes_streams else self._next_slot(timeout_s)
        except _GATHER_ERRORS as error:
            raise self._failed(error) from error
        except MemoryError:  # A batch was lost: the next one must not be served in its place.
            self.close()
            raise
        if isinstance(slot, int):
            self._stop(slot, timeout_s)
            return None
        try:
            batch = self._assembler.batch(slot)
        except (OSError, InvalidValueError) as error:
            raise self._failed(error) from error
        except (MemoryError, RuntimeError):  # as above; torch raises RuntimeError
            self.close()
            raise
        if self._assembler.object_columns:
            batch = self._with_objects(batch, slot)
        self.replaced = {}
        if self._shared.replaced_pieces:
            self.replaced = self._replaced(slot.first_row, slot.first_row + slot.n_rows)
        self._n_replaced += len(self.replaced)
        self._taker.count(slot)
        return batch

    def _replaced(self, start: int, stop: int) -> dict[int, RecordLocation]:
        replacements: dict[int, RecordLocation] = {}
        replaced_pieces = self._shared.replaced_pieces
        for first, piece in list(replaced_pieces):  # the planner may append at any time
            lo, hi = np.searchsorted(piece.replaced, (start - first, stop - first))
            replacements.update((first + row - start, piece.locate(row)) for row in piece.replaced[lo:hi].tolist())
        while replaced_pieces and replaced_pieces[0][0] + replaced_pieces[0][1].n_rows <= stop:
            replaced_pieces.popleft()
        return replacements

    def _next_slot(self, timeout_s: float) -> Slot | int:
        if not self._waited:
            slot = self._ring.take(0.0)
            if not isinstance(slot, int):
                self._inputs.waits.add_zero()
                return slot
            start_s = time.perf_counter()
            try:
                # C code moves the slot from the ring into the deque: Ctrl-C during the wait is raised after it and
                # loses no batch.
                self._waited.extend(map(self._ring.take, (timeout_s,)))
            finally:
                self._inputs.waits.add(time.perf_counter() - start_s)
        return self._waited.popleft()

    def _next_filled(self, timeout_s: float) -> Slot | int:
        """Return the next slot, or a status. Meanwhile threads fill the lists of the slot after it."""
        slot: Slot | int | Exception
        if self._ahead:
            self._inputs.waits.add_zero()
            slot = self._ahead.popleft()
        else:
            slot = self._started(self._next_slot(timeout_s))
        if isinstance(slot, Exception):
            try:
                raise slot
            finally:
                del slot  # its traceback would form a reference cycle
        if not isinstance(slot, int) and 2 * slot.n_bytes <= self._memory_bytes:
            try:
                # C code moves the slot into the deque, and its lists are begun only then, or when they are asked for:
                # Ctrl-C here loses only the batch before this one, which was taken.
                self._ahead.extend(filter(_is_slot, map(self._ring.take, (0.0,))))
                for slot_after in filter(_is_slot, tuple(self._ahead)):
                    self._started(slot_after)
            except (*_GATHER_ERRORS, MemoryError) as error:
                # It is raised at the slot's place in the order, if that slot arrived. Its frames would hold this
                # pipeline.
                self._ahead.append(error.with_traceback(None))
        return slot

    def _started(self, slot: Slot | int) -> Slot | int:
        if not isinstance(slot, int):
            for stream in self._assembler.bytes_streams:
                slot.start_bytes(stream)
        return slot

    def _stop(self, status: int, timeout_s: float) -> None:
        if status == END or (status == CLOSED and self._shared.ended):  # again, if Ctrl-C came before
            self._shared.ended = True
            self.close()
            return
        if status == FAILED and self._shared.error is not None:
            error, self._shared.error = self._shared.error, None  # its traceback would form a reference cycle
            self.close()
            try:
                raise error
            finally:
                del error
        if status in (CLOSED, FAILED):  # FAILED without an error: the planner saw close() before the ring did.
            raise RuntimeError(CLOSED_MESSAGE)
        raise TimeoutError(f"no batch within {timeout_s} s")

    def _with_objects(self, batch: Batch, slot: Slot) -> Batch:
        locations = list(self._locations(slot.first_row, slot.first_row + slot.n_rows))
        for name, index in self._assembler.object_columns:
            values = [_value(loaded, block, row, index) for loaded, block, row in locations]
            batch[name] = self._assembler.filled(name, values)
            if f"{name}.valid" in self._assembler.order:
                valid = np.array([value is not None for value in values], np.bool_)
                batch[f"{name}.valid"] = self._assembler.library.from_numpy(valid, "bool")
        return {name: batch[name] for name in self._assembler.order}

    def _locations(self, start: int, stop: int) -> Iterator[tuple[LoadedWindow, int, int]]:
        """Yield (window, block in it, row in the block) of the rows [start, stop) of the sequence."""
        for end, pushed in list(self._shared.pushed):  # the planner may append at any time
            first = end - pushed.n_rows
            lo, hi = max(start, first), min(stop, end)
            if lo < hi:
                block, row = pushed.locations(lo - first, hi - first)
                yield from ((*pushed.joined.find(b), r) for b, r in zip(block.tolist(), row.tolist(), strict=True))

    def _failed(self, error: OSError | ValueError) -> TierCacheError:
        explained = self._explain(error)
        self.close()
        return explained

    def _explain(self, error: OSError | ValueError) -> TierCacheError:
        """Return the error of the first block that cannot be read, found by reading the batch's rows one by one."""
        text = str(error.strerror if isinstance(error, OSError) else error)
        source = self._inputs.source
        streams = gather_streams(source.schema)
        names = [column.name for column in source.schema.columns for _ in column.streams(0)]
        # Ctrl-C may have lost batches: the ring counted them, but the taker did not.
        n_uncounted = self._ring.figures()["batches"] - self._taker.batches
        stop = self._taker.rows + (1 + n_uncounted) * self._inputs.share.rank_plan.batch_size
        casts = self._inputs.output_spec.cast if isinstance(error, gather.CastError) else {}
        served = served_columns(source.schema, casts)
        examined: set[PackedBlocks] = set()
        too_long = self._too_long(self._taker.rows, stop) if isinstance(error, gather.TooLongError) else None
        if too_long is not None:
            return too_long
        for loaded, block, row in self._locations(self._taker.rows, stop):
            if served and (misfit := bad_value(source.schema, loaded, block, row, served)) is not None:
                return misfit
            blocks = loaded.block_groups[loaded.group_of_block[block]]
            if isinstance(blocks, PackedBlocks):
                if blocks not in examined and (damage := blocks.find_fault()) is not None:
                    self.corrupt_shard = int(loaded.window.shards[block])
                    return damage
                examined.add(blocks)
                continue
            blocks.reset_checks()  # the file may have been corrupted since
            checks = loaded.checks
            for number, (kind, width) in enumerate(streams):
                check = None if checks is None else checks[number]
                fault = _fault((int(kind), int(width), loaded.addresses[number], check), block, row)
                if fault is not None:
                    self.corrupt_shard = int(loaded.window.shards[block])
                    return CorruptShard(
                        fault,
                        url=blocks.url,
                        block=loaded.stored_block(block),
                        column=names[number],
                        location=_stored_location(loaded, block, row),
                    )
            wrong = bad_value(source.schema, loaded, block, row, {})
            if isinstance(wrong, CorruptShard):
                wrong.location = _stored_location(loaded, block, row)
                return wrong
        return CorruptShard(text, url=source.url)

    def _too_long(self, start: int, stop: int) -> SchemaError | None:
        share, source, output_spec = self._inputs.share, self._inputs.source, self._inputs.output_spec
        replaced = self._replaced(start, stop)

        def number(index: int, _: int) -> int:
            batch, within = divmod(start + index, share.rank_plan.batch_size)
            position = int(share.rank_plan.positions(self._inputs.first_batch + batch)[within])
            return record_number(source, *(replaced.get(index) or share.locate(position)))

        for index, (loaded, block, row) in enumerate(self._locations(start, stop)):
            for column, read in loaded.columns_of_row(source.schema, block, row):
                if output_spec.layout(column) == "padded":
                    found = read(served=output_spec.column(column))
                    if column.name in output_spec.nulls:
                        found = replace_nulls(found, output_spec.nulls[column.name])
                    error = length_error(found, output_spec.padding(column), partial(number, index))
                    if error is not None:
                        return error
        return None


def _value(loaded: LoadedWindow, block: int, row: int, index: int) -> object:
    try:
        return loaded.value(block, row, index)
    except CorruptShard as error:  # Arrow checks a column of a block as a whole.
        error.location = *_stored_location(loaded, block, row)[:2], None
        raise


def _stored_location(loaded: LoadedWindow, block: int, row: int) -> RecordLocation:
    return int(loaded.window.shards[block]), int(loaded.window.blocks[block]), row


def _fault(stream: tuple[int, int, NDArray[np.uint64], NDArray[np.uint64] | None], block: int, row: int) -> str | None:
    kind, width, addresses, _ = stream
    location = (np.array([block], np.uint32), np.array([row], np.uint32))
    try:
        corruption = gather.locate(*stream, *location)
        if corruption is not None:
            return damage_message(corruption[1])
        if kind in (gather.FIXED, gather.BITS):
            gather.gather(kind, width, addresses, *location, bytearray(max(width, 1)))
        else:
            gather.gather_bytes(addresses, *location)
    except OSError as error:
        return str(error.strerror)
    return None


@atexit.register
def _close_all() -> None:
    # Planner threads are daemons: if they ran on, they would wake while the interpreter exits.
    for pipeline in list(_live):
        pipeline.close()


# Shapes must fit, text must be UTF-8, JSON must parse. Any bytes are a valid number, flag or bytes value.
_CHECKED = (Kind.RAGGED, Kind.STR, Kind.JSON)


def bad_value(
    schema: Schema, loaded: LoadedWindow, block: int, row: int, casts: Mapping[str, Column]
) -> SchemaError | CorruptShard | None:
    """Return the error of a readable row with an invalid value, or with one that a served dtype of `casts` lacks."""
    for column, read in loaded.columns_of_row(schema, block, row):
        try:
            if column.name in casts:
                read(served=casts[column.name])
            elif not casts and column.kind in _CHECKED:
                read()
        except SchemaError as error:
            return error
        except CorruptShard as error:
            return CorruptShard(error.reason, url=error.url, block=loaded.stored_block(block), column=column.name)
    return None


# A thread of a stage ends after the image that it decodes, or the batch that it sends. close() waits for it no longer
# than this.
THREAD_END_S = 1.0


@dataclass(slots=True, eq=False)
class StageJob:
    """A batch in a stage. The queue's lock guards what the threads of the stage change.

    n_rows: 0 if there is no batch, because the epoch ends or the stage before failed; n_left: tasks of the stage that
    are not done.
    """

    batch: Any = None
    number: int = 0
    n_rows: int = 0
    n_bytes: int = 0
    n_replaced: int = 0
    n_left: int = 0
    error: BaseException | None = None


JobT = TypeVar("JobT", bound=StageJob)


class StageQueue(Generic[JobT]):
    """The batches between the stage before and the consumer, oldest first. One lock guards everything.

    The lock is re-entrant: the garbage collector may drop, and so close, a pipeline in a thread that holds the lock.
    """

    def __init__(self, ahead: int) -> None:
        lock = threading.RLock()
        self._lock = lock
        self._ready, self._room = threading.Condition(lock), threading.Condition(lock)
        self._jobs: deque[JobT] = deque()
        self._ahead = ahead
        self._has_ended = self._is_closed = False
        self._error: BaseException | None = None  # raised in place of the first batch that is not done
        self._n_added = 0
        self.busy_ns = 0  # time in which threads or processes worked on batches

    @property
    def n_taken(self) -> int:
        with self._lock:
            return self._n_added - sum(job.n_rows > 0 for job in self._jobs)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def wait_for_room(self, has_worker: Callable[[], bool] = lambda: True) -> bool:
        """Wait until a batch may be added; False: none any more. After a change of has_worker() call wake()."""
        with self._lock:
            self._room.wait_for(lambda: self._has_ended or (len(self._jobs) < self._ahead and has_worker()))
            return not self._has_ended

    def add(self, job: JobT) -> None:
        with self._lock:
            self._has_ended = self._has_ended or not job.n_rows
            if not self._is_closed:
                self._jobs.append(job)
                self._n_added += job.n_rows > 0
            self.wake()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._error, self._has_ended = self._error or error, True
            self.wake()

    def first_done(self, timeout_s: float | None) -> JobT | StageJob:
        """Wait for the first batch, and return it: its job stays in the queue until remove()."""
        with self._lock:
            if not self._ready.wait_for(lambda: self._is_closed or self._error or self._is_first_done(), timeout_s):
                raise TimeoutError(f"no batch within {timeout_s} s")
            if self._is_closed:
                raise RuntimeError(CLOSED_MESSAGE)
            return self._jobs[0] if self._is_first_done() else StageJob(error=self._error)

    def remove(self, job: StageJob) -> None:
        with self._lock:
            if self._jobs and self._jobs[0] is job:
                self._jobs.popleft()
                self._room.notify_all()

    def next_done(self, timeout_s: float | None) -> StageJob:
        with self._lock:
            job = self.first_done(timeout_s)
            self.remove(job)
            return job

    def wake(self) -> None:
        """Let all waiting threads look again whether they can go on."""
        with self._lock:
            self._ready.notify_all()
            self._room.notify_all()

    def close(self) -> None:
        with self._lock:
            self._is_closed = self._has_ended = True
            dropped, self._jobs = self._jobs, deque()
            self.wake()
        dropped.clear()

    def _count_done(self, job: JobT, took_ns: int) -> None:
        self.busy_ns += took_ns
        job.n_left -= 1
        if not job.n_left:
            self.wake()

    def _is_first_done(self) -> bool:
        return bool(self._jobs) and not self._jobs[0].n_left


class LaterStage(ClosingPipeline):
    """Base of the pipelines that make batches of those of another pipeline, which they own."""

    def __init__(self, before: ClosingPipeline) -> None:
        self._before = before

    @property
    def corrupt_shard(self) -> int | None:  # type: ignore[override]
        return self._before.corrupt_shard

    def _check_not_forked(self) -> None:
        if self.is_forked_copy:
            raise RuntimeError(CLOSED_MESSAGE)


class StagePipeline(LaterStage):
    """A stage whose threads change the batches of another pipeline, with the same guarantees.

    All methods may be called from any thread. A subclass calls _begin() with what its threads run.
    """

    def __init__(self, name: str, inputs: PipelineInputs, gathered: ClosingPipeline, queue: StageQueue[Any]) -> None:
        super().__init__(gathered)
        self._name = name
        self._waits = inputs.waits
        self._first_batch = inputs.first_batch
        self._queue = queue
        self._n_rows = self._n_batches = self._n_bytes = self._n_replaced = 0
        self._threads: list[threading.Thread] = []

    def _begin(self, runs: Sequence[Callable[[], None]]) -> None:
        """Start a thread for each function. They must not refer to this object: its last reference closes it."""
        self._threads = [
            threading.Thread(target=run, name=f"tiercache-{self._name}-{i}", daemon=True) for i, run in enumerate(runs)
        ]
        self._register()
        for thread in self._threads:
            thread.start()

    def take(self, timeout_s: float = -1.0) -> Any:
        self._check_not_forked()
        start_s = time.perf_counter()
        job = self._queue.next_done(None if timeout_s < 0 else timeout_s)
        self._waits.add(time.perf_counter() - start_s)
        return self._hand_out(job)

    def _hand_out(self, job: StageJob) -> Any:
        if job.error is not None or not job.n_rows:
            # The error's traceback would form a cycle with the job, and hold the memory of its batch.
            error, job.error, job.batch = job.error, None, None
            self.close()
            try:
                if error is not None:
                    raise error
            finally:
                del error  # and with this frame, which holds the iterator and its workers
            return None
        self._n_rows += job.n_rows
        self._n_batches += 1
        self._n_bytes += job.n_bytes
        self._n_replaced += job.n_replaced
        return job.batch

    def close(self) -> None:
        if self.is_forked_copy:
            return
        self._queue.close()
        self._before.close()
        threads, self._threads = self._threads, []  # waited for once, even if close() is called again
        end_s = time.monotonic() + THREAD_END_S
        for thread in threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, end_s - time.monotonic()))
        self._unregister()

    @property
    def n_taken(self) -> int:
        return self._first_batch + self._queue.n_taken

    def figures(self) -> dict[str, float]:
        handed_out = {"samples": self._n_rows, "batches": self._n_batches, "bytes_served": self._n_bytes}
        busy = {f"{self._name}_ns": self._queue.busy_ns}
        return {**self._before.figures(), **handed_out, **busy, "skipped": self._n_replaced}
