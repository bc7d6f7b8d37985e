"""Colour jitter, normalisation and the memory format channels_last: against torchvision, for the same parameters."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from tests.support.pictures import encode, picture
from torchvision.transforms.v2 import functional

from tiercache._native.pixels import BRIGHTNESS, CONTRAST, SATURATION
from tiercache.images.decode_image import (
    N_COLOUR_DRAWS,
    N_DRAWS,
    DecodeImage,
    ImageDraws,
    draw_key,
    keyed_draws,
    plan_colours,
)
from tiercache.images.decoder import Decoder, in_layout

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER: dict[str, Any] = {"brightness": 0.4, "contrast": (0.5, 1.7), "saturation": 0.6}
GOLDEN = [0.8345808854878205, 0.08029011678934184]  # of the colours of seed 1, epoch 2, position 3
DRAWS = st.lists(
    st.floats(0, 1, exclude_max=True), min_size=N_DRAWS + N_COLOUR_DRAWS, max_size=N_DRAWS + N_COLOUR_DRAWS
)
APPLY = {
    BRIGHTNESS: functional.adjust_brightness,
    CONTRAST: functional.adjust_contrast,
    SATURATION: functional.adjust_saturation,
}


def plain_options(**changes: Any) -> DecodeImage:
    return DecodeImage((24, 32), crop="random", flip=True, **changes)


def decoded(data: bytes, options: DecodeImage, draws: Any = ()) -> torch.Tensor:
    """The picture in its layout; bfloat16 as a tensor of that dtype."""
    stored = torch.from_numpy(Decoder(options).decode(data, draws))
    return in_layout(stored.view(getattr(torch, options.dtype)), options)


@given(DRAWS, st.integers(0, 3), st.sampled_from(["CHW", "HWC", "channels_last"]))
def test_jitter_equals_torchvisions_adjustments_in_the_order_that_was_drawn(draws, seed, layout):
    data = encode(picture(60, 80, seed), "png")
    found = decoded(data, plain_options(layout=layout, **JITTER), draws)
    expected = decoded(data, plain_options(), draws)
    steps = plan_colours(plain_options(**JITTER), draws)
    assert sorted(kind for kind, _ in steps) == [BRIGHTNESS, CONTRAST, SATURATION]
    for kind, factor in steps:
        expected = APPLY[kind](expected, factor)
    shown = found.movedim(2, 0) if layout == "HWC" else found
    difference = (shown.int() - expected.int()).abs()
    assert difference.max() <= 6  # levels by which steps differ are amplified by the steps after them
    assert difference.float().mean() < 1


@given(DRAWS)
def test_factors_are_uniform_in_their_ranges_and_an_unchanged_one_is_left_out(draws):
    options = plain_options(brightness=0.4, saturation=(0.2, 3.0))
    factors = dict(plan_colours(options, draws))
    assert factors[BRIGHTNESS] == pytest.approx(0.6 + 0.8 * draws[N_DRAWS])
    assert factors[SATURATION] == pytest.approx(0.2 + 2.8 * draws[N_DRAWS + 2])
    assert CONTRAST not in factors


def test_every_order_of_adjustments_is_as_likely():
    draws = ImageDraws(1, 0, [plain_options(**JITTER)]).of(np.arange(3000))
    orders = [tuple(kind for kind, _ in plan_colours(plain_options(**JITTER), drawn)) for drawn in draws]
    counts = [orders.count(order) for order in itertools.permutations([BRIGHTNESS, CONTRAST, SATURATION])]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_without_ranges_no_colour_is_adjusted():
    assert plan_colours(plain_options(), ()) == ()
    assert not DecodeImage(8).is_random
    assert DecodeImage(8, contrast=0.1).is_random


def test_crops_do_not_depend_on_whether_colours_are_adjusted():
    positions = np.array([3, 4, 5, 90, 91, 7])
    plain = ImageDraws(1, 2, [plain_options()]).of(positions)
    jittered = ImageDraws(1, 2, [plain_options(), plain_options(**JITTER)]).of(positions)
    assert [drawn[:N_DRAWS] for drawn in jittered] == plain
    assert np.array_equal(plain[:3], keyed_draws(draw_key(1, 2), [(3, 6)]))
    assert ImageDraws(1, 2, [DecodeImage(8)]).of(positions) == [()] * 6


def test_random_numbers_of_colours_never_change():
    drawn = ImageDraws(1, 2, [plain_options(**JITTER)]).of(np.array([3]))[0][N_DRAWS:]
    assert drawn[:2] == GOLDEN


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_stored_picture_is_adjusted_and_normalised_after_it_became_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30)
    else:
        image = picture(40, 50).convert(mode)
    data, draws = encode(image, "tiff"), [0.3] * (N_DRAWS + N_COLOUR_DRAWS)
    plain = decoded(data, plain_options(), draws)
    for kind, factor in plan_colours(plain_options(**JITTER), draws):
        plain = APPLY[kind](plain, factor)
    found = decoded(data, plain_options(**JITTER, dtype="float32", mean=MEAN, std=STD), draws)
    expected = functional.normalize(functional.to_dtype(plain, torch.float32, scale=True), MEAN, STD)
    assert (found - expected).abs().max() <= 4 / 255 / min(STD) + 1e-5


@pytest.mark.parametrize("layout", ["CHW", "HWC", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "mean_std"), [("float32", (MEAN, STD)), ("float16", (0.5, 0.5)), ("bfloat16", (0, 1))]
)
def test_normalised_values_are_torchvisions_rounded_once(dtype, layout, mean_std):
    mean, std = mean_std
    data = encode(picture(50, 70))
    plain = decoded(data, DecodeImage(32))
    found = decoded(data, DecodeImage(32, layout=layout, dtype=dtype, mean=mean, std=std))
    triples = [list(v) if isinstance(v, tuple) else [v] * 3 for v in (mean, std)]
    scaled = functional.to_dtype(plain, torch.float32, scale=True)
    expected = functional.normalize(scaled, *triples).to(getattr(torch, dtype))
    shown = found.movedim(2, 0) if layout == "HWC" else found
    assert torch.equal(shown, expected)


@pytest.mark.parametrize(("dtype", "size"), [("uint8", (24, 32)), ("float32", None), ("bfloat16", (24, 32))])
def test_channels_last_is_the_usual_shape_over_the_memory_of_hwc(dtype, size):
    data = encode(picture(50, 70))
    found = decoded(data, DecodeImage(size, dtype=dtype, layout="channels_last"))
    assert found[None].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, decoded(data, DecodeImage(size, dtype=dtype)))


@pytest.mark.parametrize(("dtype", "layout"), [("uint8", "CHW"), ("float32", "HWC"), ("uint8", "channels_last")])
def test_whole_pictures_of_any_size_are_adjusted_and_normalised_too(dtype, layout):
    how = {"dtype": dtype, "layout": layout} | ({} if dtype == "uint8" else {"mean": MEAN, "std": STD})
    decoder, draws = Decoder(DecodeImage(None, **JITTER, **how)), [0.6] * (N_DRAWS + N_COLOUR_DRAWS)
    for size in ((40, 30), (11, 70), (1, 1)):
        data = encode(picture(*size), "png")
        expected = decoded(data, DecodeImage(None))
        for kind, factor in plan_colours(DecodeImage(None, **JITTER), draws):
            expected = APPLY[kind](expected, factor)
        if dtype == "float32":
            expected = functional.normalize(functional.to_dtype(expected, torch.float32, scale=True), MEAN, STD)
        found = in_layout(torch.from_numpy(decoder.decode(data, draws)), DecodeImage(None, **how))
        shown = found.movedim(2, 0) if layout == "HWC" else found
        limit = 6 if dtype == "uint8" else 6 / 255 / min(STD) + 1e-5
        assert (shown.float() - expected.float()).abs().max() <= limit
