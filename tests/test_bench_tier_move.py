"""The benchmark of moves runs, and writes a row a case."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.stress
@pytest.mark.s3
def test_each_way_has_a_row_with_its_share_of_a_plain_copy(tmp_path, warm_python):
    command = ["bench_tier_move.py", "--quick", "--only", "folder-s3", "--folder", str(tmp_path)]
    done = warm_python.run(command, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "tier_move.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == [f"folder-s3, {size}" for size in ("64 MiB", "8 MiB", "64 KiB")]
    assert all(row["share"] > 0 and row["n_bytes"] > 0 for row in rows)
