"""Every other URL, through fsspec; and S3 through s3fs, where obstore cannot be used (forked children)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from threading import Event
from typing import Any, TypeVar

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, Span, Store, Upload, check_key
from tiercache.store.fsspec_errors import exists_already, failure, is_conflict, may_have_happened
from tiercache.store.fsspec_files import Files, PlainFiles, S3Files, Taken
from tiercache.store.landing import Landing, PerProcess, read_requests, worker_pool
from tiercache.store.posix import TEMP_PREFIX
from tiercache.store.retry import Patience, RetryPolicy, with_retries
from tiercache.store.spans import Request, RequestSizes, check_spans, plan_requests
from tiercache.store.urls import redact
from tiercache.waiting import SYSTEM_CLOCK

T = TypeVar("T")

_N_THREADS = 8
_SIZES = RequestSizes()


class FsspecStore(Store):
    """Objects of any fsspec file system. Safe from any thread; each process makes a file system of its own.

    On S3 it does all that the contract says by the store's own means. Elsewhere it is as good as the file system:
    put_if_absent has one winner in this process, and among processes where the file system's mode="create" has one;
    if_match compares what info() says before and after reading.
    """

    def __init__(
        self,
        full_url: str,
        url: str,
        options: Mapping[str, Any],
        *,
        policy: RetryPolicy | None = None,
        make: Callable[[], Any] | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            full_url: of the folder, secrets included; where make is given: the folder in make's own words.
            url: what may be shown of it.
            options: of the file system.
            policy: of retries.
            make: gives the file system, one that nobody else uses and that keeps no listings; picklable.
        """
        self._full_url, self._options, self._policy = full_url, dict(options), policy or RetryPolicy()
        self._make = make
        self.url = url
        self.counters = Counters("requests", "bytes_read", "bytes_written")
        self._pool = worker_pool(_N_THREADS)
        opened = partial(_open_files, full_url, options) if make is None else partial(_made_files, make, full_url)
        self._files_here: PerProcess[Files] = PerProcess(opened, lambda f: f.close())

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._full_url, self.url, self._options, self._policy, self._make)

    @property
    def _files(self) -> Files:
        return self._files_here.get()

    def close(self) -> None:
        """End the threads of this process and close its file system's connections."""
        self._pool.drop()
        self._files_here.drop()

    def head(self, key: str) -> ObjectInfo:
        """The file system's info()."""
        check_key(key)
        return self._retried(key, "head", lambda: self._files.info(key))

    def get(self, key: str) -> bytes:
        """The whole object."""
        check_key(key)
        data = self._retried(key, "get", lambda: self._files.read(key, None, None)[0])
        self.counters.add("bytes_read", len(data))
        return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """One request on S3; info() and a range elsewhere."""
        check_key(key)
        if n_bytes <= 0:
            return b"", self.head(key)
        tail, info = self._retried(key, "read_tail", lambda: self._files.read_tail(key, n_bytes))
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
        """Ranges in parallel, all of one object."""
        check_key(key)
        check_spans(spans)
        patience = Patience(self._at(key), "read_into", deadline_s, cancel, clock=SYSTEM_CLOCK)
        requests = plan_requests(spans, _SIZES)
        seen: dict[str, str] = {} if if_match is None else {"etag": if_match}
        checks = not self._files.is_conditional and (if_match is not None or len(requests) > 1)
        if checks:
            self._check_unchanged(key, seen)

        def read_one(request: Request, landing: Landing) -> None:
            with_retries(
                lambda: self._attempt(key, request, landing, seen), self._policy, patience, stop=landing.closed
            )

        read_requests(requests, read_one, self._pool, patience)
        if checks:
            self._check_unchanged(key, seen)

    def _attempt(self, key: str, request: Request, landing: Landing, seen: dict[str, str]) -> None:
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
                f"a range ends at {wanted.end}, the object at {n_bytes}; {len(data)} bytes came",
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
        info = self._retried(key, "put", lambda: self._files.write(key, body))
        self.counters.add("bytes_written", len(body))
        return info

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write the whole object by the file system's mode="create"."""
        check_key(key)
        body = bytes(data)

        def attempt() -> bool:
            with self._conditional(key, "put_if_absent"):
                self._files.write_new(key, body)
            self.counters.add("bytes_written", len(body))
            return True

        patience = Patience(self._at(key), "put_if_absent", clock=SYSTEM_CLOCK)
        try:
            return with_retries(attempt, self._policy, patience)
        except Taken:
            return False

    def create(self, key: str, *, if_absent: bool = False) -> Upload:  # noqa: ARG002 - complete() decides
        """On S3 a multipart upload; elsewhere parts on the local disk until complete()."""
        check_key(key)
        with self._errors(key, "create"):
            parts = self._files.begin(key)
        return _FilesUpload(self, key, parts)

    def delete(self, keys: Iterable[str]) -> None:
        """One by one, or by the file system's own way for many."""
        wanted = [check_key(key) for key in keys]
        if wanted:
            self._retried(wanted[0], "delete", lambda: self._files.delete(wanted))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The file system's find()."""
        folder = check_key(prefix.removesuffix("/")) if prefix else ""
        found = self._retried(prefix, "list", lambda: self._files.find(folder))
        for info in found:
            if not any(segment.startswith(TEMP_PREFIX) for segment in info.key.split("/")):
                yield info

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """By the file system."""
        check_key(src)
        check_key(dst)
        self._retried(src, f"copy to {dst}", lambda: self._files.copy(src, dst))
        return self.head(dst)

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _retried(self, key: str, doing: str, attempt: Callable[[], T]) -> T:
        def guarded() -> T:
            with self._errors(key, doing):
                return attempt()

        return with_retries(guarded, self._policy, Patience(self._at(key), doing, clock=SYSTEM_CLOCK))

    @contextmanager
    def _errors(self, key: str, doing: str) -> Iterator[None]:
        self.counters.add("requests")
        try:
            yield
        except (StoreError, Taken):
            raise
        except Exception as error:  # noqa: BLE001 - raised again as ours
            # File systems raise what their clients raise; from None because a client's text may hold a signed URL.
            raise failure(error, doing, self._at(key)) from None

    @contextmanager
    def _conditional(self, key: str, doing: str) -> Iterator[None]:
        """Errors of a conditional write: Taken where the key is, .maybe_done where the answer was lost."""
        self.counters.add("requests")
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again as ours
            if exists_already(error) and not is_conflict(error):
                raise Taken from None
            ours = failure(error, doing, self._at(key))
            if not may_have_happened(ours):
                raise ours from None
            message = f"{doing}: no answer that says whether it was written ({ours.message})"
            raise StoreError(message, url=self._at(key), retryable=True, maybe_done=True) from None


class _FilesUpload(Upload):
    """An upload over what begin() of the file system gave."""

    def __init__(self, store: FsspecStore, key: str, parts: Any) -> None:
        self._store, self._key, self._parts = store, key, parts
        self._is_open = True

    def put_part(self, number: int, data: Buffer) -> None:
        """Send the part."""
        if number < 0 or not self._is_open:
            raise ValueError(f"{self._key}: part {number}: parts count from 0, before complete() or abort()")
        body = bytes(data)
        self._store._retried(self._key, f"put_part {number}", lambda: self._parts.put(number, body))  # noqa: SLF001
        self._store.counters.add("bytes_written", len(body))

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish the parts."""
        if not self._is_open:
            raise ValueError(f"{self._key}: the upload was completed or aborted before")
        self._parts.check()
        self._is_open = False
        try:
            with self._store._conditional(self._key, "complete"):  # noqa: SLF001 - of one file
                self._parts.complete(if_absent=if_absent)
        except Taken:
            self._drop()
            return None
        except StoreError:
            self._drop()
            raise
        return self._store.head(self._key)

    def abort(self) -> None:
        """Drop the parts."""
        if self._is_open:
            self._is_open = False
            self._drop()

    def _drop(self) -> None:
        with suppress(StoreError), self._store._errors(self._key, "abort"):  # noqa: SLF001
            self._parts.abort()


def check_scheme(scheme: str) -> None:
    """Return if fsspec knows the scheme (its package may still be missing).

    Raises:
        ValueError: it does not.
    """
    known = importlib.import_module("fsspec").available_protocols()
    if scheme not in known:
        near = get_close_matches(scheme, known, n=3)
        meant = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"no store for {scheme}://{meant}")


def _rebuild(
    full_url: str, url: str, options: Mapping[str, Any], policy: RetryPolicy, make: Callable[[], Any] | None
) -> FsspecStore:
    return FsspecStore(full_url, url, options, policy=policy, make=make)


def _open_files(full_url: str, options: Mapping[str, Any]) -> Files:
    core = importlib.import_module("fsspec.core")
    scheme = full_url.partition("://")[0]
    more = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    # No cached instances (they are shared beyond us) and no cached listings (others write too).
    common = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        fs, root = core.url_to_fs(full_url, **common, **more, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise StoreError(f"the file system cannot be opened: {error}", url=redact(full_url)) from None
    if fs.protocol == "dir":
        root = ""  # it is the folder itself, and its names are relative to it
    return _files_of(fs, root)


def _made_files(make: Callable[[], Any], root: str) -> Files:
    return _files_of(make(), root)


def _files_of(fs: Any, root: str) -> Files:
    if "s3" not in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol):
        return PlainFiles(fs, root)
    asyn = importlib.import_module("fsspec.asyn")
    return S3Files(fs, root, lambda coroutine, *args: asyn.sync(fs.loop, coroutine, *args))
