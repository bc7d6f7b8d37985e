"""The stage of the user's functions: it makes the batches of a native pipeline those of the user.

A `BatchFunction` makes one batch: the records as `dataset[i]` makes them, the transform of each, the collate function,
and the batch transforms. `TransformedPipeline` runs it ahead of the consumer, in order: in one thread, which calls the
user's functions for one record at a time, or in worker processes (transform_workers.py).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate as collate_by_type
from torch.utils.data._utils.collate import default_collate_fn_map

from tiercache.load.output_spec import Buffer, OutputSpec, as_columns, is_stack_of_rows
from tiercache.load.stage import StageJob, StagePipeline, StageQueue
from tiercache.load.transform_random import ThreadRandomness
from tiercache.rng import use_key
from tiercache.shard.read.values import ColumnValues
from tiercache.shard.schema import Column, Kind

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tiercache.load.batch import Batch
    from tiercache.load.decode import DecodedPipeline
    from tiercache.load.output_spec import ColumnLayout
    from tiercache.load.pipeline import Pipeline, PipelineInputs
    from tiercache.load.shared_block import SharedBlock
    from tiercache.rng import Key

# Batches that the thread of the training process makes ahead: one to hide a stall, and one that is being made.
BATCHES_AHEAD = 2
# Batches of each worker that wait for the consumer, beyond those that are in the worker: it gets its next batch before
# the consumer has taken the one that it made.
WAITING = 1
_APART = (Kind.BYTES, Kind.IMAGE, Kind.RAGGED)  # columns that are gathered end to end, and cut into values here


class Randomness(Protocol):
    """The random numbers of a thread or a process that runs the user's functions. See transform_random.py."""

    def batch(self) -> AbstractContextManager[None]:
        """Return the context of the calls for one batch; at its end it may raise that the batch must be made again."""

    def begin(self, key: Key) -> None:
        """Let the global random functions draw the numbers of this key from now on."""

    def call(self, function: Callable[[Any], Any], value: Any) -> Any:
        """Return function(value)."""


@dataclass(frozen=True, slots=True)
class BatchKeys:
    """What the random numbers of a batch follow from. positions: Positions of its records in the epoch's order."""

    seed: int
    epoch: int
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class BatchFunction:
    """Makes the consumer's batch of a gathered one. Immutable, and picklable if the user's functions are.

    Attributes:
        dataset: The data set, whose transform, if it has one, is applied to each record.
        columns: Its columns, as they are served.
        output_spec: How the data set serves them.
        collate_fn: Function that makes a batch of the transform's results. None: there is no transform; the batch is
            served as gathered.
        batch_transforms: Functions that are applied to the batch, in order.
    """

    dataset: Any
    columns: tuple[Column, ...]
    output_spec: OutputSpec
    collate_fn: Callable[[list[Any]], Any] | None
    batch_transforms: tuple[Callable[[Any], Any], ...]

    @property
    def gathered_spec(self) -> OutputSpec:
        """How the native path must gather the columns."""
        if self.collate_fn is None:
            return self.output_spec
        decode = self.output_spec.decode
        apart = (column.name for column in self.columns if column.kind in _APART and column.name not in decode)
        layouts: dict[str, ColumnLayout] = dict.fromkeys(apart, "buffer")
        return replace(self.output_spec, layouts=layouts, names=None)

    def make(self, gathered: Batch, keys: BatchKeys, randomness: Randomness, block: SharedBlock | None = None) -> Any:
        """Return the batch.

        Args:
            gathered: Batch in the layouts of gathered_spec. Its memory must stay valid as long as anything refers to
                it: the user's functions may keep parts of it.
            keys: Keys of the random numbers.
            randomness: Random numbers of this thread or process.
            block: Memory into which the caller will write the batch. torch's default collate function then stacks
                tensors there.

        Raises:
            BaseException: Any error of the user's functions.
        """
        collate_fn, names = self.collate_fn, self.output_spec.names
        if collate_fn is default_collate and block is not None and not self.batch_transforms:
            collate_fn = _collate_into(block)
        with randomness.batch():
            records = None if collate_fn is None else self._records(gathered, keys, randomness)
            key = use_key(keys.seed, keys.epoch, keys.positions[0], "batch")
            randomness.begin(key)
            with key:
                if collate_fn is not None:
                    batch = randomness.call(collate_fn, records)
                else:
                    batch = gathered if names is None else as_columns(gathered, names)
                for function in self.batch_transforms:
                    batch = randomness.call(function, batch)
        if batch is None:
            raise TypeError("collate_fn= or batch_transform= returned None instead of a batch")
        return batch

    def _records(self, gathered: Batch, keys: BatchKeys, randomness: Randomness) -> list[Any]:
        columns = [_values(column, gathered, self.output_spec) for column in self.columns]
        transform, records = self.dataset.transform, []
        for position, record in zip(keys.positions, _rows(columns), strict=True):
            key = use_key(keys.seed, keys.epoch, position)
            randomness.begin(key)
            with key:
                records.append(randomness.call(transform, record))
        return records


def _values(column: Column, gathered: Batch, output_spec: OutputSpec) -> ColumnValues:
    """Return a gathered column as the values of `dataset[[...]]`, over the same memory."""
    values, name = gathered[column.name], column.name
    valid = gathered[f"{name}.valid"].numpy() if output_spec.has_mask(column) else None
    if isinstance(values, torch.Tensor):
        return ColumnValues(column, _array(values), valid)
    if isinstance(values, Buffer):
        return ColumnValues(column, _cut(column, values), valid)
    if name in output_spec.decode:
        values = [None if picture is None else _array(picture) for picture in values]
    return ColumnValues(column, values, valid)


def _array(values: torch.Tensor) -> Any:
    return values if values.dtype is torch.bfloat16 else values.numpy()


def _cut(column: Column, buffer: Buffer) -> list[Any]:
    """Return the values of a buffer: bytes, or arrays over its memory."""
    values, bounds = _array(buffer.values), buffer.offsets.tolist()
    if column.kind is not Kind.RAGGED:
        memory = memoryview(values)
        return [bytes(memory[start:stop]) for start, stop in itertools.pairwise(bounds)]
    parts = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
    if is_stack_of_rows(column):
        return parts
    return [part.reshape(shape) for part, shape in zip(parts, buffer.shapes.tolist(), strict=True)]


def _rows(columns: Sequence[ColumnValues]) -> Iterator[dict[str, Any]]:
    """Yield the records. Unlike those of as_records(), their arrays are over the memory of the batch."""
    names = [found.column.name for found in columns]
    for values in zip(*map(_values_or_none, columns), strict=True):
        yield dict(zip(names, values, strict=True))


def _values_or_none(found: ColumnValues) -> Iterator[Any]:
    if found.valid is None:
        return iter(found.values)
    return (value if is_valid else None for value, is_valid in zip(found.values, found.valid.tolist(), strict=True))


def _collate_into(block: SharedBlock) -> Callable[[list[Any]], Any]:
    """Return torch's default collate function, with tensors stacked in a block of shared memory.

    In a worker process torch's own function would create a file in /dev/shm for each tensor of each batch.
    """

    def stack(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
        first = batch[0]
        if first.layout is not torch.strided or first.is_nested:
            own: torch.Tensor = default_collate_fn_map[torch.Tensor](batch, collate_fn_map=collate_fn_map)
            return own
        is_alike = all(one.dtype == first.dtype and not one.requires_grad and one.device.type == "cpu" for one in batch)
        out = block.empty((len(batch), *first.shape), first.dtype) if is_alike else None
        return torch.stack(list(batch), 0, out=out)

    functions = default_collate_fn_map
    if functions.get(torch.Tensor) is _TORCHS_STACK:  # otherwise the user has registered another function
        functions = {**functions, torch.Tensor: stack}
    return partial(collate_by_type, collate_fn_map=functions)


_TORCHS_STACK = default_collate_fn_map.get(torch.Tensor)


@dataclass(slots=True, eq=False)
class Job(StageJob):
    """A batch in this stage. gathered: the batch to make it of; None: it is made, a worker has it, or there is none."""

    gathered: Batch | None = None
    keys: BatchKeys | None = None


class JobQueue(StageQueue[Job]):
    """The queue of the batches that the user's functions make."""

    def done(self, job: Job, batch: Any, error: BaseException | None, took_ns: int) -> None:
        """Note that a batch is made, or why it cannot be: then no further batch is added."""
        with self._lock:
            job.gathered, job.batch, job.error = None, batch, error
            self._has_ended = self._has_ended or error is not None
            self._count_done(job, took_ns)


@dataclass(slots=True)
class _Opener:
    """Takes gathered batches. One thread calls it."""

    inputs: PipelineInputs
    gathered: Pipeline | DecodedPipeline
    number: int = field(init=False)

    def __post_init__(self) -> None:
        self.number = self.inputs.first_batch

    def open(self) -> Job:
        """Return the next batch as a job; a job without records at the end of the epoch, or with an error."""
        try:
            return self._open()
        except Exception as error:  # noqa: BLE001 -- top of a thread: the consumer raises it in its place
            return Job(error=error)

    def _open(self) -> Job:
        before = self.gathered.figures()
        batch = self.gathered.take()
        if batch is None:
            return Job()
        after, share = self.gathered.figures(), self.inputs.share
        positions = share.rank_plan.positions(self.number).tolist()
        keys = BatchKeys(share.seed, share.epoch, positions)
        n_bytes, n_replaced = (int(after[name] - before[name]) for name in ("bytes_served", "skipped"))
        job = Job(None, self.number, len(positions), n_bytes, n_replaced, n_left=1, gathered=batch, keys=keys)
        self.number += 1
        return job


class TransformedPipeline(StagePipeline):
    """The batches that the user's functions make of those of a native pipeline, in order, with the same guarantees.

    All methods may be called from any thread. An error of a user's function is raised in place of its batch, and closes
    the pipeline.

    Args:
        inputs: Inputs of the pipeline; `transforms` must be set.
        gathered: Native pipeline, which this object owns from now on.
    """

    def __init__(self, inputs: PipelineInputs, gathered: Pipeline | DecodedPipeline) -> None:
        transforms, pool = inputs.transforms, inputs.workers
        assert transforms is not None  # noqa: S101 -- an invariant of the engine
        self._pool = pool
        n_ahead = BATCHES_AHEAD if pool is None else transforms.n_workers * (transforms.prefetch_factor + WAITING)
        queue = JobQueue(n_ahead)
        super().__init__("transform", inputs, gathered, queue)
        opener = _Opener(inputs, gathered)
        if pool is None:
            self._begin([partial(_run_here, queue, opener, transforms.function, ThreadRandomness(inputs.warned))])
        else:
            self._begin([partial(pool.send_all, queue, opener.open), partial(pool.receive_all, queue)])

    def close(self) -> None:
        """See StagePipeline.close."""
        if self._pool is not None and not self.is_forked_copy:
            self._queue.close()
            self._pool.wake()
        super().close()


def _run_here(queue: JobQueue, opener: _Opener, function: BatchFunction, randomness: Randomness) -> None:
    """Run the thread that makes all batches."""
    while queue.wait_for_room():
        job = opener.open()
        queue.add(job)
        if job.gathered is not None and job.keys is not None:
            start_ns, batch, error = time.perf_counter_ns(), None, None
            try:
                batch = function.make(job.gathered, job.keys, randomness)
            except BaseException as raised:  # noqa: BLE001 -- the user's code: the consumer raises it in its place
                error = as_batch_error(raised)
            queue.done(job, batch, error, time.perf_counter_ns() - start_ns)
            del batch, error
        del job  # a waiting thread must not hold a batch


def as_batch_error(error: BaseException) -> BaseException:
    """Return the error that the consumer raises for an error of a user's function.

    StopIteration would end the consumer's loop, and TimeoutError is the loader's own.
    """
    if not isinstance(error, StopIteration | TimeoutError | GeneratorExit):
        return error
    wrapped = RuntimeError(f"a transform or collate function raised {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
