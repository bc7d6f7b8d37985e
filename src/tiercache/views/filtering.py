"""Evaluating a filter: the columns it names, shard by shard, in bounded memory; not the shards that cannot match."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.errors import SchemaError
from tiercache.shard.types import Kind
from tiercache.views.selection import Selection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.order import BlockTable
    from tiercache.shard.statistics import Facts
    from tiercache.shard.types import Column, Schema
    from tiercache.views.contract import Readable

    Runs = tuple[NDArray[np.int64], NDArray[np.int64]]

# Raw bytes of the blocks (all columns) whose named columns are in memory at a time, in each thread.
CHUNK_BYTES = 32 << 20
# Shards of a store are read side by side, for their time is round trips; evaluation itself takes what cores there are.
THREADS = 8

# Arrow takes casts for rising where they turn over, and NaN for a number among others: `~(x <= NaN)`, which is true,
# would rule out every shard.
_WEIGHED_WRONG = re.compile(r"\bnan\b|allow_int_overflow=true")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')

T = TypeVar("T")
R = TypeVar("R")


def matching(source: Readable, expression: pc.Expression) -> Selection:
    """Which records make an expression true (null is not true): their places as served.

    Raises:
        SchemaError: a column that is not there, an expression that cannot be evaluated over its columns or their
            values, or is no condition.
        CorruptShard, StoreError: as reading.
    """
    names = columns_of(source.stored_schema, expression)
    if not names:  # a constant; Arrow evaluates it over the rows of some column
        names = [source.schema.names[0]]
    scanned = source.scanning(names)
    shards = _may_match(scanned, expression, np.flatnonzero(scanned.shard_records).tolist())
    found = list(_ahead(lambda shard: _runs_of_shard(scanned, expression, shard), shards))
    starts, lengths = (np.concatenate([np.empty(0, np.int64), *(runs[i] for runs in found)]) for i in (0, 1))
    stored = Selection.of_runs(starts, lengths)
    listed = source.listed
    if listed is None:
        return stored
    keep = np.zeros(source.n_records, np.bool_)
    keep[stored.stored_numbers(np.arange(len(stored)))] = True
    return Selection.of(np.flatnonzero(keep[listed]))


def columns_of(schema: Schema, expression: pc.Expression) -> list[str]:
    """The columns of a schema that an expression names. Raises SchemaError as `matching`."""
    if re.search(r"\bFieldPath\(\d", _QUOTED.sub("", str(expression))):
        raise _cannot(schema, expression, "columns are named, pyarrow.compute.field('label'), not counted")
    empty = _empty(schema.columns)
    with _explained(schema, expression):
        _evaluate(empty, expression)
    return [name for name in schema.names if not _can_do_without(empty, expression, name)]


def _can_do_without(empty: pa.Table, expression: pc.Expression, name: str) -> bool:
    # Arrow does not say which fields an expression names: those without which it cannot be bound (0.1 ms each).
    try:
        _evaluate(empty.drop_columns([name]), expression)
    except pa.ArrowException:
        return False
    return True


@contextmanager
def _explained(schema: Schema, expression: pc.Expression) -> Iterator[None]:
    """What Arrow says against an expression, or against its values (a division by zero), as our error."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, TypeError) as error:
        raise _cannot(schema, expression, str(error)) from error


def _cannot(schema: Schema, expression: pc.Expression, said: str) -> SchemaError:
    unknown = re.search(r"No match for FieldRef\.Name\((.*?)\)", said)
    names = ", ".join(schema.names)
    if unknown is not None:
        message = f"filter: there is no such column; there are {names}"
        return SchemaError(message, column=unknown[1], expected=names, got=unknown[1])
    first_line = said.partition("\n")[0]
    message = f"filter: {expression} cannot be evaluated over the columns, or is no condition: {first_line}"
    return SchemaError(message, expected="an expression that is true or false", got=str(expression))


def _empty(columns: Iterable[Column]) -> pa.Table:
    columns = list(columns)
    return pa.table({c.name: pa.array([], c.storage_type) for c in columns})


def _evaluate(table: pa.Table, expression: pc.Expression) -> NDArray[np.bool_]:
    """bool[n]: for which rows it is true. Raises ArrowException; TypeError: it is no condition."""
    from pyarrow import acero

    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
            acero.Declaration("project", acero.ProjectNodeOptions([expression], ["found"])),
        ]
    )
    found = plan.to_table(use_threads=False)["found"]
    if not pa.types.is_boolean(found.type):
        raise TypeError(f"it gives {found.type}, not true or false")
    # Not to_numpy(): Arrow then imports pandas, if there is one, which takes 110 ms.
    flags = pc.fill_null(found, fill_value=False).cast(pa.uint8())
    parts = [np.frombuffer(c.buffers()[1], np.bool_, len(c), c.offset) for c in flags.chunks if len(c)]
    return np.concatenate([np.empty(0, np.bool_), *parts])


def _may_match(source: Readable, expression: pc.Expression, shards: Sequence[int]) -> list[int]:
    """The shards in which some record may match, by what the version says of each: least and greatest numbers.

    Arrow weighs the expression against what is known of a fragment before it would open its file; there are no files.
    Only integers are known well enough: a NaN is in nobody's least and greatest, and makes `!=` true.
    """
    # Here, and not above: it imports pandas, if there is one; 40 MB and 0.2 s of each process that only reads.
    import pyarrow.dataset as pds
    from pyarrow import fs

    numbers = {c.name: c for c in source.schema.columns if c.kind is Kind.SCALAR and pa.types.is_integer(c.arrow.type)}
    if not numbers or not shards or _WEIGHED_WRONG.search(_QUOTED.sub("", str(expression))):
        return list(shards)
    form, nowhere = pds.IpcFileFormat(), fs.LocalFileSystem()
    fragments = [
        form.make_fragment(str(shard), nowhere, partition_expression=_known(numbers, source.statistics(shard)))
        for shard in shards
    ]
    schema = _empty(source.schema.columns).schema
    weighed = pds.FileSystemDataset(fragments, schema, form, nowhere)
    try:
        return [int(fragment.path) for fragment in weighed.get_fragments(filter=expression)]
    except pa.ArrowInvalid:  # such as a limit beyond 2^63 weighed as a float: nothing is known, and nothing ruled out
        return list(shards)


def _known(numbers: dict[str, Column], facts: Facts) -> pc.Expression:
    """What is true of every record of a shard."""
    known = pc.scalar(True)
    for name, column in numbers.items():
        fact = facts.get(name, {})
        if "min" not in fact or "max" not in fact:
            continue
        field, kind = pc.field(name), column.arrow.type
        inside = (field >= pa.scalar(fact["min"], kind)) & (field <= pa.scalar(fact["max"], kind))
        known = known & (inside | field.is_null() if fact.get("nulls", 1) else inside)
    return known


def _runs_of_shard(source: Readable, expression: pc.Expression, shard: int) -> Runs:
    """(starts, lengths) of the matching records of a shard, as places in stored order."""
    (table,) = source.block_tables([shard])
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
        kept.append(matches + first[blocks[0]])  # blocks between them have no records of the source
    places = np.concatenate([np.empty(0, np.int64), *kept])
    heads = np.flatnonzero(np.r_[True, np.diff(places) != 1]) if len(places) else np.empty(0, np.int64)
    return places[heads], np.diff(np.r_[heads, len(places)])


def _rows(source: Readable, shard: int, blocks: NDArray[np.int64], table: BlockTable) -> NDArray[np.uint32]:
    """Rows of blocks of a shard that are the source's, one block after the other."""
    counts = table.records[blocks]
    block = np.repeat(np.arange(len(blocks), dtype=np.uint32), counts)
    row = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    shards = np.full(len(blocks), shard, np.int32)
    return source.stored_rows(shards, blocks.astype(np.int32), block, row.astype(np.uint32))


def _table(columns: Sequence[Column], blocks: Sequence[Sequence[pa.Array]]) -> pa.Table:
    def stored(array: pa.Array) -> pa.Array:
        # Compute functions know no extension types: of an image they see its bytes.
        return array.storage if isinstance(array.type, pa.BaseExtensionType) else array

    names = [column.name for column in columns]
    return pa.table(
        {name: pa.chunked_array([stored(block[i]) for block in blocks]) for i, name in enumerate(names)},
    )


def _chunks(table: BlockTable) -> Iterator[NDArray[np.int64]]:
    """Blocks with records of the source, some at a time: CHUNK_BYTES, at least one."""
    chosen = np.flatnonzero(table.records)
    begin = 0
    sums = np.cumsum(table.raw_bytes[chosen])
    while begin < len(chosen):
        done = int(sums[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(sums, done + CHUNK_BYTES, side="right")), begin + 1)
        yield chosen[begin:end]
        begin = end


def _ahead(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Work done on items by threads, in their order, a few ahead: what waits for its turn is bounded too."""
    if len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(min(THREADS, len(items)), "tiercache-filter") as pool:
        coming: deque[Future[R]] = deque()
        try:
            for item in items:
                coming.append(pool.submit(work, item))
                if len(coming) > 2 * THREADS:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
