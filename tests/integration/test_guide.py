"""Guide pages with libraries that are not in the development environment: all their examples run, in order."""

import os
import re
import subprocess
import sys

import pytest
from tests.support import ROOT

GUIDE = ROOT / "docs" / "guide"


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", ["frameworks.md", "transforms.md", "checkpoints.md"])
def test_every_example_of_the_page_runs(tmp_path, page):
    script, text = tmp_path / "examples.py", (GUIDE / page).read_text()
    script.write_text("\n".join(re.findall(r"^```py(?:thon)?\n(.*?)^```", text, re.M | re.S)))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
