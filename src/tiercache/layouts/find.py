"""Which layout the files below a URL have, and the kept indexes of files that must be read to find their records."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tiercache.errors import SchemaError
from tiercache.layouts.contract import FileBytes, FileIndex, Layout
from tiercache.layouts.parquet import ParquetLayout
from tiercache.layouts.reader import SourceBytes
from tiercache.model import ObjectInfo, ShardIdentity
from tiercache.store.access import redact
from tiercache.store.contract import Store
from tiercache.store.remote import call_threads
from tiercache.store.shared_files import replace_whole

# In this order. The first one that recognises its files reads them.
LAYOUTS: tuple[type[Layout], ...] = (ParquetLayout,)

_INDEX_THREADS = 16
# Folders of data sets in other layouts rarely have more; every one of them is listed before the first batch.
MOST_FILES = 1_000_000


def find_layout(folder: StoreFolder) -> Layout | None:
    """Return the data set of another library that a folder holds; None: its files have no known layout.

    Raises NotFound if the folder cannot be listed, and SchemaError for a layout that cannot be read.
    """
    for layout in LAYOUTS:
        found = layout.find(folder)
        if found is not None:
            return found
    return None


def dataset_id_of(url: str) -> str:
    """Return the id under which the cache keeps the files below a URL: 32 hex digits."""
    return hashlib.sha256(f"layout {redact(url)}".encode()).hexdigest()[:32]


def identity_of(dataset_id: str, info: ObjectInfo) -> ShardIdentity:
    """Return the identity of a file: another one if the file is replaced, as far as its store tells."""
    etag = info.etag or f'W/"{info.modified_s}"'
    state = json.dumps([info.key, info.n_bytes, etag, info.version, info.modified_s])
    return ShardIdentity(dataset_id, hashlib.sha256(state.encode()).hexdigest()[:32], info.n_bytes, None, etag)


def open_bytes(store: Store, dataset_id: str, info: ObjectInfo) -> SourceBytes:
    """Return the bytes of a file, guarded by its ETag if that is a strong one."""
    etag = None if info.etag is None or info.etag.startswith("W/") else info.etag
    return SourceBytes(store, info.key, identity_of(dataset_id, info), etag, info.n_bytes)


class StoreFolder:
    """The files below a store's URL. See `Folder`.

    indexes: Folder of the kept indexes; None: none are kept. only: Key of the only file to read; None: all of them.
    """

    def __init__(self, store: Store, indexes: Path | None, *, only: str | None = None) -> None:
        self._store, self._indexes, self._only = store, indexes, only
        self._dataset_id = dataset_id_of(store.url)

    @property
    def url(self) -> str:
        return self._store.url

    @cached_property
    def objects(self) -> Sequence[ObjectInfo]:
        if self._only is not None:
            return [self._store.head(self._only)]
        found = []
        for info in self._store.list():
            if not any(part.startswith((".", "_")) for part in info.key.split("/")):
                found.append(info)
                if len(found) > MOST_FILES:
                    raise SchemaError(f"{self.url}: it holds more than {MOST_FILES:,} files: open a folder below it")
        return sorted(found, key=lambda info: info.key.split("/"))

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
