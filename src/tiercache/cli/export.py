"""The verb export."""

from __future__ import annotations

from contextlib import closing
from threading import Lock
from typing import Annotated

import typer

from tiercache import config
from tiercache.cli.opening import open_data_set, open_data_set_store
from tiercache.cli.options import (
    Columns,
    DryRun,
    Jobs,
    Json,
    Quiet,
    StorageOptions,
    Url,
    Verbose,
    VersionNumber,
    parse_columns,
    parse_storage_options,
)
from tiercache.cli.output import Advance, Output, count
from tiercache.errors import NotFound, StoreError
from tiercache.model import format_bytes
from tiercache.pack.export import Export, ExportOptions
from tiercache.store import Store, open_store, redact, split_url


def export(
    url: Url,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Output: one file that ends in .parquet, or a folder, which gets one file per shard."
        ),
    ],
    columns: Columns = None,
    at: VersionNumber = None,
    jobs: Jobs = 1,
    compression: Annotated[
        str, typer.Option(metavar="CODEC", help="Compression of the Parquet files, e.g. zstd, snappy or none.")
    ] = "zstd",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    storage_option: StorageOptions = None,
    target_option: Annotated[
        list[str] | None,
        typer.Option(
            "--target-option",
            metavar="KEY=VALUE",
            help="Option of the target's store, e.g. region=eu-central-1. May be repeated.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Write a data set as Parquet files with standard Arrow types. Images keep their encoding."""
    output = Output(as_json, quiet)
    options = ExportOptions(
        columns=parse_columns(columns),
        jobs=jobs or config.available_cpus(),
        overwrite=overwrite,
        compression=compression,
    )
    folder, key = split_url(target) if target.lower().endswith(".parquet") else (target, "")
    with (
        open_data_set_store(url, storage_option) as source,
        closing(open_store(folder, **parse_storage_options(target_option))) as sink,
    ):
        data_set = open_data_set(source, at)
        task = Export(source, data_set.version, sink, options)
        n_files = 1 if key else max(1, len(data_set.shards))
        if key and not overwrite:
            _refuse_existing(sink, key)
        facts = {"target": redact(target), "files": n_files, "records": data_set.version.n_records}
        text = f"{count(data_set.version.n_records, 'record')} to {redact(target)}, {count(n_files, 'file')}"
        if dry_run:
            for column in task.schema.columns:
                output.event("column", {"name": column.name, "type": str(column)}, f"{column.name}: {column}")
            output.summary(facts | {"dry_run": True}, f"would export {text}")
            return
        with output.byte_progress("exporting") as advance:
            on_progress = _Sum(advance, data_set.version.n_bytes).add
            n_records = task.to_file(key, on_progress) if key else task.to_folder(on_progress)
        facts |= {"records": n_records, "bytes_written": int(sink.counters["bytes_written"])}
        output.summary(facts, f"exported {text}, {format_bytes(sink.counters['bytes_written'])}")


def _refuse_existing(store: Store, key: str) -> None:
    """Raise StoreError if the file exists: before the export, not after it."""
    try:
        store.head(key)
    except NotFound:
        return
    raise StoreError("the file exists already; give --overwrite to replace it", url=f"{store.url}/{key}")


class _Sum:
    """Sum of the bytes that threads have exported. add() holds the lock, so the bar only moves forward."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._total, self._done = advance, total, 0
        self._lock = Lock()

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._done += n_bytes
            self._advance(self._done, self._total)
