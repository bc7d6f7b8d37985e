"""One object as it was when it was opened: ranges of it, from the cached copy or past it."""

from __future__ import annotations

import os
import weakref
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.errors import ObjectChanged
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.cache import CachedStore
    from tiercache.cache.lease import CopyLease
    from tiercache.cache.record import Wanted

# Readers of tables ask for whole column chunks, those of text and archives for a few KiB again and again: what is
# larger than this was chosen, and what follows it is fetched ahead only after many such reads in a row.
SMALL_BYTES = 64 << 10
N_SMALL_IN_A_ROW = 3
N_LARGE_IN_A_ROW = 8
LEAST_AHEAD_BYTES = 128 << 10
MOST_AHEAD_BYTES = 8 << 20
# Checked and copied in one go for a reader of small pieces: at 8 KiB the way there takes longer than the bytes.
BLOCK_BYTES = 256 << 10


class Ahead:
    """How much to fetch beyond what one reader asks for. Pure; of one reader, so without a lock."""

    def __init__(self, most_bytes: int = MOST_AHEAD_BYTES) -> None:
        """most_bytes: never more than this."""
        self._most_bytes = most_bytes
        self._next, self._n_in_a_row, self._run_bytes = -1, 0, 0

    def after(self, wanted: ByteRange) -> int:
        """Bytes to fetch beyond wanted, 0 where it does not go on where the read before it ended."""
        if wanted.start != self._next:
            self._n_in_a_row = self._run_bytes = 0
        self._next = wanted.end
        self._n_in_a_row += 1
        self._run_bytes += wanted.n_bytes
        needed = N_SMALL_IN_A_ROW if wanted.n_bytes <= SMALL_BYTES else N_LARGE_IN_A_ROW
        if self._n_in_a_row < needed:
            return 0
        # As much again as was read in this run: whoever stops has fetched at most twice what it read.
        return min(max(self._run_bytes, LEAST_AHEAD_BYTES), self._most_bytes)


class Reading:
    """A hold on one object. All bytes are of the object that was opened, whatever lies under its key by now.

    Any thread may read; one at a time does: the lock is held while it reads, so that close() never takes a descriptor
    away from a reader. After a fork the child reads on with a hold of its own.
    """

    def __init__(self, store: CachedStore, wanted: Wanted) -> None:
        """Take a lease on the copy, there or to come."""
        self._store, self._wanted = store, wanted
        self._lease: CopyLease | None = store.cache.open(wanted, store.inner)
        self._lock = Lock()
        self._block_start, self._block = 0, bytearray()
        _readings.add(self)

    @property
    def n_bytes(self) -> int:
        """Size of the object."""
        return self._wanted.n_bytes

    def want(self, ranges: Sequence[ByteRange]) -> None:
        """Start fetching what is missing of ranges; returns at once."""
        with self._lock:
            if self._lease is not None:
                self._lease.want(ranges)

    def read(self, wanted: ByteRange) -> bytes:
        """Bytes of a range that ends within the object. Raises as read_into()."""
        # Nobody else holds the bytes that it is made of, so it hands out these and no copy.
        whole = BytesIO(bytes(wanted.n_bytes))
        with whole.getbuffer() as view:
            self.read_into(wanted, view)
        return whole.getvalue()

    def read_into(self, wanted: ByteRange, buffer: memoryview, *, ahead_bytes: int = 0) -> None:
        """Fill buffer (writable uint8, as long as the range) with a range that ends within the object.

        ahead_bytes: how much will be wanted after it; it is fetched too, and waited for only as far as a small block.

        Raises:
            NotFound: the object is gone, and the range was not here.
            ObjectChanged: it was replaced, and the range was not here.
            StoreError: the source failed.
        """
        if not wanted.n_bytes:
            return
        with self._lock:
            start = wanted.start - self._block_start
            if start >= 0 and start + wanted.n_bytes <= len(self._block):
                buffer[:] = memoryview(self._block)[start : start + wanted.n_bytes]
                return
            if not self._read_here(wanted, buffer, ahead_bytes):
                self._read_past(wanted, buffer, ahead_bytes)

    def _read_here(self, wanted: ByteRange, buffer: memoryview, ahead_bytes: int) -> bool:
        """From the copy; False: it will not be there. One that is wrong is fetched again."""
        for _ in range(2):
            lease = self._lease
            if lease is None:
                return False
            if ahead_bytes:
                lease.want([self._until(wanted, ahead_bytes)])
            if not (lease.present([wanted]) or lease.wait([wanted])):
                return False
            block = self._until(wanted, min(ahead_bytes, BLOCK_BYTES))
            if block != wanted and lease.present([block]) and self._keep_block(lease, block, buffer):
                return True
            if self._checked(lease, wanted, buffer):
                return True
            lease.close()
            self._lease = self._store.cache.open(self._wanted, self._store.inner)
        return False

    def _checked(self, lease: CopyLease, wanted: ByteRange, buffer: memoryview) -> bool:
        """Read what is here, each unit held against its checksum: nothing else checks these bytes."""
        spans = [(wanted, buffer)]
        # By the hold, if it was taken on a part: a part of an object that changed has lost its name. By name otherwise,
        # which also takes what is wrong out of the cache.
        return lease.read(spans) or self._store.cache.read(self._wanted, spans)

    def _keep_block(self, lease: CopyLease, block: ByteRange, buffer: memoryview) -> bool:
        """Read a block that is here into memory, for a reader who goes on by small pieces; False: it is wrong."""
        data = bytearray(block.n_bytes)
        if not self._checked(lease, block, memoryview(data)):
            return False
        self._block_start, self._block = block.start, data
        buffer[:] = memoryview(data)[: buffer.nbytes]
        return True

    def _until(self, wanted: ByteRange, ahead_bytes: int) -> ByteRange:
        return ByteRange(wanted.start, min(wanted.end + ahead_bytes, self.n_bytes))

    def _read_past(self, wanted: ByteRange, buffer: memoryview, ahead_bytes: int) -> None:
        """From the source, by ranges; a reader who goes on by small pieces is served from one larger."""
        block = self._until(wanted, ahead_bytes)
        if block == wanted:
            self._from_source(wanted, buffer)
            return
        data = bytearray(block.n_bytes)
        self._from_source(block, memoryview(data))
        self._block_start, self._block = block.start, data
        buffer[:] = memoryview(data)[: wanted.n_bytes]

    def _from_source(self, wanted: ByteRange, buffer: memoryview) -> None:
        if_match = self._wanted.if_match
        self._store.inner.read_into(self._wanted.key, [(wanted, buffer)], if_match=if_match)
        if if_match is not None:
            return
        # Where no ETag guards the reading, the object must look the same after it.
        found = self._store.wanted(self._wanted.key)
        if found is None or found.name != self._wanted.name:
            raise ObjectChanged(
                url=self._wanted.source, expected=self._wanted.etag, found=None if found is None else found.etag
            )

    def close(self) -> None:
        """Give the copy back. Repeatable."""
        with self._lock:
            lease, self._lease, self._block = self._lease, None, bytearray()
        if lease is not None:
            lease.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _renew_lock(self) -> None:
        """In a forked child, where a thread of the parent may have held it."""
        self._lock = Lock()


_readings: weakref.WeakSet[Reading] = weakref.WeakSet()


def _renew_locks() -> None:
    for reading in list(_readings):
        reading._renew_lock()  # noqa: SLF001 - of one file


os.register_at_fork(after_in_child=_renew_locks)
