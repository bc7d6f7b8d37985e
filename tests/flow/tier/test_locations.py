"""Present locations of files and checkpoints, by any path under which they once lay."""

import shutil

import pytest

import tiercache as tc
from tiercache.store import LocalFolder
from tiercache.store.placement_log import PlacementRow, commit_placement

RULES = """
[tiers.hot]
url = "nvme"

[tiers.standard]
url = "store"

[tiers.archive]
url = "cold"
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three tiers: a checkpoint in each, and a rule file in the working folder."""
    for tier, step in (("nvme", 30), ("store", 20), ("cold", 10)):
        write(tmp_path, tier, step)
    (tmp_path / "tiercache.toml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(root, tier, step, names=("model.bin", "metrics.json")):
    folder = root / tier / "runs" / "a" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{step} {name}")


LOCATED = {  # what is asked for, and where it lies, both below the root
    "{root}/nvme/runs/a/step-30": "nvme/runs/a/step-30",
    "{root}/nvme/runs/a/step-20": "store/runs/a/step-20",
    "{root}/nvme/runs/a/step-10": "cold/runs/a/step-10",
    "runs/a/step-20": "store/runs/a/step-20",
    "hot/runs/a/step-10": "cold/runs/a/step-10",
    "{root}/nvme/runs/a/step-10/model.bin": "cold/runs/a/step-10/model.bin",
    "file://{root}/nvme/runs/a/step-10": "cold/runs/a/step-10",
    "{root}/link/runs/a/step-10": "cold/runs/a/step-10",
    "{root}/other.txt": "other.txt",
}


def test_what_has_moved_is_located_by_any_path_under_which_it_once_lay(root, tmp_path_factory, monkeypatch):
    (root / "link").symlink_to(root / "nvme")
    (root / "other.txt").write_text("outside of all tiers")
    for asked, found in LOCATED.items():
        assert tc.locate(asked.format(root=root)) == str(root / found), asked
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert tc.locate(root / "nvme/runs/a/step-10", rules=root / "tiercache.toml") == str(root / "cold/runs/a/step-10")


def test_of_several_copies_the_fastest_whole_one_is_located(root):
    write(root, "store", 10)
    write(root, "nvme", 10, names=("model.bin",))
    assert tc.locate("runs/a/step-10") == str(root / "store/runs/a/step-10")
    write(root, "nvme", 10)
    assert tc.locate("runs/a/step-10") == str(root / "nvme/runs/a/step-10")


def test_a_folder_that_no_tier_has_whole_is_not_located(root):
    with pytest.raises(tc.NotFound, match="spread over"):
        tc.locate("runs/a")


def test_without_a_rule_file_the_placement_of_the_home_leads_to_a_moved_file_and_checkpoint(root):
    (root / "tiercache.toml").unlink()
    keys = ["runs/a/step-10/metrics.json", "runs/a/step-10/model.bin"]
    rows = {key: PlacementRow(key, str(root / "cold"), n_bytes=len("10 model.bin")) for key in keys}
    commit_placement(LocalFolder(root / "store"), rows)
    assert tc.locate(root / "store" / keys[1]) == str(root / "cold" / keys[1])
    assert tc.locate(root / "store/runs/a/step-10") == str(root / "cold/runs/a/step-10")
    with pytest.raises(tc.NotFound):
        tc.locate(root / "store/runs/a/step-11")


def test_what_was_removed_from_every_tier_is_an_error(root):
    shutil.rmtree(root / "cold/runs")
    with pytest.raises(FileNotFoundError, match="none of the tiers hot, standard, archive has it"):
        tc.locate("runs/a/step-10")
