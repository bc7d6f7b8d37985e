"""Decodes many zstd frames of a shard into one allocation of pooled memory.

With a libzstd on the machine, one call decodes all frames without the GIL. Reason: beside a consumer thread that runs
Python code, a thread that needs the GIL after each frame waits 5 ms each time, and decodes at half the speed or less.
Without a libzstd, python-zstandard decodes frame by frame, with the same result.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native.frames import Decoder
from tiercache.shard import codec
from tiercache.shard.layout import align
from tiercache.shard.memory import BUFFER_POOL
from tiercache.shard.source import Bytes, address_of

_Uint64s = npt.NDArray[np.uint64]

_FUNCTIONS = ("ZSTD_createDCtx", "ZSTD_freeDCtx", "ZSTD_decompressDCtx", "ZSTD_getFrameContentSize")
# Creating a decoder costs more than decoding a small frame; a decoder is for one thread at a time.
_here = threading.local()


class BadFrameError(codec.CodecError):
    """A zstd frame is damaged. number: Index of the frame among the given ones."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True, slots=True)
class Frames:
    """n frames in memory, uint64[n] each: their addresses, their stored lengths and their decoded lengths in bytes."""

    addresses: _Uint64s
    stored: _Uint64s
    raw: _Uint64s


def decode(frames: Frames) -> tuple[Bytes, _Uint64s]:
    """Decode all frames.

    Returns:
        The memory that holds the decoded content, which the caller owns; and the address of the content of each frame,
        uint64[n], a multiple of 64.

    Raises:
        BadFrameError: A frame does not hold the stated number of bytes. Nothing is written beyond that length.
    """
    lengths = np.array([align(n_bytes) for n_bytes in frames.raw.tolist()], np.uint64)
    ends = np.cumsum(lengths, dtype=np.uint64)
    memory = BUFFER_POOL.allocate(int(ends[-1]) if len(ends) else 0)
    out = np.uint64(address_of(memory)) + ends - lengths
    n_right = _decode_native(frames, out)
    for number in range(n_right, len(out)):  # the first of these may be damaged; _decode_one raises the reason
        _decode_one(frames, number, memory[int(ends[number] - lengths[number]) :][: int(frames.raw[number])])
    return memory, out


def _decode_native(frames: Frames, out: _Uint64s) -> int:
    """Decode frames in one call, until the first bad one. Returns the number of decoded frames; 0 without a libzstd."""
    if not hasattr(_here, "decoder"):
        functions = find_libzstd()
        _here.decoder = None if functions is None else Decoder(*functions)
    if _here.decoder is None:
        return 0
    columns = [np.ascontiguousarray(numbers, np.uint64) for numbers in (frames.addresses, frames.stored)]
    n_right: int = _here.decoder.decode(*columns, out, np.ascontiguousarray(frames.raw, np.uint64))
    return n_right


def _decode_one(frames: Frames, number: int, content: Bytes) -> None:
    stored = memoryview(pa.foreign_buffer(int(frames.addresses[number]), int(frames.stored[number])))
    try:
        codec.decompress_into(stored, content.data)
    except codec.CodecError as error:
        raise BadFrameError(number, str(error)) from error


@cache
def find_libzstd() -> tuple[int, int, int, int] | None:
    """Return the addresses of the functions that a Decoder needs, or None.

    They come from the system's libzstd, else from the libzstd that the module zstandard._cffi exports.
    """
    part = importlib.util.find_spec("zstandard._cffi")
    for name in ("libzstd.so.1", part.origin if part is not None else None):
        try:
            if name is None:
                continue
            library = ctypes.CDLL(name)
            create, destroy, decode_frame, promise = (
                ctypes.cast(getattr(library, function), ctypes.c_void_p).value or 0 for function in _FUNCTIONS
            )
        except (OSError, AttributeError):
            continue
        if create and destroy and decode_frame and promise:
            return create, destroy, decode_frame, promise
    return None
