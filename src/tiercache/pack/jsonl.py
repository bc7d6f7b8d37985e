"""JSON lines, plain or gzipped: one object a line, columns as the first records have them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import IO, Any, cast

from tiercache.errors import SchemaError
from tiercache.pack.files import Files, SourceFile
from tiercache.pack.infer import infer_types, say_type
from tiercache.pack.partitions import Partitions
from tiercache.pack.source import Batch, Part
from tiercache.shard.types import Schema, UserType

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".json")
SAMPLE_RECORDS = 1000
_PART_BYTES = 64 << 20
_BATCH_RECORDS = 4096


@dataclass(frozen=True, slots=True)
class Line:
    """A line's record. start, end: its bytes in the file as it is when unpacked."""

    start: int
    end: int
    record: dict[str, Any]


@dataclass(slots=True)
class _Run:
    """Lines that become one batch."""

    start: int
    lines: list[Line] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return self.lines[-1].end - self.start if self.lines else 0


@dataclass(frozen=True)
class JsonLines:
    """Files of JSON lines.

    parts: ranges of plain files (a line belongs to the range that it starts in), gzipped files whole.
    partitions: columns that the files' folders name.
    """

    files: Files
    schema: Schema
    parts: tuple[Part, ...]
    partitions: Partitions

    def read(self, part: Part, batch_bytes: int) -> Iterator[Batch]:
        """The records of a part.

        Raises:
            SchemaError: what is not a JSON object of these columns, naming file and line.
        """
        run = _Run(part.start)
        for line in read_lines(self.files, part):
            run.lines.append(line)
            if run.n_bytes >= batch_bytes or len(run.lines) == _BATCH_RECORDS:
                yield self._batch(part.path, run)
                run = _Run(line.end)
        if run.lines:
            yield self._batch(part.path, run)

    def _batch(self, path: str, run: _Run) -> Batch:
        constants = self.partitions.values(path, self.schema)
        names = self.schema.names
        for line in run.lines:
            if not line.record.keys() <= set(names):
                new = next(name for name in line.record if name not in names)
                place = line_place(self.files, path, line.start)
                raise SchemaError(f"{place}: a column that earlier records do not have; {say_type(new)}", column=new)
        columns = {name: [line.record.get(name, constants.get(name)) for line in run.lines] for name in names}
        starts = [line.start for line in run.lines]
        return Batch(columns, len(starts), run.n_bytes, lambda i: line_place(self.files, path, starts[i]))


def find_jsonl(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> JsonLines:
    """Look at the first 1000 records. given: the types of some columns; the others are inferred.

    Raises:
        SchemaError: a line that is not a JSON object, types that do not go together, or no record at all.
    """
    parts = split_files(found)
    sample = list(islice(((p.path, line) for p in parts for line in read_lines(files, p)), SAMPLE_RECORDS))
    if not sample:
        raise SchemaError(f"{files.place(found[0].path)}: no record, so no schema can be inferred")
    records = [{n: v for n, v in line.record.items() if n not in given} for _, line in sample]
    inferred = infer_types(records, lambda i: line_place(files, sample[i][0], sample[i][1].start))
    stored = dict.fromkeys(name for _, line in sample for name in line.record)
    partitions = Partitions.find(files, found, stored=list(stored))
    types = {**inferred, **partitions.types, **given}
    order = dict.fromkeys([*stored, *partitions.types, *given])
    return JsonLines(files, Schema.of({name: types[name] for name in order}), parts, partitions)


def split_files(found: Sequence[SourceFile]) -> tuple[Part, ...]:
    """Ranges of plain files, gzipped files whole."""
    return tuple(part for file in found for part in _split(file))


def _is_gzipped(path: str) -> bool:
    return path.lower().endswith(".gz")


def _split(file: SourceFile) -> Iterator[Part]:
    if _is_gzipped(file.path):
        yield Part(file.path, 0, file.n_bytes, file.n_bytes)
        return
    for start in range(0, file.n_bytes, _PART_BYTES):
        end = min(start + _PART_BYTES, file.n_bytes)
        yield Part(file.path, start, end, end - start)


def read_lines(files: Files, part: Part) -> Iterator[Line]:
    """The lines that start in a part; empty ones are passed over.

    Raises:
        SchemaError: a line that is not a JSON object, or a damaged gzip file.
    """
    with _opened(files, part.path) as file:
        whole = _is_gzipped(part.path)
        at = 0
        if part.start:  # the line that reaches into this part belongs to the one before
            file.seek(part.start - 1)
            at = part.start - 1 + len(file.readline())
        while whole or at < part.end:
            text = _readline(file, files.place(part.path))
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
    """What a person calls the line that starts at offset: its number is counted only when it is asked for."""
    n_lines, left = 1, offset
    with _opened(files, path) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            n_lines += block.count(b"\n")
            left -= len(block)
    return f"{files.place(path)}, line {n_lines}"
