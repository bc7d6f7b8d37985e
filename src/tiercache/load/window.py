"""Windows in memory: the blocks of a window, opened, checked, decoded, and where each lies."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tiercache.load.split import split

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from tiercache.load.plan import Piece
    from tiercache.load.source import Source
    from tiercache.order import Window
    from tiercache.shard.blocks import Blocks

T = TypeVar("T")


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

    def covers(self, piece: Piece) -> bool:
        """Whether all that the piece needs is here."""
        return self.window.start == piece.window.start and bool((self.holder[piece.wanted] >= 0).all())

    def value(self, block: int, row: int, column: int) -> object:
        """A record's value of an ARROW column, as Python objects. column: index in the shards' schema."""
        return self.held[self.holder[block]].array(int(self.position[block]), column)[int(row)].as_py()


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


def load_window(source: Source, window: Window, wanted: NDArray[np.bool_], threads: Threads) -> Loaded:
    """Bring the wanted blocks of a window into memory: those that are work in parts, side by side.

    Shards that are at hand take some 0.3 ms of Python each, for which threads would only wait for each other.

    Args:
        source: whose shards they are.
        window: of the order.
        wanted: bool[n_blocks].
        threads: that load.

    Raises:
        CorruptShard, StoreError: as `ShardReader.load`.
        CancelledError: told to stop.
    """
    n_streams = sum(len(column.streams(0)) for column in source.schema.columns)
    addresses = np.zeros((n_streams, len(window.blocks), 3), np.uint64)
    holder = np.full(len(window.blocks), -1, np.int32)
    position = np.zeros(len(window.blocks), np.int32)
    parts = split(window, wanted, threads.n_threads, source.is_at_hand)
    held: list[Blocks] = []

    def load(places: NDArray[np.int64]) -> Blocks:
        return source.load(int(window.shards[places[0]]), window.blocks[places].tolist())

    def keep(places: NDArray[np.int64], blocks: Blocks) -> None:
        addresses[:, places] = blocks.addresses
        holder[places] = len(held)
        position[places] = np.arange(len(places))
        held.append(blocks)

    futures = [threads.executor.submit(load, places) for places in parts.work]
    try:
        for places in parts.at_hand:
            keep(places, load(places))
        for future, places in zip(futures, parts.work, strict=True):
            keep(places, threads.result(future))
    finally:
        for future in futures:
            future.cancel()  # after an error: what has not begun need not
    return Loaded(window, addresses, tuple(held), holder, position)
