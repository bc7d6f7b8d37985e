"""Location resolver: where the objects of a home are read now, by the placement that this process knows.

A moved object is found without a notification::

    1. If the known placement has a row for the key, that location is read; otherwise the home is read.
    2. If the store answers that the object is missing (404), a different one (412) or archived (403), the placement is
       read again, and the location it names is asked by one HEAD; then the home, where a copy stays during the grace
       period.
    3. If the size and, where both are known, the checksum are as expected, the read continues there.

The tiers of this machine's rule file are read here without the models that validate a rule file, because building these
takes 50 ms in every process of a training job.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tiercache import config
from tiercache.errors import ArchivedShards, NotFound, ObjectChanged, StoreError, TierCacheError
from tiercache.model import OWN_FOLDER, ByteRange
from tiercache.store import LocalFolder, Store, open_store, redact
from tiercache.store.placement import log

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.store.placement.log import Placement, PlacementRow


@dataclass(frozen=True, slots=True)
class TierUrl:
    """A tier of a rule file, as far as readers need it. url: URL or absolute path."""

    name: str
    url: str
    options: Mapping[str, Any]


def tiers_of_rules(rules: Path | None = None) -> tuple[TierUrl, ...]:
    """Return the tiers of a rule file, from the fastest to the coldest; () if there is no readable one.

    rules: Rule file; None: the tiercache.toml that applies to the working folder.
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


@dataclass(slots=True)
class _ResolverState:
    """What one process knows. The lock guards opening stores and reading the placement.

    Attributes:
        was_read: Whether the marker was read.
        placement: Newest placement known; None if none is known, or the home is not tracked.
        stores: URL -> opened store.
        etags: (key, ETag at opening) -> current ETag of moved objects.
        has_local: Whether the placement names folders of this machine.
        has_remote: Whether the placement names remote stores, for which a cache pays off.
    """

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    was_read: bool = False
    placement: Placement | None = None
    stores: dict[str, Store] = field(default_factory=dict)
    etags: dict[tuple[str, str], str | None] = field(default_factory=dict)
    has_local: bool = False
    has_remote: bool = False


class LocationResolver:
    """Resolves the locations of a home's objects. Thread-safe. A forked child opens its own stores.

    Known state is read without the lock. The options of the home also apply to locations of the same service, together
    with the options that a rule file of this machine has for their tier.
    """

    def __init__(self, home: Store, options: Mapping[str, Any]) -> None:
        self.home = home
        self.options = dict(options)
        self._known = _ResolverState()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocationResolver, (self.home, self.options)

    @property
    def _state(self) -> _ResolverState:
        state = self._known
        if state.pid != os.getpid():  # the parent's lock may be held for ever, and its stores are the parent's
            was_read, found = state.was_read, state.placement
            state = self._known = _ResolverState()
            if was_read:
                self._learn(state, found)
        return state

    # -- state ------------------------------------------------------------------------------------------------------

    def placement_once(self) -> Placement | None:
        """Return the placement, read once per process; None if the home is not tracked. Raises as read_placement()."""
        state = self._state
        if not state.was_read:
            with state.lock:
                if not state.was_read:
                    self._learn(state, log.read_placement(self.home))
        return state.placement

    def refresh(self) -> Placement | None:
        """Read and return the newest placement. Raises as log.find_newest_placement()."""
        state = self._state
        with state.lock:
            found = log.find_newest_placement(self.home, state.placement)
            if found.number or state.placement is not None:
                self._learn(state, found)
        return state.placement

    @property
    def is_tracked(self) -> bool | None:
        """Whether the home is tracked; None if the marker was not read yet."""
        state = self._state
        return state.placement is not None if state.was_read else None

    @property
    def has_remote(self) -> bool:
        """Whether the known placement names a remote store, for which a cache pays off."""
        return self._known.has_remote

    @property
    def known_placement(self) -> Placement | None:
        return self._known.placement

    def row(self, key: str) -> PlacementRow | None:
        """Return the row of key in the known placement; None: at home."""
        placement = self._known.placement
        return None if placement is None or not len(placement) else placement.find(key)

    def _learn(self, state: _ResolverState, found: Placement | None) -> None:
        state.placement, state.was_read = found, True
        urls = [] if found is None else found.rows["url"].unique().to_pylist()
        state.has_local = any(not scheme_of(url) for url in urls)
        state.has_remote = any(is_remote(url) for url in urls)

    # -- stores -----------------------------------------------------------------------------------------------------

    def store_at(self, row: PlacementRow | None) -> Store:
        """Return the store of a row's location, opened once per process; the home for None."""
        if row is None or self._is_home(row.url):
            return self.home
        state, url = self._state, row.url
        with state.lock:
            if url not in state.stores:
                own = self.options if is_same_service(url, self.home.url) else {}
                try:
                    state.stores[url] = open_store(url, **(own | options_of(url)))
                except ValueError as error:
                    message = f"the placement of {self.home.url} names a location that cannot be opened: {error}"
                    raise StoreError(message, url=redact(url)) from error
            return state.stores[url]

    def _is_home(self, url: str) -> bool:
        return url.rstrip("/") == self.home.url.rstrip("/")

    def stores(self) -> tuple[Store, ...]:
        return self.home, *self._known.stores.values()

    def close(self) -> None:
        for store in self.stores():
            store.close()

    # -- resolving --------------------------------------------------------------------------------------------------

    def follow(self, key: str, call: Callable[[ObjectLocation], T], if_match: str | None = None) -> T:
        """Return call(location) for the location of key. Call it once more if the object has moved since.

        if_match: ETag of the object at opening; the new location's ETag is remembered for it. Raises ArchivedShards if
        the object must be restored first, or the error of the call if the object is not found unchanged elsewhere.
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
            etags = self._state.etags
            if len(etags) >= _MANY_ETAGS:
                etags.clear()
            etags[key, if_match] = found.info.etag
        try:
            return call(found)
        except StoreError as error:
            if is_archived(error):
                raise archived_error(key, found.row, found.store, self.home) from error
            raise

    def etag_of(self, key: str, etag: str | None) -> str | None:
        """Return the current ETag of an object that had `etag` when it was opened."""
        etags = self._known.etags
        return etags.get((key, etag), etag) if etags and etag is not None else etag

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
        for candidate in self._candidates(row, before):
            if candidate == before and (isinstance(error, NotFound) or is_archived(error)):
                continue  # that location was asked already
            try:
                store = self.store_at(candidate)
            except StoreError:
                if candidate == row:
                    raise
                continue
            try:
                info = store.head(key)
            except StoreError as failure:
                last = failure if isinstance(error, NotFound) and not isinstance(failure, NotFound) else last
                continue
            if _is_same(info, expected):
                return ObjectLocation(store, candidate, info)
            last = ObjectChanged(
                "expected the moved object, found a different one",
                url=f"{store.url}/{key}",
                expected=f"{expected.n_bytes} bytes",
                found=f"{info.n_bytes} bytes",
            )
        if is_archived(error):
            raise archived_error(key, expected, self.store_at(expected), self.home) from error
        raise last from (None if last is error else error)

    def _candidates(self, row: PlacementRow | None, before: PlacementRow | None) -> Iterator[PlacementRow | None]:
        """Yield the locations where an object may be, each once.

        First the location in the newest placement; then the home, where the object stays during the grace period; then
        the last location that this process knew.
        """
        urls: set[str | None] = set()
        for candidate in (row, None, before):
            url = None if candidate is None or self._is_home(candidate.url) else candidate.url.rstrip("/")
            if url not in urls:
                urls.add(url)
                yield candidate

    def can_be_read(self, row: PlacementRow) -> bool:
        """Return whether an object that the placement calls archived can be read now, there or at home.

        Its store is asked for one byte: a storage class alone does not tell whether an object was restored.
        """
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
        if not self._known.has_local:
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
    """Return whether an object is the one in a row, as far as the store tells."""
    sums = (info.crc32c, expected.crc32c)
    return info.n_bytes == expected.n_bytes and (None in sums or sums[0] == sums[1])


def archived_error(key: str, row: PlacementRow | None, store: Store, home: Store) -> ArchivedShards:
    """Return the error for one object of a home that must be restored; it names the command that does that."""
    kind = "" if row is None or row.storage_class is None else f" (storage class {row.storage_class})"
    command = shlex.join(["tiercache", "tier", "get", f"{home.url.rstrip('/')}/{key}", "--wait"])
    return ArchivedShards(
        f"{store.url}/{key}: is archived{kind} and must be restored before it can be read: {command}",
        names=[key],
        url=store.url,
        n_bytes=0 if row is None else row.n_bytes,
        command=command,
    )


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case; "" for a local path."""
    scheme, found, _ = url.partition("://")
    return scheme.lower() if found and scheme.lower() != "file" else ""


def is_same_service(url: str, home: str) -> bool:
    """Return whether the home's options, including credentials, may be sent to a location that its placement names.

    For these clouds the options determine the server that is asked; for all others the URL does.
    """
    scheme = scheme_of(url)
    if scheme != scheme_of(home) or "::" in url:  # a chained URL may lead to any service
        return False
    return scheme in _CLOUDS or url.split("/")[:3] == home.split("/")[:3]


def is_remote(url: str) -> bool:
    """Return whether a URL belongs to a remote store, for which a cache pays off."""
    return scheme_of(url) not in ("", "memory")
