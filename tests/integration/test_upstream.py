"""torchdata's own suite passes against tiercache.DataLoader wherever it passes against torchdata's class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.integration.upstream import compare, copy_suite, read_report

CHECKOUT = os.environ.get("TORCHDATA_CHECKOUT", "")


@pytest.mark.integration
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CHECKOUT, reason="TORCHDATA_CHECKOUT names no clone of https://github.com/pytorch/data")
def test_what_passes_with_torchdatas_class_passes_with_ours():
    report, worse = compare(Path(CHECKOUT), [])
    print(report)
    assert worse == []


def test_the_copied_suite_imports_our_class_under_torchdatas_name(tmp_path):
    suite = tmp_path / "clone" / "test" / "stateful_dataloader"
    suite.mkdir(parents=True)
    (suite / "test_x.py").write_text("from torchdata.stateful_dataloader import StatefulDataLoader as DataLoader\n")
    for ours in (False, True):
        copy_suite(tmp_path / "clone", tmp_path / f"{ours}", ours=ours)
    copied = [(tmp_path / f"{ours}/test/stateful_dataloader/test_x.py").read_text() for ours in (False, True)]
    assert copied[0].startswith("from torchdata.stateful_dataloader import")
    assert copied[1] == "from tiercache_shim import StatefulDataLoader as DataLoader\n"
    assert "from tiercache import DataLoader as StatefulDataLoader" in (tmp_path / "True/tiercache_shim.py").read_text()
    with pytest.raises(FileNotFoundError, match=r"a clone of https://github\.com/pytorch/data"):
        copy_suite(tmp_path, tmp_path / "none", ours=True)


def test_a_report_counts_the_worst_of_a_test_and_its_subtests(tmp_path):
    report = tmp_path / "report.xml"
    case = '<testcase classname="test.stateful_dataloader.test_x.A" name="{}">{}</testcase>'
    cases = [("a", ""), ("a", "<failure/>"), ("a", ""), ("b", ""), ("c", "<skipped/>"), ("d", "<error/>")]
    report.write_text("<suite>" + "".join(case.format(*c) for c in cases) + "</suite>")
    expected = {"a": "failed", "b": "passed", "c": "skipped", "d": "failed"}
    assert read_report(report) == {f"test_x.A::{name}": outcome for name, outcome in expected.items()}
