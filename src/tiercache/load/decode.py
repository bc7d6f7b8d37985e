"""The decoding stage between the gather ring and the consumer: threads decode images, some batches ahead, in order.

The threads share a queue of batches. A thread that finds no image to decode takes the next batch from the gather
pipeline, one thread at a time, so that no thread only passes batches on. The gather copied the encoded images into the
batch's slot under its SIGBUS guard, so windows and mappings may be dropped while the images are decoded.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiercache.images.decoder import DecodeError, Decoder, draw_key, keyed_draws, load_libraries, stored_dtype
from tiercache.load.batch import TORCH_DTYPES, Batch
from tiercache.load.output_spec import image_decode_error, record_number
from tiercache.load.pipeline import ClosingPipeline, Pipeline, PipelineInputs, Resources
from tiercache.shard.conversion import bfloat16_tensor
from tiercache.stats import WaitHistogram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.images.options import DecodeImage
    from tiercache.load.corrupt import RecordLocation
    from tiercache.load.output_spec import Buffer

# Batches ahead: enough to hide a stall of the consumer, and to give each thread some images of later batches while one
# batch is nearly done. More would only cost memory.
BATCHES_AHEAD, MIN_AHEAD = 4, 2
PICTURES_A_THREAD = 4
# Beyond the batches ahead: the batch that the consumer processes, and the one before, to which loops still refer.
HELD_BY_CONSUMER = 2
# Decoding threads per gather thread: gathering an image of 53 KB takes 11 us, decoding it 800 us.
DECODING_A_GATHERER = 16
# Copying this part (1/8) of a batch costs less than a hundredth of decoding the rest.
SMALL_PART = 8
# A thread that decodes an image ends after it, milliseconds later. close() does not wait longer than this for a thread.
THREAD_END_S = 1.0


class DecodedPipeline(ClosingPipeline):
    """A `Pipeline` whose images are decoded, with the same guarantees. All methods may be called from any thread."""

    def __init__(self, work: PipelineInputs, resources: Resources) -> None:
        for options in work.output_spec.decode.values():
            load_libraries(options)  # a missing library is an error of the caller, not of a thread
        self._waits = work.waits
        self._first_batch = work.first_batch
        ahead = _ahead(work, resources)
        self._queue = _DecodeQueue(ahead, goes_on=work.corruption is not None)
        # Small limits, because decoding is slower and needs the memory; waiting times that are not the consumer's.
        n_gatherers = -(-resources.n_threads // DECODING_A_GATHERER)
        self._gathered = Pipeline(
            replace(work, waits=WaitHistogram()), replace(resources, n_threads=n_gatherers, memory_bytes=0)
        )
        work.memory.keep = (ahead + HELD_BY_CONSUMER) * len(work.output_spec.decode)
        opener = _Opener(work, self._gathered)
        self._n_rows = self._n_batches = self._n_bytes = self._n_replaced = 0
        self._threads = [
            threading.Thread(target=_decode, args=(self._queue, opener), name=f"tiercache-decode-{i}", daemon=True)
            for i in range(resources.n_threads)
        ]
        self._register()
        for thread in self._threads:
            thread.start()

    def take(self, timeout_s: float = -1.0) -> Batch | None:
        """Return the next batch; None at the end of the epoch."""
        if self.is_forked_copy:
            raise RuntimeError("this iterator is closed, or was made before a fork: call iter(loader) again")
        start_s = time.perf_counter()
        job = self._queue.next_done(None if timeout_s < 0 else timeout_s)
        self._waits.add(time.perf_counter() - start_s)
        if job.batch is None:
            error, job.error = job.error, None  # its traceback would form a reference cycle
            self.close()
            if error is not None:
                raise error
            return None
        self._n_rows += job.n_rows
        self._n_batches += 1
        self._n_bytes += job.n_bytes
        self._n_replaced += len(job.replaced)
        return job.batch

    @property
    def fast_take(self) -> None:
        """None: decoded batches are returned by take() only. See Pipeline.fast_take."""

    def close(self) -> None:
        """End all threads; batches that were taken stay valid. See Pipeline.close."""
        if self.is_forked_copy:
            return
        self._queue.close()
        self._gathered.close()
        threads, self._threads = self._threads, []  # waited for once, even if close() is called again
        end_s = time.monotonic() + THREAD_END_S
        for thread in threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, end_s - time.monotonic()))
        self._unregister()

    @property
    def n_taken(self) -> int:
        """See Pipeline.n_taken."""
        return self._first_batch + self._queue.n_taken

    @property
    def corrupt_shard(self) -> int | None:  # type: ignore[override]
        """See ClosingPipeline."""
        return self._gathered.corrupt_shard

    def figures(self) -> dict[str, float]:
        """See Pipeline.figures, for the batches handed out; also decode_ns of all threads."""
        handed_out = {"samples": self._n_rows, "batches": self._n_batches, "bytes_served": self._n_bytes}
        decoded = {"skipped": self._n_replaced, "decode_ns": self._queue.decode_ns}
        return {**self._gathered.figures(), **handed_out, **decoded}


@dataclass(slots=True)
class _Pictures:
    """One column of one batch: encoded images (None: null, or decoded), crop numbers and outputs.

    out: array [n, ...], or a list if images differ in size.
    """

    name: str
    options: DecodeImage
    encoded: list[Any]
    draws: Sequence[Sequence[float]]
    out: Any

    def decode(self, index: int, decoder: Decoder) -> None:
        data, self.encoded[index] = self.encoded[index], None  # after the last image the slot is free for another batch
        if self.options.size is None:
            self.out[index] = (
                None if data is None else _tensor_of(decoder.decode(data, self.draws[index]), self.options)
            )
        elif data is None:
            self.out[index] = 0  # the memory is reused
        else:
            decoder.decode_into(data, self.draws[index], self.out[index])


@dataclass(slots=True)
class _Job:
    """A batch in the decoding stage.

    batch: None at the end of the epoch or with an error. The queue's lock guards all fields.
    """

    batch: Batch | None
    columns: Sequence[_Pictures] = ()
    number: int = 0
    n_rows: int = 0
    n_bytes: int = 0
    replaced: Mapping[int, RecordLocation] = field(default_factory=dict)
    error: Exception | None = None
    failed_at: int = -1
    n_started: int = 0
    n_done: int = 0

    @property
    def n_tasks(self) -> int:
        return len(self.columns) * self.n_rows

    def fail(self, task: int, error: Exception) -> None:
        """Keep the error of the first image, so that the error does not depend on the threads' timing."""
        if self.error is None or task < self.failed_at:
            self.error, self.failed_at = error, task


class _DecodeQueue:
    """The queue of batches between the ring and the consumer, oldest first.

    One lock guards everything. It is re-entrant: the garbage collector may drop, and so close, a pipeline in a thread
    that holds the lock.

    Args:
        ahead: Maximum number of batches in the queue.
        goes_on: Whether images are decoded after one that cannot be, so that all such images are found at once.
    """

    def __init__(self, ahead: int, *, goes_on: bool = False) -> None:
        lock = threading.RLock()
        self._lock = lock
        self._ready, self._room = threading.Condition(lock), threading.Condition(lock)
        self._ahead, self._goes_on = ahead, goes_on
        self._jobs: deque[_Job] = deque()
        self._opening = self._ended = self._closed = False
        self._n_added = 0
        self.decode_ns = 0

    @property
    def n_taken(self) -> int:
        """Number of batches that were added and are no longer in the queue."""
        with self._lock:
            return self._n_added - sum(job.batch is not None for job in self._jobs)

    def next_task(self) -> tuple[_Job, int] | None:
        """Wait for an image to decode: (its batch, its index there); index -1: open the next batch. None: closed."""
        with self._lock:
            while not self._closed:
                for job in self._jobs:
                    if job.n_started < job.n_tasks:
                        job.n_started += 1
                        return job, job.n_started - 1
                if not self._opening and not self._ended and len(self._jobs) < self._ahead:
                    self._opening = True
                    return _Job(None), -1
                self._room.wait()
            return None

    def add(self, job: _Job) -> None:
        """Append the batch that was opened."""
        with self._lock:
            self._opening = False
            self._ended = self._ended or job.batch is None
            if not self._closed:
                self._jobs.append(job)
                self._n_added += job.batch is not None  # without a batch it marks the end
            self._room.notify_all()
            self._tell(job)

    def done(self, job: _Job, task: int, error: Exception | None, took_ns: int) -> None:
        """Note that an image is decoded, or why it cannot be."""
        with self._lock:
            self.decode_ns += took_ns
            if error is not None:
                job.fail(task, error)
            if error is not None and not self._goes_on:
                job.n_done += job.n_tasks - job.n_started  # the rest of the batch is never handed out
                job.n_started = job.n_tasks
                self._ended = True
            job.n_done += 1
            self._tell(job)

    def next_done(self, timeout_s: float | None) -> _Job:
        """Wait for the oldest batch and return it. Raises TimeoutError, or RuntimeError if closed."""
        with self._lock:
            if not self._ready.wait_for(lambda: self._closed or self._first_is_done(), timeout_s):
                raise TimeoutError(f"no batch within {timeout_s} s")
            if self._closed:
                raise RuntimeError("this iterator is closed, or was made before a fork: call iter(loader) again")
            job = self._jobs.popleft()
            self._room.notify()
            if job.error is not None:
                job.batch = None
            return job

    def close(self) -> None:
        with self._lock:
            self._closed = True
            dropped, self._jobs = self._jobs, deque()
            self._ready.notify_all()
            self._room.notify_all()
        dropped.clear()

    def _first_is_done(self) -> bool:
        return bool(self._jobs) and self._jobs[0].n_done >= self._jobs[0].n_tasks

    def _tell(self, job: _Job) -> None:
        if self._jobs and job is self._jobs[0] and self._first_is_done():
            self._ready.notify()


@dataclass(slots=True)
class _Opener:
    """Prepares gathered batches for decoding. One thread at a time calls it."""

    work: PipelineInputs
    gathered: Pipeline
    number: int = field(init=False)
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.key = draw_key(self.work.share.seed, self.work.share.epoch)
        self.number = self.work.first_batch

    def open(self) -> _Job:
        """Return the next batch, ready to decode."""
        before = self.gathered.figures()["bytes_served"]
        batch = self.gathered.take()
        if batch is None:
            return _Job(None)
        decode = self.work.output_spec.decode
        positions = self.work.share.ranks.positions(self.number)
        n_rows = len(positions)
        draws: Sequence[Sequence[float]] = [()] * n_rows
        if any(options.is_random for options in decode.values()):
            draws = keyed_draws(self.key, _runs(positions)).tolist()
        n_bytes = self.gathered.figures()["bytes_served"] - before
        columns = []
        for name, options in decode.items():
            encoded = _encoded(batch[name], batch.get(f"{name}.valid"))
            batch[name], out = self._room(options, n_rows)
            columns.append(_Pictures(name, options, encoded, draws, out))
        _copy_small_columns(batch, decode.keys(), int(n_bytes))
        job = _Job(batch, columns, self.number, n_rows, int(n_bytes), self.gathered.replaced)
        self.number += 1
        return job

    def error_of(self, job: _Job, task: int, decode_error: DecodeError) -> Exception:
        """Return the consumer's error for an image that cannot be decoded."""
        column, index = divmod(task, job.n_rows)
        location = job.replaced.get(index)
        if location is None:
            location = self.work.share.locate(int(self.work.share.ranks.positions(job.number)[index]))
        record = record_number(self.work.source, *location)
        error = image_decode_error(self.work.source, job.columns[column].name, record, str(decode_error))
        error.__cause__ = decode_error.with_traceback(None)  # the frames of the traceback would hold the batch's memory
        corruption = self.work.corruption
        if corruption is not None:
            error.location = stored = corruption.stored(location)
            corruption.add(stored)  # so that later images are replaced without starting a new pipeline for each
        return error

    def _room(self, options: DecodeImage, n_rows: int) -> tuple[Any, Any]:
        """Return (the batch's value, a writable view of it)."""
        if options.size is None:
            pictures: list[Any] = [None] * n_rows
            return pictures, pictures
        shape = (n_rows, *options.batch_shape)
        picture_bytes = int(np.prod(options.batch_shape)) * options.itemsize
        lent = self.work.memory.lend(n_rows * picture_bytes, self.work.batch_rows * picture_bytes)
        tensor = torch.frombuffer(lent, dtype=TORCH_DTYPES[options.dtype]).view(shape)
        return tensor, lent.view(stored_dtype(options.dtype)).reshape(shape)


def _decode(queue: _DecodeQueue, opener: _Opener) -> None:
    """Run a decoding thread."""
    decoders: dict[str, Decoder] = {}
    while (found := queue.next_task()) is not None:
        job, task = found
        if task < 0:
            try:
                queue.add(opener.open())
            except Exception as raised:  # noqa: BLE001 -- top of a thread: the consumer raises it in its place
                queue.add(_Job(None, error=raised))
            continue
        start_ns, error = time.perf_counter_ns(), None
        column, index = divmod(task, job.n_rows)
        pictures = job.columns[column]
        try:
            decoder = decoders.get(pictures.name) or decoders.setdefault(pictures.name, Decoder(pictures.options))
            try:
                pictures.decode(index, decoder)
            except DecodeError as decode_error:
                error = opener.error_of(job, task, decode_error)
        except Exception as raised:  # noqa: BLE001 -- top of a thread: perhaps the location cannot be found either
            error = raised
        queue.done(job, task, error, time.perf_counter_ns() - start_ns)
        del job, found, pictures, error  # a waiting thread must not hold a batch


def _runs(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return consecutive positions as half-open ranges."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1])
    ends = np.concatenate([starts[1:], [len(positions)]])
    return list(zip(positions[starts].tolist(), (positions[ends - 1] + 1).tolist(), strict=True))


def _encoded(gathered: Buffer, valid: torch.Tensor | None) -> list[Any]:
    """Return each image's bytes, over the slot's memory; None for a null."""
    values, bounds = gathered.values.numpy(), gathered.offsets.tolist()
    parts = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
    return parts if valid is None else [part if ok else None for part, ok in zip(parts, valid.tolist(), strict=True)]


def _copy_small_columns(batch: Batch, decoded: Set[str], slot_bytes: int) -> None:
    """Copy the other columns out of the slot, if they are a small part of it.

    Otherwise a label of 8 bytes would keep the encoded images of its batch in memory.
    """
    beside = {name: value for name, value in batch.items() if name not in decoded}
    tensors = {name: value for name, value in beside.items() if isinstance(value, torch.Tensor)}
    if sum(value.nbytes for value in tensors.values()) > slot_bytes // SMALL_PART:
        return
    batch.update({name: value.clone() for name, value in tensors.items() if not value.is_nested})


def _tensor_of(picture: Any, options: DecodeImage) -> torch.Tensor:
    tensor: torch.Tensor = bfloat16_tensor(picture) if options.dtype == "bfloat16" else torch.from_numpy(picture)
    return tensor


def _ahead(work: PipelineInputs, resources: Resources) -> int:
    """Return how many batches are decoded ahead of the consumer."""
    n_rows = work.batch_rows
    sized = [options for options in work.output_spec.decode.values() if options.size is not None]
    batch_bytes = n_rows * sum(int(np.prod(options.batch_shape)) * options.itemsize for options in sized)
    needed = max(BATCHES_AHEAD, -(-PICTURES_A_THREAD * resources.n_threads // n_rows))
    return max(MIN_AHEAD, min(needed, resources.memory_bytes // max(batch_bytes, 1)))
