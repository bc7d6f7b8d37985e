"""What an order is to those who read by it: streams, and in each stretches of positions with the windows they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tiercache.order.groups import Groups
    from tiercache.order.window import Window


class Stretch(Protocol):
    """Consecutive positions of one stream, over which the windows do not change. Immutable.

    A `Window` is one by itself: its own windows are (itself,).
    """

    @property
    def start(self) -> int:
        """The first position in the stream."""

    @property
    def stop(self) -> int:
        """The position after the last."""

    @property
    def windows(self) -> tuple[Window, ...]:
        """What its records are taken from."""

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Places of positions [lo, hi), counted from start.

        Returns:
            block: uint32[hi - lo], counted through the blocks of the windows one after the other; row: uint32[hi - lo],
            the row inside its block.

        Raises:
            ValueError: positions outside the stretch.
        """


class Order(Protocol):
    """The order of one epoch. Position p of it is record p // n_streams of stream p % n_streams.

    Methods may be called from any thread.
    """

    @property
    def n_records(self) -> int:
        """Records of the epoch."""

    @property
    def n_streams(self) -> int:
        """Streams; 1 without shuffle. Some have no records where the epoch has fewer than streams."""

    def stream_records(self, stream: int) -> int:
        """Records of a stream: ceil((n_records - stream) / n_streams)."""

    def stretch_at(self, stream: int, position: int) -> Stretch:
        """The stretch that holds a position of a stream. May read footers of what it needs, never of what lies behind.

        Raises:
            ValueError: the position is outside the stream.
        """

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """Shards that are read from a position of a stream on, in reading order. Reads no footers.

        Args:
            stream: of n_streams.
            position: in the stream; its end is one too.
            n_bytes: stored bytes that the shards shall hold together; None: all to the end of the stream.

        Returns:
            int64[m] of data-set indices; none at the end of the stream.

        Raises:
            ValueError: the position is outside the stream.
        """

    def groups(self, stream: int) -> Groups:
        """Which shards a stream reads over which of its positions. Reads no footers.

        Raises:
            ValueError: there is no such stream.
        """
