"""ShardFile: writes a shard; lays out and checksums chunks, uploads them in parts, and appends footer and tail."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import combine, crc32c, lay_out
from tiercache.model import ShardInfo
from tiercache.shard import codec
from tiercache.shard.codec import BlockCodec
from tiercache.shard.layout import ALIGN_BYTES, CHUNK_ROW, PAGE_BYTES, Footer, Tail, align, pack_head
from tiercache.shard.parts import ColumnData, EncodedChunk, encode
from tiercache.shard.source import address_of
from tiercache.shard.statistics import ColumnStatistics
from tiercache.shard.types import Schema
from tiercache.shard.uploading import UploadQueue

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_EMPTY = np.zeros(0, np.uint8)


class _PartBuffer:
    """Buffer that collects bytes into upload parts, and computes the CRC-32C of the whole file.

    It holds at most one part and the longest reserved piece.
    """

    def __init__(self, uploads: UploadQueue, key: str) -> None:
        self._uploads = uploads
        self._upload = uploads.begin(key)
        self._memory = uploads.memory(0)
        self._filled = self._number = 0
        self.n_bytes = 0
        self.crc = 0

    def reserve(self, n_bytes: int) -> _Bytes:
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
        memory = self._uploads.memory(len(rest))
        memory[: len(rest)] = rest
        self._number = self._uploads.send(self._upload, self._number, self._memory, n_bytes)
        self._memory, self._filled = memory, len(rest)

    def complete(self) -> None:
        """Send the remaining bytes, and complete the upload."""
        if self._filled:
            self._number = self._uploads.send(self._upload, self._number, self._memory, self._filled)
        self._uploads.complete(self._upload)


class _Chunk:
    """A chunk to be written: its buffers one after the other, each aligned to ALIGN_BYTES.

    Attributes:
        lengths: Number of bytes of each buffer, without padding.
        ends: Offset of each buffer in the chunk, and the end of the chunk.
    """

    def __init__(self, encoded: EncodedChunk) -> None:
        self.nodes = encoded.nodes
        self._pieces = [_EMPTY if buffer is None else np.ascontiguousarray(buffer) for buffer in encoded.buffers]
        self.lengths = [piece.nbytes for piece in self._pieces]
        self.ends = list(accumulate(map(align, self.lengths), initial=0))

    @property
    def n_bytes(self) -> int:
        """Number of bytes of the chunk before compression."""
        return self.ends[-1]

    def lay_out(self, raw: _Bytes) -> tuple[int, npt.NDArray[np.uint32]]:
        """Copy the buffers to raw, uint8[n_bytes]. Returns the CRC-32C of the chunk and of each page."""
        sums = np.empty(-(-len(raw) // PAGE_BYTES), np.uint32)
        addresses = np.array([address_of(piece) for piece in self._pieces], np.uint64)
        return lay_out(addresses, np.array(self.lengths, np.uint64), ALIGN_BYTES, raw, PAGE_BYTES, sums), sums


class ShardFile:
    """A shard that is being written. It is not visible under `key` before finish(). For one thread.

    To discard the shard, abort its Uploads.
    """

    def __init__(self, uploads: UploadQueue, key: str, schema: Schema, block_codec: BlockCodec) -> None:
        self.key = key
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
        return self._out.n_bytes

    @property
    def table_bytes(self) -> int:
        """Approximate number of decoded bytes of the footer's tables so far."""
        rows = CHUNK_ROW.itemsize * len(self._chunks) + 16 * (len(self._nodes) + len(self._buffers))
        return rows + 4 * self._n_pages

    def add_block(self, parts: Sequence[ColumnData]) -> None:
        """Append a block. parts: Data of each column, of equal lengths."""
        chunks = [_Chunk(encode(column, part)) for column, part in zip(self._schema.columns, parts, strict=True)]
        frames = self._codec.encode([chunk.n_bytes for chunk in chunks], lambda number: self._laid_out(chunks[number]))
        for number, (chunk, frame) in enumerate(zip(chunks, frames, strict=True)):
            stored_bytes = self._add_chunk(chunk, frame)
            self._statistics[number].add(parts[number], chunk.nodes[0][1], chunk.n_bytes, stored_bytes)
        self._block_first.append(self._block_first[-1] + parts[0].n)
        self.n_blocks += 1

    def _laid_out(self, chunk: _Chunk) -> _Bytes:
        """Lay out a chunk in the memory of the file's next bytes, and return it; it is not appended yet."""
        raw = self._out.reserve(chunk.n_bytes)
        chunk.lay_out(raw)
        return raw

    def _add_chunk(self, chunk: _Chunk, frame: bytes | None) -> int:
        """Append a chunk, raw if frame is None, otherwise as the frame. Returns its number of stored bytes."""
        first_node, first_buffer, first_page = len(self._nodes), len(self._buffers), self._n_pages
        self._nodes.extend(chunk.nodes)
        self._buffers.extend(zip(chunk.ends, chunk.lengths, strict=False))  # no buffer begins at the last end
        if frame is None:
            stored_bytes = chunk.n_bytes
            crc, sums = chunk.lay_out(self._out.reserve(stored_bytes))
            self._pages.append(sums)
            self._n_pages += len(sums)
        else:
            stored_bytes, crc = len(frame), crc32c(frame)
            self._out.reserve(stored_bytes)[:] = np.frombuffer(frame, np.uint8)
        offset, kind = self._out.n_bytes, codec.RAW if frame is None else codec.ZSTD
        self._out.add(stored_bytes, crc)
        self._chunks.append((offset, stored_bytes, chunk.n_bytes, kind, crc, first_node, first_buffer, first_page))
        self._out.append(bytes(align(stored_bytes) - stored_bytes))
        return stored_bytes

    def finish(self, metadata: Mapping[str, Any]) -> ShardInfo:
        """Write footer and tail, and queue the completion of the upload. Returns the description of the shard."""
        names = self._schema.names
        statistics = {name: column.as_json() for name, column in zip(names, self._statistics, strict=True)}
        footer = self._footer(statistics, metadata)
        stored, raw_bytes = footer.pack()
        tail = Tail(self._out.n_bytes, len(stored), raw_bytes, crc32c(stored))
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

    def _footer(self, statistics: Mapping[str, Any], metadata: Mapping[str, Any]) -> Footer:
        return Footer(
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
