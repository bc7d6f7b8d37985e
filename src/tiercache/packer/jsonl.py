"""JSON lines, plain or gzipped: one object per line; column types are inferred from the first records."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, NamedTuple, cast

from tiercache.errors import SchemaError
from tiercache.packer.files import Files, InputBatch, InputSplit, SourceFile, find_partitions, partition_values
from tiercache.shard.schema import Ragged, Schema, UserType

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".json")
_SCALARS = {bool: "bool", int: "int64", float: "float64", str: "str"}
_SAMPLE_RECORDS = 1000
SPLIT_BYTES = 64 << 20
_BATCH_RECORDS = 4096


def type_of(value: object) -> str | None:
    """Return the type of a JSON value: a scalar type, "[int64]" or "[float64]", or "json"; None for null."""
    if value is None:
        return None
    if isinstance(value, list):
        kinds = {type(element) for element in value}
        if kinds <= {int, float}:
            return "[float64]" if float in kinds else "[int64]"
        return "json"
    return _SCALARS.get(type(value), "json")


def join(first: str, second: str) -> str | None:
    """Return the type that holds the values of both types; None if there is none."""
    kinds = {first, second}
    if len(kinds) == 1:
        return first
    if kinds == {"int64", "float64"}:
        return "float64"
    if kinds == {"[int64]", "[float64]"}:
        return "[float64]"
    return "json" if kinds & {"json", "[int64]", "[float64]"} else None


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
        nullable = n_values[name] < n_records
        if found.startswith("["):
            types[name] = Ragged(found.strip("[]"), (None,), nullable=nullable)
        else:
            types[name] = f"{found}?" if nullable else found
    return types


def say_type(name: str) -> str:
    """Return the advice to specify a column's type."""
    return f"specify its type, as in schema={{{name!r}: 'str?'}} or --column '{name}=str?'"


class _Line(NamedTuple):
    """Byte range of a line in its file after unpacking, and its record."""

    start: int
    end: int
    record: dict[str, Any]


@dataclass(frozen=True)
class JsonLines:
    """Files of JSON lines, a files.RecordSource.

    Splits are byte ranges of plain files (a line belongs to the range in which it starts), and whole gzipped files.
    """

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
    """Return the JSON lines of a source, with the schema of the first 1000 records. given: types of some columns.

    Raises SchemaError.
    """
    splits = split_files(found)
    sample = list(
        islice(((split.path, line) for split in splits for line in _read_lines(files, split)), _SAMPLE_RECORDS)
    )
    if not sample:
        raise SchemaError(f"{files.location(found[0].path)}: the source has no record, so no schema can be inferred")
    records = [{n: v for n, v in line.record.items() if n not in given} for _, line in sample]
    inferred = infer_types(records, lambda i: _location(files, sample[i][0], sample[i][1].start))
    stored = dict.fromkeys(name for _, line in sample for name in line.record)
    partitions = find_partitions(files, found, list(stored))
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
    with _opened(files, split.path) as file:
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
def _opened(files: Files, path: str) -> Iterator[IO[bytes]]:
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
    with _opened(files, path) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            n_lines += block.count(b"\n")
            left -= len(block)
    return f"{files.location(path)}, line {n_lines}"
