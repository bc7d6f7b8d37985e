"""Decoding: from encoded bytes to a picture in the caller's memory.

JPEG by simplejpeg (libjpeg-turbo) or as planes by libturbojpeg, PNG and WebP by OpenCV, everything else by Pillow;
resized by OpenCV. All of them drop the GIL. docs/design/2026-11-25-images.md has the figures that chose them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.images.crop import plan_crop
from tiercache.images.planes import PlaneReader, load_turbojpeg

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.images.crop import CropPlan
    from tiercache.images.options import DecodeImage

_LIBRARIES = {"simplejpeg": "simplejpeg", "cv2": "opencv-python-headless", "PIL.Image": "pillow"}
# The others (CMYK, YCCK) are read by Pillow. So is every picture that the fast library refuses or warns of: Pillow
# reads past stray bytes and some damage, as torchvision does (ImageNet has such files), and where it does not it says
# why.
_JPEG_SPACES = ("Gray", "YCbCr", "RGB")
# Beyond it Pillow sees a decompression bomb (or a damaged header, which would take minutes to fill with grey): it is
# left to Pillow, whose limit a user can lift.
MAX_PIXELS = 2 * 89_478_485
# Of scratch memory that a decoder keeps: pictures of 22 million pixels. A single one of the largest would leave half a
# GiB in each thread.
MAX_KEPT_BYTES = 64 << 20
# Linear interpolation reads 2 x 2 pixels, so beyond this it skips some; INTER_AREA reads all, at 8 times the price
# (828 against 95 us for 375 x 375 to 224 x 224 here).
MAX_LINEAR_SHRINK = 2.0
_STORED = {"uint8": "u1", "float32": "f4", "float16": "f2", "bfloat16": "u2"}


class DecodeError(ValueError):
    """Bytes that are no picture, or a damaged one; the text is what the decoder said."""


class Decoder:
    """Decodes pictures as some options say. Owns scratch memory that grows to the largest picture: one thread.

    Raises:
        ModuleNotFoundError: a library of the extra `images` is missing, or what options.resize_in needs.
    """

    def __init__(self, options: DecodeImage) -> None:
        self._options = options
        self._jpeg, self._cv2, self._pillow = load_libraries(options)
        if options.resize_in == "ycbcr":
            self._reader = PlaneReader(options, MAX_KEPT_BYTES)
        self._scratch = np.empty(0, np.uint8)
        self._planes = np.empty(0, np.uint8)
        self._scaled = np.empty(0, np.uint8)
        self._table = _table_of(options.dtype)

    def decode_into(self, data: Any, draws: Sequence[float], out: NDArray[Any]) -> None:
        """Decode a picture into out.

        Args:
            data: encoded bytes, any contiguous buffer; not kept.
            draws: as plan_crop takes them.
            out: C-contiguous options.batch_shape, of `stored_dtype(options.dtype)`, owned by the caller.

        Raises:
            DecodeError: not a picture that can be decoded; out may hold anything then.
        """
        if self._options.resize_in == "ycbcr" and self._decode_planes(data, draws, out):
            return
        picture, plan, size = self._picture(data, draws)
        self._render(picture, plan, size, out)

    def decode(self, data: Any, draws: Sequence[float]) -> NDArray[Any]:
        """Decode a picture into new memory: of any size where options.size is None. Raises DecodeError."""
        if self._options.size is not None:
            out = np.empty(self._options.batch_shape, stored_dtype(self._options.dtype))
            self.decode_into(data, draws, out)
            return out
        picture, plan, size = self._picture(data, draws)
        height, width = plan.out_height, plan.out_width
        shape = (3, height, width) if self._options.layout == "CHW" else (height, width, 3)
        out = np.empty(shape, stored_dtype(self._options.dtype))
        self._render(picture, plan, size, out)
        return out

    def _picture(self, data: Any, draws: Sequence[float]) -> tuple[NDArray[np.uint8], CropPlan, tuple[int, int]]:
        """(decoded picture uint8[h, w, 3], maybe reduced and in scratch memory; the plan; the picture's own size)."""
        if _is_jpeg(data):
            size, space = self._jpeg_header(data)
            if space in _JPEG_SPACES:
                plan = plan_crop(*size, self._options, draws)
                picture = self._decode_jpeg(data, size, plan.reduction)
                if picture is not None:
                    return picture, plan, size
        picture = None  # from here on what is not None is whole
        if 0 < declared_pixels(data) <= MAX_PIXELS:
            picture = self._decode_cv2(data)
        if picture is None:
            picture = _decode_pillow(self._pillow, data)
        size = picture.shape[0], picture.shape[1]
        return picture, plan_crop(*size, self._options, draws), size

    def _jpeg_header(self, data: Any) -> tuple[tuple[int, int], str]:
        """((height, width), colour space); the space is "" where Pillow is to read it."""
        try:
            height, width, space, _ = self._jpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError):  # KeyError: the sampling
            return (0, 0), ""
        return (height, width), space if height * width <= MAX_PIXELS else ""

    def _decode_jpeg(self, data: Any, size: tuple[int, int], reduction: int) -> NDArray[np.uint8] | None:
        """The picture, reduced; None where there is something wrong with it."""
        height, width = (-(-side // reduction) for side in size)
        n_bytes = height * width * 3
        scratch = _grown(self._scratch, n_bytes)
        self._scratch = _kept(scratch, self._scratch)
        how: dict[str, Any] = (
            {"min_height": height, "min_width": width, "min_factor": reduction} if reduction > 1 else {}
        )
        how |= {"buffer": scratch[:n_bytes], "fastdct": self._options.dct == "fast"}
        try:
            picture: NDArray[np.uint8] = self._jpeg.decode_jpeg(data, **how)
        except ValueError:
            return None
        return picture

    def _decode_cv2(self, data: Any) -> NDArray[np.uint8] | None:
        cv2 = self._cv2
        try:
            picture: NDArray[np.uint8] | None = cv2.imdecode(
                np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            )
        except cv2.error:
            return None
        return picture

    def _decode_planes(self, data: Any, draws: Sequence[float], out: NDArray[Any]) -> bool:
        """Whether data is a JPEG whose planes can be resized before they become RGB, and was decoded into out."""
        if not _is_jpeg(data):
            return False
        encoded = np.frombuffer(data, np.uint8)
        reader = self._reader
        found = reader.look(encoded)
        if found is None or found.size[0] * found.size[1] > MAX_PIXELS:
            return False
        plan = plan_crop(*found.size, self._options, draws)
        box = plan.pixels(found.size, found.size)
        planes = reader.read(encoded, found) if _are_planes_enough(plan, box) else None
        if planes is None:
            return False
        luma, chroma = found.boxes(box)
        for plane, part, resized in zip(planes, (luma, chroma, chroma), reader.resized, strict=True):
            self._resize(plane[part], resized)
        shown = self._room(plan)
        if not reader.to_rgb(shown):
            return False
        self._finish(shown, plan, out)
        return True

    def _render(self, picture: NDArray[np.uint8], plan: CropPlan, size: tuple[int, int], out: NDArray[Any]) -> None:
        """Cut, resize, mirror, and bring to out's layout and dtype."""
        top, bottom, left, right = plan.pixels(size, (picture.shape[0], picture.shape[1]))
        is_direct = self._options.layout == "HWC" and self._options.dtype == "uint8"
        shown = out if is_direct else self._room(plan)
        self._resize(picture[top:bottom, left:right], shown)
        self._finish(shown, plan, out)

    def _room(self, plan: CropPlan) -> NDArray[np.uint8]:
        """Scratch memory for a result before it is brought to out's layout and dtype, uint8[h, w, 3]."""
        n_bytes = plan.out_height * plan.out_width * 3
        scaled = _grown(self._scaled, n_bytes)
        self._scaled = _kept(scaled, self._scaled)
        return scaled[:n_bytes].reshape(plan.out_height, plan.out_width, 3)

    def _resize(self, box: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        if box.shape == out.shape:
            np.copyto(out, box)
            return
        height, width = out.shape[:2]
        shrink = max(box.shape[0] / height, box.shape[1] / width)
        how = self._cv2.INTER_LINEAR if shrink <= MAX_LINEAR_SHRINK else self._cv2.INTER_AREA
        self._cv2.resize(box, (width, height), out, interpolation=how)

    def _finish(self, shown: NDArray[np.uint8], plan: CropPlan, out: NDArray[Any]) -> None:
        """Mirror, and bring to out's layout and dtype."""
        if plan.flip:
            self._cv2.flip(shown, 1, shown)
        if shown is not out:
            self._convert(shown, out)

    def _convert(self, shown: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """uint8[h, w, 3] to out's layout and dtype."""
        cv2, source = self._cv2, shown
        if self._options.layout == "CHW":
            # A transposed numpy copy takes 45 us where this takes 7.
            source = out
            if self._table is not None:
                planes = _grown(self._planes, out.size)
                self._planes = _kept(planes, self._planes)
                source = planes[: out.size].reshape(out.shape)
            cv2.split(shown, list(source))
        elif self._table is None:
            np.copyto(out, shown)
        if self._table is None:
            return
        if out.dtype == np.float32:
            np.multiply(source, np.float32(1 / 255), out=out, dtype=np.float32)
        else:  # 45 us here; numpy's own conversion takes 200
            rows = out.shape[0] * out.shape[1]
            cv2.LUT(source.reshape(rows, -1), self._table.reshape(1, 256), out.view(np.uint16).reshape(rows, -1))


def load_libraries(options: DecodeImage) -> tuple[Any, Any, Any]:
    """simplejpeg, cv2, PIL.Image; what options need beside them too. Raises ModuleNotFoundError saying what to do."""
    found = []
    for module, distribution in _LIBRARIES.items():
        try:
            found.append(import_module(module))
        except ModuleNotFoundError as error:
            message = f"decoding pictures needs {distribution}, which is not installed: pip install 'tiercache[images]'"
            raise ModuleNotFoundError(message, name=error.name) from error
    if options.resize_in == "ycbcr":
        load_turbojpeg()
    return found[0], found[1], found[2]


def _are_planes_enough(plan: CropPlan, box: tuple[int, int, int, int]) -> bool:
    """Whether resized planes show what the resized picture would, for less work. box: top, bottom, left, right.

    At a half libjpeg decodes chroma at luma's size: nothing would be left out. Where the picture is averaged chroma, of
    which there is less, would be sampled. What is not resized has its exact pixels the usual way.
    """
    height, width = box[1] - box[0], box[3] - box[2]
    shrink = max(height / plan.out_height, width / plan.out_width)
    is_resized = (height, width) != (plan.out_height, plan.out_width)
    return plan.reduction == 1 and shrink <= MAX_LINEAR_SHRINK and is_resized


def _is_jpeg(data: Any) -> bool:
    return bytes(memoryview(data)[:3]) == b"\xff\xd8\xff"


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that elements are written as: uint16 holds the bits of bfloat16, which numpy has not."""
    return np.dtype(_STORED[dtype])


def _table_of(dtype: str) -> NDArray[Any] | None:
    """What 0, 1, ... 255 become, [256]: bits of 16-bit floats as uint16; None for uint8.

    Computed in float32 and then rounded, as torch does: equal to torchvision's ToDtype(scale=True) bit for bit.
    """
    if dtype == "uint8":
        return None
    values = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    if dtype == "bfloat16":  # the upper half of the bits, rounded to the nearest, halves to even
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values


def _grown(memory: NDArray[np.uint8], n_bytes: int) -> NDArray[np.uint8]:
    """Memory, or more; never on a multiple of 32.

    Rows that begin there libjpeg-turbo writes past the caches (vmovntdq, where there is AVX2), and they are read at
    once: 512x384 decoded and resized to 224 took 674 us instead of 584, 256x256 232 instead of 208.
    """
    if memory.size >= n_bytes:
        return memory
    more = np.empty(n_bytes + 32, np.uint8)
    first = (16 - more.ctypes.data) % 32
    return more[first : first + n_bytes]


def _kept(memory: NDArray[np.uint8], before: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return memory if memory.size <= MAX_KEPT_BYTES else before


def declared_pixels(data: Any) -> int:
    """Width times height by the header of a PNG or a WebP; 0 for what is neither, or too short to say."""
    head = bytes(memoryview(data)[:30])
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 24:
        width, height = struct.unpack_from(">II", head, 16)
        return int(width) * int(height)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 0
    if head[12:16] == b"VP8X":
        return (int.from_bytes(head[24:27], "little") + 1) * (int.from_bytes(head[27:30], "little") + 1)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    width, height = struct.unpack_from("<HH", head, 26)
    return int(width & 0x3FFF) * int(height & 0x3FFF)


def _decode_pillow(pillow: Any, data: Any) -> NDArray[np.uint8]:
    # What Pillow's readers are known to raise for damaged files: they are many, and each has its own way. And its
    # warnings, where the user has made errors of them.
    errors = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
    try:
        with pillow.open(io.BytesIO(data)) as image:
            if image.format == "EPS":  # a program: Pillow would start Ghostscript to run it
                raise ValueError("EPS is not decoded: it is a program that draws a picture, not a picture")
            if image.mode.startswith("I;16"):  # Pillow would clip
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except import_module("PIL").UnidentifiedImageError as error:
        start = bytes(memoryview(data)[:12])
        raise DecodeError(f"no picture in a format that is known here: it starts with {start!r}") from error
    except (*errors, Warning, pillow.DecompressionBombError) as error:
        raise DecodeError(str(error) or type(error).__name__) from error
