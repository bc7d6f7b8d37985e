"""Benchmarks run: their smoke tests end well and write their rows, and what is served wrong is found out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tests.flow.benchmarks.conftest import BENCHMARKS
from tests.support.warm_python import WarmPython


def test_the_comparison_has_a_row_for_each_layout_of_a_contender(
    bench: Callable[[str], ModuleType], tmp_path: Path, warm_python: WarmPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, workloads = bench("peers.compare"), bench("workloads")

    def run_in_a_fork(_runner: Any, _python: Path, job: Any) -> dict[str, Any]:
        done = warm_python.run(["-m", "peers.child", json.dumps(job.as_json())], cwd=BENCHMARKS)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    monkeypatch.setattr(bench("peers.runner").Runner, "run", run_in_a_fork)
    plan = replace(small_plan(compare, tmp_path, "tiercache"), shuffles=("full",))
    tiny = replace(workloads.ROWS, batch_size=64, n_records=2048)
    packed, *rows = compare.compare(tiny, plan, compare.Tasks(plan))
    assert packed["records_per_s"] > 0
    assert [row["form"] for row in rows] == ["list", "buffer"]
    for row in rows:
        assert row["samples_per_s.every"]["min"] > 0
        assert row["checked_share"]["median"] == 1
        assert row["neighbour_distance"]["median"] > 0.5
    text = bench("peers.report").markdown([{**row, **bench("rows").machine()} for row in rows])
    assert "Shuffled, varied columns as list:" in text


def small_plan(compare: ModuleType, folder: Path, *peers: str) -> Any:
    """One repetition of contenders that need no environment, shuffled or not, every record checked."""
    return compare.Plan(
        folder=folder,
        environments=folder / "envs",
        peers=peers,
        shuffles=("none", "full"),
        workers=(0,),
        repetitions=1,
        min_s=0.0,
        check_s=60.0,
        timeout_s=60.0,
        reuse=False,
        resume=False,
    )


@pytest.fixture
def checked(bench: Callable[[str], ModuleType], tmp_path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """A consumer of 64 small records with text, and the two batches that hold them."""
    workloads = bench("workloads")
    fields = (workloads.array_field("values", "uint8", (4, 8)), workloads.Field("text", "text", "uint8", (), 60))
    source = bench("generate").generate(workloads.Workload("tiny", fields, 32, 64), tmp_path)
    batches = []
    for at in (0, 32):
        batch = source.batch(at, at + 32)
        arrays = {name: torch.from_numpy(np.array(batch[name])) for name in ("values", "label")}
        batches.append({**arrays, "text": batch["text"]})
    return bench("consumer").Consumer(source), batches


def changed(batch: dict[str, Any]) -> dict[str, Any]:
    values = batch["values"].clone()
    values[5, 2, 3] += 1
    return {**batch, "values": values}


def respelt(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "text": [batch["text"][0].upper(), *batch["text"][1:]]}


def swapped(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "label": batch["label"].flip(0)}


def test_the_floor_serves_each_row_and_can_be_closed_in_mid_epoch(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    floor, n = bench("floor"), 4096
    values = np.arange(n * 8, dtype=np.int64).reshape(n, 8)
    data, order = values.view(np.uint8).reshape(-1), np.random.default_rng(3).permutation(n)
    columns = {"values": values, "varied": floor.Varied(data, np.arange(0, n * 64 + 1, 64))}
    made = floor.Floor(columns, 16, 2, tmp_path)
    served = [(b["values"].clone(), b["varied"][0].clone(), b["varied"][1].clone()) for b in made.epoch(order)]
    assert torch.equal(torch.cat([one for one, _, _ in served]), torch.from_numpy(values[order]))
    assert torch.equal(
        torch.cat([two for _, two, _ in served]).view(torch.int64), torch.cat([a for a, _, _ in served]).ravel()
    )
    assert all(offsets.tolist() == list(range(0, 17 * 64, 64)) for _, _, offsets in served)
    cut = made.epoch(order)
    next(cut)
    made.close()
    cut.close()
    made.close()


def test_wrong_batches_are_refused(checked: tuple[Any, list[dict[str, Any]]]) -> None:
    consumer, (one, two) = checked
    for batches in ([one], [one, two, two], [one, changed(two)], [one, respelt(two)], [one, swapped(two)]):
        with pytest.raises(ValueError, match=r"records were not served|contents of '.*' differ"):
            consumer.check_records(batches)
    for batches in ([one], [one, one], [one, changed(two)], [one, respelt(two)]):
        consumer.reset()
        consumer.read(batches)
        with pytest.raises(ValueError, match=r"records were not served|the sum of the"):
            consumer.check_sums(1)


def test_transforms_are_compared_with_torchs_loader(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench("bench_transforms")
    monkeypatch.setattr(module, "N_TOKENS", 40)
    monkeypatch.setattr(module, "N_IMAGES", 10)
    for path, transform in zip(module.pack(tmp_path), module.TRANSFORMS, strict=True):
        figures = module.compare(path, transform, 8, 0, repetitions=1)
        assert all(figure > 0 for figure in figures)
