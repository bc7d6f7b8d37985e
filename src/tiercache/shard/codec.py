"""Raw and zstd: which codec a column gets, and frames that are never decoded beyond the length that was promised."""

from __future__ import annotations

import threading
from typing import Any

import zstandard

from tiercache.shard.spec import Kind

# Numbers of codecs are never given to another one. Each has its 32 bits of a chunk's row, so a later one may keep the
# number of a dictionary in the upper half; whatever it does there, this release sees a codec that it does not know.
RAW = 0
ZSTD = 1
CODECS = (RAW, ZSTD)
DEFAULT_LEVEL = 3
FOOTER_LEVEL = 3
MAX_LEVEL = 22
# A chunk longer than this is stored raw, so a reader may refuse to decode more.
ZSTD_LIMIT_BYTES = 1 << 30
# `auto`: this many blocks are compressed to see, and zstd stays if it saves half. A saved share s pays where s > D / Z:
# D, what the disk that epochs are read from gives (1 to 3 GB/s), by Z, what all cores decode (1 to 1.8 GB/s each, 2 to
# 4 of them), is a quarter to one; and what lies in the page cache pays for decoding at every epoch and saves nothing.
MEASURED_BLOCKS = 4
WORTH = 1 / 2

# `auto` leaves shorter chunks raw: they are little of their block, and a frame of 4 KiB costs some 15 us to read, which
# were 16 ms before the first batch of each epoch for the labels beside 512 MiB of tokens.
LEAST_BYTES = 16 << 10

# Contexts cost more to make than a small chunk to compress; one may be used by one thread at a time.
_here = threading.local()


class CodecError(ValueError):
    """A frame that cannot be what was written."""


class UnknownCodecError(ValueError):
    """A codec of a later release. needed: which, in words."""

    def __init__(self, needed: str) -> None:
        super().__init__(f"no such codec here: {needed}")
        self.needed = needed


def compress(data: Any, level: int) -> bytes:
    """One zstd frame that says its content's length, without a checksum of its own (CRC-32C is ours)."""
    compressors = _here.__dict__.setdefault("compressors", {})
    if level not in compressors:
        compressors[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
    frame: bytes = compressors[level].compress(data)
    return frame


def decompress(frame: bytes | memoryview, raw_bytes: int) -> memoryview:
    """The content of a frame, read-only.

    Raises:
        CodecError: not one frame of raw_bytes bytes.
    """
    _check_promise(frame, raw_bytes)  # before the memory is taken
    out = bytearray(raw_bytes)
    decompress_into(frame, memoryview(out))
    return memoryview(out).toreadonly()


def decompress_into(frame: bytes | memoryview, out: memoryview) -> None:
    """Decode a frame into out, which is exactly as long as the content must be. The GIL is dropped meanwhile.

    Raises:
        CodecError: not one frame of that length.
    """
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
        raise CodecError(f"it is no zstd frame: {error}") from error
    if promised != raw_bytes:
        raise CodecError(f"its zstd frame holds {promised} bytes, expected {raw_bytes}")


def parse_compression(text: str) -> int | None:
    """The level that a compression's name means: None for "none", N for "zstd:N", DEFAULT_LEVEL for "zstd" and "auto".

    Raises:
        ValueError: no such compression.
    """
    if text == "none":
        return None
    if text in ("auto", "zstd"):
        return DEFAULT_LEVEL
    name, _, level = str(text).partition(":")
    if name != "zstd" or not level.isascii() or not level.isdigit() or not 1 <= int(level) <= MAX_LEVEL:
        raise ValueError(f"a compression is 'auto', 'none', 'zstd' or 'zstd:1' to 'zstd:{MAX_LEVEL}', got {text!r}")
    return int(level)


class ColumnCodec:
    """Chooses the codec of one column's chunks in one writer. Not for several threads."""

    def __init__(self, compression: str, kind: Kind) -> None:
        self._level = parse_compression(compression)
        # Encoded pictures are compressed already; measuring them would cost a compression of the first blocks.
        self._measuring = MEASURED_BLOCKS if compression == "auto" and kind is not Kind.IMAGE else 0
        self._forced = compression != "auto"
        self._raw_bytes = self._zstd_bytes = 0
        if compression == "auto" and kind is Kind.IMAGE:
            self._level = None

    def encode(self, data: Any) -> bytes | None:
        """The chunk as a zstd frame, or None to store it raw. data: a contiguous buffer."""
        n_bytes = memoryview(data).nbytes
        if self._level is None or not 0 < n_bytes <= ZSTD_LIMIT_BYTES:
            return None
        if not self._forced and n_bytes < LEAST_BYTES:
            return None
        frame = compress(data, self._level)
        if self._measuring:
            self._measure(n_bytes, len(frame))
        return frame if self._forced or len(frame) <= n_bytes * WORTH else None

    def _measure(self, raw_bytes: int, zstd_bytes: int) -> None:
        self._measuring -= 1
        self._raw_bytes += raw_bytes
        self._zstd_bytes += zstd_bytes
        if not self._measuring and self._zstd_bytes > self._raw_bytes * WORTH:
            self._level = None
