"""The benchmark of cold epochs runs, and has a row for each way beside the plain clients."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_each_way_to_read_a_cold_epoch_has_a_row_with_its_ratios(tmp_path, warm_python):
    done = warm_python.run(["bench_cold.py", "--quick", "--folder", str(tmp_path)], cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "cold.jsonl").read_text().splitlines()]
    ways = ("obstore", "socket", "in order", "shuffled")
    assert [row["case"] for row in rows] == [f"{way}, to {where}" for where in ("disk", "memory") for way in ways]
    for row in rows:
        assert row["n_bytes"] >= 8 << 20
        assert all(row[name]["median"] > 0 for name in ("bytes_per_s", "of_fastest_plain", "cpu_of_least_plain"))
    for where in ("disk", "memory"):
        plain = [
            row["of_fastest_plain"]["median"]
            for row in rows
            if row["case"] in (f"obstore, to {where}", f"socket, to {where}")
        ]
        assert max(plain) == 1.0
    assert not (tmp_path / "target").exists()
