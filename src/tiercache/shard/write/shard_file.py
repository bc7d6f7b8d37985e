"""ShardFile: lays out and checksums the chunks of a shard, and uploads them in parts by a background thread."""

from __future__ import annotations

import json
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import combine, crc32c
from tiercache.errors import StoreError
from tiercache.model import ShardInfo
from tiercache.shard.format import codec
from tiercache.shard.format.codec import BlockCodec
from tiercache.shard.format.layout import CHUNK_ROW, GROUPED_COLUMNS, Footer, Tail, align, pack_head
from tiercache.shard.format.statistics import ColumnStatistics
from tiercache.shard.memory import BUFFER_POOL, Bytes
from tiercache.shard.schema import Schema
from tiercache.shard.write.column_data import ColumnData, EncodedChunk, encode
from tiercache.store.coalescing import RequestCosts
from tiercache.store.contract import Store, Upload

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
        """Wait until all tasks are done, and end the thread. Raises the error of a failed task."""
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
        """Wait for the thread to end."""
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
        """Whether a task has failed; the next call raises its error."""
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
        """Return a new upload for the object with this key, for send() and complete()."""
        self.claim_process()
        upload = self._store.create(key)
        self._open.append(upload)
        return upload

    def send(self, upload: Upload, number: int, memory: Bytes, n_bytes: int) -> int:
        """Queue the first n_bytes of memory as parts with the numbers from `number` on. Returns the next number.

        The caller must not change the memory afterwards.
        """
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
        """Wait until all tasks are done, and end the thread. Raises StoreError if the store failed."""
        self.claim_process()
        if self._thread is not None:
            self._thread.finish()

    def abort(self) -> None:
        """Abort the uploads that are not complete, after the current task of the thread. A repeated call does nothing.

        Errors of the store are ignored here, so that the caller sees the error that led to the abort.
        """
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
    """Collects bytes into upload parts, and computes the CRC-32C of the whole file.

    It holds at most one part and the longest reserved piece.
    """

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
        """Append a copy of data."""
        self.reserve(len(data))[:] = np.frombuffer(data, np.uint8)
        self.add(len(data), crc32c(data))

    def _send(self, n_bytes: int) -> None:
        """Send the first n_bytes as parts, and copy the rest to new memory."""
        rest = self._memory[n_bytes : self._filled]
        memory = BUFFER_POOL.allocate(max(len(rest), self._uploads.part_bytes + _SLACK_BYTES))
        memory[: len(rest)] = rest
        self._number = self._uploads.send(self._upload, self._number, self._memory, n_bytes)
        self._memory, self._filled = memory, len(rest)

    def complete(self) -> None:
        """Send the remaining bytes, and complete the upload."""
        if self._filled:
            self._number = self._uploads.send(self._upload, self._number, self._memory, self._filled)
        self._uploads.complete(self._upload)


# Maximum stored bytes of the grouped columns of a shard: a few requests read all of them.
GROUP_BYTES = 256 << 10
# A reader of single blocks needs one more range for the group. So the gap that a projection would read for each block
# must cost this many requests.
_LEAST_GAP_REQUESTS = 4


def columns_to_group(chunk_bytes: Sequence[int], n_blocks: int, costs: RequestCosts) -> frozenset[int]:
    """Return the columns whose chunks should lie together behind all blocks, so that few requests read one of them.

    Without that, a projection of a small column costs a request for each block, because the gap to the chunk of the
    next block costs more than a request. The smallest columns are grouped, as many as GROUP_BYTES hold.

    Args:
        chunk_bytes: Stored bytes of each column's chunk in a typical block.
        n_blocks: Expected number of blocks of the shard.
        costs: Costs of requests.
    """
    grouped: set[int] = set()
    group_bytes, gap_bytes = 0, sum(chunk_bytes)
    for column in sorted(range(len(chunk_bytes)), key=chunk_bytes.__getitem__) if n_blocks > 1 else ():
        group_bytes += align(chunk_bytes[column]) * n_blocks
        gap_bytes -= chunk_bytes[column]
        if group_bytes > GROUP_BYTES or gap_bytes <= _LEAST_GAP_REQUESTS * costs.gap_bytes:
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
        self._statistics = [ColumnStatistics(column) for column in schema.columns]
        self._out = _PartBuffer(uploads, key)
        self._out.append(pack_head(self._shard_id))

    @property
    def n_bytes(self) -> int:
        """Number of bytes written so far, without the footer."""
        return self._out.n_bytes + self._group_bytes

    @property
    def table_bytes(self) -> int:
        """Approximate number of decoded bytes of the footer's tables so far."""
        rows = CHUNK_ROW.itemsize * len(self._chunks) + 16 * (len(self._nodes) + len(self._buffers))
        return rows + 4 * self._n_pages

    def add_block(self, columns: Sequence[ColumnData]) -> None:
        """Append a block. parts: Data of each column, of equal lengths."""
        chunks = [encode(column, data) for column, data in zip(self._schema.columns, columns, strict=True)]
        frames = self._codec.encode([chunk.n_bytes for chunk in chunks], lambda number: self._laid_out(chunks[number]))
        if not self.n_blocks:
            sizes = [
                chunk.n_bytes if frame is None else len(frame) for chunk, frame in zip(chunks, frames, strict=True)
            ]
            n_blocks = self._shard_bytes // max(sum(map(align, sizes)), 1)
            self._grouped = columns_to_group(sizes, n_blocks, RequestCosts())
        for number, (chunk, frame) in enumerate(zip(chunks, frames, strict=True)):
            # The limit bounds the memory of chunks that become larger from block to block.
            is_grouped = number in self._grouped and self._group_bytes < 4 * GROUP_BYTES
            stored_bytes = self._add_chunk(chunk, frame, is_grouped=is_grouped)
            data = columns[number]
            nulls = chunk.nodes[0][1]
            self._statistics[number].add(data.values, data.valid, data.n, nulls, chunk.n_bytes, stored_bytes)
        self._block_first.append(self._block_first[-1] + columns[0].n)
        self.n_blocks += 1

    def _laid_out(self, chunk: EncodedChunk) -> Bytes:
        """Lay out a chunk in the memory of the file's next bytes, and return it; it is not appended yet."""
        raw = self._out.reserve(chunk.n_bytes)
        chunk.lay_out(raw)
        return raw

    def _add_chunk(self, chunk: EncodedChunk, frame: bytes | None, *, is_grouped: bool) -> int:
        """Append a chunk, raw if frame is None, otherwise as the frame; or keep it for the group.

        Returns its number of stored bytes.
        """
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
        return stored_bytes

    def _append_aligned(self, n_bytes: int, crc: int) -> None:
        self._out.add(n_bytes, crc)
        self._out.append(bytes(align(n_bytes) - n_bytes))

    def _append_group(self) -> None:
        """Append the grouped chunks, column by column."""
        for number, memory in sorted(self._group, key=lambda chunk: (chunk[0] % len(self._schema), chunk[0])):
            _, stored_bytes, raw_bytes, kind, crc, *firsts = self._chunks[number]
            self._chunks[number] = (self._out.n_bytes, stored_bytes, raw_bytes, kind, crc, *firsts)
            self._out.reserve(stored_bytes)[:] = memory
            self._append_aligned(stored_bytes, crc)
        self._group_bytes = 0

    def finish(self, metadata: Mapping[str, Any]) -> ShardInfo:
        """Write footer and tail, and queue the completion of the upload. Returns the description of the shard."""
        self._append_group()
        names = self._schema.names
        statistics = {name: column.as_json() for name, column in zip(names, self._statistics, strict=True)}
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
            statistics=statistics,
            metadata=metadata,
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
            stats_json=json.dumps(statistics, sort_keys=True, separators=(",", ":")),
        )
