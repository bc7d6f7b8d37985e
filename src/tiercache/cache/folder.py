"""The cache's folder: what lies where, and the only code that deletes anything in it.

::

    tiercache-cache.json         the marker: without it nothing here is touched
    default-size.json            the size it was last opened with
    catalog.sqlite               accounts; may vanish
    copies/NAME                  a copy, read-only; its presence is the truth
    copies/NAME.json             its record: source, size, checksum
    copies/NAME.pin              a person's hold
    copies/NAME.part             a copy in part, as long as the whole; partial.py
    copies/NAME.map              which units of it are there; it stays beside the copy of an object without identity
    locks/NAME                   held while NAME is fetched or evicted
    owners/OWNER                 locked while its process has the cache open
    plans/                       what the jobs of this machine will read next
    poison/NAME.json             an object that is bad at its source; void after some minutes
    quarantine/                  copies that were found to be wrong, and what was wrong with them

Folders are 0700, files 0600, copies 0400, whatever the umask; rights.py says who else may read. No file is opened, and
no folder entered, through a link below the folder itself. Who could put one there is the user himself, so reading a
copy looks at its own name only; every opening and every fetch looks at the folders too.
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
from tiercache.cache.rights import GROUP, PRIVATE, Standing, put_right, standing
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
from tiercache.points import reach

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKER = "tiercache-cache.json"
_DEFAULT_SIZE = "default-size.json"
_DISK_UNIT_BYTES = 512  # of st_blocks, whatever the file system's block


class Folder:
    """Paths and file operations of one cache folder. No state but the paths: safe from any thread and process.

    network: name of the network file system it lies on, None on a local disk. There every machine has its own folder.
    owner: whose it is where it is somebody else's, who shares it; it is then only read. rights: of what is made here.
    BELOW: its folders.
    """

    BELOW: ClassVar = ("copies", "locks", "owners", "plans", "poison", "quarantine")

    def __init__(self, path: Path, *, shared: str | None = None) -> None:
        """Make the folder, or recognise it. shared: "group" for one that the group may read; see rights.py.

        Raises:
            ValueError: something else lies there.
            PermissionError: it is somebody else's.
            OSError: it cannot be made.
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
            pass  # a folder that can only be read is still good for its copies

    def ensure(self) -> None:
        """Make what is missing, as after somebody deleted the folder under us.

        Raises:
            NotADirectoryError: a link, or a file, stands where a folder of the cache should.
            OSError: it cannot be made.
        """
        if self._is_whole():
            return
        if not _has_marker(self.root):
            _write_marker(self.root, self.rights.file)
        put_right(self.root, self.BELOW, self.rights)

    def remember_size(self, size_bytes: int) -> None:
        """Note the size for who opens the folder and names none: a look with another would give copies up."""
        text = json.dumps({"size_bytes": size_bytes}) + "\n"
        with suppress(OSError):
            if not self._default_size.exists() or read_text(self._default_size) != text:
                replace_whole(self._default_size, text, self.rights.file)

    def _is_whole(self) -> bool:
        """Whether marker and folders are there with their rights. 13 us: it is asked before every fetch."""
        whole = stat.S_IFDIR | self.rights.folder
        try:
            return _has_marker(self.root) and all(os.lstat(path).st_mode == whole for path in self._below)
        except OSError:
            return False

    # -- copies -----------------------------------------------------------------------------------------------------

    def copy_path(self, name: str) -> str:
        """Where the copy lies."""
        return f"{self._copies}/{name}"

    def open_copy(self, name: str) -> int | None:
        """A descriptor for reading; None: not there (or a link, which is never followed)."""
        try:
            return open_file(f"{self._copies}/{name}", os.O_RDONLY)
        except PermissionError:
            if self.owner is not None or os.lstat(self.copy_path(name)).st_uid == os.geteuid():
                raise
            # Left in our folder by another user, root perhaps: nobody can use it, and it would stand here for ever.
            self._remove(name)
            return None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def has_copy(self, name: str) -> bool:
        """Whether something of that name is there."""
        return self.size_of(name) is not None

    def size_of(self, name: str) -> int | None:
        """Size in bytes of what has that name; None: nothing has; -1: no file has, and nobody will read it."""
        try:
            status = os.lstat(self.copy_path(name))
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def charge_of(self, name: str) -> int | None:
        """What a copy, or a copy in part, takes of the budget in bytes; None: it is not there."""
        path, taken = self.copy_path(name), {}
        for kind in ("", ".part", ".map"):
            with suppress(OSError):
                status = os.lstat(f"{path}{kind}")
                if stat.S_ISREG(status.st_mode):
                    taken[kind] = _taken_by(status, kind)
        return _charge(taken)

    def touched_s(self, name: str) -> float:
        """When the copy was last written or read, as its file system says, in seconds since 1970; 0: it is not there.

        Linux notes a reading once a day by default (relatime), and not at all where it is mounted with noatime.
        """
        for path in (self.copy_path(name), self.copy_path(f"{name}.part")):
            with suppress(OSError):
                status = os.lstat(path)
                return max(status.st_mtime, status.st_atime)
        return 0.0

    def sizes(self) -> dict[str, int]:
        """What every copy, and every copy in part, takes of the budget in bytes, by name."""
        taken: dict[str, dict[str, int]] = {}
        # The folder too may be gone: somebody deleted it.
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            for entry in entries:
                name, _, kind = entry.name.partition(".")
                if kind in ("", "part", "map") and NAME.fullmatch(name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # evicted meanwhile
                        status = entry.stat(follow_symlinks=False)
                        taken.setdefault(name, {})[f".{kind}" if kind else ""] = _taken_by(status, kind)
        charges = {name: _charge(parts) for name, parts in taken.items()}
        return {name: charge for name, charge in charges.items() if charge is not None}

    def has_file(self, file: str) -> bool:
        """Whether there is a file of that name among the copies."""
        return os.path.lexists(self.copy_path(file))

    def has_part(self, name: str) -> bool:
        """Whether a part of that name is there, with its map."""
        return self.has_file(f"{name}.part") and self.has_file(f"{name}.map")

    def names(self, suffix: str) -> list[str]:
        """Names that have a file with that suffix (".json", ".pin") here."""
        files: list[str] = []
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            files += [e.name.removesuffix(suffix) for e in entries if e.name.endswith(suffix)]
        return [name for name in files if NAME.fullmatch(name)]

    def read_record(self, name: str) -> Record | None:
        """The record beside a copy."""
        try:
            return Record.from_json(read_text(f"{self._copies}/{name}.json"))
        except OSError:
            return None

    def write_record(self, name: str, record: Record) -> None:
        """Write the record, whole or not at all."""
        replace_whole(self.copies / f"{name}.json", record.to_json() + "\n", self.rights.file)

    def pin(self, name: str) -> None:
        """Hold the copy."""
        os.close(open_file(f"{self._copies}/{name}.pin", os.O_WRONLY | os.O_CREAT, self.rights.file))

    def unpin(self, name: str) -> bool:
        """Let the copy go; False: it was not pinned."""
        return self._remove(f"{name}.pin")

    def is_pinned(self, name: str) -> bool:
        """Whether a person holds it."""
        return os.path.lexists(f"{self._copies}/{name}.pin")

    # -- files in the making ----------------------------------------------------------------------------------------

    def new_file(self, file: str) -> int:
        """A new, empty file among the copies, open for reading and writing. Raises FileExistsError."""
        return open_file(f"{self._copies}/{file}", os.O_RDWR | os.O_CREAT | os.O_EXCL, self.rights.file)

    def open_to_write(self, file: str) -> int | None:
        """A part or a map, open for reading and writing; None: it is not there (or a link, which is never followed)."""
        path = f"{self._copies}/{file}"
        try:
            try:
                return open_file(path, os.O_RDWR)
            except PermissionError:  # whoever sealed it died before it had its name
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
        """Give the finished part that fd is open on the copy's name; False: a copy of that name was there first.

        It is found by its descriptor: where locks lie, another part may have its path by now.

        Raises:
            FileNotFoundError: somebody has unlinked the part.
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
                # No hard links here. Replacing is right too: another copy of this name has the same bytes, and its
                # readers keep their file.
                os.rename(f"{name}.part", name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        return True

    def remove_part(self, name: str, *, keep_map: bool = False) -> None:
        """Delete a part and its map; who reads it keeps it."""
        self._remove(f"{name}.part")
        if not keep_map:  # the map last: alone it says nothing
            self._remove(f"{name}.map")

    # -- deleting ---------------------------------------------------------------------------------------------------

    def remove_copy(self, name: str) -> None:
        """Delete a copy, whole or in part, and its record. The caller knows it can be fetched again, or is wrong."""
        # The copy first: a record alone is swept, a copy alone could not be evicted.
        self._remove(name)
        self.remove_part(name)
        self._remove(f"{name}.json")

    def remove_record(self, name: str) -> None:
        """Delete a record that has lost its copy."""
        self._remove(f"{name}.json")

    def _remove(self, file: str) -> bool:
        if not NAME.fullmatch(file.split(".")[0]):
            raise ValueError(f"not a file of the cache: {file!r}")
        return self.remove_file("copies", file)

    def remove_file(self, below: str, file: str) -> bool:
        """Delete a file of a folder in BELOW ("": of the root); False: it was not there. Of a link the link goes."""
        if below not in ("", *self.BELOW) or "/" in file:
            raise ValueError(f"not a file of the cache: {below}/{file}")
        try:
            with self._marked(below) as fd:
                os.unlink(file, dir_fd=fd)
        except FileNotFoundError:
            return False
        return True

    def set_aside(self, name: str, to: str) -> bool:
        """Move a copy to quarantine/to; its readers keep it, nobody opens it any more. False: it was not there."""
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
        """A folder of the cache, certainly the one inside the marked root."""
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
    """What a copy (kind ""), a part or a map takes; a copy no less than its size, whatever is on disk by now.

    It may be a block more: ext4 keeps the extents of what came in pieces there, and leaves them there.
    """
    n_bytes = status.st_blocks * _DISK_UNIT_BYTES
    return n_bytes if kind else max(n_bytes, -(-status.st_size // BLOCK_BYTES) * BLOCK_BYTES)


def _charge(taken: dict[str, int]) -> int | None:
    """What files of one name take, with the block of the record; None: a map alone is nothing.

    taken: bytes by "" (the copy), ".part" (just named: the copy itself), ".map".
    """
    data = taken.get("", taken.get(".part"))
    return None if data is None else charge_bytes(data + taken.get(".map", 0))


def default_size_bytes(path: Path, first: int, *, shared: str | None = None) -> int:
    """The size that the cache in path was last opened with; if it is made now: first, remembered from now on."""
    file = path / _DEFAULT_SIZE
    stand = _claim(path, shared)
    with suppress(OSError):
        link_whole(file, json.dumps({"size_bytes": first}) + "\n", stand.rights.file)
    try:
        return int(json.loads(read_text(file))["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return first


def _claim(path: Path, shared: str | None) -> Standing:
    """Make the folder and its marker, or find the marker; nothing is changed in a folder that is no cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        reach("marker.folder")
    stand = standing(path, shared=shared)
    if _has_marker(path):
        return stand
    if stand.owner is not None:
        raise ValueError(f"{path}: {stand.owner} has no cache there (no {MARKER})")
    # Two processes may make it at once: each sees at most the other's marker in the making.
    names = [entry.name for entry in path.iterdir()]
    if not _has_marker(path) and not all(name.startswith((f".{MARKER}.", ".probe.")) for name in names):
        raise ValueError(f"{path}: not a cache (no {MARKER}) and not empty; a cache needs a folder of its own")
    _write_marker(path, stand.rights.file)
    # An empty folder that was there has any rights; they say nothing about sharing.
    rights = GROUP if shared == "group" else PRIVATE
    put_right(path, (), rights)
    return Standing(rights)


def _has_marker(root: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(f"{root}/{MARKER}").st_mode)
    except FileNotFoundError:
        return False


def _write_marker(path: Path, mode: int) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    link_whole(path / MARKER, json.dumps({"format": 0, "id": secrets.token_hex(16)}) + "\n", mode)
    reach("marker.written")
