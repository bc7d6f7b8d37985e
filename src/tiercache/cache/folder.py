"""The cache's folder: what lies where, and the only code that deletes anything in it.

::

    tiercache-cache.json         the marker: without it nothing here is touched
    catalog.sqlite               accounts; may vanish
    copies/NAME                  a copy, read-only; its presence is the truth
    copies/NAME.json             its record: source, size, checksum
    copies/NAME.pin              a person's hold
    copies/NAME.OWNER.RANDOM.tmp a copy in the making
    locks/NAME                   held while NAME is fetched or evicted
    owners/OWNER                 locked while its process has the cache open
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache.cache.machine import Owner, host_name, network_file_system
from tiercache.cache.record import NAME, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKER = "tiercache-cache.json"
_DEFAULT_SIZE = "default-size.json"
_TEMP_PARTS = 4
_FOLDERS = ("copies", "locks", "owners")
_NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Folder:
    """Paths and file operations of one cache folder. No state but the paths: safe from any thread and process.

    network: name of the network file system it lies on, None on a local disk. There every machine has its own folder.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder, or recognise it.

        Raises:
            ValueError: something else lies there.
            OSError: it cannot be made.
        """
        _mark(path)
        self.network = network_file_system(path)
        self.root = path / f"host-{host_name()}" if self.network else path
        self.copies = self.root / "copies"
        self.locks = self.root / "locks"
        self.owners = self.root / "owners"
        self.catalog = self.root / "catalog.sqlite"
        self._copies = str(self.copies)
        with suppress(OSError):  # a folder that can only be read is still good for its copies
            self.ensure()

    def ensure(self) -> None:
        """Make what is missing, as after somebody deleted the folder under us."""
        if not (self.root / MARKER).exists():
            _write_marker(self.root)
        for name in _FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)

    # -- copies -----------------------------------------------------------------------------------------------------

    def copy_path(self, name: str) -> str:
        """Where the copy lies."""
        return f"{self._copies}/{name}"

    def open_copy(self, name: str) -> int | None:
        """A descriptor for reading; None: not there (or a link, which is never followed)."""
        try:
            return os.open(f"{self._copies}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def has_copy(self, name: str) -> bool:
        """Whether something of that name is there."""
        return self.size_of(name) is not None

    def size_of(self, name: str) -> int | None:
        """Size in bytes of what has that name; None: nothing has."""
        try:
            return (self.copies / name).lstat().st_size
        except OSError:
            return None

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every copy that lies here, by name."""
        sizes = {}
        # The folder too may be gone: somebody deleted it.
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # evicted meanwhile
                        sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        return sizes

    def names(self, suffix: str) -> list[str]:
        """Names that have a file with that suffix (".json", ".pin") here."""
        files: list[str] = []
        with suppress(FileNotFoundError), os.scandir(self.copies) as entries:
            files += [e.name.removesuffix(suffix) for e in entries if e.name.endswith(suffix)]
        return [name for name in files if NAME.fullmatch(name)]

    def read_record(self, name: str) -> Record | None:
        """The record beside a copy."""
        try:
            return Record.from_json((self.copies / f"{name}.json").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return None

    def write_record(self, name: str, record: Record) -> None:
        """Write the record, whole or not at all."""
        _replace_file(self.copies / f"{name}.json", record.to_json() + "\n")

    def pin(self, name: str) -> None:
        """Hold the copy."""
        (self.copies / f"{name}.pin").touch()

    def unpin(self, name: str) -> bool:
        """Let the copy go; False: it was not pinned."""
        return self._remove(f"{name}.pin")

    def is_pinned(self, name: str) -> bool:
        """Whether a person holds it."""
        return (self.copies / f"{name}.pin").exists()

    # -- files in the making ----------------------------------------------------------------------------------------

    def new_temp(self, name: str, owner: Owner) -> tuple[int, str]:
        """A new, empty file for the copy called name: its descriptor and path."""
        path = f"{self._copies}/{name}.{owner}.{secrets.token_hex(4)}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o600), path

    def publish(self, temp: str, name: str) -> bool:
        """Give the finished file its name, and take its old one; False: a copy of that name was there first."""
        try:
            os.link(temp, self.copy_path(name), follow_symlinks=False)
            # Before the copy is booked: a second name, forgotten, would keep its blocks after it was evicted.
            Path(temp).unlink()
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            # No hard links here. Replacing is right too: another copy of this name has the same bytes, and its readers
            # keep their file.
            Path(temp).rename(self.copy_path(name))
        return True

    def temps(self) -> list[tuple[str, str, str]]:
        """(file, owner, name of the copy) of all files in the making."""
        with os.scandir(self.copies) as entries:
            parts = [entry.name.split(".") for entry in entries if entry.name.endswith(".tmp")]
        return [(".".join(p), p[1], p[0]) for p in parts if len(p) == _TEMP_PARTS and NAME.fullmatch(p[0])]

    # -- deleting ---------------------------------------------------------------------------------------------------

    def remove_copy(self, name: str) -> None:
        """Delete a copy and its record. The caller knows that it can be fetched again, or is wrong."""
        # The copy first: a record alone is swept, a copy alone could not be evicted.
        self._remove(name)
        self._remove(f"{name}.json")

    def remove_temp(self, file: str) -> None:
        """Delete a file in the making."""
        if file.endswith(".tmp"):
            self._remove(file)

    def remove_record(self, name: str) -> None:
        """Delete a record that has lost its copy."""
        self._remove(f"{name}.json")

    def _remove(self, file: str) -> bool:
        if not NAME.fullmatch(file.split(".")[0]) or "/" in file:
            raise ValueError(f"not a file of the cache: {file!r}")
        try:
            with self._copies_fd() as fd:
                os.unlink(file, dir_fd=fd)  # of the link itself where somebody planted one
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _copies_fd(self) -> Iterator[int]:
        """The copies' folder, certainly the one inside the marked root."""
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.stat(MARKER, dir_fd=root_fd, follow_symlinks=False)
            fd = os.open("copies", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
        finally:
            os.close(root_fd)
        try:
            yield fd
        finally:
            os.close(fd)


def default_size_bytes(path: Path, first: int) -> int:
    """The size that the default cache was given when it was made; if it is made now: first, remembered from now on."""
    _mark(path)
    file = path / _DEFAULT_SIZE
    with suppress(OSError):
        _link_file(file, json.dumps({"size_bytes": first}) + "\n")
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return first


def _mark(path: Path) -> None:
    """Make the folder and its marker, or find the marker."""
    path.mkdir(parents=True, exist_ok=True)
    if (path / MARKER).is_file():
        return
    # Two processes may make it at once: each sees at most the other's marker in the making.
    names = [entry.name for entry in path.iterdir()]
    if MARKER not in names and not all(name.startswith(f".{MARKER}.") for name in names):
        raise ValueError(f"{path}: not a cache (no {MARKER}) and not empty; a cache needs a folder of its own")
    _write_marker(path)


def _write_marker(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    _link_file(path / MARKER, json.dumps({"format": 0, "id": secrets.token_hex(16)}) + "\n")


def _temp_beside(path: Path, text: str) -> Path:
    temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temp.write_text(text, encoding="utf-8")
    return temp


def _link_file(path: Path, text: str) -> None:
    """Write a file whole unless it is there."""
    temp = _temp_beside(path, text)
    try:
        os.link(temp, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        temp.rename(path)
    finally:
        temp.unlink(missing_ok=True)


def _replace_file(path: Path, text: str) -> None:
    """Write a file whole over what is there."""
    temp = _temp_beside(path, text)
    try:
        temp.rename(path)
    finally:
        temp.unlink(missing_ok=True)
