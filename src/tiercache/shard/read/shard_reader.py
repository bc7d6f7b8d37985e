"""ShardReader: an open shard, read by blocks or by single records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native import gather
from tiercache.model import ShardIdentity, ShardInfo
from tiercache.shard.conversion import ServedColumns
from tiercache.shard.format import codec
from tiercache.shard.format.layout import Footer
from tiercache.shard.memory import address_of
from tiercache.shard.read.blocks import Blocks, check_indices
from tiercache.shard.read.chunks import Addresses, ChunkRanges, Chunks, Ids, LoadedChunks, Pages, Verify, chunk_ids
from tiercache.shard.read.source import ByteSource, LocalCopy, check_identity, read_footer
from tiercache.shard.read.values import ColumnValues, as_corrupt_shard, block_values, gather_values
from tiercache.shard.schema import BITS, VAR, Kind, Schema, Stream
from tiercache.store.contract import Store

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


class ShardReader:
    """An open shard. Thread-safe without locks; usable in a forked child process if its store is.

    After close(), the end of the last read releases the lease. Blocks that are still in use keep the mapping, which
    pins the local copy without a file descriptor until they are dropped.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        info: ShardInfo | None = None,
        identity: ShardIdentity | None = None,
        verify: Verify = "first",
        served: ServedColumns | None = None,
        footer: Footer | None = None,
    ) -> None:
        """Open a shard: one ranged request if info is given, at most two otherwise.

        Args:
            store: Store that holds the shard.
            key: Key of the shard in the store.
            info: The data set's description of the shard.
            identity: Identity under which a cache keeps its copy.
            verify: When checksums of a local copy are compared: at the "first" read of a page, "always", or "never".
            served: Columns that take() casts, as they are served.
            footer: Footer of the shard that was read earlier; saves the request if there is no local copy. The footer
                of a local copy is always read, because the copy's own footer must be checked.

        Raises:
            NotFound: There is no such object.
            CorruptShard: The object is not a shard, is damaged, or is not the shard that info or identity describes.
            UnsupportedFormat: A newer release wrote the shard.
        """
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
        self._verify = verify
        self._source = ByteSource(store, key, identity)
        self.url = self._source.url
        try:
            if footer is None or self._source.local_copy is not None:
                footer, _ = read_footer(self._source, info)
            self.footer = footer
            check_identity(self.footer, info, identity, self.url)
        except BaseException:
            self._source.close()
            raise
        self._chunks = Chunks(self._source, self.footer, verify)
        self._pages = Pages(self._source, self.footer, verify, self._chunks)
        self._records = RecordReader(self.footer, self.url, self._chunks, self._pages, served)
        self._kept: Blocks | None = None  # the last result of mapped_blocks()
        self._closed = False

    @property
    def schema(self) -> Schema:
        """Schema of the shard."""
        return self.footer.schema

    @property
    def n_records(self) -> int:
        """Number of records of the shard."""
        return self.footer.n_records

    @property
    def local_copy(self) -> LocalCopy | None:
        """The local copy; None if there is none or the reader is closed."""
        return self._source.local_copy

    @property
    def n_descriptors(self) -> int:
        """Number of file descriptors that the reader holds until it is closed or dropped."""
        copy = self._source.local_copy
        return 0 if copy is None else copy.lease.n_descriptors

    def prefetch(self, blocks: Sequence[int], columns: Sequence[int]) -> None:
        """Start fetching these blocks into the local copy, without waiting. Does nothing without a local copy."""
        self._check_open()
        self._source.prefetch(self._chunks.ranges(self._ids(blocks, columns)))

    def load(self, blocks: Sequence[int], columns: Sequence[int], *, deadline_s: float | None = None) -> Blocks:
        """Load blocks into memory, checked and decoded.

        Raw chunks of a local copy stay in the mapping. Their pages are checked when they are first read: by the caller
        of the gather (Blocks.pending_checks), by block_values, or by Blocks.array. If the local copy is complete, the
        blocks are a selection of the result of mapped_blocks().

        Args:
            blocks: Numbers of the blocks, below footer.n_blocks.
            columns: Indices of the columns in the schema, without repetition.
            deadline_s: Number of seconds from now after which the wait for the store ends; None: no limit.

        Raises:
            CorruptShard: Bytes are damaged; the error names the block and the column.
            StoreError: The store failed, or the deadline passed.
        """
        self._check_open()
        check_indices("columns", columns, len(self.schema))
        is_kept = self._kept_of(columns) is not None or self._chunks.can_keep_blocks(columns)
        whole = self.mapped_blocks(columns) if is_kept else None
        return self._load(blocks, columns, deadline_s) if whole is None else whole.select(blocks)

    def is_mapped(self, columns: Sequence[int]) -> bool:
        """Return whether all blocks of these columns are read in place, in the mapping of a local copy."""
        self._check_open()
        if self._kept_of(columns) is not None:
            return True  # the kept blocks hold the lease, so the copy cannot disappear
        return self._chunks.are_mapped(self._ids(range(self.footer.n_blocks), columns))

    def mapped_blocks(self, columns: Sequence[int]) -> Blocks | None:
        """Return all blocks of these columns in the mapping of a local copy.

        The result is kept until a call with other columns: computing it again costs 0.4 ms per shard and epoch.

        Returns:
            The blocks; None if the local copy does not have all of them, if a chunk is not raw, or if verify is
            "always".

        Raises:
            CorruptShard: The file of the copy has been truncated.
        """
        self._check_open()
        kept, copy = self._kept_of(columns), self._source.local_copy
        if kept is not None and copy is not None:
            copy.map_file()  # raises if the file has been truncated
            return kept
        blocks = range(self.footer.n_blocks)
        if not blocks or self._verify == "always" or not self._chunks.are_mapped(self._ids(blocks, columns)):
            return None
        found = self._load(blocks, columns, None)
        if not found.is_cached:  # another thread closed the reader
            return None
        self._kept = found
        if self._closed:  # close() may have run before the assignment
            self._kept = None
        return found

    def take(
        self, rows: npt.ArrayLike, columns: Sequence[int], *, deadline_s: float | None = None
    ) -> list[ColumnValues]:
        """Return the values of single records, in the order of rows. Of a raw column, only the needed pages are read.

        Args:
            rows: Numbers of the records in the shard, int64[n]; may repeat.
            columns: Indices of the columns in the schema.
            deadline_s: Number of seconds from now after which the wait for the store ends; None: no limit.

        Raises:
            IndexError: A row or column does not exist.
            CorruptShard: Bytes are damaged.
            StoreError: The store failed, or the deadline passed.
        """
        self._check_open()
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= self.n_records):
            raise IndexError(f"rows must be 0 to {self.n_records - 1}, got {int(wanted.min())} to {int(wanted.max())}")
        self._ids([], columns)
        return self._records.take(wanted, [int(c) for c in columns], deadline_s)

    def _kept_of(self, columns: Sequence[int]) -> Blocks | None:
        kept = self._kept
        return kept if kept is not None and kept.columns == tuple(columns) else None

    def _load(self, blocks: Sequence[int], columns: Sequence[int], deadline_s: float | None) -> Blocks:
        loaded = self._chunks.load(self._ids(blocks, columns), deadline_s)
        return Blocks(self.footer, self.url, tuple(map(int, blocks)), tuple(map(int, columns)), loaded)

    def _ids(self, blocks: Sequence[int], columns: Sequence[int]) -> Ids:
        check_indices("blocks", blocks, self.footer.n_blocks)
        check_indices("columns", columns, len(self.schema))
        return chunk_ids(blocks, columns, len(self.schema))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.url}: the reader is closed")

    def close(self) -> None:
        """Release the shard. Loaded Blocks stay valid. A repeated call does nothing."""
        self._closed = True
        self._kept = None
        self._source.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an open shard cannot be pickled: open it again in the other process")
