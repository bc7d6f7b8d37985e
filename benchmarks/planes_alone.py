"""Baseline of `DecodeImage(resize_in="ycbcr")`: a JPEG's 4:2:0 planes from libturbojpeg, resized by OpenCV, then RGB.

It handles only the benchmark's pictures: one size, 4:2:0 subsampling, the centre square.
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
    """Return the library with declared signatures. Raises OSError if the machine does not have it."""
    tj, number, pointer = ctypes.CDLL("libturbojpeg.so.0"), ctypes.c_int, ctypes.c_void_p
    tj.tjInitDecompress.restype = pointer
    tj.tjDecompressToYUVPlanes.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, number, pointer, number, number]
    tj.tjDecodeYUVPlanes.argtypes = [pointer] * 3 + [number, pointer] + [number] * 5
    return tj


class Decoder:
    """A thread's decoder: a handle, memory for the planes of a picture, and memory for the planes of a result."""

    def __init__(self, size: int) -> None:
        self.tj, self.size = library(), size
        self.handle = self.tj.tjInitDecompress()
        # Planes are written in whole 4:2:0 blocks: a plane with an odd side has one more line.
        height, width = IMAGE_HEIGHT + IMAGE_HEIGHT % 2, IMAGE_WIDTH + IMAGE_WIDTH % 2
        self.y = np.empty((height, width), np.uint8)
        self.cb, self.cr = np.empty((2, height // 2, width // 2), np.uint8)
        self.small = np.empty((3, size, size), np.uint8)
        # libjpeg-turbo writes rows that begin at multiples of 32 with non-temporal stores, but they are read at once.
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
        """Decode a JPEG, crop the centre square and resize it into out, uint8[size, size, 3]."""
        data, flag = np.frombuffer(encoded, np.uint8), FAST_DCT if fastdct else ACCURATE_DCT
        picture = data.ctypes.data, data.size, self.planes, IMAGE_WIDTH, None, IMAGE_HEIGHT, flag
        if self.tj.tjDecompressToYUVPlanes(self.handle, *picture):
            raise ValueError("not a picture of the benchmark")
        for part, small in zip(self.parts, self.small, strict=True):
            cv2.resize(part, (self.size, self.size), small, interpolation=cv2.INTER_LINEAR)
        result = self.rgb.ctypes.data, self.size, 0, self.size, RGB, 0
        if self.tj.tjDecodeYUVPlanes(self.handle, self.resized, None, WHOLE_CHROMA, *result):
            raise MemoryError("no memory to convert a picture")
        np.copyto(out, self.rgb)


def decode_into(encoded: Any, out: np.ndarray, *, fastdct: bool) -> None:
    """Decode with the calling thread's Decoder. See Decoder.decode_into."""
    if getattr(_own, "size", None) != out.shape[0]:
        _own.size, _own.decoder = out.shape[0], Decoder(out.shape[0])
    _own.decoder.decode_into(encoded, out, fastdct=fastdct)
