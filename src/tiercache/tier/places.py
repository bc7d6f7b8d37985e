"""Where a home's objects are read from by now: its placement as this process knows it, and the stores it leads to.

What lies elsewhere is found without being told::

    1. the placement is known, and has a row for the key: its place is asked; else the home is
    2. who was asked says that there is nothing (404), another object (412) or one that must be restored (403): the
       placement is read once more, and whoever has the object by now is asked by one HEAD; at last home, and the
       places that earlier placements name, where a copy lies until grace is over
    3. if size and, where both are known, checksum are those that it should have, reading goes on there
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from tiercache.errors import ArchivedShards, NotFound, ObjectChanged, StoreError, TierCacheError
from tiercache.model import OWN_FOLDER, ByteRange
from tiercache.store import LocalFolder, Store, open_store, redact
from tiercache.tier import placement
from tiercache.tier.machine import tier_above

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.tier.placement import Placement, Row

T = TypeVar("T")

_ARCHIVED = re.compile(r"InvalidObjectState|BlobArchived|storage class|archived", re.IGNORECASE)
_MANY_ETAGS = 4096
_CLOUDS = ("s3", "s3a", "gs", "gcs", "az", "azure")


@dataclass(frozen=True, slots=True)
class Found:
    """Where an object was found. info: what a HEAD said there; None: it was not asked."""

    store: Store
    row: Row | None
    info: ObjectInfo | None = None


def is_archived(error: StoreError) -> bool:
    """Whether a store says that an object must be restored before it can be read."""
    return error.facts.get("status") in (403, 409) and bool(_ARCHIVED.search(error.message))


@dataclass(slots=True)
class _Known:
    """What one process knows. asked: whether the mark was asked for. etags: those of objects that moved, new for old.

    earlier: number of the newest placement, and what those before it say otherwise.
    wrong: keys whose copy near by was found to be damaged; has_near, has_far: whether the placement leads to folders
    of this machine, and to stores that a cache is worth while for.
    """

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: bool = False
    placement: Placement | None = None
    stores: dict[str, Store] = field(default_factory=dict)
    etags: dict[tuple[str, str], str | None] = field(default_factory=dict)
    earlier: tuple[int, tuple[Placement, ...]] | None = None
    wrong: set[str] = field(default_factory=set)
    has_near: bool = False
    has_far: bool = False


class Places:
    """A home and what was moved away from it. Safe from any thread; a forked child opens its own stores.

    The lock guards opening stores and reading the placement anew; what is known is looked at without it.

    Args:
        home: where everything lies that no placement speaks of.
        options: storage options of the home. Places of the same service are opened by them too, and by what a rule
            file of this machine has for their tier.
    """

    def __init__(self, home: Store, options: Mapping[str, Any]) -> None:
        self.home = home
        self.options = dict(options)
        self._known = _Known()

    def __reduce__(self) -> tuple[Any, ...]:
        return Places, (self.home, self.options)

    @property
    def _here(self) -> _Known:
        known = self._known
        if known.pid != os.getpid():  # its lock may be held for ever, its stores are the parent's
            asked, found = known.asked, known.placement
            known = self._known = _Known()
            if asked:
                self._learn(known, found)
        return known

    # -- what is known ----------------------------------------------------------------------------------------------

    def look(self) -> Placement | None:
        """The placement, asked for once in a process; None: no tiers look after this home. Raises as placement.read."""
        known = self._here
        if not known.asked:
            with known.lock:
                if not known.asked:
                    self._learn(known, placement.read(self.home))
        return known.placement

    def look_again(self) -> Placement | None:
        """The newest placement there is by now. Raises as placement.search."""
        known = self._here
        with known.lock:
            found = placement.search(self.home, known.placement)
            if found.number or known.placement is not None:
                self._learn(known, found)
        return known.placement

    @property
    def is_adopted(self) -> bool | None:
        """Whether tiers look after this home; None: nobody has asked yet."""
        known = self._here
        return known.placement is not None if known.asked else None

    @property
    def has_far(self) -> bool:
        """Whether anything lies in a store that a cache is worth while for, as far as is known."""
        return self._known.has_far

    @property
    def placed(self) -> Placement | None:
        """What is known by now, without asking."""
        return self._known.placement

    def row(self, key: str) -> Row | None:
        """Where key lies as far as is known; None: at home."""
        known = self._known.placement
        return None if known is None or not len(known) else known.find(key)

    def _learn(self, known: _Known, found: Placement | None) -> None:
        known.placement, known.asked = found, True
        urls, hot = (
            set() if found is None else set(found.rows[name].unique().to_pylist()) for name in ("url", "promote")
        )
        known.has_near = any(is_local(url) for url in urls | hot if url is not None)
        known.has_far = any(is_far(url) for url in urls)

    # -- stores -----------------------------------------------------------------------------------------------------

    def store_at(self, row: Row | None) -> Store:
        """The store of a row's place, opened once in a process; the home for None."""
        if row is None or self._is_home(row.url):
            return self.home
        known = self._here
        with known.lock:
            return self._opened(known, row.url)

    def _is_home(self, url: str) -> bool:
        return url.rstrip("/") == self.home.url.rstrip("/")

    def _opened(self, known: _Known, url: str) -> Store:
        found = known.stores.get(url)
        if found is None:
            tier = tier_above(url)
            own = self.options if _same_service(url, self.home.url) else {}
            try:
                found = open_store(url, **(own if tier is None else own | tier.storage_options))
            except ValueError as error:
                message = f"the placement of {self.home.url} leads to where nothing can be read: {error}"
                raise StoreError(message, url=redact(url)) from error
            known.stores[url] = found
        return found

    def stores(self) -> tuple[Store, ...]:
        """The home, and those that were opened beside it."""
        return self.home, *self._known.stores.values()

    def close(self) -> None:
        """Drop connections of all of them."""
        for store in self.stores():
            store.close()

    # -- following --------------------------------------------------------------------------------------------------

    def follow(self, key: str, call: Callable[[Found], T], if_match: str | None = None) -> T:
        """What call gives where key lies; once more where it lies elsewhere by now.

        Raises:
            ArchivedShards: it must be restored first.
            StoreError: what the call raises, where the object is not to be found elsewhere as it was.
        """
        row = None if key.startswith(OWN_FOLDER) else self.row(key)
        try:
            return call(Found(self.store_at(row), row))
        except StoreError as error:
            archived = is_archived(error)
            if key.startswith(OWN_FOLDER) or not (archived or isinstance(error, NotFound | ObjectChanged)):
                raise
            found = self._find_again(key, row, error)
        if if_match is not None and found.info is not None:
            self._translate(key, if_match, found.info.etag)
        try:
            return call(found)
        except StoreError as error:
            if is_archived(error):
                raise archived_error(key, found.row, found.store) from error
            raise

    def etag_of(self, key: str, etag: str | None) -> str | None:
        """The ETag that an object has where it lies by now, for one that it had where it was opened."""
        etags = self._known.etags
        return etags.get((key, etag), etag) if etags and etag is not None else etag

    def _translate(self, key: str, etag: str, now: str | None) -> None:
        etags = self._here.etags
        if len(etags) >= _MANY_ETAGS:
            etags.clear()
        etags[key, etag] = now

    def _find_again(self, key: str, before: Row | None, error: StoreError) -> Found:
        """Where an object is that was not to be had where `before` says. Raises error where it is nowhere."""
        row = self._read_again(key, error)
        expected = row or before
        if expected is None:
            raise error  # nothing says that it ever lay elsewhere
        last: StoreError = error
        for place in self._candidates(key, row, before):
            if place == before and (isinstance(error, NotFound) or is_archived(error)):
                continue  # that was asked
            try:
                store = self.store_at(place)
            except StoreError:
                if place == row:
                    raise
                continue  # an earlier placement leads to where nothing can be read by now
            try:
                info = store.head(key)
            except StoreError as failure:
                last = failure if isinstance(error, NotFound) and not isinstance(failure, NotFound) else last
                continue
            if _is_same(info, expected):
                return Found(store, place, info)
            last = ObjectChanged(
                "another object lies where this one was moved to",
                url=f"{store.url}/{key}",
                expected=f"{expected.n_bytes} bytes",
                found=f"{info.n_bytes} bytes",
            )
        if is_archived(error):
            raise archived_error(key, expected, self.store_at(expected)) from error
        raise last from (None if last is error else error)

    def _candidates(self, key: str, row: Row | None, before: Row | None) -> Iterator[Row | None]:
        """Where an object may be, each place once.

        By the newest placement; at home, where it lies until grace is over; where it lay as far as this process knew;
        and, where it went from one place to another, where earlier placements say that it lay: its copy there stays
        until grace is over, and may be all there is of a copy that was lost.
        """
        asked: set[str | None] = set()
        for place in itertools.chain((row, None, before), self._earlier(key, row)):
            url = None if place is None or self._is_home(place.url) else place.url.rstrip("/")
            if url not in asked:
                asked.add(url)
                yield place

    def _earlier(self, key: str, row: Row | None) -> Iterator[Row]:
        """Where earlier placements say that key lay, the latest first. They are read once for each newest one."""
        known = self._here
        newest = known.placement
        if row is None or newest is None:
            return
        with known.lock:
            if known.earlier is None or known.earlier[0] != newest.number:
                known.earlier = newest.number, placement.moved_since(self.home, newest)
            found = known.earlier[1]
        yield from (one for one in (each.find(key) for each in found) if one is not None)

    def _read_again(self, key: str, error: StoreError) -> Row | None:
        try:
            self.look_again()
        except TierCacheError:
            raise error from None  # whoever cannot read the placement hears what was missing
        return self.row(key)

    def can_be_read(self, row: Row) -> bool:
        """Whether an object that a placement calls archived can be read by now: in its place, or where it was before.

        Its store is asked for a byte of it: a storage class alone says nothing of what was restored.
        """
        if not row.n_bytes:
            return True
        try:
            _read_a_byte(self.store_at(row), row.key)
        except StoreError as error:
            if not is_archived(error):
                return True  # whoever reads it hears why not
        else:
            return True
        others = self._candidates(row.key, row, None)
        return any(self._has_readable(place, row) for place in others if place is not row)

    def _has_readable(self, place: Row | None, expected: Row) -> bool:
        try:
            store = self.store_at(place)
            _read_a_byte(store, expected.key)
            return _is_same(store.head(expected.key), expected)
        except StoreError:
            return False

    # -- near by ----------------------------------------------------------------------------------------------------

    def near(self, key: str, n_bytes: int) -> LocalFolder | None:
        """A folder of this machine that has the object by the same key; None: there is none, or not of this size."""
        known = self._known
        if not known.has_near or key in known.wrong:
            return None
        row = self.row(key)
        for url in () if row is None else (row.promote, row.url):
            if url is not None and is_local(url):
                try:
                    store = self.store_of(url)
                    if isinstance(store, LocalFolder) and store.head(key).n_bytes == n_bytes:
                        return store
                except StoreError:
                    continue
        return None

    def store_of(self, url: str) -> Store:
        """The store of a folder, opened once in a process."""
        known = self._here
        with known.lock:
            return self._opened(known, url)

    def distrust_near(self, key: str, n_bytes: int) -> bool:
        """Hear that a copy near by was found to be wrong. True: there was one, and it is passed by from now on."""
        was_near = self.near(key, n_bytes) is not None
        self._here.wrong.add(key)
        return was_near


def _read_a_byte(store: Store, key: str) -> None:
    store.read_into(key, [(ByteRange(0, 1), memoryview(bytearray(1)))])


def _is_same(info: ObjectInfo, expected: Row) -> bool:
    """Whether an object is the one that a row is about, as far as the store says."""
    sums = (info.crc32c, expected.crc32c)
    return info.n_bytes == expected.n_bytes and (None in sums or sums[0] == sums[1])


def archived_error(key: str, row: Row | None, store: Store) -> ArchivedShards:
    """The error of one object that must be restored."""
    kind = "" if row is None or row.storage_class is None else f" (storage class {row.storage_class})"
    return ArchivedShards(
        f"{store.url}/{key}: is archived{kind} and must be restored before it can be read",
        names=[key],
        url=store.url,
        n_bytes=0 if row is None else row.n_bytes,
    )


def scheme_of(url: str) -> str:
    """Of a URL; "" for a local path."""
    scheme, found, _ = url.partition("://")
    return scheme.lower() if found and scheme.lower() != "file" else ""


def _same_service(url: str, home: str) -> bool:
    """Whether the home's options, credentials among them, may be shown to a place that its placement names.

    Of these clouds the options say which server is asked; of all else the URL does.
    """
    scheme = scheme_of(url)
    if scheme != scheme_of(home) or "::" in url:  # a chain leads on, to whatever it names
        return False
    return scheme in _CLOUDS or url.split("/")[:3] == home.split("/")[:3]


def is_far(url: str) -> bool:
    """Whether a URL is of a store that a cache is worth while for."""
    return scheme_of(url) not in ("", "memory")


def is_local(url: str) -> bool:
    """Whether a URL is a folder of the machine that reads it."""
    return not scheme_of(url)
