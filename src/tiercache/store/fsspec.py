"""Stores through fsspec: all other URLs, and S3 through s3fs where obstore cannot be used (forked children)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from threading import Event, Lock
from typing import Any, TypeVar

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, Span, Store, Upload, check_key
from tiercache.store.credentials import Credentials, Keys, refused_error, s3_access, wait_target
from tiercache.store.fsspec_errors import exists_already, is_conflict, may_have_taken_effect, to_store_error
from tiercache.store.fsspec_files import FileSystemAdapter, GenericAdapter, KeyExists, S3fsAdapter
from tiercache.store.landing import BufferGuard, ProcessLocal, read_requests, worker_pool
from tiercache.store.options import CloudOptions
from tiercache.store.posix import TEMP_PREFIX
from tiercache.store.retry import TIMEOUT_S, AbandonableAttempts, CallLimit, CallMonitor, RetryPolicy, with_retries
from tiercache.store.spans import Request, RequestSizes, check_spans, plan_requests
from tiercache.store.urls import redact, server_url
from tiercache.waiting import SYSTEM_CLOCK

T = TypeVar("T")

_N_THREADS = 8
_SIZES = RequestSizes()


class FsspecStore(Store):
    """Objects of any fsspec file system. Safe for threads; each process creates its own file system.

    On S3 the store fulfils the whole contract. Elsewhere it depends on the file system: put_if_absent lets one writer
    win in this process, and among processes if the file system supports mode="create"; if_match compares info() before
    and after the read.
    """

    def __init__(
        self,
        full_url: str,
        url: str,
        options: Mapping[str, Any],
        *,
        policy: RetryPolicy | None = None,
        make: Callable[[], Any] | None = None,
        timeout_s: float = TIMEOUT_S,
        s3: CloudOptions | None = None,
    ) -> None:
        """Store the arguments without opening the file system.

        Args:
            full_url: URL of the folder, including secrets; with make, the folder's path in that file system.
            url: URL of the folder for messages.
            options: Options of the file system.
            policy: Retries.
            make: Function that returns a file system that is not shared and does not cache listings; picklable.
            timeout_s: Seconds without progress after which a call is not retried.
            s3: Options of S3 that name the source of the keys; used instead of options.
        """
        self._full_url, self._options, self._policy = full_url, dict(options), policy or RetryPolicy()
        self._make, self._timeout_s, self._s3 = make, timeout_s, s3
        self._calls = CallMonitor()
        self.url = url
        self.counters = Counters("requests", "bytes_read", "bytes_written")
        self._pool = worker_pool(_N_THREADS)
        self._files_here: ProcessLocal[_ProcessFileSystem] = ProcessLocal(self._open, lambda opened: opened.close())

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self._full_url, self.url, self._options, self._policy, self._make, self._timeout_s, self._s3)
        return _rebuild, given

    def _open(self) -> _ProcessFileSystem:
        if self._make is not None:
            return _ProcessFileSystem(partial(_made_files, self._make, self._full_url), None, self.url)
        if self._s3 is None:
            endpoint = server_url("http", self.url, {}) if self.url.startswith("http") else self.url
            return _ProcessFileSystem(partial(_open_files, self._full_url, self._options), None, endpoint)
        config, credentials = s3_access(self._s3, self.url)
        endpoint = server_url("s3", self.url, config)
        options = {**self._options, **replace(self._s3, config=config).for_s3fs()}
        if credentials is None:
            return _ProcessFileSystem(partial(_open_files, self._full_url, options), None, endpoint)
        return _ProcessFileSystem(
            lambda keys: _open_files(self._full_url, options | _named(keys)), credentials, endpoint
        )

    def _awaited(self) -> str:
        """Return what a call waits for now, for messages. fsspec does not say which server a file system uses."""
        opened = self._files_here.get()
        return wait_target(opened.endpoint, opened.credentials)

    @property
    def _files(self) -> FileSystemAdapter:
        return self._files_here.get().files()

    def _call_limit(
        self, key: str, doing: str, deadline_s: float | None = None, cancel: Event | None = None
    ) -> CallLimit:
        at = self._at(key)
        return CallLimit(
            at, doing, deadline_s, cancel, clock=SYSTEM_CLOCK, timeout_s=self._timeout_s, endpoint=self._awaited
        )

    def close(self) -> None:
        """End the threads of this process and close its file system's connections."""
        self._calls.close()
        self._pool.drop()
        self._files_here.drop()

    def head(self, key: str) -> ObjectInfo:
        """Return the description from the file system's info()."""
        check_key(key)
        return self._retry_read(key, "head", lambda: self._files.info(key))

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        check_key(key)
        data = self._retry_read(key, "get", lambda: self._files.read(key, None, None)[0])
        self.counters.add("bytes_read", len(data))
        return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Read by one request on S3, and by info() and a range elsewhere."""
        check_key(key)
        if n_bytes <= 0:
            return b"", self.head(key)
        tail, info = self._retry_read(key, "read_tail", lambda: self._files.read_tail(key, n_bytes))
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
        """Read the ranges in parallel, all of one version of the object."""
        check_key(key)
        check_spans(spans)
        limit = self._call_limit(key, "read_into", deadline_s, cancel)
        requests = plan_requests(spans, _SIZES)
        seen: dict[str, str] = {} if if_match is None else {"etag": if_match}
        checks = not self._files.is_conditional and (if_match is not None or len(requests) > 1)
        if checks:
            self._check_unchanged(key, seen)

        def read_one(request: Request, landing: BufferGuard) -> None:
            with_retries(
                lambda: self._attempt(key, request, landing, seen),
                self._policy,
                limit,
                stop=landing.stop,
                abandons="all",
            )
            limit.progressed()

        landing = BufferGuard()
        with self._calls.track(limit, landing.stop):
            read_requests(requests, read_one, self._pool, limit, landing)
        if checks:
            self._check_unchanged(key, seen)

    def _attempt(self, key: str, request: Request, landing: BufferGuard, seen: dict[str, str]) -> None:
        wanted = request.range
        try:
            with self._errors(key, "read_into"):
                data, etag = self._files.read(key, wanted.start, wanted.end, seen.get("etag"))
        except ObjectChanged:
            raise ObjectChanged(url=self._at(key), expected=seen.get("etag")) from None
        except StoreError as error:
            if error.facts.get("status") != 416:
                raise
            data, etag = b"", None
        if etag is not None and seen.setdefault("etag", etag) != etag:
            raise ObjectChanged(url=self._at(key), expected=seen["etag"], found=etag)
        if len(data) != wanted.n_bytes:
            n_bytes = self.head(key).n_bytes
            raise StoreError(
                f"a range ends at byte {wanted.end}, the object at byte {n_bytes}; received {len(data)} bytes",
                url=self._at(key),
                retryable=n_bytes >= wanted.end,
            )
        view = memoryview(data)
        for offset, buffer in request.pieces:
            landing.copy(buffer, view[offset : offset + buffer.nbytes])
        self.counters.add("bytes_read", len(data))

    def _check_unchanged(self, key: str, seen: dict[str, str]) -> None:
        etag = self.head(key).etag or ""
        if seen.setdefault("etag", etag) != etag:
            raise ObjectChanged(url=self._at(key), expected=seen["etag"], found=etag)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Write the whole object."""
        check_key(key)
        body = bytes(data)
        info = self._retry(key, "put", lambda: self._files.write(key, body))
        self.counters.add("bytes_written", len(body))
        return info

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write the whole object with the file system's mode="create"."""
        check_key(key)
        body = bytes(data)

        def attempt() -> bool:
            with self._conditional(key, "put_if_absent"):
                self._files.write_new(key, body)
            self.counters.add("bytes_written", len(body))
            return True

        try:
            return self._calls.retrying(attempt, self._policy, self._call_limit(key, "put_if_absent"))
        except KeyExists:
            return False

    def create(self, key: str, *, if_absent: bool = False) -> Upload:  # noqa: ARG002 - complete() decides
        """Start an upload: a multipart upload on S3; elsewhere the parts stay on the local disk until complete()."""
        check_key(key)
        with self._errors(key, "create"):
            parts = self._files.begin(key)
        return _FilesUpload(self, key, parts)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete one by one."""
        wanted = [check_key(key) for key in keys]
        if wanted:
            self._retry(wanted[0], "delete", lambda: self._files.delete(wanted))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List by the file system's find()."""
        folder = check_key(prefix.removesuffix("/")) if prefix else ""
        found = self._retry_read(prefix, "list", lambda: self._files.find(folder))
        for info in found:
            if not any(segment.startswith(TEMP_PREFIX) for segment in info.key.split("/")):
                yield info

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Copy by the file system."""
        check_key(src)
        check_key(dst)
        self._retry(src, f"copy to {dst}", lambda: self._files.copy(src, dst))
        return self.head(dst)

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _retry_read(self, key: str, doing: str, attempt: Callable[[], T]) -> T:
        """Return the result of a read-only request. A request whose time is over is abandoned with its thread."""
        return self._retry(key, doing, attempt, abandons="all")

    def _retry(self, key: str, doing: str, attempt: Callable[[], T], *, abandons: AbandonableAttempts = "none") -> T:
        def guarded() -> T:
            with self._errors(key, doing):
                return attempt()

        return self._calls.retrying(guarded, self._policy, self._call_limit(key, doing), abandons=abandons)

    @contextmanager
    def _errors(self, key: str, doing: str) -> Iterator[None]:
        self.counters.add("requests")
        credentials = self._files_here.get().credentials
        number = 0 if credentials is None else credentials.number
        try:
            yield
        except (StoreError, KeyExists):
            raise
        except Exception as error:  # noqa: BLE001 - raised as a StoreError
            # A file system raises its client's errors. From None, because their text may contain a signed URL.
            raise refused_error(to_store_error(error, doing, self._at(key)), credentials, number) from None

    @contextmanager
    def _conditional(self, key: str, doing: str) -> Iterator[None]:
        """Convert the errors of a conditional write: Taken if the key exists, .maybe_done if the answer was lost."""
        self.counters.add("requests")
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised as a StoreError
            if exists_already(error) and not is_conflict(error):
                raise KeyExists from None
            ours = to_store_error(error, doing, self._at(key))
            if not may_have_taken_effect(ours):
                raise ours from None
            message = f"{doing}: the answer was lost, so the object may or may not have been written ({ours.message})"
            raise StoreError(message, url=self._at(key), retryable=True, maybe_done=True) from None


class _FilesUpload(Upload):
    """An upload through the parts object that the file system's begin() returned."""

    def __init__(self, store: FsspecStore, key: str, parts: Any) -> None:
        self._store, self._key, self._parts = store, key, parts
        self._is_open = True

    def put_part(self, number: int, data: Buffer) -> None:
        """Send the part."""
        if number < 0 or not self._is_open:
            raise ValueError(f"{self._key}: part {number}: numbers start at 0; add parts before complete() or abort()")
        body = bytes(data)
        self._store._retry(self._key, f"put_part {number}", lambda: self._parts.put(number, body))  # noqa: SLF001
        self._store.counters.add("bytes_written", len(body))

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish the parts."""
        if not self._is_open:
            raise ValueError(f"{self._key}: the upload is already completed or aborted")
        self._parts.check()
        self._is_open = False
        try:
            with self._store._conditional(self._key, "complete"):  # noqa: SLF001 - same module
                self._parts.complete(if_absent=if_absent)
        except KeyExists:
            self._drop()
            return None
        except StoreError:
            self._drop()
            raise
        return self._store.head(self._key)

    def abort(self) -> None:
        """Discard the parts."""
        if self._is_open:
            self._is_open = False
            self._drop()

    def _drop(self) -> None:
        with suppress(StoreError), self._store._errors(self._key, "abort"):  # noqa: SLF001
            self._parts.abort()


def check_scheme(scheme: str) -> None:
    """Return if fsspec knows the scheme (its package may still be missing).

    Raises:
        ValueError: fsspec does not know the scheme.
    """
    known = importlib.import_module("fsspec").available_protocols()
    if scheme not in known:
        near = get_close_matches(scheme, known, n=3)
        meant = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"no store for {scheme}://{meant}")


def _rebuild(
    full_url: str,
    url: str,
    options: Mapping[str, Any],
    policy: RetryPolicy,
    make: Callable[[], Any] | None,
    timeout_s: float,
    s3: CloudOptions | None,
) -> FsspecStore:
    return FsspecStore(full_url, url, options, policy=policy, make=make, timeout_s=timeout_s, s3=s3)


class _ProcessFileSystem:
    """This process's file system, created again when the keys change. Safe for threads."""

    def __init__(self, make: Callable[..., FileSystemAdapter], credentials: Credentials | None, endpoint: str) -> None:
        self.credentials, self.endpoint = credentials, endpoint
        self._make, self._lock = make, Lock()
        self._keys: Keys | None = None
        self._all: list[FileSystemAdapter] = []  # the last one is current; other threads may still use earlier ones

    def files(self) -> FileSystemAdapter:
        """Return the file system with keys that are valid now."""
        keys = None if self.credentials is None else self.credentials.get()
        with self._lock:
            if not self._all or keys != self._keys:
                self._all.append(self._make() if keys is None else self._make(keys))
                self._keys = keys
            return self._all[-1]

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            for files in self._all:
                files.close()
            self._all.clear()


def _named(keys: Keys) -> dict[str, Any]:
    named = {"key": keys.access_key_id, "secret": keys.secret_access_key}
    return named if keys.token is None else named | {"token": keys.token}


def _open_files(full_url: str, options: Mapping[str, Any]) -> FileSystemAdapter:
    core = importlib.import_module("fsspec.core")
    scheme = full_url.partition("://")[0]
    more = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    # No cached instances (other code shares them) and no cached listings (other programs write too).
    common = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        fs, root = core.url_to_fs(full_url, **common, **more, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise StoreError(f"the file system cannot be opened: {error}", url=redact(full_url)) from None
    if fs.protocol == "dir":
        root = ""  # the file system is the folder itself, and its names are relative to it
    return _files_of(fs, root)


def _made_files(make: Callable[[], Any], root: str) -> FileSystemAdapter:
    return _files_of(make(), root)


def _files_of(fs: Any, root: str) -> FileSystemAdapter:
    if "s3" not in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol):
        return GenericAdapter(fs, root)
    asyn = importlib.import_module("fsspec.asyn")
    return S3fsAdapter(fs, root, lambda coroutine, *args: asyn.sync(fs.loop, coroutine, *args))
