"""The benchmark of opening runs small, ends well, and measures what it says."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def rows(tmp_path_factory, warm_python) -> list[dict]:
    folder = tmp_path_factory.mktemp("bench")
    done = warm_python.run(["bench_open.py", "--quick", "--only", "warm", "--folder", str(folder)], cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "open.jsonl").read_text().splitlines()]


def test_the_case_is_a_row_of_the_wanted_number_of_shards(rows):
    assert [(row["case"], row["shards"], row["records"]) for row in rows] == [("warm", 5000, 50_000)]


def test_time_and_memory_are_measured(rows):
    assert rows[0]["seconds"]["median"] > 0
    assert rows[0]["segment_bytes"] > 5000 * 100
