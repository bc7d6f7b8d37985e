"""Shards that warm and simulate work on, and the order in which a training reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import numpy as np

from tiercache.cli.common import option, parse_size
from tiercache.load.options import LoaderOptions
from tiercache.order import DatasetSizes, EpochOrder, OrderOptions, RankPlan
from tiercache.packer.files import selected

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.order import BlockSizes
    from tiercache.shard.versions import ShardTable


# The default of LoaderOptions.
GROUP_BYTES = LoaderOptions().group_bytes

Streams: TypeAlias = Annotated[
    int | None,
    option("--streams", "N", "Number of the training's shuffle streams, as in LoaderOptions; default: one per rank."),
]
Placement: TypeAlias = Annotated[
    str | None,
    option(
        "--placement",
        "HOW",
        "The training's assignment of shards to ranks, as in LoaderOptions: sticky (default) or global.",
    ),
]
ShuffleGroup: TypeAlias = Annotated[
    str | None,
    option(
        "--shuffle-group",
        "SIZE",
        "Size of the training's shuffle groups, as in LoaderOptions, or 'all'; default: 4GiB.",
    ),
]


@dataclass(frozen=True, slots=True)
class Training:
    """A loader's order, as in LoaderOptions, and the ranks that read it.

    Attributes:
        seed: Seed of the shuffle; None: the stored order, in which every rank reads every shard.
        streams: Number of shuffle streams; None: one per rank.
    """

    seed: int | None = None
    epoch: int = 0
    ranks: tuple[int, ...] = (0,)
    world_size: int = 1
    streams: int | None = None
    placement: Literal["sticky", "global"] = "sticky"
    group_bytes: int | None = GROUP_BYTES

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
    """Shards in the order in which one reader first reads them in an epoch, and the bytes that it reads before each."""

    shards: NDArray[np.int64]
    clock: NDArray[np.int64]


def epoch_reads(
    records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training
) -> dict[int, ReadOrder]:
    """Return the reads of each of the training's ranks in its epoch. O(shards). Raises ValueError.

    records and stored_bytes are those of each shard, int64[n_shards].
    """
    order = EpochOrder(DatasetSizes(records, stored_bytes, _no_footers), training.options, training.epoch)
    runs = [order.shards_ahead(stream, 0, None) for stream in range(order.n_streams)]
    plan = RankPlan(
        offset=0,
        world_size=training.world_size,
        rank=0,
        batch_size=order.n_streams,
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


def _no_footers(shards: Sequence[int]) -> Sequence[BlockSizes]:
    raise RuntimeError(f"bug: the order of shards read the footers of {list(shards)}")


_RANKS = re.compile(r"(\d+)(?:-(\d+))?/(\d+)")


def select_shards(
    table: ShardTable,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    training: Training | None = None,
    fraction: float = 1.0,
    limit_bytes: int | None = None,
) -> NDArray[np.int64]:
    """Return the numbers of the selected shards, int64[m], in the order of the training, else the stored order.

    include and exclude are globs over shard names; fraction and limit_bytes keep the first of the selected bytes.
    """
    shards = np.arange(len(table), dtype=np.int64)
    if training is not None:
        shards = merge_reads(list(epoch_reads(table.n_records, table.n_bytes, training).values()))
    if include or exclude:
        names = table.names.to_pylist()
        shards = shards[np.array([selected(names[i], include or (), exclude or ()) for i in shards.tolist()], bool)]
    wanted_bytes = fraction * int(table.n_bytes[shards].sum()) if limit_bytes is None else limit_bytes
    return take_bytes(shards, table.n_bytes, wanted_bytes)


def parse_training(
    seed: int | None = None,
    ranks: Sequence[str] | None = None,
    streams: int | None = None,
    placement: str | None = None,
    group: str | None = None,
) -> Training | None:
    """Return the training that the options of a verb describe; None if none was given."""
    if seed is None:
        options = {"rank": ranks, "streams": streams, "placement": placement, "shuffle-group": group}
        if flag := next((name for name, value in options.items() if value is not None), None):
            raise ValueError(f"--{flag} needs --seed: without it every rank reads all shards, in stored order")
        return None
    chosen, world_size = parse_ranks(ranks or ["0/1"])
    return Training(seed, 0, chosen, world_size, streams, parse_placement(placement), parse_group(group))


def parse_placement(text: str | None) -> Literal["sticky", "global"]:
    """Return the placement that a --placement value names; None means "sticky". Raises ValueError."""
    if text in (None, "sticky"):
        return "sticky"
    if text == "global":
        return "global"
    raise ValueError(f"--placement must be sticky or global, got {text!r}")


def parse_group(text: str | None) -> int | None:
    """Return the bytes of a --shuffle-group value; None for "all". Raises ValueError."""
    if text is None:
        return GROUP_BYTES
    return None if text == "all" else parse_size("--shuffle-group", text)


def parse_ranks(texts: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Return the ranks that "3/8" or "0-3/8" texts name, in the order of the texts, and the world size.

    Raises ValueError.
    """
    ranks: list[int] = []
    sizes: set[int] = set()
    for text in texts:
        match = _RANKS.fullmatch(text.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last < int(match[3]):
            raise ValueError(f"--rank takes RANK/RANKS, e.g. 3/8 or 0-3/8, got {text!r}")
        ranks += range(first, last + 1)
        sizes.add(int(match[3]))
    if len(sizes) != 1:
        raise ValueError(f"--rank: all values must have the same number of ranks, got {sorted(sizes)}")
    return tuple(dict.fromkeys(ranks)), sizes.pop()
