"""A JPEG's planes as they are stored, and their colours at another size, by the system's libturbojpeg.

What a decoder does last, bringing chroma to the size of luma and making RGB of both, is left until the planes have been
resized: work for the result's pixels instead of the picture's. No library that comes as a wheel gives the planes, so
this is an option, and the functions are those that both libturbojpeg 2 and 3 have. Figures and what else was looked at:
docs/design/2026-11-25-images.md.
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
    "(Ubuntu), turbojpeg (Fedora) or libjpeg-turbo (conda); resize_in='rgb' does without"
)
_NAME = "libturbojpeg.so.0"
# Of turbojpeg.h: TJFLAG_FASTDCT and TJFLAG_ACCURATEDCT, TJCS_YCbCr, TJSAMP_444, TJPF_RGB.
_FLAGS = {"fast": 2048, "accurate": 4096}
_YCBCR, _WHOLE_CHROMA, _RGB = 1, 0, 0
# (down, across) that a pixel of chroma covers, by TJSAMP: 4:2:2, 4:2:0, 4:4:0. Of 4:4:4 there is nothing to upsample;
# 4:1:1 libjpeg repeats where it interpolates these, so that the pictures would differ by too much.
_STEPS = {1: (1, 2), 2: (2, 2), 4: (2, 1)}
# All steps divide it: a plane is never more than so much longer than its picture.
_PAD = 2


@dataclass(frozen=True, slots=True)
class Subsampled:
    """A JPEG with half its chroma, or a quarter, by its header.

    Attributes:
        size: (height, width), pixels.
        steps: (down, across), pixels of luma that one of chroma covers.
    """

    size: tuple[int, int]
    steps: tuple[int, int]

    def boxes(self, box: tuple[int, int, int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """A box (top, bottom, left, right) of the picture as (rows, columns) of luma and of chroma.

        Widened to whole pixels of chroma, so that both show the same; but the last one of an odd side, which covers
        luma beyond the picture, is left out unless it is all that there is.
        """
        rows, columns = (_whole(box[2 * axis], box[2 * axis + 1], self.size[axis], self.steps[axis]) for axis in (0, 1))
        return (rows[0], columns[0]), (rows[1], columns[1])


def _whole(first: int, stop: int, side: int, step: int) -> tuple[slice, slice]:
    """(of luma, of chroma) along one axis."""
    begin = first // step
    end = min(-(-stop // step), max(side // step, begin + 1))
    return slice(begin * step, min(end * step, side)), slice(begin, end)


class _Handle:
    """A decoder of TurboJPEG, for one picture.

    From picture to picture it would keep tables, which a damaged JPEG without its own would be decoded by; and after an
    error in a header version 2 goes on in the middle of it. Making one takes 0.4 us. Raises MemoryError.
    """

    def __init__(self, tj: Any) -> None:
        self._destroy, self.at = tj.tjDestroy, tj.tjInitDecompress()
        if not self.at:
            raise MemoryError("libturbojpeg has no memory for a decoder")

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and getattr(self, "at", None):
            self._destroy(self.at)


class PlaneReader:
    """Reads JPEGs as planes, one after the other: look, read, to_rgb. Owns scratch memory: one thread.

    Args:
        options: dct, and size, which must be one.
        max_kept_bytes: of scratch memory that is kept from picture to picture.

    Raises:
        ModuleNotFoundError: there is no libturbojpeg.
    """

    def __init__(self, options: DecodeImage, max_kept_bytes: int) -> None:
        self._tj, self._flags, self._max_kept_bytes = load_turbojpeg(), _FLAGS[options.dct], max_kept_bytes
        self._handle = _Handle(self._tj)
        self._header = c_int(), c_int(), c_int(), c_int()
        self._memory = np.empty(0, np.uint8)
        self.resized = np.empty((3, *options.shape), np.uint8)  # Y, Cb and Cr of a result, for the caller to fill
        self._resized_at = _pointers(self.resized)

    def look(self, data: NDArray[np.uint8]) -> Subsampled | None:
        """What its header says of a JPEG; None for one in 4:4:4, 4:1:1, grey or another kind of colours."""
        self._handle = _Handle(self._tj)
        if self._tj.tjDecompressHeader3(self._handle.at, data.ctypes.data, data.size, *self._header):
            return None
        width, height, sampling, space = (number.value for number in self._header)
        steps = _STEPS.get(sampling)
        return Subsampled((height, width), steps) if steps and space == _YCBCR else None

    def read(self, data: NDArray[np.uint8], found: Subsampled) -> Planes | None:
        """Y, Cb and Cr, in scratch memory that is good until the next call; None where something is wrong with it."""
        # Each has room for a whole picture, and the size is named: should the library read another header this time, it
        # does not write beyond all of it.
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
        """Make RGB of what stands in `resized`, by JFIF's equations. out: C-contiguous [h, w, 3], the caller's.

        False: it was not made; the library has limits to a side, 65,500 pixels, and memory.
        """
        height, width = out.shape[:2]
        args = _WHOLE_CHROMA, out.ctypes.data, width, 0, height, _RGB, 0
        return not self._tj.tjDecodeYUVPlanes(self._handle.at, self._resized_at, None, *args)


@cache
def load_turbojpeg() -> Any:
    """The library, its functions declared. Raises ModuleNotFoundError saying whence to get it."""
    for name in (_NAME, str(Path(sys.prefix, "lib", _NAME)), find_library("turbojpeg")):
        try:
            library = CDLL(name) if name else None
        except OSError:
            continue
        if library is not None and hasattr(library, "tjDecompressToYUVPlanes"):
            return _declared(library)
    raise ModuleNotFoundError(_MISSING, name="libturbojpeg")


def _declared(library: CDLL) -> CDLL:
    encoded: list[Any] = [c_void_p, c_void_p, c_ulong]  # handle, bytes, how many
    library.tjInitDecompress.restype = c_void_p
    library.tjDestroy.argtypes = [c_void_p]
    library.tjDecompressHeader3.argtypes = [*encoded, *[POINTER(c_int)] * 4]
    library.tjDecompressToYUVPlanes.argtypes = [*encoded, c_void_p, c_int, c_void_p, c_int, c_int]
    library.tjDecodeYUVPlanes.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_void_p, *[c_int] * 5]
    return library


def _pointers(planes: NDArray[np.uint8]) -> Any:
    """Those of [3, h, w], C-contiguous, for C."""
    first, n_bytes = planes.ctypes.data, planes.shape[1] * planes.shape[2]
    return (c_void_p * 3)(first, first + n_bytes, first + 2 * n_bytes)
