"""Parquet files: a row group is a block. Hive partitions are columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import SchemaError
from tiercache.layouts.contract import FileBytes, FileIndex, Folder, LayoutFile, check_unique, merged
from tiercache.layouts.hive import PartitionedLayout
from tiercache.layouts.hugging_face import array_of, check_classes, features_of, hf_features_schema
from tiercache.model import ByteRange, ObjectInfo
from tiercache.shard.schema import Schema, with_nulls

SUFFIXES = (".parquet", ".pq", ".parq")
# Bytes at the end of a file that contain nearly every footer.
_TAIL_BYTES = 64 << 10


class ParquetLayout(PartitionedLayout):
    name = "Parquet"

    suffixes: ClassVar = SUFFIXES

    @classmethod
    def find(cls, folder: Folder) -> ParquetLayout | None:
        """Return the Parquet files of a folder, by the endings of their names; other files are left out.

        A column is nullable unless the statistics of all row groups show that it has no null.
        """
        objects = [info for info in folder.objects if info.key.lower().endswith(SUFFIXES)]
        if not objects:
            return None
        indexes = folder.index("parquet", objects, _index)
        locate = f"{folder.url.rstrip('/')}/{{}}".format
        schemas = [pa.ipc.read_schema(pa.py_buffer(index.parts["schema"])) for index in indexes]
        found = {name for index in indexes for name in _texts(index.parts["with_nulls"])}
        stored = stored_schema([locate(info.key) for info in objects], schemas, found)
        return cls(stored, [LayoutFile(info, index) for info, index in zip(objects, indexes, strict=True)], folder)

    def stored_ranges(self, file: LayoutFile, blocks: Sequence[int], columns: Sequence[str]) -> list[ByteRange]:
        names = _texts(file.index.parts["names"])
        where = np.ix_(list(blocks), [names.index(name) for name in columns])
        starts, ends = file.index.parts["starts"][where].ravel(), file.index.parts["ends"][where].ravel()
        return merged([ByteRange(int(start), int(end)) for start, end in zip(starts, ends, strict=True)])

    def read_stored(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        from pyarrow import parquet as pq  # 40 ms, which only Parquet files need

        footer = data.once("footer", lambda: pq.read_metadata(_open_tail(data)))
        opened = data.open_for_arrow(self.ranges(file, [block], columns))
        with pq.ParquetFile(opened, metadata=footer) as parquet:
            group = int(file.index.parts["groups"][block])
            # The threads of the loader read several row groups at once.
            table = parquet.read_row_group(group, columns=columns, use_threads=False)
        where = f"{data.url}, row group {group}"
        return {name: array_of(self.schema.columns[self.schema.index(name)], table[name], where) for name in columns}


def _open_tail(data: FileBytes) -> pa.PythonFile:
    return data.open_for_arrow([ByteRange(max(data.n_bytes - _TAIL_BYTES, 0), data.n_bytes)])


def _index(_info: ObjectInfo, data: FileBytes) -> FileIndex:
    """Return the row groups of a file, from its footer. Raises SchemaError for a file that is not Parquet."""
    from pyarrow import parquet as pq  # see ParquetLayout.read_stored

    try:
        footer = pq.read_metadata(_open_tail(data))
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        text = str(error).strip().splitlines()[0]
        raise SchemaError(f"{data.url}: not a readable Parquet file: {text}") from error
    check_unique(data.url, schema.names)
    groups = [i for i in range(footer.num_row_groups) if footer.row_group(i).num_rows]
    starts = np.full((len(groups), len(schema.names)), data.n_bytes, np.int64)
    ends = np.zeros_like(starts)
    raw_bytes = np.zeros(len(groups), np.int64)
    position = {name: number for number, name in enumerate(schema.names)}
    for row, i in enumerate(groups):
        for name, chunk in _chunks(footer.row_group(i), schema, data.url):
            start = chunk.data_page_offset
            if chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            at = row, position[name]
            starts[at] = min(starts[at], start)
            ends[at] = max(ends[at], start + chunk.total_compressed_size)
            raw_bytes[row] += max(chunk.total_uncompressed_size, chunk.num_values * _WIDTHS.get(chunk.physical_type, 0))
    n_records = np.array([footer.row_group(i).num_rows for i in groups], np.int64)
    parts: dict[str, NDArray[Any]] = {
        "groups": np.array(groups, np.int32),
        "starts": starts,
        "ends": ends,
        "names": np.array(schema.names, np.str_),
        "with_nulls": np.array(sorted(columns_with_nulls(footer, schema, data.url)), np.str_),
        "schema": np.frombuffer(schema.serialize(), np.uint8),
    }
    return FileIndex(n_records, np.maximum(raw_bytes, n_records), parts)


_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}


def _chunks(group: Any, schema: pa.Schema, location: str) -> Iterator[tuple[str, Any]]:
    """Yield the column chunks of a row group, each with its top-level column, whose name may contain dots itself."""
    for chunk in map(group.column, range(group.num_columns)):
        segments = chunk.path_in_schema.split(".")
        names = [".".join(segments[:n]) for n in range(len(segments), 0, -1)]
        name = next((name for name in names if name in schema.names), None)
        if name is None:
            raise SchemaError(
                f"{location}: damaged: its row groups have a column that its schema lacks", column=names[0]
            )
        yield name, chunk


def columns_with_nulls(footer: Any, schema: pa.Schema, location: str) -> set[str]:
    """Return the columns that may have nulls: all nullable ones, without those that statistics show to have none.

    A null counts as a null of every leaf. The statistics of a column of lists or structs count empty lists and the
    nulls inside the values as well.
    """
    found = set[str]()
    for group in map(footer.row_group, range(footer.num_row_groups)):
        if not group.num_rows:  # has no statistics
            continue
        no_nulls = set()
        for name, chunk in _chunks(group, schema, location):
            statistics = chunk.statistics
            if statistics is not None and statistics.has_null_count and not statistics.null_count:
                no_nulls.add(name)
        found |= {field.name for field in schema if field.nullable} - no_nulls
    return found


def stored_schema(locations: Sequence[str], schemas: Sequence[pa.Schema], found: set[str]) -> Schema:
    """Return the columns of files with these Arrow schemas. Raises SchemaError for files with different columns.

    found: Columns in which files have nulls.
    """
    first = schemas[0]
    for location, schema in zip(locations[1:], schemas[1:], strict=True):
        _check_same(location, schema, locations[0], first)
    return hf_features_schema(features_of(first), with_nulls(first, found))


def _texts(array: NDArray[np.str_]) -> list[str]:
    return [str(text) for text in array]


def check_names(location: str, schema: pa.Schema, first_location: str, first: pa.Schema) -> None:
    """Raise SchemaError unless two files have the same columns, in any order."""
    if sorted(schema.names) != sorted(first.names):
        differ = sorted(set(schema.names) ^ set(first.names)) or schema.names
        raise SchemaError(f"{location}: its columns differ from those of {first_location}: {', '.join(differ)}")


def _check_same(location: str, schema: pa.Schema, first_location: str, first: pa.Schema) -> None:
    check_names(location, schema, first_location, first)
    for column in schema:
        expected = first.field(column.name).type
        if column.type != expected:
            raise SchemaError(
                f"{location}: expected {expected} as in {first_location}, got {column.type}", column=column.name
            )
    if schema.metadata != first.metadata:
        check_classes(location, features_of(schema), first_location, features_of(first))
