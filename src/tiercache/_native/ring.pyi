"""Threads without Python that gather batches ahead of one consumer (csrc/ring.h)."""

from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from tiercache._native.permute import RowFinder

END: Final[int]
FAILED: Final[int]
CLOSED: Final[int]

class Figures(TypedDict):
    """Batches taken, gather time (all threads) and wait time (consumer) in ns, number of waits, batches ready now."""

    batches: int
    gather_ns: int
    wait_ns: int
    waits: int
    ready: int

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
    def of_run(
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

class Layout:
    """Layout of consecutive rows.

    Args:
        code, bits: Element type in DLPack's terms (0 int, 1 uint, 2 float, 4 bfloat, 6 bool) and its size in bits.
        shape: Shape of a row.
    """

    def __init__(self, code: int, bits: int, shape: tuple[int, ...] = ()) -> None: ...

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

    def stream_position(self, stream: int) -> tuple[int, int, int]:
        """Return the byte positions of a stream's values and (VAR) int64 offsets, and (VAR) its number of elements."""

    def tensor(self, layout: Layout, offset: int, n_rows: int) -> object:
        """Return a DLPack capsule of n_rows rows from byte position offset. The capsule keeps the slot.

        Raises:
            ValueError: The rows are not all inside the slot.
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

    One planner thread calls push, push_sizes, finish and wait_room; one consumer thread calls take. Any thread may call
    close and figures. The thread that has closed the ring calls forget.

    Args:
        streams: uint32[n_streams, 2], kind (gather.FIXED, BITS, VAR or REF) and width in bytes.
        batch_rows: Number of rows of a batch.
        depth: Number of batches gathered ahead.
        n_threads: Number of gather threads, including the consumer's own thread while it waits.
        slot_bytes: Expected size of a batch in bytes, 0 if unknown.
    """

    def __init__(
        self, streams: NDArray[np.uint32], *, batch_rows: int, depth: int, n_threads: int, slot_bytes: int = 0
    ) -> None: ...
    def push(self, plan: Plan) -> bool:
        """Append the rows of a plan. Return False if the ring is closed."""

    def push_sizes(self, rows: NDArray[np.uint32]) -> bool:
        """Append the row counts of the next batches. Return False if the ring is closed.

        The first call must come before the first push; from then on, batches have these sizes instead of batch_rows.

        Raises:
            ValueError: A size is 0.
        """

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
    """Return the bytes of all batches still referred to, of all rings of the process, including dropped rings."""

class SpareMemory:
    """While an instance lives, a ring that ends leaves its memory (up to 64 MiB) to the next ring of the same size."""

def is_far() -> bool:
    """Return whether the workers use non-temporal stores now, because the consumer's core has another cache."""

def pretend_far(is_far: bool | None) -> None:
    """For tests: make all rings treat the consumer's core as far (True) or near (False), or measure it (None)."""

def n_answers() -> int:
    """For tests: return the number of distance measurements that consumers have made."""

def can_pass() -> bool:
    """Return whether this processor can copy with non-temporal stores, with the kernels in use."""
