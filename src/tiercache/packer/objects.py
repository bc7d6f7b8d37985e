"""Python objects as sources of a packing: functions of inputs, data sets of libraries, tables and frames, iterables.

An object is recognised by its methods, so no library is imported for it. It has units, which are the bounds of splits:
inputs, records, rows, shards of a stream. An iterable is one unit, so that one process reads it, from its beginning.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import pickle
import re
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import CodeType
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.packer.files import InputBatch, InputSplit, RecordSource
from tiercache.shard.conversion import as_table, infer_batch, infer_records
from tiercache.shard.schema import Schema, UserType, check_same_schema

# Records, and their bytes, from which types and the size of a unit are known.
_SAMPLE_RECORDS, _SAMPLE_BYTES = 100, 4 << 20
# Bytes of a split, if its units are small: tasks consist of whole splits.
_SPLIT_BYTES = 4 << 20
_BATCH_RECORDS = 1024
_SHOWN_CHARACTERS = 80
_CALLABLE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")

Arrow: TypeAlias = "pa.Table | pa.RecordBatch"
GivenSchema: TypeAlias = "Mapping[str, UserType] | pa.Schema | Schema | None"


@dataclass(frozen=True, slots=True)
class ObjectSplit(InputSplit):
    """Units [start, end) of an object. content: What the object need not be sent to a process for; digest: its hash."""

    content: Any = field(default=None, repr=False, compare=False)
    digest: str = ""


class Units(ABC):
    """The units of an object, with their records. schema: That of the object itself; None: inferred from records."""

    schema: Schema | None = None
    most_sampled = 100  # units
    is_read_once = False  # records of an iterator, unless its function can be called again
    is_inspected = True  # while true, read() is a sample and is repeated later

    @property
    @abstractmethod
    def n_units(self) -> int: ...

    @property
    def has_content_id(self) -> bool:
        """Whether repr() tells the object from any that has other records."""
        return False

    @abstractmethod
    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:
        """Yield the records of some units, or Arrow tables of them, each with the number of its unit."""

    @abstractmethod
    def location(self, unit: int, record: int) -> str:
        """Return the name of a record, for messages. record: Its number in the split."""

    def split(self, start: int, end: int, n_bytes: int) -> ObjectSplit:
        return ObjectSplit("", start, end, n_bytes)

    def types_of(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, UserType]:  # noqa: ARG002
        """Return the types that the object states. records: The sample, which shows what is nullable."""
        return {}


@dataclass(frozen=True)
class ObjectSource:
    """A Python object as a files.RecordSource."""

    units: Units
    schema: Schema
    splits: tuple[ObjectSplit, ...]

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        records: list[Mapping[str, Any]] = []
        places: list[tuple[int, int]] = []
        n_records = n_bytes = 0
        names = self.schema.names

        def taken(columns: Any, n: int, places: Sequence[tuple[int, int]], done_bytes: int = 0) -> InputBatch:
            return InputBatch(columns, n, done_bytes, lambda i: self.units.location(*places[i]))

        for unit, item in self.units.read(cast("ObjectSplit", split)):
            if isinstance(item, pa.Table | pa.RecordBatch):
                for rows in item.to_batches() if isinstance(item, pa.Table) else [item]:
                    yield taken(rows, len(rows), [(unit, n_records + i) for i in range(len(rows))])
                    n_records += len(rows)
                continue
            records.append(_record(item, names, self.units, unit, n_records))
            places.append((unit, n_records))
            n_records += 1
            n_bytes += _size_of(item)
            if n_bytes >= batch_bytes or len(records) == _BATCH_RECORDS:
                yield taken(records, len(records), places)
                records, places, n_bytes = [], [], 0
        yield taken(records, len(records), places, split.n_bytes)

    def __reduce__(self) -> Any:
        return ObjectSource, (self.units, self.schema, ())  # a task is sent with its splits


def find_object(
    source: object,
    inputs: object,
    schema: GivenSchema,
    classes: Mapping[str, Sequence[str]],
    shard_bytes: int,
    parent: Schema | None,
) -> ObjectSource:
    """Inspect an object, and return it as a source. parent: Schema of the data set that it is appended to.

    Raises SchemaError, and TypeError for an object that has no records.
    """
    units = units_of(source, inputs)
    whole = Schema.of(schema) if isinstance(schema, Schema | pa.Schema) else units.schema
    if whole is None and parent is not None and schema is None:
        whole = parent
    sample = _Sample(units) if whole is None or units.n_units > 1 else None
    if whole is None and sample is not None:
        whole = sample.infer(cast("Mapping[str, UserType]", schema or {}))
    elif whole is not None and isinstance(schema, Mapping):
        if new := [name for name in schema if name not in whole.names]:
            raise SchemaError(f"the source has no such column; there are {', '.join(whole.names)}", column=new[0])
        whole = Schema.of({column.name: schema.get(column.name, column.arrow) for column in whole.columns})
    whole = cast("Schema", whole).with_classes(classes)
    if parent is not None:
        check_same_schema(parent, whole)
        whole = parent
    unit_bytes = 1 if sample is None else sample.unit_bytes(shard_bytes)
    step = max(1, min(_SPLIT_BYTES, shard_bytes) // unit_bytes)
    starts = range(0, units.n_units, step)
    runs = [(start, min(start + step, units.n_units)) for start in starts]
    return ObjectSource(units, whole, tuple(units.split(s, e, (e - s) * unit_bytes) for s, e in runs))


def narrow_object(source: RecordSource, schema: Schema) -> RecordSource:
    """Return the source with the columns of a schema, if a data set that has a choice of columns is its object."""
    units = source.units if isinstance(source, ObjectSource) else None
    if isinstance(units, _DataSets) and units.made_by is None:
        chosen: _Data = _DataSets([one.select_columns(schema.names) for one in units.datasets])
    elif isinstance(units, _HuggingFace) and units.made_by is None:
        chosen = _HuggingFace(units.dataset.select_columns(list(schema.names)))
    else:
        return source
    return ObjectSource(chosen, schema, cast("ObjectSource", source).splits)


def object_of(source: Any) -> ObjectSource | None:
    """Return the Python object from which a source has its records, if it has them from one."""
    while hasattr(source, "source"):
        source = source.source
    return source if isinstance(source, ObjectSource) else None


def is_object(source: object) -> bool:
    """Return whether a source is a Python object, or names one as "module:callable"; else it is a path or a URL."""
    if not isinstance(source, str | os.PathLike):
        return True
    text = os.fspath(source)
    return isinstance(text, str) and _CALLABLE.fullmatch(text) is not None and not Path(text).exists()


def import_callable(name: str) -> Callable[..., Any]:
    """Return what "module:callable" names; modules in the current folder are found, too. Raises ValueError."""
    module_name, _, path = name.partition(":")
    if not path:
        raise ValueError(f"{name}: expected 'module:function'")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{name}: there is no module {error.name!r} in this folder or among the installed ones"
        ) from None
    except AttributeError:
        raise ValueError(f"{name}: the module {module_name!r} has no {path!r}") from None
    if not callable(found):
        raise ValueError(f"{name}: expected a function or a class, got {type(found).__qualname__}")
    return cast("Callable[..., Any]", found)


def units_of(source: Any, inputs: object = None) -> Units:
    if isinstance(source, str):
        source = import_callable(source)
    if inputs is not None:
        if not callable(source):
            raise TypeError(f"inputs are passed to a function, got {_shown(source)}")
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable):
            raise TypeError(f"inputs are a sequence or an iterable, one element for each call, got {_shown(inputs)}")
        return _Inputs(source, inputs)
    if callable(source) and not _has_records(source):
        made = source()
        if callable(made) or not _has_records(made):
            raise TypeError(
                f"{name_of(source)}() must return a data set, a table, or an iterable of records, got {_shown(made)}"
            )
        units = _units_of_data(made)
        units.made_by = source
        return units
    if not _has_records(source):
        raise TypeError(
            f"cannot pack {_shown(source)}: pass a path, a function with inputs, a data set, a table, a frame, or an "
            "iterable of dicts"
        )
    return _units_of_data(source)


def _has_records(source: Any) -> bool:
    if isinstance(source, type):
        return False
    return isinstance(source, Iterable) or hasattr(source, "__getitem__") or hasattr(source, "__arrow_c_stream__")


def _units_of_data(source: Any) -> _Data:
    if isinstance(source, Mapping | str | bytes):
        raise TypeError(f"expected an iterable of records, got {_shown(source)}: put a single record into a list")
    if hasattr(source, "__tiercache__"):
        source = [source]
    if isinstance(source, list | tuple) and source and all(hasattr(one, "__tiercache__") for one in source):
        natives = [one.__tiercache__() for one in source]
        if all(n.source.mixture is None and not n.source.is_packed and n.transform is None for n in natives):
            return _DataSets(source)
        if len(source) > 1:
            raise TypeError("of several data sets, none may be a mixture, have packed rows, or have a transform")
        return _Records(source[0])
    if hasattr(source, "features") and hasattr(source, "with_format"):
        return _HuggingFace(source) if hasattr(source, "__len__") else _HuggingFaceStream(source)
    if isinstance(source, pa.RecordBatchReader):
        units = _Stream(source)
        units.schema = Schema.of(source.schema)
        return units
    table = as_table(source)
    if isinstance(table, pa.Table | pa.RecordBatch):
        return _Table(pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return _Records(source)
    return _Stream(source)


class _Inputs(Units):
    """A function and its inputs, which are the units. A split has its inputs; no process gets all of them."""

    most_sampled = 8  # the function may be slow

    def __init__(self, function: Callable[..., Any], inputs: Iterable[Any]) -> None:
        self.function = function
        self.inputs = inputs if isinstance(inputs, Sequence) else list(inputs)

    @property
    def n_units(self) -> int:
        return len(self.inputs)

    def split(self, start: int, end: int, n_bytes: int) -> ObjectSplit:
        chosen = [self.inputs[i] for i in range(start, end)]
        digest = hashlib.sha256()
        for one in chosen:
            digest.update(_pickled(one))
        return ObjectSplit("", start, end, n_bytes, chosen, digest.hexdigest())

    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:
        for unit, one in enumerate(split.content, split.start):
            for item in self._items(one):
                yield unit, item

    def _items(self, one: Any) -> Iterable[Any]:
        found = as_table(self.function(one))
        if found is None:
            return ()
        if isinstance(found, Mapping | pa.Table | pa.RecordBatch):
            return (found,)
        if isinstance(found, str | bytes) or not isinstance(found, Iterable):
            expected = "a record (a dict), or an iterable of records"
            raise TypeError(f"{name_of(self.function)}({_shown(one)}): expected {expected}, got {_shown(found)}")
        return map(as_table, found)

    def location(self, unit: int, record: int) -> str:  # noqa: ARG002
        return f"input {unit} of {name_of(self.function)}"

    def __repr__(self) -> str:
        return f"Inputs({identity_of(self.function)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "inputs": ()}


class _Data(Units):
    """The data of an object. made_by: Function that made it, by which other processes make it again."""

    made_by: Callable[[], Any] | None = None

    def __reduce__(self) -> Any:
        if self.made_by is None:
            return super().__reduce__()
        return units_of, (self.made_by,), {"is_inspected": self.is_inspected}

    def __repr__(self) -> str:
        return self._fact() if self.made_by is None else f"Made({identity_of(self.made_by)}, {self.n_units})"

    @abstractmethod
    def _fact(self) -> str:
        """Return what tells the object from others."""


class _Records(_Data):
    """Records by number: a list of records, or a map-style Dataset of torch."""

    def __init__(self, records: Any) -> None:
        self.records = records

    @property
    def n_units(self) -> int:
        return len(self.records)

    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:
        for number in range(split.start, split.end):
            yield number, self.records[number]

    def location(self, unit: int, record: int) -> str:  # noqa: ARG002
        return f"record {unit} of {_shown_type(self.records)}"

    def _fact(self) -> str:
        content = hashlib.sha256()
        if isinstance(self.records, list | tuple):
            for record in self.records:
                content.update(_pickled(record))
        return f"{_shown_type(self.records)}, {self.n_units}, {content.hexdigest()}"


class _Stream(_Data):
    """Records, or Arrow tables, of an iterable: one unit. What inspections read of an iterator is kept."""

    def __init__(self, records: Iterable[Any]) -> None:
        self.records = records
        self._id = secrets.token_hex(16)  # nothing tells whether another iterable would have the same records
        self._head: list[Any] = []
        self._is_read = False

    @property
    def n_units(self) -> int:
        return 1

    @property
    def is_read_once(self) -> bool:  # type: ignore[override]
        return self.made_by is None and isinstance(self.records, Iterator)

    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:  # noqa: ARG002
        found = self.records
        if isinstance(found, Iterator):
            found = self._inspect(found) if self.is_inspected else self._rest(found)
        for item in found:
            yield 0, as_table(item)

    def _inspect(self, records: Iterator[Any]) -> Iterator[Any]:
        yield from self._head
        for item in records:
            self._head.append(item)
            yield item

    def _rest(self, records: Iterator[Any]) -> Iterable[Any]:
        if self._is_read and self.made_by is not None:
            return cast("Iterable[Any]", self.made_by())
        self._is_read = True
        head, self._head = self._head, []
        return chain(head, records)

    def location(self, unit: int, record: int) -> str:  # noqa: ARG002
        return f"record {record} of {_shown_type(self.records)}"

    def _fact(self) -> str:
        return self._id


class _Table(_Data):
    """An Arrow table, or a frame as one. A split has its rows; no process gets all of them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.schema = infer_batch(table)

    @property
    def n_units(self) -> int:
        return int(self.table.num_rows)

    def split(self, start: int, end: int, n_bytes: int) -> ObjectSplit:
        rows = _Rows(self.table.slice(start, end - start))
        return ObjectSplit("", start, end, n_bytes, rows, hashlib.sha256(rows.to_bytes()).hexdigest())

    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:
        for batch in split.content.table.to_batches():
            yield split.start, batch

    def location(self, unit: int, record: int) -> str:
        return f"row {unit + record} of the table"

    def _fact(self) -> str:
        return f"table, {self.n_units}"

    def __getstate__(self) -> dict[str, Any]:
        return {"table": self.table.slice(0, 0), "schema": self.schema}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a table. A pickle has these rows alone; that of a slice would have the whole table."""

    table: pa.Table

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        return sink.getvalue()

    def __reduce__(self) -> Any:
        return _rows_of, (self.to_bytes(),)


def _rows_of(data: bytes) -> _Rows:
    return _Rows(pa.ipc.open_stream(data).read_all())


class _DataSets(_Data):
    """Data sets of tiercache, one after the other, with their stored values."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = list(datasets)
        first = self.datasets[0].schema
        for other in self.datasets[1:]:
            check_same_schema(first, other.schema)
        self.schema = first

    @property
    def n_units(self) -> int:
        return sum(map(len, self.datasets))

    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:
        first = 0
        for dataset in self.datasets:
            start, stop = max(split.start - first, 0), min(split.end - first, len(dataset))
            if start < stop:
                number = first + start
                for batch in dataset.skip(start).take(stop - start).to_arrow():
                    yield number, batch
                    number += len(batch)
            first += len(dataset)

    def location(self, unit: int, record: int) -> str:  # noqa: ARG002
        return f"a record from {unit} on"

    @property
    def has_content_id(self) -> bool:
        return self.made_by is None

    def _fact(self) -> str:
        return repr([(dataset.fingerprint, repr(dataset)) for dataset in self.datasets])


class _HuggingFace(_Data):
    """A Dataset of Hugging Face: its Arrow table, with images as their bytes and class names."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("arrow")
        self.features = dict(dataset.features)
        nullable = {name for name in self.features if _has_nulls(dataset, name)}
        self.schema = _schema_of_features(self.features, dataset.features.arrow_schema, nullable)

    @property
    def n_units(self) -> int:
        return len(self.dataset)

    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:
        if split.end > split.start:
            table = self.dataset[split.start : split.end]
            for name in table.column_names:
                if _is_feature(self.features[name], "Image"):
                    image = [None if one is None else _image_bytes(one) for one in table[name].to_pylist()]
                    table = table.set_column(table.column_names.index(name), name, pa.array(image, pa.large_binary()))
            for batch in _plain(table).to_batches():
                yield split.start, batch

    def location(self, unit: int, record: int) -> str:
        return f"record {unit + record} of the Hugging Face data set"

    def _fact(self) -> str:
        return f"Hugging Face, {getattr(self.dataset, '_fingerprint', '')}, {self.n_units}"


class _HuggingFaceStream(_Data):
    """An IterableDataset of Hugging Face: its shards are the units."""

    def __init__(self, dataset: Any) -> None:
        self.features = dict(dataset.features or {})
        for name, feature in self.features.items():
            if _is_feature(feature, "Image"):
                dataset = dataset.cast_column(name, type(feature)(decode=False))
        self.dataset = dataset

    @property
    def n_units(self) -> int:
        return int(self.dataset.num_shards)

    def read(self, split: ObjectSplit) -> Iterator[tuple[int, Any]]:
        images = [name for name, feature in self.features.items() if _is_feature(feature, "Image")]
        for unit in range(split.start, split.end):
            for record in self.dataset.shard(num_shards=self.n_units, index=unit):
                found = {n: None if record[n] is None else _image_bytes(record[n]) for n in images}
                yield unit, record | found

    def types_of(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, UserType]:
        if not self.features:
            return {}
        nullable = {name for name in self.features if any(record[name] is None for record in records)}
        schema = _schema_of_features(self.features, self.dataset.features.arrow_schema, nullable)
        return {column.name: column.arrow for column in schema.columns}

    def location(self, unit: int, record: int) -> str:
        return f"shard {unit} of the Hugging Face data set, record {record} of the split"

    def _fact(self) -> str:
        return f"Hugging Face stream, {self.features}, {self.n_units}"


def _is_feature(feature: Any, kind: str) -> bool:
    return type(feature).__name__ == kind and type(feature).__module__.startswith("datasets.")


def _has_nulls(dataset: Any, name: str) -> bool:
    return bool(dataset.data.column(name).null_count)


def _schema_of_features(features: Mapping[str, Any], arrow: pa.Schema, nullable: set[str]) -> Schema:
    types: dict[str, UserType] = {}
    for name, feature in features.items():
        optional = "?" if name in nullable else ""
        if _is_feature(feature, "Image"):
            types[name] = f"image{optional}"
        else:
            kind = arrow.field(name).type
            plain = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
            types[name] = pa.field(name, plain, nullable=name in nullable)
    classes = {name: feature.names for name, feature in features.items() if _is_feature(feature, "ClassLabel")}
    return Schema.of(types).with_classes(classes)


def _plain(table: pa.Table) -> pa.Table:
    """Return a table whose extension types, such as those of arrays of Hugging Face, are replaced by their storage."""
    for number, column in enumerate(table.columns):
        if isinstance(column.type, pa.BaseExtensionType):
            storage = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
            table = table.set_column(number, table.column_names[number], storage)
    return table


def _image_bytes(image: Mapping[str, Any]) -> bytes:
    data = image["bytes"]
    return Path(image["path"]).read_bytes() if data is None else bytes(data)


class _Sample:
    """The first records of an object, from which its types and the size of its units follow."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.records: list[Any] = []
        self.table: Arrow | None = None
        self.n_bytes, self.n_units, self.is_cut = 0, 0, False
        n_units = min(units.n_units, units.most_sampled)
        for unit, item in units.read(units.split(0, n_units, 0)):
            self.n_units = unit
            if isinstance(item, pa.Table | pa.RecordBatch):
                self.table = self.table if self.table is not None else item
                self.n_bytes += item.nbytes
            else:
                self.n_bytes += _size_of(item)
                if len(self.records) < _SAMPLE_RECORDS:
                    self.records.append(item)
            is_enough = self.table is not None or len(self.records) == _SAMPLE_RECORDS
            if self.n_bytes >= _SAMPLE_BYTES or (is_enough and units.n_units == 1):
                self.is_cut = True
                break
        else:
            self.n_units = n_units

    def infer(self, given: Mapping[str, UserType]) -> Schema:
        """Return the schema of the records. given: Types of some columns."""
        if self.table is not None:
            types: dict[str, UserType] = {column.name: column.arrow for column in infer_batch(self.table).columns}
        else:
            records = [_record(item, tuple(given), self.units, 0, i) for i, item in enumerate(self.records)]
            types = infer_types(records, {**self.units.types_of(records), **given})
        return Schema.of(types | dict(given))

    def unit_bytes(self, large: int) -> int:
        """Return the size of a unit. large: That of a unit that is larger than the sample."""
        if self.is_cut and not self.n_units:
            return large
        return max(1, self.n_bytes // max(self.n_units, 1))


def infer_types(records: Sequence[Mapping[str, Any]], given: Mapping[str, UserType]) -> dict[str, UserType]:
    """Return the types of the columns of records, in order. given: Types of some columns. Raises SchemaError."""
    if not records and not given:
        raise SchemaError("the source has no record, so no schema can be inferred: pass schema=")
    untyped = [{name: value for name, value in record.items() if name not in given} for record in records]
    inferred = infer_records(untyped) if any(untyped) else Schema([])
    types = {column.name: column.arrow for column in inferred.columns}
    names = dict.fromkeys(name for record in records for name in record)
    return {name: given.get(name, types.get(name)) for name in names} | dict(given)


def _record(item: Any, names: Sequence[str], units: Units, unit: int, number: int) -> Mapping[str, Any]:
    """Return a record as a mapping; a tuple has the values of the columns, in order. Raises SchemaError."""
    if type(item) is dict or isinstance(item, Mapping):  # the first is ten times as fast
        return cast("Mapping[str, Any]", item)
    if isinstance(item, tuple | list) and names and len(item) == len(names):
        return dict(zip(names, item, strict=True))
    if isinstance(item, tuple | list):
        raise SchemaError(
            f"{units.location(unit, number)}: expected a record (a dict), got a {type(item).__name__} of {len(item)}; "
            "name its values by schema={'image': 'image', 'label': 'int64'}, in their order"
        )
    raise SchemaError(f"{units.location(unit, number)}: expected a record (a dict), got {_shown(item)}")


def _size_of(item: Any) -> int:
    """Return about how many bytes a record has when it is stored."""
    if type(item) is dict or isinstance(item, Mapping):
        return sum(map(_value_bytes, item.values()))
    return sum(map(_value_bytes, item)) if isinstance(item, tuple | list) else 0


def _value_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if (n_bytes := getattr(value, "nbytes", None)) is not None:
        return int(n_bytes)
    if isinstance(value, list | tuple):
        return 8 * len(value)
    width, height = value.size if hasattr(value, "getbands") else (2, 2)  # a Pillow image, or a number
    return int(width * height) * 2


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def identity_of(function: Callable[..., Any]) -> str:
    """Return what tells a function from others, and from itself after its code was changed."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return f"{type(function).__module__}.{name_of(function)}, {hashlib.sha256(_pickled(function)).hexdigest()}"
    cells = [_pickled(cell.cell_contents) for cell in function.__closure__ or ()]
    facts = repr((_facts_of(code), cells, getattr(function, "__defaults__", None)))
    return f"{function.__module__}.{name_of(function)}, {hashlib.sha256(facts.encode()).hexdigest()}"


def _facts_of(code: CodeType) -> tuple[Any, ...]:
    constants = [_constant(one) for one in code.co_consts]
    return code.co_code.hex(), constants, code.co_names, code.co_varnames


def _constant(one: object) -> object:
    if isinstance(one, frozenset):  # the order of its elements is another one in each process
        return sorted(map(repr, one))
    return _facts_of(one) if isinstance(one, CodeType) else repr(one)


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001 - the user's code pickles it
        return repr(value).encode()


def _shown_type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _shown(value: object) -> str:
    text = repr(value)
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return f"{text} ({type(value).__qualname__})"
