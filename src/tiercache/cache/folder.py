"""`Folder`: the files of a cache on disk. Only this module deletes files of the cache.

::

    tiercache-cache.json         the marker: without it nothing here is touched
    default-size.json            the size with which the cache was last opened
    catalog.sqlite               the accounts; rebuilt from the files if it is lost
    copies/NAME                  a copy, read-only; the existence of this file decides whether the object is cached
    copies/NAME.json             its record: source, size, checksum
    copies/NAME.pin              the mark of a pinned copy
    copies/NAME.part             a partial copy, as long as the whole; see partial.py
    copies/NAME.map              its unit map; kept beside the complete copy of an object without identity
    locks/NAME                   locked while NAME is fetched or evicted
    owners/OWNER                 locked while its process has the cache open
    plans/                       the reading plans of the jobs of this machine
    poison/NAME.json             an object that is corrupt at its source; valid for some minutes
    quarantine/                  corrupt copies, and reports on them

Folders have mode 0700, files 0600 and copies 0400, whatever the umask; rights.py says who else may read. No file is
opened, and no folder is entered, through a symbolic link below the root. Only the user could create such a link, so
reading a copy checks only the copy's own name; opening the cache and starting a fetch check the folders too.

The modes of the folder itself decide about sharing: see `Permissions`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tiercache.cache.machine import host_name, network_file_system
from tiercache.cache.record import NAME, Record
from tiercache.cache.rights import GROUP, PRIVATE, FolderAccess, apply_permissions, folder_access
from tiercache.catalog import charge_bytes
from tiercache.catalog.files import (
    NO_LINK,
    is_folder,
    link_whole,
    open_file,
    open_folder,
    read_text,
    replace_whole,
    set_mode,
)
from tiercache.catalog.tables import BLOCK_BYTES
from tiercache.points import crash_point

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKER = "tiercache-cache.json"
_DEFAULT_SIZE = "default-size.json"
_DISK_UNIT_BYTES = 512  # unit of st_blocks, independent of the file system's block size


class Folder:
    """Paths and file operations of one cache folder.

    It has no state except the paths; safe from any thread and process.

    Attributes:
        network: Name of the network file system of the folder; None on a local disk. On a network file system, every
            machine has a folder of its own.
        owner: Name of the other user who owns and shares the folder; None if it is this user's. A folder of another
            user is only read.
        rights: Permissions of new files.
        BELOW: Names of the subfolders.
    """

    BELOW: ClassVar = ("copies", "locks", "owners", "plans", "poison", "quarantine")

    def __init__(self, path: Path, *, shared: str | None = None) -> None:
        """Create the folder, or recognise an existing one.

        Args:
            path: The folder.
            shared: "group" for a folder that its group may read; see rights.py.

        Raises:
            ValueError: The folder contains other files.
            PermissionError: The folder belongs to another user.
            OSError: The folder cannot be created.
        """
        stand = _claim(path, shared)
        self.owner, self.rights = stand.owner, stand.rights
        self.network = network_file_system(path)
        self.root = path / f"host-{host_name()}" if self.network else path
        self.copies = self.root / "copies"
        self.locks = self.root / "locks"
        self.owners = self.root / "owners"
        self.plans = self.root / "plans"
        self.poison = self.root / "poison"
        self.quarantine = self.root / "quarantine"
        self.catalog = self.root / "catalog.sqlite"
        self._default_size = path / _DEFAULT_SIZE
        self._copies, self._below = str(self.copies), [str(self.root / name) for name in self.BELOW]
        try:
            if self.owner is None:
                self.ensure()
            is_folder(self.copies)
        except NotADirectoryError as error:
            raise ValueError(f"{error.filename}: {error.strerror}") from error
        except OSError:
            pass  # a read-only folder can still serve its copies

    def ensure(self) -> None:
        """Create what is missing, for example after the folder was deleted while the cache was open.

        Raises:
            NotADirectoryError: A link or a file has the name of a folder of the cache.
            OSError: A folder cannot be created.
        """
        if self._is_whole():
            return
        if not _has_marker(self.root):
            _write_marker(self.root, self.rights.file)
        apply_permissions(self.root, self.BELOW, self.rights)

    def remember_size(self, size_bytes: int) -> None:
        """Record the size for callers that open the folder without one. With another size, they would evict copies."""
        text = json.dumps({"size_bytes": size_bytes}) + "\n"
        with suppress(OSError):
            if not self._default_size.exists() or read_text(self._default_size) != text:
                replace_whole(self._default_size, text, self.rights.file)

    def _is_whole(self) -> bool:
        """Return whether the marker and the folders exist with their permissions.

        It runs before every fetch and takes 13 us.
        """
        whole = stat.S_IFDIR | self.rights.folder
        try:
            return _has_marker(self.root) and all(os.lstat(path).st_mode == whole for path in self._below)
        except OSError:
            return False

    # -- copies -----------------------------------------------------------------------------------------------------

    def copy_path(self, name: str) -> str:
        """Return the path of the copy."""
        return f"{self._copies}/{name}"

    def open_copy(self, name: str) -> int | None:
        """Open a copy for reading; None: it does not exist, or is a link, which is never followed."""
        try:
            return open_file(f"{self._copies}/{name}", os.O_RDONLY)
        except PermissionError:
            if self.owner is not None or os.lstat(self.copy_path(name)).st_uid == os.geteuid():
                raise
            # Another user, perhaps root, left the file in this user's folder: nobody can use it, and nothing else would
            # remove it.
            self._remove(name)
            return None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def has_copy(self, name: str) -> bool:
        """Return whether a file of that name exists."""
        return self.size_of(name) is not None

    def size_of(self, name: str) -> int | None:
        """Return the size of the copy in bytes.

        None: it does not exist; -1: it is not a regular file and is never read.
        """
        try:
            status = os.lstat(self.copy_path(name))
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def charge_of(self, name: str) -> int | None:
        """Return the bytes that a copy, whole or partial, takes of the size limit; None: it does not exist."""
        path, taken = self.copy_path(name), {}
        for kind in ("", ".part", ".map"):
            with suppress(OSError):
                status = os.lstat(f"{path}{kind}")
                if stat.S_ISREG(status.st_mode):
                    taken[kind] = _taken_by(status, kind)
        return _charge(taken)

    def touched_s(self, name: str) -> float:
        """Return the time of the last write or read in seconds since 1970; 0: the copy does not exist.

        The file system records this time. By default, Linux records reads once a day (relatime), and never on a file
        system that is mounted with noatime.
        """
        for path in (self.copy_path(name), self.copy_path(f"{name}.part")):
            with suppress(OSError):
                status = os.lstat(path)
                return max(status.st_mtime, status.st_atime)
        return 0.0

    def sizes(self) -> dict[str, int]:
        """Return the bytes that each copy, whole or partial, takes of the size limit, by name."""
        taken: dict[str, dict[str, int]] = {}
        # The folder itself may have been deleted.
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            for entry in entries:
                name, _, kind = entry.name.partition(".")
                if kind in ("", "part", "map") and NAME.fullmatch(name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # evicted during the scan
                        status = entry.stat(follow_symlinks=False)
                        taken.setdefault(name, {})[f".{kind}" if kind else ""] = _taken_by(status, kind)
        charges = {name: _charge(parts) for name, parts in taken.items()}
        return {name: charge for name, charge in charges.items() if charge is not None}

    def has_file(self, file: str) -> bool:
        """Return whether a file of that name exists among the copies."""
        return os.path.lexists(self.copy_path(file))

    def has_part(self, name: str) -> bool:
        """Return whether a partial copy of that name exists, with its map."""
        return self.has_file(f"{name}.part") and self.has_file(f"{name}.map")

    def names(self, suffix: str) -> list[str]:
        """Return the names of copies that have a file with this suffix, such as ".json" or ".pin"."""
        files: list[str] = []
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            files += [e.name.removesuffix(suffix) for e in entries if e.name.endswith(suffix)]
        return [name for name in files if NAME.fullmatch(name)]

    def read_record(self, name: str) -> Record | None:
        """Return the record of a copy; None: it cannot be read."""
        try:
            return Record.from_json(read_text(f"{self._copies}/{name}.json"))
        except OSError:
            return None

    def write_record(self, name: str, record: Record) -> None:
        """Write the record atomically."""
        replace_whole(self.copies / f"{name}.json", record.to_json() + "\n", self.rights.file)

    def pin(self, name: str) -> None:
        """Pin the copy."""
        os.close(open_file(f"{self._copies}/{name}.pin", os.O_WRONLY | os.O_CREAT, self.rights.file))

    def unpin(self, name: str) -> bool:
        """Unpin the copy; return False if it was not pinned."""
        return self._remove(f"{name}.pin")

    def is_pinned(self, name: str) -> bool:
        """Return whether the copy is pinned."""
        return os.path.lexists(f"{self._copies}/{name}.pin")

    # -- partial copies ------------------------------------------------------------------------------------------------

    def new_file(self, file: str) -> int:
        """Create an empty file among the copies, open for reading and writing. Raises FileExistsError."""
        return open_file(f"{self._copies}/{file}", os.O_RDWR | os.O_CREAT | os.O_EXCL, self.rights.file)

    def open_to_write(self, file: str) -> int | None:
        """Open a partial copy or a map for reading and writing; None: it does not exist, or is a link."""
        path = f"{self._copies}/{file}"
        try:
            try:
                return open_file(path, os.O_RDWR)
            except PermissionError:  # the process that made it read-only died before it published the copy
                fd = open_file(path, os.O_RDONLY)
                try:
                    set_mode(fd, self.rights.file)
                finally:
                    os.close(fd)
                return open_file(path, os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def give_name(self, fd: int, name: str) -> bool:
        """Give the complete partial copy that fd is open on its final name; return False if the name exists already.

        The file is found by its descriptor: on a file system where flock is not enforced, another file may have its
        path by now.

        Raises:
            FileNotFoundError: The partial copy was unlinked.
        """
        with self._marked("copies") as folder_fd:
            source = f"/proc/self/fd/{fd}"
            if not os.path.exists(source):  # noqa: PTH110 - a link
                source = f"{name}.part"
            try:
                os.link(source, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                # This file system has no hard links. Replacing is also correct: another copy of this name has the same
                # bytes, and its readers keep their file.
                os.rename(f"{name}.part", name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        return True

    def remove_part(self, name: str, *, keep_map: bool = False) -> None:
        """Delete a partial copy and its map. Readers keep the files that they have open."""
        self._remove(f"{name}.part")
        if not keep_map:  # the map last, because a map alone is harmless
            self._remove(f"{name}.map")

    # -- deleting ---------------------------------------------------------------------------------------------------

    def remove_copy(self, name: str) -> None:
        """Delete a copy, whole or partial, and its record.

        The caller knows that the object can be fetched again, or that the copy is corrupt.
        """
        # The copy first: a sweep removes a record without a copy, but a copy without a record could not be evicted.
        self._remove(name)
        self.remove_part(name)
        self._remove(f"{name}.json")

    def remove_record(self, name: str) -> None:
        """Delete the record of a missing copy."""
        self._remove(f"{name}.json")

    def _remove(self, file: str) -> bool:
        if not NAME.fullmatch(file.split(".")[0]):
            raise ValueError(f"not a file of the cache: {file!r}")
        return self.remove_file("copies", file)

    def remove_file(self, below: str, file: str) -> bool:
        """Delete a file of a subfolder in BELOW ("" for the root); return False if it did not exist.

        Of a link, the link itself is deleted.
        """
        if below not in ("", *self.BELOW) or "/" in file:
            raise ValueError(f"not a file of the cache: {below}/{file}")
        try:
            with self._marked(below) as fd:
                os.unlink(file, dir_fd=fd)
        except FileNotFoundError:
            return False
        return True

    def set_aside(self, name: str, to: str) -> bool:
        """Move a copy to quarantine/to; return False if it did not exist. Readers keep it; nobody opens it any more."""
        if not NAME.fullmatch(name) or "/" in to:
            raise ValueError(f"not a copy of the cache: {name!r} to {to!r}")
        try:
            with self._marked("copies") as src, self._marked("quarantine") as dst:
                os.rename(name, to, src_dir_fd=src, dst_dir_fd=dst)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _marked(self, below: str) -> Iterator[int]:
        """Open a subfolder; it is certain to be inside a root folder that has the marker."""
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


def _taken_by(status: os.stat_result, kind: str) -> int:
    """Return the disk space of a copy (kind ""), a partial copy or a map; for a copy, at least its size.

    It can exceed the size by a block: ext4 keeps the extents of a file that was written in pieces in an extra block,
    and does not free that block.
    """
    n_bytes = status.st_blocks * _DISK_UNIT_BYTES
    return n_bytes if kind else max(n_bytes, -(-status.st_size // BLOCK_BYTES) * BLOCK_BYTES)


def _charge(taken: dict[str, int]) -> int | None:
    """Return the disk space of the files of one name, with the block of the record; None for a map alone.

    Args:
        taken: Bytes by kind: "" (the copy), ".part" (a file just published: the copy itself), ".map".
    """
    data = taken.get("", taken.get(".part"))
    return None if data is None else charge_bytes(data + taken.get(".map", 0))


def default_size_bytes(path: Path, first: int, *, shared: str | None = None) -> int:
    """Return the size with which the cache in path was last opened; for a new cache, record and return `first`."""
    file = path / _DEFAULT_SIZE
    stand = _claim(path, shared)
    with suppress(OSError):
        link_whole(file, json.dumps({"size_bytes": first}) + "\n", stand.rights.file)
    try:
        return int(json.loads(read_text(file))["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return first


def _claim(path: Path, shared: str | None) -> FolderAccess:
    """Create the folder and its marker, or find the marker. A folder that is no cache is not changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        crash_point("marker.folder")
    stand = folder_access(path, shared=shared)
    if _has_marker(path):
        return stand
    if stand.owner is not None:
        raise ValueError(f"{path}: {stand.owner} has no cache there (no {MARKER})")
    # Two processes may create the cache at the same time: each sees at most the unfinished marker of the other.
    names = [entry.name for entry in path.iterdir()]
    if not _has_marker(path) and not all(name.startswith((f".{MARKER}.", ".probe.")) for name in names):
        raise ValueError(f"{path}: not a cache (no {MARKER}) and not empty; a cache needs a folder of its own")
    _write_marker(path, stand.rights.file)
    # The mode of an existing empty folder says nothing about sharing.
    rights = GROUP if shared == "group" else PRIVATE
    apply_permissions(path, (), rights)
    return FolderAccess(rights)


def _has_marker(root: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(f"{root}/{MARKER}").st_mode)
    except FileNotFoundError:
        return False


def _write_marker(path: Path, mode: int) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    link_whole(path / MARKER, json.dumps({"format": 0, "id": secrets.token_hex(16)}) + "\n", mode)
    crash_point("marker.written")
