"""Memory pressure: a piece whose windows do not fit memory is served in slices, whose blocks are read repeatedly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tiercache.load.plan import Piece
    from tiercache.load.window import LoadedWindow
    from tiercache.order import Window

# Share of the memory limit for windows, two of which are in memory at a time; the rest is for the model and the
# batches.
WINDOWS_SHARE = 2
# Rows examined for one slice: enough to fill any slice that does not hold its windows whole, and quick to examine.
LOOK_ROWS = 1 << 13


@dataclass(frozen=True, slots=True, eq=False)
class PieceSlice:
    """Consecutive rows of a piece, and the blocks that they need. It has the attributes of a Piece."""

    windows: tuple[Window, ...]
    wanted: tuple[NDArray[np.bool_], ...]
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]

    @property
    def run(self) -> None:
        """None: the rows are arrays."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.row)

    def rows(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """See Piece.rows."""
        return self.block, self.row


class MemoryPressure:
    """Decides whether windows fit memory twice: the one that is served and the next one. For the planner's thread.

    Mapped bytes do not count. The share of a window that is not mapped is learnt from the windows that were loaded;
    before the first one, all of it counts.

    Args:
        is_mapped: Function that returns whether a shard's blocks are only mapped.
        limit_bytes: Memory limit of the whole process.
    """

    def __init__(self, is_mapped: Callable[[int], bool], limit_bytes: int) -> None:
        self._is_at_hand = is_mapped
        self._room_bytes = limit_bytes // WINDOWS_SHARE // 2
        self._private_bytes = self._raw_bytes = 0
        self._need_bytes = 0

    @property
    def is_told(self) -> bool:
        """Whether the share of a window that is not mapped is known."""
        return self._raw_bytes > 0

    def record_usage(self, loaded: LoadedWindow) -> None:
        """Count the memory that a loaded window takes."""
        here = loaded.group_of_block >= 0
        self._raw_bytes += int(loaded.window.block_bytes[here].sum())
        self._private_bytes += loaded.private_bytes

    def fits(self, piece: Piece) -> bool:
        """Whether the piece's windows fit memory twice."""
        need_bytes = sum(self._decoded_bytes(w, wanted) for w, wanted in zip(piece.windows, piece.wanted, strict=True))
        if need_bytes <= self._room_bytes:
            return True
        self._need_bytes = max(self._need_bytes, need_bytes)
        return False

    def slices(self, piece: Piece) -> Iterator[PieceSlice]:
        """Yield the piece's rows in slices whose blocks fit memory twice.

        A slice has at least one row, even if its block does not fit.
        """
        block, row = piece.rows()
        sizes = np.concatenate([window.block_bytes for window in piece.windows])
        start = 0
        while start < len(row):
            stop = start + self._fitting(block[start : start + LOOK_ROWS], sizes)
            yield PieceSlice(
                piece.windows, _touched(piece.windows, block[start:stop]), block[start:stop], row[start:stop]
            )
            start = stop

    def explain(self, url: str) -> str:
        """Return the text of the warning, with its numbers."""
        return (
            f"{url}: the windows that are served together take {format_bytes(self._need_bytes)} when decoded, and two "
            f"such sets do not fit the {format_bytes(2 * self._room_bytes)} for windows (half of the memory limit), so "
            "blocks are read and decoded again and again, which is slow. Use more processes or more memory, or start "
            "a run with a smaller shuffle_window_bytes or fewer streams"
        )

    @property
    def _share(self) -> float:
        """Share of a block's raw bytes that takes memory of its own."""
        return self._private_bytes / self._raw_bytes if self._raw_bytes else 1.0

    def _decoded_bytes(self, window: Window, wanted: NDArray[np.bool_]) -> int:
        if not self._share:
            return 0
        whole = self._share * int(window.block_bytes[wanted].sum())
        if whole <= self._room_bytes // 64:  # asking for each shard would cost more than the answer is worth
            return int(whole)
        away = [shard for shard in set(window.shards[wanted].tolist()) if not self._is_at_hand(shard)]
        if not away:
            return 0
        return int(self._share * int(window.block_bytes[wanted & np.isin(window.shards, away)].sum()))

    def _fitting(self, block: NDArray[np.uint32], sizes: NDArray[np.int64]) -> int:
        """Return how many of the first rows need blocks that fit together."""
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
