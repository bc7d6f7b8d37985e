"""Lower bounds of fetched bytes (Belady's MIN with bypass, the share that does not fit), and an LRU's expectation."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.epoch_order import EpochOrder
from tiercache.order.window import DatasetSizes, OrderOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachebench.data import Packed
    from cachebench.jobs import Job

# Epochs after the measured ones that MIN also knows: at the end of a trace it would know that nothing follows.
AHEAD_EPOCHS = 24


def orders(packed: Packed, job: Job, n_epochs: int) -> list[list[int]]:
    """Return the shards that the job's rank reads in each epoch, in reading order."""
    dataset_sizes = DatasetSizes(packed.shard_records, packed.shard_bytes, _no_footers)
    options = OrderOptions(
        job.seed, True, job.group_bytes, job.window_bytes, streams=job.world_size, placement=job.placement
    )
    return [
        EpochOrder(dataset_sizes, options, epoch).shards_ahead(job.rank, 0, None).tolist() for epoch in range(n_epochs)
    ]


def _no_footers(shards: Sequence[int]) -> Sequence[object]:
    raise RuntimeError(f"footers of {len(shards)} shards were read; an order of shards must not need them")


def min_misses(epochs: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """Return the misses of each epoch under Belady's MIN, which may bypass the cache. All shards count alike.

    Written independently of the cache's policies, so that the code under test is not its own reference.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
    """
    trace = [shard for epoch in epochs for shard in epoch]
    following = _next_uses(trace)
    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    misses, at = [], 0
    for epoch in epochs:
        missed = 0
        for shard in epoch:
            missed += shard not in held
            held[shard] = following[at]
            heapq.heappush(heap, (-following[at], shard))
            while len(held) > capacity:
                use, furthest = heapq.heappop(heap)
                if held.get(furthest) == -use:
                    del held[furthest]
            at += 1
        misses.append(missed)
    return misses


def _next_uses(trace: Sequence[int]) -> list[int]:
    following, seen = [0] * len(trace), {}
    for at in range(len(trace) - 1, -1, -1):
        following[at] = seen.get(trace[at], len(trace) + at)
        seen[trace[at]] = at
    return following


def lru_share(f: float) -> float:
    """Return the share of bytes that an LRU with a fraction f is expected to fetch in a newly shuffled epoch."""
    return 1 - (f + (1 - f) * math.log(1 - f)) if f < 1 else 0.0


def belady(packed: Packed, jobs: Sequence[Job], n_cold: int, n_measured: int, f: float) -> float:
    """Return the share of shards fetched per measured epoch under MIN by all jobs together, each with its own cache."""
    capacity, total = round(len(packed.shard_bytes) * f), 0
    for job in jobs:
        misses = min_misses(orders(packed, job, n_cold + n_measured + AHEAD_EPOCHS), capacity)
        total += int(np.sum(misses[n_cold : n_cold + n_measured]))
    return total / n_measured / len(packed.shard_bytes)
