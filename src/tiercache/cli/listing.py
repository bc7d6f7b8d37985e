"""The verbs ls and info."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tiercache.cli.opening import OpenDataSet, open_data_set, open_data_set_store
from tiercache.cli.options import Exclude, Include, Json, Quiet, StorageOptions, Url, Verbose, VersionNumber
from tiercache.cli.output import Output, count, printable
from tiercache.model import format_bytes
from tiercache.shard.versions.manifest import Version as DataSetVersion
from tiercache.shard.versions.manifest import list_versions, read_version
from tiercache.store import Store


def ls(
    url: Url,
    versions: Annotated[
        bool, typer.Option("--versions", help="List the versions of the data set instead of its shards.")
    ] = False,
    at: VersionNumber = None,
    include: Include = None,
    exclude: Exclude = None,
    storage_option: StorageOptions = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """List the shards of a data set in record order, or its versions."""
    output = Output(as_json, quiet)
    with open_data_set_store(url, storage_option) as store:
        if versions:
            _list_versions(output, store)
            return
        data_set = open_data_set(store, at)
    chosen = [data_set.shards.info(i) for i in data_set.select(include, exclude)]
    rows = [
        {"name": i.name, "id": i.shard_id, "records": i.n_records, "bytes": i.n_bytes, "crc32c": i.crc32c}
        for i in chosen
    ]
    texts = [
        {"shard": i.name, "records": f"{i.n_records:,}", "size": format_bytes(i.n_bytes), "id": i.shard_id}
        for i in chosen
    ]
    output.table("shard", rows, texts)
    n_records, n_bytes = sum(i.n_records for i in chosen), sum(i.n_bytes for i in chosen)
    facts = {"version": data_set.version.number, "shards": len(chosen), "records": n_records, "bytes": n_bytes}
    text = f"{count(len(chosen), 'shard')}, {count(n_records, 'record')}, {format_bytes(n_bytes)}"
    output.summary(facts, f"version {data_set.version.number}: {text}")


def _list_versions(output: Output, store: Store) -> None:
    versions = [read_version(store, number) for number in list_versions(store)]
    texts = [
        {
            "version": str(v.number),
            "kind": v.kind,
            "created": v.created,
            "records": f"{v.n_records:,}",
            "shards": f"{v.n_shards:,}",
            "size": format_bytes(v.n_bytes),
        }
        for v in versions
    ]
    output.table("version", [_version_facts(v) for v in versions], texts)
    output.summary({"versions": len(versions)}, count(len(versions), "version"))


def _version_facts(version: DataSetVersion) -> dict[str, Any]:
    return {
        "version": version.number,
        "kind": version.kind,
        "created": version.created,
        "records": version.n_records,
        "shards": version.n_shards,
        "bytes": version.n_bytes,
        "fingerprint": version.fingerprint,
    }


def info(
    url: Url,
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Show a data set's version, size, columns and class names."""
    output = Output(as_json, quiet)
    with open_data_set_store(url, storage_option) as store:
        data_set = open_data_set(store, at)
    facts = info_of(data_set)
    if as_json:
        output.event("data_set", facts)
        return
    sizes = {"bytes": format_bytes(data_set.version.n_bytes), "records": f"{data_set.version.n_records:,}"}
    for name, value in facts.items():
        if name == "columns":
            typer.echo("columns")
            for column in value:
                classes = column.get("classes", [])
                counted = f", {len(classes)} classes" if classes else ""
                typer.echo(printable(f"  {column['name']}: {column['type']}{counted}"))
                for number, class_name in enumerate(classes):
                    typer.echo(printable(f"  {number:>{2 + len(str(len(classes) - 1))}}  {class_name}"))
        else:
            typer.echo(f"{name.replace('_', ' '):12} {sizes.get(name, value)}")


def info_of(data_set: OpenDataSet) -> dict[str, Any]:
    """Return all facts about a version."""
    columns: list[dict[str, Any]] = []
    for column in data_set.version.schema.columns:
        columns.append({"name": column.name, "type": str(column)})
        if column.classes:
            columns[-1]["classes"] = list(column.classes)
    identity = {"url": data_set.store.url, "dataset_id": data_set.version.dataset_id}
    return identity | _version_facts(data_set.version) | {"columns": columns}
