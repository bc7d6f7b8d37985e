"""Parquet files and JSON lines as sources of a packing."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from tiercache.errors import SchemaError
from tiercache.layouts.hive import find_partitions, partition_values
from tiercache.packer.files import Files, InputBatch, InputSplit, SourceFile
from tiercache.shard.schema import Schema, UserType
from tiercache.store.remote import call_threads

JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".json")
_SCALARS = {bool: "bool", int: "int64", float: "float64", str: "str"}
_SAMPLE_RECORDS = 1000
SPLIT_BYTES = 64 << 20
_BATCH_RECORDS = 4096


def type_of(value: object) -> str | None:
    """Return the type of a JSON value: a scalar type, "int64[*]" or "float64[*]", or "json"; None for null."""
    if value is None:
        return None
    if isinstance(value, list):
        kinds = {type(element) for element in value}
        if kinds <= {int, float}:
            return "float64[*]" if float in kinds else "int64[*]"
        return "json"
    return _SCALARS.get(type(value), "json")


def join(first: str, second: str) -> str | None:
    kinds = {first, second}
    if len(kinds) == 1:
        return first
    if kinds == {"int64", "float64"}:
        return "float64"
    if kinds == {"int64[*]", "float64[*]"}:
        return "float64[*]"
    return "json" if kinds & {"json", "int64[*]", "float64[*]"} else None


def infer_types(records: Iterable[Mapping[str, Any]], location: Callable[[int], str]) -> dict[str, UserType]:
    """Return the types of the columns of records, in the order in which the columns first appear.

    A column is nullable if a record has null or lacks it. Lists of numbers are Ragged, other lists and objects are
    json. location(i) names record i in a SchemaError.
    """
    kinds: dict[str, str | None] = {}
    n_values: dict[str, int] = {}
    n_records = 0
    for index, record in enumerate(records):
        n_records += 1
        for name, value in record.items():
            earlier = kinds.setdefault(name, None)
            if (kind := type_of(value)) is None:
                continue
            n_values[name] = n_values.get(name, 0) + 1
            kinds[name] = kind if earlier is None else join(earlier, kind)
            if kinds[name] is None:
                raise SchemaError(
                    f"{location(index)}: expected {earlier} as in earlier records, got {kind}; {say_type(name)}",
                    column=name,
                )
    types: dict[str, UserType] = {}
    for name, found in kinds.items():
        if found is None:
            raise SchemaError(f"only nulls in the first {n_records} records; {say_type(name)}", column=name)
        types[name] = f"{found}?" if n_values[name] < n_records else found
    return types


def say_type(name: str) -> str:
    return f"specify its type, as in schema={{{name!r}: 'str?'}}"


class _Line(NamedTuple):
    start: int
    end: int
    record: dict[str, Any]


@dataclass(frozen=True)
class JsonLines:
    """Files of JSON lines, a files.RecordSource: byte ranges of plain files, and whole gzipped files."""

    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]
    partitions: Mapping[str, UserType]

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        lines: list[_Line] = []
        for line in _read_lines(self.files, split):
            lines.append(line)
            if line.end - lines[0].start >= batch_bytes or len(lines) == _BATCH_RECORDS:
                yield self._batch(split.path, lines)
                lines = []
        if lines:
            yield self._batch(split.path, lines)

    def _batch(self, path: str, lines: Sequence[_Line]) -> InputBatch:
        constants = partition_values(path, self.partitions, self.schema)
        names = self.schema.names
        for line in lines:
            if not line.record.keys() <= set(names):
                new = next(name for name in line.record if name not in names)
                location = _location(self.files, path, line.start)
                raise SchemaError(f"{location}: a column that the schema lacks; {say_type(new)}", column=new)
        columns = {name: [line.record.get(name, constants.get(name)) for line in lines] for name in names}
        starts, n_bytes = [line.start for line in lines], lines[-1].end - lines[0].start
        return InputBatch(columns, len(starts), n_bytes, lambda i: _location(self.files, path, starts[i]))


def find_jsonl(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> JsonLines:
    """Return the JSON lines of a source; the first 1000 records give the schema. given: types of some columns."""
    splits = split_files(found)
    sample = list(
        islice(((split.path, line) for split in splits for line in _read_lines(files, split)), _SAMPLE_RECORDS)
    )
    if not sample:
        raise SchemaError(f"{files.location(found[0].path)}: the source has no record, so no schema can be inferred")
    records = [{n: v for n, v in line.record.items() if n not in given} for _, line in sample]
    inferred = infer_types(records, lambda i: _location(files, sample[i][0], sample[i][1].start))
    stored = dict.fromkeys(name for _, line in sample for name in line.record)
    partitions = find_partitions([file.path for file in found], files.location, list(stored))
    types = {**inferred, **partitions, **given}
    order = dict.fromkeys([*stored, *partitions, *given])
    return JsonLines(files, Schema.of({name: types[name] for name in order}), splits, partitions)


def split_files(found: Sequence[SourceFile]) -> tuple[InputSplit, ...]:
    """Return the splits of files: byte ranges of plain files, and whole gzipped files."""
    splits = []
    for file in found:
        step = max(file.n_bytes, 1) if _is_gzipped(file.path) else SPLIT_BYTES
        for start in range(0, file.n_bytes, step):
            end = min(start + step, file.n_bytes)
            splits.append(InputSplit(file.path, start, end, end - start))
    return tuple(splits)


def _is_gzipped(path: str) -> bool:
    return path.lower().endswith(".gz")


def _read_lines(files: Files, split: InputSplit) -> Iterator[_Line]:
    """Yield the lines that start in a split, without empty lines. Raises SchemaError."""
    with _opened_lines(files, split.path) as file:
        is_whole = _is_gzipped(split.path)
        at = 0
        if split.start:  # a line that began before this split belongs to the previous one
            file.seek(split.start - 1)
            at = split.start - 1 + len(file.readline())
        while is_whole or at < split.end:
            try:
                text = file.readline()
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise SchemaError(f"{files.location(split.path)}: damaged gzip file: {error}") from error
            if not text:
                return
            start, at = at, at + len(text)
            if not text.isspace():
                yield _Line(start, at, _parsed(text, files, split.path, start))


@contextmanager
def _opened_lines(files: Files, path: str) -> Iterator[IO[bytes]]:
    with files.open(path) as raw:
        if not _is_gzipped(path):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield cast("IO[bytes]", unpacked)


def _parsed(text: bytes, files: Files, path: str, start: int) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{_location(files, path, start)}: not JSON: {error}") from error
    if not isinstance(record, dict):
        location = _location(files, path, start)
        raise SchemaError(f"{location}: expected a JSON object, got {type(record).__name__}")
    return record


def _location(files: Files, path: str, offset: int) -> str:
    """Return the name and line number of the line at a byte offset, for messages; it reads the file up to there."""
    n_lines, left = 1, offset
    with _opened_lines(files, path) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            n_lines += block.count(b"\n")
            left -= len(block)
    return f"{files.location(path)}, line {n_lines}"


PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
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
        with _opened_parquet(self.files, split.path) as parquet:
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
    with call_threads(_PARALLEL_FOOTERS, "tiercache-footer") as pool:
        footers = list(pool.map(partial(_read_footer, files), [f.path for f in found]))
    for file, footer in zip(found[1:], footers[1:], strict=True):
        _check_same(files.location(file.path), footer.schema, files.location(found[0].path), footers[0].schema)
    with_nulls = set().union(*(footer.with_nulls for footer in footers))
    types: dict[str, UserType] = {f.name: f.with_nullable(f.name in with_nulls) for f in footers[0].schema}
    partitions = find_partitions([file.path for file in found], files.location, footers[0].schema.names)
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
    with _opened_parquet(files, path) as parquet:
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
def _opened_parquet(files: Files, path: str) -> Iterator[pq.ParquetFile]:
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
