"""torchdata's own suite passes against tiercache.DataLoader wherever it passes against torchdata's class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.integration.upstream import compare

CHECKOUT = os.environ.get("TORCHDATA_CHECKOUT", "")


@pytest.mark.integration
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CHECKOUT, reason="TORCHDATA_CHECKOUT names no clone of https://github.com/pytorch/data")
def test_what_passes_with_torchdatas_class_passes_with_ours():
    report, worse = compare(Path(CHECKOUT), [])
    print(report)
    assert worse == []
