"""The start of the next epoch, prepared while this epoch ends, so that little is left to do between the two."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tiercache.errors import TierCacheError
from tiercache.load.publishing import ReadPlanPublisher
from tiercache.load.share import interleaved
from tiercache.load.window import WindowLoad, loading_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.load.plan import Piece
    from tiercache.load.pressure import MemoryPressure
    from tiercache.load.share import OrderShare
    from tiercache.load.source import Source
    from tiercache.load.state import RunState
    from tiercache.load.window import LoadThreads

    PlanEpoch: TypeAlias = Callable[[RunState], OrderShare]


# Shards per call of prefetch(): some ms if each is looked up in a cache. forget() waits for one such call at most.
_SHARDS_A_STEP = 16


@dataclass(frozen=True, slots=True, eq=False)
class EpochStart:
    """The prepared start of an epoch, for one pipeline.

    pieces: all pieces of the epoch; loading: windows of the first piece, loaded or being loaded.
    """

    pieces: Iterator[Piece]
    loading: tuple[WindowLoad, ...]


def cancel_loads(ready: Future[EpochStart | None]) -> None:
    """Cancel the loads of a prepared start: now, or as soon as it is ready. May be called repeatedly."""
    ready.add_done_callback(_cancel)


def _cancel(ready: Future[EpochStart | None]) -> None:
    begun = ready.result()
    for one in begun.loading if begun is not None else ():
        one.cancel()


@dataclass(frozen=True, slots=True, eq=False)
class ClaimedEpoch:
    """An epoch that began as predicted: its share, its prepared start if there is one, and its read plan."""

    share: OrderShare
    begun: Future[EpochStart | None] | None
    publishing: ReadPlanPublisher


class NextEpoch:
    """The epoch after the current one, if it begins as predicted. The planner prepares it, and the engine takes it.

    Args:
        source: Source that both epochs read.
        state: State at the predicted start of the next epoch.
        plan_epoch: Function that returns a rank's share of an epoch. It must not refer to the loader, which would then
            live too long.
        is_expected: Whether this run has gone from one epoch to the next before. If not, no store is read for the next
            epoch.
        is_predicted: Whether the next iter() will probably draw the state's seed. If not, only the read plan is
            published: the cache learns which shards the epoch reads, and nothing is loaded.
    """

    def __init__(
        self, source: Source, state: RunState, plan_epoch: PlanEpoch, *, is_expected: bool, is_predicted: bool = True
    ) -> None:
        self._source = source
        self._state = state
        self._plan_epoch = plan_epoch
        self._is_expected = is_expected
        self._is_predicted = is_predicted
        self.publishing = ReadPlanPublisher(source, state, plan_epoch)
        self._lock = threading.Lock()
        self._ready: Future[EpochStart | None] | None = None  # None: no planner has begun to prepare it
        self._share: OrderShare | None = None
        # Set to stop the loads of the next epoch, so that closing the data set does not wait for them.
        self._unwanted = threading.Event()
        # Held during each step of the preparation. forget() waits for the current step, so that no step begins after
        # the caller closes the cache or the store. Re-entrant, because the garbage collector may call forget() in a
        # thread that is within a step.
        self._step = threading.RLock()
        self._is_over = False  # taken or forgotten: nothing more is prepared
        self._pid = os.getpid()

    @property
    def share(self) -> OrderShare:
        """The rank's share of the next epoch, planned at the first access; two threads would plan the same share."""
        # Not a cached_property: until Python 3.12 its lock is shared by all instances, and a forked child may inherit
        # it locked.
        if self._share is None:
            self._share = self._plan_epoch(self._state)
        return self._share

    def shards_ahead(self, n_bytes: int) -> list[int]:
        """Return the first shards of the epoch, about n_bytes (stored) of them; none if its seed is not predicted."""
        return self.share.shards_ahead(0, 0, n_bytes) if self._is_predicted else []

    def prepare(self, threads: LoadThreads, pressure: MemoryPressure, ahead_bytes: int) -> None:
        """Prepare the start: plan the epoch, prefetch its first shards, and begin to load its first windows.

        The windows take memory like any next window. Data that is not on this machine is loaded only if epochs are
        known to follow one another: a run of a single epoch would fetch it for nothing.

        ahead_bytes: stored bytes of shards to prefetch.
        """
        with self._lock:
            if self._is_over:
                return
            ready = self._ready = Future()
            publishing = self.publishing
        begun = None
        try:
            # The error is raised when the epoch itself is read.
            with contextlib.suppress(TierCacheError, CancelledError):
                begun = self._begin(threads, pressure, ahead_bytes, publishing)
        finally:
            ready.set_result(begun)

    def take(self, source: Source, state: RunState) -> ClaimedEpoch | None:
        """Return the epoch, once, if the loader continues there.

        None: the loader continues elsewhere, or this is a forked child. The caller's publisher must then succeed this
        one's.
        """
        if self._pid != os.getpid():  # another thread may have held the lock at the fork
            return None
        ready = self._end()
        if source is not self._source or state != self._state:
            self._drop(ready)
            return None
        taken = ClaimedEpoch(self.share, ready, self.publishing)
        # the taken publisher belongs to the engine now
        self.publishing = ReadPlanPublisher(self._source, self._state, self._plan_epoch)
        return taken

    def on_source_closed(self) -> None:
        """Drop the preparation: a local copy that it reads may be gone, or the data set is closed."""
        if self._pid != os.getpid():
            return
        ready, plan = self._end(), self.publishing
        self.publishing = ReadPlanPublisher(self._source, self._state, self._plan_epoch)  # the epoch may still begin
        self._let_go(ready, plan)

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pid") and self._pid == os.getpid():
            self._let_go(self._end(), self.publishing)

    def _let_go(self, ready: Future[EpochStart | None] | None, plan: ReadPlanPublisher) -> None:
        self._drop(ready)
        plan.close()

    def _drop(self, ready: Future[EpochStart | None] | None) -> None:
        if ready is not None:  # None: no planner has begun it, or it is taken
            self._unwanted.set()  # Also stops loads that are being submitted now and that no one can cancel yet.
            with self._step:
                cancel_loads(ready)

    def _end(self) -> Future[EpochStart | None] | None:
        with self._lock:
            self._is_over = True
            ready, self._ready = self._ready, None
        return ready

    def _begin(
        self, threads: LoadThreads, pressure: MemoryPressure, ahead_bytes: int, publishing: ReadPlanPublisher
    ) -> EpochStart | None:
        with self._a_step():
            if self._is_predicted or self._source.has_cache:
                publishing.begin(self.share)
                publishing.complete()
        if not self._is_predicted:
            return None
        rest = self.share.pieces(0)
        first = next(rest, None)  # Reads footers. forget() does not wait for that, because a store may be slow.
        if first is None:
            return None
        pieces = itertools.chain([first], rest)
        if first.run is None or not self._source.selects_all:
            first.rows()
        pairs = list(zip(first.windows, first.wanted, strict=True))
        shards = interleaved([list(dict.fromkeys(window.shards[wanted].tolist())) for window, wanted in pairs])
        near = [*dict.fromkeys([*shards, *self.shards_ahead(ahead_bytes)])] if self._source.can_prefetch else []
        for start in range(0, len(near), _SHARDS_A_STEP):
            with self._a_step():
                self._source.prefetch(near[start : start + _SHARDS_A_STEP])
        with self._a_step():
            if not pressure.fits(first) or not (self._is_expected or all(map(self._source.is_local, shards))):
                return EpochStart(pieces, ())
            # An executor of its own, because the current epoch shuts its executor down at its end.
            executor = loading_pool(threads.n_threads)
            loading = [
                WindowLoad(self._source, *pair, executor, threads.n_threads, unwanted=self._unwanted) for pair in pairs
            ]
            executor.shutdown(wait=False)
        for one in loading:
            self._load_at_hand(one)
        return EpochStart(pieces, tuple(loading))

    def _load_at_hand(self, loading: WindowLoad) -> None:
        is_left = True
        while is_left:
            with self._a_step():
                is_left = loading.map_next_shard()

    @contextlib.contextmanager
    def _a_step(self) -> Iterator[None]:
        """Context of one step of the preparation; forget() waits for it. Raises CancelledError after forget()."""
        with self._step:
            if self._unwanted.is_set():
                raise CancelledError
            yield
