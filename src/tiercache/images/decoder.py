"""Decoder of encoded images into the caller's memory.

It decodes JPEG by simplejpeg (libjpeg-turbo), PNG and WebP by OpenCV, and other formats by
Pillow; `_native/pixels` resizes, adjusts colours and normalises. All of them release the GIL.
docs/design.md holds the measurements behind this choice.
decode_image.py says what becomes of an image: crop, mirroring and colours.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiercache._native import pixels
from tiercache.distribution import install_command
from tiercache.errors import SchemaError
from tiercache.images.decode_image import (
    N_COLOUR_DRAWS,
    CropPlan,
    DecodeImage,
    colour_tables,
    fresh_draws,
    plan_colours,
    plan_crop,
)
from tiercache.shard.conversion import bfloat16_tensor
from tiercache.shard.values import ColumnValues

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

_ORIENTATION = 274  # tag of EXIF
# Exceptions of the readers of Pillow for damaged files; each has its own. Warnings, which the user may have turned into
# errors, are caught beside them.
_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
# By EXIF orientation, how OpenCV's flip() mirrors an image; those from 5 on are transposed before.
_FLIP_CODES = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}

_STORED = {"uint8": "u1", "float32": "f4", "float16": "f2", "bfloat16": "u2"}


class DecodeError(ValueError):
    """The bytes are not an image, or a damaged one; the text is the decoder's message."""


class Decoder:
    """Decodes images as the options say. Owns scratch memory that grows to the largest image; for use by one thread."""

    def __init__(self, options: DecodeImage) -> None:
        self._options = options
        self._jpeg, self._cv2, self._pillow = load_libraries()
        self._kept: dict[str, NDArray[np.uint8]] = {}
        self._tables = colour_tables(options)

    def decode_into(self, data: Any, draws: Sequence[float], out: NDArray[Any]) -> None:
        """Decode an image into out, C-contiguous: options.memory_shape(*options.shape) and stored_dtype(options.dtype).

        If it raises DecodeError, the contents of out are undefined.
        """
        picture, plan, reduction = self._picture(data, draws)
        self._render(picture, plan, reduction, out, draws)

    def decode(self, data: Any, draws: Sequence[float]) -> NDArray[Any]:
        """Decode an image into new memory, of the image's own size if options.size is None.

        The result has the shape options.memory_shape(height, width); see in_layout. Raises DecodeError.
        """
        options = self._options
        picture, plan, reduction = self._picture(data, draws)
        out = np.empty(options.memory_shape(plan.out_height, plan.out_width), stored_dtype(options.dtype))
        self._render(picture, plan, reduction, out, draws)
        return out

    def _picture(self, data: Any, draws: Sequence[float]) -> tuple[NDArray[np.uint8], CropPlan, int]:
        """Return the decoded image and its plan, as the image is shown, and the factor by which the decoder shrank it.

        The image is uint8[h, w, 3], and may lie in scratch memory.
        """
        reads_exif, orientation, picture = self._options.apply_exif_orientation, 1, None
        if bytes(memoryview(data)[:3]) == b"\xff\xd8\xff":
            orientation = jpeg_orientation(data, self._pillow) if reads_exif else 1
            size, space = self._jpeg_header(data)
            if space in _JPEG_SPACES:
                shown = size if orientation <= 4 else (size[1], size[0])
                plan = plan_crop(*shown, self._options, draws)
                reduction = plan.reduction(self._options.dct)
                picture = self._decode_jpeg(data, size, reduction)
                if picture is not None:
                    return self._turned(picture, orientation), plan, reduction
        # OpenCV turns a PNG, but not a WebP.
        elif 0 < declared_pixels(data) <= MAX_PIXELS and not (reads_exif and bytes(memoryview(data)[:4]) == b"RIFF"):
            picture = self._decode_cv2(data)
        if picture is None:
            picture, orientation = _decode_pillow(self._pillow, data, with_orientation=reads_exif)
            picture = self._turned(picture, orientation)
        height, width = picture.shape[:2]
        return picture, plan_crop(height, width, self._options, draws), 1

    def _turned(self, picture: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
        if orientation > 4:
            picture = self._cv2.transpose(picture)
        code = _FLIP_CODES.get(orientation)
        return picture if code is None else self._cv2.flip(picture, code)

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
        how: dict[str, Any] = (
            {"min_height": height, "min_width": width, "min_factor": reduction} if reduction > 1 else {}
        )
        how |= {"buffer": self._scratch("decoded", n_bytes), "fastdct": self._options.dct == "fast"}
        try:
            picture: NDArray[np.uint8] = self._jpeg.decode_jpeg(data, **how)
        except ValueError:
            return None
        return picture

    def _decode_cv2(self, data: Any) -> NDArray[np.uint8] | None:
        cv2, how = self._cv2, self._cv2.IMREAD_COLOR_RGB
        if not self._options.apply_exif_orientation:
            how |= cv2.IMREAD_IGNORE_ORIENTATION
        try:
            picture: NDArray[np.uint8] | None = cv2.imdecode(np.frombuffer(data, np.uint8), how)
        except cv2.error:
            return None
        return picture

    def _render(
        self,
        picture: NDArray[np.uint8],
        plan: CropPlan,
        reduction: int,
        out: NDArray[Any],
        draws: Sequence[float],
    ) -> None:
        options = self._options
        rows, columns = plan.axes((picture.shape[0], picture.shape[1]), reduction)
        is_direct = options.layout != "CHW" and options.dtype == "uint8"
        shown = out
        if not is_direct or options.has_jitter:
            shape = plan.out_height, plan.out_width, 3
            shown = self._scratch("resized", math.prod(shape)).reshape(shape)
        if rows.is_copy(plan.out_height) and columns.is_copy(plan.out_width):
            top, left = int(rows.start), int(columns.start)
            np.copyto(shown, picture[top : top + plan.out_height, left : left + plan.out_width])
        else:
            pixels.resize(picture, rows, columns, shown)
        if plan.flip:
            self._cv2.flip(shown, 1, shown)
        if shown is not out:
            self._convert(shown, out, plan_colours(options, draws))

    def _scratch(self, name: str, n_bytes: int) -> NDArray[np.uint8]:
        """Return scratch memory of n_bytes that does not start on a multiple of 32, and keep it unless it is large.

        If rows start on a multiple of 32, libjpeg-turbo writes past the CPU caches (vmovntdq, with AVX2), although they
        are read at once: decoding 512x384 and resizing to 224 took 674 us instead of 584 us.
        """
        memory = self._kept.get(name)
        if memory is None or memory.size < n_bytes:
            more = np.empty(n_bytes + 32, np.uint8)
            first = (16 - more.ctypes.data) % 32
            memory = more[first : first + n_bytes]
            if n_bytes <= MAX_KEPT_BYTES:
                self._kept[name] = memory
        return memory[:n_bytes]

    def _convert(self, shown: NDArray[np.uint8], out: NDArray[Any], steps: Sequence[tuple[int, float]]) -> None:
        cv2, tables, to_planar, source = self._cv2, self._tables, self._options.layout == "CHW", shown
        is_planar = bool(steps) or to_planar
        if is_planar:
            # cv2.split takes 7 us, a transposed numpy copy 45 us.
            is_direct = tables is None and to_planar
            source = out if is_direct else self._scratch("planes", shown.size).reshape(3, *shown.shape[:2])
            cv2.split(shown, list(source))
            if steps:
                pixels.adjust(source.reshape(3, -1), steps)
        if tables is not None:
            pixels.look_up(source.reshape(-1), is_planar, tables, out.reshape(-1).view(np.uint8), to_planar)
        elif is_planar and not to_planar:
            cv2.merge(list(source), out)
        elif source is not out:
            np.copyto(out, source)


def image_checker() -> Callable[[bytes], str | None]:
    """Return a function, for use by one thread, that says why an image cannot be decoded; None if it can."""
    decoder = Decoder(DecodeImage(None, layout="HWC"))

    def check(data: bytes) -> str | None:
        try:
            decoder.decode(data, ())
        except DecodeError as error:
            return f"it cannot be decoded: {error}"
        return None

    return check


def load_libraries() -> tuple[Any, Any, Any]:
    """Return the modules simplejpeg, cv2 and PIL.Image."""
    found = []
    for module, distribution in _LIBRARIES.items():
        try:
            found.append(import_module(module))
        except ModuleNotFoundError as error:
            message = f"decoding images needs {distribution}, which is not installed: {install_command('images')}"
            raise ModuleNotFoundError(message, name=error.name) from error
    return found[0], found[1], found[2]


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of the elements that are written; uint16 holds the bits of bfloat16, which numpy lacks."""
    return np.dtype(_STORED[dtype])


def in_layout(stored: Any, options: DecodeImage) -> Any:
    """Return images as they lie in memory, [..., height, width, 3], in the layout of the options; without a copy."""
    return stored.swapaxes(-1, -3).swapaxes(-1, -2) if options.layout == "channels_last" else stored


def jpeg_orientation(data: Any, pillow: Any) -> int:
    """Return the EXIF orientation of a JPEG, 1 to 8; 1 if it states none, or Pillow cannot read it."""
    try:
        with open_by_pillow(pillow, data) as image:
            return orientation_of(image)
    except DecodeError:
        return 1


def orientation_of(image: Any) -> int:
    """Return the EXIF orientation of an image of Pillow, 1 to 8. Raises what Pillow raises for damaged EXIF."""
    return _valid_orientation(image.getexif().get(_ORIENTATION, 1))


@contextmanager
def open_by_pillow(pillow: Any, data: Any) -> Iterator[Any]:
    """Open an image by Pillow. Its errors, inside the block too, are raised as DecodeError."""
    try:
        with pillow.open(io.BytesIO(data)) as image:
            if image.format == "EPS":  # Pillow would start Ghostscript to run the program in it
                raise ValueError("EPS is not supported: an EPS file is a program that draws an image")
            yield image
    except import_module("PIL").UnidentifiedImageError as error:
        start = bytes(memoryview(data)[:12])
        raise DecodeError(f"not an image in a supported format: it starts with {start!r}") from error
    except (*_PILLOW_ERRORS, Warning, pillow.DecompressionBombError) as error:
        raise DecodeError(str(error) or type(error).__name__) from error


def eight_bits(image: Any) -> NDArray[np.uint8]:
    """Return the grey values of an image of Pillow with 16 bits. Pillow itself would clip them."""
    return (np.asarray(image) >> 8).astype(np.uint8)


def _valid_orientation(found: Any) -> int:
    return found if found in range(1, 9) else 1


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


def _decode_pillow(pillow: Any, data: Any, *, with_orientation: bool) -> tuple[NDArray[np.uint8], int]:
    """Return the image, and the EXIF orientation that is still to be applied, if asked. Raises DecodeError."""
    with open_by_pillow(pillow, data) as image:
        if image.mode.startswith("I;16"):
            picture = np.repeat(eight_bits(image)[:, :, None], 3, axis=2)
        else:
            picture = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        # After the pixels: Pillow turns a TIFF itself when it reads them, and then drops the tag.
        return picture, orientation_of(image) if with_orientation else 1


Explain = Callable[[str, int, str], Exception]
"""Function of (column, index among the records that were read, decoder's message) that returns the error to raise."""


def decode_columns(
    columns: Sequence[ColumnValues], decode: Mapping[str, DecodeImage], explain: Explain
) -> list[ColumnValues]:
    """Return the columns, with the image columns decoded: arrays [n, ...], zero for a null, or lists if sizes differ.

    Random numbers come from torch's generator if torch is imported, else from numpy's global one.
    """
    n = len(columns[0].values) if columns else 0
    draws: Sequence[Sequence[float]] = [()] * n
    if any(options.is_random for options in decode.values()):
        drawn = [fresh_draws(n)]
        if any(options.has_jitter for options in decode.values()):
            drawn.append(fresh_draws(n, N_COLOUR_DRAWS))
        draws = np.concatenate(drawn, axis=1).tolist()
    return [
        _decoded(found, decode[found.column.name], draws, explain) if found.column.name in decode else found
        for found in columns
    ]


def _decoded(
    found: ColumnValues, options: DecodeImage, draws: Sequence[Sequence[float]], explain: Explain
) -> ColumnValues:
    decoder, n = Decoder(options), len(found.values)
    whole = options.size is None
    out: Any = [None] * n
    if not whole:
        out = np.zeros((n, *options.memory_shape(*options.shape)), stored_dtype(options.dtype))
    for index, data in enumerate(found.values):
        if data is None:
            continue
        try:
            if whole:
                out[index] = _typed(decoder.decode(data, draws[index]), options, found.column.name)
            else:
                decoder.decode_into(data, draws[index], out[index])
        except DecodeError as error:
            raise explain(found.column.name, index, str(error)) from error
    return ColumnValues(found.column, out if whole else _typed(out, options, found.column.name), found.valid)


def _typed(stored: Any, options: DecodeImage, column: str) -> Any:
    if options.dtype != "bfloat16":
        return in_layout(stored, options)
    tensor = bfloat16_tensor(stored)
    if tensor is None:
        message = "images of dtype bfloat16 are torch tensors: import torch first (numpy has no such dtype)"
        raise SchemaError(message, column=column, expected="torch", got="no torch")
    return in_layout(tensor, options)
