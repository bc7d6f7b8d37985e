"""Raw and zstd: which codec a column gets, and frames that are never decoded beyond the length that was promised."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import zstandard

from tiercache.shard.spec import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
# A block of a frame takes 4 bytes or more and holds 128 KiB or less: no frame decodes to more than so many times its
# length. What promises more is refused before memory is taken for it.
ZSTD_MOST_RATIO = (128 << 10) // 4
# `auto`: this many blocks are compressed to see, and zstd stays if it saves half. A saved share s pays where s > D / Z:
# D, what the disk that epochs are read from gives (1 to 3 GB/s), by Z, what all cores decode (1 to 1.8 GB/s each, 2 to
# 4 of them), is a quarter to one; and what lies in the page cache pays for decoding at every epoch and saves nothing.
MEASURED_BLOCKS = 4
WORTH = 1 / 2

# `auto` leaves shorter chunks raw: they are little of their block, and a frame of 4 KiB costs some 15 us to read, which
# were 16 ms before the first batch of each epoch for the labels beside 512 MiB of tokens.
LEAST_BYTES = 16 << 10
# `auto` leaves a block raw whose columns together save less: a shard of raw chunks is served as it is mapped, while one
# with a frame in each block has them decoded in every epoch, by threads that others wait for. The labels beside 124
# bytes of vector and text saved a twentieth, and took a fifth of an epoch.
LEAST_SAVED = 1 / 8

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
    if raw_bytes > ZSTD_MOST_RATIO * len(frame):
        raise CodecError(f"its zstd frame of {len(frame)} bytes cannot hold {raw_bytes}")


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
        if self._level is None or not self.tries(n_bytes):
            return None
        frame = compress(data, self._level)
        if self._measuring:
            self._measure(n_bytes, len(frame))
        return frame if self._forced or len(frame) <= n_bytes * WORTH else None

    def tries(self, n_bytes: int) -> bool:
        """Whether a chunk of so many bytes is compressed to see."""
        least_bytes = 1 if self._forced else LEAST_BYTES
        return self._level is not None and least_bytes <= n_bytes <= ZSTD_LIMIT_BYTES

    @property
    def is_forced(self) -> bool:
        """Whether somebody named zstd for it."""
        return self._forced and self._level is not None

    def _measure(self, raw_bytes: int, zstd_bytes: int) -> None:
        self._measuring -= 1
        self._raw_bytes += raw_bytes
        self._zstd_bytes += zstd_bytes
        if not self._measuring and self._zstd_bytes > self._raw_bytes * WORTH:
            self._level = None


class BlockCodec:
    """Chooses the codecs of all columns' chunks, block by block, in one writer. Not for several threads."""

    def __init__(self, columns: Sequence[ColumnCodec]) -> None:
        self._columns = columns
        self._is_forced = any(column.is_forced for column in columns)
        self._raw_bytes = self._saved_bytes = self._n_blocks = 0

    def encode(self, lengths: Sequence[int], chunk: Callable[[int], Any]) -> list[bytes | None]:
        """Each column's chunk as a zstd frame, or None to store it raw.

        Args:
            lengths: bytes of each chunk.
            chunk: gives one of them by its column's number, a contiguous buffer; good until it is called again.
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
        if not self._is_forced and saved_bytes < LEAST_SAVED * sum(lengths):
            return [None] * len(lengths)
        return frames

    @property
    def _saves_little(self) -> bool:
        """Whether the first blocks have shown that nothing is worth a try."""
        is_measured = self._n_blocks == MEASURED_BLOCKS and not self._is_forced
        return is_measured and self._saved_bytes < LEAST_SAVED * self._raw_bytes
