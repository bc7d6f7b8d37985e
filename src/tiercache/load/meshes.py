"""Device meshes of torch: the rank of a process in one, the processes that one joins, and which ones are in use.

No other module uses a `DeviceMesh`, whose private parts differ from one release of torch to the next (2.4 and later).
"""

from __future__ import annotations

import contextlib
import gc
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.device_mesh import DeviceMesh

# Words in the name of a dimension. A name with a word of the first kind is a dimension along which ranks usually work
# on the same batch. A word of the second kind overrides it: "dp_shard_cp" is a data dimension. All other names ("ep",
# "inter") decide nothing.
_SAME_BATCH = {"tp", "cp", "sp", "pp", "mp", "tensor", "context", "sequence", "seq", "pipeline", "pipe", "model"}
_OWN_BATCH = {"dp", "ddp", "fsdp", "hsdp", "data", "batch", "replicate", "shard"}


def mesh_rank(mesh: DeviceMesh, dims: Sequence[str]) -> tuple[int, int]:
    """Return this process's number among the mesh's ranks along `dims`, and their number; (0, 1) for no dims.

    The numbers follow the mesh's own order of dimensions: the last one varies fastest.

    Args:
        mesh: Mesh with named dimensions that this process is part of (`LoaderOptions` checks both).
        dims: Names of dimensions of the mesh, in any order.
    """
    rank, world_size = 0, 1
    for dim, (name, at) in enumerate(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True)):
        if name in dims:
            rank, world_size = rank * mesh.size(dim) + at, world_size * mesh.size(dim)
    return rank, world_size


def gather(value: Any, mesh: DeviceMesh | None) -> dict[int, Any]:
    """Return the value of each process, by its rank in torch.distributed, ascending; a collective call.

    Args:
        value: Value of this process; it is pickled.
        mesh: Mesh whose processes take part. None: all processes.
    """
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
