"""Read plans of joined sources: the part of a plan for each source, and one plan for sources that share shards."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import NEVER, PublishedPlan, ReadingPlan
from tiercache.views.view import View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tiercache.views.contract import Readable


@dataclass(frozen=True, slots=True)
class PublishedPlans:
    """Several published plans as one (`model.PublishedPlan`)."""

    every: tuple[PublishedPlan, ...]

    def advance(self, clock: int) -> None:
        """See Following.advance; advances all of them."""
        for one in self.every:
            one.advance(clock)

    def close(self) -> None:
        """See Following.close; closes all of them, even if one raises."""
        with ExitStack() as closing:
            for one in reversed(self.every):
                closing.callback(one.close)


def root_of(source: Readable) -> Readable:
    """Return the source below a view, which has the same shard numbers; any other source is returned itself."""
    while isinstance(source, View):
        source = source.source
    return source


def part_of(plan: ReadingPlan, where: NDArray[np.int64], first_shard: int) -> ReadingPlan:
    """Return some rows of a plan, with shards counted from first_shard. The clock stays that of the job."""
    first, last, then = plan.first[where], plan.last[where], plan.then[where]
    return replace(plan, shards=plan.shards[where] - first_shard, first=first, last=last, then=then)


def merge_plans(plans: Sequence[ReadingPlan]) -> ReadingPlan:
    """Return the plans of one job for the same source as one.

    A shard of several plans is in use from its first to its last use.
    """
    if len(plans) == 1:
        return plans[0]
    every = np.concatenate([plan.shards for plan in plans])
    shards, at = np.unique(every, return_inverse=True)
    first, then = np.full(len(shards), NEVER), np.full(len(shards), NEVER)
    last = np.full(len(shards), -1, np.int64)
    np.minimum.at(first, at, np.concatenate([plan.first for plan in plans]))
    np.minimum.at(then, at, np.concatenate([plan.then for plan in plans]))
    ends = np.concatenate([plan.last for plan in plans])
    np.maximum.at(last, at, np.where(ends == NEVER, -1, ends))
    last = np.where(first == NEVER, NEVER, last)
    return ReadingPlan(plans[0].owner, shards, first, last, then, plans[0].reader)
