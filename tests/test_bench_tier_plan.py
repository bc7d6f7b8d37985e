"""The benchmark of planning runs small, ends well, and measures what it says."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def rows(tmp_path_factory, warm_python) -> list[dict]:
    folder = tmp_path_factory.mktemp("bench")
    done = warm_python.run(
        ["bench_tier_plan.py", "--quick", "--only", "mixed", "--folder", str(folder)], cwd=BENCHMARKS
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "tier_plan.jsonl").read_text().splitlines()]


def test_each_case_is_a_row(rows):
    assert [row["case"] for row in rows] == ["mixed"]


def test_the_mixed_case_has_moves_and_refusals(rows):
    assert rows[0]["moves"] > 1000
    assert rows[0]["refusals"] > 10


def test_rows_have_peak_memory_and_time(rows):
    for row in rows:
        assert row["peak_bytes"] > row["made_bytes"] >= 0
        assert row["seconds"]["median"] > 0
