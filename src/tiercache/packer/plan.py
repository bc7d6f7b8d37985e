"""Options of packing, and its plan: the kind of the source, its splits, and their division into tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from tiercache import config
from tiercache.errors import NotFound, SchemaError
from tiercache.model import parse_bytes
from tiercache.packer import images, jsonl, parquet
from tiercache.packer.files import (
    Files,
    InputSplit,
    RecordSource,
    SkippedFile,
    SourceFile,
    find_files,
    find_partitions,
    refuse_foreign_files,
    refuse_foreign_index,
    selected,
)
from tiercache.shard.commit import check_mode, data_set_exists_error, find_latest, no_data_set_error
from tiercache.shard.schema import Schema, UserType, check_same_schema
from tiercache.shard.versions import Version, VersionKind
from tiercache.shard.writer import ShardOptions
from tiercache.store import MemoryStore, open_store

SourceKind: TypeAlias = Literal["images", "parquet", "jsonl"]
_SUFFIXES: dict[SourceKind, tuple[str, ...]] = {
    "images": tuple(images.SUFFIXES),
    "parquet": parquet.SUFFIXES,
    "jsonl": jsonl.SUFFIXES,
}
# More tasks than processes balance the load. Each task ends with a partly filled shard, so there are more tasks than
# processes only if each has at least four shards' worth of data.
_TASKS_PER_JOB = 4
_SHARDS_PER_TASK = 4


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of packing. The arguments of `pack` of the same names describe them."""

    kind: SourceKind | None = None
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
        if self.kind is not None and self.kind not in _SUFFIXES:
            raise ValueError(f"kind must be one of {', '.join(_SUFFIXES)}, got {self.kind!r}")
        check_mode(self.mode)
        if type(self.jobs) is not int or self.jobs < 0:
            raise ValueError(f"jobs must be a number of processes, or 0 for one per CPU, got {self.jobs!r}")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a sequence of globs, got the str {getattr(self, name)!r}")
        _ = self.shard_options

    @property
    def n_jobs(self) -> int:
        return self.jobs or config.available_cpus()

    @property
    def shard_options(self) -> ShardOptions:
        """Options of the shard writers. Raises ValueError for an invalid size or compression."""
        return ShardOptions(parse_bytes(self.shard_size), parse_bytes(self.block_size), self.compression)


@dataclass(frozen=True)
class PackPlan:
    """Plan of a packing. Nothing has been written.

    Attributes:
        source: Source to pack.
        url: URL of the data set.
        options: Options of the packing.
        tasks: Splits by task; each task writes its own shards.
        n_processes: Number of processes.
        skipped: Files of the source that are skipped although neither include nor exclude says so.
    """

    source: RecordSource
    url: str
    options: PackOptions
    tasks: tuple[tuple[InputSplit, ...], ...]
    n_processes: int
    skipped: tuple[SkippedFile, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(split.n_bytes for task in self.tasks for split in task)


def plan_pack(source: str | os.PathLike[str], url: str | os.PathLike[str], options: PackOptions) -> PackPlan:
    """Inspect a source (file, folder, glob or URL) and the data set's URL, and return a plan of the packing.

    Raises:
        NotFound: The source has no file, or there is no data set to append to.
        CommitConflict: The data set exists already (mode "create").
        SchemaError: The files cannot be packed together, or not into the data set that is appended to.
        ValueError: The kind of the source cannot be determined, or an option does not apply.
    """
    parent = _check_target(url, options)
    chosen, skipped = find_source(source, options, parent)
    tasks = divide_splits(chosen.splits, options.n_jobs, parse_bytes(options.shard_size))
    n_processes = min(options.n_jobs, max(len(tasks), 1))
    return PackPlan(chosen, os.fspath(url), options, tuple(tasks), n_processes, tuple(skipped))


def _check_target(url: str | os.PathLike[str], options: PackOptions) -> Version | None:
    """Check the data set's URL, and return the version that is appended to, if any."""
    with closing(open_store(url, **options.storage_options)) as store:
        store.require_conditional_put()  # here, because the commit comes hours later
        parent = find_latest(store)
        if options.mode == "create" and parent is not None:
            raise data_set_exists_error(store, parent)
        if options.mode == "append" and parent is None:
            raise no_data_set_error(store)
        if options.n_jobs > 1 and isinstance(store, MemoryStore):
            raise ValueError(f"{store.url}: a memory store exists in one process only; pack into it with jobs=1")
    return parent if options.mode == "append" else None


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
    raise ValueError(f"{what}; specify kind: {', '.join(_SUFFIXES)}")


def find_source(
    source: str | os.PathLike[str], options: PackOptions, parent: Version | None = None
) -> tuple[RecordSource, list[SkippedFile]]:
    """Inspect a source and return it with its kind, schema and splits, and the skipped files.

    parent is the version that is appended to. Raises NotFound, ValueError, SchemaError.
    """
    files, found, skipped = find_files(source, options.source_options)
    chosen = [f for f in found if selected(f.path, options.include, options.exclude)]
    skipped = [f for f in skipped if selected(f.path, options.include, options.exclude)]
    if not chosen:
        raise NotFound(f"include and exclude leave none of the {len(found)} files", url=files.location(""))

    refuse_foreign_index(files, chosen)
    if options.kind is None:
        refuse_foreign_files(files, chosen)
    kind = options.kind or kind_of([f.path for f in chosen])
    if kind == "images":
        if options.schema is not None:
            raise SchemaError("a folder of images has the fixed columns image, label and path: omit schema")
        classes = next((c.classes for c in parent.schema.columns if c.classes), None) if parent is not None else None
        return _with_schema_of(parent, images.find_images(files, chosen, classes)), skipped
    # A folder of tables also holds other files (README.md, Spark's _SUCCESS); a file that is named explicitly always
    # counts. Spark and pyarrow skip names that begin with "_".
    tables = [f for f in chosen if f.path.lower().endswith(_SUFFIXES[kind])]
    if tables:
        others = set(chosen) - set(tables)
        reason = f"its name is not that of a {kind} file"
        markers = {f for f in others if f.path.rpartition("/")[2].startswith("_")}
        skipped += [SkippedFile(f.path, reason) for f in chosen if f in others - markers]
    return _with_schema_of(parent, _find_table(kind, files, tables or chosen, options)), skipped


def _find_table(kind: SourceKind, files: Files, found: Sequence[SourceFile], options: PackOptions) -> RecordSource:
    given = options.schema
    if given is None or isinstance(given, Mapping):
        if kind == "parquet":
            return parquet.find_parquet(files, found, given or {})
        return jsonl.find_jsonl(files, found, given or {})
    if kind == "parquet":
        whole = parquet.find_parquet(files, found, {})
        whole.schema.select(Schema.of(given).names)  # raises SchemaError for a column that the files lack
        return replace(whole, schema=Schema.of(given))
    return jsonl.JsonLines(files, Schema.of(given), jsonl.split_files(found), find_partitions(files, found))


def _with_schema_of(parent: Version | None, source: RecordSource) -> RecordSource:
    """Return the source with the schema of the data set that it is appended to, if any.

    If a table has the data set's columns, its inferred types are ignored: each value is checked when it is written.
    Raises SchemaError if the columns differ, or the images have other classes or encodings.
    """
    if parent is None:
        return source
    names, expected = set(source.schema.names), set(parent.schema.names)
    if isinstance(source, jsonl.JsonLines) and names <= expected:
        return replace(source, schema=parent.schema)
    if isinstance(source, parquet.ParquetFiles) and names == expected:
        return replace(source, schema=parent.schema)
    check_same_schema(parent.schema, source.schema)
    return source


def divide_splits(splits: Sequence[InputSplit], jobs: int, shard_bytes: int) -> list[tuple[InputSplit, ...]]:
    """Return the splits divided into tasks of neighbouring splits with about equal bytes, in order.

    One job has one task; several jobs have one to four tasks each.
    """
    total = sum(split.n_bytes for split in splits)
    n_tasks = 1
    if jobs > 1:
        n_tasks = max(jobs, min(_TASKS_PER_JOB * jobs, total // (_SHARDS_PER_TASK * shard_bytes)))
    tasks: list[list[InputSplit]] = [[] for _ in range(min(n_tasks, max(len(splits), 1)))]
    before = 0
    for split in splits:
        middle = before + split.n_bytes / 2
        tasks[min(int(middle * len(tasks) / total), len(tasks) - 1) if total else 0].append(split)
        before += split.n_bytes
    return [tuple(task) for task in tasks if task]
