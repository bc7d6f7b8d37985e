"""A slot's memory as a batch: tensors over it without a copy, lists where records differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from tiercache._native import gather
from tiercache.shard.types import Column, Kind, Schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache._native.ring import Slot

REF = 3  # csrc/gather.h: references, for lists whose objects the consumer makes

Batch: TypeAlias = dict[str, Any]
Places: TypeAlias = Sequence[int]

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}
_LIST_KINDS = (Kind.BYTES, Kind.STR, Kind.JSON, Kind.IMAGE)


def gather_streams(schema: Schema) -> NDArray[np.uint32]:
    """(kind, width in bytes) of each stream of the columns, uint32[n_streams, 2], as the ring takes them."""
    streams: list[tuple[int, int]] = []
    for column in schema.columns:
        for stream in column.streams(0):
            as_list = stream.role == "values" and column.kind in _LIST_KINDS
            streams.append((REF if as_list else stream.kind, stream.width_bytes))
    return np.array(streams, np.uint32).reshape(-1, 2)


def slot_bytes(streams: NDArray[np.uint32], n_rows: int) -> int:
    """Memory of a batch's streams that is known beforehand (of VAR streams only the offsets)."""
    widths = {gather.FIXED: 0, gather.BITS: 1, gather.VAR: 8, REF: 16}
    sizes = [(widths[int(kind)] or int(width)) * n_rows for kind, width in streams]
    return sum(-(-(size + 8) // 64) * 64 for size in sizes)


class BadValueError(ValueError):
    """Stored values that are not what their column holds, though their checksums are right."""


class Assembler:
    """Makes batches of slots. One consumer thread.

    A batch of fixed-shape columns costs one torch.frombuffer and one view a column: 1.5 us here. Where the streams of
    a slot begin follows from its rows alone (VAR values apart), so that is computed once for each batch size.
    """

    def __init__(self, schema: Schema) -> None:
        self._streams = gather_streams(schema)
        self._layouts: dict[int, list[int]] = {}
        self._makers: list[tuple[str, Callable[[Slot, int, Places], Any]]] = []
        self.object_columns: list[tuple[str, int]] = []
        first = 0
        for index, column in enumerate(schema.columns):
            streams = column.streams(0)
            if column.kind is Kind.ARROW:
                self.object_columns.append((column.name, index))
            else:
                valid = first + len(streams) - 1 if column.nullable else None
                self._makers.append((column.name, _maker(column, first, valid)))
                if valid is not None:
                    self._makers.append((f"{column.name}.valid", _tensor_maker(torch.bool, (), valid)))
            first += len(streams)
        self.order = tuple(
            name for c in schema.columns for name in ((c.name, f"{c.name}.valid") if c.nullable else (c.name,))
        )

    def batch(self, slot: Slot) -> Batch:
        """The batch in a slot, without ARROW columns. Its tensors own the slot together.

        Raises:
            OSError: EIO, a mapped source could not be read.
            BadValueError: text that is not UTF-8, JSON that is none, shapes that do not fit.
        """
        n = slot.n_rows
        places = self._layouts.get(n)
        if places is None:
            places = self._layouts[n] = [slot.places(s)[0] for s in range(len(self._streams))]
        try:
            return {name: make(slot, n, places) for name, make in self._makers}
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise BadValueError(f"a value cannot be read: {error}") from error


def valid_mask(values: Sequence[Any]) -> torch.Tensor:
    """bool[n]: which values are not None."""
    return torch.tensor([value is not None for value in values], dtype=torch.bool)


def _maker(column: Column, stream: int, valid: int | None) -> Callable[[Slot, int, Places], Any]:
    if column.kind is Kind.RAGGED:
        return _ragged_maker(column, stream)
    if column.kind in _LIST_KINDS:
        return _list_maker(column.kind, stream, valid)
    dtype = TORCH_DTYPES[column.dtype or ""]
    return _tensor_maker(dtype, tuple(d or 0 for d in column.shape), stream)


def _tensor_maker(
    dtype: torch.dtype, shape: tuple[int, ...], stream: int
) -> Callable[[Slot, int, Places], torch.Tensor]:
    n_elements = int(np.prod(shape, dtype=np.int64))
    frombuffer = torch.frombuffer

    def make(slot: Slot, n: int, places: Places) -> torch.Tensor:
        return frombuffer(slot, dtype=dtype, count=n * n_elements, offset=places[stream]).view(n, *shape)

    def make_scalars(slot: Slot, n: int, places: Places) -> torch.Tensor:
        return frombuffer(slot, dtype=dtype, count=n, offset=places[stream])

    def make_empty(_slot: Slot, n: int, _places: Places) -> torch.Tensor:  # frombuffer refuses a count of 0
        return torch.empty((n, *shape), dtype=dtype)

    return make_empty if n_elements == 0 else make if shape else make_scalars


def _list_maker(kind: Kind, stream: int, valid: int | None) -> Callable[[Slot, int, Places], list[Any]]:
    def make(slot: Slot, n: int, places: Places) -> list[Any]:
        values: list[Any]
        values = slot.bytes_list(stream) if kind in (Kind.BYTES, Kind.IMAGE) else slot.str_list(stream)
        if valid is not None:
            present = memoryview(slot)[places[valid] : places[valid] + n]
            values = [value if ok else None for value, ok in zip(values, present, strict=True)]
        if kind is Kind.JSON:
            values = [None if value is None else json.loads(value) for value in values]
        return values

    return make


def _ragged_maker(column: Column, stream: int) -> Callable[[Slot, int, Places], list[torch.Tensor]]:
    dtype, n_dims = TORCH_DTYPES[column.dtype or ""], len(column.shape)

    def make(slot: Slot, n: int, places: Places) -> list[torch.Tensor]:
        start, offsets_at, n_elements = slot.places(stream)
        memory = memoryview(slot)
        shapes = np.frombuffer(memory, np.int32, n * n_dims, places[stream + 1]).reshape(n, n_dims)
        sizes = np.diff(np.frombuffer(memory, np.int64, n + 1, offsets_at))
        if (shapes < 0).any() or not np.array_equal(np.prod(shapes, axis=1, dtype=np.int64), sizes):
            raise BadValueError(f"column {column.name!r}: shapes do not fit the number of elements")
        if n_elements == 0:
            return [torch.empty(shape, dtype=dtype) for shape in shapes.tolist()]
        values = torch.frombuffer(slot, dtype=dtype, count=n_elements, offset=start)
        parts = torch.split(values, sizes.tolist())
        return [flat.view(shape) for flat, shape in zip(parts, shapes.tolist(), strict=True)]

    return make
