"""JSON lines, plain or gzipped: one object per line; column types are inferred from the first records."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import IO, Any, cast

from tiercache.errors import SchemaError
from tiercache.pack.files import Files, InputBatch, InputSplit, Partitions, SourceFile
from tiercache.shard.schema import Ragged, Schema, UserType

_SCALARS = {bool: "bool", int: "int64", float: "float64", str: "str"}


def type_of(value: object) -> str | None:
    """Return the type of a JSON value; None for null.

    It is a scalar type, "[int64]" or "[float64]" for a list of numbers, or "json" for anything else.
    """
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
    if "json" in kinds or "[int64]" in kinds or "[float64]" in kinds:
        return "json"
    return None


def infer_types(records: Iterable[Mapping[str, Any]], place: Callable[[int], str]) -> dict[str, UserType]:
    """Return the types of the columns of records, in the order in which the columns first appear.

    A column is nullable if a record has null or lacks it. Lists of numbers are Ragged, other lists and objects are
    json. Raises SchemaError.
    """
    kinds: dict[str, str | None] = {}
    n_values: dict[str, int] = {}
    n_records = 0
    for index, record in enumerate(records):
        n_records += 1
        for name, value in record.items():
            kind, known = type_of(value), kinds.get(name)
            kinds[name] = kind or known
            if kind is not None:
                n_values[name] = n_values.get(name, 0) + 1
                if known is not None:
                    kinds[name] = join(known, kind)
                    if kinds[name] is None:
                        raise SchemaError(
                            f"{place(index)}: expected {known} as in earlier records, got {kind}; {say_type(name)}",
                            column=name,
                        )
    types: dict[str, UserType] = {}
    for name, kind in kinds.items():
        if kind is None:
            raise SchemaError(f"only nulls in the first {n_records} records; {say_type(name)}", column=name)
        nullable = n_values[name] < n_records
        if kind.startswith("["):
            types[name] = Ragged(kind.strip("[]"), (None,), nullable=nullable)
        else:
            types[name] = f"{kind}?" if nullable else kind
    return types


def say_type(name: str) -> str:
    """Return the advice to specify a column's type."""
    return f"specify its type, as in schema={{{name!r}: 'str?'}} or --column '{name}=str?'"


SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".json")
SAMPLE_RECORDS = 1000
_PART_BYTES = 64 << 20
_BATCH_RECORDS = 4096


@dataclass(frozen=True, slots=True)
class Line:
    """Record of a line.

    Attributes:
        start, end: Byte range of the line in the file after unpacking.
        record: Parsed object.
    """

    start: int
    end: int
    record: dict[str, Any]


@dataclass(slots=True)
class _Run:
    """Lines of one batch."""

    start: int
    lines: list[Line] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return self.lines[-1].end - self.start if self.lines else 0


@dataclass(frozen=True)
class JsonLines:
    """Files of JSON lines; implements files.RecordSource.

    Attributes:
        files: Location of the files.
        schema: Schema of the records.
        parts: Splits: byte ranges of plain files (a line belongs to the range in which it starts), and whole gzipped
            files.
        partitions: Columns named by the files' folders.
    """

    files: Files
    schema: Schema
    parts: tuple[InputSplit, ...]
    partitions: Partitions

    def read(self, part: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        """Yield the records of a split. Raises SchemaError."""
        run = _Run(part.start)
        for line in read_lines(self.files, part):
            run.lines.append(line)
            if run.n_bytes >= batch_bytes or len(run.lines) == _BATCH_RECORDS:
                yield self._batch(part.path, run)
                run = _Run(line.end)
        if run.lines:
            yield self._batch(part.path, run)

    def _batch(self, path: str, run: _Run) -> InputBatch:
        constants = self.partitions.values(path, self.schema)
        names = self.schema.names
        for line in run.lines:
            if not line.record.keys() <= set(names):
                new = next(name for name in line.record if name not in names)
                place = line_place(self.files, path, line.start)
                raise SchemaError(f"{place}: a column that the schema lacks; {say_type(new)}", column=new)
        columns = {name: [line.record.get(name, constants.get(name)) for line in run.lines] for name in names}
        starts = [line.start for line in run.lines]
        return InputBatch(columns, len(starts), run.n_bytes, lambda i: line_place(self.files, path, starts[i]))


def find_jsonl(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> JsonLines:
    """Return the JSON lines of a source, with the schema of the first 1000 records. Raises SchemaError."""
    parts = split_files(found)
    sample = list(islice(((p.path, line) for p in parts for line in read_lines(files, p)), SAMPLE_RECORDS))
    if not sample:
        raise SchemaError(f"{files.location(found[0].path)}: the source has no record, so no schema can be inferred")
    records = [{n: v for n, v in line.record.items() if n not in given} for _, line in sample]
    inferred = infer_types(records, lambda i: line_place(files, sample[i][0], sample[i][1].start))
    stored = dict.fromkeys(name for _, line in sample for name in line.record)
    partitions = Partitions.find(files, found, stored=list(stored))
    types = {**inferred, **partitions.types, **given}
    order = dict.fromkeys([*stored, *partitions.types, *given])
    return JsonLines(files, Schema.of({name: types[name] for name in order}), parts, partitions)


def split_files(found: Sequence[SourceFile]) -> tuple[InputSplit, ...]:
    """Return the splits of files: byte ranges of plain files, and whole gzipped files."""
    return tuple(part for file in found for part in _split(file))


def _is_gzipped(path: str) -> bool:
    return path.lower().endswith(".gz")


def _split(file: SourceFile) -> Iterator[InputSplit]:
    if _is_gzipped(file.path):
        yield InputSplit(file.path, 0, file.n_bytes, file.n_bytes)
        return
    for start in range(0, file.n_bytes, _PART_BYTES):
        end = min(start + _PART_BYTES, file.n_bytes)
        yield InputSplit(file.path, start, end, end - start)


def read_lines(files: Files, part: InputSplit) -> Iterator[Line]:
    """Yield the lines that start in a split, without empty lines. Raises SchemaError."""
    with _opened(files, part.path) as file:
        whole = _is_gzipped(part.path)
        at = 0
        if part.start:  # a line that began before this split belongs to the previous one
            file.seek(part.start - 1)
            at = part.start - 1 + len(file.readline())
        while whole or at < part.end:
            text = _readline(file, files.location(part.path))
            if not text:
                return
            start, at = at, at + len(text)
            if not text.isspace():
                yield Line(start, at, _parsed(text, partial(line_place, files, part.path, start)))


@contextmanager
def _opened(files: Files, path: str) -> Iterator[IO[bytes]]:
    with files.open(path) as raw:
        if not _is_gzipped(path):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield cast("IO[bytes]", unpacked)


def _readline(file: IO[bytes], place: str) -> bytes:
    try:
        return file.readline()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SchemaError(f"{place}: damaged gzip file: {error}") from error


def _parsed(text: bytes, place: Any) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{place()}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise SchemaError(f"{place()}: expected a JSON object, got {type(record).__name__}")
    return record


def line_place(files: Files, path: str, offset: int) -> str:
    """Return the name and line number of the line at a byte offset, for messages; it reads the file up to there."""
    n_lines, left = 1, offset
    with _opened(files, path) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            n_lines += block.count(b"\n")
            left -= len(block)
    return f"{files.location(path)}, line {n_lines}"
