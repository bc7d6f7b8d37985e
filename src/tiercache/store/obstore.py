"""The obstore client, and the only module that imports obstore.

A call is one request, without the GIL and not retried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import obstore
import obstore.exceptions
import obstore.store

from tiercache.errors import StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.stats import Counters
from tiercache.store.credentials import Credentials, refused_error, s3_access, wait_target
from tiercache.store.landing import ProcessLocal
from tiercache.store.obstore_errors import exists_already, may_have_taken_effect, to_store_error
from tiercache.store.options import CloudOptions
from tiercache.store.urls import server_url

# obstore sends the parts of an upload as many requests, which it therefore retries itself.
_INNER_RETRIES = 8
_NO_RETRIES = {"max_retries": 0}
_PAGE_KEYS = 1000
WRITER_PART_BYTES = 8 << 20
_WRITER_PARTS_AT_ONCE = 4
_ERRORS = (obstore.exceptions.BaseError, OSError, NotImplementedError)

_first_user_pid: int | None = None


def is_usable_here() -> bool:
    """Return whether obstore works in this process: it hangs in a forked child of a process that has used it."""
    return _first_user_pid in (None, os.getpid())


class KeyExists(Exception):
    """The key exists."""


@dataclass(frozen=True, slots=True)
class BucketFolder:
    """Bucket and folder of a store.

    Attributes:
        cloud: "s3", "gs", "az" or "http".
        bucket: Bucket or container; for "http" the whole URL.
        prefix: Folder in the bucket, without slashes at its ends.
        url: URL without secrets.
    """

    cloud: str
    bucket: str
    prefix: str
    url: str

    def __repr__(self) -> str:
        return f"Place({self.url!r})"


@dataclass(frozen=True, slots=True)
class _Access:
    """How this process reaches the store: options without keys, the source of the keys, and the server."""

    config: Mapping[str, Any]
    credentials: Credentials | None
    endpoint: str


class Client:
    """obstore's functions with tiercache's errors. Safe for threads; each process creates its clients at first use.

    The client counts "requests"; its callers count bytes.
    """

    def __init__(self, place: BucketFolder, options: CloudOptions, counters: Counters) -> None:
        self.place, self.counters = place, counters
        self._access = ProcessLocal(lambda: self._find_access(options), lambda _access: None)
        inner = {"max_retries": _INNER_RETRIES, "retry_timeout": timedelta(seconds=options.timeout_s)}
        self._once = ProcessLocal(lambda: self._open(options, _NO_RETRIES), lambda _client: None)
        self._repeating = ProcessLocal(lambda: self._open(options, inner), lambda _client: None)

    def _find_access(self, options: CloudOptions) -> _Access:
        config, credentials = dict(options.config), None
        if self.place.cloud == "s3":
            config, credentials = s3_access(options, self.place.url)
        return _Access(config, credentials, server_url(self.place.cloud, self.place.bucket, config))

    def wait_target(self) -> str:
        """Return the name of what a request waits for now, for messages."""
        access = self._access.get()
        return wait_target(access.endpoint, access.credentials)

    def _open(self, options: CloudOptions, retries: Mapping[str, Any]) -> Any:
        return _open(self.place, self._access.get(), options, retries)

    def close(self) -> None:
        """Close this process's connections."""
        self._once.drop()
        self._repeating.drop()
        self._access.drop()

    def url_of(self, key: str) -> str:
        """Return the URL of a key, for messages."""
        return f"{self.place.url}/{key}" if key else self.place.url

    @contextmanager
    def errors(self, key: str, doing: str) -> Iterator[None]:
        """Count a request, and convert obstore's errors to StoreError or Taken."""
        access, number = self._access.get(), 0
        credentials = access.credentials
        if credentials is not None:
            credentials.get()  # read here, because obstore would hide the type of their error
            number = credentials.number
        self.counters.add("requests")
        try:
            yield
        except StoreError:
            raise  # NotFound is also an OSError
        except _ERRORS as error:
            if exists_already(error):
                raise KeyExists from None
            # From None: obstore's own text may contain a signed URL.
            raise self._refused(
                to_store_error(error, doing, self.url_of(key), access.endpoint), credentials, number
            ) from None

    def _refused(self, error: StoreError, credentials: Credentials | None, number: int) -> StoreError:
        """Return the error, or an error worth another attempt if new credentials are available."""
        found = refused_error(error, credentials, number)
        if found.facts.get("renewed"):  # obstore keeps the old keys until they expire
            self._once.drop()
            self._repeating.drop()
        return found

    @contextmanager
    def conditional(self, key: str, doing: str) -> Iterator[None]:
        """As errors(), for a write that must not be repeated blindly: .maybe_done is set if the answer was lost."""
        try:
            with self.errors(key, doing):
                yield
        except StoreError as error:
            if not may_have_taken_effect(error):
                raise
            message = f"{doing}: the answer was lost, so the object may or may not have been written ({error.message})"
            raise StoreError(message, url=self.url_of(key), retryable=True, maybe_done=True) from None

    def head(self, key: str, doing: str = "head") -> ObjectInfo:
        """Send HEAD."""
        try:
            with self.errors(key, doing):
                return to_object_info(key, obstore.head(self._once.get(), key))
        except StoreError as error:
            if self.place.cloud != "s3" or error.status not in (400, 401, 403) or error.facts.get("renewed"):
                raise
            refused = error
        # The answer to a HEAD has no body with a reason; a GET of one byte is refused for the same reason.
        try:
            with self.errors(key, doing):
                obstore.get(self._once.get(), key, options={"range": (0, 1)})
        except StoreError as error:
            if error.facts.get("code") or error.facts.get("renewed"):
                raise
        raise refused

    def get(self, key: str, piece_bytes: int, on_piece: Callable[[], None]) -> bytes:
        """Send GET for a whole object.

        Args:
            key: Key of the object.
            piece_bytes: Approximate size of the pieces in which a longer body is read.
            on_piece: Function called for each piece that has arrived.
        """
        with self.errors(key, "get"):
            result = obstore.get(self._once.get(), key)
            if result.meta["size"] <= piece_bytes:
                return bytes(result.bytes())
            pieces = []
            for piece in result.stream(min_chunk_size=piece_bytes):
                pieces.append(piece)
                on_piece()
            return b"".join(pieces)

    def tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Send GET with a suffix range."""
        with self.errors(key, "read_tail"):
            result = obstore.get(self._once.get(), key, options={"range": {"suffix": n_bytes}})
            return bytes(result.bytes()), to_object_info(key, result.meta)

    def range(
        self, key: str, wanted: ByteRange, if_match: str | None, piece_bytes: int
    ) -> tuple[ObjectInfo, Iterable[memoryview]]:
        """Send GET for a range. Return the description of the object, and the body in pieces of about piece_bytes.

        For use inside errors(): the call and the pieces raise obstore's own errors.
        """
        options: Any = {"range": (wanted.start, wanted.end)}
        if if_match is not None:
            options["if_match"] = if_match
        result = obstore.get(self._once.get(), key, options=options)
        if wanted.n_bytes <= piece_bytes:
            return to_object_info(key, result.meta), (memoryview(result.bytes()),)
        return to_object_info(key, result.meta), map(memoryview, result.stream(min_chunk_size=piece_bytes))

    def put(self, key: str, body: bytes) -> ObjectInfo:
        """Send PUT."""
        with self.errors(key, "put"):
            said = obstore.put(self._once.get(), key, body, use_multipart=False)
        return ObjectInfo(key, len(body), etag=said["e_tag"], version=said["version"])

    def put_new(self, key: str, body: bytes) -> ObjectInfo:
        """Send PUT with If-None-Match. Raises Taken."""
        with self.conditional(key, "put_if_absent"):
            said = obstore.put(self._once.get(), key, body, mode="create")
        return ObjectInfo(key, len(body), etag=said["e_tag"], version=said["version"])

    def delete(self, keys: Sequence[str]) -> None:
        """Send DELETE, for up to 1,000 objects at once if the store supports it."""
        with self.errors(keys[0], "delete"):
            obstore.delete(self._once.get(), keys[0] if len(keys) == 1 else keys)

    def pages(self, folder: str, after: str | None) -> Iterator[Sequence[Mapping[str, Any]]]:
        """Return the pages of a listing after a key. For use inside errors(): the pages raise obstore's own errors."""
        return iter(obstore.list(self._once.get(), folder or None, offset=after, chunk_size=_PAGE_KEYS))

    def copy(self, src: str, dst: str) -> None:
        """Copy on the server, replacing an existing object."""
        with self.errors(src, f"copy to {dst}"):
            obstore.copy(self._once.get(), src, dst)

    def copy_new(self, src: str, dst: str) -> None:
        """Copy on the server to a free key. Raises Taken."""
        with self.conditional(dst, "complete"):
            obstore.copy(self._once.get(), src, dst, overwrite=False)

    def open_writer(self, key: str) -> Any:
        """Return the writer of a multipart upload: write(), close(), or __exit__ with an error to abort."""
        with self.errors(key, "create"):
            return obstore.open_writer(
                self._repeating.get(), key, buffer_size=WRITER_PART_BYTES, max_concurrency=_WRITER_PARTS_AT_ONCE
            )


def _open(
    place: BucketFolder,
    access: _Access,
    options: CloudOptions,
    retries: Mapping[str, Any],
) -> Any:
    global _first_user_pid
    if _first_user_pid is None:
        _first_user_pid = os.getpid()
    stores: Any = obstore.store  # the types of its options do not exist at run time
    common: dict[str, Any] = {"client_options": options.for_obstore(), "retry_config": dict(retries)}
    if place.cloud == "http":
        return stores.HTTPStore(place.bucket, **common)
    config, credentials = dict(access.config), access.credentials
    common["prefix"] = place.prefix or None
    if credentials is not None:
        common["credential_provider"] = credentials.for_obstore
    elif options.credentials is not None:
        common["credential_provider"] = options.credentials
    if place.cloud == "gs":
        return stores.GCSStore(place.bucket, config=config, **common)
    if place.cloud == "az":
        return stores.AzureStore(place.bucket, config=config, **common)
    config.setdefault("copy_if_not_exists", "multipart")
    return stores.S3Store(place.bucket, config=config, **common)


def to_object_info(key: str, meta: Mapping[str, Any]) -> ObjectInfo:
    """Convert obstore's metadata to an ObjectInfo."""
    when = meta["last_modified"]
    return ObjectInfo(
        key,
        meta["size"],
        etag=meta["e_tag"],
        version=meta["version"],
        modified_s=when.timestamp() if when else None,
    )
