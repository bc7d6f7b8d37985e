"""Which layout the files below a URL have, and the kept indexes of files that must be read to find their records."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tiercache.errors import NotFound, SchemaError
from tiercache.layouts.arrow import ArrowLayout
from tiercache.layouts.contract import FileBytes, FileIndex, Layout
from tiercache.layouts.mds import MdsLayout
from tiercache.layouts.megatron import MegatronLayout
from tiercache.layouts.parquet import ParquetLayout
from tiercache.layouts.reader import SourceBytes
from tiercache.layouts.splits import keys_of_split
from tiercache.layouts.webdataset import WebDatasetLayout
from tiercache.model import ObjectInfo, ShardIdentity
from tiercache.store import without_commit
from tiercache.store.access import matches_glob, redact
from tiercache.store.contract import Store
from tiercache.store.remote import call_threads
from tiercache.store.shared_files import replace_whole

# In this order. The first one that recognises its files reads them.
LAYOUTS: tuple[type[Layout], ...] = (MdsLayout, ParquetLayout, ArrowLayout, MegatronLayout, WebDatasetLayout)

_INDEX_THREADS = 16
# Folders of data sets in other layouts rarely have more; every one of them is listed before the first batch.
MOST_FILES = 1_000_000


# Files of records, whose names and README.md may say to which split they belong: the first of these that there are.
_OF_SPLITS = (ParquetLayout.suffixes, ArrowLayout.suffixes, (".tar",))


def find_layout(folder: StoreFolder, split: Sequence[str] = ()) -> Layout | None:
    """Return the data set of another library that a folder holds; None: its files have no known layout.

    split: Names of a split or a configuration, or both, of the files of the folder. Raises NotFound if the folder
    cannot be listed, and SchemaError for a layout that cannot be read, and for files of several splits.
    """
    folder = folder.of_split(split)
    for layout in LAYOUTS:
        found = layout.find(folder)
        if found is not None:
            return found
    return None


def names_of(name: str) -> list[str]:
    """Return the keys of the files that the last segment of a URL may mean."""
    return list(dict.fromkeys([name, *(key for layout in LAYOUTS for key in layout.keys_of(name))]))


def dataset_id_of(url: str) -> str:
    """Return the id under which the cache keeps the files below a URL: 32 hex digits."""
    return hashlib.sha256(f"layout {redact(without_commit(url))}".encode()).hexdigest()[:32]


def identity_of(dataset_id: str, info: ObjectInfo) -> ShardIdentity:
    """Return the identity of a file: another one if the file is replaced, as far as its store tells."""
    etag = info.etag or f'W/"{info.modified_s}"'
    state = json.dumps([info.key, info.n_bytes, etag, info.version, info.modified_s])
    return ShardIdentity(dataset_id, hashlib.sha256(state.encode()).hexdigest()[:32], info.n_bytes, None, etag)


def open_bytes(store: Store, dataset_id: str, info: ObjectInfo) -> SourceBytes:
    """Return the bytes of a file, guarded by its ETag if that is a strong one."""
    etag = None if info.etag is None or info.etag.startswith("W/") else info.etag
    return SourceBytes(store, info, identity_of(dataset_id, info), etag, partial(open_bytes, store, dataset_id))


class StoreFolder:
    """The files below a store's URL. See `Folder`.

    indexes: Folder of the kept indexes; None: none are kept. only: Keys of the files to read, of which some may not
    exist; globs: the segments of the keys of the files to read, with wildcards; listed: the files themselves, instead
    of a listing. Without them, all files are read.
    """

    def __init__(
        self,
        store: Store,
        indexes: Path | None,
        *,
        only: Sequence[str] = (),
        globs: Sequence[str] = (),
        listed: Sequence[ObjectInfo] | None = None,
    ) -> None:
        self._store, self._indexes, self._only, self._globs, self._listed = store, indexes, only, globs, listed
        self._dataset_id = dataset_id_of(store.url)

    @property
    def url(self) -> str:
        return self._store.url

    @cached_property
    def objects(self) -> Sequence[ObjectInfo]:
        if self._listed is not None:
            return self._listed
        found = []
        for key in self._only:
            with suppress(NotFound):
                found.append(self._store.head(key))
        for info in () if self._only else self._store.list():
            parts = info.key.split("/")
            hidden = any(part.startswith((".", "_")) for part in parts)
            if not hidden and (not self._globs or matches_glob(parts, self._globs)):
                found.append(info)
                if len(found) > MOST_FILES:
                    raise SchemaError(f"{self.url}: it holds more than {MOST_FILES:,} files: open a folder below it")
        return sorted(found, key=lambda info: info.key.split("/"))

    def of_split(self, names: Sequence[str]) -> StoreFolder:
        """Return the folder with the files of one split, see keys_of_split(). Files that the URL names are all read."""
        if self._only or self._globs:
            return self
        by_key = {info.key: info for info in self.objects}
        keys = next((some for ends in _OF_SPLITS if (some := [k for k in by_key if k.lower().endswith(ends)])), [])

        def read_card() -> bytes:
            info = by_key["README.md"]
            return bytes(self.open(info).read_one(0, info.n_bytes))

        chosen = keys_of_split(self.url, by_key, keys, names, read_card)
        if len(chosen) == len(keys):
            return self
        return StoreFolder(self._store, self._indexes, listed=[by_key[key] for key in chosen])

    def open(self, info: ObjectInfo) -> FileBytes:
        return open_bytes(self._store, self._dataset_id, info)

    def index(
        self, layout: str, objects: Sequence[ObjectInfo], make: Callable[[ObjectInfo, FileBytes], FileIndex]
    ) -> list[FileIndex]:
        def one(info: ObjectInfo) -> FileIndex:
            path = self._path(layout, info)
            kept = None if path is None else _read_index(path)
            if kept is None:
                kept = make(info, self.open(info))
                if path is not None:
                    _write_index(path, kept)
            return kept

        if len(objects) < 2:
            return list(map(one, objects))
        with call_threads(min(_INDEX_THREADS, len(objects)), "tiercache-index") as pool:
            return list(pool.map(one, objects))

    def _path(self, layout: str, info: ObjectInfo) -> Path | None:
        identity = identity_of(self._dataset_id, info)
        return None if self._indexes is None else self._indexes / self._dataset_id / f"{layout}-{identity.shard_id}.npz"


_OWN = "own."


def _read_index(path: Path) -> FileIndex | None:
    """Return a kept index; None if there is none, or if it cannot be read: then it is made again."""
    with (
        suppress(OSError, ValueError, KeyError, EOFError, BadZipFile),
        np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found,
    ):
        parts = {name.removeprefix(_OWN): found[name] for name in found.files if name.startswith(_OWN)}
        return FileIndex(found["n_records"], found["raw_bytes"], parts)
    return None


def _write_index(path: Path, index: FileIndex) -> None:
    """Keep an index. On a full disk or in a read-only folder it is not kept, and the next process makes it again."""
    memory = io.BytesIO()
    arrays: dict[str, Any] = {_OWN + name: array for name, array in index.parts.items()}
    np.savez(memory, n_records=index.n_records, raw_bytes=index.raw_bytes, **arrays)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_whole(path, memory.getvalue())
