"""The `tiercache` protocol of fsspec: any file system of fsspec, read through the cache.

Examples: `fsspec.open("tiercache::s3://bucket/key")`, `pandas.read_parquet("tiercache::s3://bucket/table.parquet")`,
`fsspec.filesystem("tiercache", target_protocol="s3")`. docs/guide/any-url.md gives more. fsspec finds the class through
the package's entry point.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import fsspec
from fsspec.archive import AbstractArchiveFileSystem

from tiercache.cache import Cache, CachedStore
from tiercache.errors import NotFound, ObjectChanged, StoreError, TierCacheError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store import FsspecStore, Span, Store, StoreFile, check_key, open_store, redact, uses
from tiercache.store.access import plain_url, scheme_of
from tiercache.store.contract import ProcessLocal
from tiercache.store.hub import store_type
from tiercache.store.placement import FileLocator, archived_file_error, is_archived, options_of
from tiercache.store.placement_log import prefix_store

try:
    from fsspec.implementations.chained import ChainedFileSystem
except ImportError:  # fsspec before 2025.10 chained only its own caches; tiercache://key::s3:// works there too
    from fsspec import AbstractFileSystem as ChainedFileSystem

from tiercache.cache.fetch import CopyLease
from tiercache.cache.names import CopySpec

_CHAIN = re.compile(r"tiercache(?:://|::)")
_OWN_OPTIONS = {
    "use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "asynchronous", "loop",
}  # fmt: skip
# Read options that do not select the object. Any other option (such as version_id) may, so the target reads the object.
_HOW = {"block_size", "cache_type", "cache_options", "size", "fill_cache", "max_concurrency", "timeout"}


def without_protocol(path: Any) -> Any:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    match = _CHAIN.match(text) if isinstance(text, str) else None
    return text if match is None else text[match.end() :]


# -- the file system that is read -------------------------------------------------------------------------------------

# Options that say on which server an object is; they are never secret. Objects with the same path, size and date on
# different servers are different objects.
_PLACES = (
    "endpoint_url", "endpoint", "host", "hostname", "port", "account_name", "account_host", "base_url", "url",
    "instance", "org", "repo", "sha", "ref", "gist_id", "root_file_id", "share", "namespace", "project_id",
    "path", "fo", "target_protocol",
)  # fmt: skip
_WITH_PLACES = ("client_kwargs", "target_options")
_PLAIN = re.compile(r"[\w.:/@ -]*")
_HTTP = re.compile(r"(https?://[^/]+)/(.+)")


class TargetFileSystem:
    """A file system that users see: `given` in the process that gave it, otherwise made by make() in each process.

    Safe for threads. Values of options are never shown.
    """

    def __init__(self, make: Callable[[], Any], given: Any = None) -> None:
        first = [given]
        # A given instance serves only the process that gave it, because clients and event loops do not survive a fork.
        self._fs: ProcessLocal[Any] = ProcessLocal(lambda: (first and first.pop()) or make(), id)
        kind, arguments, options = type(self.fs), self.fs.storage_args, dict(self.fs.storage_options)
        self.protocol: str = kind.protocol if isinstance(kind.protocol, str) else kind.protocol[0]
        self._make = partial(_private_copy, kind, arguments, options)
        # A hash that stays in memory, because it covers secrets too.
        self._digest = blake2b(repr((kind, arguments, sorted(options.items()))).encode()).digest()
        names = list(inspect.signature(kind.__init__).parameters)[1:]
        self._server = "/".join(_server_names({**dict(zip(names, arguments, strict=False)), **options}))

    @classmethod
    def of(cls, fs: Any, protocol: str | None, options: dict[str, Any]) -> TargetFileSystem:
        """Return the target that is given as a file system, or as a protocol and its options."""
        if protocol is None:
            make = partial(_private_copy, type(fs), fs.storage_args, dict(fs.storage_options))
            # A thread cannot wait for a file system that belongs to an event loop of the caller.
            return cls(make, None if getattr(fs, "asynchronous", False) else fs)
        kind = fsspec.get_filesystem_class(protocol)
        # Hugging Face datasets turns tiercache::s3://b/k into tiercache::s3://b/k::s3://b/k: s3 chained over s3.
        while options.get("target_protocol") == protocol and not issubclass(kind, ChainedFileSystem):
            inner = options.pop("target_options", None) or {}
            options = {**{n: v for n, v in options.items() if n not in ("fo", "target_protocol")}, **inner}
        return cls(partial(fsspec.filesystem, protocol, **options))

    @property
    def fs(self) -> Any:
        return self._fs.get()

    def store(self, root: str) -> FsspecStore:
        """Return the store of a bucket or top folder. Its own file system does not cache listings.

        Equal targets share the store: fsspec creates a file system per thread, and each would have its own connections.
        """
        store = _stores.get((self._digest, root))
        if store is None:
            slash = "/" if self._server and not root.startswith("/") else ""
            is_url = root.startswith(("http://", "https://"))
            url = redact(root) if is_url else f"{self.protocol}://{self._server}{slash}{root}"
            store = _stores[self._digest, root] = store_type(url)(root, url, {}, make=self._make)
        return store


_stores: WeakValueDictionary[tuple[bytes, str], FsspecStore] = WeakValueDictionary()


def split_path(path: str) -> tuple[str, str] | None:
    """Split the path of a file system into (root, key): its bucket, host or top folder, and the rest.

    None if the object cannot be cached: the path of a version or with a signature ("?", with HTTP also "#"), of
    an S3 access point, of a file directly below "/", or a path that is not a key (see check_key).
    """
    if "?" in path or path.startswith("arn:"):
        return None
    if (match := _HTTP.fullmatch(path)) is not None:
        if "#" in path:
            return None
        root, key = match[1], match[2]
    else:
        cut = path.find("/", 1 if path.startswith("/") else 0)
        root, key = ("", path) if cut < 0 else (path[:cut], path[cut + 1 :])
    try:
        return root, check_key(key)
    except ValueError:
        return None


def _private_copy(kind: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Return a new file system with the same options that shares no event loop, connections or listings."""
    # Not asynchronous, so that it runs on fsspec's own loop, whichever thread or loop calls it.
    kept = {name: value for name, value in options.items() if name not in ("asynchronous", "loop")}
    try:
        return kind(*arguments, **{**kept, "use_listings_cache": False}, skip_instance_cache=True)
    except TypeError:  # a class that does not pass on unknown options has no fsspec listings cache
        return kind(*arguments, **kept, skip_instance_cache=True)


def _server_names(options: Mapping[str, Any]) -> list[str]:
    """Return the values of options that name a server or folder, such as "127.0.0.1:9000" or "host:22"."""
    found = []
    for name in _PLACES:
        value = options.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            text = redact(str(value) or "-").rpartition("://")[2]
            found += [text] if _PLAIN.fullmatch(text) else []
    for name in _WITH_PLACES:
        inner = options.get(name)
        if isinstance(inner, Mapping):
            found += _server_names(inner)
    return found


# -- one open object --------------------------------------------------------------------------------------------------

# Table readers request whole column chunks; readers of text and archives request a few KiB at a time. A read larger
# than SMALL_BYTES is probably a deliberate choice, so readahead starts only after many such reads in a row.
SMALL_BYTES = 64 << 10
N_SMALL_IN_A_ROW = 3
N_LARGE_IN_A_ROW = 8
LEAST_AHEAD_BYTES = 128 << 10
MOST_AHEAD_BYTES = 8 << 20
# Two units of the cache: the maximum overhead of a small random read.
BUFFER_BYTES = 8192


class ObjectReader(StoreFile):
    """A raw file of the bytes of the object that was opened, whatever its key names now. For one thread at a time.

    After a fork, the child continues with its own lease. The file owns the lease.
    """

    def __init__(self, store: CachedStore, spec: CopySpec) -> None:
        super().__init__(store, spec.key, spec.n_bytes)
        self._cached, self._spec = store, spec
        self._lease: CopyLease | None = store.open_copy(spec)
        self._next, self._n_in_a_row, self._run_bytes, self._ahead_end = -1, 0, 0, 0
        self._block_start, self._block = 0, bytearray()

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        if self._lease is not None:
            self._lease.prefetch(ranges)

    def read_range(self, byte_range: ByteRange) -> bytes:
        """Return the bytes of a range that ends within the object; the position stays."""
        # BytesIO returns its own buffer without a copy, because nothing else refers to it.
        whole = io.BytesIO(bytes(byte_range.n_bytes))
        with whole.getbuffer() as view:
            self.fill(byte_range, view)
        return whole.getvalue()

    def fill(self, byte_range: ByteRange, buffer: memoryview) -> None:
        """Fill buffer with a range that ends within the object, and begin to fetch what a sequential reader needs next.

        Raises NotFound or ObjectChanged if the range is not cached and the object is gone or replaced, ArchivedShards
        if it must be restored first, and StoreError.
        """
        if not byte_range.n_bytes:
            return
        ahead_bytes = self._ahead_bytes(byte_range)
        start = byte_range.start - self._block_start
        if 0 <= start <= len(self._block) - byte_range.n_bytes:
            buffer[:] = memoryview(self._block)[start : start + byte_range.n_bytes]
            return
        wanted = ByteRange(byte_range.start, min(byte_range.end + ahead_bytes, self.n_bytes))
        if ahead_bytes and byte_range.end + ahead_bytes // 2 > self._ahead_end:  # one request for many reads
            self.prefetch([wanted])
            self._ahead_end = wanted.end
        try:
            if self._read_cached([(byte_range, buffer)]):
                return
            if not ahead_bytes:
                self._read_source([(byte_range, buffer)])
                return
            # Nothing is kept of what is read here, so this file keeps the bytes ahead itself.
            self._block_start, self._block = wanted.start, bytearray(wanted.n_bytes)
            self._read_source([(wanted, memoryview(self._block))])
            buffer[:] = memoryview(self._block)[: byte_range.n_bytes]
        except StoreError as error:
            if is_archived(error):
                raise archived_file_error(self._spec.source, self.n_bytes) from error
            raise

    def _ahead_bytes(self, byte_range: ByteRange) -> int:
        """Return the number of bytes to fetch beyond a range; 0 if it does not start where the last read ended."""
        if byte_range.start != self._next:
            self._n_in_a_row = self._run_bytes = self._ahead_end = 0
        self._next = byte_range.end
        self._n_in_a_row += 1
        self._run_bytes += byte_range.n_bytes
        needed = N_SMALL_IN_A_ROW if byte_range.n_bytes <= SMALL_BYTES else N_LARGE_IN_A_ROW
        if self._n_in_a_row < needed:
            return 0
        # As much as was read in this run: a reader that stops has fetched at most twice the bytes it read.
        return min(max(self._run_bytes, LEAST_AHEAD_BYTES), MOST_AHEAD_BYTES)

    def _read_cached(self, spans: list[Span]) -> bool:
        """Read from the copy, whose checksums are compared. Return False if the range will not be cached."""
        ranges = [span for span, _ in spans]
        for _ in range(2):
            lease = self._lease
            if lease is None or not (lease.present(ranges) or lease.wait(ranges)):
                return False
            # Through the lease if it is on a partial copy, because the partial copy of a changed object has lost its
            # name. Otherwise by name, which also removes a wrong copy from the cache: it is fetched again.
            if lease.read(spans) or self._cached.read_copy(self._spec, spans):
                lease.note_read(sum(span.n_bytes for span in ranges), lambda: ranges)
                return True
            lease.close()
            self._lease = self._cached.open_copy(self._spec)
        return False

    def _read_source(self, spans: list[Span]) -> None:
        if_match = self._spec.if_match
        self._cached.inner.read_into(self._spec.key, spans, if_match=if_match)
        if if_match is None:
            # Without an ETag to check, the object must have the same description after the read.
            found = self._cached.spec_of(self._spec.key)
            if found is None or found.name != self._spec.name:
                etag = None if found is None else found.etag
                raise ObjectChanged(url=self._spec.source, expected=self._spec.etag, found=etag)

    def close(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()
        super().close()


class CachedFile(io.BufferedReader):
    """A file of the cache, open for reading: the object that was opened, even if it is replaced. Safe for threads."""

    def __init__(self, fs: TierCacheFileSystem, path: str, reader: ObjectReader) -> None:
        super().__init__(reader, BUFFER_BYTES)
        self.fs, self.path, self.size = fs, path, reader.n_bytes
        self._reader, self._lock = reader, Lock()

    def read(self, size: int | None = -1, /) -> bytes:
        with self._lock:
            start = self.tell()
            n_left = max(self.size - start, 0)
            n_bytes = n_left if size is None or size < 0 else min(size, n_left)
            if n_bytes <= BUFFER_BYTES:
                return super().read(n_bytes)
            data = self._reader.read_range(ByteRange(start, start + n_bytes))
            self.seek(start + n_bytes)
            return data

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {redact(self.path)!r}>"


# -- the file system --------------------------------------------------------------------------------------------------


class TierCacheFileSystem(ChainedFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """A file system that reads another file system through the cache. It refuses to write.

    Opening a file sends one request to the target for the object's identity: its ETag, version, or size and date.
    Cached bytes of that identity are read locally. A changed object is another copy, and an object without an identity
    bypasses the cache. Names are those of the target, and of files that a mover has sent to another tier. Safe for
    threads and fork-safe.

    Attributes:
        cache: Cache through which files are read; None before the first read, if the default cache is used.
    """

    protocol: ClassVar[str] = "tiercache"
    # fsspec then shares one instance among all paths of a chain.
    _strip_tokenize_options = ("fo",)

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        fs: Any = None,
        *,
        cache: Cache | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: str | int | None = None,
        fo: str | None = None,  # noqa: ARG002 - fsspec's name for the path in a chain; every call names its path
        **options: Any,
    ) -> None:
        """Open the target, but not the cache.

        Args:
            target_protocol: Protocol of the target file system, such as "s3". Give either this or fs.
            target_options: Options of the target file system.
            fs: Target file system, instead of target_protocol and target_options.
            cache: Cache to read through. None: Cache.default() with cache_dir and cache_size.
            cache_dir: Folder of the cache; None for the configured one.
            cache_size: Size of the cache, such as "200GB"; None for the configured one.
            fo: Not used; fsspec passes the path of a chain, and every call names its path.
            **options: Options of fsspec itself (use_listings_cache, skip_instance_cache).
        """
        if unknown := sorted(options.keys() - _OWN_OPTIONS):
            raise TypeError(
                f"tiercache:: does not know {', '.join(unknown)}; it takes cache, cache_dir and cache_size. Pass "
                "options of the target under its protocol with a URL, s3={...}, and in target_options={...} otherwise"
            )
        if options.get("asynchronous"):
            raise ValueError(
                "tiercache:: is synchronous: wrap it with fsspec.implementations.asyn_wrapper.AsyncFileSystemWrapper"
            )
        if (fs is None) == (target_protocol is None):
            raise ValueError(
                "tiercache reads another file system: name it exactly once, in the URL ('tiercache::s3://bucket/key'), "
                "by target_protocol='s3', or by fs=..."
            )
        if cache is not None and (cache_dir is not None or cache_size is not None):
            raise ValueError("cache=... has its own folder and size: remove cache_dir and cache_size")
        if target_protocol == self.protocol or isinstance(fs, TierCacheFileSystem):
            raise ValueError("tiercache:: over tiercache:: would cache everything twice; name it once")
        super().__init__(**options)
        self._target = TargetFileSystem.of(fs, target_protocol, dict(target_options or {}))
        self.cache, self._cache_dir, self._cache_size = cache, cache_dir, cache_size
        self._stores: dict[str, CachedStore] = {}
        self._locator = FileLocator(self._open_location)
        self._strip_protocol = self._strip_target_protocol  # fsspec also calls the class method, which has no target

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target.protocol!r})"

    @property
    def fs(self) -> Any:
        """Target file system of this process."""
        return self._target.fs

    def close(self) -> None:
        """End the threads and connections through which the cache reads. A later read creates them again."""
        for store in list(self._stores.values()):
            store.close()
        self._locator.close()

    def _strip_target_protocol(self, path: Any) -> Any:
        if isinstance(path, list):
            return [self._strip_target_protocol(one) for one in path]
        return self.fs._strip_protocol(without_protocol(path))  # noqa: SLF001 - part of every fsspec file system's interface

    def unstrip_protocol(self, name: str) -> str:
        """Return the URL of a path: "tiercache::s3://bucket/key"."""
        return f"{self.protocol}::{self.fs.unstrip_protocol(without_protocol(name))}"

    # -- contents, through the cache

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        """Return a file: a CachedFile if the cache can be used; block_size is for the target alone."""
        if mode != "rb":
            self._refuse(path)
        options.pop("autocommit", None)
        reader = self._reader(path, options)
        if reader is None:
            return self.fs.open(path, mode, block_size=block_size, **options)
        return CachedFile(self, path, reader)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Return the bytes of a range, with the rules of slices."""
        path = self._strip_protocol(path)
        reader = self._reader(path, options)
        if reader is None:
            return bytes(self.fs.cat_file(path, start=start, end=end, **options))
        with reader:
            first, last, _ = slice(start, end).indices(reader.n_bytes)
            wanted = ByteRange(first, max(first, last))
            reader.prefetch([wanted])
            return reader.read_range(wanted)

    def _reader(self, path: str, options: Mapping[str, Any]) -> ObjectReader | None:
        """Open the object that the path names now. Return None if the target must read it (or report why it cannot).

        In both cases, the read counts as a use of the object for the rules of tiers.
        """
        uses.record_use(str(self.fs.unstrip_protocol(path)))
        location = None if options.keys() - _HOW else split_path(path)
        # A member of an archive has no identity, but the archive has: zip://name::tiercache::s3://bucket/a.zip
        if location is None or isinstance(self.fs, AbstractArchiveFileSystem):
            return None
        if self.cache is None:
            size = None if self._cache_size is None else str(self._cache_size)
            self.cache = Cache.default(path=self._cache_dir, size=size)
        cache, (root, key) = self.cache, location
        # Nothing is opened yet: if two threads create a store, the first one is kept and nothing leaks.
        store = self._stores.get(root) or self._stores.setdefault(root, cache.store(self._target.store(root)))
        try:
            spec = store.spec_of(key)
        except NotFound:
            return self._moved_reader(path, cache)
        except TierCacheError:
            return None
        return None if spec is None else ObjectReader(store, spec)

    # -- names: the target's, and those of files that a mover has sent to another tier; fsspec derives its other methods

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        try:
            return dict(self.fs.info(path, **options))
        except FileNotFoundError:
            moved = self._moved(path)
            if not moved:
                raise
        return _about(path, moved.get(path))

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        try:
            return list(self.fs.ls(path, detail=detail, **options))
        except FileNotFoundError:
            moved = self._moved(path)
            if not moved:
                raise
        folder = path.rstrip("/")
        names = {path} if path in moved else {f"{folder}/{name[len(folder) + 1 :].split('/')[0]}" for name in moved}
        return [_about(name, moved.get(name)) if detail else name for name in sorted(names)]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> Any:
        path = self._strip_protocol(path)
        if found := self.fs.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail, **options):
            return found
        return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail)

    def _moved(self, path: str) -> dict[str, ObjectInfo]:
        """Return the file, or everything below the folder, that once lay at a path, by the name that it had."""
        base = path.rstrip("/")
        url = self._location_of(base)
        try:
            file = self._locator.find_file(url) if base else None
            folder = self._locator.find_folder(url) if base and file is None else None
        except StoreError:
            return {}
        if file is not None:
            return {path: file.info}
        return {} if folder is None else {f"{base}/{name}": one.info for name, one in folder.files.items()}

    def _moved_reader(self, path: str, cache: Cache) -> ObjectReader | None:
        """Open an object that the target no longer has, where it lies now; None: it is nowhere, or has no identity."""
        try:
            found = self._locator.find_file(self._location_of(path))
        except StoreError:
            return None
        if found is None:
            return None
        if found.is_archived:
            raise archived_file_error(found.url, found.info.n_bytes)
        name = f"moved {found.store.url}"
        store = self._stores.get(name) or self._stores.setdefault(name, cache.store(found.store))
        spec = store.spec_of(found.key)
        return None if spec is None else ObjectReader(store, spec)

    def _location_of(self, path: str) -> str:
        url = str(self.fs.unstrip_protocol(path))
        return plain_url(url) if url.startswith("file://") else url

    def _open_location(self, url: str) -> Store:
        """Return the store of a tier or home: through the target, which has credentials, if it is of the same kind."""
        options = options_of(url)
        is_same_kind = not options and scheme_of(url) == self._target.protocol
        location = split_path(f"{url}/-".partition("://")[2]) if is_same_kind else None
        if location is None:
            return open_store(url, **options)
        root, key = location
        return prefix_store(self._target.store(root), key.removesuffix("-").rstrip("/"))

    # -- writing

    def _refuse(self, path: Any, *_arguments: Any, **_options: Any) -> Any:
        raise OSError(errno.EROFS, "tiercache:: only reads: write to the URL without tiercache::", str(path))

    mkdir = makedirs = rmdir = rm = rm_file = touch = pipe_file = put_file = cp_file = mv = _refuse


def _about(path: str, info: ObjectInfo | None) -> dict[str, Any]:
    if info is None:
        return {"name": path, "size": 0, "type": "directory"}
    about: dict[str, Any] = {"name": path, "size": info.n_bytes, "type": "file"}
    about |= {} if info.modified_s is None else {"mtime": info.modified_s}
    return about | ({} if info.etag is None else {"ETag": info.etag})
