"""Checks of a cache folder, from its files and its catalog, that use no code of the cache."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, suppress
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
    """Content that the folder may have.

    Attributes:
        data: Bytes of each copy, by name.
        foreign: Bytes of files that the cache does not own, by path relative to the root.
        pins: Names of copies that must be pinned.
        maybe_pins: Names of copies that may be pinned.
    """

    data: Mapping[str, bytes]
    foreign: Mapping[str, bytes] | None = None
    pins: Collection[str] = ()
    maybe_pins: Collection[str] = ()


def allocated_bytes(folder: Path) -> int:
    """Return the disk space, in bytes, of the files directly in a folder; 0 if the folder does not exist."""
    return _bytes_of(_files_now(folder))


def allocated_at_once(folder: Path, tries: int = 20) -> int | None:
    """Return allocated_bytes() as of one instant, while others change the folder; None: it never was stable.

    A single listing may count both a removed copy and the copy that replaced it. Two equal listings show what was there
    between them.
    """
    before = _files_now(folder)
    for _ in range(tries):
        now = _files_now(folder)
        if now == before:
            return _bytes_of(now)
        before = now
    return None


def _bytes_of(files: Mapping[str, tuple[int, int]]) -> int:
    # By inode: a partial copy that was just published has two names.
    return 512 * sum(dict(files.values()).values())


def _files_now(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and number of 512-byte blocks of each file directly in a folder."""
    found: dict[str, tuple[int, int]] = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                found[entry.name] = (status.st_ino, status.st_blocks)
    return found


class FolderCheck:
    """Checks of one folder. Other processes may use the folder only during wrong_bytes() and breaches().

    Args:
        root: The cache folder.
        expected: Content that the folder may have.
    """

    def __init__(self, root: Path, expected: Expected) -> None:
        self.root, self.expected = root, expected
        self.copies = root / "copies"

    def problems(self) -> list[str]:
        """Return everything that is wrong with a folder that was swept and closed; [] if nothing is."""
        return [
            *self.wrong_bytes(),
            *self.leftover_files(),
            *self._wrong_pins(),
            *self.over_limit(),
            *self.wrong_accounts(),
            *self.lost_foreign(),
        ]

    def crash_problems(self) -> list[str]:
        """Return violations of what must hold wherever a process died, before any recovery."""
        return [*self.wrong_bytes(), *self.unfinished(), *self.lost_pinned(), *self.lost_foreign()]

    def wrong_bytes(self) -> Iterator[str]:
        """Yield published copies with wrong bytes, and units of partial copies that are marked present but wrong."""
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
        # The map must be read first: each unit is written before the map marks it as present.
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

    def leftover_files(self) -> Iterator[str]:
        """Yield files without an owner, which a crash left behind and a sweep did not remove."""
        yield from self._strays_of_copies()
        for folder in ("locks", "owners"):
            for path in sorted((self.root / folder).glob("*")):
                yield f"{folder}/{path.name} is left over"
        for path in sorted((self.root / "plans").glob("*")):
            yield f"plans/{path.name} is left over"
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
            elif suffix == "map" and f"{name}.part" not in files and _has_identity(self.copies / f"{name}.json"):
                yield f"copies/{file} lies beside a finished copy whose footer makes it needless"
            elif suffix == "json" and not {name, f"{name}.part"} & files.keys():
                yield f"copies/{file} has no copy"
            elif suffix == "part" and name in files:
                yield f"copies/{file} lies beside the finished copy"
            elif not suffix:
                yield from self._odd_copy(path, files)

    def _odd_copy(self, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink != 1:
            yield f"copy {path.name[:8]} has {status.st_nlink} names"
        yield from self._unfinished_copy(path, files)

    def _unfinished_copy(self, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
        status = path.lstat()
        if status.st_mode & 0o222:
            yield f"copy {path.name[:8]} can be written: mode {status.st_mode & 0o777:o}"
        if f"{path.name}.json" not in files:
            yield f"copy {path.name[:8]} has no record"

    def unfinished(self) -> Iterator[str]:
        """Yield published copies that lack what a copy must have before it gets its name."""
        files = {path.name: path for path in self._files()}
        for file, path in files.items():
            if _NAME.fullmatch(file) and not self._is_foreign(path) and not path.is_symlink():
                yield from self._unfinished_copy(path, files)

    def _wrong_pins(self) -> Iterator[str]:
        pins = {path.stem for path in self.copies.glob("*.pin")}
        for name in set(self.expected.pins) - pins:
            yield f"the pin of {name[:8]} is gone"
        for name in pins - set(self.expected.pins) - set(self.expected.maybe_pins):
            yield f"{name[:8]} is pinned, and nobody did it"
        yield from self.lost_pinned()

    def lost_pinned(self) -> Iterator[str]:
        """Yield pinned copies that were correct and are gone."""
        for name in self.expected.pins:
            if name in self.expected.data and not (self.copies / name).is_file():
                yield f"the pinned copy {name[:8]} is gone"

    def lost_foreign(self) -> Iterator[str]:
        """Yield files that the cache does not own and that are gone or changed."""
        for file, data in (self.expected.foreign or {}).items():
            if _read(self.root / file) != data:
                yield f"{file}, which the cache did not fetch, is gone or changed"

    def _is_foreign(self, path: Path) -> bool:
        return path.relative_to(self.root).as_posix() in (self.expected.foreign or {})

    def _files(self) -> list[Path]:
        return sorted(self.copies.iterdir()) if self.copies.is_dir() else []

    def over_limit(self) -> Iterator[str]:
        """Yield a problem if the catalog's accounts exceed the size limit."""
        taken_bytes, limit_bytes = self.charged_bytes()
        if limit_bytes is not None and taken_bytes > limit_bytes:
            yield f"the books exceed the limit: {taken_bytes} > {limit_bytes}"

    def charged_bytes(self) -> tuple[int, int | None]:
        """Return the bytes of copies, partial copies and reservations, and the limit; (0, None) without a catalog.

        A process that opens the folder charges what it finds there, so the growth of a partial copy may count twice
        until its fetcher charges it. Each name is therefore counted for at most a whole copy with its map.
        """
        books = _read_books(self.root)
        return (0, None) if books is None else (self._taken_bytes(books), books.limit)

    def _taken_bytes(self, books: _Accounts) -> int:
        total = 0
        for name in books.rows.keys() | books.reserved.keys():
            row, reserved = books.rows.get(name, 0), books.reserved.get(name, 0)
            data = self.expected.data.get(name)
            most = row + reserved if data is None else _whole_charge(len(data))
            total += min(row + reserved, max(most, row, reserved))
        return total

    def evictable(self, held: Collection[str] = ()) -> set[str]:
        """Return the names in the catalog that are neither pinned nor held."""
        books = _read_books(self.root)
        pins = {path.stem for path in self.copies.glob("*.pin")}
        return set() if books is None else set(books.rows) - pins - set(held)

    def reserved(self) -> dict[str, int]:
        """Return the reserved bytes by name."""
        books = _read_books(self.root)
        return {} if books is None else dict(books.reserved)

    def wrong_accounts(self) -> Iterator[str]:
        """Yield differences between the catalog's accounts and the files, and reservations without an owner."""
        books = _read_books(self.root)
        if books is None:
            if (self.root / "catalog.sqlite").exists():
                yield "the catalog cannot be read"
            return
        reserved = self.reserved()
        if reserved:
            yield f"bytes stay reserved: {reserved}"
        if books.used_bytes != sum(books.rows.values()):
            yield f"{books.used_bytes} bytes are used by the books, whose rows make {sum(books.rows.values())}"
        files = {path.name.partition(".")[0] for path in self._files() if _is_counted(path)}
        for name in files ^ books.rows.keys():
            yield f"{name[:8]} is {'not on the books' if name in files else 'on the books and not here'}"
        taken = sum(path.lstat().st_blocks * 512 for path in self._files() if not self._is_foreign(path))
        if taken > books.used_bytes:
            yield f"the files take {taken} bytes of disk, the books say {books.used_bytes}"


@dataclass(frozen=True, slots=True)
class _Accounts:
    """The accounts in the catalog.

    Attributes:
        used_bytes: Bytes in use.
        limit: Size limit in bytes; None if no process has the cache open.
        rows: Bytes of each copy, by name.
        reserved: Reserved bytes, by name.
    """

    used_bytes: int
    limit: int | None
    rows: Mapping[str, int]
    reserved: Mapping[str, int]


def _read_books(root: Path) -> _Accounts | None:
    """Return the accounts in the catalog; None if there is no valid catalog."""
    path = root / "catalog.sqlite"
    if not path.exists():
        return None
    with closing(sqlite3.connect(path, timeout=BUSY_S)) as db:
        try:
            db.execute("BEGIN")  # one transaction, so that all values are of one instant
            (used_bytes,) = db.execute("SELECT value FROM meta WHERE key = 'used'").fetchone()
            (limit,) = db.execute("SELECT min(limit_bytes) FROM openers").fetchone()
            rows = dict(db.execute("SELECT name, charge_bytes FROM copies").fetchall())
            reserved = dict(db.execute("SELECT name, sum(charge_bytes) FROM reservations GROUP BY name").fetchall())
        except sqlite3.DatabaseError:
            return None
    return _Accounts(int(used_bytes), limit, rows, reserved)


def _whole_charge(n_bytes: int) -> int:
    """Return the most that a copy uses: its blocks, its record, its map (5 bytes per unit) and one block of extents."""
    n_units = -(-n_bytes // BLOCK_BYTES)
    map_blocks = -(-(MAP_HEADER_BYTES + 8 + 5 * n_units) // BLOCK_BYTES)
    return (n_units + map_blocks + 2) * BLOCK_BYTES


def _has_identity(record: Path) -> bool:
    """Return whether a record is of an object of a data set, whose footer has the checksums of its pages."""
    found = _read(record)
    return found is not None and json.loads(found).get("shard_id") is not None


def _is_counted(path: Path) -> bool:
    """Return whether a file of copies/ is a copy or a partial copy, which the accounts charge."""
    name, _, suffix = path.name.partition(".")
    return bool(_NAME.fullmatch(name)) and suffix in ("", "part") and not path.is_symlink()


def _read(path: Path) -> bytes | None:
    """Return the file's bytes, or None if it cannot be opened; symbolic links are not followed."""
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
