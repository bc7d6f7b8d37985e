"""The Store contract (Store, Upload, Lease, LocalStore), and helpers for every back end and its users.

A key is a relative path of plain segments joined by "/", never "". A store neither keeps nor writes to a caller's
buffer after a call has returned. Any thread of any process that holds a store may call all methods. A failed call
raises StoreError with the redacted URL, after the back end's own retries.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo, ShardIdentity
from tiercache.stats import Counters

Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")

Span: TypeAlias = tuple[ByteRange, memoryview]
"""A byte range of an object and its destination: writable, contiguous uint8 memory of the same length."""

Receive: TypeAlias = Callable[[int, memoryview], object]
"""Receives the offset of a piece in an object, and its bytes."""


def check_key(key: str) -> str:
    """Return key if it is valid. Raises ValueError if it is empty or absolute, or has a segment "", "." or ".."."""
    segments = key.split("/")
    if "\\" in key or "\0" in key or "://" in key or any(s in ("", ".", "..") for s in segments):
        raise ValueError(
            f"not a valid key: {key!r}; a key is a relative path without empty, '.' or '..' segments, '\\' or NUL"
        )
    return key


class Upload(ABC):
    """An unfinished upload of one object in numbered parts. Its key shows nothing before complete() has returned.

    A context manager: leaving the block without complete() aborts the upload.
    """

    @abstractmethod
    def put_part(self, number: int, data: Buffer) -> None:
        """Add the next part: number 0, 1, 2, ..., from any thread but one at a time. Its bytes are not kept.

        Each but the last has min_part_bytes or more. A part that fails ends the upload. (The uploads of
        S3StorageClasses also take parts in any order and in parallel.) Raises ValueError if the number is not the next
        one, or the upload is over.
        """

    @abstractmethod
    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Join the parts in the order of their numbers, and return the object, which appears at once.

        if_absent: Return None, and change nothing, if the key exists. Some stores look at the key of a large object
        just before, which is not atomic.
        """

    @abstractmethod
    def abort(self) -> None:
        """Discard the uploaded parts. An upload that no longer exists is not an error."""

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()  # has no effect after complete()


class UploadFile(io.RawIOBase):
    """File whose bytes become the parts of an upload. finish() uploads the last one, without completing the upload."""

    def __init__(self, upload: Upload, part_bytes: int) -> None:
        self._upload, self._part_bytes = upload, part_bytes
        self._pending = bytearray()
        self._n_parts = 0
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._pending += data
        n_bytes = memoryview(data).nbytes
        self._position += n_bytes
        if len(self._pending) >= self._part_bytes:
            self._put()
        return n_bytes

    def _put(self) -> None:
        part, self._pending = self._pending, bytearray()
        self._upload.put_part(self._n_parts, part)
        self._n_parts += 1

    def finish(self) -> None:
        if self._pending or not self._n_parts:
            self._put()


class SequentialUpload(Upload):
    """An upload whose subclass appends bytes, and makes the object of them or discards them, each under the lock."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._lock = Lock()
        self._n_parts = 0
        self._is_open = True

    @abstractmethod
    def append(self, data: memoryview) -> None:
        """Append flat bytes, held only during the call."""

    @abstractmethod
    def make_object(self, *, if_absent: bool) -> ObjectInfo | None:
        """Let the object appear under its key; see Upload.complete."""

    @abstractmethod
    def discard(self) -> None:
        """Release what the upload holds, and discard its bytes. Repeated calls have no effect."""

    def put_part(self, number: int, data: Buffer) -> None:
        with self._lock:
            self._check_open()
            if number != self._n_parts:
                message = "is missing" if number > self._n_parts else "comes next"
                raise ValueError(f"{self.key}: part {self._n_parts} {message}; parts come in order, got part {number}")
            self._n_parts += 1
            self._is_open = False
            try:
                self.append(memoryview(data).cast("B"))
                self._is_open = True
            finally:
                if not self._is_open:
                    self.discard()

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        with self._lock:
            self._check_open()
            self._is_open = False
            try:
                return self.make_object(if_absent=if_absent)
            finally:
                self.discard()

    def abort(self) -> None:
        with self._lock:
            if self._is_open:
                self._is_open = False
                self.discard()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ValueError(f"{self.key}: the upload is already completed, aborted or failed")


class Store(ABC):
    """Objects under a root URL.

    Attributes:
        url: Root URL without credentials, for messages.
        counters: Number of requests, bytes_read and bytes_written in this process; of a remote store also retries,
            hedges (second requests beside late ones) and throttled (requests that the store refused as too many).
        min_part_bytes: Minimum size of every part of an upload except the last.
        provider: "aws", "gcs" or "azure" if one of these bills the requests; None for another server, or unknown.
    """

    url: str
    counters: Counters
    provider: str | None = None
    min_part_bytes: int = 5 << 20

    def url_of(self, key: str) -> str:
        """Return the URL of a key, or of the folder for "", without credentials."""
        return f"{self.url.rstrip('/')}/{key}" if key else self.url

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Return the size and identity of an object. Raises NotFound."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return a whole (small) object. Raises NotFound."""

    @abstractmethod
    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Return the last n_bytes of an object, or all of it, and its description, in one request. Raises NotFound."""

    @abstractmethod
    def read_into(
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        """Fill each span's buffer with its byte range, by coalesced and parallel requests.

        if_match: ETag that the object must still have. cancel: Event that ends the call soon with StoreError once it is
        set. The buffers are undefined after an error: NotFound, ObjectChanged, or StoreError, also for a range beyond
        the end.
        """

    def read_pieces(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        receive: Receive,
        *,
        if_match: str | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Pass each byte range to receive() as it arrives, without a buffer for all of it where the store can do so.

        ranges: Without overlap, of a few MiB each: a range is not split into several requests. Pieces of one range come
        in order, those of several ranges in any order and from several threads at once; their bytes are valid only
        during receive(). A range is passed again from its start if the object was moved during the call: the later
        bytes count. An error that receive() raises ends the call, and is raised. Otherwise as read_into().
        """
        buffers = [memoryview(bytearray(wanted.n_bytes)) for wanted in ranges]
        spans = list(zip(ranges, buffers, strict=True))
        self.read_into(key, spans, if_match=if_match, cancel=cancel)
        for wanted, buffer in spans:
            if buffer.nbytes:
                receive(wanted.start, buffer)

    @abstractmethod
    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Write a whole object of at most a few MiB atomically, in one request, and replace an existing object."""

    @abstractmethod
    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write a whole object atomically, in one request, if the key is free. Return whether it was written.

        One of several concurrent calls returns True. The error of a lost answer, after which it may be written, has
        `.maybe_done`.
        """

    def require_conditional_put(self) -> None:  # noqa: B027 -- most stores fulfil the contract
        """Return if put_if_absent() lets one of several writers win, in whichever processes they are.

        A store that cannot know this from its kind tests it, once in a process. Raises StoreError if the store lacks
        it, and the storage option `single_writer` is not set.
        """

    @abstractmethod
    def create(self, key: str) -> Upload:
        """Start an upload of any size."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. A key that does not exist is not an error."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List the objects below a folder at any depth, in no particular order. prefix: "" or a path that ends in "/".

        Temporary objects of unfinished writes are never listed. A folder that does not exist yields nothing.
        """

    def parent(self) -> tuple[Store, str] | None:
        """Return the store of the folder above the root, and the root's name in it; None: there is none, or unknown."""
        return None

    def close(self) -> None:  # noqa: B027 -- a store without connections has nothing to drop
        """Close connections and descriptors. The store may be used again afterwards."""


# A range of at most this size is one request of every store.
_PIECE_BYTES = 4 << 20


def read_unpinned(store: Store, key: str, spans: Sequence[Span], *, cancel: Event | None = None) -> None:
    """Fill spans as Store.read_into() does, but by one request after another, whose ETags may differ.

    Only for bytes that the caller compares with checksums: replicas of an HTTP server may give one object different
    ETags.
    """
    for span, buffer in spans:
        for offset in range(0, span.n_bytes, _PIECE_BYTES):
            piece = buffer[offset : offset + _PIECE_BYTES]
            start = span.start + offset
            store.read_into(key, [(ByteRange(start, start + piece.nbytes), piece)], cancel=cancel)


class WrapperStore(Store):
    """A store that calls another one, `inner`, and is no LocalStore. A subclass overrides hooks or methods."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url, self.counters, self.min_part_bytes = inner.url, inner.counters, inner.min_part_bytes
        self.provider = inner.provider

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def key_inside(self, key: str) -> str:
        """Return the inner store's key of a key, or its prefix of a prefix."""
        return key

    def info_outside(self, info: ObjectInfo) -> ObjectInfo:
        """Return the description of an object of the inner store."""
        return info

    def around(self, method: str, key: str, call: Callable[[], T]) -> T:  # noqa: ARG002 - for subclasses
        """Make a call of the inner store. A subclass acts before it, after it or instead of it.

        method: Of Store or Upload. key: For delete the first one.
        """
        return call()

    def head(self, key: str) -> ObjectInfo:
        return self.info_outside(self.around("head", key, lambda: self.inner.head(self.key_inside(key))))

    def get(self, key: str) -> bytes:
        return self.around("get", key, lambda: self.inner.get(self.key_inside(key)))

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        data, info = self.around("read_tail", key, lambda: self.inner.read_tail(self.key_inside(key), n_bytes))
        return data, self.info_outside(info)

    def read_into(
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        read, inner_key = self.inner.read_into, self.key_inside(key)
        self.around("read_into", key, lambda: read(inner_key, spans, if_match=if_match, cancel=cancel))

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        return self.info_outside(self.around("put", key, lambda: self.inner.put(self.key_inside(key), data)))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        return self.around("put_if_absent", key, lambda: self.inner.put_if_absent(self.key_inside(key), data))

    def require_conditional_put(self) -> None:
        self.inner.require_conditional_put()

    def create(self, key: str) -> Upload:
        return _WrappedUpload(self, key, self.around("create", key, lambda: self.inner.create(self.key_inside(key))))

    def delete(self, keys: Iterable[str]) -> None:
        wanted = [*keys]
        inside = [self.key_inside(key) for key in wanted]
        self.around("delete", wanted[0] if wanted else "", lambda: self.inner.delete(inside))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in self.around("list", prefix, lambda: self.inner.list(self.key_inside(prefix))):
            yield self.info_outside(info)

    def close(self) -> None:
        self.inner.close()


def unwrapped(store: Store) -> Store:
    while isinstance(store, WrapperStore):
        store = store.inner
    return store


class _WrappedUpload(Upload):
    def __init__(self, store: WrapperStore, key: str, inner: Upload) -> None:
        self._store, self._key, self._inner = store, key, inner

    def put_part(self, number: int, data: Buffer) -> None:
        self._store.around("put_part", self._key, lambda: self._inner.put_part(number, data))

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        info = self._store.around("complete", self._key, lambda: self._inner.complete(if_absent=if_absent))
        return None if info is None else self._store.info_outside(info)

    def abort(self) -> None:
        self._store.around("abort", self._key, self._inner.abort)


class Lease(Protocol):
    """A reader's lease on a local copy. While the lease is open, its bytes stay readable whatever the cache evicts."""

    @property
    def fd(self) -> int:
        """Descriptor of the copy, owned by the lease. It is valid if present() is true or wait() returned True."""

    @property
    def n_bytes(self) -> int:
        """Size of the whole object."""

    @property
    def n_descriptors(self) -> int:
        """Number of descriptors that the lease holds, or will hold once the copy is local."""

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        """Return whether all bytes of the ranges are local now."""

    def prefetch(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:
        """Start to fetch the missing bytes of the ranges, or join a running fetch. urgent: before others."""

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        """Wait until the bytes of the ranges are local, at most deadline_s seconds.

        Return False if they will not become local (no space, disk fault): the caller reads them by ranges. Raises
        StoreError if the source failed, or the deadline passed.
        """

    def note_read(self, n_bytes: int, ranges: Callable[[], Sequence[ByteRange]], /) -> int:
        """Count n_bytes that were read from the copy; return how many of them had been fetched for this process.

        A byte that was fetched counts once. ranges: Returns the ranges that were read; called only if it matters.
        """

    def close(self) -> None:
        """Release the lease. Repeated calls have no effect."""


@runtime_checkable
class LocalStore(Protocol):
    """A store that can provide its objects as local files: a local folder, or the cache of any other store."""

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """Return a lease on the local copy of key, which may still be fetched; None: read by ranges. Raises NotFound.

        identity: Of the object according to the manifest; a copy that does not match counts as a miss.
        """

    def remove_if_corrupt(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """Check the local copy of key, in which a reader found wrong bytes. Return whether it is removed.

        False: it is right, or it is the object itself.
        """


class StoreFile(io.RawIOBase):
    """A seekable raw file over an object. Each read is one range request. Only one thread may use it at a time."""

    def __init__(self, store: Store, key: str, n_bytes: int, etag: str | None = None) -> None:
        super().__init__()
        self.store, self.key, self.n_bytes, self.etag = store, key, n_bytes, etag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.n_bytes}
        if (base := bases.get(whence)) is None:
            raise ValueError(f"whence must be 0, 1 or 2, got {whence}")
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}: the position must not be negative")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + view.nbytes, self.n_bytes)
        byte_range = ByteRange(self._position, max(self._position, end))
        if byte_range.n_bytes:
            self.fill(byte_range, view[: byte_range.n_bytes])
            self._position = end
        return byte_range.n_bytes

    def fill(self, byte_range: ByteRange, buffer: memoryview) -> None:
        self.store.read_into(self.key, [(byte_range, buffer)], if_match=self.etag)


class ProcessLocal(Generic[T]):
    """A value that each process creates at first use, without a lock, which a fork could leave held.

    A child never uses or disposes of its parent's value: clients whose threads do not exist any more may hang.
    """

    def __init__(self, make: Callable[[], T], dispose: Callable[[T], object]) -> None:
        self._make, self._dispose = make, dispose
        self._values: dict[int, T] = {}

    def get(self) -> T:
        pid = os.getpid()
        value = self._values.get(pid)
        if value is None:
            created = self._make()
            value = self._values.setdefault(pid, created)  # atomic: of two threads, the first one's value is kept
            if value is not created:
                self._dispose(created)
        return value

    def drop(self) -> None:
        """Dispose of this process's value; the next get() creates a new one."""
        value = self._values.pop(os.getpid(), None)
        if value is not None:
            self._dispose(value)


# A gap of less than this costs less than one more request: 0.5 ms at 125 MB/s. With 16 or more requests in flight, a
# request costs less than its latency.
MAX_GAP_BYTES = 62_499
# Of one request: of a longer one, more bytes come again after an error.
MAX_REQUEST_BYTES = 8 << 20


def covering_ranges(
    wanted: Sequence[ByteRange], max_gap_bytes: int = MAX_GAP_BYTES, max_bytes: int = MAX_REQUEST_BYTES
) -> list[ByteRange]:
    """Return the fewest ranges that read all wanted ranges, and between them only gaps of at most max_gap_bytes.

    The wanted ranges come in any order, and may overlap or be empty. The result is in ascending order, without overlap,
    of 1 to max_bytes bytes each. A single longer range is split into nearly equal parts.
    """
    result: list[ByteRange] = []
    cluster: list[ByteRange] = []
    for run in _merged(wanted):
        if cluster and run.start - cluster[-1].end > max_gap_bytes:
            result += _cover(cluster, max_bytes)
            cluster = []
        cluster.append(run)
    return result + (_cover(cluster, max_bytes) if cluster else [])


def _merged(wanted: Sequence[ByteRange]) -> list[ByteRange]:
    runs: list[ByteRange] = []
    for span in sorted((span for span in wanted if span.n_bytes), key=lambda span: span.start):
        if runs and span.start <= runs[-1].end:
            runs[-1] = ByteRange(runs[-1].start, max(runs[-1].end, span.end))
        else:
            runs.append(span)
    return runs


def _cover(runs: Sequence[ByteRange], max_bytes: int) -> list[ByteRange]:
    start, end = runs[0].start, runs[-1].end
    if len(runs) == 1:
        step = -(-(end - start) // -(-(end - start) // max_bytes))
        return [ByteRange(at, min(at + step, end)) for at in range(start, end, step)]
    ranges: list[ByteRange] = []
    number = 0  # of the first run that is not covered to its end
    while number < len(runs):
        start = max(runs[number].start, ranges[-1].end if ranges else 0)
        end = start
        while number < len(runs) and runs[number].start < start + max_bytes:
            end = min(runs[number].end, start + max_bytes)
            if end < runs[number].end:
                break
            number += 1
        ranges.append(ByteRange(start, end))
    return ranges


def check_spans(spans: Sequence[Span]) -> None:
    """Check that each range can be read into its buffer. Raises ValueError."""
    for span, buffer in spans:
        if buffer.nbytes != span.n_bytes:
            raise ValueError(
                f"the buffer of [{span.start}, {span.end}) has {buffer.nbytes} bytes, expected {span.n_bytes}"
            )
        if buffer.readonly or not buffer.c_contiguous or buffer.itemsize != 1 or buffer.ndim != 1:
            raise ValueError(f"the buffer of [{span.start}, {span.end}) must be writable, contiguous, flat bytes")


def check_read(info: ObjectInfo, spans: Sequence[Span], if_match: str | None, url: str) -> None:
    """Raise ObjectChanged if the object does not match if_match, and StoreError if a range ends beyond the object."""
    if if_match is not None and info.etag != if_match:
        raise ObjectChanged(url=url, expected=if_match, found=info.etag)
    last = max((span.end for span, _ in spans), default=0)
    if last > info.n_bytes:
        raise StoreError(f"a range ends at byte {last}, the object at byte {info.n_bytes}", url=url)


@dataclass(frozen=True, slots=True)
class Request:
    """One range request, and the destinations of its answer as (offset in the answer, buffer)."""

    range: ByteRange
    targets: tuple[tuple[int, memoryview], ...]


def plan_requests(
    spans: Sequence[Span], max_gap_bytes: int = MAX_GAP_BYTES, max_bytes: int = MAX_REQUEST_BYTES
) -> tuple[Request, ...]:
    """Return the fewest requests for the spans, which come in any order. Each byte of each span has one target.

    Where spans overlap, bytes are read more than once, so that the targets of a request do not overlap.
    """
    layers: list[list[Span]] = []  # each without overlap; there is only one unless spans overlap
    for span, buffer in sorted((item for item in spans if item[0].n_bytes), key=lambda item: item[0].start):
        layer = next((one for one in layers if one[-1][0].end <= span.start), None)
        if layer is None:
            layers.append(layer := [])
        layer.append((span, buffer))
    requests = [request for layer in layers for request in _plan_layer(layer, max_gap_bytes, max_bytes)]
    return tuple(sorted(requests, key=lambda request: request.range.start))


def _plan_layer(spans: Sequence[Span], max_gap_bytes: int, max_bytes: int) -> list[Request]:
    """Return the requests for spans in ascending order that do not overlap."""
    ranges = covering_ranges([span for span, _ in spans], max_gap_bytes, max_bytes)
    targets: list[list[tuple[int, memoryview]]] = [[] for _ in ranges]
    number = 0
    for span, buffer in spans:
        at = span.start
        while at < span.end:
            while ranges[number].end <= at:
                number += 1
            end = min(ranges[number].end, span.end)
            targets[number].append((at - ranges[number].start, buffer[at - span.start : end - span.start]))
            at = end
    return [Request(one, tuple(pieces)) for one, pieces in zip(ranges, targets, strict=True)]
