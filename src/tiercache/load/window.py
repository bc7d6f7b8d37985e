"""Windows in memory: the blocks of a window, opened, checked, decoded, and where each lies."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from tiercache.load.plan import Piece
    from tiercache.load.source import Source
    from tiercache.order import Window
    from tiercache.shard.blocks import Blocks


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """Blocks of a window. It owns their memory: addresses are good while it lives.

    addresses: uint64[n_streams, n_blocks, 2], zeros for blocks that were not asked for; held: one Blocks a shard;
    holder, position: int32[n_blocks], which of held has the block, and where.
    """

    window: Window
    addresses: NDArray[np.uint64]
    held: tuple[Blocks, ...]
    holder: NDArray[np.int32]
    position: NDArray[np.int32]

    def covers(self, piece: Piece) -> bool:
        """Whether all that the piece needs is here."""
        return self.window.start == piece.window.start and bool((self.holder[piece.wanted] >= 0).all())

    def value(self, block: int, row: int, column: int) -> object:
        """A record's value of an ARROW column, as Python objects. column: index in the shards' schema."""
        return self.held[self.holder[block]].array(int(self.position[block]), column)[int(row)].as_py()


@dataclass(frozen=True, slots=True)
class Threads:
    """What loads windows: an executor whose threads wait for stores and decode, and a future that ends all waiting."""

    executor: Executor
    stop: Future[None]

    def result(self, future: Future[Blocks]) -> Blocks:
        """The future's result, or its error. Raises CancelledError when stop is done first."""
        watched: tuple[Future[Any], ...] = (future, self.stop)
        wait(watched, return_when=FIRST_COMPLETED)
        if not future.done():
            raise CancelledError
        return future.result()


def load_window(source: Source, window: Window, wanted: NDArray[np.bool_], threads: Threads) -> Loaded:
    """Bring the wanted blocks of a window into memory, shards side by side.

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
    addresses = np.zeros((n_streams, len(window.blocks), 2), np.uint64)
    holder = np.full(len(window.blocks), -1, np.int32)
    position = np.zeros(len(window.blocks), np.int32)
    shards = np.unique(window.shards[wanted])
    members = [np.flatnonzero(wanted & (window.shards == shard)) for shard in shards]

    def load(shard: int, places: NDArray[np.int64]) -> Blocks:
        return source.load(shard, [int(b) for b in window.blocks[places]])

    futures = [threads.executor.submit(load, int(s), places) for s, places in zip(shards, members, strict=True)]
    held = []
    try:
        for number, (future, places) in enumerate(zip(futures, members, strict=True)):
            blocks = threads.result(future)
            held.append(blocks)
            addresses[:, places] = blocks.addresses
            holder[places] = number
            position[places] = np.arange(len(places))
    finally:
        for future in futures:
            future.cancel()  # after an error: what has not begun need not
    return Loaded(window, addresses, tuple(held), holder, position)
