"""System calls for local folders: confined descriptors, atomic publishing, direct writes; and the limit of open files.

An unpublished file has no name where the file system supports O_TMPFILE, so a killed writer leaves nothing behind.
Elsewhere its name starts with TEMP_PREFIX, in the destination folder; such names are never listed.
"""

from __future__ import annotations

import errno
import os
import resource
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import numpy as np

from tiercache.errors import NotFound, StoreError
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


@dataclass(frozen=True, slots=True)
class FileAttributes:
    """Attributes of a file or a folder that a copy keeps, as far as the file system and the process's rights allow.

    Attributes:
        accessed_ns, modified_ns: Times, in nanoseconds since the epoch.
        mode: Permission bits; of a folder also the set-group-ID and sticky bits. None: the umask decides.
        owner: User and group. The user is kept by root only. None: the process's own.
    """

    accessed_ns: int
    modified_ns: int
    mode: int | None = None
    owner: tuple[int, int] | None = None

    @classmethod
    def of(cls, status: os.stat_result) -> FileAttributes:
        """Return the attributes of an existing file or folder."""
        # Not the set-user-ID bit: where the owner cannot be kept, the file would run with the mover's rights.
        # A folder stays writable for its owner, because the next files of the copy are written into it.
        is_folder = stat.S_ISDIR(status.st_mode)
        mode = status.st_mode & 0o3777 | 0o700 if is_folder else status.st_mode & 0o777
        return cls(status.st_atime_ns, status.st_mtime_ns, mode, (status.st_uid, status.st_gid))

    def set_rights(self, fd: int) -> None:
        """Give an open file or folder the owner and the mode."""
        if self.owner is not None:
            user, group = self.owner
            with _unless_refused():
                os.fchown(fd, user if os.geteuid() == 0 else -1, group)
        if self.mode is not None:
            with _unless_refused():
                os.fchmod(fd, self.mode)

    def set_times(self, fd: int) -> None:
        """Give an open file or folder the times."""
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

    Args:
        root: Root folder.
        folders: Names of the folders below it, outermost first.
        make: Whether to create missing folders, root included, and to sync the entry of each.
        attributes: Attributes of each of the folders that is created below root; folders that exist keep their times.
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
    """Create a folder in an open folder unless it exists, and sync its entry."""
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
    """An unpublished file in a folder, with its descriptor fd. close() discards a file that was not published.

    attributes: Attributes that the file gets before it is published; the folder then keeps its times. None: the file is
    a new one.
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
                attributes.set_rights(self.fd)  # now: until it is published, the bytes need the same protection
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

    def publish_if_absent(self, name: str) -> bool:
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

    def publish(self, name: str) -> None:
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
            copy_bytes(self.fd, fd, os.fstat(self.fd).st_size)
            os.fsync(fd)
            os.dup2(fd, self.fd, inheritable=False)  # the published file, whose ETag the caller takes
            self._set_times()
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
            with suppress(OSError), self._folder_time():
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


# -- the limit of open files belongs to the process, whose data sets, loaders and own files share it ------------------

# Maximum to which the soft limit is raised. Some programs loop over all possible descriptors when they start a child,
# and in many containers the hard limit is 1,048,576.
MAX_SOFT_LIMIT = 65_536


def _limits() -> tuple[int, int]:
    """Return the soft limit, and the value that it may be raised to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_SOFT_LIMIT if soft == resource.RLIM_INFINITY else soft
    hard = MAX_SOFT_LIMIT if hard == resource.RLIM_INFINITY else hard
    return soft, max(soft, min(hard, MAX_SOFT_LIMIT))


def max_shard_descriptors() -> int:
    """Return the number of descriptors for all open shards of this process; the other half is left to the user."""
    return _limits()[1] // 2


def raise_limit_for(n_descriptors: int) -> None:
    """Raise the soft limit towards the hard limit if open shards may use fewer than n_descriptors.

    Many systems set a soft limit of 1,024 because select(2) cannot use larger descriptors, and leave the hard limit
    high for programs that do not use select(2). Child processes inherit the limit.
    """
    soft, highest = _limits()
    if n_descriptors > soft // 2:
        _raise_to(soft, highest)


def raise_limit() -> bool:
    """Raise the soft limit towards the hard limit. Returns False if it is already as high as possible."""
    return _raise_to(*_limits())


def _raise_to(soft: int, highest: int) -> bool:
    if soft >= highest:
        return False
    with suppress(ValueError, OSError):  # macOS refuses more than OPEN_MAX, whatever the hard limit is
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return True
    return False


def emfile_message(error: BaseException) -> str:
    """Return a message with the limits and how to raise them if the error is EMFILE; "" for any other error."""
    if not isinstance(error, OSError) or error.errno != errno.EMFILE:
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else hard
    return (
        f"too many open files: this process has reached its limit of {soft} descriptors (the hard limit is {shown}); "
        f"raise it with `ulimit -n {max(4096, 4 * soft)}` before the program starts (the hard limit may need the "
        "administrator), or close files that are not needed"
    )
