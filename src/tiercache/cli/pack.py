"""The verb pack."""

from __future__ import annotations

from typing import Annotated

import typer

from tiercache.cli.options import (
    DryRun,
    Exclude,
    Include,
    Json,
    Quiet,
    StorageOptions,
    Url,
    Verbose,
    parse_storage_options,
    parse_types,
)
from tiercache.cli.output import Output, count
from tiercache.model import format_bytes
from tiercache.pack import PackOptions, PackPlan, plan_pack, run_pack
from tiercache.shard.versions.manifest import Version
from tiercache.store import redact

_MOST_LEFT_OUT = 20


def pack(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Input: a file, a folder or a glob, as a path or a URL.")
    ],
    url: Url,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Kind of the input: images, parquet or jsonl; default: from the file names."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TYPE", help="Type of a column, e.g. label=int64; see `tiercache info`. May be repeated."
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE", help="create (a new data set), append (add records) or overwrite (replace all records)."
        ),
    ] = "create",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Target size of a shard.")] = "128MiB",
    block_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Target size of a block, uncompressed; a block is the unit of reading and shuffling."
        ),
    ] = "1MiB",
    compression: Annotated[
        str, typer.Option(metavar="CODEC", help="Compression: auto, none, zstd or zstd:LEVEL.")
    ] = "auto",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Number of processes; 0: one per CPU.")] = 1,
    include: Include = None,
    exclude: Exclude = None,
    storage_option: StorageOptions = None,
    source_option: Annotated[
        list[str] | None,
        typer.Option(
            "--source-option",
            metavar="KEY=VALUE",
            help="Option of the source's store, e.g. region=eu-central-1. May be repeated.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Convert images, Parquet files or JSON lines into a data set.

    SOURCE is a folder of images with one sub-folder per class, or names Parquet files or JSON lines. An interrupted run
    commits nothing.
    """
    options = PackOptions(
        kind=kind,  # type: ignore[arg-type]  # PackOptions checks what the text is
        schema=parse_types(column) or None,
        mode=mode,  # type: ignore[arg-type]
        shard_size=shard_size,
        block_size=block_size,
        compression=compression,
        jobs=jobs,
        include=include or (),
        exclude=exclude or (),
        storage_options=parse_storage_options(storage_option),
        source_options=parse_storage_options(source_option),
    )
    output = Output(as_json, quiet)
    plan = plan_pack(source, url, options)
    _print_left_out(output, plan)
    if dry_run:
        _print_plan(output, plan)
        return
    version = None
    try:
        with output.byte_progress("packing") as advance:
            version = run_pack(plan, lambda done: advance(done.n_bytes, done.total_bytes))
        _print_version(output, redact(url), version)
    except KeyboardInterrupt as error:
        if version is None:
            raise
        raise KeyboardInterrupt(f"version {version.number} is committed and complete") from error


def _print_version(output: Output, url: str, version: Version) -> None:
    facts = {
        "url": url,
        "version": version.number,
        "records": version.n_records,
        "shards": version.n_shards,
        "bytes": version.n_bytes,
        "fingerprint": version.fingerprint,
    }
    text = (
        f"{count(version.n_records, 'record')} in {count(version.n_shards, 'shard')}, {format_bytes(version.n_bytes)}"
    )
    output.summary(facts, f"{url}: version {version.number} has {text}")


def _print_left_out(output: Output, plan: PackPlan) -> None:
    """Print the files that are not packed, with the reason: all of them as JSON, the first 20 for people."""
    for i, one in enumerate(plan.left_out):
        text = f"left out: {one.path}: {one.reason}" if i < _MOST_LEFT_OUT else None
        output.event("left_out", {"path": one.path, "reason": one.reason}, text)
    if len(plan.left_out) > _MOST_LEFT_OUT and not output.as_json:
        output.event("left_out", {}, f"left out: {len(plan.left_out) - _MOST_LEFT_OUT:,} more (--json names all)")


def _print_plan(output: Output, plan: PackPlan) -> None:
    for column in plan.source.schema.columns:
        output.event("column", {"name": column.name, "type": str(column)}, f"{column.name}: {column}")
    mode, url, processes = plan.options.mode, redact(plan.url), count(plan.n_processes, "process", "processes")
    facts = {"url": url, "mode": mode, "bytes": plan.total_bytes, "processes": plan.n_processes, "dry_run": True}
    output.summary(facts, f"would {mode} {url} from {format_bytes(plan.total_bytes)} of source, in {processes}")
