"""Sharded checkpoints of gloo ranks by torch.distributed.checkpoint: saved by 4 ranks, loaded by 4, 2 and 1."""

import pytest
import torch.distributed.checkpoint as dcp
from tests.distributed.checkpoint_jobs import KINDS, digest, make, state_of
from tests.distributed.ranks import run_ranks

import tiercache as tc

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SAVE, LOAD = "tests.distributed.checkpoint_jobs:save", "tests.distributed.checkpoint_jobs:load"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, warm_python):
    """Where 4 ranks saved a checkpoint of each kind, and the digests of their states."""
    folder = tmp_path_factory.mktemp("checkpoints")
    arguments = {"url": str(folder / "remote"), "local": str(folder / "local"), "kinds": KINDS}
    answers = run_ranks(warm_python, SAVE, 4, folder / "job", arguments)
    assert answers == [answers[0]] * 4
    return folder, answers[0]


@pytest.mark.parametrize("n_ranks", [4, 2])
def test_ranks_load_what_four_ranks_saved(saved, tmp_path, warm_python, n_ranks):
    folder, digests = saved
    arguments = {"url": str(folder / "remote"), "local": str(folder / "local"), "kinds": KINDS}
    for answer in run_ranks(warm_python, LOAD, n_ranks, tmp_path, arguments):
        assert answer == {kind: [digest, digest] for kind, digest in digests.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_loads_what_four_ranks_saved(saved, kind):
    folder, digests = saved
    checkpoints = tc.Checkpoints(folder / "remote")
    state = state_of(*make("plain", seed=1))
    state["loader"] = {"epoch": 0, "served": []}
    dcp.load(state, storage_reader=checkpoints.dcp_reader(KINDS.index(kind)))
    assert digest(state) == digests[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_is_stored_once_however_many_ranks_have_it(saved, kind):
    checkpoints = tc.Checkpoints(saved[0] / "remote")
    state = state_of(*make("plain"))
    tensors = [value for value in chain(state["model"].values(), *state["optimizer"]["state"].values())]
    stored = checkpoints.load(KINDS.index(kind))
    manifest = checkpoints.manifest(KINDS.index(kind))
    assert sum(entry.n_bytes for entry in manifest.tensors.values()) == sum(tensor.nbytes for tensor in tensors)
