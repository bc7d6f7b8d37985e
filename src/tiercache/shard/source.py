"""Source: the bytes of an open shard, from a mapped local copy or by ranged reads of a store."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.residence import Mapping
from tiercache.errors import CorruptShard, NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store.contract import Lease, LocalStore, Span, Store
from tiercache.store.posix import os_errors

Bytes: TypeAlias = npt.NDArray[np.uint8]
_ALIGN_BYTES = 64
# The kernel's file clock ticks every 1 to 10 ms, so two writes within a tick leave the same ctime. A ctime younger than
# this does not identify a state of the file.
MIN_CTIME_AGE_NS = 20_000_000
# A longer length that was read from a file is compared with the store before memory of that length is allocated.
_CLAIMED_BYTES = 1 << 20


def aligned_empty(n_bytes: int) -> Bytes:
    """Return uninitialised memory, uint8[n_bytes], whose address is a multiple of 64."""
    memory = np.empty(n_bytes + _ALIGN_BYTES, np.uint8)
    start = -address_of(memory) % _ALIGN_BYTES
    return memory[start : start + n_bytes]


def address_of(memory: npt.NDArray[Any]) -> int:
    """Return the address of an array's memory."""
    address: int = memory.__array_interface__["data"][0]
    return address


class LocalCopy:
    """A lease on a local copy and, after the first call of mapped(), its mapping. Dropping the object closes the lease.

    Loaded blocks keep only the mapping. The mapping holds no file descriptor, but like a lease it keeps the bytes of
    the file and the flock(2) that the cache's evictor tests.
    """

    def __init__(self, lease: Lease, url: str) -> None:
        self.lease = lease
        self.n_bytes = lease.n_bytes
        self._url = url
        self._mapped: dict[str, Bytes] = {}
        weakref.finalize(self, lease.close).atexit = False

    def map_file(self) -> Bytes:
        """Return the whole copy, read-only uint8[n_bytes]. The caller must not touch bytes that are not present yet.

        Each call reads the size of the file (0.4 us). Reason: if a file is truncated in the middle of a memory page,
        the rest of that page reads as zeros without a signal, although the page was checked before.

        Two threads may both map the file at first; one mapping is kept. There is no lock, because a fork could leave it
        locked.

        Raises:
            CorruptShard: The file is shorter than its lease states.
        """
        found = self._mapped.get("it")
        if found is None:
            try:
                mapping = Mapping(self.lease.fd, self.n_bytes)
            except OSError as error:
                raise StoreError(f"cannot map the local copy: {error}", url=self._url) from error
            found = self._mapped.setdefault("it", np.frombuffer(memoryview(mapping), np.uint8))
        if os.fstat(self.lease.fd).st_size < self.n_bytes:
            raise CorruptShard(f"the local copy is shorter than {self.n_bytes} bytes", url=self._url)
        return found

    def changed_ns(self) -> int:
        """Return the ctime of the file in ns. Every write changes it, and no program can set it back.

        Returns:
            0 if the file was changed so recently that a further write may leave the same ctime.
        """
        changed_ns = os.fstat(self.lease.fd).st_ctime_ns
        return changed_ns if time.time_ns() - changed_ns > MIN_CTIME_AGE_NS else 0

    @cached_property
    def reports_residency(self) -> bool:
        """Whether mincore(2) reports page residency correctly: only for a file that the user owns or may write."""
        return os.fstat(self.lease.fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{self.lease.fd}", os.W_OK)

    def read(self, spans: Sequence[Span]) -> None:
        """Fill each span from the file with pread, so that a concurrent truncation raises an error and no SIGBUS.

        Raises:
            CorruptShard: The file ends before the end of a span.
            StoreError: The disk failed.
        """
        for span, buffer in spans:
            filled = 0
            while filled < span.n_bytes:
                try:
                    n_read = os.preadv(self.lease.fd, [buffer[filled:]], span.start + filled)
                except OSError as error:
                    raise StoreError(f"reading the local copy failed: {error}", url=self._url) from error
                if not n_read:
                    raise CorruptShard(f"the local copy is truncated at byte {span.start + filled}", url=self._url)
                filled += n_read


class ByteSource:
    """The bytes of an object of a store. Thread-safe without locks.

    Attributes:
        n_misses: Approximate number of reads whose bytes were not in the local copy yet. Concurrent threads may lose
            counts.
    """

    def __init__(self, store: Store, key: str, identity: ShardIdentity | None) -> None:
        self.url = f"{store.url.rstrip('/')}/{key}"
        self.etag: str | None = None
        self.n_misses = 0
        self._store = store
        self._key = key
        self._copy: LocalCopy | None = None
        if isinstance(store, LocalStore):
            lease = store.open_local(key, identity)
            self._copy = None if lease is None else LocalCopy(lease, self.url)

    @property
    def local_copy(self) -> LocalCopy | None:
        """The local copy; None if there is none."""
        return self._copy

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        """Start fetching ranges into the local copy, if there is one."""
        if self._copy is not None:
            self._copy.lease.prefetch(ranges)

    def ensure_cached(self, ranges: Sequence[ByteRange], deadline_s: float | None) -> LocalCopy | None:
        """Return the local copy after these ranges are present; None if the caller must read() them from the store."""
        copy = self._copy
        if copy is None:
            return None
        if not copy.lease.present(ranges):
            self.n_misses += 1
            copy.lease.prefetch(ranges)
        with os_errors("open the local copy", self.url):  # wait() may open the file that was fetched
            return copy if copy.lease.wait(ranges, deadline_s=deadline_s) else None

    def read(self, spans: Sequence[Span], deadline_s: float | None) -> None:
        """Fill each span from the store. If tail() has read an ETag, an object that has changed since is an error.

        Raises:
            CorruptShard: The object ends before the end of a span.
            StoreError: See Store.read_into.
        """
        try:
            self._store.read_into(self._key, spans, if_match=self.etag, deadline_s=deadline_s)
        except (NotFound, ObjectChanged):
            raise
        except StoreError as error:
            end = max(span.end for span, _ in spans)
            # A permanent error does not tell whether the object is too short; head() does.
            if not error.retryable and self._store.head(self._key).n_bytes < end:
                raise CorruptShard(f"is truncated: {end} bytes expected", url=self.url, part="file") from error
            raise

    def tail(self, n_bytes: int) -> tuple[bytes, int]:
        """Return the last n_bytes of the object (or all of it, if it is shorter) and its size, with one request.

        The ETag of the response is kept for later reads.
        """
        copy = self._copy
        if copy is not None:
            span = ByteRange(max(copy.n_bytes - n_bytes, 0), copy.n_bytes)
            if self.ensure_cached([span], None) is not None:
                data = bytearray(span.n_bytes)
                copy.read([(span, memoryview(data))])
                return bytes(data), copy.n_bytes
        data_read, info = self._store.read_tail(self._key, n_bytes)
        self.etag = info.etag
        return data_read, info.n_bytes

    def range(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of the object.

        Raises:
            CorruptShard: The object is shorter.
            StoreError: See Store.read_into.
        """
        span = ByteRange(start, end)
        if span.n_bytes > _CLAIMED_BYTES:
            self._check_length(span)
        data = bytearray(span.n_bytes)
        copy = self.ensure_cached([span], None)
        if copy is not None:
            copy.read([(span, memoryview(data))])
        else:
            self.read([(span, memoryview(data))], None)
        return bytes(data)

    def _check_length(self, span: ByteRange) -> None:
        copy = self._copy
        if copy is None or not copy.lease.present([span]):
            n_bytes = self._store.head(self._key).n_bytes
            if n_bytes < span.end:
                message = f"has {n_bytes} bytes, but its data set or its tail states {span.end} or more"
                raise CorruptShard(message, url=self.url, part="file")

    def close(self) -> None:
        """Drop the reference to the local copy. The copy stays open while others hold it."""
        self._copy = None
