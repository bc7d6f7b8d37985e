"""Reads one copy of a checkpoint: its files in pieces by several threads, into the memory of the tensors themselves.

Each piece is read and added to the checksum of its file while it is in the processor's cache. Files of a remote store
come through the cache of this machine, which keeps what has arrived: an interrupted load continues there, and processes
of one machine share one download.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Event
from typing import TypeAlias

from tiercache._native.checksum import combine, crc32c
from tiercache.checkpoint.layout import Manifest, StoredFile, TensorEntry, key_of
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.store import Lease, LocalStore, Span, Store

# Threads that read; each has one piece in work. A piece is long enough for the full speed of a store's requests.
READ_THREADS = 8
PIECE_BYTES = 16 << 20
# Files that are open at a time: a checkpoint of many ranks has thousands.
_OPEN_FILES = 64
# Bytes that are read from a file and then added to the checksum: they fit the second cache of a core.
_STEP_BYTES = 1 << 20
_MOST_BUFFERS = 1024  # of one preadv(2)

Destinations: TypeAlias = Mapping[tuple[str, int], memoryview]
"""Writable memory by file and offset of a tensor, as in TensorEntry."""


Target: TypeAlias = memoryview | int
"""Memory for consecutive bytes of a file, or the number of bytes of which only the checksum is wanted."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a file, and the targets of its bytes, in order and without gaps."""

    start: int
    targets: tuple[Target, ...]

    @property
    def range(self) -> ByteRange:
        return ByteRange(self.start, self.start + sum(map(_length, self.targets)))


def _length(target: Target) -> int:
    return target if isinstance(target, int) else target.nbytes


class CopyReader:
    """Reads files of a checkpoint from one store, and compares them with the manifest. Use it as a context manager."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self._cancel = Event()
        self._cleanup = ExitStack()
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tiercache-load")

    def __enter__(self) -> CopyReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancel.set()
        self._pool.shutdown(cancel_futures=True)
        self._cleanup.close()

    def url(self, file: StoredFile) -> str:
        """Return the URL of a file."""
        return f"{self.store.url}/{key_of(self.manifest.name, file.path)}"

    def small_file(self, path: str) -> bytes:
        """Return a small file of the checkpoint."""
        file = next((one for one in self.manifest.files if one.path == path), None)
        if file is None:
            raise CorruptCheckpoint(f"the manifest has no {path}", url=f"{self.store.url}/{self.manifest.name}")
        data = bytearray(file.n_bytes)
        self._read_files([(file, [_Piece(0, (memoryview(data),))] if data else [])])
        return bytes(data)

    def fill(self, destinations: Destinations) -> int:
        """Fill the memory of tensors, and check every file that contains one of them. Return the number of bytes read.

        The other bytes of these files are read too, because the checksums are those of whole files.

        Args:
            destinations: Writable memory of each wanted tensor, as long as the tensor's values.

        Raises:
            CorruptCheckpoint: A file is missing, or differs from the manifest. The memory is then undefined.
            StoreError: The store failed. The memory is then undefined.
        """
        files = {path for path, _ in destinations}
        wanted = [file for file in self.manifest.files if file.path in files]
        tensors: dict[str, list[TensorEntry]] = {file.path: [] for file in wanted}
        entries = [one for one in self.manifest.tensors.values() if one.n_bytes and one.file in tensors]
        for entry in {(one.file, one.offset): one for one in entries}.values():  # names may share a tensor
            tensors[entry.file].append(entry)
        try:
            pieces = [(file, _pieces(file, tensors[file.path], destinations)) for file in wanted]
        except ValueError as error:
            raise CorruptCheckpoint(
                str(error), url=f"{self.store.url}/{self.manifest.name}", part="manifest"
            ) from error
        self._read_files(pieces)
        return sum(file.n_bytes for file in wanted)

    def verify(self) -> list[str]:
        """Read all files and return what differs from the manifest, one text for each wrong file."""
        problems = []
        for file in self.manifest.files:
            try:
                self._read_files([(file, _pieces(file, (), {}))])
            except CorruptCheckpoint as error:
                problems.append(error.message)
        return problems

    def _read_files(self, files: Iterable[tuple[StoredFile, Sequence[_Piece]]]) -> None:
        """Read the pieces of files in parallel, and compare the checksums. A limited number of files is open."""
        running: deque[tuple[_Source, StoredFile, Sequence[_Piece], list[Future[int]]]] = deque()
        try:
            for file, pieces in files:
                if len(running) >= _OPEN_FILES:
                    self._check(*running.popleft())
                source = self._source(file)
                source.prefetch(pieces)
                running.append((source, file, pieces, [self._pool.submit(source.read, piece) for piece in pieces]))
            while running:
                self._check(*running.popleft())
        finally:
            for _, _, _, reads in running:
                for read in reads:
                    read.cancel()

    def _check(self, source: _Source, file: StoredFile, pieces: Sequence[_Piece], reads: Sequence[Future[int]]) -> None:
        """Wait until the pieces of a file are read, and compare its checksum."""
        try:
            is_right = self._crc_of(pieces, [read.result() for read in reads]) == file.crc32c
            if not is_right and not self._is_right_now(source, file, pieces):
                message = "the bytes differ from those that were written (CRC-32C)"
                raise CorruptCheckpoint(message, url=self.url(file))
        except NotFound as error:
            raise CorruptCheckpoint(f"a file is missing: {error.message}", url=error.url) from error
        source.close()

    @staticmethod
    def _crc_of(pieces: Sequence[_Piece], sums: Sequence[int]) -> int:
        crc = 0
        for piece, crc_of_piece in zip(pieces, sums, strict=True):
            crc = combine(crc, crc_of_piece, piece.range.n_bytes)
        return crc

    def _is_right_now(self, source: _Source, file: StoredFile, pieces: Sequence[_Piece]) -> bool:
        """Read a file once more if its cached copy was corrupt, and is removed now."""
        if not source.remove_if_corrupt():
            return False
        again = self._source(file)
        return self._crc_of(pieces, [again.read(piece) for piece in pieces]) == file.crc32c

    def _source(self, file: StoredFile) -> _Source:
        try:
            source = _Source(self.store, key_of(self.manifest.name, file.path), file.n_bytes, self._cancel)
        except NotFound as error:
            raise CorruptCheckpoint("the file is missing", url=self.url(file)) from error
        self._cleanup.callback(source.close)
        if source.n_bytes != file.n_bytes:
            message = f"the file has {source.n_bytes} bytes, and the manifest states {file.n_bytes}"
            raise CorruptCheckpoint(message, url=self.url(file))
        return source


@dataclass(slots=True)
class _Source:
    """A file to be read: a lease on a local file or cached copy, or a store that is read by ranges."""

    store: Store
    key: str
    n_bytes: int
    cancel: Event
    lease: Lease | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.store, LocalStore):
            self.lease = self.store.open_local(self.key)
            if self.lease is not None:
                self.n_bytes = self.lease.n_bytes

    def close(self) -> None:
        if self.lease is not None:
            self.lease.close()

    def prefetch(self, pieces: Sequence[_Piece]) -> None:
        """Start to fetch what will be read and is not local, in the order of the file."""
        if self.lease is not None:
            missing = [piece.range for piece in pieces if not self.lease.present([piece.range])]
            self.lease.prefetch(missing)

    def remove_if_corrupt(self) -> bool:
        """Remove the cached copy if it is corrupt. Return whether it was."""
        return isinstance(self.store, LocalStore) and self.store.remove_if_corrupt(self.key)

    def read(self, piece: _Piece) -> int:
        """Fill the memory of a piece and return the CRC-32C of its bytes."""
        whole = piece.range
        if self.cancel.is_set():
            raise StoreError("the load was cancelled", url=self.store.url)
        lease, crc, offset = self.lease, 0, whole.start
        if lease is None or not lease.wait([whole]):
            (buffers,) = _steps(piece.targets, whole.n_bytes)
            self.store.read_into(self.key, list(_spans(offset, buffers)), cancel=self.cancel)
            for buffer in buffers:
                crc = crc32c(buffer, crc)
            return crc
        # The threads read one descriptor at several offsets, so that the kernel's own read-ahead sees no sequence.
        os.posix_fadvise(lease.fd, whole.start, whole.n_bytes, os.POSIX_FADV_WILLNEED)
        for buffers in _steps(piece.targets, _STEP_BYTES):
            self._read_step(lease.fd, buffers, offset)
            for buffer in buffers:
                crc = crc32c(buffer, crc)
                offset += buffer.nbytes
        return crc

    def _read_step(self, fd: int, buffers: list[memoryview], offset: int) -> None:
        while buffers:
            try:
                n_read = os.preadv(fd, buffers[:_MOST_BUFFERS], offset)
            except OSError as error:
                raise CorruptCheckpoint(f"cannot be read: {error}", url=f"{self.store.url}/{self.key}") from error
            if n_read == 0:
                raise CorruptCheckpoint(f"the file ends at byte {offset}", url=f"{self.store.url}/{self.key}")
            offset += n_read
            while buffers and n_read >= buffers[0].nbytes:
                n_read -= buffers[0].nbytes
                buffers = buffers[1:]
            if n_read:
                buffers = [buffers[0][n_read:], *buffers[1:]]


def _spans(start: int, buffers: Iterable[memoryview]) -> Iterator[Span]:
    for buffer in buffers:
        yield ByteRange(start, start + buffer.nbytes), buffer
        start += buffer.nbytes


def _steps(targets: Iterable[Target], step_bytes: int) -> Iterator[list[memoryview]]:
    """Yield memory for consecutive bytes in steps of at most step_bytes.

    Bytes without memory of their own get scratch memory, which each step uses again.
    """
    scratch = memoryview(b"")
    step: list[memoryview] = []
    used = 0
    for target in targets:
        done, n_bytes = 0, _length(target)
        while done < n_bytes:
            n = min(n_bytes - done, step_bytes - used)
            if isinstance(target, int):
                scratch = scratch or memoryview(bytearray(step_bytes))
                step.append(scratch[used : used + n])
            else:
                step.append(target[done : done + n])
            done, used = done + n, used + n
            if used == step_bytes:
                yield step
                step, used = [], 0
    if step:
        yield step


def _pieces(file: StoredFile, tensors: Iterable[TensorEntry], destinations: Destinations) -> list[_Piece]:
    """Cut a file into pieces, whose targets are the memory of the wanted tensors."""
    targets: list[Target] = []
    position = 0
    for entry in sorted(tensors, key=lambda one: one.offset):
        memory = destinations.get((entry.file, entry.offset))
        if memory is None:
            continue
        if entry.offset < position or entry.n_bytes != memory.nbytes:
            raise ValueError(f"{file.path}: two tensors overlap at byte {entry.offset}")
        targets += [entry.offset - position, memory]
        position = entry.offset + entry.n_bytes
    targets.append(file.n_bytes - position)
    pieces: list[_Piece] = []
    piece: list[Target] = []
    start = used = 0
    for target in targets:
        done, n_bytes = 0, _length(target)
        while done < n_bytes:
            n = min(n_bytes - done, PIECE_BYTES - used)
            piece.append(n if isinstance(target, int) else target[done : done + n])
            done, used = done + n, used + n
            if used == PIECE_BYTES:
                pieces.append(_Piece(start, tuple(piece)))
                start, piece, used = start + used, [], 0
    if piece:
        pieces.append(_Piece(start, tuple(piece)))
    return pieces
