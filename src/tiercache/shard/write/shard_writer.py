"""ShardWriter: writes records and batches as shards, which it streams to a store."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache._native import block_builder
from tiercache._native.block_builder import ADDED, EXCEEDS_BLOCK, NEEDS_CONVERSION, BlockBuilder
from tiercache.errors import SchemaError, StoreError
from tiercache.model import ShardInfo
from tiercache.shard.column_types import FLOATS, INTEGERS, Kind
from tiercache.shard.conversion import ConversionError
from tiercache.shard.format.codec import BlockCodec, parse_compression
from tiercache.shard.format.layout import FOOTER_LIMIT_BYTES
from tiercache.shard.schema import TYPE_KEY, Column, Schema, check_mapping
from tiercache.shard.write.column_data import BlockCutter, BlockData, ColumnData
from tiercache.shard.write.ingest import StoredArray, build_column_data, convert_column, value_converter
from tiercache.shard.write.shard_file import ShardFile, UploadQueue
from tiercache.store.contract import Store

__all__ = ["ADDED", "EXCEEDS_BLOCK", "NEEDS_CONVERSION", "RecordBuffer", "misfit_error"]

_LARGEST_INT64 = 2**63 - 1


class RecordBuffer:
    """Buffer of records that are not written yet: at most a block and one record. For one thread.

    add_fast(record) is the fast path, which takes a tenth of the time of add(): it accepts a dict whose values have
    exactly the types of the columns. It returns ADDED; EXCEEDS_BLOCK (the record is kept and exceeds the block: take()
    the records before it); or NEEDS_CONVERSION (nothing was kept: check the names, then call add()).
    """

    def __init__(self, columns: tuple[Column, ...], block_bytes: int) -> None:
        self._columns = columns
        self._converters = [value_converter(column) for column in columns]
        self._objects: dict[int, list[Any]] = {i: [] for i, c in enumerate(columns) if c.kind is Kind.ARROW}
        self._records = BlockBuilder([_spec_of(column) for column in columns], block_bytes)
        self.add_fast = self._records.add

    @property
    def cuts_exactly(self) -> bool:
        """Whether the buffer's byte counts decide where blocks end; False with ARROW columns (see BlockCutter)."""
        return not self._objects

    @property
    def n_records(self) -> int:
        """Number of records in the buffer."""
        return self._records.n_records

    def set_room(self, room_bytes: int) -> None:
        """Set the number of bytes that fit into the next block."""
        self._records.limit_bytes = max(room_bytes, 0)

    def add(self, record: Mapping[str, Any], number: int) -> int:
        """Add a record, whose names are checked; a missing column is null. Returns ADDED or EXCEEDS_BLOCK.

        number: Number of the record in the writer's input, for the SchemaError of a value that does not fit; then
        nothing of the record is kept.
        """
        named = {column.name: record.get(column.name) for column in self._columns}
        extra_bytes = 0
        index = self._records.fill(named, 0)
        while index < len(self._columns):
            try:
                value = self._converters[index](named[self._columns[index].name])
            except ConversionError as error:
                raise misfit_error(self._columns[index], error, number) from error
            extra_bytes += self._put(index, value)
            index = self._records.fill(named, index + 1)
        return self._records.commit(extra_bytes)

    def _put(self, index: int, value: Any) -> int:
        """Store a converted value. Returns the number of its bytes that the native buffer does not count."""
        column = self._columns[index]
        if column.kind is Kind.ARROW:
            kept = self._objects[index]
            del kept[self._records.n_records :]  # values of an earlier record that was rejected
            kept.append(value)
            self._records.put(index, 0)
            return 0 if value is None else max(value.nbytes - 1, 0)
        if column.kind is Kind.RAGGED and value is not None:
            self._records.put(index, np.ascontiguousarray(value).reshape(-1).view(np.uint8), value.shape)
        else:
            self._records.put(index, value)
        return 0

    def take(self, n: int) -> BlockData:
        """Remove and return the first n records: all, or all but the last. The result owns its memory."""
        batch = []
        for index, (column, arrays) in enumerate(zip(self._columns, self._records.take(n), strict=True)):
            if column.kind is Kind.ARROW:
                kept = self._objects[index]
                batch.append(build_column_data(column, kept[:n]))
                del kept[:n]
                continue
            values, offsets, shapes, valid = arrays
            if column.kind is Kind.RAGGED:
                values = values[: len(values) // column.stored.itemsize * column.stored.itemsize].view(column.stored)
            elif offsets is None and column.kind is not Kind.BOOL:
                values = values.reshape(n, column.n_elements)
            valid = None if valid is None or valid.all() else valid
            batch.append(ColumnData(n, values, offsets, shapes if column.kind is Kind.RAGGED else None, valid))
        return batch


def misfit_error(column: Column, error: ConversionError, record: int) -> SchemaError:
    """Return a ConversionError as a SchemaError. record: Number of the record in the whole input."""
    return SchemaError(str(error), column=column.name, record=record, expected=error.expected, got=error.got)


@dataclass(frozen=True, slots=True)
class _Spec:
    """Description of a column for _native.block_builder. See Spec there."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    varying: bool
    nullable: bool
    fast_kind: int = block_builder.NONE
    format: str = ""
    scalar_type: type | None = None
    low: int = 0
    high: int = 0
    limit: float = 0.0


def _spec_of(column: Column) -> _Spec:
    dtype, shape, nullable = column.stored, column.shape, column.nullable
    if column.kind is Kind.ARROW:  # self._objects keeps the values; the native buffer has a byte for each
        return _Spec(column.name, np.dtype("u1"), (), varying=False, nullable=False)
    fast_kind = _fast_kind(column)
    limits: dict[str, Any] = {}
    if fast_kind == block_builder.INTEGERS:
        info = np.iinfo(dtype.type)  # type: ignore[type-var]
        limits = {"low": int(info.min), "high": min(int(info.max), _LARGEST_INT64)}
    elif fast_kind == block_builder.FLOATS:
        limits = {"limit": float(np.finfo(dtype.type).max)}  # type: ignore[type-var]
    text = "?" if column.dtype == "bool" else np.empty(1, dtype).data.format
    return _Spec(column.name, dtype, shape, column.has_offsets, nullable, fast_kind, text, dtype.type, **limits)


def _fast_kind(column: Column) -> int:
    kinds = {
        Kind.BOOL: block_builder.BOOLS,
        Kind.BYTES: block_builder.BYTES,
        Kind.IMAGE: block_builder.BYTES,
        Kind.STR: block_builder.TEXT,
    }
    if column.kind in kinds:
        return kinds[column.kind]
    if column.dtype == "bfloat16" or sys.byteorder != "little":  # bits that look like integers; another byte order
        return block_builder.NONE
    if column.kind in (Kind.TENSOR, Kind.RAGGED):
        return block_builder.ARRAYS
    if column.kind is Kind.SCALAR and column.dtype in INTEGERS:
        return block_builder.INTEGERS
    if column.kind is Kind.SCALAR and column.dtype in FLOATS and column.stored.itemsize >= 4:
        return block_builder.FLOATS
    return block_builder.NONE


_BROKEN = "broken by an earlier error: only abort() can be called"
# State of a writer that has written nothing. Any process that holds it may start to write.
_NEW = "new"


@dataclass(frozen=True)
class ShardOptions:
    """Options of a ShardWriter.

    Args:
        shard_bytes: Approximate size of a shard, in stored bytes.
        block_bytes: Approximate size of a block, in bytes before compression.
        compression: "auto", "none", "zstd" or "zstd:LEVEL", for all columns, or a mapping by column name. A column that
            the mapping does not name gets "auto".
        metadata: Values for the footer of each shard; JSON must be able to represent them.
    """

    shard_bytes: int = 128 << 20
    block_bytes: int = 1 << 20
    compression: str | Mapping[str, str] = "auto"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shard_bytes < 1 or self.block_bytes < 1:
            raise ValueError(f"sizes must be 1 byte or more, got shard {self.shard_bytes} and block {self.block_bytes}")
        names = [self.compression] if isinstance(self.compression, str) else self.compression.values()
        for name in names:
            parse_compression(name)
        try:
            json.dumps(dict(self.metadata), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata must be representable as JSON: {error}") from error

    def compression_of(self, name: str) -> str:
        """Return the compression of the column with this name."""
        return self.compression if isinstance(self.compression, str) else self.compression.get(name, "auto")


def shard_key(writer_id: str, number: int) -> str:
    """Return the key of a writer's shard with this number."""
    return f"shards/{writer_id}-{number:06d}.tcs"


class ShardWriter:
    """Writer of records to the objects `shards/<writer id>-<number>.tcs` of a store. For one thread of one process.

    A background thread uploads, so a later call raises the errors of the store, at the latest finish(); after such an
    error the caller can only call abort(). The writer holds a few blocks and at most four upload parts in memory. A
    shard becomes visible when it is complete. As a context manager, the writer aborts if an exception leaves the block,
    and otherwise finishes.
    """

    def __init__(
        self, store: Store, schema: Schema, options: ShardOptions | None = None, *, writer_id: str | None = None
    ) -> None:
        if not len(schema):
            raise SchemaError("a schema needs at least one column")
        self._store = store
        self._schema = schema
        self._names = set(schema.names)
        self._options = options or ShardOptions()
        if not isinstance(self._options.compression, str):
            for name in self._options.compression:
                schema.index(name)
        self.writer_id = writer_id or secrets.token_hex(8)
        self._codec = BlockCodec([(self._options.compression_of(c.name), c.kind) for c in schema.columns])
        self._block_bytes = min(self._options.block_bytes, self._options.shard_bytes)
        self._cutter = BlockCutter(schema.columns, self._block_bytes)
        self._rows = RecordBuffer(schema.columns, self._block_bytes)
        self._uploads = UploadQueue(store)
        self._file: ShardFile | None = None
        self._infos: list[ShardInfo] = []
        # The reason why nothing can be written now, or "". It is _BROKEN while records are handed on: a
        # KeyboardInterrupt in that time leaves the writer broken.
        self._ended = _NEW
        self.n_records = 0
        self.n_added_records = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """See Writer.write."""
        if self._ended:
            self._check_open()
        kept = self._rows.add_fast(record)
        if kept == NEEDS_CONVERSION:
            self._check_names(record, at_record=self.n_records)
            kept = self._rows.add(record, self.n_records)
        self.n_records += 1
        if kept != ADDED:
            self._end_block()

    def _end_block(self) -> None:
        """Write all records but the last as a block. The last one exceeds the block and begins the next block."""
        self._check_open()  # here, because a check of the upload thread for every record costs 0.1 us
        self._ended = _BROKEN
        n = self._rows.n_records - 1
        if not self._rows.cuts_exactly:
            self._add_rows()
            self._rows.set_room(self._cutter.room_bytes)
        elif n or self._cutter.room_bytes < self._block_bytes:
            self._write_blocks([self._cutter.end_block(self._rows.take(n))])
            self._rows.set_room(self._block_bytes)
        self._ended = ""

    def write_batch(self, columns: Mapping[str, Any] | pa.RecordBatch | pa.Table) -> None:
        """See Writer.write_batch. The columns are read only during the call."""
        self._check_open()
        if isinstance(columns, pa.RecordBatch | pa.Table):
            if len(set(columns.schema.names)) != len(columns.schema.names):
                raise SchemaError(f"column names must differ, got {columns.schema.names}")
            # The metadata of a field says whether the column is in stored form.
            columns = {
                field.name: StoredArray(data) if TYPE_KEY in (field.metadata or {}) else data
                for field, data in zip(columns.schema, columns.columns, strict=True)
            }
        self._check_names(columns, at_record=None)
        batch = self._convert(columns)
        if not batch[0].n:
            return
        self._ended = _BROKEN
        self._add_rows()
        self.n_records += batch[0].n
        self._write_blocks(self._cutter.add(batch))
        self._rows.set_room(self._cutter.room_bytes)
        self._ended = ""

    def _convert(self, columns: Mapping[str, Any]) -> BlockData:
        given: dict[str, ColumnData] = {}
        for name, data in columns.items():
            column = self._schema.columns[self._schema.index(name)]
            try:
                given[name] = convert_column(column, data)
            except ConversionError as error:
                raise misfit_error(column, error, self.n_records + error.index) from error
        lengths = {name: part.n for name, part in given.items()}
        n = next(iter(lengths.values()), 0)
        for name, length in lengths.items():
            if length != n:
                first = next(iter(lengths))
                raise SchemaError(
                    f"expected {n} records, as in {first!r}, got {length}", column=name, expected=n, got=length
                )
        missing = [c for c in self._schema.columns if c.name not in given]
        given |= {c.name: build_column_data(c, [None] * n) for c in missing}
        return [given[name] for name in self._schema.names]

    def _check_names(self, named: Mapping[str, Any], *, at_record: int | None) -> None:
        check_mapping(named)
        if named.keys() == self._names:
            return
        for name in named:
            self._schema.index(name)
        for column in self._schema.columns:
            if column.name not in named and not column.nullable:
                raise SchemaError(
                    "it is missing", column=column.name, record=at_record, expected=str(column), got="nothing"
                )

    def _check_open(self) -> None:
        if self._ended == _NEW:
            self._uploads.claim_process()
            self._ended = ""
        if self._ended:
            raise ValueError(f"the writer is {self._ended}")
        if self._uploads.failed:
            self._ended = _BROKEN
            self._uploads.wait()

    def _add_rows(self) -> None:
        if self._rows.n_records:
            self._write_blocks(self._cutter.add(self._rows.take(self._rows.n_records)))

    def _write_blocks(self, blocks: Iterable[BlockData]) -> None:
        for block in blocks:
            if self._file is None:
                key = shard_key(self.writer_id, len(self._infos))
                self._file = ShardFile(self._uploads, key, self._schema, self._codec, self._options.shard_bytes)
            self._file.add_block(block)
            # At a quarter of the footer's limit, the rows of the next block and the rest of the footer still fit.
            if self._file.n_bytes >= self._options.shard_bytes or self._file.table_bytes > FOOTER_LIMIT_BYTES // 4:
                self._finish_file()

    def _finish_file(self) -> None:
        if self._file is not None:
            self._infos.append(self._file.finish(self._options.metadata))
            self._file = None

    def add_shards(self, infos: Iterable[ShardInfo]) -> None:
        """Add finished shards after those of the records so far. See Writer.add_shards."""
        self._check_open()
        self._ended = _BROKEN
        self._end_shard()
        self._rows.set_room(self._cutter.room_bytes)
        added = list(infos)
        self._infos += added
        self.n_added_records += sum(info.n_records for info in added)
        self._ended = ""

    def finish(self) -> list[ShardInfo]:
        """Write the pending records and close the last shard. Returns all shards in the order of their records."""
        if self._ended != "finished":
            self._check_open()
            self._uploads.claim_process()
            self._ended = _BROKEN
            self._end_shard()
            self._uploads.wait()
            self._ended = "finished"
        return list(self._infos)

    def _end_shard(self) -> None:
        """Write the pending records, and close the shard."""
        self._add_rows()
        last = self._cutter.flush()
        self._write_blocks([] if last is None else [last])
        self._finish_file()

    def abort(self) -> None:
        """Discard the unfinished shard and delete the finished ones; do nothing after the end or in a forked child."""
        if self._ended in ("finished", "aborted"):
            return
        self._ended = _BROKEN  # if a second Ctrl-C interrupts the wait for the thread, the next abort() continues
        if self._uploads.is_owner:
            self._drop()
        self._ended = "aborted"

    def _drop(self) -> None:
        self._uploads.abort()
        keys = [info.name for info in self._infos]
        if self._file is not None:
            keys.append(self._file.key)  # Ctrl-C may have arrived just after the shard became visible
            self._file = None
        # A shard that remains when the store fails is in no version. The caller must see the error that led to abort().
        with suppress(StoreError):
            if keys:
                self._store.delete(keys)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abort()  # does nothing after finish()
