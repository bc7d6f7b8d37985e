"""Shard groups of a stream and the positions over which each is read: known without footers, for prefetching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.window import offsets_of_counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class ShardGroups:
    """Shard groups that a stream reads. Immutable.

    Every record of the stream lies in a shard of a group whose positions include the record's position. Iteration
    yields (start, stop, shards).

    Attributes:
        starts, stops: int64[g], positions [start, stop) of the stream over which the shards of each group are in use.
            Groups may overlap; none is empty.
        cuts: int64[g + 1], group i reads shards[cuts[i]:cuts[i + 1]].
        shards: int64[m], shard numbers in the data set, in reading order.
        stored_bytes: int64[g], stored bytes that the stream reads of each group.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    cuts: NDArray[np.int64]
    shards: NDArray[np.int64]
    stored_bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        bounds = zip(
            self.starts.tolist(), self.stops.tolist(), self.cuts.tolist(), self.cuts[1:].tolist(), strict=False
        )
        for start, stop, first, last in bounds:
            yield start, stop, self.shards[first:last]

    def moved_to(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> ShardGroups:
        """Return the groups over other positions, with proportional bytes; groups that become empty are dropped.

        Args:
            starts, stops: int64[g], new positions of each group.
        """
        kept = np.flatnonzero(stops > starts)
        share = (stops[kept] - starts[kept]) / (self.stops[kept] - self.starts[kept])
        sizes = np.diff(self.cuts)
        chosen = np.zeros(len(self), np.bool_)
        chosen[kept] = True
        return ShardGroups(
            starts[kept],
            stops[kept],
            offsets_of_counts(sizes[kept]),
            self.shards[np.repeat(chosen, sizes)],
            (self.stored_bytes[kept] * share).astype(np.int64),
        )


def single_shard_groups(
    starts: NDArray[np.int64], stops: NDArray[np.int64], shards: NDArray[np.int64], stored_bytes: NDArray[np.int64]
) -> ShardGroups:
    """Return groups of one shard each; all arguments are int64[m]."""
    return ShardGroups(starts, stops, np.arange(len(shards) + 1), shards, stored_bytes)


def concat_groups(parts: Sequence[ShardGroups]) -> ShardGroups:
    """Return the groups of several sequences, one sequence after the other."""
    if len(parts) == 1:
        return parts[0]
    nothing = np.empty(0, np.int64)
    return ShardGroups(
        np.concatenate([nothing, *(part.starts for part in parts)]),
        np.concatenate([nothing, *(part.stops for part in parts)]),
        offsets_of_counts(np.concatenate([nothing, *(np.diff(part.cuts) for part in parts)])),
        np.concatenate([nothing, *(part.shards for part in parts)]),
        np.concatenate([nothing, *(part.stored_bytes for part in parts)]),
    )
