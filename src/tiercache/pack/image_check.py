"""Check that a file is a complete image, by its header and its end, without decoding it."""

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
    """Return what is wrong with an image; None if its header has a size in pixels and its end is present.

    Bytes after the end are accepted, as decoders accept them. Pixels are not decoded and checksums are not compared.

    Args:
        data: Bytes of the whole file.
        encoding: Encoding that sniff() returned for data.
    """
    try:
        return _CHECKS[encoding](data)
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


def _check_gif(data: bytes) -> str | None:
    width, height = struct.unpack_from("<HH", data, 6)
    return _size_damage(width, height) or (
        None if data.rstrip(b"\0").endswith(b";") else "it is cut off: its trailer is missing"
    )


def _check_webp(data: bytes) -> str | None:
    (n_bytes,) = struct.unpack_from("<I", data, 4)
    if data[12:16] not in (b"VP8 ", b"VP8L", b"VP8X"):
        return f"it has no image chunk, but {data[12:16]!r}"
    expected = 8 + n_bytes
    return None if len(data) >= expected else f"it is cut off: its header says {expected:,} bytes, it has {len(data):,}"


def _check_bmp(data: bytes) -> str | None:
    at, header_bytes = struct.unpack_from("<II", data, 10)
    if header_bytes == 12:  # OS/2
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    row_bytes = (abs(width) * bits + 31) // 32 * 4
    expected = at + (row_bytes * abs(height) if compression == 0 else 1)
    if len(data) < expected:
        return f"it is cut off: its header says {expected:,} bytes, it has {len(data):,}"
    return _size_damage(abs(width), abs(height))


def _check_tiff(data: bytes) -> str | None:
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (n_entries,) = struct.unpack_from(f"{order}H", data, at)
    fields = {
        tag: (kind, n, offset)
        for tag, kind, n, offset in struct.iter_unpack(f"{order}HHII", data[at + 2 : at + 2 + 12 * n_entries])
    }
    if len(fields) < n_entries or not {256, 257} <= fields.keys():
        return "it is cut off: its directory is not whole"
    starts, lengths = (273, 279) if 273 in fields else (324, 325)  # of strips, or of tiles
    if not {starts, lengths} <= fields.keys():
        return "it names no pixels"
    pieces = zip(_tiff_numbers(data, order, fields[starts]), _tiff_numbers(data, order, fields[lengths]), strict=False)
    expected = max((start + n_bytes for start, n_bytes in pieces), default=0)
    return (
        None if len(data) >= expected else f"it is cut off: its pixels end at byte {expected:,}, it has {len(data):,}"
    )


def _tiff_numbers(data: bytes, order: str, field: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the values of a field of 16-bit or 32-bit numbers; up to four bytes are stored in the field itself."""
    kind, n, offset = field
    letter, each_bytes = ("H", 2) if kind == 3 else ("I", 4)
    if n * each_bytes <= 4:
        inline = struct.pack(f"{order}I", offset)
        return struct.unpack_from(f"{order}{n}{letter}", inline)
    return struct.unpack_from(f"{order}{n}{letter}", data, offset)


_CHECKS: dict[str, Callable[[bytes], str | None]] = {
    "png": _check_png,
    "jpeg": _check_jpeg,
    "gif": _check_gif,
    "webp": _check_webp,
    "bmp": _check_bmp,
    "tiff": _check_tiff,
}
