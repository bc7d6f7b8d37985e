"""The public Versions: what can be done with the versions of a data set as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

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

    def __repr__(self) -> str:
        return f"Versions({self.url!r})"
