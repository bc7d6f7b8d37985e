"""How good the shuffle is, as figures of the order alone: what docs/guide/order.md says of groups and windows."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tests.support import ROOT
from tests.support.warm_python import WarmPython

BENCHMARKS = ROOT / "benchmarks"
N = 28_672  # 640 shards of 45 records
SEEDS = range(6)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("order_quality")


def correlation(quality: ModuleType, *setting: int, **more: int) -> float:
    """The mean of its size over some seeds and epochs."""
    orders = [quality.Setting("", *setting, **more).order(N, seed, epoch=seed) for seed in SEEDS]
    return float(np.mean([abs(quality.rank_correlation(order)) for order in orders]))


def clumping(quality: ModuleType, run: int, *setting: int, **more: int) -> float:
    orders = [quality.Setting("", *setting, **more).order(N, seed, epoch=seed) for seed in SEEDS]
    return float(np.mean([quality.clumping(order, run) for order in orders]))


def test_with_the_defaults_batches_of_a_sorted_set_of_twenty_groups_are_nearly_as_mixed_as_a_full_shuffle(
    quality: ModuleType,
) -> None:
    """Groups of 32 shards and 16 windows, as 4 GiB, 128 MiB and 256 MiB are: a batch of 32 is as good as one of 25."""
    assert correlation(quality, 20, 640, 320) < 0.02
    assert clumping(quality, 32, 20, 640, 320) < 1.4
    assert clumping(quality, N // 20, 20, 640, 320) < 12


@pytest.mark.stress
def test_the_benchmark_of_the_order_has_rows_of_each_stage(tmp_path: Path, warm_python: WarmPython) -> None:
    command = ["bench_order.py", "--quick", "--seeds", "2", "--repetitions", "1", "--folder", str(tmp_path)]
    done = warm_python.run(command, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "order.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"speed", "resume", "state", "quality", "training"}
    assert all(row["bytes"] < 1000 for row in rows if row["stage"] == "state")
    assert {row["case"]: row for row in rows if row["stage"] == "training"}.keys() >= {
        "numpy's shuffle",
        "stored order",
    }
