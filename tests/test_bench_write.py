"""The benchmark of writing runs, and has a row for each way of each workload."""

import json
from pathlib import Path

from tests.support.warm_python import WarmPython

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_each_way_of_writing_has_a_row_beside_the_disks(tmp_path: Path, warm_python: WarmPython) -> None:
    done = warm_python.run(["bench_write.py", "--quick", "--folder", str(tmp_path)], cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "write.jsonl").read_text().splitlines()]
    for workload in ("tokens", "bytes", "tensors", "rows"):
        of_it = [row for row in rows if row["workload"]["name"] == workload]
        assert {"disk: write, fsync", "write_batch", "write"} <= {row["way"] for row in of_it}
        assert all(row["of_disk"]["median"] > 0 and row["n_bytes"] > 0 for row in of_it)
    assert {path.name for path in tmp_path.iterdir()} == {"write.jsonl"}
