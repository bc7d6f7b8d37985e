"""The layouts of columns for records that were read one by one: what `dataset[[...]]` returns.

It is the plain counterpart of what the native path does in a slot's memory (csrc/forms.h), without common code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.errors import SchemaError
from tiercache.load.buffer import Buffer
from tiercache.load.serving import OutputSpec, is_stack_of_rows, varying
from tiercache.shard.conversion import as_numpy
from tiercache.shard.read.values import ColumnValues, as_batch
from tiercache.shard.schema import Column, Kind

Array: TypeAlias = npt.NDArray[Any]


def apply_layouts(columns: Sequence[ColumnValues], serving: OutputSpec) -> dict[str, Any]:
    """Return the batch by column: array, list, Buffer or nested tensor.

    It also has the lengths of padded columns and the masks of nullable ones.

    Raises:
        SchemaError: A nested tensor is requested, and torch is not installed.
    """
    if not serving.layouts:
        return as_batch(columns)
    batch: dict[str, Any] = {}
    for found in columns:
        name, form = found.column.name, serving.layout(found.column)
        if form == "list":
            batch[name] = found.values
        elif form == "padded":
            batch[name], batch[f"{name}.lengths"] = _padded(found.column, _runs(found))
        elif form == "buffer":
            batch[name] = _buffer(found.column, _runs(found))
        else:
            batch[name] = _nested(found.column, _buffer(found.column, _runs(found)))
        if found.valid is not None:
            batch[f"{name}.valid"] = found.valid
    return batch


def _runs(found: ColumnValues) -> list[Array]:
    """Return each record's elements as an array of the stored dtype; a null has no elements."""
    column = found.column
    if column.kind is Kind.RAGGED:
        none = np.zeros([d or 0 for d in column.shape], column.stored)
        return [none if value is None else _stored(column, value) for value in found.values]
    encoded = (value.encode() if isinstance(value, str) else value or b"" for value in found.values)
    return [np.frombuffer(value, np.uint8) for value in encoded]


def _stored(column: Column, value: Any) -> Array:
    read = as_numpy(value)  # bfloat16 tensors as their bits
    array = value if read is None else read[0]
    return np.asarray(array.view(column.stored))


def _typed(column: Column, stored: Array) -> Any:
    if column.dtype == "bool":
        return stored.view(np.bool_)
    if column.dtype != "bfloat16":
        return stored
    torch = sys.modules["torch"]  # torch is imported, because the values are its tensors
    return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)


def _shapes(column: Column, runs: Sequence[Array]) -> npt.NDArray[np.int64]:
    n_dims = max(len(column.shape), 1)
    return np.array([run.shape for run in runs], np.int64).reshape(len(runs), n_dims)


def _padded(column: Column, runs: Sequence[Array]) -> tuple[Any, npt.NDArray[np.int64]]:
    """Return (array [n, longest, ...], zero-padded; lengths, int64[n] or int64[n, n_varying])."""
    shapes, vary = _shapes(column, runs), list(varying(column))
    dims = [d or 0 for d in column.shape] or [0]
    for dimension in vary:
        dims[dimension] = int(shapes[:, dimension].max(initial=0))
    out = np.zeros((len(runs), *dims), column.stored)
    for index, run in enumerate(runs):
        place: tuple[int | slice, ...] = (index, *(slice(n) for n in run.shape))
        out[place] = run
    lengths = np.ascontiguousarray(shapes[:, vary])
    return _typed(column, out), lengths[:, 0] if len(vary) == 1 else lengths


def _buffer(column: Column, runs: Sequence[Array]) -> Buffer:
    shapes, rows = _shapes(column, runs), is_stack_of_rows(column)
    inner = tuple(d or 0 for d in column.shape[1:]) if rows else ()
    flat = runs if rows else [run.reshape(-1) for run in runs]
    values = np.concatenate([np.zeros((0, *inner), column.stored), *flat])
    offsets = np.zeros(len(runs) + 1, np.int64)
    np.cumsum(shapes[:, 0] if rows else shapes.prod(axis=1), out=offsets[1:])
    return Buffer(_typed(column, values), offsets, None if rows else shapes.astype(np.int32))


def _nested(column: Column, buffer: Buffer) -> Any:
    try:
        torch = import_module("torch")
    except ModuleNotFoundError as error:
        message = "the form 'nested' is a torch tensor, and torch is not installed; 'buffer' is of numpy arrays"
        raise SchemaError(message, column=column.name, expected="torch", got="no torch") from error
    values = torch.as_tensor(buffer.values)
    return torch.nested.nested_tensor_from_jagged(values, torch.from_numpy(buffer.offsets))
