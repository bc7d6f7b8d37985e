"""The benchmark of docs/guide/frameworks.md runs."""

import json

from tests.support import ROOT

BENCHMARKS = ROOT / "benchmarks"


def test_every_way_is_measured_beside_torchs_own(tmp_path, warm_python):
    done = warm_python.run(["bench_frameworks.py", "--quick", "--folder", str(tmp_path)], cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "frameworks.jsonl").read_text().splitlines()]
    assert [row["workload"]["name"] for row in rows] == ["tokens", "rows"]
    assert all(len(row["records_per_s"]) == 7 for row in rows)
