"""Hive partitions: columns whose values are in folder names, as in ``table/year=2024/part-0.parquet``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from tiercache.errors import SchemaError
from tiercache.pack.files import Files, SourceFile
from tiercache.shard.column_types import FLOATS, INTEGERS, Kind
from tiercache.shard.schema import Column, Schema, UserType

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Partitions:
    """The partition columns of a source's files.

    Attributes:
        types: Column names to types, in the order of the folders. Empty for a source without partitions.
    """

    types: Mapping[str, UserType]

    @staticmethod
    def find(files: Files, found: Sequence[SourceFile], *, stored: Sequence[str] = ()) -> Partitions:
        """Return the partition columns that the files' folders name.

        A column whose values are all integers of up to 18 digits is int64; any other column is str. A column with a
        null partition is nullable.

        Args:
            files: Location of the files, for messages.
            found: Files of the source; the folders are those below the source's root.
            stored: Columns that the files hold themselves. Their stored values are packed, not the folders'.

        Raises:
            SchemaError: Files with different partition columns.
        """
        texts: dict[str, list[str | None]] = {}
        first: tuple[str, ...] | None = None
        for file in found:
            pairs = _pairs(file.path)
            if first is None:
                first = tuple(pairs)
                texts = {name: [] for name in pairs}
            if tuple(pairs) != first:
                raise SchemaError(
                    f"{files.location(file.path)}: its folders name the partition columns {_listed(pairs)}, those of "
                    f"{files.location(found[0].path)} name {_listed(first)}; pack only files with the same partition "
                    "columns, chosen with include and exclude"
                )
            for name, text in pairs.items():
                texts[name].append(text)
        return Partitions({name: _type_of(values) for name, values in texts.items() if name not in stored})

    def values(self, path: str, schema: Schema) -> dict[str, object]:
        """Return the value of each partition column for the records of a file.

        Args:
            path: Path of the file below the source's root.
            schema: Columns that are packed; a partition column that it does not have is left out.

        Raises:
            SchemaError: A value that does not fit the column's type.
        """
        pairs = _pairs(path)
        columns = {column.name: column for column in schema.columns}
        return {name: _value(path, columns[name], pairs[name]) for name in self.types if name in columns}


def _pairs(path: str) -> dict[str, str | None]:
    """Return the partition columns in a path, and their texts."""
    pairs = {}
    for folder in path.split("/")[:-1]:
        name, is_pair, text = folder.partition("=")
        if is_pair and name:
            pairs[unquote(name)] = None if text == _NULL else unquote(text)
    return pairs


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _type_of(texts: Sequence[str | None]) -> str:
    known = [text for text in texts if text is not None]
    type_name = "int64" if known and all(map(_INTEGER.fullmatch, known)) else "str"
    return f"{type_name}?" if len(known) < len(texts) else type_name


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
