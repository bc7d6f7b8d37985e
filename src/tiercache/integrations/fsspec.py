"""The `tiercache` protocol of fsspec: any file system of fsspec, read through the cache.

Examples: `fsspec.open("tiercache::s3://bucket/key")`, `pandas.read_parquet("tiercache::s3://bucket/table.parquet")`,
`fsspec.filesystem("tiercache", target_protocol="s3")`. docs/guide/any-url.md gives more. fsspec finds the class through
the package's entry point.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

import fsspec
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.callbacks import DEFAULT_CALLBACK

from tiercache.cache import Cache, CachedStore, drop_objects
from tiercache.errors import NotFound, StoreError, TierCacheError
from tiercache.integrations.fsspec_files import CachedFile, ObjectReader, WrittenFile
from tiercache.integrations.fsspec_moved import FOLLOWED, MovedPaths, follow, moved_paths
from tiercache.model import ByteRange
from tiercache.store import FsspecStore, Store, check_key, open_store, redact
from tiercache.store.placement import uses
from tiercache.store.placement.locations import FileLocator, archived_file_error
from tiercache.store.placement.log import prefix_store
from tiercache.store.placement.resolver import options_of, scheme_of
from tiercache.store.range_reads import ProcessLocal

_CHAIN = re.compile(r"tiercache(?:://|::)")
_MAGIC = re.compile(r"[*?\[]")


def without_protocol(path: Any) -> Any:
    """Return paths (a path, a list, or the keys of a mapping) without "tiercache::", as the target accepts them."""
    if isinstance(path, Mapping):
        return {without_protocol(name): value for name, value in path.items()}
    if isinstance(path, list | tuple | set | frozenset):
        return [without_protocol(name) for name in path]
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    match = _CHAIN.match(text) if isinstance(text, str) else None
    return text if match is None else text[match.end() :]


def literal_prefix(path: str) -> str:
    """Return the part of a path before its first wildcard: the folder that contains all matches."""
    return _MAGIC.split(path)[0].rpartition("/")[0] if _MAGIC.search(path) else path


# Methods of a file system that do not read contents: names of their leading path arguments, and of the written paths.
_ONE_PATH = (
    "ls info exists lexists isdir isfile find walk glob du size expand_path created modified checksum ukey sign mkdir "
    "makedirs rmdir invalidate_cache"
)
_PATH_METHODS = {
    **dict.fromkeys(_ONE_PATH.split(), ("path", "")),
    **dict.fromkeys(("pipe", "pipe_file", "rm", "rm_file", "touch"), ("path", "path")),
    "sizes": ("paths", ""),
    "start_transaction": ("", ""),
    "end_transaction": ("", ""),
    "put": ("lpath rpath", "rpath"),
    "put_file": ("lpath rpath", "rpath"),
    "copy": ("path1 path2", "path2"),
    "cp_file": ("path1 path2", "path2"),
    "mv": ("path1 path2", "path1 path2"),
}


def _delegate(method: str, paths: str, written: str) -> Callable[..., Any]:
    """Return a method that calls the target's method, and drops the cached copies of the written paths after it."""
    names = paths.split()
    dropped = [names.index(name) for name in written.split()]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        given = [*arguments[: len(names)], *(options.pop(name) for name in names[len(arguments) :] if name in options)]
        try:
            return getattr(self.fs, method)(*map(without_protocol, given), *arguments[len(names) :], **options)
        finally:
            if dropped:
                self.drop(*(given[number] for number in dropped if number < len(given)))

    call.__name__, call.__qualname__ = method, f"DelegatedMethods.{method}"
    call.__doc__ = f"Call the target's {method}(){' and drop the cached copies of the written paths' * bool(dropped)}."
    return call


class DelegatedMethods:
    """The methods of _PATH_METHODS. The subclass provides fs (the target) and drop()."""


for _method, (_paths, _written) in _PATH_METHODS.items():
    _delegated = _delegate(_method, _paths, _written)
    setattr(DelegatedMethods, _method, follow(_method, _delegated) if _method in FOLLOWED else _delegated)


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
        self._make = partial(private_copy, kind, arguments, options)
        # A hash that stays in memory, because it covers secrets too.
        self._digest = blake2b(repr((kind, arguments, sorted(options.items()))).encode()).digest()
        names = list(inspect.signature(kind.__init__).parameters)[1:]
        self._server = "/".join(_server_names({**dict(zip(names, arguments, strict=False)), **options}))

    def __repr__(self) -> str:
        return f"Target({self.protocol!r})"

    @property
    def fs(self) -> Any:
        """File system of this process."""
        return self._fs.get()

    def store(self, root: str) -> FsspecStore:
        """Return the store of a bucket or top folder. Its own file system does not cache listings.

        Equal targets share the store: fsspec creates a file system per thread, and each would have its own connections.
        """
        store = _stores.get((self._digest, root))
        if store is None:
            store = _stores[self._digest, root] = FsspecStore(root, self.url(root), {}, make=self._make)
        return store

    def url(self, path: str) -> str:
        """Return the URL of a path without credentials and query."""
        if path.startswith(("http://", "https://")):
            return redact(path)
        return f"{self.protocol}://{self._server}{'/' if self._server and not path.startswith('/') else ''}{path}"


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


def private_copy(kind: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
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


try:
    from fsspec.implementations.chained import ChainedFileSystem
except ImportError:  # fsspec before 2025.10 chained only its own caches; tiercache://key::s3:// works there too
    from fsspec import AbstractFileSystem as ChainedFileSystem

T = TypeVar("T")
A = TypeVar("A")

# Number of parallel calls when many objects are read.
N_AT_ONCE = 16
COPY_BYTES = 8 << 20
_OWN_OPTIONS = {
    "use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "asynchronous", "loop",
}  # fmt: skip
# Read options that do not select the object. Any other option (such as version_id) may, so the target reads the object.
_HOW = {"block_size", "cache_type", "cache_options", "size", "fill_cache", "max_concurrency", "timeout"}


class TierCacheFileSystem(DelegatedMethods, ChainedFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """A file system that reads another file system through the cache, and delegates all other methods to it.

    Opening a file sends one request to the target for the object's identity: its ETag, version, or size and date.
    Cached bytes of that identity are read locally. A changed object is another copy, and an object without an identity
    bypasses the cache. Writes go to the target and drop the cached copy. Safe for threads and fork-safe.

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

        Raises:
            TypeError: An option is unknown. Options of the target go into target_options.
            ValueError: No target or two targets are given, the target is a tiercache file system, or a cache is given
                together with its folder or size.
        """
        _check_options(options)
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
        self._target = (
            _target_of_instance(fs)
            if target_protocol is None
            else _target_of_protocol(target_protocol, dict(target_options or {}))
        )
        self.cache, self._cache_dir, self._cache_size = cache, cache_dir, cache_size
        self._is_uncached = False
        self._stores: dict[str, CachedStore] = {}
        self._locator = FileLocator(self._open_location)
        self._strip_protocol = self._strip_target_protocol  # fsspec also calls the class method, which has no target

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target.protocol!r})"

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that only the target has."""
        if name.startswith("_") or name == "fs":  # may be read before __init__ has finished
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.fs, name)

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
        return self.fs._strip_protocol(without_protocol(path))  # noqa: SLF001 - part of every fsspec file system's interface

    def unstrip_protocol(self, name: str) -> str:
        """Return the URL of a path: "tiercache::s3://bucket/key"."""
        return f"{self.protocol}::{self.fs.unstrip_protocol(without_protocol(name))}"

    # Reads, through the cache

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Return a file: a CachedFile if the cache can be used. block_size: Its maximum readahead in bytes."""
        reading = self._reading(path, options) if mode == "rb" else None
        if reading is not None:
            return CachedFile(self, path, reading, block_size if isinstance(block_size, int) else None)
        if not autocommit:
            options["autocommit"] = False
        file = self.fs.open(path, mode, block_size=block_size, cache_options=cache_options, **options)
        if mode == "rb":
            return file
        self.drop(path)
        return WrittenFile(file, lambda: self.drop(path))

    def _reading(self, path: str, options: Mapping[str, Any]) -> ObjectReader | None:
        """Open the object that the path names now. Return None if the target must read it (or report why it cannot).

        In both cases, the read counts as a use of the object for the rules of tiers.
        """
        uses.record_use(str(self.fs.unstrip_protocol(path)))
        location = None if options.keys() - _HOW else split_path(path)
        # A member of an archive has no identity, but the archive has: zip://name::tiercache::s3://bucket/a.zip
        if location is None or isinstance(self.fs, AbstractArchiveFileSystem):
            return None
        root, key = location
        store = self._stores.get(root)
        if store is None:
            cache = self._open_cache()
            if cache is None:
                return None
            # Nothing is opened yet: if two threads create a store, the first one is kept and nothing leaks.
            store = self._stores.setdefault(root, cache.store(self._target.store(root)))
        try:
            spec = store.spec_of(key)
        except NotFound:
            return self._read_moved(path)
        except TierCacheError:
            return None
        return None if spec is None else ObjectReader(store, spec)

    # Files that a mover has sent to another tier

    def _read_moved(self, path: str) -> ObjectReader | None:
        """Open an object that the target no longer has, where it lies now; None: it is nowhere, or has no cache."""
        cache = self._open_cache()
        try:
            found = self._locator.find_file(self._location_of(path))
        except StoreError:
            return None
        if found is None or cache is None:
            return None
        if found.is_archived:
            raise archived_file_error(found.url, found.info.n_bytes)
        name = f"moved {found.store.url}"
        store = self._stores.get(name) or self._stores.setdefault(name, cache.store(found.store))
        spec = store.spec_of(found.key)
        return None if spec is None else ObjectReader(store, spec)

    def moved(self, path: str) -> MovedPaths | None:
        """Return the names at or below a path (before its first wildcard) that moved to another tier; None: none."""
        base = literal_prefix(str(self._strip_protocol(path))).rstrip("/")
        try:
            return moved_paths(self._locator, base, self._location_of(base)) if base else None
        except StoreError:
            return None

    def _location_of(self, path: str) -> str:
        """Return the URL or local path of a path of the target."""
        url = str(self.fs.unstrip_protocol(path))
        return uses.plain_url(url) if url.startswith("file://") else url

    def _open_location(self, url: str) -> Store:
        """Return the store of a tier or home: through the target, which has credentials, if it is of the same kind."""
        options = options_of(url)
        is_same_kind = not options and scheme_of(url) == self._target.protocol
        location = split_path(f"{url}/-".partition("://")[2]) if is_same_kind else None
        if location is None:
            return open_store(url, **options)
        root, key = location
        return prefix_store(self._target.store(root), key.removesuffix("-").rstrip("/"))

    def _open_cache(self) -> Cache | None:
        """Return the cache; None, with a warning, if the default cache cannot be opened: the user did not name it."""
        if self.cache is None and not self._is_uncached:
            size = None if self._cache_size is None else str(self._cache_size)
            try:
                self.cache = Cache.default(path=self._cache_dir, size=size)
            except OSError as error:
                if self._cache_dir is not None:
                    raise
                self._is_uncached = True
                warnings.warn(
                    f"tiercache:: has no cache, so everything is read from its source: {error}; name a writable folder "
                    "with cache_dir=... or TIERCACHE_CACHE_DIR",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self.cache

    def open_many(self, open_files: Any) -> list[Any]:
        """Open the files of an fsspec.OpenFiles in parallel; fsspec calls this in `with open_files as files`."""
        return map_parallel(lambda file: file.__enter__(), list(open_files))

    def commit_many(self, open_files: Any) -> None:
        """Do nothing: each file was written when it was closed. fsspec calls this after open_many()."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Return the bytes of a range, with the rules of slices."""
        stripped = self._strip_protocol(path)
        reading = self._reading(stripped, options)
        if reading is None:
            return bytes(self.fs.cat_file(stripped, start=start, end=end, **options))
        with reading:
            return reading.read(_slice(start, end, reading.n_bytes))

    def cat(
        self, path: str | list[str], recursive: bool = False, on_error: str = "raise", **options: Any
    ) -> bytes | dict[str, bytes | Exception]:
        """Return contents by path, read in parallel, or the content alone if path names one file."""
        paths = self.expand_path(path, recursive=recursive)
        if isinstance(path, str) and paths == [self._strip_protocol(path)] and not recursive:
            return self.cat_file(paths[0], **options)
        files = [name for name in paths if not (recursive and self.isdir(name))]
        found = map_parallel(lambda name: _tried(lambda: self.cat_file(name, **options), on_error != "raise"), files)
        contents = zip(files, found, strict=True)
        return {name: data for name, data in contents if on_error != "omit" or not isinstance(data, Exception)}

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | list[int | None] | None,
        ends: int | list[int | None] | None,
        max_gap: int | None = None,  # noqa: ARG002 - fsspec's
        on_error: str = "return",
        **options: Any,
    ) -> list[bytes | Exception]:
        """Return the bytes of many ranges. Each object is looked up once, and all its ranges are fetched together.

        max_gap is not used: the cache coalesces neighbouring ranges itself.
        """
        first = starts if isinstance(starts, list) else [starts] * len(paths)
        last = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(first) == len(last):
            raise ValueError(f"{len(paths)} paths, {len(first)} starts, {len(last)} ends: expected equal numbers")
        names = list(dict.fromkeys(paths))
        with ExitStack() as stack:
            opened = map_parallel(lambda path: self._reading(self._strip_protocol(path), options), names)
            readers = dict(zip(names, opened, strict=True))
            ranges = {stack.enter_context(one): list[ByteRange]() for one in opened if one is not None}
            items = list(zip(paths, first, last, strict=True))
            for path, start, end in items:
                if (reader := readers[path]) is not None:
                    ranges[reader].append(_slice(start, end, reader.n_bytes))
            for one, ranges_of_one in ranges.items():
                one.prefetch(ranges_of_one)

            def read(path: str, start: int | None, end: int | None) -> bytes:
                if (reader := readers[path]) is None:
                    return bytes(self.fs.cat_file(without_protocol(path), start, end, **options))
                return reader.read(_slice(start, end, reader.n_bytes))

            return map_parallel(lambda item: _tried(lambda: read(*item), on_error != "raise"), items)

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Any = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **options: Any,
    ) -> None:
        """Copy files and folders to local paths in parallel, with fsspec's rules for the destination paths."""
        planned = _CopyRecorder(self)
        ChainedFileSystem.get(planned, rpath, lpath, recursive=recursive, maxdepth=maxdepth)
        callback.set_size(len(planned.pairs))

        def copy(pair: tuple[str, str]) -> None:
            with callback.branched(*pair) as child:
                self.get_file(*pair, callback=child, **options)
            callback.relative_update()

        map_parallel(copy, planned.pairs)

    def get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, outfile: Any = None, **options: Any
    ) -> None:
        """Copy a file to a local path or into an open file. For a folder, create the local folder."""
        path = self._strip_protocol(rpath)
        reading = self._reading(path, options)
        out = lpath if outfile is None and hasattr(lpath, "write") else outfile
        if reading is None:
            if out is None and self.isdir(path):
                Path(lpath).mkdir(parents=True, exist_ok=True)
                return
            more = {} if outfile is None else {"outfile": outfile}
            self.fs.get_file(path, lpath, callback=callback, **more, **options)
            return
        with reading, ExitStack() as stack:
            if out is None:
                Path(lpath).parent.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(Path(lpath).open("wb"))
            _copy_object(reading, out, callback)

    # Writes, by the target

    def drop(self, *paths: Any) -> None:
        """Drop the cached copies of paths (a path, a list or a mapping's keys; with wildcards) and of paths below."""
        sources = [self._target.url(name).rstrip("/") for path in paths for name in self._literals(path)]
        # The write has succeeded, and the new object has another identity than the copy. An error here would wrongly
        # say that the write failed.
        with suppress(TierCacheError, OSError, ValueError):
            cache = self._open_cache()
            if cache is not None:
                drop_objects(cache, sources)

    def _literals(self, path: Any) -> list[str]:
        if isinstance(path, str | os.PathLike):
            return [literal_prefix(str(self._strip_protocol(path)))]
        return [name for one in path for name in self._literals(one)]

    @property
    def transaction(self) -> Any:
        """Transaction of the target."""
        return self.fs.transaction


class _CopyRecorder:
    """A file system for fsspec's get(), which copies files one by one: it records the copies instead."""

    def __init__(self, fs: TierCacheFileSystem) -> None:
        self._fs = fs
        self.pairs: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Record the copy."""
        self.pairs.append((rpath, lpath))


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - _OWN_OPTIONS)
    if unknown:
        raise TypeError(
            f"tiercache:: does not know {', '.join(unknown)}; it takes cache, cache_dir and cache_size. Pass options "
            "of the target under its protocol with a URL, s3={...}, and in target_options={...} otherwise"
        )
    if options.get("asynchronous"):
        raise ValueError(
            "tiercache:: is synchronous: wrap it with fsspec.implementations.asyn_wrapper.AsyncFileSystemWrapper"
        )


def _target_of_instance(fs: Any) -> TargetFileSystem:
    make = partial(private_copy, type(fs), fs.storage_args, dict(fs.storage_options))
    # A thread cannot wait for a file system that belongs to an event loop of the caller.
    return TargetFileSystem(make, None if getattr(fs, "asynchronous", False) else fs)


def _target_of_protocol(protocol: str, options: dict[str, Any]) -> TargetFileSystem:
    kind = fsspec.get_filesystem_class(protocol)
    # Hugging Face datasets turns tiercache::s3://b/k into tiercache::s3://b/k::s3://b/k: s3 chained over s3.
    while options.get("target_protocol") == protocol and not issubclass(kind, ChainedFileSystem):
        inner = options.pop("target_options", None) or {}
        options = {**{n: v for n, v in options.items() if n not in ("fo", "target_protocol")}, **inner}
    return TargetFileSystem(partial(fsspec.filesystem, protocol, **options))


def _slice(start: int | None, end: int | None, n_bytes: int) -> ByteRange:
    first, last, _ = slice(start, end).indices(n_bytes)
    return ByteRange(first, max(first, last))


def _tried(call: Callable[[], T], keeps_error: bool) -> T | Exception:
    """Return the result of a call or, if keeps_error, its exception, as fsspec's on_error="return" requires."""
    try:
        return call()
    except Exception as error:
        if keeps_error:
            return error
        raise


def map_parallel(call: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Return the results of calls for all items, run in parallel. The first error is raised after all calls."""
    items = list(items)
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(N_AT_ONCE, len(items)), thread_name_prefix="tiercache-fsspec") as pool:
        return list(pool.map(call, items))


def _copy_object(reading: ObjectReader, out: Any, callback: Any) -> None:
    """Write a whole object to an open file, and report the progress to callback."""
    n_bytes = reading.n_bytes
    callback.set_size(n_bytes)
    reading.prefetch([ByteRange(0, n_bytes)])
    buffer = memoryview(bytearray(min(COPY_BYTES, n_bytes)))
    for start in range(0, n_bytes, COPY_BYTES):
        span = ByteRange(start, min(start + COPY_BYTES, n_bytes))
        reading.read_into(span, buffer[: span.n_bytes])
        out.write(buffer[: span.n_bytes])
        callback.relative_update(span.n_bytes)
