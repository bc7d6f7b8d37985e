"""Writer: writes records as a new version of a data set. ShardWriter streams them to a store as shards."""

from __future__ import annotations

import os
import secrets
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tiercache._native import block_builder
from tiercache._native.block_builder import ADDED, NEEDS_CONVERSION, BlockBuilder
from tiercache.errors import SchemaError, StoreError
from tiercache.model import ShardInfo, parse_bytes
from tiercache.shard.codec import BlockCodec, parse_compression
from tiercache.shard.conversion import (
    ConversionError,
    StoredArray,
    as_table,
    build_column_data,
    convert_column,
    infer_batch,
    infer_records,
    value_converter,
)
from tiercache.shard.footer import FOOTER_LIMIT_BYTES
from tiercache.shard.schema import (
    FLOATS,
    INTEGERS,
    TYPE_KEY,
    Column,
    Kind,
    Schema,
    UserType,
    check_mapping,
    check_same_schema,
)
from tiercache.shard.shard_file import BlockCutter, BlockData, ColumnData, ShardFile, UploadQueue
from tiercache.shard.versions import (
    SHARDS_FOLDER,
    Commit,
    Version,
    VersionKind,
    check_mode,
    find_parent,
)
from tiercache.store import open_store
from tiercache.store.contract import Store

if TYPE_CHECKING:
    import pandas as pd

_LARGEST_INT64 = 2**63 - 1
# Number of records among which each column needs a value, if a Writer has no schema.
_FIRST_RECORDS = 100


class RecordBuffer:
    """Buffer of records that are not written yet: at most a block and one record. For one thread.

    add_fast(record) is the fast path, which takes a tenth of the time of add(): it accepts a dict whose values have
    exactly the types of the columns. It returns ADDED; EXCEEDS_BLOCK (the record is kept and exceeds the block: take()
    the records before it); or NEEDS_CONVERSION (nothing was kept: call add()).
    """

    def __init__(self, schema: Schema, block_bytes: int) -> None:
        self._schema = schema
        self._columns = columns = schema.columns
        self._names = set(schema.names)
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
        """Add a record; a missing column is null. Returns ADDED or EXCEEDS_BLOCK.

        number: Number of the record in the writer's input, for the SchemaError of a value that does not fit; then
        nothing of the record is kept.
        """
        check_mapping(record)
        if record.keys() != self._names:
            _check_names(self._schema, record, at_record=number)
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
    hint = f"; a column with nulls has the type '{column}?'" if error.got in ("None", "null") else ""
    return SchemaError(f"{error}{hint}", column=column.name, record=record, expected=error.expected, got=error.got)


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
    """Options of a ShardWriter: sizes of shards (stored) and blocks (before compression); the rest as in Writer."""

    shard_bytes: int = 128 << 20
    block_bytes: int = 1 << 20
    compression: str | Mapping[str, str] = "auto"

    def __post_init__(self) -> None:
        if self.shard_bytes < 1 or self.block_bytes < 1:
            raise ValueError(f"sizes must be 1 byte or more, got shard {self.shard_bytes} and block {self.block_bytes}")
        names = [self.compression] if isinstance(self.compression, str) else self.compression.values()
        for name in names:
            parse_compression(name)

    def compression_of(self, name: str) -> str:
        """Return the compression of the column with this name."""
        return self.compression if isinstance(self.compression, str) else self.compression.get(name, "auto")


def shard_key(writer_id: str, number: int) -> str:
    """Return the key of a writer's shard with this number."""
    return f"{SHARDS_FOLDER}{writer_id}-{number:06d}.tcs"


def convert_batch(schema: Schema, columns: Mapping[str, Any] | pa.RecordBatch | pa.Table, n_before: int) -> BlockData:
    """Return a batch in stored form. n_before: Number of the first record, for errors. Raises SchemaError."""
    if isinstance(columns, pa.RecordBatch | pa.Table):
        if len(set(columns.schema.names)) != len(columns.schema.names):
            raise SchemaError(f"column names must differ, got {columns.schema.names}")
        # The metadata of a field says whether the column is in stored form.
        columns = {
            field.name: StoredArray(data) if TYPE_KEY in (field.metadata or {}) else data
            for field, data in zip(columns.schema, columns.columns, strict=True)
        }
    check_mapping(columns)
    _check_names(schema, columns, at_record=None)
    given: dict[str, ColumnData] = {}
    for name, data in columns.items():
        column = schema.columns[schema.index(name)]
        try:
            given[name] = convert_column(column, data)
        except ConversionError as error:
            raise misfit_error(column, error, n_before + error.index) from error
    lengths = {name: part.n for name, part in given.items()}
    n = next(iter(lengths.values()), 0)
    for name, length in lengths.items():
        if length != n:
            first = next(iter(lengths))
            raise SchemaError(
                f"expected {n} records, as in {first!r}, got {length}", column=name, expected=n, got=length
            )
    missing = [c for c in schema.columns if c.name not in given]
    given |= {c.name: build_column_data(c, [None] * n) for c in missing}
    return [given[name] for name in schema.names]


def _check_names(schema: Schema, named: Mapping[str, Any], *, at_record: int | None) -> None:
    for name in named:
        schema.index(name)
    for column in schema.columns:
        if column.name not in named and not column.nullable:
            raise SchemaError(
                "it is missing", column=column.name, record=at_record, expected=str(column), got="nothing"
            )


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
        self._options = options or ShardOptions()
        if not isinstance(self._options.compression, str):
            for name in self._options.compression:
                schema.index(name)
        self.writer_id = writer_id or secrets.token_hex(8)
        self._codec = BlockCodec([(self._options.compression_of(c.name), c.kind) for c in schema.columns])
        self._block_bytes = min(self._options.block_bytes, self._options.shard_bytes)
        self._cutter = BlockCutter(schema.columns, self._block_bytes)
        self._rows = RecordBuffer(schema, self._block_bytes)
        self._uploads = UploadQueue(store)
        self._file: ShardFile | None = None
        self._infos: list[ShardInfo] = []
        # The reason why nothing can be written now, or "". It is _BROKEN while records are handed on: a
        # KeyboardInterrupt in that time leaves the writer broken.
        self._ended = _NEW
        self.n_records = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """See Writer.write."""
        if self._ended:
            self._check_open()
        kept = self._rows.add_fast(record)
        if kept == NEEDS_CONVERSION:
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
        batch = convert_batch(self._schema, columns, self.n_records)
        if not batch[0].n:
            return
        self._ended = _BROKEN
        self._add_rows()
        self.n_records += batch[0].n
        self._write_blocks(self._cutter.add(batch))
        self._rows.set_room(self._cutter.room_bytes)
        self._ended = ""

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
            self._infos.append(self._file.finish())
            self._file = None

    def finish(self) -> list[ShardInfo]:
        """Write the pending records and close the last shard. Returns all shards in the order of their records."""
        if self._ended != "finished":
            self._check_open()
            self._uploads.claim_process()
            self._ended = _BROKEN
            self._add_rows()
            last = self._cutter.flush()
            self._write_blocks([] if last is None else [last])
            self._finish_file()
            self._uploads.wait()
            self._ended = "finished"
        return list(self._infos)

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


class Writer:
    """Writer of a data set: uploads shards while records arrive, and commits once, in close().

    For one process and one thread. A background thread uploads, so a later call raises the error of a store, at the
    latest close(). Used as a context manager, the writer commits at the end of the `with` block; if an exception leaves
    the block, the writer commits nothing and deletes the shards that it has written. A killed writer needs no clean-up,
    because no version lists its shards; `tiercache gc` removes them later. A writer with records that is dropped
    without close() or abort(), or is still open when the program ends, commits nothing: it prints an error line on
    standard error and gives a ResourceWarning.

    Attributes:
        version: The committed version; None before the commit.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        schema: Mapping[str, UserType] | pa.Schema | Schema | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
        mode: VersionKind = "create",
        shard_size: int | str = "128MiB",
        block_size: int | str = "1MiB",
        compression: str | Mapping[str, str] = "auto",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the newest version at url, if any, and check mode and schema against it. Nothing is written yet.

        Args:
            url: URL or path of the data set's folder.
            schema: Mapping of column names to types (docs/guide/datasets.md), or an Arrow schema. None: the schema of
                the data set (append), or the schema that is inferred from the first record or batch.
            classes: Mapping of columns of integers to the class names of their labels 0, 1, 2, ....
            mode: "create" makes a new data set; "append" adds records to an existing one; "overwrite" replaces one, or
                creates it. Until an overwrite commits, readers see the old version; later they can open it by number.
            shard_size: Approximate size of a shard in stored bytes; an int or a text such as "128MiB".
            block_size: Approximate size of a block in bytes before compression; an int or a text such as "1MiB".
            compression: "auto", "none", "zstd" or "zstd:LEVEL", for all columns, or a mapping by column name.
            storage_options: Options of the store, such as credentials and the region.

        Raises:
            CommitConflict: mode is "create", and a data set exists at url.
            NotFound: mode is "append", and no data set exists at url.
            SchemaError: The schema is invalid, or differs from the schema of the data set to append to.
            UnsupportedFormat: Only a later release may write to the data set.
            ValueError: Another argument is invalid.
            StoreError: The store failed.
        """
        check_mode(mode)
        self._options = ShardOptions(parse_bytes(shard_size), parse_bytes(block_size), compression)
        self._mode = mode
        self._store = open_store(url, **(storage_options or {}))
        self._shards: ShardWriter | None = None
        self._finalizer: weakref.finalize[..., Writer] | None = None
        self._commit: Commit | None = None
        self._ended = ""
        self.version: Version | None = None
        self._first_records: list[dict[str, Any]] = []  # records that wait for the schema
        self._classes = dict(classes or {})
        given = None if schema is None else Schema.of(schema).with_classes(self._classes)
        self._parent = find_parent(self._store, mode)
        if mode == "append" and self._parent is not None:
            if given is None:
                given = self._parent.schema.with_classes(self._classes)
            check_same_schema(self._parent.schema, given)
            given = self._parent.schema
        self._schema = given
        if given is not None:
            self._begin(ShardWriter(self._store, given, self._options))

    def _begin(self, shards: ShardWriter) -> None:
        self._shards = shards
        self._watch(lambda: shards.n_records)

    def _watch(self, count_records: Callable[[], int]) -> None:
        """Report the records that are lost if this writer is dropped. The function must not refer to the writer."""
        self._end_watch()
        self._finalizer = weakref.finalize(self, _report_unclosed, self.url, count_records, os.getpid())

    def _end_watch(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()

    @property
    def url(self) -> str:
        """URL of the data set, without credentials."""
        return self._store.url

    @property
    def schema(self) -> Schema | None:
        """Schema of the data set; None until it is given or inferred."""
        return self._schema

    @property
    def n_records(self) -> int:
        """Number of records that this writer has written so far."""
        return self._shards.n_records if self._shards is not None else len(self._first_records)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record.

        If no schema was given, the first record gives the types. Where it has None or an empty list, the next records
        do, up to 100; a copy of these records waits until then.

        Args:
            record: Mapping of column names to values. A nullable column may be missing.

        Raises:
            SchemaError: A value does not fit its column. The error names the column, the record, the expected and the
                actual value; the record is not written.
            StoreError: The store failed, possibly for records written before. The caller can then only leave the
                context or call abort().
            ValueError: The writer is closed.
        """
        if self._shards is not None:
            self._shards.write(record)
            return
        self._check_open()
        try:
            schema = infer_records([*self._first_records, record])
        except SchemaError as error:
            if not error.details.get("is_untyped") or len(self._first_records) + 1 == _FIRST_RECORDS:
                raise
            self._first_records.append(deepcopy(dict(record)))
            self._watch(self._first_records.__len__)
            return
        with self._starting(schema) as shards:
            shards.write(record)

    def write_batch(self, columns: Mapping[str, Any] | pa.RecordBatch | pa.Table | pd.DataFrame) -> None:
        """Add several records, given by column. After an error none of them is written.

        If no schema was given, a column is nullable if the first batch has a null in it.

        Args:
            columns: Mapping of column names to arrays or lists of equal length; or an Arrow record batch or table, or a
                frame of pandas or polars. NaN in a frame is a null only in columns of pandas' own types.

        Raises:
            SchemaError, StoreError, ValueError: See write().
        """
        columns = as_table(columns)
        if self._shards is None:
            with self._starting(infer_batch(columns)) as shards:
                shards.write_batch(columns)
        else:
            self._shards.write_batch(columns)

    def close(self) -> None:
        """Finish the last shard and commit. A repeated call is safe. An error before the commit aborts the writer.

        Raises:
            CommitConflict: Another writer created or changed the data set first; this writer changed nothing.
            SchemaError: No schema was given and no record was written; or an overwrite by another writer changed the
                schema of the data set to append to.
            StoreError: The store failed. If .maybe_done is true, the commit may have happened: call close() again to
                find out and to finish it.
            ValueError: The writer was aborted.
        """
        if self._ended == "closed":
            return
        self._check_open()
        self._end_watch()  # from here on, an exception says what was not committed
        if self._commit is None:
            try:
                if self._first_records:
                    infer_records(self._first_records)  # raises the error that names the column without a type
                if self._shards is None or self._schema is None:
                    raise SchemaError("cannot create a data set: no schema was given and no record was written")
                infos, schema, writer_id = self._shards.finish(), self._schema, self._shards.writer_id
                self._commit = Commit(
                    self._store, infos, schema=schema, mode=self._mode, parent=self._parent, writer_id=writer_id
                )
            finally:
                if self._commit is None:
                    self.abort()
        self.version = self._commit.run()
        self._ended = "closed"
        self._store.close()

    def abort(self) -> None:
        """Commit nothing, and delete the shards that were written. On a closed or aborted writer, do nothing.

        If the commit itself failed, the shards are kept, because the commit may have happened.
        """
        if self._ended:
            return
        self._end_watch()
        self._ended = "aborted"
        # A shard that cannot be deleted now is harmless, because no version lists it.
        with suppress(StoreError):
            if self._shards is not None:
                self._shards.abort()
        self._store.close()

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError(f"the writer is {self._ended}")

    @contextmanager
    def _starting(self, schema: Schema) -> Iterator[ShardWriter]:
        """Yield a shard writer for an inferred schema; drop both if the data that gave the schema cannot be written."""
        self._check_open()
        first = self._first_records
        nullable = {c.name: c.nullable or any(record.get(c.name) is None for record in first) for c in schema.columns}
        schema = Schema.of({c.name: c.arrow.with_nullable(nullable[c.name]) for c in schema.columns})
        schema = schema.with_classes(self._classes)
        shards = ShardWriter(self._store, schema, self._options)
        self._schema = schema
        self._begin(shards)
        try:
            for record in first:
                shards.write(record)
            yield shards
            self._first_records = []
        except SchemaError:
            self._watch(first.__len__)
            self._schema = self._shards = None
            raise

    def __repr__(self) -> str:
        state = self._ended or "open"
        if self.version is not None:
            state = f"committed as version {self.version.number}"
        schema = "schema not known yet" if self._schema is None else repr(self._schema)
        records = f"{self.n_records:,} record{'' if self.n_records == 1 else 's'}"
        return f"Writer({self.url!r}, mode={self._mode!r}, {state}, {records}: {schema})"

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.abort()
        elif self._ended != "aborted":
            self.close()


def _report_unclosed(url: str, count_records: Callable[[], int], pid: int) -> None:
    """Report the records of a writer that nothing refers to any more, or that is open when the program ends."""
    n_records = count_records()
    if not n_records or pid != os.getpid():  # a forked child has only a copy of the writer
        return
    records = "1 record" if n_records == 1 else f"{n_records:,} records"
    text = f"{url}: a Writer with {records} was not closed, so nothing was committed: use `with`, or call close()"
    if sys.stderr is not None:
        sys.stderr.write(f"tiercache: error: {text}\n")  # Python does not show a ResourceWarning by default
    warnings.warn(text, ResourceWarning, stacklevel=2)
