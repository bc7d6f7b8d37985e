"""The rank of this process, and the values on which all ranks must agree."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tiercache import config

if TYPE_CHECKING:
    from tiercache.load.options import LoaderOptions

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of world_size shares of an epoch, which this process is served.

    Attributes:
        rank: Number of the share.
        world_size: Number of shares.
        origin: Where both were found.
        local_ranks: Number of processes on this machine, which share its cores and its memory.
    """

    rank: int
    world_size: int
    origin: Literal["options", "torch.distributed", "environment", "alone", "sampler"]
    local_ranks: int = 1

    def __str__(self) -> str:
        origin = "alone" if self.origin == "alone" else f"from {self.origin}"
        return f"rank {self.rank} of {self.world_size} ({origin})"

    @property
    def is_alone(self) -> bool:
        """Whether no other process is served a share of the same epochs."""
        return self.world_size == 1


def _joined_ranks() -> Any:
    """Return the module torch.distributed if it joins this process with others; None: torch need not be installed."""
    module: Any = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


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
    if (dist := _joined_ranks()) is not None:
        return Rank(dist.get_rank(), dist.get_world_size(), "torch.distributed", local_ranks)
    if environment:
        return Rank(environment[0], environment[1], "environment", local_ranks)
    return Rank(0, 1, "alone")


def _gather(value: Any) -> list[Any]:
    """Return the value of each process of torch.distributed, by rank; a collective call. value: It is pickled."""
    dist: Any = sys.modules["torch.distributed"]  # batches of NumPy arrays need no torch
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agree(rank: Rank, mine: dict[str, Any], alike: dict[str, Any]) -> dict[str, Any]:
    """Return the first rank's values on all ranks that torch.distributed joins, else `mine`; a collective call.

    Raises:
        ValueError: One of `alike` differs on one of the ranks; raised on every rank.
    """
    if rank.is_alone or rank.origin != "torch.distributed":
        return mine
    # Gathered, not broadcast: every rank sees the difference and raises, so no rank waits for one that raised.
    gathered = _gather((mine, alike))
    agreed: dict[str, Any]
    agreed, expected = gathered[0]
    for other, (_, theirs) in enumerate(gathered):
        for name, value in theirs.items():
            if value != expected[name]:
                raise ValueError(
                    f"{name}={value!r} on rank {other} differs from rank 0's {expected[name]!r}: all ranks that "
                    "share an epoch must have the same value"
                )
    return agreed


def find_slowest(exposed: dict[str, float]) -> dict[str, float]:
    """Return the exposed waits of the process with the longest total, and its number; a collective call."""
    gathered = [exposed] if _joined_ranks() is None else _gather(exposed)
    slowest = max(range(len(gathered)), key=lambda number: gathered[number]["total"])
    return {"rank": slowest, **gathered[slowest]}


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
