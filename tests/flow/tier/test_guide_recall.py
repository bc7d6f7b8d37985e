"""The guide to recalls shows what its commands print, and its examples read what the commands have moved."""

from tests.support import ROOT, guide_session
from tests.support.guide_session import differences

PAGE = ROOT / "docs" / "guide" / "recall.md"


def test_the_commands_print_what_the_page_shows_and_the_examples_read_what_has_moved(tmp_path, warm_python):
    text = PAGE.read_text()
    assert differences(text, guide_session.replay(text, tmp_path, warm_python)) == []
    hot, standard = (tmp_path / "tiers" / name / "checkpoints/run7" for name in ("nvme", "store"))
    assert sorted(path.name for path in hot.iterdir()) == ["step-2000", "step-4000"]
    assert sorted(path.name for path in standard.iterdir()) == ["step-1000", "step-2000", "step-3000"]
    imports, _, *examples = guide_session.blocks(text, "python")  # the second writes the checkpoints
    script = tmp_path / "after.py"
    script.write_text("\n".join([imports, *examples]))
    environment = guide_session.environment_in(tmp_path)
    done = warm_python.run([str(script)], cwd=tmp_path, environment=environment, is_strict=True)
    assert done.returncode == 0, done.stderr
