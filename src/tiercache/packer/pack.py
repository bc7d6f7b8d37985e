"""Packing of a source: its kind, splits and tasks; their records as shards, in one process or several; one commit.

The tasks follow from the source and the options alone, so any number of processes writes the same shards. A finished
task is recorded in the target (`shard/packings.py`): after a kill, the same command goes on with the other tasks.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from tiercache import config
from tiercache.crash_points import crash_point
from tiercache.errors import StoreError
from tiercache.model import parse_bytes
from tiercache.packer.bad_records import BadRecordLog, OnError, report_url, write_batch, write_report
from tiercache.packer.files import InputSplit, RecordSource, SkippedFile
from tiercache.packer.objects import find_object, is_object
from tiercache.packer.sources import SourceKind, SourceOptions, find_source
from tiercache.packer.tokens import tokenized
from tiercache.packer.workers import Report, run_in_processes
from tiercache.shard.packings import Packing, begin_packing, find_packing, list_packings
from tiercache.shard.schema import Schema, UserType, check_same_schema
from tiercache.shard.versions import (
    Commit,
    Version,
    VersionKind,
    check_mode,
    check_writable,
    data_set_exists_error,
    find_latest,
    no_data_set_error,
)
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import MemoryStore, Store, open_store, redact, split_url

logger = logging.getLogger("tiercache")

# A source has this many tasks for the processes to share, unless one would have less than a shard's worth of data; the
# upper limit is what a kill may lose of the work of a process.
_TASKS = 64
_MOST_SHARDS_PER_TASK = 8
# Shards of a task may exceed the target size by this part, rather than that the last one is nearly empty.
_SHARD_EXCESS = 0.25
_SHARD_OVERHEAD = 0.02  # of footers, and of columns that are not in the source


@dataclass(frozen=True, kw_only=True)
class PackOptions(SourceOptions):
    """Options of packing. The arguments of `pack` of the same names describe them."""

    report: str | os.PathLike[str] | None = None
    mode: VersionKind = "create"
    shard_size: int | str = "128MiB"
    block_size: int | str = "1MiB"
    compression: str | Mapping[str, str] = "auto"
    workers: int = 1
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
        if type(self.workers) is not int or self.workers < 0:
            raise ValueError(f"workers must be a number of processes, or 0 for one per CPU, got {self.workers!r}")
        _ = self.shard_options

    @property
    def n_workers(self) -> int:
        """Number of processes that may be used."""
        return self.workers or config.available_cpus()

    @property
    def shard_options(self) -> ShardOptions:
        """Options of the shard writers. Raises ValueError for an invalid size or compression."""
        return ShardOptions(parse_bytes(self.shard_size), parse_bytes(self.block_size), self.compression)


@dataclass(frozen=True)
class PackPlan:
    """Plan of a packing. Nothing has been written.

    key: Hash of the source and of the options that decide what is written. finished: Tasks that an earlier run of this
    packing has finished.
    """

    source: RecordSource
    url: str
    options: PackOptions
    tasks: tuple[tuple[InputSplit, ...], ...]  # splits by task; each task writes its own shards
    key: str
    finished: frozenset[int] = frozenset()
    skipped: tuple[SkippedFile, ...] = ()  # although neither include nor exclude says so

    @property
    def n_workers(self) -> int:
        """Number of processes to use."""
        return min(self.options.n_workers, max(len(self.tasks) - len(self.finished), 1))

    @property
    def total_bytes(self) -> int:
        """Bytes of the source."""
        return sum(split.n_bytes for task in self.tasks for split in task)


def plan_pack(source: Any, url: str | os.PathLike[str], options: PackOptions, inputs: object = None) -> PackPlan:
    """Inspect a source (see `pack`) and the data set's URL, and return a plan of the packing.

    Raises NotFound, CommitConflict, SchemaError, TypeError, ValueError, as `pack`.
    """
    with closing(open_store(url, **options.storage_options)) as store:
        parent = _check_target(store, options)
        chosen, skipped = _find(source, inputs, options, parent if options.mode == "append" else None)
        tasks = divide_splits(chosen.splits, options.shard_options.shard_bytes)
        key = _key_of(chosen, tasks, options)
        packing = find_packing(store, key)
        if options.mode == "create" and parent is not None and (packing is None or not packing.committed(store, "")):
            raise data_set_exists_error(store, parent)
        finished = frozenset() if packing is None else frozenset(packing.finished())
        if n_others := sum(records.key != key for records in list_packings(store)):
            logger.warning(
                "%s: packings of other sources, or with other options, were not finished, and are left to gc: %d",
                store.url,
                n_others,
            )
    return PackPlan(chosen, os.fspath(url), options, tuple(tasks), key, finished, tuple(skipped))


def _find(
    source: Any, inputs: object, options: PackOptions, parent: Version | None
) -> tuple[RecordSource, list[SkippedFile]]:
    if options.tokenize is not None:
        plain, skipped = _find(source, inputs, replace(options, tokenize=None), None)
        tokens = tokenized(plain, options.tokenize, options.text_column)
        if parent is not None:
            check_same_schema(parent.schema, tokens.schema)
        return tokens, skipped
    if inputs is None and not is_object(source):
        return find_source(source, options, parent)
    for name in ("kind", "labels", "label_pattern", "check_images", "include", "exclude", "source_options"):
        if getattr(options, name):
            raise ValueError(f"{name}= is for files; the source is a Python object")
    schema = None if parent is None else parent.schema
    shard_bytes = options.shard_options.shard_bytes
    found = find_object(source, inputs, options.schema, options.classes, shard_bytes, schema)
    if options.n_workers > 1 and found.units.n_units > 1:  # also if there is little data, which one process packs
        _check_picklable(found)
    return found, []


def _check_picklable(source: RecordSource) -> None:
    try:
        pickle.dumps(source)
    except Exception as error:
        raise ValueError(
            f"the source cannot be sent to other processes ({error}): they must be able to import its function, which "
            "is therefore defined in a module, outside of other functions; or use workers=1"
        ) from error


def _check_target(store: Store, options: PackOptions) -> Version | None:
    """Check a data set's store, and return the newest version, if any."""
    store.require_conditional_put()  # here, because the commit comes hours later
    parent = find_latest(store)
    if options.mode == "create" and parent is not None and next(list_packings(store), None) is None:
        raise data_set_exists_error(store, parent)
    if options.mode == "append" and parent is None:
        raise no_data_set_error(store)
    if parent is not None:
        check_writable(parent, store.url)
    if options.n_workers > 1 and isinstance(store, MemoryStore):
        raise ValueError(f"{store.url}: a memory store exists in one process only; pack into it with workers=1")
    return parent


def _key_of(source: RecordSource, tasks: Sequence[Sequence[InputSplit]], options: PackOptions) -> str:
    """Return a hash of what decides the shards that are written."""
    how = (options.on_error == "dead-letter", options.mode, options.shard_options, [len(task) for task in tasks])
    facts = (repr(source), source.schema.to_bytes(), source.splits, how)
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def divide_splits(splits: Sequence[InputSplit], shard_bytes: int) -> list[tuple[InputSplit, ...]]:
    """Return the splits divided into tasks of neighbouring splits with about equal bytes, in order."""
    total = sum(split.n_bytes for split in splits)
    task_bytes = min(max(total // _TASKS, shard_bytes), _MOST_SHARDS_PER_TASK * shard_bytes)
    tasks: list[list[InputSplit]] = [[] for _ in range(max(total // task_bytes, 1))]
    before = 0
    for split in splits:
        middle = before + split.n_bytes / 2
        tasks[min(int(middle * len(tasks) / total), len(tasks) - 1) if total else 0].append(split)
        before += split.n_bytes
    return [tuple(task) for task in tasks if task]


def _even_shard_bytes(task_bytes: int, options: ShardOptions) -> int:
    """Return the size at which the shards of a task are about equal, if the data is stored as large as it is."""
    n_shards = math.ceil(task_bytes / options.shard_bytes - _SHARD_EXCESS)
    even = int(task_bytes / max(n_shards, 1) * (1 + _SHARD_OVERHEAD)) + 2 * options.block_bytes
    least = options.shard_bytes if n_shards <= 1 else 0  # the sizes of a source may be those of compressed files
    return min(max(even, least), int(options.shard_bytes * (1 + _SHARD_EXCESS)))


_SHOWN_SKIPPED = 5


@dataclass(frozen=True, slots=True)
class PackProgress:
    """Number of records packed, and bytes of the source that are packed, of the bytes of the whole source."""

    n_records: int
    n_bytes: int
    total_bytes: int


def run_pack(
    plan: PackPlan,
    on_progress: Callable[[PackProgress], None] | None = None,
    on_bad: Callable[[int, str], None] | None = None,
) -> Version:
    """Write the shards, then commit them and return the version.

    Until the commit no reader sees anything. After an exception, Ctrl-C or a kill, the tasks that are finished stay,
    and another call with the same source and options continues with the others. A packing that was killed after its
    commit commits nothing again: its version is returned.
    Raises SchemaError (which names the location in the source), CommitConflict and StoreError.
    """
    with closing(open_store(plan.url, **plan.options.storage_options)) as store:
        parent = _check_target(store, plan.options)
        packing = begin_packing(store, plan.key, {"": parent.number if parent else 0})
        if (version := packing.committed(store, "")) is None:
            try:
                _run_tasks(plan, packing, on_progress)
            except BaseException:
                with suppress(StoreError):  # the first error must stay visible
                    if not packing.finished():
                        packing.remove()
                raise
            crash_point("packing.tasks_finished")
            if plan.options.on_error != "stop":
                _report_bad_records(plan, packing, on_bad)
            version = _commit(plan, packing, parent)
            crash_point("packing.committed")
        packing.remove()
        return version


def _run_tasks(plan: PackPlan, packing: Packing, on_progress: Callable[[PackProgress], None] | None) -> None:
    """Run the tasks that are not finished."""
    finished, total_bytes = _usable(packing), plan.total_bytes
    done = [0, sum(split.n_bytes for number in finished for split in plan.tasks[number])]

    def report(n_records: int, n_bytes: int) -> None:
        done[:] = done[0] + n_records, min(done[1] + n_bytes, total_bytes)
        if on_progress is not None:
            on_progress(PackProgress(done[0], done[1], total_bytes))

    job = _Job(plan.source, plan.url, plan.options, packing.id, plan.key, packing.bases)
    left = [(number, splits) for number, splits in enumerate(plan.tasks) if number not in finished]
    if plan.n_workers > 1:
        run_in_processes(job.run, left, plan.n_workers, report)
    else:
        for task in left:
            job.run(task, report)


def _report_bad_records(plan: PackPlan, packing: Packing, on_bad: Callable[[int, str], None] | None) -> None:
    """Write the report of all bad records, in the order of the source, and call on_bad with their number."""
    url = report_url(plan.url, plan.options.report)
    root, key = split_url(url)
    beside = plan.options.report is None
    with closing(open_store(root, **plan.options.storage_options if beside else {})) as store:
        n_bad = write_report(store, key, (packing.bad_records(number) for number in range(len(plan.tasks))))
    if n_bad and on_bad is not None:
        on_bad(n_bad, redact(url))


def _commit(plan: PackPlan, packing: Packing, parent: Version | None) -> Version:
    """Commit the shards of all tasks, unless another process that runs the same packing has committed them."""
    shards = packing.finished()  # all of them; or another process has removed some, after its commit
    if (version := packing.committed(packing.store, "")) is not None:
        return version
    infos = [info for number in range(len(plan.tasks)) for info in shards[number][""]]
    return Commit(
        packing.store,
        infos,
        schema=plan.source.schema,
        mode=plan.options.mode,
        parent=parent,
        writer_id=packing.id[:16],
        nonce=packing.id,
    ).run()


def _usable(packing: Packing) -> set[int]:
    """Return the finished tasks. The record of one whose shards have been deleted is removed: it runs again."""
    finished = packing.finished()
    there = {info.key: info.n_bytes for info in packing.store.list("shards/")} if finished else {}
    for number, parts in list(finished.items()):
        if any(there.get(info.name) != info.n_bytes for infos in parts.values() for info in infos):
            packing.forget(number)
            del finished[number]
    return set(finished)


@dataclass(frozen=True)
class _Job:
    """What a process needs to run tasks of a packing. Picklable."""

    source: RecordSource
    url: str
    options: PackOptions
    packing_id: str
    key: str
    bases: Mapping[str, int]

    def run(self, task: tuple[int, Sequence[InputSplit]], report: Report) -> None:
        """Write the records of a task, its number and its splits, and record its shards. After an error none is left.

        If another process has recorded the task meanwhile, that process's shards count, and these are deleted.
        """
        number, splits = task
        options = self.options.shard_options
        n_bytes = sum(split.n_bytes for split in splits)
        even = replace(options, shard_bytes=_even_shard_bytes(n_bytes, options))
        with closing(open_store(self.url, **self.options.storage_options)) as store:
            packing = Packing(store, self.key, self.packing_id, self.bases)
            with ShardWriter(store, self.source.schema, even) as writer:
                with BadRecordLog(store, packing.bad_key(number), self.options.on_error) as log:
                    for split in splits:
                        for batch in self.source.read(split, options.block_bytes):
                            write_batch(writer, batch, log.add)
                            report(batch.n_records, batch.n_bytes)
                    log.close()
                infos = writer.finish()
            crash_point("packing.shards_written")
            if not packing.finish(number, {"": infos}):
                store.delete([info.name for info in infos])
            crash_point("packing.task_recorded")


def pack(
    source: Any,
    inputs: Any = None,
    url: str | os.PathLike[str] | None = None,
    *,
    kind: SourceKind | None = None,
    schema: Mapping[str, UserType] | pa.Schema | Schema | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    labels: str | os.PathLike[str] | None = None,
    label_pattern: str | None = None,
    check_images: bool = False,
    on_error: OnError = "stop",
    report: str | os.PathLike[str] | None = None,
    mode: VersionKind = "create",
    shard_size: int | str = "128MiB",
    block_size: int | str = "1MiB",
    compression: str | Mapping[str, str] = "auto",
    workers: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tokenize: str | None = None,
    text_column: str = "text",
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[PackProgress], None] | None = None,
) -> Version:
    """Pack files, the records of a function, or a Python object into a data set, in the order of the source.

    After Ctrl-C, a kill or an error, the same call continues: parts that are finished are kept, below the data set's
    URL, and no record is lost or written twice.

    ::

        tiercache.pack("photos/", "s3://bucket/photos", workers=4)
        tiercache.pack("part-*.parquet", "s3://bucket/table", schema={"image": tiercache.Image("jpeg")})
        tiercache.pack(parse, paths, "s3://bucket/parsed", workers=8)  # parse(path) yields records
        tiercache.pack(frame, "s3://bucket/table")

    Args:
        source: File, folder, glob or URL to pack; of a folder, all files below it are packed in the order of their
            paths, except hidden files. Or a function, which is called with each of `inputs`, and returns a record (a
            dict), an iterable of records, an Arrow table or a frame, or None. Or an object: a Dataset of torch or
            Hugging Face, a frame of pandas or polars, an Arrow table or reader, data sets of tiercache (one or a list),
            an iterable of records; "module:callable" names a function that returns such an object or yields records.
        inputs: Inputs of the function, one for each call: a sequence, or an iterable, which is listed. May be left out:
            `pack(source, url)`.
        url: URL of the data set.
        kind: Kind of the source: "images", "parquet", "csv", "feather", "orc" or "jsonl"; "mds", "arrow" or "megatron",
            which `Dataset` also reads in place; None: decided by the files' names. "files": each file below a folder is
            a record, with the columns bytes and path. "text": each file is a document in UTF-8, with the columns text
            and path.
        schema: Mapping from column names to types, which overrides the types of these columns; or, for tables, an Arrow
            schema (or a Schema) with all columns to pack.
        classes: Mapping of columns of integers to the class names of their labels 0, 1, 2, .... The classes of images
            are the names of the first folders of their paths, sorted, unless classes={"label": [...]} states them.
        labels: Table (CSV, JSON lines or Parquet) with the labels of images or files. One of its columns names the
            files, by path, name, or name without suffix; the others become columns. Text in the column "label" becomes
            the number of a class.
        label_pattern: Regular expression whose group named "label" (or whose first group) is the class in the path of
            an image or a file, such as "(?P<label>[a-z]+)_[0-9]+".
        check_images: Whether each image is decoded, to find those that are damaged inside. Without it, the header and
            the end of each image are checked.
        on_error: What a record that cannot be read or does not fit the schema causes: "stop": an error that names its
            location; "skip": a line of the report; "dead-letter": the same, with the record itself.
        report: Path or URL of the report of bad records, a file of JSON lines. None: `url` and ".bad.jsonl".
        mode: "create" for a new data set, "append" or "overwrite".
        shard_size: Target size of a shard in bytes, or a text such as "128MiB".
        block_size: Target size of a block in bytes, or a text such as "1MiB".
        compression: "auto", "none", "zstd" or "zstd:LEVEL", or a mapping from columns to these.
        workers: Number of processes; 0: one per CPU. The shards are the same for any number. Each process writes whole
            shards, so one process packs records that fill one shard. An iterable is read by one process.
        include: Globs over the paths below the source; only files that match one of them are packed. Empty: all files.
        exclude: Globs of files that are not packed.
        tokenize: Tokenizer of the text, which is replaced by the column "tokens": "bytes"; "tiktoken:gpt2"; the path of
            a tokenizer.json or of its folder; or a name on the Hugging Face Hub. No special tokens are added:
            `pack_sequences(eos=)` adds the end token. None: the text stays.
        text_column: Column of the text that is replaced.
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
        labels=labels,
        label_pattern=label_pattern,
        check_images=check_images,
        on_error=on_error,
        report=report,
        mode=mode,
        shard_size=shard_size,
        block_size=block_size,
        compression=compression,
        workers=workers,
        include=include,
        exclude=exclude,
        tokenize=tokenize,
        text_column=text_column,
        storage_options=storage_options or {},
        source_options=source_options or {},
    )
    if url is None:
        inputs, url = None, inputs
    if not isinstance(url, str | os.PathLike):
        raise TypeError(f"pack() takes pack(source, url) or pack(function, inputs, url); the URL is {url!r}")
    plan = plan_pack(source, url, options, inputs)
    if n := len(plan.skipped):
        shown = "; ".join(f"{one.path}: {one.reason}" for one in plan.skipped[:_SHOWN_SKIPPED])
        more = f"; and {n - _SHOWN_SKIPPED:,} more" if n > _SHOWN_SKIPPED else ""
        counted = "1 file is" if n == 1 else f"{n:,} files are"
        warnings.warn(
            f"{redact(os.fspath(source))}: {counted} not packed: {shown}{more}. To silence this warning, exclude them "
            "by name (exclude=)",
            stacklevel=2,
        )

    def warn(n_bad: int, report_at: str) -> None:
        warnings.warn(f"{n_bad:,} bad records were not packed; {report_at} lists them", stacklevel=4)

    return run_pack(plan, on_progress, warn)
