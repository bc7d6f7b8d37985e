"""obstore, call by call: the one file that knows it. A call is one request, without the GIL, and not repeated."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from tiercache.store.aws import profile_credentials
from tiercache.store.landing import PerProcess
from tiercache.store.obstore_errors import exists_already, failure, may_have_happened
from tiercache.store.options import CloudOptions

# Parts of an upload and pages of a listing are many requests inside obstore, which therefore repeats them itself.
_INNER_RETRIES = {"max_retries": 8, "retry_timeout": timedelta(minutes=3)}
_NO_RETRIES = {"max_retries": 0}
_PAGE_KEYS = 1000
WRITER_PART_BYTES = 8 << 20
_WRITER_PARTS_AT_ONCE = 4
_ERRORS = (obstore.exceptions.BaseError, OSError, NotImplementedError)

_first_user_pid: int | None = None


def is_usable_here() -> bool:
    """Whether obstore can be used in this process: not in a forked child of one that has used it, where it hangs."""
    return _first_user_pid in (None, os.getpid())


class Taken(Exception):
    """The key is taken."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store's objects are. cloud: "s3", "gs", "az" or "http"; bucket: or container, or for http the whole URL.

    prefix: folder in the bucket, without slashes at its ends; url: without secrets.
    """

    cloud: str
    bucket: str
    prefix: str
    url: str

    def __repr__(self) -> str:
        return f"Place({self.url!r})"


class Client:
    """obstore's functions with our errors. Any thread; clients are made by each process when it first needs them.

    counters: gets "requests" here, bytes where they are used.
    """

    def __init__(self, place: Place, options: CloudOptions, counters: Counters) -> None:
        self.place, self.counters = place, counters
        self._once = PerProcess(lambda: _open(place, options, _NO_RETRIES), lambda _client: None)
        self._repeating = PerProcess(lambda: _open(place, options, _INNER_RETRIES), lambda _client: None)

    def close(self) -> None:
        """Drop this process's connections."""
        self._once.drop()
        self._repeating.drop()

    def at(self, key: str) -> str:
        """The URL of a key, for people."""
        return f"{self.place.url}/{key}" if key else self.place.url

    @contextmanager
    def errors(self, key: str, doing: str) -> Iterator[None]:
        """Count a request; turn obstore's errors into ours, or into Taken."""
        self.counters.add("requests")
        try:
            yield
        except StoreError:
            raise  # NotFound is an OSError too
        except _ERRORS as error:
            if exists_already(error):
                raise Taken from None
            # From None: obstore's own text may hold a signature of the URL.
            raise failure(error, doing, self.at(key)) from None

    @contextmanager
    def conditional(self, key: str, doing: str) -> Iterator[None]:
        """As errors(), for a write that must not be repeated blindly: .maybe_done where the answer was lost."""
        try:
            with self.errors(key, doing):
                yield
        except StoreError as error:
            if not may_have_happened(error):
                raise
            message = f"{doing}: no answer that says whether it was written ({error.message})"
            raise StoreError(message, url=self.at(key), retryable=True, maybe_done=True) from None

    def head(self, key: str, doing: str = "head") -> ObjectInfo:
        """HEAD."""
        with self.errors(key, doing):
            return described(key, obstore.head(self._once.get(), key))

    def get(self, key: str) -> bytes:
        """GET of a whole object."""
        with self.errors(key, "get"):
            return bytes(obstore.get(self._once.get(), key).bytes())

    def tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """GET of a suffix range."""
        with self.errors(key, "read_tail"):
            result = obstore.get(self._once.get(), key, options={"range": {"suffix": n_bytes}})
            return bytes(result.bytes()), described(key, result.meta)

    def range(
        self, key: str, wanted: ByteRange, if_match: str | None, piece_bytes: int
    ) -> tuple[ObjectInfo, Iterable[memoryview]]:
        """GET of a range: what the object is, and the body in pieces of about piece_bytes.

        For use inside errors(): the call and the pieces raise obstore's own errors.
        """
        options: Any = {"range": (wanted.start, wanted.end)}
        if if_match is not None:
            options["if_match"] = if_match
        result = obstore.get(self._once.get(), key, options=options)
        if wanted.n_bytes <= piece_bytes:
            return described(key, result.meta), (memoryview(result.bytes()),)
        return described(key, result.meta), map(memoryview, result.stream(min_chunk_size=piece_bytes))

    def put(self, key: str, body: bytes) -> ObjectInfo:
        """PUT."""
        with self.errors(key, "put"):
            said = obstore.put(self._once.get(), key, body, use_multipart=False)
        return ObjectInfo(key, len(body), etag=said["e_tag"], version=said["version"])

    def put_new(self, key: str, body: bytes) -> ObjectInfo:
        """PUT with If-None-Match. Raises Taken."""
        with self.conditional(key, "put_if_absent"):
            said = obstore.put(self._once.get(), key, body, mode="create")
        return ObjectInfo(key, len(body), etag=said["e_tag"], version=said["version"])

    def delete(self, keys: Sequence[str]) -> None:
        """DELETE, of up to a thousand at once where the store can."""
        with self.errors(keys[0], "delete"):
            obstore.delete(self._once.get(), keys[0] if len(keys) == 1 else keys)

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Pages of a listing."""
        # A plain HTTP server refuses for good what object stores rarely refuse for a moment.
        client = (self._once if self.place.cloud == "http" else self._repeating).get()
        with self.errors(folder, "list"):
            pages = iter(obstore.list(client, folder or None, chunk_size=_PAGE_KEYS))
        while True:
            with self.errors(folder, "list"):
                page = next(pages, None)
            if page is None:
                return
            for meta in page:
                yield described(meta["path"], meta)

    def copy(self, src: str, dst: str) -> None:
        """Copy by the server, replacing."""
        with self.errors(src, f"copy to {dst}"):
            obstore.copy(self._once.get(), src, dst)

    def copy_new(self, src: str, dst: str) -> None:
        """Copy by the server to a free key. Raises Taken."""
        with self.conditional(dst, "complete"):
            obstore.copy(self._once.get(), src, dst, overwrite=False)

    def open_writer(self, key: str) -> Any:
        """A writer of a multipart upload: write(), close(), or __exit__ with an error to abort."""
        with self.errors(key, "create"):
            return obstore.open_writer(
                self._repeating.get(), key, buffer_size=WRITER_PART_BYTES, max_concurrency=_WRITER_PARTS_AT_ONCE
            )


def _open(place: Place, options: CloudOptions, retries: Mapping[str, Any]) -> Any:
    global _first_user_pid
    if _first_user_pid is None:
        _first_user_pid = os.getpid()
    stores: Any = obstore.store  # the types of its options cannot be had at run time
    common: dict[str, Any] = {"client_options": dict(options.client), "retry_config": dict(retries)}
    config = dict(options.config)
    if place.cloud == "http":
        return stores.HTTPStore(place.bucket, **common)
    common["prefix"] = place.prefix or None
    if place.cloud == "gs":
        return stores.GCSStore(place.bucket, config=config, **common)
    if place.cloud == "az":
        return stores.AzureStore(place.bucket, config=config, **common)
    config.setdefault("copy_if_not_exists", "multipart")
    if options.profile is not None:
        common["credential_provider"], more = profile_credentials(options.profile)
        config = {**more, **config}
    elif {"access_key_id", "secret_access_key"} <= config.keys() and "session_token" not in config:
        # Keys that were given need no token; obstore would join them with one that the environment has for its own.
        given = {"access_key_id": config.pop("access_key_id"), "secret_access_key": config.pop("secret_access_key")}
        common["credential_provider"] = lambda: {**given, "token": None, "expires_at": None}
    return stores.S3Store(place.bucket, config=config, **common)


def described(key: str, meta: Mapping[str, Any]) -> ObjectInfo:
    """Obstore's description in our words."""
    when = meta["last_modified"]
    return ObjectInfo(
        key,
        meta["size"],
        etag=meta["e_tag"],
        version=meta["version"],
        modified_s=when.timestamp() if when else None,
    )
