"""Batches: their memory, the ring's description of a schema, and the assembly of arrays and lists over a slot.

Batch memory is reused: it returns when the last tensor over it is dropped. PipelineSetup is what the pipelines of a run
have in common. An array library says what batches consist of: loader.py has torch's, numpy_loader.py NumPy's.
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
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from tiercache._native import gather, packing
from tiercache._native.ring import SLOT_ALIGN, ArenaKeeper, BatchBuilder, BufferEntry, RowType, Slot, TensorEntry
from tiercache.data.output_spec import (
    Buffer,
    OutputSpec,
    is_stack_of_rows,
    stored_fill,
    stream_fills,
    value_of,
    varying,
)
from tiercache.data.records import Records
from tiercache.errors import SchemaError
from tiercache.shard.schema import STORED, Column, Kind, Schema
from tiercache.shard.values import cast_kind, size_ratio

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]

# A little less than the largest block for which glibc changes its thresholds.
_LARGEST_BYTES = (32 << 20) - (64 << 10)

_lent: dict[int, int] = {}  # token -> bytes, for the whole process; single dict operations need no lock

_tokens = itertools.count()


class BatchMemory:
    """Lends byte arrays, which return by themselves in the thread that drops the last reference.

    A loader keeps one for its life: an epoch that began with fresh pages decoded its first 200 images at 1,050 us each,
    later ones at 800. All methods and `keep` may be used from any thread.
    """

    def __init__(self, keep: int = 0) -> None:
        self.keep = keep  # maximum number of returned arrays of one size; others are freed
        self._rings_spare = ArenaKeeper()  # keeps the ring's pages for the next epoch in the same way
        # By size. Any thread, including finalizers, appends and pops by single operations, which need no lock.
        self._free: defaultdict[int, deque[Bytes]] = defaultdict(deque)

    def lend(self, n_bytes: int, size_bytes: int) -> Bytes:
        """Return uint8[n_bytes], writable, with arbitrary content: the first bytes of an array of size_bytes.

        size_bytes: size of the array to take or to allocate; one size is reused for all requests of that size.

        The memory returns when nothing refers to *this* array any more. An array of `ArrayLibrary.over` refers to it; a
        NumPy view does not (NumPy's views refer to the array that owns the memory).
        """
        try:
            memory = self._free[size_bytes].pop()  # the last one returned: part of it is still in a processor's cache
        except IndexError:
            memory = self._allocate(size_bytes)
        return lend(memory, n_bytes, partial(self.take_back, memory))

    def _allocate(self, n_bytes: int) -> Bytes:
        return np.empty(n_bytes, np.uint8)

    def take_back(self, memory: Bytes) -> None:
        free = self._free[memory.size]
        if len(free) < self.keep:
            free.append(memory)


def lend(memory: Bytes, n_bytes: int, take_back: Callable[[], None]) -> Bytes:
    """Return the first n_bytes of memory as an array; take_back is called when nothing refers to *this* array any more.

    take_back runs in the thread that drops the last reference, perhaps in the garbage collector: it must take no lock.
    """
    lent = memory[:n_bytes]
    token = next(_tokens)
    _lent[token] = memory.size
    weakref.finalize(lent, _give_back, token, take_back).atexit = False
    return lent


def lent_bytes() -> int:
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


def _give_back(token: int, take_back: Callable[[], None]) -> None:
    _lent.pop(token, None)
    take_back()


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // SLOT_ALIGN) * SLOT_ALIGN


class PinnedMemory(BatchMemory):
    """Lends pinned memory and finds the slot of an address. See BatchMemory; all methods may be called from any thread.

    The memory of a ring is allocated once and kept from epoch to epoch; an iterator that overlaps another gets memory
    of its own. Memory may return in any thread and at any instant, because the garbage collector runs finalizers. So
    containers are changed by single operations only, which need no lock. n_held: slots that the consumer's side of a
    ring holds at a time.
    """

    def __init__(self, pin: Callable[[int], torch.Tensor], n_held: int) -> None:
        super().__init__(n_held)
        self._pin = pin
        self.n_held = n_held
        self._blocks: dict[int, tuple[torch.Tensor, int]] = {}  # by address: memory, and the bytes of its slots
        self._free_arenas: deque[tuple[Bytes, int]] = deque()  # memory, and the bytes of its slots
        self._largest_bytes = 0
        self._tensors: tuple[int, deque[torch.Tensor]] = 0, deque()  # bytes of each, and those that are not lent

    def slot_bytes(self, expected_bytes: int) -> int:
        return aligned(max(expected_bytes + 1, self._largest_bytes))

    def note_largest(self, n_bytes: int) -> None:
        self._largest_bytes = max(self._largest_bytes, n_bytes)

    def lend_arena(self, slot_bytes: int, n_slots: int) -> tuple[Bytes, int]:
        """Return memory for the slots of a ring, and their size: slot_bytes or more, a multiple of SLOT_ALIGN.

        The memory returns when nothing refers to the array any more.
        """
        memory: Bytes | None = None
        while memory is None and self._free_arenas:
            kept, kept_bytes = self._free_arenas.popleft()
            if kept_bytes >= slot_bytes and kept.size >= kept_bytes * n_slots:
                memory, slot_bytes = kept, kept_bytes
            else:  # outgrown
                self._forget(kept)
        if memory is None:
            memory = self._allocate(slot_bytes * n_slots, slot_bytes)
        lent = memory[:]
        weakref.finalize(lent, self._free_arenas.append, (memory, slot_bytes)).atexit = False
        return lent, slot_bytes

    def lend_tensor(self, n_bytes: int) -> tuple[Bytes, torch.Tensor] | None:
        """Return lent memory of n_bytes, and a tensor over it, which does not keep it; None if there is none."""
        size_bytes, free = self._tensors
        try:
            tensor = free.pop() if n_bytes <= size_bytes else None
        except IndexError:
            tensor = None
        if tensor is None:
            return None
        return lend(tensor.numpy(), n_bytes, partial(free.append, tensor)), tensor[:n_bytes]

    def allocate_tensor(self, n_bytes: int) -> tuple[Bytes, torch.Tensor]:
        """Do as lend_tensor(), and allocate memory for n_held tensors if there is none."""
        if n_bytes > self._tensors[0]:
            step = max(SLOT_ALIGN, 1 << max(0, n_bytes.bit_length() - 3))  # little larger tensors share the memory
            self._tensors = -(-n_bytes // step) * step, deque()  # smaller memory is freed when it returns
        size_bytes, free = self._tensors
        while (found := self.lend_tensor(n_bytes)) is None:
            free.extend([self._pin(size_bytes) for _ in range(self.n_held)])
        return found

    def take_back(self, memory: Bytes) -> None:
        free = self._free[memory.size]
        free.append(memory)
        while len(free) > self.keep:
            self._forget(free.popleft())

    def find_slot(self, address: int) -> torch.Tensor | None:
        for start, (memory, slot_bytes) in list(self._blocks.items()):
            if start <= address < start + memory.numel():
                first = (address - start) // slot_bytes * slot_bytes
                return memory[first : first + slot_bytes]
        return None

    def _allocate(self, n_bytes: int, slot_bytes: int | None = None) -> Bytes:
        pinned = self._pin(n_bytes)
        self._blocks[pinned.data_ptr()] = pinned, slot_bytes or n_bytes
        memory: Bytes = pinned.numpy()
        return memory

    def _forget(self, memory: Bytes) -> None:
        self._blocks.pop(memory.ctypes.data, None)


def numpy_dtype(dtype: str, column: str | None = None) -> np.dtype[Any]:
    if dtype != "bfloat16":
        return np.dtype(dtype)
    try:
        bfloat16: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
    except ModuleNotFoundError as error:
        message = "NumPy itself has no bfloat16: install ml_dtypes, or serve float32 (cast=, or DecodeImage's dtype=)"
        raise SchemaError(message, column=column, expected="ml_dtypes", got="no ml_dtypes") from error
    return bfloat16


class _Held:
    """An array that arrays over its memory keep alive.

    An array over an array refers to the owner of the memory instead, and BatchMemory takes the memory back at the end
    of the array that it lent.
    """

    def __init__(self, array: Bytes) -> None:
        self.array, self.__array_interface__ = array, array.__array_interface__


class ArrayLibrary:
    """What batches consist of: NumPy's arrays, or those of a subclass. Stateless and picklable.

    from_dlpack: None if rows_over() makes all arrays, because an array that NumPy makes of a capsule is read-only;
    nested: function that makes the jagged nested array of (values end to end, offsets).
    """

    profiler: Any = SimpleNamespace(_is_profiler_enabled=False)
    from_dlpack: Callable[[object], Any] | None = None
    nested: Callable[[Any, Any], Any] | None = None

    def row_type(self, dtype: str, shape: tuple[int, ...]) -> RowType | None:  # noqa: ARG002
        return None

    def rows_over(self, dtype: str, shape: tuple[int, ...] = ()) -> Callable[[Slot, int, int], Any]:
        """Return a function that makes an array [n, *shape] of a column, from the slot, an offset in bytes and n.

        The array lies over the slot, or, if it is small, in memory of its own.
        """
        kind = numpy_dtype(dtype)
        if 0 in shape:
            return lambda _slot, _offset, n: np.empty((n, *shape), kind)
        array: Callable[..., Any] = np.ndarray  # NumPy's stubs accept only built-in buffers
        row_bytes = math.prod(shape) * kind.itemsize
        if not shape:  # building a tuple takes a sixth of the time of the array
            return lambda slot, offset, n: array(n, kind, slot.column(offset, n * row_bytes))
        return lambda slot, offset, n: array((n, *shape), kind, slot.column(offset, n * row_bytes))

    def over(self, memory: Any, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Any:
        """Return an array with one element or more over a writable buffer, which it keeps alive. offset: in bytes."""
        if isinstance(memory, np.ndarray):
            memory = np.asarray(_Held(memory))
        return np.frombuffer(memory, numpy_dtype(dtype), math.prod(shape), offset).reshape(shape)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return np.empty(tuple(shape), numpy_dtype(dtype))

    def split(self, array: Any, sizes: list[int]) -> Sequence[Any]:
        return [array[start:stop] for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0))]

    def from_numpy(self, stored: Any, dtype: str) -> Any:
        """Return an array over the memory of a NumPy array that has the stored elements (bfloat16: their bits)."""
        return stored.view(numpy_dtype(dtype)) if dtype == "bfloat16" else stored


PADDED = 4  # csrc/output_layout.h

# Words of a stream's row in the table of layouts (struct tc_output_layout).
_GATHERED_FIRST, _VALID, _FILL, _FILL_BYTES, _SHAPE, _DIMS, _N_DIMS, _COUNTS_ROWS = range(8)

_PADDING, _MULTIPLE_OF, _MAX_LENGTH, _TRUNCATES, _N_WORDS = range(8, 13)

_NO_STREAM = 2**64 - 1

_NO_LIMIT = 2**63 - 1

_BYTES_LIKE = (Kind.BYTES, Kind.STR, Kind.IMAGE, Kind.JSON)

_ON_HOST = 1 << 24  # csrc/gather.h: on_host


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
    layout = output_spec.layout(column)
    if layout == "padded":
        return PADDED
    return gather.REF if layout == "list" and column.kind in (Kind.BYTES, Kind.IMAGE) else None


def slot_bytes(streams: NDArray[np.uint32], n_rows: int) -> int:
    widths = {gather.FIXED: 0, gather.BITS: 1, gather.VAR: 8, gather.REF: 16, PADDED: 16, packing.PACKED: 0}
    sizes = []
    for kind, width in streams.tolist():
        size = widths[kind & 0xFF] or width
        is_of_elements = kind & 0xFF in (gather.FIXED, gather.BITS)
        sizes.append((size * size_ratio(kind) if is_of_elements else size) * n_rows)
    return sum(-(-(int(size) + 8) // 64) * 64 for size in sizes)


def layout_table(schema: Schema, output_spec: OutputSpec) -> NDArray[np.uint64] | None:
    """Return the table of column layouts and fill values, as Plan takes it; None if no stream needs it.

    A struct tc_output_layout for each stream, followed by the data that they point to, in the same array: it must not
    be copied or moved.
    """
    tail = bytearray()
    rows: list[list[int]] = []
    for column in schema.columns:
        rows += _column_rows(column, output_spec, len(rows), tail)
    if not any(row[_GATHERED_FIRST] or row[_N_DIMS] or row[_VALID] != _NO_STREAM for row in rows):
        return None
    table = np.zeros(len(rows) * _N_WORDS + len(tail) // 8, np.uint64)
    n_words = len(rows) * _N_WORDS
    words = table[:n_words].reshape(-1, _N_WORDS)
    words[:] = rows
    words[:, [_FILL, _DIMS]] += np.uint64(table.ctypes.data + 8 * n_words)
    table[n_words:] = np.frombuffer(tail, np.uint64)
    return table


def _column_rows(column: Column, output_spec: OutputSpec, first: int, tail: bytearray) -> list[list[int]]:
    column = output_spec.column(column)  # fill values have the served dtype; a cast column has the same streams
    streams, layout = column.streams(0), output_spec.layout(column)
    rows = [[0, _NO_STREAM, 0, 0, _NO_STREAM, 0, 0, 0, 0, 1, _NO_LIMIT, 0] for _ in streams]
    if not rows:
        return rows
    ragged = column.kind is Kind.RAGGED
    if column.name in output_spec.nulls:
        for row, fill in zip(rows, stream_fills(column, output_spec.nulls[column.name]), strict=False):
            row[_VALID], row[_FILL], row[_FILL_BYTES] = first + len(streams) - 1, _put(tail, fill), len(fill)
        rows[-1][_GATHERED_FIRST] = 1
    if ragged or layout == "padded":
        dims = np.array([-1 if d is None else d for d in column.shape] or [-1], np.int64)
        rows[0][_DIMS], rows[0][_N_DIMS] = _put(tail, dims.tobytes()), len(dims)
    if layout == "padded":
        padding = output_spec.padding(column)
        rows[0][_PADDING] = int.from_bytes(padding.stored_value(column).tobytes(), "little")
        rows[0][_MULTIPLE_OF], rows[0][_TRUNCATES] = padding.multiple_of, int(padding.truncate)
        rows[0][_MAX_LENGTH] = padding.max_length or _NO_LIMIT
    if ragged:
        rows[0][_SHAPE] = first + 1
        rows[0][_COUNTS_ROWS] = int(layout in ("buffer", "nested") and is_stack_of_rows(column))
        rows[1][_GATHERED_FIRST] = 1
    return rows


def _put(tail: bytearray, data: Any) -> int:
    start = len(tail)
    tail += data
    tail += bytes(-len(tail) % 8)
    return start


Batch: TypeAlias = dict[str, Any]

Make: TypeAlias = Callable[["Slot", int], Any]

Entry: TypeAlias = Make | TensorEntry | BufferEntry

_LIST_KINDS = (Kind.BYTES, Kind.STR, Kind.JSON, Kind.IMAGE)


class InvalidValueError(ValueError):
    """A stored value is invalid for its column although its checksum is right."""


class Assembler:
    """Builds batches from slots. It holds nothing of a slot or an epoch, so pipelines in any threads share one.

    One native call builds all tensors over the slot and all buffers, 0.35 us per tensor here; each other value takes a
    call. is_native: whether a batch consists only of such tensors and buffers.
    """

    def __init__(self, schema: Schema, served: OutputSpec, library: ArrayLibrary) -> None:
        self.library = library
        self.streams = gather_streams(schema, served)
        kinds = self.streams[:, 0].tolist()
        schema = served.schema(schema)
        self.bytes_streams = [number for number, kind in enumerate(kinds) if kind & 0xFF == gather.REF]
        entries: list[tuple[str, Entry]] = []
        self.object_columns: list[tuple[str, int]] = []
        self._object_fills: dict[str, Callable[[], Any]] = {}
        names: list[str] = []
        first = 0
        for index, column in enumerate(schema.columns):
            streams = column.streams(0)
            made = _entries(column, served, first, library)
            if column.kind in (Kind.STR, Kind.JSON) and served.layout(column) == "list":
                self.streams[first, 0] |= _ON_HOST
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
        self.entries = BatchBuilder(entries, len(kinds), library.from_dlpack)
        self.is_native = self.entries.is_native and not self.object_columns

    def batch(self, slot: Slot) -> Batch:
        """Return the batch in a slot, without ARROW columns. OSError: a mapped source could not be read (EIO)."""
        try:
            return self.entries.build(slot)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InvalidValueError(f"a value cannot be read: {error}") from error

    def filled(self, name: str, values: list[Any]) -> list[Any]:
        make = self._object_fills.get(name)
        return values if make is None else [make() if value is None else value for value in values]


def _entries(column: Column, output_spec: OutputSpec, first: int, library: ArrayLibrary) -> list[tuple[str, Entry]]:
    if column.kind is Kind.ARROW:
        return []
    valid = first + len(column.streams(0)) - 1 if output_spec.has_mask(column) else None
    layout, name = output_spec.layout(column), column.name
    entries: list[tuple[str, Entry]]
    if layout == "padded":
        lengths = _lengths_maker(column, first, library)
        entries = [(name, _padded_maker(column, first, library)), (f"{name}.lengths", lengths)]
    elif layout == "buffer":
        entries = [(name, _buffer_entry(column, first, library))]
    elif layout == "nested":
        entries = [(name, _nested_maker(column, first, library))]
    elif layout == "boundaries":
        entries = list(zip((name, "max_seqlen"), _sequences_makers(column, first, library), strict=True))
    elif column.kind is Kind.RAGGED:
        entries = [(name, _ragged_maker(column, first, library))]
    elif column.kind in _LIST_KINDS:
        entries = [(name, _list_maker(column.kind, first, valid))]
    else:
        entries = [(name, _tensor_entry(_dtype(column), tuple(d or 0 for d in column.shape), first, library))]
    if valid is not None:
        entries.append((f"{name}.valid", _tensor_entry("bool", (), valid, library)))
    return entries


def _dtype(column: Column) -> str:
    return column.dtype or "uint8"


def _tensor_entry(dtype: str, shape: tuple[int, ...], stream: int, library: ArrayLibrary) -> Make | TensorEntry:
    row_type = library.row_type(dtype, shape)
    if row_type is not None:
        return TensorEntry(stream, row_type)
    over = library.rows_over(dtype, shape)
    return lambda slot, n: over(slot, slot.values_position(stream), n)


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


def _ragged_maker(column: Column, stream: int, library: ArrayLibrary) -> Make:
    dtype, n_dims, rows = _dtype(column), len(column.shape), is_stack_of_rows(column)
    inner, item_bytes = tuple(d or 0 for d in column.shape[1:]), STORED[dtype].itemsize

    def make(slot: Slot, n: int) -> list[Any]:
        start, offsets_at, n_elements = slot.stream_position(stream)
        memory = memoryview(slot)
        shapes = np.frombuffer(memory, np.int32, n * n_dims, slot.stream_position(stream + 1)[0]).reshape(n, n_dims)
        if n_elements == 0:
            return [library.empty(shape, dtype) for shape in shapes.tolist()]
        values = library.over(slot.column(start, n_elements * item_bytes), dtype, (n_elements,))
        if rows:  # split on the rows: a view per record would cost as much again
            return list(library.split(values.reshape(-1, *inner) if inner else values, shapes[:, 0].tolist()))
        sizes = np.diff(np.frombuffer(memory, np.int64, n + 1, offsets_at))
        parts = library.split(values, sizes.tolist())
        return [flat.reshape(shape) for flat, shape in zip(parts, shapes.tolist(), strict=True)]

    return make


def _lengths_at(n: int) -> int:
    """Return the byte position of the lengths in the head of a padded stream (csrc/output_layout.c)."""
    return -(-8 * (n + 1) // 64) * 64


def _padded_maker(column: Column, stream: int, library: ArrayLibrary) -> Make:
    dtype, n_varying = _dtype(column), len(varying(column))
    item_bytes = STORED[dtype].itemsize
    unpack = struct.Struct(f"<{n_varying}q").unpack_from
    dims = [d or 0 for d in column.shape] or [0]
    vary = varying(column)

    def make(slot: Slot, n: int) -> Any:
        start, head, n_elements = slot.stream_position(stream)
        box = dims.copy()
        for dimension, longest in zip(vary, unpack(slot, head + _lengths_at(n) + 8 * n * n_varying), strict=True):
            box[dimension] = longest
        if n_elements == 0:
            return library.empty((n, *box), dtype)
        return library.over(slot.column(start, n * math.prod(box) * item_bytes), dtype, (n, *box))

    return make


def _lengths_maker(column: Column, stream: int, library: ArrayLibrary) -> Make:
    n_varying = len(varying(column))

    over = library.rows_over("int64", (n_varying,) if n_varying > 1 else ())
    return lambda slot, n: over(slot, slot.stream_position(stream)[1] + _lengths_at(n), n)


def _buffer_entry(column: Column, stream: int, library: ArrayLibrary) -> Make | BufferEntry:
    make, inner = _buffer_maker(column, stream, library), tuple(d or 0 for d in column.shape[1:])
    values, offsets = library.row_type(_dtype(column), inner), library.row_type("int64", ())
    if values is None or offsets is None or not is_stack_of_rows(column):
        return make
    return BufferEntry(stream, values, offsets, Buffer, make)


def _buffer_maker(column: Column, stream: int, library: ArrayLibrary) -> Callable[[Slot, int], Buffer]:
    dtype, n_dims, rows = _dtype(column), len(column.shape), is_stack_of_rows(column)
    inner = tuple(d or 0 for d in column.shape[1:]) if rows else ()
    n_inner = math.prod(inner)
    values_over, offsets_over = library.rows_over(dtype, inner), library.rows_over("int64")
    shapes_over = library.rows_over("int32", (n_dims,))

    def make(slot: Slot, n: int) -> Buffer:
        start, offsets_at, n_elements = slot.stream_position(stream)
        offsets = offsets_over(slot, offsets_at, n + 1)
        if n_elements == 0:
            values = library.empty((int(offsets[-1]) if inner else 0, *inner), dtype)
        else:
            values = values_over(slot, start, n_elements // n_inner)
        return Buffer(values, offsets, None if rows else shapes_over(slot, slot.stream_position(stream + 1)[0], n))

    return make


def _nested_maker(column: Column, stream: int, library: ArrayLibrary) -> Make:
    make_buffer, nested = _buffer_maker(column, stream, library), library.nested
    assert nested is not None  # noqa: S101 -- the loader has refused the layout otherwise

    def make(slot: Slot, n: int) -> Any:
        buffer = make_buffer(slot, n)
        return nested(buffer.values, buffer.offsets)

    return make


def _sequences_makers(column: Column, stream: int, library: ArrayLibrary) -> tuple[Make, Make]:
    """Return the makers of `cu_seqlens` and `max_seqlen`, which are called in this order."""
    over = library.rows_over(_dtype(column), ())

    def make(slot: Slot, n: int) -> Any:
        start, offsets_at, _ = slot.stream_position(stream)
        return over(slot, start, packing.join_in_place(slot, start, offsets_at, n))

    def make_longest(slot: Slot, n: int) -> int:
        start, _, n_boundaries = slot.stream_position(stream)
        return int(np.diff(np.frombuffer(memoryview(slot), np.int32, n_boundaries - n + 1, start)).max())

    return make, make_longest


class PipelineSetup:
    """Values that the pipelines of one source and output spec share; the engine keeps them from epoch to epoch.

    Computing them takes 0.3 ms after batches have evicted the code from the processor's caches (0.03 ms if they have
    not).
    """

    def __init__(self, source: Records, output_spec: OutputSpec, library: ArrayLibrary) -> None:
        self.source = source
        self.output_spec = output_spec
        self.library = library
        gathered = output_spec.without_decoding()
        self.assembler = Assembler(source.schema, gathered, library)
        kinds = set((self.assembler.streams[:, 0] & 0xFF).tolist())
        self.varies, self.pads = gather.VAR in kinds, PADDED in kinds
        self._is_packed = packing.PACKED in kinds
        self.stored_bytes = int(source.shard_bytes.sum())
        self.largest_bytes = int(source.shard_bytes.max(initial=1))
        self._n_records = max(int(source.shard_records.sum()), 1)
        self.layouts = layout_table(source.schema, gathered)

    def slot_bytes(self, n_rows: int) -> tuple[int, int]:
        """Return the memory of a new slot, and the estimated bytes of a batch."""
        expected_bytes = slot_bytes(self.assembler.streams, n_rows)
        about_bytes = self.stored_bytes // self._n_records * n_rows
        if self.varies and self._is_packed:
            # Room for the boundaries of pieces. A slot without room gets memory of its own when it is filled first,
            # and new pages cost half as much as the rows (8 rows of 4096 tokens: 64 us instead of 45).
            expected_bytes += expected_bytes // 16
        elif self.varies:  # with room for a batch that is longer than most
            expected_bytes = max(expected_bytes, about_bytes + about_bytes // 8)
        return expected_bytes, max(expected_bytes, about_bytes)
