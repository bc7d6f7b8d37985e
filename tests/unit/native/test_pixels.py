"""Adjustments of colours, against torchvision; tables, against numpy's indexing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from tiercache._native.pixels import BRIGHTNESS, CONTRAST, MAX_FACTOR, SATURATION, adjust, look_up, resize

EXPECTED = {
    BRIGHTNESS: functional.adjust_brightness,
    CONTRAST: functional.adjust_contrast,
    SATURATION: functional.adjust_saturation,
}


def make_planes(n: int, seed: int, spread: int = 256) -> np.ndarray:
    """Random colours, uint8[3, n]; a small spread makes them nearly grey."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 257 - spread, n)
    return (base + rng.integers(0, spread, (3, n))).astype(np.uint8)


def adjusted(planes: np.ndarray, *steps: tuple[int, float]) -> np.ndarray:
    found = planes.copy()
    adjust(found, steps)
    return found


def by_torchvision(planes: np.ndarray, *steps: tuple[int, float]) -> np.ndarray:
    image = torch.from_numpy(planes.copy()).reshape(3, 1, -1)
    for kind, factor in steps:
        image = EXPECTED[kind](image, factor)
    return image.reshape(3, -1).numpy()


@given(
    st.sampled_from([BRIGHTNESS, CONTRAST]),
    st.one_of(st.floats(0, 2), st.floats(0, MAX_FACTOR)),
    st.integers(1, 70),
    st.integers(0, 99),
    st.sampled_from([1, 20, 256]),
)
def test_brightness_and_contrast_are_those_of_torchvision_up_to_one_level(kind, factor, n, seed, spread):
    planes = make_planes(n, seed, spread)
    difference = np.abs(adjusted(planes, (kind, factor)).astype(int) - by_torchvision(planes, (kind, factor)))
    assert difference.max() <= 1


@given(st.one_of(st.floats(0, 2), st.floats(0, MAX_FACTOR)), st.integers(1, 70), st.integers(0, 99))
def test_the_saturation_is_that_of_torchvision_up_to_one_level_of_the_grey_value(factor, n, seed):
    planes = make_planes(n, seed)
    difference = np.abs(
        adjusted(planes, (SATURATION, factor)).astype(int) - by_torchvision(planes, (SATURATION, factor))
    )
    assert difference.max() <= 1 + math.ceil(abs(1 - factor))


@pytest.mark.parametrize("kind", EXPECTED)
def test_few_pixels_differ_from_torchvision(kind):
    planes = make_planes(20_000, 1)
    for factor in (0.6, 0.9, 1.3, 1.7, 3.0, 7.5):
        difference = np.abs(adjusted(planes, (kind, factor)).astype(int) - by_torchvision(planes, (kind, factor)))
        # Where a result is an integer, torchvision's float32 arithmetic may be rounded down to the one below it.
        assert difference.mean() < 0.1


def test_factors_of_zero_give_black_one_grey_and_grey_pixels_and_of_one_no_change():
    planes = make_planes(5000, 2)
    assert not adjusted(planes, (BRIGHTNESS, 0.0)).any()
    assert len(np.unique(adjusted(planes, (CONTRAST, 0.0)))) == 1
    for kind in EXPECTED:
        assert np.array_equal(adjusted(planes, (kind, 1.0)), planes)
    adjust(np.zeros((3, 0), np.uint8), [(CONTRAST, 0.5)])
    grey = adjusted(planes, (SATURATION, 0.0))
    assert np.array_equal(grey, by_torchvision(planes, (SATURATION, 0.0))[[0, 0, 0]]) or np.ptp(grey, axis=0).max() == 0


@pytest.mark.parametrize("order", list(itertools.permutations(EXPECTED)))
def test_steps_are_applied_in_their_order(order):
    planes, steps = make_planes(3000, 3), [(kind, 0.7 + 0.3 * kind) for kind in order]
    expected = planes
    for step in steps:
        expected = adjusted(expected, step)
    assert np.array_equal(adjusted(planes, *steps), expected)
    assert np.abs(expected.astype(int) - by_torchvision(planes, *steps)).max() <= 4


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ((2, 4), []),
        ((3, 4), [(3, 1.0)]),
        ((3, 4), [(-1, 1.0)]),
        ((3, 4), [(BRIGHTNESS, -0.1)]),
        ((3, 4), [(BRIGHTNESS, MAX_FACTOR + 0.01)]),
        ((3, 4), [(BRIGHTNESS, float("nan"))]),
        ((3, 4), [(BRIGHTNESS, 1.0)] * 4),
    ],
)
def test_adjustments_that_are_out_of_range_are_refused(shape, steps):
    with pytest.raises(ValueError, match="expected"):
        adjust(np.zeros(shape, np.uint8), steps)


@given(st.integers(0, 40), st.sampled_from([np.uint16, np.uint32]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_value_becomes_the_element_of_its_channels_table(n, dtype, is_planar, to_planar, seed):
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 2**16, (3, 256)).astype(dtype)
    planes = rng.integers(0, 256, (3, n)).astype(np.uint8)
    expected = np.stack([table[plane] for table, plane in zip(tables, planes, strict=True)])
    values = planes if is_planar else np.ascontiguousarray(planes.T)
    out = np.zeros((3, n) if to_planar else (n, 3), dtype)
    look_up(values.reshape(-1), is_planar, tables.view(np.uint8), out.reshape(-1).view(np.uint8), to_planar)
    assert np.array_equal(out if to_planar else out.T, expected)


@pytest.mark.parametrize(
    ("n_values", "table_shape", "n_bytes", "skip"),
    [
        (6, (3, 512), 11, 0),
        (7, (3, 512), 14, 0),
        (6, (2, 512), 12, 0),
        (6, (3, 256), 6, 0),
        (6, (3, 768), 18, 0),
        (6, (3, 500), 12, 0),
        (6, (3, 512), 12, 1),
    ],
)
def test_tables_and_memory_that_do_not_match_are_refused(n_values, table_shape, n_bytes, skip):
    out = np.zeros(n_bytes + 8, np.uint8)[skip : skip + n_bytes]
    with pytest.raises(ValueError, match="expected"):
        look_up(np.zeros(n_values, np.uint8), True, np.zeros(table_shape, np.uint8), out, True)


def whole(n: int, n_out: int) -> tuple[float, float, float, int, int]:
    return 0.0, n, max(n / n_out, 1), 0, n


@given(*[st.integers(1, 90)] * 4, st.integers(0, 99))
def test_a_resized_picture_is_that_of_torchvision_with_antialias_up_to_one_level(height, width, rows, columns, seed):
    wide = np.random.default_rng(seed).integers(0, 256, (height, width + 3, 3), np.uint8)
    image, found = wide[:, :width], np.empty((rows, columns, 3), np.uint8)
    resize(image, whole(height, rows), whole(width, columns), found)
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1)
    expected = functional.resize(planes, [rows, columns], antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("side", [3, 224, 3001])
@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_a_resized_picture_of_one_colour_keeps_it(side, level):
    found = np.empty((7, 64, 3), np.uint8)
    resize(np.full((side, side, 3), level, np.uint8), whole(side, 7), whole(side, 64), found)
    assert (found == level).all()


def test_the_filter_reads_no_pixel_outside_its_range():
    image = np.full((40, 40, 3), 255, np.uint8)
    image[10:30, 12:32] = 7
    found = np.empty((8, 8, 3), np.uint8)
    resize(image, (10, 20, 2.5, 10, 30), (12, 20, 2.5, 12, 32), found)
    assert (found == 7).all()


@pytest.mark.parametrize(
    "axis",
    [(0, 9, 1, 0, 9), (0, 8, 1, 8, 8), (0, 8, 1, -1, 8), (0, 8, 0, 0, 8), (float("nan"), 8, 1, 0, 8), (9, 8, 1, 0, 8)],
)
def test_a_resize_outside_of_the_picture_is_an_error(axis):
    image, found = np.zeros((8, 8, 3), np.uint8), np.empty((4, 4, 3), np.uint8)
    for rows, columns in ((axis, whole(8, 4)), (whole(8, 4), axis)):
        with pytest.raises(ValueError, match="expected"):
            resize(image, rows, columns, found)
    with pytest.raises(ValueError, match="three channels"):
        resize(image[:, ::2], whole(8, 4), whole(4, 4), found)
