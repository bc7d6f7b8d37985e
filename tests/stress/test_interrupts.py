"""Ctrl-C between any two lines: verbs say what is true, caches stay right, a loop goes on where it was."""

import json

import pytest
from tests.support.warm_python import run_warm


def rounds(folder, n, *arguments, timeout_s=170):
    done = run_warm(
        ["-m", "tests.stress.interrupt_rounds", str(folder), "--rounds", str(n), *arguments], timeout_s=timeout_s
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    if report["problems"]:  # all of them are shown: an assertion would show the first words
        pytest.fail("\n".join(report["problems"]), pytrace=False)
    assert report["n_struck"] == n
    return report


@pytest.mark.parametrize("only", ["verb pack", "cache come_back"])
def test_ctrl_c_at_any_line_leaves_nothing_wrong(tmp_path, only):
    rounds(tmp_path, 3, "--only", only)


@pytest.mark.stress
@pytest.mark.timeout(5400)
def test_ctrl_c_at_many_lines_of_everything_spoils_nothing(tmp_path, capsys):
    report = rounds(tmp_path, 2000, timeout_s=5000)
    with capsys.disabled():
        print(f"\ninterrupts: {report['struck']} in {report['seconds']:.0f} s, {report['swallowed']} swallowed")
