"""Each benchmark runs small, ends well, and writes a row for each case with figures above zero."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.flow.benchmarks.conftest import BENCHMARKS
from tests.support.warm_python import WarmPython

STRESS, S3 = pytest.mark.stress, pytest.mark.s3
COLD = [f"{way}, to {where}" for where in ("disk", "memory") for way in ("obstore", "socket", "in order", "shuffled")]
LOADERS = ["loader, crop=center", "loader, crop=random"]
# Program, its arguments, its file of rows, and cases that the rows must have.
PROGRAMS = [
    pytest.param("bench_stages", "--only checksum gather assembly overhead first_epoch", "stages", [], id="stages"),
    pytest.param("bench_cold", "", "cold", COLD, id="cold", marks=STRESS),
    pytest.param("bench_tier_plan", "--only mixed", "tier_plan", ["mixed"], id="tier_plan"),
    pytest.param("bench_records", "", "records", ["warm 1", "remote cold"], id="records", marks=STRESS),
    pytest.param("bench_cache", "", "cache", ["through the cache", "by hand, C"], id="cache", marks=STRESS),
    pytest.param("bench_in_place", "", "in_place", ["Parquet, tokens", "WebDataset, images"], id="in_place"),
    pytest.param("bench_disk", "", "disk", [], id="disk", marks=STRESS),
    pytest.param("bench_images", "--threads 2", "images", LOADERS, id="images", marks=STRESS),
    pytest.param("bench_images", "--augmented --threads 2", "augmented", [], id="augmented", marks=STRESS),
    pytest.param("bench_open", "--only warm", "open", ["warm"], id="open", marks=STRESS),
    pytest.param("bench_packing", "", "packing", ["packed, tokens"], id="packing", marks=STRESS),
    pytest.param("bench_tier_whole", "--only named", "tier_whole", ["named"], id="tier_whole", marks=STRESS),
    pytest.param("bench_write", "", "write", [], id="write", marks=STRESS),
    pytest.param("bench_write", "--packers tokens rows", "packers", ["tokens", "rows"], id="packers", marks=STRESS),
    pytest.param(
        "bench_checkpoint", "", "checkpoint", ["copy", "save", "save-s3", "dcp"], id="checkpoint", marks=[STRESS, S3]
    ),
    pytest.param(
        "bench_tier_move",
        "--only folder-s3",
        "tier_move",
        ["folder-s3, 64 MiB", "folder-s3, 64 KiB"],
        id="tier_move",
        marks=[STRESS, S3],
    ),
]


def medians(value: Any) -> Iterator[float]:
    """Yield every figure called "median" anywhere in a row."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "median" and inner is not None:
                yield inner
            else:
                yield from medians(inner)


@pytest.mark.parametrize(("program", "arguments", "rows", "cases"), PROGRAMS)
def test_each_case_has_a_row_with_figures(
    program: str, arguments: str, rows: str, cases: list[str], tmp_path: Path, warm_python: WarmPython
) -> None:
    command = [f"{program}.py", "--quick", "--folder", str(tmp_path), *arguments.split()]
    done = warm_python.run(command, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / f"{rows}.jsonl").read_text().splitlines()]
    assert found
    assert set(cases) <= {row.get("case") for row in found}
    assert all(figure > 0 for row in found if row.get("case") != "each further column" for figure in medians(row))
