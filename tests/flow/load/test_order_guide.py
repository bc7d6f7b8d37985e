"""The guide to the order shows what its example prints."""

import re

from tests.support import ROOT

GUIDE = ROOT / "docs" / "guide" / "order.md"
FENCE = re.compile(r"^```(python|text)\n(.*?)^```", re.M | re.S)


def test_the_worked_example_prints_what_the_guide_shows(tmp_path, warm_python):
    blocks = FENCE.findall(GUIDE.read_text())
    code = "\n".join(text for language, text in blocks if language == "python")
    done = warm_python.run(["-c", code], cwd=tmp_path, is_strict=True)
    assert done.returncode == 0, done.stderr
    shown = "".join(text for language, text in blocks if language == "text")
    assert shown
    assert done.stdout == shown
