"""Arguments of Checkpoints: what is accepted, and what the errors say."""

import math

import numpy as np
import pytest
import torch
from tests.support.checkpoint_files import write_checkpoint

import tiercache as tc
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.errors import NotFound
from tiercache.store import LocalFolder


@pytest.fixture
def run(tmp_path):
    with tc.Checkpoints(tmp_path / "run") as checkpoints:
        yield checkpoints


# -- the local folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", ["s3://bucket/run7", "gs://bucket/run7", "simplecache::s3://bucket/run7"])
def test_the_url_of_a_store_is_no_local_folder(tmp_path, monkeypatch, local):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="local= is a folder of this machine, such as '/nvme/run7', got the URL"):
        tc.Checkpoints("run", local=local)
    assert [*tmp_path.iterdir()] == []


def test_a_file_url_is_a_local_folder(tmp_path):
    with tc.Checkpoints(tmp_path / "run", local=f"file://{tmp_path}/fast") as checkpoints:
        checkpoints.save(1, {"n": 1}).wait("local")
    assert [*(tmp_path / "fast").glob("step-*/checkpoint.json")]


# -- numbers -------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_tensors_are_metrics(run):
    metrics = {
        "python": 3,
        "numpy": np.float32(0.5),
        "count": np.int64(7),
        "array": np.array(1.5),
        "tensor": torch.tensor(2.5, requires_grad=True),
        "half": torch.tensor([0.25], dtype=torch.bfloat16),
        "bad": np.nan,
        "huge": -math.inf,
    }
    run.save(1, {"n": 1}, metrics=metrics).wait()
    (found,) = run.list()
    assert repr(found.metrics["bad"]) == "nan"
    assert {name: value for name, value in found.metrics.items() if name != "bad"} == {
        "python": 3, "numpy": 0.5, "count": 7, "array": 1.5, "tensor": 2.5, "half": 0.25, "huge": -math.inf,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "error", "text"),
    [
        ({"loss": "0.5"}, TypeError, "the metric 'loss' is a number, got str '0.5'"),
        ({"loss": None}, TypeError, "the metric 'loss' is a number, got NoneType None"),
        ({"loss": torch.ones(3)}, ValueError, r"the metric 'loss' is a number, got Tensor tensor\("),
        ({"loss": np.ones(3)}, TypeError, "the metric 'loss' is a number, got ndarray"),
        ({"loss": 10**400}, ValueError, "the metric 'loss' is a number, got int 1000"),
        ({1: 0.5}, TypeError, "the name of a metric is a text, got 1"),
        ([("loss", 0.5)], TypeError, "metrics is a dict such as {'loss': 0.5}, got list"),
    ],
)
def test_the_error_for_a_metric_names_it(run, metrics, error, text):
    with pytest.raises(error, match=text):
        run.save(1, {"n": 1}, metrics=metrics)
    assert run.list() == []


def test_a_note_may_have_numbers_and_arrays_of_numpy_and_torch(run):
    note = {"step": np.int64(3), "lr": np.float32(0.5), "sizes": np.arange(2), "rank": torch.tensor(1), "t": (1, 2)}
    run.save(1, {"n": 1}, note=note).wait()
    assert run.list()[0].note == {"step": 3, "lr": 0.5, "sizes": [0, 1], "rank": 1, "t": [1, 2]}


@pytest.mark.parametrize(
    ("note", "error", "text"),
    [
        ({"x": object()}, TypeError, "note is a JSON value, .*: it contains a object"),
        ({"x": math.nan}, ValueError, "note is a JSON value, .*: Out of range"),
    ],
)
def test_the_error_for_a_note_says_what_a_note_is(run, note, error, text):
    with pytest.raises(error, match=text):
        run.save(1, {"n": 1}, note=note)


@pytest.mark.parametrize("step", [np.int64(5), torch.tensor(5), np.array(5), np.uint8(5)])
def test_a_step_may_be_an_integer_of_numpy_or_torch(run, step):
    run.save(step, {"n": 1}).wait()
    assert run.load(step) == {"n": 1}
    assert run.load("5") == {"n": 1}


@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        (1.0, TypeError, "step is an integer, got the float 1.0"),
        ("1", TypeError, "step is an integer, got the str '1'"),
        (-1, ValueError, "step is an integer from 0 to"),
    ],
)
def test_the_error_for_a_step_says_what_it_is(run, step, error, text):
    with pytest.raises(error, match=text):
        run.save(step, {"n": 1})


# -- which ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["latest", "best:loss", 3])
def test_the_error_of_an_empty_run_names_its_url_and_what_was_expected(tmp_path, which):
    checkpoints = Checkpoints(LocalFolder(tmp_path / "rnu7"))
    with pytest.raises(
        NotFound, match=r"/rnu7: no complete checkpoint.*; there are no checkpoints.*: expected folders step-"
    ):
        checkpoints.load(which)


def test_the_error_of_an_empty_url_names_the_runs_below_it(tmp_path):
    write_checkpoint(LocalFolder(tmp_path / "runs/a"), 1)
    write_checkpoint(LocalFolder(tmp_path / "runs/b"), 1)
    with pytest.raises(NotFound, match="there are runs in folders below this URL: a, b"):
        Checkpoints(LocalFolder(tmp_path / "runs")).load()


def test_the_error_at_the_url_of_a_checkpoint_names_the_url_of_its_run(tmp_path):
    name = write_checkpoint(LocalFolder(tmp_path / "a"), 1)
    with pytest.raises(NotFound, match=f"this is the URL of a checkpoint; that of its run is {tmp_path}/a"):
        Checkpoints(LocalFolder(tmp_path / "a" / name)).load()


def test_the_error_names_other_objects_at_the_url(tmp_path):
    LocalFolder(tmp_path).put("checkpoint-5/model.bin", b"1")
    with pytest.raises(NotFound, match=r"only other objects, such as checkpoint-5/model\.bin; `tiercache ckpt ls"):
        Checkpoints(LocalFolder(tmp_path)).load()


def test_the_error_of_a_run_with_unfinished_saves_says_what_they_lack(tmp_path):
    name = write_checkpoint(LocalFolder(tmp_path), 1, commit=False)
    with pytest.raises(NotFound, match=rf"only incomplete ones \(1\): the last, {name}: it has no manifest"):
        Checkpoints(LocalFolder(tmp_path)).load()


def test_a_typing_error_gives_what_was_probably_meant(tmp_path):
    remote = LocalFolder(tmp_path)
    name = write_checkpoint(remote, 1, metrics={"val_loss": 0.5})
    checkpoints = Checkpoints(remote)
    cases = {
        "lastest": (ValueError, "did you mean 'latest'"),
        "best:val_los": (NotFound, "did you mean 'val_loss'"),
        "bets:val_loss": (ValueError, "did you mean 'best:val_loss'"),
        name[:-1]: (ValueError, f"did you mean '{name}'"),
        name[:-1] + ("0" if name[-1] != "0" else "1"): (NotFound, f"did you mean '{name}'"),
    }
    for which, (error, text) in cases.items():
        with pytest.raises(error, match=text):
            checkpoints.load(which)


def test_the_error_for_a_misspelt_key_of_into_lists_the_keys_of_the_state(run):
    run.save(1, {"model": torch.nn.Linear(2, 2), "optim": {"lr": 1}}).wait()
    with pytest.raises(ValueError, match=r"missing in the checkpoint \(1\): modle\n.*state \(2\): model, optim"):
        run.load(into={"modle": torch.nn.Linear(2, 2)})
    with pytest.raises(TypeError, match="objects to fill are the argument into="):
        run.load({"model": torch.nn.Linear(2, 2)})


def test_the_reason_of_a_pin_is_a_text(run):
    run.save(1, {"n": 1}).wait()
    with pytest.raises(TypeError, match=r"why is a text, such as 'the release of May', got the list \['a'\]"):
        run.pin("latest", ["a"])


@pytest.mark.parametrize("which", [1.0, None, True, ["latest"]])
def test_what_is_neither_text_nor_integer_is_a_type_error(tmp_path, which):
    write_checkpoint(LocalFolder(tmp_path), 1)
    with pytest.raises(TypeError, match="a checkpoint is 'latest', 'best:METRIC', a step or a name, got the"):
        Checkpoints(LocalFolder(tmp_path)).load(which)


def test_a_writer_for_dcp_takes_the_same_steps(run):
    assert run.dcp_writer(np.int64(5)).step == 5
    with pytest.raises(TypeError, match="step is an integer, got the float"):
        run.dcp_writer(5.0)
