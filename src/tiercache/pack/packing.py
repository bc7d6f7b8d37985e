"""Packs a source: parts into shards, in this process or several, then one commit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from secrets import token_hex
from typing import Any

from tiercache import config
from tiercache.errors import NotFound, SchemaError, StoreError
from tiercache.model import ShardInfo, parse_bytes
from tiercache.pack.files import LeftOut
from tiercache.pack.options import PackOptions, PackProgress
from tiercache.pack.plan import find_source, fitted, share_out
from tiercache.pack.processes import Report, run_in_processes
from tiercache.pack.source import Batch, Part, Source
from tiercache.shard.commit import commit, data_set_exists, find_latest, nothing_to_append_to
from tiercache.shard.types import Schema
from tiercache.shard.versions import Version
from tiercache.shard.writer import ShardOptions, ShardWriter, shard_key
from tiercache.store import MemoryStore, Store, open_store, redact

_SHOWN_LEFT_OUT = 5
_COMMITTING = "while it committed: look whether the version is there before you run the same command again"


@dataclass(frozen=True)
class PackPlan:
    """What packing will do.

    Nothing has been written. parent: the version that is appended to or overwritten, else None. left_out: files of the
    source that are not packed, although neither include nor exclude says so.
    """

    source: Source
    url: str
    options: PackOptions
    shares: tuple[tuple[Part, ...], ...]
    n_processes: int
    parent: Version | None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of source."""
        return sum(part.n_bytes for share in self.shares for part in share)


@dataclass(frozen=True)
class _Share:
    """One process's work: neighbouring parts, into shards of their own."""

    source: Source
    parts: tuple[Part, ...]
    url: str
    storage_options: Mapping[str, Any]
    shards: ShardOptions
    writer_id: str


def plan_pack(source: str | os.PathLike[str], url: str | os.PathLike[str], options: PackOptions) -> PackPlan:
    """Look at source and url, and decide what packing will do.

    Raises:
        NotFound: no file in the source, or no data set to append to.
        CommitConflict: a data set is there already (mode "create").
        SchemaError: files that cannot be packed together, or not into the data set that is appended to.
        ValueError: the kind of source cannot be told, or an option does not fit.
    """
    with closing(open_store(url, **options.storage_options)) as store:
        parent = find_latest(store)
        if options.mode == "create" and parent is not None:
            raise data_set_exists(store, parent)
        if options.mode == "append" and parent is None:
            raise nothing_to_append_to(store)
        jobs = options.jobs or config.available_cpus()
        if jobs > 1 and isinstance(store, MemoryStore):
            raise ValueError(f"{store.url}: lives in the memory of one process; pack it with jobs=1")
    there = parent.schema if parent is not None and options.mode == "append" else None
    found, left_out = find_source(source, options, classes=_classes(there))
    if there is not None:
        found = fitted(found, there)
    shares = share_out(found.parts, jobs, parse_bytes(options.shard_size))
    n_processes = min(jobs, max(len(shares), 1))
    return PackPlan(found, os.fspath(url), options, tuple(shares), n_processes, parent, tuple(left_out))


def run_pack(plan: PackPlan, on_progress: Callable[[PackProgress], None] | None = None) -> Version:
    """Write the shards, then commit them; until then no reader sees anything. on_progress is called in this thread.

    Left by an exception, Ctrl-C included, it deletes the shards that it has finished. A process that is killed leaves
    them: no version names them, and nothing needs to be cleaned up before packing again. Ctrl-C during the commit
    itself leaves them too, for they may belong to a version by then: the KeyboardInterrupt says so.

    Raises:
        SchemaError: a record that does not fit, naming where in the source it stands.
        CommitConflict: somebody else committed first.
        StoreError: of the source or of the data set.
    """
    options, progress = plan.options, PackProgress(0, 0, plan.total_bytes)

    def report(step: PackProgress) -> None:
        nonlocal progress
        n_records, n_bytes = progress.n_records + step.n_records, progress.n_bytes + step.n_bytes
        progress = replace(progress, n_records=n_records, n_bytes=min(n_bytes, plan.total_bytes))
        if on_progress is not None:
            on_progress(progress)

    tasks, is_committing = _tasks(plan), False
    try:
        with closing(open_store(plan.url, **options.storage_options)) as store:
            try:
                infos = _write_shares(plan, tasks, report)
                is_committing = True
            except BaseException:
                if not is_committing:
                    _delete_shards(store, tasks)
                raise
            return commit(store, infos, schema=plan.source.schema, mode=options.mode, parent=plan.parent)
    except KeyboardInterrupt as error:
        if is_committing:
            raise KeyboardInterrupt(_COMMITTING) from error
        raise


def _write_shares(plan: PackPlan, tasks: Sequence[_Share], report: Report) -> list[ShardInfo]:
    """All shards, in the order of the source."""
    finished: dict[int, list[ShardInfo]] = {}
    if plan.n_processes == 1:
        finished.update((i, write_share(task, report)) for i, task in enumerate(tasks))
    else:
        run_in_processes(write_share, tasks, plan.n_processes, report, finished.__setitem__)
    return [info for i in range(len(tasks)) for info in finished[i]]


def _tasks(plan: PackPlan) -> list[_Share]:
    options = plan.options
    shards = ShardOptions(
        shard_bytes=parse_bytes(options.shard_size),
        block_bytes=parse_bytes(options.block_size),
        compression=options.compression,
    )
    return [
        _Share(plan.source, parts, plan.url, options.storage_options, shards, token_hex(8)) for parts in plan.shares
    ]


def _delete_shards(store: Store, tasks: Iterable[_Share]) -> None:
    """Delete what was finished of shares; also by processes that were killed, or ended before anybody heard of it."""
    with suppress(StoreError):  # an unnamed shard does no harm, and the first error is what counts
        for task in tasks:
            for key in (shard_key(task.writer_id, number) for number in count()):
                try:
                    store.head(key)
                except NotFound:
                    break
                store.delete([key])


def write_share(share: _Share, report: Report) -> list[ShardInfo]:
    """Write one share's records as shards; nothing is left of them when it raises.

    report gets a PackProgress a batch.
    """
    with closing(open_store(share.url, **share.storage_options)) as store:
        n_records = 0
        with ShardWriter(store, share.source.schema, share.shards, writer_id=share.writer_id) as writer:
            for part in share.parts:
                for batch in share.source.read(part, share.shards.block_bytes):
                    _write(writer, batch, n_records)
                    n_records += batch.n_records
                    report(PackProgress(batch.n_records, batch.n_bytes, 0))
            return writer.finish()


def _write(writer: ShardWriter, batch: Batch, first_record: int) -> None:
    """Write a batch; where a record does not fit, the error says where in the source it stands."""
    try:
        writer.write_batch(batch.columns)
    except SchemaError as error:
        if error.record is None:
            raise
        text = error.message.removeprefix(f"column {error.column!r}, ").removeprefix(f"record {error.record}: ")
        facts = {name: fact for name, fact in error.facts.items() if name not in ("column", "record")}
        where = batch.place(error.record - first_record)
        raise SchemaError(f"{where}: {text}", column=error.column, **facts) from error


def _classes(schema: Schema | None) -> tuple[str, ...] | None:
    """The class names of the data set that is appended to, where it has any."""
    return next((c.classes for c in schema.columns if c.classes), None) if schema is not None else None


def pack(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    *,
    options: PackOptions | None = None,
    on_progress: Callable[[PackProgress], None] | None = None,
    **fields: Any,
) -> Version:
    """Pack a folder of images, Parquet files or JSON lines into a data set, in the order of the source.

    ::

        tiercache.pack("photos/", "s3://bucket/photos", jobs=4)
        tiercache.pack("part-*.parquet", "s3://bucket/table", schema={"image": tiercache.Image("jpeg")})

    Args:
        source: a file, folder, glob, or URL. Of a folder the files below it, but hidden ones, in the order of their
            paths.
        url: where the data set goes.
        options: how; fields: PackOptions's attributes by name, instead or in addition.
        on_progress: called in this thread now and then.

    Returns:
        The version that was committed. A UserWarning names files of the source that were left out, such as links that
        lead nowhere.

    Raises:
        NotFound, CommitConflict, SchemaError, ValueError: see plan_pack() and run_pack().
    """
    plan = plan_pack(source, url, replace(options or PackOptions(), **fields))
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
