"""The reading plan that the cache gets: when a rank reads each shard, in this epoch and in later ones.

The clock of a reading plan is the number of stored bytes that the job has read since the start of its epoch.
make_reading_plan() is a pure function; ReadingPlanPublisher publishes, advances and withdraws the plan.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import TierCacheError
from tiercache.model import NEVER, ReadingPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from tiercache.data.records import Records
    from tiercache.load.epoch import MakeShare, OrderShare
    from tiercache.load.state import RunState
    from tiercache.model import PublishedPlan
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
    order, rank_plan = share.order, share.rank_plan
    begins, ends = np.full(n_shards, NEVER), np.zeros(n_shards, np.int64)
    spans: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    for stream in rank_plan.streams:
        groups = _groups_from(order.groups(stream), stream, order.n_streams, start)
        sizes = np.diff(groups.cuts)
        np.minimum.at(begins, groups.shards, np.repeat(groups.starts, sizes))
        np.maximum.at(ends, groups.shards, np.repeat(groups.stops, sizes))
        spans.append((groups.starts, groups.stops, groups.stored_bytes))
    return ShardUses(begins, ends, ReadClock(start, *(np.concatenate(column) for column in zip(*spans, strict=True))))


def _groups_from(groups: ShardGroups, stream: int, n_streams: int, start: int) -> ShardGroups:
    """Return a stream's groups, in positions of the epoch, without what lies before `start`."""
    # Position p of the stream is position p * n_streams + stream of the epoch.
    begins, ends = groups.starts * n_streams + stream, (groups.stops - 1) * n_streams + stream + 1
    return replace(groups, starts=begins, stops=ends).moved_to(np.maximum(begins, start), ends)


def make_reading_plan(
    owner: str, uses: ShardUses, later: Iterable[OrderShare], n_filled: int, max_shards: int = MAX_SHARDS_AHEAD
) -> ReadingPlan:
    """Return the reading plan of a rank.

    Args:
        owner: Description of the job for people.
        uses: What the rank reads in the current epoch.
        later: The rank's shares of the later epochs. They are examined until all shards of this epoch are found again
            and EPOCHS_WITHOUT_NEWS further epochs show no new shard, at most MAX_EPOCHS_AHEAD.
        n_filled: Number of shards that have records.
        max_shards: Maximum of shards examined over all later epochs; at least one epoch is examined.
    """
    n_shards = len(uses.ends)
    next_read = np.full(n_shards, NEVER)
    elapsed, cost, n_quiet = uses.clock.total, 0, 0
    for number, share in enumerate(later):
        later_uses = find_shard_uses(share, 0, n_shards)
        new_shards = later_uses.shards[next_read[later_uses.shards] == NEVER]
        next_read[new_shards] = elapsed + later_uses.clock.at(later_uses.begins[new_shards])
        elapsed += later_uses.clock.total
        cost += cost_of(share, n_shards)
        n_quiet = n_quiet + 1 if not len(new_shards) and (next_read[uses.shards] != NEVER).all() else 0
        if n_quiet >= EPOCHS_WITHOUT_NEWS or np.count_nonzero(next_read != NEVER) == n_filled:
            break
        if number + 1 >= MAX_EPOCHS_AHEAD or cost >= max_shards or elapsed >= NEVER // 2:
            break
    shards = np.flatnonzero((uses.ends > 0) | (next_read != NEVER))
    is_read = uses.ends[shards] > 0
    first, last = (
        np.where(is_read, uses.clock.at(np.where(is_read, positions[shards], 0)), NEVER)
        for positions in (uses.begins, uses.ends)
    )
    return ReadingPlan(owner, shards, first, last, next_read[shards])


def cost_of(share: OrderShare, n_shards: int) -> int:
    """Return the cost of examining one epoch, in shards."""
    return n_shards + _SHARDS_A_STREAM * len(share.rank_plan.streams)


logger = logging.getLogger("tiercache")

# A plan of this many shards is published in some 10 ms, before the first shard is opened, and later epochs are examined
# in as much time. A thread of its own makes larger plans: 1,000,000 shards take 3 s, in which windows must be loaded.
QUICK_SHARDS, QUICK_SHARDS_AHEAD = 4096, 1 << 17


class ReadingPlanPublisher:
    """Publishes the reading plan of one rank's epoch.

    The planner begins, completes and advances it; the owner of the epoch closes it. Without a cache nothing is
    computed. A plan that cannot be written is not an error: the cache then knows less. Thread-safe; in a forked child
    the methods do nothing.
    """

    def __init__(self, source: Records, state: RunState, make_share: MakeShare) -> None:
        self._source = source
        self._state = state
        self._make_share = make_share
        self._lock = threading.RLock()  # The garbage collector may call close() in a thread that holds the lock.
        self._share: OrderShare | None = None
        self._uses: ShardUses | None = None
        self._published: PublishedPlan | None = None
        self._earlier: ReadingPlanPublisher | None = None  # closed once this publisher has published
        self._is_complete = self._is_closed = False
        self._clock = 0
        self._pid = os.getpid()

    def begin(self, share: OrderShare, n_batches: int = 0) -> None:
        """Publish the plan of a share, of which n_batches were served before; many shards wait for complete().

        Only the first call counts. It comes before a shard of the share is opened.
        """
        if self._share is not None or self._is_closed or not self._source.storage.has_cache:
            return
        self._share, self._start = share, share.rank_plan.offset_after(n_batches)
        if len(self._source.shard_records) <= QUICK_SHARDS:
            self._is_complete = True
            self._publish(QUICK_SHARDS_AHEAD)

    def complete(self) -> None:
        """Publish the plan of many shards in a thread, after the first batch was pushed. Only the first call counts."""
        if self._share is not None and not self._is_complete and not self._is_closed:
            self._is_complete = True
            threading.Thread(target=self._publish, args=(MAX_SHARDS_AHEAD,), name="tiercache-plan", daemon=True).start()

    def advance(self, n_batches: int, n_rows: int) -> None:
        """Set the clock to n_batches of the share and then n_rows."""
        uses, share = self._uses, self._share
        if uses is not None and share is not None:
            n_done = min(n_batches + n_rows // share.rank_plan.batch_size, share.rank_plan.n_batches)
            position = np.array([share.rank_plan.offset_after(n_done)], np.int64)
            self._advance(int(uses.clock.at(position)[0]))

    def finish(self) -> None:
        """Set the clock to the end of the epoch: no shard is in use, not even those of a dropped last batch."""
        if self._uses is not None and self._pid == os.getpid():  # a forked child may have inherited the lock locked
            self._advance(self._uses.clock.total)

    def replace_earlier(self, earlier: ReadingPlanPublisher) -> None:
        """Close another publisher as soon as this one has published, or is closed."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._published is None and not self._is_closed and self._source.storage.has_cache:
                self._earlier = earlier
                return
        earlier.close()

    def close(self) -> None:
        """Withdraw the plan. May be called repeatedly."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_closed = True
            published, self._published = self._published, None
            earlier, self._earlier = self._earlier, None
        for one in (published, earlier):
            if one is not None:
                one.close()

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pid"):
            self.close()

    def _advance(self, clock: int) -> None:
        with self._lock:  # The planner may report an older position after the consumer took the last batch.
            if clock > self._clock:
                self._clock = clock
                if self._published is not None:
                    self._published.advance(clock)

    def _publish(self, max_shards: int) -> None:
        published: PublishedPlan | None
        try:
            published = self._make_and_publish(max_shards)
        except (OSError, TierCacheError) as error:
            logger.debug("the reading plan cannot be published, so the cache does not know what comes: %s", error)
            # The earlier plan is withdrawn all the same: it would announce this epoch as the next one for ever.
            published = None
        with self._lock:
            earlier, self._earlier = self._earlier, None
            is_unwanted = self._is_closed
            if not is_unwanted:
                self._published = published
                if published is not None and self._clock:
                    published.advance(self._clock)
        for one in (earlier, published if is_unwanted else None):
            if one is not None:
                one.close()

    def _make_and_publish(self, max_shards: int) -> PublishedPlan | None:
        share, source = self._share, self._source
        if share is None:
            return None
        n_shards = len(source.shard_records)
        self._uses = find_shard_uses(share, self._start, n_shards)
        rank_plan, n_filled = share.rank_plan, int(np.count_nonzero(source.shard_records))
        owner = f"rank {rank_plan.rank} of {rank_plan.world_size}, epoch {self._state.epoch}, seed {share.seed}"
        # The rank's shares of the following epochs.
        later = (self._make_share(self._state.following(n)) for n in itertools.count(self._state.epoch + 1))
        plan = make_reading_plan(owner, self._uses, later, n_filled, max_shards)
        # Closed while the plan was computed. The cache may be closed too, and must not be opened again.
        if self._is_closed:
            return None
        return source.storage.publish(replace(plan, reader=self._reader(share)))

    def _reader(self, share: OrderShare) -> str:
        """Return ReadingPlan.reader; "" for a single rank.

        One of several ranks ends its epoch first. The cache remembers what that rank reads next, so that the other
        ranks do not evict it.
        """
        rank_plan, parts = share.rank_plan, [(part.dataset_id, part.selection) for part in self._source.parts]
        beside = rank_plan.world_size > 1
        seed = self._state.following(0).seed  # the same in all epochs of the run
        return f"rank {rank_plan.rank} of {rank_plan.world_size}, seed {seed}, of {parts}" if beside else ""
