"""Codecs of chunks (raw and zstd): the choice of a codec, and decoding that never exceeds the stated length."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import zstandard

from tiercache.shard.schema import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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

# Creating a context costs more than compressing a small chunk; a context is for one thread at a time.
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
        raise ValueError(f"a compression is 'auto', 'none', 'zstd' or 'zstd:1' to 'zstd:{MAX_LEVEL}', got {text!r}")
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
