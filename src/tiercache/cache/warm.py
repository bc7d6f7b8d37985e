"""Warming: what is missing of the requested copies, whether it fits, and the fetches."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tiercache.cache.accounts import charge_bytes
from tiercache.cache.partial import UNIT_BYTES, charge_of, mask_of, n_units, open_part
from tiercache.crash_points import crash_point
from tiercache.errors import StoreError
from tiercache.model import ByteRange, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Set

    from tiercache.cache.fetch import Fetch
    from tiercache.cache.names import CopySpec
    from tiercache.cache.partial import Mask
    from tiercache.cache.session import CacheSession, WriteSession
    from tiercache.store import Store


Ranges: TypeAlias = "Mapping[str, Sequence[ByteRange]]"
"""Byte ranges that suffice, by key. An object without an entry is wanted whole."""


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """The progress of warming.

    Attributes:
        n_done: Number of requested copies that are present.
        n_wanted: Number of requested copies.
        bytes_done: Bytes of the requested copies that are present.
        bytes_wanted: Bytes of the requested copies.
        last: Key of the copy that was just fetched; "" at the start.
    """

    n_done: int
    n_wanted: int
    bytes_done: int
    bytes_wanted: int
    last: str = ""


@dataclass(frozen=True, slots=True)
class WarmReport:
    """The result of warming.

    Attributes:
        n_wanted: Number of requested copies.
        n_fetched: Number of copies that were fetched by this call.
        bytes_fetched: Bytes of those copies.
    """

    n_wanted: int
    n_fetched: int
    bytes_fetched: int


@dataclass(frozen=True, slots=True)
class WarmItem:
    """A requested copy.

    Attributes:
        spec: Specification of the copy.
        ranges: Byte ranges that suffice, ascending.
        is_whole: Whether the whole object is requested.
        missing_bytes: Bytes to fetch; None: the copy is present.
        charge_bytes: Bytes that the fetch adds to the used space.
    """

    spec: CopySpec
    ranges: tuple[ByteRange, ...]
    is_whole: bool
    missing_bytes: int | None = None
    charge_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        return sum(span.n_bytes for span in self.ranges)


@dataclass(frozen=True, slots=True)
class WarmPlan:
    """The requested copies, each once, in the order of the fetches.

    Attributes:
        items: The requested copies.
        freeable_bytes: Bytes that the policy could evict, other than requested copies; 0 if the free space suffices.
        fits: Whether there is enough space, or eviction can free enough.
    """

    items: tuple[WarmItem, ...]
    freeable_bytes: int = 0
    fits: bool = True

    @property
    def missing(self) -> list[WarmItem]:
        return [item for item in self.items if item.missing_bytes is not None]

    @property
    def missing_bytes(self) -> int:
        return sum(item.missing_bytes or 0 for item in self.items)

    @property
    def need_bytes(self) -> int:
        return sum(item.charge_bytes for item in self.items)


def plan_warm(
    opened: CacheSession, specs: Sequence[CopySpec], ranges: Ranges, *, check_sizes: bool = False
) -> WarmPlan:
    """Return what is missing of the requested copies. It scans the folder and the accounts once, however many they are.

    check_sizes also finds truncated copies, and files that are not regular: 2 us per copy.
    """
    folder = opened.folder
    whole, partial = frozenset(folder.names("")), frozenset(folder.names(".part"))
    items: dict[str, WarmItem] = {}
    for spec in specs:
        is_whole = spec.key not in ranges
        spans = (ByteRange(0, spec.n_bytes),) if is_whole else tuple(ranges[spec.key])
        exists = spec.name in whole and (not check_sizes or folder.size_of(spec.name) == spec.n_bytes)
        items[spec.name] = _measured(opened, WarmItem(spec, spans, is_whole), exists, spec.name in partial)
    plan = WarmPlan(tuple(items.values()))
    if not plan.missing or opened.writing is None:
        return replace(plan, fits=not plan.missing)
    evictor = opened.writing.evictor
    lack_bytes = evictor.lack_bytes(plan.need_bytes)
    freeable_bytes = evictor.freeable_bytes(items.keys()) if lack_bytes > 0 else 0
    return replace(plan, freeable_bytes=freeable_bytes, fits=lack_bytes <= freeable_bytes)


def _measured(opened: CacheSession, item: WarmItem, exists: bool, has_part: bool) -> WarmItem:
    """Return the item with what is missing of it."""
    name, n_bytes = item.spec.name, item.spec.n_bytes
    if exists:
        return item
    if item.is_whole and not has_part:
        return replace(item, missing_bytes=n_bytes, charge_bytes=charge_bytes(n_bytes))
    present = _present_units(opened, name, n_bytes) if has_part else np.zeros(n_units(n_bytes), bool)
    wanted = mask_of(item.ranges, n_bytes)
    missing = wanted & ~present
    if not item.is_whole and not missing.any():
        return item
    # A partial copy that has all units but no final name still counts as missing.
    new_bytes = charge_bytes(n_bytes) if item.is_whole else charge_of(wanted | present, n_bytes)
    charge = max(new_bytes - charge_of(present, n_bytes), 0)
    return replace(item, missing_bytes=min(int(missing.sum()) * UNIT_BYTES, n_bytes), charge_bytes=charge)


def _present_units(opened: CacheSession, name: str, n_bytes: int) -> Mask:
    held = open_part(opened.folder, name, n_bytes)
    if held is None:
        return np.zeros(n_units(n_bytes), bool)
    try:
        return held.mask()
    finally:
        held.close()


def _is_present(opened: CacheSession, item: WarmItem) -> bool:
    if not item.is_whole and opened.is_cached(item.spec, item.ranges):
        return True
    lease = opened.look_up(item.spec.name, item.spec.n_bytes)
    if lease is not None:
        lease.close()
    return lease is not None


def warm(
    opened: CacheSession,
    store: Store,
    plan: WarmPlan,
    *,
    jobs: int,
    on_progress: Callable[[WarmProgress], None] | None,
) -> WarmReport:
    """Fetch what is missing of the requested objects. See Cache.warm. On the first error, all fetches are cancelled."""
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, got {jobs}")
    writing, missing = opened.writable(), plan.missing
    if not plan.fits:
        raise _full(writing, plan.need_bytes, plan.freeable_bytes)
    crash_point("warm.planned")
    n_wanted, bytes_wanted = len(plan.items), sum(item.n_bytes for item in plan.items)
    n_done, bytes_done = n_wanted - len(missing), bytes_wanted - plan.missing_bytes
    tell = on_progress or (lambda _: None)
    tell(WarmProgress(n_done, n_wanted, bytes_done, bytes_wanted))
    fetches, n_fetched, bytes_fetched = _Fetches(writing, store, plan), 0, 0
    pool = ThreadPoolExecutor(min(jobs, len(missing)) or 1, "tiercache-warm")
    try:
        futures = {pool.submit(fetches.fetch, item): item for item in missing}
        for future in as_completed(futures):
            item = futures.pop(future)
            n_bytes = item.missing_bytes or 0
            if future.result():
                n_fetched, bytes_fetched = n_fetched + 1, bytes_fetched + n_bytes
            n_done, bytes_done = n_done + 1, bytes_done + n_bytes
            tell(WarmProgress(n_done, n_wanted, bytes_done, bytes_wanted, item.spec.key))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        fetches.cancel()
        pool.shutdown()
    lost = [item.spec.source for item in plan.items if not _is_present(opened, item)]
    if lost:
        raise StoreError(
            f"{len(lost)} of {n_wanted} copies are missing again after warming", url=lost[0], retryable=True
        )
    return WarmReport(n_wanted, n_fetched, bytes_fetched)


def _full(writing: WriteSession, need_bytes: int, freeable_bytes: int) -> StoreError:
    used, reserved, limit = writing.accounts.sums()
    return StoreError(
        f"the cache has no space: {format_bytes(need_bytes)} more are needed, but of {format_bytes(limit)}, "
        f"{format_bytes(used + reserved)} are used, {format_bytes(freeable_bytes)} of which can be evicted, and the "
        f"disk has {format_bytes(max(writing.evictor.usable_bytes(), 0))} above min_free; evict or unpin copies, "
        "enlarge the cache, or request less",
        url=str(writing.folder.root),
        code="CacheFull",
    )


class _Fetches:
    """The fetches of one call, each in the thread that calls fetch()."""

    def __init__(self, writing: WriteSession, store: Store, plan: WarmPlan) -> None:
        self._writing, self._store = writing, store
        self._names: Set[str] = frozenset(item.spec.name for item in plan.items)
        self._running: set[Fetch] = set()
        self._is_cancelled = False
        self._error: BaseException | None = None

    def cancel(self) -> None:
        self._is_cancelled = True
        for fetch in list(self._running):
            fetch.cancel.set()

    def fetch(self, item: WarmItem) -> bool:
        """Fetch the requested part of one copy; return False if another thread or process fetched it.

        After an error, every call raises that error and fetches nothing.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._fetch(item)
        except BaseException as error:
            self._error = error
            raise

    def _fetch(self, item: WarmItem) -> bool:
        spec, fetcher = item.spec, self._writing.fetcher
        while True:
            fetch = fetcher.join(spec, self._store)
            is_ours = fetch.try_start()
            if fetch.request(item.ranges, urgent=True):
                break
            fetch.leave()  # it ended after join()
        try:
            if is_ours:
                fetch.protected = self._names
                self._running.add(fetch)
                if self._is_cancelled:
                    fetch.cancel.set()
                try:
                    fetcher.run(fetch)
                finally:
                    self._running.discard(fetch)
            fetch.wait(item.ranges, None)
        finally:
            held, has_left = fetch.claim()
            if not has_left:
                fetch.leave()
            is_present = held is not None and held.covers(item.ranges)
            if held is not None:
                held.close()
        crash_point("warm.fetched")
        if not is_present:
            if fetch.cancel.is_set() or self._writing.breaker.is_open:
                reason = "the cache was closed" if fetch.cancel.is_set() else "the cache's disk fails"
                raise StoreError(f"not cached: {reason}", url=spec.source, retryable=True)
            raise _full(self._writing, charge_bytes(item.n_bytes), 0)
        return is_ours
