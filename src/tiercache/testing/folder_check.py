"""What a cache folder must look like, read from its files and its catalog without any code of the cache."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiercache._native.checksum import crc32c

BLOCK_BYTES = 4096
BUSY_S = 10.0
MAP_HEADER_BYTES = 64
_NAME = re.compile(r"[0-9a-f]{40}")
_BESIDE = ("", ".json", ".pin", ".part", ".map")


@dataclass(frozen=True, slots=True)
class Expected:
    """What may lie in the folder. data: bytes by name of the copy; foreign: files of others, relative to the root.

    pins: names that a person holds for certain; maybe_pins: names that he may hold.
    """

    data: Mapping[str, bytes]
    foreign: Mapping[str, bytes] | None = None
    pins: Collection[str] = ()
    maybe_pins: Collection[str] = ()


def allocated_bytes(folder: Path) -> int:
    """Bytes of disk that the files directly in a folder take, as the file system counts them; 0 if it is not there."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                except FileNotFoundError:
                    continue
    except FileNotFoundError:
        return 0
    return total


class FolderCheck:
    """Looks at one folder. Nobody may be at work in it, except for wrong_bytes() and breaches()."""

    def __init__(self, root: Path, expected: Expected) -> None:
        self.root, self.expected = root, expected
        self.copies = root / "copies"

    def problems(self) -> list[str]:
        """All that is wrong with a folder that was swept and closed; [] if nothing is."""
        return [
            *self.wrong_bytes(),
            *self.strays(),
            *self._wrong_pins(),
            *self.breaches(),
            *self.wrong_books(),
            *self.lost_foreign(),
        ]

    # -- bytes ------------------------------------------------------------------------------------------------------

    def wrong_bytes(self) -> Iterator[str]:
        """Published copies that are not what they must be, and units of parts that are said to be here and are not."""
        for path in self._files():
            name, _, suffix = path.name.partition(".")
            if not _NAME.fullmatch(name) or name not in self.expected.data:
                continue
            data = self.expected.data[name]
            if not suffix:
                found = _read(path)
                if found is not None and found != data:
                    yield f"copy {name[:8]}: {_difference(data, found)}"
            elif suffix == "part":
                yield from self._wrong_units(path, data)

    def _wrong_units(self, path: Path, data: bytes) -> Iterator[str]:
        # The map first: what it says is here was written before.
        found_map, part = _read(path.with_suffix(".map")), _read(path)
        if found_map is None or part is None or len(found_map) < MAP_HEADER_BYTES:
            return
        if len(part) != len(data):
            yield f"part {path.name[:8]} has {len(part)} bytes, expected {len(data)}"
            return
        n_units = -(-len(data) // BLOCK_BYTES)
        flags = np.frombuffer(found_map, np.uint8, n_units, MAP_HEADER_BYTES)
        sums = np.frombuffer(found_map, np.uint32, n_units, -(-(MAP_HEADER_BYTES + n_units) // 8) * 8)
        for unit in np.flatnonzero(flags):
            here = slice(int(unit) * BLOCK_BYTES, (int(unit) + 1) * BLOCK_BYTES)
            if part[here] != data[here]:
                yield f"part {path.name[:8]}: unit {unit} is said to be here, but {_difference(data[here], part[here])}"
            elif int(sums[unit]) != crc32c(data[here]):
                yield f"part {path.name[:8]}: the checksum of unit {unit} is not that of its bytes"

    # -- files ------------------------------------------------------------------------------------------------------

    def strays(self) -> Iterator[str]:
        """Files that nobody owns: what a crash left and a sweep did not take."""
        yield from self._strays_of_copies()
        for folder in ("locks", "owners"):
            for path in sorted((self.root / folder).glob("*")):
                yield f"{folder}/{path.name} is left over"
        for path in sorted((self.root / "plans").glob("*")):
            yield f"plans/{path.name} is left over"
        for path in sorted((self.root / "quarantine").glob("*")):
            if path.suffix != ".json":
                yield f"quarantine/{path.name}: bad bytes are left over"
        for path in sorted(self.root.glob(".*")):
            if not self._is_foreign(path):
                yield f"{path.name} is left over"

    def _strays_of_copies(self) -> Iterator[str]:
        files = {path.name: path for path in self._files()}
        for file, path in files.items():
            name, dot, suffix = file.partition(".")
            if self._is_foreign(path):
                continue
            if not _NAME.fullmatch(name) or dot + suffix not in _BESIDE:
                yield f"copies/{file} is left over"
            elif suffix == "part" and f"{name}.map" not in files:
                yield f"copies/{file} has no map"
            elif suffix == "map" and not {name, f"{name}.part"} & files.keys():
                yield f"copies/{file} has neither part nor copy"
            elif suffix in ("json", "pin") and not {name, f"{name}.part"} & files.keys():
                yield f"copies/{file} has no copy"
            elif suffix == "part" and name in files:
                yield f"copies/{file} lies beside the finished copy"
            elif not suffix:
                yield from self._odd_copy(path, files)

    def _odd_copy(self, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink != 1:
            yield f"copy {path.name[:8]} has {status.st_nlink} names"
        if status.st_mode & 0o222:
            yield f"copy {path.name[:8]} can be written: mode {status.st_mode & 0o777:o}"
        if f"{path.name}.json" not in files:
            yield f"copy {path.name[:8]} has no record"

    def _wrong_pins(self) -> Iterator[str]:
        pins = {path.stem for path in self.copies.glob("*.pin")}
        for name in set(self.expected.pins) - pins:
            yield f"the pin of {name[:8]} is gone"
        for name in pins - set(self.expected.pins) - set(self.expected.maybe_pins):
            yield f"{name[:8]} is pinned, and nobody did it"
        for name in self.expected.pins:
            if not (self.copies / name).is_file():
                yield f"the pinned copy {name[:8]} is gone"

    def lost_foreign(self) -> Iterator[str]:
        """Files that the cache has not fetched, and that are gone or changed all the same."""
        for file, data in (self.expected.foreign or {}).items():
            if _read(self.root / file) != data:
                yield f"{file}, which the cache did not fetch, is gone or changed"

    def _is_foreign(self, path: Path) -> bool:
        return path.relative_to(self.root).as_posix() in (self.expected.foreign or {})

    def _files(self) -> list[Path]:
        return sorted(self.copies.iterdir()) if self.copies.is_dir() else []

    # -- books ------------------------------------------------------------------------------------------------------

    def breaches(self) -> Iterator[str]:
        """The budget exceeded, by the books."""
        taken_bytes, limit_bytes = self.taken()
        if limit_bytes is not None and taken_bytes > limit_bytes:
            yield f"the books exceed the limit: {taken_bytes} > {limit_bytes}"

    def taken(self) -> tuple[int, int | None]:
        """Bytes that copies, parts and reservations take, and the limit; (0, None) without books.

        A process that opens the folder books what it finds there, so that a part that is growing may count twice until
        its fetcher books it: once of the two is enough here.
        """
        books = _read_books(self.root)
        if books is None:
            return 0, None
        names = books.rows.keys() | books.reserved.keys()
        return sum(max(books.rows.get(name, 0), books.reserved.get(name, 0)) for name in names), books.limit

    def wrong_books(self) -> Iterator[str]:
        """Books that do not say what the files say, or promise bytes to somebody who is gone."""
        books = _read_books(self.root)
        if books is None:
            if (self.root / "catalog.sqlite").exists():
                yield "the catalog cannot be read"
            return
        if books.reserved or books.reserved_bytes:
            yield f"{books.reserved_bytes} bytes stay reserved: {books.reserved}"
        if books.used_bytes != sum(books.rows.values()):
            yield f"{books.used_bytes} bytes are used by the books, whose rows make {sum(books.rows.values())}"
        files = {path.name.partition(".")[0] for path in self._files() if _is_counted(path)}
        for name in files ^ books.rows.keys():
            yield f"{name[:8]} is {'not on the books' if name in files else 'on the books and not here'}"
        taken = sum(path.lstat().st_blocks * 512 for path in self._files() if not self._is_foreign(path))
        if taken > books.used_bytes:
            yield f"the files take {taken} bytes of disk, the books say {books.used_bytes}"


@dataclass(frozen=True, slots=True)
class _Books:
    """What the catalog says; rows and reserved: bytes by name."""

    used_bytes: int
    reserved_bytes: int
    limit: int | None
    rows: Mapping[str, int]
    reserved: Mapping[str, int]


def _read_books(root: Path) -> _Books | None:
    """What the catalog says; None: there is none, or it is not one."""
    path = root / "catalog.sqlite"
    if not path.exists():
        return None
    with closing(sqlite3.connect(path, timeout=BUSY_S)) as db:
        try:
            db.execute("BEGIN")  # all of it as of one instant
            sums = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('used', 'reserved')").fetchall())
            (limit,) = db.execute("SELECT min(limit_bytes) FROM openers").fetchone()
            rows = dict(db.execute("SELECT name, charge_bytes FROM copies").fetchall())
            reserved = dict(db.execute("SELECT name, sum(charge_bytes) FROM reservations GROUP BY name").fetchall())
        except sqlite3.DatabaseError:
            return None
    return _Books(int(sums["used"]), int(sums["reserved"]), limit, rows, reserved)


def _is_counted(path: Path) -> bool:
    """Whether a file of copies/ is a copy or a part: what has a row on the books."""
    name, _, suffix = path.name.partition(".")
    return bool(_NAME.fullmatch(name)) and suffix in ("", "part") and not path.is_symlink()


def _read(path: Path) -> bytes | None:
    """The file's bytes, None if it is not there; a link is not followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _difference(expected: bytes, found: bytes) -> str:
    if len(expected) != len(found):
        return f"it has {len(found)} bytes, expected {len(expected)}"
    first = next(i for i in range(len(expected)) if expected[i] != found[i])
    return f"byte {first} is {found[first]:#04x}, expected {expected[first]:#04x}"
