"""How the next epoch begins, made ready while this one ends, so that little is left to do between two epochs."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tiercache.errors import TierCacheError
from tiercache.load.publishing import Publishing
from tiercache.load.share import interleaved
from tiercache.load.window import Loading, loading_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.load.plan import Piece
    from tiercache.load.pressure import Pressure
    from tiercache.load.share import OrderShare
    from tiercache.load.source import Source
    from tiercache.load.state import RunState
    from tiercache.load.window import Threads

    PlanEpoch: TypeAlias = Callable[[RunState], OrderShare]


# Asked for at a time: some ms where each is looked up in a cache, which is what forget() waits for at most.
_SHARDS_A_STEP = 16


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """The beginning of an epoch, good for one pipeline.

    pieces: all of them; loading: windows of the first, on their way or there.
    """

    pieces: Iterator[Piece]
    loading: tuple[Loading, ...]


def drop(ready: Future[Begun | None]) -> None:
    """Let what is not loaded of a beginning not be loaded: now, or once it is made ready. Repeatable."""
    ready.add_done_callback(_cancel)


def _cancel(ready: Future[Begun | None]) -> None:
    begun = ready.result()
    for one in begun.loading if begun is not None else ():
        one.cancel()


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """An epoch that came as expected: what is served of it, its beginning if that is being prepared, and its plan."""

    share: OrderShare
    begun: Future[Begun | None] | None
    publishing: Publishing


class Coming:
    """The epoch after the one that is served, if it comes as expected. Its planner prepares, its loader takes.

    Args:
        source: that both epochs read.
        state: where the coming epoch would begin.
        plan_epoch: a rank's share of an epoch; holds no loader, which would keep it alive.
        is_expected: whether this run has gone from one epoch to the next before: only then a store is read for it.
        is_foreseen: whether the state's seed is likely the one that the next iter() will draw. Where it is not, only
            the plan is published: the cache learns which shards the epoch reads, and nothing is loaded for it.
    """

    def __init__(
        self, source: Source, state: RunState, plan_epoch: PlanEpoch, *, is_expected: bool, is_foreseen: bool = True
    ) -> None:
        self._source = source
        self._state = state
        self._plan_epoch = plan_epoch
        self._is_expected = is_expected
        self._is_foreseen = is_foreseen
        self.publishing = Publishing(source, state, plan_epoch)
        self._lock = threading.Lock()
        self._ready: Future[Begun | None] | None = None  # None: nobody has begun it
        self._share: OrderShare | None = None
        self._unwanted = threading.Event()  # of what is loaded of it: whoever closes the data set does not wait for it
        # Held for each step of making ready: forget() waits for the one that is under way, so that nothing begins anew
        # at a cache or a store that is closed after it. The collector may forget in a thread in the midst of a step.
        self._step = threading.RLock()
        self._is_over = False  # taken or forgotten: nothing is to be made ready any more
        self._pid = os.getpid()

    @property
    def share(self) -> OrderShare:
        """What the rank is served of it. Planned when first asked for; two threads would plan the same."""
        # Not a cached_property: until Python 3.12 all instances share its lock, which a forked child may inherit held.
        if self._share is None:
            self._share = self._plan_epoch(self._state)
        return self._share

    def shards_ahead(self, n_bytes: int) -> list[int]:
        """Shards that it begins with, about n_bytes (stored) of them; none where its seed is not foreseen."""
        return self.share.shards_ahead(0, 0, n_bytes) if self._is_foreseen else []

    def prepare(self, threads: Threads, pressure: Pressure, ahead_bytes: int) -> None:
        """Make the beginning ready: plan it, have its shards brought near, and begin to load its first windows.

        Shards are brought near as far as ahead_bytes.

        Windows take memory as any that come next would. Data that is not on this machine is loaded only where epochs
        are known to follow one another, else a run of one epoch would fetch it for nothing.
        """
        with self._lock:
            if self._is_over:
                return
            ready = self._ready = Future()
            publishing = self.publishing
        begun = None
        try:
            with contextlib.suppress(TierCacheError, CancelledError):  # who asks for the epoch hears of it
                begun = self._begin(threads, pressure, ahead_bytes, publishing)
        finally:
            ready.set_result(begun)

    def take(self, source: Source, state: RunState) -> Taken | None:
        """The epoch, once, if that is where the loader goes on.

        None: the loader goes on elsewhere, or in a forked child. Its publishing must then succeed this one's.
        """
        if self._pid != os.getpid():  # the lock may be held for ever
            return None
        ready = self._end()
        if source is not self._source or state != self._state:
            self._drop(ready)
            return None
        taken = Taken(self.share, ready, self.publishing)
        self.publishing = Publishing(self._source, self._state, self._plan_epoch)  # the other one is the loader's now
        return taken

    def forget(self) -> None:
        """Drop what was made ready: a copy that it may read from is gone, or nobody wants it."""
        if self._pid != os.getpid():
            return
        ready, plan = self._end(), self.publishing
        self.publishing = Publishing(self._source, self._state, self._plan_epoch)  # the epoch may come all the same
        self._let_go(ready, plan)

    def __del__(self) -> None:
        if hasattr(self, "_pid") and self._pid == os.getpid():
            self._let_go(self._end(), self.publishing)

    def _let_go(self, ready: Future[Begun | None] | None, plan: Publishing) -> None:
        self._drop(ready)
        plan.close()

    def _drop(self, ready: Future[Begun | None] | None) -> None:
        if ready is not None:  # else nobody has begun it, or it is taken
            self._unwanted.set()  # also where its loading is just being begun, and nobody has it to cancel yet
            with self._step:
                drop(ready)

    def _end(self) -> Future[Begun | None] | None:
        with self._lock:
            self._is_over = True
            ready, self._ready = self._ready, None
        return ready

    def _begin(self, threads: Threads, pressure: Pressure, ahead_bytes: int, publishing: Publishing) -> Begun | None:
        with self._a_step():
            if self._is_foreseen or self._source.is_cached:
                publishing.begin(self.share)
                publishing.complete()
        if not self._is_foreseen:
            return None
        rest = self.share.pieces(0)
        first = next(rest, None)  # reads footers, for which forget() does not wait: a store may take its time
        if first is None:
            return None
        pieces = itertools.chain([first], rest)
        if first.run is None or not self._source.is_whole:
            first.rows()
        pairs = list(zip(first.windows, first.wanted, strict=True))
        shards = interleaved([list(dict.fromkeys(window.shards[wanted].tolist())) for window, wanted in pairs])
        near = [*dict.fromkeys([*shards, *self.shards_ahead(ahead_bytes)])] if self._source.is_fetched else []
        for start in range(0, len(near), _SHARDS_A_STEP):
            with self._a_step():
                self._source.prefetch(near[start : start + _SHARDS_A_STEP])
        with self._a_step():
            if not pressure.fits(first) or not (self._is_expected or all(map(self._source.is_near, shards))):
                return Begun(pieces, ())
            executor = loading_pool(threads.n_threads)  # its own: the epoch that ends takes its threads with it
            loading = [
                Loading(self._source, *pair, executor, threads.n_threads, unwanted=self._unwanted) for pair in pairs
            ]
            executor.shutdown(wait=False)
        for one in loading:
            self._load_at_hand(one)
        return Begun(pieces, tuple(loading))

    def _load_at_hand(self, loading: Loading) -> None:
        is_left = True
        while is_left:
            with self._a_step():
                is_left = loading.load_next_at_hand()

    @contextlib.contextmanager
    def _a_step(self) -> Iterator[None]:
        """A step of making ready, for which forget() waits. Raises CancelledError where nobody wants it any more."""
        with self._step:
            if self._unwanted.is_set():
                raise CancelledError
            yield
