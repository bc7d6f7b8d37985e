"""The verb head."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from tiercache.cli.opening import OpenDataSet, open_data_set, open_data_set_store
from tiercache.cli.options import Columns, Json, Quiet, StorageOptions, Url, Verbose, VersionNumber, parse_columns
from tiercache.cli.output import Output, count
from tiercache.cli.values import format_value, json_value
from tiercache.shard.read.shard_reader import ShardReader


def head(
    url: Url,
    n: Annotated[int, typer.Option("-n", min=1, metavar="N", help="Number of records to show.")] = 5,
    start: Annotated[
        int, typer.Option("--start", min=0, metavar="I", help="Index of the first record to show, counted from 0.")
    ] = 0,
    columns: Columns = None,
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Show some records of a data set.

    Images are shown as their size, arrays by their first elements. Only the needed bytes are read.
    """
    output = Output(as_json, quiet)
    with open_data_set_store(url, storage_option) as store:
        data_set = open_data_set(store, at)
        schema = data_set.version.schema
        chosen = list(schema.select(parse_columns(columns) or schema.names).names)
        n_shown = print_records(output, data_set, range(start, min(start + n, data_set.version.n_records)), chosen)
    facts = {"version": data_set.version.number, "shown": n_shown, "records": data_set.version.n_records}
    output.summary(facts, f"{n_shown} of {count(data_set.version.n_records, 'record')}")


def print_records(output: Output, data_set: OpenDataSet, rows: range, names: list[str]) -> int:
    """Print the records in rows; return the number of records printed."""
    first = data_set.shards.first_record
    n_shown = 0
    for shard in range(int(np.searchsorted(first, rows.start, side="right")) - 1, len(data_set.shards)):
        start, stop = max(rows.start, int(first[shard])), min(rows.stop, int(first[shard + 1]))
        if start >= stop:
            break
        _print_shard(output, data_set, (shard, range(start, stop)), names)
        n_shown += stop - start
    return n_shown


def _print_shard(output: Output, data_set: OpenDataSet, place: tuple[int, range], names: list[str]) -> None:
    shard, rows = place
    info = data_set.shards.info(shard)
    identity = info.identity(data_set.version.dataset_id)
    with ShardReader(data_set.store, info.name, info=info, identity=identity) as reader:
        indices = [reader.schema.index(name) for name in names]
        within = np.arange(rows.start, rows.stop, dtype=np.int64) - data_set.shards.first_record[shard]
        values = reader.take(within, indices)
    width = max(map(len, names))
    for i, row in enumerate(rows):
        record = {v.column.name: (v.column, v.record(i)) for v in values}
        if not output.as_json:
            lines = [f"  {name:{width}}  {format_value(*record[name])}" for name in names]
            typer.echo("\n".join([f"record {row}", *lines]))
        else:
            output.event("record", {"index": row, "record": {name: json_value(*record[name]) for name in names}})
