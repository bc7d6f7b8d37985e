"""TFRecord files as a source of a packing: their records, and the features of tf.train.Example as columns."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple, TypeAlias, cast

import numpy as np
import pyarrow.types as pt

from tiercache._native.checksum import crc32c
from tiercache.errors import SchemaError
from tiercache.packer.files import BadRecord, Files, InputBatch, InputSplit, SourceFile, describe_start, read_bytes
from tiercache.packer.tables import say_type
from tiercache.shard.schema import Column, Kind, Schema, UserType
from tiercache.store.remote import call_threads

TFRECORD_SUFFIXES = (".tfrecord", ".tfrecords", ".tfrecord.gz", ".tfrecords.gz")
RAW_COLUMN = "bytes"
_SAMPLE_RECORDS, _SAMPLE_BYTES = 1000, 32 << 20
_BATCH_RECORDS = 4096
_PARALLEL_STARTS = 16
_MOST_BYTES = 2**31 - 1
_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_TYPES = {1: "bytes", 2: "float32", 3: "int64"}  # by the number of the field of a Feature

Feature: TypeAlias = "list[bytes] | np.ndarray[Any, Any]"


class _Record(NamedTuple):
    """Bytes of a record, or why it cannot be read. ends: Whether nothing after it can be read."""

    number: int
    data: bytes
    reason: str = ""
    ends: bool = False


@dataclass(frozen=True)
class TFRecords:
    """TFRecord files, a files.RecordSource. A split is a file, because records are found only one after the other.

    features: Features of the Examples; None: the records are no Examples, so that each is a value of bytes.
    """

    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]
    features: tuple[str, ...] | None

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        path = self.files.location(split.path)
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        bad: list[BadRecord] = []
        n_bytes = 0
        with _opened(self.files, split.path) as file:
            for record in _records(file):
                n_bytes += len(record.data)
                try:
                    if record.reason:
                        raise ValueError(record.reason)
                    rows.append(self._row(record.data))
                    numbers.append(record.number)
                except ValueError as error:
                    location = f"{path}, {'from ' * record.ends}record {record.number}{' on' * record.ends}"
                    bad.append(BadRecord(location, str(error), record.data or None))
                if n_bytes >= batch_bytes or len(rows) == _BATCH_RECORDS:
                    yield self._batch(path, rows, numbers, n_bytes, bad)
                    rows, numbers, bad, n_bytes = [], [], [], 0
        if rows or bad:
            yield self._batch(path, rows, numbers, n_bytes, bad)

    def _batch(
        self, path: str, rows: list[dict[str, Any]], numbers: list[int], n_bytes: int, bad: list[BadRecord]
    ) -> InputBatch:
        columns = {name: [row[name] for row in rows] for name in self.schema.names}
        return InputBatch(columns, len(rows), n_bytes, lambda i: f"{path}, record {numbers[i]}", bad)

    def _row(self, data: bytes) -> dict[str, Any]:
        if self.features is None:
            return {RAW_COLUMN: data}
        found = parse_example(data)
        if new := [name for name in found if name not in self.features]:
            raise ValueError(f"the feature {new[0]!r} is not in the first records; {say_type(new[0])}")
        return {column.name: _value(column, found.get(column.name)) for column in self.schema.columns}


def find_tfrecords(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> TFRecords:
    """Return the records of TFRecord files; the first 1000 give the schema. given: types of some columns.

    Raises SchemaError for a file that is no TFRecord file.
    """
    with call_threads(_PARALLEL_STARTS, "tiercache-start") as pool:
        for _ in pool.map(partial(_check_start, files), found):
            pass
    sample: list[tuple[str, bytes]] = []
    sample_bytes, damage = 0, ""
    for file in found:
        with _opened(files, file.path) as opened:
            for record in _records(opened):
                location = f"{files.location(file.path)}, record {record.number}"
                if record.reason:
                    damage = damage or f"{location}: {record.reason}"
                    continue
                sample.append((location, record.data))
                sample_bytes += len(record.data)
                if len(sample) == _SAMPLE_RECORDS or sample_bytes >= _SAMPLE_BYTES:
                    break
        if len(sample) == _SAMPLE_RECORDS or sample_bytes >= _SAMPLE_BYTES:
            break
    if not sample:
        where = damage or files.location(found[0].path)
        raise SchemaError(f"{where}: the source has no record, so no schema can be inferred")
    splits = tuple(InputSplit(file.path, 0, max(file.n_bytes, 1), file.n_bytes) for file in found)
    examples = _examples(sample)
    if examples is None:
        if new := [name for name in given if name != RAW_COLUMN]:
            message = f"{sample[0][0]}: not a tf.train.Example, so the only column is {RAW_COLUMN!r}"
            raise SchemaError(message, column=new[0])
        return TFRecords(files, Schema.of({RAW_COLUMN: "bytes"} | dict(given)), splits, None)
    types = _types_of(examples, given) | dict(given)
    return TFRecords(files, Schema.of(types), splits, tuple(types))


def _check_start(files: Files, file: SourceFile) -> None:
    try:
        with _opened(files, file.path) as opened:
            start = opened.read(_LENGTH.size)
    except (gzip.BadGzipFile, zlib.error, EOFError):
        start = b"?"
    if start and not _is_header(start):
        what = "it does not begin with the length of a record and its checksum"
        raise SchemaError(
            f"{files.location(file.path)}: not a TFRecord file: {what}; {describe_start(files, file.path)}"
        )


def _examples(sample: Sequence[tuple[str, bytes]]) -> list[tuple[str, dict[str, Feature]]] | None:
    """Return the Examples of a sample; None: no record of it is one."""
    found = []
    for location, data in sample:
        try:
            found.append((location, parse_example(data)))
        except ValueError:
            continue
    return found if any(features for _, features in found) else None


def _types_of(examples: Sequence[tuple[str, dict[str, Feature]]], given: Mapping[str, UserType]) -> dict[str, UserType]:
    """Return the types of the features, by name: one value is a scalar, several are an array."""
    kinds: dict[str, str] = {}
    sizes: dict[str, list[int]] = {}
    for location, features in examples:
        for name, values in features.items():
            sizes.setdefault(name, []).append(len(values))
            if name in given or not len(values):
                continue
            kind = "bytes" if isinstance(values, list) else str(values.dtype)
            if kinds.setdefault(name, kind) != kind:
                message = f"{location}: expected {kinds[name]} as in earlier records, got {kind}; {say_type(name)}"
                raise SchemaError(message, column=name)
    types: dict[str, UserType] = {}
    for name in sorted(sizes):
        if name in given:
            types[name] = given[name]
        elif name not in kinds:
            message = f"only empty lists in the first {len(examples)} records; {say_type(name)}"
            raise SchemaError(message, column=name)
        else:
            is_scalar = max(sizes[name]) == 1
            lacks = len(sizes[name]) < len(examples) or (is_scalar and not min(sizes[name]))
            types[name] = (kinds[name] if is_scalar else f"list<{kinds[name]}>") + "?" * lacks
    return types


_ONE_VALUE = (Kind.SCALAR, Kind.BOOL, Kind.STR, Kind.BYTES, Kind.IMAGE)


def _value(column: Column, values: Feature | None) -> Any:
    """Return the value of a column for a feature. Raises ValueError."""
    if values is None:
        return None
    if column.kind in _ONE_VALUE:
        if len(values) > 1:
            raise ValueError(f"the feature {column.name!r} has {len(values)} values, and the column is {column}")
        if not len(values):
            return None
        value: Any = values[0]
        if column.kind is Kind.STR and isinstance(value, bytes):
            return _text(column, value)
        return bool(value) if column.kind is Kind.BOOL and value in (0, 1) else value
    if column.kind is Kind.TENSOR and isinstance(values, np.ndarray) and len(values) == column.n_elements:
        return values.reshape(column.shape)  # as FixedLenFeature: a list of an Example has one dimension
    if not len(values):  # of any kind: writers leave the kind of an empty list open
        return []
    inner = getattr(column.storage_type, "value_type", None)
    if isinstance(values, list) and inner is not None and (pt.is_string(inner) or pt.is_large_string(inner)):
        return [_text(column, value) for value in values]
    return values


def _text(column: Column, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the feature {column.name!r} is not text in UTF-8: {error}") from None


@contextmanager
def _opened(files: Files, path: str) -> Iterator[IO[bytes]]:
    """Open a file, which may be compressed with gzip whatever its name is, as TensorFlow's writer does."""
    with files.open(path) as raw:
        start = raw.read(_LENGTH.size)
        raw.seek(0)
        if start[:2] == b"\x1f\x8b" and not _is_header(start):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast("IO[bytes]", unpacked)
        else:
            yield raw


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _is_header(start: bytes) -> bool:
    return len(start) == _LENGTH.size and _masked(start[:8]) == _LENGTH.unpack(start)[1]


def _records(file: IO[bytes]) -> Iterator[_Record]:
    """Yield the records of a file; the last one says if the rest cannot be read."""
    number = 0
    try:
        while start := read_bytes(file, _LENGTH.size):
            if not _is_header(start):
                short = len(start) < _LENGTH.size
                what = "the file ends inside the length of a record" if short else "the checksum of its length is wrong"
                yield _Record(number, b"", what, ends=True)
                return
            n_bytes = _LENGTH.unpack(start)[0]
            if n_bytes > _MOST_BYTES:
                yield _Record(number, b"", f"it has {n_bytes:,} bytes; the most is {_MOST_BYTES:,}", ends=True)
                return
            data, end = read_bytes(file, n_bytes), read_bytes(file, _CHECKSUM.size)
            if len(end) < _CHECKSUM.size:
                what = f"the file ends inside a record: expected {n_bytes:,} bytes, got {len(data):,}"
                yield _Record(number, data, what, ends=True)
                return
            reason = "" if _masked(data) == _CHECKSUM.unpack(end)[0] else "the checksum of its bytes is wrong"
            yield _Record(number, data, reason)
            number += 1
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        yield _Record(number, b"", f"damaged gzip file: {error}", ends=True)


def parse_example(data: bytes) -> dict[str, Feature]:
    """Return the features of a serialized tf.train.Example by name: bytes, float32 or int64.

    Raises ValueError for other bytes, also for a SequenceExample, whose lists of features have no columns.
    """
    features: dict[str, Feature] = {}
    for number, wire, part in _fields(memoryview(data)):
        if (number, wire) != (1, 2):
            raise ValueError(f"not a tf.train.Example: it has a field {number}")
        for inner, inner_wire, entry in _fields(part):
            if (inner, inner_wire) != (1, 2):
                raise ValueError(f"not a tf.train.Example: its features have a field {inner}")
            name, values = _entry(entry)
            features[name] = values
    return features


def _entry(entry: memoryview) -> tuple[str, Feature]:
    name: str = ""
    values: Feature = []
    for number, wire, part in _fields(entry):
        if wire != 2 or number not in (1, 2):
            raise ValueError(f"not a tf.train.Example: a feature has a field {number}")
        if number == 1:
            name = str(part, "utf-8")  # its error is a ValueError
            continue
        for kind, kind_wire, content in _fields(part):
            if kind_wire != 2 or kind not in _TYPES:
                raise ValueError(f"not a tf.train.Example: the values of a feature have a field {kind}")
            values = _LISTS[kind](content)
    return name, values


def _bytes_list(content: memoryview) -> Feature:
    return [bytes(part) for part in _numbered_one(content, (2,))]


def _float_list(content: memoryview) -> Feature:
    parts = _numbered_one(content, (2, 5))
    return np.concatenate([np.empty(0, "<f4"), *(np.frombuffer(part, "<f4") for part in parts)])


def _int64_list(content: memoryview) -> Feature:
    parts = _numbered_one(content, (0, 2))
    return np.concatenate([np.empty(0, np.int64), *map(_varints, parts)])


_LISTS: Mapping[int, Callable[[memoryview], Feature]] = {1: _bytes_list, 2: _float_list, 3: _int64_list}


def _numbered_one(content: memoryview, wires: Sequence[int]) -> list[memoryview]:
    parts = []
    for number, wire, part in _fields(content):
        if number != 1 or wire not in wires:
            raise ValueError(f"not a tf.train.Example: a list of values has a field {number} of wire type {wire}")
        parts.append(part)
    return parts


def _varints(packed: memoryview) -> np.ndarray[Any, Any]:
    """Return packed varints as int64."""
    data = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(data < 0x80)
    if not len(data):
        return np.empty(0, np.int64)
    if not len(ends) or ends[-1] != len(data) - 1:
        raise ValueError("not a tf.train.Example: its last number is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("not a tf.train.Example: a number has more than 10 bytes")
    place = np.arange(len(data)) - np.repeat(starts, lengths)
    shifted = (data & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(shifted, starts).view(np.int64)


_FIXED = {1: 8, 5: 4}


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield the fields of a message of protobuf: number, wire type and bytes. Raises ValueError."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        start = at
        if wire == 0:
            at = _varint(data, at)[1]
        elif wire == 2:
            n_bytes, start = _varint(data, at)
            at = start + n_bytes
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise ValueError(f"not a message of protobuf: wire type {wire}")
        if at > end:
            raise ValueError("not a message of protobuf: a field is cut off")
        yield number, wire, data[start:at]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("not a message of protobuf: a number is cut off")
