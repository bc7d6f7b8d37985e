"""One shard in the making: lays out chunks, sums them, sends them on in parts, and ends with footer and tail."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import combine, crc32c, crc32c_pages
from tiercache.model import ShardInfo
from tiercache.shard import codec
from tiercache.shard.codec import ColumnCodec
from tiercache.shard.layout import CHUNK_ROW, PAGE_BYTES, Footer, Tail, align, pack_head
from tiercache.shard.parts import Encoded, Part, encode
from tiercache.shard.statistics import ColumnStatistics
from tiercache.shard.types import Schema
from tiercache.store.contract import Store

# Larger than the least part of every store, and large enough that a request's overhead does not show.
_PART_BYTES = 8 << 20
_Bytes: TypeAlias = npt.NDArray[np.uint8]


class _PartBuffer:
    """Bytes on their way into an upload, gathered to parts; sums the whole file.

    Holds one part and the longest piece.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._upload = store.create(key)
        self._part_bytes = max(_PART_BYTES, store.min_part_bytes)
        self._memory: _Bytes = np.empty(self._part_bytes + (1 << 20), np.uint8)
        self._filled = self._number = 0
        self.n_bytes = 0
        self.crc = 0

    def reserve(self, n_bytes: int) -> _Bytes:
        """Memory for the next n_bytes, to be filled before add()."""
        if self._filled + n_bytes > len(self._memory):
            grown = np.empty(max(self._filled + n_bytes, len(self._memory) * 5 // 4), np.uint8)
            grown[: self._filled] = self._memory[: self._filled]
            self._memory = grown
        return self._memory[self._filled : self._filled + n_bytes]

    def add(self, n_bytes: int, crc: int) -> None:
        """Append the first n_bytes of what was reserved. crc: their CRC-32C."""
        self.crc = combine(self.crc, crc, n_bytes)
        self._filled += n_bytes
        self.n_bytes += n_bytes
        if self._filled >= self._part_bytes:
            self._send(self._filled // self._part_bytes * self._part_bytes)

    def append(self, data: bytes) -> None:
        """Append a copy of data."""
        self.reserve(len(data))[:] = np.frombuffer(data, np.uint8)
        self.add(len(data), crc32c(data))

    def _send(self, n_bytes: int) -> None:
        """Upload the first n_bytes as parts and move the rest to the front."""
        for start in range(0, n_bytes, self._part_bytes):
            self._upload.put_part(self._number, self._memory[start : min(start + self._part_bytes, n_bytes)].data)
            self._number += 1
        rest = self._memory[n_bytes : self._filled].copy()
        self._memory[: len(rest)] = rest
        self._filled = len(rest)

    def complete(self) -> None:
        if self._filled:
            self._send(self._filled)
        self._upload.complete()

    def abort(self) -> None:
        self._upload.abort()


class ShardFile:
    """A shard that is being written under `key`; nothing is there before finish(). One thread."""

    def __init__(self, store: Store, key: str, schema: Schema, codecs: Sequence[ColumnCodec]) -> None:
        self.key = key
        self.n_blocks = 0
        self._schema = schema
        self._codecs = codecs
        self._shard_id = secrets.token_bytes(16)
        self._block_first = [0]
        self._chunks: list[tuple[int, ...]] = []
        self._nodes: list[tuple[int, int]] = []
        self._buffers: list[tuple[int, int]] = []
        self._pages: list[npt.NDArray[np.uint32]] = []
        self._n_pages = 0
        self._statistics = [ColumnStatistics(column) for column in schema.columns]
        self._out = _PartBuffer(store, key)
        self._out.append(pack_head(self._shard_id))

    @property
    def n_bytes(self) -> int:
        """Bytes so far, without the footer."""
        return self._out.n_bytes

    @property
    def table_bytes(self) -> int:
        """Decoded bytes of the footer's tables so far, about."""
        rows = CHUNK_ROW.itemsize * len(self._chunks) + 16 * (len(self._nodes) + len(self._buffers))
        return rows + 4 * self._n_pages

    def add_block(self, parts: Sequence[Part]) -> None:
        """Append a block. parts: one of each column, of equal length."""
        for number, column in enumerate(self._schema.columns):
            encoded = encode(column, parts[number])
            raw_bytes = self._add_chunk(encoded, self._codecs[number])
            self._statistics[number].add(parts[number], encoded.nodes[0][1], raw_bytes)
        self._block_first.append(self._block_first[-1] + parts[0].n)
        self.n_blocks += 1

    def _add_chunk(self, encoded: Encoded, column_codec: ColumnCodec) -> int:
        first_node, first_buffer, first_page = len(self._nodes), len(self._buffers), self._n_pages
        raw = self._lay_out(encoded)
        frame = column_codec.encode(raw)
        offset, raw_bytes = self._out.n_bytes, len(raw)
        if frame is None:
            stored_bytes, crc = raw_bytes, self._sum_pages(raw)
        else:
            stored_bytes, crc = len(frame), crc32c(frame)
            self._out.reserve(stored_bytes)[:] = np.frombuffer(frame, np.uint8)
        self._out.add(stored_bytes, crc)
        kind = codec.RAW if frame is None else codec.ZSTD
        self._chunks.append((offset, stored_bytes, raw_bytes, kind, crc, first_node, first_buffer, first_page))
        self._out.append(bytes(align(stored_bytes) - stored_bytes))
        return raw_bytes

    def _lay_out(self, encoded: Encoded) -> _Bytes:
        """Copy a chunk's buffers, each aligned, to where the file's next bytes go, and note them."""
        self._nodes.extend(encoded.nodes)
        pieces = [np.zeros(0, np.uint8) if b is None else b.reshape(-1).view(np.uint8) for b in encoded.buffers]
        ends = np.cumsum([0, *(align(len(piece)) for piece in pieces)])
        raw = self._out.reserve(int(ends[-1]))
        for piece, start, end in zip(pieces, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            raw[start : start + len(piece)] = piece
            raw[start + len(piece) : end] = 0
            self._buffers.append((start, len(piece)))
        return raw

    def _sum_pages(self, raw: _Bytes) -> int:
        sums = np.zeros(-(-len(raw) // PAGE_BYTES), np.uint32)
        crc = crc32c_pages(raw.ctypes.data, len(raw), PAGE_BYTES, sums)
        self._pages.append(sums)
        self._n_pages += len(sums)
        return crc

    def finish(self, metadata: Mapping[str, Any]) -> ShardInfo:
        """Write footer and tail, and publish."""
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

    def abort(self) -> None:
        """Drop it. Harmless after finish()."""
        self._out.abort()
