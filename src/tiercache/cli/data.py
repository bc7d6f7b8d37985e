"""The verbs that read or write one data set: pack, info, head and export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
import typer

from tiercache.cli.common import (
    Columns,
    DryRun,
    EngineName,
    Exclude,
    Include,
    Jobs,
    Output,
    StorageOptions,
    Url,
    VersionNumber,
    argument,
    count,
    errors_name,
    flag,
    option,
    parse_columns,
    parse_size,
    parse_storage_options,
    printable,
    verb,
)
from tiercache.cli.expressions import parse_condition
from tiercache.data.dataset import Dataset
from tiercache.data.opened_version import OpenedVersion
from tiercache.model import format_bytes
from tiercache.packer.export import plan_export
from tiercache.packer.files import SkippedFile, selected
from tiercache.packer.pack import run_pack
from tiercache.packer.plan import PackOptions, plan_pack
from tiercache.packer.sources import SOURCE_KINDS
from tiercache.shard.schema import Column, Kind, UserType
from tiercache.shard.versions import ShardTable, Version, find_version, read_shards
from tiercache.store import Store, open_store, redact
from tiercache.store.placement import follow_placement


@dataclass(frozen=True)
class OpenDataSet:
    store: Store
    version: Version
    shards: ShardTable

    def select(self, include: Sequence[str] | None, exclude: Sequence[str] | None = None) -> list[int]:
        names = self.shards.names.to_pylist()
        return [i for i, name in enumerate(names) if selected(name, include or (), exclude or ())]


@contextmanager
def open_data_set_store(url: str, storage_options: Sequence[str] | None) -> Iterator[Store]:
    """Yield the store of a data set's URL, and close it at the end. It finds shards that were moved to other tiers."""
    options = parse_storage_options(storage_options)
    with closing(follow_placement(open_store(url, **options), options)) as store:
        yield store


def open_data_set(store: Store, at: str | None = None) -> OpenDataSet:
    version = find_version(store, at)
    return OpenDataSet(store, version, read_shards(store, version))


@contextmanager
def _served(url: str, at: str | None, storage_options: Sequence[str] | None) -> Iterator[Dataset]:
    """Yield the data set, or the data of another library, at a URL, past the cache; and close it at the end."""
    with closing(
        Dataset(url, version=at, cache=False, storage_options=parse_storage_options(storage_options))
    ) as found:
        yield found


@verb(after_ctrl_c="the same command continues, and keeps what is finished")
def pack(
    output: Output,
    source: Annotated[
        str, argument("SOURCE", "Input: a file, folder, glob or data set, as a path or a URL; or module:callable.")
    ],
    url: Url,
    kind: Annotated[
        str | None,
        option(
            "--kind",
            "KIND",
            f"Kind of the input, if file names do not say it: {', '.join(SOURCE_KINDS)}.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        option("--labels", "FILE", "Table of the labels of images or files: CSV, JSON lines or Parquet."),
    ] = None,
    label_pattern: Annotated[
        str | None,
        option("--label-pattern", "REGEX", "The class in a file's path, e.g. '(?P<label>[a-z]+)_[0-9]+'."),
    ] = None,
    check_images: Annotated[bool, flag("--check-images", "Decode each image, to find those damaged inside.")] = False,
    on_error: Annotated[
        str,
        option(
            "--on-error", "WHAT", "What a bad record does: stop, skip, or dead-letter (its bytes are in the report)."
        ),
    ] = "stop",
    report: Annotated[
        str | None, option("--report", "FILE", "Report of bad records as JSON lines; default: URL.bad.jsonl.")
    ] = None,
    column: Annotated[
        list[str] | None,
        option(
            "--column",
            "NAME=TYPE",
            "Type of a column, e.g. label=int or x=float32[3], as `info` prints it. May be repeated.",
        ),
    ] = None,
    mode: Annotated[
        str,
        option("--mode", "MODE", "create (a new data set), append (add records) or overwrite (replace all records)."),
    ] = "create",
    shard_size: Annotated[str, option("--shard-size", "SIZE", "Target size of a shard.")] = "128MiB",
    block_size: Annotated[
        str,
        option(
            "--block-size",
            "SIZE",
            "Target size of a block, uncompressed; a block is the unit of reading and shuffling.",
        ),
    ] = "1MiB",
    compression: Annotated[
        str, option("--compression", "CODEC", "Compression: auto, none, zstd or zstd:LEVEL.")
    ] = "auto",
    workers: Annotated[
        int, option("--workers -w", "N", "Number of processes; 0: one per CPU. The result is the same.", min=0)
    ] = 1,
    engine: EngineName = "process",
    include: Include = None,
    exclude: Exclude = None,
    columns: Columns = None,
    where: Annotated[
        str | None,
        option("--where", "CONDITION", 'Only records for which it is true, e.g. "year >= 2020 and label != 3".'),
    ] = None,
    tokenize: Annotated[
        str | None,
        option(
            "--tokenize", "NAME", "Store tokens instead of text: bytes, tiktoken:gpt2, a tokenizer.json, a Hub name."
        ),
    ] = None,
    text_column: Annotated[str, option("--text-column", "NAME", "Column of the text to tokenize.")] = "text",
    map: Annotated[  # noqa: A002 - the name of the option
        str | None,
        option("--map", "MODULE:FUNCTION", "Function of a record: returns a record, a list of records, or None."),
    ] = None,
    resize: Annotated[
        int | None,
        option("--resize", "N", "Make images smaller whose shorter side has more than N pixels.", min=1),
    ] = None,
    encode: Annotated[
        str | None,
        option("--encode", "HOW", "Encoding of images: jpeg:90, png, webp:80; images that have it are kept."),
    ] = None,
    split: Annotated[
        str | None,
        option("--split", "NAME=SHARE,...", "Parts, e.g. train=0.9,val=0.1, each a data set at URL/NAME."),
    ] = None,
    split_by: Annotated[
        str | None, option("--split-by", "NAME", "Column whose equal values stay in one part of --split.")
    ] = None,
    shuffle: Annotated[int | None, option("--shuffle", "SEED", "Write the records in a random order.")] = None,
    sort: Annotated[str | None, option("--sort", "NAME", "Sort the records by this column; nulls come last.")] = None,
    dedup: Annotated[bool, flag("--dedup", "Leave out records that are equal to an earlier one.")] = False,
    dedup_by: Annotated[
        str | None, option("--dedup-by", "NAME", "Leave out records whose value in a column an earlier one has.")
    ] = None,
    storage_option: StorageOptions = None,
    source_option: Annotated[
        list[str] | None,
        option(
            "--source-option", "KEY=VALUE", "Option of the source's store, e.g. region=eu-central-1. May be repeated."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Convert images, tables, text or any files into a data set.

    SOURCE is a folder of images, which may have one sub-folder per class, or of text, or names tables: Parquet, CSV,
    Feather, ORC or JSON lines; or data of other libraries: NumPy, TFRecord, MDS, LitData, Arrow, Megatron or
    WebDataset. After Ctrl-C or a kill, the same command continues.
    """
    with errors_name("--where"):
        condition = None if where is None else parse_condition(where)
    options = PackOptions(
        kind=kind,  # type: ignore[arg-type]  # PackOptions checks what the text is
        schema=parse_types(column) or None,
        labels=labels,
        label_pattern=label_pattern,
        check_images=check_images,
        on_error=on_error,  # type: ignore[arg-type]
        report=report,
        mode=mode,  # type: ignore[arg-type]
        shard_size=parse_size("--shard-size", shard_size),
        block_size=parse_size("--block-size", block_size),
        compression=compression,
        workers=workers,
        engine=engine,  # type: ignore[arg-type]
        include=include or (),
        exclude=exclude or (),
        columns=parse_columns(columns) or (),
        filter=condition,
        tokenize=tokenize,
        text_column=text_column,
        map=map,
        resize=resize,
        encode=encode,
        split=_parse_shares(split),
        split_by=split_by,
        shuffle=shuffle,
        sort=sort,
        dedup=dedup_by or dedup,
        storage_options=parse_storage_options(storage_option),
        source_options=parse_storage_options(source_option),
    )
    plan = plan_pack(source, url, options)
    _print_skipped(output, plan.skipped)
    target = redact(plan.url)
    if plan.is_committed and not output.quiet:
        text = "packed before, from the same source with the same options"
        text += "; --mode overwrite packs it again" if mode == "create" else ""
        output.event("unchanged", {"url": target}, f"{target}: {text}")
    if dry_run:
        for one in plan.source.schema.columns:
            output.event("column", {"name": one.name, "type": str(one)}, f"{one.name}: {one}")
        facts = {"url": target, "mode": mode, "bytes": plan.total_bytes, "workers": plan.n_workers, "dry_run": True}
        how = "as tasks of Ray" if engine == "ray" else f"in {count(plan.n_workers, 'process', 'processes')}"
        would = f"would {mode} {target} from {format_bytes(plan.total_bytes)} of source, {how}"
        output.summary(facts, f"would leave {target} as it is" if plan.is_committed else would)
        return
    if plan.finished and not output.quiet:
        facts = {"finished": len(plan.finished), "tasks": len(plan.tasks)}
        output.event("continued", facts, f"continues: {len(plan.finished)} of {len(plan.tasks)} tasks are finished")
    elif plan.is_begun and options.has_passes and not output.quiet:
        output.event("continued", {}, "continues: a packing of these records was begun, and not finished")

    def on_duplicates(n: int) -> None:
        output.event("duplicates", {"records": n}, f"{count(n, 'duplicate was', 'duplicates were')} left out")

    def on_bad(n_bad: int, report_at: str) -> None:
        text = f"{count(n_bad, 'bad record was', 'bad records were')} not packed: {report_at} lists them"
        output.event("bad_records", {"records": n_bad, "report": report_at}, text)

    with output.byte_progress("packing") as advance:
        versions = run_pack(plan, lambda done: advance(done.n_bytes, done.total_bytes), on_bad, on_duplicates)
    for part, version in versions.items():
        where = f"{target.rstrip('/')}/{part}" if part else target
        facts = {name: value for name, value in version_facts(version).items() if name not in ("kind", "created")}
        text = f"{count(version.n_records, 'record')} in {count(version.n_shards, 'shard')}"
        text += f", {format_bytes(version.n_bytes)}"
        output.summary({"url": where, **facts}, f"{where}: version {version.number} has {text}")


def _parse_shares(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    shares: dict[str, float] = {}
    for pair in text.split(","):
        name, _, share = (one.strip() for one in pair.partition("="))
        try:
            if name in shares:
                raise ValueError(f"{name!r} is named twice")
            shares[name] = float(share)
        except ValueError as error:
            raise ValueError(f"--split takes parts and their shares, such as train=0.9,val=0.1: {error}") from None
    return shares


_MOST_SKIPPED = 20


def _print_skipped(output: Output, skipped: Sequence[SkippedFile]) -> None:
    for i, one in enumerate(skipped):
        text = f"left out: {one.path}: {one.reason}" if i < _MOST_SKIPPED else None
        output.event("left_out", {"path": one.path, "reason": one.reason}, text)
    if len(skipped) > _MOST_SKIPPED and not output.as_json:
        output.event("left_out", {}, f"left out: {len(skipped) - _MOST_SKIPPED:,} more (--json names all)")


def parse_types(pairs: Sequence[str] | None) -> dict[str, UserType]:
    types: dict[str, UserType] = {}
    for pair in pairs or ():
        name, found, text = pair.rpartition("=")
        if not found or not name:
            raise ValueError(f"--column takes NAME=TYPE, e.g. label=int64 or caption=str?, got {pair!r}")
        types[name] = str(Column.of(name, text))
    return types


@verb(after_ctrl_c="nothing was changed; run the same command again")
def info(
    output: Output,
    url: Url,
    shards: Annotated[bool, flag("--shards", "List the shards, in record order.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
) -> None:
    """Show a data set's version, size and columns, or list its shards.

    URL may also be data of another library that is read in place, such as Parquet, WebDataset or MDS.
    --include and --exclude select shards to list.
    """
    with _served(url, at, storage_option) as dataset:
        leaf = cast("OpenedVersion", dataset.__tiercache__().source.leaves[0])
        data_set = OpenDataSet(leaf.store, leaf.manifest, leaf.table)
    if shards or include or exclude:
        _list_shards(output, data_set, data_set.select(include, exclude))
    else:
        _show_info(output, data_set)


def _list_shards(output: Output, data_set: OpenDataSet, numbers: Sequence[int]) -> None:
    chosen = [data_set.shards.info(i) for i in numbers]
    rows, texts = [], []
    for i in chosen:
        facts = {"name": i.name, "id": i.shard_id, "records": i.n_records, "bytes": i.n_bytes, "crc32c": i.crc32c}
        rows.append(facts)
        size = format_bytes(i.n_bytes)
        texts.append({"shard": i.name, "records": f"{i.n_records:,}", "size": size, "id": i.shard_id})
    output.table("shard", rows, texts)
    n_records, n_bytes = sum(i.n_records for i in chosen), sum(i.n_bytes for i in chosen)
    facts = {"version": data_set.version.number, "shards": len(chosen), "records": n_records, "bytes": n_bytes}
    text = f"{count(len(chosen), 'shard')}, {count(n_records, 'record')}, {format_bytes(n_bytes)}"
    output.summary(facts, f"version {data_set.version.number}: {text}")


def version_facts(version: Version) -> dict[str, Any]:
    return {
        "version": version.number,
        "kind": version.kind,
        "created": version.created,
        "records": version.n_records,
        "shards": version.n_shards,
        "bytes": version.n_bytes,
        "fingerprint": version.fingerprint,
    }


def _show_info(output: Output, data_set: OpenDataSet) -> None:
    version = data_set.version
    columns = [
        {"name": column.name, "type": str(column)} | ({"classes": list(column.classes)} if column.classes else {})
        for column in version.schema.columns
    ]
    facts: dict[str, Any] = {"url": data_set.store.url, "dataset_id": version.dataset_id} | version_facts(version)
    facts["shards"] = len(data_set.shards)  # the version of a layout has no segments, which list shards
    if output.as_json:
        output.event("data_set", facts | {"columns": columns})
        return
    for name, value in (facts | {"bytes": format_bytes(version.n_bytes), "records": f"{version.n_records:,}"}).items():
        typer.echo(f"{name.replace('_', ' '):12} {value}")
    typer.echo("columns")
    for column in version.schema.columns:
        classes = column.classes or ()
        counted = f", {len(classes)} classes" if classes else ""
        typer.echo(printable(f"  {column.name}: {column}{counted}"))
        for number, class_name in enumerate(classes):
            typer.echo(printable(f"  {number:>{2 + len(str(len(classes) - 1))}}  {class_name}"))


@verb(after_ctrl_c="nothing was changed; run the same command again")
def head(
    output: Output,
    url: Url,
    n: Annotated[int, option("-n", "N", "Number of records to show.", min=1)] = 5,
    start: Annotated[int, option("--start", "I", "Index of the first record to show, counted from 0.", min=0)] = 0,
    columns: Columns = None,
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
) -> None:
    """Show some records of a data set.

    URL may also be data of another library that is read in place, such as Parquet, WebDataset or MDS.
    Images are shown by their size, arrays by their first elements. Only the needed bytes are read.
    """
    with _served(url, at, storage_option) as dataset:
        if chosen := parse_columns(columns):
            dataset = dataset.select_columns(chosen)
        n_records = len(dataset)
        rows = np.arange(start, max(start, min(start + n, n_records)))
        values = dataset.__tiercache__().source.values(rows)
        version = dataset.version
    width = max(len(v.column.name) for v in values)
    for i, row in enumerate(rows.tolist()):
        record = {v.column.name: (v.column, v.record(i)) for v in values}
        if output.as_json:
            output.event("record", {"index": row, "record": {name: json_value(*one) for name, one in record.items()}})
        else:
            lines = [f"  {name:{width}}  {format_value(*one)}" for name, one in record.items()]
            typer.echo("\n".join([f"record {row}", *lines]))
    facts = {"version": version, "shown": len(rows), "records": n_records}
    output.summary(facts, f"{len(rows)} of {count(n_records, 'record')}")


_TEXT_CHARACTERS = 70
_ELEMENTS = 6


def format_value(column: Column, value: Any) -> str:
    """Return one line for people: "<jpeg 12.3 KiB>" for images and bytes, first elements of arrays, long texts cut."""
    if value is None:
        return "null"
    if column.kind in (Kind.IMAGE, Kind.BYTES):
        return f"<{column.encoding or column.kind} {format_bytes(len(value))}>"
    if column.kind is Kind.STR:
        return shorten(json.dumps(value, ensure_ascii=False))
    if column.shape:
        array = _as_numpy(value)
        first = ", ".join(str(element) for element in array.reshape(-1)[:_ELEMENTS].tolist())
        more = ", ..." if array.size > _ELEMENTS else ""
        return f"{column.dtype}{list(array.shape)} [{first}{more}]"
    if column.kind in (Kind.SCALAR, Kind.BOOL):
        number = _as_numpy(value).item()
        name = f" ({column.classes[number]})" if column.classes and 0 <= number < len(column.classes) else ""
        return f"{number}{name}"
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


def json_value(column: Column, value: Any) -> Any:
    if value is None:
        return None
    if column.kind in (Kind.IMAGE, Kind.BYTES):
        return format_value(column, value)
    if column.shape or column.kind in (Kind.SCALAR, Kind.BOOL):
        return _as_numpy(value).tolist()
    return value


def _as_numpy(value: Any) -> np.ndarray[Any, Any]:
    """Return an array, a number or a torch tensor as a numpy array; bfloat16 is widened to float32."""
    if hasattr(value, "detach"):
        value = value.detach().float().numpy()
    return np.asarray(value)


def shorten(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 3] + "..."


@verb(after_ctrl_c="no incomplete file was left behind; run the same command again with --overwrite")
def export(
    output: Output,
    url: Url,
    target: Annotated[
        str, argument("TARGET", "Output: one file, such as photos.parquet, or a folder, which gets one file per shard.")
    ],
    format: Annotated[  # noqa: A002 - the name of the option
        str | None,
        option(
            "--format",
            "FORMAT",
            "parquet, arrow, webdataset, mds or jsonl; default: by the name of the file, or parquet.",
        ),
    ] = None,
    columns: Columns = None,
    at: VersionNumber = None,
    jobs: Jobs = 1,
    compression: Annotated[
        str | None,
        option("--compression", "CODEC", "Compression of Parquet or Arrow; default: zstd for Parquet, none for Arrow."),
    ] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace existing files.")] = False,
    storage_option: StorageOptions = None,
    target_option: Annotated[
        list[str] | None,
        option(
            "--target-option", "KEY=VALUE", "Option of the target's store, e.g. region=eu-central-1. May be repeated."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write a data set as Parquet, Arrow, WebDataset, MDS or JSON lines.

    Images keep their encoding. `pack` makes an equal data set of the files.
    """
    with _served(url, at, storage_option) as dataset:
        if chosen := parse_columns(columns):
            dataset = dataset.select_columns(chosen)
        plan = plan_export(dataset, target, format, jobs, overwrite, compression)
        n = len(dataset)
        facts: dict[str, Any] = {"target": redact(target), "format": plan.format, "records": n}
        text = f"{count(n, 'record')} to {redact(target)} as {plan.format}"
        if dry_run:
            for column in plan.schema.columns:
                output.event("column", {"name": column.name, "type": str(column)}, f"{column.name}: {column}")
            output.summary(facts | {"dry_run": True}, f"would export {text}")
            return
        with (
            closing(open_store(plan.folder, **parse_storage_options(target_option))) as sink,
            output.count_progress("exporting") as advance,
        ):
            files = plan.write(sink, lambda done: advance(done, n))
        facts |= {"files": len(files), "bytes_written": int(sink.counters["bytes_written"])}
        written = format_bytes(sink.counters["bytes_written"])
        output.summary(facts, f"exported {text}, {count(len(files), 'file')}, {written}")
