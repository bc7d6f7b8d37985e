"""Packing of a source: the tasks of its plan as shards, in one process or several; other passes; one commit.

A finished task is recorded in the target (`shard/packings.py`): after a kill, the same command goes on with the others.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from tiercache.crash_points import crash_point
from tiercache.errors import NotFound, SchemaError, StoreError
from tiercache.packer import rearrange
from tiercache.packer.bad_records import BadRecordLog, OnError, report_url, write_batch, write_report
from tiercache.packer.files import InputBatch, InputSplit, RecordSource
from tiercache.packer.objects import object_of
from tiercache.packer.plan import PackOptions, PackPlan, check_target, divide_splits, open_targets, part_url, plan_pack
from tiercache.packer.rearrange import (
    BY_HASH,
    BY_POSITION,
    POSITIONS,
    Buckets,
    DuplicatePositions,
    Hashes,
    RunPlan,
    Runs,
    RunWriter,
    TooManyRecordsError,
    WithoutDuplicates,
    bucket_splits,
)
from tiercache.packer.sources import SourceKind
from tiercache.packer.transform import MapFunction, divide
from tiercache.packer.workers import Report, run_in_processes, run_in_ray
from tiercache.ray_tasks import TaskEngine
from tiercache.shard.packings import Packing, begin_packing, find_packing, pass_folder
from tiercache.shard.schema import Schema, UserType
from tiercache.shard.versions import Commit, Version, VersionKind
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import Store, open_store, redact, split_url
from tiercache.store.access import absolute_url

logger = logging.getLogger("tiercache")

# Shards of a task may exceed the target size by this part, rather than that the last one is nearly empty.
_SHARD_EXCESS = 0.25
_SHARD_OVERHEAD = 0.02  # of footers, and of columns that are not in the source
_SHOWN_SKIPPED = 5


def _even_shard_bytes(task_bytes: int, options: ShardOptions) -> int:
    """Return the size at which the shards of a task are about equal, if the data is stored as large as it is."""
    n_shards = math.ceil(task_bytes / options.shard_bytes - _SHARD_EXCESS)
    even = int(task_bytes / max(n_shards, 1) * (1 + _SHARD_OVERHEAD)) + 2 * options.block_bytes
    least = options.shard_bytes if n_shards <= 1 else 0  # the sizes of a source may be those of compressed files
    return min(max(even, least), int(options.shard_bytes * (1 + _SHARD_EXCESS)))


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
    on_duplicates: Callable[[int], None] | None = None,
) -> dict[str, Version]:
    """Write the shards, then commit them and return the version of each part; "" without a split.

    Until the commit no reader sees anything. After an exception, Ctrl-C or a kill, the tasks that are finished stay,
    and another call with the same source and options continues with the others. A part that this packing has committed
    is not committed again: its version is returned. on_bad is called with the number of bad records and the URL of
    their report, and on_duplicates with the number of records that dedup= has left out.
    Raises SchemaError (which names the location in the source), CommitConflict and StoreError.
    """
    with open_targets(plan.url, plan.options) as (store, targets):
        parents = {part: check_target(target, plan.options) for part, target in targets.items()}
        creates = plan.options.mode == "create"  # then a version that is there is this packing's own
        bases = {part: parent.number if parent and not creates else 0 for part, parent in parents.items()}
        packing = begin_packing(store, plan.key, bases)
        versions = {part: packing.committed(target, part) for part, target in targets.items()}
        if None in versions.values():
            try:
                passes = _run_passes(plan, packing, targets, on_progress)
            except BaseException:
                with suppress(StoreError):  # the first error must stay visible
                    if packing.is_empty():
                        packing.remove()
                raise
            crash_point("packing.tasks_finished")
            if plan.options.on_error != "stop":
                _report_bad_records(plan.url, packing, passes.first, on_bad)
            if plan.options.dedup and on_duplicates is not None:
                on_duplicates(passes.n_duplicates)
            for part, target in targets.items():
                versions[part] = versions[part] or _commit(passes.last, packing, part, target, parents[part])
                crash_point("packing.committed")
        packing.remove()
        return {part: version for part, version in versions.items() if version is not None}


@dataclass(frozen=True)
class _Passes:
    """The plans of the pass that has read the source, and of the last one; both if there is one."""

    first: PackPlan
    last: PackPlan
    n_duplicates: int = 0


def _run_passes(
    plan: PackPlan, packing: Packing, targets: Mapping[str, Store], on_progress: Callable[[PackProgress], None] | None
) -> _Passes:
    """Run the tasks, after those of other passes if the order is another one or duplicates are left out."""
    options, n_duplicates = plan.options, 0
    is_small = options.order is not None and _fits_in_a_run(plan)
    n_passes = 1 + bool(options.dedup) + (options.order is not None and not is_small)
    progress = _Progress(on_progress, plan.total_bytes, n_passes)
    if options.dedup:
        positions = _find_duplicates(plan, progress)
        n_duplicates = sum(info.n_records for info in positions.infos)
        plan = _with_source(plan, WithoutDuplicates.of(plan.source, positions))
    if options.order is None:
        _run_tasks(plan, packing, targets, progress)
        return _Passes(plan, plan, n_duplicates)
    if is_small:
        tasks = (tuple(split for task in plan.tasks for split in task),) if plan.tasks else ()
        whole = replace(plan, tasks=tasks, run_plan=RunPlan(options.order, _run_bytes(options), is_whole=True))
        try:
            _run_tasks(whole, packing, targets, progress)
        except TooManyRecordsError:
            progress.n_passes += 2
        else:
            return _Passes(whole, whole, n_duplicates)
    first = replace(plan, url=_pass_url(plan, "runs"), run_plan=RunPlan(options.order, _run_bytes(options)))
    runs = _run_pass(first, progress)
    splits = bucket_splits(runs, options.order, rearrange.RUN_BYTES)
    last = _with_source(plan, Buckets(runs, options.order, plan.source.schema, splits))
    _run_tasks(last, packing, targets, progress)
    return _Passes(first, last, n_duplicates)


def _run_bytes(options: PackOptions) -> int:
    return rearrange.RUN_BYTES // len(options.parts)


def _fits_in_a_run(plan: PackPlan) -> bool:
    """Return whether to sort, or shuffle, the records where they are written, which needs no other pass.

    If they prove to be larger than their files, the other passes begin. A source that is read once must not try this.
    """
    found = object_of(plan.source)
    if plan.total_bytes > _run_bytes(plan.options) or (found is not None and found.units.is_read_once):
        return False
    with open_targets(_pass_url(plan, "runs"), plan.options) as (store, _):
        return find_packing(store, plan.key) is None


def _find_duplicates(plan: PackPlan, progress: _Progress) -> Runs:
    """Return the sorted positions of the records that are left out."""
    column = plan.options.dedup if isinstance(plan.options.dedup, str) else None
    options = replace(plan.options, split=None, split_by=None)
    hashes = _with_source(replace(plan, options=options), Hashes(plan.source, column))
    by_hash, by_position = RunPlan(BY_HASH, rearrange.RUN_BYTES), RunPlan(BY_POSITION, rearrange.RUN_BYTES)
    runs = _run_pass(replace(hashes, url=_pass_url(plan, "hashes"), run_plan=by_hash), progress)
    buckets = bucket_splits(runs, BY_HASH, rearrange.RUN_BYTES)
    found = _with_source(hashes, DuplicatePositions(runs, BY_HASH, POSITIONS, buckets))
    found = replace(found, url=_pass_url(plan, "duplicates"), run_plan=by_position)
    return _run_pass(found, _Progress(None, 0, 1))[""]


def _with_source(plan: PackPlan, source: RecordSource) -> PackPlan:
    tasks = divide_splits(source.splits, plan.options.shard_options.shard_bytes)
    return replace(plan, source=source, tasks=tuple(tasks))


def _pass_url(plan: PackPlan, name: str) -> str:
    return f"{os.fspath(plan.url).rstrip('/')}/{pass_folder(plan.key, name)}"


def _run_pass(plan: PackPlan, progress: _Progress) -> dict[str, Runs]:
    """Run a pass that is not the last, and return the runs of each part."""
    with open_targets(plan.url, plan.options) as (store, targets):
        packing = begin_packing(store, plan.key, dict.fromkeys(targets, 0))
        try:
            _run_tasks(plan, packing, targets, progress)
        except BaseException:
            with suppress(StoreError):
                if packing.is_empty():
                    packing.remove()
            raise
        finished = packing.finished()
        if len(finished) < len(plan.tasks):
            raise NotFound(
                "the packing was finished by another process meanwhile: run the command again", url=store.url
            )
        runs = {}
        for part in targets:
            infos = tuple(info for number in range(len(plan.tasks)) for info in finished[number][part])
            url = part_url(absolute_url(plan.url), part)
            runs[part] = Runs(url, plan.source.schema, infos, plan.options.storage_options)
        return runs


@dataclass
class _Progress:
    """Progress over all passes, each of which counts as the bytes of the source. Records count in the last pass."""

    on_progress: Callable[[PackProgress], None] | None
    source_bytes: int
    n_passes: int
    n_begun: int = 0

    def begin_pass(self, total_bytes: int, done_bytes: int) -> Report:
        """Return the function that takes what tasks of the next pass have done."""
        before, self.n_begun = self.n_begun * self.source_bytes, self.n_begun + 1
        done = [0, done_bytes]

        def report(n_records: int, n_bytes: int) -> None:
            done[:] = done[0] + n_records, min(done[1] + n_bytes, total_bytes)
            if self.on_progress is not None:
                n_records = done[0] if self.n_begun == self.n_passes else 0
                n_bytes = done[1] * self.source_bytes // total_bytes if total_bytes else 0
                self.on_progress(PackProgress(n_records, before + n_bytes, self.n_passes * self.source_bytes))

        return report


def _run_tasks(plan: PackPlan, packing: Packing, targets: Mapping[str, Store], progress: _Progress) -> None:
    """Run the tasks that are not finished."""
    finished = _usable(packing, targets)
    report = progress.begin_pass(
        plan.total_bytes, sum(split.n_bytes for number in finished for split in plan.tasks[number])
    )
    job = _Job(plan.source, absolute_url(plan.url), plan.options, packing.id, plan.key, packing.bases, plan.run_plan)
    left = [(number, splits) for number, splits in enumerate(plan.tasks) if number not in finished]
    if not left:
        return
    n_workers = min(plan.options.n_workers, len(left))
    if plan.options.engine == "ray":
        run_in_ray(job.run, left, report)
    elif n_workers > 1:
        run_in_processes(job.run, left, n_workers, report)
    else:
        for task in left:
            job.run(task, report)


def _report_bad_records(
    target: str, packing: Packing, plan: PackPlan, on_bad: Callable[[int, str], None] | None
) -> None:
    """Write the report of all bad records, in the order of the source, and call on_bad with their number.

    target: URL of the data set. plan: That of the pass that has read the source. If there are bad records alone, the
    options are wrong rather than the data: the packing and its other passes are removed. Raises SchemaError then.
    """
    url = report_url(target, plan.options.report)
    root, key = split_url(url)
    beside = plan.options.report is None
    with (
        closing(open_store(root, **plan.options.storage_options if beside else {})) as store,
        open_targets(plan.url, plan.options) as (records, _),
    ):
        of_pass = begin_packing(records, plan.key, {})  # which has begun
        n_bad = write_report(store, key, (of_pass.bad_records(number) for number in range(len(plan.tasks))))
        parts = [infos for of_task in of_pass.finished().values() for infos in of_task.values()]
    if n_bad and not any(info.n_records for infos in parts for info in infos):
        packing.remove()
        raise SchemaError(
            f"no record could be packed, and {n_bad:,} are bad; nothing was committed. Their reasons: {redact(url)}"
        )
    if n_bad and on_bad is not None:
        on_bad(n_bad, redact(url))


def _commit(plan: PackPlan, packing: Packing, part: str, target: Store, parent: Version | None) -> Version:
    """Commit the shards of all tasks, unless another process that runs the same packing has committed them.

    Raises StoreError if the records of tasks are gone.
    """
    shards = packing.finished()  # all of them; or another process has removed some, after its commit
    if (version := packing.committed(target, part)) is not None:
        return version
    if n_lost := sum(number not in shards for number in range(len(plan.tasks))):
        raise StoreError(
            f"the records of {n_lost} of {len(plan.tasks)} finished tasks were removed meanwhile, as gc "
            "does if they are old; the data set was not changed: run the same command again",
            url=target.url,
        )
    infos = [info for number in range(len(plan.tasks)) for info in shards[number][part]]
    return Commit(
        target,
        infos,
        schema=plan.source.schema,
        mode=plan.options.mode,
        parent=parent,
        writer_id=packing.id[:16],
        nonce=packing.id,
    ).run()


def _usable(packing: Packing, targets: Mapping[str, Store]) -> set[int]:
    """Return the finished tasks. The record of one whose shards have been deleted is removed: it runs again."""
    finished = packing.finished()
    there = {
        (part, info.key): info.n_bytes
        for part, target in targets.items()
        if finished
        for info in target.list("shards/")
    }
    for number, parts in list(finished.items()):
        if any(there.get((part, info.name)) != info.n_bytes for part, infos in parts.items() for info in infos):
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
    run_plan: RunPlan | None = None

    def run(self, task: tuple[int, Sequence[InputSplit]], report: Report) -> None:
        """Write the records of a task, its number and its splits, and record its shards. After an error none is left.

        If another process has recorded the task meanwhile, that process's shards count, and these are deleted.
        """
        number, splits = task
        with open_targets(self.url, self.options) as (store, targets), ExitStack() as stack:
            packing = Packing(store, self.key, self.packing_id, self.bases)
            log = stack.enter_context(BadRecordLog(store, packing.bad_key(number), self.options.on_error))
            writers: dict[str, ShardWriter | RunWriter] = {}
            for part in self.options.parts:
                writers[part] = self._writer(targets[part], number, self._bytes_of(part, splits))
                stack.enter_context(cast("AbstractContextManager[Any]", writers[part]))
            for split in splits:
                left_bytes = split.n_bytes
                for part, batch in self._batches(split):
                    write_batch(writers[part], batch, log.add)
                    done_bytes = min(batch.n_bytes, left_bytes)  # sizes in memory are not those of files
                    left_bytes -= done_bytes
                    report(batch.n_records, done_bytes)
                report(0, left_bytes)
            log.close()
            infos = {part: writer.finish() for part, writer in writers.items()}
            crash_point("packing.shards_written")
            if not packing.finish(number, infos):
                for part, of_part in infos.items():
                    targets[part].delete([info.name for info in of_part])
            crash_point("packing.task_recorded")

    def _bytes_of(self, part: str, splits: Sequence[InputSplit]) -> int:
        if isinstance(self.source, Buckets):
            return sum(split.n_bytes for split in splits if split.path == part)
        return int(self.options.parts[part] * sum(split.n_bytes for split in splits))

    def _writer(self, target: Store, number: int, n_bytes: int) -> ShardWriter | RunWriter:
        options = self.options.shard_options
        options = replace(options, shard_bytes=_even_shard_bytes(n_bytes, options))
        if self.run_plan is not None:
            return RunWriter(target, self.source.schema, options, self.run_plan, number)
        return ShardWriter(target, self.source.schema, options)

    def _batches(self, split: InputSplit) -> Iterator[tuple[str, InputBatch]]:
        n_records = 0
        for batch in self.source.read(split, self.options.shard_options.block_bytes):
            if isinstance(self.source, Buckets):  # the first pass has divided the records
                yield split.path, batch
            else:
                yield from divide(batch, self.options.division, split, n_records)
            n_records += batch.n_records


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
    engine: TaskEngine = "process",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    columns: Sequence[str] = (),
    filter: pc.Expression | None = None,  # noqa: A002 - as in Dataset.filter()
    tokenize: str | None = None,
    text_column: str = "text",
    map: MapFunction | str | None = None,  # noqa: A002 - the name of the option of the command
    resize: int | None = None,
    encode: str | None = None,
    split: Mapping[str, float] | None = None,
    split_by: str | None = None,
    shuffle: int | None = None,
    sort: str | None = None,
    dedup: bool | str = False,
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[PackProgress], None] | None = None,
) -> Version:
    """Pack files, the records of a function, or a Python object into a data set.

    The records are in the order of the source, unless `shuffle` or `sort` states another one. After Ctrl-C, a kill or
    an error, the same call continues: parts that are finished are kept, below the data set's URL, and no record is lost
    or written twice. If it had come to its end, a call with mode="create" and files or data sets that have not changed
    returns the version that is there; with an object of Python, whose content is not compared, it raises
    CommitConflict.

    ::

        tiercache.pack("photos/", "s3://bucket/photos", workers=4)
        tiercache.pack("part-*.parquet", "s3://bucket/table", schema={"image": tiercache.Image("jpeg")})
        tiercache.pack(parse, paths, "s3://bucket/parsed", workers=8)  # parse(path) yields records
        tiercache.pack(frame, "s3://bucket/table")

    Args:
        source: File, folder, glob or URL to pack, also that of a data set of tiercache or of a repository of the
            Hugging Face Hub; of a folder, all files below it are packed in the order of their paths, except hidden
            files. Or a function, which is called with each of `inputs`, and returns a record (a
            dict), an iterable of records, an Arrow table or a frame, or None. Or an object: a Dataset of torch or
            Hugging Face, a frame of pandas or polars, an Arrow table or reader, data sets of tiercache (one or a list),
            an iterable of records; "module:callable" names a function that returns such an object or yields records.
        inputs: Inputs of the function, one for each call: a sequence, or an iterable, which is listed. May be left out:
            `pack(source, url)`.
        url: URL of the data set.
        kind: Kind of the source: "images", "parquet", "csv", "feather", "orc", "jsonl", "numpy", "tfrecord" or
            "litdata"; "mds", "arrow", "megatron" or "webdataset", which `Dataset` also reads in place; None: decided by
            the files' names. "files": each file below a folder is a record, with the columns bytes and path. "text":
            each file is a document in UTF-8, with the columns text and path.
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
        engine: "process": `workers` processes of this machine; "ray": tasks of the Ray cluster to which this process is
            connected, or that RAY_ADDRESS names, or that Ray starts here. All of its machines must reach the source and
            the data set. The shards are the same.
        include: Globs over the paths below the source; only files that match one of them are packed. Empty: all files.
        exclude: Globs of files that are not packed.
        columns: Names of the columns of the source to pack, in this order; empty: all. Others are not read, where the
            format allows it.
        filter: Condition over the columns of the source, also those that are not packed; only records for which it is
            true are packed, such as pyarrow.compute.field("year") >= 2020.
        tokenize: Tokenizer of the text, which is replaced by the column "tokens": "bytes"; "tiktoken:gpt2"; the path of
            a tokenizer.json or of its folder; or a name on the Hugging Face Hub. No special tokens are added:
            `pack_sequences(eos=)` adds the end token. None: the text stays.
        text_column: Column of the text that is replaced.
        map: Function of a record of the source, as `dataset[i]` returns it, or "module:function". It returns a record
            (a dict), a list of records, or None to leave the record out. If it raises, the record is a bad one.
            `schema` states the types of the results; otherwise the first ones give them, and a column that is passed on
            keeps its type.
        resize: Greatest length of the shorter side of images, in pixels. A larger image becomes smaller, as by
            torchvision's Resize, and is encoded anew.
        encode: Encoding of images: "jpeg", "png" or "webp", with a quality, as in "jpeg:90", or without. None: that
            which they have. An image that has the encoding and the size is kept byte for byte.
        split: Parts and their shares, such as {"train": 0.9, "val": 0.1}. Each part is a data set at URL/NAME. A hash
            decides, so the sizes are only about the shares.
        split_by: Column of keys (integers, text or bytes) that are hashed, so that records with equal keys stay
            together, as `Dataset.split(by_hash=)` does. None: the record's number in its file.
        shuffle: Seed of a random order of all records. None: the order of the source.
        sort: Column by whose values the records are sorted, ascending, nulls last; those with equal values stay in the
            order of the source. A column of numbers, text, bytes or times.
        dedup: Whether only the first of equal records is packed; or a column: the first record of those whose values in
            it are equal. The source is read twice, so it must not be an iterator. Values are compared by a hash of
            their bytes.
        storage_options: Options of the data set's store.
        source_options: Options of the source's store.
        on_progress: Function called in this thread with a PackProgress from time to time.

    Returns:
        The committed version; with `split`, that of its first part. A UserWarning names files of the source that were
        skipped, such as dangling links.

    Raises:
        NotFound, CommitConflict, SchemaError, StoreError, TypeError, ValueError: See plan_pack() and run_pack().
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
        engine=engine,
        include=include,
        exclude=exclude,
        columns=columns,
        filter=filter,
        tokenize=tokenize,
        text_column=text_column,
        map=map,
        resize=resize,
        encode=encode,
        split=split,
        split_by=split_by,
        shuffle=shuffle,
        sort=sort,
        dedup=dedup,
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

    if plan.is_committed:
        logger.info("%s: packed before, from the same source with the same options", redact(plan.url))

    def warn(n_bad: int, report_at: str) -> None:
        warnings.warn(f"{n_bad:,} bad records were not packed; {report_at} lists them", stacklevel=4)

    def say(n_duplicates: int) -> None:
        logger.info("%s: duplicates were left out: %d", redact(plan.url), n_duplicates)

    return next(iter(run_pack(plan, on_progress, warn, say).values()))
