"""Padding of a batch by repetition of its last record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiercache.load.buffer import Buffer


def pad_batch(batch: Any, n: int) -> tuple[Any, int]:
    """Return (the batch padded to n records by repeating the last one, number of repeated records).

    The batch is a dict or, with `as_tuple`, a list of columns: tensors, jagged nested tensors, lists or `Buffer`s. A
    value of another type stays as it is.
    """
    if isinstance(batch, Mapping):
        found = {name: _column(value, n) for name, value in batch.items()}
        return {name: value for name, (value, _) in found.items()}, max((m for _, m in found.values()), default=0)
    values = [_column(value, n) for value in batch]
    return [value for value, _ in values], max((m for _, m in values), default=0)


def _column(value: Any, n: int) -> tuple[Any, int]:
    if not isinstance(value, torch.Tensor | list | Buffer) or not 0 < _length(value) < n:
        return value, 0
    n_missing = n - _length(value)
    return _longer(value, n_missing), n_missing


def _length(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.size(0) if value.dim() else 0
    return len(value)


def _longer(value: Any, n_more: int) -> Any:
    if isinstance(value, list):
        return value + value[-1:] * n_more
    if isinstance(value, Buffer):
        return _longer_buffer(value, n_more)
    if value.is_nested:
        parts = value.unbind()
        return torch.nested.nested_tensor([*parts, *parts[-1:] * n_more], layout=value.layout)
    return torch.cat([value, *[value[-1:]] * n_more])


def _longer_buffer(buffer: Buffer, n_more: int) -> Buffer:
    start, stop = buffer.offsets[-2], buffer.offsets[-1]
    values = torch.cat([buffer.values, *[buffer.values[int(start) : int(stop)]] * n_more])
    steps = torch.arange(1, n_more + 1, dtype=buffer.offsets.dtype)
    offsets = torch.cat([buffer.offsets, stop + steps * (stop - start)])
    shapes = None if buffer.shapes is None else torch.cat([buffer.shapes, *[buffer.shapes[-1:]] * n_more])
    return Buffer(values, offsets, shapes)
