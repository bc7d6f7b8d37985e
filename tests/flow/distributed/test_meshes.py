"""Jobs of 8 ranks on device meshes over gloo: groups that are served the same batches, and runs that change shape."""

from collections import defaultdict
from contextlib import closing
from itertools import chain

import numpy as np
import pytest
from tests.support.http_server import HttpFaultServer
from tests.support.meshes import FakeMesh
from tests.support.ranks import run_ranks

import tiercache as tc
from tiercache.load.loader_options import mesh_rank

pytestmark = pytest.mark.timeout(300)

N = 317  # a prime; enough records are left for the last batch that no rank must repeat one
DP_TP, DP_CP_PP, TP, RESUMED = {"dp": 2, "tp": 4}, {"dp": 2, "cp": 2, "pp": 2}, {"tp": 8}, {"dp": 4, "tp": 2}
SIX_OF_EIGHT = {"dp": 2, "tp": 3}
CASES = {
    "dp 2 x tp 4": {"sizes": DP_TP, "dims": ["dp"], "n_epochs": 2},
    "dp 2 x cp 2 x pp 2": {"sizes": DP_CP_PP, "dims": ["dp"], "n_epochs": 2},
    "tp 8": {"sizes": TP, "dims": [], "n_epochs": 2},
    "stopped, dp 2 x tp 4": {"sizes": DP_TP, "dims": ["dp"], "stop_after": 11},
    "stopped, dp 2 x cp 2 x pp 2": {"sizes": DP_CP_PP, "dims": ["dp"], "stop_after": 7},
    "dp 4 x tp 2, from dp 2 x tp 4": {"sizes": RESUMED, "dims": ["dp"], "resumed": "stopped, dp 2 x tp 4"},
    "dp 4 x tp 2, from dp 2 x cp 2 x pp 2": {
        "sizes": RESUMED,
        "dims": ["dp"],
        "resumed": "stopped, dp 2 x cp 2 x pp 2",
    },
    "a slice": {"sizes": DP_CP_PP, "dims": ["dp"], "part": ["dp"]},
    "a flattened slice": {"sizes": DP_CP_PP, "dims": ["flat"], "part": ["dp", "cp"], "is_flattened": True},
    "six of eight": {"sizes": SIX_OF_EIGHT, "dims": ["dp"]},
    "idle stage": {"sizes": DP_CP_PP, "dims": ["dp"], "only_state": {"pp": 1}},
    "other window": {"sizes": DP_TP, "dims": ["dp"], "windows": ["4KiB"] * 6 + ["8KiB"] * 2},
    "unknown mesh": {"sizes": DP_TP, "dims": None},
}


@pytest.fixture(scope="module")
def job(packed, tmp_path_factory, warm_python):
    """What one job of 8 ranks served: {case: (one answer a rank)}, and the folder of its data set."""
    url, folder = str(packed(N)), tmp_path_factory.mktemp("meshes")
    answers = run_ranks(warm_python, "tests.support.mesh_jobs:serve", 8, folder, {"url": url, "cases": CASES})
    return {"url": url, **{case: [answer[case] for answer in answers] for case in CASES}}


def groups_of(answers, sizes, dims):
    """The epochs of each group: its ranks must have been served the same batches, step by step."""
    found = defaultdict(list)
    for rank, answer in enumerate(answers):
        found[mesh_rank(FakeMesh(sizes, rank), dims)[0]].append(answer["epochs"])
    assert all(epochs == group[0] for group in found.values() for epochs in group)
    return [found[number][0] for number in range(len(found))]


def records_of(groups):
    """All records of each epoch, sorted."""
    return [sorted(chain.from_iterable(chain.from_iterable(parts))) for parts in zip(*groups, strict=True)]


@pytest.mark.parametrize(
    ("case", "n_groups"), [("dp 2 x tp 4", 2), ("dp 2 x cp 2 x pp 2", 2), ("tp 8", 1), ("a slice", 2)]
)
def test_a_group_is_served_the_same_batches_and_all_groups_each_record_once(job, case, n_groups):
    groups = groups_of(job[case], CASES[case]["sizes"], CASES[case]["dims"])
    assert len(groups) == n_groups
    for records in records_of(groups):
        assert records == list(range(N))
    assert len({str(epoch) for epoch in groups[0]}) == len(groups[0])  # epochs differ


def test_a_flattened_slice_splits_over_all_of_its_dimensions(job):
    groups = groups_of(job["a flattened slice"], DP_CP_PP, ["dp", "cp"])
    assert len(groups) == 4
    assert records_of(groups) == [list(range(N))]


def test_ranks_outside_of_the_mesh_are_not_waited_for(job):
    answers = job["six of eight"]
    assert answers[6:] == [{}, {}]
    assert records_of(groups_of(answers[:6], SIX_OF_EIGHT, ["dp"])) == [list(range(N))]
    assert [answer["state"] for answer in answers[:6]] == [answers[0]["state"]] * 6
    slowest = {answer["slowest"] for answer in answers[:6]}  # the same on all ranks of the mesh
    assert len(slowest) == 1
    assert slowest <= set(range(6))


@pytest.mark.parametrize("before", ["dp 2 x tp 4", "dp 2 x cp 2 x pp 2"])
def test_a_run_continues_as_dp_4_x_tp_2_with_each_record_once(job, before):
    first = groups_of(job[f"stopped, {before}"], CASES[before]["sizes"], ["dp"])
    rest = groups_of(job[f"dp 4 x tp 2, from {before}"], RESUMED, ["dp"])
    assert (len(first), len(rest)) == (2, 4)
    assert records_of(first + rest) == [list(range(N))]
    # Step by step they are the batches of one process that continues from the same state.
    with closing(tc.Dataset(job["url"])) as dataset:
        alone = tc.DataLoader(dataset, batch_size=20, shuffle=True)
        alone.load_state_dict(job[f"stopped, {before}"][0]["state"])
        batches = [sorted(batch["id"].tolist()) for batch in alone]
    steps = list(zip(*(epochs[0] for epochs in rest), strict=True))
    assert [sorted(chain.from_iterable(step)) for step in steps] == batches


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("six of eight", "other window", "idle stage")])
def test_all_ranks_have_the_same_state(job, case):
    states = [answer["state"] for answer in job[case]]
    assert states == [states[0]] * 8


def test_a_stage_that_needs_no_batches_takes_part_by_asking_for_the_state(job):
    answers = job["idle stage"]
    reading, idle = [answers[rank] for rank in (0, 2, 4, 6)], [answers[rank] for rank in (1, 3, 5, 7)]
    assert [answer["epochs"] for answer in idle] == [[]] * 4
    assert reading[0] == reading[1]
    assert records_of([reading[0]["epochs"], reading[2]["epochs"]]) == [list(range(N))]
    assert {answer["state"]["seed"] for answer in answers} == {reading[0]["state"]["seed"]}


def test_a_different_option_in_another_part_of_the_mesh_is_an_error_on_all_ranks(job):
    errors = [answer["error"] for answer in job["other window"]]
    assert errors == [errors[0]] * 8
    assert "window_bytes=8192 on rank 6 differs from rank 0's 4096" in errors[0]


def test_ranks_that_do_not_know_of_their_mesh_warn(job):
    for case, answers in job.items():
        if case == "url":
            continue
        for answer in answers:
            warned = answer.get("warned", [])
            assert len(warned) == (case == "unknown mesh"), warned
            assert all("'tp'" in message and "mesh=mesh, dims=" in message for message in warned)


def test_a_group_on_one_machine_fetches_its_data_once_through_the_cache(packed, tmp_path, warm_python):
    folder = packed(1003)
    objects = {
        f"data/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    with HttpFaultServer(objects) as server:
        arguments = {"url": f"{server.url}/data", "cache": str(tmp_path / "cache")}
        answers = run_ranks(warm_python, "tests.support.mesh_jobs:read_through_cache", 4, tmp_path / "job", arguments)
        log = [seen for seen in server.log if "/shards/" in seen.path]
    served, repeats = zip(*answers, strict=True)
    assert served == (served[0],) * 4
    assert sorted(served[0]) == list(range(1003))
    with closing(tc.Dataset(folder)) as dataset:
        table = dataset._source.leaves[0].table
        data_bytes = {f"/data/{table.info(n).name}": table.info(n).footer_offset for n in range(len(table))}
    n_again = 0
    for path, n_bytes in data_bytes.items():
        requested = np.zeros(n_bytes, np.int64)  # how often each byte, of those before the footer
        for seen in log:
            if seen.path == path:
                start, stop = (seen.range or "bytes=0-").removeprefix("bytes=").split("-")
                wanted = slice(int(start), int(stop or n_bytes) + 1)
                n_again += bool(requested[wanted].any())
                requested[wanted] += 1
        assert requested.all()
    assert n_again <= sum(repeats)  # on a loaded machine a request may be late, and is then sent again


def test_the_loader_says_which_share_it_serves(job):
    assert [answer["repr"].rsplit(", ", 1)[1] for answer in job["dp 2 x tp 4"]] == (
        ["rank 0 of 2 (from mesh))"] * 4 + ["rank 1 of 2 (from mesh))"] * 4
    )
