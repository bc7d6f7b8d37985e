"""The publisher of a read plan: it tells the cache when an epoch's shards are read, and how far the epoch is."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import TierCacheError
from tiercache.load.forecast import MAX_SHARDS_AHEAD, ShardUses, cost_of, find_shard_uses, make_read_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.load.share import OrderShare
    from tiercache.load.source import Source
    from tiercache.load.state import RunState
    from tiercache.model import PublishedPlan

logger = logging.getLogger("tiercache")

# A plan of this many shards is published in some 10 ms, before the first shard is opened, and later epochs are examined
# in as much time. A thread of its own makes larger plans: 1,000,000 shards take 3 s, in which windows must be loaded.
QUICK_SHARDS, QUICK_SHARDS_AHEAD = 4096, 1 << 17


class ReadPlanPublisher:
    """Publishes the read plan of one rank's epoch.

    The planner begins, completes and advances it; the owner of the epoch closes it. Without a cache nothing is
    computed. A plan that cannot be written is not an error: the cache then knows less. Thread-safe; in a forked child
    the methods do nothing.

    Args:
        source: Source that is read.
        state: State at the start of the epoch, or where it was resumed.
        plan_epoch: Function that returns a rank's share of an epoch. It must not refer to the loader, which would then
            live too long.
    """

    def __init__(self, source: Source, state: RunState, plan_epoch: Callable[[RunState], OrderShare]) -> None:
        self._source = source
        self._state = state
        self._plan_epoch = plan_epoch
        self._lock = threading.RLock()  # The garbage collector may call close() in a thread that holds the lock.
        self._share: OrderShare | None = None
        self._uses: ShardUses | None = None
        self._following: PublishedPlan | None = None
        self._before: ReadPlanPublisher | None = None  # closed once this publisher has published
        self._is_complete = self._is_closed = False
        self._clock = 0
        self._pid = os.getpid()

    def begin(self, share: OrderShare, n_batches: int = 0) -> None:
        """Publish what is known quickly, before a shard of the share is opened. Only the first call counts.

        n_batches: number of batches of the share that were served before.
        """
        if self._share is not None or self._is_closed or not self._source.has_cache:
            return
        self._share, self._start = share, share.ranks.offset_after(n_batches)
        if len(self._source.shard_records) <= QUICK_SHARDS:
            self._publish(QUICK_SHARDS_AHEAD)

    def complete(self) -> None:
        """Publish all that can be known, after the first batch was pushed. Only the first call counts."""
        if self._share is None or self._is_complete or self._is_closed:
            return
        self._is_complete = True
        if len(self._source.shard_records) <= QUICK_SHARDS:
            self._publish(MAX_SHARDS_AHEAD)
        else:
            threading.Thread(target=self._publish, args=(MAX_SHARDS_AHEAD,), name="tiercache-plan", daemon=True).start()

    def advance(self, n_batches: int, n_rows: int) -> None:
        """Set the clock to n_batches of the share and then n_rows."""
        uses, share = self._uses, self._share
        if uses is not None and share is not None:
            n_done = min(n_batches + n_rows // share.batch_size, share.n_batches)
            position = np.array([share.ranks.offset_after(n_done)], np.int64)
            self._advance(int(uses.clock.at(position)[0]))

    def finish(self) -> None:
        """Set the clock to the end of the epoch: no shard is in use, not even those of a dropped last batch."""
        if self._uses is not None and self._pid == os.getpid():  # a forked child may have inherited the lock locked
            self._advance(self._uses.clock.total)

    def succeed(self, before: ReadPlanPublisher) -> None:
        """Close another publisher as soon as this one has published, or is closed."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._following is None and not self._is_closed and self._source.has_cache:
                self._before = before
                return
        before.close()

    def close(self) -> None:
        """Withdraw the plan. May be called repeatedly."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_closed = True
            following, self._following = self._following, None
            before, self._before = self._before, None
        for one in (following, before):
            if one is not None:
                one.close()

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pid"):
            self.close()

    def _advance(self, clock: int) -> None:
        with self._lock:  # The planner may report an older position after the consumer took the last batch.
            if clock > self._clock:
                self._clock = clock
                if self._following is not None:
                    self._following.advance(clock)

    def _publish(self, max_shards: int) -> None:
        following: PublishedPlan | None
        try:
            following = self._follow(max_shards)
        except (OSError, TierCacheError) as error:
            logger.debug("the reading plan cannot be published, so the cache does not know what comes: %s", error)
            # The earlier plan is withdrawn all the same: it would announce this epoch as the next one for ever.
            following = None
        with self._lock:
            old, self._following = self._following, following or self._following
            before, self._before = self._before, None
            over = [one for one in (old, before) if one is not None and one is not self._following]
            if self._is_closed and self._following is not None:
                over.append(self._following)
                self._following = None
        try:
            with self._lock:
                if self._following is not None and self._clock:
                    self._following.advance(self._clock)
        finally:  # No other object refers to these plans any more.
            for one in over:
                one.close()

    def _follow(self, max_shards: int) -> PublishedPlan | None:
        share, source = self._share, self._source
        if share is None:
            return None
        n_shards = len(source.shard_records)
        if self._uses is None:
            self._uses = find_shard_uses(share, self._start, n_shards)
        ranks, n_filled = share.ranks, int(np.count_nonzero(source.shard_records))
        owner = f"rank {ranks.rank} of {ranks.world_size}, epoch {self._state.epoch}, seed {share.seed}"
        looked: list[int] = []
        plan = make_read_plan(owner, self._uses, self._later(looked), n_filled, max_shards)
        self._is_complete = max_shards >= MAX_SHARDS_AHEAD or sum(looked) < max_shards
        # Closed while the plan was computed. The cache may be closed too, and must not be opened again.
        if self._is_closed:
            return None
        return source.publish(replace(plan, reader=self._reader(share)))

    def _reader(self, share: OrderShare) -> str:
        """Return ReadingPlan.reader; "" for a single rank.

        One of several ranks ends its epoch first. The cache remembers what that rank reads next, so that the other
        ranks do not evict it.
        """
        ranks, parts = share.ranks, [(part.dataset_id, part.selection) for part in self._source.parts]
        beside = ranks.world_size > 1
        seed = self._state.following(0).seed  # the same in all epochs of the run
        return f"rank {ranks.rank} of {ranks.world_size}, seed {seed}, of {parts}" if beside else ""

    def _later(self, looked: list[int]) -> Iterator[OrderShare]:
        """Yield the rank's shares of the following epochs; append the cost of each to `looked`."""
        for number in itertools.count(self._state.epoch + 1):
            share = self._plan_epoch(self._state.following(number))
            looked.append(cost_of(share, len(self._source.shard_records)))
            yield share
