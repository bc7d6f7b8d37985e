"""The benchmark of packed sequences runs, and its states resume."""

import json
from pathlib import Path

import pytest
from tests.support.warm_python import WarmPython

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.stress
def test_the_benchmark_of_packing_has_rows_of_each_way_and_every_step_resumes(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    done = warm_python.run(["bench_packing.py", "--quick", "--folder", str(tmp_path)], cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    *ways, resume = [json.loads(line) for line in (tmp_path / "packing.jsonl").read_text().splitlines()]
    assert resume["right"] == resume["steps"] > 20
    assert {"stored rows, tokens", "packed, tokens", "plain Python packer"} <= {way["case"] for way in ways}
    fill = {way["case"]: way["fill_ratio"] for way in ways}
    assert fill["packed, all columns, concatenate"] > 0.99
    assert fill["packed, all columns, separate"] < fill["packed, all columns, best_fit"] <= 1
