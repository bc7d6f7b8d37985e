"""The options of a loader beyond torch's own arguments, and what follows from them: a process's rank and resources.

Only this module uses a `DeviceMesh`, whose private parts differ from one release of torch to the next (2.4 and later).
"""

from __future__ import annotations

import contextlib
import gc
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from tiercache import config
from tiercache.model import parse_bytes
from tiercache.order.window import MAX_STREAMS

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

ALL = "all"
P = ParamSpec("P")


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
        memory_bytes: Memory of the batches that are gathered ahead (int or "256MiB"), and of those that workers have;
            each worker may always have one. None: 1/32 of the memory limit, shared by the ranks of the machine, at most
            256 MiB.
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
        device_batches: Number of batches whose copies to the device are issued before the training loop asks for them.
            None: 2.
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
        choice: list[str]
        for name, *choice in (
            ("placement", "sticky", "global"),
            ("on_corrupt", "raise", "previous"),
            ("device_buffers", "new", "fixed"),
        ):
            if getattr(self, name) not in choice:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choice))}, got {getattr(self, name)!r}")
        if self.batch_transform is not None and not callable(self.batch_transform):
            raise TypeError(f"batch_transform must be a function of a batch, got {self.batch_transform!r}")
        for name in ("threads", "device_batches", "shuffle_group_bytes", "shuffle_window_bytes", "memory_bytes"):
            given = getattr(self, name)
            if given in (None, ALL):
                continue
            try:
                is_large_enough = parse_bytes(given) >= 1
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if not is_large_enough:
                raise ValueError(f"{name} must be 1 or more, got {given!r}")
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


@dataclass(frozen=True, slots=True)
class Rank:
    """One of world_size shares of an epoch, which this process is served.

    Attributes:
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


def checks_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Let the constructor of a loader say what is meant by a path instead of a data set, and by an option as argument.

    In a decorator, because frameworks read the signature and expect torch's arguments there.
    """

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        name = type(args[0]).__name__
        dataset = args[1] if len(args) > 1 else kwargs.get("dataset")
        if isinstance(dataset, str | os.PathLike):
            path = os.fspath(dataset)
            raise TypeError(f"{name}() takes a data set, got a path: {name}(tiercache.Dataset({path!r}), ...)")
        if options := [f"{one.name}={kwargs[one.name]!r}" for one in fields(LoaderOptions) if one.name in kwargs]:
            said = f"tiercache.LoaderOptions({', '.join(options)})"
            raise TypeError(f"{options[0].partition('=')[0]}= is an option: {name}(..., options={said})")
        init(*args, **kwargs)

    return checked


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


# Words in the name of a dimension. A name with a word of the first kind is a dimension along which ranks usually work
# on the same batch. A word of the second kind overrides it: "dp_shard_cp" is a data dimension. All other names ("ep",
# "inter") decide nothing.
_SAME_BATCH = {"tp", "cp", "sp", "pp", "mp", "tensor", "context", "sequence", "seq", "pipeline", "pipe", "model"}

_OWN_BATCH = {"dp", "ddp", "fsdp", "hsdp", "data", "batch", "replicate", "shard"}


def mesh_rank(mesh: DeviceMesh, dims: Sequence[str]) -> tuple[int, int]:
    """Return this process's number among the mesh's ranks along `dims`, and their number; (0, 1) for no dims.

    The numbers follow the mesh's own order of dimensions: the last one varies fastest.
    """
    rank, world_size = 0, 1
    for dim, (name, at) in enumerate(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True)):
        if name in dims:
            rank, world_size = rank * mesh.size(dim) + at, world_size * mesh.size(dim)
    return rank, world_size


def gather(value: Any, mesh: DeviceMesh | None) -> dict[int, Any]:
    """Return the value of each process, by its rank in torch.distributed, ascending; a collective call."""
    dist: Any = sys.modules["torch.distributed"]  # batches of NumPy arrays need no torch
    groups: list[Any] = [None]
    if mesh is not None and mesh.size() < dist.get_world_size():
        # A process has no group of all processes of a mesh. After the gathering along the first dimensions, each
        # process knows the values of all processes that differ from it only in those.
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    values = {dist.get_rank(): value}
    for group in groups:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, values, group=group)
        values = {rank: found for part in gathered for rank, found in part.items()}
    return dict(sorted(values.items()))


def whole_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Return the mesh from which a mesh was sliced or flattened, or the mesh itself; None if torch does not tell.

    From torch 2.5 to 2.8, only the thread that sliced the mesh can tell.
    """
    # Private, so anything may go wrong; but if a slice were taken for the whole, each slice would draw its own seed.
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(mesh, "_get_root_mesh"):  # torch 2.9 and later
            return mesh._get_root_mesh()  # noqa: SLF001
        resources: Any = sys.modules["torch.distributed.device_mesh"]._mesh_resources  # noqa: SLF001
        if hasattr(resources, "get_root_mesh"):
            whole: DeviceMesh | None = resources.get_root_mesh(mesh)
        else:  # torch 2.4
            whole = resources.get_parent_mesh(mesh) or mesh
        return whole
    return None


def find_same_batch_dims() -> dict[str, DeviceMesh]:
    """Return the dimensions of this process's meshes along which ranks usually need the same batches, by name.

    The values are the meshes. Dimensions of size 1 are left out.
    """
    found: dict[str, DeviceMesh] = {}
    for mesh in _meshes():
        # A mesh that another thread is making lacks attributes, and a later torch may have others.
        with contextlib.suppress(Exception):
            names, coordinate = mesh.mesh_dim_names, mesh.get_coordinate()
            if names and coordinate is not None:
                sizes = [mesh.size(dim) for dim in range(len(names))]
                found |= {name: mesh for name, n in zip(names, sizes, strict=True) if n > 1 and is_same_batch_dim(name)}
    return found


def is_same_batch_dim(name: str) -> bool:
    """Whether the name of a dimension says that ranks along it work on the same batch."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return bool(words & _SAME_BATCH) and not words & _OWN_BATCH


def _meshes() -> Iterator[DeviceMesh]:
    """Yield the device meshes of this process.

    torch keeps no list of them, and not every dimension has a process group of its own that could be recognised, so the
    objects of the garbage collector are searched: 0.1 s of a processor for a million objects, once for each loader.
    """
    kind = getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", None)
    if kind is not None:
        yield from (one for one in gc.get_objects() if type(one) is kind)


@dataclass(frozen=True, slots=True)
class Resources:
    """Limits of a pipeline.

    n_threads: Number of gather threads; memory_bytes: memory of batches gathered ahead; limit_bytes: memory limit of
    the whole process.
    """

    n_threads: int
    memory_bytes: int
    limit_bytes: int


# Share of the memory limit for batches gathered ahead: enough for 32 batches of 8 MiB, and little beside a model.
_MEMORY_SHARE, _MEMORY_MAX_BYTES = 32, 256 << 20


def share_resources(options: LoaderOptions, rank: Rank, n_cpus: int, limit_bytes: int) -> Resources:
    """Return the resources of one of the ranks on a machine that has n_cpus cores and limit_bytes of memory."""
    n_threads = options.threads or max(1, n_cpus // rank.local_ranks)
    share_bytes = min(_MEMORY_MAX_BYTES, limit_bytes // _MEMORY_SHARE) // rank.local_ranks
    memory_bytes = share_bytes if options.memory_bytes is None else parse_bytes(options.memory_bytes)
    return Resources(n_threads, memory_bytes, limit_bytes // rank.local_ranks)
