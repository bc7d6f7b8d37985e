"""What a training reads, in which order: from the order alone, without torch and without a footer. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from tiercache.load.options import LoaderOptions
from tiercache.order import EpochOrder, Layout, OrderOptions, RankPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tiercache.order import BlockTable

# A group is what is read at a time.
GROUP_BYTES = LoaderOptions().group_bytes


@dataclass(frozen=True, slots=True)
class Training:
    """An order as a loader makes it, and who reads it.

    Attributes:
        seed: of a shuffled order; None: the stored order, of which every rank reads every shard.
        ranks: those that are meant, of world_size.
        streams: None: one for each rank of world_size.
        batch_size: of one rank; it only matters where streams does not divide a global batch; None: it does.
    """

    seed: int | None = None
    epoch: int = 0
    ranks: tuple[int, ...] = (0,)
    world_size: int = 1
    streams: int | None = None
    placement: Literal["sticky", "global"] = "sticky"
    group_bytes: int | None = GROUP_BYTES
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError naming what is wrong (what the order checks apart)."""
        bad = [rank for rank in self.ranks if not 0 <= rank < self.world_size]
        if bad or not self.ranks:
            raise ValueError(f"a rank is from 0 to {self.world_size - 1} of {self.world_size}, got {bad or 'none'}")

    @property
    def options(self) -> OrderOptions:
        """Of the order. Windows make no difference to which shards are read when."""
        return OrderOptions(
            seed=self.seed or 0,
            shuffle=self.seed is not None,
            group_bytes=self.group_bytes,
            window_bytes=None,
            streams=self.streams or self.world_size,
            placement=self.placement,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """Shards that are read one after the other, each for the first time in an epoch.

    shards: int64[m]; clock: int64[m], stored bytes that the same reader has read of the epoch before.
    """

    shards: NDArray[np.int64]
    clock: NDArray[np.int64]


def epoch_reads(records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training) -> dict[int, Reads]:
    """What each of the training's ranks reads in its epoch. O(shards).

    Args:
        records, stored_bytes: of each shard, int64[n_shards].
        training: whose epoch and ranks.

    Raises:
        ValueError: options that no order has.
    """
    order = EpochOrder(Layout(records, stored_bytes, _no_footers), training.options, training.epoch)
    runs = [order.shards_ahead(stream, 0, None) for stream in range(order.n_streams)]
    plan = RankPlan(
        offset=0,
        world_size=training.world_size,
        rank=0,
        batch_size=training.batch_size or order.n_streams,
        drop_last=False,
        n_records=order.n_records,
        n_streams=order.n_streams,
    )
    ranks = {rank: replace(plan, rank=rank).streams for rank in training.ranks}
    return {rank: _side_by_side([runs[s] for s in streams], stored_bytes) for rank, streams in ranks.items()}


def read_first(reads: Sequence[Reads]) -> NDArray[np.int64]:
    """Shards in the order in which some readers side by side come to them, each once: int64[m]."""
    if not reads:
        return np.zeros(0, np.int64)
    shards = np.concatenate([each.shards for each in reads])
    shards = shards[np.argsort(np.concatenate([each.clock for each in reads]), kind="stable")]
    return shards[np.sort(np.unique(shards, return_index=True)[1])]


def first_bytes(shards: NDArray[np.int64], stored_bytes: NDArray[np.int64], n_bytes: float) -> NDArray[np.int64]:
    """The first of these shards that hold n_bytes together; all where they hold less."""
    before = np.cumsum(stored_bytes[shards]) - stored_bytes[shards]
    return shards[: int(np.searchsorted(before, n_bytes, side="left"))]


def _side_by_side(runs: Sequence[NDArray[np.int64]], stored_bytes: NDArray[np.int64]) -> Reads:
    """Streams that are read in turns, a record of each: they go on at about the same bytes a second."""
    if not runs:
        return Reads(np.zeros(0, np.int64), np.zeros(0, np.int64))
    shards = np.concatenate(runs)
    before = np.concatenate([np.cumsum(stored_bytes[run]) - stored_bytes[run] for run in runs])
    shards = shards[np.argsort(before, kind="stable")]
    # A shard that two of the rank's streams share is opened once.
    shards = shards[np.sort(np.unique(shards, return_index=True)[1])]
    return Reads(shards, np.cumsum(stored_bytes[shards]) - stored_bytes[shards])


def _no_footers(shards: Sequence[int]) -> Sequence[BlockTable]:
    raise RuntimeError(f"the order of shards asked for footers of {list(shards)}: it never does")
