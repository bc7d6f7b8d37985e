"""Batches over a slot's memory: tensors without a copy, and lists for values of varying length."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils import dlpack

from tiercache._native import gather
from tiercache._native.assembly import BufferEntry, Entries, TensorEntry
from tiercache._native.ring import Layout
from tiercache.load.buffer import Buffer
from tiercache.load.fills import stored_fill, value_of
from tiercache.load.serving import OutputSpec, is_stack_of_rows, varying
from tiercache.load.streams import gather_streams
from tiercache.shard.schema import Column, Kind, Schema

if TYPE_CHECKING:
    from tiercache._native.ring import Slot

Batch: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[["Slot", int], Any]
Entry: TypeAlias = Make | TensorEntry | BufferEntry

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}
_LIST_KINDS = (Kind.BYTES, Kind.STR, Kind.JSON, Kind.IMAGE)


class InvalidValueError(ValueError):
    """A stored value is invalid for its column although its checksum is right."""


class Assembler:
    """Builds batches from slots. It holds nothing of a slot or an epoch, so pipelines in any threads share one.

    One native call builds all tensors over the slot and all buffers, 0.35 us per tensor here; each other value takes a
    call.

    Attributes:
        streams: Kinds and widths of the streams, as the ring takes them.
        bytes_streams: Numbers of the streams that are served as lists of bytes.
        object_columns: (name, number) of the ARROW columns.
        entries: The entries that are built from a slot.
        is_native: Whether a batch consists only of such tensors and buffers.
        order: Names of a batch's entries, in order.
    """

    def __init__(self, schema: Schema, serving: OutputSpec | None = None) -> None:
        served = serving or OutputSpec()
        self.streams = gather_streams(schema, served)
        kinds = self.streams[:, 0].tolist()
        schema = served.schema(schema)
        self.bytes_streams = [number for number, kind in enumerate(kinds) if kind == gather.REF]
        entries: list[tuple[str, Entry]] = []
        self.object_columns: list[tuple[str, int]] = []
        self._object_fills: dict[str, Callable[[], Any]] = {}
        names: list[str] = []
        first = 0
        for index, column in enumerate(schema.columns):
            streams = column.streams(0)
            made = _entries(column, served, first)
            if column.kind is Kind.ARROW:
                self.object_columns.append((column.name, index))
                if column.name in served.nulls:
                    stored = stored_fill(column, served.nulls[column.name])
                    self._object_fills[column.name] = partial(value_of, column, stored)
                names += [column.name, *([f"{column.name}.valid"] if served.has_mask(column) else [])]
            entries += made
            names += [name for name, _ in made]
            first += len(streams)
        self.order = tuple(names)
        self.entries = Entries(entries, len(kinds), _from_dlpack)
        self.is_native = self.entries.is_native and not self.object_columns

    def batch(self, slot: Slot) -> Batch:
        """Return the batch in a slot, without ARROW columns. Its tensors share the ownership of the slot.

        Raises:
            OSError: A mapped source could not be read (EIO).
            InvalidValueError: Text is not UTF-8, or a JSON value cannot be parsed.
        """
        try:
            return self.entries.batch(slot)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InvalidValueError(f"a value cannot be read: {error}") from error

    def filled(self, name: str, values: list[Any]) -> list[Any]:
        """Return an ARROW column's objects with nulls replaced by its fill value, if it has one."""
        make = self._object_fills.get(name)
        return values if make is None else [make() if value is None else value for value in values]


def valid_mask(values: Sequence[Any]) -> torch.Tensor:
    """Return bool[n]: which values are not None."""
    return torch.tensor([value is not None for value in values], dtype=torch.bool, device="cpu")


def _entries(column: Column, serving: OutputSpec, first: int) -> list[tuple[str, Entry]]:
    """Return a column's entries in a batch; its streams begin with number `first`. ARROW columns have none."""
    if column.kind is Kind.ARROW:
        return []
    valid = first + len(column.streams(0)) - 1 if serving.has_mask(column) else None
    form, name = serving.layout(column), column.name
    entries: list[tuple[str, Entry]]
    if form == "padded":
        entries = [(name, _padded_maker(column, first)), (f"{name}.lengths", _lengths_maker(column, first))]
    elif form == "buffer":
        entries = [(name, _buffer_entry(column, first))]
    elif form == "nested":
        entries = [(name, _nested_maker(column, first))]
    elif column.kind is Kind.RAGGED:
        entries = [(name, _ragged_maker(column, first))]
    elif column.kind in _LIST_KINDS:
        entries = [(name, _list_maker(column.kind, first, valid))]
    else:
        entries = [(name, _tensor_entry(_dtype(column), tuple(d or 0 for d in column.shape), first))]
    if valid is not None:
        entries.append((f"{name}.valid", _tensor_entry(torch.bool, (), valid)))
    return entries


def _dtype(column: Column) -> torch.dtype:
    return TORCH_DTYPES[column.dtype or "uint8"]


def _tensor_entry(dtype: torch.dtype, shape: tuple[int, ...], stream: int) -> Make | TensorEntry:
    layout = _layout(dtype, shape)
    if layout is not None:
        return TensorEntry(stream, layout)
    over = _tensors_over(dtype, shape)
    return lambda slot, n: over(slot, slot.places(stream)[0], n)


def _tensors_over(dtype: torch.dtype, shape: tuple[int, ...] = ()) -> Callable[[Slot, int, int], torch.Tensor]:
    """Return a function that makes a tensor [n, *shape] over a slot, from the slot, an offset in bytes and n.

    Through DLPack it takes 0.35 us here; a NumPy array plus a tensor takes 0.55, torch.frombuffer plus view 1.1.
    """
    # An empty tensor would have the address of the next stream, and torch.save refuses two dtypes at one address.
    if 0 in shape:
        return lambda _slot, _offset, n: torch.empty((n, *shape), dtype=dtype, device="cpu")
    if (layout := _layout(dtype, shape)) is None:
        stored = np.dtype(str(dtype).removeprefix("torch."))
        array: Callable[..., Any] = np.ndarray  # NumPy's stubs accept only built-in buffers
        return lambda slot, offset, n: torch.from_numpy(array((n, *shape), stored, slot, offset))
    return lambda slot, offset, n: _from_dlpack(slot.tensor(layout, offset, n))


def _layout(dtype: torch.dtype, shape: tuple[int, ...] = ()) -> Layout | None:
    """Return the memory layout of rows; None if they have no elements or this torch cannot import them by DLPack."""
    code = None if 0 in shape else _dlpack_code(dtype)
    return None if code is None else Layout(code, 8 * dtype.itemsize, shape)


# torch.from_dlpack examines its argument for 0.1 us, and then calls this.
_from_dlpack: Callable[[object], torch.Tensor] = getattr(torch._C, "_from_dlpack", dlpack.from_dlpack)  # noqa: SLF001


@cache
def _dlpack_code(dtype: torch.dtype) -> int | None:
    """Return DLPack's number of a kind of dtype; None if this torch does not import it."""
    if dtype is torch.bfloat16:
        return 4
    array = np.zeros(1, str(dtype).removeprefix("torch."))
    try:
        _from_dlpack(array.__dlpack__())
    except (RuntimeError, BufferError):
        return None
    return {"i": 0, "u": 1, "f": 2, "b": 6}[array.dtype.kind]


def _list_maker(kind: Kind, stream: int, valid: int | None) -> Make:
    as_bytes = kind in (Kind.BYTES, Kind.IMAGE)

    def make(slot: Slot, n: int) -> list[Any]:
        values: list[Any] = slot.bytes_list(stream) if as_bytes else slot.str_list(stream)
        if valid is not None:
            at = slot.places(valid)[0]
            present = bytes(memoryview(slot)[at : at + n])
            null = present.find(0)
            while null >= 0:
                values[null] = None
                null = present.find(0, null + 1)
        if kind is Kind.JSON:
            values = [None if value is None else json.loads(value) for value in values]
        return values

    return make


def _ragged_maker(column: Column, stream: int) -> Make:
    dtype, n_dims, rows = _dtype(column), len(column.shape), is_stack_of_rows(column)
    inner = tuple(d or 0 for d in column.shape[1:])

    def make(slot: Slot, n: int) -> list[torch.Tensor]:
        start, offsets_at, n_elements = slot.places(stream)
        memory = memoryview(slot)
        shapes = np.frombuffer(memory, np.int32, n * n_dims, slot.places(stream + 1)[0]).reshape(n, n_dims)
        if n_elements == 0:
            return [torch.empty(shape, dtype=dtype, device="cpu") for shape in shapes.tolist()]
        values = torch.frombuffer(slot, dtype=dtype, count=n_elements, offset=start)
        if rows:  # torch.split on the rows: a view per record would cost as much again
            return list(torch.split(values.view(-1, *inner) if inner else values, shapes[:, 0].tolist()))
        sizes = np.diff(np.frombuffer(memory, np.int64, n + 1, offsets_at))
        parts = torch.split(values, sizes.tolist())
        return [flat.view(shape) for flat, shape in zip(parts, shapes.tolist(), strict=True)]

    return make


def _padded_maker(column: Column, stream: int) -> Make:
    dtype, n_varying = _dtype(column), len(varying(column))
    unpack = struct.Struct(f"<{n_varying}q").unpack_from
    dims = [d or 0 for d in column.shape] or [0]
    vary = varying(column)

    def make(slot: Slot, n: int) -> torch.Tensor:
        start, head, n_elements = slot.places(stream)
        box = dims.copy()
        for dimension, longest in zip(vary, unpack(slot, head + 8 * (n + 1 + n * n_varying)), strict=True):
            box[dimension] = longest
        if n_elements == 0:
            return torch.empty((n, *box), dtype=dtype, device="cpu")
        return torch.frombuffer(slot, dtype=dtype, count=n_elements, offset=start).view(n, *box)

    return make


def _lengths_maker(column: Column, stream: int) -> Make:
    n_varying = len(varying(column))

    over = _tensors_over(torch.int64, (n_varying,) if n_varying > 1 else ())
    return lambda slot, n: over(slot, slot.places(stream)[1] + 8 * (n + 1), n)


def _buffer_entry(column: Column, stream: int) -> Make | BufferEntry:
    make, inner = _buffer_maker(column, stream), tuple(d or 0 for d in column.shape[1:])
    values, offsets = _layout(_dtype(column), inner), _layout(torch.int64)
    if values is None or offsets is None or not is_stack_of_rows(column):
        return make
    return BufferEntry(stream, values, offsets, Buffer, make)


def _buffer_maker(column: Column, stream: int) -> Callable[[Slot, int], Buffer]:
    dtype, n_dims, rows = _dtype(column), len(column.shape), is_stack_of_rows(column)
    inner = tuple(d or 0 for d in column.shape[1:]) if rows else ()
    n_inner = math.prod(inner)
    values_over, offsets_over = _tensors_over(dtype, inner), _tensors_over(torch.int64)
    shapes_over = _tensors_over(torch.int32, (n_dims,))

    def make(slot: Slot, n: int) -> Buffer:
        start, offsets_at, n_elements = slot.places(stream)
        offsets = offsets_over(slot, offsets_at, n + 1)
        if n_elements == 0:
            values = torch.empty((int(offsets[-1]) if inner else 0, *inner), dtype=dtype, device="cpu")
        else:
            values = values_over(slot, start, n_elements // n_inner)
        return Buffer(values, offsets, None if rows else shapes_over(slot, slot.places(stream + 1)[0], n))

    return make


def _nested_maker(column: Column, stream: int) -> Make:
    make_buffer = _buffer_maker(column, stream)

    def make(slot: Slot, n: int) -> torch.Tensor:
        buffer = make_buffer(slot, n)
        nested: torch.Tensor = torch.nested.nested_tensor_from_jagged(buffer.values, buffer.offsets)
        return nested

    return make
