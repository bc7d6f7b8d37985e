"""The rank of this process, and the values on which all ranks must agree."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tiercache import config
from tiercache.load.meshes import find_same_batch_dims, gather, mesh_rank, whole_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
        mesh: Mesh of all processes of the run, if the origin is "mesh": several of them may have the same share. None:
            they are all processes of torch.distributed.
    """

    rank: int
    world_size: int
    origin: Literal["options", "mesh", "torch.distributed", "environment", "alone", "sampler"]
    local_ranks: int = 1
    mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        origin = "alone" if self.origin == "alone" else f"from {self.origin}"
        return f"rank {self.rank} of {self.world_size} ({origin})"

    @property
    def is_alone(self) -> bool:
        """Whether no other process is served a share of the same epochs."""
        return self.world_size == 1 and self.origin != "mesh"


def _joined_ranks() -> Any:
    """Return the module torch.distributed if it joins this process with others; None: torch need not be installed."""
    module: Any = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def find_rank(options: LoaderOptions) -> Rank:
    """Return this process's rank.

    The options come first, either a rank or a mesh that has one, then torch.distributed if it is initialised, then the
    environment variables of a launcher. Else the process is the only rank.
    """
    environment = config.distributed_environment()
    local_ranks = environment[3] if environment else 1
    if options.rank is not None and options.world_size is not None:
        return Rank(options.rank, options.world_size, "options", local_ranks)
    if options.mesh is not None:
        return Rank(*mesh_rank(options.mesh, options.dims or ()), "mesh", local_ranks, whole_mesh(options.mesh))
    if not options.split_ranks:
        return Rank(0, 1, "options", local_ranks)
    if (dist := _joined_ranks()) is not None:
        return Rank(dist.get_rank(), dist.get_world_size(), "torch.distributed", local_ranks)
    if environment:
        return Rank(environment[0], environment[1], "environment", local_ranks)
    return Rank(0, 1, "alone")


def agree(rank: Rank, mine: dict[str, Any], alike: dict[str, Any]) -> dict[str, Any]:
    """Return the first rank's values on all ranks that torch.distributed joins, else `mine`; a collective call.

    Raises:
        ValueError: One of `alike` differs on one of the ranks; raised on every rank.
    """
    if rank.is_alone or rank.origin not in ("torch.distributed", "mesh"):
        return mine
    # Gathered, not broadcast: every rank sees the difference and raises, so no rank waits for one that raised.
    gathered = gather((mine, alike), rank.mesh)
    first = min(gathered)
    agreed: dict[str, Any]
    agreed, expected = gathered[first]
    for other, (_, theirs) in gathered.items():
        for name, value in theirs.items():
            if value != expected[name]:
                raise ValueError(
                    f"{name}={value!r} on rank {other} differs from rank {first}'s {expected[name]!r}: all ranks that "
                    "share an epoch must have the same value"
                )
    return agreed


def find_slowest(rank: Rank, exposed: dict[str, float]) -> dict[str, float]:
    """Return the exposed waits of the process with the longest total, and its number; a collective call.

    The processes of the rank's mesh take part, else all that torch.distributed joins. Without it the only one is 0.
    """
    gathered = {0: exposed} if _joined_ranks() is None else gather(exposed, rank.mesh)
    slowest = max(gathered, key=lambda number: gathered[number]["total"])
    return {"rank": slowest, **gathered[slowest]}


def must_not_draw(rank: Rank) -> bool:
    """Whether the run must use seed 0; warns if so.

    Ranks that cannot communicate would each draw their own seed. They would serve some records twice, and others not at
    all.
    """
    if rank.world_size == 1 or rank.origin in ("torch.distributed", "mesh"):
        return False
    warnings.warn(
        f"{rank} without torch.distributed and without a seed: the order is that of seed 0; "
        "give LoaderOptions(seed=...) and Dataset(version=...) so that all ranks read the same version in one order",
        stacklevel=6,  # the caller of iter(loader) or loader.state_dict()
    )
    return True


def warn_of_meshes(rank: Rank) -> None:
    """Warn if ranks that usually need the same batches are served different ones, as far as their meshes show that."""
    if rank.world_size == 1 or rank.origin not in ("torch.distributed", "environment"):
        return
    found = find_same_batch_dims()
    if not found:
        return
    name, mesh = next(iter(found.items()))
    warnings.warn(
        f"a DeviceMesh with the dimensions {mesh.mesh_dim_names} is in use, and each of the {rank.world_size} ranks is "
        f"served batches of its own, also along {name!r}, where ranks usually work on the same batch: pass "
        "LoaderOptions(mesh=mesh, dims=...) with the names of the data-parallel dimensions, or rank= and world_size= "
        "if each rank must have batches of its own",
        RuntimeWarning,
        stacklevel=6,  # the caller of iter(loader) or loader.state_dict()
    )
