"""Packing of a source: tasks of its splits; their records as shards, in one process or several; one commit."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from secrets import token_hex
from typing import Any, TypeAlias, cast

import pyarrow as pa

from tiercache import config
from tiercache.errors import NotFound, SchemaError, StoreError, TierCacheError
from tiercache.model import ShardInfo, parse_bytes
from tiercache.packer.files import InputBatch, InputSplit, RecordSource, SkippedFile
from tiercache.packer.sources import SourceKind, SourceOptions, find_source
from tiercache.shard.schema import Schema, UserType
from tiercache.shard.versions import (
    Version,
    VersionKind,
    check_mode,
    data_set_exists_error,
    find_latest,
    no_data_set_error,
)
from tiercache.shard.writer import ShardOptions, ShardWriter, Writer, shard_key
from tiercache.store import MemoryStore, open_store, redact

# More tasks than processes balance the load. Each task ends with a partly filled shard, so there are more tasks than
# processes only if each has at least four shards' worth of data.
_TASKS_PER_JOB = 4
_SHARDS_PER_TASK = 4


@dataclass(frozen=True, kw_only=True)
class PackOptions(SourceOptions):
    """Options of packing. The arguments of `pack` of the same names describe them."""

    mode: VersionKind = "create"
    shard_size: int | str = "128MiB"
    block_size: int | str = "1MiB"
    compression: str | Mapping[str, str] = "auto"
    jobs: int = 1
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
        if type(self.jobs) is not int or self.jobs < 0:
            raise ValueError(f"jobs must be a number of processes, or 0 for one per CPU, got {self.jobs!r}")
        _ = self.shard_options

    @property
    def n_jobs(self) -> int:
        """Number of processes that may be used."""
        return self.jobs or config.available_cpus()

    @property
    def shard_options(self) -> ShardOptions:
        """Options of the shard writers. Raises ValueError for an invalid size or compression."""
        return ShardOptions(parse_bytes(self.shard_size), parse_bytes(self.block_size), self.compression)


@dataclass(frozen=True)
class PackPlan:
    """Plan of a packing. Nothing has been written."""

    source: RecordSource
    url: str
    options: PackOptions
    tasks: tuple[tuple[InputSplit, ...], ...]  # splits by task; each task writes its own shards
    n_processes: int
    skipped: tuple[SkippedFile, ...] = ()  # although neither include nor exclude says so

    @property
    def total_bytes(self) -> int:
        """Bytes of the source."""
        return sum(split.n_bytes for task in self.tasks for split in task)


def plan_pack(source: str | os.PathLike[str], url: str | os.PathLike[str], options: PackOptions) -> PackPlan:
    """Inspect a source (file, folder, glob or URL) and the data set's URL, and return a plan of the packing.

    Raises NotFound, CommitConflict, SchemaError, ValueError, as `pack`.
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


# Time to finish a batch and abort its upload. A process that takes longer is killed, which leaves no more behind than
# an abort does.
_STOP_S = 10.0
_SHOWN_SKIPPED = 5
_COMMITTING = "during the commit: check whether the version exists before you run the command again"


@dataclass(frozen=True, slots=True)
class PackProgress:
    """Number of records packed, and bytes of the source that are packed, of the bytes of the whole source."""

    n_records: int
    n_bytes: int
    total_bytes: int


_Report: TypeAlias = Callable[[int, int], object]  # takes numbers of records and bytes


def run_pack(plan: PackPlan, on_progress: Callable[[PackProgress], None] | None = None) -> Version:
    """Write the shards, then commit them and return the version.

    Until the commit no reader sees anything. After an exception, Ctrl-C included, this deletes the shards that it has
    finished. A killed process leaves them behind: no version names them, and nothing needs to be cleaned up before
    packing again. Ctrl-C during the commit leaves the shards, because they may already belong to a version: the message
    of the KeyboardInterrupt says so.
    Raises SchemaError (which names the location in the source), CommitConflict and StoreError.
    """
    done, is_committing = [0, 0], False

    def report(n_records: int, n_bytes: int) -> None:
        done[:] = done[0] + n_records, min(done[1] + n_bytes, plan.total_bytes)
        if on_progress is not None:
            on_progress(PackProgress(done[0], done[1], plan.total_bytes))

    options = plan.options
    try:
        with Writer(
            plan.url,
            schema=plan.source.schema,
            mode=options.mode,
            shard_size=options.shard_size,
            block_size=options.block_size,
            compression=options.compression,
            storage_options=options.storage_options,
        ) as writer:
            if plan.n_processes > 1:
                writer.add_shards(_write_in_processes(plan, report))
            else:
                for number in range(len(plan.tasks)):
                    _write_splits(writer, plan, number, report)
            is_committing = True
            writer.close()
        return cast("Version", writer.version)
    except KeyboardInterrupt as error:
        if is_committing:
            raise KeyboardInterrupt(_COMMITTING) from error
        raise


def _write_in_processes(plan: PackPlan, report: _Report) -> list[ShardInfo]:
    """Have processes write all shards, and return them in the order of the source."""
    writer_ids = [token_hex(8) for _ in plan.tasks]
    try:
        shards = _run_in_processes(partial(_write_shards, plan), list(enumerate(writer_ids)), plan.n_processes, report)
        return [info for infos in shards for info in infos]
    except BaseException:
        _delete_shards(plan, writer_ids)
        raise


def _delete_shards(plan: PackPlan, writer_ids: Iterable[str]) -> None:
    """Delete the finished shards of all tasks, also those of processes that were killed or did not report."""
    with (
        suppress(StoreError),  # an unnamed shard is harmless; the first error must stay visible
        closing(open_store(plan.url, **plan.options.storage_options)) as store,
    ):
        for writer_id in writer_ids:
            for key in (shard_key(writer_id, number) for number in count()):
                try:
                    store.head(key)
                except NotFound:
                    break
                store.delete([key])


def _write_shards(plan: PackPlan, task: tuple[int, str], report: _Report) -> list[ShardInfo]:
    """Write the records of a task (its number, and the id of its writer) as shards. After an error none is left."""
    number, writer_id = task
    options = plan.options
    with (
        closing(open_store(plan.url, **options.storage_options)) as store,
        ShardWriter(store, plan.source.schema, options.shard_options, writer_id=writer_id) as writer,
    ):
        _write_splits(writer, plan, number, report)
        return writer.finish()


def _write_splits(writer: Writer | ShardWriter, plan: PackPlan, number: int, report: _Report) -> None:
    for split in plan.tasks[number]:
        for batch in plan.source.read(split, plan.options.shard_options.block_bytes):
            _write(writer, batch)
            report(batch.n_records, batch.n_bytes)


def _write(writer: Writer | ShardWriter, batch: InputBatch) -> None:
    """Write a batch; if a record does not fit, the error names its location in the source."""
    first_record = writer.n_records
    try:
        writer.write_batch(batch.columns)
    except SchemaError as error:
        if error.record is None:
            raise
        text = error.message.removeprefix(f"column {error.column!r}, ").removeprefix(f"record {error.record}: ")
        where = batch.location(error.record - first_record)
        raise SchemaError(f"{where}: {text}", column=error.column, expected=error.expected, got=error.got) from error


def _run_in_processes(
    work: Callable[[Any, _Report], Any], tasks: Sequence[Any], n_processes: int, report: _Report
) -> list[Any]:
    """Return the results of work(task, report) for all tasks, run in n_processes processes.

    Processes are spawned: forked ones would inherit the threads and clients of stores, which do not survive a fork.
    An exception of work, and TierCacheError for a process that died, is raised after the others have been stopped.
    """
    context = get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    results: dict[int, Any] = {}
    pending = iter(enumerate(tasks))

    def send_next(connection: Connection) -> None:
        if (task := next(pending, None)) is not None:
            connection.send(task)

    try:
        for _ in range(min(n_processes, len(tasks))):
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_serve, args=(theirs, work), daemon=True)
            workers[ours].start()
            theirs.close()
            send_next(ours)
        while len(results) < len(tasks):
            for connection in wait(list(workers)):
                kind, value = _receive(cast("Connection", connection), workers)
                if kind == "report":
                    report(*value)
                elif kind == "failed":
                    raise value
                else:
                    results[value[0]] = value[1]
                    send_next(cast("Connection", connection))
    finally:
        _stop(workers)
    return [results[number] for number in range(len(tasks))]


def _receive(connection: Connection, workers: Mapping[Connection, SpawnProcess]) -> tuple[str, Any]:
    try:
        return cast("tuple[str, Any]", connection.recv())
    except (EOFError, OSError) as error:
        process = workers[connection]
        process.join(_STOP_S)
        hint = "; the system may have killed it for lack of memory" if process.exitcode == -signal.SIGKILL else ""
        message = f"a worker process died (exit code {process.exitcode}){hint}; nothing was committed"
        raise TierCacheError(message) from error


def _stop(workers: Mapping[Connection, SpawnProcess]) -> None:
    for connection in workers:
        connection.close()
    for process in workers.values():
        if process.pid is not None:
            process.join(_STOP_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _serve(connection: Connection, work: Callable[[Any, _Report], Any]) -> None:
    """Run a worker process: receive tasks, send reports and one result each, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent stops the workers
    with connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, task = connection.recv()
            try:
                result = work(task, lambda *done: connection.send(("report", done)))
                answer: tuple[str, Any] = ("done", (number, result))
            except Exception as error:  # noqa: BLE001 - top-level function of a process: the error goes to the parent
                answer = ("failed", error)
            connection.send(answer)


def pack(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    *,
    kind: SourceKind | None = None,
    schema: Mapping[str, UserType] | pa.Schema | Schema | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    mode: VersionKind = "create",
    shard_size: int | str = "128MiB",
    block_size: int | str = "1MiB",
    compression: str | Mapping[str, str] = "auto",
    jobs: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[PackProgress], None] | None = None,
) -> Version:
    """Pack a folder of images, Parquet files or JSON lines into a data set, in the order of the source.

    ::

        tiercache.pack("photos/", "s3://bucket/photos", jobs=4)
        tiercache.pack("part-*.parquet", "s3://bucket/table", schema={"image": tiercache.Image("jpeg")})

    Args:
        source: File, folder, glob or URL to pack. Of a folder, all files below it are packed in the order of their
            paths, except hidden files.
        url: URL of the data set.
        kind: Kind of the source: "images", "parquet" or "jsonl"; None: decided by the files' names.
        schema: Mapping from column names to types, which overrides the types of these columns; or an Arrow schema (or a
            Schema) with all columns to pack. Not for images.
        classes: Mapping of columns of integers to the class names of their labels 0, 1, 2, .... Not for images, whose
            folders name the classes.
        mode: "create" for a new data set, "append" or "overwrite".
        shard_size: Target size of a shard in bytes, or a text such as "128MiB".
        block_size: Target size of a block in bytes, or a text such as "1MiB".
        compression: "auto", "none", "zstd" or "zstd:LEVEL", or a mapping from columns to these.
        jobs: Number of processes; 0: one per CPU.
        include: Globs over the paths below the source; only files that match one of them are packed. Empty: all files.
        exclude: Globs of files that are not packed.
        storage_options: Options of the data set's store.
        source_options: Options of the source's store.
        on_progress: Function called in this thread with a PackProgress from time to time.

    Returns:
        The committed version. A UserWarning names files of the source that were skipped, such as dangling links.

    Raises:
        NotFound, CommitConflict, SchemaError, ValueError: See plan_pack() and run_pack().
    """
    options = PackOptions(
        kind=kind,
        schema=schema,
        classes=classes or {},
        mode=mode,
        shard_size=shard_size,
        block_size=block_size,
        compression=compression,
        jobs=jobs,
        include=include,
        exclude=exclude,
        storage_options=storage_options or {},
        source_options=source_options or {},
    )
    plan = plan_pack(source, url, options)
    if n := len(plan.skipped):
        shown = "; ".join(f"{one.path}: {one.reason}" for one in plan.skipped[:_SHOWN_SKIPPED])
        more = f"; and {n - _SHOWN_SKIPPED:,} more" if n > _SHOWN_SKIPPED else ""
        counted = "1 file is" if n == 1 else f"{n:,} files are"
        warnings.warn(
            f"{redact(os.fspath(source))}: {counted} not packed: {shown}{more}. To silence this warning, exclude them "
            "by name (exclude=)",
            stacklevel=2,
        )
    return run_pack(plan, on_progress)
