"""Scans of records: Arrow batches from end to end, filters, splits, and the counts of classes.

A scan reads only the columns that it needs, in bounded memory.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.data.records import JoinNode, Node, Records, Selection, Step, runs_of, shuffled_order
from tiercache.errors import SchemaError
from tiercache.order.epoch_order import derive_key
from tiercache.order.explicit import ServedOrder
from tiercache.order.mixture import exact_weight
from tiercache.order.window import BlockSizes
from tiercache.shard.conversion import arrow_to_numpy
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.shard.values import join_arrow
from tiercache.shard.versions import as_arrow
from tiercache.store.remote import call_threads

Scalar = TypeVar("Scalar", bound=np.generic)
T = TypeVar("T")

# Records per range of a source with an explicit order. Neighbours lie anywhere: within a range, each block is read
# once.
LISTED_RECORDS = 4096
# Records whose place in the order is computed at a time.
ORDER_RECORDS = 1 << 20
# Limit, per thread, of the raw bytes (all columns) of the blocks whose columns are in memory at a time.
CHUNK_BYTES = 32 << 20
# Number of shards read in parallel: their time is round trips. Evaluation uses the cores that are free.
THREADS = 8

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
# Fractions such as 1/3 are given as floats: their sum may differ from 1 by as much.
_SUM_TOLERANCE = Fraction(1, 10**6)
_MOST_PARTS = 1 << 16
_INTEGERS = (Kind.SCALAR,)
_CLASSES = (*_INTEGERS, Kind.BOOL, Kind.STR)


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
    for _, read in arrow_parts(source):
        yield from read()


def arrow_parts(source: Records) -> list[tuple[int, Callable[[], Iterator[pa.RecordBatch]]]]:
    """Return for each shard the number of its first record, and a function that yields its records in batches.

    Of a source with an explicit order, a part is a run of records, and there are as many as shards. Raises ValueError
    for packed rows.
    """
    if source.is_packed:
        raise ValueError("packed rows have no Arrow form: convert the documents, or make arrays of dataset[...]")
    shards = np.flatnonzero(source.shard_records).tolist()
    if source.is_in_stored_order:
        return [(int(source.first_record[shard]), partial(_stored_batches, source, shard)) for shard in shards]
    bounds = np.linspace(0, source.n_records, max(1, len(shards)) + 1).astype(np.int64).tolist()
    return [(start, partial(_listed_batches, source, start, stop)) for start, stop in pairwise(bounds) if start < stop]


def _listed_batches(source: Records, first: int, end: int) -> Iterator[pa.RecordBatch]:
    for start in range(first, end, LISTED_RECORDS):
        parts, positions = [], []
        for shard, block, where, rows in source.places(np.arange(start, min(start + LISTED_RECORDS, end))):
            positions.append(where)
            parts.append([array.take(as_arrow(rows)) for array in source.arrays(shard, block)])
        yield pa.RecordBatch.from_arrays(join_arrow(parts, positions, source.schema), schema=source.schema.arrow)


def _stored_batches(source: Records, shard: int) -> Iterator[pa.RecordBatch]:
    (table,) = source.block_sizes([shard])
    for block in np.flatnonzero(table.records).tolist():
        arrays = source.arrays(shard, block)
        if source.selection is not None:
            chosen = _rows(source, shard, np.array([block]), table)
            if bool((np.diff(chosen.astype(np.int64)) == 1).all()):
                arrays = [array.slice(int(chosen[0]), len(chosen)) for array in arrays]
            else:
                arrays = [array.take(pa.array(chosen)) for array in arrays]
        yield pa.RecordBatch.from_arrays(arrays, schema=source.schema.arrow)


@dataclass(frozen=True, slots=True)
class FilterStep(Step):
    expression: pc.Expression
    selects_by_place: ClassVar[bool] = False

    def choose(self, records: Records) -> Selection:
        """See Step.choose. Raises SchemaError for an unknown column, and the errors of reading."""
        return matching(records, self.expression)

    def __str__(self) -> str:
        return f"filter({self.expression})"

    def __reduce__(self) -> tuple[Any, ...]:
        # 0.6 KB instead of 2.2 KB, most of which are zeros.
        return _filter, (zlib.compress(pickle.dumps(self.expression), 9),)


def _filter(compressed: bytes) -> FilterStep:
    return FilterStep(pickle.loads(zlib.decompress(compressed)))  # noqa: S301 -- part of a pickle itself


def matching(source: Records, expression: pc.Expression) -> Selection:
    """Return which records make an expression true (null is not true), as a selection of served records.

    Raises SchemaError if the expression is not a condition over the columns and their values; ValueError.
    """
    if source.is_packed:
        raise ValueError("packed rows cannot be filtered: filter the documents, and pack the result")
    names = columns_of(source.stored_schema, expression)
    if not names:  # a constant: Arrow needs some column to know the number of rows
        names = [source.schema.names[0]]

    def matches_of(table: pa.Table) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        with arrow_errors_as_schema_errors(source.stored_schema, expression):
            flags = evaluate(table, expression)
        starts, first = runs_of(np.flatnonzero(flags))
        return len(flags), starts, np.diff(first)

    found = map_tables(source, names, matches_of)
    bases = np.cumsum([0, *(n for n, _, _ in found)]).tolist()
    starts = [first + base for (_, first, _), base in zip(found, bases, strict=False)]
    lengths = [n for _, _, n in found]
    nothing = np.empty(0, np.int64)
    stored = Selection.of_runs(np.concatenate([nothing, *starts]), np.concatenate([nothing, *lengths]))
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


def map_tables(source: Records, names: Sequence[str], function: Callable[[pa.Table], T]) -> list[T]:
    """Return the function's results for tables of stored columns, in stored order; several threads call it.

    Each table has the source's records in some neighbouring blocks. Those of a mixture are those of its parts.
    """
    scanned = source.for_scan(names)

    def results_of(shard: int) -> list[T]:
        (table,) = scanned.block_sizes([shard])
        return [function(_table(scanned, shard, blocks, table)) for blocks in chunks_of(table)]

    shards = np.flatnonzero(scanned.shard_records).tolist()
    with call_threads(min(THREADS, max(len(shards), 1)), "tiercache-scan") as pool:
        return [result for results in pool.map(results_of, shards) for result in results]


def _table(source: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes) -> pa.Table:
    arrays = [source.arrays(shard, block) for block in blocks.tolist()]
    found = storage_table(source.schema.names, arrays)
    if source.selection is None:
        return found
    before = np.cumsum([0, *(len(columns[0]) for columns in arrays)])
    block = np.repeat(np.arange(len(blocks)), table.records[blocks])
    return found.take(pa.array(before[block] + _rows(source, shard, blocks, table)))


def storage_table(names: Sequence[str], blocks: Sequence[Sequence[pa.Array]]) -> pa.Table:
    """Return the columns with these names of some blocks, given by block, for `evaluate`."""
    # Compute functions do not support extension types: they see the bytes of an image.
    stored = [[one.storage if isinstance(one.type, pa.BaseExtensionType) else one for one in block] for block in blocks]
    return pa.table({name: pa.chunked_array([block[i] for block in stored]) for i, name in enumerate(names)})


def columns_of(schema: Schema, expression: pc.Expression) -> list[str]:
    """Return the columns of a schema that an expression names. Raises SchemaError as `matching`."""
    if re.search(r"\bFieldPath\(\d", _QUOTED.sub("", str(expression))):
        raise _cannot(
            schema, expression, "name columns, as in pyarrow.compute.field('label'), instead of numbering them"
        )
    empty = pa.table({column.name: pa.array([], column.storage_type) for column in schema.columns})
    with arrow_errors_as_schema_errors(schema, expression):
        evaluate(empty, expression)
    return [name for name in schema.names if not _can_do_without(empty, expression, name)]


def _can_do_without(empty: pa.Table, expression: pc.Expression, name: str) -> bool:
    # Arrow does not report which fields an expression names: they are those without which binding fails (0.1 ms each).
    try:
        evaluate(empty.drop_columns([name]), expression)
    except pa.ArrowException:
        return False
    return True


@contextmanager
def arrow_errors_as_schema_errors(schema: Schema, expression: pc.Expression) -> Iterator[None]:
    """Convert Arrow's errors about an expression or its values (a division by zero) into SchemaError."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, TypeError) as error:
        raise _cannot(schema, expression, str(error)) from error


def _cannot(schema: Schema, expression: pc.Expression, reason: str) -> SchemaError:
    unknown = re.search(r"No match for FieldRef\.Name\((.*?)\)", reason)
    names = ", ".join(schema.names)
    if unknown is not None:
        message = f"there is no such column; there are {names}"
        return SchemaError(message, column=unknown[1], expected=names, got=unknown[1])
    first_line = reason.partition("\n")[0]
    message = f"cannot evaluate {expression} as a condition over the columns: {first_line}"
    return SchemaError(message, expected="an expression that is true or false", got=str(expression))


def evaluate(table: pa.Table, expression: pc.Expression) -> NDArray[np.bool_]:
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
    flags = pc.fill_null(found, fill_value=False)
    return np.concatenate([np.empty(0, np.bool_), *map(arrow_to_numpy, flags.chunks)])


def _rows(source: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes) -> NDArray[np.uint32]:
    """Return the rows of blocks of a shard that belong to the source, one block after the other."""
    counts = table.records[blocks]
    block = np.repeat(np.arange(len(blocks), dtype=np.uint32), counts)
    row = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    shards = np.full(len(blocks), shard, np.int32)
    return source.stored_rows(shards, blocks.astype(np.int32), block, row.astype(np.uint32))


def chunks_of(table: BlockSizes) -> Iterator[NDArray[np.int64]]:
    """Yield blocks that hold records of the source, in chunks of CHUNK_BYTES or of one block."""
    chosen = np.flatnonzero(table.records)
    begin = 0
    sums = np.cumsum(table.raw_bytes[chosen])
    while begin < len(chosen):
        done = int(sums[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(sums, done + CHUNK_BYTES, side="right")), begin + 1)
        yield chosen[begin:end]
        begin = end


@dataclass(frozen=True, slots=True)
class Split:
    """How records are split: by weights, drawn (also within each class of `by`) or by hash. Picklable."""

    names: tuple[str, ...]
    weights: tuple[int, ...]
    seed: int
    by: str | None = None
    by_hash: str | None = None

    @staticmethod
    def of(fractions: Mapping[str, Any], seed: int, by: str | None, by_hash: str | None) -> Split:
        """Return a split after checking its arguments. Raises TypeError and ValueError."""
        if not isinstance(fractions, Mapping):
            raise TypeError(f"split() takes a mapping such as {{'train': 0.9, 'val': 0.1}}, got {fractions!r}")
        if by is not None and by_hash is not None:
            raise ValueError(f"by={by!r} and by_hash={by_hash!r} exclude each other")
        if not 1 <= len(fractions) <= _MOST_PARTS:
            raise ValueError(f"split() needs 1 to {_MOST_PARTS} parts, got {len(fractions)}")
        try:
            exact = [exact_weight(fraction) for fraction in fractions.values()]
        except ValueError:
            exact = [Fraction(0)]
        if abs(sum(exact, Fraction(-1))) > _SUM_TOLERANCE:
            given = ", ".join(f"{name}: {fraction}" for name, fraction in fractions.items())
            raise ValueError(f"the fractions must be above 0 and sum up to 1, got {given}")
        denominator = math.lcm(*(fraction.denominator for fraction in exact))
        weights = tuple(int(fraction * denominator) for fraction in exact)
        return Split(tuple(fractions), weights, seed, by, by_hash)

    def parts(self, records: Records) -> list[Selection]:
        """Return the parts of some records, in their order. Raises SchemaError; ValueError for an empty part."""
        part_of = self._at_random(records) if self.by_hash is None else self._by_hash(records, self.by_hash)
        order = np.argsort(part_of, kind="stable")  # linear time for 16 bits
        ends = np.cumsum(np.bincount(part_of, minlength=len(self.names)))
        found = [Selection.of(places) for places in np.split(order, ends[:-1])]
        for name, part in zip(self.names, found, strict=True):
            if not len(part):
                raise ValueError(f"the part {name!r} would have none of the {records.n_records:,} records")
        return found

    def _at_random(self, records: Records) -> NDArray[np.uint16]:
        """Return the part of each record, uint16[n]: the records of a class are taken in the order of a shuffle."""
        n = records.n_records
        part_of = np.empty(n, np.uint16)
        if not n:
            return part_of
        order, counts = shuffled_order(self.seed, n)[:], np.array([n])
        if self.by is not None:
            codes = class_codes(records, self.by)
            order = order[np.argsort(codes[order], kind="stable")]
            counts = np.bincount(codes)
        sizes = share_out(counts.tolist(), self.weights)
        parts = np.tile(np.arange(len(self.names), dtype=np.uint16), len(sizes))
        part_of[order] = np.repeat(parts, np.concatenate(sizes))
        return part_of

    def _by_hash(self, records: Records, name: str) -> NDArray[np.uint16]:
        """Return the part of each record, uint16[n], as the hash of its key decides."""
        self.check_key(records.stored_schema, "by_hash")
        return _served(
            records, map_tables(records, [name], lambda table: self.part_of_keys(table.column(0))), np.uint16
        )

    def check_key(self, schema: Schema, argument: str) -> None:
        """Raise SchemaError if the column of `by_hash` has no keys, or is not in a schema. argument: Its name."""
        if self.by_hash is not None:
            _check_kind(schema, self.by_hash, argument, (*_INTEGERS, Kind.STR, Kind.BYTES))

    def part_of_keys(self, keys: pa.ChunkedArray) -> NDArray[np.uint16]:
        """Return the part that the hash of each key decides, uint16[n]. keys: Integers, text or bytes, and nulls."""
        key, total = derive_key(self.seed, "split by hash"), sum(self.weights)
        ends = np.cumsum(np.array(self.weights[:-1], object))
        bounds = np.array([(int(end) << 64) // total for end in ends], np.uint64)
        encoded = keys.dictionary_encode().combine_chunks()  # a key that occurs often is hashed once
        hashes = [key_hash(value, key) for value in (*encoded.dictionary.to_pylist(), None)]
        parts = np.searchsorted(bounds, np.array(hashes, np.uint64), side="right").astype(np.uint16)
        found: NDArray[np.uint16] = parts[np.asarray(pc.fill_null(encoded.indices, len(hashes) - 1))]
        return found


def key_hash(value: int | str | bytes | None, key: bytes) -> int:
    """Return the hash of a key of `by_hash`, 64 bits. It must never change: a record keeps its part by it."""
    data = value if isinstance(value, bytes) else "" if value is None else str(value)
    data = data.encode() if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")


def share_out(counts: Sequence[int], weights: Sequence[int]) -> list[list[int]]:
    """Return the sizes of the parts of each class: each is the exact share, rounded down or up.

    The records that rounding leaves over go to the parts that are farthest behind their exact shares of all classes so
    far, so the sums over all classes are close too. For one class this is the largest-remainder method.
    """
    total, behind, found = sum(weights), [0] * len(weights), []
    for count in counts:
        sizes = [count * weight // total for weight in weights]
        left = [count * weight % total for weight in weights]
        behind = [debt + part for debt, part in zip(behind, left, strict=True)]
        by_debt = sorted((part for part in range(len(weights)) if left[part]), key=lambda part: (-behind[part], part))
        for part in by_debt[: count - sum(sizes)]:
            sizes[part] += 1
            behind[part] -= total
        found.append(sizes)
    return found


@dataclass(frozen=True, slots=True)
class SplitStep(Step):
    split: Split
    part: int
    selects_by_place: ClassVar[bool] = False

    def choose(self, records: Records) -> Selection:
        return self.split.parts(records)[self.part]

    def __str__(self) -> str:
        split, total = self.split, sum(self.split.weights)
        parts = zip(split.names, split.weights, strict=True)
        fractions = ", ".join(f"{name!r}: {weight / total:g}" for name, weight in parts)
        how = "".join(f", {key}={value!r}" for key, value in (("by", split.by), ("by_hash", split.by_hash)) if value)
        return f"split({{{fractions}}}, seed={split.seed}{how})[{split.names[self.part]!r}]"


def hash_splits(node: Node) -> set[tuple[str, int]]:
    """Return the column and the seed of each split by hash from which the records of a node come."""
    if isinstance(node, JoinNode):
        return set().union(*(hash_splits(below) for below in node.below))
    if node is None:
        return set()
    splits = (step.split for step in node.steps if isinstance(step, SplitStep))
    return {(split.by_hash, split.seed) for split in splits if split.by_hash is not None} | hash_splits(node.below)


def class_codes(records: Records, name: str) -> NDArray[np.int32]:
    """Return a number for each record, int32[n], equal for equal values: 0 for null. Raises SchemaError."""
    _check_column(records, name, "by", _CLASSES)
    encoded = map_tables(records, [name], lambda table: table.column(0).dictionary_encode().combine_chunks())
    if not encoded:
        return np.empty(0, np.int32)
    unified = pa.chunked_array(encoded).unify_dictionaries()
    codes = [np.asarray(pc.fill_null(chunk.indices, -1)).astype(np.int32) + 1 for chunk in unified.chunks]
    return _served(records, codes, np.int32)


def class_counts(records: Records, name: str) -> dict[Any, int]:
    """Return the number of records by value of a column, in rising order; null comes last. Raises as `class_codes`."""
    _check_column(records, name, "column", _CLASSES)
    counts: dict[Any, int] = {}
    for found in map_tables(records, [name], lambda table: table.column(0).value_counts().to_pylist()):
        for item in found:
            counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
    nulls = {None: counts.pop(None)} if None in counts else {}
    return dict(sorted(counts.items())) | nulls


def _check_column(records: Records, name: str, argument: str, kinds: Sequence[Kind]) -> Column:
    """Return a stored column. Raises SchemaError: There is none, or it has none of the kinds."""
    return _check_kind(records.stored_schema, name, argument, kinds)


def _check_kind(schema: Schema, name: str, argument: str, kinds: Sequence[Kind]) -> Column:
    column = schema.columns[schema.index(name)]
    is_float = column.kind is Kind.SCALAR and not pa.types.is_integer(column.arrow.type)
    if column.kind not in kinds or is_float:
        expected = "classes: integers, bool or text" if Kind.BOOL in kinds else "keys: integers, bytes or text"
        message = f"{argument}= takes a column of {expected}; this is {column}"
        raise SchemaError(message, column=name, expected=expected, got=str(column))
    return column


def _served(records: Records, found: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    """Return values that were found in stored order, one per record, in served order."""
    values: NDArray[Any] = np.concatenate([np.empty(0, dtype), *found])
    order = records.record_order
    return values if order is None else in_served_order(values, order)
