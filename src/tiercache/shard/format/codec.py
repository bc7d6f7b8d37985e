"""Codecs of chunks (raw and zstd): the choice of a codec, and decoding that never exceeds the stated length."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import zstandard

from tiercache.shard.column_types import Kind

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
    """Return the content of a frame, read-only.

    Raises:
        CodecError: The data is not a frame with raw_bytes bytes of content.
    """
    _check_promise(frame, raw_bytes)  # before memory is allocated
    out = bytearray(raw_bytes)
    decompress_into(frame, memoryview(out))
    return memoryview(out).toreadonly()


def decompress_into(frame: bytes | memoryview, out: memoryview) -> None:
    """Decode a frame into out, whose length must equal that of the content. Releases the GIL while it decodes.

    Raises:
        CodecError: The data is not a frame with content of that length.
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
        raise CodecError(f"it is not a zstd frame: {error}") from error
    if promised != raw_bytes:
        raise CodecError(f"its zstd frame states {promised} bytes, expected {raw_bytes}")
    if raw_bytes > MAX_ZSTD_RATIO * len(frame):
        raise CodecError(f"its zstd frame of {len(frame)} bytes cannot hold {raw_bytes} bytes")


def parse_compression(text: str) -> int | None:
    """Return the zstd level of a compression: None for "none", N for "zstd:N", DEFAULT_LEVEL for "zstd" and "auto".

    Raises:
        ValueError: The text is not a compression.
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
    """Chooses the codec of the chunks of a column in a writer. Not thread-safe."""

    def __init__(self, compression: str, kind: Kind) -> None:
        self._level = parse_compression(compression)
        # Encoded images are compressed already, so no block is compressed as a test.
        self._measuring = MEASURED_BLOCKS if compression == "auto" and kind is not Kind.IMAGE else 0
        self._forced = compression != "auto"
        self._raw_bytes = self._zstd_bytes = 0
        if compression == "auto" and kind is Kind.IMAGE:
            self._level = None

    def encode(self, data: Any) -> bytes | None:
        """Return a chunk, a contiguous buffer, as a zstd frame; None if it should be stored raw."""
        n_bytes = memoryview(data).nbytes
        if self._level is None or not self.tries(n_bytes):
            return None
        frame = compress(data, self._level)
        if self._measuring:
            self._measure(n_bytes, len(frame))
        return frame if self._forced or len(frame) <= n_bytes * MAX_ZSTD_FRACTION else None

    def tries(self, n_bytes: int) -> bool:
        """Return whether encode() tries to compress a chunk of this many bytes."""
        least_bytes = 1 if self._forced else MIN_ZSTD_BYTES
        return self._level is not None and least_bytes <= n_bytes <= ZSTD_LIMIT_BYTES

    @property
    def is_forced(self) -> bool:
        """Whether the user chose zstd for the column."""
        return self._forced and self._level is not None

    def _measure(self, raw_bytes: int, zstd_bytes: int) -> None:
        self._measuring -= 1
        self._raw_bytes += raw_bytes
        self._zstd_bytes += zstd_bytes
        if not self._measuring and self._zstd_bytes > self._raw_bytes * MAX_ZSTD_FRACTION:
            self._level = None


class BlockCodec:
    """Chooses the codecs of the chunks of each block in a writer. Not thread-safe."""

    def __init__(self, columns: Sequence[ColumnCodec]) -> None:
        self._columns = columns
        self._is_forced = any(column.is_forced for column in columns)
        self._raw_bytes = self._saved_bytes = self._n_blocks = 0

    def encode(self, lengths: Sequence[int], chunk: Callable[[int], Any]) -> list[bytes | None]:
        """Return for each column the chunk as a zstd frame, or None if it should be stored raw.

        Args:
            lengths: Number of bytes of each chunk.
            chunk: Function from a column's number to its chunk, a contiguous buffer that is valid until the next call.
        """
        if self._saves_little:
            return [None] * len(lengths)
        frames = [
            column.encode(chunk(number)) if column.tries(n_bytes) else None
            for number, (column, n_bytes) in enumerate(zip(self._columns, lengths, strict=True))
        ]
        saved_bytes = sum(n - len(frame) for n, frame in zip(lengths, frames, strict=True) if frame is not None)
        if self._n_blocks < MEASURED_BLOCKS:
            self._n_blocks += 1
            self._raw_bytes += sum(lengths)
            self._saved_bytes += saved_bytes
        if not self._is_forced and saved_bytes < MIN_SAVED_FRACTION * sum(lengths):
            return [None] * len(lengths)
        return frames

    @property
    def _saves_little(self) -> bool:
        """Whether the first blocks have shown that compression does not pay."""
        is_measured = self._n_blocks == MEASURED_BLOCKS and not self._is_forced
        return is_measured and self._saved_bytes < MIN_SAVED_FRACTION * self._raw_bytes
