"""Local folders as a store: the keys are the files below a root folder."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo, ShardIdentity
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, Receive, SequentialUpload, Span, Store, Upload, check_key
from tiercache.store.posix import (
    CACHED_BYTES,
    MIN_BYTES,
    TEMP_PREFIX,
    DirectWriter,
    FileAttributes,
    UnpublishedFile,
    copy_bytes,
    file_info,
    open_folder,
    os_errors,
    write_all,
)
from tiercache.store.ranges import RequestCosts, check_read, check_spans, plan_requests
from tiercache.waiting import SYSTEM_CLOCK


class FileLease:
    """A lease on a whole local file: an open descriptor (-1 after close()). All bytes are local."""

    n_descriptors = 1

    def __init__(self, fd: int, n_bytes: int) -> None:
        self.fd, self.n_bytes = fd, n_bytes

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        return all(span.end <= self.n_bytes for span in ranges)

    def prefetch(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:  # noqa: ARG002 - the contract
        """Ask the kernel to read the ranges ahead."""
        for span in ranges:
            if span.n_bytes:
                os.posix_fadvise(self.fd, span.start, span.n_bytes, os.POSIX_FADV_WILLNEED)

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:  # noqa: ARG002 - the contract
        """Return present(): there is nothing to wait for."""
        return self.present(ranges)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FileLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FileUpload(SequentialUpload):
    """An upload that appends its parts to an unpublished file."""

    def __init__(self, file: UnpublishedFile, name: str, key: str, url: str, counters: Counters) -> None:
        super().__init__(key)
        self._file, self._name, self._url, self._counters = file, name, url, counters
        self._n_bytes = 0
        self._direct: DirectWriter | None = None  # created for the first part that may bypass the page cache

    def append(self, data: memoryview) -> None:
        if self._direct is None and data.nbytes >= MIN_BYTES and self._counters["bytes_written"] >= CACHED_BYTES:
            self._direct = DirectWriter(self._file.fd)
        with os_errors("put_part", self._url):
            n_direct = self._direct.write(data, self._n_bytes) if self._direct is not None else 0
            write_all(self._file.fd, data[n_direct:], self._n_bytes + n_direct)
        self._n_bytes += data.nbytes
        self._counters.add("bytes_written", data.nbytes)

    def publish(self, *, if_absent: bool) -> ObjectInfo | None:
        with os_errors("complete", self._url):
            if not if_absent:
                self._file.publish(self._name)
            elif not self._file.publish_if_absent(self._name):
                return None
            return file_info(self.key, os.fstat(self._file.fd))

    def discard(self) -> None:
        if self._direct is not None:
            self._direct.close()
        self._file.close()


# preadv accepts at most IOV_MAX (1024) buffers. Reads of 32 MiB keep deadlines and cancellation prompt on a slow disk.
_MAX_PIECES = 1024
_COSTS = RequestCosts(max_gap_bytes=0, max_bytes=32 << 20)
_PIECE_BYTES = 1 << 20


class LocalFolder(Store):
    """The files below a folder. It has no state except the root: safe for threads, fork-safe and picklable.

    A file appears complete and durable: the writer syncs the file and its folder. Symbolic links below the root are
    never followed. Folders are created as keys need them; a root that does not exist is an empty store.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow the user's links
        self.url = str(self.root)
        self.counters = Counters("requests", "bytes_read", "bytes_written")

    def __repr__(self) -> str:
        return f"LocalFolder({self.url!r})"

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[str]]:
        return LocalFolder, (self.url,)

    def head(self, key: str) -> ObjectInfo:
        """Return the size, the date and an ETag made of inode number, mtime, size and ctime."""
        with self._opened(key, "head") as fd:
            return file_info(key, os.fstat(fd))

    def get(self, key: str) -> bytes:
        return self.read_tail(key, sys.maxsize)[0]

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        with self._opened(key, "read_tail") as fd:
            info = file_info(key, os.fstat(fd))
            data = bytearray(min(n_bytes, info.n_bytes))
            self._fill(key, fd, info.n_bytes - len(data), [memoryview(data)])
            return bytes(data), info

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Read up to 32 MiB per call into the buffers, without the GIL. Checks deadline and cancel between calls."""
        check_spans(spans)
        end_s = None if deadline_s is None else SYSTEM_CLOCK.monotonic() + deadline_s
        with self._opened(key, "read_into") as fd:
            check_read(file_info(key, os.fstat(fd)), spans, if_match, self._at(key))
            for request in plan_requests(spans, _COSTS):
                if cancel is not None and cancel.is_set():
                    raise StoreError("read_into: cancelled", url=self._at(key), retryable=True)
                if end_s is not None and SYSTEM_CLOCK.monotonic() > end_s:
                    raise StoreError(f"read_into: not done within {deadline_s:g} s", url=self._at(key), retryable=True)
                self._fill(key, fd, request.range.start, [buffer for _, buffer in request.targets])

    def read_pieces(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        receive: Receive,
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Read through one small buffer, which stays in the processor's cache."""
        etag = self.head(key).etag if if_match is None else if_match
        end_s = None if deadline_s is None else SYSTEM_CLOCK.monotonic() + deadline_s
        buffer = memoryview(bytearray(min(_PIECE_BYTES, max((wanted.n_bytes for wanted in ranges), default=0))))
        for wanted in ranges:
            for start in range(wanted.start, wanted.end, _PIECE_BYTES):
                piece = ByteRange(start, min(start + _PIECE_BYTES, wanted.end))
                left_s = None if end_s is None else end_s - SYSTEM_CLOCK.monotonic()
                spans = [(piece, buffer[: piece.n_bytes])]
                self.read_into(key, spans, if_match=etag, deadline_s=left_s, cancel=cancel)
                receive(start, buffer[: piece.n_bytes])

    def _fill(self, key: str, fd: int, offset: int, buffers: list[memoryview]) -> None:
        """Read consecutive bytes of the file into the buffers."""
        buffers = [buffer for buffer in buffers if buffer.nbytes]
        while buffers:
            n_read = os.preadv(fd, buffers[:_MAX_PIECES], offset)
            if n_read == 0:
                raise ObjectChanged("the file was truncated during the read", url=self._at(key), found=offset)
            self.counters.add("bytes_read", n_read)
            offset += n_read
            while buffers and n_read >= buffers[0].nbytes:
                n_read -= buffers.pop(0).nbytes
            if n_read:
                buffers[0] = buffers[0][n_read:]

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Write a temporary file, sync it, and rename it."""
        with self._new_file(key, "put", data) as (file, name):
            file.publish(name)
            return file_info(key, os.fstat(file.fd))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write a temporary file, sync it, and link it: exactly one concurrent link(2) succeeds."""
        with self._new_file(key, "put_if_absent", data) as (file, name):
            return file.publish_if_absent(name)

    def create(self, key: str, *, attributes: Sequence[FileAttributes] | None = None) -> Upload:
        """Start an upload that writes its parts to the disk as they come.

        Args:
            key: Key of the file.
            attributes: Attributes of the folders that the upload creates, from the outermost one on, and of the file;
                see attributes(). With them, folders that exist keep their times. None: a new file of this process.
        """
        folders, name = _split(key)
        with (
            self._errors(key, "create"),
            open_folder(self.root, folders, make=True, attributes=attributes) as folder_fd,
        ):
            file = UnpublishedFile(folder_fd, None if attributes is None else attributes[-1])
            return FileUpload(file, name, key, self._at(key), self.counters)

    def attributes(self, key: str) -> list[FileAttributes]:
        """Return the attributes of the folders that contain a file, from the outermost one below root on, and its own.

        Raises NotFound.
        """
        steps = check_key(key).split("/")
        with self._errors(key, "attributes"):
            paths = [self.root.joinpath(*steps[: number + 1]) for number in range(len(steps))]
            return [FileAttributes.of(path.lstat()) for path in paths]

    def delete(self, keys: Iterable[str]) -> None:
        """Unlink each file. The folders stay."""
        for key in keys:
            folders, name = _split(key)
            try:
                with self._errors(key, "delete"), open_folder(self.root, folders) as folder_fd:
                    _unlink_file(name, folder_fd)
            except NotFound:
                continue

    def delete_unchanged(self, key: str, etag: str) -> bool:
        """Unlink a file if it still has this ETag. Return whether the file is gone, also if it was gone before."""
        folders, name = _split(key)
        try:
            with self._errors(key, "delete"), open_folder(self.root, folders) as folder_fd:
                found = file_info(key, os.stat(name, dir_fd=folder_fd, follow_symlinks=False))
                if found.etag != etag:
                    return False
                _unlink_file(name, folder_fd)
        except NotFound:
            pass
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List the regular files below a folder."""
        found: list[ObjectInfo] = []

        def visit(key: str, entry: os.DirEntry[str]) -> None:
            if entry.is_file(follow_symlinks=False):
                try:  # noqa: SIM105 - a context manager for each file takes 10 % of a listing
                    found.append(file_info(key, entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    pass  # deleted after the folder was read

        for _ in self._walk("list", check_key(prefix.removesuffix("/")) if prefix else "", visit):
            yield from found
            found.clear()

    def _walk(self, doing: str, top: str, visit: Callable[[str, os.DirEntry[str]], None]) -> Iterator[None]:
        """Call visit for all entries below a folder that are not folders; yield after each folder, which is closed."""
        pending = [top]
        while pending:
            folder = pending.pop()
            steps = folder.split("/") if folder else []
            with (
                self._errors(folder, doing),
                suppress(FileNotFoundError, NotADirectoryError),
                open_folder(self.root, steps) as folder_fd,
                os.scandir(folder_fd) as entries,
            ):
                for entry in entries:
                    if entry.name.startswith(TEMP_PREFIX) or "\\" in entry.name:
                        continue
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(key)
                    else:
                        visit(key, entry)
            yield

    def symlinks(self) -> Iterator[tuple[str, str]]:
        """List the symbolic links to something that exists, as (path below the root, target without links)."""
        root = os.path.realpath(self.root)
        found: list[str] = []

        def visit(key: str, entry: os.DirEntry[str]) -> None:
            if entry.is_symlink():
                found.append(key)

        for _ in self._walk("links", "", visit):
            for key in found:
                target = os.path.realpath(f"{root}/{key}")
                if os.path.exists(target):  # noqa: PTH110 - realpath's
                    yield key, target
            found.clear()

    def remove_empty(self, folder: str) -> None:
        """Remove a folder and its subfolders as far as they contain nothing else. A missing folder is not an error.

        Folders are not objects here, but other programs list them. A folder into which another process writes stays.
        """
        *above, name = check_key(folder).split("/")
        gone = suppress(FileNotFoundError, NotADirectoryError)
        with self._errors(folder, "remove_empty"), gone, open_folder(self.root, above) as folder_fd:
            for _, inner_names, _, inner_fd in os.fwalk(name, topdown=False, dir_fd=folder_fd):
                for inner in inner_names:
                    _rmdir(inner, inner_fd)
            _rmdir(name, folder_fd)

    def remove_empty_above(self, key: str) -> None:
        """Remove the folders that contain a key and nothing else any more, from the innermost one upwards.

        The root stays, and so does a folder that contains anything, or into which another process writes.
        """
        folders, _ = _split(key)
        with self._errors(key, "remove_empty_above"):
            while folders:
                *folders, name = folders
                with suppress(FileNotFoundError, NotADirectoryError), open_folder(self.root, folders) as folder_fd:
                    if not _rmdir(name, folder_fd):
                        return

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Copy inside the kernel, and share blocks if the file system supports it."""
        with self._opened(src, "copy") as src_fd, self._new_file(dst, "copy") as (file, name):
            n_bytes = os.fstat(src_fd).st_size
            copy_bytes(src_fd, file.fd, n_bytes)
            file.publish(name)
            self.counters.add("bytes_written", n_bytes)
            return file_info(dst, os.fstat(file.fd))

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> FileLease | None:
        """Return a lease that holds a descriptor of the file, or None if its size differs from the identity's."""
        with self._opened(key, "open_local") as fd:
            n_bytes = os.fstat(fd).st_size
            if identity is not None and identity.n_bytes != n_bytes:
                return None
            return FileLease(os.dup(fd), n_bytes)

    def forget_cached(self, key: str) -> None:
        """Drop the file's pages from the page cache, so that the next read comes from the disk.

        Works for a synced file.
        """
        with self._opened(key, "forget_cached") as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def remove_if_corrupt(self, key: str, identity: ShardIdentity | None = None) -> bool:  # noqa: ARG002 -- the contract's names
        """Return False: the file is the object itself, and there is no other source to fetch it from."""
        return False

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    @contextmanager
    def _errors(self, key: str, doing: str) -> Iterator[None]:
        self.counters.add("requests")
        with os_errors(doing, self._at(key)):
            yield

    @contextmanager
    def _opened(self, key: str, doing: str) -> Iterator[int]:
        folders, name = _split(key)
        with self._errors(key, doing), open_folder(self.root, folders) as folder_fd:
            # O_NONBLOCK: open() must not hang on a named pipe in this folder.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder_fd)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise NotFound(f"not a regular file ({doing})", url=self._at(key))
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def _new_file(self, key: str, doing: str, data: Buffer = b"") -> Iterator[tuple[UnpublishedFile, str]]:
        """Yield an unpublished file that contains data, and the name that the key gives it."""
        folders, name = _split(key)
        flat = memoryview(data).cast("B")
        with (
            self._errors(key, doing),
            open_folder(self.root, folders, make=True) as folder_fd,
            closing(UnpublishedFile(folder_fd)) as file,
        ):
            write_all(file.fd, flat, 0)
            self.counters.add("bytes_written", flat.nbytes)
            yield file, name


def _rmdir(name: str, above_fd: int) -> bool:
    """Remove a folder if it is an empty folder. Return whether it is gone."""
    try:
        os.rmdir(name, dir_fd=above_fd)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def _unlink_file(name: str, folder_fd: int) -> None:
    with suppress(IsADirectoryError):  # a folder is not an object
        os.unlink(name, dir_fd=folder_fd)


def _split(key: str) -> tuple[list[str], str]:
    *folders, name = check_key(key).split("/")
    if name.startswith(TEMP_PREFIX):
        raise ValueError(
            f"not a valid key: {key!r}; names that start with {TEMP_PREFIX!r} are reserved for unfinished writes"
        )
    return folders, name
