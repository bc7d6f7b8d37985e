"""Tiering of one opened data set: a store that follows the placement, use counts, and promotion to the hot tier.

Promotion copies a shard that is read from a tier below the hot one there, once, in the background, if it fits. Copies
go only to folders that a rule file of this machine names as a tier: a placement beside a data set is not allowed to
choose where this machine writes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from functools import partial
from typing import TYPE_CHECKING

from tiercache import config
from tiercache._native.checksum import crc32c
from tiercache.catalog.private_files import make_folder, open_file
from tiercache.errors import TierCacheError
from tiercache.model import ByteRange
from tiercache.store import LocalFolder
from tiercache.store.contract import LocalStore
from tiercache.tier.placement.redirecting_store import RedirectingLocalStore, RedirectingStore, check_readable
from tiercache.tier.placement.resolver import existing, tier_above
from tiercache.tier.placement.use_reports import UseRecorder
from tiercache.waiting import SYSTEM_CLOCK, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

    from tiercache.model import ShardIdentity
    from tiercache.store import Lease, Store
    from tiercache.tier.placement.log import PlacementRow
    from tiercache.tier.placement.resolver import LocationResolver


PART_BYTES = 8 << 20
# Share of a disk that stays free: a full shared disk would stop more than promotion.
FREE_SHARE = 0.05
# Time for which the measured size of a hot tier is believed: listing 100,000 files takes 0.3 s.
LOOK_S = 30.0
# Longest wait for the account of a hot tier, which is locked only while a process measures or updates it.
LOCK_S = 10.0
_ACCOUNT = struct.Struct("=dQ")  # time of the measurement, in seconds since boot; bytes in the tier

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class HotTier:
    """A hot tier of this machine. limit_bytes: Capacity in bytes; None: limited only by the disk."""

    url: str
    limit_bytes: int | None


def hot_folder(url: str) -> HotTier | None:
    """Return this machine's hot tier at url or above it; None if there is none: then nothing may be written there."""
    tier = tier_above(url)
    if tier is None or tier.role != "hot":
        return None
    try:
        return HotTier(tier.url, tier.limit_bytes)
    except (ValueError, TypeError, OSError):
        return None


class Promoter:
    """Copies objects to the hot tier, one after the other, in a thread that ends when the queue is empty. Thread-safe.

    If a copy fails, the object stays where it is and is read from there. Of several processes of a machine, one copies.

    Args:
        places: Resolver of the objects' locations.
        source: Function that returns the store to read from; a cache around it may have the object already.
        find_hot: Function that returns this machine's hot tier at or above a URL.
    """

    def __init__(
        self,
        places: LocationResolver,
        source: Callable[[], Store],
        find_hot: Callable[[str], HotTier | None] = hot_folder,
    ) -> None:
        self._places, self._source, self._find_hot = places, source, find_hot
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[PlacementRow, ShardIdentity]] = deque()
        self._seen: set[str] = set()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._pid = os.getpid()

    def offer(self, key: str, identity: ShardIdentity) -> None:
        """Queue an object that was opened, if its placement asks for promotion. Returns at once."""
        row = self._places.row(key)
        if row is None or row.promote is None or row.promote == row.url:
            return
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            if key in self._seen or self._closed.is_set():
                return
            self._seen.add(key)
            self._waiting.append((row, identity))
            if self._thread is not None:
                return
            thread = threading.Thread(target=_work, args=(weakref.ref(self),), name="tiercache-promote", daemon=True)
            with suppress(RuntimeError):  # no more threads can be started: a later offer tries again
                thread.start()
                self._thread = thread

    def wait(self, deadline_s: float | None = None) -> bool:
        """Wait until the queue is done. Return False after deadline_s seconds."""
        thread = self._thread if self._pid == os.getpid() else None
        if thread is not None:
            thread.join(deadline_s)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """Stop after the current part; an incomplete copy is not kept. The object may be used again."""
        if self._pid != os.getpid():
            return
        self._closed.set()
        with self._lock:
            self._waiting.clear()
        self.wait(30.0)
        with self._lock:
            self._closed = threading.Event()
            self._seen.clear()

    def next(self) -> tuple[PlacementRow, ShardIdentity] | None:
        """Return the next object to copy; None if the queue is empty, and the thread ends."""
        with self._lock:
            if not self._waiting:
                self._thread = None
                return None
            return self._waiting.popleft()

    def copy(self, row: PlacementRow, identity: ShardIdentity) -> bool:
        """Copy an object to its hot tier. Return False if it is there, may not or does not fit, or is being copied."""
        hot = None if row.promote is None else self._find_hot(row.promote)
        if row.promote is None or hot is None:
            return False
        with suppress(OSError, TierCacheError, ValueError):
            fd = _claim(f"{row.promote}/{row.key}")
            if fd is None:
                return False
            try:
                return self._copy(row, identity, hot)
            finally:
                flock(fd, LOCK_UN)  # explicitly: a child that was forked meanwhile has the descriptor too
                os.close(fd)
        return False

    def _copy(self, row: PlacementRow, identity: ShardIdentity, hot: HotTier) -> bool:
        store = self._places.store_of(str(row.promote))
        try:
            if store.head(row.key).n_bytes == identity.n_bytes:
                return False  # another process has copied it
        except FileNotFoundError:
            pass
        if not self._take_room(hot, row, identity.n_bytes):
            logger.info("%s: not copied to %s, which has no room for it", row.key, hot.url)
            return False
        total = 0
        with _Reading(self._source(), row.key, identity) as reading, store.create(row.key) as upload:
            part_bytes = max(PART_BYTES, store.min_part_bytes)
            for number, start in enumerate(range(0, identity.n_bytes, part_bytes)):
                if self._closed.is_set():
                    return False
                data = reading.read(ByteRange(start, min(start + part_bytes, identity.n_bytes)))
                total = crc32c(data, total)
                upload.put_part(number, data)
            if total != identity.crc32c:
                logger.warning("%s: not copied to %s: its checksum is not the one in the data set", row.key, hot.url)
                return False
            return upload.complete(if_absent=True) is not None

    def _take_room(self, hot: HotTier, row: PlacementRow, n_bytes: int) -> bool:
        limits = [limit for limit in (hot.limit_bytes, row.hot_bytes) if limit is not None]
        folder = self._places.store_of(hot.url)
        if isinstance(folder, LocalFolder):
            disk = shutil.disk_usage(existing(hot.url))
            if disk.free - n_bytes < FREE_SHARE * disk.total:
                return False
        return not limits or _reserve(
            hot.url, n_bytes, min(limits), lambda: sum(info.n_bytes for info in folder.list())
        )


class _Reading:
    """Reader of an object's bytes: from its local copy, waiting for bytes that are being fetched, or by ranges."""

    def __init__(self, store: Store, key: str, identity: ShardIdentity) -> None:
        self._store, self._key = store, key
        self._lease: Lease | None = store.open_local(key, identity) if isinstance(store, LocalStore) else None

    def read(self, part: ByteRange) -> bytearray:
        """Return the bytes of a range. Raises StoreError, OSError."""
        data = bytearray(part.n_bytes)
        lease = self._lease
        if lease is not None:
            if not lease.present([part]):
                lease.prefetch([part])
            if lease.wait([part]) and os.preadv(lease.fd, [data], part.start) == part.n_bytes:
                return data
        self._store.read_into(self._key, [(part, memoryview(data))])
        return data

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lease is not None:
            self._lease.close()


def _work(promoter: weakref.ref[Promoter]) -> None:
    while True:
        found = promoter()
        job = None if found is None else found.next()
        if found is None or job is None:
            return
        found.copy(*job)
        del found


def _reserve(url: str, n_bytes: int, limit_bytes: int, count: Callable[[], int]) -> bool:
    """Reserve room in a hot tier. All processes of this machine share one account. Return False if it does not fit.

    Without the account, each process would fill the space that the others have reserved but not yet used. Room of a
    failed copy is free again after the next measurement. count: Function that returns the bytes in the tier now.
    """
    fd = _lock_file("room", url)
    try:
        if not wait_for(partial(_try_lock, fd), LOCK_S):
            return False
        now_s, found = SYSTEM_CLOCK.monotonic(), os.pread(fd, _ACCOUNT.size, 0)
        looked_s, used_bytes = _ACCOUNT.unpack(found) if len(found) == _ACCOUNT.size else (-LOOK_S, 0)
        if not 0 <= now_s - looked_s < LOOK_S:
            looked_s, used_bytes = now_s, count()
        has_room: bool = used_bytes + n_bytes <= limit_bytes
        os.pwrite(fd, _ACCOUNT.pack(looked_s, used_bytes + (n_bytes if has_room else 0)), 0)
        return has_room
    finally:
        with suppress(OSError):
            flock(fd, LOCK_UN)  # see copy()
        os.close(fd)


def _claim(url: str) -> int | None:
    """Return a lock on copying to url, held until the descriptor is closed; None if another process has it."""
    fd = _lock_file("promote", url)
    if not _try_lock(fd):
        os.close(fd)
        return None
    return fd


def _lock_file(what: str, url: str) -> int:
    folder = config.state_folder() / "locks"
    make_folder(folder, 0o700)
    return open_file(folder / f"{what}-{hashlib.sha256(url.encode()).hexdigest()[:32]}", os.O_RDWR | os.O_CREAT)


def _try_lock(fd: int) -> bool:
    try:
        flock(fd, LOCK_EX | LOCK_NB)
    except OSError:
        return False
    return True


class TieredReader:
    """How one process reads one data set whose shards may be moved. Thread-safe, and fork-safe.

    It queries no store before a run begins, or before a shard is missing from its known location.

    Args:
        placed: The data set's own store, which follows the placement.
        store: Store that reads go through: the same store, or the cache around it.
    """

    def __init__(self, placed: RedirectingStore, store: Store) -> None:
        self._placed, self._places = placed, placed.places
        self._recorder = UseRecorder(self._places)
        self._promoter = Promoter(self._places, lambda: store)

    def opened(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """Count an opened shard, and offer it for promotion. Return a local folder that has it, or None."""
        self._recorder.note(key)
        if not self.has_moved:
            return None
        self._promoter.offer(key, identity)
        return self.local_copy(key, identity)

    @property
    def has_moved(self) -> bool:
        """Whether any object is away from home, as far as is known."""
        return bool(self._places.known_placement)

    def local_copy(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """Return a folder of this machine, other than the home, that has the shard; None if there is none."""
        return self._places.local_copy(key, identity.n_bytes)

    def is_remote(self, key: str) -> bool:
        """Return whether a shard of a local home is in a remote store."""
        return isinstance(self._placed, RedirectingLocalStore) and self._placed.is_remote(key)

    def far(self) -> Store | None:
        """Return the store that reads the moved shards of a local home through the cache; None if there are none."""
        return (
            self._placed.remote_store
            if self._places.has_remote and isinstance(self._placed, RedirectingLocalStore)
            else None
        )

    def reject_local_copy(self, key: str, identity: ShardIdentity) -> bool:
        """Stop using a damaged local copy of a shard. Return True if the shard was read from a local tier's folder."""
        return self.has_moved and self._places.reject_local_copy(key, identity.n_bytes)

    def prepare_reading(self, keys: pa.ChunkedArray, is_here: Callable[[int], bool], *, reads_all: bool) -> None:
        """Prepare for a run that reads these shards, and check that they can be read. See check_readable."""
        check_readable(self._placed, keys, is_here)
        if self._places.is_tracked:
            self._recorder.begin(None if reads_all else keys.to_pylist())

    def close(self) -> None:
        """Report the uses, and stop promotion. The object may be used again."""
        self._recorder.close()
        self._promoter.close()
