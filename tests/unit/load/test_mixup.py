"""MixUp and CutMix, against torchvision for the same draws."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

import tiercache as tc
from tiercache.transform_rng import rng, use_key

N_CLASSES = 5


def make_batch(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (n, 3, 12, 17), generator=generator)
    images = values.to(torch.uint8) if dtype == torch.uint8 else (values / 255).to(dtype)
    labels = torch.randint(0, N_CLASSES, (n,), generator=generator)
    return {"image": images, "label": labels, "id": list(range(n))}


def mixed(mixing: Any, batch: dict[str, Any], position: int = 0) -> dict[str, Any]:
    copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with use_key(1, 2, position):
        return mixing(copied)


def share_of(alpha: float, position: int = 0) -> float:
    with use_key(1, 2, position):
        return float(rng().numpy.beta(alpha, alpha))


class _Given(v2.MixUp):
    """torchvision's MixUp with a given share."""

    def __init__(self, share: float) -> None:
        super().__init__(num_classes=N_CLASSES)
        self.share = share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"lam": self.share}


class _GivenBox(v2.CutMix):
    """torchvision's CutMix with its own arithmetic over given draws."""

    def __init__(self, alpha: float, position: int) -> None:
        super().__init__(num_classes=N_CLASSES)
        self.given = alpha, position

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        alpha, position = self.given
        height, width = flat_inputs[0].shape[-2:]
        with use_key(1, 2, position):
            draw = rng().numpy
            share = draw.beta(alpha, alpha)
            x, y = draw.integers(width), draw.integers(height)
        half = 0.5 * np.sqrt(1.0 - share)
        x1, x2 = max(x - int(half * width), 0), min(x + int(half * width), width)
        y1, y2 = max(y - int(half * height), 0), min(y + int(half * height), height)
        return {"box": (x1, y1, x2, y2), "lam_adjusted": 1.0 - (x2 - x1) * (y2 - y1) / (width * height)}


@given(st.integers(1, 9), st.sampled_from([0.2, 1.0, 5.0]), st.integers(0, 50))
def test_mixup_equals_torchvisions_for_the_same_share(n, alpha, position):
    batch = make_batch(n, seed=position)
    found = mixed(tc.MixUp(alpha, N_CLASSES), batch, position)
    images, labels = _Given(share_of(alpha, position))(batch["image"], batch["label"])
    torch.testing.assert_close(found["image"], images)
    torch.testing.assert_close(found["label"], labels)
    assert found["id"] == batch["id"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixup_of_halves_equals_torchvisions_within_their_rounding(dtype):
    batch = make_batch(6, dtype)
    found = mixed(tc.MixUp(1.0, N_CLASSES), batch)["image"]
    expected, _ = _Given(share_of(1.0))(batch["image"], batch["label"])
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=2 * torch.finfo(dtype).eps, rtol=0)


def test_mixup_of_uint8_is_that_of_floats_rounded():
    batch = make_batch(6, torch.uint8)
    found = mixed(tc.MixUp(1.0, N_CLASSES), batch)["image"]
    expected, _ = _Given(share_of(1.0))(batch["image"].float(), batch["label"])
    assert found.dtype == torch.uint8
    assert (found.float() - expected).abs().max() <= 0.5 + 1e-3


@given(
    st.integers(1, 9),
    st.sampled_from([0.2, 1.0, 5.0]),
    st.integers(0, 50),
    st.sampled_from([torch.uint8, torch.float16, torch.float32]),
    st.sampled_from(["CHW", "HWC", "channels_last"]),
)
def test_cutmix_equals_torchvisions_for_the_same_box(n, alpha, position, dtype, layout):
    batch = make_batch(n, dtype, seed=position)
    images, labels = _GivenBox(alpha, position)(batch["image"], batch["label"])
    if layout != "CHW":
        batch["image"] = batch["image"].movedim(1, 3).contiguous()
    if layout == "channels_last":
        batch["image"] = batch["image"].movedim(3, 1)
    found = mixed(tc.CutMix(alpha, N_CLASSES), batch, position)
    shown = found["image"].movedim(3, 1) if layout == "HWC" else found["image"]
    assert torch.equal(shown, images)
    torch.testing.assert_close(found["label"], labels)


@pytest.mark.parametrize("mixing", [tc.MixUp(1.0, N_CLASSES), tc.CutMix(1.0, N_CLASSES)])
def test_a_mix_is_a_function_of_the_key_and_lies_in_the_memory_of_the_batch(mixing):
    batch = make_batch(8)
    first, again, other = (mixed(mixing, batch, position)["image"] for position in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    address = batch["image"].data_ptr()
    with use_key(0, 0, 0):
        assert mixing(batch)["image"].data_ptr() == address
    assert batch["label"].dtype == torch.int64  # the given dict is not changed


@pytest.mark.parametrize("mixing", [tc.MixUp, tc.CutMix])
def test_labels_that_are_probabilities_are_mixed_as_they_are(mixing):
    batch = make_batch(6)
    once = mixed(mixing(1.0, N_CLASSES), batch)["label"]
    batch["label"] = torch.nn.functional.one_hot(batch["label"], N_CLASSES).float()
    assert torch.equal(mixed(mixing(), batch)["label"], once)
    torch.testing.assert_close(once.sum(1), torch.ones(6))


@pytest.mark.parametrize("mixing", [tc.MixUp, tc.CutMix])
def test_the_columns_may_have_other_names_and_settings_survive_pickling(mixing):
    batch = make_batch(4)
    renamed = {"picture": batch["image"], "class": batch["label"]}
    other = pickle.loads(pickle.dumps(mixing(1.0, N_CLASSES, image="picture", label="class")))
    found, expected = mixed(other, renamed), mixed(mixing(1.0, N_CLASSES), batch)
    assert torch.equal(found["picture"], expected["image"])
    assert torch.equal(found["class"], expected["label"])


@pytest.mark.parametrize("mixing", [tc.MixUp, tc.CutMix])
def test_a_batch_that_cannot_be_mixed_is_an_error_that_says_why(mixing):
    for change, error, told in (
        ({"image": [torch.zeros(3, 4, 4)]}, TypeError, "images of one size.*a list"),
        ({"image": torch.zeros(6, 4)}, TypeError, r"images of one size.*\[6, 4\]"),
        ({"label": torch.tensor([0, 1, 2, 3, 4, 5])}, ValueError, "class numbers must be 0 to 4.*got 0 to 5"),
        ({"label": torch.tensor([0, 1, -1, 3, 4, 0])}, ValueError, "got -1 to 4"),
        ({"label": torch.zeros(6)}, ValueError, "class numbers.*float32"),
        ({"label": torch.zeros(6, 4)}, ValueError, "labels have 4 classes, and n_classes is 5"),
        ({"label": torch.zeros(5, dtype=torch.int64)}, ValueError, "got 5 for 6"),
        ({"label": ["a"] * 6}, TypeError, "labels as a tensor"),
    ):
        with pytest.raises(error, match=f"(?s){told}"):
            mixed(mixing(1.0, N_CLASSES), make_batch(6) | change)
    with pytest.raises(KeyError, match="no column 'label', only image"):
        mixed(mixing(1.0, N_CLASSES), {"image": make_batch(2)["image"]})
    for wrong in ({"alpha": 0}, {"alpha": "1"}, {"n_classes": 0}, {"n_classes": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mixing(**wrong)
    if mixing is tc.MixUp:
        with pytest.raises(TypeError, match=r"uint8 and float images, got torch\.int32"):
            mixed(tc.MixUp(1.0, N_CLASSES), make_batch(2) | {"image": torch.zeros(2, 3, 4, 4, dtype=torch.int32)})


@pytest.mark.parametrize("mixing", [tc.MixUp, tc.CutMix])
def test_outside_of_a_transform_there_are_no_draws(mixing):
    with pytest.raises(RuntimeError, match="outside of a transform"):
        mixing(1.0, N_CLASSES)(make_batch(2))
