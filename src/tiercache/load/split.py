"""The parts in which threads load a window's blocks: a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tiercache.order import Window

# Parts per thread: at the end the other threads wait at most for one such part.
PARTS_A_THREAD = 2
# A part costs about 0.2 ms beside its bytes. A part of 16 MiB is decoded in 20 ms, which is how long close() may wait.
MIN_PART_BYTES, MAX_PART_BYTES = 1 << 20, 16 << 20


@dataclass(frozen=True, slots=True)
class WindowParts:
    """Parts of a window, each an int64 array of indices of its blocks, adjacent in one shard and in its order.

    at_hand: whole shards that are only mapped; work: parts that are read, fetched or decoded.
    """

    at_hand: tuple[NDArray[np.int64], ...]
    work: tuple[NDArray[np.int64], ...]


def split_window(
    window: Window, wanted: NDArray[np.bool_], n_threads: int, is_mapped: Callable[[int], bool]
) -> WindowParts:
    """Cut the wanted blocks of a window into parts; those to read, fetch or decode have about the same bytes.

    A thread takes the next part when its last one is done, so all threads are busy to the end, whatever the shards.

    Args:
        window: Window of the order.
        wanted: bool[n_blocks], the blocks to load.
        n_threads: Number of threads that load.
        is_mapped: Function that returns whether a shard's blocks are only mapped.

    Returns:
        The parts. A part to read, fetch or decode has MAX_PART_BYTES at most unless it is a single block. Shards are in
        the order in which the window names them.
    """
    places = np.flatnonzero(wanted)
    if not len(places):
        return WindowParts((), ())
    shards = window.shards[places]
    order = np.lexsort((window.blocks[places], shards))
    places, shards = places[order], shards[order]
    starts = np.concatenate([[0], np.flatnonzero(shards[1:] != shards[:-1]) + 1])
    stops = [*starts[1:].tolist(), len(places)]
    turns = np.argsort(np.minimum.reduceat(places, starts))  # sorted by the first block of each shard in the window
    runs = [places[starts[turn] : stops[turn]] for turn in turns.tolist()]
    free = [is_mapped(int(window.shards[run[0]])) for run in runs]
    at_hand = [run for run, is_free in zip(runs, free, strict=True) if is_free]
    work = [run for run, is_free in zip(runs, free, strict=True) if not is_free]
    limit = part_bytes(sum(int(window.block_bytes[run].sum()) for run in work), n_threads)
    return WindowParts(tuple(at_hand), tuple(part for run in work for part in _cut(run, window, limit)))


def part_bytes(n_bytes: int, n_threads: int) -> int:
    """Return the size of a part of a window that has n_bytes to load."""
    return min(max(n_bytes // (n_threads * PARTS_A_THREAD), MIN_PART_BYTES), MAX_PART_BYTES)


def _cut(run: NDArray[np.int64], window: Window, limit_bytes: int) -> list[NDArray[np.int64]]:
    """Cut a shard's blocks into parts of about the same size, at most limit_bytes unless a block is larger."""
    sums = np.cumsum(window.block_bytes[run])
    n_parts = -(-int(sums[-1]) // limit_bytes)
    share = -(-int(sums[-1]) // max(n_parts, 1))
    parts, begin, start_bytes = [], 0, 0
    while begin < len(run):
        end = max(int(np.searchsorted(sums, start_bytes + share, side="right")), begin + 1)
        parts.append(run[begin:end])
        begin, start_bytes = end, int(sums[end - 1])
    return parts
