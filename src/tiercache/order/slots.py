"""Slots of a global batch: its positions sorted by stream, and ranges of slots in order of position; closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class BatchSlots:
    """Offsets of a global batch (positions counted from its start), sorted by stream, then by offset.

    Offset p belongs to the stream whose first offset is p % n_streams; it is that stream's number p // n_streams.

    Attributes:
        n_streams: Number of streams of the order.
        first: int64[n_streams], first offset of each stream; beyond the batch if the stream has none.
        starts: int64[n_streams + 1], slot at which each stream's offsets begin.
    """

    n_streams: int
    first: NDArray[np.int64]
    starts: NDArray[np.int64]

    def number(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of offsets, int64[n]."""
        if self.n_streams == 1:
            return places
        by_place = np.empty(self.n_streams, np.int64)
        by_place[self.first] = self.starts[:-1]
        rounds, first = np.divmod(places, self.n_streams)
        return by_place[first] + rounds

    def take(self, start: int, stop: int) -> RankOffsets:
        """Return the offsets in slots [start, stop), ascending; start < stop."""
        begin = int(np.searchsorted(self.starts, start, side="right")) - 1
        end = int(np.searchsorted(self.starts, stop, side="left"))
        lo = np.maximum(start - self.starts[begin:end], 0)
        hi = np.minimum(stop, self.starts[begin + 1 : end + 1]) - self.starts[begin:end]
        filled = lo < hi
        return _taken(self.first[begin:end][filled], (lo[filled], hi[filled]), self.n_streams)


def stream_slots(start: int, n: int, n_streams: int) -> BatchSlots:
    """Return the slots of a global batch.

    Args:
        start: First position of the batch.
        n: Number of positions.
        n_streams: Number of streams of the order.
    """
    first = (np.arange(n_streams, dtype=np.int64) - start % n_streams) % n_streams
    rounds, longer = divmod(n, n_streams)
    starts = np.zeros(n_streams + 1, np.int64)
    np.cumsum(rounds + (first < longer), out=starts[1:])
    return BatchSlots(n_streams, first, starts)


@dataclass(frozen=True, slots=True, eq=False)
class _Rounds:
    """Rows [start, stop) of the offsets taken: one offset of each of some streams per round, from round `first` on.

    columns: int64[m], first offsets of those streams, ascending.
    """

    start: int
    stop: int
    first: int
    columns: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RankOffsets:
    """Offsets of a global batch that a rank takes, ascending; any range of them is computed at once.

    All streams but the first and the last are taken completely, so there are few parts, whatever the size of the batch:
    the set of streams changes only at a round at which a stream begins or ends.
    """

    n_streams: int
    parts: tuple[_Rounds, ...]

    def offsets(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return rows [start, stop) of the offsets taken, int64[stop - start]."""
        found = []
        for part in self.parts:
            lo, hi = max(start, part.start), min(stop, part.stop)
            if lo >= hi:
                continue
            rows = np.arange(lo - part.start, hi - part.start, dtype=np.int64)
            if len(part.columns) == 1:
                found.append((rows + part.first) * self.n_streams + part.columns[0])
            else:
                rounds, column = np.divmod(rows, len(part.columns))
                found.append((rounds + part.first) * self.n_streams + part.columns[column])
        return np.concatenate(found) if found else np.zeros(0, np.int64)


def _taken(
    first: NDArray[np.int64], rounds: tuple[NDArray[np.int64], NDArray[np.int64]], n_streams: int
) -> RankOffsets:
    """Return the offsets that a rank takes.

    Args:
        first: int64[m], first offset of each stream.
        rounds: First round of each stream that is taken, and the round after the last one.
        n_streams: Number of streams of the order.
    """
    turn = np.argsort(first)
    first, lo, hi = first[turn], rounds[0][turn], rounds[1][turn]
    parts, start = [], 0
    for begin, end in pairwise(np.unique(np.concatenate([lo, hi])).tolist()):
        columns = first[(lo <= begin) & (hi >= end)]
        if len(columns):
            stop = start + (end - begin) * len(columns)
            parts.append(_Rounds(start, stop, begin, columns))
            start = stop
    return RankOffsets(n_streams, tuple(parts))
