"""The guide to the order shows what its example prints."""

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "order.md"
FENCE = re.compile(r"^```(python|text)\n(.*?)^```", re.M | re.S)


def test_the_worked_example_prints_what_the_guide_shows(tmp_path):
    blocks = FENCE.findall(GUIDE.read_text())
    code = "\n".join(text for language, text in blocks if language == "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = "".join(text for language, text in blocks if language == "text")
    assert shown
    assert done.stdout == shown
