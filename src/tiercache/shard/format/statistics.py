"""Statistics of the columns of a shard, in its footer and in its row of a segment: nulls, bytes, minimum, maximum."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.shard.column_types import INTEGERS, Kind
from tiercache.shard.schema import Column, Schema

Statistics: TypeAlias = Mapping[str, Mapping[str, Any]]
_MOST = 2**62
# Largest finite float by its size in bytes.
_GREATEST = {2: 65504.0, 4: float(np.finfo(np.float32).max), 8: float(np.finfo(np.float64).max)}


def parse_statistics(text: str, schema: Schema, n_records: int) -> Statistics:
    """Return the statistics in a shard's row of a segment, by column. Unknown columns are left out.

    Raises ValueError for an invalid value; the message names the column and the field.
    """
    try:
        facts = json.loads(text or "{}")
    except RecursionError as error:
        raise ValueError("statistics: the JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"statistics: not JSON: {error}") from error
    for _, problem in invalid_statistics(facts, schema, n_records):
        raise ValueError(problem)
    return {name: fact for name, fact in facts.items() if name in schema.names}


def invalid_statistics(facts: Any, schema: Schema, n_records: int) -> Iterator[tuple[str, str]]:
    """Yield (column, message) for each column of parsed JSON of any form whose statistics are invalid."""
    if not isinstance(facts, dict):
        yield "", f"statistics: a JSON object is expected, got {_shown(facts)}"
        return
    for column in schema.columns:
        if column.name in facts and (problem := _problem_of(facts[column.name], column, n_records)):
            yield column.name, f"statistics of column {column.name!r}: {problem}"


def _problem_of(fact: Any, column: Column, n_records: int) -> str:
    if not isinstance(fact, dict):
        return f"a JSON object is expected, got {_shown(fact)}"
    for name, most in (("nulls", n_records if column.nullable else 0), ("bytes", _MOST), ("stored", _MOST)):
        value = fact.get(name, 0)
        if type(value) is not int or not 0 <= value <= most:
            return f"{name!r} is a whole number from 0 to {most}, got {_shown(value)}"
    if not _is_ordered(column):
        return ""
    for name in ("min", "max"):
        if name in fact and not _is_value(fact[name], column):
            return f"{name!r} is a finite {column.dtype}, got {_shown(fact[name])}"
    if "min" in fact and "max" in fact and fact["min"] > fact["max"]:
        return f"'min' {fact['min']} is greater than 'max' {fact['max']}"
    return ""


def _is_ordered(column: Column) -> bool:
    return column.kind is Kind.SCALAR and column.dtype != "bfloat16"


def _is_value(value: Any, column: Column) -> bool:
    if column.dtype in INTEGERS:
        bits = 8 * column.stored.itemsize
        least, greatest = (0, 2**bits) if column.dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        return type(value) is int and least <= value < greatest
    return type(value) in (int, float) and not math.isnan(value) and abs(value) <= _GREATEST[column.stored.itemsize]


def _shown(value: Any) -> str:
    """Return a text for a value of untrusted input, of at most 83 characters."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**128 else "a number of more than 128 bits"
    return text if len(text) <= 80 else f"{text[:80]}..."


class ColumnStatistics:
    """Statistics of a column of a shard, summed over its blocks."""

    def __init__(self, column: Column) -> None:
        self._ordered = _is_ordered(column)
        self._nulls = self._bytes = self._stored = 0
        self._low: Any = None
        self._high: Any = None

    def add(
        self,
        values: npt.NDArray[Any] | None,
        valid: npt.NDArray[np.bool_] | None,
        n: int,
        nulls: int,
        raw_bytes: int,
        stored_bytes: int,
    ) -> None:
        """Add the records of a block: n records, whose stored elements are `values` if the column has any."""
        self._nulls += nulls
        self._bytes += raw_bytes
        self._stored += stored_bytes
        if not self._ordered or values is None or nulls == n:
            return
        numbers = values if valid is None else values[valid]
        # fmin and fmax ignore NaN.
        low, high = np.fmin.reduce(numbers, axis=None).item(), np.fmax.reduce(numbers, axis=None).item()
        self._low = low if self._low is None else min(self._low, low)
        self._high = high if self._high is None else max(self._high, high)

    def as_json(self) -> dict[str, Any]:
        """Return "nulls" and "bytes"; "stored" if it differs from "bytes"; "min" and "max" of finite numbers."""
        facts: dict[str, Any] = {"nulls": self._nulls, "bytes": self._bytes}
        if self._stored != self._bytes:  # writing it always made the rows of a segment a third longer
            facts["stored"] = self._stored
        if self._low is not None and math.isfinite(self._low) and math.isfinite(self._high):
            facts |= {"min": self._low, "max": self._high}
        return facts

    def difference(self, fact: Mapping[str, Any]) -> str:
        """Return the first difference between stated statistics and the counted blocks, as a message; "" if none."""
        found = self.as_json()
        found.setdefault("stored", found["bytes"])
        for name in ("nulls", "bytes", "stored", "min", "max"):
            if name in fact and (name in found or self._ordered) and fact[name] != found.get(name):
                return f"{name!r} is {_shown(fact[name])}, but the blocks have {_shown(found.get(name))}"
        return ""
