"""SIGKILL at every point of a save: the newest committed checkpoint reads back bit by bit, and little is left over."""

import json

import pytest
from tests.stress.checkpoint_rounds import points_of_checkpoints
from tests.testing.warm_process import run_warm

N_ROUNDS = 2_000  # of `make stress`


def rounds(folder, n_rounds, seed, timeout_s=170):
    """The report of that many struck rounds."""
    arguments = ["--rounds", str(n_rounds), "--seed", str(seed)]
    done = run_warm(["-m", "tests.stress.checkpoint_rounds", str(folder), *arguments], timeout_s=timeout_s)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def check(report, n_rounds):
    assert report["problems"] == []
    assert report["never_reached"] == [], "no job of tests/stress/checkpoint_rounds.py gets there"
    assert report["n_struck"] == n_rounds
    assert report["struck"].keys() == points_of_checkpoints().keys()


def test_a_process_killed_at_any_point_of_a_save_loses_no_checkpoint(tmp_path):
    n_rounds = len(points_of_checkpoints())
    check(rounds(tmp_path, n_rounds, seed=3), n_rounds)


@pytest.mark.stress
@pytest.mark.timeout(7200)
def test_two_thousand_kills_lose_no_checkpoint(tmp_path, capsys):
    report = rounds(tmp_path, N_ROUNDS, seed=300, timeout_s=7000)
    with capsys.disabled():
        print(
            f"\ncheckpoints: {report['n_struck']} rounds struck {len(report['struck'])} points, each at least "
            f"{min(report['struck'].values(), default=0)} times; {report['missed']} missed; "
            f"{report['rounds_per_s']} rounds a second; {len(report['problems'])} problems"
        )
    check(report, N_ROUNDS)
