"""Formats of other libraries, recognised by names and first bytes: pack() refuses instead of misreading them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tiercache.errors import SchemaError
from tiercache.pack.files import Files, SourceFile

# suffix -> format and the library that reads it
_BY_SUFFIX: Mapping[str, str] = {
    ".mds": "a MosaicML Streaming (MDS) shard; mosaicml-streaming reads it",
    ".beton": "an FFCV data set; ffcv reads it",
    ".tar": "a tar archive, as WebDataset writes; webdataset or tarfile reads it",
    ".tfrecord": "a TFRecord file; tensorflow reads it",
    ".tfrecords": "a TFRecord file; tensorflow reads it",
    ".array_record": "an ArrayRecord file; array_record reads it",
    ".arrayrecord": "an ArrayRecord file; array_record reads it",
    ".arrow": "an Arrow file, as Hugging Face datasets writes; datasets or pyarrow reads it",
    ".feather": "a Feather file; pyarrow reads it",
    ".lance": "a Lance file; lance reads it",
    ".h5": "an HDF5 file; h5py reads it",
    ".hdf5": "an HDF5 file; h5py reads it",
    ".npy": "a NumPy array; numpy.load() reads it",
    ".npz": "an archive of NumPy arrays; numpy.load() reads it",
    ".zip": "a zip archive; unpack it",
    ".orc": "an ORC file; pyarrow reads it",
    ".avro": "an Avro file",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# Shards of TFRecord and ArrayRecord data sets are named train.tfrecord-00000-of-00010.
_NUMBERED = re.compile(r"-\d+-of-\d+$")
# offset, bytes, format
_BY_START: Sequence[tuple[int, bytes, str]] = (
    (257, b"ustar", _BY_SUFFIX[".tar"]),
    (0, b"PK\x03\x04", _BY_SUFFIX[".zip"]),
    (0, b"\x89HDF\r\n\x1a\n", _BY_SUFFIX[".h5"]),
    (0, b"\x93NUMPY", _BY_SUFFIX[".npy"]),
    (0, b"ARROW1", _BY_SUFFIX[".arrow"]),
    (0, b"ORC", _BY_SUFFIX[".orc"]),
    (0, b"Obj\x01", _BY_SUFFIX[".avro"]),
)
_START_BYTES = 4096
_INDEX = "index.json"
_MDS_INDEX = re.compile(rb'\s*\{\s*("version"\s*:\s*\d+\s*,\s*)?"shards"\s*:\s*\[')
_LITDATA_INDEX = re.compile(rb'\s*\{\s*"chunks"\s*:\s*\[')


def format_by_name(path: str) -> str | None:
    """Return the description of the foreign format that a file's name indicates; None if there is none."""
    name = _NUMBERED.sub("", path.rsplit("/", 1)[-1].lower())
    if name.endswith(".tgz"):
        return _BY_SUFFIX[".tar"]
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return _BY_SUFFIX.get("." + name.rsplit(".", 1)[1]) if "." in name else None


def refuse_foreign_index(files: Files, found: Sequence[SourceFile]) -> None:
    """Raise SchemaError for a folder of MosaicML Streaming or LitData; its index would be packed as a JSON record."""
    for file in found:
        if file.path.rsplit("/", 1)[-1] == _INDEX:
            start = _start(files, file.path)
            if _MDS_INDEX.match(start):
                what = "the index of a MosaicML Streaming (MDS) data set; mosaicml-streaming reads it"
                raise _refused(files, file.path, what, "leave the index out with exclude")
            if _LITDATA_INDEX.match(start):
                what = "the index of a LitData data set; litdata reads it"
                raise _refused(files, file.path, what, "leave the index out with exclude")


def refuse_foreign_files(files: Files, found: Sequence[SourceFile]) -> None:
    """Raise SchemaError for a file in a foreign format, by its name; for a single file also by its first bytes."""
    for file in found:
        format_name = format_by_name(file.path)
        if format_name is None and len(found) == 1:
            start = _start(files, file.path)
            matches = (text for offset, magic, text in _BY_START if start[offset : offset + len(magic)] == magic)
            format_name = next(matches, None)
        if format_name is not None:
            raise _refused(files, file.path, format_name, "choose files with kind, include and exclude")


def _start(files: Files, path: str) -> bytes:
    with files.open(path) as file:
        return file.read(_START_BYTES)


def _refused(files: Files, path: str, what: str, remedy: str) -> SchemaError:
    return SchemaError(
        f"{files.location(path)}: this is {what}. pack takes folders of images, Parquet and JSON lines. Write records "
        f"of other formats with tiercache.Writer, or {remedy}"
    )
