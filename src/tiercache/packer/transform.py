"""What changes the records of a source on their way into shards.

A selection of columns and records, a function of records, and a split into data sets.
"""

from __future__ import annotations

import hashlib
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.data.scan import Split, arrow_errors_as_schema_errors, columns_of, evaluate
from tiercache.errors import SchemaError
from tiercache.images.decoder import DecodeError
from tiercache.layouts.reader import blocks_of
from tiercache.packer.bad_records import BatchWriter, write_batch
from tiercache.packer.files import BadRecord, InputBatch, InputSplit, RecordSource
from tiercache.packer.objects import identity_of, import_callable, infer_types, name_of
from tiercache.shard.schema import Kind, Schema, UserType, check_same_schema, storable_type
from tiercache.shard.values import as_records, block_values
from tiercache.shard.writer import convert_batch

MapFunction: TypeAlias = Callable[[dict[str, Any]], Any]
# Results from which types are known, and bytes of the source that may be read for them.
_SAMPLE_RECORDS, _SAMPLE_BYTES = 100, 256 << 20
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class SelectedSource:
    """Columns of a source, and those records that make a filter true, a files.RecordSource.

    source has these columns, and those that the filter names.
    """

    source: RecordSource
    schema: Schema
    filter: pc.Expression | None

    @property
    def splits(self) -> tuple[InputSplit, ...]:
        return self.source.splits

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        keys = () if self.filter is None else columns_of(self.source.schema, self.filter)
        for batch in self.source.read(split, batch_bytes):
            if not batch.n_records:
                yield batch
                continue
            kept, bad = np.arange(batch.n_records), list[BadRecord]()
            if self.filter is not None:
                # Arrow needs some column to know the number of records, also for a constant.
                kept, bad = self._matching(batch, self.source.schema.select(keys or self.source.schema.names[:1]))
            chosen = taken(batch, kept, self.schema.names)
            yield replace(chosen, bad=[*chosen.bad, *bad])

    def _matching(self, batch: InputBatch, keys: Schema) -> tuple[np.ndarray[Any, Any], list[BadRecord]]:
        """Return the numbers of the records that make the filter true, and those whose values do not fit it."""
        try:
            return np.flatnonzero(self._flags(batch, keys, slice(None))), []
        except _MISFITS:
            kept, bad = list[int](), list[BadRecord]()
        for i in range(batch.n_records):
            row = slice(i, i + 1)
            try:
                if self._flags(batch, keys, row)[0]:
                    kept.append(i)
            except _MISFITS as error:
                content = {name: values_of(batch, name, row)[0] for name in keys.names}
                reason = f"its values do not fit the filter: {str(error).partition(chr(10))[0]}"
                bad.append(BadRecord(batch.location(i), reason, content))
        return np.array(kept, np.int64), bad

    def _flags(self, batch: InputBatch, keys: Schema, rows: slice) -> np.ndarray[Any, Any]:
        arrays = {}
        for column in keys.columns:
            values = values_of(batch, column.name, rows)
            if isinstance(values, pa.Array):
                plain = values.storage if isinstance(values.type, pa.BaseExtensionType) else values
                arrays[column.name] = plain.cast(column.storage_type)
            else:
                arrays[column.name] = pa.array(list(values), column.storage_type)
        with arrow_errors_as_schema_errors(keys, self.filter):
            return evaluate(pa.table(arrays), self.filter)

    def __repr__(self) -> str:
        # Arrow shortens the text of an expression with many values.
        digest = None if self.filter is None else hashlib.sha256(pickle.dumps(self.filter)).hexdigest()
        return f"SelectedSource({self.source!r}, {self.schema.names}, {self.filter}, {digest})"


_MISFITS = (SchemaError, pa.ArrowException, TypeError, ValueError, OverflowError)


def values_of(batch: InputBatch, name: str, rows: slice) -> Any:
    """Return values of a column, as an Arrow array or a sequence. Of a list of records, an absent one is None."""
    if isinstance(batch.columns, list):
        return [record.get(name) for record in batch.columns[rows]]
    return batch.columns[name][rows]


def select_source(
    source: RecordSource,
    columns: Sequence[str],
    expression: pc.Expression | None,
    narrow: Callable[[RecordSource, Schema], RecordSource],
) -> SelectedSource:
    """Return a source with some columns, in this order (empty: all), and the records that make an expression true.

    narrow: Returns a source that reads only the columns of a schema, where the source can. Raises SchemaError.
    """
    whole = source.schema
    schema = whole.select(columns) if columns else whole
    keys = [] if expression is None else columns_of(whole, expression)
    needed = whole.select(list(dict.fromkeys([*schema.names, *keys])))
    return SelectedSource(narrow(source, needed), schema, expression)


@dataclass(frozen=True)
class MappedSource:
    """The records that a function makes of those of a source, a files.RecordSource."""

    source: RecordSource
    function: MapFunction
    schema: Schema

    @property
    def splits(self) -> tuple[InputSplit, ...]:
        return self.source.splits

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        for batch in self.source.read(split, batch_bytes):
            yield _map_batch(batch, self.source.schema, self.function)[0]

    def __repr__(self) -> str:
        return f"MappedSource({self.source!r}, {identity_of(self.function)})"


def map_source(
    source: RecordSource,
    function: MapFunction | str,
    schema: Mapping[str, UserType] | pa.Schema | Schema | None,
    classes: Mapping[str, Sequence[str]],
    parent: Schema | None,
) -> MappedSource:
    """Return a source whose records are those of a function, or of "module:function".

    The first results give the types that schema does not; a column that the function passes on keeps its type. parent:
    Schema of the data set that they are appended to. Raises SchemaError, TypeError, ValueError.
    """
    if isinstance(function, str):
        function = import_callable(function)
    if not callable(function):
        raise TypeError(f"map= must be a function of a record, or 'module:function', got {function!r}")
    if isinstance(schema, pa.Schema | Schema):
        mapped = Schema.of(schema)
    elif parent is not None and schema is None:
        mapped = parent
    else:
        mapped = _infer(source, function, schema or {})
    mapped = mapped.with_classes(classes)
    if parent is not None:
        check_same_schema(parent, mapped)
    return MappedSource(source, function, mapped)


def _infer(source: RecordSource, function: MapFunction, given: Mapping[str, UserType]) -> Schema:
    sample: list[Mapping[str, Any]] = []
    changed: set[str] = set()
    bad: list[BadRecord] = []
    n_bytes = 0
    for batch in (batch for split in source.splits for batch in source.read(split, _BATCH_BYTES)):
        mapped, others = _map_batch(batch, source.schema, function)
        sample += mapped.columns  # type: ignore[arg-type]  # a list
        changed |= others
        bad += mapped.bad
        n_bytes += batch.n_bytes
        if len(sample) >= _SAMPLE_RECORDS or n_bytes >= _SAMPLE_BYTES:
            break
    if not sample and bad:
        raise SchemaError(f"{bad[0].location}: {bad[0].reason}", column=bad[0].column)
    if not sample and given:
        return Schema.of(given)
    if not sample:
        raise SchemaError(f"{name_of(function)}() returned no record of those that were tried: pass schema=")
    plain = {column.name: column for column in source.schema.columns if column.name not in given}
    kept = {name: column for name, column in plain.items() if name not in changed}
    types = infer_types(sample[:_SAMPLE_RECORDS], {**given, **{name: column.arrow for name, column in kept.items()}})
    there = dict.fromkeys([*(name for record in sample for name in record), *given])
    for name, column in plain.items():  # other bytes of an image are an image
        if column.kind is Kind.IMAGE and name in changed and isinstance(sample[0].get(name), bytes):
            types[name] = f"image{'?' if column.nullable else ''}"
    schema = Schema.of({name: types[name] for name in there})
    return schema.with_classes({name: one.classes for name, one in kept.items() if one.classes and name in there})


def _map_batch(batch: InputBatch, schema: Schema, function: MapFunction) -> tuple[InputBatch, set[str]]:
    """Return the results as a batch, and the names of columns whose values are not those of the source."""
    numbers, records, bad = _records_of(batch, schema)
    found: list[Mapping[str, Any]] = []
    origins: list[int] = []
    changed: set[str] = set()
    for number, record in zip(numbers, records, strict=True):
        try:
            results = function(dict(record))
            if results is None or isinstance(results, Mapping):
                results = [] if results is None else [results]
            if not isinstance(results, list | tuple) or not all(isinstance(one, Mapping) for one in results):
                expected = "a record (a dict), a list of records, or None to leave the record out"
                raise TypeError(f"it must return {expected}, got {results!r:.80}")
        except Exception as error:  # noqa: BLE001 - the user's code
            reason = f"an image cannot be decoded: {error}" if isinstance(error, DecodeError) else None
            bad.append(BadRecord(batch.location(number), reason or _fault(function, error), dict(record)))
            continue
        for one in results:
            changed |= {name for name, value in one.items() if name not in record or value is not record[name]}
        found += results
        origins += [number] * len(results)
    mapped = InputBatch(found, len(found), batch.n_bytes, lambda i: batch.location(origins[i]), bad)
    return mapped, changed


def _fault(function: MapFunction, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is that of the call
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{name_of(function)}() failed: {type(error).__name__}: {error}{where}"


class _Values:
    """Records of batches as `Dataset` serves them, in the place of a ShardWriter."""

    def __init__(self, schema: Schema) -> None:
        self.schema, self.records, self.n_records = schema, list[Mapping[str, Any]](), 0

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        self.n_records += 1

    def write_batch(self, columns: Mapping[str, Any] | pa.RecordBatch) -> None:
        data = convert_batch(self.schema, columns, self.n_records)
        chosen, n = range(len(self.schema)), data[0].n
        loaded = blocks_of(self.schema, "", [0], chosen, [data])
        values = block_values(loaded, chosen, np.zeros(n, np.uint32), np.arange(n, dtype=np.uint32))
        self.records += as_records(values)
        self.n_records += n


def _records_of(batch: InputBatch, schema: Schema) -> tuple[list[int], list[Mapping[str, Any]], list[BadRecord]]:
    """Return the good records of a batch with their numbers in it, and the bad ones."""
    values = _Values(schema)
    numbers, bad = write_good(values, batch)
    return numbers, values.records, bad


def write_good(writer: BatchWriter, batch: InputBatch) -> tuple[list[int], list[BadRecord]]:
    """Write the good records of a batch to a new writer. Return their numbers in the batch, and the bad records."""
    wrong, bad = set[int](), list[BadRecord]()

    def add(one: BadRecord) -> None:
        if len(bad) >= len(batch.bad):
            wrong.add(writer.n_records + len(wrong))
        bad.append(one)

    if batch.n_records or batch.bad:
        write_batch(writer, batch, add)
    return [number for number in range(batch.n_records) if number not in wrong], bad


def divide(batch: InputBatch, split: Split | None, where: InputSplit, first: int) -> Iterator[tuple[str, InputBatch]]:
    """Yield the records of each part of a split; None: of the one part "". Bytes and bad records are the first part's.

    Without a key, a record's part follows from its number in the source: where, and first, that of the batch in it.
    """
    if split is None:
        yield "", batch
        return
    n = batch.n_records
    if split.by_hash is None:
        keys = pa.array([f"{where.path}:{where.start}:{first + i}" for i in range(n)], pa.string())
    else:
        keys = _keys_of(batch, split.by_hash)
    parts = split.part_of_keys(pa.chunked_array([keys])) if n else np.zeros(0, np.uint16)
    for number, name in enumerate(split.names):
        rows = np.flatnonzero(parts == number)
        of_part = taken(batch, rows)
        yield name, replace(of_part, n_bytes=0, bad=()) if number else of_part


def _location_of(batch: InputBatch, rows: Any, i: int) -> str:
    return batch.location(int(rows[i]))


def taken(batch: InputBatch, rows: np.ndarray[Any, Any], names: Sequence[str] | None = None) -> InputBatch:
    """Return some records of a batch, with some columns (None: all). Its bytes and bad records stay the same."""
    found: Any = batch.columns
    if names is not None and isinstance(found, list):
        found = [{name: record[name] for name in names if name in record} for record in found]
    elif names is not None:
        found = (
            found.select(list(names)) if isinstance(found, pa.RecordBatch) else {name: found[name] for name in names}
        )
    if len(rows) < batch.n_records:
        if isinstance(found, pa.RecordBatch):
            arrays = [_taken_values(values, rows) for values in found.columns]
            fields = [field.with_type(array.type) for field, array in zip(found.schema, arrays, strict=True)]
            found = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
        elif isinstance(found, list):
            found = [found[i] for i in rows]
        else:
            found = {name: _taken_values(values, rows) for name, values in found.items()}
    return InputBatch(found, len(rows), batch.n_bytes, partial(_location_of, batch, rows), batch.bad)


def _taken_values(values: Any, rows: np.ndarray[Any, Any]) -> Any:
    if isinstance(values, pa.Array):
        try:
            return values.take(pa.array(rows))
        except pa.ArrowNotImplementedError:  # of views of text and bytes, as polars exports them
            return values.cast(storable_type(values.type)).take(pa.array(rows))
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]


def _keys_of(batch: InputBatch, name: str) -> pa.Array:
    """Return the keys of a batch. A value that is no key has the part of a null: the writer says what is wrong."""
    columns = batch.columns
    if isinstance(columns, pa.RecordBatch):
        index = columns.schema.get_field_index(name)
        return pa.nulls(batch.n_records, pa.string()) if index < 0 else columns.column(index)
    found: Any = [record.get(name) for record in columns] if isinstance(columns, list) else columns.get(name)
    if isinstance(found, pa.Array):
        return found
    # Keys of one column are hashed as text or bytes; an integer as its decimal digits.
    keys = [_key(value) for value in (found if found is not None else [None] * batch.n_records)]
    return pa.array(keys, pa.binary())


def _key(value: Any) -> bytes | None:
    if isinstance(value, bytes):
        return value
    return str(value).encode(errors="surrogatepass") if isinstance(value, str | int | np.integer) else None
