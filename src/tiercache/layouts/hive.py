"""Partition columns that the names of folders state, as Hive and Spark write them: "year=2024/month=5/"."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.layouts.contract import FileBytes, Folder, Layout, LayoutFile
from tiercache.model import ByteRange
from tiercache.shard.schema import FLOATS, INTEGERS, Column, Kind, Schema, UserType

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NULL = "__HIVE_DEFAULT_PARTITION__"


def find_partitions(
    paths: Sequence[str], location: Callable[[str], str], stored: Sequence[str] = ()
) -> dict[str, UserType]:
    """Return the types of the partition columns that the folders of files name, without those in `stored`.

    All integers of up to 18 digits: int64; else str. Raises SchemaError for files with different columns.
    location(path): name of a file in messages.
    """
    texts: dict[str, list[str | None]] = {}
    first = list(_pairs(paths[0])) if paths else []
    for path in paths:
        pairs = _pairs(path)
        if list(pairs) != first:
            raise SchemaError(
                f"{location(path)}: its folders name the partition columns {_listed(pairs)}, those of "
                f"{location(paths[0])} name {_listed(first)}; read only files with the same partition columns, in a "
                "folder of their own, or pack with include= and exclude="
            )
        for name, text in pairs.items():
            texts.setdefault(name, []).append(text)
    return {name: _type_of(values) for name, values in texts.items() if name not in stored}


def partition_values(path: str, partitions: Mapping[str, UserType], schema: Schema) -> dict[str, object]:
    """Return the values of the partition columns that the schema has, for the records of a file. Raises SchemaError."""
    pairs = _pairs(path)
    return {c.name: _value(path, c, pairs[c.name]) for c in schema.columns if c.name in partitions}


def _pairs(path: str) -> dict[str, str | None]:
    pairs = {}
    for folder in path.split("/")[:-1]:
        name, is_pair, text = folder.partition("=")
        if is_pair and name:
            pairs[unquote(name)] = None if text == _NULL else unquote(text)
    return pairs


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _type_of(texts: Sequence[str | None]) -> str:
    given = [text for text in texts if text is not None]
    type_name = "int64" if given and all(map(_INTEGER.fullmatch, given)) else "str"
    return f"{type_name}?" if len(given) < len(texts) else type_name


def _value(path: str, column: Column, text: str | None) -> object:
    if text is None:
        return None
    try:
        if column.kind is Kind.SCALAR and column.dtype in INTEGERS:
            return int(text)
        if column.kind is Kind.SCALAR and column.dtype in FLOATS:
            return float(text)
        if column.kind is Kind.BOOL:
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise SchemaError(
            f"{path}: expected {column} in the name of the folder, got {text!r}", column=column.name
        ) from None
    return text


class PartitionedLayout(Layout):
    """Layout of tables, whose folders may name partition columns: these follow the columns that the files store."""

    def __init__(self, stored: Schema, files: Sequence[LayoutFile], folder: Folder) -> None:
        keys = [file.info.key for file in files]
        self._partitions = find_partitions(keys, f"{folder.url.rstrip('/')}/{{}}".format, stored.names)
        super().__init__(Schema([*stored.columns, *Schema.of(self._partitions).columns]), files)

    @abstractmethod
    def stored_ranges(self, file: LayoutFile, blocks: Sequence[int], columns: Sequence[str]) -> list[ByteRange]:
        """See Layout.ranges."""

    @abstractmethod
    def read_stored(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """See Layout.read. columns: One or more."""

    def ranges(self, file: LayoutFile, blocks: Sequence[int], columns: Sequence[str]) -> list[ByteRange]:
        return self.stored_ranges(file, blocks, [name for name in columns if name not in self._partitions])

    def read(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        stored = [name for name in columns if name not in self._partitions]
        found = dict(self.read_stored(file, data, block, stored)) if stored else {}
        if len(stored) < len(columns):
            constants = partition_values(file.info.key, self._partitions, self.schema)
            for column in self.schema.columns:
                if column.name in constants:
                    value = pa.scalar(constants[column.name], column.storage_type)
                    found[column.name] = pa.repeat(value, int(file.index.n_records[block]))
        return found
