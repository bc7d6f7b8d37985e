"""Batches gathered ahead of one consumer, in threads without Python (csrc/ring.h), and their delivery as objects."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, Final, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from tiercache._native.permute import RowFinder

END: Final[int]
FAILED: Final[int]
CLOSED: Final[int]
SLOT_ALIGN: Final[int]

class Figures(TypedDict):
    """Batches taken, gather time (all threads) and wait time (consumer) in ns, number of waits, batches ready now.

    largest: Bytes that a slot needs for the largest batch so far.
    """

    batches: int
    gather_ns: int
    wait_ns: int
    waits: int
    ready: int
    largest: int

class Plan:
    """The rows of a window in output order, and the objects that keep their memory alive.

    Args:
        addresses: uint64[n_streams, n_blocks, 3]; see gather.pyi.
        block, row: uint32[n_rows], location of each row.
        held: Object that owns the memory behind addresses and checks.
        checks: uint64[n_streams, n_blocks, 4], chunks that are checked on first touch (see gather.pyi), or None.
        output_layouts: uint64[n], a struct tc_output_layout (csrc/output_layout.h) for each stream and the data that
            they point to, equal for all plans of a ring; or None.
    """

    def __init__(
        self,
        addresses: NDArray[np.uint64],
        block: NDArray[np.uint32],
        row: NDArray[np.uint32],
        held: object,
        checks: NDArray[np.uint64] | None = None,
        output_layouts: NDArray[np.uint64] | None = None,
    ) -> None: ...
    @staticmethod
    def from_finder(
        addresses: NDArray[np.uint64],
        run: tuple[RowFinder, int, int],
        held: object,
        checks: NDArray[np.uint64] | None = None,
        output_layouts: NDArray[np.uint64] | None = None,
    ) -> Plan:
        """Return a plan whose rows a finder locates batch by batch.

        Args:
            addresses, held, checks, output_layouts: See Plan.
            run: (finder, start, n): n rows from position start.

        Raises:
            ValueError: The finder has fewer rows, or more blocks than addresses.
        """

    @property
    def n_rows(self) -> int: ...
    @property
    def held(self) -> object: ...

class RowType:
    """Type of consecutive rows.

    Args:
        code, bits: Element type in DLPack's terms (0 int, 1 uint, 2 float, 4 bfloat, 6 bool) and its size in bits.
        shape: Shape of a row.
    """

    def __init__(self, code: int, bits: int, shape: tuple[int, ...] = ()) -> None: ...

class ColumnMemory:
    """The bytes of a column, as a writable buffer: in a slot, which it keeps, or a copy, which held_bytes() counts.

    Args:
        source: Contiguous bytes, which are copied.
    """

    def __init__(self, source: NDArray[np.uint8] | memoryview) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Slot:
    """The memory of a batch, a writable buffer of bytes (for torch.frombuffer).

    The memory is reused when nothing refers to the slot any more.
    """

    first_row: int
    @property
    def n_rows(self) -> int: ...
    @property
    def n_bytes(self) -> int:
        """Size of the batch's values, including the bytes that references point to."""

    def values_position(self, stream: int) -> int:
        """Return the byte position of a stream's values."""

    def stream_position(self, stream: int) -> tuple[int, int, int]:
        """Return the byte positions of a stream's values and (VAR) int64 offsets, and (VAR) its number of elements."""

    def tensor(self, row_type: RowType, offset: int, n_rows: int) -> object:
        """Return a DLPack capsule of n_rows rows from byte position offset.

        The capsule keeps the slot, or, for a small column, a copy of the rows.

        Raises:
            ValueError: The rows are not all inside the slot.
        """

    def column(self, offset: int, n_bytes: int) -> ColumnMemory:
        """Return the memory of a column: n_bytes from byte position offset. It is a copy for a small column.

        Raises:
            ValueError: The bytes are not all inside the slot.
        """

    def start_bytes(self, stream: int) -> None:
        """Create the bytes objects of a REF stream, and let the ring's threads start to fill them."""

    def bytes_list(self, stream: int) -> list[bytes]:
        """Return new bytes objects of a REF stream, filled from the source. start_bytes() may have started them.

        The caller must keep the source alive, and with it the plan's `held`.

        Raises:
            OSError: EIO; the source could not be read.
        """

    def str_list(self, stream: int) -> list[str]:
        """Return new str objects of a VAR stream of bytes. Raises UnicodeDecodeError."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Ring:
    """Gathers batches in order, in threads without Python.

    One planner thread calls push, finish and wait_room; one consumer thread calls take. Any thread may call
    close and figures. The thread that has closed the ring calls forget.

    Args:
        streams: uint32[n_streams, 2], kind (gather.FIXED, BITS, VAR or REF) and width in bytes.
        batch_rows: Number of rows of a batch.
        depth: Number of batches gathered ahead.
        n_threads: Number of gather threads, including the consumer's own thread while it waits.
        slot_bytes: Expected size of a batch in bytes, 0 if unknown.
        memory: Writable uint8[n], aligned to SLOT_ALIGN, from which slots of exactly slot_bytes are cut (a multiple of
            SLOT_ALIGN). The ring keeps the array until the last tensor over its slots is dropped. A batch that does not
            fit into its slot, and a batch for which no slot is left, lies in memory of its own. None: the ring
            allocates its memory.

    Raises:
        ValueError: A number is out of range, or `memory` or slot_bytes is not aligned.
        MemoryError: There is no memory, or no thread could start.
    """

    def __init__(
        self,
        streams: NDArray[np.uint32],
        *,
        batch_rows: int,
        depth: int,
        n_threads: int,
        slot_bytes: int = 0,
        memory: NDArray[np.uint8] | None = None,
    ) -> None: ...
    def push(self, plan: Plan) -> bool:
        """Append the rows of a plan. Return False if the ring is closed."""

    def finish(self, failed: bool = False) -> None:
        """End the sequence: take() returns the remaining rows as a short batch, then END; or, if failed, FAILED."""

    def wait_room(self, n_plans: int) -> bool:
        """Wait until at most n_plans plans are still needed, or the next batch needs rows that are not pushed yet.

        Drops the plans that are no longer needed. Returns False if the ring is closed.
        """

    def take(self, timeout_s: float = -1.0) -> Slot | int:
        """Return the next batch, or END, FAILED or CLOSED, or another int after timeout_s seconds (negative: no limit).

        Raises:
            OSError: EIO; a mapped source of this batch could not be read.
            gather.CorruptError: The stored bytes are not what was written.
            gather.CastError: A value cannot be represented in the dtype of the cast.
            gather.TooLongError: A record is longer than its output layout allows.
            MemoryError: No memory for the batch.
            KeyboardInterrupt: Ctrl-C; exceptions of other signal handlers are passed on, too.
        """

    def close(self) -> None:
        """Wake all waiting threads and end the workers. Slots that are taken stay valid. May be called repeatedly."""

    def forget(self) -> None:
        """Drop all plans. Call it after close(), when bytes_list() will not be called for any slot any more."""

    def figures(self) -> Figures:
        """Return the statistics of the ring."""

def held_bytes() -> int:
    """Return the bytes that keep batches of all rings of the process alive.

    These are slots that are taken, columns that were copied, and unused slots of a ring that was dropped, which are
    freed with its last slot.
    """

class ArenaKeeper:
    """While an instance lives, a ring that ends leaves its memory (up to 64 MiB) to the next ring of the same size."""

def is_far() -> bool:
    """Return whether the workers use non-temporal stores now, because the consumer's core has another cache."""

def override_distance(is_far: bool | None) -> None:
    """For tests: make all rings treat the consumer's core as far (True) or near (False), or measure it (None)."""

def n_distance_measurements() -> int:
    """For tests: return the number of distance measurements that consumers have made."""

def has_nontemporal_copies() -> bool:
    """Return whether this processor can copy with non-temporal stores, with the kernels in use."""

class TensorEntry:
    """A tensor [n, *shape] over a stream of rows of fixed size.

    Args:
        stream: Index of the stream.
        row_type: Element type and shape of a row.
    """

    def __init__(self, stream: int, row_type: RowType) -> None: ...

class BufferEntry:
    """A buffer of values of varying length and their int64 offsets, from a VAR stream.

    Args:
        stream: Index of the stream.
        values: Type of a row of the values.
        offsets: Type of an offset.
        cls: Class of the result. Its instances get the attributes values, offsets and shapes (None), without a call of
            `__init__`.
        make_empty: Function (slot, n_rows) that makes the result if the batch has no elements.

    Raises:
        ValueError: A row of the values has no elements.
    """

    def __init__(
        self,
        stream: int,
        values: RowType,
        offsets: RowType,
        cls: type[Any],
        make_empty: Callable[[Slot, int], Any],
    ) -> None: ...

class BatchBuilder:
    """Recipe of a batch: the names of its entries and how each entry is made from a slot. Any thread may use it.

    Args:
        entries: Name and maker of each entry. A maker is a TensorEntry, a BufferEntry or a function (slot, n_rows).
        n_streams: Number of streams of the slots.
        from_dlpack: Function that makes a tensor from a DLPack capsule; None: no entry is a tensor or a buffer.

    Raises:
        ValueError: An entry has a stream that slots do not have.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, TensorEntry | BufferEntry | Callable[[Slot, int], Any]]],
        n_streams: int,
        from_dlpack: Callable[[object], Any] | None,
    ) -> None: ...
    @property
    def is_native(self) -> bool:
        """Whether all entries are tensors and buffers, so that only from_dlpack and make_empty are called."""

    def build(self, slot: Slot) -> dict[str, Any]:
        """Return the batch in a slot. The entries keep the slot alive. Exceptions of the makers are passed on."""

class BatchTaker:
    """Takes ready batches from a ring without Python code in between, and counts all batches that are taken.

    Args:
        ring: Ring that batches are taken from.
        entries: Recipe of the batches.
        pushed: Queue of (end row in the sequence, pushed rows), oldest first. An entry is dropped when the rows up to
            its end are taken.
        slow_if_any: Queues. While one of them holds something, take_ready() returns None: the normal path must serve
            the batch.
        lock: Lock of the thread that takes batches.
        waits: Histogram of waits. The first bin counts the batches that were ready when they were requested.
    """

    def __init__(
        self,
        ring: Ring,
        entries: BatchBuilder,
        pushed: deque[tuple[int, Any]],
        slow_if_any: tuple[deque[Any], ...],
        lock: RLock,
        waits: list[int],
    ) -> None: ...
    @property
    def rows(self) -> int:
        """Position in the sequence of the next batch's first row."""

    @property
    def samples(self) -> int:
        """Number of rows of the counted batches."""

    @property
    def batches(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...
    def count(self, slot: Slot) -> None:
        """Count a batch, and drop the entries of `pushed` whose rows are all taken."""

    def take_ready(self) -> dict[str, Any] | None:
        """Take and count the next batch if it is ready and takes the fast path; otherwise return None and take nothing.

        Raises:
            MemoryError: No memory for the batch, which is lost.
        """

class FastIterator:
    """Base class of an iterator that returns ready batches without a Python frame of its own.

    The fast path saves 0.2 to 0.5 us per batch in the consumer's thread. A subclass implements the normal path,
    `_next()`, for all other batches.

    Args:
        progress: Object with the attribute n_yielded, the number of batches returned, which is incremented.
        profiler: Module whose `_is_profiler_enabled` switches the fast path off.
        is_plain: Whether batches are returned as they are taken, without further processing.
    """

    def __init__(self, progress: Any, profiler: Any, is_plain: bool) -> None: ...
    def _set_fast_path(self, take_ready: Callable[[], Any] | None) -> None:
        """Set the function that takes ready batches, as `BatchTaker.take_ready`; None switches the fast path off."""

    def _next_ready(self) -> Any | None:
        """Return the next batch, counted, if it is ready and takes the fast path, else None."""

    def _next(self) -> Any:
        """Return the next batch on the normal path. Raises StopIteration at the end."""

    def _on_take_error(self, error: BaseException) -> None:
        """Handle an exception of a batch being taken: KeyboardInterrupt, MemoryError, or torch's RuntimeError."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Any: ...
