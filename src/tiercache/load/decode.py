"""The decoding stage between the gather ring and the consumer: threads decode images, some batches ahead, in order.

The threads share a queue of batches. A thread that finds no image to decode takes the next batch from the gather
pipeline, one thread at a time, so that no thread only passes batches on. The gather copied the encoded images into the
batch's slot under its SIGBUS guard, so windows and mappings may be dropped while the images are decoded.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from tiercache.data.output_spec import Buffer, image_decode_error, record_number
from tiercache.images.decode_image import DecodeImage, ImageDraws
from tiercache.images.decoder import DecodeError, Decoder, in_layout, load_libraries, stored_dtype
from tiercache.load.batch import ArrayLibrary, Bytes, aligned
from tiercache.load.loader_options import Resources
from tiercache.load.pieces import RecordLocation
from tiercache.load.pipeline import Pipeline, StageJob, StagePipeline, StageQueue
from tiercache.load.planner import PipelineInputs
from tiercache.stats import WaitHistogram

# Batches ahead: enough to hide a stall of the consumer, and to give each thread some images of later batches while one
# batch is nearly done. More would only cost memory.
BATCHES_AHEAD, MIN_AHEAD = 4, 2

PICTURES_A_THREAD = 4

# Beyond the batches ahead: the batch that the consumer processes, and the one before, to which loops still refer.
HELD_BY_CONSUMER = 2

# Decoding threads per gather thread: gathering an image of 53 KB takes 11 us, decoding it 800 us.
DECODING_A_GATHERER = 16


class DecodedPipeline(StagePipeline):
    """A `Pipeline` whose images are decoded, with the same guarantees. All methods may be called from any thread."""

    def __init__(self, inputs: PipelineInputs, resources: Resources) -> None:
        load_libraries()  # a missing library is an error of the caller, not of a thread
        ahead = _ahead(inputs, resources)
        queue = _DecodeQueue(ahead, goes_on=inputs.corruption is not None)
        # Small limits, because decoding is slower and needs the memory; waiting times that are not the consumer's.
        n_gatherers = -(-resources.n_threads // DECODING_A_GATHERER)
        gathered = Pipeline(
            replace(inputs, waits=WaitHistogram(), pinned=None),
            replace(resources, n_threads=n_gatherers, memory_bytes=0),
        )
        super().__init__("decode", inputs, gathered, queue)
        inputs.memory.keep = ahead + (HELD_BY_CONSUMER if inputs.pinned is None else inputs.pinned.n_held)
        opener = _Opener(inputs, gathered)
        if inputs.pinned is not None:
            opener.reserve(inputs.memory.keep)
        self._begin([partial(_decode, queue, opener)] * resources.n_threads)


@dataclass(slots=True)
class _Pictures:
    """One column of one batch: encoded images (None: null, or decoded), crop numbers and outputs."""

    name: str
    options: DecodeImage
    encoded: list[Any]
    draws: Sequence[Sequence[float]]
    out: Any
    library: ArrayLibrary

    def decode(self, index: int, decoder: Decoder) -> None:
        data, self.encoded[index] = self.encoded[index], None  # after the last image the slot is free for another batch
        if self.options.size is None:
            picture = None if data is None else decoder.decode(data, self.draws[index])
            if picture is not None:
                picture = in_layout(self.library.from_numpy(picture, self.options.dtype), self.options)
            self.out[index] = picture
        elif data is None:
            self.out[index] = 0  # the memory is reused
        else:
            decoder.decode_into(data, self.draws[index], self.out[index])


@dataclass(slots=True, eq=False)
class _Job(StageJob):
    """A batch in the decoding stage. Its tasks are its images, column by column."""

    columns: Sequence[_Pictures] = ()
    replaced: Mapping[int, RecordLocation] = field(default_factory=dict)
    failed_at: int = -1  # task of `error`
    n_started: int = 0

    def __post_init__(self) -> None:
        self.n_left = self.n_tasks

    @property
    def n_tasks(self) -> int:
        return len(self.columns) * self.n_rows


class _DecodeQueue(StageQueue[_Job]):
    """Batches whose images the threads decode. goes_on: also after a bad image, so that all are found at once."""

    def __init__(self, ahead: int, *, goes_on: bool = False) -> None:
        super().__init__(ahead)
        self._goes_on, self._is_opening = goes_on, False

    def next_task(self) -> tuple[_Job, int] | None:
        """Wait for an image to decode: (its batch, its index there); index -1: open the next batch. None: closed."""
        with self._lock:
            while not self._is_closed:
                for job in self._jobs:
                    if job.n_started < job.n_tasks:
                        job.n_started += 1
                        return job, job.n_started - 1
                if not self._is_opening and not self._has_ended and len(self._jobs) < self._ahead:
                    self._is_opening = True
                    return _Job(), -1
                self._room.wait()
            return None

    def add(self, job: _Job) -> None:
        with self._lock:
            self._is_opening = False
            super().add(job)

    def done(self, job: _Job, task: int, error: Exception | None, took_ns: int) -> None:
        with self._lock:
            # The error of the first image is kept, so that it does not depend on the threads' timing.
            if error is not None and (job.error is None or task < job.failed_at):
                job.error, job.failed_at = error, task
            if error is not None and not self._goes_on:
                job.n_left -= job.n_tasks - job.n_started  # the rest of the batch is never handed out
                job.n_started = job.n_tasks
                self._has_ended = True
            self._count_done(job, took_ns)


class _Opener:
    """Prepares gathered batches for decoding. One thread at a time calls it."""

    def __init__(self, inputs: PipelineInputs, gathered: Pipeline) -> None:
        self.inputs, self.gathered = inputs, gathered
        self.draws = ImageDraws(inputs.share.seed, inputs.share.epoch, inputs.output_spec.decode.values())
        self.number = inputs.first_batch
        # of the images of a batch, which lie in one block, column after column
        decode = inputs.output_spec.decode.values()
        self.block_bytes = sum(aligned(_picture_bytes(options) * inputs.batch_rows) for options in decode)

    def reserve(self, n_blocks: int) -> None:
        """Allocate the pinned memory of n_blocks batches, in the caller's thread.

        An allocation by a decoding thread would break a CUDA graph that the training loop captures at that moment.
        """
        if self.block_bytes:
            blocks = [self.inputs.memory.lend(self.block_bytes, self.block_bytes) for _ in range(n_blocks)]
            blocks.clear()  # they return to be lent again

    def open(self) -> _Job:
        before = self.gathered.figures()["bytes_served"]
        batch = self.gathered.take()
        if batch is None:
            return _Job()
        decode = self.inputs.output_spec.decode
        positions = self.inputs.share.rank_plan.positions(self.number)
        n_rows = len(positions)
        draws = self.draws.of(positions)
        n_bytes = self.gathered.figures()["bytes_served"] - before
        lent = self.inputs.memory.lend(self.block_bytes, self.block_bytes) if self.block_bytes else None
        columns, end, library = [], 0, self.inputs.setup.library
        for name, options in decode.items():
            encoded = _encoded(batch[name], batch.get(f"{name}.valid"))
            batch[name], out = _room_in(lent, end, options, n_rows, library)
            columns.append(_Pictures(name, options, encoded, draws, out, library))
            end += aligned(_picture_bytes(options) * n_rows)
        replaced = self.gathered.replaced
        job = _Job(batch, self.number, n_rows, int(n_bytes), len(replaced), columns=columns, replaced=replaced)
        self.number += 1
        return job

    def error_of(self, job: _Job, task: int, decode_error: DecodeError) -> Exception:
        column, index = divmod(task, job.n_rows)
        location = job.replaced.get(index)
        if location is None:
            location = self.inputs.share.locate(int(self.inputs.share.rank_plan.positions(job.number)[index]))
        record = record_number(self.inputs.source, *location)
        error = image_decode_error(self.inputs.source, job.columns[column].name, record, str(decode_error))
        error.__cause__ = decode_error.with_traceback(None)  # the frames of the traceback would hold the batch's memory
        corruption = self.inputs.corruption
        if corruption is not None:
            error.location = stored = corruption.stored(location)
            corruption.add(stored)  # so that later images are replaced without starting a new pipeline for each
        return error


def _picture_bytes(options: DecodeImage) -> int:
    return 0 if options.size is None else int(np.prod(options.batch_shape)) * options.itemsize


def _room_in(
    memory: Bytes | None, start: int, options: DecodeImage, n_rows: int, library: ArrayLibrary
) -> tuple[Any, Any]:
    if memory is None or options.size is None:
        pictures: list[Any] = [None] * n_rows
        return pictures, pictures
    shape = (n_rows, *options.memory_shape(*options.shape))
    served = in_layout(library.over(memory, options.dtype, shape, start), options)
    there = memory[start : start + n_rows * _picture_bytes(options)]
    return served, there.view(stored_dtype(options.dtype)).reshape(shape)


def _decode(queue: _DecodeQueue, opener: _Opener) -> None:
    decoders: dict[str, Decoder] = {}
    while (found := queue.next_task()) is not None:
        job, task = found
        if task < 0:
            try:
                queue.add(opener.open())
            except Exception as raised:  # noqa: BLE001 -- top of a thread: the consumer raises it in its place
                queue.add(_Job(error=raised))
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


def _encoded(gathered: Buffer, valid: Any) -> list[Any]:
    """Return each image's bytes, over the slot's memory; None for a null."""
    values, bounds = np.asarray(gathered.values), gathered.offsets.tolist()
    parts = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
    return parts if valid is None else [part if ok else None for part, ok in zip(parts, valid.tolist(), strict=True)]


def _ahead(inputs: PipelineInputs, resources: Resources) -> int:
    n_rows = inputs.batch_rows
    batch_bytes = n_rows * sum(map(_picture_bytes, inputs.output_spec.decode.values()))
    needed = max(BATCHES_AHEAD, -(-PICTURES_A_THREAD * resources.n_threads // n_rows))
    return max(MIN_AHEAD, min(needed, resources.memory_bytes // max(batch_bytes, 1)))
