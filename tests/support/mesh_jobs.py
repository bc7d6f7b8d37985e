"""What the ranks of the tests' jobs on device meshes do, run by child.py."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
import torch.distributed as dist
from tests.support.loader_jobs import take
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tiercache as tc

SMALL = {"shuffle_window_bytes": "4KiB", "shuffle_group_bytes": "16KiB"}
Case = dict[str, Any]


def serve(url: str, cases: dict[str, Case]) -> dict[str, Case]:
    """Every case with the same process group; what each served this rank. A case may continue from another's state."""
    dist.init_process_group("gloo")
    found: dict[str, Case] = {}
    for name, case in cases.items():
        resumed = found[case.pop("resumed")]["state"] if "resumed" in case else None
        found[name] = serve_case(url, resumed=resumed, **case)
        dist.barrier()  # the calls of a rank that is not in a mesh must not meet those of the next case
    dist.destroy_process_group()
    return found


def serve_case(
    url: str,
    sizes: dict[str, int],
    dims: list[str] | None,
    *,
    part: list[str] | None = None,
    is_flattened: bool = False,
    only_state: dict[str, int] | None = None,
    windows: list[str] | None = None,
    n_epochs: int = 1,
    stop_after: int | None = None,
    batch_size: int = 5,
    resumed: Case | None = None,
) -> Case:
    """Batches of ids by epoch, and what the loader says; or the error.

    Args:
        url: The data set.
        sizes: Sizes of the mesh's dimensions, by name. The mesh has the first ranks; the others do nothing.
        dims: LoaderOptions.dims; None: the loader does not know the mesh.
        part: Dimensions of the part of the mesh that the loader is given.
        is_flattened: Whether that part is flattened, as dimension "flat".
        only_state: The ranks at this place of a dimension only ask for the state.
        windows: shuffle_window_bytes, by rank.
        n_epochs, stop_after, batch_size: How much is served.
        resumed: State that is loaded before.
    """
    rank = dist.get_rank()
    torch.manual_seed(rank)  # each rank would draw a seed of its own
    gc.collect()  # meshes of earlier cases
    mesh = make_mesh(sizes)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return {}
    given = mesh if part is None else mesh[tuple(part)]
    if is_flattened:
        given = given._flatten("flat")
    options: Case = {**SMALL, **({} if dims is None else {"mesh": given, "dims": dims})}
    if windows is not None:
        options["shuffle_window_bytes"] = windows[rank]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loader = tc.DataLoader(
            tc.Dataset(url), batch_size=batch_size, shuffle=True, options=tc.LoaderOptions(**options)
        )
        if resumed is not None:
            loader.load_state_dict(resumed)
        place = dict(zip(sizes, coordinate, strict=True))
        epochs = []
        try:
            if only_state is None or not only_state.items() <= place.items():
                epochs = [take(loader, stop_after) for _ in range(n_epochs)]
            state = loader.state_dict()
        except ValueError as error:
            return {"error": str(error)}
    own = [str(one.message) for one in warned if "DeviceMesh" in str(one.message)]
    slowest = None if dims is None else loader.stats(across_ranks=True)["exposed_wait_s"]["slowest_rank"]["rank"]
    return {"epochs": epochs, "state": state, "warned": own, "repr": repr(loader), "slowest": slowest}


def make_mesh(sizes: dict[str, int]) -> DeviceMesh:
    """The mesh of the first ranks."""
    shape = tuple(sizes.values())
    n_ranks = torch.Size(shape).numel()
    if n_ranks == dist.get_world_size():
        return init_device_mesh("cpu", shape, mesh_dim_names=tuple(sizes))
    return DeviceMesh("cpu", torch.arange(n_ranks).reshape(shape), mesh_dim_names=tuple(sizes))


def read_through_cache(url: str, cache: str) -> tuple[list[int], int]:
    """The ids of an epoch of one tensor-parallel group of all ranks, in lockstep, through the machine's cache.

    And the number of requests that this rank repeated because they were late.
    """
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    dataset = tc.Dataset(url, cache=tc.Cache(cache, size="64MiB", min_free="0%"))
    options = tc.LoaderOptions(mesh=mesh, dims="dp", **SMALL)
    served = []
    loader = tc.DataLoader(dataset, batch_size=20, shuffle=True, options=options)
    for batch in loader:
        served += batch["id"].tolist()
        dist.all_reduce(torch.ones(1))  # as the layers of the model do
    dist.barrier()
    dist.destroy_process_group()
    stats = loader.stats()
    return served, stats["retries"] + stats["hedges"]
