"""When a rank reads each shard: this epoch from where it begins, and as many later ones as it takes. Pure.

A job's clock is the stored bytes that it has read since its epoch began. Within a group it goes on as the group's
records are served, so that it stands where a group is over when the last of them was.
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
    from tiercache.order.groups import Groups

# Epochs that are looked at beyond the one that is read. One tells all where a rank reads the same shards in each.
MAX_EPOCHS_AHEAD = 64
# Shards of all epochs that are looked at: 0.15 us a shard and 150 us a stream here, so 0.3 s for the most.
MAX_SHARDS_AHEAD = 1 << 21
_SHARDS_A_STREAM = 1024
# A rank with shards of its own meets no others; one that is dealt others in each epoch may have met all but a few.
EPOCHS_WITHOUT_NEWS = 3


class Clock:
    """The clock at each position of an epoch, from `start` on. Immutable.

    Args:
        start: position of the epoch at which it is 0.
        begins, ends: int64[g], positions of the epoch between which each group is read.
        n_bytes: int64[g], of each.
    """

    def __init__(
        self, start: int, begins: NDArray[np.int64], ends: NDArray[np.int64], n_bytes: NDArray[np.int64]
    ) -> None:
        bounds, where = np.unique(np.concatenate([[start], begins, ends]), return_inverse=True)
        rates = n_bytes / np.maximum(ends - begins, 1)
        changes = np.bincount(where[1:], np.concatenate([rates, -rates]), len(bounds))
        read = np.cumsum(changes)[:-1] * np.diff(bounds)
        self._bounds = bounds
        # Sums of rates that come and go are off by rounding, and a clock must not go back.
        self._bytes = np.maximum.accumulate(np.concatenate([[0.0], np.cumsum(read)]))

    @property
    def total(self) -> int:
        """At the end of the epoch."""
        return round(float(self._bytes[-1]))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The clock when all that lies before each position was served: int64[n]."""
        return np.round(np.interp(positions, self._bounds, self._bytes)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """What a rank reads of one epoch. Immutable.

    begins, ends: int64[n_shards], positions of the epoch between which each shard is in use; NEVER, 0: not read.
    """

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    clock: Clock

    @property
    def shards(self) -> NDArray[np.int64]:
        """Those that are read, rising."""
        return np.flatnonzero(self.ends)


def uses_of(share: OrderShare, start: int, n_shards: int) -> Uses:
    """What the rank of a share reads from a position of its epoch to the end. Reads no footers.

    Padding, and records of a last batch that come from another rank's stream, do not count.
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
    return Uses(begins, ends, Clock(start, *(np.concatenate(column) for column in zip(*spans, strict=True))))


def _from(groups: Groups, stream: int, n_streams: int, start: int) -> Groups:
    """Groups of a stream over positions of the epoch, what lies before `start` cut off."""
    # Position p of the stream is position p * n_streams + stream of the epoch.
    begins, ends = groups.starts * n_streams + stream, (groups.stops - 1) * n_streams + stream + 1
    return replace(groups, starts=begins, stops=ends).where(np.maximum(begins, start), ends)


def forecast(
    owner: str, uses: Uses, later: Iterable[OrderShare], n_filled: int, max_shards: int = MAX_SHARDS_AHEAD
) -> ReadingPlan:
    """The plan of a rank.

    Args:
        owner: for people.
        uses: of the epoch that is read.
        later: the rank's shares of the epochs after it; looked at until all shards of this epoch are found again and no
            others turn up in EPOCHS_WITHOUT_NEWS more, MAX_EPOCHS_AHEAD at most.
        n_filled: how many shards have records.
        max_shards: that are looked at, of all later epochs together; one epoch is in any case.
    """
    n_shards = len(uses.ends)
    then = np.full(n_shards, NEVER)
    passed, looked, quiet = uses.clock.total, 0, 0
    for number, share in enumerate(later):
        found = uses_of(share, 0, n_shards)
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
    """What looking at one epoch costs, in shards."""
    return n_shards + _SHARDS_A_STREAM * len(share.ranks.streams)
