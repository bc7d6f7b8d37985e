"""Checkpoints that the tier engine has moved, as users meet them: the command moves, tc.Checkpoints finds."""

import shutil

import numpy as np
import pytest
from tests.support.checkpoint_files import write_checkpoint
from typer.testing import CliRunner

import tiercache as tc
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.cli.app import app
from tiercache.errors import NotFound, StoreError
from tiercache.store import LocalFolder

LOSSES = {1: 0.1, 2: 0.9, 3: 0.8, 4: 0.7}
RULES = """
state_dir = "state"
[tiers.{first}]
url = "first"

[tiers.{second}]
url = "second"

[[rules]]
name = "runs"
match = "**"
keep_{first} = {{ last = 2 }}
then = "{second}"

[tiering]
grace = "0s"
"""


@pytest.fixture(params=[("standard", "archive"), ("hot", "standard")], ids=["run at home", "run in a hot tier"])
def work(request, tmp_path, monkeypatch):
    """A run of four steps, of which a rule has moved the first two; the working folder has no rule file."""
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    (tmp_path / "tiercache.toml").write_text(RULES.format(first=request.param[0], second=request.param[1]))
    with tc.Checkpoints(tmp_path / "first/run7") as checkpoints:
        for step, loss in LOSSES.items():
            checkpoints.save(step, {"w": np.full(9, step)}, metrics={"loss": loss}).wait()
    done = CliRunner().invoke(app, ["tier", "run", "--once", "--rules", str(tmp_path / "tiercache.toml")])
    assert done.exit_code == 0, done.output
    assert len([*(tmp_path / "second/run7").glob("*/checkpoint.json")]) == 2
    (tmp_path / "tiercache.toml").rename(tmp_path / "rules.toml")
    return tmp_path


@pytest.fixture
def run(work):
    with tc.Checkpoints(work / "first/run7") as checkpoints:
        yield checkpoints


def value(checkpoints, which):
    return int(checkpoints.load(which)["w"][0])


def test_every_choice_sees_the_moved_checkpoints_from_any_working_folder(run):
    chosen = {which: value(run, which) for which in ("best:loss", "best:loss:max", "latest", 2, run.list()[0].name)}
    assert [*chosen.values()] == [1, 2, 4, 2, 1]


def test_the_rule_file_of_the_working_folder_gives_the_same(work, run, monkeypatch):
    (work / "rules.toml").rename(work / "tiercache.toml")
    monkeypatch.chdir(work)
    assert [value(run, which) for which in ("best:loss", "latest", 2)] == [1, 4, 2]
    assert {one.tiers for one in run.list()} in ({("archive",), ("remote",)}, {("standard",), ("remote",)})


def test_list_and_verify_describe_the_moved_checkpoints(work, run):
    listed = run.list()
    assert [(one.step, one.state, one.metrics) for one in listed] == [
        (step, "complete", {"loss": loss}) for step, loss in LOSSES.items()
    ]
    assert [one.tiers for one in listed] == [(f"{work}/second/run7",)] * 2 + [("remote",)] * 2
    assert run.verify("best:loss").problems == {f"{work}/second/run7": ()}
    tensors = next((work / "second/run7" / listed[0].name).glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    assert not run.verify(1).is_right


def test_weights_are_opened_where_the_checkpoint_is(work, run):
    first = run.list()[0]
    for url in (work / "first/run7" / first.name, work / "second/run7" / first.name):
        with tc.open_weights(url, framework="numpy") as weights:
            assert weights["w"][0] == 1
    with tc.open_weights(work / "first/run7", framework="numpy") as weights:
        assert weights["w"][0] == 4


def test_weights_of_a_run_that_was_moved_as_a_whole_are_those_of_the_checkpoint_written_last(work):
    for folder in (work / "first/run7").glob("step-*"):
        shutil.move(folder, work / "second/run7" / folder.name)
    write_checkpoint(LocalFolder(work / "first/other"), 7, {"w": np.zeros(3)})
    with tc.open_weights(work / "second/run7", framework="numpy") as weights:
        assert weights["w"][0] == 4
    with pytest.raises(NotFound, match=r"no model.safetensors.index.json, .* or checkpoint here"):
        tc.open_weights(work / "first", framework="numpy")


def test_a_moved_checkpoint_is_not_deleted_here_and_may_be_pinned_there(work, run):
    with pytest.raises(ValueError, match=r"is in .*second/run7, where the tier engine has put it.*ckpt rm"):
        run.delete("best:loss")
    run.pin("best:loss", "the release of May")
    assert [one.why_pinned for one in run.list()] == ["the release of May", "", "", ""]
    (folder,) = (work / "second/run7").glob("step-000000000001.*")
    assert (folder / "pin.json").exists()


def test_a_step_that_was_moved_and_is_saved_again_after_a_restart_conflicts_with_nothing(work, run):
    (work / "rules.toml").rename(work / "tiercache.toml")
    for step in (1, 2):
        run.save(step, {"w": np.full(9, 10 + step)}, metrics={"loss": 0.5}).wait()
    done = CliRunner().invoke(app, ["tier", "run", "--once", "--rules", str(work / "tiercache.toml"), "--json"])
    assert done.exit_code == 0, done.output
    assert "conflict" not in done.output
    assert [(one.step, one.state, len(one.tiers)) for one in run.list()] == [
        (step, "complete", 1) for step in (1, 2, 3, 4, 1, 2)
    ]
    # The highest step of the run stays, as those that were written last do.
    assert [one.tiers == ("remote",) for one in run.list()] == [False, False, False, True, True, True]
    assert (value(run, "latest"), value(run, 1), value(run, run.list()[0].name)) == (12, 11, 1)
    assert all(run.verify(one.name).is_right for one in run.list())


def test_a_tier_that_cannot_be_asked_is_named_in_the_error_and_does_not_change_the_choice(work, monkeypatch):
    def unreachable(url):
        raise StoreError("no route to host", url=url)

    run = Checkpoints(LocalFolder(work / "first/run7"))
    monkeypatch.setattr(run._stores, "_store_at", unreachable)
    is_home = "archive" in (work / "rules.toml").read_text()
    tier = "the tier .*/second/run7 could not be asked: .*no route to host"
    for which in ("best:loss", 2):
        with pytest.raises(StoreError, match=tier):
            run.load(which)
    if is_home:  # its placement states what is in the other tier
        assert value(run, "latest") == 4
        assert value(run, 3) == 3
        moved = [(one.step, one.state, one.metrics) for one in run.list()][:2]
        assert moved == [(1, "moved", {"loss": 0.1}), (2, "moved", {"loss": 0.9})]
    else:
        for ask in (lambda: run.load("latest"), run.list):
            with pytest.raises(StoreError, match=tier):
                ask()
    newest = max(path.name for path in (work / "first/run7").glob("step-*"))
    assert value(run, newest) == 4


@pytest.mark.parametrize("work", [("standard", "archive")], indirect=True)
def test_a_placement_that_cannot_be_read_is_an_error_and_not_another_checkpoint(work, run):
    (placement,) = work.glob("first/_tiercache/placement/*.arrow")
    placement.write_bytes(b"torn")
    with pytest.raises(StoreError, match="which checkpoint is 'best:loss' cannot be known: the placement of moved"):
        run.load("best:loss")
