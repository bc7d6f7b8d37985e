"""Metrics of checkpoints, from names and from small files."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.faults import Fault, FaultStore

from tiercache.errors import StoreError
from tiercache.store import MemoryStore
from tiercache.tier.checkpoint_names import metrics_in_name, metrics_in_names
from tiercache.tier.inventory import METRIC_FILES, parse_metrics, read_metrics


@pytest.fixture
def store(request):
    store = MemoryStore(request.node.name)
    yield store
    store.delete([info.key for info in store.list()])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epoch=1-step=100-val_loss=0.32.ckpt", {"val_loss": 0.32}),
        ("epoch=1-val_loss=1.9-acc=1.ckpt", {"val_loss": 1.9, "acc": 1.0}),
        ("sample-mnist-epoch02-val_loss0.32.ckpt", {"val_loss": 0.32}),
        ("step_5-val_loss-1.9", {"val_loss": 1.9}),
        ("step_5-val_loss--1.9", {"val_loss": -1.9}),
        ("epoch=2-val_loss=-1.9e-5-v1.ckpt", {"val_loss": -1.9e-5}),
        ("ckpt_epoch_3_val_loss_0.32.pt", {"val_loss": 0.32}),
        ("checkpoint-230500-loss-1.2531", {"loss": 1.2531}),
        ("R1@0.3=23.51-step=5.ckpt", {"R1@0.3": 23.51}),
        ("val_loss=nan-step=2.ckpt", {}),
        ("val_loss=inf-step=2.ckpt", {}),
        ("step-10.pt", {}),
        ("epoch=3-step=10", {}),
        ("global_step1000", {}),
        ("model-00001-of-00002.bin", {}),
    ],
)
def test_metrics_are_read_from_a_name(name, expected):
    assert metrics_in_name(name) == expected


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 10**9))
def test_a_formatted_metric_is_read_back(value, step):
    assert metrics_in_name(f"epoch=1-step={step}-val_loss={value!r}.ckpt") == {"val_loss": value}


def test_trainer_metrics_are_those_of_the_step_of_the_checkpoint():
    log = [
        {"epoch": 1.0, "step": 100, "loss": 2.5},
        {"epoch": 1.0, "step": 100, "eval_loss": 1.5, "eval_runtime": 3.0},
        {"epoch": 2.0, "step": 200, "eval_loss": 1.25},
        {"epoch": 2.0, "step": 200, "loss": 2.0, "total_flos": 1e18},
    ]
    body = {"best_metric": 0.5, "global_step": 200, "log_history": log}
    assert parse_metrics("trainer_state.json", json.dumps(body).encode()) == {"eval_loss": 1.25, "loss": 2.0}


def test_metrics_may_be_nested_in_a_table():
    body = {"step": 5, "metrics": {"val_loss": 1.5, "name": "x"}, "train": {"loss": 2}, "done": True}
    assert parse_metrics("metrics.json", json.dumps(body).encode()) == {"step": 5, "val_loss": 1.5, "train/loss": 2}


HUGE = b'{"a": NaN, "b": Infinity, "c": 1' + b"0" * 400 + b"}"


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff\xfe", HUGE, b"[" * 10**5])
@pytest.mark.parametrize("name", METRIC_FILES)
def test_a_file_with_other_content_has_no_metrics(name, data):
    assert parse_metrics(name, data) == {}


def test_metrics_json_has_precedence(store):
    found = [store.put(f"step-1/{name}", json.dumps({"val_loss": n}).encode()) for n, name in enumerate(METRIC_FILES)]
    assert METRIC_FILES[-1] == "metrics.json"
    assert read_metrics(store, found) == {"val_loss": len(found) - 1}


def test_the_file_in_the_outermost_folder_is_read(store):
    found = [
        store.put("step-1/part/metrics.json", b'{"val_loss": 1}'),
        store.put("step-1/metrics.json", b'{"val_loss": 2}'),
    ]
    assert read_metrics(store, found) == {"val_loss": 2}


def test_a_file_that_cannot_be_read_now_is_an_error(store):
    info = store.put("step-1/metrics.json", b'{"val_loss": 1}')
    with pytest.raises(StoreError, match="metrics"):
        read_metrics(FaultStore(store, [Fault("read_tail")]), [info])


NAMES = ("val_loss", "acc", "a1", "top1_acc", "é")
metrics = st.sampled_from([*NAMES, "a2", "a12", "top1_acc", "loss"])
signs = ["-", "_", "=", ".", "+", "\n", "²", "٣", "\\", "(", "*", "[", " ", "E-3", ".ckpt", ".pt", "x.y", "nan"]
numbers = st.sampled_from(
    ["0", "1", "25", "00", "1e5", "1e999", "nan", "-inf", "0.25", "-1.5", "+2.", "1.0e-3", "0.5E2"]
)
counters = st.sampled_from(["epoch=0", "step-25", "global_step7", "v1", "iteration_12", "ckpt3"])
pieces = (
    st.tuples(metrics, st.sampled_from(["=", "-", "_", ""]), numbers).map("".join)
    | counters
    | st.sampled_from(signs)
    | numbers
)
names = st.tuples(st.lists(pieces, max_size=5), st.sampled_from(["-", "_", ""])).map(lambda two: two[1].join(two[0]))


def plain(texts: list[str]) -> dict[str, list[float]]:
    return {name: [metrics_in_name(text).get(name, np.nan) for text in texts] for name in NAMES}


@given(st.lists(names, max_size=6), st.integers(1, 12))
def test_many_names_have_the_metrics_that_each_name_has(texts, times):
    texts = [text for text in texts for _ in range(times)]
    found = metrics_in_names(pa.array(texts, pa.large_string()), NAMES)
    for name, values in plain(texts).items():
        assert np.array_equal(found[name], values, equal_nan=True)


digits = st.text("0123456789", min_size=1, max_size=25)


@given(st.lists(names.map(lambda text: text or "x"), max_size=3), st.data())
def test_names_that_differ_only_in_digits_have_their_own_metrics(texts, data):
    filled = ["".join(data.draw(digits) if c == "0" else c for c in text) for text in texts for _ in range(9)]
    found = metrics_in_names(pa.array(filled, pa.large_string()), NAMES)
    for name, values in plain(filled).items():
        assert np.array_equal(found[name], values, equal_nan=True)
