"""The stage of the user's functions: it makes the batches of a native pipeline those of the user.

A `BatchFunction` makes one batch: the records as `dataset[i]` makes them, the transform of each, the collate function,
and the batch transforms. `TransformedPipeline` calls it in the consumer's thread, for each batch when the consumer asks
for it; worker processes (transform_workers.py) call it ahead of the consumer.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate as collate_by_type
from torch.utils.data._utils.collate import default_collate_fn_map

from tiercache.data.output_spec import Buffer, OutputSpec, as_columns, is_stack_of_rows, record_tuple
from tiercache.load.pipeline import CLOSED_MESSAGE, ClosingPipeline
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.shard.values import ColumnValues
from tiercache.transform_rng import use_key

if TYPE_CHECKING:
    from tiercache.data.output_spec import ColumnLayout
    from tiercache.load.batch import Batch
    from tiercache.load.epoch import OrderShare
    from tiercache.load.pipeline import PipelineInputs
    from tiercache.load.shared_block import SharedBlock

_APART = (Kind.BYTES, Kind.IMAGE, Kind.RAGGED)  # columns that are gathered end to end, and cut into values here


@dataclass(frozen=True, slots=True)
class BatchKeys:
    """What the random numbers of a batch follow from. positions: Positions of its records in the epoch's order."""

    seed: int
    epoch: int
    positions: Sequence[int]

    @staticmethod
    def of(share: OrderShare, number: int) -> BatchKeys:
        """Return the keys of the batch with this number of a rank's share."""
        return BatchKeys(share.seed, share.epoch, share.rank_plan.positions(number).tolist())


@dataclass(frozen=True, slots=True)
class BatchFunction:
    """Makes the consumer's batch of a gathered one. Immutable, and picklable if the user's functions are.

    Attributes:
        dataset: The data set, whose transform, if it has one, is applied to each record.
        columns: Its columns, as they are served.
        output_spec: How the data set serves them.
        collate_fn: Function that makes a batch of the records or of the transform's results. None: the batch is served
            as gathered.
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

    def make(self, gathered: Batch, keys: BatchKeys, block: SharedBlock | None = None) -> Any:
        """Return the batch.

        Args:
            gathered: Batch in the layouts of gathered_spec. Its memory must stay valid as long as anything refers to
                it: the user's functions may keep parts of it.
            keys: Keys of the random numbers.
            block: Memory into which the caller will write the batch. torch's default collate function then stacks
                tensors there.

        Raises:
            BaseException: Any error of the user's functions.
        """
        collate_fn, names = self.collate_fn, self.output_spec.names
        if collate_fn is default_collate and block is not None and not self.batch_transforms:
            collate_fn = _collate_into(block)
        records = [] if collate_fn is None else self._records(gathered, keys)
        with use_key(keys.seed, keys.epoch, keys.positions[0], "batch"):
            if collate_fn is not None:
                batch = collate_fn(records)
            else:
                batch = gathered if names is None else as_columns(gathered, names)
            for function in self.batch_transforms:
                batch = function(batch)
        if batch is None:
            raise TypeError("collate_fn= or batch_transform= returned None instead of a batch")
        return batch

    def _records(self, gathered: Batch, keys: BatchKeys) -> list[Any]:
        rows = _rows([_values(column, gathered, self.output_spec) for column in self.columns])
        transform, names, records = self.dataset.transform, self.output_spec.names, []
        if transform is None:
            if names is None:
                return list(rows)
            schema = Schema(list(self.columns))
            return [record_tuple(record, names, schema) for record in rows]
        for position, record in zip(keys.positions, rows, strict=True):
            with use_key(keys.seed, keys.epoch, position):
                records.append(transform(record))
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


class TransformedPipeline(ClosingPipeline):
    """The batches that the user's functions make of those of a native pipeline, in the thread of the consumer.

    take() makes a batch when the consumer asks for it, and none ahead. The functions then draw from the program's
    random generators in a fixed order, so that a seeded script is repeatable. The native pipeline works ahead in its
    own threads. An error of a user's function, or Ctrl-C within it, closes the pipeline; its batch does
    not count as taken.

    Args:
        function: The user's functions.
        inputs: Inputs of the pipeline.
        gathered: Native pipeline, which this object owns from now on.
    """

    def __init__(self, function: BatchFunction, inputs: PipelineInputs, gathered: ClosingPipeline) -> None:
        self._function = function
        self._share, self._waits = inputs.share, inputs.waits
        self._gathered = gathered
        self._busy_ns, self._has_failed = 0, False
        self._taking = threading.RLock()
        self._register()

    def take(self, timeout_s: float = -1.0) -> Any:
        """Return the next batch; None at the end of the epoch. Raises as Pipeline.take(), and the functions' errors.

        timeout_s: Limit of the wait for the gathered batch. 0 asks for a batch that is ready, and none ever is.
        """
        if self.is_forked_copy:
            raise RuntimeError(CLOSED_MESSAGE)
        if timeout_s == 0:
            raise TimeoutError("a transform in the consumer's thread makes no batch ahead")
        start_s = time.perf_counter()
        with self._taking:
            try:
                number = self._gathered.n_taken
                gathered = self._gathered.take(timeout_s)
                if gathered is None:
                    self.close()
                    return None
                return self._make(gathered, number)
            finally:
                self._waits.add(time.perf_counter() - start_s)

    def close(self) -> None:
        if self.is_forked_copy:
            return
        self._gathered.close()
        self._unregister()

    @property
    def n_taken(self) -> int:
        return self._gathered.n_taken - self._has_failed

    @property
    def corrupt_shard(self) -> int | None:  # type: ignore[override]
        return self._gathered.corrupt_shard

    def figures(self) -> dict[str, float]:
        """Return the figures of the native pipeline, and the time in the user's functions."""
        return {**self._gathered.figures(), "transform_ns": self._busy_ns}

    def _make(self, gathered: Batch, number: int) -> Any:
        start_ns = time.perf_counter_ns()
        try:
            return self._function.make(gathered, BatchKeys.of(self._share, number))
        except BaseException as raised:
            self._has_failed = True
            self.close()
            error = as_batch_error(raised)
            if error is raised:
                raise
            raise error from raised
        finally:
            self._busy_ns += time.perf_counter_ns() - start_ns


def as_batch_error(error: BaseException) -> BaseException:
    """Return the error that the consumer raises for an error of a user's function.

    StopIteration would end the consumer's loop, and TimeoutError is the loader's own.
    """
    if not isinstance(error, StopIteration | TimeoutError | GeneratorExit):
        return error
    return RuntimeError(f"a transform or collate function raised {type(error).__name__}: {error}")
