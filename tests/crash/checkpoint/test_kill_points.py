"""SIGKILL at every point of a save and of retention: visible checkpoints read back bit by bit, and little is left."""

import json

import pytest
from tests.stress.checkpoint_rounds import points_of_checkpoints
from tests.stress.retention_rounds import points_of_retention
from tests.support.warm_python import run_warm

N_ROUNDS = 2_000  # of `make stress`


def rounds(folder, n_rounds, seed, *, n_retention=0, timeout_s=170):
    """The reports of that many struck rounds: of retention, if there are any, and of saves."""
    arguments = ["--rounds", str(n_rounds), "--seed", str(seed), "--retention", str(n_retention)]
    done = run_warm(["-m", "tests.stress.checkpoint_rounds", str(folder), *arguments], timeout_s=timeout_s)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report, n_rounds, points=points_of_checkpoints):
    assert report["problems"] == []
    assert report["never_reached"] == [], "no job of the rounds gets there"
    assert report["n_struck"] == n_rounds
    assert report["struck"].keys() == points().keys()


def test_a_process_killed_at_any_point_of_a_save_or_of_retention_leaves_whole_checkpoints_and_nothing_else(tmp_path):
    n_saves, n_retention = len(points_of_checkpoints()), len(points_of_retention())
    retention, saves = rounds(tmp_path, n_saves, seed=3, n_retention=n_retention)
    check(saves, n_saves)
    check(retention, n_retention, points_of_retention)


@pytest.mark.stress
@pytest.mark.timeout(7200)
def test_two_thousand_kills_lose_no_checkpoint(tmp_path, capsys):
    (report,) = rounds(tmp_path, N_ROUNDS, seed=300, timeout_s=7000)
    with capsys.disabled():
        print(
            f"\ncheckpoints: {report['n_struck']} rounds struck {len(report['struck'])} points, each at least "
            f"{min(report['struck'].values(), default=0)} times; {report['missed']} missed; "
            f"{report['rounds_per_s']} rounds a second; {len(report['problems'])} problems"
        )
    check(report, N_ROUNDS)
