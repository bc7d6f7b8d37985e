"""Decoder of encoded images into the caller's memory.

It decodes JPEG by simplejpeg (libjpeg-turbo) or as planes by libturbojpeg, PNG and WebP by OpenCV, other formats by
Pillow, and resizes by OpenCV. All of them release the GIL. docs/design/2026-11-25-images.md holds the measurements
behind this choice.
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
# Pillow reads the other colour spaces (CMYK, YCCK), and every image that the fast library refuses or warns about:
# Pillow accepts stray bytes and some damage, as torchvision does (ImageNet has such files), and reports what is wrong
# otherwise.
_JPEG_SPACES = ("Gray", "YCbCr", "RGB")
# Above this size Pillow reports a decompression bomb (or the header is damaged, and filling the image with grey would
# take minutes): such an image is left to Pillow, whose limit a user can raise.
MAX_PIXELS = 2 * 89_478_485
# Maximum scratch memory that a decoder keeps: images of 22 million pixels. One of the largest images would otherwise
# leave 0.5 GiB in each thread.
MAX_KEPT_BYTES = 64 << 20
# Linear interpolation reads 2 x 2 pixels, so beyond this factor it skips pixels. INTER_AREA reads all of them, at 8
# times the cost (828 us instead of 95 us for 375 x 375 to 224 x 224).
MAX_LINEAR_SHRINK = 2.0
_STORED = {"uint8": "u1", "float32": "f4", "float16": "f2", "bfloat16": "u2"}


class DecodeError(ValueError):
    """The bytes are not an image, or a damaged one; the text is the decoder's message."""


class Decoder:
    """Decodes images as the options say. Owns scratch memory that grows to the largest image; for use by one thread.

    Args:
        options: Options of the column.

    Raises:
        ModuleNotFoundError: A library of the extra `images` is missing, or the library that options.resize_in needs.
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
        """Decode an image into out.

        Args:
            data: Encoded bytes, any contiguous buffer; no reference is kept.
            draws: Random numbers, see plan_crop.
            out: C-contiguous array of shape options.batch_shape and dtype `stored_dtype(options.dtype)`, owned by the
                caller.

        Raises:
            DecodeError: The image cannot be decoded; the contents of out are then undefined.
        """
        if self._options.resize_in == "ycbcr" and self._decode_planes(data, draws, out):
            return
        picture, plan, size = self._picture(data, draws)
        self._render(picture, plan, size, out)

    def decode(self, data: Any, draws: Sequence[float]) -> NDArray[Any]:
        """Decode an image into new memory, of the image's own size if options.size is None. Raises DecodeError."""
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
        """Return the decoded image, its plan and its own size (height, width).

        The image is uint8[h, w, 3]; it may be reduced, and may lie in scratch memory.
        """
        if _is_jpeg(data):
            size, space = self._jpeg_header(data)
            if space in _JPEG_SPACES:
                plan = plan_crop(*size, self._options, draws)
                picture = self._decode_jpeg(data, size, plan.reduction)
                if picture is not None:
                    return picture, plan, size
        picture = None  # from here on, an image that is not None has its full size
        if 0 < declared_pixels(data) <= MAX_PIXELS:
            picture = self._decode_cv2(data)
        if picture is None:
            picture = _decode_pillow(self._pillow, data)
        size = picture.shape[0], picture.shape[1]
        return picture, plan_crop(*size, self._options, draws), size

    def _jpeg_header(self, data: Any) -> tuple[tuple[int, int], str]:
        """Return ((height, width), colour space); the colour space is "" if Pillow must read the image."""
        try:
            height, width, space, _ = self._jpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError):  # KeyError: unknown chroma subsampling
            return (0, 0), ""
        return (height, width), space if height * width <= MAX_PIXELS else ""

    def _decode_jpeg(self, data: Any, size: tuple[int, int], reduction: int) -> NDArray[np.uint8] | None:
        """Return the image, reduced; None if the decoder rejects it."""
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
        """Decode data into out if it is a JPEG whose planes can be resized before they become RGB.

        Returns:
            Whether out was written completely.
        """
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
        """Crop, resize, mirror, and convert to out's layout and dtype."""
        top, bottom, left, right = plan.pixels(size, (picture.shape[0], picture.shape[1]))
        is_direct = self._options.layout == "HWC" and self._options.dtype == "uint8"
        shown = out if is_direct else self._room(plan)
        self._resize(picture[top:bottom, left:right], shown)
        self._finish(shown, plan, out)

    def _room(self, plan: CropPlan) -> NDArray[np.uint8]:
        """Return scratch memory uint8[h, w, 3] for a result before it is converted to out's layout and dtype."""
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
        """Mirror the result, and convert it to out's layout and dtype."""
        if plan.flip:
            self._cv2.flip(shown, 1, shown)
        if shown is not out:
            self._convert(shown, out)

    def _convert(self, shown: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Convert uint8[h, w, 3] to out's layout and dtype."""
        cv2, source = self._cv2, shown
        if self._options.layout == "CHW":
            # cv2.split takes 7 us, a transposed numpy copy 45 us.
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
        else:  # a table lookup takes 45 us, numpy's own conversion 200 us
            rows = out.shape[0] * out.shape[1]
            cv2.LUT(source.reshape(rows, -1), self._table.reshape(1, 256), out.view(np.uint16).reshape(rows, -1))


def load_libraries(options: DecodeImage) -> tuple[Any, Any, Any]:
    """Return the modules simplejpeg, cv2 and PIL.Image, and check that libturbojpeg is there if the options need it.

    Raises:
        ModuleNotFoundError: A library is missing; the message says how to install it.
    """
    found = []
    for module, distribution in _LIBRARIES.items():
        try:
            found.append(import_module(module))
        except ModuleNotFoundError as error:
            message = f"decoding images needs {distribution}, which is not installed: pip install 'tiercache[images]'"
            raise ModuleNotFoundError(message, name=error.name) from error
    if options.resize_in == "ycbcr":
        load_turbojpeg()
    return found[0], found[1], found[2]


def _are_planes_enough(plan: CropPlan, box: tuple[int, int, int, int]) -> bool:
    """Return whether resizing the planes gives the same image as resizing RGB, for less work.

    At a reduction of 2 or more libjpeg decodes chroma at luma's size: nothing would be saved. If the image is averaged
    (INTER_AREA), chroma, which has fewer pixels, would be sampled instead. An image that is not resized gets its exact
    pixels from the RGB path.

    Args:
        plan: Crop of the image.
        box: (top, bottom, left, right) in pixels.
    """
    height, width = box[1] - box[0], box[3] - box[2]
    shrink = max(height / plan.out_height, width / plan.out_width)
    is_resized = (height, width) != (plan.out_height, plan.out_width)
    return plan.reduction == 1 and shrink <= MAX_LINEAR_SHRINK and is_resized


def _is_jpeg(data: Any) -> bool:
    return bytes(memoryview(data)[:3]) == b"\xff\xd8\xff"


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of the elements that are written; uint16 holds the bits of bfloat16, which numpy lacks."""
    return np.dtype(_STORED[dtype])


def _table_of(dtype: str) -> NDArray[Any] | None:
    """Return the values of 0, 1, ... 255, [256]; 16-bit floats as uint16 bits; None for uint8.

    Values are computed in float32 and then rounded, as torch does: they equal torchvision's ToDtype(scale=True) bit for
    bit.
    """
    if dtype == "uint8":
        return None
    values = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    if dtype == "bfloat16":  # the upper 16 bits, rounded to nearest even
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values


def _grown(memory: NDArray[np.uint8], n_bytes: int) -> NDArray[np.uint8]:
    """Return the memory, or new memory of at least n_bytes that does not start on a multiple of 32.

    If rows start on a multiple of 32, libjpeg-turbo writes past the CPU caches (vmovntdq, with AVX2), although they are
    read at once: decoding 512x384 and resizing to 224 took 674 us instead of 584 us.
    """
    if memory.size >= n_bytes:
        return memory
    more = np.empty(n_bytes + 32, np.uint8)
    first = (16 - more.ctypes.data) % 32
    return more[first : first + n_bytes]


def _kept(memory: NDArray[np.uint8], before: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return memory if memory.size <= MAX_KEPT_BYTES else before


def declared_pixels(data: Any) -> int:
    """Return width times height from the header of a PNG or WebP; 0 for other formats or a header that is too short."""
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
    # Exceptions that Pillow's readers raise for damaged files (each reader has its own), and Pillow's warnings if the
    # user has turned them into errors.
    errors = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
    try:
        with pillow.open(io.BytesIO(data)) as image:
            if image.format == "EPS":  # Pillow would start Ghostscript to run the program in it
                raise ValueError("EPS is not supported: an EPS file is a program that draws an image")
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit values
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except import_module("PIL").UnidentifiedImageError as error:
        start = bytes(memoryview(data)[:12])
        raise DecodeError(f"not an image in a supported format: it starts with {start!r}") from error
    except (*errors, Warning, pillow.DecompressionBombError) as error:
        raise DecodeError(str(error) or type(error).__name__) from error
