"""Threads that gather batches ahead of one consumer, without Python (csrc/ring.h)."""

from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from tiercache._native.permute import RowFinder

END: Final[int]
FAILED: Final[int]
CLOSED: Final[int]

class Figures(TypedDict):
    """Batches taken, ns of gathering (all threads) and of waiting (the consumer), waits, batches ready now."""

    batches: int
    gather_ns: int
    wait_ns: int
    waits: int
    ready: int

class Plan:
    """A window's rows in served order, and what keeps their memory alive.

    addresses: uint64[n_streams, n_blocks, 3]; block, row: uint32[n_rows]; held: any object that owns the memory behind
        addresses and checks; checks: uint64[n_streams, n_blocks, 4], the chunks to be checked on first touch (as
        gather.pyi says), or None; forms: uint64[n], a struct tc_form (csrc/forms.h) for each stream and what they point
        to, the same for all plans of a ring, or None.
    """

    def __init__(
        self,
        addresses: NDArray[np.uint64],
        block: NDArray[np.uint32],
        row: NDArray[np.uint32],
        held: object,
        checks: NDArray[np.uint64] | None = None,
        forms: NDArray[np.uint64] | None = None,
    ) -> None: ...
    @staticmethod
    def of_run(
        addresses: NDArray[np.uint64],
        run: tuple[RowFinder, int, int],
        held: object,
        checks: NDArray[np.uint64] | None = None,
        forms: NDArray[np.uint64] | None = None,
    ) -> Plan:
        """A plan of n rows from position `start` of a finder on, run = (finder, start, n): found batch by batch.

        Raises:
            ValueError: the finder has not so many rows, or more blocks than addresses.
        """

    @property
    def n_rows(self) -> int: ...
    @property
    def held(self) -> object: ...

class Layout:
    """How rows of a column lie one after the other.

    code, bits: of their type, as DLPack has them (0 int, 1 uint, 2 float, 4 bfloat, 6 bool); shape: of a row.
    """

    def __init__(self, code: int, bits: int, shape: tuple[int, ...] = ()) -> None: ...

class Slot:
    """A batch's memory, a writable buffer of bytes (give it to torch.frombuffer).

    Reused when nothing refers to it any more.
    """

    first_row: int
    @property
    def n_rows(self) -> int: ...
    @property
    def n_bytes(self) -> int:
        """Bytes of the batch's values, those that references point to included."""

    def places(self, stream: int) -> tuple[int, int, int]:
        """Where a stream lies: its values and (VAR) its int64 offsets, in bytes, and (VAR) how many elements it has."""

    def tensor(self, layout: Layout, offset: int, n_rows: int) -> object:
        """A DLPack capsule of n_rows from offset on, in bytes, for whoever takes such: it keeps the slot by itself.

        Raises:
            ValueError: they are not all in the slot.
        """

    def start_bytes(self, stream: int) -> None:
        """Make the objects of a REF stream, and have the ring's threads begin to fill them."""

    def bytes_list(self, stream: int) -> list[bytes]:
        """New bytes objects of a REF stream, those that were started or started now, filled from the source.

        The source must be kept, and with it the plan's `held`.

        Raises:
            OSError: EIO, the source could not be read.
        """

    def str_list(self, stream: int) -> list[str]:
        """New str objects of a VAR stream of bytes. Raises UnicodeDecodeError."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Ring:
    """Batches in order.

    push, finish and wait_room are one planner thread's; take is one consumer thread's; close and figures
    anyone's; forget that of whoever closed.

    streams: uint32[n_streams, 2], kind (gather.FIXED, BITS, VAR or 3: references) and width in bytes; depth: batches
        gathered ahead;
    slot_bytes: expected size of a batch.
    """

    def __init__(
        self, streams: NDArray[np.uint32], *, batch_rows: int, depth: int, n_threads: int, slot_bytes: int = 0
    ) -> None: ...
    def push(self, plan: Plan) -> bool:
        """Append a plan's rows. False: the ring is closed."""

    def push_sizes(self, rows: NDArray[np.uint32]) -> bool:
        """Say how many rows each of the next batches has, after those that were told of before. False: closed.

        From the first call on, which comes before the first push, batches have these sizes, instead of batch_rows.

        Raises:
            ValueError: a batch of no rows.
        """

    def finish(self, failed: bool = False) -> None:
        """End the sequence: take() gives a last, short batch of the rows left, then END; or FAILED."""

    def wait_room(self, n_plans: int) -> bool:
        """Wait until at most n_plans pushed plans are still needed, or the next batch needs rows that are not pushed.

        Drops the plans that are no longer needed. False: the ring is closed.
        """

    def take(self, timeout_s: float = -1.0) -> Slot | int:
        """The next batch, or END, FAILED, CLOSED, or another int when timeout_s passed (negative: no limit).

        Raises:
            OSError: EIO, a mapped source of this batch could not be read.
            gather.CorruptError: its bytes are not what was written.
            KeyboardInterrupt: and whatever else a signal handler raises while it waits.
        """

    def close(self) -> None:
        """Wake everyone and end the threads; slots that are out stay valid. Repeatable."""

    def forget(self) -> None:
        """Let go of all plans, once the ring is closed and no slot's lists will be made any more."""

    def figures(self) -> Figures:
        """What it has done so far."""

def held_bytes() -> int:
    """Memory of all batches that somebody still refers to, of all rings of the process, gone ones included."""

class SpareMemory:
    """While one lives, a ring that ends opened_versions its memory to the next of the same size."""

def is_far() -> bool:
    """Whether what threads gather passes the caches by just now, for a consumer whose core is of another cache."""

def pretend_far(is_far: bool | None) -> None:
    """For tests: have all rings take their consumer's core for one of another cache, or of the same; None: find out."""

def n_answers() -> int:
    """For tests: how often consumers have found out whether their core is far."""

def can_pass() -> bool:
    """Whether this processor copies past its caches, with the kernels that are used."""
