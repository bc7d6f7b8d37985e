"""SIGKILL at every named point of the source: the next process needs no hand, and nothing that was promised is lost.

Points of tiers are struck by tests/crash/tier/test_move_crashes.py, those of checkpoints by
tests/crash/checkpoint/test_kill_points.py.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.stress.kill_rounds import points_here
from tests.support.warm_python import run_warm

N_ROUNDS = 10_000  # of `make stress`
N_PROCESSES = 4


def rounds(folder, n_rounds, seed, *, timeout_s=170):
    """The report of that many struck rounds."""
    arguments = ["--rounds", str(n_rounds), "--seed", str(seed)]
    done = run_warm(["-m", "tests.stress.kill_rounds", str(folder), *arguments], timeout_s=timeout_s)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def check(report, n_rounds):
    assert report["problems"] == []
    assert report["never_reached"] == [], "no job of tests/stress/jobs.py gets there"
    assert sum(report["struck"].values()) == n_rounds
    assert report["struck"].keys() == points_here().keys()


def test_a_process_killed_at_any_point_leaves_a_correct_cache(tmp_path):
    n_rounds = len(points_here())
    report = rounds(tmp_path, n_rounds, seed=5)
    check(report, n_rounds)
    assert min(report["struck"].values()) == 1
    assert report["witnessed"] > 0


@pytest.mark.stress
@pytest.mark.timeout(5400)
def test_ten_thousand_kills_leave_a_correct_cache(tmp_path, capsys):
    n_each = N_ROUNDS // N_PROCESSES

    def one(number):
        return rounds(tmp_path / str(number), n_each, seed=100 + number, timeout_s=5000)

    with ThreadPoolExecutor(N_PROCESSES) as pool:
        reports = list(pool.map(one, range(N_PROCESSES)))
    with capsys.disabled():
        print()
        for report in reports:
            print(
                f"kill points: {report['n_struck']} rounds struck {len(report['struck'])} points, each at least "
                f"{min(report['struck'].values())} times; {report['witnessed']} with a witness; "
                f"{report['missed']} missed; "
                f"{report['rounds_per_s']} rounds a second; {len(report['problems'])} problems"
            )
    for report in reports:
        check(report, n_each)
