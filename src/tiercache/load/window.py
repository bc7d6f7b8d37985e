"""Windows in memory: their blocks are opened, checked and decoded; several windows can be addressed as one."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tiercache._native.residence import are_resident
from tiercache.errors import CorruptShard
from tiercache.load.split import split_window
from tiercache.order import Window
from tiercache.store.retry import stop_retries_when

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from tiercache.load.source import Source
    from tiercache.shard.read.blocks import Blocks

T = TypeVar("T")

# Pages that were checked longer ago are checked again. Checking data in memory takes less than a hundredth of this time
# (7 GB/s per core), and an epoch that takes longer is bound by the disk or the consumer.
CHECKED_FOR_S = 600.0
# Minimum number of threads that wait for stores: they wait for the network, so there may be more of them than cores.
MIN_LOAD_THREADS = 4


def renew_checks(blocks: Blocks) -> None:
    """Mark blocks unchecked if they will be read from the disk again, or were checked long ago."""
    if not blocks.reports_residency or are_resident(blocks.pages):
        blocks.reset_old_checks(CHECKED_FOR_S)
    else:
        blocks.reset_checks()


def loading_pool(n_threads: int) -> ThreadPoolExecutor:
    """Return the threads that load windows, beside n_threads gather threads; they start with the first task."""
    return ThreadPoolExecutor(max(MIN_LOAD_THREADS, n_threads), "tiercache-load")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedWindow:
    """The loaded blocks of a window. It owns their memory: addresses are valid while it lives.

    addresses: uint64[n_streams, n_blocks, 3], zeros for blocks that were not requested; held: the parts that were
    loaded concurrently; holder, position: int32[n_blocks], the index in `held` of the part that has the block (-1:
    none), and the block's index there.
    """

    window: Window
    addresses: NDArray[np.uint64]
    block_groups: tuple[Blocks, ...]
    group_of_block: NDArray[np.int32]
    position: NDArray[np.int32]

    @property
    def checks(self) -> NDArray[np.uint64] | None:
        """Checks that the blocks still need, uint64[n_streams, n_blocks, 4] as Blocks.pending_checks; None: none."""
        checks = None
        for number, blocks in enumerate(self.block_groups):
            left = blocks.pending_checks
            if left is None:
                continue
            if checks is None:
                checks = np.zeros((*self.addresses.shape[:2], 4), np.uint64)
            places = np.flatnonzero(self.group_of_block == number)
            checks[:, places[np.argsort(self.position[places])]] = left
        return checks

    @property
    def private_bytes(self) -> int:
        """Bytes of memory that are neither mapped nor shared: data that was read or decoded."""
        return sum(blocks.private_bytes for blocks in self.block_groups)

    def covers(self, wanted: NDArray[np.bool_]) -> bool:
        """Whether all of these blocks are loaded. wanted: bool[n_blocks]."""
        return bool((self.group_of_block[wanted] >= 0).all())

    def value(self, block: int, row: int, column: int) -> object:
        """Return a record's value of an ARROW column as Python objects. column: its index among the served columns."""
        blocks = self.block_groups[self.group_of_block[block]]
        return blocks.array(int(self.position[block]), blocks.columns[column])[int(row)].as_py()


class JoinedWindows:
    """Windows whose rows are served together; their blocks are numbered through, one window after the other.

    windows: in that order; addresses: uint64[n_streams, n_blocks, 3] of all windows, valid while this object lives.
    """

    def __init__(self, windows: Sequence[LoadedWindow]) -> None:
        self.windows = tuple(windows)
        parts = [loaded.addresses for loaded in self.windows]
        self.addresses: NDArray[np.uint64] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        self._ends = np.cumsum([part.shape[1] for part in parts])
        self._checks: NDArray[np.uint64] | None = None
        self._n_asked = 0

    def checks_for(self, n_rows: int) -> NDArray[np.uint64] | None:
        """Return the checks of all windows for n_rows; some of the named pages may have been checked since.

        Computing the checks takes 0.2 us per chunk: for a few rows of many blocks that is more than checking each page
        once more. So they are computed once per as many rows as there are chunks.
        """
        self._n_asked += n_rows
        if self._checks is None or self._n_asked >= self.addresses.shape[0] * self.addresses.shape[1]:
            self._checks, self._n_asked = self.checks, 0
        return self._checks

    @property
    def checks(self) -> NDArray[np.uint64] | None:
        """Checks that the blocks of all windows still need. See Loaded.checks."""
        parts = [loaded.checks for loaded in self.windows]
        if len(parts) == 1 or all(part is None for part in parts):
            return parts[0]
        nothing = [np.zeros((*loaded.addresses.shape[:2], 4), np.uint64) for loaded in self.windows]
        return np.concatenate([n if part is None else part for part, n in zip(parts, nothing, strict=True)], axis=1)

    def find(self, block: int) -> tuple[LoadedWindow, int]:
        """Return the window of a block, and the block's number in that window."""
        number = int(np.searchsorted(self._ends, block, side="right"))
        return self.windows[number], block - (int(self._ends[number - 1]) if number else 0)


@dataclass(frozen=True, slots=True)
class LoadThreads:
    """Threads that load windows: an executor with n_threads that wait for stores and decode, and a stop signal.

    stop: Future that ends all waiting; limit_bytes: memory limit of the whole process.
    """

    executor: Executor
    stop: Future[None]
    n_threads: int
    limit_bytes: int

    def result(self, future: Future[T]) -> T:
        """Return the future's result, or raise its error. Raises CancelledError if stop is done first."""
        watched: tuple[Future[Any], ...] = (future, self.stop)
        wait(watched, return_when=FIRST_COMPLETED)
        if not future.done():
            raise CancelledError
        return future.result()


class WindowLoad:
    """A window that is being loaded: threads read and decode, concurrently in parts; finish() maps the rest.

    Mapping a shard takes some 0.3 ms of Python, for which threads would only wait for each other.

    Args:
        source: Source of the shards.
        window: Window of the order.
        wanted: bool[n_blocks], the blocks to load.
        executor: Executor that loads; it may be shut down meanwhile.
        n_threads: Number of threads that load.
        unwanted: Event that keeps threads from starting further parts once it is set. None: only cancel() does.
    """

    def __init__(
        self,
        source: Source,
        window: Window,
        wanted: NDArray[np.bool_],
        executor: Executor,
        n_threads: int,
        *,
        unwanted: Event | None = None,
    ) -> None:
        self.window = window
        self.wanted = wanted
        self._source, self._unwanted = source, unwanted
        self._n_streams = sum(len(column.streams(0)) for column in source.schema.columns)
        parts = split_window(window, wanted, n_threads, source.is_mapped)
        self._at_hand = list(parts.at_hand)
        self._loaded: list[tuple[NDArray[np.int64], Blocks]] = []
        self._work = [(places, executor.submit(self._load_wanted, places)) for places in parts.work]

    def finish(self, threads: LoadThreads) -> LoadedWindow:
        """Return the window when all of it is loaded. May be called once.

        Raises:
            CorruptShard, StoreError: See `ShardReader.load`.
            CancelledError: The pipeline stopped.
        """
        n_blocks = len(self.window.blocks)
        addresses = np.zeros((self._n_streams, n_blocks, 3), np.uint64)
        holder, position = np.full(n_blocks, -1, np.int32), np.zeros(n_blocks, np.int32)
        try:
            self.map_shards()
            loaded = [*self._loaded, *((places, threads.result(future)) for places, future in self._work)]
        finally:
            self.cancel()  # after an error the other parts need not start
            # The epoch refers to this object to its end, and must not keep this memory.
            self._loaded, self._work = [], []
        for number, (places, blocks) in enumerate(loaded):
            addresses[:, places] = blocks.addresses
            holder[places] = number
            position[places] = np.arange(len(places))
        return LoadedWindow(self.window, addresses, tuple(blocks for _, blocks in loaded), holder, position)

    def map_shards(self) -> None:
        """Map all mapped shards in this thread. Raises as finish()."""
        while self.map_next_shard():
            pass

    def map_next_shard(self) -> bool:
        """Map the next mapped shard in this thread; False: there is none left. Raises as finish()."""
        if not self._at_hand:
            return False
        places = self._at_hand.pop()
        self._loaded.append((places, self._load(places)))
        return True

    def cancel(self) -> None:
        """Cancel the parts that no thread has started."""
        for _, future in self._work:
            future.cancel()

    def _load_wanted(self, places: NDArray[np.int64]) -> Blocks:
        if self._unwanted is not None and self._unwanted.is_set():
            raise CancelledError
        with stop_retries_when(self._unwanted):
            return self._load(places)

    def _load(self, places: NDArray[np.int64]) -> Blocks:
        shard = int(self.window.shards[places[0]])
        try:
            blocks = self._source.load(shard, self.window.blocks[places].tolist())
            # Single pages of 4 KiB are read for listed rows; checking would read 64 KiB for each of them.
            if isinstance(self.window, Window):
                renew_checks(blocks)
            return blocks
        except CorruptShard as error:
            error.facts["place"] = shard, error.facts["block"], None  # used if corrupt records are replaced
            raise
