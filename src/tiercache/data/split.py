"""Splits: disjoint parts of a data set, at random, by classes or by the hash of a key; and the counts of classes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.data.records import JoinNode, Step, shuffled_order
from tiercache.data.scan import in_served_order, map_column
from tiercache.data.selection import Selection
from tiercache.errors import SchemaError
from tiercache.order.epoch_order import derive_key
from tiercache.order.mixture import exact_weight
from tiercache.shard.schema import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.data.records import Node, Records
    from tiercache.shard.schema import Column

# Fractions such as 1/3 are given as floats: their sum may differ from 1 by as much.
_SUM_TOLERANCE = Fraction(1, 10**6)
_MOST_PARTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Split:
    """How records are split. Picklable; the parts are evaluated anew on each version.

    Attributes:
        names: Names of the parts, in order.
        weights: Relative size of each part, whole numbers of 1 or more.
        seed: Seed of the random choice.
        by: Column whose values are shared out by themselves. None: all records together.
        by_hash: Column whose hash decides the part of a record. None: the part is drawn.
    """

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
        """Return the parts of some records, as selections of served places in their order.

        Raises:
            SchemaError: A column does not exist, or its values are no classes or keys.
            ValueError: A part has no records.
        """
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
        _check_column(records, name, "by_hash", (*_INTEGERS, Kind.STR, Kind.BYTES))
        key, total = derive_key(self.seed, "split by hash"), sum(self.weights)
        ends = np.cumsum(np.array(self.weights[:-1], object))
        bounds = np.array([(int(end) << 64) // total for end in ends], np.uint64)

        def find(values: pa.ChunkedArray) -> NDArray[np.uint16]:
            encoded = values.dictionary_encode().combine_chunks()  # a key that occurs often is hashed once
            hashes = [key_hash(value, key) for value in (*encoded.dictionary.to_pylist(), None)]
            parts = np.searchsorted(bounds, np.array(hashes, np.uint64), side="right").astype(np.uint16)
            found: NDArray[np.uint16] = parts[np.asarray(pc.fill_null(encoded.indices, len(hashes) - 1))]
            return found

        return _served(records, map_column(records, name, find), np.uint16)


def key_hash(value: int | str | bytes | None, key: bytes) -> int:
    """Return the hash of a key of `by_hash`, 64 bits. It must never change: a record keeps its part by it."""
    data = value if isinstance(value, bytes) else "" if value is None else str(value)
    data = data.encode() if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")


def share_out(counts: Sequence[int], weights: Sequence[int]) -> list[list[int]]:
    """Return the sizes of the parts of each class: each is the exact share, rounded down or up.

    The records of a class that rounding down leaves over go to the parts that have the fewest records compared with
    their exact shares of all classes so far. So the sums over all classes are close to the exact shares too. For a
    single class this is the largest-remainder method.

    Args:
        counts: Number of records of each class.
        weights: Relative size of each part.
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
    """One part of a split: `part` is its number."""

    split: Split
    part: int
    selects_by_place: ClassVar[bool] = False

    def choose(self, records: Records) -> Selection:
        """See Step.choose. Raises as Split.parts."""
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


_INTEGERS = (Kind.SCALAR,)
_CLASSES = (*_INTEGERS, Kind.BOOL, Kind.STR)


def class_codes(records: Records, name: str) -> NDArray[np.int32]:
    """Return a number for each record, int32[n], equal for equal values of a column: 0 for null, then as they occur.

    Raises SchemaError: The column does not exist, or its values are not classes.
    """
    _check_column(records, name, "by", _CLASSES)
    encoded = map_column(records, name, lambda values: values.dictionary_encode().combine_chunks())
    if not encoded:
        return np.empty(0, np.int32)
    unified = pa.chunked_array(encoded).unify_dictionaries()
    codes = [np.asarray(pc.fill_null(chunk.indices, -1)).astype(np.int32) + 1 for chunk in unified.chunks]
    return _served(records, codes, np.int32)


def class_counts(records: Records, name: str) -> dict[Any, int]:
    """Return the number of records by value of a column, in rising order; null comes last.

    A shard whose smallest and largest values are equal is not read. Raises SchemaError as `class_codes`.
    """
    _check_column(records, name, "column", _CLASSES)
    counts: dict[Any, int] = {}
    unknown = []
    for shard in np.flatnonzero(records.shard_records).tolist():
        fact = records.statistics(shard).get(name, {})
        if fact.get("nulls") == 0 and "min" in fact and fact["min"] == fact.get("max"):
            counts[fact["min"]] = counts.get(fact["min"], 0) + int(records.shard_records[shard])
        else:
            unknown.append(shard)
    for found in map_column(records, name, lambda values: values.value_counts().to_pylist(), unknown):
        for item in found:
            counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
    nulls = {None: counts.pop(None)} if None in counts else {}
    return dict(sorted(counts.items())) | nulls


def _check_column(records: Records, name: str, argument: str, kinds: Sequence[Kind]) -> Column:
    """Return a stored column. Raises SchemaError: There is none, or it has none of the kinds."""
    schema = records.stored_schema
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
