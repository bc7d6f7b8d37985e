"""Layouts of other libraries, which `tiercache.Dataset` reads in place, as sources of a packing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache.errors import CorruptShard, SchemaError
from tiercache.layouts.contract import Layout, LayoutFile
from tiercache.layouts.find import LAYOUTS, StoreFolder, dataset_id_of, names_of, open_bytes
from tiercache.layouts.reader import LayoutReader
from tiercache.layouts.webdataset import ending_of
from tiercache.model import ObjectInfo
from tiercache.packer.export_formats import arrays_of
from tiercache.packer.files import BadRecord, Files, InputBatch, InputSplit, SourceFile, StoreFiles
from tiercache.shard.schema import Column, Kind, Schema, UserType
from tiercache.store import Store, open_store

# Kinds of sources, and the ends of names of their files. Parquet, and Arrow as .feather, are kinds of tables.
LAYOUT_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"mds": ("index.json",), "arrow": (".arrow", ".ipc"), "megatron": (".idx",), "webdataset": (".tar",)}
)
# Bytes of a split, if its blocks are small: tasks consist of whole splits.
_SPLIT_BYTES = 4 << 20


@dataclass(frozen=True)
class LayoutSource:
    """A data set in the layout of another library, a files.RecordSource. A batch has the records of one block.

    schema: Columns to pack, whose types may be others than those of the layout. stored: Names of those columns that the
    layout names otherwise.
    """

    files: Files
    layout: Layout
    schema: Schema
    stored: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def splits(self) -> tuple[InputSplit, ...]:
        return tuple(split for file in self.layout.files for split in _runs_of_blocks(file))

    @cached_property
    def _by_key(self) -> Mapping[str, LayoutFile]:
        return {file.info.key: file for file in self.layout.files}

    @cached_property
    def _store(self) -> Store:
        return _open(self.files)

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:  # noqa: ARG002 - a block is a batch
        file, plain = self._by_key[split.path], self.layout.schema
        columns = [plain.index(self.stored.get(name, name)) for name in self.schema.names]
        pairs = list(zip(self.schema.columns, [plain.columns[column] for column in columns], strict=True))
        fields = pa.schema([stored.arrow.with_name(column.name) for column, stored in pairs])
        data = open_bytes(self._store, dataset_id_of(self._store.url), file.info)
        index = file.index
        with closing(LayoutReader(self.layout, file, data)) as reader:
            first = int(index.n_records[: split.start].sum())
            for block in range(split.start, split.end):
                n, n_bytes = int(index.n_records[block]), int(index.raw_bytes[block])
                try:
                    loaded = reader.load_blocks([block], columns)
                except (CorruptShard, SchemaError) as error:
                    where = f"{self.files.location(split.path)}, records {first:,} to {first + n - 1:,}"
                    bad = BadRecord(where, str(error))
                    yield InputBatch({}, 0, n_bytes, str, [bad])
                else:
                    arrays = [loaded.array(0, column) for column in columns]
                    batch: Any = pa.RecordBatch.from_arrays(arrays, schema=fields)
                    if any(_is_other(*pair) for pair in pairs):
                        values = (_objects(*pair, array) for pair, array in zip(pairs, arrays, strict=True))
                        batch = dict(zip(self.schema.names, values, strict=True))
                    yield InputBatch(batch, n, n_bytes, partial(self._location, split.path, first))
                first += n

    def _location(self, path: str, first: int, i: int) -> str:
        return f"{self.files.location(path)}, record {first + i:,}"

    def __repr__(self) -> str:
        return f"LayoutSource({self.files!r}, {self.layout.name}, {self.layout.fingerprint})"

    def __reduce__(self) -> tuple[object, ...]:
        return LayoutSource, (self.files, self.layout, self.schema, self.stored)  # each process opens the store


def named_as(layout: Layout, given: Mapping[str, UserType] | pa.Schema | Schema | None) -> Mapping[str, str]:
    """Return the columns of tars that types are given for, without the ending: {"image": "image.jpg"}."""
    if layout.name != "WebDataset" or given is None:
        return {}
    columns = [column for column in Schema.of(given).columns if column.name not in layout.schema.names]
    return {column.name: name for column in columns if (name := ending_of(column)) in layout.schema.names}


def _is_other(column: Column, stored: Column) -> bool:
    """Return whether the values of a column are in another form, as export() writes those that a format lacks."""
    is_array = column.kind in (Kind.TENSOR, Kind.RAGGED)
    is_flags = is_array and column.dtype == "bool" and stored.dtype == "uint8"
    return is_flags or (stored.kind is Kind.JSON and column.kind is not Kind.JSON) or _is_npy(column, stored)


def _is_npy(column: Column, stored: Column) -> bool:
    return stored.name.endswith(".npy") and stored.kind is Kind.BYTES and column.kind in (Kind.TENSOR, Kind.RAGGED)


def _objects(column: Column, stored: Column, array: pa.Array) -> Any:
    """Return values as those of the column's type: what JSON says, arrays of files of NumPy, and flags that are 0 or 1.

    Values that cannot be read stay what they are: they are bad records.
    """
    if not _is_other(column, stored):
        return array
    if stored.kind is Kind.RAGGED or stored.kind is Kind.TENSOR:
        arrays = arrays_of(stored, array)
        return [one if one is None or (one > 1).any() else one.view(np.bool_) for one in arrays]
    values = array.to_pylist()
    for i, value in enumerate(values):
        with suppress(ValueError, EOFError, OSError):
            if value is not None:
                is_json = stored.kind is Kind.JSON
                values[i] = json.loads(value) if is_json else np.load(io.BytesIO(value), allow_pickle=False)
    return values


def _runs_of_blocks(file: LayoutFile) -> Iterator[InputSplit]:
    """Yield the splits of a file. A file that is only read beside others has none."""
    sizes = file.index.raw_bytes
    ends = np.cumsum(sizes)
    starts = np.flatnonzero(np.diff((ends - 1) // _SPLIT_BYTES, prepend=-2)).tolist()
    for start, end in pairwise([*starts, len(sizes)]):
        yield InputSplit(file.info.key, start, end, int(sizes[start:end].sum()))


def find_layout_source(files: Files, found: Sequence[SourceFile], kind: str) -> LayoutSource:
    """Return these files as a data set of a layout. Raises SchemaError if they are none, or if it cannot be read."""
    layout = next(one for one in LAYOUTS if one.name.lower() == kind)
    with closing(_open(files)) as store:
        folder = StoreFolder(store, None, listed=[ObjectInfo(file.path, file.n_bytes) for file in found])
        if len(found) == 1:  # a URL may name one of the files of a layout
            folder = StoreFolder(store, None, only=names_of(found[0].path))
        data = layout.find(folder)
    if data is None:
        where = files.location(found[0].path if len(found) == 1 else "")
        raise SchemaError(f"{where}: expected files of {layout.name}, as kind={kind!r} says, and found none")
    return LayoutSource(files, data, data.schema)


def _open(files: Files) -> Store:
    return open_store(files.root, **(files.storage_options if isinstance(files, StoreFiles) else {}))
