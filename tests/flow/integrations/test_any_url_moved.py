"""`tiercache::` paths whose files have moved to another tier."""

import fsspec
import pytest
from tests.flow.tier.test_locations import RULES, write

from tiercache.store import LocalFolder
from tiercache.store.placement_log import PlacementRow, commit_placement


@pytest.fixture
def root(tmp_path, monkeypatch):
    for tier, step in (("nvme", 30), ("store", 20), ("cold", 10)):
        write(tmp_path, tier, step)
    (tmp_path / "tiercache.toml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fs(make):
    return make("file")


@pytest.mark.parametrize("step", [30, 20, 10])
def test_a_file_is_read_by_its_old_local_path(root, fs, step):
    path = f"{root}/nvme/runs/a/step-{step}/model.bin"
    assert fs.cat_file(path) == f"{step} model.bin".encode()
    with fs.open(path) as file:
        assert (file.read(), file.size) == (f"{step} model.bin".encode(), len(f"{step} model.bin"))


def test_fsspec_opens_the_old_path_after_the_protocol(root, cache):
    url = f"tiercache::{root}/nvme/runs/a/step-10/model.bin"
    opened = fsspec.open(url, cache=cache)
    with opened as file:
        assert file.read() == b"10 model.bin"
    opened.fs.close()


def test_several_moved_files_are_read_together(root, fs):
    paths = [f"{root}/nvme/runs/a/step-{step}/model.bin" for step in (30, 10)]
    assert fs.cat(paths) == {paths[0]: b"30 model.bin", paths[1]: b"10 model.bin"}
    assert fs.cat_ranges(paths, 0, 2) == [b"30", b"10"]


def test_a_moved_file_is_copied_to_a_local_path(root, fs, tmp_path):
    fs.get(f"{root}/nvme/runs/a/step-10", str(tmp_path / "copy"), recursive=True)
    assert (tmp_path / "copy/model.bin").read_text() == "10 model.bin"


def test_a_moved_checkpoint_is_listed_as_if_it_had_stayed(root, fs):
    folder = f"{root}/nvme/runs/a/step-10"
    names = [f"{folder}/metrics.json", f"{folder}/model.bin"]
    assert fs.exists(folder)
    assert fs.isdir(folder)
    assert fs.isfile(names[1])
    assert sorted(fs.ls(folder, detail=False)) == names
    assert sorted(fs.find(folder)) == names
    assert sorted(fs.glob(f"{folder}/*.bin")) == names[1:]
    assert [sorted(files) for _, _, files in fs.walk(folder)] == [["metrics.json", "model.bin"]]
    assert fs.info(names[1])["size"] == len("10 model.bin")
    assert fs.du(folder) == len("10 model.bin") + len("10 metrics.json")


def test_what_is_nowhere_stays_missing(root, fs):
    path = f"{root}/nvme/runs/a/step-11"
    assert not fs.exists(path)
    assert not fs.isdir(path)
    for call in (fs.info, fs.ls, fs.cat_file, fs.open):
        with pytest.raises(FileNotFoundError):
            call(path)


def test_a_folder_that_exists_is_listed_as_it_is(root, fs):
    assert fs.ls(f"{root}/nvme/runs/a", detail=False) == [f"{root}/nvme/runs/a/step-30"]


def test_without_a_rule_file_the_placement_of_a_home_leads_on(root, fs):
    (root / "tiercache.toml").unlink()
    key = "runs/a/step-10/model.bin"
    row = PlacementRow(key, str(root / "cold"), n_bytes=len("10 model.bin"))
    commit_placement(LocalFolder(root / "store"), {key: row})
    assert fs.cat_file(f"{root}/store/{key}") == b"10 model.bin"
