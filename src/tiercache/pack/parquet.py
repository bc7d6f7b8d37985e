"""Parquet files with a common Arrow schema, read by row group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from tiercache.errors import SchemaError
from tiercache.pack.files import Files, InputBatch, InputSplit, Partitions, SourceFile
from tiercache.shard.schema import Schema, UserType

SUFFIXES = (".parquet", ".pq", ".parq")
_PARALLEL_FOOTERS = 16
_BATCH_ROWS = 65536


@dataclass(frozen=True, slots=True)
class Footer:
    """Facts about a file that planning needs.

    Attributes:
        path: Path of the file.
        schema: Arrow schema.
        with_nulls: Columns for which the statistics do not rule out nulls.
        row_group_bytes: Size of each row group in bytes.
    """

    path: str
    schema: pa.Schema
    with_nulls: frozenset[str]
    row_group_bytes: tuple[int, ...]


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files with one schema; implements files.RecordSource.

    Attributes:
        files: Location of the files.
        schema: Schema of the records.
        parts: Splits, one per row group.
        partitions: Columns named by the files' folders.
    """

    files: Files
    schema: Schema
    parts: tuple[InputSplit, ...]
    partitions: Partitions

    def read(self, part: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        """Yield the rows of a row group, with dictionaries decoded. Raises SchemaError for a damaged file."""
        place, first_row = self.files.location(part.path), 0
        constants = self.partitions.values(part.path, self.schema)
        names = [name for name in self.schema.names if name not in constants]
        with _opened(self.files, part.path) as parquet:
            n_rows = max(1, parquet.metadata.row_group(part.start).num_rows)
            rows = max(1, min(_BATCH_ROWS, batch_bytes * n_rows // max(part.n_bytes, 1)))
            batches = parquet.iter_batches(rows, row_groups=[part.start], columns=names)
            while (batch := _next(batches, place)) is not None:
                where = partial(_row_place, place, part.start, first_row)
                first_row += len(batch)
                n_bytes = part.n_bytes * len(batch) // n_rows
                yield InputBatch(self._columns(batch, constants), len(batch), n_bytes, where)

    def _columns(self, batch: pa.RecordBatch, constants: Mapping[str, object]) -> pa.RecordBatch:
        """Return the columns of a batch in the order of the schema: stored columns and partition columns."""
        columns = []
        for column in self.schema.columns:
            if column.name not in constants:
                columns.append(_plain(batch[column.name]))
                continue
            value = constants[column.name]
            known_type = column.storage_type if value is None else None
            columns.append(pa.array([value] * len(batch), known_type))
        return pa.RecordBatch.from_arrays(columns, names=list(self.schema.names))


def find_parquet(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> ParquetFiles:
    """Return the Parquet files of a source, with the schema from their footers.

    A column is nullable if the statistics do not rule out nulls. Columns that Hive partitions name (``year=2024/``)
    follow the stored columns. Raises SchemaError.
    """
    with ThreadPoolExecutor(_PARALLEL_FOOTERS) as pool:
        footers = list(pool.map(partial(_read_footer, files), [f.path for f in found]))
    for footer in footers[1:]:
        _check_same(files.location(footer.path), footer.schema, files.location(footers[0].path), footers[0].schema)
    with_nulls = frozenset().union(*(footer.with_nulls for footer in footers))
    types: dict[str, UserType] = {f.name: f.with_nullable(f.name in with_nulls) for f in footers[0].schema}
    partitions = Partitions.find(files, found, stored=footers[0].schema.names)
    types |= partitions.types
    if new := [name for name in given if name not in types]:
        raise SchemaError(
            f"{files.location(found[0].path)}: no such column; there are {', '.join(types)}", column=new[0]
        )
    parts = [InputSplit(f.path, i, i + 1, n_bytes) for f in footers for i, n_bytes in enumerate(f.row_group_bytes)]
    return ParquetFiles(files, Schema.of(types | dict(given)), tuple(parts), partitions)


def _read_footer(files: Files, path: str) -> Footer:
    with _opened(files, path) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise SchemaError(f"{files.location(path)}: the file has two columns with this name", column=twice)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        with_nulls: set[str] = set()
        for group in groups:
            for chunk in (group.column(i) for i in range(group.num_columns)):
                known = chunk.statistics is not None and chunk.statistics.has_null_count
                if not known or chunk.statistics.null_count:
                    with_nulls.add(_top_name(chunk.path_in_schema, schema))
        nullable = frozenset(name for name in with_nulls if schema.field(name).nullable)
        return Footer(path, schema.remove_metadata(), nullable, tuple(group.total_byte_size for group in groups))


def _top_name(path: str, schema: pa.Schema) -> str:
    """Return the top-level column of a leaf's dotted path; column names may contain dots themselves."""
    parts = path.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
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


def _next(batches: Iterator[pa.RecordBatch], place: str) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(place, error) from error


def _damaged(place: str, error: Exception) -> SchemaError:
    return SchemaError(f"{place}: not a readable Parquet file: {str(error).strip().splitlines()[0]}")


def _row_place(place: str, row_group: int, first_row: int, row: int) -> str:
    return f"{place}, row group {row_group}, row {first_row + row}"


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pt.is_dictionary(column.type) else column


def _check_same(place: str, schema: pa.Schema, first_place: str, first: pa.Schema) -> None:
    if sorted(schema.names) != sorted(first.names):
        differ = sorted(set(schema.names) ^ set(first.names)) or schema.names
        raise SchemaError(f"{place}: its columns differ from those of {first_place}: {', '.join(differ)}")
    for field in schema:
        expected = first.field(field.name).type
        if field.type != expected:
            raise SchemaError(f"{place}: expected {expected} as in {first_place}, got {field.type}", column=field.name)
