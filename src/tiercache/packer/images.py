"""A folder of images with one sub-folder per class, as columns image (encoded bytes), label and path.

Each JPEG, PNG or WebP file is checked to be a complete image by its header and its end, without decoding it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tiercache.errors import SchemaError
from tiercache.packer.files import Files, InputBatch, InputSplit, SourceFile
from tiercache.shard.schema import Image, Schema

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
_SHOWN_FOLDERS = 5
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
_SPLIT_FILES = 64


@dataclass(frozen=True)
class ImageFolder:
    """Images of one encoding, a files.RecordSource. A record's label is the index of its class."""

    files: Files
    images: tuple[SourceFile, ...]
    classes: tuple[str, ...]
    encoding: str

    @property
    def schema(self) -> Schema:
        types = {"image": Image(self.encoding), "label": "int64", "path": "str"}
        return Schema.of(types).with_classes({"label": self.classes})

    @property
    def splits(self) -> tuple[InputSplit, ...]:
        starts = range(0, len(self.images), _SPLIT_FILES)
        runs = [(start, min(start + _SPLIT_FILES, len(self.images))) for start in starts]
        return tuple(InputSplit("", s, e, sum(f.n_bytes for f in self.images[s:e])) for s, e in runs)

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        labels = {name: label for label, name in enumerate(self.classes)}
        for run in _runs(self.images[split.start : split.end], batch_bytes):
            paths = [f.path for f in run]
            images = self.files.read_many(paths)
            for path, image in zip(paths, images, strict=True):
                self._check(path, image)
            columns: dict[str, Sequence[Any]] = {
                "image": images,
                "label": [labels[path.split("/")[0]] for path in paths],
                "path": paths,
            }
            locations = [self.files.location(path) for path in paths]
            yield InputBatch(columns, len(run), sum(f.n_bytes for f in run), locations.__getitem__)

    def _check(self, path: str, image: bytes) -> None:
        encoding = sniff(image)
        if encoding is None:
            what = f"starts with {image[:8]!r}" if image else "is empty"
            raise SchemaError(
                f"{self.files.location(path)}: not an image in a supported format: it {what}; {_leave_out(path)}"
            )
        if encoding != self.encoding:
            raise SchemaError(
                f"{self.files.location(path)}: this is a {encoding}, but the others are {self.encoding}; "
                f"a column holds one encoding: convert it, or {_leave_out(path)}"
            )
        damage = find_damage(image, encoding)
        if damage is not None:
            raise SchemaError(f"{self.files.location(path)}: incomplete {encoding}: {damage}; {_leave_out(path)}")


def find_images(files: Files, found: Sequence[SourceFile], classes: Sequence[str] | None = None) -> ImageFolder:
    """Return the images of a folder, checked by their names and the first file's bytes.

    classes fixes the class names and their order; None: the names of the sub-folders, sorted. Raises SchemaError.
    """
    for file in found:
        suffix = _suffix(file.path)
        if suffix and suffix not in SUFFIXES:
            raise SchemaError(f"{files.location(file.path)}: its name is not that of an image; {_leave_out(file.path)}")
        if "/" not in file.path:
            raise SchemaError(
                f"{files.location(file.path)}: an image must lie in a sub-folder that is named after its class"
            )
    _refuse_deep_folders(files, found)
    first = {SUFFIXES[_suffix(f.path)]: f.path for f in reversed(found) if _suffix(f.path)}
    if len(first) > 1:
        examples = ", ".join(f"{encoding} ({path})" for encoding, path in sorted(first.items()))
        raise SchemaError(
            f"several image encodings: {examples}; a column holds one encoding: choose one with include=['*.png']"
        )
    names = sorted({f.path.split("/")[0] for f in found})
    if classes is not None and (new := sorted(set(names) - set(classes))):
        raise SchemaError(
            f"class {new[0]!r} is not among the data set's {len(classes)} classes; appending cannot add classes"
        )
    encoding = next(iter(first), None) or sniff(files.read_many([found[0].path])[0])
    if encoding is None:
        raise SchemaError(f"{files.location(found[0].path)}: not an image in a supported format")
    return ImageFolder(files, tuple(found), tuple(names if classes is None else classes), encoding)


def _refuse_deep_folders(files: Files, found: Sequence[SourceFile]) -> None:
    """Raise SchemaError if the folders of the classes have sub-folders: they may be splits instead of classes."""
    deep = [f.path.split("/")[:-1] for f in found if f.path.count("/") > 1]
    if not deep:
        return
    outer, inner = (_shown({folders[level] for folders in deep}) for level in (0, 1))
    raise SchemaError(
        f"{files.location('/'.join(deep[0]))}: a second level of folders: expected images directly in the folder of "
        f"their class, found the folders {inner} in {outer}; if {outer} are splits, such as train and val, pack each "
        f"of them by itself; otherwise move the images into the folders of their classes"
    )


def _shown(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN_FOLDERS]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return ", ".join(map(repr, shown)) + more


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2]
    return "." + name.rpartition(".")[2].lower() if "." in name else ""


def _leave_out(path: str) -> str:
    suffix = _suffix(path)
    glob = f"*{suffix}" if suffix and suffix not in SUFFIXES else path
    return f"leave it out with exclude=[{glob!r}]"


def _runs(files: Sequence[SourceFile], batch_bytes: int) -> Iterator[list[SourceFile]]:
    run: list[SourceFile] = []
    run_bytes = 0
    for file in files:
        run.append(file)
        run_bytes += file.n_bytes
        if run_bytes >= batch_bytes:
            yield run
            run, run_bytes = [], 0
    if run:
        yield run
