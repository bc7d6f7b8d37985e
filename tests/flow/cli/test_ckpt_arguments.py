"""Arguments of tiercache ckpt: RUN/WHICH, URLs, relative paths and globs, of every layout; incomplete checkpoints."""

import json
import os
import time

import numpy as np
import pytest

import tiercache as tc
from tiercache.checkpoint.format import parse_name

RULES = """
[tiers.hot]
url = "hot"

[tiers.standard]
url = "store"
"""
LAYOUTS = {  # files of the checkpoint of a step
    "dcp": lambda step: {
        f"step-{step}/__0_0.distcp": b"w" * step,
        f"step-{step}/metrics.json": json.dumps({"loss": 100.5 - step}).encode(),
        f"step-{step}/.metadata": b"m",
    },
    "lightning": lambda step: {f"epoch={step}-step={step}-loss={100 - step}.50.ckpt": b"w" * step},
    "trainer": lambda step: {
        f"checkpoint-{step}/pytorch_model.bin": b"w" * step,
        f"checkpoint-{step}/trainer_state.json": json.dumps({"log_history": [{"loss": 100.5 - step}]}).encode(),
    },
    "files": lambda step: {f"ckpt_{step}_loss_{100 - step}.50.pt": b"w" * step},
}


def write(folder, layout, *steps):
    """Write checkpoints of a run, the first an hour before the second and so on."""
    for number, step in enumerate(steps):
        if layout == "own":
            with tc.Checkpoints(folder) as checkpoints:
                checkpoints.save(step, {"w": np.full(9, step)}, metrics={"loss": 100.5 - step}).wait()
            continue
        for name, data in LAYOUTS[layout](step).items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            os.utime(file, (time.time() - 3600 * (len(steps) - number),) * 2)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def steps(tiercache):
    """The steps of the checkpoints that an argument selects."""

    def find(argument, code=0):
        events = tiercache("ckpt", "ls", argument, "--json", code=code).events
        return [one["step"] for one in events if one["event"] == "checkpoint"]

    return find


@pytest.mark.parametrize("layout", ["own", *LAYOUTS])
@pytest.mark.parametrize("has_rules", [True, False])
def test_one_checkpoint_of_a_run_is_named_by_which_and_by_path(root, steps, tiercache, layout, has_rules):
    if has_rules:
        (root / "tiercache.toml").write_text(RULES)
    write(root / "hot/run", layout, 10, 30, 20)
    run = "hot/run"
    found = {which: steps(f"{run}/{which}") for which in ("latest", "best:loss", "best:loss:max", "20")}
    assert found == {"latest": [20], "best:loss": [30], "best:loss:max": [10], "20": [20]}
    assert steps(f"file://{root}/hot/run/latest") == steps(f"./{run}/latest") == steps(root / run / "latest") == [20]
    assert sorted(steps(run)) == sorted(steps("hot/*")) == sorted(steps("./h*/run/*")) == [10, 20, 30]
    (one,) = [one for one in tiercache("ckpt", "ls", f"{run}/30", "--json").events if one["event"] == "checkpoint"]
    assert steps(one["path"]) == [30]  # what is printed is an argument
    assert steps(root / "hot" / one["path"].removeprefix("hot/")) == [30]


@pytest.mark.parametrize("command", ["ls", "verify", "rm --dry-run", "pin", "unpin"])
def test_every_command_takes_a_run_and_which(root, tiercache, command):
    write(root / "run", "own", 10, 30, 20)
    name = next(path.name for path in (root / "run").glob("step-*20.*"))
    (verb, *options) = command.split()
    out = tiercache("ckpt", verb, "run/latest", *options).out
    assert f"run/{name}" in out
    if command in ("pin", "unpin"):
        pin = json.loads((root / "run" / name / "pin.json").read_text())
        assert pin == {"pinned": command == "pin", "why": ""}


def test_a_pin_does_not_change_which_checkpoint_is_the_latest(root, tiercache, steps):
    with tc.Checkpoints(root / "run", pending=3) as checkpoints:
        for step in (5, 10, 20):
            checkpoints.save(step, {"n": step})
    (first,) = (root / "run").glob("step-*10.*")
    written_s = parse_name(first.name)[1]
    for path in first.iterdir():  # the second save began before the files of the first one were written
        os.utime(path, (written_s + 0.9,) * 2)
    (last,) = (root / "run").glob("step-*20.*")
    tiercache("ckpt", "pin", f"run/{last.name}")
    (pin,) = (root / "run").glob("*/pin.json")
    os.utime(pin, (written_s + 5,) * 2)
    assert steps("run/latest") == [20]


def test_a_url_names_a_run_a_checkpoint_and_which(root, tiercache, steps):
    url = "memory://ckpt-arguments/runs/a"
    for step in (10, 20):
        with tc.Checkpoints(url) as checkpoints:
            checkpoints.save(step, {"n": step}).wait()
            name = checkpoints.list()[-1].name
    assert steps(url) == [10, 20]
    assert steps(f"{url}/latest") == steps(f"{url}/{name}") == [20]
    tiercache("ckpt", "pin", f"{url}/latest")
    assert f"{url}/{name}: left" in tiercache("ckpt", "rm", f"{url}/latest", "--yes", code=3).out
    tiercache("ckpt", "rm", f"{url}/10", "--yes")
    assert steps(url) == [20]


def test_checkpoints_of_several_runs_can_be_named_together(root, tiercache):
    write(root / "runs/a", "own", 10)
    write(root / "runs/b", "dcp", 20)
    events = tiercache("ckpt", "verify", "runs/a/latest", "runs/b/latest", "--json").events
    assert [one["path"].split("/")[:2] for one in events[:-1]] == [["runs", "a"], ["runs", "b"]]
    assert "expected checkpoints in one folder" in tiercache("ckpt", "verify", "s3://a/x", "s3://b/y", code=2).err


def test_the_error_says_what_there_is_instead(root, tiercache):
    write(root / "run", "own", 10, 20)
    assert "known metrics: loss" in tiercache("ckpt", "ls", "run/best:los", code=1).err
    assert "of step 7; steps of the last ones: 10, 20" in tiercache("ckpt", "ls", "run/7", code=1).err
    assert "no checkpoints of a known layout" in tiercache("ckpt", "ls", "rnu", code=1).err


def test_a_folder_outside_the_tiers_is_found_with_its_path(root, tiercache, steps):
    (root / "tiercache.toml").write_text(RULES)
    write(root / "elsewhere/run", "dcp", 10, 20)
    assert steps("./elsewhere/run/latest") == [20]
    assert "a local folder is written ./FOLDER" in tiercache("ckpt", "ls", "elsewhere/run", code=1).err


# -- incomplete checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["file", "manifest", "short", "corrupt"])
def test_an_incomplete_checkpoint_of_our_own_is_named_with_the_reason(root, tiercache, steps, damage):
    write(root / "run", "own", 10, 20)
    (folder,) = (root / "run").glob("step-*20.*")
    (tensors,) = folder.glob("*.safetensors")
    if damage == "file":
        tensors.unlink()
    elif damage == "manifest":
        (folder / "checkpoint.json").unlink()
    elif damage == "short":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    else:
        (folder / "checkpoint.json").write_bytes(b"{}")
    reason = {
        "file": "tensors-00001-of-00001.safetensors is missing",
        "manifest": "it has no manifest",
        "short": "tensors-00001-of-00001.safetensors has",
        "corrupt": "does not match its CRC-32C",
    }[damage]
    rows = {one["step"]: one for one in tiercache("ckpt", "ls", "run", "--json").events if one["event"] == "checkpoint"}
    assert (rows[10]["complete"], rows[10]["problem"]) == (True, "")
    assert rows[20]["complete"] is False
    assert reason in rows[20]["problem"]
    assert [one["text"] for one in rows[10]["kept"]] == ["newest of its run"]
    assert f"not complete: {rows[20]['problem']}" in tiercache("ckpt", "ls", "run").out
    assert steps("run/latest") == [10]
    tiercache("ckpt", "verify", f"run/{folder.name}", code=3 if damage == "manifest" else 4)


def test_an_incomplete_checkpoint_of_another_library_is_not_the_latest(root, tiercache, steps):
    write(root / "run", "dcp", 10, 20)
    (root / "run/step-20/.metadata").unlink()
    assert steps("run/latest") == [10]
    assert "not complete: files are missing" in tiercache("ckpt", "ls", "run/step-20").out


def test_the_rules_of_the_program_that_saved_last_say_what_it_keeps(tiercache, root):
    def kept():
        events = tiercache("ckpt", "ls", "run", "--json").events
        return {one["step"]: [why["text"] for why in one["kept"]] for one in events if one["event"] == "checkpoint"}

    losses = {10: 0.5, 20: 0.1, 60: 0.9, 70: 0.8}
    rules = [tc.Keep(every_steps=50), tc.Keep(best="loss:1"), tc.Keep(last=1, tier="local")]
    with tc.Checkpoints("run", local="nvme", keep=rules) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"w": np.full(9, step)}, metrics={"loss": loss}).wait()
    best, every = "Keep(best='loss:1')", "Keep(every_steps=50)"
    assert kept() == {20: [best], 60: [every], 70: ["newest of its run"]}
    with tc.Checkpoints("run", local="nvme", keep=rules) as checkpoints:
        checkpoints.list()  # a program that does not save changes nothing
    assert kept()[60] == [every]
    with tc.Checkpoints("run", local="nvme") as checkpoints:
        checkpoints.save(80, {"w": np.zeros(9)}).wait()
    assert kept() == {20: [], 60: [], 70: [], 80: ["newest of its run"]}
