"""Benchmarks run: their smoke tests end well and write their rows, and what is served wrong is found out."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "default"}


def run_quick(command: list[str], folder: Path) -> tuple[str, list[dict]]:
    """What a benchmark prints, and its rows."""
    done = subprocess.run(
        [sys.executable, *command, "--quick", "--folder", str(folder)],
        check=False,
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in (folder / "peers.jsonl").read_text().splitlines()]


def loads(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["benchmark"] == "load"]


def test_the_loaders_are_compared_record_by_record(tmp_path: Path) -> None:
    text, rows = run_quick(["bench_loader.py", "--workload", "tokens"], tmp_path)
    assert [row["peer"] for row in loads(rows)] == ["tiercache", "torch_map", "c_floor"]
    assert "x floor" in text
    for row in loads(rows):
        assert row["workload"]["name"] == "tokens"
        assert row["samples_per_s.every"]["min"] > 0
        assert row["neighbour_distance"]["median"] > 0.5
        assert {"cores", "kernel", "processor", "versions"} <= set(row)


@pytest.mark.parametrize(
    ("workload", "only"),
    [("rows", ["numpy_memmap"]), ("bytes", ["c_floor"]), ("images", ["torch_map"])],
)
def test_the_comparison_has_a_row_for_each_way_of_each_contender(
    workload: str, only: list[str], tmp_path: Path
) -> None:
    _, rows = run_quick(["-m", "peers", "--workload", workload, "--shuffle", "none", "--only", *only], tmp_path)
    forms = [""] if workload == "images" else ["list", "buffer"]
    assert [(row["peer"], row["form"]) for row in loads(rows)] == [(peer, form) for peer in only for form in forms]
    for row in loads(rows):
        assert row.get("missing", "").startswith("not yet") or row["rank_correlation"]["median"] == 1


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports modules of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_what_cannot_be_installed_is_named_with_its_reason(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    peer = bench("peers.catalogue").Peer(title="one", requirements=("numpy",), system=("no-such-module",))
    environments = bench("peers.environments")
    with pytest.raises(environments.NotInstalledError, match="needs"):
        environments.interpreter("one", peer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_contender_that_fails_is_a_row_with_its_reason(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    compare, catalogue, workloads = bench("peers.compare"), bench("peers.catalogue"), bench("workloads")
    tiny = replace(workloads.TENSORS, n_records=8)
    failing = catalogue.Peer(title="no such adapter", tuned="never", shuffles=("none",))
    plan = compare.Plan(
        folder=tmp_path,
        environments=tmp_path / "envs",
        peers=("no_such_adapter",),
        shuffles=("none", "full"),
        workers=(0,),
        repetitions=1,
        min_s=0.0,
        timeout_s=60.0,
        reuse=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalogue.PEERS, "no_such_adapter", failing)
        rows = compare.compare(tiny, plan)
    assert [row["benchmark"] for row in rows] == ["pack", "load"]
    assert all("ModuleNotFoundError" in row["missing"] for row in rows)
    text = bench("peers.report").markdown([{**row, **bench("rows").machine()} for row in rows])
    assert "no such adapter (shuffle none): ModuleNotFoundError" in text


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


def test_right_batches_pass_both_checks_in_either_form(checked: tuple[Any, list[dict[str, Any]]]) -> None:
    consumer, batches = checked
    buffers = [
        {**b, "text": (np.frombuffer("".join(b["text"]).encode(), np.uint8), np.arange(0, 33 * 60, 60))}
        for b in batches
    ]
    consumer.check_records(batches)
    consumer.check_records(buffers)
    consumer.reset()
    consumer.read(batches)
    consumer.read(buffers[::-1])
    consumer.check_sums(2)


def test_wrong_batches_are_refused(checked: tuple[Any, list[dict[str, Any]]]) -> None:
    consumer, (one, two) = checked
    for batches in ([one], [one, two, two], [one, changed(two)], [one, respelt(two)], [one, swapped(two)]):
        with pytest.raises(ValueError, match=r"records did not come|contents of '.*' differ"):
            consumer.check_records(batches)
    for batches in ([one], [one, one], [one, changed(two)], [one, respelt(two)]):
        consumer.reset()
        consumer.read(batches)
        with pytest.raises(ValueError, match=r"records did not come|sum up to"):
            consumer.check_sums(1)


def test_the_quality_of_a_shuffle_is_told_from_the_order(bench: Callable[[str], ModuleType]) -> None:
    quality, n = bench("consumer").shuffle_quality, 4096
    assert quality(np.arange(n)) == {"rank_correlation": 1.0, "neighbour_distance": pytest.approx(0, abs=0.001)}
    # Runs of neighbours, themselves well mixed: the rank correlation alone would not tell.
    rng = np.random.default_rng(1)
    runs = (rng.permutation(n // 32)[:, None] * 32 + np.arange(32)).ravel()
    assert abs(quality(runs)["rank_correlation"]) < 0.3
    assert quality(runs)["neighbour_distance"] < 0.1
    assert quality(rng.permutation(n))["neighbour_distance"] == pytest.approx(1, abs=0.05)
