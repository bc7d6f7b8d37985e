"""Stores through fsspec: all URLs that the other back ends do not open."""

from __future__ import annotations

import errno
import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from difflib import get_close_matches
from functools import partial
from threading import Lock
from typing import Any, cast

from tiercache.distribution import install_command
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.stats import Counters
from tiercache.store.access import CallOptions, hide_secrets, redact, server_url
from tiercache.store.remote import (
    CONFLICT_CODES,
    RETRYABLE_STATUSES,
    ObjectClient,
    ObjectWriter,
    ReadSettings,
    RemoteStore,
)

_N_REQUESTS = 8
_RETRYABLE = (errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE)
_NOT_SENT = (
    "EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ConnectionRefusedError", "ConnectError",
    "ConnectTimeout",
)  # fmt: skip
_BROKEN = (
    "ReadTimeoutError", "ConnectionClosedError", "ResponseStreamingError", "IncompleteReadError", "HTTPClientError",
    "ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "FSTimeoutError", "ProxyConnectionError",
    "TransportError", "ConnectionError", "Timeout", "ChunkedEncodingError",
)  # fmt: skip


def to_store_error(error: BaseException, doing: str, url: str) -> StoreError:
    answer = _answer(error)
    status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", status)
    status = status if isinstance(status, int) else None
    shown = hide_secrets(str(error).strip() or type(error).__name__)
    code = answer.get("Error", {}).get("Code")
    code = None if code is None or str(code) == str(status) else str(code)
    is_conflict = code in CONFLICT_CODES
    exists = (isinstance(error, FileExistsError) or status == 412) and not is_conflict
    if code is not None and code not in shown:  # s3fs keeps only the message
        shown = f"{code}: {shown}"
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return NotFound(f"no such object ({doing})", url=url, status=status)
    if status == 412:
        message = f"the object does not have the requested ETag ({doing})"
        return ObjectChanged(message, url=url, status=status, exists=exists)
    if isinstance(error, NotImplementedError):
        return StoreError(f"{doing}: not supported by this kind of store ({shown})", url=url, unsupported=True)
    names = {kind.__name__ for kind in type(error).__mro__}
    sent = names.isdisjoint(_NOT_SENT)
    if status is not None:
        retryable = status in RETRYABLE_STATUSES or is_conflict
    elif isinstance(error, PermissionError | FileExistsError):
        retryable = False
    else:
        lost = isinstance(error, TimeoutError | ConnectionError) or not names.isdisjoint((*_NOT_SENT, *_BROKEN))
        retryable = lost or (isinstance(error, OSError) and error.errno in _RETRYABLE)
    facts: dict[str, Any] = {"status": status, "code": code, "sent": sent, "text": shown, "exists": exists}
    return StoreError(f"{doing}: {shown}", url=url, retryable=retryable, **facts)


def _answer(error: BaseException) -> dict[str, dict[str, Any]]:
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response
    return {}


_TIMES = ("LastModified", "last_modified", "mtime", "modified", "created")
_MARKS = (
    "ETag", "etag", "md5", "md5Hash", "checksum", "ino", "mtime", "LastModified", "Last-Modified", "last_modified",
    "modified", "created", "Content-MD5", "Digest", "generation", "blob_id",
)  # fmt: skip
# Prefix of a weak ETag, which a store may give to two states of an object with different bytes.
_WEAK = "W/"


def to_object_info(key: str, about: Mapping[str, Any]) -> ObjectInfo:
    """Convert an info() of fsspec to an ObjectInfo.

    The ETag is the file system's. If that is missing or weak, the ETag is built from all fields that change with a
    file, and is None if there are none.
    """
    marks = [about[name] for name in _MARKS if about.get(name) is not None]
    etag = next((about[name] for name in ("ETag", "etag") if isinstance(about.get(name), str)), None)
    if etag is None or etag.startswith(_WEAK):
        firm = [mark for mark in marks if mark != etag]
        built = '"' + "-".join(str(mark).replace('"', "") for mark in [*marks, about["size"]]) + '"'
        etag = built if firm else None
    return ObjectInfo(key, _size(about), etag=etag, modified_s=_time(about))


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


class FsspecClient(ObjectClient):
    """Requests to any file system of fsspec, which is created at first use.

    open_fs returns a file system, and the path of the folder in it. The locks guard its creation, and make test and
    write of put_new() atomic within this process.
    """

    checks_etag = False

    def __init__(self, open_fs: Callable[[], tuple[Any, str]], url: str, counters: Counters, endpoint: str) -> None:
        self.url, self.counters = url, counters
        self._open_fs, self._endpoint = open_fs, endpoint
        self._lock, self._writing = Lock(), Lock()
        self._opened: tuple[Any, str] | None = None

    def at(self, key: str) -> tuple[Any, str]:
        with self._lock:
            if self._opened is None:
                self._opened = self._open_fs()
            fs, root = self._opened
        root = root.rstrip("/")
        return fs, f"{root}/{key}" if root and key else root or key

    def wait_target(self) -> str:
        """Return the URL or the server, because fsspec does not say which server a file system uses."""
        return self._endpoint

    @contextmanager
    def errors(self, key: str, doing: str) -> Iterator[None]:
        self.counters.add("requests")
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - raised as a StoreError
            # From None, because the text may contain a signed URL.
            raise to_store_error(error, doing, self.url_of(key)) from None

    def describe(self, fs: Any, path: str) -> Mapping[str, Any]:
        """Return the file system's description of a path, which it reads now."""
        fs.invalidate_cache()
        return cast("Mapping[str, Any]", fs.info(path))

    def describe_below(self, fs: Any, folder: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the descriptions of the files below a folder by path."""
        fs.invalidate_cache()
        try:
            return cast("Mapping[str, Mapping[str, Any]]", fs.find(folder, detail=True, withdirs=False))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def head(self, key: str) -> ObjectInfo:
        about = self.describe(*self.at(key))
        if about.get("type") == "directory":
            raise FileNotFoundError(key)
        return to_object_info(key, about)

    def get(self, key: str, on_piece: Callable[[], object]) -> bytes:  # noqa: ARG002 - one piece
        self.head(key)  # some file systems read a folder as b""
        fs, path = self.at(key)
        return bytes(fs.cat_file(path))

    def tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        info = self.head(key)
        fs, path = self.at(key)
        start = max(info.n_bytes - n_bytes, 0)
        return bytes(fs.cat_file(path, start=start, end=info.n_bytes)) if info.n_bytes else b"", info

    def range(
        self,
        key: str,
        byte_range: ByteRange,
        if_match: str | None,  # noqa: ARG002 - see checks_etag
    ) -> tuple[ObjectInfo | None, Iterable[memoryview]]:
        fs, path = self.at(key)
        return None, (memoryview(bytes(fs.cat_file(path, start=byte_range.start, end=byte_range.end))),)

    def put(self, key: str, body: bytes) -> ObjectInfo:
        self._in_folder(key, lambda fs, path: fs.pipe_file(path, body))
        return self.head(key)

    def put_new(self, key: str, body: bytes) -> None:
        """Write by pipe_file(mode="create"), after an existence check for file systems without that mode."""
        with self._writing:
            fs, path = self.at(key)
            fs.invalidate_cache()
            if fs.exists(path):
                raise FileExistsError(key)
            self._in_folder(key, lambda fs, path: fs.pipe_file(path, body, mode="create"))

    def put_new_by_store(self, key: str, body: bytes) -> None:
        self.at(key)[0].invalidate_cache()
        try:
            self._in_folder(key, lambda fs, path: fs.pipe_file(path, body, mode="create"))
        except TypeError as error:  # an older file system, whose pipe_file() has no such argument
            raise NotImplementedError(f'pipe_file(mode="create"): {error}') from error

    def _in_folder(self, key: str, write: Callable[[Any, str], object]) -> None:
        fs, path = self.at(key)
        try:
            write(fs, path)
        except FileNotFoundError:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(fs, path)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            fs, path = self.at(key)
            with suppress(FileNotFoundError):
                fs.rm_file(path)

    def pages(self, folder: str, after: str | None) -> Iterator[Sequence[ObjectInfo]]:  # noqa: ARG002 - one page
        fs, top = self.at(folder)
        root = self.at("")[1]
        start, inside = f"{root}/" if root else "", f"{top}/" if top else ""
        yield [
            to_object_info(name.removeprefix(start), about)
            for name, about in self.describe_below(fs, top).items()
            if name.startswith(inside) and not name.endswith("/")
        ]

    def open_writer(self, key: str) -> ObjectWriter:
        return _SpooledWriter(lambda file: self._in_folder(key, lambda fs, path: fs.put_file(file, path)))

    def close(self) -> None:
        self._opened = None


class S3fsClient(FsspecClient):
    """S3 as s3fs reads it below `tiercache::`: with If-Match, in place of a look at the object before and after."""

    checks_etag = True

    def range(
        self, key: str, byte_range: ByteRange, if_match: str | None
    ) -> tuple[ObjectInfo | None, Iterable[memoryview]]:
        fs, path = self.at(key)
        bucket, _, name = path.partition("/")
        arguments = {"Bucket": bucket, "Key": name, "Range": f"bytes={byte_range.start}-{byte_range.end - 1}"}
        arguments |= {} if if_match is None else {"IfMatch": if_match}

        async def read() -> tuple[bytes, Mapping[str, Any]]:
            # s3fs has no public method for a GET under a condition.
            answer = await fs._call_s3("get_object", **arguments)  # noqa: SLF001
            async with answer["Body"] as body:
                return await body.read(), answer

        data, answer = importlib.import_module("fsspec.asyn").sync(fs.loop, read)
        n_bytes = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
        return ObjectInfo(key, int(n_bytes), etag=answer.get("ETag")), (memoryview(data),)

    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None and opened[0]._s3 is not None:  # noqa: SLF001 - s3fs closes only on garbage collection
            fs = opened[0]
            importlib.import_module("fsspec.asyn").sync(fs.loop, fs._s3.__aexit__, None, None, None)  # noqa: SLF001
            fs._s3 = None  # noqa: SLF001


class _SpooledWriter:
    """A temporary local file that close() sends: most file systems would show a file that grows."""

    def __init__(self, send: Callable[[str], object]) -> None:
        self._send = send
        self._file = tempfile.NamedTemporaryFile(prefix="tiercache-upload-")  # noqa: SIM115 - closed by abort()

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def close(self) -> None:
        self._file.flush()
        self._send(self._file.name)
        self._file.close()

    def abort(self) -> None:
        self._file.close()


class FsspecStore(RemoteStore):
    """Objects of any fsspec file system. Safe for threads; each process creates its own file system.

    How much of the contract it fulfils depends on the file system: put_if_absent lets one writer win in this process,
    and among processes if the file system supports mode="create", which commits require; if_match compares info()
    before and after the read. full_url includes secrets. make() returns a file system that is not shared and does not
    cache listings; full_url is then the path in it.
    """

    def __init__(
        self,
        full_url: str,
        url: str,
        options: Mapping[str, Any],
        call: CallOptions | None = None,
        make: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(url, call or CallOptions(), ReadSettings(n_requests=_N_REQUESTS))
        self._full_url, self._options, self._make = full_url, dict(options), make

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._full_url, self.url, self._options, self.call_options, self._make)

    def _open_client(self) -> FsspecClient:
        endpoint = server_url("http", self.url, {}) if self.url.startswith("http") else self.url
        make, full_url = self._make, self._full_url
        open_fs = partial(open_file_system, full_url, self._options) if make is None else lambda: (make(), full_url)
        return self._client_type()(open_fs, self.url, self.counters, endpoint)

    def _client_type(self) -> type[FsspecClient]:
        return S3fsClient if self.url.startswith(("s3://", "s3a://")) else FsspecClient


def check_scheme(scheme: str) -> None:
    """Return if fsspec knows the scheme (its package may still be missing). Raises ValueError."""
    protocols = importlib.import_module("fsspec").available_protocols()
    if scheme not in protocols:
        near = get_close_matches(scheme, protocols, n=3)
        meant = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"no store for {scheme}://{meant}")


def open_file_system(full_url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a new file system of fsspec, and the path of the URL in it."""
    core = importlib.import_module("fsspec.core")
    scheme = full_url.partition("://")[0]
    more: dict[str, Any] = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    # No cached instances (other code shares them) and no cached listings (other programs write too).
    common = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        fs, root = core.url_to_fs(full_url, **{**common, **options, **more})
    except (ImportError, ValueError, TypeError) as error:
        text = f"{error}: {install_command('hub')}" if scheme == "hf" and isinstance(error, ImportError) else error
        raise StoreError(f"the file system cannot be opened: {text}", url=redact(full_url)) from None
    return fs, "" if fs.protocol == "dir" else root  # a "dir" is the folder itself
