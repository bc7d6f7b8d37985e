"""Scans of a source: record numbers and Arrow batches from end to end, and the evaluation of filters.

A filter reads the columns of its expression in bounded memory, and skips shards that cannot match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.data.selection import Selection, runs_of
from tiercache.errors import SchemaError
from tiercache.shard.schema import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.data.records import Records
    from tiercache.order import BlockSizes
    from tiercache.order.explicit import ServedOrder
    from tiercache.shard.format.statistics import Statistics
    from tiercache.shard.schema import Column, Schema


Scalar = TypeVar("Scalar", bound=np.generic)
T = TypeVar("T")

# Records per range of a source with an explicit order. Neighbours lie anywhere: within a range, each block is read
# once.
LISTED_RECORDS = 4096
# Records whose place in the order is computed at a time.
ORDER_RECORDS = 1 << 20


def spans(source: Records) -> Iterator[tuple[int, int]]:
    """Yield ranges of record numbers [start, stop), in order; one per block if the source is in stored order."""
    if not source.is_in_stored_order:
        for start in range(0, source.n_records, LISTED_RECORDS):
            yield start, min(start + LISTED_RECORDS, source.n_records)
        return
    for shard in np.flatnonzero(source.shard_records).tolist():
        start = int(source.first_record[shard])
        for n in source.block_sizes([shard])[0].records.tolist():
            if n:
                yield start, start + n
            start += n


def arrow_batches(source: Records) -> Iterator[pa.RecordBatch]:
    """Yield record batches in order. A run of records of one block refers to its memory; other batches are copies."""
    schema = source.schema.arrow
    if not source.is_in_stored_order:
        for start, stop in spans(source):
            yield pa.RecordBatch.from_arrays(source.take_arrow(np.arange(start, stop)), schema=schema)
        return
    for shard in np.flatnonzero(source.shard_records).tolist():
        (table,) = source.block_sizes([shard])
        for block in np.flatnonzero(table.records).tolist():
            arrays = source.arrays(shard, block)
            if not source.selects_all:
                rows = _rows(source, shard, np.array([block]), table)
                if bool((np.diff(rows.astype(np.int64)) == 1).all()):
                    arrays = [array.slice(int(rows[0]), len(rows)) for array in arrays]
                else:
                    arrays = [array.take(pa.array(rows)) for array in arrays]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


# Limit, per thread, of the raw bytes (all columns) of the blocks whose columns are in memory at a time.
CHUNK_BYTES = 32 << 20
# Number of shards read in parallel: their time is round trips. Evaluation uses the cores that are free.
THREADS = 8

# Expressions for which Arrow's pruning by statistics is wrong: it assumes that casts are monotonic even if they
# overflow, and it treats NaN like any number. `~(x <= NaN)`, which is true, would rule out every shard.
_WEIGHED_WRONG = re.compile(r"\bnan\b|allow_int_overflow=true")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def matching(source: Records, expression: pc.Expression) -> Selection:
    """Return which records make an expression true (null is not true), as a selection of served records.

    Raises SchemaError if a column does not exist, or the expression is not a condition over the columns and their
    values; ValueError for packed rows; CorruptShard and StoreError.
    """
    if source.is_packed:
        raise ValueError("packed rows cannot be filtered: filter the documents, and pack the result")
    names = columns_of(source.stored_schema, expression)
    if not names:  # a constant: Arrow needs some column to know the number of rows
        names = [source.schema.names[0]]
    scanned = source.for_scan(names)
    shards = _may_match(scanned, expression, np.flatnonzero(scanned.shard_records).tolist())
    with ThreadPoolExecutor(min(THREADS, max(len(shards), 1)), "tiercache-filter") as pool:
        found = list(pool.map(lambda shard: _matches_of_shard(scanned, expression, shard), shards))
    starts = np.concatenate([np.empty(0, np.int64), *(first for first, _ in found)])
    stored = Selection.of_runs(starts, np.concatenate([np.empty(0, np.int64), *(n for _, n in found)]))
    order = source.record_order
    if order is None:
        return stored
    keep = np.zeros(source.n_records, np.bool_)
    keep[stored.stored_numbers(np.arange(len(stored)))] = True
    return Selection.of(np.flatnonzero(in_served_order(keep, order)))


def in_served_order(values: NDArray[Scalar], order: ServedOrder) -> NDArray[Scalar]:
    """Return one value per record, given in stored order, in served order."""
    found = np.empty(len(order), values.dtype)
    for start in range(0, len(order), ORDER_RECORDS):  # an order that is a function is never stored whole
        found[start : start + ORDER_RECORDS] = values[order[start : start + ORDER_RECORDS]]
    return found


def map_column(
    source: Records, name: str, function: Callable[[pa.ChunkedArray], T], shards: Sequence[int] | None = None
) -> list[T]:
    """Return the function's results for the values of a column, in stored order; several threads call it.

    Each call gets the values of the source's records in some neighbouring blocks, as they are stored. The column need
    not be among the served ones.

    Args:
        source: Records that are read; those of a mixture are the stored records of its parts.
        name: Name of a column.
        function: Function of some values.
        shards: Numbers of the shards to read, rising. None: all that hold records of the source.

    Raises:
        SchemaError: There is no such column.
    """
    scanned = source.for_scan([name])

    def results_of(shard: int) -> list[T]:
        (table,) = scanned.block_sizes([shard])
        return [function(_values(scanned, shard, blocks, table)) for blocks in _chunks(table)]

    shards = np.flatnonzero(scanned.shard_records).tolist() if shards is None else shards
    with ThreadPoolExecutor(min(THREADS, max(len(shards), 1)), "tiercache-scan") as pool:
        return [result for results in pool.map(results_of, shards) for result in results]


def _values(source: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes) -> pa.ChunkedArray:
    """Return the values of the source's records in blocks of a shard; the source has one column."""
    arrays = [source.arrays(shard, block) for block in blocks.tolist()]
    values = _table(source.schema.columns, arrays).column(0)
    if source.selects_all:
        return values
    before = np.cumsum([0, *(len(columns[0]) for columns in arrays)])
    block = np.repeat(np.arange(len(blocks)), table.records[blocks])
    return values.take(pa.array(before[block] + _rows(source, shard, blocks, table)))


def columns_of(schema: Schema, expression: pc.Expression) -> list[str]:
    """Return the columns of a schema that an expression names. Raises SchemaError as `matching`."""
    if re.search(r"\bFieldPath\(\d", _QUOTED.sub("", str(expression))):
        raise _cannot(
            schema, expression, "name columns, as in pyarrow.compute.field('label'), instead of numbering them"
        )
    empty = _empty(schema.columns)
    with _explained(schema, expression):
        _evaluate(empty, expression)
    return [name for name in schema.names if not _can_do_without(empty, expression, name)]


def _can_do_without(empty: pa.Table, expression: pc.Expression, name: str) -> bool:
    # Arrow does not report which fields an expression names: they are those without which binding fails (0.1 ms each).
    try:
        _evaluate(empty.drop_columns([name]), expression)
    except pa.ArrowException:
        return False
    return True


@contextmanager
def _explained(schema: Schema, expression: pc.Expression) -> Iterator[None]:
    """Convert Arrow's errors about an expression or its values (a division by zero) into SchemaError."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, TypeError) as error:
        raise _cannot(schema, expression, str(error)) from error


def _cannot(schema: Schema, expression: pc.Expression, reason: str) -> SchemaError:
    unknown = re.search(r"No match for FieldRef\.Name\((.*?)\)", reason)
    names = ", ".join(schema.names)
    if unknown is not None:
        message = f"filter: there is no such column; there are {names}"
        return SchemaError(message, column=unknown[1], expected=names, got=unknown[1])
    first_line = reason.partition("\n")[0]
    message = f"filter: cannot evaluate {expression} as a condition over the columns: {first_line}"
    return SchemaError(message, expected="an expression that is true or false", got=str(expression))


def _empty(columns: Iterable[Column]) -> pa.Table:
    columns = list(columns)
    return pa.table({c.name: pa.array([], c.storage_type) for c in columns})


def _evaluate(table: pa.Table, expression: pc.Expression) -> NDArray[np.bool_]:
    """Return bool[n]: whether the expression is true for each row. Raises ArrowException, or TypeError."""
    from pyarrow import acero

    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
            acero.Declaration("project", acero.ProjectNodeOptions([expression], ["found"])),
        ]
    )
    found = plan.to_table(use_threads=False)["found"]
    if not pa.types.is_boolean(found.type):
        raise TypeError(f"its type is {found.type}, not bool")
    # Not to_numpy(): Arrow then imports pandas if it is installed, which takes 110 ms.
    flags = pc.fill_null(found, fill_value=False).cast(pa.uint8())
    parts = [np.frombuffer(c.buffers()[1], np.bool_, len(c), c.offset) for c in flags.chunks if len(c)]
    return np.concatenate([np.empty(0, np.bool_), *parts])


def _may_match(source: Records, expression: pc.Expression, shards: Sequence[int]) -> list[int]:
    """Return the shards in which a record may match, judged by the minimum and maximum of each column.

    Arrow evaluates the expression against the partition expression of a dataset fragment before it would open the
    fragment's file; there are no files here. Only integers are used: minimum and maximum of floats ignore NaN, which
    makes `!=` true.
    """
    # Imported here: pyarrow.dataset imports pandas if it is installed, 40 MB and 0.2 s in each process that only reads.
    import pyarrow.dataset as pds
    from pyarrow import fs

    numbers = {c.name: c for c in source.schema.columns if c.kind is Kind.SCALAR and pa.types.is_integer(c.arrow.type)}
    if not numbers or not shards or _WEIGHED_WRONG.search(_QUOTED.sub("", str(expression))):
        return list(shards)
    form, nowhere = pds.IpcFileFormat(), fs.LocalFileSystem()
    fragments = [
        form.make_fragment(str(shard), nowhere, partition_expression=_bounds_of(numbers, source.statistics(shard)))
        for shard in shards
    ]
    schema = _empty(source.schema.columns).schema
    weighed = pds.FileSystemDataset(fragments, schema, form, nowhere)
    try:
        return [int(fragment.path) for fragment in weighed.get_fragments(filter=expression)]
    except pa.ArrowInvalid:  # such as a bound beyond 2^63 compared as a float: rule out nothing
        return list(shards)


def _bounds_of(numbers: dict[str, Column], facts: Statistics) -> pc.Expression:
    """Return an expression that is true for every record of a shard."""
    bounds = pc.scalar(True)
    for name, column in numbers.items():
        fact = facts.get(name, {})
        if "min" not in fact or "max" not in fact:
            continue
        field, kind = pc.field(name), column.arrow.type
        inside = (field >= pa.scalar(fact["min"], kind)) & (field <= pa.scalar(fact["max"], kind))
        bounds = bounds & (inside | field.is_null() if fact.get("nulls", 1) else inside)
    return bounds


def _matches_of_shard(
    source: Records, expression: pc.Expression, shard: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (starts, lengths) of the runs of matching records of a shard, as record numbers in stored order."""
    (table,) = source.block_sizes([shard])
    first = np.r_[0, np.cumsum(table.records)] + source.first_record[shard]
    kept = []
    for blocks in _chunks(table):
        arrays = [source.arrays(shard, block) for block in blocks.tolist()]
        with _explained(source.schema, expression):
            found = _evaluate(_table(source.schema.columns, arrays), expression)
        rows = _rows(source, shard, blocks, table)
        before = np.cumsum([0, *(len(columns[0]) for columns in arrays)])
        block = np.repeat(np.arange(len(blocks)), table.records[blocks])
        matches = np.flatnonzero(found[before[block] + rows])
        kept.append(matches + first[blocks[0]])  # blocks in between hold no records of the source
    positions = np.concatenate([np.empty(0, np.int64), *kept])
    starts, first = runs_of(positions)
    return starts, np.diff(first)


def _rows(source: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes) -> NDArray[np.uint32]:
    """Return the rows of blocks of a shard that belong to the source, one block after the other."""
    counts = table.records[blocks]
    block = np.repeat(np.arange(len(blocks), dtype=np.uint32), counts)
    row = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    shards = np.full(len(blocks), shard, np.int32)
    return source.stored_rows(shards, blocks.astype(np.int32), block, row.astype(np.uint32))


def _table(columns: Sequence[Column], blocks: Sequence[Sequence[pa.Array]]) -> pa.Table:
    def stored(array: pa.Array) -> pa.Array:
        # Compute functions do not support extension types: they see the bytes of an image.
        return array.storage if isinstance(array.type, pa.BaseExtensionType) else array

    names = [column.name for column in columns]
    return pa.table(
        {name: pa.chunked_array([stored(block[i]) for block in blocks]) for i, name in enumerate(names)},
    )


def _chunks(table: BlockSizes) -> Iterator[NDArray[np.int64]]:
    """Yield blocks that hold records of the source, in chunks of CHUNK_BYTES or of one block."""
    chosen = np.flatnonzero(table.records)
    begin = 0
    sums = np.cumsum(table.raw_bytes[chosen])
    while begin < len(chosen):
        done = int(sums[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(sums, done + CHUNK_BYTES, side="right")), begin + 1)
        yield chosen[begin:end]
        begin = end
