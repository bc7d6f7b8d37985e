"""Checks of encoded images by their header and their end, without decoding them."""

from __future__ import annotations

import struct
from collections.abc import Callable

_STARTS = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
}
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset((0x00, 0x01, *range(0xD0, 0xDA), 0xFF))  # without a length
_PNG_CHUNK_BYTES = 12  # length, type, checksum


def sniff(data: bytes) -> str | None:
    """Return the encoding that the first bytes of an image indicate; None if they match no supported encoding."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((encoding for start, encoding in _STARTS.items() if data.startswith(start)), None)


def find_damage(data: bytes, encoding: str) -> str | None:
    """Return what is wrong with a whole image file; None if its header has a size in pixels and its end is present.

    Bytes after the end are accepted, as decoders accept them. Pixels are not decoded and checksums are not compared.
    GIF, BMP and TIFF are not examined: a damaged one is found when it is decoded.
    """
    check = _CHECKS.get(encoding)
    if check is None:
        return None
    try:
        return check(data)
    except (struct.error, IndexError):
        return "it ends inside its header"


def _size_damage(width: int, height: int) -> str | None:
    return None if width and height else f"its header says {width} x {height} pixels"


def _check_png(data: bytes) -> str | None:
    n_bytes, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if (n_bytes, kind) != (13, b"IHDR"):
        return "it has no header (IHDR)"
    at, has_pixels = 8, False
    while at + _PNG_CHUNK_BYTES <= len(data):
        n_bytes, kind = struct.unpack_from(">I4s", data, at)
        at += _PNG_CHUNK_BYTES + n_bytes
        has_pixels = has_pixels or kind == b"IDAT"
        if kind == b"IEND" and at <= len(data):
            return _size_damage(width, height) if has_pixels else "it has no pixels (IDAT)"
    return "it is cut off: its last chunk (IEND) is missing"


def _check_jpeg(data: bytes) -> str | None:
    at = 2
    damage: str | None = "it has no frame header"
    while (at := data.find(0xFF, at)) >= 0:  # decoders also skip bytes between segments
        marker = data[at + 1]
        if marker == _JPEG_SCAN:
            # Inside a scan, 0xff is followed by 0x00 or a restart marker, so an end marker after this point is a real
            # one. The end markers of thumbnails precede the scan.
            has_end = data.rfind(b"\xff\xd9", at) >= 0
            return damage or (None if has_end else "it is cut off: its end marker is missing")
        if marker in _JPEG_BARE:
            at += 1
            continue
        (n_bytes,) = struct.unpack_from(">H", data, at + 2)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            damage = _size_damage(width, height or 1)  # height 0: the height follows the first scan
        at += 2 + n_bytes
    return "it is cut off: it has no scan"


def _check_webp(data: bytes) -> str | None:
    (n_bytes,) = struct.unpack_from("<I", data, 4)
    if data[12:16] not in (b"VP8 ", b"VP8L", b"VP8X"):
        return f"it has no image chunk, but {data[12:16]!r}"
    expected = 8 + n_bytes
    return None if len(data) >= expected else f"it is cut off: its header says {expected:,} bytes, it has {len(data):,}"


_CHECKS: dict[str, Callable[[bytes], str | None]] = {"png": _check_png, "jpeg": _check_jpeg, "webp": _check_webp}
SUFFIXES = {
    ".jpg": "jpeg", ".jpeg": "jpeg", ".jpe": "jpeg", ".png": "png", ".gif": "gif", ".webp": "webp", ".bmp": "bmp",
    ".tif": "tiff", ".tiff": "tiff",
}  # fmt: skip


def check_image(data: bytes, encoding: str | None) -> str | None:
    """Return why a file is not a whole image of an encoding (None: of any that is supported); None if it is one."""
    found = sniff(data)
    if found is None:
        what = f"starts with {data[:8]!r}" if data else "is empty"
        return f"not an image in a supported format: it {what}"
    if encoding is not None and found != encoding:
        return f"this is a {found}, but the column holds {encoding} images only"
    damage = find_damage(data, found)
    return None if damage is None else f"incomplete {found}: {damage}"
