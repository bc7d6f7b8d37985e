"""Windows in memory: the blocks of a window, opened, checked, decoded, and where each lies; several as one."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tiercache._native.residence import are_resident
from tiercache.errors import CorruptShard
from tiercache.load.split import split
from tiercache.order import Window
from tiercache.store.retry import trying_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from tiercache.load.source import Source
    from tiercache.shard.blocks import Blocks

T = TypeVar("T")

# A window's pages are checked again where that was done longer ago. Data in memory is checked in less than a hundredth
# of this time (7 GB/s a core), and an epoch that takes longer is bound by the disk or the consumer.
CHECKED_FOR_S = 600.0
# Threads that wait for stores: their time is the network's, so they are more than the cores.
MIN_LOAD_THREADS = 4


def renew_checks(blocks: Blocks) -> None:
    """Have blocks checked again that will be read from the disk again, or were checked long ago."""
    if not blocks.tells_residence or are_resident(blocks.pages):
        blocks.forget_old_checks(CHECKED_FOR_S)
    else:
        blocks.forget_checks()


def loading_pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads that load windows, beside n_threads that gather; they are started when there is work."""
    return ThreadPoolExecutor(max(MIN_LOAD_THREADS, n_threads), "tiercache-load")


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """Blocks of a window. It owns their memory: addresses are good while it lives.

    addresses: uint64[n_streams, n_blocks, 3], zeros for blocks that were not asked for; held: the parts
    that were loaded side by side;
    holder, position: int32[n_blocks], which of held has the block, and where.
    """

    window: Window
    addresses: NDArray[np.uint64]
    held: tuple[Blocks, ...]
    holder: NDArray[np.int32]
    position: NDArray[np.int32]

    @property
    def checks(self) -> NDArray[np.uint64] | None:
        """What is left to check of the blocks, uint64[n_streams, n_blocks, 4] as Blocks.checks; None: nothing."""
        checks = None
        for number, blocks in enumerate(self.held):
            left = blocks.checks
            if left is None:
                continue
            if checks is None:
                checks = np.zeros((*self.addresses.shape[:2], 4), np.uint64)
            places = np.flatnonzero(self.holder == number)
            checks[:, places[np.argsort(self.position[places])]] = left
        return checks

    @property
    def private_bytes(self) -> int:
        """Memory that is neither mapped nor shared: what was read or decoded."""
        return sum(blocks.private_bytes for blocks in self.held)

    def covers(self, wanted: NDArray[np.bool_]) -> bool:
        """Whether all of these blocks are here, bool[n_blocks]."""
        return bool((self.holder[wanted] >= 0).all())

    def value(self, block: int, row: int, column: int) -> object:
        """A record's value of an ARROW column, as Python objects. column: its number among those that are served."""
        blocks = self.held[self.holder[block]]
        return blocks.array(int(self.position[block]), blocks.columns[column])[int(row)].as_py()


class Joined:
    """Windows whose rows are served together: their blocks are numbered through, one window after the other.

    windows: in that order; addresses: uint64[n_streams, n_blocks, 3] of all of them, good while it lives.
    """

    def __init__(self, windows: Sequence[Loaded]) -> None:
        self.windows = tuple(windows)
        parts = [loaded.addresses for loaded in self.windows]
        self.addresses: NDArray[np.uint64] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        self._ends = np.cumsum([part.shape[1] for part in parts])
        self._checks: NDArray[np.uint64] | None = None
        self._n_asked = 0

    def checks_for(self, n_rows: int) -> NDArray[np.uint64] | None:
        """As Loaded.checks, of all windows, for so many rows; some of what it names may have been checked since.

        Looking what is left costs 0.2 us a chunk: for a few rows of many blocks more than to look each page up once
        more. So it is looked up once in as many rows as there are chunks.
        """
        self._n_asked += n_rows
        if self._checks is None or self._n_asked >= self.addresses.shape[0] * self.addresses.shape[1]:
            self._checks, self._n_asked = self.checks, 0
        return self._checks

    @property
    def checks(self) -> NDArray[np.uint64] | None:
        """As Loaded.checks, of all windows."""
        parts = [loaded.checks for loaded in self.windows]
        if len(parts) == 1 or all(part is None for part in parts):
            return parts[0]
        nothing = [np.zeros((*loaded.addresses.shape[:2], 4), np.uint64) for loaded in self.windows]
        return np.concatenate([n if part is None else part for part, n in zip(parts, nothing, strict=True)], axis=1)

    def find(self, block: int) -> tuple[Loaded, int]:
        """The window of a block, and its number there."""
        number = int(np.searchsorted(self._ends, block, side="right"))
        return self.windows[number], block - (int(self._ends[number - 1]) if number else 0)


@dataclass(frozen=True, slots=True)
class Threads:
    """What loads windows: an executor whose n_threads wait for stores and decode, and a future that ends all waiting.

    limit_bytes: of memory, for all that the process does.
    """

    executor: Executor
    stop: Future[None]
    n_threads: int
    limit_bytes: int

    def result(self, future: Future[T]) -> T:
        """The future's result, or its error. Raises CancelledError when stop is done first."""
        watched: tuple[Future[Any], ...] = (future, self.stop)
        wait(watched, return_when=FIRST_COMPLETED)
        if not future.done():
            raise CancelledError
        return future.result()


class Loading:
    """A window on its way into memory: what is work was begun, in parts, side by side; the rest is done by finish().

    Shards that are at hand take some 0.3 ms of Python each, for which threads would only wait for each other.

    Args:
        source: whose shards they are.
        window: of the order.
        wanted: bool[n_blocks].
        executor: whose threads load; it may be shut down meanwhile.
        n_threads: that load.
        unwanted: once it is set, what no thread has begun to load is not loaded; None: cancel() alone says so.
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
        parts = split(window, wanted, n_threads, source.is_at_hand)
        self._at_hand = list(parts.at_hand)
        self._loaded: list[tuple[NDArray[np.int64], Blocks]] = []
        self._work = [(places, executor.submit(self._load_wanted, places)) for places in parts.work]

    def finish(self, threads: Threads) -> Loaded:
        """The window, once all of it is there. To be called once.

        Raises:
            CorruptShard, StoreError: as `ShardReader.load`.
            CancelledError: told to stop.
        """
        n_blocks = len(self.window.blocks)
        addresses = np.zeros((self._n_streams, n_blocks, 3), np.uint64)
        holder, position = np.full(n_blocks, -1, np.int32), np.zeros(n_blocks, np.int32)
        try:
            self.load_at_hand()
            loaded = [*self._loaded, *((places, threads.result(future)) for places, future in self._work)]
        finally:
            self.cancel()  # after an error: what has not begun need not
            self._loaded, self._work = [], []  # an epoch knows how it began to its end, and must not keep this memory
        for number, (places, blocks) in enumerate(loaded):
            addresses[:, places] = blocks.addresses
            holder[places] = number
            position[places] = np.arange(len(places))
        return Loaded(self.window, addresses, tuple(blocks for _, blocks in loaded), holder, position)

    def load_at_hand(self) -> None:
        """Do what is at hand, in this thread. Raises as finish()."""
        while self.load_next_at_hand():
            pass

    def load_next_at_hand(self) -> bool:
        """Do the next part of what is at hand, in this thread; False: there is none. Raises as finish()."""
        if not self._at_hand:
            return False
        places = self._at_hand.pop()
        self._loaded.append((places, self._load(places)))
        return True

    def cancel(self) -> None:
        """Let what has not begun not begin."""
        for _, future in self._work:
            future.cancel()

    def _load_wanted(self, places: NDArray[np.int64]) -> Blocks:
        if self._unwanted is not None and self._unwanted.is_set():
            raise CancelledError
        with trying_until(self._unwanted):
            return self._load(places)

    def _load(self, places: NDArray[np.int64]) -> Blocks:
        shard = int(self.window.shards[places[0]])
        try:
            blocks = self._source.load(shard, self.window.blocks[places].tolist())
            # Of listed rows single pages of 4 KiB are read, where a check would have 64 KiB read for each of them.
            if isinstance(self.window, Window):
                renew_checks(blocks)
            return blocks
        except CorruptShard as error:
            error.facts["place"] = shard, error.facts["block"], None  # for those who go on without it
            raise
