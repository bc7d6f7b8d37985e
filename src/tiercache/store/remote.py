"""A store that is reached by requests: RemoteStore retries and parallelises the single requests of an ObjectClient.

obstore.py and fsspec.py have the clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event
from typing import Protocol, TypeVar

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.stats import Counters
from tiercache.store.calls import Attempt, CallLimit, RequestRunner, RetryPolicy
from tiercache.store.contract import Buffer, ProcessLocal, Receive, SequentialUpload, Span, Store, Upload, check_key
from tiercache.store.options import CallOptions
from tiercache.store.posix import TEMP_PREFIX
from tiercache.store.ranges import (
    Landing,
    Request,
    RequestCosts,
    check_spans,
    land_in_buffers,
    land_in_pieces,
    plan_requests,
    untouched_spans,
)
from tiercache.waiting import SYSTEM_CLOCK, Clock

T = TypeVar("T")

# Every failure of a server, such as 520 to 529 of content delivery networks, but what it does not implement or allow.
RETRYABLE_STATUSES = frozenset((408, 425, 429, *range(500, 600))) - {501, 505, 511}
# Statuses with which the server says that it did not execute the request; after other errors of a write this is
# unknown.
_NOT_EXECUTED = (429, 501, 503)
# Statuses with which a server refuses the condition of a put, which it does not implement.
_UNCONDITIONAL = (405, 501)
# The name of an unfinished write, which no listing shows.
_PROBE_KEY = f"{TEMP_PREFIX}conditional-put"
# S3's codes of a status 409 with which it refuses a write because another one of the key is running.
CONFLICT_CODES = ("ConditionalRequestConflict", "OperationAborted")
# Statuses with which the server says that it gets too many requests; S3 sends 503 SlowDown.
_THROTTLED = (429, 503)
_BEYOND_END = 416
_DELETE_KEYS = 1000
# An object of at most this size is written by one request, also with if_absent.
_HOLD_BYTES = 16 << 20
_ONE_ATTEMPT = RetryPolicy(n_attempts=1)


class KeyExists(Exception):
    """The key exists."""


class ObjectWriter(Protocol):
    """A large object that is written in order. One thread at a time uses it."""

    def write(self, data: bytes) -> object:
        """Append data."""

    def close(self) -> object:
        """Publish the object."""

    def abort(self) -> object:
        """Discard the object."""


class ObjectClient(ABC):
    """Single requests to a store by one client library, not retried. Safe for threads.

    The methods raise the library's own errors. errors() converts them to StoreError, with .status, .code and details:
    "sent" is False if the request was never sent, and "exists" says that a conditional write was refused because the
    key exists.

    Attributes:
        url: URL of the folder, for messages.
        counters: Counters of the store; the client counts "requests".
        checks_etag: Whether range() enforces if_match. Otherwise the store compares descriptions before and after.
    """

    url: str
    counters: Counters
    checks_etag = True

    def url_of(self, key: str) -> str:
        """Return the URL of a key, for messages."""
        return f"{self.url}/{key}" if key else self.url

    @abstractmethod
    def wait_target(self) -> str:
        """Return the name of what a request waits for now: the server, or the source of the credentials."""

    @abstractmethod
    def errors(self, key: str, doing: str) -> AbstractContextManager[None]:
        """Count a request, and convert the library's errors to StoreError."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Return the description of an object."""

    @abstractmethod
    def get(self, key: str, on_piece: Callable[[], object]) -> bytes:
        """Return a whole object; call on_piece for each piece of the body that has arrived."""

    @abstractmethod
    def tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Return the end of an object."""

    @abstractmethod
    def range(
        self, key: str, byte_range: ByteRange, if_match: str | None
    ) -> tuple[ObjectInfo | None, Iterable[memoryview]]:
        """Request a range. Return the description of the object if the answer has it, and the body in pieces."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> ObjectInfo:
        """Write a whole object."""

    @abstractmethod
    def put_new(self, key: str, body: bytes) -> ObjectInfo | None:
        """Write a whole object if the key is free. Return the object if the answer describes it."""

    def put_new_by_store(self, key: str, body: bytes) -> None:
        """Write a whole object if the key is free, by nothing but the store's own condition."""
        self.put_new(key, body)

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects. May fail if one of them does not exist."""

    @abstractmethod
    def pages(self, folder: str, after: str | None) -> Iterator[Sequence[ObjectInfo]]:
        """Yield the pages of a listing after a key."""

    @abstractmethod
    def copy(self, src: str, dst: str) -> None:
        """Copy an object, replacing an existing one."""

    @abstractmethod
    def open_writer(self, key: str) -> ObjectWriter:
        """Return the writer of a large object."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


def _may_have_taken_effect(error: StoreError) -> bool:
    """Return whether a failed write may have taken effect: it was sent, and no answer says that it was refused."""
    if error.status is not None:
        return int(error.status) >= 500 and error.status not in _NOT_EXECUTED
    return bool(error.details.get("sent", False)) and bool(error.retryable)


# With 8 MiB and 20 ms, 16 requests fill 6 GB/s; with 1 MiB and 50 ms, 32 fill 660 MB/s.
N_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How a store reads.

    Attributes:
        policy: Retries of a request.
        costs: Costs of requests, from which their ranges follow.
        n_requests: Number of requests that run at once, unless the storage option `concurrency` says another.
        clock: Clock of the time limits.
        hedges: Whether late requests get a second attempt beside them.
    """

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    costs: RequestCosts = field(default_factory=RequestCosts)
    n_requests: int = N_REQUESTS
    clock: Clock = SYSTEM_CLOCK
    hedges: bool = True


class RemoteStore(Store):
    """Objects that an ObjectClient reads and writes. Each process creates its client and threads at first use.

    Safe for threads. A subclass opens the client. If the user promises that one process writes at a time, conditional
    puts are a look at the key and a put.

    Attributes:
        knows_conditional_put: Whether the kind of the store alone says that it has conditional puts.
    """

    knows_conditional_put = False

    def __init__(self, url: str, options: CallOptions, settings: ReadSettings) -> None:
        self.url, self.call_options, self._settings = url, options, settings
        self._may_commit = options.is_single_writer  # or known from a test of conditional puts
        self.counters = Counters("requests", "bytes_read", "bytes_written", "retries", "hedges", "throttled")
        self._client: ProcessLocal[ObjectClient] = ProcessLocal(self._open_client, lambda client: client.close())
        self._runner = ProcessLocal(self._open_runner, RequestRunner.close)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def _open_client(self) -> ObjectClient:
        """Return a new client for this process, without sending a request."""

    def _open_runner(self) -> RequestRunner:
        chosen = self._settings
        n_requests = self.call_options.concurrency or chosen.n_requests
        return RequestRunner(n_requests, chosen.policy, chosen.clock, self.counters, hedges=chosen.hedges)

    def _count_throttled(self, error: StoreError) -> None:
        if error.status in _THROTTLED:
            self.counters.add("throttled")

    @property
    def client(self) -> ObjectClient:
        """This process's client, which sends single requests."""
        return self._client.get()

    def close(self) -> None:
        """End the threads of this process and close its connections. Running calls are not retried any more."""
        self._runner.drop()
        self._client.drop()

    def call_limit(
        self, key: str, doing: str, deadline_s: float | None = None, cancel: Event | None = None
    ) -> CallLimit:
        """Return the time limits of a new call."""
        client = self.client
        return CallLimit(
            client.url_of(key),
            doing,
            deadline_s,
            cancel,
            clock=self._settings.clock,
            timeout_s=self.call_options.timeout_s,
            endpoint=client.wait_target,
            on_failure=self._count_throttled,
            counters=self.counters,
        )

    def _read(self, key: str, doing: str, request: Callable[[ObjectClient, Attempt], T], *, hedges: bool = True) -> T:
        """Return the result of a read-only request."""

        def send(attempt: Attempt) -> T:
            client = self.client
            with client.errors(key, doing):
                return request(client, attempt)

        result: T = self._runner.get().run([send], self.call_limit(key, doing), hedges=hedges)[0]
        return result

    def _write(self, key: str, doing: str, request: Callable[[ObjectClient], T], *, is_conditional: bool = False) -> T:
        """Return the result of a write request.

        Its last attempt is always awaited, because its effect would be unknown otherwise. A conditional write is not
        repeated after a lost answer, because it would find its own object: it raises StoreError with .maybe_done, or
        KeyExists.
        """

        def send(_attempt: Attempt) -> T:
            client = self.client
            try:
                with client.errors(key, doing):
                    return request(client)
            except StoreError as error:
                if not is_conditional:
                    raise
                if error.details.get("exists"):
                    raise KeyExists from None
                if not _may_have_taken_effect(error):
                    raise
                lost = f"{doing}: the answer was lost, so the object may or may not have been written ({error.message})"
                raise StoreError(lost, url=client.url_of(key), retryable=True, maybe_done=True) from None

        result: T = self._runner.get().run([send], self.call_limit(key, doing), is_write=True)[0]
        return result

    def head(self, key: str) -> ObjectInfo:
        """Send one HEAD."""
        check_key(key)
        return self._read(key, "head", lambda client, _attempt: client.head(key))

    def get(self, key: str) -> bytes:
        """Send one GET."""
        check_key(key)
        data = self._read(key, "get", lambda client, attempt: client.get(key, attempt.received))
        self.counters.add("bytes_read", len(data))
        return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Send one GET with a suffix range; HEAD and GET if the store has no suffix ranges or the object is empty."""
        check_key(key)
        if n_bytes <= 0:
            return b"", self.head(key)
        tail, info = self._read(key, "read_tail", lambda client, _attempt: client.tail(key, n_bytes))
        self.counters.add("bytes_read", len(tail))
        return tail, info

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
        requests = plan_requests(spans, self._settings.costs)
        limit = self.call_limit(key, "read_into", deadline_s, cancel)
        self._read_requests(key, [(request, land_in_buffers(request)) for request in requests], if_match, limit)

    def read_pieces(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        receive: Receive,
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Pass pieces of the client's buffers to receive(). All ranges are of one version of the object."""
        check_key(key)
        # Of this size, no range is split into two requests.
        extent_bytes = max((one.end for one in ranges), default=0) - min((one.start for one in ranges), default=0)
        costs = replace(self._settings.costs, max_bytes=max(extent_bytes, 1))
        requests = plan_requests(untouched_spans(ranges), costs)
        limit = self.call_limit(key, "read_pieces", deadline_s, cancel)
        self._read_requests(key, [(request, land_in_pieces(request, receive)) for request in requests], if_match, limit)

    def _read_requests(
        self, key: str, requests: Sequence[tuple[Request, Landing]], if_match: str | None, limit: CallLimit
    ) -> None:
        """Execute the requests of one call. After it has returned or raised, no bytes are stored."""
        client = self.client
        reading = _ObjectRead(client, key, if_match, limit)
        compares = not client.checks_etag and (if_match is not None or len(requests) > 1)
        if compares:
            reading.check_etag(self.head(key))
        try:
            sends = [partial(reading.attempt, request.range, landing) for request, landing in requests]
            self._runner.get().run(sends, limit)
        finally:
            for _, landing in requests:
                landing.close()  # an attempt that was overtaken or abandoned may still run
        if compares:
            reading.check_etag(self.head(key))

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Send one PUT."""
        check_key(key)
        body = bytes(data)  # a connection may hold the body longer than the call; bytes are not copied
        info = self._write(key, "put", lambda client: client.put(key, body))
        self.counters.add("bytes_written", len(body))
        return info

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Send one PUT with If-None-Match: *."""
        try:
            self.put_new(check_key(key), bytes(data))
        except KeyExists:
            return False
        return True

    def put_new(self, key: str, body: bytes) -> ObjectInfo | None:
        """As put_if_absent(). Return the new object if the answer describes it. Raises KeyExists."""
        if self.call_options.is_single_writer:
            with suppress(NotFound):
                self.head(key)
                raise KeyExists
            return self.put(key, body)
        info = self._write(key, "put_if_absent", lambda client: client.put_new(key, body), is_conditional=True)
        self.counters.add("bytes_written", len(body))
        return info

    def require_conditional_put(self) -> None:
        """Test the store once, by up to three requests: it must refuse the second of two puts of one key."""
        if self._may_commit or self.knows_conditional_put:
            return
        was_created, reason = False, "the store ignores the condition of a put"
        try:
            try:
                self._put_probe()
            except StoreError as error:
                if not error.maybe_done:
                    raise
            was_created = True
            self._put_probe()  # must be refused
        except KeyExists:
            self._may_commit = True
        except StoreError as error:
            if error.status not in _UNCONDITIONAL and not error.details.get("unsupported"):
                raise
            reason = error.message
        finally:
            if was_created:  # else another process tests the store now, or its test was interrupted
                with suppress(StoreError):
                    self.delete([_PROBE_KEY])
        if not self._may_commit:
            raise StoreError(
                f"{reason}: of two writers that commit at the same time, one would lose its data without an error; if "
                "only one process writes at a time, say so with storage_options={'single_writer': True}",
                url=self.url,
            )

    def _put_probe(self) -> None:
        def put(client: ObjectClient) -> None:
            client.put_new_by_store(_PROBE_KEY, b"")

        self._write(_PROBE_KEY, "put_if_absent", put, is_conditional=True)

    def create(self, key: str) -> Upload:
        """Start an upload that streams its parts. Up to 16 MiB are written by one request."""
        return _RemoteUpload(self, check_key(key))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete up to 1,000 objects per request if the store supports it."""

        def delete(keys: Sequence[str]) -> None:
            self._write(keys[0], "delete", lambda client: client.delete(keys))

        wanted = [check_key(key) for key in keys]
        for start in range(0, len(wanted), _DELETE_KEYS):
            some = wanted[start : start + _DELETE_KEYS]
            try:
                delete(some)
            except NotFound:
                for key in some:  # this store reports missing objects, and stopped at the first one
                    with suppress(NotFound):
                        delete([key])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List by pages of 1,000 objects."""
        folder = check_key(prefix.removesuffix("/")) if prefix else ""
        after: str | None = None
        pages: Iterator[Sequence[ObjectInfo]] | None = None

        def next_page(client: ObjectClient, _attempt: Attempt) -> Sequence[ObjectInfo] | None:
            nonlocal pages
            try:
                pages = client.pages(folder, after) if pages is None else pages
                return next(pages, None)
            except BaseException:
                pages = None  # the next attempt begins after the last key
                raise

        # Without hedges: a page follows from the page before, so two attempts must not run at once.
        while (page := self._read(folder, "list", next_page, hedges=False)) is not None:
            for info in page:
                after = info.key
                if not any(segment.startswith(TEMP_PREFIX) for segment in info.key.split("/")):
                    yield info

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Copy on the server, if the store supports that."""
        check_key(src)
        check_key(dst)
        self._write(src, f"copy to {dst}", lambda client: client.copy(src, dst))
        return self.head(dst)

    def open_writer(self, key: str) -> ObjectWriter:
        """Return the writer of a new large object."""
        return self._write(key, "create", lambda client: client.open_writer(key))

    def write(self, key: str, writer: ObjectWriter, data: bytes) -> None:
        """Append data to the writer, which may block while too many parts are in flight."""
        with self.client.errors(key, "put_part"):
            writer.write(data)
        self.counters.add("bytes_written", len(data))

    def publish(self, key: str, writer: ObjectWriter, n_bytes: int) -> ObjectInfo:
        """Publish a large object."""

        def close(_attempt: Attempt) -> None:
            with self.client.errors(key, "complete"):
                writer.close()

        self._runner.get().run([close], self.call_limit(key, "complete"), is_write=True, policy=_ONE_ATTEMPT)
        info = self.head(key)
        if info.n_bytes != n_bytes:
            raise StoreError(f"complete: sent {n_bytes} bytes, stored {info.n_bytes}", url=self.client.url_of(key))
        return info

    def discard(self, key: str, writer: ObjectWriter) -> None:
        """Discard a large object. If this fails, its parts stay until a lifecycle rule of the bucket removes them."""
        with suppress(StoreError), self.client.errors(key, "abort"):
            writer.abort()


class _ObjectRead:
    """One read_into: all its ranges must be of one version of the object, named by if_match or by the first answer.

    The threads of the call share it; dict.setdefault is atomic.
    """

    def __init__(self, client: ObjectClient, key: str, if_match: str | None, limit: CallLimit) -> None:
        self._client, self._key, self._limit = client, key, limit
        self._seen: dict[str, str] = {} if if_match is None else {"etag": if_match}

    def attempt(self, byte_range: ByteRange, landing: Landing, attempt: Attempt) -> None:
        """Send one request and store its bytes.

        It continues after the bytes of earlier attempts, if the answer says that they are of the same version.
        """
        client = self._client
        etag = self._seen.get("etag")
        condition = None if etag is None or etag.startswith("W/") else etag  # HTTP: a weak ETag never matches If-Match
        start = landing.n_bytes if self._seen else 0
        wanted = ByteRange(byte_range.start + start, byte_range.end)
        if not wanted.n_bytes:
            return  # another attempt has brought the rest, and is about to end
        position, info = start, None
        try:
            with client.errors(self._key, "read_into"):
                info, body = client.range(self._key, wanted, condition)
                if info is not None:
                    self.check_etag(info)
                    self._check_end(info.n_bytes, byte_range)
                for data in body:
                    if attempt.is_over or landing.error is not None:
                        break
                    is_new = landing.add(position, data)
                    position += data.nbytes
                    attempt.received(has_new=is_new)  # bytes that had come before are no progress
        except ObjectChanged as error:
            raise ObjectChanged(url=client.url_of(self._key), expected=etag, found=error.found) from None
        except StoreError as error:
            if error.status == _BEYOND_END:
                raise self._too_far(byte_range, "before the range") from None
            raise
        finally:
            client.counters.add("bytes_read", position - start)
        if landing.error is not None:
            raise landing.error
        if position != byte_range.end - byte_range.start and not attempt.is_over:
            if info is None:
                with client.errors(self._key, "head"):
                    info = client.head(self._key)
                self._check_end(info.n_bytes, byte_range)
            message = f"read_into: received only {position - start} bytes of the range [{wanted.start}, {wanted.end})"
            raise StoreError(message, url=client.url_of(self._key), retryable=True)

    def check_etag(self, info: ObjectInfo) -> None:
        """Raise ObjectChanged if the description is that of another version than those seen before."""
        # Without an ETag, only the date tells a replaced object.
        name, found = ("etag", info.etag) if info.etag is not None else ("date", str(info.modified_s))
        expected = self._seen.setdefault(name, found)
        if found != expected:
            raise ObjectChanged(url=self._client.url_of(self._key), expected=expected, found=found)

    def _check_end(self, n_bytes: int, byte_range: ByteRange) -> None:
        if n_bytes < byte_range.end:
            raise self._too_far(byte_range, f"at byte {n_bytes}")

    def _too_far(self, byte_range: ByteRange, end: str) -> StoreError:
        return StoreError(
            f"a range ends at byte {byte_range.end}, the object {end}", url=self._client.url_of(self._key)
        )


class _RemoteUpload(SequentialUpload):
    """An upload that holds the first 16 MiB, which one request can write, and streams a longer object."""

    def __init__(self, store: RemoteStore, key: str) -> None:
        super().__init__(key)
        self._store = store
        self._held: list[bytes] = []
        self._n_bytes = 0
        self._writer: ObjectWriter | None = None

    def append(self, data: memoryview) -> None:
        self._n_bytes += data.nbytes
        self._held.append(bytes(data))
        if self._writer is None and self._n_bytes > _HOLD_BYTES:
            self._writer = self._store.open_writer(self.key)
        if self._writer is not None:
            held, self._held = self._held, []
            for part in held:
                self._store.write(self.key, self._writer, part)

    def publish(self, *, if_absent: bool) -> ObjectInfo | None:
        """Publish the object. obstore cannot complete a long object under a condition, so the key is checked before."""
        if self._writer is None:
            data = b"".join(self._held)
            if not if_absent:
                return self._store.put(self.key, data)
            try:
                return self._store.put_new(self.key, data) or self._store.head(self.key)
            except KeyExists:
                return None
        if if_absent:
            with suppress(NotFound):
                self._store.head(self.key)
                return None
        info = self._store.publish(self.key, self._writer, self._n_bytes)
        self._writer = None  # after an error, discard() aborts it
        return info

    def discard(self) -> None:
        self._held = []
        writer, self._writer = self._writer, None
        if writer is not None:
            self._store.discard(self.key, writer)
