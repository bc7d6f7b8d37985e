"""LoaderOptions(mesh=, dims=) in one process: meshes as one rank after the other sees them."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
from collections import defaultdict
from contextlib import closing
from math import prod
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tests.support.meshes import FakeMesh
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiercache as tc
from tiercache.load.loader_options import (
    LoaderOptions,
    find_rank,
    find_same_batch_dims,
    is_same_batch_dim,
    mesh_rank,
    share_resources,
    whole_mesh,
)

DP_TP, DP_CP_PP = {"dp": 2, "tp": 4}, {"dp": 2, "cp": 2, "pp": 2}


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4))
def test_ranks_are_equal_exactly_if_they_differ_only_in_other_dimensions(shape):
    sizes = {f"d{number}": size for number, (size, _) in enumerate(shape)}
    dims = [f"d{number}" for number, (_, is_split) in enumerate(shape) if is_split]
    by_place = defaultdict(set)
    for rank in range(prod(sizes.values())):
        mesh = FakeMesh(sizes, rank)
        place = tuple(at for at, (_, is_split) in zip(mesh.get_coordinate(), shape, strict=True) if is_split)
        by_place[place].add(mesh_rank(mesh, dims))
    assert [found for places in sorted(by_place) for found in by_place[places]] == [
        (number, len(by_place)) for number in range(len(by_place))
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dims": ("dp",)}, ValueError, r"dims=\('dp',\) names dimensions of mesh=: pass mesh= too"),
        ({"mesh": FakeMesh(DP_TP, 0)}, ValueError, r"needs dims=.* among \('dp', 'tp'\)"),
        ({"mesh": FakeMesh(DP_TP, 0), "dims": ("dp", "cp")}, ValueError, r"no dimension 'cp': .* \('dp', 'tp'\)"),
        ({"mesh": FakeMesh(DP_TP, 0), "dims": ("dp", "dp")}, ValueError, "each dimension once"),
        ({"mesh": FakeMesh(DP_TP, 8), "dims": "dp"}, ValueError, "rank 8 of torch.distributed, is not in the mesh"),
        ({"mesh": FakeMesh(DP_TP, 0), "dims": "dp", "rank": 0, "world_size": 2}, ValueError, "remove rank=0"),
        ({"mesh": FakeMesh(DP_TP, 0), "dims": "dp", "split_ranks": False}, ValueError, r"pass dims=\(\)"),
        ({"mesh": [[0, 1]], "dims": "dp"}, TypeError, r"must be a torch.*DeviceMesh, got \[\[0, 1\]\]"),
    ],
)
def test_what_does_not_fit_together_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        LoaderOptions(**options)


def test_a_mesh_whose_dimensions_have_no_names_is_an_error():
    mesh = FakeMesh(DP_TP, 0)
    mesh.mesh_dim_names = None
    with pytest.raises(ValueError, match="create it with mesh_dim_names="):
        LoaderOptions(mesh=mesh, dims="dp")


def test_a_sampler_and_a_mesh_exclude_each_other(make_dataset):
    options = LoaderOptions(mesh=FakeMesh(DP_TP, 0), dims="dp")
    with closing(tc.Dataset(make_dataset(8))) as dataset, pytest.raises(ValueError, match="remove mesh="):
        tc.DataLoader(dataset, sampler=[0, 1], options=options)


def test_names_of_dimensions_whose_ranks_share_batches():
    shared = ["tp", "cp", "sp", "pp", "mp", "tensor_parallel", "Context", "pipeline-parallel", "TP"]
    others = ["dp", "dp_replicate", "fsdp", "ddp", "data", "replicate", "shard", "dp_shard_cp", "ep", "inter"]
    assert [name for name in shared + others if is_same_batch_dim(name)] == shared


@pytest.fixture
def fake_job():
    """A process group whose calls return at once: this process is rank 5 of 8."""
    gc.collect()  # meshes of earlier tests
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def warnings_of_a_run(url, options=None):
    """What a loader warns of in two epochs."""
    with closing(tc.Dataset(url)) as dataset, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loader = tc.DataLoader(dataset, batch_size=4, shuffle=True, options=options)
        with closing(tc.Dataset(url)) as other:
            alone = tc.DataLoader(other, shuffle=True, options=LoaderOptions(seed=3, rank=0, world_size=1))
            loader.load_state_dict(alone.state_dict())
        for _ in range(2):
            list(loader)
    return [(str(one.message), one.category, one.filename) for one in warned]


@pytest.mark.parametrize(
    ("shape", "names", "dim"),
    [
        ((2, 2, 2), ("dp", "cp", "pp"), "cp"),
        ((1, 8), ("dp", "tp"), "tp"),  # its group is that of all processes
    ],
)
def test_a_mesh_in_use_is_warned_of_once_with_the_option(make_dataset, fake_job, shape, names, dim):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    ((message, category, filename),) = warnings_of_a_run(make_dataset(40))
    assert "LoaderOptions(mesh=mesh, dims=...)" in message
    assert str(names) in message
    assert repr(dim) in message
    assert (category, filename) == (RuntimeWarning, __file__)
    del mesh


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((8,), None),
        ((2, 4), ("dp_replicate", "dp_shard")),
        ((8, 1), ("dp", "tp")),
    ],
)
def test_a_mesh_of_data_dimensions_is_not_warned_of(make_dataset, fake_job, shape, names):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    assert warnings_of_a_run(make_dataset(40)) == []
    del mesh


def test_a_loader_that_is_told_its_rank_does_not_warn_of_a_mesh(make_dataset, fake_job):
    mesh, url = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp")), make_dataset(40)
    for options in ({"rank": 0, "world_size": 2}, {"split_ranks": False}, {"mesh": mesh, "dims": "dp"}):
        assert warnings_of_a_run(url, LoaderOptions(**options)) == []


def test_a_mesh_that_another_release_of_torch_makes_otherwise_is_passed_over(monkeypatch):
    class DeviceMesh:
        pass

    changed = DeviceMesh()
    monkeypatch.setitem(sys.modules, "torch.distributed.device_mesh", SimpleNamespace(DeviceMesh=DeviceMesh))
    assert find_same_batch_dims() == {}
    monkeypatch.setitem(sys.modules, "torch.distributed.device_mesh", SimpleNamespace())
    assert find_same_batch_dims() == {}
    del changed


def test_options_with_a_real_mesh_are_compared_copied_and_pickled(fake_job):
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    options = LoaderOptions(mesh=mesh, dims=["dp"])
    for other in (copy.copy(options), copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert other == options
        assert hash(other) == hash(options)
        assert find_rank(other) == find_rank(options)
    assert options != LoaderOptions(mesh=mesh, dims=())
    assert options != LoaderOptions()


def test_the_processes_of_a_slice_are_those_of_the_whole_mesh(fake_job):
    whole = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "cp", "tp"))
    for mesh in (whole, whole["dp"], whole["dp", "cp"], whole["dp", "cp"]._flatten("data")):
        assert whole_mesh(mesh) is whole


def test_the_whole_mesh_is_unknown_if_another_release_of_torch_hides_it():
    assert whole_mesh(FakeMesh(DP_TP, 0)) is None
    rank = find_rank(LoaderOptions(mesh=FakeMesh({"tp": 8}, 0), dims=()))
    assert (rank.mesh, rank.is_alone) == (None, False)  # all processes of torch.distributed must agree then


def test_threads_and_memory_are_shared_by_the_processes_of_the_machine_whatever_the_mesh(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    options = LoaderOptions(mesh=FakeMesh(DP_TP, 1), dims="dp")
    shared = share_resources(options, find_rank(options), n_cpus=16, limit_bytes=64 << 20)
    assert (shared.n_threads, shared.memory_bytes, shared.limit_bytes) == (4, (2 << 20) // 4, 16 << 20)
