"""A shard that is being written: records of columns in memory in stored form, cut into blocks, encoded, and uploaded.

ShardFile lays out and checksums the chunks of a shard; a background thread uploads it in parts.
"""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.types as pt

from tiercache._native.checksum import combine, crc32c, lay_out
from tiercache.errors import StoreError
from tiercache.model import ShardInfo
from tiercache.shard import codec
from tiercache.shard.codec import ALIGN_BYTES, BUFFER_POOL, BlockCodec, Bytes, address_of, align
from tiercache.shard.footer import CHUNK_ROW, GROUPED_COLUMNS, PAGE_BYTES, Footer, Tail, pack_head
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.store.contract import MAX_GAP_BYTES, Store, Upload

Array: TypeAlias = npt.NDArray[Any]
_SHAPE = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class ColumnData:
    """n records of a column in stored form."""

    n: int
    values: Array | None = None  # [n, n_elements], or uint8[n] for BOOL, or flat if there are offsets
    offsets: Array | None = None  # int64[n + 1], indices into values; the first need not be 0
    shapes: Array | None = None  # int32[n, n_dimensions], for RAGGED
    valid: Array | None = None  # bool[n]; None if there are no nulls
    array: pa.Array | None = None  # the records of ARROW; then all other arrays are None

    def slice(self, start: int, end: int) -> ColumnData:
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

    nodes are the (length, nulls) of the Arrow nodes, depth first; ends are the offsets of the buffers, and the end.
    """

    def __init__(self, nodes: Sequence[tuple[int, int]], buffers: Sequence[Any]) -> None:
        self.nodes = nodes
        self.buffers = [np.zeros(0, np.uint8) if one is None else np.ascontiguousarray(one) for one in buffers]
        self.lengths = [buffer.nbytes for buffer in self.buffers]
        self.ends = list(accumulate(map(align, self.lengths), initial=0))
        self.n_bytes = self.ends[-1]

    def lay_out(self, raw: Bytes) -> tuple[int, npt.NDArray[np.uint32]]:
        """Copy the buffers to raw, uint8[n_bytes]. Returns the CRC-32C of the chunk and of each page."""
        sums = np.empty(-(-len(raw) // PAGE_BYTES), np.uint32)
        addresses = np.array([address_of(buffer) for buffer in self.buffers], np.uint64)
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
        return self._block_bytes - self._pending_bytes

    def end_block(self, batch: BlockData) -> BlockData:
        """Return the block of the pending records and these records. Without pending records, nothing is copied."""
        return self._joined(batch if batch[0].n else None)

    def flush(self) -> BlockData | None:
        return self._joined(None) if self._pending else None

    def _ends_bytes(self, batch: BlockData) -> npt.NDArray[np.int64]:
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


Task: TypeAlias = Callable[[], None]

# At least the minimum part size of every store, and large enough to make the overhead of a request negligible. While
# the writer is busy, the thread waits 5 ms for the GIL each time, so it should need the GIL rarely.
PART_BYTES = 8 << 20
# With the part that is being filled and the part that is being sent, four parts are in memory. With a queue of one,
# writer and thread would wait for each other in turn if both are equally fast.
_MAX_WAITING = 2
# Space after a part for the rest of the chunk that fills it; one huge page, because parts consist of huge pages.
_SLACK_BYTES = 2 << 20


class _UploadThread:
    """A thread that runs tasks in order. After an error or cancel() it drops tasks instead.

    The object holds no reference to its owner, so that an abandoned writer can be collected while its thread waits.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._is_cancelled = False
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._free = threading.Semaphore(_MAX_WAITING + 1)  # the task that runs has its place until it is done
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="tiercache-upload", daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        """Queue a task; wait while the queue is full. Raises the error of an earlier task."""
        self._raise_error()
        self._free.acquire()
        self._raise_error()
        self._tasks.put(task)

    def finish(self) -> None:
        self._tasks.put(None)
        self._thread.join()
        self._raise_error()

    def cancel(self) -> None:
        """Drop the queued tasks, and end the thread after its current task. The garbage collector may call this.

        In a forked child process, which has no such thread, the call does nothing.
        """
        if os.getpid() == self._pid:
            self._is_cancelled = True
            self._tasks.put(None)  # reentrant, unlike a lock, which the interrupted thread may hold

    def join(self) -> None:
        self._thread.join()

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        task = self._tasks.get()
        is_last = task is None
        try:
            if task is not None and self.error is None and not self._is_cancelled:
                task()
        except BaseException as error:  # noqa: BLE001 -- top of a thread: the writer raises it at its next call
            self.error = error
        del task  # before the next task gets its place: a task holds the memory of a part
        self._free.release()
        return not is_last


class UploadQueue:
    """The uploads of a writer. The writer's thread calls all methods; a background thread calls the store.

    The next call that queues a task, or wait(), raises an error of the store; after that the owner can only call
    abort(). The thread starts with the first part. The owner must call wait() or abort() at the end.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.part_bytes = max(PART_BYTES, store.min_part_bytes)
        self._thread: _UploadThread | None = None
        self._pid: int | None = None
        self._open: list[Upload] = []

    @property
    def failed(self) -> bool:
        return self._thread is not None and self._thread.error is not None

    @property
    def is_owner(self) -> bool:
        """Whether the uploads belong to this process; False in a child process forked after claim_process()."""
        return self._pid in (None, os.getpid())

    def claim_process(self) -> None:
        """Make this process the owner of the uploads. Raises ValueError if they belong to the parent process."""
        if not self.is_owner:
            raise ValueError(
                "a writer can be used only in the process that began to write, not in a forked child of it"
            )
        self._pid = os.getpid()

    def begin(self, key: str) -> Upload:
        self.claim_process()
        upload = self._store.create(key)
        self._open.append(upload)
        return upload

    def send(self, upload: Upload, number: int, memory: Bytes, n_bytes: int) -> int:
        """Queue n_bytes of memory, which must not change any more, as parts. Returns the next part's number."""
        parts = [memory[start : min(start + self.part_bytes, n_bytes)] for start in range(0, n_bytes, self.part_bytes)]

        def send() -> None:
            for i, part in enumerate(parts):
                upload.put_part(number + i, part.data)

        self._put(send)
        return number + len(parts)

    def complete(self, upload: Upload) -> None:
        """Queue the completion of an upload, which publishes the object after all its parts are sent."""
        open_uploads = self._open

        def complete() -> None:
            upload.complete()
            open_uploads.remove(upload)

        self._put(complete)

    def _put(self, task: Task) -> None:
        self.claim_process()
        if self._thread is None:
            self._thread = _UploadThread()
            weakref.finalize(self, self._thread.cancel)
        self._thread.put(task)

    def wait(self) -> None:
        self.claim_process()
        if self._thread is not None:
            self._thread.finish()

    def abort(self) -> None:
        """Abort the uploads that are not complete; errors of the store are ignored: the caller sees the first error."""
        if not self.is_owner:
            return
        if self._thread is not None:
            self._thread.cancel()
            self._thread.join()
        while self._open:
            with suppress(StoreError):
                self._open[-1].abort()
            self._open.pop()


class _PartBuffer:
    """Collects bytes into upload parts; at most one part and the longest reserved piece are in memory."""

    def __init__(self, uploads: UploadQueue, key: str) -> None:
        self._uploads = uploads
        self._upload = uploads.begin(key)
        self._memory = BUFFER_POOL.allocate(uploads.part_bytes + _SLACK_BYTES)
        self._filled = self._number = 0
        self.n_bytes = 0
        self.crc = 0

    def reserve(self, n_bytes: int) -> Bytes:
        """Return the memory for the next n_bytes, uint8[n_bytes], which the caller fills before add()."""
        if self._filled + n_bytes > len(self._memory):
            grown = np.empty(max(self._filled + n_bytes, len(self._memory) * 5 // 4), np.uint8)
            grown[: self._filled] = self._memory[: self._filled]
            self._memory = grown
        return self._memory[self._filled : self._filled + n_bytes]

    def add(self, n_bytes: int, crc: int) -> None:
        """Append the first n_bytes of the reserved memory. crc: CRC-32C of these bytes."""
        self.crc = combine(self.crc, crc, n_bytes)
        self._filled += n_bytes
        self.n_bytes += n_bytes
        if self._filled >= self._uploads.part_bytes:
            self._send(self._filled // self._uploads.part_bytes * self._uploads.part_bytes)

    def append(self, data: bytes) -> None:
        self.reserve(len(data))[:] = np.frombuffer(data, np.uint8)
        self.add(len(data), crc32c(data))

    def _send(self, n_bytes: int) -> None:
        rest = self._memory[n_bytes : self._filled]
        memory = BUFFER_POOL.allocate(max(len(rest), self._uploads.part_bytes + _SLACK_BYTES))
        memory[: len(rest)] = rest
        self._number = self._uploads.send(self._upload, self._number, self._memory, n_bytes)
        self._memory, self._filled = memory, len(rest)

    def complete(self) -> None:
        if self._filled:
            self._number = self._uploads.send(self._upload, self._number, self._memory, self._filled)
        self._uploads.complete(self._upload)


# Maximum stored bytes of the grouped columns of a shard: a few requests read all of them.
GROUP_BYTES = 256 << 10
# A reader of single blocks needs one more range for the group. So the gap that a projection would read for each block
# must cost this many requests.
_LEAST_GAP_REQUESTS = 4


def columns_to_group(chunk_bytes: Sequence[int], n_blocks: int) -> frozenset[int]:
    """Return the columns whose chunks should lie together behind all blocks: the smallest, up to GROUP_BYTES.

    Without that, a projection of a small column costs a request for each block, because the gap to the chunk of the
    next block costs more than a request.
    """
    grouped: set[int] = set()
    group_bytes, gap_bytes = 0, sum(chunk_bytes)
    for column in sorted(range(len(chunk_bytes)), key=chunk_bytes.__getitem__) if n_blocks > 1 else ():
        group_bytes += align(chunk_bytes[column]) * n_blocks
        gap_bytes -= chunk_bytes[column]
        if group_bytes > GROUP_BYTES or gap_bytes <= _LEAST_GAP_REQUESTS * MAX_GAP_BYTES:
            break
        grouped.add(column)
    return frozenset(grouped)


class ShardFile:
    """A shard that is being written, invisible before finish(). For one thread. Abort its uploads to discard it.

    The chunks of small columns (columns_to_group) stay in memory until finish().
    """

    def __init__(
        self, uploads: UploadQueue, key: str, schema: Schema, block_codec: BlockCodec, shard_bytes: int = 0
    ) -> None:
        """Begin a shard. shard_bytes: Expected size, which says whether small columns are worth grouping."""
        self.key = key
        self._shard_bytes = shard_bytes
        self._grouped: frozenset[int] = frozenset()
        self._group: list[tuple[int, Bytes]] = []  # index in _chunks, and stored bytes
        self._group_bytes = 0
        self.n_blocks = 0
        self._schema = schema
        self._codec = block_codec
        self._shard_id = secrets.token_bytes(16)
        self._block_first = [0]
        self._chunks: list[tuple[int, ...]] = []
        self._nodes: list[tuple[int, int]] = []
        self._buffers: list[tuple[int, int]] = []
        self._pages: list[npt.NDArray[np.uint32]] = []
        self._n_pages = 0
        self._out = _PartBuffer(uploads, key)
        self._out.append(pack_head(self._shard_id))

    @property
    def n_bytes(self) -> int:
        return self._out.n_bytes + self._group_bytes

    @property
    def table_bytes(self) -> int:
        """Approximate number of decoded bytes of the footer's tables so far."""
        rows = CHUNK_ROW.itemsize * len(self._chunks) + 16 * (len(self._nodes) + len(self._buffers))
        return rows + 4 * self._n_pages

    def add_block(self, columns: Sequence[ColumnData]) -> None:
        chunks = [encode(column, data) for column, data in zip(self._schema.columns, columns, strict=True)]
        frames = self._codec.encode([chunk.n_bytes for chunk in chunks], lambda number: self._laid_out(chunks[number]))
        if not self.n_blocks:
            sizes = [
                chunk.n_bytes if frame is None else len(frame) for chunk, frame in zip(chunks, frames, strict=True)
            ]
            n_blocks = self._shard_bytes // max(sum(map(align, sizes)), 1)
            self._grouped = columns_to_group(sizes, n_blocks)
        for number, (chunk, frame) in enumerate(zip(chunks, frames, strict=True)):
            # The limit bounds the memory of chunks that become larger from block to block.
            is_grouped = number in self._grouped and self._group_bytes < 4 * GROUP_BYTES
            self._add_chunk(chunk, frame, is_grouped=is_grouped)
        self._block_first.append(self._block_first[-1] + columns[0].n)
        self.n_blocks += 1

    def _laid_out(self, chunk: EncodedChunk) -> Bytes:
        raw = self._out.reserve(chunk.n_bytes)
        chunk.lay_out(raw)
        return raw

    def _add_chunk(self, chunk: EncodedChunk, frame: bytes | None, *, is_grouped: bool) -> None:
        """Append a chunk, raw if frame is None, otherwise as the frame; or keep it for the group."""
        first_node, first_buffer, first_page = len(self._nodes), len(self._buffers), self._n_pages
        self._nodes.extend(chunk.nodes)
        self._buffers.extend(zip(chunk.ends, chunk.lengths, strict=False))  # no buffer begins at the last end
        stored_bytes = chunk.n_bytes if frame is None else len(frame)
        memory = np.empty(stored_bytes, np.uint8) if is_grouped else self._out.reserve(stored_bytes)
        if frame is None:
            crc, sums = chunk.lay_out(memory)
            self._pages.append(sums)
            self._n_pages += len(sums)
        else:
            crc = crc32c(frame)
            memory[:] = np.frombuffer(frame, np.uint8)
        offset, kind = self._out.n_bytes, codec.RAW if frame is None else codec.ZSTD
        if is_grouped:
            self._group.append((len(self._chunks), memory))
            self._group_bytes += align(stored_bytes)
        else:
            self._append_aligned(stored_bytes, crc)
        self._chunks.append((offset, stored_bytes, chunk.n_bytes, kind, crc, first_node, first_buffer, first_page))

    def _append_aligned(self, n_bytes: int, crc: int) -> None:
        self._out.add(n_bytes, crc)
        self._out.append(bytes(align(n_bytes) - n_bytes))

    def _append_group(self) -> None:
        for number, memory in sorted(self._group, key=lambda chunk: (chunk[0] % len(self._schema), chunk[0])):
            _, stored_bytes, raw_bytes, kind, crc, *firsts = self._chunks[number]
            self._chunks[number] = (self._out.n_bytes, stored_bytes, raw_bytes, kind, crc, *firsts)
            self._out.reserve(stored_bytes)[:] = memory
            self._append_aligned(stored_bytes, crc)
        self._group_bytes = 0

    def finish(self) -> ShardInfo:
        self._append_group()
        footer = Footer(
            schema=self._schema,
            shard_id=self._shard_id,
            n_records=self._block_first[-1],
            n_blocks=self.n_blocks,
            block_first=np.array(self._block_first, np.uint64),
            chunks=np.array(self._chunks, CHUNK_ROW).reshape(self.n_blocks, len(self._schema)),
            nodes=np.array(self._nodes, np.uint64).reshape(-1, 2),
            buffers=np.array(self._buffers, np.uint64).reshape(-1, 2),
            pages=np.concatenate([np.zeros(0, np.uint32), *self._pages]),
        )
        stored, raw_bytes = footer.pack()
        features = GROUPED_COLUMNS if self._group else 0
        tail = Tail(self._out.n_bytes, len(stored), raw_bytes, crc32c(stored), features)
        self._out.append(stored)
        self._out.append(tail.pack())
        self._out.complete()
        return ShardInfo(
            name=self.key,
            shard_id=self._shard_id.hex(),
            n_records=footer.n_records,
            n_bytes=self._out.n_bytes,
            crc32c=self._out.crc,
            footer_offset=tail.footer_offset,
            footer_bytes=tail.footer_bytes,
        )
