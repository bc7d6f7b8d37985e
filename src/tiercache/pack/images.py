"""A folder of images with one sub-folder per class, as columns image (encoded bytes), label and path.

Each file is checked to be a complete image by its header and its end, without decoding it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.pack.files import Files, SourceFile
from tiercache.pack.image_check import find_damage, sniff
from tiercache.pack.source import InputBatch, InputSplit
from tiercache.shard.schema import CLASSES_KEY, Image, Schema

SUFFIXES = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".png": "png",
    ".gif": "gif",
    ".webp": "webp",
    ".bmp": "bmp",
    ".tif": "tiff",
    ".tiff": "tiff",
}
_PART_FILES = 64
_BATCH_FILES = 256


@dataclass(frozen=True)
class ImageFolder:
    """Images by class; implements pack.source.Source.

    Attributes:
        files: Location of the files.
        images: Files in order.
        classes: Class names in order; a record's label is the index of its class.
        encoding: Encoding of all images.
    """

    files: Files
    images: tuple[SourceFile, ...]
    classes: tuple[str, ...]
    encoding: str

    @property
    def schema(self) -> Schema:
        """Columns image, label, path."""
        names = json.dumps(self.classes, ensure_ascii=False).encode()
        label = pa.field("label", pa.int64(), nullable=False, metadata={CLASSES_KEY: names})
        return Schema.of({"image": Image(self.encoding), "label": label, "path": "str"})

    @property
    def parts(self) -> tuple[InputSplit, ...]:
        """Splits of consecutive files."""
        starts = range(0, len(self.images), _PART_FILES)
        runs = [(start, min(start + _PART_FILES, len(self.images))) for start in starts]
        return tuple(InputSplit("", s, e, sum(f.n_bytes for f in self.images[s:e])) for s, e in runs)

    def read(self, part: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        """Yield the files of a split, unchanged.

        Raises:
            SchemaError: A file is not an image of the column's encoding.
        """
        labels = {name: label for label, name in enumerate(self.classes)}
        for run in _runs(self.images[part.start : part.end], batch_bytes):
            paths = [f.path for f in run]
            images = self.files.read_many(paths)
            for path, image in zip(paths, images, strict=True):
                self._check(path, image)
            columns: dict[str, Sequence[Any]] = {
                "image": images,
                "label": [labels[path.split("/")[0]] for path in paths],
                "path": paths,
            }
            yield InputBatch(columns, len(run), sum(f.n_bytes for f in run), partial(self._place, paths))

    def _place(self, paths: Sequence[str], record: int) -> str:
        return self.files.location(paths[record])

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


def find_images(files: Files, found: Sequence[SourceFile], *, classes: Sequence[str] | None = None) -> ImageFolder:
    """Return the images of a folder, checked by their names and the first file's bytes.

    Args:
        files: Location of the files.
        found: Files of the folder.
        classes: Class names with a fixed order (when appending to a data set); None: the names of the sub-folders,
            sorted.

    Raises:
        SchemaError: A file lies outside a class folder or is not an image by its name; there are several encodings; or
            a class is not in `classes`.
    """
    for file in found:
        suffix = _suffix(file.path)
        if suffix and suffix not in SUFFIXES:
            raise SchemaError(f"{files.location(file.path)}: its name is not that of an image; {_leave_out(file.path)}")
        if "/" not in file.path:
            raise SchemaError(
                f"{files.location(file.path)}: an image must lie in a sub-folder that is named after its class"
            )
    first = {SUFFIXES[_suffix(f.path)]: f.path for f in reversed(found) if _suffix(f.path)}
    if len(first) > 1:
        examples = ", ".join(f"{encoding} ({path})" for encoding, path in sorted(first.items()))
        raise SchemaError(
            f"several image encodings: {examples}; a column holds one encoding: select with include, as in '*.png'"
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


def _suffix(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else ""


def _leave_out(path: str) -> str:
    suffix = _suffix(path)
    glob = f"*{suffix}" if suffix and suffix not in SUFFIXES else path
    return f"leave it out with exclude, as in {glob!r}"


def _runs(files: Sequence[SourceFile], batch_bytes: int) -> Iterator[list[SourceFile]]:
    run: list[SourceFile] = []
    run_bytes = 0
    for file in files:
        run.append(file)
        run_bytes += file.n_bytes
        if run_bytes >= batch_bytes or len(run) == _BATCH_FILES:
            yield run
            run, run_bytes = [], 0
    if run:
        yield run
