"""How the next epoch begins, made ready while this one ends, so that little is left to do between two epochs."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tiercache.errors import TierCacheError
from tiercache.load.plan import Piece, pieces
from tiercache.load.window import Loaded, Threads, load_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.load.source import Source
    from tiercache.load.state import RunState
    from tiercache.order import EpochOrder, RankPlan

    PlanEpoch: TypeAlias = Callable[[RunState], tuple[EpochOrder, RankPlan]]


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """The beginning of an epoch, good for one pipeline.

    pieces: all of them; loaded: the window of the first.
    """

    order: EpochOrder
    ranks: RankPlan
    pieces: Iterator[Piece]
    loaded: Loaded


class Coming:
    """The epoch after the one that is served, if it comes as expected. Its planner prepares, its loader takes.

    Args:
        source: that both epochs read.
        state: where the coming epoch would begin.
        plan_epoch: order and share of an epoch; holds no loader, which would keep it alive.
    """

    def __init__(self, source: Source, state: RunState, plan_epoch: PlanEpoch) -> None:
        self._source = source
        self._state = state
        self._plan_epoch = plan_epoch
        self._begun: Begun | None = None
        self._pid = os.getpid()

    def prepare(self, threads: Threads) -> None:
        """Make the beginning ready, where its first window is at hand: others cost memory, or what the cache has."""
        try:
            order, ranks = self._plan_epoch(self._state)
            rest = pieces(order, ranks)
            first = next(rest, None)
            if first is None or not all(map(self._source.is_at_hand, set(first.window.shards[first.wanted].tolist()))):
                return
            loaded = load_window(self._source, first.window, first.wanted, threads)
        except TierCacheError:
            return  # who asks for the epoch hears of it
        self._begun = Begun(order, ranks, itertools.chain([first], rest), loaded)

    def take(self, source: Source, state: RunState) -> Begun | None:
        """What was made ready, once, if that is where the loader goes on; not in a forked child."""
        begun, self._begun = self._begun, None
        expected = source is self._source and state == self._state and self._pid == os.getpid()
        return begun if expected else None

    def forget(self) -> None:
        """Drop what was made ready: a copy that it may read from is gone."""
        self._begun = None
