"""Stores through fsspec: all other URLs, and S3 through s3fs where obstore cannot be used (forked children)."""

from __future__ import annotations

import errno
import importlib
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, Span, Store, Upload, check_key, parts_in_order
from tiercache.store.credentials import Credentials, Keys, refused_error, s3_access, wait_target
from tiercache.store.options import CloudOptions, redact, server_url
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
from tiercache.store.retry import TIMEOUT_S, AbandonableAttempts, CallLimit, CallMonitor, RetryPolicy, with_retries
from tiercache.waiting import SYSTEM_CLOCK

_SECRET = re.compile(r"\?[^\s\"',)]*|(?<=://)[^/\s@\"']*@")
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_NOT_DONE = (429, 503)
_RETRYABLE = (errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE)
_NOT_SENT = ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ConnectionRefusedError")
_BROKEN = (
    "ReadTimeoutError", "ConnectionClosedError", "ResponseStreamingError", "IncompleteReadError", "HTTPClientError",
    "ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "FSTimeoutError", "ProxyConnectionError",
)  # fmt: skip


def to_store_error(error: BaseException, doing: str, url: str) -> StoreError:
    """Convert an error to a StoreError with .status, .retryable and .sent (False if the request was never sent)."""
    status = status_of(error)
    shown = _SECRET.sub("", str(error).strip() or type(error).__name__)
    code = _answer(error).get("Error", {}).get("Code")
    code = None if code is None or str(code) == str(status) else str(code)
    if code is not None and code not in shown:  # s3fs keeps only the message
        shown = f"{code}: {shown}"
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return NotFound(f"no such object ({doing})", url=url, status=status)
    if status == 412:
        return ObjectChanged(f"the object does not have the requested ETag ({doing})", url=url, status=status)
    if isinstance(error, NotImplementedError):
        return StoreError(f"{doing}: not supported by this kind of store ({shown})", url=url)
    names = {kind.__name__ for kind in type(error).__mro__}
    sent = names.isdisjoint(_NOT_SENT)
    if status is not None:
        retryable = status in _TRY_AGAIN or is_conflict(error)
    elif isinstance(error, PermissionError | FileExistsError):
        retryable = False
    else:
        lost = isinstance(error, TimeoutError | ConnectionError) or not names.isdisjoint((*_NOT_SENT, *_BROKEN))
        retryable = lost or (isinstance(error, OSError) and error.errno in _RETRYABLE)
    return StoreError(
        f"{doing}: {shown}", url=url, retryable=retryable, status=status, sent=sent, code=code, text=shown
    )


def may_have_taken_effect(error: StoreError) -> bool:
    """Return whether a failed write may still have taken effect."""
    status = error.status
    if status is not None:
        return status >= 500 and status not in _NOT_DONE
    return bool(error.details.get("sent", False)) and error.retryable


def exists_already(error: BaseException) -> bool:
    """Return whether a conditional write was refused because the key exists."""
    return isinstance(error, FileExistsError) or status_of(error) == 412


def is_conflict(error: BaseException) -> bool:
    """Return whether S3 refused the write because another conditional write of the key is running."""
    return _answer(error).get("Error", {}).get("Code") == "ConditionalRequestConflict"


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the error or its cause, or None."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(error, "status", None))
    return status if isinstance(status, int) else None


def _answer(error: BaseException) -> dict[str, dict[str, object]]:
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response
    return {}


_MARKS = (
    "ETag",
    "etag",
    "md5",
    "md5Hash",
    "checksum",
    "ino",
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "modified",
    "created",
    "Content-MD5",
    "Digest",
    "generation",
    "blob_id",
)
# Prefix of a weak ETag, which a store may give to two states of an object with different bytes.
_WEAK = "W/"
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "created")


class KeyExists(Exception):
    """The key exists."""


class FileSystemAdapter(ABC):
    """A folder of a file system, with the keys of the store. Every method raises the file system's own errors."""

    is_conditional = False
    """Whether read() itself checks if_match."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root.rstrip("/")

    def path(self, key: str) -> str:
        """Return the file system's path of a key."""
        return f"{self.root}/{key}" if self.root else key

    @abstractmethod
    def info(self, key: str) -> ObjectInfo:
        """Return the description of an object."""

    @abstractmethod
    def read(
        self, key: str, start: int | None, end: int | None, if_match: str | None = None
    ) -> tuple[bytes, str | None]:
        """Return bytes of an object, perhaps fewer than requested, and its ETag if the answer has one."""

    @abstractmethod
    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Return the end of an object."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object."""

    @abstractmethod
    def write_new(self, key: str, data: bytes) -> None:
        """Write an object. Raises FileExistsError (or S3's 412) if the key exists."""

    @abstractmethod
    def begin(self, key: str) -> Any:
        """Return a parts object for an upload: put(number, bytes), check(), complete(if_absent=), abort()."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, ignoring missing ones."""
        for key in keys:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self.path(key))

    def find(self, folder: str) -> list[ObjectInfo]:
        """Return the objects below a subfolder."""
        top = self.path(folder) if folder else self.root
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(top, detail=True, withdirs=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        start = f"{self.root}/" if self.root else ""
        inside = f"{top}/" if top else ""
        return [
            to_object_info(name.removeprefix(start), about)
            for name, about in found.items()
            if name.startswith(inside) and not name.endswith("/")
        ]

    def copy(self, src: str, dst: str) -> None:
        """Copy an object."""
        self.fs.cp_file(self.path(src), self.path(dst))

    def close(self) -> None:  # noqa: B027 - most file systems have nothing to close
        """Close the connections."""


class GenericAdapter(FileSystemAdapter):
    """Any file system. The lock makes test and write of write_new() atomic within this process."""

    def __init__(self, fs: Any, root: str) -> None:
        super().__init__(fs, root)
        self._lock = Lock()

    def info(self, key: str) -> ObjectInfo:
        """Return what the file system reports about the object. A folder is not an object."""
        self.fs.invalidate_cache()
        about = self.fs.info(self.path(key))
        if about.get("type") == "directory":
            raise FileNotFoundError(key)
        return to_object_info(key, about)

    def read(
        self, key: str, start: int | None, end: int | None, if_match: str | None = None
    ) -> tuple[bytes, str | None]:
        """Read by cat_file(); the caller compares ETags."""
        del if_match
        if start is None:
            self.info(key)  # some file systems read a folder as b""
        return bytes(self.fs.cat_file(self.path(key), start=start, end=end)), None

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Read by info() and cat_file()."""
        info = self.info(key)
        if not info.n_bytes:
            return b"", info
        data, _ = self.read(key, max(info.n_bytes - n_bytes, 0), info.n_bytes)
        return data, info

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write by pipe_file()."""
        self._with_folder(key, lambda: self.fs.pipe_file(self.path(key), data))
        return self.info(key)

    def write_new(self, key: str, data: bytes) -> None:
        """Write by pipe_file(mode="create"), after an existence check for file systems without that mode."""
        with self._lock:
            self._refuse_taken(key)
            self._with_folder(key, lambda: self.fs.pipe_file(self.path(key), data, mode="create"))

    def _refuse_taken(self, key: str) -> None:
        self.fs.invalidate_cache()
        if self.fs.exists(self.path(key)):
            raise FileExistsError(key)

    def send_file(self, source: Path, key: str, *, if_absent: bool) -> None:
        """Copy a local file to the key."""
        with self._lock:
            if if_absent:
                self._refuse_taken(key)
            self._with_folder(key, lambda: self.fs.put_file(str(source), self.path(key)))

    def _with_folder(self, key: str, write: Callable[[], object]) -> None:
        try:
            write()
        except FileNotFoundError:
            self.fs.makedirs(self.path(key).rpartition("/")[0], exist_ok=True)
            write()

    def begin(self, key: str) -> Any:
        """Return an upload whose parts are local files."""
        return _SpooledParts(self, key)


class _SpooledParts:
    """Parts in a temporary folder; the lock guards the table."""

    def __init__(self, files: GenericAdapter, key: str) -> None:
        self._files, self._key = files, key
        self._folder = tempfile.TemporaryDirectory(prefix="tiercache-upload-", ignore_cleanup_errors=True)
        self._lock = Lock()
        self._parts: dict[int, Path] = {}

    def put(self, number: int, data: bytes) -> None:
        part = Path(self._folder.name) / str(number)
        part.write_bytes(data)
        with self._lock:
            self._parts[number] = part

    def check(self) -> None:
        parts_in_order(self._parts, self._key)

    def complete(self, *, if_absent: bool) -> None:
        whole = Path(self._folder.name) / "whole"
        with whole.open("wb") as out:
            for part in parts_in_order(self._parts, self._key):
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
                part.unlink()
        self._files.send_file(whole, self._key, if_absent=if_absent)
        self.abort()

    def abort(self) -> None:
        self._folder.cleanup()


class S3fsAdapter(FileSystemAdapter):
    """S3 through s3fs's client calls. s3fs must not retry by itself.

    Args:
        run: Function that runs a coroutine function on s3fs's event loop and waits for it.
    """

    is_conditional = True

    def __init__(self, fs: Any, root: str, run: Callable[..., Any]) -> None:
        super().__init__(fs, root)
        self._run = run
        fs.retries = 1  # otherwise s3fs retries a conditional put whose answer was lost
        self.bucket, _, self._prefix = self.root.partition("/")

    def location(self, key: str) -> dict[str, str]:
        """Return Bucket and Key of a key."""
        return {"Bucket": self.bucket, "Key": f"{self._prefix}/{key}" if self._prefix else key}

    def call(self, method: str, **arguments: Any) -> Mapping[str, Any]:
        """Send one request."""
        answer: Mapping[str, Any] = self.fs.call_s3(method, **arguments)
        return answer

    def info(self, key: str) -> ObjectInfo:
        """Send one HEAD."""
        said = self.call("head_object", **self.location(key))
        return _answered(key, said, said["ContentLength"])

    def _get(self, key: str, **arguments: str) -> tuple[bytes, Mapping[str, Any]]:
        async def whole() -> tuple[bytes, Mapping[str, Any]]:
            # s3fs has no public method for a GET that also returns the ETag.
            said = await self.fs._call_s3("get_object", **self.location(key), **arguments)  # noqa: SLF001
            async with said["Body"] as body:
                return await body.read(), said

        got: tuple[bytes, Mapping[str, Any]] = self._run(whole)
        return got

    def read(
        self, key: str, start: int | None, end: int | None, if_match: str | None = None
    ) -> tuple[bytes, str | None]:
        """Send one GET."""
        arguments = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}
        if if_match is not None:
            arguments["IfMatch"] = if_match
        data, said = self._get(key, **arguments)
        return data, said.get("ETag")

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Send one GET with a suffix range, and a HEAD for an empty object."""
        try:
            data, said = self._get(key, Range=f"bytes=-{n_bytes}")
        except OSError as error:
            if getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode") != 416:
                raise
            return b"", self.info(key)
        size = said.get("ContentRange", "").rpartition("/")[2] or said["ContentLength"]
        return data, _answered(key, said, int(size))

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Send one PUT."""
        return _answered(key, self.call("put_object", Body=data, **self.location(key)), len(data))

    def write_new(self, key: str, data: bytes) -> None:
        """Send one PUT with If-None-Match."""
        self.call("put_object", Body=data, IfNoneMatch="*", **self.location(key))

    def delete(self, keys: Sequence[str]) -> None:
        """Send one DELETE per object."""
        for key in keys:
            self.call("delete_object", **self.location(key))

    def begin(self, key: str) -> Any:
        """Return a multipart upload."""
        return _Multipart(self, key)

    def close(self) -> None:
        """Close the session of s3fs."""
        client = self.fs._s3  # noqa: SLF001 - s3fs closes only on garbage collection, too late for a clean exit
        if client is not None:
            self._run(client.__aexit__, None, None, None)
            self.fs._s3 = None  # noqa: SLF001


class _Multipart:
    """A multipart upload whose parts are sent as they come; the lock guards the table and the id."""

    def __init__(self, files: S3fsAdapter, key: str) -> None:
        self._files, self._key = files, key
        self._lock = Lock()
        self._id: str | None = None
        self._tags: dict[int, str] = {}

    def put(self, number: int, data: bytes) -> None:
        place = self._files.location(self._key)
        with self._lock:
            if self._id is None:
                self._id = str(self._files.call("create_multipart_upload", **place)["UploadId"])
        said = self._files.call("upload_part", UploadId=self._id, PartNumber=number + 1, Body=data, **place)
        with self._lock:
            self._tags[number] = said["ETag"]

    def check(self) -> None:
        parts_in_order(self._tags, self._key)

    def complete(self, *, if_absent: bool) -> None:
        if self._id is None:
            if if_absent:
                self._files.write_new(self._key, b"")
            else:
                self._files.write(self._key, b"")
            return
        parts = [{"PartNumber": n + 1, "ETag": tag} for n, tag in enumerate(parts_in_order(self._tags, self._key))]
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        place = self._files.location(self._key)
        self._files.call(
            "complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts}, **place, **condition
        )

    def abort(self) -> None:
        if self._id is not None:
            self._files.call("abort_multipart_upload", UploadId=self._id, **self._files.location(self._key))


def _answered(key: str, said: Mapping[str, Any], n_bytes: int) -> ObjectInfo:
    when = said.get("LastModified")
    return ObjectInfo(
        key,
        n_bytes,
        etag=said.get("ETag"),
        version=said.get("VersionId"),
        modified_s=when.timestamp() if when is not None else None,
        storage_class=said.get("StorageClass"),
        restore=said.get("Restore"),
    )


def to_object_info(key: str, about: Mapping[str, Any]) -> ObjectInfo:
    """Convert an info() of fsspec to an ObjectInfo.

    The ETag is the file system's. If that is missing or weak, the ETag is built from all fields that change with a
    file, and is None if there are none.
    """
    marks = [about[name] for name in _MARKS if about.get(name) is not None]
    given = next((about[name] for name in ("ETag", "etag") if isinstance(about.get(name), str)), None)
    if given is None or given.startswith(_WEAK):
        firm = [mark for mark in marks if mark != given]
        made = '"' + "-".join(str(mark).replace('"', "") for mark in [*marks, about["size"]]) + '"'
        given = made if firm else None
    return ObjectInfo(key, _size(about), etag=given, modified_s=_time(about))


def _size(about: Mapping[str, Any]) -> int:
    size = about["size"]
    if size is None:
        raise OSError("the file system does not report the size of the object")
    return int(size)


def _time(about: Mapping[str, Any]) -> float | None:
    for name in _TIMES:
        value = about.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


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
            if error.status != 416:
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
