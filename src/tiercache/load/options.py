"""The options of the loader beyond torch's own arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tiercache.model import parse_bytes
from tiercache.order import MAX_STREAMS

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

ALL = "all"
_CHOICES = {
    "placement": ("sticky", "global"),
    "on_corrupt": ("raise", "previous"),
    "device_buffers": ("new", "fixed"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """Options of `DataLoader(options=...)`. The defaults suit most runs.

    Attributes:
        seed: Seed of the order of all epochs, any integer. None: the run draws one from the loader's generator or
            torch's when it begins, and ranks that share epochs use that of rank 0.
        rank: Number of this process among the ranks that share the epoch. None: torch.distributed's rank, else that of
            the environment variables, else 0.
        world_size: Number of ranks that share the epoch; given together with `rank`. None: from the same origin as
            `rank`.
        split_ranks: Whether ranks share the records of an epoch. False: every rank is served all records.
        shuffle_streams: Number of streams of the shuffled order. The streams are read side by side, each by one rank or
            by some neighbouring ranks. None: the number of ranks at the start of the run. It is part of the state: a
            resumed run keeps the number that it began with.
        placement: "sticky": a stream, and so a rank, reads the same shards in all epochs of a run, so that the ranks'
            caches together hold the data set. "global": a rank reads other shards in each epoch.
        shuffle_group_bytes: Stored bytes of the shards that are read at a time (int, "4GiB" or "all").
        shuffle_window_bytes: Raw bytes of the blocks over which rows are mixed (int, "256MiB" or "all"), i.e. how much
            is in memory at a time.
        memory_bytes: Memory of the batches that are gathered ahead (int or "256MiB"). None: 1/32 of the memory limit,
            shared by the ranks of the machine, at most 256 MiB.
        threads: Number of gather threads, including the consumer's own thread while it waits. None: the number of the
            machine's cores, shared by its ranks.
        on_corrupt: What to do with a record that is corrupt in the store, or an image that cannot be decoded: "raise"
            CorruptShard, or serve the "previous" record of this rank's sequence instead.
        mesh: torch's DeviceMesh of all processes of the run, with named dimensions; it replaces `rank` and
            `world_size`. The processes agree on the order over its groups. None: each process is a rank of its own.
        dims: Names of the dimensions of `mesh` over which the epoch is split, in any order (a str: one name). Processes
            that differ only in other dimensions (tensor, context or pipeline parallelism) are served the same batches.
            (): all processes are served all records.
        batch_transform: Function that takes a batch as the loader would serve it, and returns what is served instead.
            It is applied after that of the data set (docs/guide/transforms.md).
        device: Device on which batches are served ("cuda", "cuda:1", its number or a torch.device), copied ahead of the
            training loop. "cuda" is the current device at iter(). None or "cpu": batches stay in host memory.
        device_batches: Number of batches whose copies to the device are issued at a time, including the batch that is
            handed out next. None: 2.
        device_buffers: "new": each batch has memory of its own, as long as anything refers to it. "fixed": every batch
            is served at the same addresses and is valid until the next batch is requested, as CUDA graphs need; full
            batches only.
    """

    seed: int | None = None
    rank: int | None = None
    world_size: int | None = None
    split_ranks: bool = True
    shuffle_streams: int | None = None
    placement: Literal["sticky", "global"] = "sticky"
    shuffle_group_bytes: int | str = "4GiB"
    shuffle_window_bytes: int | str = "256MiB"
    memory_bytes: int | str | None = None
    threads: int | None = None
    on_corrupt: Literal["raise", "previous"] = "raise"
    mesh: DeviceMesh | None = None
    dims: str | Sequence[str] | None = None
    batch_transform: Callable[[Any], Any] | None = None
    device: str | int | torch.device | None = None
    device_batches: int | None = None
    device_buffers: Literal["new", "fixed"] = "new"

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("seed", "rank", "world_size", "shuffle_streams", "threads", "device_batches"):
            self._as_int(name)
        self._check_ranks()
        if self.shuffle_streams is not None and not 1 <= self.shuffle_streams <= MAX_STREAMS:
            raise ValueError(f"shuffle_streams must be 1 to {MAX_STREAMS}, got {self.shuffle_streams}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if self.batch_transform is not None and not callable(self.batch_transform):
            raise TypeError(f"batch_transform must be a function of a batch, got {self.batch_transform!r}")
        for name in ("threads", "device_batches"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be 1 or more, got {count}")
        for name in ("shuffle_group_bytes", "shuffle_window_bytes", "memory_bytes"):
            size = getattr(self, name)
            if size is not None and size != ALL and parse_bytes(size) < 1:
                raise ValueError(f"{name} must be 1 byte or more, got {size!r}")
        if self.memory_bytes == ALL:
            raise ValueError("memory_bytes must be a size such as '256MiB', got 'all'")

    def _check_ranks(self) -> None:
        if (self.rank is None) != (self.world_size is None):
            raise ValueError(f"rank and world_size go together, got rank={self.rank}, world_size={self.world_size}")
        if self.rank is not None and self.world_size is not None and not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank={self.rank}, world_size={self.world_size}")
        if self.mesh is not None or self.dims is not None:
            self._check_mesh()

    def _as_int(self, name: str) -> None:
        """Convert any kind of integer to int, because the state holds plain values."""
        value = getattr(self, name)
        if value is not None:
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError as error:
                raise TypeError(f"{name} must be an integer, got {value!r}") from error

    def _check_mesh(self) -> None:
        """Check the mesh and its dimensions, and make `dims` a tuple."""
        mesh, dims = self.mesh, (self.dims,) if isinstance(self.dims, str) else self.dims
        if mesh is None:
            raise ValueError(f"dims={self.dims!r} names dimensions of mesh=: pass mesh= too")
        if not hasattr(mesh, "get_coordinate"):
            raise TypeError(f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {mesh!r}")
        if self.rank is not None:
            raise ValueError(f"mesh= decides the rank: remove rank={self.rank} and world_size={self.world_size}")
        if not self.split_ranks:
            raise ValueError("mesh= cannot be combined with split_ranks=False: pass dims=() to split over no dimension")
        names = mesh.mesh_dim_names
        if not names:
            raise ValueError("the dimensions of the mesh have no names: create it with mesh_dim_names=")
        if dims is None:
            raise ValueError(f"mesh= needs dims=, the names of the data-parallel dimensions among {names}")
        dims = tuple(dims)
        unknown = [name for name in dims if name not in names]
        if unknown:
            raise ValueError(f"the mesh has no dimension {unknown[0]!r}: its dimensions are {names}")
        if len(set(dims)) < len(dims):
            raise ValueError(f"dims must name each dimension once, got {dims}")
        if mesh.get_coordinate() is None:
            raise ValueError(
                f"this process, rank {mesh.get_rank()} of torch.distributed, is not in the mesh: create the loader "
                "only on ranks of the mesh"
            )
        object.__setattr__(self, "dims", dims)

    @property
    def group_bytes(self) -> int | None:
        """shuffle_group_bytes in bytes; None for "all"."""
        return None if self.shuffle_group_bytes == ALL else parse_bytes(self.shuffle_group_bytes)

    @property
    def window_bytes(self) -> int | None:
        """shuffle_window_bytes in bytes; None for "all"."""
        return None if self.shuffle_window_bytes == ALL else parse_bytes(self.shuffle_window_bytes)
