"""The files that are packed: a local file, folder or glob, or the same below a store's URL."""

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
from tiercache.store.urls import Location

_BUFFER_BYTES = 1 << 20
_PARALLEL_READS = 16
_WILD = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. path: below the source's root, with "/"."""

    path: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file of a source that is not packed, although nothing excludes it. path: below the source's root, with "/"."""

    path: str
    reason: str


class Files(Protocol):
    """Where the files lie. Picklable, so that each process of a parallel pack opens its own."""

    def list(self) -> Iterator[SourceFile | LeftOut]:
        """All files in no promised order, but hidden ones and those in hidden folders; and what is left out."""

    def open(self, path: str) -> BinaryIO:
        """A file for reading, seekable; the caller closes it."""

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """Whole small files, in the order of paths."""

    def place(self, path: str) -> str:
        """What a person calls the file."""


@dataclass(frozen=True)
class LocalFiles:
    """Files below a local folder. Links are followed: folders of images are often made of them."""

    root: str

    def list(self) -> Iterator[SourceFile | LeftOut]:
        """Every file. Left out: links to nothing or to a folder above them; what is neither file nor folder."""
        pending: list[tuple[str, frozenset[str]]] = [("", frozenset())]
        while pending:
            folder, above = pending.pop()
            real = os.path.realpath(Path(self.root, folder))
            if real in above:
                yield LeftOut(folder, "a link to a folder that it lies in")
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
                        yield LeftOut(path, f"a link to {str(Path(entry.path).readlink())!r}, where nothing is")
                    else:
                        yield LeftOut(path, "a pipe, socket or device, and no file")

    def open(self, path: str) -> BinaryIO:
        """The file."""
        return Path(self.root, path).open("rb", buffering=_BUFFER_BYTES)

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """One after the other: reading from the page cache gains nothing from threads."""
        return [Path(self.root, path).read_bytes() for path in paths]

    def place(self, path: str) -> str:
        """Its path."""
        return str(Path(self.root, path))


@dataclass(frozen=True)
class StoreFiles:
    """Files below a store's URL; the store is opened when it is first needed, in each process anew."""

    root: str
    storage_options: Mapping[str, Any]

    @cached_property
    def store(self) -> Store:
        """The open store."""
        return open_store(self.root, **self.storage_options)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFiles, (self.root, self.storage_options)

    def list(self) -> Iterator[SourceFile | LeftOut]:
        """What the store lists."""
        for info in self.store.list():
            if not any(map(is_hidden, info.key.split("/"))):
                yield SourceFile(info.key, info.n_bytes)

    def open(self, path: str) -> BinaryIO:
        """The object, read by ranges of at least a MiB."""
        info = self.store.head(path)
        return io.BufferedReader(StoreFile(self.store, path, info.n_bytes, info.etag), buffer_size=_BUFFER_BYTES)

    def read_many(self, paths: Sequence[str]) -> Sequence[bytes]:
        """Sixteen requests at a time."""
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return list(pool.map(self.store.get, paths))

    def place(self, path: str) -> str:
        """Its redacted URL."""
        return f"{self.store.url.rstrip('/')}/{path}"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is never packed: ".x", and what belongs to a data set that lies in the source."""
    return name.startswith(".") or name == "_tiercache" or name.endswith(".tcs")


def selected(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a path passes the globs: one of include (if there are any) and none of exclude.

    A glob without "/" is matched with each part of the path ("*.jpg", "drafts"), one with "/" with the whole path;
    there "*" crosses "/" too.
    """

    def matches(glob: str) -> bool:
        return any(fnmatchcase(part, glob) for part in ([path] if "/" in glob else path.split("/")))

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def find_files(
    source: str | os.PathLike[str], storage_options: Mapping[str, Any]
) -> tuple[Files, list[SourceFile], list[LeftOut]]:
    """Where source's files lie, which they are in order of their paths, and what is left out.

    source: one file, a folder, or a glob.

    Raises:
        NotFound: nothing is there.
        ValueError: not a path or URL.
    """
    place = Location.parse(source)
    remote = bool(place.scheme)
    text = os.fspath(source) if remote else place.path
    root, globs = (text, []) if not remote and Path(text).exists() else _split_glob(text)
    if not globs and (single := _single_file(text, remote, storage_options)) is not None:
        return single
    if not remote and not Path(root).is_dir():
        raise NotFound("no such file or folder", url=text)
    files: Files = StoreFiles(root, storage_options) if remote else LocalFiles(os.path.abspath(root))  # noqa: PTH100
    listed = [f for f in files.list() if not globs or _matches(f.path.split("/"), globs)]
    # By the parts of the path: a folder's files stay together although "-" and "." sort before "/".
    listed.sort(key=lambda f: f.path.split("/"))
    found = [f for f in listed if isinstance(f, SourceFile)]
    left_out = [f for f in listed if isinstance(f, LeftOut)]
    if not found:
        what = "no file matches" if globs else "no files in this folder"
        also = f", but {left_out[0].path!r}: {left_out[0].reason}" if left_out else ""
        raise NotFound(f"{what}{also}", url=files.place("/".join(globs)))
    return files, found, left_out


def _split_glob(text: str) -> tuple[str, list[str]]:
    """The root before the first part with a wildcard, and the parts from there."""
    scheme, _, rest = text.rpartition("://")
    parts = rest.split("/")
    wild = next((i for i, part in enumerate(parts) if _WILD & set(part)), len(parts))
    root = "/".join(parts[:wild]) or ("/" if wild else ".")
    return (f"{scheme}://{root}" if scheme else root), parts[wild:]


def _matches(parts: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether a path's parts match globs, one each; "**" matches any number of parts."""
    if not globs:
        return not parts
    if globs[0] == "**":
        return any(_matches(parts[i:], globs[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], globs[0]) and _matches(parts[1:], globs[1:])


def _single_file(
    text: str, remote: bool, options: Mapping[str, Any]
) -> tuple[Files, list[SourceFile], list[LeftOut]] | None:
    if not remote:
        path = Path(text).absolute()
        if not path.is_file():
            return None
        return LocalFiles(str(path.parent)), [SourceFile(path.name, path.stat().st_size)], []
    try:
        root, key = split_url(text)
        files = StoreFiles(root, options)
        return files, [SourceFile(key, files.store.head(key).n_bytes)], []
    except (NotFound, ValueError):  # ValueError: a bucket's root, which is no object
        return None
