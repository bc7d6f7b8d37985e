"""Files of a source: their listing, the formats of other libraries that are refused, and Hive partitions.

`RecordSource` is the interface of a source that has been inspected: its schema, its splits and their records.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tiercache.errors import NotFound
from tiercache.store import Store, StoreFile, open_store, split_url
from tiercache.store.options import ParsedUrl

_BUFFER_BYTES = 1 << 20
_PARALLEL_READS = 16
_WILD = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """File of a source.

    Attributes:
        path: Path below the source's root, with "/".
        n_bytes: Size of the file.
    """

    path: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """File of a source that is skipped although no option excludes it.

    Attributes:
        path: Path below the source's root, with "/".
        reason: Reason for people.
    """

    path: str
    reason: str


class Files(Protocol):
    """Location of a source's files. Picklable: each process of a parallel pack opens its own."""

    def list(self) -> Iterator[SourceFile | SkippedFile]:
        """Yield all files in any order, except hidden ones and those in hidden folders; also the skipped files."""

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, seekable; the caller closes it."""

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """Return the contents of small files, in the order of paths."""

    def location(self, path: str) -> str:
        """Return the name of a file for messages."""


@dataclass(frozen=True)
class LocalFiles:
    """Files below a local folder. Symbolic links are followed, because image folders often consist of links.

    Attributes:
        root: Path of the folder.
    """

    root: str

    def list(self) -> Iterator[SourceFile | SkippedFile]:
        """See Files.list. Skipped: dangling links, links to a parent folder, and anything but files and folders."""
        pending: list[tuple[str, frozenset[str]]] = [("", frozenset())]
        while pending:
            folder, above = pending.pop()
            real = os.path.realpath(Path(self.root, folder))
            if real in above:
                yield SkippedFile(folder, "a link to one of its parent folders")
                continue
            with os.scandir(real) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir():
                        pending.append((path, above | {real}))
                    elif entry.is_file():
                        yield SourceFile(path, entry.stat().st_size)
                    elif entry.is_symlink() and not Path(entry.path).exists():
                        yield SkippedFile(path, f"a link to {str(Path(entry.path).readlink())!r}, which does not exist")
                    else:
                        yield SkippedFile(path, "a pipe, socket or device")

    def open(self, path: str) -> BinaryIO:
        """See Files.open."""
        return Path(self.root, path).open("rb", buffering=_BUFFER_BYTES)

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """See Files.read_many. One file after the other: threads do not speed up reads from the page cache."""
        return [Path(self.root, path).read_bytes() for path in paths]

    def location(self, path: str) -> str:
        """See Files.location: the file's path."""
        return str(Path(self.root, path))


@dataclass(frozen=True)
class StoreFiles:
    """Files below a store's URL; each process opens the store on first use.

    Attributes:
        root: URL.
        storage_options: Options of the store.
    """

    root: str
    storage_options: Mapping[str, Any]

    @cached_property
    def store(self) -> Store:
        """Opened store."""
        return open_store(self.root, **self.storage_options)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFiles, (self.root, self.storage_options)

    def list(self) -> Iterator[SourceFile | SkippedFile]:
        """See Files.list: the objects that the store lists."""
        for info in self.store.list():
            if not any(map(is_hidden, info.key.split("/"))):
                yield SourceFile(info.key, info.n_bytes)

    def open(self, path: str) -> BinaryIO:
        """See Files.open. The object is read by ranges of at least 1 MiB."""
        info = self.store.head(path)
        return io.BufferedReader(StoreFile(self.store, path, info.n_bytes, info.etag), buffer_size=_BUFFER_BYTES)

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """See Files.read_many, with 16 parallel requests."""
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return list(pool.map(self.store.get, paths))

    def location(self, path: str) -> str:
        """See Files.location: the file's URL without credentials."""
        return f"{self.store.url.rstrip('/')}/{path}"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is never packed: ".x", and the parts of a data set that lies in the source."""
    return name.startswith(".") or name == "_tiercache" or name.endswith(".tcs")


def selected(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a path matches one of the include globs (if there are any) and none of the exclude globs.

    A glob without "/" is matched with each part of the path ("*.jpg", "drafts"), a glob with "/" with the whole path,
    where "*" also matches "/".
    """

    def matches(glob: str) -> bool:
        return any(fnmatchcase(part, glob) for part in ([path] if "/" in glob else path.split("/")))

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def find_files(
    source: str | os.PathLike[str], storage_options: Mapping[str, Any]
) -> tuple[Files, list[SourceFile], list[SkippedFile]]:
    """Return the location of a source's files, the files in order of their paths, and the skipped files.

    Args:
        source: Path or URL of a file or a folder, or a glob.
        storage_options: Options of the source's store.

    Raises:
        NotFound: There is no such file.
        ValueError: The source is not a path or URL.
    """
    place = ParsedUrl.parse(source)
    remote = bool(place.scheme)
    text = os.fspath(source) if remote else place.path
    root, globs = (text, []) if not remote and Path(text).exists() else _split_glob(text)
    if not globs and (single := _single_file(text, remote, storage_options)) is not None:
        return single
    if not remote and not Path(root).is_dir():
        raise NotFound("no such file or folder", url=text)
    files: Files = StoreFiles(root, storage_options) if remote else LocalFiles(os.path.abspath(root))  # noqa: PTH100
    listed = [f for f in files.list() if not globs or _matches(f.path.split("/"), globs)]
    # Sort by the parts of the path: the files of a folder stay together although "-" and "." sort before "/".
    listed.sort(key=lambda f: f.path.split("/"))
    found = [f for f in listed if isinstance(f, SourceFile)]
    left_out = [f for f in listed if isinstance(f, SkippedFile)]
    if not found:
        what = "no file matches" if globs else "no files in this folder"
        also = f", but {left_out[0].path!r}: {left_out[0].reason}" if left_out else ""
        raise NotFound(f"{what}{also}", url=files.location("/".join(globs)))
    return files, found, left_out


def _split_glob(text: str) -> tuple[str, list[str]]:
    """Return the root before the first part with a wildcard, and the parts from there on."""
    scheme, _, rest = text.rpartition("://")
    parts = rest.split("/")
    wild = next((i for i, part in enumerate(parts) if _WILD & set(part)), len(parts))
    root = "/".join(parts[:wild]) or ("/" if wild else ".")
    return (f"{scheme}://{root}" if scheme else root), parts[wild:]


def _matches(parts: Sequence[str], globs: Sequence[str]) -> bool:
    """Return whether a path's parts match the globs, one each; "**" matches any number of parts."""
    if not globs:
        return not parts
    if globs[0] == "**":
        return any(_matches(parts[i:], globs[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], globs[0]) and _matches(parts[1:], globs[1:])


def _single_file(
    text: str, remote: bool, options: Mapping[str, Any]
) -> tuple[Files, list[SourceFile], list[SkippedFile]] | None:
    if not remote:
        path = Path(text).absolute()
        if not path.is_file():
            return None
        return LocalFiles(str(path.parent)), [SourceFile(path.name, path.stat().st_size)], []
    try:
        root, key = split_url(text)
        files = StoreFiles(root, options)
        return files, [SourceFile(key, files.store.head(key).n_bytes)], []
    except (NotFound, ValueError):  # ValueError: the root of a bucket is not an object
        return None
