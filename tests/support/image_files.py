"""Small whole image files, made without an image library."""

import struct
import zlib


def png(payload: bytes = b"", *, width: int = 1, height: int = 1) -> bytes:
    """A PNG of black pixels; payload goes into a private chunk, which decoders pass over."""
    rows = b"".join(b"\0" + bytes(width) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"prVt", payload), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def jpeg(payload: bytes = b"") -> bytes:
    """The segments of a JPEG of one pixel, with payload as a comment; its scan is not one that decodes."""
    frame = struct.pack(">BHHB", 8, 1, 1, 1) + b"\x01\x11\x00"
    segments = [(0xFE, payload), (0xC0, frame), (0xDA, b"\x01\x01\x00\x00\x3f\x00")]
    coded = b"".join(struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in segments)
    return b"\xff\xd8" + coded + b"\x12\x34\xff\xd9"
