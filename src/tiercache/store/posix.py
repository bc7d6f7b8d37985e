"""What a local folder needs of the system: descriptors that stay inside a root, files that appear whole, our errors.

A file in the making has no name at all where the file system can do that (O_TMPFILE): a killed writer leaves nothing to
sweep. Elsewhere it has a name that starts with TEMP_PREFIX, in the folder where it will appear; such names are never
listed.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tiercache.descriptors import too_many_open
from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo

TEMP_PREFIX = ".tiercache-tmp-"
_COPY_BYTES = 64 << 20
# No upload of a shard takes as long; the clocks of machines that share a folder differ by less.
_LEFT_S = 24 * 3600.0
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_WRITING = ("put", "put_if_absent", "create", "complete")
# A full disk or a refused permission stays so; these may pass by themselves (network file systems give the last three).
_RETRYABLE = (
    errno.EAGAIN,
    errno.EINTR,
    errno.EIO,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.EBUSY,
    errno.ENFILE,  # the whole machine's limit: other processes close files too. EMFILE, this process's own, stays
)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS, errno.EMLINK)


def store_error(error: OSError, doing: str, url: str) -> StoreError:
    """Our error for an error of the system."""
    if error.errno in _ABSENT and doing not in _WRITING:
        return NotFound(f"no such object ({doing})", url=url)
    if error.errno == errno.ELOOP:
        return StoreError(f"{doing}: a symbolic link is in the way; keys are never followed through links", url=url)
    if limit := too_many_open(error):
        return StoreError(f"{doing}: {limit}", url=url, too_many_open=True)
    return StoreError(f"{doing}: {os.strerror(error.errno or 0)}", url=url, retryable=error.errno in _RETRYABLE)


@contextmanager
def os_errors(doing: str, url: str) -> Iterator[None]:
    """Turn errors of the system into ours; url: redacted."""
    try:
        yield
    except StoreError:
        raise  # NotFound is an OSError too
    except OSError as error:
        raise store_error(error, doing, url) from error


def file_info(key: str, status: os.stat_result) -> ObjectInfo:
    """What a file is. The ETag holds the inode number, mtime, size and ctime.

    Any program may restore a file's mtime (rsync -t, cp -p, utime); only the kernel sets its ctime, so that a file with
    other bytes has another ETag. The inode's generation is left out: reading it takes an open file (FS_IOC_GETVERSION),
    and a listing opens none; a reused inode number has another ctime already.
    """
    etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ctime_ns:x}"'
    return ObjectInfo(key, status.st_size, etag=etag, modified_s=status.st_mtime)


@contextmanager
def open_folder(root: Path, folders: list[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder below root, reached step by step without following links below root.

    make: make what is missing, root too, and sync the entry of each folder made.
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
            # Closed when nobody knows it any more: Ctrl-C strikes as close() returns, and a second one would be of
            # whatever has the number by then.
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
    """Make the entries of a folder durable, where the file system knows how."""
    try:
        os.fsync(folder_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


_swept: set[tuple[int, int]] = set()


def _sweep(folder_fd: int) -> None:
    """Once a process and folder, remove what writers left that were killed more than a day ago."""
    status = os.fstat(folder_fd)
    if (status.st_dev, status.st_ino) in _swept:
        return
    _swept.add((status.st_dev, status.st_ino))
    with os.scandir(folder_fd) as entries:
        left = [entry.name for entry in entries if entry.name.startswith(TEMP_PREFIX)]
    for name in left:
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mtime > _LEFT_S:
                os.unlink(name, dir_fd=folder_fd)


class NewFile:
    """A file in the making, in a folder. One owner; close() drops what was not published.

    folder_fd: not kept, duplicated; fd: for writing and reading at any offset, from any thread.
    """

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

    def sibling(self) -> NewFile:
        """Another file in the making, in the same folder."""
        return NewFile(self._folder_fd)

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

    def publish_absent(self, name: str) -> bool:
        """Give the file its name, atomically, unless that name is taken: then False. Durable when it returns."""
        os.fsync(self.fd)
        try:
            self._link(name)
        except FileExistsError:
            return False
        self._unlink_temp()  # now, and not by close(): it changes the ctime, which is part of the file's ETag
        sync_folder(self._folder_fd)
        return True

    def publish(self, name: str) -> None:
        """Give the file its name, atomically replacing what has it. Durable when it returns."""
        os.fsync(self.fd)
        if self._temp_name is None:
            try:
                # The usual case, a new name, never shows a temporary one.
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
            # Given a folder descriptor, Python passes AT_SYMLINK_FOLLOW: what linking a nameless file needs.
            os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=self._folder_fd, follow_symlinks=True)
            return
        try:
            os.link(self._temp_name, name, src_dir_fd=self._folder_fd, dst_dir_fd=self._folder_fd)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            self._copy_exclusively(name)

    def _copy_exclusively(self, name: str) -> None:
        # File systems without hard links (FAT, some FUSE): O_EXCL still has one winner, but a reader may see the file
        # grow, and so may whoever follows a crash; small files (versions) are written by one call.
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=self._folder_fd)
        try:
            copy_bytes(self.fd, fd, os.fstat(self.fd).st_size, 0, 0)
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Drop the descriptors, and the file if it was not published. Harmless when repeated."""
        self._unlink_temp()
        if self._open_fds:
            try:
                os.close(self._open_fds.pop())
            finally:
                self.close()  # the other one, where Ctrl-C strikes here too

    def _unlink_temp(self) -> None:
        if self._temp_name is not None:
            with suppress(OSError):
                os.unlink(self._temp_name, dir_fd=self._folder_fd)
            self._temp_name = None


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of data (flat bytes) at offset; the GIL is dropped meanwhile."""
    while data.nbytes:
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written


def copy_bytes(src_fd: int, dst_fd: int, n_bytes: int, src_offset: int, dst_offset: int) -> None:
    """Copy bytes between files inside the kernel where it can (sharing blocks on file systems that do).

    Raises:
        OSError: EIO where src ends too early, or what the system says.
    """
    done = 0
    while done < n_bytes:
        part_bytes = min(_COPY_BYTES, n_bytes - done)
        try:
            n_copied = os.copy_file_range(src_fd, dst_fd, part_bytes, src_offset + done, dst_offset + done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
            data = os.pread(src_fd, min(part_bytes, 1 << 20), src_offset + done)
            write_all(dst_fd, memoryview(data), dst_offset + done)
            n_copied = len(data)
        if not n_copied:
            raise OSError(errno.EIO, "the source ended early")
        done += n_copied
