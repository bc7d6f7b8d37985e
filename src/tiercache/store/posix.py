"""System calls for local folders: confined descriptors, atomic publishing of new files, direct writes, error mapping.

An unpublished file has no name where the file system supports O_TMPFILE, so a killed writer leaves nothing behind.
Elsewhere its name starts with TEMP_PREFIX, in the destination folder; such names are never listed.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from tiercache.errors import NotFound, StoreError
from tiercache.file_limit import emfile_message
from tiercache.model import ObjectInfo

TEMP_PREFIX = ".tiercache-tmp-"
_COPY_BYTES = 64 << 20
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
    return StoreError(f"{doing}: {os.strerror(error.errno or 0)}", url=url, retryable=error.errno in _RETRYABLE)


@contextmanager
def os_errors(doing: str, url: str) -> Iterator[None]:
    """Convert errors of the system to StoreError."""
    try:
        yield
    except StoreError:
        raise  # NotFound is also an OSError
    except OSError as error:
        raise _store_error(error, doing, url) from error


def file_info(key: str, status: os.stat_result) -> ObjectInfo:
    """Return the description of a file. The ETag holds the inode number, mtime, size and ctime.

    Any program may restore a file's mtime (rsync -t, cp -p, utime); only the kernel sets its ctime, so a file with
    other bytes has another ETag. The ETag omits the inode's generation, because reading it needs an open file
    (FS_IOC_GETVERSION) and a listing opens none; a reused inode number has a new ctime anyway.
    """
    etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ctime_ns:x}"'
    return ObjectInfo(key, status.st_size, etag=etag, modified_s=status.st_mtime)


@contextmanager
def open_folder(root: Path, folders: list[str], *, make: bool = False) -> Iterator[int]:
    """Yield a descriptor of a folder below root, opened step by step without following links below root.

    make: create missing folders, root included, and sync the entry of each.
    """
    if make:
        _make_root(root)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in folders:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=fd)
                    sync_folder(fd)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            # Forget the descriptor before closing it: if Ctrl-C interrupts close(), a second close() could hit
            # another file that has received the same number.
            outer, fd = fd, inner
            os.close(outer)
        yield fd
    finally:
        os.close(fd)


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
    """Make the entries of a folder durable, where the file system supports it."""
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


class UnpublishedFile:
    """An unpublished file in a folder, with its descriptor fd. close() discards a file that was not published."""

    def __init__(self, folder_fd: int) -> None:
        self._folder_fd = os.dup(folder_fd)
        self._open_fds = [self._folder_fd]
        self._temp_name: str | None = None
        try:
            self.fd = self._open()
        except OSError:
            self.close()
            raise
        self._open_fds.append(self.fd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(".", flags | os.O_TMPFILE, 0o666, dir_fd=self._folder_fd)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        _sweep(self._folder_fd)
        name = TEMP_PREFIX + secrets.token_hex(8)
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=self._folder_fd)
        self._temp_name = name
        return fd

    def publish_if_absent(self, name: str) -> bool:
        """Give the file its name atomically if the name is free. Return whether it was; the file is then durable."""
        os.fsync(self.fd)
        try:
            self._link(name)
        except FileExistsError:
            return False
        self._unlink_temp()  # before the caller takes the ETag: unlinking changes the ctime, which is part of it
        sync_folder(self._folder_fd)
        return True

    def publish(self, name: str) -> None:
        """Give the file its name atomically, replacing an existing file. The file is durable when the call returns."""
        os.fsync(self.fd)
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
            copy_bytes(self.fd, fd, os.fstat(self.fd).st_size)
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptors and discard the file if it was not published. Repeated calls have no effect."""
        self._unlink_temp()
        if self._open_fds:
            try:
                os.close(self._open_fds.pop())
            finally:
                self.close()  # closes the other descriptor, even if Ctrl-C interrupts this one

    def _unlink_temp(self) -> None:
        if self._temp_name is not None:
            with suppress(OSError):
                os.unlink(self._temp_name, dir_fd=self._folder_fd)
            self._temp_name = None


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of data (flat bytes) at offset, without the GIL."""
    while data.nbytes:
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written


def copy_bytes(src_fd: int, dst_fd: int, n_bytes: int) -> None:
    """Copy the first bytes of a file, inside the kernel where possible. Raises OSError, also if src ends too early."""
    done = 0
    while done < n_bytes:
        part_bytes = min(_COPY_BYTES, n_bytes - done)
        try:
            n_copied = os.copy_file_range(src_fd, dst_fd, part_bytes, done, done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
            data = os.pread(src_fd, min(part_bytes, 1 << 20), done)
            write_all(dst_fd, memoryview(data), done)
            n_copied = len(data)
        if not n_copied:
            raise OSError(errno.EIO, "the source file is shorter than expected")
        done += n_copied


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
    """A second descriptor (O_DIRECT) of a file that is being written.

    The page cache copies all written bytes into pages that must be allocated first, in a virtual machine often by the
    host: 512 MB in parts of 8 MiB took 1.3 to 3.7 s with the page cache, and 0.3 to 0.5 s without. Direct writes also
    leave other programs' pages in the page cache.

    Safe for threads. The file's own descriptor must stay open until close().
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
        """Close the descriptor. Repeated calls have no effect."""
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
