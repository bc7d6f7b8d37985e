"""Parquet files: read by row group for packing, and written by the export of a data set."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from tiercache.config import available_cpus
from tiercache.errors import SchemaError, StoreError
from tiercache.packer.files import Files, InputBatch, InputSplit, SourceFile, find_partitions, partition_values
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema, UserType
from tiercache.shard.versions import ShardTable, Version, read_shards
from tiercache.store import Store, Upload

SUFFIXES = (".parquet", ".pq", ".parq")
_PARALLEL_FOOTERS = 16
_BATCH_ROWS = 65536


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files with one schema, a files.RecordSource with one split per row group."""

    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]
    partitions: Mapping[str, UserType]

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        """Yield the rows of a row group, with dictionaries decoded. Raises SchemaError for a damaged file."""
        location, first_row = self.files.location(split.path), 0
        constants = partition_values(split.path, self.partitions, self.schema)
        names = [name for name in self.schema.names if name not in constants]
        with _opened(self.files, split.path) as parquet:
            n_rows = max(1, parquet.metadata.row_group(split.start).num_rows)
            rows = max(1, min(_BATCH_ROWS, batch_bytes * n_rows // max(split.n_bytes, 1)))
            batches = parquet.iter_batches(rows, row_groups=[split.start], columns=names)
            while (batch := _next(batches, location)) is not None:
                where = partial(_row_location, location, split.start, first_row)
                first_row += len(batch)
                n_bytes = split.n_bytes * len(batch) // n_rows
                yield InputBatch(self._columns(batch, constants), len(batch), n_bytes, where)

    def _columns(self, batch: pa.RecordBatch, constants: Mapping[str, object]) -> pa.RecordBatch:
        """Return the columns of a batch in the order of the schema: stored columns and partition columns."""
        columns = []
        for column in self.schema.columns:
            if column.name in constants:
                value = constants[column.name]
                columns.append(pa.array([value] * len(batch), column.storage_type if value is None else None))
            else:
                stored = batch[column.name]
                columns.append(stored.dictionary_decode() if pt.is_dictionary(stored.type) else stored)
        return pa.RecordBatch.from_arrays(columns, names=list(self.schema.names))


def find_parquet(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> ParquetFiles:
    """Return the Parquet files of a source, with the schema from their footers. given: types of some columns.

    A column is nullable unless the statistics of all row groups show that it has no null. Those of a column of lists or
    structs count empty lists and the nulls inside the values as well. Columns that Hive partitions name
    (``year=2024/``) follow the stored columns. Raises SchemaError.
    """
    with ThreadPoolExecutor(_PARALLEL_FOOTERS) as pool:
        footers = list(pool.map(partial(_read_footer, files), [f.path for f in found]))
    for file, footer in zip(found[1:], footers[1:], strict=True):
        _check_same(files.location(file.path), footer.schema, files.location(found[0].path), footers[0].schema)
    with_nulls = set().union(*(footer.with_nulls for footer in footers))
    types: dict[str, UserType] = {f.name: f.with_nullable(f.name in with_nulls) for f in footers[0].schema}
    partitions = find_partitions(files, found, footers[0].schema.names)
    types |= partitions
    if new := [name for name in given if name not in types]:
        raise SchemaError(
            f"{files.location(found[0].path)}: no such column; there are {', '.join(types)}", column=new[0]
        )
    splits = [
        InputSplit(file.path, i, i + 1, n_bytes)
        for file, footer in zip(found, footers, strict=True)
        for i, n_bytes in enumerate(footer.row_group_bytes)
    ]
    return ParquetFiles(files, Schema.of(types | dict(given)), tuple(splits), partitions)


class _Footer(NamedTuple):
    """Schema of a file, columns that may have nulls, and each row group's size."""

    schema: pa.Schema
    with_nulls: frozenset[str]
    row_group_bytes: tuple[int, ...]


def _read_footer(files: Files, path: str) -> _Footer:
    with _opened(files, path) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise SchemaError(f"{files.location(path)}: the file has two columns with this name", column=twice)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        with_nulls: set[str] = set()
        for group in groups:
            if not group.num_rows:  # has no statistics
                continue
            no_nulls = {
                _top_name(chunk.path_in_schema, schema)
                for chunk in (group.column(i) for i in range(group.num_columns))
                if chunk.statistics is not None and chunk.statistics.has_null_count and not chunk.statistics.null_count
            }  # a null counts as a null of every leaf
            with_nulls |= {field.name for field in schema if field.nullable} - no_nulls
        sizes = tuple(group.total_byte_size for group in groups)
        return _Footer(schema.remove_metadata(), frozenset(with_nulls), sizes)


def _top_name(path: str, schema: pa.Schema) -> str:
    """Return the top-level column of a leaf's dotted path; column names may contain dots themselves."""
    segments = path.split(".")
    names = [".".join(segments[:n]) for n in range(len(segments), 0, -1)]
    return next(name for name in names if name in schema.names)


@contextmanager
def _opened(files: Files, path: str) -> Iterator[pq.ParquetFile]:
    with files.open(path) as file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=True)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(files.location(path), error) from error
        with parquet:
            yield parquet


def _next(batches: Iterator[pa.RecordBatch], location: str) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(location, error) from error


def _damaged(location: str, error: Exception) -> SchemaError:
    return SchemaError(f"{location}: not a readable Parquet file: {str(error).strip().splitlines()[0]}")


def _row_location(location: str, row_group: int, first_row: int, row: int) -> str:
    return f"{location}, row group {row_group}, row {first_row + row}"


def _check_same(location: str, schema: pa.Schema, first_location: str, first: pa.Schema) -> None:
    if sorted(schema.names) != sorted(first.names):
        differ = sorted(set(schema.names) ^ set(first.names)) or schema.names
        raise SchemaError(f"{location}: its columns differ from those of {first_location}: {', '.join(differ)}")
    for column in schema:
        expected = first.field(column.name).type
        if column.type != expected:
            raise SchemaError(
                f"{location}: expected {expected} as in {first_location}, got {column.type}", column=column.name
            )


_PART_BYTES = 16 << 20
_ROW_GROUP_BYTES = 64 << 20
_ROW_GROUP_ROWS = 1 << 20
_CODECS = ("none", "snappy", "gzip", "brotli", "lz4", "zstd")
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export: columns in order (None: all), number of files of a folder that are written in parallel.

    jobs=0 stands for one per CPU; overwrite says whether existing files are replaced; compression is one of _CODECS.
    """

    columns: Sequence[str] | None = None
    jobs: int = 1
    overwrite: bool = False
    compression: str = "zstd"

    def __post_init__(self) -> None:
        if self.compression not in _CODECS:
            raise ValueError(f"compression must be one of {', '.join(_CODECS)}, got {self.compression!r}")
        if self.jobs < 0:
            raise ValueError(f"jobs must be a number of files, or 0 for one per CPU, got {self.jobs}")


@dataclass(frozen=True)
class Export:
    """Export of one version of the data set in `source` to files in `target`."""

    source: Store
    version: Version
    target: Store
    options: ExportOptions = field(default_factory=ExportOptions)

    def to_file(self, key: str, on_progress: Callable[[int], None] | None = None) -> int:
        """Write all records to one Parquet file, which is visible once it is complete.

        Returns the number of records. Raises StoreError (also
        if the file exists and overwrite is False) and CorruptShard.
        """
        shards = read_shards(self.source, self.version)
        return self._write(key, shards, range(len(shards)), on_progress)

    def to_folder(self, on_progress: Callable[[int], None] | None = None) -> int:
        """Write `part-00000.parquet`, ...: one file per shard, at least one, options.jobs in parallel. See to_file().

        Files of a longer export that is overwritten are deleted at the end, because they would be read as part of this
        one.
        """
        shards = read_shards(self.source, self.version)
        n_files = max(1, len(shards))
        matches = filter(None, (_PART_NAME.fullmatch(info.key) for info in self.target.list()))
        stale = sorted(number[0] for number in matches if int(number[1]) >= n_files)
        if stale and not self.options.overwrite:
            raise StoreError(
                "the folder holds a file of another export; choose another folder, or overwrite",
                url=f"{self.target.url}/{stale[0]}",
            )

        def write(number: int) -> int:
            chosen = range(number, min(number + 1, len(shards)))
            return self._write(f"part-{number:05d}.parquet", shards, chosen, on_progress)

        with ThreadPoolExecutor(self.options.jobs or available_cpus(), "tiercache-export") as pool:
            n_records = sum(pool.map(write, range(n_files)))
        if stale:
            self.target.delete(stale)
        return n_records

    @property
    def schema(self) -> Schema:
        """Schema of the exported columns."""
        schema = self.version.schema
        return schema if self.options.columns is None else schema.select(self.options.columns)

    def _write(
        self, key: str, shards: ShardTable, chosen: Sequence[int], on_progress: Callable[[int], None] | None
    ) -> int:
        schema, n_records = self.schema.arrow, 0
        with self.target.create(key) as upload:
            sink = _UploadFile(upload, max(_PART_BYTES, self.target.min_part_bytes))
            with pq.ParquetWriter(sink, schema, compression=self.options.compression) as writer:
                for shard in chosen:
                    for table in self._row_groups(shards, shard):
                        writer.write_table(table, row_group_size=max(1, table.num_rows))
                        n_records += table.num_rows
                    if on_progress is not None:
                        on_progress(int(shards.n_bytes[shard]))
            sink.finish()
            if upload.complete(if_absent=not self.options.overwrite) is None:
                raise StoreError(
                    "the file already exists; choose another name, or overwrite", url=f"{self.target.url}/{key}"
                )
        return n_records

    def _row_groups(self, shards: ShardTable, shard: int) -> Iterator[pa.Table]:
        """Yield a shard's records in tables of about a row group each."""
        info, names = shards.info(shard), self.schema.names
        identity = info.identity(self.version.dataset_id)
        with ShardReader(self.source, info.name, info=info, identity=identity) as reader:
            columns = [reader.schema.index(name) for name in names]
            pending: list[pa.RecordBatch] = []
            for block in range(reader.footer.n_blocks):
                loaded = reader.load([block], columns)
                arrays = [loaded.array(0, column) for column in columns]
                pending.append(pa.RecordBatch.from_arrays(arrays, schema=self.schema.arrow))
                n_bytes = sum(batch.nbytes for batch in pending)
                if n_bytes >= _ROW_GROUP_BYTES or sum(map(len, pending)) >= _ROW_GROUP_ROWS:
                    yield pa.Table.from_batches(pending)
                    pending = []
            if pending:
                yield pa.Table.from_batches(pending)


class _UploadFile(io.RawIOBase):
    """Sequential writable file over an upload. finish() uploads the remaining bytes."""

    def __init__(self, upload: Upload, part_bytes: int) -> None:
        self._upload, self._part_bytes = upload, part_bytes
        self._pending = bytearray()
        self._n_parts = 0
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._pending += data
        n_bytes = memoryview(data).nbytes
        self._position += n_bytes
        if len(self._pending) >= self._part_bytes:
            self._put()
        return n_bytes

    def _put(self) -> None:
        part, self._pending = self._pending, bytearray()
        self._upload.put_part(self._n_parts, part)
        self._n_parts += 1

    def finish(self) -> None:
        if self._pending or not self._n_parts:
            self._put()
