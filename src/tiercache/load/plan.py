"""What a rank is served of each window: pure, from the order and the rank's share to pieces of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tiercache.order import EpochOrder, RankPlan, Window

# A window is handed on in pieces, the first one small and each four times the one before: the rows of a window of 10^8
# records take seconds to compute (80 ns each), the first batch must not; and a piece is computed in about the time in
# which the fastest consumers are served the one before.
FIRST_PIECE_ROWS = 1 << 13
PIECE_ROWS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of one window in served order.

    block (into the window's blocks), row: uint32[n]; wanted: bool[n_blocks], the blocks that these and the window's
    later pieces need.
    """

    window: Window
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]
    wanted: NDArray[np.bool_]


def pieces(order: EpochOrder, ranks: RankPlan) -> Iterator[Piece]:
    """What the rank is served from its offset to the end of the epoch, in order, padding last."""
    full_stop = ranks.offset + ranks.n_full * ranks.global_batch
    size = FIRST_PIECE_ROWS
    position = ranks.offset
    while position < full_stop:
        window = order.window_at(position)
        stop = min(position + size, window.stop, full_stop)
        piece = _share(window, position, stop, ranks)
        if len(piece.row):
            yield piece
        position, size = stop, min(4 * size, PIECE_ROWS)
    if ranks.n_left:
        for start, stop in ranks.batch(ranks.n_full):
            yield from _run(order, start, stop)


def _share(window: Window, start: int, stop: int, ranks: RankPlan) -> Piece:
    """The rank's rows among positions [start, stop) of full global batches."""
    block, row = window.rows(start - window.start, stop - window.start)
    if ranks.world_size > 1:
        positions = np.arange(start - ranks.offset, stop - ranks.offset)
        mine = positions % ranks.global_batch // ranks.batch_size == ranks.rank
        block, row = block[mine], row[mine]
    if window.key is not None:
        return Piece(window, block, row, np.ones(len(window.blocks), np.bool_))
    return Piece(
        window, block, row, window.first[1:] > start - window.start
    )  # unshuffled and resumed: what lies behind is not needed


def _run(order: EpochOrder, start: int, stop: int) -> Iterator[Piece]:
    while start < stop:
        window = order.window_at(start)
        end = min(stop, window.stop)
        block, row = window.rows(start - window.start, end - window.start)
        wanted = np.zeros(len(window.blocks), np.bool_)
        wanted[block] = True
        yield Piece(window, block, row, wanted)
        start = end
