"""What a shard's footer and its row in a segment say of each column: nulls, bytes, least and greatest number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tiercache.shard.parts import Part
from tiercache.shard.spec import Kind
from tiercache.shard.types import Column


class ColumnStatistics:
    """Sums over the blocks of one column of one shard."""

    def __init__(self, column: Column) -> None:
        self._ordered = column.kind is Kind.SCALAR and column.dtype != "bfloat16"
        self._nulls = self._bytes = self._stored = 0
        self._low: Any = None
        self._high: Any = None

    def add(self, part: Part, nulls: int, raw_bytes: int, stored_bytes: int) -> None:
        """Count a block's part of the column. stored_bytes: what its chunk takes in the file."""
        self._nulls += nulls
        self._bytes += raw_bytes
        self._stored += stored_bytes
        if not self._ordered or part.values is None or nulls == part.n:
            return
        numbers = part.values if part.valid is None else part.values[part.valid]
        # fmin and fmax pass over NaN
        low, high = np.fmin.reduce(numbers, axis=None).item(), np.fmax.reduce(numbers, axis=None).item()
        self._low = low if self._low is None else min(self._low, low)
        self._high = high if self._high is None else max(self._high, high)

    def as_json(self) -> dict[str, Any]:
        """{"nulls", "bytes"}, {"stored"} where it is not bytes and, of numbers that are finite, {"min", "max"}."""
        facts: dict[str, Any] = {"nulls": self._nulls, "bytes": self._bytes}
        if self._stored != self._bytes:  # said always, it made a segment's rows a third longer
            facts["stored"] = self._stored
        if self._low is not None and math.isfinite(self._low) and math.isfinite(self._high):
            facts |= {"min": self._low, "max": self._high}
        return facts
