"""Scores of Lightning's ModelCheckpoint: read from the pickle in a checkpoint, which is never executed."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.faults import Fault, FaultStore

from tiercache.errors import StoreError
from tiercache.store import MemoryStore
from tiercache.tier.inventory.metrics import read_scores

NAME = "epoch=1-step=8.ckpt"


def saved(body: object) -> bytes:
    file = io.BytesIO()
    torch.save(body, file)
    return file.getvalue()


def callback(monitor: str | None, scores: dict[str, object], **more: object) -> dict[str, object]:
    """The state of a ModelCheckpoint, as Lightning 2.6 writes it."""
    best = min(scores, key=scores.get, default="")
    return {
        "monitor": monitor,
        "best_model_score": scores.get(best),
        "best_model_path": best,
        "current_score": next(reversed(scores.values()), None),
        "dirpath": "/runs/a",
        "best_k_models": scores,
        "kth_best_model_path": best,
        "kth_value": scores.get(best),
        "last_model_path": "",
        **more,
    }


def checkpoint(*callbacks: dict[str, object], n_weights: int = 16) -> dict[str, object]:
    """A checkpoint with the keys of Lightning's, in their order."""
    weights = OrderedDict((f"layers.{i}.weight", torch.randn(n_weights)) for i in range(4))
    weights["tied.weight"] = weights["layers.0.weight"]
    return {
        "epoch": 1,
        "global_step": 8,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2}}}},
        "callbacks": {f"ModelCheckpoint{{'monitor': {one['monitor']!r}}}": one for one in callbacks},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
    }


@pytest.fixture
def scores_in(request):
    store = MemoryStore(request.node.name)

    def read(data: bytes, name: str = NAME) -> dict[str, float]:
        store.put("x", data)
        return dict(read_scores(store, "x", len(data), name))

    read.store = store
    yield read
    store.delete(["x"])


@pytest.mark.parametrize(
    "score",
    [
        0.25,
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.float64),
        torch.tensor(0.25, dtype=torch.float16),
        torch.tensor(0.25, dtype=torch.bfloat16),
        torch.tensor([9.0, 0.25])[1],
    ],
    ids=["number", "float32", "float64", "float16", "bfloat16", "part of a tensor"],
)
def test_the_score_of_a_checkpoint_is_found_by_its_own_name(scores_in, score):
    scores = {"/runs/a/epoch=0-step=4.ckpt": torch.tensor(0.5), f"/runs/a/{NAME}": score}
    assert scores_in(saved(checkpoint(callback("val_loss", scores)))) == {"val_loss": 0.25}


def test_an_integer_tensor_is_a_score(scores_in):
    scores = {f"gs://b/{NAME}": torch.tensor(3)}
    assert scores_in(saved(checkpoint(callback("n_wrong", scores)))) == {"n_wrong": 3.0}


def test_each_callback_has_its_own_metric(scores_in):
    scores = {f"C:\\runs\\{NAME}": torch.tensor(0.25)}
    data = saved(checkpoint(callback("val_loss", scores), callback("val/acc", scores), callback(None, scores)))
    assert scores_in(data) == {"val_loss": 0.25, "val/acc": 0.25}


def test_the_score_of_another_checkpoint_is_ignored(scores_in):
    """current_score is that of the last one that this callback saved: another callback may have saved since."""
    scores = {"/runs/a/epoch=0-step=4.ckpt": torch.tensor(0.5)}
    data = saved(checkpoint(callback("val_loss", scores, current_score=torch.tensor(0.5))))
    assert scores_in(data) == {}


@pytest.mark.parametrize("score", [float("inf"), torch.tensor(float("nan")), None, "0.5", True, torch.tensor([])])
def test_values_that_are_no_numbers_are_ignored(scores_in, score):
    assert scores_in(saved(checkpoint(callback("val_loss", {NAME: score})))) == {}


class Touch:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_the_pickle_is_not_executed(scores_in, tmp_path):
    body = checkpoint(callback("val_loss", {NAME: torch.tensor(0.25)})) | {"hyper_parameters": Touch(tmp_path / "ran")}
    data = saved(body)
    assert scores_in(data) == {"val_loss": 0.25}
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(data), weights_only=False)  # it would have run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_any_pickle_protocol_is_read(scores_in, protocol):
    body = checkpoint(callback("val_loss", {NAME: 0.25}), callback("acc", {}))
    body["state_dict"] = {"n": 1 << 70, "set": {1}, "bytes": b"x", "frozen": frozenset([2]), "list": [1, [2], (3,)]}
    body["optimizer_states"] = [complex(1, 2), range(3)]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as records:
        records.writestr("archive/data.pkl", pickle.dumps(body, protocol))
    assert scores_in(file.getvalue()) == {"val_loss": 0.25}


def test_only_little_of_a_large_checkpoint_is_read(scores_in):
    data = saved(checkpoint(callback("val_loss", {NAME: torch.tensor(0.25)}), n_weights=2_000_000))
    scores_in.store.put("x", data)
    before = scores_in.store.counters.snapshot()["bytes_read"]
    assert read_scores(scores_in.store, "x", len(data), NAME) == {"val_loss": 0.25}
    assert len(data) > 32_000_000
    assert scores_in.store.counters.snapshot()["bytes_read"] - before < 2_000_000


def test_a_store_that_fails_is_an_error(scores_in):
    data = saved(checkpoint())
    scores_in.store.put("x", data)
    with pytest.raises(StoreError):
        read_scores(FaultStore(scores_in.store, [Fault("read_into")]), "x", len(data), NAME)


@pytest.mark.parametrize("name", ["other/data.txt", "archive/data.pkl"])
def test_another_zip_file_has_no_scores(scores_in, name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as records:
        records.writestr(name, b"x" * 100)
    assert scores_in(file.getvalue()) == {}


def test_a_pickle_that_is_too_large_is_not_read(scores_in, monkeypatch):
    monkeypatch.setattr("tiercache.tier.inventory.metrics._MAX_PICKLE_BYTES", 100)
    assert scores_in(saved(checkpoint(callback("val_loss", {NAME: 0.25})))) == {}


GOOD = saved(checkpoint(callback("val_loss", {NAME: torch.tensor(0.25)})))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_a_damaged_checkpoint_has_a_score_or_none(scores_in, data):
    changed = bytearray(GOOD[: data.draw(st.integers(0, len(GOOD)) | st.just(len(GOOD)))])
    for _ in range(data.draw(st.integers(0, 4)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    found = scores_in(bytes(changed))
    assert all(isinstance(value, float) and value == value for value in found.values())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.binary(max_size=60))
def test_any_pickle_has_a_score_or_none(scores_in, data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as records:
        records.writestr("archive/data.pkl", data)
    assert scores_in(file.getvalue()) == {}
