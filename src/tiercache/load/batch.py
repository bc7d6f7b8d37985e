"""Batches: the ring's description of a schema, the assembly of tensors and lists over a slot, and collate().

Batch memory is reused: decoded batches return it when their last tensor is dropped. PipelineSetup is what the pipelines
of a run have in common.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import struct
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import dlpack

from tiercache._native import gather
from tiercache._native.ring import ArenaKeeper, BatchBuilder, BufferEntry, Layout, TensorEntry
from tiercache.load.output_spec import (
    Buffer,
    LazyRecords,
    OutputSpec,
    apply_layouts,
    as_columns,
    is_stack_of_rows,
    stored_fill,
    stream_fills,
    value_of,
    varying,
)
from tiercache.shard.conversion import cast_kind, size_ratio
from tiercache.shard.read.values import ColumnValues
from tiercache.shard.schema import Column, Kind, Schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache._native.ring import Slot
    from tiercache.views import Records


Bytes = npt.NDArray[np.uint8]

# A little less than the largest block for which glibc changes its thresholds.
_LARGEST_BYTES = (32 << 20) - (64 << 10)

_lent: dict[int, int] = {}  # token -> bytes, for the whole process; single dict operations need no lock
_tokens = itertools.count()


class BatchMemory:
    """Lends byte arrays, which return by themselves in the thread that drops the last reference.

    A loader keeps one for its life: an epoch that began with fresh pages decoded its first 200 images at 1,050 us each,
    later ones at 800. All methods and `keep` may be used from any thread.

    Attributes:
        keep: Maximum number of returned arrays of one size that are kept; others are freed.
    """

    def __init__(self, keep: int = 0) -> None:
        self.keep = keep
        self._rings_spare = ArenaKeeper()  # keeps the ring's pages for the next epoch in the same way
        # By size. Any thread, including finalizers, appends and pops by single operations, which need no lock.
        self._free: defaultdict[int, deque[Bytes]] = defaultdict(deque)

    def lend(self, n_bytes: int, size_bytes: int) -> Bytes:
        """Return uint8[n_bytes], writable, with arbitrary content.

        The memory returns when nothing refers to *this* array any more. A tensor made by torch.frombuffer refers to it;
        a NumPy view does not (NumPy's views refer to the array that owns the memory).
        """
        try:
            memory = self._free[size_bytes].pop()  # the last one returned: part of it is still in a processor's cache
        except IndexError:
            memory = np.empty(size_bytes, np.uint8)
        lent = memory[:n_bytes]
        token = next(_tokens)
        _lent[token] = size_bytes
        weakref.finalize(lent, _give_back, token, memory, self).atexit = False
        return lent

    @property
    def free_bytes(self) -> int:
        """Bytes of memory that are kept for later requests."""
        return sum(size_bytes * len(free) for size_bytes, free in list(self._free.items()))

    def take_back(self, memory: Bytes) -> None:
        """Keep returned memory for the next request of its size."""
        free = self._free[memory.size]
        if len(free) < self.keep:
            free.append(memory)


def lent_bytes() -> int:
    """Return the bytes of memory that are lent now, in the whole process."""
    return sum(list(_lent.values()))


@cache
def keep_freed_memory() -> None:
    """Let malloc keep up to 64 MiB that lists of objects free, for the objects of the next batches.

    glibc returns the end of its heap to the system as soon as 128 KiB there are free: the objects of each batch of 5 MB
    took 200 fresh pages, and half of the processor time was the kernel's. glibc stops doing so after one large block is
    freed, as in any program that frees a large array; no page of the block is touched. MALLOC_* settings and other
    malloc libraries keep their behaviour.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    libc.free(libc.malloc(_LARGEST_BYTES))


def _give_back(token: int, memory: Bytes, owner: BatchMemory) -> None:
    _lent.pop(token, None)
    owner.take_back(memory)


PADDED = 4  # csrc/output_layout.h
# Words of a stream's row in the table of layouts (struct tc_output_layout).
_EARLY, _VALID, _FILL, _FILL_BYTES, _SHAPE, _DIMS, _N_DIMS, _IN_ROWS, _N_WORDS = range(9)
_NONE = 2**64 - 1
_BYTES_LIKE = (Kind.BYTES, Kind.STR, Kind.IMAGE, Kind.JSON)


def gather_streams(schema: Schema, output_spec: OutputSpec | None = None) -> NDArray[np.uint32]:
    """Return (kind, width in bytes) of each stream of the columns, uint32[n_streams, 2], as the ring takes them.

    schema: as stored. The higher bytes of a kind state how its column is cast.
    """
    served = output_spec or OutputSpec()
    streams: list[tuple[int, int]] = []
    for column in schema.columns:
        for stream in column.streams(0):
            kind = _values_kind(column, served) if stream.role == "values" else None
            kind = stream.kind if kind is None else kind
            if stream.role == "values":
                kind = cast_kind(kind, column, served.column(column))
            streams.append((kind, stream.width_bytes))
    return np.array(streams, np.uint32).reshape(-1, 2)


def _values_kind(column: Column, output_spec: OutputSpec) -> int | None:
    """Return the kind of a stream of values if it differs from the stored one."""
    form = output_spec.layout(column)
    if form == "padded":
        return PADDED
    return gather.REF if form == "list" and column.kind in (Kind.BYTES, Kind.IMAGE) else None


def slot_bytes(streams: NDArray[np.uint32], n_rows: int) -> int:
    """Return the bytes of a batch's streams that are known in advance (only the offsets for varying lengths)."""
    widths = {gather.FIXED: 0, gather.BITS: 1, gather.VAR: 8, gather.REF: 16, PADDED: 16}
    sizes = []
    for kind, width in streams.tolist():
        size = widths[kind & 0xFF] or width
        is_of_elements = kind & 0xFF in (gather.FIXED, gather.BITS)
        sizes.append((size * size_ratio(kind) if is_of_elements else size) * n_rows)
    return sum(-(-(int(size) + 8) // 64) * 64 for size in sizes)


def layout_table(schema: Schema, output_spec: OutputSpec) -> NDArray[np.uint64] | None:
    """Return the table of column layouts and fill values, as Plan takes it; None if no stream needs it.

    Returns:
        uint64[n]: a struct tc_output_layout for each stream, followed by the data that they point to, in the same
        array. So the array must not be copied or moved.
    """
    tail = bytearray()
    rows: list[list[int]] = []
    for column in schema.columns:
        rows += _column_rows(column, output_spec, len(rows), tail)
    if not any(row[_EARLY] or row[_N_DIMS] or row[_VALID] != _NONE for row in rows):
        return None
    table = np.zeros(len(rows) * _N_WORDS + len(tail) // 8, np.uint64)
    n_words = len(rows) * _N_WORDS
    words = table[:n_words].reshape(-1, _N_WORDS)
    words[:] = rows
    words[:, [_FILL, _DIMS]] += np.uint64(table.ctypes.data + 8 * n_words)
    table[n_words:] = np.frombuffer(tail, np.uint64)
    return table


def _column_rows(column: Column, output_spec: OutputSpec, first: int, tail: bytearray) -> list[list[int]]:
    """Return a column's rows of the table; its streams begin with number `first`. Pointers are offsets into `tail`."""
    column = output_spec.column(column)  # fill values have the served dtype; a cast column has the same streams
    streams, form = column.streams(0), output_spec.layout(column)
    rows = [[0, _NONE, 0, 0, _NONE, 0, 0, 0] for _ in streams]
    if not rows:
        return rows
    ragged = column.kind is Kind.RAGGED
    if column.name in output_spec.nulls:
        for row, fill in zip(rows, stream_fills(column, output_spec.nulls[column.name]), strict=False):
            row[_VALID], row[_FILL], row[_FILL_BYTES] = first + len(streams) - 1, _put(tail, fill), len(fill)
        rows[-1][_EARLY] = 1
    if ragged or form == "padded":
        dims = np.array([-1 if d is None else d for d in column.shape] or [-1], np.int64)
        rows[0][_DIMS], rows[0][_N_DIMS] = _put(tail, dims.tobytes()), len(dims)
    if ragged:
        rows[0][_SHAPE] = first + 1
        rows[0][_IN_ROWS] = int(form in ("buffer", "nested") and is_stack_of_rows(column))
        rows[1][_EARLY] = 1
    return rows


def _put(tail: bytearray, data: Any) -> int:
    """Append data to the tail at a multiple of 8 bytes; return its offset."""
    start = len(tail)
    tail += data
    tail += bytes(-len(tail) % 8)
    return start


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

    def __init__(self, schema: Schema, output_spec: OutputSpec | None = None) -> None:
        served = output_spec or OutputSpec()
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
        self.entries = BatchBuilder(entries, len(kinds), _from_dlpack)
        self.is_native = self.entries.is_native and not self.object_columns

    def batch(self, slot: Slot) -> Batch:
        """Return the batch in a slot, without ARROW columns. Its tensors share the ownership of the slot.

        Raises:
            OSError: A mapped source could not be read (EIO).
            InvalidValueError: Text is not UTF-8, or a JSON value cannot be parsed.
        """
        try:
            return self.entries.build(slot)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InvalidValueError(f"a value cannot be read: {error}") from error

    def filled(self, name: str, values: list[Any]) -> list[Any]:
        """Return an ARROW column's objects with nulls replaced by its fill value, if it has one."""
        make = self._object_fills.get(name)
        return values if make is None else [make() if value is None else value for value in values]


def valid_mask(values: Sequence[Any]) -> torch.Tensor:
    """Return bool[n]: which values are not None."""
    return torch.tensor([value is not None for value in values], dtype=torch.bool, device="cpu")


def _entries(column: Column, output_spec: OutputSpec, first: int) -> list[tuple[str, Entry]]:
    """Return a column's entries in a batch; its streams begin with number `first`. ARROW columns have none."""
    if column.kind is Kind.ARROW:
        return []
    valid = first + len(column.streams(0)) - 1 if output_spec.has_mask(column) else None
    form, name = output_spec.layout(column), column.name
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
    return lambda slot, n: over(slot, slot.stream_position(stream)[0], n)


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
            at = slot.stream_position(valid)[0]
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
        start, offsets_at, n_elements = slot.stream_position(stream)
        memory = memoryview(slot)
        shapes = np.frombuffer(memory, np.int32, n * n_dims, slot.stream_position(stream + 1)[0]).reshape(n, n_dims)
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
        start, head, n_elements = slot.stream_position(stream)
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
    return lambda slot, n: over(slot, slot.stream_position(stream)[1] + 8 * (n + 1), n)


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
        start, offsets_at, n_elements = slot.stream_position(stream)
        offsets = offsets_over(slot, offsets_at, n + 1)
        if n_elements == 0:
            values = torch.empty((int(offsets[-1]) if inner else 0, *inner), dtype=dtype, device="cpu")
        else:
            values = values_over(slot, start, n_elements // n_inner)
        return Buffer(values, offsets, None if rows else shapes_over(slot, slot.stream_position(stream + 1)[0], n))

    return make


def _nested_maker(column: Column, stream: int) -> Make:
    make_buffer = _buffer_maker(column, stream)

    def make(slot: Slot, n: int) -> torch.Tensor:
        buffer = make_buffer(slot, n)
        nested: torch.Tensor = torch.nested.nested_tensor_from_jagged(buffer.values, buffer.offsets)
        return nested

    return make


class PipelineSetup:
    """Values that the pipelines of one source and output spec share; the engine keeps them from epoch to epoch.

    Computing them takes 0.3 ms after batches have evicted the code from the processor's caches (0.03 ms if they have
    not).

    Attributes:
        assembler: Builder of batches, in which images to decode are buffers.
        varies: Whether records differ in length.
        stored_bytes, largest_bytes: Stored size of all shards, and of the largest.
        layouts: See `layout_table`.
    """

    def __init__(self, source: Records, output_spec: OutputSpec | None = None) -> None:
        self.source = source
        self.output_spec = output_spec or OutputSpec()
        gathered = self.output_spec.without_decoding()
        self.assembler = Assembler(source.schema, gathered)
        self.varies = bool((self.assembler.streams[:, 0] & 0xFF == gather.VAR).any())
        self.stored_bytes = int(source.shard_bytes.sum())
        self.largest_bytes = int(source.shard_bytes.max(initial=1))
        self._n_records = max(int(source.shard_records.sum()), 1)
        self.layouts = layout_table(source.schema, gathered)

    def slot_bytes(self, n_rows: int) -> tuple[int, int]:
        """Return the memory of a new slot, and the estimated bytes of a batch."""
        expected_bytes = slot_bytes(self.assembler.streams, n_rows)
        about_bytes = self.stored_bytes // self._n_records * n_rows
        if self.varies:  # with room for a batch that is longer than most
            expected_bytes = max(expected_bytes, about_bytes + about_bytes // 8)
        return expected_bytes, max(expected_bytes, about_bytes)


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
    if isinstance(records, LazyRecords) and records.as_gathered:
        batch = {name: _tensor(values) for name, values in apply_layouts(records.columns, records.output_spec).items()}
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
