"""Jobs of 2, 3 and 4 ranks over torch.distributed: what all of them together are served, by content."""

from collections import Counter
from itertools import chain

import pytest
from tests.support.ranks import run_ranks, together
from tests.support.records import append_records

import tiercache as tc

SMALL = {"shuffle_window_bytes": "4KiB", "shuffle_group_bytes": "16KiB"}
pytestmark = pytest.mark.timeout(300)

N = 1013  # a prime: no batch size and no number of ranks divides it
# Two and four show little that three do not.
WORLDS = [3, *(pytest.param(n, marks=pytest.mark.stress) for n in (2, 4))]


@pytest.fixture(scope="module", params=WORLDS, ids="{} ranks".format)
def job(request, packed, tmp_path_factory, warm_python):
    """Everything that one job of so many ranks served: {case: (one answer a rank)}."""
    world, url = request.param, packed(N)
    first = tc.Dataset(url).version
    with tc.Writer(url, mode="append") as writer:
        append_records(writer, N, 37)
    rank_versions = [first] + [None] * (world - 1)
    bound = {"url": str(url), "loader": {"batch_size": 7}, "options": {**SMALL}}
    other = {"rank_options": [{}] * (world - 1)}
    cases = {
        "whole": {**bound, "rank_versions": rank_versions, "n_epochs": 2},
        "dropping": {**bound, "loader": {"batch_size": 7, "drop_last": True}, "n_epochs": 2},
        "own seeds": {**bound, "rank_options": [{"seed": rank} for rank in range(world)]},
        "other window": {**bound, "rank_options": [*other["rank_options"], {"shuffle_window_bytes": "8KiB"}]},
        "other batch": {**bound, "rank_options": [*other["rank_options"], {"loader": {"batch_size": 8}}]},
        "seeded": {**bound, "n_epochs": 2, "options": {**SMALL, "seed": 6}},
        "numpy": {**bound, "n_epochs": 2, "options": {**SMALL, "seed": 6}, "by_numpy": True},
        "numpy, no seed": {**bound, "n_epochs": 2, "rank_versions": rank_versions, "by_numpy": True},
        "stopped": {**bound, "stop_after": 9, "options": {**SMALL, "seed": 5}},
        **{f"{n} records": {**bound, "url": str(packed(n)), "n_epochs": 2} for n in (0, 1, 2, 5)},
    }
    cases["0 records"]["loader"] = {"batch_size": 7, "shuffle": False}  # torch's RandomSampler refuses no records
    folder = tmp_path_factory.mktemp("job")
    answers = run_ranks(warm_python, "tests.support.loader_jobs:serve", world, folder, {"cases": [*cases.values()]})
    return {"url": url, **dict(zip(cases, zip(*answers, strict=True), strict=True))}


def epochs_of(answers):
    """Of each epoch, the batches of each rank."""
    return list(zip(*(answer["epochs"] for answer in answers), strict=True))


def records_of(parts):
    return Counter(chain.from_iterable(chain.from_iterable(parts)))


def version_of(answer):
    ((_, version, *_),) = answer["state"]["parts"]
    return version


def test_all_ranks_together_serve_each_record_once(job):
    epochs = epochs_of(job["whole"])
    assert len(epochs) == 2
    for parts in epochs:
        served = records_of(parts)
        assert sorted(served) == list(range(N))
        assert served.total() == N + sum(answer["padded"] for answer in job["whole"]) / 2  # counted over both epochs


def test_numpy_batches_are_those_of_the_loader_on_each_rank(job):
    for torchs, numpys in zip(job["seeded"], job["numpy"], strict=True):
        assert numpys["epochs"] == torchs["epochs"]
        assert numpys["state"] == torchs["state"]
        assert "(from torch.distributed)" in numpys["repr"]


def test_ranks_of_numpy_batches_agree_on_a_seed_and_a_version(job):
    for parts in epochs_of(job["numpy, no seed"]):
        assert sorted(records_of(parts)) == list(range(N))
    assert all(answer["state"] == job["numpy, no seed"][0]["state"] for answer in job["numpy, no seed"])


def test_two_epochs_serve_in_different_orders(job):
    first, second = epochs_of(job["whole"])
    assert together(first) != together(second)


def test_dropping_the_last_batch_serves_whole_global_batches_of_different_records(job):
    world = len(job["dropping"])
    for parts in epochs_of(job["dropping"]):
        served = records_of(parts)
        assert set(served.values()) == {1}
        assert served.total() == (N + 37) // (7 * world) * 7 * world


@pytest.mark.parametrize("case", ["whole", "dropping", "own seeds"])
def test_every_rank_has_as_many_batches_as_it_says(job, case):
    lengths = {answer["length"] for answer in job[case]}
    counts = {len(batches) for answer in job[case] for batches in answer["epochs"]}
    assert lengths == counts
    assert len(counts) == 1


def test_every_rank_learns_the_exposed_wait_of_the_slowest(job):
    mine = [answer["exposed"] for answer in job["whole"]]
    slowest = max(range(len(mine)), key=lambda rank: mine[rank]["total"])
    expected = {"rank": slowest, **{key: mine[slowest][key] for key in ("total", "mean", "p99")}}
    assert [exposed["slowest_rank"] for exposed in mine] == [expected] * len(mine)


def test_ranks_that_open_after_an_append_read_the_version_of_rank_0(job):
    assert {version_of(answer) for answer in job["whole"]} == {1}
    assert {version_of(answer) for answer in job["dropping"]} == {2}


@pytest.mark.parametrize("case", ["whole", "dropping", "own seeds", "stopped", "5 records"])
def test_the_state_is_the_same_on_every_rank(job, case):
    states = [answer["state"] for answer in job[case]]
    assert states == [states[0]] * len(states)


def test_the_seed_of_rank_0_holds_for_all(job):
    assert job["own seeds"][0]["state"]["seed"] == 0
    (parts,) = epochs_of(job["own seeds"])
    assert sorted(records_of(parts)) == list(range(N + 37))


def test_a_different_window_on_one_rank_is_an_error_on_all(job):
    world = len(job["other window"])
    assert all("window_bytes" in answer["error"] and "8192" in answer["error"] for answer in job["other window"])
    assert all(f"rank {world - 1}" in answer["error"] for answer in job["other window"])


def test_a_different_batch_size_on_one_rank_is_an_error_on_all(job):
    assert all("batch_size" in answer["error"] for answer in job["other batch"])


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_tiny_data_sets_give_every_rank_as_many_batches(job, n):
    answers = job[f"{n} records"]
    for parts in epochs_of(answers):
        served = records_of(parts)
        assert {len(batches) for batches in parts} == {min(n, 1)}
        assert sorted(served) == list(range(n))
    world = len(answers)
    assert sum(answer["padded"] for answer in answers) == 2 * (max(0, world - n) if n else 0)


def test_repr_names_the_rank(job):
    world = len(job["whole"])
    for rank, answer in enumerate(job["whole"]):
        assert f"rank {rank} of {world} (from torch.distributed)" in answer["repr"]


def test_any_other_number_of_ranks_serves_the_rest(job):
    (stopped,) = epochs_of(job["stopped"])
    served = records_of(stopped)
    assert set(served.values()) == {1}
    dataset = tc.Dataset(job["url"])
    for world in (1, 2, 4):
        rest = Counter()
        for rank in range(world):
            options = tc.LoaderOptions(rank=rank, world_size=world)
            loader = tc.DataLoader(dataset, batch_size=12, shuffle=True, options=options)
            loader.load_state_dict(job["stopped"][0]["state"])
            rest.update(chain.from_iterable(batch["id"].tolist() for batch in loader))
            assert loader.stats()["padded"] == 0
        assert set(rest.values()) == {1}
        assert served.keys() ^ rest.keys() == set(range(N + 37))
    dataset.close()


@pytest.fixture(scope="module")
def ways(packed, tmp_path_factory, warm_python):
    """What two ranks are served with functions of the user, on either path: {way: (one answer a rank)}."""
    arguments = {"url": str(packed(N)), "batch_size": 60}
    answers = run_ranks(
        warm_python, "tests.support.loader_jobs:serve_ways", 2, tmp_path_factory.mktemp("ways"), arguments
    )
    return {name: [answer[name] for answer in answers] for name in answers[0]}


@pytest.mark.parametrize("name", ["collate_fn", "transform", "subclass", "batch_size=None"])
def test_every_path_splits_an_epoch_over_the_ranks(ways, name):
    answers = ways[name]
    assert ["rank 0 of 2" in answers[0]["repr"], "rank 1 of 2" in answers[1]["repr"]] == [True, True]
    assert answers[0]["length"] == answers[1]["length"] == len(answers[0]["epochs"][0]) == len(answers[1]["epochs"][0])
    for parts in epochs_of(answers):
        served = records_of(parts)
        assert sorted(served) == list(range(N))
        assert served.total() - N <= 1  # an odd record leaves one of two ranks to be padded, or none
    natively = ways["native"]
    if name != "batch_size=None":  # whose global batches are others
        assert [answer["length"] for answer in answers] == [answer["length"] for answer in natively]
    if name in ("collate_fn", "transform"):  # on torch's path, torchdata draws a number before the order's seed
        # Rank 0 was seeded alike for each, so the orders are one.
        assert [answer["epochs"] for answer in answers] == [answer["epochs"] for answer in natively]
        assert answers[0]["state"] == answers[1]["state"] == natively[0]["state"]
    assert epochs_of(answers)[0] != epochs_of(answers)[1]
