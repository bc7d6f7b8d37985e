"""Images on their way into shards: checks by their header and end, without decoding; other sizes and encodings."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tiercache.errors import SchemaError
from tiercache.images.decoder import eight_bits, load_libraries, open_by_pillow, orientation_of
from tiercache.shard.schema import Image, Kind, Schema

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


_WRITTEN = {"jpeg": 90, "png": None, "webp": 80}  # with the default of the quality
# By EXIF orientation, the names of Pillow's transpositions.
_TRANSPOSED = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
_PROFILES = {"L": b"GRAY", "LA": b"GRAY", "RGB": b"RGB ", "RGBA": b"RGB "}  # colour spaces of ICC profiles, by mode


@dataclass(frozen=True)
class ImageRecoder:
    """Makes the images of a record smaller, and encodes them anew. An image that needs neither is kept as it is.

    columns: Columns of images. resize: Greatest length of the shorter side, in pixels. encoding: None: that of the
    image, or PNG if that is not written. quality: None: a default.
    """

    columns: tuple[str, ...]
    resize: int | None
    encoding: str | None
    quality: int | None

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with other images. Raises DecodeError."""
        return {
            name: self.recode(value) if name in self.columns and value is not None else value
            for name, value in record.items()
        }

    def recode(self, data: bytes) -> bytes:
        """Return an encoded image. Raises DecodeError."""
        pillow, found = load_libraries()[2], sniff(data)
        with open_by_pillow(pillow, data) as image:
            shorter = min(image.size)
            is_large = self.resize is not None and shorter > self.resize
            if not is_large and self.encoding in (None, found):
                return data
            encoding = self.encoding or (found if found in _WRITTEN else "png")
            image.load()
            turn = _TRANSPOSED.get(orientation_of(image))
            shown = _in_mode_of(encoding, image.transpose(pillow.Transpose[turn]) if turn else image, pillow)
            if self.resize is not None and is_large:
                width, height = (int(self.resize * side / shorter) for side in shown.size)
                shown = shown.resize((width, height), pillow.Resampling.BILINEAR)
            profile = image.info.get("icc_profile") or b""
            shown.info = {}  # else, Pillow writes some of it
            options: dict[str, Any] = {"quality": self.quality or _WRITTEN[encoding]} if encoding != "png" else {}
            if profile[16:20] == _PROFILES.get(shown.mode):
                options["icc_profile"] = profile
            stream = io.BytesIO()
            shown.save(stream, encoding, **options)
            return stream.getvalue()


def _in_mode_of(encoding: str, image: Any, pillow: Any) -> Any:
    """Return an image of Pillow with the colours, grey values and alpha that an encoding stores."""
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers of 32 bits, which {encoding} does not store")
    if image.mode.startswith("I;16"):
        return image if encoding == "png" else pillow.fromarray(eight_bits(image))
    mode = "L" if image.getbands()[0] in ("1", "L") and image.mode != "LAB" else "RGB"
    if image.has_transparency_data and encoding != "jpeg":
        mode += "A"
    return image if image.mode == mode else image.convert(mode)


def parse_encode(text: str) -> tuple[str, int | None]:
    """Return the encoding and the quality of a text such as "jpeg:90" or "png". Raises ValueError."""
    name, found, quality = text.partition(":")
    if name not in _WRITTEN or (found and (_WRITTEN[name] is None or quality not in map(str, range(1, 101)))):
        raise ValueError(f"encode must be jpeg, png or webp; jpeg and webp take a quality, as in jpeg:90, got {text!r}")
    return name, int(quality) if found else None


def recoded(schema: Schema, resize: int | None, encode: str | None) -> tuple[ImageRecoder, dict[str, Image]]:
    """Return what changes the images of records, and the types of their columns. Raises SchemaError, ValueError."""
    load_libraries()
    encoding, quality = (None, None) if encode is None else parse_encode(encode)
    columns = [column for column in schema.columns if column.kind is Kind.IMAGE]
    if not columns:
        listed = ", ".join(f"{column.name}: {column}" for column in schema.columns)
        raise SchemaError(f"resize= and encode= change columns of images, and there is none among {listed}")
    kept = {c.name: c.encoding if encode is None and c.encoding in _WRITTEN else encoding for c in columns}
    types = {column.name: Image(kept[column.name], column.nullable) for column in columns}
    return ImageRecoder(tuple(kept), resize, encoding, quality), types
