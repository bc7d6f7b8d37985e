"""The framework examples of the guide to recalls go on from checkpoints that rules have moved."""

import os
import subprocess
import sys

import pytest
from tests.support import ROOT, guide_session

EXAMPLES = guide_session.blocks((ROOT / "docs" / "guide" / "recall.md").read_text(), "py")


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", EXAMPLES, ids=["transformers", "lightning"])
def test_a_training_goes_on_from_a_checkpoint_that_has_moved(tmp_path, example):
    environment = os.environ | {"HOME": str(tmp_path), "TIERCACHE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.recall_jobs", str(tmp_path), example],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "went on at 4"
