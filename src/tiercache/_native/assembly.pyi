"""Batches of slots: what most are made of, tensors and buffers, in one call; and what an iterator does for each."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, Self

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
        something, batches are not as most are; lock: that of whoever takes; waits: a histogram, in whose first bin
        stands how many batches were there when they were asked for.
    """

    def __init__(
        self,
        ring: Ring,
        entries: Entries,
        pieces: deque[tuple[int, Any]],
        odd: tuple[deque[Any], ...],
        lock: RLock,
        waits: list[int],
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

class ReadyIterator:
    """An iterator whose batches, where they are ready and nothing is unusual, come without a Python frame of its own.

    That takes the consumer's thread 0.2 to 0.5 us less for each here. Who inherits has the long way for all others.

    progress: has n_yielded, batches handed out, which is moved for each; profiler: a module whose _is_profiler_enabled
        says that batches are to come the long way; n_undrawn: batches up to which nothing is drawn from torch's random
        numbers, but for the first; is_plain: whether batches are handed out as they are taken.
    """

    def __init__(self, progress: Any, profiler: Any, n_undrawn: int, is_plain: bool) -> None: ...
    def _take_by(self, take_ready: Callable[[], Any] | None) -> None:
        """SpaceRequest this for batches from here on, as `Taker.take_ready`; None: nobody has any ready."""

    def _take_ready(self) -> Any | None:
        """The next batch, counted, if it is ready and nothing is unusual about it. Raises as what is asked for it."""

    def _next(self) -> Any:
        """The next batch, the long way. Raises StopIteration."""

    def _missed(self, error: BaseException) -> None:
        """Hear of what is raised where a batch is taken: KeyboardInterrupt, MemoryError, RuntimeError (torch's)."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Any: ...
