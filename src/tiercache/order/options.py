"""Frozen inputs of an order: options, sizes of shards (from segments) and of blocks (from footers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

# One stream for each rank of the largest cluster. A stream number fits 16 bits, which numpy sorts in linear time.
MAX_STREAMS = 1 << 16


@dataclass(frozen=True, slots=True)
class OrderOptions:
    """Options of an epoch's order. The order depends only on these options, the layout and the epoch.

    Attributes:
        seed: Any integer.
        shuffle: Whether to shuffle. False: position p is record p.
        group_bytes: Stored bytes of a shard group, the shards that are read at a time; None: all shards.
        window_bytes: Raw bytes of a window, the blocks over which rows are mixed; None: a whole group.
        streams: Number of streams: parts of the order that are read in parallel, each by its own rank if there are
            enough ranks. Without shuffle there is always one stream.
        placement: "sticky": a stream has the same shards in all epochs; "global": it does not. One stream satisfies
            both.
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
            ValueError: A size is below one byte, the placement is unknown, or the number of streams is out of range.
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
    """Blocks of one shard, from its footer.

    Attributes:
        records: int64[n_blocks], number of records of each block.
        raw_bytes: int64[n_blocks], decoded bytes of each block, all columns.
    """

    records: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Convert integer arrays to int64. Raises ValueError if their lengths differ or a number is negative."""
        for name in ("records", "raw_bytes"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if len(self.records) != len(self.raw_bytes):
            raise ValueError(f"records has {len(self.records)} blocks, raw_bytes has {len(self.raw_bytes)}")


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Shards of a data set in stored order, and access to their footers.

    Attributes:
        records: int64[n_shards], number of records of each shard.
        stored_bytes: int64[n_shards], bytes of each whole shard as stored.
        blocks: Function that returns the block tables of shards, given their numbers, in the same order. An order calls
            it for the non-empty shards of one shard group, or of the records of one window, from any thread. Its
            exceptions are passed on; the function itself should cache its results.
    """

    records: NDArray[np.int64]
    stored_bytes: NDArray[np.int64]
    blocks: Callable[[Sequence[int]], Sequence[BlockTable]]

    def __post_init__(self) -> None:
        """Convert integer arrays to int64. Raises ValueError if their lengths differ or a number is negative."""
        for name in ("records", "stored_bytes"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if len(self.records) != len(self.stored_bytes):
            raise ValueError(f"records has {len(self.records)} shards, stored_bytes has {len(self.stored_bytes)}")


def _counts(name: str, values: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the values as a read-only int64 array (a view if they already are int64)."""
    array = np.ascontiguousarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{name} must be a one-dimensional integer array, got {array.dtype} of shape {array.shape}")
    counts = array.astype(np.int64, copy=False).view()
    if counts.size and counts.min() < 0:
        raise ValueError(f"{name} must be 0 or more, below 2**63, got {array[counts.argmin()]}")
    counts.flags.writeable = False
    return counts
