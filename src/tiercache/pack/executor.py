"""Execution of a packing: writes splits as shards, in this process or in several, then commits once.

Each process has its own pipe to this process, and there are no shared locks: a killed process cannot block the others
and is not mistaken for a slow one, because its pipe ends.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
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
from tiercache.pack.files import InputBatch, InputSplit, RecordSource, SkippedFile
from tiercache.pack.plan import Kind, PackOptions, PackProgress, divide_splits, find_source, with_schema
from tiercache.shard.column_types import UserType
from tiercache.shard.schema import Schema
from tiercache.shard.versions.commit import data_set_exists_error, find_latest, no_data_set_error
from tiercache.shard.versions.manifest import Version, VersionKind
from tiercache.shard.write.dataset_writer import Writer
from tiercache.shard.write.shard_writer import ShardWriter, shard_key
from tiercache.store import MemoryStore, Store, open_store, redact

ProgressCallback: TypeAlias = Callable[[Any], None]
# Time to finish a batch and abort its upload. A process that takes longer is killed, which leaves no more behind than
# an abort does.
_STOP_S = 10.0


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: int = -1


def run_in_processes(
    work: Callable[[Any, ProgressCallback], Any],
    tasks: Sequence[Any],
    n_processes: int,
    report: ProgressCallback,
    keep: Callable[[int, Any], None],
) -> None:
    """Run work(task, report) for each task in n_processes processes.

    Processes are spawned: forked ones would inherit the threads and clients of stores, which do not survive a fork.
    Raises TierCacheError.
    """
    context = get_context("spawn")
    workers: list[_Worker] = []
    n_left = len(tasks)
    pending = iter(enumerate(tasks))
    try:
        for _ in range(min(n_processes, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            workers.append(_Worker(process, ours))
            process.start()
            theirs.close()
            _give(workers[-1], pending)
        while n_left:
            for connection in wait([w.connection for w in workers]):
                worker = next(w for w in workers if w.connection is connection)
                kind, value = _receive(worker)
                if kind == "report":
                    report(value)
                elif kind == "failed":
                    raise value
                else:
                    keep(worker.task, value)
                    n_left -= 1
                    _give(worker, pending)
    finally:
        _stop(workers)


def _give(worker: _Worker, pending: Any) -> None:
    task = next(pending, None)
    if task is not None:
        worker.task = task[0]
        worker.connection.send(task[1])


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = worker.connection.recv()
    except (EOFError, OSError) as error:
        worker.process.join(_STOP_S)
        code = worker.process.exitcode
        hint = "; the system may have killed it for lack of memory" if code == -signal.SIGKILL else ""
        raise TierCacheError(f"a worker process died (exit code {code}){hint}; nothing was committed") from error
    return message


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        if worker.process.pid is not None:
            worker.process.join(_STOP_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()


def _serve(connection: Connection, work: Callable[[Any, ProgressCallback], Any]) -> None:
    """Run a worker process: receive tasks, send reports and one result each, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent stops the workers
    with connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                answer = ("done", work(task, lambda value: connection.send(("report", value))))
            except Exception as error:  # noqa: BLE001 - top-level function of a process: the error goes to the parent
                answer = ("failed", error)
            connection.send(answer)


_SHOWN_LEFT_OUT = 5
_COMMITTING = "during the commit: check whether the version exists before you run the command again"


@dataclass(frozen=True)
class PackPlan:
    """Plan of a packing. Nothing has been written.

    Attributes:
        source: Source to pack.
        url: URL of the data set.
        options: Options of the packing.
        shares: Splits by task; each task writes its own shards.
        n_processes: Number of processes.
        parent: Version that is appended to or overwritten; None for a new data set.
        left_out: Files of the source that are skipped although neither include nor exclude says so.
    """

    source: RecordSource
    url: str
    options: PackOptions
    shares: tuple[tuple[InputSplit, ...], ...]
    n_processes: int
    parent: Version | None
    left_out: tuple[SkippedFile, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of the source."""
        return sum(part.n_bytes for share in self.shares for part in share)


@dataclass(frozen=True)
class _PackTask:
    """Task of one process: neighbouring splits, written to their own shards."""

    source: RecordSource
    parts: tuple[InputSplit, ...]
    url: str
    options: PackOptions
    writer_id: str


def plan_pack(source: str | os.PathLike[str], url: str | os.PathLike[str], options: PackOptions) -> PackPlan:
    """Inspect source and url, and return a plan of the packing.

    Raises NotFound, CommitConflict, SchemaError, ValueError.
    """
    with closing(open_store(url, **options.storage_options)) as store:
        parent = find_latest(store)
        if options.mode == "create" and parent is not None:
            raise data_set_exists_error(store, parent)
        if options.mode == "append" and parent is None:
            raise no_data_set_error(store)
        jobs = options.jobs or config.available_cpus()
        if jobs > 1 and isinstance(store, MemoryStore):
            raise ValueError(f"{store.url}: a memory store exists in one process only; pack into it with jobs=1")
    there = parent.schema if parent is not None and options.mode == "append" else None
    classes = None if there is None else next((c.classes for c in there.columns if c.classes), None)
    found, left_out = find_source(source, options, classes=classes)
    if there is not None:
        found = with_schema(found, there)
    shares = divide_splits(found.parts, jobs, parse_bytes(options.shard_size))
    n_processes = min(jobs, max(len(shares), 1))
    return PackPlan(found, os.fspath(url), options, tuple(shares), n_processes, parent, tuple(left_out))


def run_pack(plan: PackPlan, on_progress: Callable[[PackProgress], None] | None = None) -> Version:
    """Write the shards, then commit them; until the commit no reader sees anything.

    After an exception, Ctrl-C included, it deletes the shards that it has finished. A killed process leaves them
    behind: no version names them, and nothing needs to be cleaned up before packing again. Ctrl-C during the commit
    also leaves them, because they may already belong to a version: the message of the KeyboardInterrupt says so.
    Returns the committed version.
    Raises SchemaError (which names the location in the source), CommitConflict and StoreError.
    """
    options, progress, is_committing = plan.options, PackProgress(0, 0, plan.total_bytes), False

    def report(step: PackProgress) -> None:
        nonlocal progress
        n_records, n_bytes = progress.n_records + step.n_records, progress.n_bytes + step.n_bytes
        progress = replace(progress, n_records=n_records, n_bytes=min(n_bytes, plan.total_bytes))
        if on_progress is not None:
            on_progress(progress)

    writer = Writer(
        plan.url,
        schema=plan.source.schema,
        mode=options.mode,
        shard_size=options.shard_size,
        block_size=options.block_size,
        compression=options.compression,
        storage_options=options.storage_options,
    )
    try:
        with writer:
            if plan.n_processes > 1:
                _write_in_processes(plan, writer, report)
            for parts in plan.shares if plan.n_processes == 1 else ():
                _write_splits(writer, plan.source, parts, options, report)
            is_committing = True
    except KeyboardInterrupt as error:
        if is_committing:
            raise KeyboardInterrupt(_COMMITTING) from error
        raise
    return cast("Version", writer.version)


def _write_in_processes(plan: PackPlan, writer: Writer, report: ProgressCallback) -> None:
    """Have processes write all shards, and add them to the writer in the order of the source."""
    tasks = [_PackTask(plan.source, parts, plan.url, plan.options, token_hex(8)) for parts in plan.shares]
    finished: dict[int, list[ShardInfo]] = {}
    try:
        run_in_processes(write_share, tasks, plan.n_processes, report, finished.__setitem__)
        writer.add_shards([info for i in range(len(tasks)) for info in finished[i]])
    except BaseException:
        with closing(open_store(plan.url, **plan.options.storage_options)) as store:
            _delete_shards(store, tasks)
        raise


def _delete_shards(store: Store, tasks: Iterable[_PackTask]) -> None:
    """Delete the finished shards of all tasks, also those of processes that were killed or did not report."""
    with suppress(StoreError):  # an unnamed shard is harmless; the first error must stay visible
        for task in tasks:
            for key in (shard_key(task.writer_id, number) for number in count()):
                try:
                    store.head(key)
                except NotFound:
                    break
                store.delete([key])


def write_share(task: _PackTask, report: ProgressCallback) -> list[ShardInfo]:
    """Write the records of one task as shards; after an exception nothing is left of them."""
    with (
        closing(open_store(task.url, **task.options.storage_options)) as store,
        ShardWriter(store, task.source.schema, task.options.shard_options, writer_id=task.writer_id) as writer,
    ):
        _write_splits(writer, task.source, task.parts, task.options, report)
        return writer.finish()


def _write_splits(
    writer: Writer | ShardWriter,
    source: RecordSource,
    parts: Iterable[InputSplit],
    options: PackOptions,
    report: ProgressCallback,
) -> None:
    for part in parts:
        for batch in source.read(part, options.shard_options.block_bytes):
            _write(writer, batch)
            report(PackProgress(batch.n_records, batch.n_bytes, 0))


def _write(writer: Writer | ShardWriter, batch: InputBatch) -> None:
    """Write a batch; if a record does not fit, the error names its location in the source."""
    first_record = writer.n_records
    try:
        writer.write_batch(batch.columns)
    except SchemaError as error:
        if error.record is None:
            raise
        text = error.message.removeprefix(f"column {error.column!r}, ").removeprefix(f"record {error.record}: ")
        where = batch.place(error.record - first_record)
        raise SchemaError(f"{where}: {text}", column=error.column, expected=error.expected, got=error.got) from error


def pack(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    schema: Mapping[str, UserType] | pa.Schema | Schema | None = None,
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
    if plan.left_out:
        n = len(plan.left_out)
        shown = "; ".join(f"{one.path}: {one.reason}" for one in plan.left_out[:_SHOWN_LEFT_OUT])
        more = f"; and {n - _SHOWN_LEFT_OUT:,} more" if n > _SHOWN_LEFT_OUT else ""
        counted = "1 file is" if n == 1 else f"{n:,} files are"
        warnings.warn(
            f"{redact(os.fspath(source))}: {counted} not packed: {shown}{more}. To silence this warning, exclude them "
            "by name (exclude=)",
            stacklevel=2,
        )
    return run_pack(plan, on_progress)
