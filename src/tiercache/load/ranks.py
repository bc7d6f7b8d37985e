"""The rank of this process, and the values on which all ranks must agree."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from tiercache import config

if TYPE_CHECKING:
    from tiercache.load.options import LoaderOptions

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of world_size processes that share an epoch."""

    rank: int
    world_size: int
    origin: Literal["options", "torch.distributed", "environment", "alone", "sampler"]
    local_ranks: int = 1

    def __str__(self) -> str:
        origin = "alone" if self.origin == "alone" else f"from {self.origin}"
        return f"rank {self.rank} of {self.world_size} ({origin})"


def find_rank(options: LoaderOptions) -> Rank:
    """Return this process's rank.

    The options come first, then torch.distributed if it is initialised, then the environment variables of a launcher.
    Else the process is the only rank.
    """
    environment = config.distributed_environment()
    local_ranks = environment[3] if environment else 1
    if options.rank is not None and options.world_size is not None:
        return Rank(options.rank, options.world_size, "options", local_ranks)
    if not options.split_ranks:
        return Rank(0, 1, "options", local_ranks)
    if dist.is_available() and dist.is_initialized():
        return Rank(dist.get_rank(), dist.get_world_size(), "torch.distributed", local_ranks)
    if environment:
        return Rank(environment[0], environment[1], "environment", local_ranks)
    return Rank(0, 1, "alone")


def agree(rank: Rank, mine: dict[str, Any], alike: dict[str, Any]) -> dict[str, Any]:
    """Return rank 0's values on all ranks that torch.distributed joins, else `mine`; a collective call.

    Raises:
        ValueError: One of `alike` differs on one of the ranks; raised on every rank.
    """
    if rank.origin != "torch.distributed" or rank.world_size == 1:
        return mine
    # Gathered, not broadcast: every rank sees the difference and raises, so no rank waits for one that raised.
    gathered: list[Any] = [None] * rank.world_size
    dist.all_gather_object(gathered, (mine, alike))
    agreed: dict[str, Any]
    agreed, first = gathered[0]
    for other, (_, theirs) in enumerate(gathered):
        for name, value in theirs.items():
            if value != first[name]:
                raise ValueError(
                    f"{name}={value!r} on rank {other} differs from rank 0's {first[name]!r}: all ranks that share an "
                    "epoch must have the same value"
                )
    return agreed


def must_not_draw(rank: Rank) -> bool:
    """Whether the run must use seed 0; warns if so.

    Ranks that cannot communicate would each draw their own seed. They would serve some records twice, and others not at
    all.
    """
    if rank.world_size == 1 or rank.origin == "torch.distributed":
        return False
    warnings.warn(
        f"{rank} without torch.distributed and without a seed: the order is that of seed 0; "
        "give LoaderOptions(seed=...) and Dataset(version=...) so that all ranks read the same version in one order",
        stacklevel=6,  # the caller of iter(loader) or loader.state_dict()
    )
    return True
