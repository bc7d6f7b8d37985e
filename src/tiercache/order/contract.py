"""Inputs and interface of an order.

`OrderOptions`, `DatasetSizes` and `BlockSizes` are what an order is made from; `Order` and its sections are what a
loader reads by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tiercache.order.explicit import AnyWindow
    from tiercache.order.window import ShardGroups


# One stream for each rank of the largest cluster. A stream number fits 16 bits, which numpy sorts in linear time.
MAX_STREAMS = 1 << 16


@dataclass(frozen=True, slots=True)
class OrderOptions:
    """Options of an epoch's order. The order depends only on these options, the sizes of the data set and the epoch.

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
        """Check the values."""
        for name, size in (("shuffle_group_bytes", self.group_bytes), ("shuffle_window_bytes", self.window_bytes)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be 1 or more, or 'all', got {size}")
        if self.placement not in ("sticky", "global"):
            raise ValueError(f"placement must be 'sticky' or 'global', got {self.placement!r}")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be 1 to {MAX_STREAMS}, got {self.streams}")


@dataclass(frozen=True, slots=True, eq=False)
class BlockSizes:
    """Sizes of the blocks of one shard, from its footer.

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
class DatasetSizes:
    """Sizes of the shards of a data set, in stored order, and of their blocks.

    Attributes:
        records: int64[n_shards], number of records of each shard.
        stored_bytes: int64[n_shards], bytes of each whole shard as stored.
        blocks: Function that returns the block sizes of shards, given their numbers, in the same order. An order calls
            it for the non-empty shards of one shard group, or of the records of one window, from any thread. Its
            exceptions are passed on; the function itself should cache its results.
    """

    records: NDArray[np.int64]
    stored_bytes: NDArray[np.int64]
    blocks: Callable[[Sequence[int]], Sequence[BlockSizes]]

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


class Section(Protocol):
    """Section: consecutive positions of one stream that are served from the same windows. Immutable.

    A `Window` is a section by itself: its `windows` are (itself,).
    """

    @property
    def start(self) -> int:
        """First position in the stream."""

    @property
    def stop(self) -> int:
        """Position after the last one."""

    @property
    def windows(self) -> tuple[AnyWindow, ...]:
        """Windows that hold the section's records."""

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the block and the row of the records at positions [lo, hi), counted from `start`.

        Returns:
            block: uint32[hi - lo], index into the blocks of all windows, concatenated. row: uint32[hi - lo], row inside
            the block.

        Raises:
            ValueError: The positions are outside the section.
        """


class Order(Protocol):
    """Order of one epoch. Position p is record p // n_streams of stream p % n_streams.

    All methods may be called from any thread.
    """

    @property
    def n_records(self) -> int:
        """Number of records of the epoch."""

    @property
    def n_streams(self) -> int:
        """Number of streams; 1 without shuffle. Some are empty if the epoch has fewer records than streams."""

    def stream_records(self, stream: int) -> int:
        """Return the number of records of a stream: ceil((n_records - stream) / n_streams)."""

    def section_at(self, stream: int, position: int) -> Section:
        """Return the section that holds a position of a stream. It may read the footers that this section needs.

        Raises:
            ValueError: The position is outside the stream.
        """

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """Return the shards that are read from a position of a stream on, in reading order. Reads no footers.

        Args:
            stream: Number of the stream.
            position: Position in the stream; the end of the stream is allowed.
            n_bytes: Stored bytes that the shards hold together; None: all shards to the end of the stream.

        Returns:
            int64[m], shard numbers in the data set; empty at the end of the stream.

        Raises:
            ValueError: The position is outside the stream.
        """

    def groups(self, stream: int) -> ShardGroups:
        """Return the shard groups of a stream, with the positions over which each one is read. Reads no footers.

        Raises:
            ValueError: There is no such stream.
        """
