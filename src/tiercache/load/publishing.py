"""Tells the cache when an epoch's shards are read: publishes the plan, keeps its clock, withdraws it."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import TierCacheError
from tiercache.load.forecast import MAX_SHARDS_AHEAD, Uses, cost_of, forecast, uses_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.load.share import OrderShare
    from tiercache.load.source import Source
    from tiercache.load.state import RunState
    from tiercache.model import Following

logger = logging.getLogger("tiercache")

# A plan of so many shards is named in some 10 ms, before the first is opened, and later epochs are looked at for
# as long. One of more is made by a thread of its own: of 1,000,000 shards it takes 3 s, in which windows must come.
QUICK_SHARDS, QUICK_SHARDS_AHEAD = 4096, 1 << 17


class Publishing:
    """The plan of one rank's epoch. Its planner begins, completes and advances it; whoever has the epoch closes it.

    Nothing is computed for a source that no cache is round. A plan that cannot be written is no error: the cache then
    knows less. Safe from any thread; in a forked child nothing is done.

    Args:
        source: that is read.
        state: where the epoch begins, or was resumed.
        plan_epoch: a rank's share of an epoch; holds no loader, which would keep it alive.
    """

    def __init__(self, source: Source, state: RunState, plan_epoch: Callable[[RunState], OrderShare]) -> None:
        self._source = source
        self._state = state
        self._plan_epoch = plan_epoch
        self._lock = threading.RLock()  # closing may come by the collector, in a thread that holds it
        self._share: OrderShare | None = None
        self._uses: Uses | None = None
        self._following: Following | None = None
        self._before: Publishing | None = None  # closed once this one is published
        self._is_complete = self._is_closed = False
        self._clock = 0
        self._pid = os.getpid()

    def begin(self, share: OrderShare, n_batches: int = 0) -> None:
        """Publish what is known quickly, before a shard of the share is opened. Only the first call counts.

        n_batches: of the share that are served by now.
        """
        if self._share is not None or self._is_closed or not self._source.is_cached:
            return
        self._share, self._start = share, share.ranks.offset_after(n_batches)
        if len(self._source.shard_records) <= QUICK_SHARDS:
            self._publish(QUICK_SHARDS_AHEAD)

    def complete(self) -> None:
        """Publish all that can be known, once the first batch is on its way. Only the first call counts."""
        if self._share is None or self._is_complete or self._is_closed:
            return
        self._is_complete = True
        if len(self._source.shard_records) <= QUICK_SHARDS:
            self._publish(MAX_SHARDS_AHEAD)
        else:
            threading.Thread(target=self._publish, args=(MAX_SHARDS_AHEAD,), name="tiercache-plan", daemon=True).start()

    def advance(self, n_batches: int, n_rows: int) -> None:
        """Say that so many batches of the share and then so many rows were served."""
        uses, share = self._uses, self._share
        if uses is not None and share is not None:
            n_done = min(n_batches + n_rows // share.batch_size, share.n_batches)
            position = np.array([share.ranks.offset_after(n_done)], np.int64)
            self._advance(int(uses.clock.at(position)[0]))

    def finish(self) -> None:
        """Say that the epoch is over: no shard is in use any more, nor what a last batch was dropped of."""
        if self._uses is not None and self._pid == os.getpid():  # a fork's lock may be held for ever
            self._advance(self._uses.clock.total)

    def succeed(self, before: Publishing) -> None:
        """Close another one as soon as this one is published, or closed."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._following is None and not self._is_closed and self._source.is_cached:
                self._before = before
                return
        before.close()

    def close(self) -> None:
        """Withdraw the plan. Repeatable."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_closed = True
            following, self._following = self._following, None
            before, self._before = self._before, None
        for one in (following, before):
            if one is not None:
                one.close()

    def __del__(self) -> None:
        if hasattr(self, "_pid"):
            self.close()

    def _advance(self, clock: int) -> None:
        with self._lock:  # the planner may still say where it was when the consumer has had the last batch
            if clock > self._clock:
                self._clock = clock
                if self._following is not None:
                    self._following.advance(clock)

    def _publish(self, max_shards: int) -> None:
        following: Following | None
        try:
            following = self._follow(max_shards)
        except (OSError, TierCacheError) as error:
            logger.debug("the reading plan cannot be published, so the cache does not know what comes: %s", error)
            following = None  # and the one before goes all the same: it would say for ever what was to come next
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
        finally:  # nobody else knows of these any more
            for one in over:
                one.close()

    def _follow(self, max_shards: int) -> Following | None:
        share, source = self._share, self._source
        if share is None:
            return None
        n_shards = len(source.shard_records)
        if self._uses is None:
            self._uses = uses_of(share, self._start, n_shards)
        ranks, n_filled = share.ranks, int(np.count_nonzero(source.shard_records))
        owner = f"rank {ranks.rank} of {ranks.world_size}, epoch {self._state.epoch}, seed {share.seed}"
        looked: list[int] = []
        plan = forecast(owner, self._uses, self._later(looked), n_filled, max_shards)
        self._is_complete = max_shards >= MAX_SHARDS_AHEAD or sum(looked) < max_shards
        if self._is_closed:  # while this was computed; the cache may be closed too, and would be opened again for it
            return None
        return source.publish(replace(plan, reader=self._reader(share)))

    def _reader(self, share: OrderShare) -> str:
        """See ReadingPlan: of two ranks one ends first, and the other would have what it kept evicted."""
        ranks, parts = share.ranks, [(part.dataset_id, part.selection) for part in self._source.parts]
        beside = ranks.world_size > 1
        seed = self._state.following(0).seed  # the same in all epochs of the run
        return f"rank {ranks.rank} of {ranks.world_size}, seed {seed}, of {parts}" if beside else ""

    def _later(self, looked: list[int]) -> Iterator[OrderShare]:
        """The rank's shares of the epochs that follow; their costs are put into `looked` as they are asked for."""
        for number in itertools.count(self._state.epoch + 1):
            share = self._plan_epoch(self._state.following(number))
            looked.append(cost_of(share, len(self._source.shard_records)))
            yield share
