"""Planes of a JPEG in 4:2:0 by libturbojpeg, resized by OpenCV and then made RGB: by hand, with nothing around it.

The baseline of `DecodeImage(resize_in="ycbcr")`, for pictures of the benchmark alone: one size, 4:2:0, the centre.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import cv2
import numpy as np

from workloads import IMAGE_HEIGHT, IMAGE_WIDTH

FAST_DCT, ACCURATE_DCT, RGB, WHOLE_CHROMA = 2048, 4096, 0, 0
_own = threading.local()


def library() -> Any:
    """The library, declared. Raises OSError where the machine has none."""
    tj, number, pointer = ctypes.CDLL("libturbojpeg.so.0"), ctypes.c_int, ctypes.c_void_p
    tj.tjInitDecompress.restype = pointer
    tj.tjDecompressToYUVPlanes.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, number, pointer, number, number]
    tj.tjDecodeYUVPlanes.argtypes = [pointer] * 3 + [number, pointer] + [number] * 5
    return tj


class Decoder:
    """A thread's own: a handle, room for the planes of a picture, and for those of a result."""

    def __init__(self, size: int) -> None:
        self.tj, self.size = library(), size
        self.handle = self.tj.tjInitDecompress()
        # Planes are written in whole blocks of 4:2:0: of an odd side one line more.
        height, width = IMAGE_HEIGHT + IMAGE_HEIGHT % 2, IMAGE_WIDTH + IMAGE_WIDTH % 2
        self.y = np.empty((height, width), np.uint8)
        self.cb, self.cr = np.empty((2, height // 2, width // 2), np.uint8)
        self.small = np.empty((3, size, size), np.uint8)
        # libjpeg-turbo writes rows that begin on multiples of 32 past the caches, and they are read at once.
        memory = np.empty(3 * size * size + 32, np.uint8)
        first = (16 - memory.ctypes.data) % 32
        self.rgb = memory[first : first + 3 * size * size].reshape(size, size, 3)
        self.planes = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in (self.y, self.cb, self.cr)))
        self.resized = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in self.small))
        side = min(IMAGE_HEIGHT, IMAGE_WIDTH) // 2
        top, left = (height // 2 - side) // 2, (width // 2 - side) // 2
        chroma = slice(top, top + side), slice(left, left + side)
        luma = slice(2 * top, 2 * (top + side)), slice(2 * left, 2 * (left + side))
        self.parts = (self.y[luma], self.cb[chroma], self.cr[chroma])

    def decode_into(self, encoded: Any, out: np.ndarray, *, fastdct: bool) -> None:
        """Decode a JPEG, cut the centre square and resize it into out, uint8[size, size, 3]."""
        data, flag = np.frombuffer(encoded, np.uint8), FAST_DCT if fastdct else ACCURATE_DCT
        picture = data.ctypes.data, data.size, self.planes, IMAGE_WIDTH, None, IMAGE_HEIGHT, flag
        if self.tj.tjDecompressToYUVPlanes(self.handle, *picture):
            raise ValueError("no picture of the benchmark")
        for part, small in zip(self.parts, self.small, strict=True):
            cv2.resize(part, (self.size, self.size), small, interpolation=cv2.INTER_LINEAR)
        result = self.rgb.ctypes.data, self.size, 0, self.size, RGB, 0
        if self.tj.tjDecodeYUVPlanes(self.handle, self.resized, None, WHOLE_CHROMA, *result):
            raise MemoryError("no memory for a row")
        np.copyto(out, self.rgb)


def decode_into(encoded: Any, out: np.ndarray, *, fastdct: bool) -> None:
    """As Decoder's, by the thread's own one."""
    if getattr(_own, "size", None) != out.shape[0]:
        _own.size, _own.decoder = out.shape[0], Decoder(out.shape[0])
    _own.decoder.decode_into(encoded, out, fastdct=fastdct)
