"""EXIF orientations, against Pillow's exif_transpose."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.support.pictures import encode, picture

from tiercache.images.decode_image import N_DRAWS, DecodeImage
from tiercache.images.decoder import DecodeError, Decoder, jpeg_orientation

ORIENTATIONS = range(1, 9)
FORMATS = ("jpeg", "png", "webp")


def with_orientation(image: Image.Image, orientation: int, how: str = "jpeg", **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, how, exif=exif, **options)


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What Pillow shows of a stored picture."""
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def decoded(data: bytes, draws: Any = (), **options: Any) -> np.ndarray:
    return Decoder(DecodeImage(**{"layout": "HWC", "apply_exif_orientation": True} | options)).decode(data, draws)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("how", FORMATS)
def test_a_whole_picture_is_turned_as_by_pillow(how, orientation):
    data = with_orientation(picture(37, 53), orientation, how)
    stored = decoded(data, size=None, apply_exif_orientation=False)
    assert np.array_equal(decoded(data, size=None), turned(stored, orientation))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("how", ["tiff", "cmyk jpeg"])
def test_a_picture_that_pillow_reads_is_turned_once(how, orientation):
    image = picture(20, 30).convert("CMYK") if how == "cmyk jpeg" else picture(20, 30)
    data = with_orientation(image, orientation, how.split()[-1])
    expected = np.asarray(ImageOps.exif_transpose(Image.open(__import__("io").BytesIO(data))).convert("RGB"))
    assert np.array_equal(decoded(data, size=None), expected)


@pytest.mark.parametrize(("layout", "dtype"), [("CHW", "uint8"), ("HWC", "float16"), ("channels_last", "uint8")])
def test_a_crop_is_that_of_the_turned_picture(layout, dtype):
    image = picture(60, 90)
    options = {"size": (20, 28), "resize": 40, "layout": layout, "dtype": dtype}
    for orientation in ORIENTATIONS:
        found = decoded(with_orientation(image, orientation, "png"), **options)
        expected = decoded(encode(Image.fromarray(turned(np.asarray(image), orientation)), "png"), **options)
        assert found.shape == expected.shape
        scale = 1 if dtype == "uint8" else 255
        assert np.abs(found.view(dtype).astype(float) - expected.view(dtype)).max() * scale <= 5


@given(
    st.sampled_from(ORIENTATIONS),
    st.integers(30, 90),
    st.integers(30, 90),
    st.lists(st.floats(0, 0.999), min_size=N_DRAWS, max_size=N_DRAWS),
)
def test_a_random_crop_and_its_flip_are_those_of_the_turned_picture(orientation, height, width, draws):
    image = picture(height, width)
    options = {"size": (30, 24), "crop": "random", "flip": True}
    found = decoded(with_orientation(image, orientation, "png"), draws, **options)
    plain = encode(Image.fromarray(turned(np.asarray(image), orientation)), "png")
    assert np.abs(found.astype(int) - decoded(plain, draws, **options)).max() <= 1


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_picture_that_is_decoded_at_a_half_is_turned_too(orientation):
    image = picture(240, 360)
    data = with_orientation(image, orientation)
    plain = encode(Image.fromarray(turned(np.asarray(image), orientation)))
    difference = np.abs(decoded(data, size=(50, 60)).astype(int) - decoded(plain, size=(50, 60)))
    assert difference.max() <= 6


@pytest.mark.parametrize("how", [*FORMATS, "tiff"])
def test_by_default_and_without_exif_a_picture_is_served_as_stored(how):
    plain = encode(picture(20, 30), how)
    assert decoded(plain, size=None).shape == (20, 30, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("element", "value"), [(3, 6), (4, 6), (3, 0), (3, 9)])
def test_both_byte_orders_and_both_integer_types_are_read(order, element, value):
    field = struct.pack(f"{order}HHIHH", 274, element, 1, *((value, 0) if element == 3 else (0, value)))
    if element == 4:
        field = struct.pack(f"{order}HHII", 274, element, 1, value)
    other = struct.pack(f"{order}HHII", 271, 2, 4, 0)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 2) + other + field + bytes(4)
    segment = b"Exif\0\0" + tiff
    data = encode(picture(20, 30))
    fill = b"\xff\xff"  # fill bytes may come before a marker
    data = data[:2] + fill + b"\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    assert jpeg_orientation(data, Image) == (value if 1 <= value <= 8 else 1)


@given(st.sampled_from(FORMATS), st.data())
def test_damaged_exif_data_never_fails(how, data):
    good = bytearray(with_orientation(picture(8, 8), 6, how))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, min(len(good), 200) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.integers(0, len(good)))
    for damaged in (bytes(good[:kept]), np.frombuffer(bytes(good), np.uint8)):
        assert jpeg_orientation(damaged, Image) in ORIENTATIONS
        with suppress(DecodeError):
            decoded(damaged, size=None)
