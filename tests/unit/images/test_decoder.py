"""Decoding, pixel by pixel against Pillow and torchvision."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from tests.support.pictures import by_pillow, encode, picture
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tiercache.images import decoder
from tiercache.images.decode_image import DecodeImage, plan_crop
from tiercache.images.decoder import DecodeError, Decoder

WHOLE = DecodeImage(None, layout="HWC")
FAST = DecodeImage(None, layout="HWC", dct="fast")
MIRROR = [0.0] * 24


def whole(data: bytes) -> np.ndarray:
    return Decoder(WHOLE).decode(data, ())


@pytest.mark.parametrize("how", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_a_whole_image_equals_that_of_pillow(how):
    data = encode(picture(37, 53), how)
    difference = np.abs(whole(data).astype(int) - by_pillow(data))
    assert difference.max() <= (4 if how == "webp" else 1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_is_converted_to_rgb_as_by_pillow(mode, progressive):
    data = encode(picture(37, 53).convert(mode), progressive=progressive)
    assert np.abs(whole(data).astype(int) - by_pillow(data)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [75, 90])
def test_the_fast_transform_gives_simplejpegs_pixels_which_differ_by_little(mode, quality):
    data = encode(picture(375, 500).convert(mode), quality=quality)
    found = Decoder(FAST).decode(data, ())
    assert np.array_equal(found, simplejpeg.decode_jpeg(data, fastdct=True))
    difference = np.abs(found.astype(int) - whole(data))
    assert 0.2 < difference.mean() < 1.5  # grey 0.4 to 0.5, colours 0.9 to 1.0
    assert difference.max() <= 6  # grey 1, colours 3


def test_the_fast_transform_is_for_jpegs_that_pillow_is_not_needed_for():
    data = encode(picture(37, 53))
    place = data.index(b"\xff\xdb")
    others = [encode(picture(37, 53), how) for how in ("png", "webp", "gif")]
    others += [encode(picture(37, 53).convert("CMYK")), data[:place] + b"\x00\x00\x00" + data[place:]]
    for other in others:
        assert np.array_equal(Decoder(FAST).decode(other, ()), whole(other))
    assert np.abs(whole(others[-1]).astype(int) - by_pillow(data)).max() <= 1  # stray bytes, which Pillow skips


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_every_kind_of_png_is_converted_to_rgb_as_by_pillow(mode):
    data = encode(picture(37, 53).convert(mode), "png")
    assert np.array_equal(whole(data), by_pillow(data))


def test_alpha_is_dropped_and_not_blended():
    image = picture(20, 30)
    image.putalpha(7)
    assert np.array_equal(whole(encode(image, "png")), np.asarray(image)[:, :, :3])


@pytest.mark.parametrize("how", ["png", "tiff"])
def test_the_upper_8_of_16_bits_are_kept(how):
    levels = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    found = whole(encode(Image.fromarray(levels), how))
    assert np.array_equal(found, np.repeat((levels >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


def difference_to_torchvision(data: bytes, options: DecodeImage, transform: v2.Transform) -> np.ndarray:
    expected = transform(torch.from_numpy(np.array(by_pillow(data))).permute(2, 0, 1)).numpy()
    return np.abs(Decoder(options).decode(data, ()).astype(int) - expected)


@pytest.mark.parametrize("how", ["jpeg", "png"])
@pytest.mark.parametrize("size", [(375, 500), (260, 260), (800, 600), (100, 150), (256, 300)])
def test_the_center_is_that_of_torchvision_with_antialias_up_to_one_level(size, how):
    expected = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    difference = difference_to_torchvision(encode(noise(*size), how), DecodeImage(224, resize=256), expected)
    assert difference.max() <= 1


@given(st.integers(40, 300), st.integers(40, 300), st.lists(st.floats(0, 0.999), min_size=24, max_size=24))
def test_a_random_crop_is_that_of_torchvision_with_antialias_up_to_one_level(height, width, draws):
    data, options = encode(noise(height, width), "png"), DecodeImage(64, crop="random")
    plan = plan_crop(height, width, options, draws)
    image = torch.from_numpy(np.array(by_pillow(data))).permute(2, 0, 1)
    box = round(plan.top), round(plan.left), round(plan.height), round(plan.width)
    expected = functional.resized_crop(image, *box, [64, 64], antialias=True).numpy()
    assert np.abs(Decoder(options).decode(data, draws).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("size", [292, 220, 150, 106, 100, 80, 53, 40, 20])
def test_a_photograph_differs_from_torchvision_with_antialias_by_less_than_one_level_on_average(name, size):
    data = encode(Image.fromarray(load_sample_image(name)))
    expected = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    assert difference_to_torchvision(data, DecodeImage(size), expected).mean() < 1
    assert difference_to_torchvision(data, DecodeImage(size, dct="fast"), expected).mean() < 4


@pytest.mark.parametrize("how", ["png", "jpeg"])
@pytest.mark.parametrize("side", [300, 1200, 4800])
def test_a_fine_pattern_is_averaged_and_not_sampled_at_any_image_size(how, side):
    stripes = np.tile(np.array([[0, 255]], np.uint8), (side, side // 2))
    found = Decoder(DecodeImage(100)).decode(encode(Image.fromarray(stripes), how), ())
    assert found[:, 20:-20, 20:-20].mean() == pytest.approx(127, abs=5)
    assert found[:, 20:-20, 20:-20].std() < 45


@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.lists(st.floats(0, 0.999), min_size=24, max_size=24)
)
def test_an_image_of_any_size_fills_the_whole_result(height, width, size, draws):
    data = encode(Image.fromarray(np.full((height, width, 3), (200, 100, 50), np.uint8)))
    decoder = Decoder(DecodeImage(size, crop="random", flip=True))
    out = np.zeros((3, size, size), np.uint8)
    decoder.decode_into(data, draws, out)
    assert np.abs(out.reshape(3, -1).astype(int) - np.array([[200], [100], [50]])).max() <= 3


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_a_mirrored_result_is_the_mirror_of_the_result(layout):
    data = encode(picture(50, 70))
    found = Decoder(DecodeImage(32, layout=layout, flip=True)).decode(data, MIRROR)
    plain = Decoder(DecodeImage(32, layout=layout)).decode(data, ())
    axis = 2 if layout == "CHW" else 1
    assert np.array_equal(found, np.flip(plain, axis))
    assert not np.array_equal(found, plain)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damage that it reads past
@pytest.mark.parametrize("how", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_a_broken_image_is_an_error_with_the_decoders_message(how, capfd):
    data = encode(picture(60, 80), how)
    for broken in (b"", b"this is no picture at all", data[:30], data[: len(data) // 2]):
        with pytest.raises(DecodeError, match=r"\w+"):
            whole(broken)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damage that it reads past
@given(st.data())
def test_damage_anywhere_gives_an_image_or_a_decode_error(data):
    good = bytearray(encode(picture(24, 32), data.draw(st.sampled_from(["jpeg", "gif", "bmp", "tiff"]))))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(2, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Decoder(DecodeImage(8)).decode(bytes(good), ())
    except DecodeError:
        return
    assert found.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("jpeg", {}),
        ("png", {}),
        ("webp", {"lossless": True}),
        ("webp", {"lossless": False}),
        ("webp", {"exif": b"Exif\0\0"}),
        ("gif", {}),
    ],
)
def test_an_image_of_more_pixels_than_pillow_allows_is_an_error_in_every_format(monkeypatch, how, options):
    data = encode(picture(60, 80), how, **options)
    assert whole(data).shape == (60, 80, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2399)
    monkeypatch.setattr(decoder, "MAX_PIXELS", 4799)
    with pytest.raises(DecodeError, match=r"4800 pixels.*exceeds limit"):
        whole(data)


def test_a_pillow_warning_that_is_an_error_is_a_decode_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2401)
    with pytest.raises(DecodeError, match="could be decompression bomb"):
        whole(encode(picture(60, 80), "gif"))


def test_an_eps_file_is_not_run(monkeypatch):
    def run(*given, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    with pytest.raises(DecodeError, match="EPS is not supported"):
        whole(encode(picture(20, 30), "eps"))


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_scratch_memory_of_a_large_image_is_not_kept(monkeypatch, layout):
    monkeypatch.setattr(decoder, "MAX_KEPT_BYTES", 3 * 40 * 40)
    found = Decoder(DecodeImage(None, dtype="float32", layout=layout))
    for side in (40, 90, 39):
        data = encode(picture(side, side))
        expected = Decoder(DecodeImage(None, dtype="float32", layout=layout)).decode(data, ())
        assert np.array_equal(found.decode(data, ()), expected)
    assert sum(memory.nbytes for memory in found._kept.values()) <= 3 * decoder.MAX_KEPT_BYTES


def test_scratch_memory_does_not_start_on_a_multiple_of_32():
    found = Decoder(DecodeImage(20))
    found.decode(encode(picture(224, 224)), ())
    assert found._kept["decoded"].ctypes.data % 32
    assert found._kept["resized"].ctypes.data % 32


@pytest.mark.parametrize(("module", "name"), [("cv2", "opencv-python-headless"), ("simplejpeg", "simplejpeg")])
def test_a_missing_library_is_an_error_that_names_the_extra(module, name):
    code = f"""
import sys
sys.modules[{module!r}] = None
from tiercache.images.decoder import Decoder
from tiercache.images.decode_image import DecodeImage
try:
    Decoder(DecodeImage(8))
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"needs {name}" in said
    assert "pip install 'tiercache-data[images]'" in said
