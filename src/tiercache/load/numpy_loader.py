"""The loader of NumPy batches: the native path of `tiercache.DataLoader` without torch."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tiercache.data.output_spec import NativeAccess, NativeDataset, OutputSpec
from tiercache.errors import SchemaError
from tiercache.load.batch import ArrayLibrary, Batch, numpy_dtype
from tiercache.load.engine import LoaderArguments, OrderEngine
from tiercache.load.epoch import RunState
from tiercache.load.loader_options import LoaderOptions, checks_arguments
from tiercache.load.transform import BatchFunction
from tiercache.shard.schema import Schema


def _check_columns(schema: Schema, output_spec: OutputSpec) -> None:
    """Raise SchemaError for a column that cannot be served as NumPy arrays. schema: as stored."""
    for column in output_spec.schema(schema).columns:
        if output_spec.layout(column) == "nested":
            message = "the layout 'nested' is a torch tensor; 'buffer' is of NumPy arrays"
            expected = "'list', 'padded', 'buffer'"
            raise SchemaError(message, column=column.name, expected=expected, got="'nested'")
        decode = output_spec.decode.get(column.name)
        if "bfloat16" in (column.dtype, decode.dtype if decode is not None else None):
            numpy_dtype("bfloat16", column.name)


def _batch_function(dataset: NativeDataset, access: NativeAccess, options: LoaderOptions) -> BatchFunction | None:
    """Return the user's functions; None: there are none."""
    batch_transforms = tuple(one for one in (access.batch_transform, options.batch_transform) if one is not None)
    if access.transform is None and not batch_transforms:
        return None
    return BatchFunction(
        dataset=dataset,
        columns=access.output_spec.schema(access.source.schema).columns,
        output_spec=access.output_spec,
        collate_fn=None if access.transform is None else _collate,
        batch_transforms=batch_transforms,
    )


def _collate(records: Sequence[Any]) -> Any:
    """Return the batch of the results of a transform."""
    if any(record is None for record in records):
        raise TypeError("transform= returned None instead of a record")
    return _combine(records)


def _combine(values: Sequence[Any]) -> Any:
    """Return one value of a batch for values of its records: an array if they have one shape, else a list.

    The members of dicts, tuples and lists are combined one by one, as torch's default_collate does.
    """
    first = values[0]
    if isinstance(first, Mapping):
        if any(not isinstance(value, Mapping) or value.keys() != first.keys() for value in values):
            raise _unlike(values)
        return {name: _combine([value[name] for value in values]) for name in first}
    if isinstance(first, tuple | list):
        if any(not isinstance(value, tuple | list) or len(value) != len(first) for value in values):
            raise _unlike(values)
        members = [_combine(member) for member in zip(*values, strict=True)]
        return type(first)(*members) if hasattr(first, "_fields") else members
    if all(map(_is_stacked, values)) and len({np.shape(value) for value in values}) == 1:
        return np.stack(values)
    return list(values)


def _is_stacked(value: Any) -> bool:
    # np.str_ and np.bytes_ are generic, too; they are served as str and bytes are.
    return isinstance(value, np.ndarray | np.generic | bool | int | float) and not isinstance(value, str | bytes)


def _unlike(values: Sequence[Any]) -> ValueError:
    found = " and ".join(sorted({_describe(value) for value in values}))
    return ValueError(
        "the results of a transform make a batch only if their dicts have the same keys and their tuples and lists the "
        f"same length, got {found}: return arrays where the length varies"
    )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"keys {', '.join(map(repr, value))}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def _draw_seed() -> int:
    return int(np.random.randint(np.iinfo(np.int64).max, dtype=np.int64))


class NumpyLoader:
    """Batches of NumPy arrays. Neither it nor its batches need torch.

    Order, ranks and state are those of `DataLoader` with the same arguments, and either of them continues from a state
    of the other. Each iter() begins the next epoch. A batch is a dict by column, or a list if the data set serves
    tuples: arrays [n, ...] of the column's dtype; lists for bytes, str, JSON and encoded images; a list of arrays for
    ragged columns and for images of various sizes; `<column>.valid`, bool[n], beside a nullable column. The consumer
    owns a batch and may write to it. One thread at a time uses a loader, which pickles with its position.

    The transforms of the data set and of the options run in the thread that calls next(), where `tiercache.rng()` gives
    the numbers that it gives in `DataLoader`. Results of a transform of records are collated by key: arrays and numbers
    become an array if they have one shape, and a list if not; other values become a list.

    Args:
        dataset: Data set of a class that does not override how records are read.
        batch_size: Number of records per batch, 1 or more.
        shuffle: Whether to serve the records in a new random order in each epoch.
        drop_last: Whether to drop the last batch of an epoch if it is shorter than `batch_size`.
        options: Seed, ranks and shuffle quality, and the resources of the native path. Without a seed, a run draws one
            from NumPy's global generator when it begins.

    Raises:
        TypeError: `options` is not a LoaderOptions, or batch_size is no integer.
        ValueError: batch_size is below 1; or the data set's class overrides how records are read.
        SchemaError: A column has the layout "nested", which is a torch tensor; or it is served as bfloat16, and
            ml_dtypes is not installed.
    """

    @checks_arguments
    def __init__(
        self,
        dataset: NativeDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        options: LoaderOptions | None = None,
    ) -> None:
        batch_size = operator.index(batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if options is not None and not isinstance(options, LoaderOptions):
            raise TypeError(f"options= takes a tiercache.LoaderOptions(...), got {options!r}")
        access = dataset.__tiercache__()
        if access.overrides_access:
            raise ValueError(
                "NumpyLoader reads records itself, and the data set's class overrides how records are read: give the "
                "change as the data set's transform= instead"
            )
        if options is not None and options.device is not None:
            raise ValueError(
                f"device={options.device!r}: NumPy arrays lie in host memory: remove device=, or use DataLoader"
            )
        _check_columns(access.source.schema, access.output_spec)
        self._dataset = dataset
        self._start(
            LoaderArguments(
                library=ArrayLibrary(),
                batch_size=batch_size,
                shuffle=bool(shuffle),
                drop_last=bool(drop_last),
                timeout_s=0,
                draw_seed=_draw_seed,
                options=options or LoaderOptions(),
                output_spec=access.output_spec,
            )
        )

    def _start(self, arguments: LoaderArguments) -> None:
        access = self._dataset.__tiercache__()
        function = _batch_function(self._dataset, access, arguments.options)
        if function is not None:
            arguments = replace(arguments, output_spec=function.gathered_spec)
        self._engine = OrderEngine(access.source, arguments)
        self._engine.function = function

    def __iter__(self) -> Iterator[Batch]:
        """Return the iterator of the next epoch. It ends its threads when it is exhausted or dropped."""
        return self._engine.iterate()

    def __len__(self) -> int:
        return self._engine.n_batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values for a checkpoint; equal on all ranks. See `DataLoader.state_dict`."""
        return self._engine.state().to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state, of this class or of `DataLoader`, on any number of ranks.

        Args:
            state_dict: Value that state_dict() returned.

        Raises:
            ValueError: It is no such state, or an argument or option differs from it, so that the order would change.
            ObjectChanged: The data set differs from the one that the state was saved on.
        """
        self._engine.load(RunState.from_dict(state_dict))

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next epoch. A state that was loaded for that epoch keeps its position.

        Args:
            epoch: Number of the epoch, 0 or more.
        """
        self._engine.set_epoch(epoch)

    def stats(self, *, across_ranks: bool = False) -> dict[str, Any]:
        """Return the counters and the bottleneck, as `DataLoader.stats` (docs/guide/loader.md).

        Args:
            across_ranks: Whether `exposed_wait_s` also tells of the slowest rank. Then the call is a collective of
                torch.distributed: all ranks must make it.
        """
        return self._engine.stats(across_ranks=across_ranks)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._dataset, self._engine.rebuild_arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._dataset, (arguments, position) = state
        self._start(arguments)
        if position is not None:
            self._engine.load(position)

    def __repr__(self) -> str:
        facts = [repr(self._dataset), f"batch_size={self._engine.arguments.batch_size}", *self._engine.facts()]
        position = f"native path, {self._engine.describe_position()}"
        return f"{type(self).__name__}({', '.join(facts)}, {position}, {self._engine.rank()})"
