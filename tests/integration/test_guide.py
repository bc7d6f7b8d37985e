"""docs/guide/frameworks.md: its examples run in order, those of the heavy frameworks too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "frameworks.md"


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_every_example_of_the_page_runs(tmp_path):
    script = tmp_path / "examples.py"
    script.write_text("\n".join(re.findall(r"^```py(?:thon)?\n(.*?)^```", PAGE.read_text(), re.M | re.S)))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
