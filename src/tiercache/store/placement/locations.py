"""Present locations of files and checkpoints, found from any path or URL under which they once lay.

::

    1. If the rule file of this machine has a tier that contains the path, the same path is looked up in all its tiers,
       from the fastest to the coldest. This needs no placement, and finds copies in tiers of this machine alone.
    2. Otherwise a home is searched in the folders above the path: the first that has a tracking marker, or that is a
       tier whose marker leads to the home, and whose placement has a row for the path leads to the object. This works
       without a rule file.

A file is looked up by HEAD requests, a folder by listings. An object that must be restored is found last.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tiercache.errors import ArchivedShards, CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.model import OWN_FOLDER, ByteRange, ObjectInfo
from tiercache.store import LocalFolder, Store, open_store, redact
from tiercache.store.placement import log
from tiercache.store.placement.resolver import TierUrl, is_archived, options_of, scheme_of, tiers_of_rules
from tiercache.store.placement.uses import plain_url

OpenUrl: TypeAlias = Callable[[str], Store]

# Schemes of stores that may hold a home. A web server is not asked for markers that it cannot have.
_HOME_SCHEMES = ("", "s3", "s3a", "gs", "gcs", "az", "azure", "abfs")
_MOST_FOLDERS = 12
# A folder that is known to be no home is not asked again for this time.
_NO_HOME_S = 60.0
_THREADS = 16


@dataclass(frozen=True, slots=True)
class FileLocation:
    """Location of an object. store: Store of the folder in which it lies under key; whoever opened it closes it."""

    store: Store
    key: str
    info: ObjectInfo
    is_archived: bool = False

    @property
    def url(self) -> str:
        """URL or local path of the object."""
        return url_below(self.store, self.key)


@dataclass(frozen=True, slots=True)
class FolderLocation:
    """Locations of everything below a folder.

    Attributes:
        files: Location of each object, by its path below the folder.
        whole_url: URL or local path of the folder in the first store that has all of it; None: it is spread.
        is_archived: Whether that copy must be restored before it can be read.
    """

    files: Mapping[str, FileLocation]
    whole_url: str | None
    is_archived: bool = False


@dataclass(frozen=True, slots=True)
class FolderTiers:
    """The tiers, other than a folder itself, in which objects of the folder may lie.

    Attributes:
        urls: URL of the folder in each tier, by the name of the tier; by the URL if no rule file has the tier.
        placed: URL of the folder that has an object, by the object's key below the folder, as the placement states it.
        home: URL of the folder in the home; None: no placement was found.
    """

    urls: Mapping[str, str]
    placed: Mapping[str, str]
    home: str | None


class FileLocator:
    """Finds the present locations of files and folders. Thread-safe; the lock guards the opened stores.

    Use it as a context manager, or call close().
    """

    def __init__(self, open_url: OpenUrl | None = None, *, rules: Path | None = None) -> None:
        """Open nothing yet.

        open_url: Function that opens the store of a tier or home. None: by this machine's rule file. rules: Rule file;
        None: the tiercache.toml that applies to the working folder.
        """
        self._open_url = open_url or (lambda url: open_store(url, **options_of(url)))
        self._rules = rules
        self._lock = threading.Lock()
        self._stores: dict[str, Store] = {}
        self._no_homes: dict[str, float] = {}

    def __enter__(self) -> FileLocator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the opened stores. The object can be used again afterwards."""
        with self._lock:
            opened = [*self._stores.values()]
            self._stores.clear()
        for store in opened:
            store.close()

    # -- looking up -------------------------------------------------------------------------------------------------

    def find_file(self, path: str) -> FileLocation | None:
        """Return the location of an object, by a path or URL under which it lay; None: it is nowhere.

        Of several copies, the fastest one that can be read. Raises StoreError if no copy was found and a store failed.
        """
        key = self.key_of(path)
        if key is not None:
            return self._first(self._stores_of_tiers(), key) if key else None
        for home, placement, below in self._homes_above(path):
            row = placement.find(below)
            if row is not None:
                return self._first([self.store(row.url), home], below)
        return None

    def find_folder(self, path: str) -> FolderLocation | None:
        """Return the locations of all that is below a folder, such as a checkpoint; None: nothing. See find_file()."""
        key = self.key_of(path)
        if key is not None:
            return self._folder(self._stores_of_tiers(), key) if key else None
        for home, placement, below in self._homes_above(path):
            urls = placement.urls_below(below)
            if urls:
                return self._folder([*map(self.store, urls), home], below)
        return None

    def find_tiers(self, path: str, *, follows_placement: bool = True) -> FolderTiers:
        """Return the tiers in which objects of a folder may lie, as the rule file and the placement state them.

        follows_placement: Whether the folders above the path are searched for a home.

        Raises:
            StoreError: A marker, or the placement, could not be read.
            CorruptShard, UnsupportedFormat: The placement is not readable.
        """
        key = self.key_of(path)
        urls = {} if key is None else {tier.name: _below(tier.url, key) for tier in self.tiers()}
        placed: dict[str, str] = {}
        home = None
        for folder, below in self._folders_above(f"{path.rstrip('/')}/-") if follows_placement else ():
            found = self._home_at(folder)
            if found is None:
                continue
            root, placement = found
            below = below.removesuffix("-").rstrip("/")
            home = _below(root, below)
            rows, start = placement.rows_below(below), len(below) + 1 if below else 0
            for object_key, url in zip(rows["key"].to_pylist(), rows["url"].to_pylist(), strict=True):
                placed[object_key[start:]] = _below(url, below)
            break
        for url in dict.fromkeys([*([] if home is None else [home]), *placed.values()]):
            if not any(_is_same_url(url, known) for known in urls.values()):
                urls[redact(url)] = url
        others = {name: url for name, url in urls.items() if not _is_same_url(url, path)}
        return FolderTiers(others, placed, home)

    def key_of(self, path: str) -> str | None:
        """Return the path below the tiers' URLs of a path or URL; None: it is in no tier of the rule file."""
        given = {path.rstrip("/"), plain_url(path).rstrip("/")}
        if not scheme_of(path):
            given.add(os.path.normpath(path.removeprefix("file://")))
        for tier in self.tiers():
            for root in {tier.url.rstrip("/"), plain_url(tier.url).rstrip("/")}:
                for one in given:
                    if one == root:
                        return ""
                    if one.startswith(f"{root}/"):
                        return one.removeprefix(f"{root}/")
        return None

    def tiers(self) -> tuple[TierUrl, ...]:
        """Return the tiers of the rule file, from the fastest to the coldest; () if there is no readable file."""
        return tiers_of_rules(self._rules)

    def _stores_of_tiers(self) -> list[Store]:
        return [self.store(url) for url in dict.fromkeys(tier.url for tier in self.tiers())]

    def store(self, url: str) -> Store:
        """Return the store of a URL, opened once. Raises ValueError if it cannot be opened."""
        with self._lock:
            store = self._stores.get(url)
            if store is None:
                store = self._stores[url] = self._open_url(url)
            return store

    def _first(self, stores: list[Store], key: str) -> FileLocation | None:
        archived: FileLocation | None = None
        failure: StoreError | None = None
        for store in stores:
            try:
                info = store.head(key)
                if _can_be_read(store, info):
                    return FileLocation(store, key, info)
                archived = archived or FileLocation(store, key, info, is_archived=True)
            except NotFound:
                continue
            except StoreError as error:
                failure = failure or error
        if archived is None and failure is not None:
            raise failure
        return archived

    def _folder(self, stores: list[Store], key: str) -> FolderLocation | None:
        found: list[tuple[Store, dict[str, ObjectInfo]]] = []
        failure: StoreError | None = None
        for store in stores:
            try:
                infos = {info.key: info for info in store.list(f"{key}/") if OWN_FOLDER not in f"/{info.key}"}
                found += [(store, infos)] if infos else []
            except StoreError as error:
                failure = failure or error
        if not found:
            if failure is not None:
                raise failure
            return None
        archived = [not _can_all_be_read(store, infos) for store, infos in found]
        order = sorted(range(len(found)), key=lambda i: archived[i])  # readable ones first, and of these the fastest
        files: dict[str, FileLocation] = {}
        for i in order:
            store, infos = found[i]
            for name, info in infos.items():
                files.setdefault(name.removeprefix(f"{key}/"), FileLocation(store, name, info, archived[i]))
        whole = next((i for i in order if len(found[i][1]) == len(files)), None)
        if whole is None:
            return FolderLocation(files, None)
        return FolderLocation(files, url_below(found[whole][0], key), archived[whole])

    # -- homes without a rule file ----------------------------------------------------------------------------------

    def _homes_above(self, path: str) -> Iterator[tuple[Store, log.Placement, str]]:
        """Yield (home, placement, path below it) for each tracked folder above a path, the nearest first."""
        for url, below in self._folders_above(path):
            found = None
            # An unreadable placement of a folder above is not the error that the reader should get.
            with suppress(StoreError, CorruptShard, UnsupportedFormat, ValueError):
                found = self._home_at(url)
            if found is None:
                self._no_homes.setdefault(url, time.monotonic())
            elif len(found[1]):
                yield self.store(found[0]), found[1], below

    def _home_at(self, url: str) -> tuple[str, log.Placement] | None:
        """Return the URL of the home at a folder, or to which its marker leads, and its placement; None: no marker.

        Raises as log.read_placement().
        """
        if self._no_homes.get(url, -_NO_HOME_S) + _NO_HOME_S > time.monotonic():
            return None
        found, home = log.follow_marker(self.store(url)), url
        if isinstance(found, str):
            home, found = found, log.read_placement(self.store(found)) or log.empty_placement()
        if found is None:
            self._no_homes[url] = time.monotonic()
            return None
        return home, found

    @staticmethod
    def _folders_above(path: str) -> Iterator[tuple[str, str]]:
        """Yield the URL of each folder above a path that may be a home, the nearest first, and the path below it."""
        plain = plain_url(path)
        if scheme_of(plain) not in _HOME_SCHEMES or "::" in plain:
            return
        head, found, rest = plain.partition("://")
        root = f"{head}://" if found else "/"
        segments = (rest if found else plain).strip("/").split("/")
        first = 1 if found else 0  # a bucket is no folder
        for n in range(len(segments) - 1, max(first - 1, len(segments) - 1 - _MOST_FOLDERS), -1):
            yield root + "/".join(segments[:n]), "/".join(segments[n:])


def _below(url: str, path: str) -> str:
    return f"{url.rstrip('/')}/{path}".rstrip("/")


def _is_same_url(first: str, second: str) -> bool:
    return plain_url(first).rstrip("/") == plain_url(second).rstrip("/")


def url_below(store: Store, key: str) -> str:
    """Return the URL or local path of a key in a store."""
    return str(store.root / key) if isinstance(store, LocalFolder) else f"{store.url.rstrip('/')}/{key}"


def _can_be_read(store: Store, info: ObjectInfo) -> bool:
    """Return whether an object can be read now. Remote stores are asked for one byte. Raises StoreError."""
    if not info.n_bytes or isinstance(store, LocalFolder):
        return True
    try:
        store.read_into(info.key, [(ByteRange(0, 1), memoryview(bytearray(1)))])
    except StoreError as error:
        if is_archived(error):
            return False
        raise
    return True


def _can_all_be_read(store: Store, infos: Mapping[str, ObjectInfo]) -> bool:
    if isinstance(store, LocalFolder):
        return True
    with ThreadPoolExecutor(min(_THREADS, len(infos)), "tiercache-locations") as pool:
        return all(pool.map(lambda info: _can_be_read(store, info), infos.values()))


def archived_file_error(url: str, n_bytes: int = 0, *, rules: Path | None = None) -> ArchivedShards:
    """Return the error for a file or checkpoint that must be restored; it names the command that does that."""
    shown = redact(url)
    words = ["tiercache", "tier", "get", shown, "--wait", *([] if rules is None else ["--rules", str(rules)])]
    command = shlex.join(words)
    return ArchivedShards(
        f"{shown}: is archived and must be restored before it can be read: {command}",
        names=[shown.rpartition("/")[2]],
        url=shown,
        n_bytes=n_bytes,
        command=command,
    )


def locate(path: str | os.PathLike[str], *, rules: str | os.PathLike[str] | None = None) -> str:
    """Return the present location of a file or checkpoint.

    It is found in the tiers of this machine's rule file, or else by the placement of a home above it. Of several
    copies, the location is that of the fastest one that can be read.

    Args:
        path: Path or URL under which it lies or once lay: in any tier, also one that it has left, or relative to the
            tiers' URLs, perhaps after the name of a tier.
        rules: Rule file; None: the tiercache.toml that applies to the working folder.

    Returns:
        Local path, or URL.

    Raises:
        NotFound: It is nowhere, or no tier has all of it.
        ArchivedShards: It must be restored first; the message names the command.
        StoreError: No copy was found, and a store failed.
    """
    text = os.fspath(path)
    with closing(FileLocator(rules=None if rules is None else Path(rules))) as locator:
        asked = _asked(locator, text)
        file = locator.find_file(asked)
        if file is not None:
            if file.is_archived:
                raise archived_file_error(file.url, file.info.n_bytes, rules=None if rules is None else Path(rules))
            return file.url
        folder = locator.find_folder(asked)
        if folder is not None and folder.whole_url is not None:
            if folder.is_archived:
                n_bytes = sum(one.info.n_bytes for one in folder.files.values())
                raise archived_file_error(folder.whole_url, n_bytes, rules=None if rules is None else Path(rules))
            return folder.whole_url
        if folder is not None:
            spread = sorted({one.store.url for one in folder.files.values()})
            message = f"no tier has all of it: it is spread over {', '.join(map(redact, spread))}; name one checkpoint"
            raise NotFound(message, url=redact(asked))
        if locator.key_of(asked) is None and not scheme_of(asked) and Path(asked).exists():
            return asked
        names = ", ".join(tier.name for tier in locator.tiers())
        where = f"none of the tiers {names} has it" if names else "no rule file and no placement leads to it"
        raise NotFound(f"expected a file or checkpoint, found nothing: {where}", url=redact(asked))


def _asked(locator: FileLocator, text: str) -> str:
    """Return the path or URL that an argument names. If there are tiers, a relative path is below their URLs."""
    if scheme_of(text) or text.startswith("file://"):
        return text
    local = os.path.abspath(Path(text).expanduser())  # noqa: PTH100 - resolve() would follow links
    tiers = locator.tiers()
    is_relative = not Path(text).expanduser().is_absolute() and not text.startswith(("./", "../"))
    if is_relative and tiers and locator.key_of(local) is None:
        name, _, below = text.strip("/").partition("/")
        path = below if below and name in [tier.name for tier in tiers] else text.strip("/")
        return f"{tiers[0].url.rstrip('/')}/{path}"
    return local
