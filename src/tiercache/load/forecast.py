"""When a rank reads each shard, in this epoch and in later ones: pure functions.

The clock of a read plan is the number of stored bytes that the job has read since the start of its epoch. Within a
group of shards the clock advances as the group's records are served, and it reaches the end of the group with its last
record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import NEVER, ReadingPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from tiercache.load.share import OrderShare
    from tiercache.order.window import ShardGroups

# Maximum of later epochs that are examined. If a rank reads the same shards in each epoch, one is enough.
MAX_EPOCHS_AHEAD = 64
# Maximum of shards examined over all epochs. A shard takes 0.15 us and a stream 150 us, so the maximum takes 0.3 s.
MAX_SHARDS_AHEAD = 1 << 21
_SHARDS_A_STREAM = 1024
# Epochs without a new shard after which the search ends. A rank with fixed shards reads no others; a rank that gets
# other shards in each epoch has then probably met all but a few.
EPOCHS_WITHOUT_NEWS = 3


class ReadClock:
    """Maps positions of an epoch, from `start` on, to the clock. Immutable.

    Args:
        start: Position of the epoch at which the clock is 0.
        begins, ends: int64[g], positions of the epoch between which each group is read.
        n_bytes: int64[g], stored bytes of each group.
    """

    def __init__(
        self, start: int, begins: NDArray[np.int64], ends: NDArray[np.int64], n_bytes: NDArray[np.int64]
    ) -> None:
        bounds, where = np.unique(np.concatenate([[start], begins, ends]), return_inverse=True)
        rates = n_bytes / np.maximum(ends - begins, 1)
        changes = np.bincount(where[1:], np.concatenate([rates, -rates]), len(bounds))
        read = np.cumsum(changes)[:-1] * np.diff(bounds)
        self._bounds = bounds
        # Rounding errors of the summed rates could make the clock run backwards.
        self._bytes = np.maximum.accumulate(np.concatenate([[0.0], np.cumsum(read)]))

    @property
    def total(self) -> int:
        """The clock at the end of the epoch."""
        return round(float(self._bytes[-1]))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the clock when all records before each position were served: int64[n]."""
        return np.round(np.interp(positions, self._bounds, self._bytes)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ShardUses:
    """The shards that a rank reads in one epoch, and when. Immutable.

    begins, ends: int64[n_shards], positions of the epoch between which each shard is in use; NEVER and 0 if it is not
    read.
    """

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    clock: ReadClock

    @property
    def shards(self) -> NDArray[np.int64]:
        """The shards that are read, rising."""
        return np.flatnonzero(self.ends)


def find_shard_uses(share: OrderShare, start: int, n_shards: int) -> ShardUses:
    """Return what the rank reads from a position of its epoch to the end. Reads no footers.

    Padding, and records of a last batch that come from another rank's stream, are not counted.
    """
    order, ranks = share.order, share.ranks
    begins, ends = np.full(n_shards, NEVER), np.zeros(n_shards, np.int64)
    spans: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    for stream in ranks.streams:
        groups = _from(order.groups(stream), stream, order.n_streams, start)
        sizes = np.diff(groups.cuts)
        np.minimum.at(begins, groups.shards, np.repeat(groups.starts, sizes))
        np.maximum.at(ends, groups.shards, np.repeat(groups.stops, sizes))
        spans.append((groups.starts, groups.stops, groups.stored_bytes))
    return ShardUses(begins, ends, ReadClock(start, *(np.concatenate(column) for column in zip(*spans, strict=True))))


def _from(groups: ShardGroups, stream: int, n_streams: int, start: int) -> ShardGroups:
    """Return a stream's groups, in positions of the epoch, without what lies before `start`."""
    # Position p of the stream is position p * n_streams + stream of the epoch.
    begins, ends = groups.starts * n_streams + stream, (groups.stops - 1) * n_streams + stream + 1
    return replace(groups, starts=begins, stops=ends).moved_to(np.maximum(begins, start), ends)


def make_read_plan(
    owner: str, uses: ShardUses, later: Iterable[OrderShare], n_filled: int, max_shards: int = MAX_SHARDS_AHEAD
) -> ReadingPlan:
    """Return the read plan of a rank.

    Args:
        owner: Description of the job for people.
        uses: What the rank reads in the current epoch.
        later: The rank's shares of the later epochs. They are examined until all shards of this epoch are found again
            and EPOCHS_WITHOUT_NEWS further epochs show no new shard, at most MAX_EPOCHS_AHEAD.
        n_filled: Number of shards that have records.
        max_shards: Maximum of shards examined over all later epochs; at least one epoch is examined.
    """
    n_shards = len(uses.ends)
    then = np.full(n_shards, NEVER)
    passed, looked, quiet = uses.clock.total, 0, 0
    for number, share in enumerate(later):
        found = find_shard_uses(share, 0, n_shards)
        news = found.shards[then[found.shards] == NEVER]
        then[news] = passed + found.clock.at(found.begins[news])
        passed += found.clock.total
        looked += cost_of(share, n_shards)
        quiet = quiet + 1 if not len(news) and (then[uses.shards] != NEVER).all() else 0
        if quiet >= EPOCHS_WITHOUT_NEWS or np.count_nonzero(then != NEVER) == n_filled:
            break
        if number + 1 >= MAX_EPOCHS_AHEAD or looked >= max_shards or passed >= NEVER // 2:
            break
    shards = np.flatnonzero((uses.ends > 0) | (then != NEVER))
    is_read = uses.ends[shards] > 0
    first, last = (
        np.where(is_read, uses.clock.at(np.where(is_read, positions[shards], 0)), NEVER)
        for positions in (uses.begins, uses.ends)
    )
    return ReadingPlan(owner, shards, first, last, then[shards])


def cost_of(share: OrderShare, n_shards: int) -> int:
    """Return the cost of examining one epoch, in shards."""
    return n_shards + _SHARDS_A_STREAM * len(share.ranks.streams)
