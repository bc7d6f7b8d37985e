"""A data set of another library that is read where it lies, open for reading with the interface of an open version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache import config
from tiercache.data.opened_version import DatasetLocation, LeafSpec, OpenedVersion, VersionStores
from tiercache.errors import NotFound, StoreError
from tiercache.layouts.contract import Layout
from tiercache.layouts.find import StoreFolder, dataset_id_of, find_layout, identity_of, names_of, open_bytes
from tiercache.layouts.reader import LayoutReader
from tiercache.model import ByteRange, ShardIdentity, ShardInfo, SourcePart
from tiercache.order.window import BlockSizes
from tiercache.shard.reader import OpenShard
from tiercache.shard.versions import ShardTable, Version, say_pack, table_of
from tiercache.store import folders_above, pin_revision, without_commit
from tiercache.store.access import split_glob, split_url

# Column ranges of at least 15/16 of a file are not fetched by ranges; see shard/source.py:column_ranges.
_MOST, _OF = 15, 16


def open_leaf(
    location: DatasetLocation, version: int | str | None, columns: Sequence[str] | None, given: str
) -> OpenedVersion:
    """Return a version of the data set at a URL; or the data set of another library there, if it has no version.

    A URL of the Hugging Face Hub names a commit from here on: every process and epoch reads the same files. given: URL
    as the user wrote it. Raises as `Dataset`.
    """
    location = replace(location, url=pin_revision(location.url, location.storage_options))
    try:
        return OpenedVersion(location, version, columns)
    except NotFound as error:
        if version is not None:
            raise
        found = _find(location)
        if found is None:
            error.message = error.message.replace(say_pack(error.url), say_pack(given))
            raise
        place, layout = found
        try:
            return OpenedLayout(place, layout, columns)
        except NotFound as lost:
            raise lost from error


def _find(location: DatasetLocation) -> tuple[DatasetLocation, Layout] | None:
    """Return the location of a layout's files and the layout; a URL may name a file, or files by wildcards."""
    stores = VersionStores(location)
    folder = StoreFolder(stores.store, _index_folder(stores))
    try:
        if folder.objects:
            layout = find_layout(folder)
            return None if layout is None else (location, layout)
    except StoreError:
        return None  # the error of the version that was not found says more
    finally:
        stores.close()
    root, globs = split_glob(location.url)
    only: Sequence[str] = ()
    if not globs:
        try:
            root, name = split_url(location.url)
        except ValueError:
            return None
        only = names_of(name)
    above = [] if globs else list(folders_above(location.url))
    for url, split in ((root, list[str]()), *above):
        place = replace(location, url=url)
        stores = VersionStores(place)
        try:
            folder = StoreFolder(stores.store, _index_folder(stores), only=() if split else only, globs=globs)
            layout = find_layout(folder, split)
        except StoreError:
            return None
        finally:
            stores.close()
        if layout is not None:
            return place, layout
    return None


def _index_folder(stores: VersionStores) -> Path:
    folder = config.read_settings().cache_dir if stores.cache is None else stores.cache.path
    return Path(folder).expanduser().absolute() / "indexes"


@dataclass(frozen=True, slots=True)
class LayoutSpec:
    """The layout itself: a copy of the data set reads the same files, whatever has come to the folder since."""

    location: DatasetLocation
    layout: Layout
    columns: tuple[str, ...]

    @property
    def version(self) -> int:
        return 0

    def open(self) -> OpenedLayout:
        return OpenedLayout(self.location, self.layout, self.columns)


class FileTable(ShardTable):
    """The files of a layout, in the place of the shards of a version."""

    def __init__(self, layout: Layout, dataset_id: str) -> None:
        self._files = [(file.info.key, identity_of(dataset_id, file.info)) for file in layout.files]
        rows = [
            ShardInfo(key, identity.shard_id, file.total_records, identity.n_bytes, 0, 0, 0)
            for (key, identity), file in zip(self._files, layout.files, strict=True)
        ]
        super().__init__([table_of(rows)])

    def objects(self, _dataset_id: str, shards: NDArray[np.int64]) -> Sequence[tuple[str, ShardIdentity]]:
        return [self._files[shard] for shard in shards.tolist()]

    def identities(self, shards: NDArray[np.int64]) -> tuple[list[str], list[int], Sequence[int | None]]:
        found = [self._files[shard][1] for shard in shards.tolist()]
        return [one.shard_id for one in found], [one.n_bytes for one in found], [None] * len(found)


class OpenedLayout(OpenedVersion):
    """Files of a layout with some of its columns. A file is read as a shard, and it has the layout's blocks."""

    def __init__(self, location: DatasetLocation, layout: Layout, columns: Sequence[str] | None) -> None:
        self.layout = layout
        stores = VersionStores(location)
        dataset_id = dataset_id_of(stores.inner.url)
        table = FileTable(layout, dataset_id)
        fingerprint = layout.fingerprint
        if without_commit(location.url) != location.url:  # the Hub tells the content of each file by its ETag
            etags = [file.info.etag for file in layout.files]
            fingerprint = hashlib.sha256(json.dumps([fingerprint, etags]).encode()).hexdigest()[:32]
        manifest = Version(
            dataset_id=dataset_id,
            number=0,
            parent=None,
            kind=layout.name,
            schema_bytes=layout.schema.to_bytes(),
            writer="",
            nonce="",
            created="",
            fingerprint=fingerprint,
            n_records=int(table.first_record[-1]),
            n_bytes=int(table.n_bytes.sum()),
            segments=(),
        )
        self._begin(location, stores, manifest, table, columns)

    @property
    def part(self) -> SourcePart:
        """See OpenedVersion.part. A copy of the files elsewhere is the same data set: names and sizes identify it."""
        return SourcePart(self.manifest.fingerprint, 0, self.manifest.fingerprint)

    def _make_spec(self) -> LeafSpec:
        return LayoutSpec(self.location, self.layout, self.schema.names)

    def _opener(self, past_cache: bool) -> Callable[[int], OpenShard]:
        stores = self.stores
        store = stores.placed if past_cache else stores.store
        how: dict[str, Any] = {"served": self._served, "recent": self._recent}
        return partial(_open_file, store, self._dataset_id, self.layout, **how)

    def block_sizes(self, shards: Sequence[int]) -> list[BlockSizes]:
        """See OpenedVersion.block_sizes. Nothing is read: the index has them."""
        if self.stores.has_cache:
            for shard in shards:
                if shard not in self._ranges:
                    self._ranges[shard] = self._column_ranges(shard)
        indexes = [self.layout.files[shard].index for shard in shards]
        return [BlockSizes(index.n_records, index.raw_bytes) for index in indexes]

    def _column_ranges(self, shard: int) -> tuple[ByteRange, ...] | None:
        file = self.layout.files[shard]
        ranges = self.layout.ranges(file, range(len(file.index.n_records)), self.schema.names)
        most = sum(one.n_bytes for one in ranges) * _OF >= file.info.n_bytes * _MOST
        return None if most else tuple(ranges)

    def block_elements(self, shard: int) -> NDArray[np.int64]:
        """See OpenedVersion.block_elements. All records are read: the index does not have their lengths."""
        n_blocks = len(self.layout.files[shard].index.n_records)
        return np.array([_n_elements(self.arrays(shard, block)[0]) for block in range(n_blocks)], np.int64)

    def prefetch_blocks(self, shard: int, blocks: Sequence[int]) -> None:
        """See Storage.prefetch_blocks."""
        fetcher = self.stores.fetcher
        if fetcher is None or shard in self._readers:
            super().prefetch_blocks(shard, blocks)
            return
        key, identity = self._object(shard)
        urgent = self.layout.ranges(self.layout.files[shard], blocks, self.schema.names)
        fetcher.prefetch(key, identity, self._ranges.get(shard), urgent_ranges=urgent)

    def at_version(self, number: int) -> OpenedVersion:
        """See OpenedVersion.at_version. There are no versions: the caller compares the fingerprint."""
        if number != self.manifest.number:
            raise NotFound(f"version {number}: {self.layout.name} files have no versions", url=self.url)
        return self


def _open_file(store: Any, dataset_id: str, layout: Layout, shard: int, **how: Any) -> LayoutReader:
    file = layout.files[shard]
    return LayoutReader(layout, file, open_bytes(store, dataset_id, file.info), **how)


def _n_elements(array: pa.Array) -> int:
    storage = array.storage if isinstance(array, pa.ExtensionArray) else array
    return len(storage.field("data").flatten())
