"""SIGKILL at every crash point of the mover: nothing is lost, and later runs finish the moves."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.stress.tier_rounds import points_of_tiers
from tests.support.warm_python import run_warm

N_ROUNDS = 2_000  # of `make stress`
N_PROCESSES = 2


def rounds(folder, n_rounds, seed, *more, timeout_s=170):
    """The report of that many struck rounds."""
    arguments = ["--rounds", str(n_rounds), "--seed", str(seed), *more]
    done = run_warm(["-m", "tests.stress.tier_rounds", str(folder), *arguments], timeout_s=timeout_s)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def check(report, n_rounds):
    assert report["problems"] == []
    assert report["never_reached"] == [], "no job of tests/support/tier_jobs.py gets there"
    assert report["n_struck"] == n_rounds
    assert report["struck"].keys() == points_of_tiers().keys()


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_a_mover_that_dies_at_any_point_loses_nothing(tmp_path):
    n_rounds = len(points_of_tiers())
    report = rounds(tmp_path, n_rounds, 7, "--shapes", "local", "one_bucket", "one_warm", timeout_s=570)
    check(report, n_rounds)


@pytest.mark.stress
@pytest.mark.timeout(7200)
def test_two_thousand_deaths_of_movers_lose_nothing(tmp_path, capsys):
    n_each = N_ROUNDS // N_PROCESSES
    with ThreadPoolExecutor(N_PROCESSES) as pool:
        reports = list(
            pool.map(lambda n: rounds(tmp_path / str(n), n_each, 200 + n, timeout_s=7000), range(N_PROCESSES))
        )
    with capsys.disabled():
        print()
        for report in reports:
            print(
                f"tiers: {report['n_struck']} rounds struck {len(report['struck'])} points, each at least "
                f"{min(report['struck'].values())} times; {report['missed']} missed; "
                f"{report['rounds_per_s']} rounds a second; {len(report['problems'])} problems"
            )
    for report in reports:
        check(report, n_each)
