"""The benchmark of checkpoints runs, and writes a row for each way, with its ratios to a plain copy and the disk."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.stress
@pytest.mark.s3
def test_each_way_has_a_row_with_its_ratios(tmp_path, warm_python):
    command = ["bench_checkpoint.py", "--quick", "--folder", str(tmp_path)]
    done = warm_python.run(command, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in map(json.loads, (tmp_path / "checkpoint.jsonl").read_text().splitlines())}
    assert rows.keys() >= {"copy", "disk", "save", "save-s3", "torch", "dcp", "dcp, tuned"}
    for name in ("save", "torch", "dcp"):
        assert min(rows[name][ratio]["median"] for ratio in ("blocked_of_copy", "disk_share", "load_share")) > 0
    assert rows["save-s3"]["store_s"]["median"] >= rows["save-s3"]["disk_s"]["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.jsonl"], "the data is deleted"
