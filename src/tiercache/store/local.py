"""Local folders as a store: the keys are the files below a root folder.

The system calls are below the store: confined descriptors, files without a name, direct writes. A new file has no name
where the file system supports O_TMPFILE, so a killed writer leaves nothing behind. Elsewhere its name starts with
TEMP_PREFIX, in the destination folder; such names are never listed.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, RLock

import numpy as np

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo, ShardIdentity
from tiercache.stats import Counters
from tiercache.store.contract import (
    Buffer,
    SequentialUpload,
    Span,
    Store,
    Upload,
    check_key,
    check_read,
    check_spans,
    plan_requests,
)
from tiercache.store.shared_files import emfile_message


class FileLease:
    """A lease on a whole local file: an open descriptor (-1 after close()). All bytes are local."""

    n_descriptors = 1

    def __init__(self, fd: int, n_bytes: int) -> None:
        self.fd, self.n_bytes = fd, n_bytes

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        return all(span.end <= self.n_bytes for span in ranges)

    def prefetch(self, ranges: Sequence[ByteRange], *, urgent: bool = False) -> None:  # noqa: ARG002 - the contract
        for span in ranges:
            if span.n_bytes:
                os.posix_fadvise(self.fd, span.start, span.n_bytes, os.POSIX_FADV_WILLNEED)

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:  # noqa: ARG002 - the contract
        return self.present(ranges)

    def note_read(self, _n_bytes: int, _ranges: Callable[[], Sequence[ByteRange]], /) -> int:
        return 0

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FileLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FileUpload(SequentialUpload):
    def __init__(self, file: NewFile, name: str, key: str, url: str, counters: Counters) -> None:
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

    def make_object(self, *, if_absent: bool) -> ObjectInfo | None:
        with os_errors("complete", self._url):
            if not if_absent:
                self._file.set_name(self._name)
            elif not self._file.name_if_free(self._name):
                return None
            return file_info(self.key, os.fstat(self._file.fd))

    def discard(self) -> None:
        if self._direct is not None:
            self._direct.close()
        self._file.close()


# preadv accepts at most IOV_MAX (1024) buffers. Reads of 32 MiB keep cancellation prompt on a slow disk.
_MAX_PIECES = 1024
_READ_BYTES = 32 << 20


class LocalFolder(Store):
    """The files below a folder. It has no state except the root: safe for threads, fork-safe and picklable.

    A file appears complete and durable. Symbolic links below the root are never followed. A missing root is an empty
    store.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow the user's links
        self.url = str(self.root)
        self.counters = Counters("requests", "bytes_read", "bytes_written")

    def __repr__(self) -> str:
        return f"LocalFolder({self.url!r})"

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[str]]:
        return LocalFolder, (self.url,)

    def parent(self) -> tuple[Store, str] | None:
        return (LocalFolder(self.root.parent), self.root.name) if self.root.name else None

    def head(self, key: str) -> ObjectInfo:
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
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        """Read up to 32 MiB per system call into the buffers, without the GIL. Checks cancel between them."""
        check_spans(spans)
        with self._opened(key, "read_into") as fd:
            check_read(file_info(key, os.fstat(fd)), spans, if_match, self.url_of(key))
            for request in plan_requests(spans, 0, _READ_BYTES):
                if cancel is not None and cancel.is_set():
                    raise StoreError("read_into: cancelled", url=self.url_of(key), retryable=True)
                self._fill(key, fd, request.range.start, [buffer for _, buffer in request.targets])

    def _fill(self, key: str, fd: int, offset: int, buffers: list[memoryview]) -> None:
        buffers = [buffer for buffer in buffers if buffer.nbytes]
        while buffers:
            n_read = os.preadv(fd, buffers[:_MAX_PIECES], offset)
            if n_read == 0:
                raise ObjectChanged("the file was truncated during the read", url=self.url_of(key), found=offset)
            self.counters.add("bytes_read", n_read)
            offset += n_read
            while buffers and n_read >= buffers[0].nbytes:
                n_read -= buffers.pop(0).nbytes
            if n_read:
                buffers[0] = buffers[0][n_read:]

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        with self._new_file(key, "put", data) as (file, name):
            file.set_name(name)
            return file_info(key, os.fstat(file.fd))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write a temporary file, sync it, and link it: exactly one concurrent link(2) succeeds."""
        with self._new_file(key, "put_if_absent", data) as (file, name):
            return file.name_if_free(name)

    def create(self, key: str, *, attributes: Sequence[FileAttributes] | None = None) -> Upload:
        """Start an upload that writes its parts to the disk as they come.

        attributes: See attributes(); folders that exist then keep their times.
        """
        folders, name = _split(key)
        with (
            self._errors(key, "create"),
            open_folder(self.root, folders, make=True, attributes=attributes) as folder_fd,
        ):
            file = NewFile(folder_fd, None if attributes is None else attributes[-1])
            return FileUpload(file, name, key, self.url_of(key), self.counters)

    def attributes(self, key: str) -> list[FileAttributes]:
        """Return the attributes of the folders that contain a file, from the outermost below root on, and its own."""
        steps = check_key(key).split("/")
        with self._errors(key, "attributes"):
            paths = [self.root.joinpath(*steps[: number + 1]) for number in range(len(steps))]
            return [FileAttributes.of(path.lstat()) for path in paths]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            _split(key)  # refuses the names of temporary files
            self.delete_unchanged(key, None)

    def delete_unchanged(self, key: str, etag: str | None) -> bool:
        """Unlink a file if it still has this ETag (None: any); return whether it is gone, also if it was before."""
        *folders, name = check_key(key).split("/")
        try:
            with self._errors(key, "delete"), open_folder(self.root, folders) as folder_fd:
                if etag is not None:
                    found = file_info(key, os.stat(name, dir_fd=folder_fd, follow_symlinks=False))
                    if found.etag != etag:
                        return False
                with suppress(IsADirectoryError):  # a folder is not an object
                    os.unlink(name, dir_fd=folder_fd)
        except NotFound:
            pass
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
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

    def _walk(
        self, doing: str, top: str, visit: Callable[[str, os.DirEntry[str]], None], *, with_temporary: bool = False
    ) -> Iterator[None]:
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
                    if (entry.name.startswith(TEMP_PREFIX) and not with_temporary) or "\\" in entry.name:
                        continue
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(key)
                    else:
                        visit(key, entry)
            yield

    def temporary_files(self, folder: str) -> Iterator[ObjectInfo]:
        """List the files of unfinished writes below a folder, of live writers and of killed ones."""
        found: list[ObjectInfo] = []

        def visit(key: str, entry: os.DirEntry[str]) -> None:
            if entry.name.startswith(TEMP_PREFIX) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # it was given its name, or removed
                    found.append(file_info(key, entry.stat(follow_symlinks=False)))

        for _ in self._walk("list", check_key(folder.removesuffix("/")), visit, with_temporary=True):
            yield from found
            found.clear()

    def remove_temporary(self, infos: Iterable[ObjectInfo]) -> None:
        """Remove files of temporary_files(), unless they have changed since."""
        for info in infos:
            self.delete_unchanged(info.key, info.etag)

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
        """Remove a folder and its subfolders as far as they contain nothing else: other programs list them."""
        *above, name = check_key(folder).split("/")
        gone = suppress(FileNotFoundError, NotADirectoryError)
        with self._errors(folder, "remove_empty"), gone, open_folder(self.root, above) as folder_fd:
            for _, inner_names, _, inner_fd in os.fwalk(name, topdown=False, dir_fd=folder_fd):
                for inner in inner_names:
                    _rmdir(inner, inner_fd)
            _rmdir(name, folder_fd)

    def remove_empty_above(self, key: str) -> None:
        """Remove the folders above a key that contain nothing any more, from the innermost one up to the root."""
        folders, _ = _split(key)
        with self._errors(key, "remove_empty_above"):
            while folders:
                *folders, name = folders
                with suppress(FileNotFoundError, NotADirectoryError), open_folder(self.root, folders) as folder_fd:
                    if not _rmdir(name, folder_fd):
                        return

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> FileLease | None:
        with self._opened(key, "open_local") as fd:
            n_bytes = os.fstat(fd).st_size
            if identity is not None and identity.n_bytes != n_bytes:
                return None
            return FileLease(os.dup(fd), n_bytes)

    def forget_cached(self, key: str) -> None:
        """Drop a synced file's pages from the page cache, so that the next read comes from the disk."""
        with self._opened(key, "forget_cached") as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def remove_if_corrupt(self, key: str, identity: ShardIdentity | None = None) -> bool:  # noqa: ARG002 - the contract
        """Return False: the file is the object itself, and there is no other source to fetch it from."""
        return False

    @contextmanager
    def _errors(self, key: str, doing: str) -> Iterator[None]:
        self.counters.add("requests")
        with os_errors(doing, self.url_of(key)):
            yield

    @contextmanager
    def _opened(self, key: str, doing: str) -> Iterator[int]:
        folders, name = _split(key)
        with self._errors(key, doing), open_folder(self.root, folders) as folder_fd:
            # O_NONBLOCK: open() must not hang on a named pipe in this folder.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder_fd)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise NotFound(f"not a regular file ({doing})", url=self.url_of(key))
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def _new_file(self, key: str, doing: str, data: Buffer = b"") -> Iterator[tuple[NewFile, str]]:
        folders, name = _split(key)
        flat = memoryview(data).cast("B")
        with (
            self._errors(key, doing),
            open_folder(self.root, folders, make=True) as folder_fd,
            closing(NewFile(folder_fd)) as file,
        ):
            write_all(file.fd, flat, 0)
            self.counters.add("bytes_written", flat.nbytes)
            yield file, name


def _rmdir(name: str, above_fd: int) -> bool:
    try:
        os.rmdir(name, dir_fd=above_fd)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def _split(key: str) -> tuple[list[str], str]:
    *folders, name = check_key(key).split("/")
    if name.startswith(TEMP_PREFIX):
        raise ValueError(
            f"not a valid key: {key!r}; names that start with {TEMP_PREFIX!r} are reserved for unfinished writes"
        )
    return folders, name


TEMP_PREFIX = ".tiercache-tmp-"
_COPY_BYTES = 1 << 20
# Longer than any upload of a shard, and than the clock difference of machines that share a folder.
_LEFT_S = 24 * 3600.0
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_WRITING = ("put", "put_if_absent", "create", "complete")
# Errors that may pass without action, unlike a full disk or a refused permission. Network file systems return some.
# ENFILE is the limit of the machine, whose processes may close files; EMFILE, the process's own limit, persists.
_RETRYABLE = (
    errno.EAGAIN, errno.EINTR, errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EBUSY, errno.ENFILE,
)  # fmt: skip
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
# Errors of file systems without owners, modes or times, and of a server that refuses root the change of an owner.
_NOT_KEPT = (errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS, errno.EMLINK)


def _store_error(error: OSError, doing: str, url: str) -> StoreError:
    if error.errno in _ABSENT and doing not in _WRITING:
        return NotFound(f"no such object ({doing})", url=url)
    if error.errno == errno.ELOOP:
        return StoreError(
            f"{doing}: the path contains a symbolic link; a store does not follow links below its root", url=url
        )
    if limit := emfile_message(error):
        return StoreError(f"{doing}: {limit}", url=url, too_many_open=True)
    text = os.strerror(error.errno or 0)
    if error.errno == errno.ENOSPC and _has_no_free_inode(url):
        text = "no free inodes: its file system holds as many files as it can, whatever bytes are free; delete files"
    return StoreError(f"{doing}: {text}", url=url, retryable=error.errno in _RETRYABLE)


def _has_no_free_inode(path: str) -> bool:
    """Return whether the file system of a path, or of its nearest folder that exists, is full by its inodes."""
    for folder in (Path(path), *Path(path).parents):
        with suppress(OSError):
            status = os.statvfs(folder)
            return status.f_files > 0 and status.f_favail == 0
    return False


@contextmanager
def os_errors(doing: str, url: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise  # NotFound is also an OSError
    except OSError as error:
        raise _store_error(error, doing, url) from error


def file_info(key: str, status: os.stat_result) -> ObjectInfo:
    """Return the description of a file. The ETag holds the inode number, mtime, size and ctime.

    Any program may restore a mtime (rsync -t, utime); only the kernel sets the ctime, so a file with other bytes, or a
    reused inode number, has another ETag.
    """
    etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ctime_ns:x}"'
    return ObjectInfo(key, status.st_size, etag=etag, modified_s=status.st_mtime)


@dataclass(frozen=True, slots=True)
class FileAttributes:
    """Attributes of a file or a folder that a copy keeps, as far as the file system and the process's rights allow.

    mode: None: the umask decides. owner: User (kept by root only) and group; None: the process's own.
    """

    accessed_ns: int
    modified_ns: int
    mode: int | None = None
    owner: tuple[int, int] | None = None

    @classmethod
    def of(cls, status: os.stat_result) -> FileAttributes:
        # Not the set-user-ID bit: where the owner cannot be kept, the file would run with the mover's rights.
        # A folder stays writable for its owner, because the next files of the copy are written into it.
        is_folder = stat.S_ISDIR(status.st_mode)
        mode = status.st_mode & 0o3777 | 0o700 if is_folder else status.st_mode & 0o777
        return cls(status.st_atime_ns, status.st_mtime_ns, mode, (status.st_uid, status.st_gid))

    def set_rights(self, fd: int) -> None:
        if self.owner is not None:
            user, group = self.owner
            with _unless_refused():
                os.fchown(fd, user if os.geteuid() == 0 else -1, group)
        if self.mode is not None:
            with _unless_refused():
                os.fchmod(fd, self.mode)

    def set_times(self, fd: int) -> None:
        with _unless_refused():
            os.utime(fd, ns=(self.accessed_ns, self.modified_ns))


@contextmanager
def _unless_refused() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_KEPT:
            raise


# Held from the look at a folder's time until it is set back, so that no thread sets back to another thread's change.
_folder_times = RLock()


@contextmanager
def _folder_time_kept(folder_fd: int) -> Iterator[None]:
    """Leave the times of a folder as they are, while the block changes its entries."""
    with _folder_times:
        status = os.fstat(folder_fd)
        try:
            yield
        finally:
            FileAttributes.of(status).set_times(folder_fd)


@contextmanager
def open_folder(
    root: Path, folders: list[str], *, make: bool = False, attributes: Sequence[FileAttributes] | None = None
) -> Iterator[int]:
    """Yield a descriptor of a folder below root, opened step by step without following links below root.

    make: Create missing folders, root included, and sync the entry of each. attributes: Of each folder that is created;
    folders that exist keep their times.
    """
    if make:
        _make_root(root)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, name in enumerate(folders):
            if make:
                _make_folder(name, fd, None if attributes is None else attributes[number])
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            # Forget the descriptor before closing it: if Ctrl-C interrupts close(), a second close() could hit
            # another file that has received the same number.
            outer, fd = fd, inner
            os.close(outer)
        yield fd
    finally:
        os.close(fd)


def _make_folder(name: str, above_fd: int, attributes: FileAttributes | None) -> None:
    try:
        if attributes is None:
            os.mkdir(name, dir_fd=above_fd)
        else:
            with _folder_time_kept(above_fd):
                os.mkdir(name, 0o777 if attributes.mode is None else attributes.mode, dir_fd=above_fd)
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above_fd)
                try:
                    attributes.set_rights(fd)
                    attributes.set_times(fd)
                finally:
                    os.close(fd)
    except FileExistsError:
        return
    sync_folder(above_fd)


def _make_root(root: Path) -> None:
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fd = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_folder(fd)
        finally:
            os.close(fd)


def sync_folder(folder_fd: int) -> None:
    try:
        os.fsync(folder_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


_swept: set[tuple[int, int]] = set()


def _sweep(folder_fd: int) -> None:
    """Remove temporary files older than a day, left by killed writers. Runs once per process and folder."""
    status = os.fstat(folder_fd)
    if (status.st_dev, status.st_ino) in _swept:
        return
    _swept.add((status.st_dev, status.st_ino))
    with os.scandir(folder_fd) as entries:
        left = [entry.name for entry in entries if entry.name.startswith(TEMP_PREFIX)]
    for name in left:
        with suppress(FileNotFoundError):  # another process may sweep at the same time
            if time.time() - os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mtime > _LEFT_S:
                os.unlink(name, dir_fd=folder_fd)


class NewFile:
    """A file that has no name yet, with its descriptor fd. close() discards it if it was given none.

    attributes: The file gets them before its name, and its folder keeps its times. None: it is a new file.
    """

    def __init__(self, folder_fd: int, attributes: FileAttributes | None = None) -> None:
        self._attributes = attributes
        self._folder_fd = os.dup(folder_fd)
        self._open_fds = [self._folder_fd]
        self._temp_name: str | None = None
        try:
            self.fd = self._open()
            self._open_fds.append(self.fd)
            if attributes is not None:
                attributes.set_rights(self.fd)  # now: until it has its name, the bytes need the same protection
        except OSError:
            self.close()
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(".", flags | os.O_TMPFILE, 0o666, dir_fd=self._folder_fd)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        _sweep(self._folder_fd)
        name = TEMP_PREFIX + secrets.token_hex(8)
        mode = 0o666 if self._attributes is None or self._attributes.mode is None else 0o600
        with self._folder_time():
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=self._folder_fd)
        self._temp_name = name
        return fd

    def _folder_time(self) -> AbstractContextManager[None]:
        return nullcontext() if self._attributes is None else _folder_time_kept(self._folder_fd)

    def _set_times(self) -> None:
        if self._attributes is not None:
            self._attributes.set_times(self.fd)

    def name_if_free(self, name: str) -> bool:
        """Give the file its name atomically if the name is free. Return whether it was; the file is then durable."""
        os.fsync(self.fd)
        with self._folder_time():
            self._set_times()
            try:
                self._link(name)
            except FileExistsError:
                return False
            self._unlink_temp()  # before the caller takes the ETag: unlinking changes the ctime, which is part of it
        sync_folder(self._folder_fd)
        return True

    def set_name(self, name: str) -> None:
        """Give the file its name atomically, replacing an existing file. The file is durable when the call returns."""
        os.fsync(self.fd)
        with self._folder_time():
            self._set_times()
            if self._temp_name is None:
                try:
                    # For a free name, no temporary name ever appears.
                    self._link(name)
                except FileExistsError:
                    temp = TEMP_PREFIX + secrets.token_hex(8)
                    self._link(temp)
                    self._temp_name = temp
            if self._temp_name is not None:
                os.rename(self._temp_name, name, src_dir_fd=self._folder_fd, dst_dir_fd=self._folder_fd)
                self._temp_name = None
        sync_folder(self._folder_fd)

    def _link(self, name: str) -> None:
        if self._temp_name is None:
            # With a folder descriptor, Python passes AT_SYMLINK_FOLLOW, which linking a nameless file needs.
            os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=self._folder_fd, follow_symlinks=True)
            return
        try:
            os.link(self._temp_name, name, src_dir_fd=self._folder_fd, dst_dir_fd=self._folder_fd)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            self._copy_exclusively(name)

    def _copy_exclusively(self, name: str) -> None:
        # File systems without hard links (FAT, some FUSE): O_EXCL still lets one writer win, but a reader, or a process
        # after a crash, may see a partial file. Small files (versions) are written by one call.
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=self._folder_fd)
        try:
            if self._attributes is not None:
                self._attributes.set_rights(fd)
            n_bytes = 0
            while data := os.pread(self.fd, _COPY_BYTES, n_bytes):
                write_all(fd, memoryview(data), n_bytes)
                n_bytes += len(data)
            os.fsync(fd)
            os.dup2(fd, self.fd, inheritable=False)  # the named file, whose ETag the caller takes
            self._set_times()
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptors and discard the file if it has no name. Repeated calls have no effect."""
        self._unlink_temp()
        if self._open_fds:
            try:
                os.close(self._open_fds.pop())
            finally:
                self.close()  # closes the other descriptor, even if Ctrl-C interrupts this one

    def _unlink_temp(self) -> None:
        if self._temp_name is not None:
            with suppress(OSError), self._folder_time():
                os.unlink(self._temp_name, dir_fd=self._folder_fd)
            self._temp_name = None


def write_all(fd: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written


# Alignment of memory, offset and length: the page size, which is at least the block size of any disk in use.
ALIGN_BYTES = 4096
# Smaller writes gain little from bypassing the page cache.
MIN_BYTES = 1 << 20
# A store's first bytes stay in the page cache, because a small data set is often read right after it is written:
# packing 100 MB and a first shuffled epoch took 0.11 s with the page cache and 0.16 s without. Larger data sets gain
# from direct writes: 512 MB took 2.1 times as long through the page cache.
CACHED_BYTES = 128 << 20
# Errors of file systems that accept O_DIRECT at open but not at write, and of memory that a disk cannot read.
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EFAULT, errno.ENOMEM)


class DirectWriter:
    """A second descriptor (O_DIRECT) of a file that is being written, which stays open until close(). Safe for threads.

    The page cache copies all bytes into pages that must be allocated first, in a virtual machine often by the host: 512
    MB in parts of 8 MiB took 1.3 to 3.7 s with it, and 0.3 to 0.5 s without.
    """

    def __init__(self, fd: int) -> None:
        self._fd = _opened(fd)

    def write(self, data: memoryview, offset: int) -> int:
        """Write the aligned part of flat data, as far as direct writes accept it; return the number of bytes."""
        n_bytes = data.nbytes // ALIGN_BYTES * ALIGN_BYTES
        if self._fd < 0 or n_bytes < MIN_BYTES or (_address(data) | offset) % ALIGN_BYTES:
            return 0
        done = 0
        while done < n_bytes and done % ALIGN_BYTES == 0:
            try:
                done += os.pwrite(self._fd, data[done:n_bytes], offset + done)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                break
        return done

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _opened(fd: int) -> int:
    """Return a descriptor for direct writes to the (perhaps nameless) file of fd, or -1 if the system provides none."""
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC | flag)
    return -1


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)
