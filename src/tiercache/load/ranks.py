"""Which share of an epoch this process is served, and what all ranks must agree on."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from tiercache import config

if TYPE_CHECKING:
    from tiercache.load.options import LoaderOptions

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of world_size processes that share an epoch.

    Attributes:
        origin: who said so.
        local_ranks: how many share this machine.
    """

    rank: int
    world_size: int
    origin: Literal["options", "torch.distributed", "environment", "alone"]
    local_ranks: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} (from {self.origin})"


def find_rank(options: LoaderOptions) -> Rank:
    """This process's rank.

    As given, else torch.distributed's when it is initialised, else its environment's, else alone.
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
    """Rank 0's version of `mine` where torch.distributed joins the ranks, else mine; a collective call.

    Args:
        rank: this process's.
        mine: plain values, of which rank 0's hold for all.
        alike: plain values that all ranks were given alike.

    Raises:
        ValueError: one of `alike` differs from rank 0's.
    """
    if rank.origin != "torch.distributed" or rank.world_size == 1:
        return mine
    shared = [(mine, alike)]
    dist.broadcast_object_list(shared, src=0)
    agreed, first = shared[0]
    for name, value in alike.items():
        if value != first[name]:
            raise ValueError(f"{name}={value!r} on rank {rank.rank} differs from rank 0's {first[name]!r}")
    return agreed


def draw_seed(rank: Rank, generator: torch.Generator | None) -> int:
    """A seed for the run: from the generator or torch's own, as torch's RandomSampler draws one.

    Ranks that cannot talk to each other would each draw their own and serve records twice: they take 0, with a warning.
    """
    if rank.world_size > 1 and rank.origin != "torch.distributed":
        warnings.warn(
            f"{rank} without torch.distributed and without a seed: the order is that of seed 0; "
            "give LoaderOptions(seed=...) and Dataset(version=...) so that all ranks read the same",
            stacklevel=6,  # the caller of iter(loader) or loader.state_dict()
        )
        return 0
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
