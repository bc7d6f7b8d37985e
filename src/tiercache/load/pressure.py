"""Windows that do not fit memory: pieces are then served slice by slice, whose blocks are read again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tiercache.load.plan import Piece
    from tiercache.load.window import Loaded
    from tiercache.order import Window

# Of the memory limit, for windows, two of which are in memory at a time: the rest is the model's and the batches'.
WINDOWS_SHARE = 2
# Rows that are looked at for one slice: enough to fill any that does not hold its windows whole, quickly looked at.
LOOK_ROWS = 1 << 13


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Rows of a piece, one after the other, and the blocks that they need. The same attributes as a Piece."""

    windows: tuple[Window, ...]
    wanted: tuple[NDArray[np.bool_], ...]
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]

    @property
    def run(self) -> None:
        """Its rows are arrays."""

    @property
    def n_rows(self) -> int:
        """Of the slice."""
        return len(self.row)

    def rows(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """As Piece.rows."""
        return self.block, self.row


class Pressure:
    """Whether windows fit memory twice: what is being served, and what comes after it. For the planner's thread.

    What is mapped does not count. How much of a window is not mapped is learnt from those that were loaded; before the
    first, all of it is taken to be decoded.

    Args:
        is_at_hand: whether a shard's blocks are mapped as they are.
        limit_bytes: of memory, for all that the process does.
    """

    def __init__(self, is_at_hand: Callable[[int], bool], limit_bytes: int) -> None:
        self._is_at_hand = is_at_hand
        self._room_bytes = limit_bytes // WINDOWS_SHARE // 2
        self._private_bytes = self._raw_bytes = 0
        self._need_bytes = 0

    @property
    def is_told(self) -> bool:
        """Whether it is known how much of a window is not mapped."""
        return self._raw_bytes > 0

    def learn(self, loaded: Loaded) -> None:
        """Count what a window took."""
        here = loaded.holder >= 0
        self._raw_bytes += int(loaded.window.block_bytes[here].sum())
        self._private_bytes += loaded.private_bytes

    def fits(self, piece: Piece) -> bool:
        """Whether the piece's windows fit twice."""
        need_bytes = sum(self._decoded_bytes(w, wanted) for w, wanted in zip(piece.windows, piece.wanted, strict=True))
        if need_bytes <= self._room_bytes:
            return True
        self._need_bytes = max(self._need_bytes, need_bytes)
        return False

    def slices(self, piece: Piece) -> Iterator[Slice]:
        """The piece's rows, cut so that the blocks of each slice fit twice, or one block does not.

        A row is one slice at least: never refused.
        """
        block, row = piece.rows()
        sizes = np.concatenate([window.block_bytes for window in piece.windows])
        start = 0
        while start < len(row):
            stop = start + self._fitting(block[start : start + LOOK_ROWS], sizes)
            yield Slice(piece.windows, _touched(piece.windows, block[start:stop]), block[start:stop], row[start:stop])
            start = stop

    def explain(self, url: str) -> str:
        """The warning, with its arithmetic."""
        return (
            f"{url}: the windows that are served at a time take {format_bytes(self._need_bytes)} decoded, and two of "
            f"each do not fit the {format_bytes(2 * self._room_bytes)} that are for them (half of the memory limit): "
            "blocks are read and decoded again and again, which is slow. More processes or more memory avoid it, or a "
            "run with a smaller shuffle_window_bytes or fewer streams"
        )

    @property
    def _share(self) -> float:
        """Of a block's raw bytes, what takes memory of its own."""
        return self._private_bytes / self._raw_bytes if self._raw_bytes else 1.0

    def _decoded_bytes(self, window: Window, wanted: NDArray[np.bool_]) -> int:
        if not self._share:
            return 0
        whole = self._share * int(window.block_bytes[wanted].sum())
        if whole <= self._room_bytes // 64:  # asking for each shard would cost more than it tells
            return int(whole)
        away = [shard for shard in set(window.shards[wanted].tolist()) if not self._is_at_hand(shard)]
        if not away:
            return 0
        return int(self._share * int(window.block_bytes[wanted & np.isin(window.shards, away)].sum()))

    def _fitting(self, block: NDArray[np.uint32], sizes: NDArray[np.int64]) -> int:
        """How many of the first rows need blocks that fit together."""
        blocks, first = np.unique(block, return_index=True)
        turn = np.argsort(first)
        needed = np.cumsum(sizes[blocks[turn]]) * self._share
        n_blocks = max(int(np.searchsorted(needed, self._room_bytes, side="right")), 1)
        return int(first[turn[n_blocks]]) if n_blocks < len(blocks) else len(block)


def _touched(windows: tuple[Window, ...], block: NDArray[np.uint32]) -> tuple[NDArray[np.bool_], ...]:
    ends = np.cumsum([len(window.blocks) for window in windows])
    touched = np.zeros(int(ends[-1]), np.bool_)
    touched[block] = True
    return tuple(np.split(touched, ends[:-1]))
