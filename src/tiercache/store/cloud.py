"""S3, Google Cloud Storage, Azure and HTTP as a store: obstore's requests, run in parallel and retried.

A forked child of a process that used obstore cannot use it: CloudStore then selects s3fs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Condition, Event
from typing import Any, Protocol, TypeVar

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, Span, Store, Upload, check_key
from tiercache.store.fsspec import FsspecStore
from tiercache.store.obstore import (
    WRITER_PART_BYTES,
    BucketFolder,
    Client,
    KeyExists,
    is_beyond_end,
    is_usable_here,
    knows_no_range,
    to_object_info,
)
from tiercache.store.options import CloudOptions
from tiercache.store.posix import TEMP_PREFIX
from tiercache.store.range_reads import (
    BufferGuard,
    ProcessLocal,
    Request,
    RequestSizes,
    check_spans,
    plan_requests,
    read_requests,
    worker_pool,
)
from tiercache.store.retry import CallLimit, CallMonitor, RetryPolicy, with_retries
from tiercache.store.s3 import PartsEtag, is_md5_of
from tiercache.waiting import SYSTEM_CLOCK, Clock

# An object of at most this size is written by one request, also with if_absent.
_HOLD_BYTES = 16 << 20
# Maximum size of early parts, whose predecessors have not come yet; then put_part() waits.
_AHEAD_BYTES = 64 << 20
_AHEAD_WAIT_S = 300.0


class UploadTarget(Protocol):
    """Destination of an upload.

    Attributes:
        key: Key of the object.
        exclusive: Whether a large object may be published with if_absent.
        part_bytes: Size of the parts that a writer sends.
    """

    key: str
    exclusive: bool
    part_bytes: int

    def put(self, data: bytes, *, if_absent: bool) -> ObjectInfo | None:
        """Write a small object in one request. Return None if if_absent is true and the key exists."""

    def begin(self) -> Any:
        """Return the writer of a new large object."""

    def write(self, writer: Any, data: bytes) -> None:
        """Append data to the writer."""

    def close(self, writer: Any, n_bytes: int, *, if_absent: bool) -> ObjectInfo | None:
        """Publish the object."""

    def abort(self, writer: Any) -> None:
        """Discard the object."""


class OrderedUpload(Upload):
    """An upload that holds the first 16 MiB and then streams. Early parts wait in memory, up to 64 MiB of them.

    The lock guards the table of parts and the sending flag; one thread at a time sends bytes, outside the lock. After
    complete(), `is_confirmed` says whether the store returned the MD5 of exactly the bytes sent, if confirm() was
    called.
    """

    def __init__(self, target: UploadTarget) -> None:
        self._target = target
        self._etag: PartsEtag | None = None
        self.is_confirmed = False
        self._changed = Condition()
        self._next = 0
        self._early: dict[int, bytes] = {}
        self._is_sending = False
        self._is_open = True
        self._error: StoreError | None = None
        self._held: list[bytes] = []
        self._n_bytes = 0
        self._writer: Any = None

    def confirm(self) -> None:
        """Hash the bytes from the first one on, for is_confirmed. Costs 1.5 s of processor time per GB."""
        self._etag = PartsEtag(self._target.part_bytes)

    def put_part(self, number: int, data: Buffer) -> None:
        """Send the part, or keep a copy until its turn."""
        part = bytes(data)
        with self._changed:
            self._admit(number, len(part))
            self._early[number] = part
            if self._is_sending:
                return
            self._is_sending = True
        try:
            while (due := self._take_due()) is not None:
                self._send(due)
        except BaseException as error:
            with self._changed:
                broken = StoreError(f"put_part {number}: interrupted", url=self._target.key, retryable=False)
                self._error = error if isinstance(error, StoreError) else broken
                self._is_sending = False
                self._changed.notify_all()
            raise

    def _admit(self, number: int, n_bytes: int) -> None:
        def has_room() -> bool:
            early_bytes = sum(map(len, self._early.values()))
            return number == self._next or early_bytes + n_bytes <= _AHEAD_BYTES or not self._is_open

        key = self._target.key
        if not self._changed.wait_for(has_room, _AHEAD_WAIT_S):
            message = f"put_part {number}: part {self._next} is still missing after {_AHEAD_WAIT_S:g} s"
            raise StoreError(message, url=key, retryable=False)
        if self._error is not None:
            raise self._error
        if not self._is_open or number < self._next or number in self._early:
            raise ValueError(f"{key}: part {number}: each part must come once, before complete() or abort()")

    def _take_due(self) -> bytes | None:
        with self._changed:
            part = self._early.pop(self._next, None)
            if part is None:
                # Cleared under the lock: the thread of a later part sees that no thread sends, and sends the part
                # itself.
                self._is_sending = False
                self._changed.notify_all()
                return None
            self._next += 1
            self._changed.notify_all()
            return part

    def _send(self, part: bytes) -> None:
        self._n_bytes += len(part)
        if self._writer is not None:
            self._write(part)
            return
        self._held.append(part)
        if self._n_bytes > _HOLD_BYTES:
            self._writer = self._target.begin()
            for held in self._held:
                self._write(held)
            self._held.clear()

    def _write(self, part: bytes) -> None:
        self._target.write(self._writer, part)
        if self._etag is not None:  # hashed after the hand-over, while the writer sends the part
            self._etag.add(part)

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish the object. A small object takes one request."""
        key = self._target.key
        if if_absent and self._writer is not None and not self._target.exclusive:
            raise ValueError(f"{key}: complete(if_absent=True) of a large object needs create(key, if_absent=True)")
        if not self._stop():
            raise ValueError(f"{key}: the upload is already completed or aborted")
        if self._error is not None:
            self._drop()
            raise self._error
        if self._early:
            self._drop()
            raise ValueError(f"{key}: part {self._next} is missing; parts are numbered 0, 1, 2, ... without gaps")
        return self._put(if_absent=if_absent) if self._writer is None else self._close(if_absent=if_absent)

    def _put(self, *, if_absent: bool) -> ObjectInfo | None:
        data = b"".join(self._held)
        info = self._target.put(data, if_absent=if_absent)
        self.is_confirmed = self._etag is not None and info is not None and is_md5_of(info.etag, data)
        return info

    def _close(self, *, if_absent: bool) -> ObjectInfo | None:
        info = self._target.close(self._writer, self._n_bytes, if_absent=if_absent)
        self.is_confirmed = self._etag is not None and info is not None and self._etag.matches(info.etag)
        return info

    def abort(self) -> None:
        """Discard the bytes sent."""
        if self._stop():
            self._drop()

    def _stop(self) -> bool:
        with self._changed:
            was_open, self._is_open = self._is_open, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_sending)
            return was_open

    def _drop(self) -> None:
        self._held.clear()
        self._early.clear()
        if self._writer is not None:
            with suppress(StoreError):  # the parts then stay until a lifecycle rule of the bucket removes them
                self._target.abort(self._writer)


T = TypeVar("T")

_N_THREADS = 16
_DELETE_KEYS = 1000
# A longer body is read in pieces of this size, so that a call that has ended stops early.
_PIECE_BYTES = 1 << 20
# Each piece counts as progress: a connection with fewer bytes per second than this counts as stalled.
_SLOWEST_BYTES_S = 32 << 10


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How a store reads.

    Attributes:
        policy: Retries.
        sizes: Sizes of requests.
        n_threads: Number of threads in the store's pool.
        clock: Clock that the time limits use.
    """

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    sizes: RequestSizes = field(default_factory=RequestSizes)
    n_threads: int = _N_THREADS
    clock: Clock = SYSTEM_CLOCK


class ObstoreStore(Store):
    """Objects in a bucket, through obstore. Safe for threads; each process creates its client and threads at first use.

    Must not be used where is_usable_here() is false; CloudStore ensures this.
    """

    def __init__(
        self, place: BucketFolder, options: CloudOptions, tuning: ReadSettings, *, counters: Counters | None = None
    ) -> None:
        self._place, self._options, self._tuning = place, options, tuning
        self.url = place.url
        self.counters = counters or Counters("requests", "bytes_read", "bytes_written")
        self._client = Client(place, options, self.counters)
        self._pool = worker_pool(tuning.n_threads)
        self._calls = CallMonitor()
        self._timeout_s = options.timeout_s
        self._piece_bytes = min(_PIECE_BYTES, max(64 << 10, int(self._timeout_s * _SLOWEST_BYTES_S)))

    def __repr__(self) -> str:
        return f"ObstoreStore({self.url!r})"

    def __reduce__(self) -> tuple[type[ObstoreStore], tuple[BucketFolder, CloudOptions, ReadSettings]]:
        return ObstoreStore, (self._place, self._options, self._tuning)

    def close(self) -> None:
        """End the threads of this process and close its connections. Running calls are not retried any more."""
        self._calls.close()
        self._pool.drop()
        self._client.close()

    def _call_limit(
        self, key: str, doing: str, deadline_s: float | None = None, cancel: Event | None = None
    ) -> CallLimit:
        client = self._client
        return CallLimit(
            client.url_of(key),
            doing,
            deadline_s,
            cancel,
            clock=self._tuning.clock,
            timeout_s=self._timeout_s,
            endpoint=client.wait_target,
        )

    def _retry_read(self, key: str, doing: str, attempt: Callable[[CallLimit], T]) -> T:
        """Return the result of a read-only request. A request whose time is over is abandoned with its thread."""
        limit = self._call_limit(key, doing)
        return self._calls.retrying(lambda: attempt(limit), self._tuning.policy, limit, abandons="retries")

    def _retry_write(self, key: str, doing: str, attempt: Callable[[], T]) -> T:
        """Return the result of a write request.

        Its last attempt is always awaited, because its effect would be unknown otherwise.
        """
        return self._calls.retrying(attempt, self._tuning.policy, self._call_limit(key, doing))

    def head(self, key: str) -> ObjectInfo:
        """Send one HEAD."""
        check_key(key)
        return self._retry_read(key, "head", lambda _limit: self._client.head(key))

    def get(self, key: str) -> bytes:
        """Send one GET."""
        check_key(key)
        data = self._retry_read(key, "get", lambda limit: self._client.get(key, self._piece_bytes, limit.progressed))
        self.counters.add("bytes_read", len(data))
        return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Send one GET with a suffix range; HEAD and GET if the store has no suffix ranges or the object is empty."""
        check_key(key)
        if n_bytes <= 0:
            return b"", self.head(key)

        def attempt(_limit: CallLimit) -> tuple[bytes, ObjectInfo]:
            try:
                tail, info = self._client.tail(key, n_bytes)
            except StoreError as error:
                # Azure has no suffix ranges. An empty object has no valid range, and some servers then send all of it.
                if not is_beyond_end(error) and not knows_no_range(error):
                    raise
                return self._tail_by_head(key, n_bytes)
            self.counters.add("bytes_read", len(tail))
            return tail, info

        return self._retry_read(key, "read_tail", attempt)

    def _tail_by_head(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        info = self.head(key)
        tail = bytearray(min(n_bytes, info.n_bytes))
        wanted = ByteRange(info.n_bytes - len(tail), info.n_bytes)
        self.read_into(key, [(wanted, memoryview(tail))], if_match=info.etag)
        return bytes(tail), info

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Read the ranges in parallel, with one copy from the client's buffer.

        All ranges are of one version of the object.
        """
        check_key(key)
        check_spans(spans)
        limit = self._call_limit(key, "read_into", deadline_s, cancel)
        reading, landing = _ObjectRead(self._client, key, if_match, self._piece_bytes, limit), BufferGuard()

        def read_one(request: Request, landing: BufferGuard) -> None:
            with_retries(
                lambda: reading.attempt(request, landing),
                self._tuning.policy,
                limit,
                stop=landing.stop,
                abandons="retries",
            )

        with self._calls.track(limit, landing.stop):
            read_requests(plan_requests(spans, self._tuning.sizes), read_one, self._pool, limit, landing)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Send one PUT."""
        check_key(key)
        body = bytes(data)  # a connection may hold the body longer than the call; bytes are not copied
        info = self._retry_write(key, "put", lambda: self._client.put(key, body))
        self.counters.add("bytes_written", len(body))
        return info

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Send one PUT with If-None-Match: *."""
        return self._put_new(check_key(key), bytes(data)) is not None

    def _put_new(self, key: str, body: bytes) -> ObjectInfo | None:
        try:
            info = self._retry_write(key, "put_if_absent", lambda: self._client.put_new(key, body))
        except KeyExists:
            return None
        self.counters.add("bytes_written", len(body))
        return info

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """Start an upload that streams its parts in order, several at a time. Up to 16 MiB are written by one request.

        Args:
            key: Key of the object.
            if_absent: Whether complete(if_absent=True) will be called. More than 16 MiB then go through a temporary
                object.
        """
        return OrderedUpload(_Target(self, check_key(key), exclusive=if_absent))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete up to 1,000 objects per request if the store supports it."""
        wanted = [check_key(key) for key in keys]
        for start in range(0, len(wanted), _DELETE_KEYS):
            some = wanted[start : start + _DELETE_KEYS]
            try:
                self._delete(some)
            except NotFound:
                for key in some:  # this store reports missing objects, and stopped at the first one
                    with suppress(NotFound):
                        self._delete([key])

    def _delete(self, keys: Sequence[str]) -> None:
        self._retry_write(keys[0], "delete", lambda: self._client.delete(keys))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List by pages of 1,000 objects."""
        folder = check_key(prefix.removesuffix("/")) if prefix else ""
        after: str | None = None
        pages: Iterator[Sequence[Mapping[str, Any]]] | None = None

        def next_page(_limit: CallLimit) -> Sequence[Mapping[str, Any]] | None:
            nonlocal pages
            with self._client.errors(folder, "list"):
                try:
                    pages = self._client.pages(folder, after) if pages is None else pages
                    return next(pages, None)
                except BaseException:
                    pages = None  # the next attempt begins after the last key
                    raise

        while (page := self._retry_read(folder, "list", next_page)) is not None:
            for meta in page:
                info = to_object_info(meta["path"], meta)
                after = info.key
                if not any(segment.startswith(TEMP_PREFIX) for segment in info.key.split("/")):
                    yield info

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Copy on the server."""
        check_key(src)
        check_key(dst)
        self._retry_write(src, f"copy to {dst}", lambda: self._client.copy(src, dst))
        return self.head(dst)

    def publish_new(self, src: str, dst: str) -> ObjectInfo | None:
        """Rename an object to a free key. If the key exists, delete src and return None."""
        try:
            self._retry_write(src, "complete", lambda: self._client.copy_new(src, dst))
        except KeyExists:
            return None
        finally:
            with suppress(StoreError):  # a leftover temporary object is harmless; the first error says more
                self._delete([src])
        return self.head(dst)

    def put_whole(self, key: str, data: bytes, *, if_absent: bool) -> ObjectInfo | None:
        """Write a whole object and return its description, or None if if_absent is true and the key exists."""
        return self._put_new(key, data) if if_absent else self.put(key, data)

    @contextmanager
    def watched(self, key: str, doing: str) -> Iterator[None]:
        """Execute a step of an upload, whose requests obstore sends and retries itself."""
        with self._client.errors(key, doing), self._calls.track(self._call_limit(key, doing)):
            yield

    @property
    def client(self) -> Client:
        """Client that sends single requests."""
        return self._client


class _ObjectRead:
    """One read_into: all its ranges must be of one version of the object, named by if_match or by the first answer.

    The threads of the call share it; dict.setdefault is atomic.
    """

    def __init__(self, client: Client, key: str, if_match: str | None, piece_bytes: int, limit: CallLimit) -> None:
        self._client, self._key, self._piece_bytes, self._limit = client, key, piece_bytes, limit
        self._seen: dict[str, str] = {} if if_match is None else {"etag": if_match}
        self._n_landed: dict[int, int] = {}  # start of a request -> most bytes that any attempt has received

    def attempt(self, request: Request, landing: BufferGuard) -> None:
        """Send one request and copy its bytes into the buffers."""
        client, wanted = self._client, request.range
        etag = self._seen.get("etag")
        asked = None if etag is None or etag.startswith("W/") else etag  # HTTP: a weak ETag never matches If-Match
        try:
            with client.errors(self._key, "read_into"):
                info, body = client.range(self._key, wanted, asked, self._piece_bytes)
                self._check(info, wanted)
                n_read = _land(body, request, landing, self._note_landed)
        except ObjectChanged as error:
            raise ObjectChanged(url=client.url_of(self._key), expected=etag, found=error.found) from None
        except StoreError as error:
            if is_beyond_end(error):
                raise self._too_far(wanted, "before the range") from None
            raise
        if n_read != wanted.n_bytes and not landing.closed.is_set():
            message = f"read_into: received only {n_read} bytes of the range [{wanted.start}, {wanted.end})"
            raise StoreError(message, url=client.url_of(self._key), retryable=True)
        client.counters.add("bytes_read", n_read)

    def _note_landed(self, request: Request, n_bytes: int) -> None:
        """Record as progress the bytes that no earlier attempt has received."""
        if n_bytes > self._n_landed.get(request.range.start, 0):
            self._n_landed[request.range.start] = n_bytes
            self._limit.progressed()

    def _check(self, info: ObjectInfo, wanted: ByteRange) -> None:
        # Without an ETag, only the date tells a replaced object.
        name, found = ("etag", info.etag) if info.etag is not None else ("date", str(info.modified_s))
        expected = self._seen.setdefault(name, found)
        if found != expected:
            raise ObjectChanged(url=self._client.url_of(self._key), expected=expected, found=found)
        if info.n_bytes < wanted.end:
            raise self._too_far(wanted, f"at byte {info.n_bytes}")

    def _too_far(self, wanted: ByteRange, end: str) -> StoreError:
        return StoreError(f"a range ends at byte {wanted.end}, the object {end}", url=self._client.url_of(self._key))


def _land(
    body: Iterable[memoryview], request: Request, landing: BufferGuard, on_landed: Callable[[Request, int], None]
) -> int:
    """Copy the body to the request's pieces as it arrives. Return the number of bytes received."""
    n_read = 0
    for data in body:
        if landing.closed.is_set():
            break
        for offset, buffer in request.pieces:
            start, end = max(offset, n_read), min(offset + buffer.nbytes, n_read + data.nbytes)
            if start < end:
                landing.copy(buffer[start - offset : end - offset], data[start - n_read : end - n_read])
        n_read += data.nbytes
        on_landed(request, n_read)
    return n_read


class _Target:
    """Destination of an upload, for OrderedUpload, which does not depend on obstore."""

    def __init__(self, store: ObstoreStore, key: str, *, exclusive: bool) -> None:
        self.key, self.exclusive, self.part_bytes = key, exclusive, WRITER_PART_BYTES
        self._store = store
        self._streamed_key = f"{TEMP_PREFIX}{os.urandom(8).hex()}" if exclusive else key

    def put(self, data: bytes, *, if_absent: bool) -> ObjectInfo | None:
        """Write a small object in one request."""
        return self._store.put_whole(self.key, data, if_absent=if_absent)

    def begin(self) -> Any:
        """Return the writer of a new multipart upload."""
        return self._store.client.open_writer(self._streamed_key)

    def write(self, writer: Any, data: bytes) -> None:
        """Pass bytes to the writer, which blocks while too many parts are in flight."""
        with self._store.watched(self.key, "put_part"):
            writer.write(data)
        self._store.counters.add("bytes_written", len(data))

    def close(self, writer: Any, n_bytes: int, *, if_absent: bool) -> ObjectInfo | None:
        """Publish the bytes of the writer. Return None if if_absent is true and the key exists."""
        store = self._store
        with store.watched(self.key, "complete"):
            writer.close()
        if not self.exclusive:
            info: ObjectInfo | None = store.head(self.key)
        elif if_absent:
            info = store.publish_new(self._streamed_key, self.key)
        else:
            info = store.copy(self._streamed_key, self.key)
            store.delete([self._streamed_key])
        if info is not None and info.n_bytes != n_bytes:
            message = f"complete: sent {n_bytes} bytes, stored {info.n_bytes}"
            raise StoreError(message, url=store.client.url_of(self.key))
        return info

    def abort(self, writer: Any) -> None:
        """Discard the multipart upload."""
        with self._store.client.errors(self.key, "abort"):
            writer.__exit__(StoreError, None, None)


class CloudStore(Store):
    """A bucket, a container or an HTTP server. Each process that holds the store selects the client for itself."""

    def __init__(self, place: BucketFolder, options: CloudOptions, tuning: ReadSettings | None = None) -> None:
        self._place, self._options, self._tuning = place, options, tuning or ReadSettings()
        self.url = place.url
        self.counters = Counters("requests", "bytes_read", "bytes_written")
        self._here: ProcessLocal[Store] = ProcessLocal(self._open, lambda store: store.close())

    def __repr__(self) -> str:
        return f"CloudStore({self.url!r})"

    def __reduce__(self) -> tuple[type[CloudStore], tuple[BucketFolder, CloudOptions, ReadSettings]]:
        return CloudStore, (self._place, self._options, self._tuning)

    def _open(self) -> Store:
        if is_usable_here():
            return ObstoreStore(self._place, self._options, self._tuning, counters=self.counters)
        _warn_of_fork()
        store = _fallback_store(self._place, self._options, self._tuning)
        store.counters = self.counters
        return store

    @property
    def place(self) -> BucketFolder:
        """Bucket and folder of the store."""
        return self._place

    @property
    def options(self) -> CloudOptions:
        """Storage options, including credentials; never shown."""
        return self._options

    @property
    def cloud(self) -> str:
        """Kind of cloud: "s3", "gs", "az" or "http"."""
        return self._place.cloud

    @property
    def identity(self) -> tuple[str, ...]:
        """Cloud, endpoint, bucket and prefix: equal for stores of the same folder."""
        config = self._options.config
        endpoint = str(config.get("endpoint", config.get("account_name", ""))).rstrip("/")
        return self._place.cloud, endpoint, self._place.bucket, self._place.prefix

    @property
    def back_end(self) -> Store:
        """Store that does the work in this process."""
        return self._here.get()

    def head(self, key: str) -> ObjectInfo:
        """See Store.head."""
        return self.back_end.head(key)

    def get(self, key: str) -> bytes:
        """See Store.get."""
        return self.back_end.get(key)

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See Store.read_tail."""
        return self.back_end.read_tail(key, n_bytes)

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """See Store.read_into."""
        self.back_end.read_into(key, spans, if_match=if_match, deadline_s=deadline_s, cancel=cancel)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """See Store.put."""
        return self.back_end.put(key, data)

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """See Store.put_if_absent."""
        return self.back_end.put_if_absent(key, data)

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """See Store.create."""
        return self.back_end.create(key, if_absent=if_absent)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store.delete."""
        self.back_end.delete(keys)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list."""
        return self.back_end.list(prefix)

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """See Store.copy."""
        return self.back_end.copy(src, dst)

    def close(self) -> None:
        """Close this process's back end."""
        self._here.drop()


def _fallback_store(place: BucketFolder, options: CloudOptions, tuning: ReadSettings) -> Store:
    if place.cloud == "http":
        given = options.for_fsspec_http()
        return FsspecStore(place.bucket, place.url, given, policy=tuning.policy, timeout_s=options.timeout_s)
    if place.cloud != "s3":
        message = "obstore cannot be used in this forked process; start workers with forkserver or spawn"
        raise StoreError(message, url=place.url)
    if options.unknown_to_s3fs:
        names = ", ".join(options.unknown_to_s3fs)
        message = (
            f"this forked process reads S3 by s3fs, which does not support {names}; start it with forkserver or spawn"
        )
        raise StoreError(message, url=place.url)
    full_url = f"s3://{place.bucket}/{place.prefix}".rstrip("/")
    return FsspecStore(full_url, place.url, {}, policy=tuning.policy, timeout_s=options.timeout_s, s3=options)


_warned = False


def _warn_of_fork() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "this process was forked from a process that had used obstore, which does not survive a fork: S3 is read "
            "by s3fs, which is slower; start workers with forkserver or spawn",
            RuntimeWarning,
            stacklevel=4,
        )
