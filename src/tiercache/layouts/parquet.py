"""Parquet files: a row group is a block. Hive partitions are columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import SchemaError
from tiercache.layouts.contract import FileBytes, FileIndex, Folder, Layout, LayoutFile, merged
from tiercache.layouts.hive import find_partitions, partition_values
from tiercache.model import ByteRange, ObjectInfo
from tiercache.shard.schema import Schema, UserType

SUFFIXES = (".parquet", ".pq", ".parq")
# Bytes at the end of a file that contain nearly every footer.
_TAIL_BYTES = 64 << 10


class ParquetLayout(Layout):
    name = "Parquet"

    def __init__(self, schema: Schema, files: Sequence[LayoutFile], partitions: Mapping[str, UserType]) -> None:
        super().__init__(schema, files)
        self._partitions = dict(partitions)

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
        first = _schema_of(indexes[0])
        locate = f"{folder.url.rstrip('/')}/{{}}".format
        for info, index in zip(objects[1:], indexes[1:], strict=True):
            _check_same(locate(info.key), _schema_of(index), locate(objects[0].key), first)
        with_nulls = {name for index in indexes for name in _texts(index.parts["with_nulls"])}
        types: dict[str, UserType] = {f.name: f.with_nullable(f.name in with_nulls) for f in first}
        partitions = find_partitions([info.key for info in objects], locate, first.names)
        files = [LayoutFile(info, index) for info, index in zip(objects, indexes, strict=True)]
        return cls(Schema.of(types | partitions), files, partitions)

    def ranges(self, file: LayoutFile, blocks: Sequence[int], columns: Sequence[str]) -> list[ByteRange]:
        names = _texts(file.index.parts["names"])
        chosen = [names.index(name) for name in columns if name not in self._partitions]
        where = np.ix_(list(blocks), chosen)
        starts, ends = file.index.parts["starts"][where].ravel(), file.index.parts["ends"][where].ravel()
        return merged([ByteRange(int(start), int(end)) for start, end in zip(starts, ends, strict=True)])

    def read(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        stored = [name for name in columns if name not in self._partitions]
        found: dict[str, Any] = {}
        if stored:
            from pyarrow import parquet as pq  # 40 ms, which only Parquet files need

            footer = data.once("footer", lambda: pq.read_metadata(_open_tail(data)))
            opened = data.open_for_arrow(self.ranges(file, [block], stored))
            with pq.ParquetFile(opened, metadata=footer) as parquet:
                group = int(file.index.parts["groups"][block])
                # The threads of the loader read several row groups at once.
                table = parquet.read_row_group(group, columns=stored, use_threads=False)
            found = {name: table[name] for name in stored}
        n_records = int(file.index.n_records[block])
        constants = partition_values(file.info.key, self._partitions, self.schema) if len(stored) < len(columns) else {}
        for name in columns:
            if name in self._partitions:
                column = self.schema.columns[self.schema.index(name)]
                found[name] = pa.repeat(pa.scalar(constants[name], column.storage_type), n_records)
        return found


def _open_tail(data: FileBytes) -> pa.PythonFile:
    return data.open_for_arrow([ByteRange(max(data.n_bytes - _TAIL_BYTES, 0), data.n_bytes)])


def _index(_info: ObjectInfo, data: FileBytes) -> FileIndex:
    """Return the row groups of a file, from its footer. Raises SchemaError for a file that is not Parquet."""
    from pyarrow import parquet as pq  # see ParquetLayout.read

    try:
        footer = pq.read_metadata(_open_tail(data))
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        text = str(error).strip().splitlines()[0]
        raise SchemaError(f"{data.url}: not a readable Parquet file: {text}") from error
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise SchemaError(f"{data.url}: the file has two columns with this name", column=twice)
    groups = [i for i in range(footer.num_row_groups) if footer.row_group(i).num_rows]
    starts = np.full((len(groups), len(schema.names)), data.n_bytes, np.int64)
    ends = np.zeros_like(starts)
    raw_bytes = np.zeros(len(groups), np.int64)
    with_nulls: set[str] = set()
    position = {name: number for number, name in enumerate(schema.names)}
    for row, i in enumerate(groups):
        group, no_nulls = footer.row_group(i), set[str]()
        for chunk in map(group.column, range(group.num_columns)):
            name = _top_name(chunk.path_in_schema, schema)
            start = chunk.data_page_offset
            if chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            at = row, position[name]
            starts[at] = min(starts[at], start)
            ends[at] = max(ends[at], start + chunk.total_compressed_size)
            raw_bytes[row] += max(chunk.total_uncompressed_size, chunk.num_values * _WIDTHS.get(chunk.physical_type, 0))
            statistics = chunk.statistics
            if statistics is not None and statistics.has_null_count and not statistics.null_count:
                no_nulls.add(name)  # a null counts as a null of every leaf
        with_nulls |= {field.name for field in schema if field.nullable} - no_nulls
    n_records = np.array([footer.row_group(i).num_rows for i in groups], np.int64)
    parts: dict[str, NDArray[Any]] = {
        "groups": np.array(groups, np.int32),
        "starts": starts,
        "ends": ends,
        "names": np.array(schema.names, np.str_),
        "with_nulls": np.array(sorted(with_nulls), np.str_),
        "schema": np.frombuffer(schema.serialize(), np.uint8),
    }
    return FileIndex(n_records, np.maximum(raw_bytes, n_records), parts)


_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}


def _top_name(path: str, schema: pa.Schema) -> str:
    """Return the top-level column of a leaf's dotted path; column names may contain dots themselves."""
    segments = path.split(".")
    names = [".".join(segments[:n]) for n in range(len(segments), 0, -1)]
    return next(name for name in names if name in schema.names)


def _texts(array: NDArray[np.str_]) -> list[str]:
    return [str(text) for text in array]


def _schema_of(index: FileIndex) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(index.parts["schema"])).remove_metadata()


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
