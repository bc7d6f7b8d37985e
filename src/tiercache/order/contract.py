"""Inputs and interface of an order.

`OrderOptions`, `Layout` and `BlockTable` are what an order is made from; `Order` and its sections are what a loader
reads by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tiercache.order.groups import ShardGroups
    from tiercache.order.window import Window


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
    def windows(self) -> tuple[Window, ...]:
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
