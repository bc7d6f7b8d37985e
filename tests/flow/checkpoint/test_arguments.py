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


def test_the_url_of_a_store_is_no_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for local in ["s3://bucket/run7", "gs://bucket/run7", "simplecache::s3://bucket/run7"]:
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


def test_the_error_for_a_metric_names_it(run):
    for metrics, error, text in [
        ({"loss": "0.5"}, TypeError, "the metric 'loss' is a number, got str '0.5'"),
        ({"loss": None}, TypeError, "the metric 'loss' is a number, got NoneType None"),
        ({"loss": torch.ones(3)}, ValueError, r"the metric 'loss' is a number, got Tensor tensor\("),
        ({"loss": np.ones(3)}, TypeError, "the metric 'loss' is a number, got ndarray"),
        ({"loss": 10**400}, ValueError, "the metric 'loss' is a number, got int 1000"),
        ({1: 0.5}, TypeError, "the name of a metric is a text, got 1"),
        ([("loss", 0.5)], TypeError, "metrics is a dict such as {'loss': 0.5}, got list"),
    ]:
        with pytest.raises(error, match=text):
            run.save(1, {"n": 1}, metrics=metrics)
    assert run.list() == []


def test_a_note_may_have_numbers_and_arrays_of_numpy_and_torch(run):
    note = {"step": np.int64(3), "lr": np.float32(0.5), "sizes": np.arange(2), "rank": torch.tensor(1), "t": (1, 2)}
    run.save(1, {"n": 1}, note=note).wait()
    assert run.list()[0].note == {"step": 3, "lr": 0.5, "sizes": [0, 1], "rank": 1, "t": [1, 2]}


# -- which ---------------------------------------------------------------------------------------------------------


def test_the_error_of_a_run_without_checkpoints_says_what_is_there_and_what_was_expected(tmp_path):
    name = write_checkpoint(LocalFolder(tmp_path / "runs/a"), 1)
    write_checkpoint(LocalFolder(tmp_path / "runs/b"), 1)
    LocalFolder(tmp_path / "other").put("checkpoint-5/model.bin", b"1")
    unfinished = write_checkpoint(LocalFolder(tmp_path / "unfinished"), 1, commit=False)
    cases = {
        "rnu7": "/rnu7: no complete checkpoint.*; there are no checkpoints.*: expected folders step-",
        "runs": "there are runs in folders below this URL: a, b",
        f"runs/a/{name}": f"this is the URL of a checkpoint; that of its run is {tmp_path}/runs/a",
        "other": r"only other objects, such as checkpoint-5/model\.bin; `tiercache ckpt ls",
        "unfinished": rf"only incomplete ones \(1\): the last, {unfinished}: it has no manifest",
    }
    for path, text in cases.items():
        for which in ("latest", "best:loss", 3):
            with pytest.raises(NotFound, match=text):
                Checkpoints(LocalFolder(tmp_path / path)).load(which)


def test_a_step_is_an_integer_of_any_library_and_other_arguments_are_refused_by_their_names(run):
    for step in (np.int64(5), torch.tensor(5), np.array(5), np.uint8(5)):
        run.save(step, {"n": 1}).wait()
        assert run.load(step) == run.load("5") == {"n": 1}
        assert run.dcp_writer(step).step == 5
    for step, error, text in (
        (1.0, TypeError, "step is an integer, got the float 1.0"),
        ("1", TypeError, "step is an integer, got the str '1'"),
        (-1, ValueError, "step is an integer from 0 to"),
    ):
        for begin in (lambda step=step: run.save(step, {"n": 1}), lambda step=step: run.dcp_writer(step)):
            with pytest.raises(error, match=text):
                begin()
    with pytest.raises(TypeError, match=r"note is a JSON value, .*: it contains a object"):
        run.save(1, {"n": 1}, note={"x": object()})
    with pytest.raises(ValueError, match=r"note is a JSON value, .*: Out of range"):
        run.save(1, {"n": 1}, note={"x": math.nan})
    with pytest.raises(TypeError, match=r"why is a text, such as 'the release of May', got the list \['a'\]"):
        run.pin("latest", ["a"])
    for which in (1.0, None, True, ["latest"]):
        with pytest.raises(TypeError, match="a checkpoint is 'latest', 'best:METRIC', a step or a name, got the"):
            run.load(which)


def test_the_error_for_a_misspelt_key_of_into_lists_the_keys_of_the_state(run):
    run.save(1, {"model": torch.nn.Linear(2, 2), "optim": {"lr": 1}}).wait()
    with pytest.raises(ValueError, match=r"missing in the checkpoint \(1\): modle\n.*state \(2\): model, optim"):
        run.load(into={"modle": torch.nn.Linear(2, 2)})
    with pytest.raises(TypeError, match="objects to fill are the argument into="):
        run.load({"model": torch.nn.Linear(2, 2)})
