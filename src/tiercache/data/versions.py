"""The public Versions: what can be done with the versions of a data set as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any

import pyarrow.compute as pc

from tiercache.data.drop import DropReport, drop
from tiercache.model import parse_duration
from tiercache.shard.gc import GcReport, collect_garbage
from tiercache.shard.versions import Version, delete_tag, put_tag, read_versions
from tiercache.store import Store, open_store
from tiercache.store.placement import follow_placement


class Versions:
    """The versions of a data set: list, name and remove them (docs/guide/versions.md).

    Args:
        url: Local path or URL of the data set.
        storage_options: Options of the store, as docs/guide/storage.md lists them.
    """

    def __init__(self, url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._options = dict(storage_options or {})
        with closing(open_store(url, **self._options)) as store:
            self.url = store.url
        self._url = os.fspath(url)

    def _opened(self) -> closing[Store]:
        return closing(open_store(self._url, **self._options))

    def list(self) -> list[Version]:
        """Return all versions, oldest first.

        Each has `number`, `kind` (how it was made: "create", "append", "overwrite" or "drop"), `created` (a text),
        `n_records`, `n_shards`, `n_bytes`, `fingerprint` and `tags`.

        Raises:
            NotFound: The URL holds no data set.
            CorruptShard: A version or a tag is damaged.
        """
        with self._opened() as store:
            return read_versions(store)

    def tag(self, name: str, version: int | str | None = None, *, replace: bool = False) -> None:
        """Give a version a name, under which `Dataset(url, version=name)` opens it. `gc` keeps tagged versions.

        If the name is the version's already, nothing changes.

        Args:
            name: Up to 100 letters, digits, ".", "_" and "-"; not a number.
            version: Number, or another tag, of the version. None: the newest version.
            replace: Whether a name of another version is moved to this one.

        Raises:
            CommitConflict: The name is that of another version.
            NotFound: There is no such version.
            ValueError: A tag cannot have this name.
        """
        with self._opened() as store:
            put_tag(store, name, version, replace=replace)

    def untag(self, name: str) -> None:
        """Remove a name. The version stays.

        Args:
            name: Tag to remove.

        Raises:
            NotFound: There is no such tag.
        """
        with self._opened() as store:
            delete_tag(store, name)

    def drop(
        self,
        where: pc.Expression | None = None,
        *,
        columns: Iterable[str] = (),
        jobs: int = 4,
        dry_run: bool = False,
    ) -> DropReport:
        """Make a version without the records for which a condition is true, and without some columns.

        The condition is evaluated for the newest version; a null condition keeps its record. Shards that keep all their
        records stay as they are; the others are written again, all of them if columns are dropped. What others append
        meanwhile is looked at, too. Earlier versions keep everything until `gc` removes them. After an error or a kill,
        the data set is as it was.

        Args:
            where: Expression such as `pyarrow.compute.field("label") == 3`, as `Dataset.filter` takes it. None: all
                records stay.
            columns: Names of the columns to drop. The condition may name them.
            jobs: Number of shards to process at a time; 0: one per CPU. Each needs about 100 MiB of memory.
            dry_run: Whether to write nothing, and only return what would be done.

        Returns:
            What was done. If no record matches and no column is given, there is no new version.

        Raises:
            NotFound: The URL holds no data set.
            SchemaError: A column does not exist, all columns are named, or the expression is no condition over them.
            CommitConflict: Another writer has changed the columns meanwhile.
            CorruptShard, UnsupportedFormat: A shard or a version cannot be read, or only a later release may write.
            StoreError: The store failed. If .maybe_done is true, the version may have been made: repeat the call.
            ValueError: Nothing is to be dropped.
        """
        with closing(follow_placement(open_store(self._url, **self._options), self._options)) as store:
            return drop(store, where, columns, jobs=jobs, dry_run=dry_run)

    def gc(
        self, *, older_than: str | float = "7d", keep_versions: int | None = None, dry_run: bool = False
    ) -> GcReport:
        """Remove what no version needs: shards and segments, temporary files, parts of uploads that were killed.

        Nothing that a version or a reader of it needs is removed, and nothing of a writer that is live: one that has
        written anything within the time `older_than`. A writer must not pause for longer between two shards, or before
        its commit.

        Args:
            older_than: Safety age, by the clock of the store: seconds, or a text such as "7d" or "12h".
            keep_versions: Number of the newest versions to keep. Of the others, those with a tag, and those younger
                than `older_than`, are kept too; the rest is deleted, and their readers fail. None: no version is
                deleted.
            dry_run: Whether to remove nothing, and only return what would be removed.

        Returns:
            What was removed, or would be.

        Raises:
            NotFound: The URL holds no data set.
            CorruptShard, UnsupportedFormat: A version cannot be read, so what it needs is unknown; nothing was removed.
            StoreError: The store failed, or does not say when objects were written.
            ValueError: An argument is invalid.
        """
        older_than_s = parse_duration(older_than)
        with self._opened() as store:
            return collect_garbage(store, older_than_s=older_than_s, keep_versions=keep_versions, dry_run=dry_run)

    def __repr__(self) -> str:
        return f"Versions({self.url!r})"
