"""Metrics of many names at once are those of each name."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.tier.checkpoint_names import metrics_in_name, metrics_in_names

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


@pytest.mark.parametrize("n", [1, 100])
def test_a_slice_of_names_has_the_metrics_of_its_names(n):
    texts = [f"epoch={i}-val_loss={i / 8}.ckpt" for i in range(n + 2)]
    found = metrics_in_names(pa.array(texts, pa.large_string()).slice(1, n), ["val_loss"])
    assert found["val_loss"].tolist() == [i / 8 for i in range(1, n + 1)]
