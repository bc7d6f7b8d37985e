"""Decoding of a JPEG into its stored planes, and conversion to RGB at another size, by the system's libturbojpeg.

The usual last steps of decoding, upsampling chroma and converting to RGB, happen after the planes have been resized:
work for the result's pixels instead of the image's. No library on PyPI exposes the planes, so this is an option, and
the code uses only functions that libturbojpeg 2 and 3 both have. Measurements and alternatives:
docs/design/images.md.
"""

from __future__ import annotations

import math
import sys
from ctypes import CDLL, POINTER, c_int, c_ulong, c_void_p
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tiercache.images.options import DecodeImage

    Planes = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]

_MISSING = (
    "resize_in='ycbcr' needs libturbojpeg, which was not found: it is the package libturbojpeg0 (Debian), libturbojpeg "
    "(Ubuntu), turbojpeg (Fedora) or libjpeg-turbo (conda); or use resize_in='rgb', which does not need it"
)
_NAME = "libturbojpeg.so.0"
# Values from turbojpeg.h: TJFLAG_FASTDCT and TJFLAG_ACCURATEDCT, TJCS_YCbCr, TJSAMP_444, TJPF_RGB.
_FLAGS = {"fast": 2048, "accurate": 4096}
_YCBCR, _WHOLE_CHROMA, _RGB = 1, 0, 0
# (down, across): luma pixels that a chroma pixel covers, by TJSAMP: 4:2:2, 4:2:0, 4:4:0. 4:4:4 needs no upsampling. For
# 4:1:1 libjpeg repeats pixels instead of interpolating, so the images would differ by too much.
_STEPS = {1: (1, 2), 2: (2, 2), 4: (2, 1)}
# All steps divide this value: a plane is never longer than its image rounded up to a multiple of it.
_PAD = 2


@dataclass(frozen=True, slots=True)
class JpegPlanesHeader:
    """Header of a JPEG whose chroma has half or a quarter of luma's pixels.

    Attributes:
        size: (height, width) in pixels.
        steps: (down, across), luma pixels that a chroma pixel covers.
    """

    size: tuple[int, int]
    steps: tuple[int, int]

    def boxes(self, box: tuple[int, int, int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return a box (top, bottom, left, right) of the image as (rows, columns) of luma and of chroma.

        The box is widened to whole chroma pixels, so that both planes show the same area. The last chroma pixel of an
        odd side, which covers luma beyond the image, is left out unless it is the only one.
        """
        rows, columns = (_whole(box[2 * axis], box[2 * axis + 1], self.size[axis], self.steps[axis]) for axis in (0, 1))
        return (rows[0], columns[0]), (rows[1], columns[1])


def _whole(first: int, stop: int, side: int, step: int) -> tuple[slice, slice]:
    """Return (luma slice, chroma slice) along one axis."""
    begin = first // step
    end = min(-(-stop // step), max(side // step, begin + 1))
    return slice(begin * step, min(end * step, side)), slice(begin, end)


class _Handle:
    """TurboJPEG decoder for one image.

    A decoder that is reused keeps tables, by which a damaged JPEG without its own tables would be decoded; and after an
    error in a header, version 2 continues in the middle of that header. Creating a decoder takes 0.4 us. Raises
    MemoryError.
    """

    def __init__(self, tj: Any) -> None:
        self._destroy, self.at = tj.tjDestroy, tj.tjInitDecompress()
        if not self.at:
            raise MemoryError("libturbojpeg could not allocate a decoder")

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and getattr(self, "at", None):
            self._destroy(self.at)


class PlaneReader:
    """Reads JPEGs as planes, one after the other: look(), read(), to_rgb(). Owns scratch memory; for use by one thread.

    Args:
        options: Options with dct and size; size must not be None.
        max_kept_bytes: Maximum scratch memory that is kept between images.

    Raises:
        ModuleNotFoundError: libturbojpeg is missing.
    """

    def __init__(self, options: DecodeImage, max_kept_bytes: int) -> None:
        self._tj, self._flags, self._max_kept_bytes = load_turbojpeg(), _FLAGS[options.dct], max_kept_bytes
        self._handle = _Handle(self._tj)
        self._header = c_int(), c_int(), c_int(), c_int()
        self._memory = np.empty(0, np.uint8)
        self.resized = np.empty((3, *options.shape), np.uint8)  # Y, Cb and Cr of a result; the caller fills it
        self._resized_at = _pointers(self.resized)

    def look(self, data: NDArray[np.uint8]) -> JpegPlanesHeader | None:
        """Return the header of a JPEG; None if it is 4:4:4, 4:1:1, grey or of another colour space."""
        self._handle = _Handle(self._tj)
        if self._tj.tjDecompressHeader3(self._handle.at, data.ctypes.data, data.size, *self._header):
            return None
        width, height, sampling, space = (number.value for number in self._header)
        steps = _STEPS.get(sampling)
        return JpegPlanesHeader((height, width), steps) if steps and space == _YCBCR else None

    def read(self, data: NDArray[np.uint8], found: JpegPlanesHeader) -> Planes | None:
        """Return Y, Cb and Cr, valid until the next call, in scratch memory; None if the decoder rejects the image."""
        # Each plane has room for a whole image, and the size is passed explicitly: even if the library reads a
        # different header this time, it does not write outside this memory.
        (height, width), (down, across) = found.size, found.steps
        shape = 3, -(-height // _PAD) * _PAD, -(-width // _PAD) * _PAD
        n_bytes = math.prod(shape)
        memory = self._memory
        if memory.size < n_bytes:
            memory = np.empty(n_bytes, np.uint8)
            if n_bytes <= self._max_kept_bytes:
                self._memory = memory
        y, cb, cr = planes = memory[:n_bytes].reshape(shape)
        strides = (c_int * 3)(shape[2], shape[2], shape[2])
        args = data.ctypes.data, data.size, _pointers(planes), width, strides, height, self._flags
        if self._tj.tjDecompressToYUVPlanes(self._handle.at, *args):
            return None
        chroma = slice(-(-height // down)), slice(-(-width // across))
        return y[:height, :width], cb[chroma], cr[chroma]

    def to_rgb(self, out: NDArray[np.uint8]) -> bool:
        """Convert the planes in `resized` to RGB by JFIF's equations.

        Args:
            out: C-contiguous uint8[h, w, 3], owned by the caller.

        Returns:
            False if the library failed: it limits a side to 65,500 pixels, and may lack memory.
        """
        height, width = out.shape[:2]
        args = _WHOLE_CHROMA, out.ctypes.data, width, 0, height, _RGB, 0
        return not self._tj.tjDecodeYUVPlanes(self._handle.at, self._resized_at, None, *args)


@cache
def load_turbojpeg() -> Any:
    """Return the library with its functions declared.

    Raises:
        ModuleNotFoundError: The library is missing; the message says how to install it.
    """
    for name in (_NAME, str(Path(sys.prefix, "lib", _NAME)), find_library("turbojpeg")):
        try:
            library = CDLL(name) if name else None
        except OSError:
            continue
        if library is not None and hasattr(library, "tjDecompressToYUVPlanes"):
            return _declared(library)
    raise ModuleNotFoundError(_MISSING, name="libturbojpeg")


def _declared(library: CDLL) -> CDLL:
    encoded: list[Any] = [c_void_p, c_void_p, c_ulong]  # handle, pointer to the bytes, number of bytes
    library.tjInitDecompress.restype = c_void_p
    library.tjDestroy.argtypes = [c_void_p]
    library.tjDecompressHeader3.argtypes = [*encoded, *[POINTER(c_int)] * 4]
    library.tjDecompressToYUVPlanes.argtypes = [*encoded, c_void_p, c_int, c_void_p, c_int, c_int]
    library.tjDecodeYUVPlanes.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_void_p, *[c_int] * 5]
    return library


def _pointers(planes: NDArray[np.uint8]) -> Any:
    """Return C pointers to the planes of a C-contiguous [3, h, w] array."""
    first, n_bytes = planes.ctypes.data, planes.shape[1] * planes.shape[2]
    return (c_void_p * 3)(first, first + n_bytes, first + 2 * n_bytes)
