"""ColumnData: records of a column in memory in stored form; BlockCutter splits a stream of batches into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.types as pt

from tiercache._native.checksum import lay_out
from tiercache.shard.column_types import Kind
from tiercache.shard.format.layout import ALIGN_BYTES, PAGE_BYTES, align
from tiercache.shard.memory import Bytes, address_of
from tiercache.shard.schema import Column

Array: TypeAlias = npt.NDArray[Any]
_SHAPE = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class ColumnData:
    """n records of a column in stored form.

    Attributes:
        n: Number of records.
        values: Stored elements: [n, n_elements] for SCALAR and TENSOR, uint8[n] for BOOL, otherwise a flat array to
            which offsets refer.
        offsets: int64[n + 1], indices into values; the first need not be 0.
        shapes: int32[n, n_dimensions], for RAGGED.
        valid: bool[n]; None if there are no nulls.
        array: Arrow array of the records, for ARROW; then all other arrays are None.
    """

    n: int
    values: Array | None = None
    offsets: Array | None = None
    shapes: Array | None = None
    valid: Array | None = None
    array: pa.Array | None = None

    def slice(self, start: int, end: int) -> ColumnData:
        """Return the records [start, end), which share this object's memory."""
        if start == 0 and end == self.n:
            return self
        return ColumnData(
            end - start,
            self.values if self.offsets is not None or self.values is None else self.values[start:end],
            None if self.offsets is None else self.offsets[start : end + 1],
            None if self.shapes is None else self.shapes[start:end],
            None if self.valid is None else self.valid[start:end],
            None if self.array is None else self.array.slice(start, end - start),
        )

    def own(self) -> ColumnData:
        """Return a copy of the records, in no more memory than they need."""
        return join_column_data([self], copy_one=True)


def join_column_data(items: Sequence[ColumnData], *, copy_one: bool = False) -> ColumnData:
    """Return the records of all items, in order, in new memory; a single item is returned itself unless copy_one."""
    if len(items) == 1 and not copy_one:
        return items[0]
    n = sum(item.n for item in items)
    valid = None
    if any(item.valid is not None for item in items):
        valid = np.concatenate([np.ones(item.n, bool) if item.valid is None else item.valid for item in items])
    if items[0].array is not None:
        arrays = [item.array for item in items]
        return ColumnData(n, array=pa.concat_arrays(arrays) if len(arrays) > 1 else _plain(arrays[0]))
    if items[0].offsets is None:
        return ColumnData(n, np.concatenate([item.values for item in items if item.values is not None]), valid=valid)
    return replace(_join_runs(items), valid=valid)


def _join_runs(items: Sequence[ColumnData]) -> ColumnData:
    runs, offsets, total = [], [np.zeros(1, np.int64)], 0
    for item in items:
        if item.offsets is None or item.values is None:
            continue
        first, last = int(item.offsets[0]), int(item.offsets[-1])
        runs.append(item.values[first:last])
        offsets.append(item.offsets[1:] + (total - first))
        total += last - first
    shapes = (
        None if items[0].shapes is None else np.concatenate([item.shapes for item in items if item.shapes is not None])
    )
    return ColumnData(sum(item.n for item in items), np.concatenate(runs), np.concatenate(offsets), shapes)


def record_bytes(column: Column, data: ColumnData) -> int | npt.NDArray[np.int64]:
    """Return the raw bytes of each record, which decide where blocks end: one number for all records, or int64[n]."""
    if column.kind is Kind.ARROW and data.array is not None:
        return max(1, -(-int(data.array.nbytes) // max(data.n, 1)))
    if data.offsets is None:
        return max(1, column.row_bytes)
    sizes: npt.NDArray[np.int64] = np.diff(data.offsets) * column.stored.itemsize + (8 + 4 * len(column.shape))
    return sizes


class EncodedChunk:
    """A chunk to be written: its buffers one after the other, each aligned to ALIGN_BYTES.

    Attributes:
        nodes: (length, nulls) of the Arrow nodes, depth first.
        lengths: Number of bytes of each buffer, depth first, without padding.
        ends: Offset of each buffer in the chunk, and the end of the chunk.
    """

    def __init__(self, nodes: Sequence[tuple[int, int]], buffers: Sequence[Any]) -> None:
        self.nodes = nodes
        self._buffers = [np.zeros(0, np.uint8) if one is None else np.ascontiguousarray(one) for one in buffers]
        self.lengths = [buffer.nbytes for buffer in self._buffers]
        self.ends = list(accumulate(map(align, self.lengths), initial=0))
        self.n_bytes = self.ends[-1]

    def lay_out(self, raw: Bytes) -> tuple[int, npt.NDArray[np.uint32]]:
        """Copy the buffers to raw, uint8[n_bytes]. Returns the CRC-32C of the chunk and of each page."""
        sums = np.empty(-(-len(raw) // PAGE_BYTES), np.uint32)
        addresses = np.array([address_of(buffer) for buffer in self._buffers], np.uint64)
        return lay_out(addresses, np.array(self.lengths, np.uint64), ALIGN_BYTES, raw, PAGE_BYTES, sums), sums


def encode(column: Column, data: ColumnData) -> EncodedChunk:
    """Return column data as Arrow buffers. Offsets begin at 0; validity bits exist only with nulls."""
    if data.array is not None:
        plain = _plain(data.array)
        buffers = [None if buffer is None else np.frombuffer(buffer, np.uint8) for buffer in plain.buffers()]
        return EncodedChunk(tuple(_nodes(plain)), buffers)
    n, values = data.n, data.values
    nulls = 0 if data.valid is None else n - int(np.count_nonzero(data.valid))
    validity = _bits(data.valid) if nulls else None
    top = (n, nulls)
    if data.offsets is None or values is None:
        if column.kind is Kind.TENSOR:
            return EncodedChunk((top, (n * column.n_elements, 0)), (validity, None, values))
        return EncodedChunk((top,), (validity, _bits(values) if column.kind is Kind.BOOL else values))
    first, last = int(data.offsets[0]), int(data.offsets[-1])
    values, offsets = values[first:last], data.offsets - first if first else data.offsets
    if column.kind is not Kind.RAGGED:
        return EncodedChunk((top,), (validity, offsets, values))
    inner = ((n, 0), (len(values), 0), (n, 0), (n * len(column.shape), 0))
    return EncodedChunk((top, *inner), (validity, None, offsets, None, values, None, None, data.shapes))


def _bits(flags: Any) -> Array:
    """Return flags as an Arrow bitmap."""
    return np.packbits(flags, bitorder="little")


def _plain(array: pa.Array) -> pa.Array:
    """Return a copy without slice offsets, unused child values and needless validity bits, by an IPC record batch."""
    batch = pa.RecordBatch.from_arrays([array], ["x"])
    return pa.ipc.read_record_batch(batch.serialize(), batch.schema).column(0)


def _nodes(array: pa.Array) -> Iterator[tuple[int, int]]:
    yield len(array), array.null_count
    if pt.is_struct(array.type):
        for i in range(array.type.num_fields):
            yield from _nodes(array.field(i))
    elif pt.is_nested(array.type):
        yield from _nodes(array.values)


def shapes_of(column: Column, n: int, shape: Sequence[int]) -> Array:
    """Return int32[n, n_dimensions], the shapes of n ragged records that have the same shape."""
    return np.tile(np.array(shape, _SHAPE), (n, 1)).reshape(n, len(column.shape))


BlockData: TypeAlias = list[ColumnData]


class BlockCutter:
    """Collects records until they fill a block. It copies what it keeps: callers may change their arrays."""

    def __init__(self, columns: Sequence[Column], block_bytes: int) -> None:
        self._columns = columns
        self._block_bytes = block_bytes
        self._pending: list[BlockData] = []
        self._pending_bytes = 0

    def add(self, batch: BlockData) -> Iterator[BlockData]:
        """Add a batch (the data of each column, of equal lengths); yield each full block. The rest stays pending."""
        n = batch[0].n
        ends_bytes = self._ends_bytes(batch)
        start = 0
        while start < n:
            end = self._end_of_block(ends_bytes, start)
            if end == n:
                self._pending.append([data.slice(start, n).own() for data in batch])
                self._pending_bytes += int(ends_bytes[n] - ends_bytes[start])
                return
            head = [data.slice(start, end) for data in batch]
            yield self._joined(head if end > start else None)
            start = end

    @property
    def room_bytes(self) -> int:
        """Number of bytes that still fit into the pending block."""
        return self._block_bytes - self._pending_bytes

    def end_block(self, batch: BlockData) -> BlockData:
        """Return the block of the pending records and these records. Without pending records, nothing is copied."""
        return self._joined(batch if batch[0].n else None)

    def flush(self) -> BlockData | None:
        """Return the block of the pending records; None if there are none."""
        return self._joined(None) if self._pending else None

    def _ends_bytes(self, batch: BlockData) -> npt.NDArray[np.int64]:
        """Return int64[n + 1]: the number of bytes before each record; the last entry is the total."""
        ends = np.zeros(batch[0].n + 1, np.int64)
        for column, data in zip(self._columns, batch, strict=True):
            ends[1:] += record_bytes(column, data)
        np.cumsum(ends, out=ends)
        return ends

    def _end_of_block(self, ends_bytes: npt.NDArray[np.int64], start: int) -> int:
        """Return the first record that does not fit into the block; an empty block takes a record of any size."""
        room_bytes = int(ends_bytes[start]) + self._block_bytes - self._pending_bytes
        end = int(np.searchsorted(ends_bytes, room_bytes, side="right")) - 1
        return max(end, start if self._pending else start + 1)

    def _joined(self, head: BlockData | None) -> BlockData:
        batches = [*self._pending, head] if head is not None else self._pending
        self._pending, self._pending_bytes = [], 0
        return [join_column_data([batch[number] for batch in batches]) for number in range(len(self._columns))]
