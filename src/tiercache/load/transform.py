"""The user's functions on batches: how they make a batch, and the stage that calls them in the consumer's thread.

A `BatchFunction` makes one batch: the records as `dataset[i]` makes them, the transform of each, the collate function,
and the batch transforms. `TransformedPipeline` calls it for each batch when the consumer asks for it; worker processes
(transform_workers.py) call it ahead of the consumer. This module does not need torch; collate.py has torch's functions.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from tiercache.data.output_spec import Buffer, ColumnLayout, OutputSpec, as_columns, is_stack_of_rows, record_tuple
from tiercache.errors import TierCacheError
from tiercache.load.batch import Batch
from tiercache.load.epoch import OrderShare
from tiercache.load.pipeline import ClosingPipeline, LaterStage
from tiercache.load.planner import PipelineInputs
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.transform_rng import use_key

_APART = (Kind.BYTES, Kind.IMAGE, Kind.RAGGED)  # columns that are gathered end to end, and cut into values here


@dataclass(slots=True)
class BatchKeys:
    """What the random numbers of a batch follow from, and how far its functions have come.

    Attributes:
        positions: Positions of its records in the epoch's order.
        current: Index of the record that is being transformed; None: the functions of the whole batch run.
    """

    seed: int
    epoch: int
    positions: Sequence[int]
    current: int | None = None

    @staticmethod
    def of(share: OrderShare, number: int) -> BatchKeys:
        """Return the keys of the batch with this number of a rank's share."""
        return BatchKeys(share.seed, share.epoch, share.rank_plan.positions(number).tolist())


@dataclass(frozen=True, slots=True)
class BatchFunction:
    """Makes the consumer's batch of a gathered one. Immutable, and picklable if the user's functions are.

    Attributes:
        collate_fn: Function that makes a batch of the records or of the transform's results. None: the batch is served
            as gathered.
        is_own: Whether only MixUp and CutMix run, which draw from rng() alone and keep nothing of a batch.
    """

    dataset: Any
    columns: tuple[Column, ...]
    output_spec: OutputSpec
    collate_fn: Callable[[list[Any]], Any] | None
    batch_transforms: tuple[Callable[[Any], Any], ...]
    is_own: bool = False

    @property
    def gathered_spec(self) -> OutputSpec:
        """How the native path must gather the columns."""
        if self.collate_fn is None:
            return self.output_spec
        decode = self.output_spec.decode
        apart = (column.name for column in self.columns if column.kind in _APART and column.name not in decode)
        layouts: dict[str, ColumnLayout] = dict.fromkeys(apart, "buffer")
        return replace(self.output_spec, layouts=layouts, names=None)

    def make(self, gathered: Batch, keys: BatchKeys) -> Any:
        """Return the batch.

        Args:
            gathered: Batch in the layouts of gathered_spec. Its memory must stay valid as long as anything refers to
                it: the user's functions may keep parts of it.
        """
        collate_fn, names = self.collate_fn, self.output_spec.names
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
        columns = {column.name: _values(column, gathered, self.output_spec) for column in self.columns}
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        transform, names, records = self.dataset.transform, self.output_spec.names, []
        if transform is None:
            if names is None:
                return list(rows)
            schema = Schema(list(self.columns))
            return [record_tuple(record, names, schema) for record in rows]
        for index, (position, record) in enumerate(zip(keys.positions, rows, strict=True)):
            keys.current = index
            with use_key(keys.seed, keys.epoch, position):
                records.append(transform(record))
        keys.current = None
        return records


def _values(column: Column, gathered: Batch, output_spec: OutputSpec) -> Iterable[Any]:
    values, name = gathered[column.name], column.name
    if isinstance(values, Buffer):
        values = _cut(column, values)
    elif hasattr(values, "dtype"):
        values = _array(values)
    elif name in output_spec.decode:
        values = [None if picture is None else _array(picture) for picture in values]
    if not output_spec.has_mask(column):
        return cast("Iterable[Any]", values)
    flags = gathered[f"{name}.valid"].tolist()
    return (value if is_valid else None for value, is_valid in zip(values, flags, strict=True))


def _array(values: Any) -> Any:
    """Return a tensor as a NumPy array; an array is returned as it is, and so is a tensor of bfloat16."""
    return values if isinstance(values, np.ndarray) or str(values.dtype) == "torch.bfloat16" else values.numpy()


def _cut(column: Column, buffer: Buffer) -> list[Any]:
    values, bounds = _array(buffer.values), buffer.offsets.tolist()
    if column.kind is not Kind.RAGGED:
        memory = memoryview(values)
        return [bytes(memory[start:stop]) for start, stop in itertools.pairwise(bounds)]
    parts = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
    if is_stack_of_rows(column):
        return parts
    return [part.reshape(shape) for part, shape in zip(parts, buffer.shapes.tolist(), strict=True)]


class TransformedPipeline(LaterStage):
    """The batches that the user's functions make of those of a native pipeline, in the thread that calls take().

    take() makes one batch, and none ahead. In the consumer's thread the functions draw from the program's random
    generators in a fixed order, so that a seeded script is repeatable. The native pipeline works ahead in its
    own threads. An error of a user's function, or Ctrl-C within it, closes the pipeline; its batch does
    not count as taken.
    """

    def __init__(self, function: BatchFunction, inputs: PipelineInputs, gathered: ClosingPipeline) -> None:
        super().__init__(gathered)
        self._function, self._inputs = function, inputs
        self.runs_in_caller = not function.is_own
        self._busy_ns, self._has_failed = 0, False
        self._taking = threading.RLock()
        self._register()

    def take(self, timeout_s: float = -1.0) -> Any:
        """Return the next batch; None at the end of the epoch. Raises as Pipeline.take(), and the functions' errors.

        timeout_s: Limit of the wait for the gathered batch.
        """
        self._check_not_forked()
        start_s = time.perf_counter()
        with self._taking:
            try:
                number = self._before.n_taken
                gathered = self._before.take(timeout_s)
                if gathered is None:
                    self.close()
                    return None
                return self._make(gathered, number)
            finally:
                self._inputs.waits.add(time.perf_counter() - start_s)

    def close(self) -> None:
        """See Pipeline.close."""
        if self.is_forked_copy:
            return
        self._before.close()
        self._unregister()

    @property
    def n_taken(self) -> int:
        """See ClosingPipeline."""
        return self._before.n_taken - self._has_failed

    def figures(self) -> dict[str, float]:
        """Return the figures of the native pipeline, and the time in the user's functions."""
        return {**self._before.figures(), "transform_ns": self._busy_ns}

    def _make(self, gathered: Batch, number: int) -> Any:
        start_ns = time.perf_counter_ns()
        keys = BatchKeys.of(self._inputs.share, number)
        try:
            return self._function.make(gathered, keys)
        except BaseException as raised:
            self._has_failed = True
            error = as_batch_error(raised)
            note_origin(error, self._inputs, keys)
            self.close()
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


def note_origin(error: BaseException, inputs: PipelineInputs, keys: BatchKeys) -> None:
    """Add to an error of a user's function which record, or which batch, it got."""
    if not isinstance(error, Exception):  # Ctrl-C, or an exit
        return
    position = keys.positions[keys.current or 0]
    try:
        location = inputs.share.locate(position)
        record = inputs.source.describe_at(*location)
        if inputs.corruption is not None and inputs.corruption.is_bad(location):
            record = f"the record that is served instead of the corrupt {record}"
    except (OSError, TierCacheError):  # The footer can no longer be read; the function's error is the one to report.
        record = f"the record at position {position} of epoch {keys.epoch}"
    error.add_note(
        f"tiercache: in {'the batch that begins with' if keys.current is None else 'the transform of'} {record}"
    )
