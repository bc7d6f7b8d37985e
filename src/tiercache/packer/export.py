"""The export of a data set to files of other libraries: a file for each shard, or one file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from tiercache.config import available_cpus
from tiercache.data.dataset import Dataset
from tiercache.data.records import Records
from tiercache.data.scan import arrow_parts
from tiercache.errors import NotFound, StoreError
from tiercache.layouts.mds import INDEX
from tiercache.packer.export_formats import FORMATS
from tiercache.shard.schema import Schema
from tiercache.store import Store, UploadFile, open_store, redact, split_url
from tiercache.store.remote import call_threads

ExportFormat: TypeAlias = Literal["parquet", "arrow", "webdataset", "mds", "jsonl"]
_PART_BYTES = 16 << 20
_GROUP_RECORDS = 1 << 20
_SUFFIXES = {suffix: name for name, one in FORMATS.items() for suffix in one.suffixes if name != "mds"}
_OF_AN_EXPORT = re.compile(r"part-\d{5,}(\.\d+)?\.(parquet|arrow|tar|mds|jsonl)")
# Ends of the names of files, which no folder has.
_OTHER_FILES = (
    ".avro", ".csv", ".gz", ".h5", ".hdf5", ".json", ".mds", ".npy", ".npz", ".orc", ".pkl", ".pt", ".tfrecord", ".tgz",
    ".tsv", ".txt", ".xlsx", ".zip", ".zst",
)  # fmt: skip


def export(
    dataset: Dataset,
    target: str | os.PathLike[str],
    *,
    format: ExportFormat | None = None,  # noqa: A002 - the name of the option of the command
    jobs: int = 1,
    overwrite: bool = False,
    compression: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write the records of a data set or a view, in its order, as files of another library.

    ::

        tiercache.export(dataset, "photos.parquet")
        tiercache.export(dataset.filter(pc.field("label") == 3), "s3://bucket/shards", format="webdataset", jobs=0)

    The values are the stored ones: casts, decoders, fill values and transforms have no effect. docs/guide/versions.md
    says which types each format has, and how `pack` makes an equal data set of the files. A file appears when it is
    complete; the index of MDS is written after its shards.

    Args:
        dataset: Data set or view; its columns are written. For some of them, use `select_columns`.
        target: Path or URL of a folder, which gets a file for each shard; or of one file, whose name ends in .parquet,
            .arrow, .feather, .ipc, .tar, .jsonl or .ndjson.
        format: "parquet", "arrow" (IPC files), "webdataset" (tars), "mds" (of MosaicML) or "jsonl" (JSON lines). None:
            that of the file's name; for a folder, "parquet".
        jobs: Number of files that are written at a time; 0: one per CPU.
        overwrite: Whether existing files are replaced, and files of an earlier export to the folder deleted.
        compression: Compression of Parquet ("zstd" by default, "none", "snappy", "gzip", "brotli", "lz4") or Arrow
            ("none" by default, "lz4", "zstd").
        storage_options: Options of the target's store.
        on_progress: Function called with the number of records that are written so far.

    Returns:
        URLs of the files, in the order of their records; that of the index of MDS comes first.

    Raises:
        StoreError: The target has files of an export, and overwrite is false; or writing fails.
        SchemaError: The format cannot have a column, or a value; the message names it.
        ValueError: The format, its compression or the target's name is unknown; or these are packed rows.
    """
    plan = plan_export(dataset, target, format, jobs, overwrite, compression)
    with closing(open_store(plan.folder, **(storage_options or {}))) as store:
        return plan.write(store, on_progress)


def plan_export(
    dataset: Dataset,
    target: str | os.PathLike[str],
    format_name: str | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    codec: str | None = None,
) -> Export:
    """Return an export whose arguments, and the columns of the data set, are checked. Raises as export()."""
    url = os.fspath(target)
    if format_name is not None and format_name not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {format_name!r}")
    ending = next((one for one in (*_SUFFIXES, *_OTHER_FILES) if url.lower().endswith(one)), "")
    name = format_name or _SUFFIXES.get(ending) or "parquet"
    if ending and _SUFFIXES.get(ending) != name:
        raise ValueError(
            f"{redact(url)}: export writes no {ending} file{f' as {format_name}' if format_name else ''}: name a file "
            f"that ends in {', '.join(_SUFFIXES)}, or a folder and a format, which is one of {', '.join(FORMATS)}"
        )
    writer = FORMATS[name].writer
    codec = codec or writer.codecs[0]
    if codec not in writer.codecs:
        raise ValueError(f"compression of {name} must be one of {', '.join(writer.codecs)}, got {codec!r}")
    folder, key = split_url(url) if ending else (url, "")
    plan = Export(dataset, folder, key, name, jobs, overwrite, codec)
    writer.check(plan.schema)
    return plan


@dataclass(frozen=True)
class Export:
    """An export that was checked. folder: URL. key: Name of the one file; "": a file for each shard."""

    dataset: Dataset
    folder: str
    key: str
    format: str
    jobs: int
    overwrite: bool
    codec: str

    @property
    def _records(self) -> Records:
        return self.dataset.__tiercache__().source

    @property
    def schema(self) -> Schema:
        """Columns that are written."""
        return self._records.schema

    def write(self, target: Store, on_progress: Callable[[int], None] | None = None) -> list[str]:
        """Write the files to the store of the folder. See export()."""
        parts = arrow_parts(self._records)
        earlier = self._earlier_files(target)
        run = _Run(self, target, on_progress)
        if self.key:
            batches = (batch for _, read in parts for batch in read())
            written = [run.write_file(self.key, run.grouped(batches), 0, 1 << 62)[0]]
        else:
            with call_threads(self.jobs or available_cpus(), "tiercache-export") as pool:
                numbers = range(max(1, len(parts)))
                files = list(pool.map(run.write_part, numbers, parts or [(0, lambda: iter(()))]))
            written = [file for of_part in files for file in of_part]
        names = [name for name, _ in written]
        if self.format == "mds":
            entries = [facts | {"raw_data": {"basename": name} | facts["raw_data"]} for name, facts in written]
            with run.create(INDEX) as file:
                file.write(json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode())
            names.insert(0, INDEX)
        if stale := [name for name in earlier if name not in names]:
            target.delete(stale)
        return [f"{target.url.rstrip('/')}/{name}" for name in names]

    def _earlier_files(self, target: Store) -> list[str]:
        """Return the files of an earlier export to the folder. Raises StoreError if there is something to replace."""
        if self.key:
            found = [self.key] if _exists(target, self.key) else []
        else:
            found = sorted(info.key for info in target.list() if _OF_AN_EXPORT.fullmatch(info.key))
            if self.format == "mds" and _exists(target, INDEX):
                found.append(INDEX)
        if found and not self.overwrite:
            what = "the file already exists" if self.key else "the folder already has a file of another export"
            raise StoreError(
                f"{what}; choose another name, or replace it with overwrite=True", url=f"{target.url}/{found[0]}"
            )
        if INDEX in found:  # it would describe shards that are replaced
            target.delete([INDEX])
        return [] if self.key else found


def _exists(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except NotFound:
        return False
    return True


class _Run:
    """One run of an export. Safe from any thread."""

    def __init__(self, plan: Export, target: Store, on_progress: Callable[[int], None] | None) -> None:
        self._plan, self._target, self._on_progress = plan, target, on_progress
        self._schema, self._format = plan.schema, FORMATS[plan.format]
        self._lock, self._n_written = Lock(), 0

    def write_part(
        self, number: int, part: tuple[int, Callable[[], Iterator[pa.RecordBatch]]]
    ) -> list[tuple[str, dict[str, Any]]]:
        """Write the files of one shard. Returns (name, facts) of each."""
        first, read = part
        groups, files = self.grouped(read()), list[tuple[str, dict[str, Any]]]()
        table: pa.Table | None = None
        while table is not None or not files:
            name = f"part-{number:05d}{f'.{len(files)}' if files else ''}{self._format.suffixes[0]}"
            file, table, first = self.write_file(name, groups, first, self._format.writer.file_bytes, table)
            files.append(file)
        return files

    def write_file(
        self, name: str, groups: Iterator[pa.Table], first: int, file_bytes: int, table: pa.Table | None = None
    ) -> tuple[tuple[str, dict[str, Any]], pa.Table | None, int]:
        """Write tables to one file, until it has file_bytes. Returns (name, facts), and the next table and record."""
        n_bytes = 0
        with self.create(name) as sink:
            writer = self._format.writer(sink, self._schema, self._plan.codec, first)
            table = next(groups, None) if table is None else table
            while table is not None and (not n_bytes or n_bytes + table.nbytes <= file_bytes):
                writer.write(table)
                n_bytes, first = n_bytes + table.nbytes, first + table.num_rows
                self._count(table.num_rows)
                table = next(groups, None)
            facts = writer.finish()
        return (name, facts), table, first

    def grouped(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        """Yield the batches in tables of about the size that the format wants."""
        pending: list[pa.RecordBatch] = []
        n_bytes = n_records = 0
        for batch in batches:
            pending.append(batch)
            n_bytes, n_records = n_bytes + batch.nbytes, n_records + len(batch)
            if n_bytes >= self._format.writer.group_bytes or n_records >= _GROUP_RECORDS:
                yield pa.Table.from_batches(pending)
                pending, n_bytes, n_records = [], 0, 0
        if pending:
            yield pa.Table.from_batches(pending)

    @contextmanager
    def create(self, name: str) -> Iterator[UploadFile]:
        """Yield a file that appears at the end of the block. Raises StoreError if there is one that must stay."""
        with self._target.create(name) as upload:
            file = UploadFile(upload, max(_PART_BYTES, self._target.min_part_bytes))
            yield file
            file.finish()
            if upload.complete(if_absent=not self._plan.overwrite) is None:
                raise StoreError(
                    "the file already exists; choose another name, or replace it with overwrite=True",
                    url=f"{self._target.url}/{name}",
                )

    def _count(self, n_records: int) -> None:
        with self._lock:  # so that a bar only moves forward
            self._n_written += n_records
            if self._on_progress is not None:
                self._on_progress(self._n_written)
