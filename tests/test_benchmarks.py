"""Benchmarks run: each one's smoke test, with a few records, ends well and writes its rows."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_quick(name: str, folder: Path, *arguments: str) -> tuple[str, list[dict]]:
    """What a benchmark prints, and its rows."""
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), "--quick", "--folder", str(folder), *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "default"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workload", ["tokens", "tensors"])
def test_the_loaders_are_compared_record_by_record(workload: str, tmp_path: Path) -> None:
    text, rows = run_quick("loader", tmp_path, "--workload", workload)
    assert [row["case"] for row in rows] == ["tiercache", "torch, 0 workers", "C floor"]
    assert "of the C floor" in text
    for row in rows:
        assert row["workload"]["name"] == workload
        assert row["samples_per_s"]["min"] > 0
        assert {"cores", "kernel", "processor", "versions"} <= set(row)


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A consumer of 64 small records, and the two batches that hold them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    workloads = importlib.import_module("workloads")
    tiny = workloads.Workload("tiny", "uint8", (4, 8), 32, 64)
    workloads.generate(tiny, tmp_path)
    values = torch.from_numpy(np.array(tiny.columns(tmp_path)["values"]))
    batches = [{"values": values[at : at + 32], "label": torch.arange(at, at + 32)} for at in (0, 32)]
    return workloads.Consumer(tiny, np.load(tmp_path / "sums.npy")), batches


def changed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values = batch["values"].clone()
    values[5, 2, 3] += 1
    return {**batch, "values": values}


def swapped(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "label": batch["label"].flip(0)}


def test_right_batches_pass_both_checks(checked: tuple[Any, list[dict[str, torch.Tensor]]]) -> None:
    consumer, batches = checked
    consumer.check_records(batches)
    consumer.reset()
    consumer.read(batches)
    consumer.read(batches[::-1])
    consumer.check_sums(2)


def test_wrong_batches_are_refused(checked: tuple[Any, list[dict[str, torch.Tensor]]]) -> None:
    consumer, (one, two) = checked
    for batches in ([one], [one, two, two], [one, changed(two)], [one, swapped(two)]):
        with pytest.raises(ValueError, match=r"records did not come|contents differ"):
            consumer.check_records(batches)
    for batches in ([one], [one, one], [one, changed(two)]):
        consumer.reset()
        consumer.read(batches)
        with pytest.raises(ValueError, match=r"records did not come|sum up to"):
            consumer.check_sums(1)
