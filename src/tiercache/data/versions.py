"""The public Versions: what can be done with the versions of a data set as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from tiercache.model import parse_duration
from tiercache.shard.gc import GcReport, collect_garbage
from tiercache.shard.versions import Version, delete_tag, put_tag, read_versions
from tiercache.store import Store, open_store


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

        Each has `number`, `kind` (how it was made: "create", "append" or "overwrite"), `created` (a text),
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
