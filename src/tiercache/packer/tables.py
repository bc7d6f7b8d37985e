"""Tables as sources of a packing: Parquet, CSV, Feather, ORC and JSON lines."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import IO, Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from pyarrow import csv

from tiercache.errors import SchemaError
from tiercache.layouts.contract import check_unique
from tiercache.layouts.hive import find_partitions, partition_values
from tiercache.layouts.hugging_face import array_of, features_of
from tiercache.layouts.parquet import check_names, columns_with_nulls, stored_schema
from tiercache.layouts.reader import blocks_of
from tiercache.packer.files import BadRecord, Files, InputBatch, InputSplit, SourceFile, check_text, describe_start
from tiercache.shard.schema import Column, Kind, Schema, UserType
from tiercache.shard.shard_file import ColumnData
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
    number: int  # in the split, from 0
    start: int
    end: int
    text: bytes


@dataclass(frozen=True)
class JsonLines:
    """Files of JSON lines, a files.RecordSource: byte ranges of plain files, and whole gzipped files."""

    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]
    partitions: Mapping[str, UserType]

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        constants = partition_values(split.path, self.partitions, self.schema)
        names, known = self.schema.names, frozenset(self.schema.names)
        lines = _Lines(self.files, split)
        records: list[dict[str, Any]] = []
        numbers: list[int] = []
        bad: list[BadRecord] = []
        start = end = split.start

        def batch() -> InputBatch:
            columns = {name: [record.get(name, constants.get(name)) for record in records] for name in names}
            return InputBatch(columns, len(records), end - start, partial(_location_of, lines, tuple(numbers)), bad)

        for line in lines:
            end = line.end
            record, reason, column = _parsed(line.text), "", None
            if isinstance(record, str):
                reason = record
            elif not record.keys() <= known:
                column = next(name for name in record if name not in known)
                reason = f"a column that the schema lacks; {say_type(column)}"
            else:
                records.append(record)
                numbers.append(line.number)
            if reason:
                bad.append(BadRecord(lines.location(line.number), reason, line.text, column))
            if end - start >= batch_bytes or len(records) == _BATCH_RECORDS:
                yield batch()
                records, numbers, bad, start = [], [], [], end
        if lines.damage:
            bad.append(BadRecord(self.files.location(split.path), lines.damage))
        if records or bad:
            yield batch()


def _location_of(lines: _Lines, numbers: Sequence[int], record: int) -> str:
    return lines.location(numbers[record])


def find_jsonl(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> JsonLines:
    """Return the JSON lines of a source; the first 1000 records give the schema. given: types of some columns."""
    check_text(files, found, "jsonl")
    splits = split_files(found)
    sample: list[tuple[dict[str, Any], _Lines, int]] = []
    damage = ""
    for lines in (_Lines(files, split) for split in splits):
        for line in islice(lines, _SAMPLE_RECORDS - len(sample)):
            parsed = _parsed(line.text)
            if isinstance(parsed, dict):
                sample.append((parsed, lines, line.number))
            else:
                damage = damage or f"{lines.location(line.number)}: {parsed}"
        damage = damage or (lines.damage and f"{files.location(lines.path)}: {lines.damage}")
        if len(sample) >= _SAMPLE_RECORDS:
            break
    if not sample:
        where = damage or files.location(found[0].path)
        raise SchemaError(f"{where}: the source has no record, so no schema can be inferred")
    records = [{n: v for n, v in record.items() if n not in given} for record, _, _ in sample]
    inferred = infer_types(records, lambda i: sample[i][1].location(sample[i][2]))
    stored = dict.fromkeys(name for record, _, _ in sample for name in record)
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


class _Lines:
    """Lines that start in a split, without empty ones. damage: Why the rest of a gzipped file cannot be read."""

    def __init__(self, files: Files, split: InputSplit) -> None:
        self._files, self._split, self.path = files, split, split.path
        self._first = split.start  # offset of the first line
        self._n_before: int | None = None
        self.damage = ""

    def __iter__(self) -> Iterator[_Line]:
        split, is_whole = self._split, _is_gzipped(self._split.path)
        with _opened_lines(self._files, split.path) as file:
            at = 0
            if split.start:  # a line that began before this split belongs to the previous one
                file.seek(split.start - 1)
                self._first = at = split.start - 1 + len(file.readline())
            for number in count():
                if not is_whole and at >= split.end:
                    return
                try:
                    text = file.readline()
                except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                    self.damage = f"damaged gzip file: {error}; its records from line {number + 1} on are lost"
                    return
                if not text:
                    return
                start, at = at, at + len(text)
                if not text.isspace():
                    yield _Line(number, start, at, text)

    def location(self, number: int) -> str:
        """Return the file and the number of a line, for messages. The first call reads the file up to the split."""
        if self._n_before is None:
            self._n_before, left = 0, self._first
            with _opened_lines(self._files, self._split.path) as file:
                while left and (block := file.read(min(left, 1 << 20))):
                    self._n_before += block.count(b"\n")
                    left -= len(block)
        return f"{self._files.location(self._split.path)}, line {self._n_before + number + 1}"


@contextmanager
def _opened_lines(files: Files, path: str) -> Iterator[IO[bytes]]:
    with files.open(path) as raw:
        if not _is_gzipped(path):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield cast("IO[bytes]", unpacked)


def _parsed(text: bytes) -> dict[str, Any] | str:
    """Return a record, or why the line is not one."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return record if isinstance(record, dict) else f"expected a JSON object, got {type(record).__name__}"


TABLE_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq", ".parq"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "feather": (".feather",),
    "orc": (".orc",),
}
_PARALLEL_FOOTERS = 16
_BATCH_ROWS = 65536
# Row groups of up to this size are read whole, by few requests; larger ones in pieces, to bound the memory.
_WHOLE_BYTES = 32 << 20
_PIECE_BYTES = 8 << 20


class _BadRow(NamedTuple):
    reason: str
    content: Any = None
    column: str | None = None


@dataclass(frozen=True)
class TableFiles:
    """Files of tables in one format with the same columns, a files.RecordSource.

    A split is a row group (Parquet), a record batch (Feather), a stripe (ORC) or a whole file (CSV).
    """

    format: str
    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]
    partitions: Mapping[str, UserType]
    stored: Schema  # columns that `datasets` has written, in the types that array_of() gives them

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        """Yield the rows of a split, with dictionaries decoded."""
        constants = partition_values(split.path, self.partitions, self.schema)
        stored = [column for column in self.schema.columns if column.name not in constants]
        format_ = _FORMATS[self.format]
        row, bad = format_.first_row, list[BadRecord]()
        location = self.files.location(split.path) + format_.piece.format(split.start)
        try:
            for item in format_.read(self.files, split, stored, batch_bytes):
                if isinstance(item, _BadRow):
                    bad.append(BadRecord(f"{location}, row {row}", item.reason, item.content, item.column))
                    row += 1
                    continue
                rows = max(1, min(_BATCH_ROWS, batch_bytes * len(item) // max(item.nbytes, 1)))
                for start in range(0, len(item), rows):
                    batch = item.slice(start, rows)
                    where = partial(_row_location, location, row)
                    columns = self._columns(batch, constants, location)
                    yield InputBatch(columns, len(batch), batch.nbytes, where, bad)
                    row, bad = row + len(batch), []
        except SchemaError as error:
            bad.append(BadRecord(self.files.location(split.path), error.message.removeprefix(f"{location}: ")))
        except (pa.ArrowException, OSError) as error:
            bad.append(BadRecord(f"{location}, from row {row} on", f"not readable: {_first_line(error)}"))
        if bad:
            yield InputBatch({}, 0, 0, str, bad)

    def _columns(self, batch: pa.RecordBatch, constants: Mapping[str, object], location: str) -> pa.RecordBatch:
        """Return the columns of a batch in the order of the schema: stored columns and partition columns."""
        columns, fields = [], []
        for column in self.schema.columns:
            metadata = None
            if column.name in constants:
                value = constants[column.name]
                found = pa.array([value] * len(batch), column.storage_type if value is None else None)
            else:
                found, metadata = batch[column.name], batch.schema.field(column.name).metadata
                found = found.dictionary_decode() if pt.is_dictionary(found.type) else found
            if column.name in self.stored.names:
                i = self.stored.index(column.name)
                found = array_of(self.stored.columns[i], found, location)
                if isinstance(found, ColumnData):
                    loaded = blocks_of(self.stored, location, (0,), (i,), [[found]])
                    found = pa.ExtensionArray.from_storage(
                        self.stored.columns[i].arrow.type, loaded.array(0, i).storage
                    )
            columns.append(found)
            fields.append(pa.field(column.name, found.type, metadata=metadata))
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def find_tables(
    format_name: str,
    files: Files,
    found: Sequence[SourceFile],
    given: Mapping[str, UserType],
    *,
    accepts_damage: bool = False,
) -> TableFiles:
    """Return the files of a format, with the schema from their footers or first rows. given: types of some columns.

    In Parquet, a column is nullable unless the statistics of all row groups show that it has no null. Those of a column
    of lists or structs count empty lists and the nulls inside the values as well. In other formats it is nullable if
    the first rows of a file have a null. Columns that Hive partitions name (``year=2024/``) follow the stored columns.
    accepts_damage: Files that cannot be opened are a bad record each, unless all are damaged. Raises SchemaError.
    """
    errors: list[SchemaError] = []

    def head_of(file: SourceFile) -> _Head | None:
        try:
            return _FORMATS[format_name].inspect(files, file)
        except SchemaError as error:
            if not accepts_damage:
                raise
            errors.append(error)
            return None

    with call_threads(_PARALLEL_FOOTERS, "tiercache-footer") as pool:
        heads = list(zip(found, pool.map(head_of, found), strict=True))
    whole = [(file, head) for file, head in heads if head is not None]
    if not whole:
        raise errors[0]
    first, schemas = whole[0][0], [head.schema for _, head in whole]
    locations = [files.location(file.path) for file, _ in whole]
    if format_name == "csv":
        schemas = _widened(locations, schemas)
    with_nulls = set[str]().union(*(head.with_nulls for _, head in whole))
    stored = stored_schema(locations, schemas, with_nulls)
    types: dict[str, UserType] = {column.name: column.arrow for column in stored.columns}
    partitions = find_partitions([file.path for file in found], files.location, stored.names)
    types |= partitions
    if new := [name for name in given if name not in types]:
        raise SchemaError(f"{files.location(first.path)}: no such column; there are {', '.join(types)}", column=new[0])
    splits = [
        InputSplit(file.path, i, i + 1, n_bytes)
        for file, head in heads
        for i, n_bytes in enumerate((file.n_bytes,) if head is None else head.piece_bytes)
    ]
    kept = {column.name: column.classes for column in stored.columns if column.classes and column.name not in given}
    schema = Schema.of(types | dict(given)).with_classes(kept)
    written = [name for name in features_of(schemas[0]) if name in stored.names]
    return TableFiles(format_name, files, schema, tuple(splits), partitions, stored.select(written))


class _Head(NamedTuple):
    """Schema of a file, columns that may have nulls, and the size of each of its pieces, which become splits."""

    schema: pa.Schema
    with_nulls: frozenset[str]
    piece_bytes: tuple[int, ...]


class _Format(NamedTuple):
    """How files of a format are inspected and read. piece: name of a piece in messages."""

    inspect: Callable[[Files, SourceFile], _Head]
    read: Callable[[Files, InputSplit, Sequence[Column], int], Iterator[pa.RecordBatch | _BadRow]]
    piece: str
    first_row: int = 0


def _inspect_parquet(files: Files, file: SourceFile) -> _Head:
    with _opened(files, file.path, pq.ParquetFile) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        location = files.location(file.path)
        check_unique(location, schema.names)
        sizes = tuple(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        return _Head(schema, frozenset(columns_with_nulls(metadata, schema, location)), sizes)


def _read_parquet(
    files: Files, split: InputSplit, columns: Sequence[Column], batch_bytes: int
) -> Iterator[pa.RecordBatch]:
    is_small = split.n_bytes <= _WHOLE_BYTES
    how = {"pre_buffer": is_small, "buffer_size": 0 if is_small else _PIECE_BYTES}
    with _opened(files, split.path, partial(pq.ParquetFile, **how)) as parquet:
        n_rows = max(1, parquet.metadata.row_group(split.start).num_rows)
        rows = max(1, min(_BATCH_ROWS, batch_bytes * n_rows // max(split.n_bytes, 1)))
        yield from parquet.iter_batches(rows, row_groups=[split.start], columns=[column.name for column in columns])


def _inspect_feather(files: Files, file: SourceFile) -> _Head:
    with _opened(files, file.path, pa.ipc.open_file) as feather:
        n = feather.num_record_batches
        return _head_of(files, file, feather.schema, feather.get_batch(0) if n else None, n)


def _read_feather(
    files: Files, split: InputSplit, columns: Sequence[Column], _batch_bytes: int
) -> Iterator[pa.RecordBatch]:
    names = [column.name for column in columns]

    def open_columns(file: BinaryIO) -> Any:
        schema = pa.ipc.open_file(file).schema
        chosen = [schema.get_field_index(name) for name in names]
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=chosen))

    with _opened(files, split.path, open_columns) as feather:
        yield feather.get_batch(split.start).select(names)


def _open_orc(file: BinaryIO) -> Any:
    from pyarrow import orc

    return orc.ORCFile(file)


def _inspect_orc(files: Files, file: SourceFile) -> _Head:
    with _opened(files, file.path, _open_orc) as orc:
        return _head_of(files, file, orc.schema, orc.read_stripe(0) if orc.nstripes else None, orc.nstripes)


def _read_orc(
    files: Files, split: InputSplit, columns: Sequence[Column], _batch_bytes: int
) -> Iterator[pa.RecordBatch]:
    with _opened(files, split.path, _open_orc) as orc:
        yield orc.read_stripe(split.start, columns=[column.name for column in columns])


def _head_of(files: Files, file: SourceFile, schema: pa.Schema, first: pa.RecordBatch | None, n_pieces: int) -> _Head:
    check_unique(files.location(file.path), schema.names)
    nulls = (
        [] if first is None else [n for n, column in zip(schema.names, first.columns, strict=True) if column.null_count]
    )
    return _Head(schema.remove_metadata(), frozenset(nulls), (file.n_bytes // max(n_pieces, 1),) * n_pieces)


# Wide enough for a row of any usual table: a row must fit into a block.
_CSV_BLOCK_BYTES = 8 << 20
_DELIMITERS = ",;\t|"
_CSV_ERROR = re.compile(r"In CSV column #(\d+): (?:Row #\d+: )?CSV conversion error to ([^:]+): (.*)")


def _inspect_csv(files: Files, file: SourceFile) -> _Head:
    check_text(files, [file], "csv")
    with _opened(files, file.path, lambda opened: opened, is_text=True) as opened:
        try:
            reader = _open_csv(opened, None, lambda _row: "skip")
            first = next(iter(reader), None)
        except pa.ArrowInvalid as error:
            raise _damaged(files.location(file.path), error, describe_start(files, file.path)) from error
        check_unique(files.location(file.path), reader.schema.names)
        nulls = [n for n, c in zip(reader.schema.names, first.columns if first else (), strict=False) if c.null_count]
        return _Head(reader.schema, frozenset(nulls), (file.n_bytes,))


def _open_csv(
    file: IO[bytes], types: Mapping[str, pa.DataType] | None, on_invalid: Callable[[csv.InvalidRow], str]
) -> csv.CSVStreamingReader:
    """Return a reader. types: The columns to read; None: all of them, with the types that the first rows have."""
    start = file.read(1 << 16)
    header = start.partition(b"\n")[0].decode(errors="replace")
    delimiter = max(_DELIMITERS, key=header.count)
    return csv.open_csv(
        pa.PythonFile(_Rest(start, file), "r"),
        # One thread: only then do invalid rows know their numbers. Packing has a process for each worker.
        read_options=csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=on_invalid),
        convert_options=_convert_options(types),
    )


def _convert_options(types: Mapping[str, pa.DataType] | None) -> csv.ConvertOptions:
    return (
        csv.ConvertOptions() if types is None else csv.ConvertOptions(column_types=types, include_columns=list(types))
    )


class _Rest(io.RawIOBase):
    """A file whose first bytes have been read."""

    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self._start, self._file = start, file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._start:
            part, self._start = (self._start, b"") if size < 0 else (self._start[:size], self._start[size:])
            return part if size >= 0 else part + self._file.read()
        return self._file.read(size)


def _read_csv(
    files: Files, split: InputSplit, columns: Sequence[Column], _batch_bytes: int
) -> Iterator[pa.RecordBatch | _BadRow]:
    """Yield the rows of a file. From a block with a value that does not fit its type on, values are converted again."""
    simple = (Kind.SCALAR, Kind.BOOL, Kind.STR, Kind.ARROW)
    types = {c.name: c.storage_type if c.kind in simple else pa.string() for c in columns}
    n_good = 0
    with _opened(files, split.path, lambda opened: opened, is_text=True) as opened:
        rows = _CsvRows(opened, types)
        try:
            for item in rows:
                n_good += 0 if isinstance(item, _BadRow) else len(item)
                yield item
            return
        except pa.ArrowInvalid as error:
            if not _CSV_ERROR.search(str(error)):
                raise
    n_items = n_good + rows.n_bad
    with _opened(files, split.path, lambda opened: opened, is_text=True) as opened:
        for item in _CsvRows(opened, dict.fromkeys(types, pa.binary())):
            n = 1 if isinstance(item, _BadRow) else len(item)
            n_passed = min(n, n_items)
            n_items -= n_passed
            if isinstance(item, _BadRow):
                if not n_passed:
                    yield item
            elif n_passed < n:
                yield from _converted(item.slice(n_passed), types)


class _CsvRows:
    """Rows of a CSV file as batches, and its rows with a wrong number of fields between them, in order."""

    def __init__(self, file: IO[bytes], types: Mapping[str, pa.DataType]) -> None:
        self._file, self._types = file, types
        self._invalid: deque[csv.InvalidRow] = deque()
        self.n_bad = 0

    def __iter__(self) -> Iterator[pa.RecordBatch | _BadRow]:
        row = 2  # the header is row 1 for Arrow
        for batch in _open_csv(self._file, self._types, self._keep):
            start = 0
            while start < len(batch):
                n = len(batch) - start
                if self._invalid:
                    n = min(n, self._invalid[0].number - row)
                if n:
                    yield batch.slice(start, n)
                    start, row = start + n, row + n
                else:
                    yield self._take()
                    row += 1
        while self._invalid:
            yield self._take()

    def _keep(self, row: csv.InvalidRow) -> str:
        self._invalid.append(row)
        return "skip"

    def _take(self) -> _BadRow:
        self.n_bad += 1
        row = self._invalid.popleft()
        return _BadRow(f"expected {row.expected_columns} fields, got {row.actual_columns}", row.text)


def _converted(texts: pa.RecordBatch, types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch | _BadRow]:
    """Yield rows of text as the types, and those that do not fit them."""
    written = io.BytesIO()
    csv.write_csv(texts, written)
    written.seek(0)
    try:
        parse = csv.ParseOptions(newlines_in_values=True)
        table = csv.read_csv(written, parse_options=parse, convert_options=_convert_options(types))
    except pa.ArrowInvalid as error:
        if len(texts) > 1:
            half = len(texts) // 2
            yield from _converted(texts.slice(0, half), types)
            yield from _converted(texts.slice(half), types)
            return
        found = _CSV_ERROR.search(str(error))
        content = {name: _text(value) for name, value in texts.to_pylist()[0].items()}
        if found is None:
            yield _BadRow(_first_line(error), content)
        else:
            yield _BadRow(f"expected {found[2]}, got {found[3]}", content, list(types)[int(found[1])])
    else:
        yield from table.combine_chunks().to_batches()


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


_FORMATS: Mapping[str, _Format] = {
    "parquet": _Format(_inspect_parquet, _read_parquet, ", row group {}"),
    "feather": _Format(_inspect_feather, _read_feather, ", record batch {}"),
    "orc": _Format(_inspect_orc, _read_orc, ", stripe {}"),
    "csv": _Format(_inspect_csv, _read_csv, "", first_row=1),
}


@contextmanager
def _opened(files: Files, path: str, open_table: Callable[[Any], Any], *, is_text: bool = False) -> Iterator[Any]:
    with _opened_lines(files, path) if is_text else files.open(path) as file:
        try:
            table = open_table(file)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(files.location(path), error, describe_start(files, path)) from error
        if isinstance(table, pq.ParquetFile):
            with table:
                yield table
        else:
            yield table


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _damaged(location: str, error: Exception, start: str) -> SchemaError:
    return SchemaError(f"{location}: not a readable file of its format: {_first_line(error)}; {start}")


def _row_location(location: str, first_row: int, row: int) -> str:
    return f"{location}, row {first_row + row}"


def _widened(locations: Sequence[str], schemas: Sequence[pa.Schema]) -> list[pa.Schema]:
    """Return schemas of CSV files, whose types are guesses, with common types: float64 for all numbers, else text.

    The type of a column without values in the first rows of a file is null, and that of the other files decides.
    """
    first = schemas[0]
    for location, schema in zip(locations, schemas, strict=True):
        check_names(location, schema, locations[0], first)
    fields = []
    for name in first.names:
        types = {schema.field(name).type for schema in schemas} - {pa.null()}
        widest = pa.float64() if types == {pa.int64(), pa.float64()} else pa.string()
        fields.append((name, types.pop() if len(types) == 1 else widest))
    return [pa.schema(fields)] * len(schemas)
