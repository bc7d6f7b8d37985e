"""Sharded checkpoints of gloo ranks by torch.distributed.checkpoint: saved by 4 ranks, loaded by 4, 2 and 1."""

import json
import signal

import pytest
import torch.distributed.checkpoint as dcp
from tests.stress.rank_rounds import Rounds, points_of_ranks
from tests.support.checkpoint_jobs import KINDS, digest, make, state_of
from tests.support.ranks import Job, run_ranks

import tiercache as tc

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SAVE, LOAD = "tests.support.checkpoint_jobs:save", "tests.support.checkpoint_jobs:load"
N_ROUNDS = 450  # half an hour on two cores; `python -m tests.stress.rank_rounds` takes any number


@pytest.fixture(scope="module")
def saved(tmp_path_factory, warm_python):
    """Where 4 ranks saved a checkpoint of each kind, and the digests of their states."""
    folder = tmp_path_factory.mktemp("checkpoints")
    arguments = {"url": str(folder / "remote"), "local": str(folder / "local"), "kinds": KINDS}
    answers = run_ranks(warm_python, SAVE, 4, folder / "job", arguments)
    assert answers == [answers[0]] * 4
    return folder, answers[0]


@pytest.mark.parametrize("n_ranks", [pytest.param(4, marks=pytest.mark.stress), 2])
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
    moments = [value for of_one in state["optimizer"]["state"].values() for value in of_one.values()]
    manifest = checkpoints._stores.scan().manifest(name_of(checkpoints, KINDS.index(kind)))
    stored = sum(entry.n_bytes for entry in manifest.tensors.values())
    assert stored == sum(tensor.nbytes for tensor in [*state["model"].values(), *moments])


def test_a_plain_load_puts_the_parts_of_all_ranks_together(saved):
    folder, digests = saved
    model, optimizer = make("plain", seed=1)
    checkpoints = tc.Checkpoints(folder / "remote")
    state = {**state_of(model, optimizer), "loader": {"epoch": 0, "served": []}}
    assert digest(checkpoints.load("best:loss")) == digests[KINDS[-1]]
    checkpoints.load("latest", into=state)
    assert digest(state) == digests[KINDS[-1]]


def name_of(checkpoints, step):
    (name,) = [info.name for info in checkpoints.list() if info.step == step]
    return name


def test_a_rank_that_fails_or_is_killed_leaves_the_last_checkpoint(tmp_path, warm_python):
    url, local = str(tmp_path / "remote"), str(tmp_path / "local")
    arguments = {"url": url, "local": local, "answers": str(tmp_path)}
    with Job(warm_python, "tests.support.checkpoint_jobs:fail", 2, tmp_path / "job", arguments) as job:
        codes = job.exit_codes()
    assert codes[1] == -signal.SIGKILL, job.said()
    assert codes[0] != 0, "rank 0 saved without its peer"
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for answer in answers:  # both ranks learn of the failure
        assert "scripted fault in complete" in answer["error"], answer
    checkpoints = tc.Checkpoints(url, local=local)
    found = [(info.step, info.state) for info in checkpoints.list()]
    if (1, "incomplete") in found:  # unless rank 1 failed, and deleted the local files, before rank 0 uploaded any
        found.remove((1, "incomplete"))
    assert found == [(0, "complete"), (2, "incomplete")]
    assert digest(checkpoints.load("latest")) == answers[0]["digest"]


@pytest.mark.parametrize(("point", "newest"), [("dcp.described", 0), ("dcp.committed", 1)])
def test_a_coordinator_that_is_killed_leaves_a_whole_checkpoint(tmp_path, warm_python, point, newest):
    url, local = str(tmp_path / "remote"), str(tmp_path / "local")
    arguments = {"url": url, "local": local, "point": point}
    with Job(warm_python, "tests.support.checkpoint_jobs:die", 1, tmp_path / "job", arguments) as job:
        assert job.exit_codes() == [-signal.SIGKILL], job.said()
    state = tc.Checkpoints(url, local=local).load("latest")
    assert state["step"].tolist() == [newest] * 1000


def test_retention_cleans_the_local_folder_of_every_machine(tmp_path, warm_python):
    arguments = {"url": str(tmp_path / "remote"), "local": str(tmp_path / "local"), "n_saves": 4}
    first, second = run_ranks(warm_python, "tests.support.checkpoint_jobs:save_on_machines", 2, tmp_path, arguments)
    assert first == [3]
    assert second in ([3], [2, 3])  # applied while step 3 is written: it may be committed by then


@pytest.mark.stress
@pytest.mark.timeout(7200)
def test_kills_of_ranks_lose_no_checkpoint_and_leave_nothing(tmp_path, warm_python, capsys):
    rounds = Rounds(tmp_path, seed=23, python=warm_python)
    rounds.run(N_ROUNDS)
    report = rounds.report
    with capsys.disabled():
        print(
            f"\ntwo ranks: {report.n_struck} rounds struck {len(report.struck)} points; "
            f"{report.missed} missed; {report.seconds:.0f} s; {len(report.problems)} problems"
        )
    assert report.problems == []
    assert report.never_reached == []
    assert points_of_ranks().keys() <= report.struck.keys()
