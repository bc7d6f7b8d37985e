"""`Folder`: the files of a cache on disk, their locks, and the disk. Only this module deletes files of the cache.

::

    tiercache-cache.json         the marker: without it nothing here is touched
    default-size.json            the size with which the cache was last opened
    catalog.sqlite               the accounts; rebuilt from the files if it is lost
    copies/NAME                  a copy, read-only; the existence of this file decides whether the object is cached
    copies/NAME.json             its record: source, size, checksum
    copies/NAME.pin              the mark of a pinned copy
    copies/NAME.part             a partial copy, as long as the whole; see copy_file.py
    copies/NAME.map              its unit map; kept beside the complete copy of an object without identity
    locks/NAME                   locked while NAME is fetched or evicted
    owners/OWNER                 locked while its process has the cache open
    plans/                       the reading plans of the jobs of this machine

The folder belongs to one user. Folders have mode 0700, files 0600 and copies 0400, whatever the umask. No file is
opened, and no folder is entered, through a symbolic link below the root. Only the user could create such a link, so
reading a copy checks only the copy's own name; opening the cache and starting a fetch check the folders too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tiercache.cache.names import NAME, CopySpec
from tiercache.crash_points import crash_point
from tiercache.store.shared_files import (
    DISK_FULL,
    NO_LINK,
    PRIVATE,
    is_folder,
    link_whole,
    make_folder,
    maker_of,
    open_file,
    open_folder,
    pid_namespace,
    read_text,
    replace_whole,
    set_mode,
    start_time,
)

# -- locks -------------------------------------------------------------------------------------------------------------

_private: set[int] = set()


def keep_private(fd: int) -> int:
    """Let forked children close fd, and return it. The descriptor must be closed with close_private()."""
    _private.add(fd)
    return fd


def close_private(fd: int) -> None:
    # Deregistered first: a fork in between leaves the child one descriptor too many; in the other order, the child
    # could close another file.
    _private.discard(fd)
    os.close(fd)


def _close_inherited() -> None:
    while _private:
        with suppress(OSError):
            os.close(_private.pop())


os.register_at_fork(after_in_child=_close_inherited)


def try_shared(fd: int) -> bool:
    return _try(fd, fcntl.LOCK_SH)


def try_exclusive(fd: int) -> bool:
    return _try(fd, fcntl.LOCK_EX)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: str | Path) -> bool:
    """Return whether another descriptor has the exclusive lock of a file; False if the file cannot be opened."""
    try:
        fd = open_file(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_shared(fd)
    finally:
        os.close(fd)


class NameLock:
    """The lock to fetch or evict one copy: a lock file, which is removed when the lock is released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        while True:
            fd = open_file(self.path, os.O_RDWR | os.O_CREAT)
            try:
                is_free = try_exclusive(fd)
                # The last holder may have removed the file between open() and flock(): then the lock is on a file
                # without a name.
                has_name = os.fstat(fd).st_nlink > 0
            except BaseException:
                os.close(fd)
                raise
            if is_free and has_name:
                self._fd = keep_private(fd)
                text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
                with suppress(OSError):  # a full disk: the note only serves messages
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, text.encode(), 0)
                return True
            os.close(fd)
            if not is_free:
                return False

    @property
    def is_held(self) -> bool:
        return self._fd is not None

    def holder(self) -> str:
        try:
            note = json.loads(read_text(self.path))
            return f"process {note['pid']} on {note['host']} (lock {self.path})"
        except (OSError, ValueError, KeyError, TypeError):
            return f"another process (lock {self.path})"

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                self.path.unlink()
            close_private(fd)


# -- the disk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DiskSpace:
    free_bytes: int
    total_bytes: int
    n_free_files: int | None


def disk_space(path: Path) -> DiskSpace:
    status = os.statvfs(path)
    n_free_files = status.f_favail if status.f_files else None
    return DiskSpace(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, n_free_files)


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_FULL


# Types of file systems whose locks, links or mappings other machines share. FUSE often is one and cannot be told apart.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "gfs2", "ocfs2")


def network_file_system(path: Path) -> str | None:
    try:
        device = path.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    types = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    return types[0] if types and types[0].split(".")[0] in _NETWORK else None


BLOCK_BYTES = 4096


def charge_bytes(n_bytes: int) -> int:
    """Return the charge of a file of n_bytes: its size in whole disk blocks, plus one block for its record."""
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES


# -- the folder --------------------------------------------------------------------------------------------------------

MARKER = "tiercache-cache.json"
_DEFAULT_SIZE = "default-size.json"
_DISK_UNIT_BYTES = 512  # unit of st_blocks, independent of the file system's block size
# A small file is written in microseconds. An older temporary file has lost its writer, even if a process with that
# number runs again.
OLD_TEMP_S = 600.0


COPY_MODE = 0o400
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


class Folder:
    """Paths and file operations of one cache folder. It has no other state; safe from any thread and process."""

    BELOW: ClassVar = ("copies", "locks", "owners", "plans")

    def __init__(self, path: Path) -> None:
        """Create the folder, or recognise an existing one.

        Raises:
            PermissionError, ValueError: The folder belongs to another user, or has other contents.
            OSError: The folder cannot be created or examined, or file locks do not work there.
        """
        _claim(path)
        self.root = path
        self.copies, self.locks, self.owners, self.plans = (self.root / name for name in self.BELOW)
        self.catalog = self.root / "catalog.sqlite"
        self._default_size = path / _DEFAULT_SIZE
        self._copies, self._below = str(self.copies), [str(self.root / name) for name in self.BELOW]
        self._check_locks()
        try:
            self.ensure()
            is_folder(self.copies)
        except NotADirectoryError as error:
            raise ValueError(f"{error.filename}: {error.strerror}") from error
        except OSError:
            pass  # a read-only folder can still serve its copies

    def _check_locks(self) -> None:
        """Raise OSError if a lock does not exclude a second one, as on some network file systems."""
        with ExitStack() as stack:
            for _ in range(2):
                fd = open_file(self.root / MARKER, os.O_RDONLY)
                stack.callback(os.close, fd)
                try:
                    if not try_exclusive(fd):
                        return  # the first one already, if another process is checking too
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    break
        raise OSError(
            errno.ENOLCK,
            "file locks do not work on this file system, so processes would evict what others read; choose a folder on "
            "a local disk for the cache (TIERCACHE_CACHE_DIR, or Cache(path, ...))",
            str(self.root),
        )

    @property
    def id(self) -> str:
        """Random id in the folder's marker, 32 hex digits; "" if it cannot be read."""
        try:
            found = json.loads(read_text(self.root / MARKER))["id"]
            return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{32}", found) else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def ensure(self) -> None:
        if self._is_whole():
            return
        if not _has_marker(self.root):
            _write_marker(self.root)
        for path in self._below:
            make_folder(Path(path), 0o700)

    def remember_size(self, size_bytes: int) -> None:
        text = json.dumps({"size_bytes": size_bytes}) + "\n"
        with suppress(OSError):
            if not self._default_size.exists() or read_text(self._default_size) != text:
                replace_whole(self._default_size, text)

    def _is_whole(self) -> bool:
        """Return whether the marker and the folders exist: 13 us, before every fetch."""
        try:
            return _has_marker(self.root) and all(stat.S_ISDIR(os.lstat(path).st_mode) for path in self._below)
        except OSError:
            return False

    # -- copies -----------------------------------------------------------------------------------------------------

    def copy_path(self, name: str) -> str:
        return f"{self._copies}/{name}"

    def open_copy(self, name: str) -> int | None:
        """Open a copy for reading; None: it does not exist, or is a link, which is never followed."""
        try:
            return open_file(f"{self._copies}/{name}", os.O_RDONLY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def size_of(self, name: str) -> int | None:
        """Return the size of the copy in bytes; None: it does not exist; -1: it is no regular file, and never read."""
        try:
            status = os.lstat(self.copy_path(name))
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def charge_of(self, name: str) -> int | None:
        """Return the bytes that a copy, whole or partial, takes of the size limit; None: it does not exist."""
        path, disk_bytes = self.copy_path(name), {}
        for kind in ("", ".part", ".map"):
            with suppress(OSError):
                status = os.lstat(f"{path}{kind}")
                if stat.S_ISREG(status.st_mode):
                    disk_bytes[kind] = _disk_bytes(status, kind)
        return _charge(disk_bytes)

    def sizes(self) -> dict[str, int]:
        files: dict[str, dict[str, int]] = {}
        # The folder itself may have been deleted.
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            for entry in entries:
                name, dot, suffix = entry.name.partition(".")
                if suffix in ("", "part", "map") and NAME.fullmatch(name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # evicted during the scan
                        status, kind = entry.stat(follow_symlinks=False), f"{dot}{suffix}"
                        files.setdefault(name, {})[kind] = _disk_bytes(status, kind)
        charges = {name: _charge(disk_bytes) for name, disk_bytes in files.items()}
        return {name: charge for name, charge in charges.items() if charge is not None}

    def has_file(self, file: str) -> bool:
        return os.path.lexists(self.copy_path(file))

    def names(self, suffix: str) -> list[str]:
        files: list[str] = []
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            files += [e.name.removesuffix(suffix) for e in entries if e.name.endswith(suffix)]
        return [name for name in files if NAME.fullmatch(name)]

    def read_record(self, name: str) -> CopySpec | None:
        try:
            return CopySpec.from_json(name, read_text(f"{self._copies}/{name}.json"))
        except OSError:
            return None

    def write_record(self, spec: CopySpec, crc32c: int | None) -> None:
        path, text = self.copies / f"{spec.name}.json", spec.to_json(crc32c)
        with suppress(OSError):
            if read_text(path) == text:
                return
        replace_whole(path, text)

    def pin(self, name: str) -> None:
        os.close(open_file(f"{self._copies}/{name}.pin", os.O_WRONLY | os.O_CREAT))

    def unpin(self, name: str) -> bool:
        return self._remove(f"{name}.pin")

    def is_pinned(self, name: str) -> bool:
        return self.has_file(f"{name}.pin")

    # -- partial copies ------------------------------------------------------------------------------------------------

    def new_file(self, file: str) -> int:
        return open_file(f"{self._copies}/{file}", os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def open_to_write(self, file: str) -> int | None:
        path = f"{self._copies}/{file}"
        try:
            try:
                return open_file(path, os.O_RDWR)
            except PermissionError:  # the process that made it read-only died before it completed the copy
                fd = open_file(path, os.O_RDONLY)
                try:
                    set_mode(fd, PRIVATE)
                finally:
                    os.close(fd)
                return open_file(path, os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def give_name(self, fd: int, name: str) -> bool:
        """Give the partial copy that fd is open on its final name, unless another file has the name already.

        The file is found by its descriptor: after the folder was deleted by hand, another file may have its path.
        """
        with self._marked("copies") as folder_fd:
            try:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                # This file system has no hard links. Replacing is also correct: another copy of this name has the same
                # bytes, and its readers keep their file.
                os.rename(f"{name}.part", name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        return True

    def take_name(self, name: str) -> None:
        """Make a complete copy a partial one again."""
        with self._marked("copies") as folder_fd:
            os.rename(name, f"{name}.part", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)

    def unlink_part(self, name: str, fd: int, *, keep_map: bool) -> None:
        """Remove the names of the partial copy that fd is open on, if they still belong to this file."""
        with suppress(FileNotFoundError):
            if os.lstat(self.copy_path(f"{name}.part")).st_ino != os.fstat(fd).st_ino:
                return
        if not keep_map:  # first: a sweep removes a partial copy beside its complete copy, but not a map alone
            self.remove_file("copies", f"{name}.map")
        self.remove_part(name, keep_map=True)

    def remove_part(self, name: str, *, keep_map: bool = False) -> None:
        self._remove(f"{name}.part")
        if not keep_map:  # the map last, because a map alone is harmless
            self._remove(f"{name}.map")

    # -- deleting ---------------------------------------------------------------------------------------------------

    def remove_copy(self, name: str) -> None:
        # The copy first: a sweep removes a record without a copy.
        self._remove(name)
        self.remove_part(name)
        self.remove_record(name)

    def remove_record(self, name: str) -> None:
        self._remove(f"{name}.json")

    def _remove(self, file: str) -> bool:
        if not NAME.fullmatch(file.split(".")[0]):
            raise ValueError(f"not a file of the cache: {file!r}")
        return self.remove_file("copies", file)

    def remove_file(self, below: str, file: str) -> bool:
        """Delete a file, or a link, of a subfolder in BELOW ("" for the root); return False if it did not exist."""
        if below not in ("", *self.BELOW) or "/" in file:
            raise ValueError(f"not a file of the cache: {below}/{file}")
        try:
            with self._marked(below) as fd:
                os.unlink(file, dir_fd=fd)
        except FileNotFoundError:
            return False
        return True

    def sweep_temp_files(self) -> None:
        for below in ("", *self.BELOW):
            with suppress(FileNotFoundError):
                for file in os.listdir(self.root / below):  # noqa: PTH208 - names, thousands of them
                    if file.startswith(".") and self._is_left(below, file):
                        self.remove_file(below, file)

    def _is_left(self, below: str, file: str) -> bool:
        maker = maker_of(file)
        if maker is None:
            return False
        if maker[0] == pid_namespace() and start_time(maker[1]) is None:
            return True
        try:
            # The absolute value: after the clock was set back, a file must not stay for a year.
            return abs(time.time() - os.lstat(self.root / below / file).st_mtime) > OLD_TEMP_S
        except FileNotFoundError:
            return False

    @contextmanager
    def _marked(self, below: str) -> Iterator[int]:
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.stat(MARKER, dir_fd=root_fd, follow_symlinks=False).st_mode):
                raise FileNotFoundError(errno.ENOENT, "no marker of a cache: nothing is deleted", str(self.root))
            fd = open_folder(below or ".", dir_fd=root_fd)
        finally:
            os.close(root_fd)
        try:
            yield fd
        finally:
            os.close(fd)


def _disk_bytes(status: os.stat_result, kind: str) -> int:
    """Return the disk space of a copy (kind ""), a partial copy or a map; for a copy, at least its size.

    ext4 keeps the extents of a file that was written in pieces in an extra block, and does not free it.
    """
    n_bytes = status.st_blocks * _DISK_UNIT_BYTES
    return n_bytes if kind else max(n_bytes, -(-status.st_size // BLOCK_BYTES) * BLOCK_BYTES)


def _charge(disk_bytes: dict[str, int]) -> int | None:
    """Return the disk space of the files of one name, by kind, with the block of the record; None for a map alone."""
    data = disk_bytes.get("", disk_bytes.get(".part"))
    return None if data is None else charge_bytes(data + disk_bytes.get(".map", 0))


def default_size_bytes(path: Path, first: int) -> int:
    """Return the size with which the cache in path was last opened; for a new cache, record and return `first`."""
    file = path / _DEFAULT_SIZE
    _claim(path)
    with suppress(OSError):
        link_whole(file, json.dumps({"size_bytes": first}) + "\n")
    try:
        return int(json.loads(read_text(file))["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return first


def _claim(path: Path) -> None:
    """Create the folder and its marker, or find the marker. A folder that is no cache is not changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        crash_point("marker.folder")
    status = path.stat()  # the caller may name a symbolic link; no link below it is ever followed
    if status.st_uid != os.geteuid():
        raise PermissionError(
            errno.EPERM,
            f"this cache folder belongs to {user_name(status.st_uid)} (uid {status.st_uid}), not to "
            f"{user_name(os.geteuid())}; a cache belongs to one user: choose a folder of your own, such as "
            f"{path}-{user_name(os.geteuid())} (TIERCACHE_CACHE_DIR, or Cache(path, ...))",
            str(path),
        )
    if _has_marker(path):
        return
    # Two processes may create the cache at the same time: each sees at most the unfinished marker of the other.
    names = [entry.name for entry in path.iterdir()]
    # "indexes": of layouts of other libraries, which a process without a cache keeps here too (data/opened_layout.py).
    if not _has_marker(path) and not all(name.startswith(f".{MARKER}.") or name == "indexes" for name in names):
        raise ValueError(f"{path}: not a cache (no {MARKER}) and not empty; a cache needs a folder of its own")
    _write_marker(path)
    fd = open_folder(path.resolve())
    try:
        set_mode(fd, 0o700)
    finally:
        os.close(fd)


def user_name(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _has_marker(root: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(f"{root}/{MARKER}").st_mode)
    except FileNotFoundError:
        return False


def _write_marker(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    link_whole(path / MARKER, json.dumps({"format": 0, "id": secrets.token_hex(16)}) + "\n")
    crash_point("marker.written")
