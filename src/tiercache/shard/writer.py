"""ShardWriter: records and batches into shards, streamed to a store."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from tiercache.errors import SchemaError, StoreError
from tiercache.model import ShardInfo
from tiercache.shard.arrow_ingest import Stored
from tiercache.shard.codec import BlockCodec, ColumnCodec, parse_compression
from tiercache.shard.cutter import BlockCutter, Parts
from tiercache.shard.fit import MisfitError
from tiercache.shard.ingest import build_part, part_of_column
from tiercache.shard.layout import FOOTER_LIMIT_BYTES
from tiercache.shard.record_buffer import KEPT, NOT_USUAL, RecordBuffer, misfit_error
from tiercache.shard.shard_file import ShardFile
from tiercache.shard.types import TYPE_KEY, Column, Schema, check_mapping
from tiercache.shard.uploading import Uploads
from tiercache.store.contract import Store

_BROKEN = "broken by an earlier error: only abort() can be called"
# Nothing was written: any process may begin to.
_NEW = "new"


@dataclass(frozen=True)
class ShardOptions:
    """How shards are made.

    shard_bytes, block_bytes: about so many stored and raw bytes. compression: "auto", "none", "zstd" or "zstd:LEVEL",
    for all columns or by column (those not named get "auto"). metadata: JSON-able facts for the footer.
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
            raise ValueError(f"metadata must be JSON-able: {error}") from error

    def compression_of(self, name: str) -> str:
        """The compression of a column."""
        return self.compression if isinstance(self.compression, str) else self.compression.get(name, "auto")


def shard_key(writer_id: str, number: int) -> str:
    """Where a writer's shard `number` goes."""
    return f"shards/{writer_id}-{number:06d}.tcs"


class ShardWriter:
    """Writes records to `shards/<writer id>-<number>.tcs` of a store. For one thread of one process.

    A thread of its own uploads, so the store's errors are raised by a later call, at the latest by finish(); after one
    only abort() can be called. Memory is bounded by a few blocks and four parts of an upload. A shard is visible once
    it is whole. Leaving the context by an exception aborts; else it finishes.
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
        codecs = [ColumnCodec(self._options.compression_of(c.name), c.kind) for c in schema.columns]
        self._codec = BlockCodec(codecs)
        self._block_bytes = min(self._options.block_bytes, self._options.shard_bytes)
        self._cutter = BlockCutter(schema.columns, self._block_bytes)
        self._rows = RecordBuffer(schema.columns, self._block_bytes)
        self._uploads = Uploads(store)
        self._file: ShardFile | None = None
        self._infos: list[ShardInfo] = []
        # Why nothing can be written just now; while records are handed on it says that the writer is broken, which it
        # is if Ctrl-C strikes meanwhile.
        self._ended = _NEW
        self.n_records = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record: a value for each column; a nullable column may be left out.

        Raises:
            SchemaError: a value does not fit, a column is missing or not known; the record is not written.
            StoreError: of what was written before.
        """
        if self._ended:
            self._check_open()
        kept = self._rows.add_usual(record)
        if kept == NOT_USUAL:
            self._check_names(record, at_record=self.n_records)
            kept = self._rows.add(record, self.n_records)
        self.n_records += 1
        if kept != KEPT:
            self._end_block()

    def _end_block(self) -> None:
        """Write all records but the last as a block: what is too much for it begins the next."""
        self._check_open()  # whether the thread has failed: here, and not for every record, which it cost 0.1 us
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
        """Add records by columns of one length: arrays, lists, tensors, or an Arrow batch or table.

        Arrays are only read during the call.

        Raises:
            SchemaError: a value does not fit (it names column, record in the writer's whole input, expected and got);
                columns are missing, not known or of different lengths; nothing of the batch is written.
            StoreError: of what was written before.
        """
        self._check_open()
        if isinstance(columns, pa.RecordBatch | pa.Table):
            if len(set(columns.schema.names)) != len(columns.schema.names):
                raise SchemaError(f"column names must differ, got {columns.schema.names}")
            columns = {field.name: _as_said(field, columns.column(field.name)) for field in columns.schema}
        self._check_names(columns, at_record=None)
        parts = self._parts(columns)
        if not parts[0].n:
            return
        self._ended = _BROKEN
        self._add_rows()
        self.n_records += parts[0].n
        self._write_blocks(self._cutter.add(parts))
        self._rows.set_room(self._cutter.room_bytes)
        self._ended = ""

    def _parts(self, columns: Mapping[str, Any]) -> Parts:
        given = {
            name: part_of(self._schema.columns[self._schema.index(name)], data, self.n_records)
            for name, data in columns.items()
        }
        lengths = {name: part.n for name, part in given.items()}
        n = next(iter(lengths.values()), 0)
        for name, length in lengths.items():
            if length != n:
                first = next(iter(lengths))
                raise SchemaError(
                    f"expected {n} records, as in {first!r}, got {length}", column=name, expected=n, got=length
                )
        missing = [c for c in self._schema.columns if c.name not in given]
        given |= {c.name: build_part(c, [None] * n) for c in missing}
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
            self._uploads.claim()
            self._ended = ""
        if self._ended:
            raise ValueError(f"the writer is {self._ended}")
        if self._uploads.failed:
            self._ended = _BROKEN
            self._uploads.wait()

    def _add_rows(self) -> None:
        if self._rows.n_records:
            self._write_blocks(self._cutter.add(self._rows.take(self._rows.n_records)))

    def _write_blocks(self, blocks: Iterable[Parts]) -> None:
        for block in blocks:
            if self._file is None:
                key = shard_key(self.writer_id, len(self._infos))
                self._file = ShardFile(self._uploads, key, self._schema, self._codec)
            self._file.add_block(block)
            # A quarter of the footer's limit: the next block's rows and the rest of the footer surely fit.
            if self._file.n_bytes >= self._options.shard_bytes or self._file.table_bytes > FOOTER_LIMIT_BYTES // 4:
                self._finish_file()

    def _finish_file(self) -> None:
        if self._file is not None:
            self._infos.append(self._file.finish(self._options.metadata))
            self._file = None

    def finish(self) -> list[ShardInfo]:
        """Write what is pending and close the last shard. Returns all shards in the order of their records."""
        if self._ended != "finished":
            self._check_open()
            self._uploads.claim()
            self._ended = _BROKEN
            self._add_rows()
            last = self._cutter.flush()
            self._write_blocks([] if last is None else [last])
            self._finish_file()
            self._uploads.wait()
            self._ended = "finished"
        return list(self._infos)

    def abort(self) -> None:
        """Drop the shard in the making and delete those that were finished.

        Harmless when repeated, after finish(), and in a process that was forked meanwhile: there it does nothing.
        """
        if self._ended in ("finished", "aborted"):
            return
        self._ended = _BROKEN  # a second Ctrl-C while the thread is waited for leaves it to the next abort()
        if self._uploads.is_here:
            self._drop()
        self._ended = "aborted"

    def _drop(self) -> None:
        self._uploads.abort()
        keys = [info.name for info in self._infos]
        if self._file is not None:
            keys.append(self._file.key)  # Ctrl-C may have struck just after it became visible
            self._file = None
        # What stays when the store fails is named by no version: gc finds it. The error that made us abort is the one
        # to show.
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
            self.abort()  # harmless after finish()


def _as_said(field: pa.Field, data: pa.Array | pa.ChunkedArray) -> Any:
    """A column of an Arrow table, with what its field says of it: that it is in a shard's stored form."""
    return Stored(data) if TYPE_KEY in (field.metadata or {}) else data


def part_of(column: Column, data: Any, first_record: int) -> Any:
    """part_of_column() with misfits as SchemaError.

    first_record: number of the batch's first record in the whole input.
    """
    try:
        return part_of_column(column, data)
    except MisfitError as error:
        raise misfit_error(column, error, first_record + error.index) from error
