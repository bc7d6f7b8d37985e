"""Bytes of a shard, from a mapped local copy or by ranged reads; its footer; and the byte ranges of its columns."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tiercache._native.mapping import Mapping
from tiercache.errors import CorruptShard, NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ShardIdentity, ShardInfo
from tiercache.shard.codec import Bytes
from tiercache.shard.footer import TAIL_BYTES, Footer, Tail
from tiercache.store.contract import Lease, LocalStore, Span, Store, read_unpinned
from tiercache.store.local import os_errors

# The kernel's file clock ticks every 1 to 10 ms, so two writes within a tick leave the same ctime. A ctime younger than
# this does not identify a state of the file.
MIN_CTIME_AGE_NS = 20_000_000
# How often bytes from a store that do not match their checksum are read again: they may have been damaged in transit.
READS_AGAIN = 5
# Longer ranges that a file states are compared with the store before memory of that length is allocated.
_CLAIMED_BYTES = 1 << 20


class LocalCopy:
    """A lease on a local copy and its mapping. Dropping the object closes the lease.

    Loaded blocks keep only the mapping. It holds no file descriptor, but like a lease it keeps the bytes of the file
    and the flock(2) that the cache's evictor tests.
    """

    def __init__(self, lease: Lease, url: str) -> None:
        self.lease = lease
        self.n_bytes = lease.n_bytes
        self._url = url
        self._mapped: dict[str, Bytes] = {}
        weakref.finalize(self, lease.close).atexit = False

    def map_file(self) -> Bytes:
        """Return the whole copy, read-only uint8[n_bytes]. The caller must not touch bytes that are not present yet.

        Each call reads the size of the file (0.4 us): if a file is truncated in the middle of a memory page, the rest
        of that page reads as zeros without a signal, although it was checked before. Raises CorruptShard for a shorter
        file. There is no lock, which a fork could leave locked: of two threads that map at once, one mapping is kept.
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
        """Return the file's ctime in ns, which no program can set back; 0 if another write may leave it unchanged."""
        changed_ns = os.fstat(self.lease.fd).st_ctime_ns
        return changed_ns if time.time_ns() - changed_ns > MIN_CTIME_AGE_NS else 0

    @cached_property
    def reports_residency(self) -> bool:
        """Whether mincore(2) reports page residency correctly: only for a file that the user owns or may write."""
        return os.fstat(self.lease.fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{self.lease.fd}", os.W_OK)

    def read(self, spans: Sequence[Span]) -> None:
        """Fill each span from the file with pread: a concurrent truncation raises CorruptShard and no SIGBUS."""
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
    """The bytes of an object of a store. Thread-safe without locks, so n_misses may lose counts of missing ranges."""

    def __init__(self, store: Store, key: str, identity: ShardIdentity | None, *, part: str = "file") -> None:
        self._part = part  # name of the object in errors
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
        return self._copy

    def prefetch_ranges(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:
        if self._copy is not None:
            self._copy.lease.prefetch(ranges, urgent=urgent)

    def ensure_cached(self, ranges: Sequence[ByteRange]) -> LocalCopy | None:
        """Return the local copy after these ranges are present; None if the caller must read() them from the store."""
        copy = self._copy
        if copy is None:
            return None
        if not copy.lease.present(ranges):
            self.n_misses += len(ranges)
            copy.lease.prefetch(ranges)
        with os_errors("open the local copy", self.url):  # wait() may open the file that was fetched
            return copy if copy.lease.wait(ranges) else None

    def read(self, spans: Sequence[Span]) -> None:
        """Fill each span from the store. If tail() has read an ETag, an object that has changed since is an error."""
        try:
            try:
                self._store.read_into(self._key, spans, if_match=self.etag)
            except ObjectChanged:
                if self.etag is not None:
                    raise
                read_unpinned(self._store, self._key, spans)  # the reader compares the bytes with checksums
        except (NotFound, ObjectChanged):
            raise
        except StoreError as error:
            # A permanent error does not tell whether the object is too short; head() does.
            if not error.retryable:
                self._check_end(max(span.end for span, _ in spans), error)
            raise

    def check_claimed(self, span: ByteRange) -> None:
        """Raise CorruptShard if the object is shorter than stated; only long ranges are compared."""
        is_cached = self._copy is not None and self._copy.lease.present([span])
        if span.n_bytes > _CLAIMED_BYTES and not is_cached:
            self._check_end(span.end)

    def _check_end(self, end: int, cause: StoreError | None = None) -> None:
        n_bytes = self._store.head(self._key).n_bytes
        if n_bytes < end:
            message = f"has {n_bytes} bytes, but {end} or more are stated"
            raise CorruptShard(message, url=self.url, part=self._part) from cause

    def tail(self, n_bytes: int) -> tuple[bytes, int]:
        """Return the last n_bytes of the object and its size, with one request; its ETag holds for later reads."""
        copy = self._copy
        if copy is not None:
            span = ByteRange(max(copy.n_bytes - n_bytes, 0), copy.n_bytes)
            if self.ensure_cached([span]) is not None:
                data = bytearray(span.n_bytes)
                copy.read([(span, memoryview(data))])
                return bytes(data), copy.n_bytes
        data_read, info = self._store.read_tail(self._key, n_bytes)
        self.etag = info.etag
        return data_read, info.n_bytes

    def range(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of the object. Raises CorruptShard if it is shorter, and StoreError."""
        span = ByteRange(start, end)
        self.check_claimed(span)
        data = bytearray(span.n_bytes)
        copy = self.ensure_cached([span])
        if copy is not None:
            copy.read([(span, memoryview(data))])
        else:
            self.read([(span, memoryview(data))])
        return bytes(data)

    def close(self) -> None:
        self._copy = None


# Without a data set's description of the shard, the length of the footer is unknown. This many bytes from the end
# contain nearly every footer, so one request is sufficient.
TAIL_GUESS_BYTES = 64 << 10


def read_footer(source: ByteSource, info: ShardInfo | None) -> tuple[Footer, Tail]:
    """Return footer and tail of a shard, with one ranged read if info is given, and at most two otherwise.

    Data from a store whose checksum is wrong is fetched again; a local copy is not: the caller drops it.
    """
    for _ in range(READS_AGAIN):
        try:
            return _read_footer(source, info)
        except CorruptShard:
            copy = source.local_copy
            if copy is not None and copy.lease.present([ByteRange(max(copy.n_bytes - TAIL_BYTES, 0), copy.n_bytes)]):
                raise
    return _read_footer(source, info)


def _read_footer(source: ByteSource, info: ShardInfo | None) -> tuple[Footer, Tail]:
    if info is None:
        data, n_bytes = source.tail(TAIL_GUESS_BYTES)
    else:
        _check_row(source, info)
        data, n_bytes = source.range(info.footer_offset, info.n_bytes), info.n_bytes
    tail = Tail.parse(data[-TAIL_BYTES:], n_bytes, source.url)
    if info is not None and tail.footer_offset != info.footer_offset:
        message = "its tail and its data set state different positions of the footer"
        raise CorruptShard(message, url=source.url, part="tail")
    have = n_bytes - len(data)
    if tail.footer_offset < have:
        data = source.range(tail.footer_offset, have) + data
        have = tail.footer_offset
    start = tail.footer_offset - have
    return Footer.parse(memoryview(data)[start : start + tail.footer_bytes], tail, source.url), tail


def fetch_footer(store: Store, key: str, info: ShardInfo) -> Footer:
    """Return the footer of a shard that is read later, with one ranged request that bypasses any local copy."""
    source = ByteSource(store, key, None)
    try:
        footer, _ = read_footer(source, info)
    finally:
        source.close()
    check_identity(footer, info, None, source.url)
    return footer


def _check_row(source: ByteSource, info: ShardInfo) -> None:
    copy = source.local_copy
    if copy is not None and copy.n_bytes != info.n_bytes:
        message = f"has {copy.n_bytes} bytes, its data set states {info.n_bytes}"
        raise CorruptShard(message, url=source.url, part="file")
    end = info.footer_offset + info.footer_bytes + TAIL_BYTES
    if info.footer_offset < 0 or info.footer_bytes < 0 or end != info.n_bytes:
        raise CorruptShard("its data set's row states an inconsistent footer or size", url=source.url, part="segment")


def check_identity(footer: Footer, info: ShardInfo | None, identity: ShardIdentity | None, url: str) -> None:
    """Raise CorruptShard unless a footer belongs to the shard that the data set or the cache describes."""
    shard_id = footer.shard_id.hex()
    for named in (info, identity):
        if named is not None and named.shard_id != shard_id:
            message = f"is shard {shard_id}, its data set states {named.shard_id}"
            raise CorruptShard(message, url=url, part="footer")
    if info is not None and info.n_records != footer.n_records:
        message = f"has {footer.n_records} records, its data set states {info.n_records}"
        raise CorruptShard(message, url=url, part="footer")


# Columns that occupy at least 15/16 of a shard are not fetched by ranges: the whole shard takes the same time, and
# other readers can use it.
_MOST, _OF = 15, 16
# Ranges with a smaller gap are merged, because the bytes between cost less than another request. They take space in the
# cache; so longer gaps, which would still cost less time than a request, are not fetched.
_COLUMN_GAP_BYTES = 16 << 10


def column_ranges(footer: Footer, info: ShardInfo, columns: Sequence[int]) -> tuple[ByteRange, ...] | None:
    """Return the ranges of all blocks of these columns and of the footer; None if they are nearly the whole shard."""
    ranges = block_ranges(footer, info, range(footer.n_blocks), columns)
    return None if sum(r.n_bytes for r in ranges) * _OF >= info.n_bytes * _MOST else tuple(ranges)


# Grouped columns of more bytes are not fetched as a whole for some blocks. Writers group less (shard_file.GROUP_BYTES).
_MAX_GROUPED_BYTES = 2 << 20


def grouped_columns(footer: Footer, columns: Sequence[int]) -> list[int]:
    """Return the columns whose chunks lie together behind all blocks (see shard_file.columns_to_group)."""
    offsets = footer.chunks["offset"]
    grouped = [c for c in columns if (offsets[:1, c] > offsets[-1:].min()).any()]
    return grouped if int(footer.chunks["stored"][:, grouped].sum()) <= _MAX_GROUPED_BYTES else []


def chunks_with_group(footer: Footer, blocks: Sequence[int], columns: Sequence[int]) -> NDArray[np.int64]:
    """Return the numbers of the chunks to fetch for blocks, int64[n]; those of grouped columns for all blocks.

    A fetch follows the file. The chunks of a group would come behind all later blocks, and in a request for each block.
    """
    numbers = np.arange(footer.chunks.size).reshape(footer.chunks.shape)
    grouped = grouped_columns(footer, columns)
    return np.concatenate([numbers[np.ix_(list(blocks), list(columns))].ravel(), numbers[:, grouped].ravel()])


def block_ranges(footer: Footer, info: ShardInfo, blocks: Sequence[int], columns: Sequence[int]) -> list[ByteRange]:
    chunks = footer.chunks.ravel()[chunks_with_group(footer, blocks, columns)]
    starts = np.append(chunks["offset"].astype(np.int64), info.footer_offset)
    ends = np.append((chunks["offset"] + chunks["stored"]).astype(np.int64), info.n_bytes)
    return merge_ranges(starts, ends, _COLUMN_GAP_BYTES)


def merge_ranges(starts: NDArray[np.int64], ends: NDArray[np.int64], gap_bytes: int) -> list[ByteRange]:
    """Return ranges in order, with those merged that overlap or have at most gap_bytes between them."""
    if not len(starts):
        return []
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    first = np.flatnonzero(np.r_[True, starts[1:] > ends[:-1] + gap_bytes])
    return list(map(ByteRange, starts[first].tolist(), ends[np.r_[first[1:] - 1, len(ends) - 1]].tolist()))
