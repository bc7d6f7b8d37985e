"""The planner of crops, against torchvision and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2

from tiercache.images.decode_image import N_DRAWS, DecodeImage, draw_key, fresh_draws, keyed_draws, plan_crop

GOLDEN = [0.4238178365345855, 0.6353276264334768, 0.060577275508620576]  # of seed 1, epoch 2, position 3
SIDES = st.integers(1, 3000)
DRAWS = st.lists(st.floats(0, 1, exclude_max=True), min_size=N_DRAWS, max_size=N_DRAWS)
SPANS = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair)))
OPTIONS = st.one_of(
    st.builds(DecodeImage, st.tuples(st.integers(1, 500), st.integers(1, 500)), flip=st.booleans()),
    st.builds(DecodeImage, st.integers(1, 256), resize=st.integers(256, 600)),
    st.builds(DecodeImage, st.integers(1, 500), crop=st.just("random"), scale=SPANS, ratio=SPANS),
    st.just(DecodeImage(None, flip=True)),
)


@given(SIDES, SIDES, OPTIONS, DRAWS)
def test_a_crop_lies_inside_its_image_at_every_reduction(height, width, options, draws):
    plan = plan_crop(height, width, options, draws)
    # The centre's edges are fractions of pixels: they are right to within rounding.
    assert plan.top >= -1e-6
    assert plan.left >= -1e-6
    assert plan.top + plan.height <= height + 1e-6
    assert plan.left + plan.width <= width + 1e-6
    if options.size is not None:
        assert (plan.out_height, plan.out_width) == options.shape
    sizes = plan.out_height, plan.out_width
    for dct in ("accurate", "fast"):
        reduction = plan.reduction(dct)
        decoded = (-(-height // reduction), -(-width // reduction))
        for axis, n_decoded, n_out in zip(plan.axes(decoded, reduction), decoded, sizes, strict=True):
            assert 0 <= axis.first < axis.stop <= n_decoded
            assert axis.first - 1e-6 <= axis.start
            assert axis.start + axis.length <= n_decoded + 1e-6
            if reduction > 1:
                assert axis.length >= n_out * (2 if dct == "accurate" else 1)


@given(SIDES, SIDES, st.integers(1, 300), st.integers(0, 200))
def test_the_center_crop_is_that_of_torchvision(height, width, size, more):
    plan = plan_crop(height, width, DecodeImage(size, resize=size + more), ())
    short, long = min(height, width), max(height, width)
    full = (size + more, int((size + more) * long / short))
    full_height, full_width = full if height <= width else full[::-1]
    top, left = round((full_height - size) / 2.0), round((full_width - size) / 2.0)
    scaled = (plan.top * full_height / height, plan.left * full_width / width)
    assert scaled == pytest.approx((top, left), abs=1e-6)
    extent = (plan.height * full_height / height, plan.width * full_width / width)
    assert extent == pytest.approx((size, size), abs=1e-6)


@pytest.mark.parametrize(
    ("size", "scale"), [((375, 500), (0.08, 1.0)), ((100, 900), (0.5, 0.6)), ((40, 40), (0.08, 1.0))]
)
def test_random_crops_have_the_areas_shapes_and_places_of_torchvision(size, scale):
    n = 1500
    options = DecodeImage(224, crop="random", scale=scale)
    ours = np.array(
        [
            (plan.height * plan.width, plan.width / plan.height, plan.top, plan.left)
            for plan in (plan_crop(*size, options, d) for d in keyed_draws(draw_key(7, 0), [(0, n)]).tolist())
        ]
    )
    torch.manual_seed(5)
    transform, empty = v2.RandomResizedCrop(224, scale=scale), [torch.empty(3, *size)]
    theirs = [transform.make_params(empty) for _ in range(n)]
    expected = np.array([(p["height"] * p["width"], p["width"] / p["height"], p["top"], p["left"]) for p in theirs])
    for number in range(4):
        assert stats.ks_2samp(ours[:, number], expected[:, number]).pvalue > 1e-4


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**40), st.integers(1, 40), st.integers(0, 40))
def test_random_numbers_of_a_position_do_not_depend_on_its_neighbours(key, start, n, cut):
    cut = min(cut, n)
    whole = keyed_draws(key, [(start, start + n)])
    assert whole.shape == (n, N_DRAWS)
    assert ((whole >= 0) & (whole < 1)).all()
    pieces = [run for run in ((start, start + cut), (start + cut, start + n)) if run[0] < run[1]]
    assert np.array_equal(whole, keyed_draws(key, pieces))


def test_random_numbers_of_a_run_never_change():
    draws = keyed_draws(draw_key(1, 2), [(3, 4)])[0]
    assert draws[:3].tolist() == GOLDEN


def test_about_half_of_the_images_are_mirrored():
    draws = keyed_draws(draw_key(0, 0), [(0, 4000)]).tolist()
    flips = [plan_crop(10, 10, DecodeImage(8, flip=True), d).flip for d in draws]
    assert 0.45 < np.mean(flips) < 0.55
    assert not any(plan_crop(10, 10, DecodeImage(8), d).flip for d in draws[:50])


def test_a_record_read_by_index_draws_from_torchs_generator():
    torch.manual_seed(3)
    first = fresh_draws(2)
    torch.manual_seed(3)
    assert np.array_equal(first, fresh_draws(2))
    assert first.shape == (2, N_DRAWS)


def test_without_torch_numpys_global_generator_is_drawn_from(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "torch")
    np.random.seed(3)
    first = fresh_draws(2)
    np.random.seed(3)
    assert np.array_equal(first, fresh_draws(2))
