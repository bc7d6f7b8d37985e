"""The benchmark of a disk runs, and writes a row for each number of threads."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_each_number_of_threads_has_a_row_with_all_three_ways(tmp_path, warm_python):
    done = warm_python.run(["bench_disk.py", "--quick", "--folder", str(tmp_path)], cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "disk.jsonl").read_text().splitlines()]
    assert [row["n_threads"] for row in rows] == [1, 2, 4]
    assert all(row[way]["median"] > 0 for row in rows for way in ("write", "read", "both"))
