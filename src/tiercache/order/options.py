"""What an order is made from, frozen: options, the sizes of shards (from segments) and of blocks (from footers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

# One for each rank of the largest machine; and a stream's number fits 16 bits, by which numpy sorts in linear time.
MAX_STREAMS = 1 << 16


@dataclass(frozen=True, slots=True)
class OrderOptions:
    """How an epoch is ordered. The order depends on these, the layout and the epoch, and on nothing else.

    Attributes:
        seed: any integer.
        shuffle: False: position p is record p.
        group_bytes: stored bytes of the shards that are read at a time; None: all.
        window_bytes: raw bytes of the blocks that rows are mixed over; None: a whole group.
        streams: parts of the order that are read side by side, each by a rank of its own if there are so many; without
            shuffle there is one, whatever stands here.
        placement: whether a stream keeps its shards over the epochs ("sticky") or not ("global"); one stream has both.
    """

    seed: int
    shuffle: bool
    group_bytes: int | None
    window_bytes: int | None
    streams: int = 1
    placement: Literal["sticky", "global"] = "sticky"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a size below one byte, a placement that does not exist, or a number of streams out of range.
        """
        for name, size in (("shuffle_group_bytes", self.group_bytes), ("shuffle_window_bytes", self.window_bytes)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be 1 or more, or 'all', got {size}")
        if self.placement not in ("sticky", "global"):
            raise ValueError(f"placement must be 'sticky' or 'global', got {self.placement!r}")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be 1 to {MAX_STREAMS}, got {self.streams}")


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """Blocks of one shard, from its footer. records, raw_bytes (all columns, decoded): int64[n_blocks]."""

    records: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Take any integer arrays as int64. Raises ValueError if they differ in length or hold a negative number."""
        for name in ("records", "raw_bytes"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if len(self.records) != len(self.raw_bytes):
            raise ValueError(f"{len(self.records)} blocks have records, {len(self.raw_bytes)} have bytes")


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Shards of a data set in data-set order, and a way to their footers.

    Attributes:
        records: int64[n_shards].
        stored_bytes: int64[n_shards], bytes of the whole shard as stored.
        blocks: the blocks of some shards by their indices, in that order. Called once a group, for its shards that
            have records, from any thread; what it raises passes through. The caller memoises it.
    """

    records: NDArray[np.int64]
    stored_bytes: NDArray[np.int64]
    blocks: Callable[[Sequence[int]], Sequence[BlockTable]]

    def __post_init__(self) -> None:
        """Take any integer arrays as int64. Raises ValueError if they differ in length or hold a negative number."""
        for name in ("records", "stored_bytes"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if len(self.records) != len(self.stored_bytes):
            raise ValueError(f"{len(self.records)} shards have records, {len(self.stored_bytes)} have bytes")


def _counts(name: str, values: NDArray[np.integer]) -> NDArray[np.int64]:
    """The values as a read-only int64 array (a view where they are one already)."""
    array = np.ascontiguousarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{name} must be one row of integers, got {array.dtype} of shape {array.shape}")
    counts = array.astype(np.int64, copy=False).view()
    if counts.size and counts.min() < 0:
        raise ValueError(f"{name} must be 0 or more, below 2**63, got {array[counts.argmin()]}")
    counts.flags.writeable = False
    return counts
