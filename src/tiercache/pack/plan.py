"""Options of packing, and its plan: the kind of the source, its splits, and their division into tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from tiercache.errors import NotFound, SchemaError
from tiercache.model import parse_bytes
from tiercache.pack import images, jsonl, parquet
from tiercache.pack.files import (
    Files,
    InputSplit,
    Partitions,
    RecordSource,
    SkippedFile,
    SourceFile,
    find_files,
    refuse_foreign_files,
    refuse_foreign_index,
    selected,
)
from tiercache.shard.schema import Schema, UserType, check_same_schema
from tiercache.shard.versions.commit import check_mode
from tiercache.shard.versions.manifest import VersionKind
from tiercache.shard.write.shard_writer import ShardOptions

Kind: TypeAlias = Literal["images", "parquet", "jsonl"]
KINDS: tuple[Kind, ...] = ("images", "parquet", "jsonl")


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of packing.

    Attributes:
        kind: Kind of the source: "images", "parquet" or "jsonl"; None: decided by the files' names.
        schema: Mapping from column names to types, which overrides the types of these columns; or an Arrow schema (or a
            Schema) with all columns to pack. Not for images.
        mode: "create" for a new data set, "append" or "overwrite".
        shard_size: Target size of a shard in bytes, or a text such as "128MiB".
        block_size: Target size of a block in bytes, or a text such as "1MiB".
        compression: "auto", "none", "zstd" or "zstd:LEVEL", or a mapping from columns to these.
        jobs: Number of processes; 0: one per CPU.
        include: Globs over the paths below the source; only files that match one of them are packed. Empty: all files.
        exclude: Globs of files that are not packed.
        storage_options: Options of the data set's store.
        source_options: Options of the source's store.
    """

    kind: Kind | None = None
    schema: Mapping[str, UserType] | pa.Schema | Schema | None = None
    mode: VersionKind = "create"
    shard_size: int | str = "128MiB"
    block_size: int | str = "1MiB"
    compression: str | Mapping[str, str] = "auto"
    jobs: int = 1
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    source_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        check_mode(self.mode)
        if type(self.jobs) is not int or self.jobs < 0:
            raise ValueError(f"jobs must be a number of processes, or 0 for one per CPU, got {self.jobs!r}")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a sequence of globs, got the str {getattr(self, name)!r}")
        _ = self.shard_options

    @property
    def shard_options(self) -> ShardOptions:
        """Options of the shard writers. Raises ValueError for an invalid size or compression."""
        return ShardOptions(parse_bytes(self.shard_size), parse_bytes(self.block_size), self.compression)


@dataclass(frozen=True, slots=True)
class PackProgress:
    """Progress of packing.

    Attributes:
        n_records: Number of records packed.
        n_bytes: Bytes of the source that are packed.
        total_bytes: Bytes of the whole source.
    """

    n_records: int
    n_bytes: int
    total_bytes: int


_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "images": tuple(images.SUFFIXES),
    "parquet": parquet.SUFFIXES,
    "jsonl": jsonl.SUFFIXES,
}
# More tasks than processes balance the load. Each task ends with a partly filled shard, so there are more tasks than
# processes only if each has at least four shards' worth of data.
_SHARES_A_JOB = 4
_SHARDS_A_SHARE = 4


def kind_of(paths: Sequence[str]) -> Kind:
    """Return the kind that the files' names indicate; files that match no kind are ignored. Raises ValueError."""
    found = {kind for kind in KINDS for path in paths if path.lower().endswith(_SUFFIXES[kind])}
    if len(found) == 1:
        return found.pop()
    what = (
        f"files of several kinds ({', '.join(sorted(found))})"
        if found
        else "no file name indicates the kind of the source"
    )
    raise ValueError(f"{what}; specify kind: {', '.join(KINDS)}")


def find_source(
    source: str | os.PathLike[str], options: PackOptions, *, classes: Sequence[str] | None = None
) -> tuple[RecordSource, list[SkippedFile]]:
    """Inspect a source and return it with its kind, schema and splits, and the skipped files.

    Raises NotFound, ValueError, SchemaError.
    """
    files, found, left_out = find_files(source, options.source_options)
    chosen = [f for f in found if selected(f.path, options.include, options.exclude)]
    left_out = [f for f in left_out if selected(f.path, options.include, options.exclude)]
    if not chosen:
        raise NotFound(f"include and exclude leave none of the {len(found)} files", url=files.location(""))
    refuse_foreign_index(files, chosen)
    if options.kind is None:
        refuse_foreign_files(files, chosen)
    kind = options.kind or kind_of([f.path for f in chosen])
    if kind == "images":
        if options.schema is not None:
            raise SchemaError("a folder of images has the fixed columns image, label and path: omit schema")
        return images.find_images(files, chosen, classes=classes), left_out
    # A folder of tables also holds other files (README.md, Spark's _SUCCESS); a file that is named explicitly always
    # counts.
    known = [f for f in chosen if f.path.lower().endswith(_SUFFIXES[kind])]
    if known:
        taken = set(known)
        left_out += [
            SkippedFile(f.path, f"its name is not that of a {kind} file")
            for f in chosen
            if f not in taken and not _is_marker(f)
        ]
    return _find_table(kind, files, known or chosen, options), left_out


def _is_marker(file: SourceFile) -> bool:
    """Return whether a file holds no records by convention: Spark and pyarrow skip names that begin with "_"."""
    return file.path.rsplit("/", 1)[-1].startswith("_")


def _find_table(kind: Kind, files: Files, found: Sequence[SourceFile], options: PackOptions) -> RecordSource:
    given = options.schema
    if given is None or isinstance(given, Mapping):
        find = parquet.find_parquet if kind == "parquet" else jsonl.find_jsonl
        return find(files, found, given or {})
    if kind == "parquet":
        whole = parquet.find_parquet(files, found, {})
        whole.schema.select(Schema.of(given).names)  # raises SchemaError for a column that the files lack
        return replace(whole, schema=Schema.of(given))
    partitions = Partitions.find(files, found)
    return jsonl.JsonLines(files, Schema.of(given), jsonl.split_files(found), partitions)


def with_schema(source: RecordSource, there: Schema) -> RecordSource:
    """Return the source with the schema of the data set that it is appended to.

    If a table has the data set's columns, its inferred types are ignored: each value is checked when it is written.
    Raises SchemaError.
    """
    names = set(source.schema.names)
    if isinstance(source, jsonl.JsonLines) and names <= set(there.names):
        return replace(source, schema=there)
    if isinstance(source, parquet.ParquetFiles) and names == set(there.names):
        return replace(source, schema=there)
    check_same_schema(there, source.schema)
    return source


def divide_splits(parts: Sequence[InputSplit], jobs: int, shard_bytes: int) -> list[tuple[InputSplit, ...]]:
    """Return the splits divided into tasks of neighbouring splits with about equal bytes, in order.

    One job has one task; several jobs have one to four tasks each.
    """
    total = sum(part.n_bytes for part in parts)
    n_shares = 1
    if jobs > 1:
        n_shares = max(jobs, min(_SHARES_A_JOB * jobs, total // (_SHARDS_A_SHARE * shard_bytes)))
    shares: list[list[InputSplit]] = [[] for _ in range(min(n_shares, max(len(parts), 1)))]
    before = 0
    for part in parts:
        middle = before + part.n_bytes / 2
        shares[min(int(middle * len(shares) / total), len(shares) - 1) if total else 0].append(part)
        before += part.n_bytes
    return [tuple(share) for share in shares if share]
