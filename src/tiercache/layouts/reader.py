"""An open file of another library's layout, with the interface of an open shard; its blocks as `Blocks`."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache.errors import SchemaError, TierCacheError
from tiercache.layouts.contract import FileBytes, Layout, LayoutFile
from tiercache.model import ByteRange, ObjectInfo, ShardIdentity
from tiercache.shard.blocks import Blocks, LoadedChunks
from tiercache.shard.codec import address_of
from tiercache.shard.conversion import ConversionError, StoredArray, build_column_data, convert_column
from tiercache.shard.footer import CHUNK_ROW, Footer
from tiercache.shard.reader import MAX_RECENT, MAX_RECENT_BYTES, RecentBlocks
from tiercache.shard.schema import Column, RaggedType, Schema
from tiercache.shard.shard_file import BlockData, ColumnData, encode
from tiercache.shard.source import ByteSource, LocalCopy
from tiercache.shard.values import ColumnValues, ServedColumns, block_values
from tiercache.store.contract import Store

# Arrow refuses some buffers without an address, although they have no bytes.
_EMPTY = np.zeros(8, np.uint8)
# What a layout, and the library that it uses, may raise for damaged bytes.
_UNREADABLE = (pa.ArrowException, ArithmeticError, EOFError, LookupError, OSError, ValueError, struct.error)


class SourceBytes(FileBytes):
    """The bytes of a file of a store: from a local copy if there is one, after what is missing there was fetched."""

    def __init__(
        self,
        store: Store,
        info: ObjectInfo,
        identity: ShardIdentity,
        etag: str | None,
        open_other: Callable[[ObjectInfo], SourceBytes],
    ) -> None:
        self._source = ByteSource(store, info.key, identity)
        self._source.etag = etag
        self._open_other = open_other
        self._others: dict[str, SourceBytes] = {}
        super().__init__(self._source.url, info.n_bytes)

    @property
    def local_copy(self) -> LocalCopy | None:
        return self._source.local_copy

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        self._source.prefetch_ranges(ranges, urgent=True)

    def read(self, ranges: Sequence[ByteRange]) -> list[memoryview]:
        for one in ranges:
            if one.end > self.n_bytes:
                raise self.damaged(f"has {self.n_bytes} bytes, but its index names bytes up to {one.end}")
        memory = [np.empty(one.n_bytes, np.uint8).data for one in ranges]
        spans = [(one, view) for one, view in zip(ranges, memory, strict=True) if one.n_bytes]
        if spans:
            self._source.ensure_cached([one for one, _ in spans])
            self._source.read(spans)  # a cache compares its copy with the checksums of its unit map
        return [view.toreadonly() for view in memory]

    def beside(self, info: ObjectInfo) -> FileBytes:
        if info.key not in self._others:
            self._others.setdefault(info.key, self._open_other(info))
        return self._others[info.key]

    @property
    def n_descriptors(self) -> int:
        copies = [one.local_copy for one in (self, *list(self._others.values()))]
        return sum(copy.lease.n_descriptors for copy in copies if copy is not None)

    def close(self) -> None:
        self._source.close()
        for other in self._others.values():
            other.close()


class LayoutReader:
    """An open file of a layout. See `ShardReader`, whose methods these are; nothing is mapped.

    Every read decodes: into memory of its own, or into that of the library that reads the format.
    """

    def __init__(
        self,
        layout: Layout,
        file: LayoutFile,
        data: SourceBytes,
        *,
        served: ServedColumns | None = None,
        recent: RecentBlocks | None = None,
    ) -> None:
        self._layout, self._file, self._data = layout, file, data
        self._served = served or {}
        self._recent: RecentBlocks = deque(maxlen=MAX_RECENT) if recent is None else recent
        self._first = np.append(0, np.cumsum(file.index.n_records))

    @property
    def local_copy(self) -> LocalCopy | None:
        return self._data.local_copy

    @property
    def n_descriptors(self) -> int:
        return self._data.n_descriptors

    def load_blocks(self, blocks: Sequence[int], columns: Sequence[int]) -> Blocks:
        schema = self._layout.schema
        names = [schema.columns[column].name for column in columns]
        data = [self._read(int(block), names) for block in blocks]
        ranges = [self._layout.ranges(self._file, [int(block)], names) for block in blocks]
        stored_bytes = [sum(one.n_bytes for one in some) for some in ranges]
        return blocks_of(
            schema, self._data.url, blocks, columns, data, stored_bytes=stored_bytes, local_copy=self.local_copy
        )

    def load_shapes(self, blocks: Sequence[int], column: int) -> Blocks:
        return self.load_blocks(blocks, [column])

    def _read(self, block: int, names: Sequence[str]) -> BlockData:
        try:
            found = self._layout.read(self._file, self._data, block, names)
        except _UNREADABLE as error:
            if isinstance(error, TierCacheError):
                raise
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise self._data.damaged(f"not readable as {self._layout.name}: {text}", block) from error
        return converted(self._layout.schema, found, names, int(self._file.index.n_records[block]), self._data, block)

    def count_read(self, loaded: Blocks) -> int:
        copy = self.local_copy
        if copy is None:
            return 0
        names = [self._layout.schema.columns[column].name for column in loaded.columns]
        return copy.lease.note_read(loaded.stored_bytes, lambda: self._layout.ranges(self._file, loaded.blocks, names))

    def prefetch_blocks(self, blocks: Sequence[int], columns: Sequence[int]) -> None:
        copy = self.local_copy
        if copy is not None and not copy.lease.present([ByteRange(0, copy.n_bytes)]):
            names = [self._layout.schema.columns[column].name for column in columns]
            self._data.prefetch(self._layout.ranges(self._file, blocks, names))

    def is_mapped(self, _columns: Sequence[int]) -> bool:
        return False

    def mapped_blocks(self, _columns: Sequence[int]) -> None:
        """Return None: nothing is mapped."""

    @property
    def footer(self) -> NoReturn:
        raise TypeError("a file of a layout has an index, and no footer")

    def take(self, rows: npt.ArrayLike, columns: Sequence[int]) -> list[ColumnValues]:
        numbers = np.asarray(rows, np.int64).reshape(-1)
        of_row = np.searchsorted(self._first, numbers, side="right") - 1
        blocks, position = np.unique(of_row, return_inverse=True)
        key = self._file.info.key.encode(), tuple(blocks.tolist()), tuple(columns)
        loaded = next((kept for of, kept in list(self._recent) if of == key), None)
        if loaded is None:
            loaded = self.load_blocks(blocks.tolist(), columns)
            if loaded.private_bytes <= MAX_RECENT_BYTES:
                self._recent.append((key, loaded))
        row = (numbers - self._first[of_row]).astype(np.uint32)
        return block_values(loaded, columns, position.reshape(-1).astype(np.uint32), row, self._served)

    def close(self) -> None:
        self._data.close()


def _is_stored(column: Column, values: object) -> bool:
    """Return whether values are in stored form, as in a file that export() has written: bfloat16 as its 16 bits."""
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        return False
    is_flags = column.dtype == "bool" and isinstance(values.type, RaggedType | pa.FixedShapeTensorType)
    return column.dtype == "bfloat16" or is_flags


def converted(
    schema: Schema, found: Mapping[str, Any], names: Sequence[str], n_records: int, data: FileBytes, block: int
) -> BlockData:
    """Return what a layout has read, in stored form, and checked against the schema and the index."""
    columns: BlockData = []
    for name in names:
        column = schema.columns[schema.index(name)]
        values = found.get(name)
        try:
            if isinstance(values, ColumnData):
                one = values
            elif values is None:
                one = build_column_data(column, [None] * n_records)
            else:
                one = convert_column(column, StoredArray(values) if _is_stored(column, values) else values)
        except ConversionError as error:
            raise SchemaError(
                f"{data.url}, block {block}, record {error.index}: expected {error.expected}, got {error.got}; "
                f"pack() takes a type that has such values: tiercache.pack(source, url, schema={{{name!r}: ...}})",
                column=name,
            ) from error
        if one.n != n_records:
            raise data.damaged(f"column {name!r} has {one.n} records, and the index says {n_records}", block)
        columns.append(one)
    return columns


def blocks_of(
    schema: Schema,
    url: str,
    numbers: Sequence[int],
    columns: Sequence[int],
    data: Sequence[BlockData],
    *,
    stored_bytes: Sequence[int] = (),
    local_copy: LocalCopy | None = None,
) -> Blocks:
    """Return records in memory as loaded blocks: over the same memory, without a copy.

    data: the columns of each block. stored_bytes: bytes that were read for each. local_copy: where they were read.
    """
    chunks = np.zeros((len(numbers), len(schema)), CHUNK_ROW)
    nodes: list[tuple[int, int]] = []
    buffers: list[tuple[int, int]] = []
    owners: list[Any] = []
    for row, block in enumerate(data):
        for place, (number, one) in enumerate(zip(columns, block, strict=True)):
            chunk = encode(schema.columns[number], one)
            entry = chunks[row, number]
            entry["first_node"], entry["first_buffer"] = len(nodes), len(buffers)
            entry["raw"] = sum(chunk.lengths)
            entry["stored"] = stored_bytes[row] if stored_bytes and not place else 0
            nodes += chunk.nodes
            memory = [_aligned(one) for one in chunk.buffers]
            # A chunk is a range of memory that begins at its address. This one begins at 0, and its buffers anywhere.
            buffers += [(address_of(one if one.nbytes else _EMPTY), one.nbytes) for one in memory]
            owners += memory
    footer = Footer(
        schema=schema,
        shard_id=bytes(16),
        n_records=sum(block[0].n for block in data if block),
        n_blocks=len(numbers),
        block_first=np.append(0, np.cumsum([block[0].n for block in data])).astype(np.uint64),
        chunks=chunks,
        nodes=np.array(nodes, np.uint64).reshape(-1, 2),
        buffers=np.array(buffers, np.uint64).reshape(-1, 2),
        pages=np.zeros(0, np.uint32),
    )
    loaded = LoadedChunks(
        np.zeros(len(numbers) * len(columns), np.uint64), owners, sum(one.nbytes for one in owners), copy=local_copy
    )
    found = Blocks(footer, url, tuple(range(len(numbers))), tuple(map(int, columns)), loaded)
    return found.numbered(tuple(map(int, numbers)))


def _aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array if array.flags.aligned else array.copy()
