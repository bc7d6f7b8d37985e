"""Planes that are resized before they become RGB: beside what the decoder makes of the same pictures otherwise."""

from __future__ import annotations

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from tests.images.pictures import BY_PLANES, encode, picture

from tiercache.images import decoder
from tiercache.images import decoder as decoder_module
from tiercache.images.decoder import DecodeError, Decoder, JpegPlanesHeader, PlaneReader
from tiercache.images.image_plan import plan_crop
from tiercache.images.options import DecodeImage

SUBSAMPLED = ("420", "422", "440")
MIRROR = [0.0] * 24


def jpeg(height: int, width: int, subsampling: str = "420", seed: int = 0) -> bytes:
    return simplejpeg.encode_jpeg(np.asarray(picture(height, width, seed)), 90, "RGB", subsampling)


def both(data: bytes, draws: Any = (), **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(by planes, as RGB)."""
    one, other = (Decoder(DecodeImage(**options, resize_in=way)).decode(data, draws) for way in ("ycbcr", "rgb"))
    return one, other


def array_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


# -- the same picture --------------------------------------------------------------------------------------------------


def by_rgb(data: bytes, draws: Any, options: DecodeImage) -> np.ndarray:
    """The whole picture in RGB, of which the same box is resized: [h, w, 3]."""
    whole = simplejpeg.decode_jpeg(data, fastdct=options.dct == "fast")
    plan = plan_crop(*whole.shape[:2], options, draws)
    steps = PlaneReader(options, 1 << 20).look(array_of(data))
    luma, _ = steps.boxes(plan.pixels(whole.shape[:2], whole.shape[:2]))
    shown = cv2.resize(whole[luma], options.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return shown[:, ::-1] if plan.flip else shown


@BY_PLANES
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (333, 447), (225, 301), (101, 77)])
@pytest.mark.parametrize("subsampling", SUBSAMPLED)
@pytest.mark.parametrize("dct", ["accurate", "fast"])
def test_an_image_by_planes_looks_like_one_by_rgb(size, subsampling, dct):
    options = DecodeImage(224, dct=dct, layout="HWC", resize_in="ycbcr")
    data = jpeg(*size, subsampling)
    difference = np.abs(Decoder(options).decode(data, ()).astype(int) - by_rgb(data, (), options))
    assert 0 < difference.mean() < 0.6
    assert difference.max() <= 6


@BY_PLANES
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (333, 447), (225, 301)])
def test_the_center_crop_is_widened_by_less_than_a_chroma_pixel(size):
    found, expected = both(jpeg(*size), size=224)
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() < 1
    assert difference.max() <= 8


@BY_PLANES
@given(st.data())
def test_a_random_crop_by_planes_is_the_crop_that_was_drawn(data):
    size = data.draw(st.integers(40, 120)), data.draw(st.integers(40, 120))
    draws = data.draw(st.lists(st.floats(0, 0.999), min_size=24, max_size=24))
    options = DecodeImage(40, crop="random", flip=True, layout="HWC", resize_in="ycbcr", scale=(0.5, 1.0))
    encoded = jpeg(*size, data.draw(st.sampled_from(SUBSAMPLED)))
    plan = plan_crop(*size, options, draws)
    assume(decoder._are_planes_enough(plan, plan.pixels(size, size)))
    found = Decoder(options).decode(encoded, draws)
    assert np.abs(found.astype(int) - by_rgb(encoded, draws, options)).mean() < 2


@BY_PLANES
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16", "bfloat16"])
def test_every_dtype_and_layout_has_the_same_values(layout, dtype):
    data = jpeg(100, 140)
    how = {"size": (64, 80), "resize_in": "ycbcr", "flip": True}
    plain = Decoder(DecodeImage(**how)).decode(data, MIRROR)
    found = Decoder(DecodeImage(**how, dtype=dtype, layout=layout)).decode(data, MIRROR)
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    table = Decoder(DecodeImage(None, dtype=dtype, layout="HWC")).decode(encode(Image.fromarray(levels), "png"), ())
    shown = plain if layout == "CHW" else plain.transpose(1, 2, 0)
    assert np.array_equal(found, table[0, :, 0][shown])


@BY_PLANES
def test_sharp_colours_keep_their_positions():
    """A red square on blue, its edges on odd pixels: chroma moves with luma, by less than a pixel of its own."""
    shown = np.zeros((200, 200, 3), np.uint8)
    shown[:, :, 2] = 255
    shown[51:149, 51:149] = (255, 0, 0)
    found, expected = both(simplejpeg.encode_jpeg(shown, 95, "RGB", "420"), size=150)
    middle = [side // 2 for side in found.shape[1:]]
    for line, other in (
        (found[:, middle[0]], expected[:, middle[0]]),
        (found[:, :, middle[1]], expected[:, :, middle[1]]),
    ):
        for color in (0, 2):
            crossed = [np.flatnonzero(np.diff(np.sign(values[color].astype(int) - 127))) for values in (line, other)]
            assert np.abs(crossed[0] - crossed[1]).max() <= 1


@BY_PLANES
def test_one_decoder_decodes_images_of_changing_sizes_and_samplings():
    one = Decoder(DecodeImage(32, resize_in="ycbcr"))
    sizes = [(40, 50), (300, 200), (33, 35), (64, 999), (40, 50)]
    for i, size in enumerate(sizes):
        data = jpeg(*size, SUBSAMPLED[i % 3], seed=i)
        fresh = Decoder(DecodeImage(32, resize_in="ycbcr")).decode(data, ())
        assert np.array_equal(one.decode(data, ()), fresh)


@BY_PLANES
def test_threads_with_a_decoder_each_do_not_disturb_each_other():
    encoded = [jpeg(90 + i, 120 - i, SUBSAMPLED[i % 3], seed=i) for i in range(16)]
    options = DecodeImage(48, resize_in="ycbcr")

    def all_of_them(_):
        one = Decoder(options)
        return [one.decode(data, ()) for data in encoded * 8]

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(all_of_them, range(4))
    assert all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# -- what is no such picture comes as ever -----------------------------------------------------------------------------


OTHERS = {
    "png": lambda image: encode(image, "png"),
    "webp": lambda image: encode(image, "webp"),
    "4:4:4": lambda image: encode(image, subsampling="4:4:4"),
    "4:1:1": lambda image: simplejpeg.encode_jpeg(np.asarray(image), 90, "RGB", "411"),
    "grey": lambda image: encode(image.convert("L")),
    "cmyk": lambda image: encode(image.convert("CMYK")),
    "rgb": lambda image: encode(image, keep_rgb=True),
    "stray bytes": lambda image: encode(image).replace(b"\xff\xdb", b"\x00\x00\x00\xff\xdb", 1),
}


@BY_PLANES
@pytest.mark.parametrize("how", OTHERS)
def test_images_other_than_subsampled_jpegs_equal_those_by_rgb(how):
    found, expected = both(OTHERS[how](picture(100, 140)), size=64)
    assert np.array_equal(found, expected)


@BY_PLANES
@pytest.mark.parametrize(("height", "width", "size"), [(64, 90, 64), (64, 64, 64), (128, 200, 64), (700, 900, 64)])
def test_images_that_are_not_resized_or_reduced_equal_those_by_rgb(height, width, size):
    found, expected = both(jpeg(height, width), size=size)
    assert np.array_equal(found, expected)


@BY_PLANES
@pytest.mark.parametrize("n_bytes", [0, 2, 3, 30, 700, -300])
def test_a_jpeg_that_is_cut_short_is_an_error(n_bytes):
    data = jpeg(100, 140)[:n_bytes]
    with pytest.raises(DecodeError, match=r"\w+"):
        Decoder(DecodeImage(64, resize_in="ycbcr")).decode(data, ())


def without(data: bytes, marker: int) -> bytes:
    """A JPEG without its segments of one kind."""
    kept, at = data[:2], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        kept += b"" if data[at + 1] == marker else data[at:end]
        at = end
    return kept + data[at:]


@BY_PLANES
def test_a_jpeg_without_tables_is_not_decoded_with_those_of_the_previous_image():
    data = jpeg(100, 140)
    no_quantisation, no_huffman = without(data, 0xDB), without(data, 0xC4)
    standard = Decoder(DecodeImage(64, resize_in="ycbcr")).decode(no_huffman, ())
    one = Decoder(DecodeImage(64, resize_in="ycbcr"))
    for quality in (30, 95):
        one.decode(encode(picture(100, 140), quality=quality, optimize=True, subsampling="4:2:0"), ())
        with pytest.raises(DecodeError, match=r"\w+"):
            one.decode(no_quantisation, ())
        assert np.array_equal(one.decode(no_huffman, ()), standard)


@BY_PLANES
@pytest.mark.parametrize("at", [b"\xff\xc4", b"\xff\xdb", b"\xff\xc0", b"\xff\xda"])
def test_a_damaged_header_does_not_affect_the_next_image(at):
    data = jpeg(100, 140)
    place = data.index(at)
    damaged = data[: place + 2] + b"\xff\xff" + data[place + 4 :]
    one = Decoder(DecodeImage(64, resize_in="ycbcr"))
    expected = one.decode(data, ())
    for broken in (damaged, data[: place + 3]):
        with pytest.raises(DecodeError, match=r"\w+"):
            one.decode(broken, ())
        assert np.array_equal(one.decode(data, ()), expected)


@BY_PLANES
@pytest.mark.parametrize("size", [(64, 256), (32, 224)])
def test_averaged_images_equal_those_by_rgb(size):
    y = np.mgrid[:400, :400][0]
    stripes = np.where(((y // 4) % 2 == 1)[:, :, None], [200, 60, 60], [20, 130, 180]).astype(np.uint8)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(stripes), 95, "RGB", "420")
    found, expected = both(data, [0.5] * 24, size=size, crop="random", scale=(1, 1), ratio=(1, 1))
    assert np.array_equal(found, expected)


@BY_PLANES
def test_a_result_larger_than_the_librarys_limit_equals_that_by_rgb():
    found, expected = both(jpeg(20, 30), size=(1, 65501))
    assert np.array_equal(found, expected)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damage that it reads past
@BY_PLANES
@given(st.data())
def test_damage_anywhere_gives_an_image_or_a_decode_error(data):
    damaged = bytearray(jpeg(24, 34, data.draw(st.sampled_from(SUBSAMPLED))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(3, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Decoder(DecodeImage(16, resize_in="ycbcr")).decode(bytes(damaged), ())
    except DecodeError:
        return
    assert found.shape == (3, 16, 16)


@BY_PLANES
def test_an_image_of_more_pixels_than_pillow_allows_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2399)
    monkeypatch.setattr(decoder, "MAX_PIXELS", 4799)
    with pytest.raises(DecodeError, match=r"4800 pixels.*exceeds limit"):
        Decoder(DecodeImage(50, resize_in="ycbcr")).decode(jpeg(60, 80), ())


# -- memory ------------------------------------------------------------------------------------------------------------


@BY_PLANES
@pytest.mark.parametrize("other", [(64, 96, "444"), (640, 960, "420"), (61, 93, "411"), (16, 16, "420")])
def test_a_jpeg_that_changed_after_its_header_was_read_does_not_overflow_its_memory(other):
    reader = PlaneReader(DecodeImage(32, resize_in="ycbcr"), 1 << 30)
    reader._memory = np.full(1 << 20, 7, np.uint8)
    found = reader.look(array_of(jpeg(64, 96)))
    reader.read(array_of(jpeg(*other)), found)
    assert (reader._memory[3 * 64 * 96 :] == 7).all()


@BY_PLANES
def test_scratch_memory_of_a_large_image_is_not_kept():
    reader = PlaneReader(DecodeImage(32, resize_in="ycbcr"), 3 * 64 * 64)
    for side, kept in ((64, 3 * 64 * 64), (400, 3 * 64 * 64), (40, 3 * 64 * 64)):
        data = array_of(jpeg(side, side))
        assert [plane.shape for plane in reader.read(data, reader.look(data))] == [(side, side)] + [
            (side // 2,) * 2
        ] * 2
        assert reader._memory.nbytes == kept


@BY_PLANES
def test_every_libturbojpeg_handle_is_destroyed(monkeypatch):
    library, made, gone = decoder_module.load_turbojpeg(), [], []

    class Recorded:
        def __getattr__(self, name):
            return {"tjInitDecompress": self.make, "tjDestroy": self.destroy}.get(name) or getattr(library, name)

        def make(self):
            made.append(library.tjInitDecompress())
            return made[-1]

        def destroy(self, handle):
            gone.append(handle)
            library.tjDestroy(handle)

    monkeypatch.setattr(decoder_module, "load_turbojpeg", Recorded)
    one = Decoder(DecodeImage(32, resize_in="ycbcr"))
    for data in (jpeg(40, 50), jpeg(40, 50)[:200], encode(picture(40, 50), "png"), jpeg(40, 50, "444")):
        with contextlib.suppress(DecodeError):
            one.decode(data, ())
    del one
    gc.collect()
    assert sorted(made) == sorted(gone)
    assert len(made) > 3


# -- boxes -------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_box_is_widened_to_whole_chroma_pixels_and_no_further(data):
    size = height, width = data.draw(st.integers(1, 99)), data.draw(st.integers(1, 99))
    steps = data.draw(st.sampled_from(sorted(decoder_module._STEPS.values())))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    luma, chroma = JpegPlanesHeader(size, steps).boxes((top, bottom, left, right))
    edges = zip(luma, chroma, ((top, bottom), (left, right)), steps, size, strict=True)
    for of_luma, of_chroma, (low, high), step, n in edges:
        assert low - step < of_luma.start <= low
        assert high <= of_luma.stop < high + step or (of_luma.stop == n // step * step and high == n)
        assert of_chroma.start * step == of_luma.start < of_luma.stop <= n
        assert of_chroma.stop * step == of_luma.stop or (of_luma.start == n - 1 and of_chroma.stop * step == n + 1)


# -- the library -------------------------------------------------------------------------------------------------------


def test_a_missing_libturbojpeg_is_an_error_that_names_its_package(monkeypatch):
    monkeypatch.setattr(decoder_module, "_NAME", "no-such-library.so")
    monkeypatch.setattr(decoder_module, "find_library", lambda name: None)
    decoder_module.load_turbojpeg.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match=r"libturbojpeg0 \(Debian\)"):
            Decoder(DecodeImage(32, resize_in="ycbcr"))
        assert Decoder(DecodeImage(32)).decode(jpeg(40, 40), ()).shape == (3, 32, 32)
    finally:
        decoder_module.load_turbojpeg.cache_clear()
