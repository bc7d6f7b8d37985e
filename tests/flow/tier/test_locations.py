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


@pytest.mark.parametrize(("step", "tier"), [(30, "nvme"), (20, "store"), (10, "cold")])
def test_a_checkpoint_is_located_by_the_path_that_it_has_left(root, step, tier):
    assert tc.locate(root / f"nvme/runs/a/step-{step}") == str(root / tier / f"runs/a/step-{step}")
    assert tc.locate(f"runs/a/step-{step}") == str(root / tier / f"runs/a/step-{step}")
    assert tc.locate(f"hot/runs/a/step-{step}") == str(root / tier / f"runs/a/step-{step}")


def test_a_file_of_a_checkpoint_is_located(root):
    assert tc.locate(root / "nvme/runs/a/step-10/model.bin") == str(root / "cold/runs/a/step-10/model.bin")


def test_a_file_url_is_located(root):
    assert tc.locate(f"file://{root}/nvme/runs/a/step-10") == str(root / "cold/runs/a/step-10")


def test_of_several_copies_the_fastest_whole_one_is_located(root):
    write(root, "store", 10)
    write(root, "nvme", 10, names=("model.bin",))
    assert tc.locate("runs/a/step-10") == str(root / "store/runs/a/step-10")
    write(root, "nvme", 10)
    assert tc.locate("runs/a/step-10") == str(root / "nvme/runs/a/step-10")


def test_a_folder_that_no_tier_has_whole_is_not_located(root):
    with pytest.raises(tc.NotFound, match="spread over"):
        tc.locate("runs/a")


def test_a_path_that_is_nowhere_is_an_error(root):
    with pytest.raises(FileNotFoundError, match="none of the tiers hot, standard, archive has it"):
        tc.locate("runs/a/step-11")


def test_a_rule_file_can_be_named(root, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert tc.locate(root / "nvme/runs/a/step-10", rules=root / "tiercache.toml") == str(root / "cold/runs/a/step-10")


def test_a_path_outside_all_tiers_stays_where_it_is(root):
    (root / "other.txt").write_text("x")
    assert tc.locate(root / "other.txt") == str(root / "other.txt")


def test_without_a_rule_file_the_placement_of_the_home_leads_to_a_moved_file_and_checkpoint(root):
    (root / "tiercache.toml").unlink()
    keys = ["runs/a/step-10/metrics.json", "runs/a/step-10/model.bin"]
    rows = {key: PlacementRow(key, str(root / "cold"), n_bytes=len("10 model.bin")) for key in keys}
    commit_placement(LocalFolder(root / "store"), rows)
    assert tc.locate(root / "store" / keys[1]) == str(root / "cold" / keys[1])
    assert tc.locate(root / "store/runs/a/step-10") == str(root / "cold/runs/a/step-10")
    with pytest.raises(tc.NotFound):
        tc.locate(root / "store/runs/a/step-11")


def test_a_link_to_a_tier_is_the_tier(root):
    (root / "link").symlink_to(root / "nvme")
    assert tc.locate(root / "link/runs/a/step-10") == str(root / "cold/runs/a/step-10")


def test_what_was_removed_from_every_tier_is_an_error(root):
    shutil.rmtree(root / "cold/runs")
    with pytest.raises(tc.NotFound):
        tc.locate("runs/a/step-10")
