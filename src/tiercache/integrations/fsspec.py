"""`tiercache::` for fsspec: any file system of fsspec, read through the cache.

`fsspec.open("tiercache::s3://bucket/key")`, `pandas.read_parquet("tiercache::s3://bucket/table.parquet")`, or
`fsspec.filesystem("tiercache", target_protocol="s3")`; docs/guide/any-url.md has more. fsspec finds the class by the
package's entry point.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import fsspec
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.callbacks import DEFAULT_CALLBACK

from tiercache.cache import Cache, CachedStore
from tiercache.catalog import read_log
from tiercache.errors import TierCacheError
from tiercache.integrations.files import CachedFile, WrittenFile
from tiercache.integrations.reading import Reading
from tiercache.integrations.target import Target, place_of, unshared
from tiercache.integrations.verbs import TargetVerbs, bare, literal
from tiercache.model import ByteRange

try:
    from fsspec.implementations.chained import ChainedFileSystem
except ImportError:  # before 2025.10 fsspec knew only its own caches for chains; tiercache://key::s3:// works there too
    from fsspec import AbstractFileSystem as ChainedFileSystem

T = TypeVar("T")
A = TypeVar("A")

# Objects that are asked about at the same time, where many are read at once.
N_AT_ONCE = 16
COPY_BYTES = 8 << 20
_OWN_OPTIONS = {
    "use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "asynchronous", "loop",
}  # fmt: skip
# Options of reading that say how; any other may say what, such as version_id, and is the target's business.
_HOW = {"block_size", "cache_type", "cache_options", "size", "fill_cache", "max_concurrency", "timeout"}


class TierCacheFileSystem(TargetVerbs, ChainedFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """A file system that reads another one through the cache, and leaves all else to it.

    Opening a file asks the target once what the object is now (its ETag, version, or size and date): what the cache has
    of that one is read here, a changed object is another copy, and one without any identity is read past the cache.
    Writing goes to the target and drops the copy. Any thread may use it, and forked children.
    """

    protocol: ClassVar[str] = "tiercache"
    # One file system for all paths of a chain.
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
        """Open nothing yet but the target.

        Args:
            target_protocol: of the file system behind, such as "s3"; or fs.
            target_options: its options.
            fs: the file system behind, in place of the two.
            cache: None: Cache.default() with cache_dir and cache_size, as the configuration has them.
            cache_dir: the cache's folder.
            cache_size: its size, such as "200GB".
            fo: not used: every call names its path.
            **options: fsspec's own (use_listings_cache, skip_instance_cache).

        Raises:
            TypeError: an option that is not known; options of the target go into target_options.
            ValueError: no target, two, or this one again; a cache and also its folder or size.
        """
        _check_options(options)
        if (fs is None) == (target_protocol is None):
            raise ValueError(
                "tiercache reads another file system: name it in the URL ('tiercache::s3://bucket/key'), by "
                "target_protocol='s3', or by fs=..., and only once"
            )
        if cache is not None and (cache_dir is not None or cache_size is not None):
            raise ValueError("cache=... has its own folder and size: leave cache_dir and cache_size out")
        if target_protocol == self.protocol or isinstance(fs, TierCacheFileSystem):
            raise ValueError("tiercache:: over tiercache:: would keep everything twice; name it once")
        super().__init__(**options)
        self._target = _given(fs) if target_protocol is None else _made(target_protocol, dict(target_options or {}))
        self._cache, self._cache_dir, self._cache_size = cache, cache_dir, cache_size
        self._is_uncached = False
        self._stores: dict[str, CachedStore] = {}
        self._strip_protocol = self._strip_target_protocol  # fsspec asks the class too, which knows no target

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target.protocol!r})"

    def __getattr__(self, name: str) -> Any:
        """What only the target has: its own methods and settings."""
        if name.startswith("_") or name == "fs":  # not before __init__ is over
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.fs, name)

    @property
    def fs(self) -> Any:
        """The file system behind, of this process."""
        return self._target.fs

    def close(self) -> None:
        """End the threads and connections by which the cache reads. They come again when they are needed."""
        for store in list(self._stores.values()):
            store.close()

    def _strip_target_protocol(self, path: Any) -> Any:
        return self.fs._strip_protocol(bare(path))  # noqa: SLF001 - fsspec's name for what every file system gives

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path: "tiercache::s3://bucket/key"."""
        return f"{self.protocol}::{self.fs.unstrip_protocol(bare(name))}"

    # -- reading, through the cache ---------------------------------------------------------------------------------

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """A file: CachedFile where the cache may be used; block_size: most bytes to be fetched ahead of a reader."""
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

    def _reading(self, path: str, options: Mapping[str, Any]) -> Reading | None:
        """A hold on what lies under path now; None: the target reads it, or says in its own words why it cannot.

        Either way it counts as a use of the object, for tiers' rules.
        """
        read_log.note(str(self.fs.unstrip_protocol(path)))
        place = None if options.keys() - _HOW else place_of(path)
        # What lies in an archive has no identity of its own; the archive has: zip://name::tiercache::s3://bucket/a.zip
        if place is None or isinstance(self.fs, AbstractArchiveFileSystem):
            return None
        root, key = place
        store = self._stores.get(root)
        if store is None:
            cache = self._open_cache()
            if cache is None:
                return None
            # Nothing is opened yet: of two threads that make one, the first wins, and nothing is lost.
            store = self._stores.setdefault(root, cache.store(self._target.store(root)))
        try:
            wanted = store.wanted(key)
        except TierCacheError:
            return None
        return None if wanted is None else Reading(store, wanted)

    def _open_cache(self) -> Cache | None:
        """The cache; None, with a warning, where the default one cannot be had: nobody has asked for it by name."""
        if self._cache is None and not self._is_uncached:
            size = None if self._cache_size is None else str(self._cache_size)
            try:
                self._cache = Cache.default(path=self._cache_dir, size=size)
            except OSError as error:
                if self._cache_dir is not None:
                    raise
                self._is_uncached = True
                warnings.warn(
                    f"tiercache:: has no cache, so that everything is read from its source: {error}; name a folder "
                    "that can be written by cache_dir=... or TIERCACHE_CACHE_DIR",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._cache

    def open_many(self, open_files: Any) -> list[Any]:
        """The files of an fsspec.OpenFiles, opened many at a time; fsspec calls it in `with open_files as files`."""
        return at_once(lambda file: file.__enter__(), list(open_files))

    def commit_many(self, open_files: Any) -> None:
        """Nothing: each was written when it was closed. fsspec calls it after open_many()."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes of a range, by the rules of slices."""
        stripped = self._strip_protocol(path)
        reading = self._reading(stripped, options)
        if reading is None:
            return bytes(self.fs.cat_file(stripped, start=start, end=end, **options))
        with reading:
            return reading.read(_slice(start, end, reading.n_bytes))

    def cat(
        self, path: str | list[str], recursive: bool = False, on_error: str = "raise", **options: Any
    ) -> bytes | dict[str, bytes | Exception]:
        """Contents by path, many at a time; of one path that names one file: its content."""
        paths = self.expand_path(path, recursive=recursive)
        if isinstance(path, str) and paths == [self._strip_protocol(path)] and not recursive:
            return self.cat_file(paths[0], **options)
        files = [name for name in paths if not (recursive and self.isdir(name))]
        found = at_once(lambda name: _tried(lambda: self.cat_file(name, **options), on_error != "raise"), files)
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
        """The bytes of many ranges; each object is asked about once, and all its ranges are fetched together.

        max_gap: not used; the cache joins what lies close together.
        """
        first = starts if isinstance(starts, list) else [starts] * len(paths)
        last = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(first) == len(last):
            raise ValueError(f"{len(paths)} paths, {len(first)} starts, {len(last)} ends: one of each is expected")
        names = list(dict.fromkeys(paths))
        with ExitStack() as stack:
            opened = at_once(lambda path: self._reading(self._strip_protocol(path), options), names)
            readings = dict(zip(names, opened, strict=True))
            wanted = {stack.enter_context(one): list[ByteRange]() for one in opened if one is not None}
            for path, start, end in zip(paths, first, last, strict=True):
                reading = readings[path]
                if reading is not None:
                    wanted[reading].append(_slice(start, end, reading.n_bytes))
            for one, ranges in wanted.items():
                one.want(ranges)

            def read(number: int) -> bytes:
                path, start, end = paths[number], first[number], last[number]
                reading = readings[path]
                if reading is None:
                    return bytes(self.fs.cat_file(bare(path), start, end, **options))
                return reading.read(_slice(start, end, reading.n_bytes))

            return at_once(lambda number: _tried(lambda: read(number), on_error != "raise"), range(len(paths)))

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Any = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **options: Any,
    ) -> None:
        """Copy files and folders to local paths, many at a time; by fsspec's rules of what goes where."""
        planned = _Planned(self)
        ChainedFileSystem.get(planned, rpath, lpath, recursive=recursive, maxdepth=maxdepth)
        callback.set_size(len(planned.pairs))

        def copy(pair: tuple[str, str]) -> None:
            with callback.branched(*pair) as child:
                self.get_file(*pair, callback=child, **options)
            callback.relative_update()

        at_once(copy, planned.pairs)

    def get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, outfile: Any = None, **options: Any
    ) -> None:
        """Copy a file to a local path, or into an open file; of a folder: make one."""
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
            _copy(reading, out, callback)

    # -- writing: the target does it --------------------------------------------------------------------------------

    def drop(self, *paths: Any) -> None:
        """Forget the copies of paths (one, a list, a mapping's keys; with wildcards) and of what lies below them."""
        sources = [self._target.url(name).rstrip("/") for path in paths for name in self._literals(path)]
        # It is written, and has another name than the copy: an error here would say that it is not.
        with suppress(TierCacheError, OSError, ValueError):
            cache = self._open_cache()
            if cache is not None:
                cache.drop_objects(sources)

    def _literals(self, path: Any) -> list[str]:
        if isinstance(path, str | os.PathLike):
            return [literal(str(self._strip_protocol(path)))]
        return [name for one in path for name in self._literals(one)]

    @property
    def transaction(self) -> Any:
        """The target's."""
        return self.fs.transaction


class _Planned:
    """A file system to fsspec's get(), which copies one file after the other: it only notes which."""

    def __init__(self, fs: TierCacheFileSystem) -> None:
        self._fs = fs
        self.pairs: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Note it."""
        self.pairs.append((rpath, lpath))


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - _OWN_OPTIONS)
    if unknown:
        raise TypeError(
            f"tiercache:: does not know {', '.join(unknown)}; it takes cache, cache_dir and cache_size. Options of the "
            "target go by its name beside a URL, s3={...}, and into target_options={...} elsewhere"
        )
    if options.get("asynchronous"):
        raise ValueError(
            "tiercache:: is called by threads: wrap it by fsspec.implementations.asyn_wrapper.AsyncFileSystemWrapper"
        )


def _given(fs: Any) -> Target:
    make = partial(unshared, type(fs), fs.storage_args, dict(fs.storage_options))
    # One that belongs to somebody's event loop cannot be waited for from a thread.
    return Target(make, None if getattr(fs, "asynchronous", False) else fs)


def _made(protocol: str, options: dict[str, Any]) -> Target:
    kind = fsspec.get_filesystem_class(protocol)
    # Hugging Face datasets makes tiercache::s3://b/k::s3://b/k of tiercache::s3://b/k: an s3 over an s3.
    while options.get("target_protocol") == protocol and not issubclass(kind, ChainedFileSystem):
        inner = options.pop("target_options", None) or {}
        options = {**{n: v for n, v in options.items() if n not in ("fo", "target_protocol")}, **inner}
    return Target(partial(fsspec.filesystem, protocol, **options))


def _slice(start: int | None, end: int | None, n_bytes: int) -> ByteRange:
    first, last, _ = slice(start, end).indices(n_bytes)
    return ByteRange(first, max(first, last))


def _tried(call: Callable[[], T], keeps_error: bool) -> T | Exception:
    """What a call gives; where keeps_error: or what it raises, as fsspec's on_error="return" says."""
    try:
        return call()
    except Exception as error:
        if keeps_error:
            return error
        raise


def at_once(call: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Results of calls for all items, some of them at the same time; the first error is raised when all have ended."""
    asked = list(items)
    if len(asked) < 2:
        return [call(item) for item in asked]
    with ThreadPoolExecutor(min(N_AT_ONCE, len(asked)), thread_name_prefix="tiercache-fsspec") as pool:
        return list(pool.map(call, asked))


def _copy(reading: Reading, out: Any, callback: Any) -> None:
    """Write a whole object to an open file, and tell callback how far it is."""
    n_bytes = reading.n_bytes
    callback.set_size(n_bytes)
    reading.want([ByteRange(0, n_bytes)])
    buffer = memoryview(bytearray(min(COPY_BYTES, n_bytes)))
    for start in range(0, n_bytes, COPY_BYTES):
        piece = ByteRange(start, min(start + COPY_BYTES, n_bytes))
        reading.read_into(piece, buffer[: piece.n_bytes])
        out.write(buffer[: piece.n_bytes])
        callback.relative_update(piece.n_bytes)
