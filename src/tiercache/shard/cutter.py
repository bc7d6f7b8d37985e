"""BlockCutter: splits a stream of batches into blocks of about equal size.

The block boundaries depend only on the sizes of records, and not on the batches. Exception: in a column of Kind.ARROW,
each record counts with the mean size of its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.shard.parts import ColumnData, join_column_data, record_bytes
from tiercache.shard.types import Column

BlockData: TypeAlias = list[ColumnData]


class BlockCutter:
    """Collects records until they fill a block.

    Records that are kept between calls are copied, so callers may change their arrays.
    """

    def __init__(self, columns: Sequence[Column], block_bytes: int) -> None:
        self._columns = columns
        self._block_bytes = block_bytes
        self._pending: list[BlockData] = []
        self._pending_bytes = 0

    def add(self, parts: BlockData) -> Iterator[BlockData]:
        """Add a batch (the data of each column, of equal lengths); yield each full block. The rest stays pending."""
        n = parts[0].n
        ends_bytes = self._ends_bytes(parts)
        start = 0
        while start < n:
            end = self._end_of_block(ends_bytes, start)
            if end == n:
                self._pending.append([part.slice(start, n).own() for part in parts])
                self._pending_bytes += int(ends_bytes[n] - ends_bytes[start])
                return
            head = [part.slice(start, end) for part in parts]
            yield self._joined(head if end > start else None)
            start = end

    @property
    def room_bytes(self) -> int:
        """Number of bytes that still fit into the pending block."""
        return self._block_bytes - self._pending_bytes

    def end_block(self, parts: BlockData) -> BlockData:
        """Return the block of the pending records and these records. Without pending records, nothing is copied."""
        return self._joined(parts if parts[0].n else None)

    def flush(self) -> BlockData | None:
        """Return the block of the pending records; None if there are none."""
        return self._joined(None) if self._pending else None

    def _ends_bytes(self, parts: BlockData) -> npt.NDArray[np.int64]:
        """Return int64[n + 1]: the number of bytes before each record; the last entry is the total."""
        ends = np.zeros(parts[0].n + 1, np.int64)
        for column, part in zip(self._columns, parts, strict=True):
            ends[1:] += record_bytes(column, part)
        np.cumsum(ends, out=ends)
        return ends

    def _end_of_block(self, ends_bytes: npt.NDArray[np.int64], start: int) -> int:
        """Return the first record that does not fit into the block; an empty block takes a record of any size."""
        room_bytes = int(ends_bytes[start]) + self._block_bytes - self._pending_bytes
        end = int(np.searchsorted(ends_bytes, room_bytes, side="right")) - 1
        return max(end, start if self._pending else start + 1)

    def _joined(self, head: BlockData | None) -> BlockData:
        batches = [*self._pending, head] if head is not None else self._pending
        self._pending, self._pending_bytes = [], 0
        return [join_column_data([batch[number] for batch in batches]) for number in range(len(self._columns))]
