"""S3, Google Cloud Storage, Azure and HTTP through obstore: the client, its errors, and the store.

A call of the client is one request, without the GIL and not retried. obstore's asynchronous functions send it, because
only their requests can be cancelled; a thread waits for the answer, and there is no event loop. Status and kind of an
error are parsed from its text, because obstore exposes them nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import obstore
import obstore.exceptions
import obstore.store

from tiercache.distribution import install_command
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.stats import Counters
from tiercache.store.access import (
    CloudOptions,
    Credentials,
    hide_secrets,
    refused_error,
    refused_without_source,
    s3_access,
    server_url,
    wait_target,
)
from tiercache.store.contract import Store
from tiercache.store.remote import (
    CONFLICT_CODES,
    RETRYABLE_STATUSES,
    ObjectClient,
    ObjectWriter,
    ReadSettings,
    RemoteStore,
    wait_for_answer,
)
from tiercache.waiting import SYSTEM_CLOCK

_STATUS = re.compile(r"status code: (\d{3})\b ?([^:\n]*):? ?(.*)", re.DOTALL)
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_CAUSES = re.compile(r'(?:message|error): "?([^"\n]+?)"?,?\n')
# Metadata services, which clients ask for credentials if the options contain none.
_METADATA = re.compile(r"/latest/(?:api/token|meta-data)|/computeMetadata/|/metadata/identity/")
_XML = re.compile(r"<(Code|Message)>([^<]{1,300})</")
_SERVER = re.compile(r"performing \w+ (https?://[^/\s]+)")
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
_OTHER_RANGE = re.compile(r"Requested \d+\.\.\d+, got \d+\.\.\d+")
_DEBUG = "\n\nDebug source"
_BODY_CHARS = 200
_MISSING, _CHANGED, _BEYOND_END = 404, 412, 416
# Codes of S3 and Azure, and the text of Google Cloud Storage, for a bucket or container that does not exist.
_NO_BUCKET, _NO_BUCKET_TEXT = ("NoSuchBucket", "ContainerNotFound"), "The specified bucket does not exist"


def to_store_error(error: BaseException, doing: str, url: str, endpoint: str = "") -> StoreError:
    text, name = str(error), type(error).__name__
    answer = _STATUS.search(text.partition(_DEBUG)[0])
    status = int(answer[1]) if answer else None
    reason = _reason(answer[3].strip()) if answer else {}
    shown = hide_secrets(_answer_text(answer, reason) if answer else _cause(text, endpoint))
    is_conflict = any(code in text for code in CONFLICT_CODES)
    if name == "AlreadyExistsError" and not is_conflict:
        return StoreError(f"{doing}: the key exists", url=url, status=status, exists=True)
    no_bucket = reason.get("Code") in _NO_BUCKET or _NO_BUCKET_TEXT in text
    if isinstance(error, FileNotFoundError) or (no_bucket and status == _MISSING):
        what = "bucket" if no_bucket else "object"
        return NotFound(f"no such {what} ({doing})", url=url, status=status, code=reason.get("Code"))
    if name in ("PreconditionError", "NotModifiedError") or status == _CHANGED:
        return ObjectChanged(f"the object does not have the requested ETag ({doing})", url=url, status=status)
    if _OTHER_RANGE.search(text):
        return StoreError(f"{doing}: the server sent another range ({shown})", url=url, retryable=True)
    if "RangeNotSupported" in text or "non-partial" in text:
        message = f"{doing}: the server sent the whole object instead of a range; it may not support range requests"
        return StoreError(message, url=url, retryable=True, no_range=True)
    if name in ("NotSupportedError", "NotImplementedError"):
        message = f"{doing}: not supported by this kind of store ({shown})"
        return StoreError(message, url=url, no_range=True, unsupported=True)
    if _METADATA.search(text) and status not in RETRYABLE_STATUSES:
        message = (
            f"{doing}: no credentials: none in storage_options or the environment, and the metadata service of a cloud "
            f"machine gave none ({shown}); for a public bucket set the storage option skip_signature=true; AWS "
            f"profiles need botocore: {install_command('archive')}"
        )
        return StoreError(message, url=url)
    if certificate := _CERTIFICATE.search(text):
        message = (
            f"{doing}: the certificate of {endpoint or 'the server'} is not trusted ({certificate[1]}); "
            "set the storage option root_certificate, or AWS_CA_BUNDLE, to a file of trusted certificates"
        )
        return StoreError(message, url=url, sent=False)
    kind = _KIND.search(text)
    retryable = status in RETRYABLE_STATUSES or is_conflict if status else kind is not None
    facts: dict[str, Any] = {"status": status, "code": reason.get("Code"), "text": shown}
    sent = kind is None or kind[1] != "Connect"
    return StoreError(f"{doing}: {shown}", url=url, retryable=retryable, sent=sent, **facts)


def _reason(body: str) -> dict[str, str]:
    """Return Code and Message of an answer's body, from XML (S3, STS, Azure) or JSON (Google); {} without them."""
    if not body.startswith("{"):
        return dict(_XML.findall(body))
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    inner = document.get("error", document)
    if isinstance(inner, dict):  # {"error": {"code": 401, "status": "UNAUTHENTICATED", "message": "..."}}
        found = {"Code": inner.get("status") or inner.get("code"), "Message": inner.get("message")}
    else:  # OAuth: {"error": "invalid_grant", "error_description": "..."}
        found = {"Code": inner, "Message": document.get("error_description")}
    return {name: str(value) for name, value in found.items() if value}


def _answer_text(answer: re.Match[str], reason: Mapping[str, str]) -> str:
    body = ": ".join(reason[name] for name in ("Code", "Message") if name in reason) or answer[3].strip()
    shown = "" if not body or body.startswith("<") else f": {body[:_BODY_CHARS]}"  # "<": an HTML page
    return f"HTTP {answer[1]} {answer[2].strip()}{shown}"


def _cause(text: str, endpoint: str) -> str:
    """Return why there is no answer, for the user."""
    first, _, debug = text.partition(_DEBUG)
    kind, causes = _KIND.search(debug), _CAUSES.findall(debug)
    if kind is None:
        return first.strip().splitlines()[0] if first.strip() else "unknown error"
    server = _SERVER.search(first)
    where = server[1] if server else endpoint or "the server"
    what = {
        "Timeout": f"timed out: no answer, or no further byte, from {where}",
        "Connect": f"cannot connect to {where}",
    }.get(kind[1], f"the connection to {where} broke")
    return f"{what}{': ' + causes[-1] if causes else ''}"


class _Answer:
    """What obstore uses as an asyncio.Future: it sets the result, and cancel() ends the request. Safe for threads.

    The first result or error counts. add_done_callback() gives it obstore's function that ends the request.
    """

    def __init__(self) -> None:
        self._ends: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._callbacks: list[Callable[[_Answer], object]] = []
        self._is_cancelled = False

    def add_done_callback(self, callback: Callable[[_Answer], object]) -> None:
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        return self._is_cancelled

    def set_result(self, value: Any) -> None:
        self._ends.put((value, None))

    def set_exception(self, error: BaseException) -> None:
        self._ends.put((None, error))

    def cancel(self, error: BaseException) -> None:
        self._is_cancelled = True
        self._ends.put((None, error))
        with suppress(IndexError):
            self._callbacks.pop()(self)  # it panics if it is called twice

    def wait(self, timeout_s: float) -> bool:
        with suppress(Empty):
            self._ends.put(self._ends.get(timeout=timeout_s))  # one thread waits, so nothing comes in between
            return True
        return False

    def result(self) -> Any:
        value, error = self._ends.get()
        if error is not None:
            raise error
        return value


class _Loop:
    """What obstore needs of an event loop: it makes the futures, and runs nothing."""

    def create_future(self) -> Any:
        return _Answer()

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: object = None) -> Any:  # noqa: ARG002
        callback(*args)


_LOOP: Any = _Loop()


def _ask(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the result of an asynchronous function of obstore. The end of the running attempt ends the request."""
    # asyncio documents these two functions for the authors of event loops.
    before = asyncio._get_running_loop()  # noqa: SLF001
    asyncio._set_running_loop(_LOOP)  # noqa: SLF001
    try:
        answer = function(*args, **options)
    finally:
        asyncio._set_running_loop(before)  # noqa: SLF001
    return wait_for_answer(answer)


def _items(stream: Any) -> Iterator[Any]:
    """Yield what an asynchronous iterator of obstore yields."""
    while True:
        try:
            item = _ask(stream.__anext__)
        except StopAsyncIteration:
            return
        yield item


# obstore sends the parts of an upload as many requests, which it therefore retries itself.
_INNER_RETRIES = 8
_PAGE_KEYS = 1000
# A longer body is read in pieces of this size, which stay in the processor's cache until they are checksummed and
# written. Smaller ones cost more turns of the interpreter lock, which all threads share: a shuffled cold epoch of 2 GiB
# took 6.0 s with this size, 6.9 to 7.8 s with 256 KiB and 5.6 s with 1 MiB; one in stored order 4.0, 4.2 and 4.8 s.
_PIECE_BYTES = 512 << 10
# Each piece counts as progress, so where connections are slow, pieces are what half a second brings: an answer that
# comes slowly must not look like one that does not come. Before the first body, nothing is known.
_PIECE_S, _LEAST_PIECE_BYTES, _FIRST_PIECE_BYTES = 0.5, 16 << 10, 128 << 10
_WRITER_PART_BYTES = 8 << 20
_WRITER_PARTS_AT_ONCE = 4
_ERRORS = (obstore.exceptions.BaseError, OSError, NotImplementedError)

_first_user_pid: int | None = None


@dataclass(frozen=True, slots=True)
class BucketFolder:
    """Bucket and folder of a store. cloud: "s3", "gs", "az" or "http", whose bucket is the whole URL."""

    cloud: str
    bucket: str
    prefix: str
    url: str

    def __repr__(self) -> str:
        return f"BucketFolder({self.url!r})"


class ObstoreClient(ObjectClient):
    """obstore's functions, which hang in a forked child of a process that has used them: the constructor refuses it."""

    def __init__(self, folder: BucketFolder, options: CloudOptions, counters: Counters) -> None:
        if _first_user_pid not in (None, os.getpid()):
            raise StoreError(
                "this process was forked from a process that had used a remote store, whose connections do not survive "
                'a fork; start the worker processes with multiprocessing_context="forkserver"',
                url=folder.url,
            )
        self.folder, self.url, self.counters = folder, folder.url, counters
        self._options, self._config = options, dict(options.config)
        self._credentials: Credentials | None = None
        if folder.cloud == "s3":
            self._config, self._credentials = s3_access(options, folder.url)
        self._endpoint = server_url(folder.cloud, folder.bucket, self._config)
        self._piece_bytes = _FIRST_PIECE_BYTES
        self._stores: dict[int, Any] = {}  # by the number of retries

    def wait_target(self) -> str:
        return wait_target(self._endpoint, self._credentials)

    def _store(self, max_retries: int = 0) -> Any:
        store = self._stores.get(max_retries)
        return self._stores.setdefault(max_retries, self._open(max_retries)) if store is None else store

    def _open(self, max_retries: int) -> Any:
        global _first_user_pid
        if _first_user_pid is None:
            _first_user_pid = os.getpid()
        stores: Any = obstore.store  # the types of its options do not exist at run time
        folder, options = self.folder, self._options
        retries = {"max_retries": max_retries, "retry_timeout": timedelta(seconds=options.call.timeout_s)}
        client = options.for_obstore_uploads() if max_retries else options.for_obstore()
        common: dict[str, Any] = {"client_options": client, "retry_config": retries}
        if folder.cloud == "http":
            return stores.HTTPStore(folder.bucket, **common)
        common |= {"config": dict(self._config), "prefix": folder.prefix or None}
        provider = options.credentials if self._credentials is None else self._credentials.for_obstore
        if provider is not None:
            common["credential_provider"] = provider
        if folder.cloud == "gs":
            return stores.GCSStore(folder.bucket, **common)
        if folder.cloud == "az":
            return stores.AzureStore(folder.bucket, **common)
        common["config"].setdefault("copy_if_not_exists", "multipart")
        if self._endpoint.endswith((".amazonaws.com", ".amazonaws.com.cn")):  # not every other server knows it
            common["config"].setdefault("checksum_algorithm", "CRC64NVME")
        return stores.S3Store(folder.bucket, **common)

    def close(self) -> None:
        self._stores.clear()

    @contextmanager
    def errors(self, key: str, doing: str) -> Iterator[None]:
        credentials, number = self._credentials, 0
        if credentials is not None:
            credentials.get()  # read here, because obstore would hide the type of their error
            number = credentials.number
        self.counters.add("requests")
        try:
            yield
            if credentials is not None:
                credentials.accepted = number
        except StoreError:
            raise  # NotFound is also an OSError
        except _ERRORS as error:
            failed = to_store_error(error, doing, self.url_of(key), self._endpoint)
            if credentials is None and not self._config.get("skip_signature"):
                refused = refused_without_source(failed, self.folder.cloud)
            else:
                refused = refused_error(failed, credentials, number)
            if refused.details.get("renewed"):  # obstore keeps the old keys until they expire
                self._stores.clear()
            raise refused from None  # from None: obstore's own text may contain a signed URL

    def head(self, key: str) -> ObjectInfo:
        try:
            return to_object_info(key, _ask(obstore.head_async, self._store(), key))
        except _ERRORS as error:
            if self.folder.cloud == "s3" and to_store_error(error, "", "").status in (400, 401, 403):
                # The answer to a HEAD has no body with a reason; a GET of one byte is refused for the same reason.
                self.counters.add("requests")
                _ask(obstore.get_async, self._store(), key, options={"range": (0, 1)})
            raise

    def get(self, key: str, on_piece: Callable[[], object]) -> bytes:
        pieces = []
        result = _ask(obstore.get_async, self._store(), key)
        for piece in self._pieces(result):
            pieces.append(piece)
            on_piece()
        return b"".join(pieces)

    def tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        try:
            result = _ask(obstore.get_async, self._store(), key, options={"range": {"suffix": n_bytes}})
            return _ask(result.bytes_async).to_bytes(), to_object_info(key, result.meta)
        except _ERRORS as error:
            # Azure has no suffix ranges. An empty object has no valid range, and some servers then send all of it.
            failed = to_store_error(error, "", "")
            if failed.status != _BEYOND_END and not failed.details.get("no_range"):
                raise
        self.counters.add("requests")
        info = self.head(key)
        if not info.n_bytes:
            return b"", info
        self.counters.add("requests")
        found, body = self.range(key, ByteRange(max(info.n_bytes - n_bytes, 0), info.n_bytes), None)
        if found.etag != info.etag:
            raise ObjectChanged(url=self.url_of(key), expected=info.etag, found=found.etag)
        return b"".join(body), info

    def range(self, key: str, byte_range: ByteRange, if_match: str | None) -> tuple[ObjectInfo, Iterable[memoryview]]:
        options: Any = {"range": (byte_range.start, byte_range.end)}
        if if_match is not None:
            options["if_match"] = if_match
        result = _ask(obstore.get_async, self._store(), key, options=options)
        if byte_range.n_bytes <= self._piece_bytes:
            return to_object_info(key, result.meta), (memoryview(_ask(result.bytes_async)),)
        return to_object_info(key, result.meta), map(memoryview, self._pieces(result))

    def _pieces(self, result: Any) -> Iterator[bytes]:
        n_bytes, begun_s = 0, SYSTEM_CLOCK.monotonic()
        for piece in _items(result.stream(min_chunk_size=self._piece_bytes)):
            n_bytes += len(piece)
            yield piece
        a_piece_bytes = _PIECE_S * n_bytes / max(SYSTEM_CLOCK.monotonic() - begun_s, 1e-6)
        self._piece_bytes = int(min(max(a_piece_bytes, _LEAST_PIECE_BYTES), _PIECE_BYTES))

    def put(self, key: str, body: bytes) -> ObjectInfo:
        result = _ask(obstore.put_async, self._store(), key, body, use_multipart=False)
        return ObjectInfo(key, len(body), etag=result["e_tag"], version=result["version"])

    def put_new(self, key: str, body: bytes) -> None:
        _ask(obstore.put_async, self._store(), key, body, mode="create")

    def delete(self, keys: Sequence[str]) -> None:
        _ask(obstore.delete_async, self._store(), keys[0] if len(keys) == 1 else keys)

    def pages(self, folder: str, after: str | None) -> Iterator[Sequence[ObjectInfo]]:
        for page in _items(obstore.list(self._store(), folder or None, offset=after, chunk_size=_PAGE_KEYS)):
            yield [to_object_info(meta["path"], meta) for meta in page]

    def open_writer(self, key: str) -> ObjectWriter:
        store, sizes = self._store(_INNER_RETRIES), (_WRITER_PART_BYTES, _WRITER_PARTS_AT_ONCE)
        return _ObstoreWriter(obstore.open_writer(store, key, buffer_size=sizes[0], max_concurrency=sizes[1]))


class _ObstoreWriter:
    """obstore's writer, which blocks while too many parts are in flight."""

    def __init__(self, writer: Any) -> None:
        self.write, self.close = writer.write, writer.close
        self._writer = writer

    def abort(self) -> None:
        self._writer.__exit__(StoreError, None, None)


def to_object_info(key: str, meta: Mapping[str, Any]) -> ObjectInfo:
    when = meta["last_modified"]
    modified_s = when.timestamp() if when else None
    return ObjectInfo(key, meta["size"], etag=meta["e_tag"], version=meta["version"], modified_s=modified_s)


_CONDITIONAL_HOSTS = (".amazonaws.com", ".amazonaws.com.cn", ".googleapis.com", ".core.windows.net")
_PROVIDERS = {".amazonaws.com": "aws", "storage.googleapis.com": "gcs", ".blob.core.windows.net": "azure"}


class CloudStore(RemoteStore):
    """A bucket, a container or an HTTP server. Its options include credentials, and are never shown."""

    def __init__(self, folder: BucketFolder, options: CloudOptions, settings: ReadSettings | None = None) -> None:
        super().__init__(folder.url, options.call, settings or ReadSettings())
        self.folder, self.options, self.stall_s = folder, options, options.stall_s
        host = urlsplit(server_url(folder.cloud, folder.bucket, options.config)).hostname or ""
        self.provider = next((name for domain, name in _PROVIDERS.items() if host.endswith(domain)), None)
        self.knows_conditional_put = host.endswith(_CONDITIONAL_HOSTS)

    def __reduce__(self) -> tuple[type[CloudStore], tuple[BucketFolder, CloudOptions, ReadSettings]]:
        return CloudStore, (self.folder, self.options, self._settings)

    def _open_client(self) -> ObjectClient:
        return ObstoreClient(self.folder, self.options, self.counters)

    def parent(self) -> tuple[Store, str] | None:
        prefix, _, name = self.folder.prefix.rpartition("/")
        if not name:
            return None
        above = replace(self.folder, prefix=prefix, url=self.url.rstrip("/").rpartition("/")[0])
        return CloudStore(above, self.options, self._settings), name

    @property
    def cloud(self) -> str:
        """Kind of cloud: "s3", "gs", "az" or "http"."""
        return self.folder.cloud

    @property
    def identity(self) -> tuple[str, ...]:
        """Cloud, endpoint, bucket and prefix: equal for stores of the same folder."""
        config = self.options.config
        endpoint = str(config.get("endpoint", config.get("account_name", ""))).rstrip("/")
        return self.folder.cloud, endpoint, self.folder.bucket, self.folder.prefix
