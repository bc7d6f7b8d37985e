"""Where moved objects are now: for the readers of a home, and for any path under which a file or checkpoint once lay.

A moved object of a home is found without a notification::

    1. If the known placement has a row for the key, that location is read; otherwise the home is read.
    2. If the object is missing there (404), a different one (412) or archived (403), the placement is read again, and
       the location it names is asked by one HEAD; then the home, where a copy stays during the grace period.
    3. If the size and, where both are known, the checksum are as expected, the read continues there.

Any other path is looked up in all tiers of this machine's rule file, from the fastest to the coldest: this needs no
placement, and finds copies in tiers of this machine alone. A path that is in no such tier is looked up in the
placement of a home above it, or of the home to which the marker of a tier above it leads.

The rule file is read without the models that validate it: building these takes 50 ms in every process of a job.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache import config
from tiercache.errors import (
    ArchivedShards,
    CorruptShard,
    NotFound,
    ObjectChanged,
    StoreError,
    TierCacheError,
    UnsupportedFormat,
)
from tiercache.model import OWN_FOLDER, ByteRange, ObjectInfo, ShardIdentity, format_bytes
from tiercache.prices import provider_prices, read_dollars
from tiercache.store import Lease, LocalFolder, LocalStore, Span, Store, open_store, placement_log, redact
from tiercache.store.access import plain_url, scheme_of
from tiercache.store.contract import ProcessLocal, Receive, WrapperStore
from tiercache.store.placement_log import Placement, PlacementRow
from tiercache.store.remote import call_threads


@dataclass(frozen=True, slots=True)
class TierUrl:
    """A tier of a rule file, as far as readers need it. url: URL or absolute path."""

    name: str
    url: str
    options: Mapping[str, Any]


def tiers_of_rules(rules: Path | None = None) -> tuple[TierUrl, ...]:
    """Return the tiers of a rule file, from the fastest to the coldest; () if there is no readable one.

    rules: None: the tiercache.toml that applies to the working folder.
    """
    with suppress(KeyError, ValueError, TypeError, AttributeError, OSError):
        file = config.find_file(Path.cwd()) if rules is None else rules.absolute()
        if file is not None:
            tables = config.parse_toml(file, config.read_file(file)).get("tiers", {})
            urls = {name: str(table["url"]) for name, table in tables.items()}
            return tuple(
                TierUrl(
                    name,
                    url if "://" in url else os.path.normpath(file.parent / Path(url).expanduser()),
                    dict(tables[name].get("storage_options", {})),
                )
                for name, url in urls.items()
            )
    return ()


def options_of(url: str) -> dict[str, Any]:
    """Return the storage options of the tier at url or above it; {} where this machine's rule file has none."""
    segments = url.split("/")
    if ".." not in segments and "." not in segments:
        for tier in tiers_of_rules():
            if f"{url.rstrip('/')}/".startswith(f"{tier.url.rstrip('/')}/"):
                return dict(tier.options)
    return {}


T = TypeVar("T")

_ARCHIVED = re.compile(r"InvalidObjectState|BlobArchived|storage class|archived", re.IGNORECASE)
_MANY_ETAGS = 4096
_CLOUDS = ("s3", "s3a", "gs", "gcs", "az", "azure")


@dataclass(frozen=True, slots=True)
class ObjectLocation:
    """Location at which an object was found. info: Answer of a HEAD there; None if none was made."""

    store: Store
    row: PlacementRow | None
    info: ObjectInfo | None = None


def is_archived(error: StoreError) -> bool:
    """Return whether a store's error says that an object must be restored before it can be read."""
    return error.status in (403, 409) and bool(_ARCHIVED.search(error.message))


class LocationResolver:
    """Resolves the locations of a home's objects. Thread-safe and fork-safe.

    What is known is read without the lock, which guards the reading of the placement. Locations of the home's service
    are opened with the home's options, and all with those that a rule file of this machine has for their tier.
    known_placement: The newest one known; None: none is, or the home is not tracked. has_remote: Whether it names a
    remote store, for which a cache pays off.
    """

    def __init__(self, home: Store, options: Mapping[str, Any]) -> None:
        self.home = home
        self.options = dict(options)
        self.known_placement: Placement | None = None
        self.has_remote = self._has_local = False
        self._was_read = False
        self._lock = ProcessLocal(threading.Lock, lambda _lock: None)  # a parent's lock may be held for ever
        self._stores: dict[str, Store] = {}
        self._etags: dict[tuple[str, str], str | None] = {}  # (key, ETag at opening) -> ETag of the moved object

    def __reduce__(self) -> tuple[Any, ...]:
        return LocationResolver, (self.home, self.options)

    # -- the placement ----------------------------------------------------------------------------------------------

    def placement_once(self) -> Placement | None:
        """Return the placement, read once; None if the home is not tracked. Raises as read_placement()."""
        if not self._was_read:
            with self._lock.get():
                if not self._was_read:
                    self._learn(placement_log.read_placement(self.home))
        return self.known_placement

    def refresh(self) -> Placement | None:
        """Read and return the newest placement. Raises as placement_log.find_newest_placement()."""
        with self._lock.get():
            found = placement_log.find_newest_placement(self.home, self.known_placement)
            if found.number or self.known_placement is not None:
                self._learn(found)
        return self.known_placement

    @property
    def is_tracked(self) -> bool | None:
        return self.known_placement is not None if self._was_read else None

    def row(self, key: str) -> PlacementRow | None:
        placement = self.known_placement
        return None if placement is None or not len(placement) else placement.find(key)

    def _learn(self, found: Placement | None) -> None:
        urls = [] if found is None else found.rows["url"].unique().to_pylist()
        self._has_local = any(not scheme_of(url) for url in urls)
        self.has_remote = any(is_remote(url) for url in urls)
        self.known_placement, self._was_read = found, True

    # -- stores -----------------------------------------------------------------------------------------------------

    def store_at(self, row: PlacementRow | None) -> Store:
        """Return the store of a row's location, opened once; the home for None."""
        if row is None or self._is_home(row.url):
            return self.home
        url = row.url
        if url not in self._stores:
            own = self.options if is_same_service(url, self.home.url) else {}
            try:
                self._stores.setdefault(url, open_store(url, **(own | options_of(url))))  # it has sent no request yet
            except ValueError as error:
                message = f"the placement of {self.home.url} names a location that cannot be opened: {error}"
                raise StoreError(message, url=redact(url)) from error
        return self._stores[url]

    def _is_home(self, url: str) -> bool:
        return url.rstrip("/") == self.home.url.rstrip("/")

    def stores(self) -> tuple[Store, ...]:
        return self.home, *self._stores.values()

    def close(self) -> None:
        for store in self.stores():
            store.close()

    # -- resolving --------------------------------------------------------------------------------------------------

    def follow(self, key: str, call: Callable[[ObjectLocation], T], if_match: str | None = None) -> T:
        """Return call(location) for the location of key. Call it once more if the object has moved since.

        if_match: ETag at opening, for which the new location's is remembered. Raises ArchivedShards if the object must
        be restored first, or the error of the call if it is not found unchanged elsewhere.
        """
        row = None if key.startswith(OWN_FOLDER) else self.row(key)
        try:
            return call(ObjectLocation(self.store_at(row), row))
        except StoreError as error:
            archived = is_archived(error)
            if key.startswith(OWN_FOLDER) or not (archived or isinstance(error, NotFound | ObjectChanged)):
                raise
            found = self._find_again(key, row, error)
        if if_match is not None and found.info is not None:
            if len(self._etags) >= _MANY_ETAGS:
                self._etags.clear()
            self._etags[key, if_match] = found.info.etag
        try:
            return call(found)
        except StoreError as error:
            if is_archived(error):
                raise self._archived_error(key, found.row, found.store) from error
            raise

    def etag_of(self, key: str, etag: str) -> str | None:
        return self._etags.get((key, etag), etag)

    def _find_again(self, key: str, before: PlacementRow | None, error: StoreError) -> ObjectLocation:
        """Return the new location of an object that is not where `before` says. Raises error if it is nowhere."""
        try:
            self.refresh()
        except TierCacheError:
            raise error from None  # without the placement, report the original error
        row = self.row(key)
        expected = row or before
        if expected is None:
            raise error  # no placement has a row for it
        last: StoreError = error
        # At home it stays during the grace period.
        for candidate in (None,) if row is None or self._is_home(row.url) else (row, None):
            if candidate == before and (isinstance(error, NotFound) or is_archived(error)):
                continue  # that location was asked already
            store = self.store_at(candidate)
            try:
                info = store.head(key)
            except StoreError as failure:
                last = failure if isinstance(error, NotFound) and not isinstance(failure, NotFound) else last
                continue
            if _is_same(info, expected):
                return ObjectLocation(store, candidate, info)
            last = ObjectChanged(
                "expected the moved object, found a different one",
                url=store.url_of(key),
                expected=f"{expected.n_bytes} bytes",
                found=f"{info.n_bytes} bytes",
            )
        if is_archived(error):
            raise self._archived_error(key, expected, self.store_at(expected)) from error
        raise last from (None if last is error else error)

    def _archived_error(self, key: str, row: PlacementRow | None, store: Store) -> ArchivedShards:
        kind = "" if row is None or row.storage_class is None else f" (storage class {row.storage_class})"
        what = f"{store.url_of(key)}: is archived{kind} and must be restored before it can be read"
        return archived_error(store.url, [key], 0 if row is None else row.n_bytes, what, [self.home.url_of(key)])

    def can_be_read(self, row: PlacementRow) -> bool:
        """Return whether an object that the placement calls archived can be read now, there or at home."""
        if not row.n_bytes:
            return True
        try:
            _read_a_byte(self.store_at(row), row.key)
        except StoreError as error:
            if is_archived(error):
                home = None if self._is_home(row.url) else self.home
                with suppress(StoreError):
                    if home is not None:
                        _read_a_byte(home, row.key)
                        return _is_same(home.head(row.key), row)
                return False
        return True  # a later read reports other errors

    # -- local folders ----------------------------------------------------------------------------------------------

    def local_copy(self, key: str, n_bytes: int) -> LocalFolder | None:
        """Return a folder of this machine that has the object under its key, with this size; None if there is none."""
        if not self._has_local:
            return None
        row = self.row(key)
        if row is None or scheme_of(row.url):
            return None
        with suppress(StoreError):
            store = self.store_at(row)
            if store is not self.home and isinstance(store, LocalFolder) and store.head(key).n_bytes == n_bytes:
                return store
        return None


def _read_a_byte(store: Store, key: str) -> None:
    store.read_into(key, [(ByteRange(0, 1), memoryview(bytearray(1)))])


def _is_same(info: ObjectInfo, expected: PlacementRow) -> bool:
    sums = (info.crc32c, expected.crc32c)
    return info.n_bytes == expected.n_bytes and (None in sums or sums[0] == sums[1])


def archived_error(url: str, keys: Sequence[str], n_bytes: int, what: str, asked: Sequence[str] = ()) -> ArchivedShards:
    """Return the error for objects below a URL that must be restored first; `what` comes before the command.

    asked: URLs, and options, for the command. (): url.
    """
    command = shlex.join(["tiercache", "tier", "get", *(asked or [url]), "--wait"])
    return ArchivedShards(f"{what}: {command}", names=[*keys], url=url, n_bytes=n_bytes, command=command)


def is_same_service(url: str, home: str) -> bool:
    """Return whether the home's options, including credentials, may be sent to a location that its placement names."""
    scheme = scheme_of(url)
    if scheme != scheme_of(home) or "::" in url:  # a chained URL may lead to any service
        return False
    return scheme in _CLOUDS or url.split("/")[:3] == home.split("/")[:3]


def is_remote(url: str) -> bool:
    return scheme_of(url) not in ("", "memory")


# Restores of archived shards are queried in parallel, because the time is round trips.
ASKING_THREADS = 16
# Most names in a message and its command. For more shards the command restores all below the URL. The error has all.
_SHOWN = 8

Cached: TypeAlias = Callable[[Store], Store]


def follow_placement(home: Store, options: Mapping[str, Any], cached: Cached | None = None) -> RedirectingStore:
    """Return a store that follows the placement of a home: a LocalStore where the home is one.

    cached: Wraps a store in the cache, for the remote objects of a local home.
    """
    resolver = LocationResolver(home, options)
    return RedirectingLocalStore(resolver, cached) if isinstance(home, LocalStore) else RedirectingStore(resolver)


class RedirectingStore(WrapperStore):
    """Store whose reads follow the placement; all other calls, and `counters`, are those of the home."""

    def __init__(self, resolver: LocationResolver) -> None:
        super().__init__(resolver.home)
        self.resolver = resolver

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.resolver,)

    @property
    def by_ranges(self) -> RedirectingStore:
        """The same store for reads by ranges only, without local files or a cache."""
        return self

    @property
    def remote_store(self) -> Store | None:
        """Store of the moved objects of a local home, through the cache if there is one; None: there are none."""
        return None

    def is_remote(self, key: str) -> bool:  # noqa: ARG002 - of a local home
        """Return whether a local home has moved key to a remote store, for which a cache pays off."""
        return False

    def figures(self) -> dict[str, float]:
        """Return the counters, summed over the home and the other locations, and their prices; 0 for unknown providers.

        dollars: Of the requests. egress_dollars: Of the bytes, if they leave the region.
        """
        sums: dict[str, float] = {"dollars": 0.0, "egress_dollars": 0.0}
        for store in self.resolver.stores():
            counters = store.counters.snapshot()
            prices = provider_prices(store.provider)
            if prices is not None:
                dollars, egress = read_dollars(prices, counters.get("requests", 0), counters.get("bytes_read", 0))
                counters |= {"dollars": dollars, "egress_dollars": egress}
            for name, figure in counters.items():
                sums[name] = sums.get(name, 0) + figure
        return sums

    # -- reading ----------------------------------------------------------------------------------------------------

    def read_into(
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        """See Store.read_into. An ETag means the object as it was opened, wherever it has moved since."""

        def read(found: ObjectLocation) -> None:
            etag = self._etag_at(found, key, if_match)
            found.store.read_into(key, spans, if_match=etag, cancel=cancel)

        self.resolver.follow(key, read, if_match)

    def read_pieces(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        receive: Receive,
        *,
        if_match: str | None = None,
        cancel: Event | None = None,
    ) -> None:
        def read(found: ObjectLocation) -> None:
            etag = self._etag_at(found, key, if_match)
            found.store.read_pieces(key, ranges, receive, if_match=etag, cancel=cancel)

        self.resolver.follow(key, read, if_match)

    def _etag_at(self, found: ObjectLocation, key: str, if_match: str | None) -> str | None:
        if if_match is None:
            return None
        return self.resolver.etag_of(key, if_match) if found.info is None else found.info.etag

    def head(self, key: str) -> ObjectInfo:
        return self.resolver.follow(key, lambda found: found.info or found.store.head(key))

    def get(self, key: str) -> bytes:
        return self.resolver.follow(key, lambda found: found.store.get(key))

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        return self.resolver.follow(key, lambda found: found.store.read_tail(key, n_bytes))

    def close(self) -> None:
        self.resolver.close()


class RedirectingLocalStore(RedirectingStore):
    """A local home: its own files are opened directly, remote objects are read through the cache."""

    def __init__(self, resolver: LocationResolver, cached: Cached | None) -> None:
        super().__init__(resolver)
        self._cached = cached
        self._remote_store: Store | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.resolver, self._cached)

    @property
    def by_ranges(self) -> RedirectingStore:
        return RedirectingStore(self.resolver)

    @property
    def remote_store(self) -> Store | None:
        if self._remote_store is None and self.resolver.has_remote:
            self._remote_store = self.by_ranges if self._cached is None else self._cached(self.by_ranges)
        return self._remote_store

    def is_remote(self, key: str) -> bool:
        row = self.resolver.row(key) if self.resolver.has_remote else None
        return row is not None and is_remote(row.url)

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """Return a lease on the file, or on the cached copy of a remote object; None if it is read by ranges."""

        def open_at(found: ObjectLocation) -> Lease | None:
            is_cached = found.row is not None and is_remote(found.row.url)
            store = (self.remote_store if is_cached else None) or found.store
            return store.open_local(key, identity) if isinstance(store, LocalStore) else None

        return self.resolver.follow(key, open_at)

    def remove_if_corrupt(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """See LocalStore.remove_if_corrupt. Returns False for a file of this home, which is the object itself."""
        store = self.remote_store
        if store is None or not self.is_remote(key):
            return False
        return isinstance(store, LocalStore) and store.remove_if_corrupt(key, identity)


# -- check before a run ---------------------------------------------------------------------------------------------


def check_readable(store: RedirectingStore, keys: pa.ChunkedArray, is_here: Callable[[int], bool]) -> None:
    """Raise ArchivedShards, with all names, if some of these objects must be restored first.

    Objects that the placement calls archived may have been restored: the store is asked for one byte each. is_here:
    Whether object i is on this machine already.
    """
    placement = store.resolver.placement_once()
    needed = () if placement is None else _archived(store, placement, keys, is_here)
    if needed and (newer := store.resolver.refresh()) is not placement and newer is not None:
        needed = _archived(store, newer, keys, is_here)  # they may have been restored to the home since
    if needed:
        names, n_bytes, url = [row.key for row in needed], sum(row.n_bytes for row in needed), store.url
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        what = (
            f"{url}: {len(names)} shards that this run reads ({format_bytes(n_bytes)}: {shown}) are archived and must "
            "be restored first; this command shows cost and duration, and restores them"
        )
        raise archived_error(url, names, n_bytes, what, [*map(store.url_of, names)] if len(names) <= _SHOWN else [url])


def _archived(
    store: RedirectingStore, placement: Placement, keys: pa.ChunkedArray, is_here: Callable[[int], bool]
) -> tuple[PlacementRow, ...]:
    if not len(placement):
        return ()
    at = placement.row_numbers(keys)
    archived = pc.equal(placement.rows["state"], "archived").to_numpy()
    rows = [placement.row(int(at[i])) for i in np.flatnonzero(at >= 0).tolist() if archived[at[i]] and not is_here(i)]
    with call_threads(min(ASKING_THREADS, max(len(rows), 1)), "tiercache-archived") as pool:
        can_read = list(pool.map(store.resolver.can_be_read, rows))
    return tuple(row for row, can in zip(rows, can_read, strict=True) if not can)


# -- one opened data set -----------------------------------------------------------------------------------------------


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
        return self.store.url_of(self.key)


@dataclass(frozen=True, slots=True)
class FolderLocation:
    """Locations of everything below a folder. files: By path below it.

    whole_url: The folder in the first store that has all of it; None: it is spread. is_archived: That copy must be
    restored first.
    """

    files: Mapping[str, FileLocation]
    whole_url: str | None
    is_archived: bool = False


@dataclass(frozen=True, slots=True)
class FolderTiers:
    """The tiers, other than a folder itself, in which objects of the folder may lie.

    urls: Folder in each tier, by the tier's name; by the URL if no rule file has it. placed: Folder that has an object,
    by the key below the folder, as the placement states it. home: Folder in the home; None: no placement.
    """

    urls: Mapping[str, str]
    placed: Mapping[str, str]
    home: str | None


class FileLocator:
    """Finds the present locations of files and folders. Thread-safe; the lock guards the opened stores.

    open_url: Opens the store of a tier or home; None: by the rule file. rules: None: that of the working folder.
    """

    def __init__(self, open_url: OpenUrl | None = None, *, rules: Path | None = None) -> None:
        self._open_url = open_url or (lambda url: open_store(url, **options_of(url)))
        self._rules = rules
        self._lock = threading.Lock()
        self._stores: dict[str, Store] = {}
        self._no_homes: dict[str, float] = {}

    def close(self) -> None:
        with self._lock:
            opened = [*self._stores.values()]
            self._stores.clear()
        for store in opened:
            store.close()

    # -- looking up -------------------------------------------------------------------------------------------------

    def find_file(self, path: str) -> FileLocation | None:
        """Return the location of an object, by a path or URL under which it lay; None: it is nowhere.

        Of several copies, the fastest that can be read. Raises StoreError if no copy was found and a store failed.
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

        follows_placement: Search the folders above for a home. Raises as placement_log.read_placement().
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
        return tiers_of_rules(self._rules)

    def _stores_of_tiers(self) -> list[Store]:
        return [self.store(url) for url in dict.fromkeys(tier.url for tier in self.tiers())]

    def store(self, url: str) -> Store:
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
        return FolderLocation(files, found[whole][0].url_of(key), archived[whole])

    # -- homes without a rule file ----------------------------------------------------------------------------------

    def _homes_above(self, path: str) -> Iterator[tuple[Store, placement_log.Placement, str]]:
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

    def _home_at(self, url: str) -> tuple[str, placement_log.Placement] | None:
        """Return the URL of the home at a folder, or to which its marker leads, and its placement; None: no marker."""
        if self._no_homes.get(url, -_NO_HOME_S) + _NO_HOME_S > time.monotonic():
            return None
        found, home = placement_log.follow_marker(self.store(url)), url
        if isinstance(found, str):
            home, found = found, placement_log.read_placement(self.store(found)) or placement_log.empty_placement()
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
    with call_threads(min(_THREADS, len(infos)), "tiercache-locations") as pool:
        return all(pool.map(lambda info: _can_be_read(store, info), infos.values()))


def archived_file_error(url: str, n_bytes: int = 0, *, rules: Path | None = None) -> ArchivedShards:
    shown = redact(url)
    what = f"{shown}: is archived and must be restored before it can be read"
    asked = [shown] if rules is None else [shown, "--rules", str(rules)]
    return archived_error(shown, [shown.rpartition("/")[2]], n_bytes, what, asked)


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
