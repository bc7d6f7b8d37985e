"""Codecs of chunks (raw and zstd): their choice, decoding that never exceeds the stated length, and pooled memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

from tiercache._native.zstd import ZstdDecoder
from tiercache.shard.schema import Kind

Bytes: TypeAlias = npt.NDArray[np.uint8]
Addresses: TypeAlias = npt.NDArray[np.uint64]
# Alignment of chunks and buffers.
ALIGN_BYTES = 64
# Size of a huge page: one page fault instead of 512. Two threads decoded 2,190 MB/s into touched memory, and 630 MB/s
# into fresh pages of 4 KiB.
HUGE_PAGE_BYTES = 2 << 20
# Smaller allocations come from malloc, which keeps touched memory itself.
SMALL_BYTES = 1 << 20
# A free allocation is reused for a request if it is at most this many times larger.
FIT = 2


def aligned_empty(n_bytes: int) -> Bytes:
    memory = np.empty(n_bytes + ALIGN_BYTES, np.uint8)
    start = -address_of(memory) % ALIGN_BYTES
    return memory[start : start + n_bytes]


def address_of(memory: npt.NDArray[Any]) -> int:
    address: int = memory.__array_interface__["data"][0]
    return address


class _Allocation:
    """An allocation of private pages whose address is a multiple of HUGE_PAGE_BYTES."""

    __slots__ = ("address", "n_bytes", "pages")

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        # MAP_PRIVATE, because by default Python maps memory that a forked child process would share.
        self.pages = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = address_of(np.frombuffer(self.pages, np.uint8))
        self.address = start + -start % HUGE_PAGE_BYTES
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # the kernel has no huge pages
                self.pages.madvise(mmap.MADV_HUGEPAGE)


class _Loan:
    """The owner that all arrays over an allocation reference; its deletion returns the allocation to the pool."""

    def __init__(self, pool: BufferPool, allocation: _Allocation, n_bytes: int) -> None:
        self._pool, self._allocation = pool, allocation
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (n_bytes,),
            "typestr": "|u1",
            "data": (allocation.address, False),
        }

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting():
            self._pool.release(self._allocation)


class BufferPool:
    """Pool of memory. Thread-safe; the garbage collector may return memory at any moment.

    There is no lock, because a fork could leave it locked, and a garbage collection under it would deadlock. Each step
    is one operation of a dict or list; at worst, two threads keep one allocation too many for a moment. The pool keeps
    at most as many free bytes as are in use.
    """

    def __init__(self) -> None:
        self._lent: dict[int, _Allocation] = {}
        self._free: list[_Allocation] = []

    def allocate(self, n_bytes: int) -> Bytes:
        """Return writable, uninitialised uint8[n_bytes], aligned to 64 bytes, or to HUGE_PAGE_BYTES if it is large."""
        if n_bytes < SMALL_BYTES:
            return aligned_empty(n_bytes)
        allocation = self._find(n_bytes) or _Allocation(-(-n_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
        self._lent[id(allocation)] = allocation
        return np.asarray(_Loan(self, allocation, n_bytes))

    def release(self, allocation: _Allocation) -> None:
        self._lent.pop(id(allocation), None)
        self._free.append(allocation)
        while self._free and self.free_bytes > self.used_bytes:
            with contextlib.suppress(IndexError):  # another thread took the last allocation
                self._free.pop(0)

    @property
    def used_bytes(self) -> int:
        return sum(allocation.n_bytes for allocation in list(self._lent.values()))

    @property
    def free_bytes(self) -> int:
        return sum(allocation.n_bytes for allocation in list(self._free))

    def _find(self, n_bytes: int) -> _Allocation | None:
        """Remove and return the smallest free allocation that fits; None if none fits."""
        fitting = [
            allocation
            for allocation in list(self._free)
            if n_bytes <= allocation.n_bytes <= FIT * n_bytes + HUGE_PAGE_BYTES
        ]
        for allocation in sorted(fitting, key=lambda allocation: allocation.n_bytes):
            with contextlib.suppress(ValueError):  # another thread took the allocation
                self._free.remove(allocation)
                return allocation
        return None


# One pool for the process, so that loaders reuse each other's memory.
BUFFER_POOL = BufferPool()


def align(n_bytes: int) -> int:
    return (n_bytes + ALIGN_BYTES - 1) // ALIGN_BYTES * ALIGN_BYTES


# The number of a codec is never reused. The field has 32 bits, so a later codec may store, for example, the number of a
# dictionary in the upper half; this release then sees an unknown codec.
RAW = 0
ZSTD = 1
CODECS = (RAW, ZSTD)
DEFAULT_LEVEL = 3
FOOTER_LEVEL = 3
MAX_LEVEL = 22
# A longer chunk is stored raw, so a reader may refuse to decode a frame of more bytes.
ZSTD_LIMIT_BYTES = 1 << 30
# A block of a zstd frame takes at least 4 bytes and holds at most 128 KiB, so this is the largest ratio of a frame. A
# frame that states a larger one is refused before memory is allocated.
MAX_ZSTD_RATIO = (128 << 10) // 4
# "auto" compresses the chunks of a column in this many blocks as a test, and keeps zstd for the column if the frames
# have at most this fraction of the raw bytes. The limit also applies to each single frame. Compression pays if the
# saved fraction exceeds D / Z, where D is the read speed of the disk (1 to 3 GB/s) and Z the decoding speed of all
# cores (1 to 1.8 GB/s each, 2 to 4 cores). For data in the page cache it never pays.
MEASURED_BLOCKS = 4
MAX_ZSTD_FRACTION = 1 / 2
# "auto" stores shorter chunks raw: they are a small fraction of their block, and reading a frame of 4 KiB costs about
# 15 us. For the labels beside 512 MiB of tokens that was 16 ms before the first batch of each epoch.
MIN_ZSTD_BYTES = 16 << 10
# "auto" stores a block raw if its columns together save less than this fraction. A shard of raw chunks is served from
# the mapping; a shard with frames is decoded in every epoch. Example: compressed labels beside 124 bytes of vector and
# text saved a twentieth of the bytes, and cost a fifth of the epoch's time.
MIN_SAVED_FRACTION = 1 / 8
# Contexts and the decoder: creating one costs more than a small chunk; each is for one thread at a time.
_here = threading.local()


class CodecError(ValueError):
    """A zstd frame is damaged, or does not have the expected length."""


class UnknownCodecError(ValueError):
    """A chunk uses a codec of a later release. needed: Description of the codec."""

    def __init__(self, needed: str) -> None:
        super().__init__(f"this release does not know {needed}")
        self.needed = needed


def compress(data: Any, level: int) -> bytes:
    """Return data as a zstd frame that states its content length. It has no zstd checksum; chunks have a CRC-32C."""
    compressors = _here.__dict__.setdefault("compressors", {})
    if level not in compressors:
        compressors[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
    frame: bytes = compressors[level].compress(data)
    return frame


def decompress(frame: bytes | memoryview, raw_bytes: int) -> memoryview:
    """Return the content of a frame, read-only. Raises CodecError unless it has raw_bytes bytes."""
    _check_promise(frame, raw_bytes)  # before memory is allocated
    out = bytearray(raw_bytes)
    decompress_into(frame, memoryview(out))
    return memoryview(out).toreadonly()


def decompress_into(frame: bytes | memoryview, out: memoryview) -> None:
    """Decode a frame into out without the GIL. Raises CodecError unless the content has that length."""
    _check_promise(frame, len(out))
    try:
        if not hasattr(_here, "decompressor"):
            _here.decompressor = zstandard.ZstdDecompressor()
        with _here.decompressor.stream_reader(frame, read_across_frames=False) as reader:
            filled = reader.readinto(out) if len(out) else 0
    except zstandard.ZstdError as error:
        raise CodecError(f"its zstd frame cannot be decoded: {error}") from error
    if filled != len(out):
        raise CodecError(f"its zstd frame gave {filled} bytes, expected {len(out)}")


def _check_promise(frame: bytes | memoryview, raw_bytes: int) -> None:
    try:
        promised = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise CodecError(f"it is not a zstd frame: {error}") from error
    if promised != raw_bytes:
        raise CodecError(f"its zstd frame states {promised} bytes, expected {raw_bytes}")
    if raw_bytes > MAX_ZSTD_RATIO * len(frame):
        raise CodecError(f"its zstd frame of {len(frame)} bytes cannot hold {raw_bytes} bytes")


def parse_compression(text: str) -> int | None:
    """Return the zstd level of a compression such as "zstd:9", or None for "none". Raises ValueError."""
    if text == "none":
        return None
    if text in ("auto", "zstd"):
        return DEFAULT_LEVEL
    name, _, level = str(text).partition(":")
    if name != "zstd" or not level.isascii() or not level.isdigit() or not 1 <= int(level) <= MAX_LEVEL:
        raise ValueError(f"compression must be 'auto', 'none', 'zstd' or 'zstd:1' to 'zstd:{MAX_LEVEL}', got {text!r}")
    return int(level)


class BlockCodec:
    """Chooses the codec of each chunk, from compression and kind of each column. Not thread-safe."""

    def __init__(self, columns: Sequence[tuple[str, Kind]]) -> None:
        # Encoded images are compressed already, so no block is compressed as a test.
        self._levels = [
            None if text == "auto" and kind is Kind.IMAGE else parse_compression(text) for text, kind in columns
        ]
        self._is_forced = [
            level is not None and text != "auto" for level, (text, _) in zip(self._levels, columns, strict=True)
        ]
        # The first blocks of each column that "auto" compressed: their number, raw bytes and bytes of the frames.
        self._tried = [(0, 0, 0)] * len(columns)
        self._raw_bytes = self._saved_bytes = self._n_blocks = 0

    def encode(self, lengths: Sequence[int], chunk: Callable[[int], Any]) -> list[bytes | None]:
        """Return for each column the chunk as a zstd frame, or None if it should be stored raw.

        chunk() returns the chunk of a column as a contiguous buffer that is valid until the next call.
        """
        is_forced = any(self._is_forced)
        raw: list[bytes | None] = [None] * len(lengths)
        is_measured = self._n_blocks == MEASURED_BLOCKS
        if is_measured and not is_forced and self._saved_bytes < MIN_SAVED_FRACTION * self._raw_bytes:
            return raw
        frames = [self._frame(number, n_bytes, chunk) for number, n_bytes in enumerate(lengths)]
        saved_bytes = sum(n - len(frame) for n, frame in zip(lengths, frames, strict=True) if frame is not None)
        if not is_measured:
            self._n_blocks += 1
            self._raw_bytes += sum(lengths)
            self._saved_bytes += saved_bytes
        return raw if not is_forced and saved_bytes < MIN_SAVED_FRACTION * sum(lengths) else frames

    def _frame(self, column: int, n_bytes: int, chunk: Callable[[int], Any]) -> bytes | None:
        level, is_forced = self._levels[column], self._is_forced[column]
        if level is None or not (1 if is_forced else MIN_ZSTD_BYTES) <= n_bytes <= ZSTD_LIMIT_BYTES:
            return None
        frame = compress(chunk(column), level)
        if is_forced:
            return frame
        n_tried, raw_bytes, zstd_bytes = self._tried[column]
        if n_tried < MEASURED_BLOCKS:
            self._tried[column] = n_tried + 1, raw_bytes + n_bytes, zstd_bytes + len(frame)
            if n_tried + 1 == MEASURED_BLOCKS and zstd_bytes + len(frame) > (raw_bytes + n_bytes) * MAX_ZSTD_FRACTION:
                self._levels[column] = None
        return frame if len(frame) <= n_bytes * MAX_ZSTD_FRACTION else None


_FUNCTIONS = ("ZSTD_createDCtx", "ZSTD_freeDCtx", "ZSTD_decompressDCtx", "ZSTD_getFrameContentSize")


class BadFrameError(CodecError):
    """A zstd frame is damaged. number: Index of the frame among the given ones."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def decode(addresses: Addresses, stored: Addresses, raw: Addresses) -> tuple[Bytes, Addresses]:
    """Decode n frames, given by addresses, stored lengths and decoded lengths, uint64[n].

    Returns the memory of the content, which the caller owns, and the address of each content, a multiple of 64. Raises
    BadFrameError; nothing is written beyond the stated lengths.
    """
    lengths = np.array([align(n_bytes) for n_bytes in raw.tolist()], np.uint64)
    ends = np.cumsum(lengths, dtype=np.uint64)
    memory = BUFFER_POOL.allocate(int(ends[-1]) if len(ends) else 0)
    out = np.uint64(address_of(memory)) + ends - lengths
    for number in range(_decode_native(addresses, stored, out, raw), len(out)):
        # The first of these may be damaged; decompress_into raises the reason.
        frame = memoryview(pa.foreign_buffer(int(addresses[number]), int(stored[number])))
        try:
            decompress_into(frame, memory[int(ends[number] - lengths[number]) :][: int(raw[number])].data)
        except CodecError as error:
            raise BadFrameError(number, str(error)) from error
    return memory, out


def _decode_native(addresses: Addresses, stored: Addresses, out: Addresses, raw: Addresses) -> int:
    """Decode frames in one call, until the first bad one. Returns the number of decoded frames; 0 without a libzstd."""
    if not hasattr(_here, "decoder"):
        functions = find_libzstd()
        _here.decoder = None if functions is None else ZstdDecoder(*functions)
    if _here.decoder is None:
        return 0
    n_right: int = _here.decoder.decode(
        *(np.ascontiguousarray(one, np.uint64) for one in (addresses, stored, out, raw))
    )
    return n_right


@cache
def find_libzstd() -> tuple[int, int, int, int] | None:
    """Return the addresses of a ZstdDecoder's functions in the system's libzstd or zstandard._cffi, or None."""
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
