"""Read order of a training, computed from the sampler order alone, without torch and without footers. Pure."""

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

# The default of LoaderOptions.
GROUP_BYTES = LoaderOptions().group_bytes


@dataclass(frozen=True, slots=True)
class Training:
    """A loader's order and the ranks that read it.

    Attributes:
        seed: Seed of the shuffle; None: the stored order, in which every rank reads every shard.
        epoch: Epoch, counted from 0.
        ranks: Ranks whose reads are wanted.
        world_size: Number of ranks.
        streams: Number of shuffle streams; None: one per rank.
        placement: Assignment of shards to ranks, see LoaderOptions.
        group_bytes: Size of a shuffle group; None: all shards.
        batch_size: Batch size per rank; it matters only if streams does not divide the global batch size. None: it
            does.
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
        """Check the ranks. Raises ValueError. The order checks the other values."""
        bad = [rank for rank in self.ranks if not 0 <= rank < self.world_size]
        if bad or not self.ranks:
            raise ValueError(f"ranks must be from 0 to {self.world_size - 1} of {self.world_size}, got {bad or 'none'}")

    @property
    def options(self) -> OrderOptions:
        """Return the options of the order. Windows do not affect which shards are read when, so there are none."""
        return OrderOptions(
            seed=self.seed or 0,
            shuffle=self.seed is not None,
            group_bytes=self.group_bytes,
            window_bytes=None,
            streams=self.streams or self.world_size,
            placement=self.placement,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ReadOrder:
    """Shards in the order in which one reader first reads them in an epoch.

    Attributes:
        shards: Shard numbers, int64[m].
        clock: Stored bytes that the reader has read in the epoch before each shard, int64[m].
    """

    shards: NDArray[np.int64]
    clock: NDArray[np.int64]


def epoch_reads(
    records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training
) -> dict[int, ReadOrder]:
    """Return the reads of each of the training's ranks in its epoch. O(shards).

    Args:
        records: Records of each shard, int64[n_shards].
        stored_bytes: Bytes of each shard, int64[n_shards].
        training: Training with its epoch and ranks.

    Raises:
        ValueError: The order does not accept the options.
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
    return {rank: _interleave([runs[s] for s in streams], stored_bytes) for rank, streams in ranks.items()}


def merge_reads(reads: Sequence[ReadOrder]) -> NDArray[np.int64]:
    """Return the shards in the order in which parallel readers first read them, without duplicates: int64[m]."""
    if not reads:
        return np.zeros(0, np.int64)
    shards = np.concatenate([each.shards for each in reads])
    shards = shards[np.argsort(np.concatenate([each.clock for each in reads]), kind="stable")]
    return shards[np.sort(np.unique(shards, return_index=True)[1])]


def take_bytes(shards: NDArray[np.int64], stored_bytes: NDArray[np.int64], n_bytes: float) -> NDArray[np.int64]:
    """Return the first shards that together hold n_bytes; all shards if they hold less."""
    before = np.cumsum(stored_bytes[shards]) - stored_bytes[shards]
    return shards[: int(np.searchsorted(before, n_bytes, side="left"))]


def _interleave(runs: Sequence[NDArray[np.int64]], stored_bytes: NDArray[np.int64]) -> ReadOrder:
    """Return the reads of streams that advance together, one record of each in turn, at about equal byte rates."""
    if not runs:
        return ReadOrder(np.zeros(0, np.int64), np.zeros(0, np.int64))
    shards = np.concatenate(runs)
    before = np.concatenate([np.cumsum(stored_bytes[run]) - stored_bytes[run] for run in runs])
    shards = shards[np.argsort(before, kind="stable")]
    # A shard that two of the rank's streams read is opened once.
    shards = shards[np.sort(np.unique(shards, return_index=True)[1])]
    return ReadOrder(shards, np.cumsum(stored_bytes[shards]) - stored_bytes[shards])


def _no_footers(shards: Sequence[int]) -> Sequence[BlockTable]:
    raise RuntimeError(f"bug: the order of shards read the footers of {list(shards)}")
