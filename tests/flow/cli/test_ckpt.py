"""tiercache ckpt: the checkpoints of every layout, listed, read, removed, pinned and compared."""

import json
import os
import time

import pytest
from tests.support.later_release import version_text

import tiercache as tc
from tiercache._native.checksum import crc32c
from tiercache.checkpoint.format import Manifest, StoredFile, checkpoint_name, encode_manifest

RULES = """
state_dir = "state"
[tiers.hot]
url = "nvme"

[tiers.standard]
url = "store"

[tiers.archive]
url = "cold"

[[rules]]
name = "runs"
match = "runs/**"
keep_hot = { last = 1, best = "val_loss:1" }
then = "archive"
after = "0s"

[tiering]
grace = "0s"
"""
DAY_S = 86400.0


def write(root, tier, name, files, days):
    """Write a checkpoint of so many days ago: a folder of files, or one file."""
    for path, data in files.items():
        file = root / tier / name / path if path else root / tier / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        os.utime(file, (time.time() - days * DAY_S,) * 2)


def step(root, number, loss, days, tier="nvme"):
    files = {"model.pt": bytes([number]) * 1000, "metrics.json": json.dumps({"val_loss": loss}).encode()}
    write(root, tier, f"runs/a/step-{number}", files, days)


def own(root, number, days, tier="nvme"):
    """Write one of our own checkpoints; return its path."""
    files = {"state.json": b"{}", "tensors-00001-of-00001.safetensors": bytes([number]) * 500}
    stored = tuple(StoredFile(path, len(data), crc32c(data)) for path, data in files.items())
    created_s = round(time.time() - days * DAY_S, 3)
    name = checkpoint_name(number, created_s, "0123ab")
    manifest = encode_manifest(Manifest(name, number, created_s, stored, metrics={"val_loss": 1.0}))
    write(root, tier, f"own/{name}", files | {"checkpoint.json": manifest}, days)
    return f"own/{name}"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three checkpoints of a run, the best of which is the first, one file, and one of our own."""
    (tmp_path / "tiercache.toml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    for tier in ("nvme", "store", "cold"):
        (tmp_path / tier).mkdir()
    for number, loss, days in ((1, 0.5, 9), (2, 0.9, 8), (3, 0.8, 7)):
        step(tmp_path, number, loss, days)
    write(tmp_path, "nvme", "files/ckpt-7.pt", {"": b"7" * 100}, 5)
    return tmp_path


def listed(tiercache, *arguments):
    events = tiercache("ckpt", "ls", *arguments, "--json").events
    return {one["path"]: one for one in events if one["event"] == "checkpoint"}


class TestLs:
    def test_every_layout_is_listed_with_step_size_age_tiers_and_metrics(self, tiercache, root):
        name = own(root, 40, 2)
        found = listed(tiercache, "--metrics")
        assert {path: one["step"] for path, one in found.items()} == {
            "runs/a/step-1": 1, "runs/a/step-2": 2, "runs/a/step-3": 3, "files/ckpt-7.pt": 7, name: 40,
        }  # fmt: skip
        one = found["runs/a/step-2"]
        assert (one["n_bytes"], [copy["tier"] for copy in one["copies"]], one["metrics"]) == (
            1000 + len('{"val_loss": 0.9}'),
            ["hot"],
            {"val_loss": 0.9},
        )
        assert abs(one["age_s"] - 8 * DAY_S) < 600
        assert abs(found[name]["age_s"] - 2 * DAY_S) < 600

    def test_each_checkpoint_has_the_rules_and_keys_that_keep_it(self, tiercache, root):
        found = listed(tiercache)
        texts = {path: [one["text"] for one in row["kept"]] for path, row in found.items()}
        assert texts["runs/a/step-1"] == ["runs: keep_hot best = val_loss:1"]
        assert texts["runs/a/step-2"] == []
        assert texts["runs/a/step-3"] == ["newest of its run", "runs: keep_hot last = 1"]

    def test_a_path_may_begin_with_the_name_of_a_tier(self, tiercache, root):
        step(root, 4, 0.7, 1, tier="store")
        assert list(listed(tiercache, "hot/runs/a")) == ["runs/a/step-1", "runs/a/step-2", "runs/a/step-3"]
        assert list(listed(tiercache, "standard/runs")) == ["runs/a/step-4"]
        assert list(listed(tiercache, "hot/runs/*/step-1*")) == ["runs/a/step-1"]


class TestVerify:
    def test_our_own_checkpoint_is_compared_with_its_manifest(self, tiercache, root):
        name = own(root, 40, 2)
        (found, _) = tiercache("ckpt", "verify", name, "--json").events
        assert (found["is_proven"], found["problems"]) == (True, [])

    def test_a_changed_byte_is_corrupt_and_named(self, tiercache, root):
        name = own(root, 40, 2)
        (root / "nvme" / name / "state.json").write_bytes(b"[]")
        out = tiercache("ckpt", "verify", name, code=4).out
        assert f"{name}/state.json: expected CRC-32C" in out

    def test_a_checkpoint_of_a_later_format_is_not_corrupt(self, tiercache, root):
        name = own(root, 40, 2)
        path = root / "nvme" / name / "checkpoint.json"
        path.write_bytes(version_text(json.loads(path.read_bytes()) | {"format": 2}))
        (found, _) = tiercache("ckpt", "verify", name, "--json", code=3).events
        assert "the checkpoint has format 2, which a later release" in "".join(found["problems"])
        assert not found["is_corrupt"]

    def test_a_moved_checkpoint_is_compared_with_the_catalog(self, tiercache, root):
        tiercache("tier", "run", "--once")
        (found, _) = tiercache("ckpt", "verify", "runs/a/step-2", "--json").events
        assert (found["tier"], found["is_proven"]) == ("archive", True)

    def test_two_copies_that_differ_are_reported(self, tiercache, root):
        write(root, "store", "runs/a/step-1", {"model.pt": b"x" * 1000}, 9)
        assert "files are missing, or differ" in tiercache("ckpt", "verify", "runs/a/step-1", code=3).out


class TestRm:
    def test_a_checkpoint_is_deleted_from_all_tiers_with_its_folder(self, tiercache, root):
        step(root, 1, 0.5, 9, tier="store")
        tiercache("ckpt", "rm", "runs/a/step-1", "--yes")
        assert list(root.rglob("step-1")) == []
        assert (root / "nvme/runs/a/step-2/model.pt").exists()
        assert not (root / "store/runs").exists()

    def test_a_pinned_checkpoint_is_left_alone(self, tiercache, root):
        (root / "tiercache.toml").write_text(f'{RULES}\n[[pins]]\nmatch = "runs/a/step-1"\nwhy = "the paper"\n')
        out = tiercache("ckpt", "rm", "runs/a/step-*", "--yes", code=3).out
        assert "runs/a/step-1: left: pinned by pins[1]: the paper: a [[pins]] table of the rule file" in out
        assert [path.name for path in (root / "nvme/runs/a").iterdir()] == ["step-1"]

    def test_a_dry_run_names_the_pinned_checkpoints_that_stay(self, tiercache, root):
        name = own(root, 40, 2)
        tiercache("ckpt", "pin", name)
        out = tiercache("ckpt", "rm", "runs/a", name, "--dry-run").out
        assert f"would leave {name}: pinned" in out
        assert "would delete 3 checkpoints" in out

    def test_without_a_terminal_yes_is_required(self, tiercache, root):
        assert "--yes" in tiercache("ckpt", "rm", "runs/a", code=2).err
        assert len(listed(tiercache, "runs/a")) == 3


class TestPin:
    def test_a_checkpoint_of_another_library_is_pinned_by_the_rule_file_alone(self, tiercache, root):
        text = 'a [[pins]] table of the rule file with match = "runs/a/step-2*" pins it'
        assert text in tiercache("ckpt", "pin", "hot/runs/a/step-2", code=2).err
        (root / "tiercache.toml").write_text(f'{RULES}\n[[pins]]\nmatch = "runs/a/step-2*"\nwhy = "the paper"\n')
        assert [one["text"] for one in listed(tiercache, "runs/a/step-2")["runs/a/step-2"]["kept"]] == [
            "pins[1]: the paper"
        ]

    def test_our_own_checkpoint_is_pinned_in_its_folder(self, tiercache, root):
        name = own(root, 40, 2)
        tiercache("ckpt", "pin", name, "--why", "the release of May")
        body = json.loads((root / "nvme" / name / "pin.json").read_text())
        assert body == {"pinned": True, "why": "the release of May"}
        one = listed(tiercache, name)[name]
        assert one["complete"]
        assert "pinned: the release of May" in [reason["text"] for reason in one["kept"]]
        out = tiercache("ckpt", "rm", name, "--yes", code=3).out
        assert f"{name}: left: pinned: the release of May; `tiercache ckpt unpin {name}` removes the pin" in out
        with tc.Checkpoints(root / "nvme/own") as checkpoints, pytest.raises(ValueError, match="tiercache ckpt unpin"):
            checkpoints.delete(40)
        tiercache("ckpt", "unpin", name)
        tiercache("ckpt", "rm", name, "--yes")
        assert [*root.rglob("checkpoint.json")] == []

    @pytest.mark.parametrize("text", ["{", '{"pinned": "no"}', '{"pinned": false, "why": 1}'])
    def test_a_pin_that_cannot_be_read_is_a_pin_for_the_command_and_for_checkpoints(self, tiercache, root, text):
        name = own(root, 40, 2)
        (root / "nvme" / name / "pin.json").write_text(text)
        assert f"would leave {name}: pinned" in tiercache("ckpt", "rm", name, "--dry-run").out
        with tc.Checkpoints(root / "nvme/own") as checkpoints:
            assert [one.is_pinned for one in checkpoints.list()] == [True]
