"""Files of a source: their listing, the formats that are refused, and what the first bytes of a file say.

`RecordSource` is the interface of a source that has been inspected: its schema, its splits and their records.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, TypeAlias

import pyarrow as pa

from tiercache.errors import NotFound, SchemaError
from tiercache.model import ObjectInfo
from tiercache.shard.schema import Schema
from tiercache.store import Store, StoreFile, open_store, split_url
from tiercache.store.access import ParsedUrl, matches_glob, split_glob
from tiercache.store.remote import call_threads


@dataclass(frozen=True, slots=True)
class InputSplit:
    """Split of a source, read by one process: [start, end) of path, counted in files, row groups or bytes."""

    path: str  # "" for a split of several files
    start: int
    end: int
    n_bytes: int  # balances the load and measures progress


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Record of a source that cannot be packed. Whether that ends the packing is decided by the packer."""

    location: str  # of the record, for people
    reason: str
    content: Any = None  # its bytes or its columns, as far as they can be read
    column: str | None = None


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Some records of a split, as columns or as a list. location(i) names the place of record i, for messages.

    bad: Records between the previous batch and the end of this one that cannot be read, in order.
    """

    columns: Mapping[str, Sequence[Any]] | pa.RecordBatch | list[Mapping[str, Any]]
    n_records: int
    n_bytes: int
    location: Callable[[int], str]
    bad: Sequence[BadRecord] = ()


def record_location(location: str, first: int, i: int) -> str:
    """Return the name of record i of a batch, for messages. first: Number of the first record of the batch."""
    return f"{location}, record {first + i}"


class RecordSource(Protocol):
    """Source that has been inspected and can be read. Picklable.

    Its repr says what is packed, as that of a dataclass does: by it, the same command recognises a packing that was not
    finished.
    """

    @property
    def schema(self) -> Schema:
        """Schema of all its records."""

    @property
    def splits(self) -> tuple[InputSplit, ...]:
        """Splits; their order, and the order inside each of them, is the order of the data set."""

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        """Yield the records of a split in batches of about batch_bytes, a few of which are in memory at a time.

        A record that cannot be read is in the `bad` of a batch. Raises StoreError and OSError.
        """


_BUFFER_BYTES = 1 << 20
_PARALLEL_READS = 16


@dataclass(frozen=True, slots=True)
class SourceFile:
    """File of a source. validator: Its ETag, or the time of its last change; it differs after the file was changed."""

    path: str
    n_bytes: int
    validator: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """File of a source that is skipped although no option excludes it, with the reason for people."""

    path: str
    reason: str


@dataclass(frozen=True)
class LocalFiles:
    """Files below a local folder. Symbolic links are followed, because image folders often consist of links.

    fingerprint: Hash of the paths, sizes and validators of the files that are packed, which the repr of a source
    contains; "" until these files are known.
    """

    root: str
    fingerprint: str = ""

    def list(self) -> Iterator[SourceFile | SkippedFile]:
        """Yield all files in any order, except ignored ones and those in ignored folders.

        Skipped: dangling links, links to a parent folder, and anything but files and folders.
        """
        pending: list[tuple[str, frozenset[str]]] = [("", frozenset())]
        while pending:
            folder, above = pending.pop()
            real = os.path.realpath(Path(self.root, folder))
            if real in above:
                yield SkippedFile(folder, "a link to one of its parent folders")
                continue
            with os.scandir(real) as entries:
                for entry in entries:
                    if is_ignored(entry.name):
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir():
                        pending.append((path, above | {real}))
                    elif entry.is_file():
                        yield _local_file(path, entry.stat())
                    elif entry.is_symlink() and not Path(entry.path).exists():
                        yield SkippedFile(path, f"a link to {str(Path(entry.path).readlink())!r}, which does not exist")
                    else:
                        yield SkippedFile(path, "a pipe, socket or device")

    def open(self, path: str) -> BinaryIO:
        return Path(self.root, path).open("rb", buffering=_BUFFER_BYTES)

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """Return the contents of small files. Threads would not speed up reads from the page cache."""
        return [Path(self.root, path).read_bytes() for path in paths]

    def location(self, path: str) -> str:
        return str(Path(self.root, path))


@dataclass(frozen=True)
class StoreFiles:
    """Files below a store's URL, with the methods of LocalFiles. Each process opens the store on first use."""

    root: str
    storage_options: Mapping[str, Any] = field(repr=False)  # may hold credentials
    fingerprint: str = ""

    @cached_property
    def store(self) -> Store:
        return open_store(self.root, **self.storage_options)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFiles, (self.root, self.storage_options, self.fingerprint)

    def list(self) -> Iterator[SourceFile | SkippedFile]:
        for info in self.store.list():
            if not any(map(is_ignored, info.key.split("/"))):
                yield _stored_file(info)

    def open(self, path: str) -> BinaryIO:
        """Open an object, which is read by ranges of at least 1 MiB."""
        info = self.store.head(path)
        return io.BufferedReader(StoreFile(self.store, path, info.n_bytes, info.etag), buffer_size=_BUFFER_BYTES)

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """Return the contents of small objects, by 16 parallel requests."""
        with call_threads(_PARALLEL_READS, "tiercache-read") as pool:
            return list(pool.map(self.store.get, paths))

    def location(self, path: str) -> str:
        return f"{self.store.url.rstrip('/')}/{path}"


Files: TypeAlias = LocalFiles | StoreFiles


def _local_file(path: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, status.st_size, str(status.st_mtime_ns))


def _stored_file(info: ObjectInfo) -> SourceFile:
    return SourceFile(info.key, info.n_bytes, info.etag or str(info.modified_s))


def with_fingerprint(files: Files, found: Iterable[SourceFile]) -> Files:
    """Return where files lie, with the fingerprint of those that are packed."""
    digest = hashlib.sha256()
    for file in found:
        digest.update(f"{file.path!r} {file.n_bytes} {file.validator}\n".encode())
    return replace(files, fingerprint=digest.hexdigest()[:32])


# What operating systems, archivers and Spark leave beside the data.
_JUNK = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "lost+found", "@eadir", "_success")
)


def is_ignored(name: str) -> bool:
    """Return whether a file or folder is never packed: ".x", junk, and a data set that lies in the source."""
    return name.startswith(".") or name == "_tiercache" or name.endswith((".tcs", ".crc")) or name.lower() in _JUNK


def selected(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a path matches one of the include globs (if there are any) and none of the exclude globs.

    A glob without "/" is matched with each segment of the path ("*.jpg", "drafts"), a glob with "/" with the whole
    path, where "*" also matches "/".
    """

    def matches(glob: str) -> bool:
        return any(fnmatchcase(segment, glob) for segment in ([path] if "/" in glob else path.split("/")))

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def find_files(
    source: str | os.PathLike[str], storage_options: Mapping[str, Any]
) -> tuple[Files, list[SourceFile], list[SkippedFile]]:
    """Return where a source's files lie, the files in order of their paths, and the skipped files. Raises NotFound."""
    parsed = ParsedUrl.parse(source)
    remote = bool(parsed.scheme)
    text = os.fspath(source) if remote else parsed.path
    root, globs = (text, []) if not remote and Path(text).exists() else split_glob(text)
    if not globs and (single := find_file(text, storage_options)) is not None:
        return *single, []
    if not remote and not Path(root).is_dir():
        raise NotFound("no such file or folder", url=text)
    files: Files = StoreFiles(root, storage_options) if remote else LocalFiles(os.path.abspath(root))  # noqa: PTH100
    listed = [f for f in files.list() if not globs or matches_glob(f.path.split("/"), globs)]
    # Sort by the segments of the path: the files of a folder stay together although "-" and "." sort before "/".
    listed.sort(key=lambda f: f.path.split("/"))
    found = [f for f in listed if isinstance(f, SourceFile)]
    skipped = [f for f in listed if isinstance(f, SkippedFile)]
    if not found:
        what = "no file matches" if globs else "no files in this folder"
        also = f", but {skipped[0].path!r}: {skipped[0].reason}" if skipped else ""
        raise NotFound(f"{what}{also}", url=files.location("/".join(globs)))
    return files, found, skipped


def find_file(source: str, options: Mapping[str, Any]) -> tuple[Files, list[SourceFile]] | None:
    """Return the file at a path or URL, and where it lies; None if no file is there."""
    parsed = ParsedUrl.parse(source)
    text, remote = source if parsed.scheme else parsed.path, bool(parsed.scheme)
    if not remote:
        path = Path(text).absolute()
        return (LocalFiles(str(path.parent)), [_local_file(path.name, path.stat())]) if path.is_file() else None
    try:
        root, key = split_url(text)
        files = StoreFiles(root, options)
        return files, [_stored_file(files.store.head(key))]
    except (NotFound, ValueError):  # ValueError: the root of a bucket is not an object
        return None


# suffix -> format and the library that reads it
_BY_SUFFIX: Mapping[str, str] = {
    ".mds": "a shard of MosaicML Streaming (MDS), whose index.json is missing",
    ".beton": "an FFCV data set; ffcv reads it",
    ".tar": "a compressed tar archive; pack takes tars that are not compressed, as WebDataset writes",
    ".tgz": "a compressed tar archive; pack takes tars that are not compressed, as WebDataset writes",
    ".array_record": "an ArrayRecord file; array_record reads it",
    ".arrayrecord": "an ArrayRecord file; array_record reads it",
    ".lance": "a Lance file; lance reads it",
    ".h5": "an HDF5 file; h5py reads it",
    ".hdf5": "an HDF5 file; h5py reads it",
    ".zip": "a zip archive; unpack it",
    ".avro": "an Avro file",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# Shards of TFRecord and ArrayRecord data sets are named train.tfrecord-00000-of-00010.
_NUMBERED = re.compile(r"-\d+-of-\d+(?=$|\.gz$)")
_START_BYTES = 4096
_READ_BYTES = 8 << 20
INDEX_FILE = "index.json"
_INDEXES = {
    "mds": (
        re.compile(rb'\s*\{\s*("version"\s*:\s*\d+\s*,\s*)?"shards"\s*:\s*\['),
        "MosaicML Streaming (MDS)",
    ),
    "litdata": (re.compile(rb'\s*\{\s*"chunks"\s*:\s*\['), "LitData"),
}


def find_index(files: Files, found: Sequence[SourceFile], kind: str | None) -> str | None:
    """Return the kind of the data set, "mds" or "litdata", if these files have the index of one.

    Raises SchemaError if the index would be packed as a JSON record.
    """
    of = None
    for file in found:
        if _name(file.path) == INDEX_FILE:
            with files.open(file.path) as opened:
                start = opened.read(_START_BYTES)
            for indexed, (pattern, name) in _INDEXES.items():
                if not pattern.match(start):
                    continue
                if kind not in (None, indexed):
                    what = f"the index of a {name} data set, which kind={indexed!r} packs"
                    raise _refused(files, file.path, what, f"leave the index out with exclude=[{INDEX_FILE!r}]")
                of = indexed
    return of


def read_bytes(file: IO[bytes], n_bytes: int) -> bytes:
    """Return n_bytes, or fewer at the end. A size that a damaged file states reserves no memory."""
    if n_bytes <= _READ_BYTES:
        return file.read(n_bytes)
    parts = []
    while n_bytes and (part := file.read(min(n_bytes, _READ_BYTES))):
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


_SIGNATURES: Mapping[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"ORC": "ORC",
    b"ARROW1": "Arrow",
    b"FEA1": "Feather version 1",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "SQLite",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "PDF",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_SHOWN_BYTES = 16


def describe_start(files: Files, path: str) -> str:
    """Return a sentence that says what a file's first bytes are."""
    with files.open(path) as opened:
        start = opened.read(_START_BYTES)
    if not start:
        return "the file is empty"
    if (name := signature(start)) is None:
        name = "no known format" if _is_binary(start) else "text"
    return f"its first bytes are {start[:_SHOWN_BYTES]!r}: {name}"


def signature(start: bytes) -> str | None:
    """Return the name of the format whose signature a file begins with, if any."""
    return next((name for begin, name in _SIGNATURES.items() if start.startswith(begin)), None)


def _is_binary(start: bytes) -> bool:
    return b"\0" in start


def check_text(files: Files, found: Sequence[SourceFile], kind: str) -> None:
    """Raise SchemaError for a file that is not text, or not gzip although its name says so, from its first bytes."""

    def check(file: SourceFile) -> None:
        with files.open(file.path) as opened:
            start = opened.read(_START_BYTES)
        is_gzip = file.path.lower().endswith(".gz")
        fits = signature(start) == "gzip" if is_gzip else signature(start) is None and not _is_binary(start)
        if start and not fits:
            raise SchemaError(
                f"{files.location(file.path)}: its name is that of a {kind} file{' in gzip' * is_gzip}, but "
                f"{describe_start(files, file.path)}; rename it, or leave it out with exclude="
            )

    with call_threads(_PARALLEL_READS, "tiercache-start") as pool:
        for _ in pool.map(check, found):
            pass


def plain_name(path: str) -> str:
    """Return the lower-case name of a file without the number of a shard ("-00000-of-00010")."""
    return _NUMBERED.sub("", _name(path).lower())


def refuse_foreign_files(files: Files, found: Sequence[SourceFile]) -> None:
    """Raise SchemaError for a file in a foreign format, by its name."""
    for file in found:
        name = plain_name(file.path)
        if name.endswith(".tar"):
            continue
        for suffix in _COMPRESSED:
            name = name.removesuffix(suffix)
        format_name = _BY_SUFFIX.get("." + name.rpartition(".")[2]) if "." in name else None
        if format_name is not None:
            raise _refused(files, file.path, format_name, "choose files with kind=, include= and exclude=")


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _refused(files: Files, path: str, what: str, remedy: str) -> SchemaError:
    return SchemaError(
        f"{files.location(path)}: this is {what}. pack takes folders of images, text or files, Parquet, CSV, Feather, "
        "ORC, JSON lines, NumPy, TFRecord, WebDataset, MDS, LitData, Arrow and Megatron. Pack records of other formats "
        f"by module:callable, or {remedy}"
    )
