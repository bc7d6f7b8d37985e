"""Sources of packing: which kind of source the files are, and its records, with the schema of the data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from tiercache.errors import NotFound, SchemaError
from tiercache.layouts.hive import find_partitions
from tiercache.packer import images, tables
from tiercache.packer.files import (
    Files,
    RecordSource,
    SkippedFile,
    SourceFile,
    find_files,
    refuse_foreign_files,
    refuse_foreign_index,
    selected,
)
from tiercache.shard.schema import Schema, UserType, check_same_schema
from tiercache.shard.versions import Version

SourceKind: TypeAlias = Literal["images", "parquet", "jsonl"]
_SUFFIXES: dict[SourceKind, tuple[str, ...]] = {
    "images": tuple(images.SUFFIXES),
    "parquet": tables.PARQUET_SUFFIXES,
    "jsonl": tables.JSON_SUFFIXES,
}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of the source of a packing. The arguments of `pack` of the same names describe them."""

    kind: SourceKind | None = None
    schema: Mapping[str, UserType] | pa.Schema | Schema | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    source_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in _SUFFIXES:
            raise ValueError(f"kind must be one of {', '.join(_SUFFIXES)}, got {self.kind!r}")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a sequence of globs, got the str {getattr(self, name)!r}")


def kind_of(paths: Sequence[str]) -> SourceKind:
    """Return the kind that the files' names indicate; files that match no kind are ignored. Raises ValueError."""
    found = {kind for kind in _SUFFIXES for path in paths if path.lower().endswith(_SUFFIXES[kind])}
    if len(found) == 1:
        return found.pop()
    what = (
        f"files of several kinds ({', '.join(sorted(found))})"
        if found
        else "no file name indicates the kind of the source"
    )
    raise ValueError(f"{what}; say it with kind=, which is one of {', '.join(_SUFFIXES)}")


def find_source(
    source: str | os.PathLike[str], options: SourceOptions, parent: Version | None = None
) -> tuple[RecordSource, list[SkippedFile]]:
    """Inspect a source and return it with its kind, schema and splits, and the skipped files.

    parent is the version that is appended to. Raises NotFound, ValueError, SchemaError.
    """
    files, found, skipped = find_files(source, options.source_options)
    chosen = [f for f in found if selected(f.path, options.include, options.exclude)]
    skipped = [f for f in skipped if selected(f.path, options.include, options.exclude)]
    if not chosen:
        raise NotFound(f"include= and exclude= leave none of the {len(found)} files", url=files.location(""))

    refuse_foreign_index(files, chosen)
    if options.kind is None:
        refuse_foreign_files(files, chosen)
    kind = options.kind or kind_of([f.path for f in chosen])
    if kind == "images":
        if options.schema is not None:
            raise SchemaError("a folder of images has the fixed columns image, label and path: omit schema=")
        if options.classes:
            raise SchemaError("the sub-folders of a folder of images name its classes: omit classes=")
        classes = next((c.classes for c in parent.schema.columns if c.classes), None) if parent is not None else None
        return with_schema_of(parent, images.find_images(files, chosen, classes)), skipped
    # A folder of tables also holds other files (README.md, Spark's _SUCCESS); a file that is named explicitly always
    # counts. Spark and pyarrow skip names that begin with "_".
    tables = [f for f in chosen if f.path.lower().endswith(_SUFFIXES[kind])]
    if tables:
        others = set(chosen) - set(tables)
        reason = f"its name is not that of a {kind} file"
        markers = {f for f in others if f.path.rpartition("/")[2].startswith("_")}
        skipped += [SkippedFile(f.path, reason) for f in chosen if f in others - markers]
    table = _find_table(kind, files, tables or chosen, options)
    table = replace(table, schema=table.schema.with_classes(options.classes))
    return with_schema_of(parent, table, options.classes), skipped


def _find_table(
    kind: SourceKind, files: Files, found: Sequence[SourceFile], options: SourceOptions
) -> tables.ParquetFiles | tables.JsonLines:
    given = options.schema
    if given is None or isinstance(given, Mapping):
        if kind == "parquet":
            return tables.find_parquet(files, found, given or {})
        return tables.find_jsonl(files, found, given or {})
    if kind == "parquet":
        whole = tables.find_parquet(files, found, {})
        whole.schema.select(Schema.of(given).names)  # raises SchemaError for a column that the files lack
        return replace(whole, schema=Schema.of(given))
    return tables.JsonLines(
        files,
        Schema.of(given),
        tables.split_files(found),
        find_partitions([file.path for file in found], files.location),
    )


def with_schema_of(
    parent: Version | None, source: RecordSource, classes: Mapping[str, Sequence[str]] | None = None
) -> RecordSource:
    """Return the source with the schema of the data set that it is appended to, if any.

    If a table has the data set's columns, its inferred types are ignored: each value is checked when it is written.
    Raises SchemaError if the columns differ, or the images have other classes or encodings.
    """
    if parent is None:
        return source
    names, expected = set(source.schema.names), set(parent.schema.names)
    schema = parent.schema.with_classes(classes or {})  # the writer refuses other classes than those of the data set
    if isinstance(source, tables.JsonLines) and names <= expected:
        return replace(source, schema=schema)
    if isinstance(source, tables.ParquetFiles) and names == expected:
        return replace(source, schema=schema)
    check_same_schema(parent.schema, source.schema)
    return source
