"""Names that are alike but for their digits say together what each of them says alone."""

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.tier.inventory import layouts
from tiercache.tier.inventory.layouts import Layout, recognise_layout
from tiercache.tier.text_columns import MOST_DIGITS, NameTemplates

DIGITS = re.compile("[0-9]+")

texts = st.lists(st.text("019ae/é٣²-", max_size=8) | st.text("01", min_size=17, max_size=20), max_size=10)


@given(texts, st.integers(0, 2))
def test_shapes_have_one_zero_for_each_run_of_digits(some, skipped):
    alike = NameTemplates.of(pa.array(some, pa.large_string()).slice(skipped))
    some = some[skipped:]
    assert [alike.shapes[number].as_py() for number in alike.shape.tolist()] == [DIGITS.sub("0", text) for text in some]
    assert len(set(alike.shapes.to_pylist())) == len(alike.shapes)
    assert alike.is_long.tolist() == [any(len(run) > MOST_DIGITS for run in DIGITS.findall(text)) for text in some]


@given(texts, st.data())
def test_a_number_is_what_stands_in_its_run(some, data):
    alike = NameTemplates.of(pa.array(some, pa.large_string()))
    runs = [DIGITS.findall(text) for text in some]
    rows = [i for i, of in enumerate(runs) if of and not alike.is_long[i]]
    chosen = [data.draw(st.integers(1, len(runs[row]))) for row in rows]
    found = alike.number(np.array(rows, np.int64), np.array(chosen, np.int64))
    assert found.tolist() == [int(runs[row][run - 1]) for row, run in zip(rows, chosen, strict=True)]


# -- checkpoints -----------------------------------------------------------------------------------------------------

PIECES = (
    *("epoch", "step", "global_step", "Iter", "ckpt", "v", "=", "-", "_", ".", "-step=", "_epoch_", "-v0"),
    *("gpt0-", "net", "-loss=0.0", "_acc0.0e-0", "-top0=0", "-loss=nan", "e", "/", "runs/a0/", "é", "\n", ".h0"),
    *(".pt", ".ckpt", ".tar", ".safetensors", ".metadata", "0", "00"),
)
templates = st.lists(st.sampled_from(PIECES), min_size=2, max_size=6).map("".join) | st.sampled_from(
    [
        "runs/run-0/epoch=0-step=0-val_loss=0.0.ckpt",
        "runs/gpt0/gpt0-step0-v0.pt",
        "a0/step_0.pt",
        "epoch_0.pt",
        "a0/epoch=0-step_0-loss0.0.ckpt",
    ]
)
digits = st.text("0123456789", min_size=1, max_size=3) | st.sampled_from(["0" * 18, "1" * 19, "7" * 25, "1" * 18])


@pytest.mark.parametrize("few", [1, 3])
def test_checkpoints_are_known_by_names_that_are_alike_as_by_each(monkeypatch, few):
    @given(st.lists(templates, max_size=4), st.data())
    def check(some, data):
        filled = {"".join(data.draw(digits) if c == "0" else c for c in text) for text in some for _ in range(4)}
        keys = pa.array(sorted(filled), pa.large_string())
        found = {}
        for least in (few, 1 << 30):
            with monkeypatch.context() as patch:
                patch.setattr(layouts, "_FEW", least)
                found[least] = recognise_layout(keys)
        for name in Layout.__slots__:
            together, alone = (getattr(one, name) for one in found.values())
            equal = together.equals(alone) if name == "paths" else np.array_equal(together, alone)
            assert equal, name

    check()


def test_one_run_is_one_series_whether_its_names_are_read_together_or_not(monkeypatch):
    monkeypatch.setattr(layouts, "_FEW", 3)
    keys = ["a/step=1.pt", "a/step=2.pt", "a/step=30.pt", "a/step=30-v1.pt", f"a/step=4-v{'1' * 20}.pt", "b/step=1.pt"]
    found = recognise_layout(pa.array(sorted(keys), pa.large_string()))
    of = dict(zip(found.paths.to_pylist(), found.series.tolist(), strict=True))
    assert {of[key] for key in keys[:5]} == {of["a/step=1.pt"]}
    assert of["b/step=1.pt"] != of["a/step=1.pt"]
