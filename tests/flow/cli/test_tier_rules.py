"""What tier check, plan, apply and run say of rules that delete too much, or that do not do what was meant."""

import os
import time
from pathlib import Path

import pytest

DAY_S = 86400.0
TIERS = """
state_dir = "state"
[tiers.hot]
url = "hot"
[tiers.archive]
url = "cold"
[tiering]
grace = "1d"
"""


class Folder:
    """Two tiers of 10 files in runs/, of 100 bytes each, and of two in keep/."""

    def __init__(self, root: Path, tiercache) -> None:
        self.root, self._tiercache = root, tiercache
        (root / "cold").mkdir()
        for n in range(10):
            self.write(f"runs/{n}.bin", days=n)
        for name in ("a", "b"):
            self.write(f"keep/{name}.bin", days=20)

    def write(self, key: str, days: float = 0.0) -> None:
        path = self.root / "hot" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
        self.age(path, days)

    def age(self, path: Path, days: float) -> None:
        os.utime(path, (time.time() - days * DAY_S - 60,) * 2)

    def rules(self, text: str, grace: str = "1d") -> None:
        (self.root / "tiercache.toml").write_text(TIERS.replace('grace = "1d"', f'grace = "{grace}"') + text)

    def tier(self, *arguments, code=0):
        return self._tiercache("tier", *arguments, code=code)

    def warnings(self, *arguments) -> list[str]:
        lines = self.tier(*arguments).out.splitlines()
        return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.root / "hot/runs").iterdir())


@pytest.fixture
def folder(tmp_path, monkeypatch, tiercache):
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path, tiercache)


class TestMassDeletions:
    RULE = '[[rules]]\nname = "old runs"\nmatch = "runs/**"\ndelete_after = "{}"\n{}\n'

    def test_a_run_that_would_delete_more_than_half_stops_before_it_deletes_or_moves_anything(self, folder):
        folder.rules('[[rules]]\nmatch = "keep/**"\nto = "archive"\n' + self.RULE.format("4d", ""), grace="0s")
        done = folder.tier("run", "--once", code=7)
        assert "STOPPED: old runs: would delete 600 B of 1000 B for good, and its max_delete is 50%" in done.out
        assert "--yes" in done.out
        assert "nothing of the plan was done" in done.out
        assert len(folder.files()) == 10
        assert sorted(path.name for path in (folder.root / "hot/keep").iterdir()) == ["a.bin", "b.bin"]

    def test_deletions_that_were_confirmed_are_made_after_the_grace_period_without_another_question(self, folder):
        folder.rules(self.RULE.format("1d", ""))
        folder.tier("run", "--once", "--yes")
        folder.tier("run", "--once")
        assert len(folder.files()) == 10
        folder.write("runs/10.bin", days=30)  # a further deletion, small enough by itself
        folder.tier("run", "--once")
        folder.rules(self.RULE.format("1d", ""), grace="0s")
        folder.tier("run", "--once")
        assert folder.files() == ["0.bin"]

    @pytest.mark.parametrize(
        ("limit", "code"), [("90%", 0), ("89%", 7), ("900", 0), ("899", 7), ("100%", 0), ("0%", 7), ("1TB", 0)]
    )
    def test_max_delete_of_a_rule_is_a_share_or_a_size(self, folder, limit, code):
        folder.rules(self.RULE.format("1d", f'max_delete = "{limit}"'))
        folder.tier("run", "--once", code=code)

    def test_plan_warns_and_apply_of_the_plan_needs_yes_too(self, folder):
        folder.rules(self.RULE.format("1d", ""), grace="0s")
        (warning,) = folder.warnings("plan", "--out", "plan.json")
        assert warning.startswith("old runs: would delete 900 B of 1000 B for good")
        folder.tier("apply", "plan.json", code=7)
        folder.rules(self.RULE.format("20d", ""), grace="0s")
        folder.tier("run", "--once")
        assert len(folder.files()) == 10
        folder.rules(self.RULE.format("1d", ""), grace="0s")
        assert "9 of 9 moves done" in folder.tier("apply", "plan.json", "--yes").out


@pytest.mark.parametrize("verb", ["check", "plan"])
class TestWarnings:
    def test_a_rule_that_matches_nothing_is_named(self, folder, verb):
        folder.rules('[[rules]]\nname = "cold"\nmatch = "run/**"\nafter = "1d"\nto = "archive"\n')
        assert folder.warnings(verb) == ["cold: matches no object"]

    def test_a_pin_that_matches_nothing_is_named(self, folder, verb):
        folder.rules('[[pins]]\nmatch = ["runs/1.bin", "runs/33.bin", "keep/**"]\n')
        (warning,) = folder.warnings(verb)
        assert warning == "pins[1]: 'runs/33.bin' matches no object, and protects nothing"

    def test_an_exception_that_matches_nothing_is_named(self, folder, verb):
        rule = '[[rules]]\nname = "cold"\nmatch = "runs/**"\nafter = "99d"\nto = "archive"\n'
        folder.rules(f'{rule}except = ["keeep/*", "runs/3.bin"]\n')
        (warning,) = folder.warnings(verb)
        assert warning == "cold: except = 'keeep/*' matches none of the objects that `match` matches"

    def test_a_rule_that_protects_what_a_rule_above_it_deletes_is_in_the_wrong_place(self, folder, verb):
        rules = '[[rules]]\nname = "all"\nmatch = "**"\ndelete_after = "99d"\n'
        folder.rules(rules + '[[rules]]\nname = "stays"\nmatch = "keep/**"\n')
        assert (
            "stays: applies to nothing, because rules above it apply to all 2 objects that it matches: "
            "the first of these is all"
        ) in folder.warnings(verb)
        folder.rules('[[rules]]\nname = "stays"\nmatch = "keep/**"\n' + rules)
        assert folder.warnings(verb) == []

    def test_a_partial_copy_of_a_checkpoint_is_named_with_the_reason(self, folder, verb):
        folder.rules('[[rules]]\nmatch = "ck/**"\nkeep_hot = {last = 1}\nthen = "archive"\nafter = "1d"\n')
        for step, names in ((1, "abc"), (2, "abc"), (3, "ab")):
            for name in names:
                folder.write(f"ck/step-{step}/{name}.bin", days=9 - step)
        lines = folder.tier(verb).out.splitlines()
        assert (
            "note: 1 checkpoint incomplete and left alone, lacking files that other checkpoints of its run have: "
            "ck/step-3"
        ) in lines

    def test_a_file_without_mistakes_gives_no_warning(self, folder, verb):
        folder.rules('[[rules]]\nmatch = "runs/**"\nexcept = "runs/3.bin"\nafter = "99d"\nto = "archive"\n')
        assert folder.warnings(verb) == []


def test_a_partial_copy_of_the_newest_checkpoint_deletes_none_of_the_complete_ones(folder):
    folder.rules('[[rules]]\nmatch = "ck/**"\nkeep_hot = {last = 1}\ndelete_after = "1d"\nmax_delete = "100%"', "0s")
    for step, names in ((1, "abc"), (2, "abc"), (3, "ab")):
        for name in names:
            folder.write(f"ck/step-{step}/{name}.bin", days=9 - step)
    folder.tier("run", "--once")
    assert sorted(path.name for path in (folder.root / "hot/ck").iterdir()) == ["step-2", "step-3"]


class TestOneFolder:
    def test_check_refuses_a_tier_that_is_another_tier_by_a_link(self, folder):
        (folder.root / "cold").rmdir()
        (folder.root / "cold").symlink_to("hot")
        folder.rules("")
        done = folder.tier("check", code=2)
        assert "tiers.archive.url" in done.err
        assert "are one folder by a link or a mount" in done.err

    def test_a_tier_whose_folder_does_not_exist_yet_is_found_through_a_link_above_it(self, folder):
        (folder.root / "link").symlink_to("hot")
        folder.rules("")
        path = folder.root / "tiercache.toml"
        path.write_text(path.read_text().replace('url = "cold"', 'url = "link/new"'))
        assert "lie inside one another" in folder.tier("check", code=2).err
