"""Parquet files with a common Arrow schema, read by row group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from tiercache.errors import SchemaError
from tiercache.pack.files import Files, InputBatch, InputSplit, SourceFile, find_partitions, partition_values
from tiercache.shard.schema import Schema, UserType

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

    A column is nullable if the statistics do not rule out nulls. Columns that Hive partitions name (``year=2024/``)
    follow the stored columns. Raises SchemaError.
    """
    with ThreadPoolExecutor(_PARALLEL_FOOTERS) as pool:
        footers = list(pool.map(partial(_read_footer, files), [f.path for f in found]))
    for file, footer in zip(found[1:], footers[1:], strict=True):
        _check_same(files.location(file.path), footer.schema, files.location(found[0].path), footers[0].schema)
    with_nulls = frozenset().union(*(footer.with_nulls for footer in footers))
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
    """Schema of a file, columns for which the statistics do not rule out nulls, and the size of each row group."""

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
            for chunk in (group.column(i) for i in range(group.num_columns)):
                has_count = chunk.statistics is not None and chunk.statistics.has_null_count
                if not has_count or chunk.statistics.null_count:
                    with_nulls.add(_top_name(chunk.path_in_schema, schema))
        nullable = frozenset(name for name in with_nulls if schema.field(name).nullable)
        return _Footer(schema.remove_metadata(), nullable, tuple(group.total_byte_size for group in groups))


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
    for field in schema:
        expected = first.field(field.name).type
        if field.type != expected:
            raise SchemaError(
                f"{location}: expected {expected} as in {first_location}, got {field.type}", column=field.name
            )
