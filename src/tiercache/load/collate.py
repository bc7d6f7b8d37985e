"""collate(): a batch of records for torch's DataLoader, as the native path would make it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tiercache.data.output_spec import Buffer, ReadRecords, apply_layouts, as_columns
from tiercache.load.torch_library import TORCH_DTYPES
from tiercache.shard.schema import Kind
from tiercache.shard.values import ColumnValues


def collate(records: Sequence[Any]) -> Any:
    """Return a batch of records, for torch's DataLoader over a `tiercache.Dataset`.

    Records that were read together (`Dataset.__getitems__`) and not accessed since become a batch without a copy per
    record, in the layouts of the data set. Other records are stacked, because they may have been changed.

    Args:
        records: Dicts with the same keys, of NumPy arrays and scalars, bytes, str or other objects; or tuples.

    Returns:
        Dict by column: a tensor [n, ...] of the column's dtype if the shapes agree, else a list. For tuples a list of
        such values.

    Raises:
        ValueError: There are no records.
    """
    if isinstance(records, ReadRecords) and records.as_gathered:
        batch = {
            name: _tensor(values)
            for name, values in apply_layouts(records.columns, records.output_spec, records.number).items()
        }
        for values in records.columns:
            if values.column.kind is Kind.RAGGED and records.output_spec.layout(values.column) == "list":
                batch[values.column.name] = _ragged(values)
            elif values.column.name in records.output_spec.decode and isinstance(values.values, list):
                batch[values.column.name] = _pictures(values)
        return batch if records.output_spec.names is None else as_columns(batch, records.output_spec.names)
    if not records:
        raise ValueError("cannot make a batch of no records")
    if isinstance(records[0], tuple):
        return [_stack(list(values)) for values in zip(*records, strict=True)]
    return {name: _stack([record[name] for record in records]) for name in records[0]}


def _tensor(values: Any) -> Any:
    if isinstance(values, Buffer):
        return Buffer(_tensor(values.values), _tensor(values.offsets), _tensor(values.shapes))
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def _pictures(values: ColumnValues) -> list[Any]:
    """Return a list of tensors of whole images; None for a null."""
    return [_tensor(picture) for picture in values.values]


def _ragged(values: ColumnValues) -> list[torch.Tensor]:
    """Return a list of tensors; a null is an empty tensor, as on the native path."""
    empty = torch.empty([d or 0 for d in values.column.shape], dtype=TORCH_DTYPES[values.column.dtype or ""])
    return [empty.clone() if v is None else torch.as_tensor(v) for v in values.values]


def _stack(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor) and all(isinstance(v, torch.Tensor) and v.shape == first.shape for v in values):
        return torch.stack(values)
    if isinstance(first, np.ndarray | np.generic) and all(isinstance(v, type(first)) for v in values):
        if all(v.shape == first.shape for v in values):
            return torch.from_numpy(np.stack(values))
        return [torch.from_numpy(v) for v in values]
    if isinstance(first, bool | int | float) and all(isinstance(v, bool | int | float) for v in values):
        return torch.tensor(values)
    return values
