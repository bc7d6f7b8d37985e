"""The benchmark of `tier plan` as a whole runs small, ends well, and measures what it says."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def rows(tmp_path_factory, warm_python) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("bench")
    done = warm_python.run(
        ["bench_tier_whole.py", "--quick", "--only", "named", "--folder", str(folder)], cwd=BENCHMARKS
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (folder / "tier_whole.jsonl").read_text().splitlines()]
    return {row["case"]: row for row in found}


def test_a_plan_with_most_of_the_objects_in_it_is_written(rows):
    for row in rows.values():
        assert row["moves"] > row["objects"] / 2
        assert row["plan_bytes"] > 200 * row["moves"]


def test_listing_time_and_the_rest_are_separate(rows):
    for row in rows.values():
        assert row["seconds"]["median"] > row["listing_s"]["median"] > 0
        assert row["rest_s"]["median"] == pytest.approx(row["seconds"]["median"] - row["listing_s"]["median"])
