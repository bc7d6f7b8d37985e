"""The benchmark of batches on a device measures every way; on the fake device here, with few steps."""

from __future__ import annotations

import importlib

import pytest
import torch
from tests.flow.benchmarks.conftest import BENCHMARKS
from tests.support.fake_device import FakeDevice, install


def test_each_way_has_a_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_device")
    monkeypatch.setattr(bench, "SIDE", 16)
    monkeypatch.setattr(bench, "UNCOUNTED_STEPS", 1)
    install(monkeypatch, is_eager=True)
    backend = FakeDevice(torch.device("privateuseone"), is_eager=True)
    plan = bench.Plan("privateuseone", backend, torch.device("cpu"), 3, 4, 1, n_workers=0, is_pinning=False)
    rows = bench.measure(bench.pack(tmp_path, 40), plan, "fake")
    assert [row["case"] for row in rows[:3]] == ["pageable", "pinned", "tiercache"]
    assert [row["case"] for row in rows[3:]] == [f"steps, {name}" for name in bench.WAYS]
    assert all(row["copy_GB_s"]["median"] > 0 for row in rows[:3])
    assert all(row["steps_per_s"]["median"] > 0 and row["p99_ms"]["max"] >= row["mean_ms"]["min"] for row in rows[3:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_an_accelerator_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", ["bench_device.py"])
    importlib.import_module("bench_device").main()
    assert "nothing is measured: device='cuda' needs an accelerator" in capsys.readouterr().out
