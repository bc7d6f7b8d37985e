"""Model weights for inference: tensors of safetensors files, mapped from the cache of the machine.

A file is one cached copy, which all processes of the machine map: its pages are in memory once. Only the ranges of
requested tensors are fetched. A tensor is private memory of its process as soon as it is written to (copy-on-write), so
that nobody changes the copy.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from threading import Lock
from typing import Any, Literal, TypeAlias

import numpy as np

from tiercache.cache import Cache, CachedStore
from tiercache.checkpoint.format import (
    MANIFEST_NAME,
    Manifest,
    TensorEntry,
    header_bytes,
    parse_header,
    parse_manifest,
    parse_name,
)
from tiercache.checkpoint.loading import numpy_dtype
from tiercache.checkpoint.run_stores import RunStores, resolve
from tiercache.checkpoint.state_tree import DTYPES
from tiercache.checkpoint.writer import in_parallel
from tiercache.errors import CorruptCheckpoint, NotFound
from tiercache.model import ByteRange
from tiercache.store import Lease, LocalStore, Store, check_key, open_store, split_url
from tiercache.store.placement import follow_placement, is_remote
from tiercache.store.shared_files import raise_limit

Framework: TypeAlias = Literal["torch", "numpy"]

_INDEX_NAME = "model.safetensors.index.json"
_FILE_NAME = "model.safetensors"
_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
# First read of a file; longer headers need a second one.
_HEADER_GUESS_BYTES = 64 << 10
_THREADS = 8
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has the name from 3.13 on


def open_weights(
    url: str | os.PathLike[str],
    *,
    prefix: str = "",
    framework: Framework = "torch",
    cache: Cache | Literal[False] | None = None,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Weights:
    """Return the tensors of safetensors files, which are mapped, not loaded.

    Args:
        url: URL or path of a safetensors file; of a folder with `model.safetensors.index.json`, with
            `model.safetensors`, or with other safetensors files, as on the Hugging Face Hub; of a checkpoint of
            `Checkpoints`; or of its `Checkpoints`, for the one written last.
        prefix: Beginning of the names of the wanted tensors, which is removed from them, such as "model.".
        framework: Library of the tensors: "torch" or "numpy".
        cache: Cache through which the files are read. None: local files are mapped in place, all others come through
            `Cache.default()`. False: no cache; tensors of remote files are then read into memory of the process.
        verify: Whether the bytes of a cached file are compared with their checksums when a tensor is first used in this
            process. Local files have no checksums here; for checkpoints, `Checkpoints.verify()` compares them.
        storage_options: Options of the store.

    Returns:
        A mapping from names to tensors. Close it, or use it as a context manager; tensors stay valid afterwards.

    Raises:
        NotFound: There are no safetensors files.
        CorruptCheckpoint: A file is not what it should be.
        StoreError: The store failed.
        ValueError: The URL or an option is invalid.
    """
    if framework not in ("torch", "numpy"):
        raise ValueError(f"framework is 'torch' or 'numpy', got {framework!r}")
    text = os.fspath(url)
    root, name = split_url(text) if text.endswith((_SUFFIX, _INDEX_SUFFIX)) else (text, "")  # a file, or a folder
    options = dict(storage_options or {})

    def through_cache(inner: Store) -> Store:
        is_cached = cache is not False and (cache is not None or is_remote(inner.url))
        return (cache or Cache.default()).store(inner) if is_cached else inner

    store = through_cache(follow_placement(open_store(root, **options), options))
    try:
        found = _find_files(store, name)
        if found is None:
            store.close()
            inner, found = _find_checkpoint(root, options)
            store = through_cache(inner)
        files, known = found
        return Weights(store, files, known, prefix=prefix, framework=framework, verify=verify)
    except BaseException:
        store.close()
        raise


class Weights(Mapping[str, Any]):
    """Mapping of names to tensors, as open_weights() returns it. Safe from any thread, and in a forked process.

    A tensor is fetched and mapped when it is first looked up: `weights["embed.weight"]`. load() gets many at once.
    """

    def __init__(
        self,
        store: Store,
        files: Sequence[str],
        known: Mapping[str, TensorEntry] | None = None,
        *,
        prefix: str = "",
        framework: Framework = "torch",
        verify: bool = True,
    ) -> None:
        """Read the headers of the files, unless `known` describes the tensors. close() closes the store."""
        self._store, self._framework, self._verify = store, framework, verify
        self._files = {key: _File(store, key) for key in files}
        # Memory of the tensors that were used, and their position in it.
        self._buffers: dict[str, tuple[Any, int]] = {}
        raise_limit(3 * len(self._files))  # copy, unit map and mapping
        try:
            if known is None:
                parts = in_parallel([partial(_read_header, file) for file in self._files.values()], _THREADS)
                known = _merged(parts, store.url)
        except BaseException:
            self._close_files()
            raise
        self._infos = {name[len(prefix) :]: info for name, info in known.items() if name.startswith(prefix)}
        if prefix and not self._infos:
            some = ", ".join(sorted(known)[:5])
            self._close_files()
            raise NotFound(f"no tensor has a name that begins with {prefix!r}; there are {some}", url=store.url)

    def __repr__(self) -> str:
        n_bytes = sum(info.n_bytes for info in self._infos.values())
        return f"Weights({self._store.url!r}, {len(self)} tensors, {n_bytes} bytes)"

    def __len__(self) -> int:
        return len(self._infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __getitem__(self, name: str) -> Any:
        return self.load([name])[name]

    def info(self, name: str) -> TensorEntry:
        """Return type, shape and place of a tensor, without its values. Raises KeyError."""
        return self._infos[name]

    def prefetch(self, names: Iterable[str] | None = None) -> None:
        """Start to fetch tensors into the cache, and return at once.

        Args:
            names: Names of the tensors; None: all.
        """
        ranges: dict[str, list[ByteRange]] = {}
        for name in self._infos if names is None else names:
            info = self._infos[name]
            ranges.setdefault(info.file, []).append(_range(info))
        for key, wanted in ranges.items():
            self._files[key].prefetch(wanted)

    def load(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Return tensors by name, fetched and checked by several threads.

        Args:
            names: Names of the tensors; None: all.

        Raises:
            KeyError: There is no such tensor.
            StoreError: The store failed.
            ValueError: NumPy does not have the type of a tensor.
        """
        wanted = {name: self._infos[name] for name in (self._infos if names is None else names)}
        new = [name for name, info in wanted.items() if info.n_bytes and name not in self._buffers]
        self.prefetch(new)
        calls = [
            partial(self._files[wanted[name].file].buffer, _range(wanted[name]), verify=self._verify) for name in new
        ]
        self._buffers.update(zip(new, in_parallel(calls, _THREADS), strict=True))
        return {name: self._tensor(info, *self._buffers.get(name, (b"", 0))) for name, info in wanted.items()}

    def _tensor(self, info: TensorEntry, buffer: Any, offset: int) -> Any:
        if self._framework == "numpy":
            dtype = numpy_dtype(info.dtype)
            if not info.n_bytes:
                return np.empty(info.shape, dtype)
            return np.frombuffer(buffer, dtype, info.n_bytes // dtype.itemsize, offset).reshape(info.shape)
        torch = import_module("torch")
        torch_dtype = getattr(torch, DTYPES[info.dtype])
        if not info.n_bytes:
            return torch.empty(info.shape, dtype=torch_dtype)
        if offset % torch_dtype.itemsize:  # a file of another writer, whose header is not padded
            buffer, offset = bytearray(memoryview(buffer)[offset : offset + info.n_bytes]), 0
        count = info.n_bytes // torch_dtype.itemsize
        return torch.frombuffer(buffer, dtype=torch_dtype, count=count, offset=offset).reshape(info.shape)

    def close(self) -> None:
        """Close files and connections. Tensors stay valid: their memory keeps the file. Repeated calls do nothing."""
        self._close_files()
        self._store.close()

    def _close_files(self) -> None:
        self._buffers.clear()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _File:
    """A safetensors file: a lease on a local file or cached copy, which is mapped; or a store that is read by ranges.

    It is opened when it is first used. The lock guards the lease and the mapping.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store, self.key = store, key
        self._lock = Lock()
        self._mapping: mmap.mmap | None = None
        self._lease: Lease | None = None
        self._is_local = isinstance(store, LocalStore)
        self._is_closed = False

    def _opened(self) -> Lease | None:
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self.url}: these weights are closed")
            if self._lease is None and self._is_local and isinstance(self._store, LocalStore):
                self._lease = self._store.open_local(self.key)
                self._is_local = self._lease is not None
            return self._lease

    @property
    def n_bytes(self) -> int:
        lease = self._opened()
        return self._store.head(self.key).n_bytes if lease is None else lease.n_bytes

    @property
    def url(self) -> str:
        return f"{self._store.url}/{self.key}"

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        lease = self._opened()
        if lease is not None:
            lease.prefetch(ranges)

    def buffer(self, span: ByteRange, *, verify: bool) -> tuple[Any, int]:
        """Return memory with a range, and its position there: the mapped file, or a copy if it cannot be mapped.

        A corrupt copy is removed and fetched again; tensors that were mapped from it keep the former file.
        """
        for _ in range(2):
            lease = self._opened()
            if lease is None or not lease.wait([span]):
                break
            is_right = True
            if verify and isinstance(self._store, CachedStore):
                # The threads read one descriptor at several offsets, so that the kernel's read-ahead sees no sequence.
                os.posix_fadvise(lease.fd, span.start, span.n_bytes, os.POSIX_FADV_WILLNEED)
                is_right = self._store.is_right(self.key, lease, [span])
            with self._lock:
                if self._lease is not lease:  # another thread has found the copy corrupt
                    continue
                if is_right:
                    if self._mapping is None:
                        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
                        self._mapping = mmap.mmap(lease.fd, lease.n_bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
                    lease.note_read(span.n_bytes, lambda: [span])
                    return self._mapping, span.start
                if isinstance(self._store, CachedStore):
                    self._store.remove_if_corrupt(self.key)
                lease.close()
                self._lease = self._mapping = None
        data = bytearray(span.n_bytes)
        self._store.read_into(self.key, [(span, memoryview(data))])
        return data, 0

    def close(self) -> None:
        with self._lock:
            lease, self._lease, self._mapping, self._is_closed = self._lease, None, None, True
        if lease is not None:
            lease.close()


# -- finding the files -------------------------------------------------------------------------------------------------


def _range(info: TensorEntry) -> ByteRange:
    return ByteRange(info.offset, info.offset + info.n_bytes)


def _find_files(store: Store, name: str) -> tuple[list[str], dict[str, TensorEntry] | None] | None:
    """Return the keys of the safetensors files, and the tensors if a manifest describes them; None: there are none.

    Files that many folders have are asked for by name: stores behind plain HTTP cannot list.
    """
    if name.endswith(_SUFFIX):
        return [name], None
    for key in [name] if name else [_INDEX_NAME, MANIFEST_NAME, _FILE_NAME]:
        try:
            if key == MANIFEST_NAME:
                return _of_manifest(parse_manifest(store.get(key), f"{store.url}/{key}"), "")
            if key == _FILE_NAME:
                store.head(key)
                return [key], None
            return _indexed(store, key), None
        except NotFound:
            if name:
                raise
    files = sorted(info.key for info in store.list() if "/" not in info.key and info.key.endswith(_SUFFIX))
    return (files, None) if files else None


def _find_checkpoint(
    url: str, options: Mapping[str, Any]
) -> tuple[Store, tuple[list[str], dict[str, TensorEntry] | None]]:
    """Return the checkpoint of a URL, or the last one of a run, in any tier: an open store, files and tensors."""
    head, _, last = url.rstrip("/").rpartition("/")
    run, which = (head, last) if parse_name(last) is not None else (url, "latest")
    store = open_store(run, **options)
    stores = RunStores({"remote": store}, options)
    try:
        scan = stores.scan_to_load(which)
        if not scan.loadable_names and not scan.unasked:
            message = f"no {_INDEX_NAME}, {_FILE_NAME}, other safetensors file or checkpoint here"
            raise NotFound(f"{message}; {scan.hint}" if scan.hint else message, url=url)
        name = resolve(scan, which)
        manifest, opened = stores.open_copy(scan, name)
    except BaseException:
        store.close()
        raise
    finally:
        stores.close()
    if opened is not store:
        store.close()
    return opened, _of_manifest(manifest, f"{name}/")


def _indexed(store: Store, key: str) -> list[str]:
    try:
        names = sorted(set(json.loads(store.get(key))["weight_map"].values()))
        folder = key.rpartition("/")[0]
        return [check_key(f"{folder}/{name}" if folder else name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"not an index of safetensors files: {error!r}", url=f"{store.url}/{key}") from error


def _of_manifest(manifest: Manifest, folder: str) -> tuple[list[str], dict[str, TensorEntry]]:
    tensors = {name: replace(entry, file=f"{folder}{entry.file}") for name, entry in manifest.tensors.items()}
    return sorted({info.file for info in tensors.values()}), tensors


def _read_header(file: _File) -> dict[str, TensorEntry]:

    def first(n_bytes: int) -> bytes:
        n_bytes = min(n_bytes, file.n_bytes)
        return bytes(memoryview(file.buffer(ByteRange(0, n_bytes), verify=True)[0])[:n_bytes])

    try:
        start = first(_HEADER_GUESS_BYTES)
        n_bytes = header_bytes(start)
        found = parse_header(start[:n_bytes] if n_bytes <= len(start) else first(n_bytes), file.n_bytes)
    except ValueError as error:
        raise CorruptCheckpoint(str(error), url=file.url) from error
    return {
        name: TensorEntry(file.key, offset, spec.n_bytes, spec.dtype, spec.shape)
        for name, (spec, offset) in found.items()
    }


def _merged(parts: Iterable[Mapping[str, TensorEntry]], url: str) -> dict[str, TensorEntry]:
    merged: dict[str, TensorEntry] = {}
    for part in parts:
        for name, info in part.items():
            if name in merged:
                raise CorruptCheckpoint(f"tensor {name!r} is in {merged[name].file} and in {info.file}", url=url)
            if info.dtype not in DTYPES:
                raise CorruptCheckpoint(f"tensor {name!r} has the type {info.dtype}, which is not supported", url=url)
            merged[name] = info
    return merged
