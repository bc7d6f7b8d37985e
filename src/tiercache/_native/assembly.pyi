"""Batches of slots: what most batches are made of, tensors and buffers, in one call; and a count of what was taken."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

from tiercache._native.ring import Layout, Ring, Slot

class TensorEntry:
    """A tensor [n, *shape] over a stream of rows of one size, which layout describes."""

    def __init__(self, stream: int, layout: Layout) -> None: ...

class BufferEntry:
    """Values of a VAR stream and their offsets, int64.

    values, offsets: a row of theirs; cls: whose objects get values, offsets and shapes (None) as attributes, past its
        own __init__; make_empty: makes one of a slot and its number of rows where there are no elements.

    Raises:
        ValueError: a row of the values has no elements.
    """

    def __init__(
        self,
        stream: int,
        values: Layout,
        offsets: Layout,
        cls: type[Any],
        make_empty: Callable[[Slot, int], Any],
    ) -> None: ...

class Entries:
    """What batches hold: for each name an entry, or what makes it of a slot and its number of rows. Any thread.

    n_streams: of the slots; from_dlpack: makes a tensor of a capsule.

    Raises:
        ValueError: an entry of a stream that slots do not have.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, TensorEntry | BufferEntry | Callable[[Slot, int], Any]]],
        n_streams: int,
        from_dlpack: Callable[[object], Any],
    ) -> None: ...
    @property
    def is_native(self) -> bool:
        """Whether all are tensors and buffers: nothing is called but, for a buffer of empty values, make_empty."""

    def batch(self, slot: Slot) -> dict[str, Any]:
        """The batch in a slot; what it is made of keeps the slot. Raises what is called raises."""

class Taker:
    """Counts what was taken of a ring, and takes what needs nothing else than counting.

    pieces: (row after its last, piece): those that end with the rows taken are let go of; odd: while one of these holds
        something, batches are not as most are; lock: that of whoever takes.
    """

    def __init__(
        self,
        ring: Ring,
        entries: Entries,
        pieces: deque[tuple[int, Any]],
        odd: tuple[deque[Any], ...],
        lock: RLock,
    ) -> None: ...
    @property
    def rows(self) -> int:
        """Of the sequence, before the next batch."""

    @property
    def samples(self) -> int:
        """Rows of the batches that were counted."""

    @property
    def batches(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...
    def count(self, slot: Slot) -> None:
        """Count a batch, and let go of the pieces that nothing is left of."""

    def take_ready(self) -> dict[str, Any] | None:
        """The next batch, counted, if it is ready and as most are; else None, and nothing is taken.

        Raises:
            MemoryError: it is lost.
        """
