"""RecordReader: reads single records of a shard by the pages, or by the compressed chunks, that hold their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native import gather
from tiercache.shard import codec
from tiercache.shard.blocks import Blocks
from tiercache.shard.cast import ServedColumns
from tiercache.shard.chunks import Addresses, Chunks, Ids, LoadedChunks, chunk_ids
from tiercache.shard.layout import Footer
from tiercache.shard.pages import ChunkRanges, Pages
from tiercache.shard.source import address_of
from tiercache.shard.types import BITS, VAR, Kind, Stream
from tiercache.shard.values import ColumnValues, as_corrupt_shard, block_values, gather_values

Numbers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _RowRanges:
    """The positions of a stream's rows: the chunk of each row, and the bytes [start, end) in the decoded chunk.

    Attributes:
        stored: Whether the row has bytes; False if its chunk has no such buffer.
    """

    stream: Stream
    chunk: Ids
    start: Numbers
    end: Numbers
    stored: npt.NDArray[np.bool_]


class RecordReader:
    """Reader of single rows of an open shard. Thread-safe."""

    def __init__(
        self, footer: Footer, url: str, chunks: Chunks, pages: Pages, served: ServedColumns | None = None
    ) -> None:
        self._footer = footer
        self._url = url
        self._chunks = chunks
        self._pages = pages
        self._rows = footer.chunks.ravel()
        self._n_columns = len(footer.schema)
        self._served = served or {}
        self._brought: frozenset[int] = frozenset()  # columns that need no further call of Chunks.prefetch_columns()

    def take(self, rows: Numbers, columns: Sequence[int], deadline_s: float | None) -> list[ColumnValues]:
        """Return the values of rows, in order, for each column. The caller has checked that the rows exist."""
        block = np.searchsorted(self._footer.block_first, rows.astype(np.uint64), side="right").astype(np.int64) - 1
        row = rows - self._footer.block_first[block].astype(np.int64)
        asked = list(dict.fromkeys(columns))
        if not self._brought.issuperset(asked) and self._chunks.prefetch_columns(asked, deadline_s):
            self._brought = self._brought.union(asked)
        by_block = [c for c in asked if self._needs_blocks(c, block)]
        found = self._take_plain([c for c in asked if c not in by_block], block, row, deadline_s)
        found |= self._take_blocks(by_block, block, row, deadline_s)
        return [found[c] for c in columns]

    def _needs_blocks(self, number: int, block: Ids) -> bool:
        """Return whether to read whole chunks: single pages cannot be read, or a local copy holds the chunks."""
        ids = block * self._n_columns + number
        if self._footer.schema.columns[number].kind is Kind.ARROW or self._chunks.is_cached(np.unique(ids)):
            return True
        return not (self._rows["codec"][ids] == codec.RAW).any()

    def _take_blocks(
        self, columns: Sequence[int], block: Ids, row: Numbers, deadline_s: float | None
    ) -> dict[int, ColumnValues]:
        if not columns:
            return {}
        numbers, position = np.unique(block, return_inverse=True)
        loaded = self._chunks.load(chunk_ids(numbers.tolist(), columns, self._n_columns), deadline_s)
        blocks = Blocks(self._footer, self._url, tuple(numbers.tolist()), tuple(columns), loaded)
        places = position.astype(np.uint32).ravel(), row.astype(np.uint32)
        values = block_values(blocks, columns, *places, self._served)
        return dict(zip(columns, values, strict=True))

    def _take_plain(
        self, columns: Sequence[int], block: Ids, row: Numbers, deadline_s: float | None
    ) -> dict[int, ColumnValues]:
        if not columns:
            return {}
        streams = [s for c in columns for s in self._footer.schema.columns[c].streams(c)]
        whole = self._load_whole(columns, block, deadline_s)
        places = [self._place(stream, block, row) for stream in streams]
        memory = _Memory(self._pages, self._rows, whole, deadline_s)
        addresses = memory.addresses(places)
        sources = np.zeros((len(streams), len(row), 3), np.uint64)
        runs: list[tuple[int, _RowRanges]] = []
        for number, place in enumerate(places):
            column = self._footer.schema.columns[place.stream.column]
            with as_corrupt_shard(column, self._url):
                if place.stream.kind == VAR:
                    run, lengths = self._run(place, addresses[number])
                    runs.append((number, run))
                    sources[number, :, 1] = memory.keep(lengths)
                    sources[number, :, 2] = lengths[:, 1].astype(np.uint64)
                elif place.stream.kind == BITS:
                    bits = _bits(addresses[number], row)
                    sources[number, :, 0] = np.where(place.stored, memory.keep(bits), np.uint64(0))
                else:
                    sources[number, :, 0] = addresses[number]
        for (number, _), found in zip(runs, memory.addresses([run for _, run in runs]), strict=True):
            sources[number, :, 0] = found
        return self._gather(streams, sources)

    def _gather(self, streams: Sequence[Stream], sources: Addresses) -> dict[int, ColumnValues]:
        """Gather the values. Each row has its own addresses, so the kernel gets it as row 0 of its own block."""
        n = sources.shape[1]
        block, row = np.arange(n, dtype=np.uint32), np.zeros(n, np.uint32)
        found = {}
        for number in dict.fromkeys(stream.column for stream in streams):
            mine = np.ascontiguousarray(sources[[i for i, s in enumerate(streams) if s.column == number]])
            column = self._footer.schema.columns[number]
            served = self._served.get(column.name)
            found[number] = gather_values(column, mine, block, row, url=self._url, served=served)
        return found

    def _load_whole(self, columns: Sequence[int], block: Ids, deadline_s: float | None) -> tuple[Ids, LoadedChunks]:
        """Load the compressed chunks that hold rows. Returns their numbers, ascending, and their decoded bytes."""
        ids = np.unique((block[:, None] * self._n_columns + np.array(columns, np.int64)[None, :]).ravel())
        ids = ids[self._rows["codec"][ids] != codec.RAW]
        return ids, self._chunks.load(ids, deadline_s)

    def _buffer(self, chunk: Ids, buffer: int) -> tuple[Numbers, Numbers]:
        """Return offset and length of a buffer in each chunk, by the buffer's index in the chunk."""
        rows = self._footer.buffers[self._rows["first_buffer"][chunk] + np.uint64(buffer)].astype(np.int64)
        return rows[:, 0], rows[:, 1]

    def _place(self, stream: Stream, block: Ids, row: Numbers) -> _RowRanges:
        """Return the bytes of each row that are read first: two offsets (VAR), one byte (BITS), or the row (FIXED)."""
        chunk = block * self._n_columns + stream.column
        which = stream.values_buffer if stream.offsets_buffer is None else stream.offsets_buffer
        offset, length = self._buffer(chunk, which)
        if stream.kind == VAR:
            start, n_bytes = offset + 8 * row, 16
        elif stream.kind == BITS:
            start, n_bytes = offset + row // 8, 1
        else:
            start, n_bytes = offset + stream.width_bytes * row, stream.width_bytes
        stored = length > 0
        start = np.where(stored, start, 0)
        return _RowRanges(stream, chunk, start, np.where(stored, start + n_bytes, 0), stored)

    def _run(self, place: _RowRanges, addresses: Addresses) -> tuple[_RowRanges, Numbers]:
        """Read and check the offsets of a VAR stream.

        Returns:
            The positions of the rows' elements, and int64[n, 2], the offsets of each row relative to its first element.
        """
        bounds = _read(addresses, 16).view(np.int64).reshape(-1, 2)
        offset, length = self._buffer(place.chunk, place.stream.values_buffer)
        width = place.stream.width_bytes
        wrong = (bounds[:, 0] < 0) | (bounds[:, 1] < bounds[:, 0]) | (bounds[:, 1] > length // width)
        if wrong.any():
            self._chunks.fail(int(place.chunk[np.argmax(wrong)]), "offsets decrease or exceed the chunk")
        start = offset + bounds[:, 0] * width
        end = offset + bounds[:, 1] * width
        lengths = np.zeros_like(bounds)
        lengths[:, 1] = bounds[:, 1] - bounds[:, 0]
        return _RowRanges(place.stream, place.chunk, start, end, end > start), lengths


class _Memory:
    """Loads positions in decoded chunks or in pages, and owns the memory to which the returned addresses point."""

    def __init__(
        self, pages: Pages, rows: npt.NDArray[np.void], whole: tuple[Ids, LoadedChunks], deadline_s: float | None
    ) -> None:
        self._pages = pages
        self._rows = rows
        self._ids, loaded = whole
        self._bases = loaded.addresses
        self._deadline_s = deadline_s
        self._owners: list[Any] = [loaded.owners]

    def keep(self, rows: npt.NDArray[Any]) -> Addresses:
        """Keep a reference to an array, and return the address of each of its rows."""
        self._owners.append(rows)
        return (address_of(rows) + np.arange(len(rows)) * rows.strides[0]).astype(np.uint64)

    def addresses(self, places: Sequence[_RowRanges]) -> list[Addresses]:
        """Return the addresses of each item of places, uint64[n], 0 if nothing is stored. One load reads all pages."""
        if not places:
            return []
        chunk, start, end = (np.concatenate([getattr(p, name) for p in places]) for name in ("chunk", "start", "end"))
        addresses = np.zeros(len(chunk), np.uint64)
        stored = end > start
        raw = stored & (self._rows["codec"][chunk] == codec.RAW)
        if raw.any():
            loaded = self._pages.load(ChunkRanges(chunk[raw], start[raw], end[raw]), self._deadline_s)
            addresses[raw] = loaded.addresses
            self._owners.append(loaded.owners)
        decoded = stored & ~raw
        base = self._bases[np.searchsorted(self._ids, chunk[decoded])]
        addresses[decoded] = base + start[decoded].astype(np.uint64)
        return np.split(addresses, np.cumsum([len(p.chunk) for p in places])[:-1])


def _read(addresses: Addresses, width_bytes: int) -> npt.NDArray[np.uint8]:
    """Return width_bytes from each address, which are read under the SIGBUS guard."""
    n = len(addresses)
    sources = np.zeros((n, 3), np.uint64)
    sources[:, 0] = addresses
    out = np.empty(n * width_bytes, np.uint8)
    gather.gather(gather.FIXED, width_bytes, sources, np.arange(n, dtype=np.uint32), np.zeros(n, np.uint32), out)
    return out


def _bits(addresses: Addresses, row: Numbers) -> npt.NDArray[np.uint8]:
    """Return the bit of each row as a byte 0 or 1; 1 if the address is 0."""
    found = np.ones(len(row), np.uint8)
    some = addresses != 0
    found[some] = (_read(addresses[some], 1) >> (row[some] % 8).astype(np.uint8)) & 1
    return found
