"""Reading plans of records that several versions hold."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import NEVER, PublishedPlan, ReadingPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PublishedPlans:
    """Several published plans as one (`model.PublishedPlan`)."""

    every: tuple[PublishedPlan, ...]

    def advance(self, clock: int) -> None:
        """See PublishedPlan.advance; advances all of them."""
        for one in self.every:
            one.advance(clock)

    def close(self) -> None:
        """See PublishedPlan.close; closes all of them, even if one raises."""
        with ExitStack() as closing:
            for one in reversed(self.every):
                closing.callback(one.close)


def plan_of(plan: ReadingPlan, where: NDArray[np.int64], numbers: NDArray[np.int64]) -> ReadingPlan:
    """Return the rows of a plan at `where` for one version, with its shard numbers. The clock stays that of the job.

    A shard that several rows name is in use from its first to its last use.
    """
    shards, at = np.unique(numbers, return_inverse=True)
    first, first_later = np.full(len(shards), NEVER), np.full(len(shards), NEVER)
    last = np.full(len(shards), -1, np.int64)
    np.minimum.at(first, at, plan.first[where])
    np.minimum.at(first_later, at, plan.first_later[where])
    np.maximum.at(last, at, np.where(plan.last[where] == NEVER, -1, plan.last[where]))
    last = np.where(first == NEVER, NEVER, last)
    return replace(plan, shards=shards, first=first, last=last, first_later=first_later)
