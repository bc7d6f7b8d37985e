"""Where an open shard's bytes come from: a lease on a local copy, mapped once, or ranges of a store."""

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
# The kernel stamps files by a clock that ticks every 1 to 10 ms: a file written twice within a tick has one ctime. A
# ctime that is younger than this does not yet tell one state of the file from the next one.
SETTLED_NS = 20_000_000
# A length that was read from a file is not believed beyond this, before memory of that length is taken.
_CLAIMED_BYTES = 1 << 20


def aligned_empty(n_bytes: int) -> Bytes:
    """Uninitialised memory that begins at a multiple of 64."""
    memory = np.empty(n_bytes + _ALIGN_BYTES, np.uint8)
    start = -address_of(memory) % _ALIGN_BYTES
    return memory[start : start + n_bytes]


def address_of(memory: npt.NDArray[Any]) -> int:
    """Where an array's memory begins."""
    address: int = memory.__array_interface__["data"][0]
    return address


class LocalCopy:
    """A lease and, once it was asked for, its mapping. The lease is closed when this object is dropped.

    Loaded blocks keep the mapping alone: it holds no descriptor, and it keeps the file's bytes, and the flock(2) that
    the cache's evictor asks for, as a lease does.
    """

    def __init__(self, lease: Lease, url: str) -> None:
        self.lease = lease
        self.n_bytes = lease.n_bytes
        self._url = url
        self._mapped: dict[str, Bytes] = {}
        weakref.finalize(self, lease.close).atexit = False

    def mapped(self) -> Bytes:
        """The whole copy, read-only. Bytes that are not present yet must not be touched.

        Each time the file's size is asked (0.4 us): of a file that was cut in the middle of a page of memory the rest
        of that page reads as zeros, in a mapping whose pages were checked before, and no signal tells.

        Two threads may both map it the first time; one mapping stays. There is no lock, for a fork could leave it
        locked.

        Raises:
            CorruptShard: the file is shorter than its lease says.
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
        """The file's ctime in ns, which every write to it changes and nobody can set back.

        0: the file was changed so recently that a further write may leave the ctime as it is.
        """
        changed_ns = os.fstat(self.lease.fd).st_ctime_ns
        return changed_ns if time.time_ns() - changed_ns > SETTLED_NS else 0

    @cached_property
    def tells_residence(self) -> bool:
        """Whether mincore(2) says which pages are in memory: of files that one neither owns nor may write, it lies."""
        return os.fstat(self.lease.fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{self.lease.fd}", os.W_OK)

    def read(self, spans: Sequence[Span]) -> None:
        """Fill each span from the file, which a truncation under us makes an error and not a signal.

        Raises:
            CorruptShard: the file ends before a span does.
            StoreError: the disk failed.
        """
        for span, buffer in spans:
            filled = 0
            while filled < span.n_bytes:
                try:
                    n_read = os.preadv(self.lease.fd, [buffer[filled:]], span.start + filled)
                except OSError as error:
                    raise StoreError(f"reading the local copy failed: {error}", url=self._url) from error
                if not n_read:
                    raise CorruptShard(f"the local copy ends at {span.start + filled}: cut short", url=self._url)
                filled += n_read


class Source:
    """The bytes of one object of a store. Safe from any thread; holds no lock.

    n_misses: how often the local copy was asked for bytes that were not in it yet; a rule of thumb, two threads may
    count one.
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
    def copy(self) -> LocalCopy | None:
        """The local copy, if there is one."""
        return self._copy

    def want(self, ranges: Sequence[ByteRange]) -> None:
        """Start fetching ranges to the local copy, if there is one to be."""
        if self._copy is not None:
            self._copy.lease.want(ranges)

    def local(self, ranges: Sequence[ByteRange], deadline_s: float | None) -> LocalCopy | None:
        """The local copy with these ranges present, or None: read() them."""
        copy = self._copy
        if copy is None:
            return None
        if not copy.lease.present(ranges):
            self.n_misses += 1
            copy.lease.want(ranges)
        with os_errors("open the local copy", self.url):  # of what was fetched meanwhile
            return copy if copy.lease.wait(ranges, deadline_s=deadline_s) else None

    def read(self, spans: Sequence[Span], deadline_s: float | None) -> None:
        """Fill each span from the store, as it was when it was opened.

        Raises:
            CorruptShard: the object is shorter than the spans.
            StoreError: as of Store.read_into.
        """
        try:
            self._store.read_into(self._key, spans, if_match=self.etag, deadline_s=deadline_s)
        except (NotFound, ObjectChanged):
            raise
        except StoreError as error:
            end = max(span.end for span, _ in spans)
            # A store only says that it failed for good; whether the object is too short it says when asked.
            if not error.retryable and self._store.head(self._key).n_bytes < end:
                raise CorruptShard(f"cut short: {end} bytes expected", url=self.url, part="file") from error
            raise

    def tail(self, n_bytes: int) -> tuple[bytes, int]:
        """The last n_bytes of the object (all of it if shorter), and its size; one request.

        Keeps the ETag for later reads.
        """
        copy = self._copy
        if copy is not None:
            span = ByteRange(max(copy.n_bytes - n_bytes, 0), copy.n_bytes)
            if self.local([span], None) is not None:
                data = bytearray(span.n_bytes)
                copy.read([(span, memoryview(data))])
                return bytes(data), copy.n_bytes
        data_read, info = self._store.read_tail(self._key, n_bytes)
        self.etag = info.etag
        return data_read, info.n_bytes

    def range(self, start: int, end: int) -> bytes:
        """Bytes [start, end).

        Raises:
            CorruptShard: the object is shorter.
            StoreError: as of Store.read_into.
        """
        span = ByteRange(start, end)
        if span.n_bytes > _CLAIMED_BYTES:
            self._check_length(span)
        data = bytearray(span.n_bytes)
        copy = self.local([span], None)
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
                message = f"has {n_bytes} bytes, its data set or its tail says that it has {span.end} or more"
                raise CorruptShard(message, url=self.url, part="file")

    def close(self) -> None:
        """Let go of the local copy; it stays open for those who still hold it."""
        self._copy = None
