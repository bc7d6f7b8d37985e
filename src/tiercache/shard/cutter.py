"""Cuts a stream of batches into blocks of about one size.

Only the sizes of records count, and not how they were batched; but of a column of Kind.ARROW each record counts as the
mean of its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.shard.parts import Part, join, record_bytes
from tiercache.shard.types import Column

Parts: TypeAlias = list[Part]


class BlockCutter:
    """Gathers parts of all columns until they are a block.

    What is kept between calls is a copy: callers may change their arrays.
    """

    def __init__(self, columns: Sequence[Column], block_bytes: int) -> None:
        self._columns = columns
        self._block_bytes = block_bytes
        self._pending: list[Parts] = []
        self._pending_bytes = 0

    def add(self, parts: Parts) -> Iterator[Parts]:
        """Take a batch (parts of all columns, of equal length), and give each block that is full.

        Less than a block stays pending.
        """
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
        """How many more bytes fit into the block that is pending."""
        return self._block_bytes - self._pending_bytes

    def end_block(self, parts: Parts) -> Parts:
        """The block of what is pending and these records, which are known to fill it; not copied if nothing is."""
        return self._joined(parts if parts[0].n else None)

    def flush(self) -> Parts | None:
        """The block of what is pending, if anything is."""
        return self._joined(None) if self._pending else None

    def _ends_bytes(self, parts: Parts) -> npt.NDArray[np.int64]:
        """Bytes of the records before each, and of all: int64[n + 1]."""
        ends = np.zeros(parts[0].n + 1, np.int64)
        for column, part in zip(self._columns, parts, strict=True):
            ends[1:] += record_bytes(column, part)
        np.cumsum(ends, out=ends)
        return ends

    def _end_of_block(self, ends_bytes: npt.NDArray[np.int64], start: int) -> int:
        """The first record that no longer fits; an empty block takes one of any size."""
        room_bytes = int(ends_bytes[start]) + self._block_bytes - self._pending_bytes
        end = int(np.searchsorted(ends_bytes, room_bytes, side="right")) - 1
        return max(end, start if self._pending else start + 1)

    def _joined(self, head: Parts | None) -> Parts:
        batches = [*self._pending, head] if head is not None else self._pending
        self._pending, self._pending_bytes = [], 0
        return [join([batch[number] for batch in batches]) for number in range(len(self._columns))]
