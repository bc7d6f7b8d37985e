"""The owners of a cache (its open sessions), and its accounts: bytes of copies, reservations, and uses of copies.

The accounts are a SQLite file, because several processes must keep one limit exactly, and because eviction must not
scan the folder. They can be rebuilt from the files of the folder, and are if they are lost. On a full disk they are
kept in memory.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from tiercache.cache.folder import Folder, close_private, is_locked, keep_private, try_exclusive
from tiercache.crash_points import crash_point
from tiercache.store.shared_files import Database, boot_id, open_file, pid_namespace, start_time

# -- owners ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a temporary file or a reservation: one open cache in one process. Never reused."""

    boot: str
    namespace: int
    pid: int
    started: int
    nonce: str

    @classmethod
    def of_this_process(cls) -> Owner:
        pid = os.getpid()
        return cls(boot_id(), pid_namespace(), pid, start_time(pid) or 0, secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        match = re.fullmatch(r"([0-9a-f]{1,16})-(\d+)-(\d+)-(\d+)-([0-9a-f]{8})", text)
        return match and cls(match[1], int(match[2]), int(match[3]), int(match[4]), match[5])

    def __str__(self) -> str:
        return f"{self.boot}-{self.namespace}-{self.pid}-{self.started}-{self.nonce}"

    def runs(self) -> bool | None:
        """Return whether the owner's process runs; None: it cannot be determined from here (another container)."""
        if self.boot != boot_id():
            return False
        if self.namespace != pid_namespace():
            return None
        return start_time(self.pid) == self.started


_open_here: set[str] = set()


class Owners:
    """This session as an owner, the other owners, and what the accounts ask about the files. Safe from any thread."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._lock = folder, Lock()
        self.me = Owner.of_this_process()
        self.is_closed = False
        self._fd = self._make()
        _open_here.add(str(self.me))

    def _make(self) -> int:
        fd = open_file(self._folder.owners / str(self.me), os.O_RDWR | os.O_CREAT)
        try:
            crash_point("owner.made")
            try_exclusive(fd)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                self._folder.remove_file("owners", str(self.me))
            raise
        crash_point("owner.locked")
        return keep_private(fd)

    def ensure(self) -> None:
        """Recreate the folder and the owner file if they were deleted. Raises OSError after close()."""
        # Two fetches may find it deleted: the second would close the file that the first has just locked.
        with self._lock:
            if self.is_closed:  # called during a close: another file may have this descriptor number now
                raise OSError(errno.EBADF, f"cache {self._folder.root} is closed")
            self._folder.ensure()
            if not os.fstat(self._fd).st_nlink:
                fd, self._fd = self._fd, self._make()
                close_private(fd)

    def alive(self, text: str) -> bool:
        """Return whether an owner still has the cache open; in other boots or containers its file's lock decides."""
        owner = Owner.parse(text)
        if owner is None:
            return False
        if owner.pid == self.me.pid and owner.started == self.me.started and owner.namespace == self.me.namespace:
            return text in _open_here
        runs = owner.runs()
        return is_locked(self._folder.owners / text) if runs is None else runs

    def remove_files_of(self, text: str) -> None:
        with suppress(FileNotFoundError):
            crash_point("owner.buried")
            if Owner.parse(text) is not None:
                self._folder.remove_file("owners", text)

    def remove_files_of_dead(self) -> None:
        for text in [file.name for file in self._folder.owners.iterdir()]:
            if not self.alive(text):
                self.remove_files_of(text)

    def processes(self) -> list[tuple[int, str]]:
        owners = [Owner.parse(file.name) for file in self._folder.owners.iterdir()]
        running = [owner for owner in owners if owner is not None and owner.runs()]
        return [(pid, command_of(pid)) for pid in sorted({owner.pid for owner in running})]

    def charge_of(self, name: str) -> int | None:
        return self._folder.charge_of(name)

    def charges(self) -> dict[str, int]:
        return self._folder.sizes()

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
        _open_here.discard(str(self.me))
        with suppress(OSError):
            self._folder.remove_file("owners", str(self.me))
        close_private(self._fd)


_LONGEST_COMMAND = 200


def command_of(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.replace("\0", " ").strip()[:_LONGEST_COMMAND]


# -- accounts ----------------------------------------------------------------------------------------------------------

FIGURES = (
    "bytes_hit",
    "bytes_missed",
    "bytes_fetched",
    "evicted",
    "quarantined",
    "poisoned",
)
# Names of removed copies that are remembered for processes that keep the rows in memory. A process that has missed more
# reads all rows again.
MOST_GONE = 10_000

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE copies (
    name TEXT PRIMARY KEY, charge_bytes INTEGER NOT NULL CHECK (charge_bytes >= 0), last_use INTEGER NOT NULL,
    changed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX copies_changed ON copies (changed);
CREATE TABLE gone (changed INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE reservations (
    owner TEXT NOT NULL, name TEXT NOT NULL, charge_bytes INTEGER NOT NULL CHECK (charge_bytes >= 0),
    PRIMARY KEY (owner, name)
) WITHOUT ROWID;
CREATE TABLE openers (owner TEXT PRIMARY KEY, limit_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE figures (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER copy_in AFTER INSERT ON copies BEGIN
    UPDATE meta SET value = value + new.charge_bytes WHERE key = 'used'; END;
CREATE TRIGGER copy_out AFTER DELETE ON copies BEGIN
    UPDATE meta SET value = value - old.charge_bytes WHERE key = 'used'; END;
CREATE TRIGGER copy_grows AFTER UPDATE OF charge_bytes ON copies BEGIN
    UPDATE meta SET value = value + new.charge_bytes - old.charge_bytes WHERE key = 'used'; END;
INSERT INTO meta VALUES ('used', 0), ('clock', 0), ('forgotten', 0);
"""


@dataclass(frozen=True, slots=True)
class CopyRow:
    name: str
    charge_bytes: int
    last_use: int


def _meta(db: sqlite3.Connection, key: str) -> int:
    return int(db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])


def _tick(db: sqlite3.Connection, n: int = 1) -> int:
    return int(db.execute("UPDATE meta SET value = value + ? WHERE key = 'clock' RETURNING value", (n,)).fetchone()[0])


def _set_copy(db: sqlite3.Connection, name: str, charge_bytes: int) -> None:
    db.execute(
        "INSERT INTO copies VALUES (?1, ?2, ?3, ?3) ON CONFLICT (name) DO UPDATE SET charge_bytes = ?2, changed = ?3",
        (name, charge_bytes, _tick(db)),
    )


def _drop_copies(db: sqlite3.Connection, names: Iterable[str]) -> None:
    for name in names:
        if db.execute("DELETE FROM copies WHERE name = ?", (name,)).rowcount:
            db.execute("INSERT INTO gone VALUES (?, ?)", (_tick(db), name))
    query = "SELECT changed FROM gone ORDER BY changed DESC LIMIT 1 OFFSET ?"
    oldest = db.execute(query, (MOST_GONE,)).fetchone()
    if oldest is not None:
        db.execute("DELETE FROM gone WHERE changed <= ?", oldest)
        db.execute("UPDATE meta SET value = ? WHERE key = 'forgotten'", oldest)


def _reserved(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT total(charge_bytes) FROM reservations").fetchone()[0])


def _rows(db: sqlite3.Connection, condition: str, *values: object) -> list[CopyRow]:
    query = f"SELECT name, charge_bytes, last_use FROM copies {condition}"  # noqa: S608 - our own text
    return [CopyRow(*row) for row in db.execute(query, values)]


class Accounts:
    """The accounts of one cache folder, used by one owner (a process that has the folder open). Thread-safe.

    Every method is one short transaction for which processes may race. Byte counts are charges, see charge_bytes. No
    reservation commits if copies and reservations together would exceed the limit.
    """

    def __init__(self, path: Path, owners: Owners) -> None:
        self._owner, self.owners = str(owners.me), owners
        self._own_limit_bytes: int | None = None
        # Our reservations, in case the file is lost. Changed only inside run(), which holds its lock.
        self._held: dict[str, int] = {}
        self._database = Database(
            path, wal=True, make_folder=owners.ensure, prepare=self._prepare, catch_up=self._catch_up
        )

    def _prepare(self, db: sqlite3.Connection) -> None:
        # A trigger contains ";", but a statement ends only at a ";" at the end of a line: a trigger ends with "END;".
        for statement in filter(str.strip, _SCHEMA.split(";\n")):
            db.execute(statement)
        # The accounts of another boot of the machine are not trusted.
        db.execute("INSERT INTO meta VALUES ('boot', ?), ('id', ?)", (boot_id(), secrets.token_hex(8)))
        self._come_back(db)
        self._take_in(db, is_new=True)

    def _catch_up(self, db: sqlite3.Connection) -> None:
        self._come_back(db)
        self._take_in(db, is_new=False)

    def close(self) -> None:
        self._database.close()

    # -- owners -----------------------------------------------------------------------------------------------------

    def register(self, limit_bytes: int) -> int:
        def work(db: sqlite3.Connection) -> int:
            db.execute("INSERT OR REPLACE INTO openers VALUES (?, ?)", (self._owner, limit_bytes))
            return self._limit(db)

        self._own_limit_bytes = limit_bytes
        return self._database.run(work)

    def unregister(self) -> None:
        def work(db: sqlite3.Connection) -> None:
            self._held.clear()
            self._forget(db, self._owner)

        self._own_limit_bytes = None
        self._database.run(work)

    def limit_bytes(self) -> int:
        return self._database.run(self._limit)

    def _limit(self, db: sqlite3.Connection) -> int:
        self._come_back(db)
        for owner, limit_bytes in db.execute("SELECT owner, limit_bytes FROM openers ORDER BY limit_bytes").fetchall():
            if owner == self._owner or self.owners.alive(owner):
                return int(limit_bytes)
            self.owners.remove_files_of(owner)
            self._forget(db, owner)
        return 0

    def _come_back(self, db: sqlite3.Connection) -> None:
        """Restore our limit and reservations in a file that another process made after somebody deleted the old one."""
        if self._own_limit_bytes is not None:
            db.execute("INSERT OR IGNORE INTO openers VALUES (?, ?)", (self._owner, self._own_limit_bytes))
        rows = [(self._owner, name, charge) for name, charge in self._held.items()]
        db.executemany("INSERT OR IGNORE INTO reservations VALUES (?, ?, ?)", rows)

    def _forget(self, db: sqlite3.Connection, owner: str) -> None:
        db.execute("DELETE FROM openers WHERE owner = ?", (owner,))
        query = "DELETE FROM reservations WHERE owner = ? RETURNING name"
        for (name,) in db.execute(query, (owner,)).fetchall():
            # The owner may have died between writing bytes and booking them.
            if (charge := self.owners.charge_of(name)) is not None:
                _set_copy(db, name, charge)

    # -- bytes ------------------------------------------------------------------------------------------------------

    def reserve(self, name: str, charge_bytes: int, *, usable_bytes: Callable[[], int]) -> bool:
        """Reserve room for bytes that will be added to a copy. Return whether there is room.

        An owner holds one reservation per name. A second call replaces it, unless there is no room for the new size.
        """
        before = self._held.get(name)

        def work(db: sqlite3.Connection) -> bool:
            self._held.pop(name, None)
            self._delete_reservation(db, name)
            if self._lack(db, charge_bytes, usable_bytes) > 0:
                if before is not None:
                    self._held[name] = before
                    self._come_back(db)
                return False
            db.execute("INSERT INTO reservations VALUES (?, ?, ?)", (self._owner, name, charge_bytes))
            self._held[name] = charge_bytes
            return True

        return self._database.run(work)

    def lack_bytes(self, charge_bytes: int, *, usable_bytes: Callable[[], int]) -> int:
        return self._database.run(lambda db: self._lack(db, charge_bytes, usable_bytes))

    def _lack(self, db: sqlite3.Connection, charge_bytes: int, usable_bytes: Callable[[], int]) -> int:
        limit = self._limit(db)
        self._forget_dead(db, "reservations")
        used, reserved = _meta(db, "used"), _reserved(db)
        # Some of the reserved bytes are on disk already. Counting all of them against the free space is the safe side.
        return max(used + reserved - limit, reserved - usable_bytes()) + charge_bytes

    def set_charge(self, name: str, charge_bytes: int) -> None:
        """Set the row of a copy, also of one that was found, and release this owner's reservation for the name."""

        def work(db: sqlite3.Connection) -> None:
            self._delete_reservation(db, name)
            _set_copy(db, name, charge_bytes)
            self._held.pop(name, None)

        self._database.run(work)

    def release(self, name: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            self._held.pop(name, None)
            self._delete_reservation(db, name)

        self._database.run(work)

    def _delete_reservation(self, db: sqlite3.Connection, name: str) -> None:
        db.execute("DELETE FROM reservations WHERE owner = ? AND name = ?", (self._owner, name))

    def remove(self, names: Iterable[str]) -> None:
        """Remove the rows of copies whose files are gone.

        The race: (1) we delete the file, (2) it is fetched again, named and booked, (3) we remove its row. A fetch
            names a copy before it books it, so a file that does not exist now will be booked after our removal.
        """

        def work(db: sqlite3.Connection) -> None:
            _drop_copies(db, [name for name in names if self.owners.charge_of(name) is None])

        self._database.run(work)

    # -- uses and counters ------------------------------------------------------------------------------------------

    def add_uses(self, names: Iterable[str]) -> None:
        query = "UPDATE copies SET last_use = ?1, changed = ?1 WHERE name = ?2"

        def work(db: sqlite3.Connection) -> None:
            used = list(names)
            first = _tick(db, len(used)) - len(used) + 1
            db.executemany(query, [(first + i, name) for i, name in enumerate(used)])

        self._database.run(work)

    def add_figures(self, figures: Mapping[str, int]) -> None:
        query = "INSERT INTO figures VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = value + ?2"
        self._database.run(lambda db: db.executemany(query, list(figures.items())))

    def figures(self) -> dict[str, int]:
        rows = self._database.run(lambda db: dict(db.execute("SELECT name, value FROM figures").fetchall()))
        return {name: rows.get(name, 0) for name in FIGURES}

    # -- queries ----------------------------------------------------------------------------------------------------

    def sums(self) -> tuple[int, int, int]:
        return self._database.run(self._sums)

    def _sums(self, db: sqlite3.Connection) -> tuple[int, int, int]:
        return _meta(db, "used"), _reserved(db), self._limit(db)

    def is_reserved(self, name: str) -> bool:
        query = "SELECT count(*) FROM reservations WHERE name = ?"
        return bool(self._database.run(lambda db: db.execute(query, (name,)).fetchone()[0]))

    def rows(self) -> list[CopyRow]:
        return self._database.run(lambda db: _rows(db, "ORDER BY last_use, name"))

    def changes(self, since: tuple[str, int]) -> tuple[tuple[str, int], bool, list[CopyRow], list[str]]:
        """Return the next `since`, whether all rows follow, changed rows, and names that were removed before them.

        since: Of an earlier answer; ("", 0): all rows.
        """

        def work(db: sqlite3.Connection) -> tuple[tuple[str, int], bool, list[CopyRow], list[str]]:
            (catalog,) = db.execute("SELECT value FROM meta WHERE key = 'id'").fetchone()
            whole = since[0] != catalog or since[1] < _meta(db, "forgotten")
            seen = 0 if whole else since[1]
            query = "SELECT DISTINCT name FROM gone WHERE changed > ?"
            gone = [] if whole else [name for (name,) in db.execute(query, (seen,))]
            return (catalog, _meta(db, "clock")), whole, _rows(db, "WHERE changed > ?", seen), gone

        return self._database.run(work)

    # -- reconciliation with the files ------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Make the accounts agree with the files.

        Those from before the last boot are rebuilt: they are not synced, and a power failure may have lost some.
        """
        query = "SELECT value FROM meta WHERE key = 'boot'"
        if self._database.run(lambda db: db.execute(query).fetchone()[0]) != boot_id():
            self._database.replace()
        self._database.run(lambda db: self._take_in(db, is_new=False))

    def _forget_dead(self, db: sqlite3.Connection, table: str) -> None:
        """Forget the owners in a table that died without unregistering: workers often do, several per epoch."""
        query = f"SELECT DISTINCT owner FROM {table} WHERE owner <> ?"  # noqa: S608 - our own text
        for (owner,) in db.execute(query, (self._owner,)).fetchall():
            if not self.owners.alive(owner):
                self.owners.remove_files_of(owner)
                self._forget(db, owner)

    def _take_in(self, db: sqlite3.Connection, *, is_new: bool) -> None:
        # In new accounts, bytes that are being fetched count twice until their fetcher books them: its reservation may
        # be smaller than the partial copy. In existing accounts, the reservation covers what was added since the row
        # was set.
        self._forget_dead(db, "openers")
        self._forget_dead(db, "reservations")
        charges = self.owners.charges()
        known = dict(db.execute("SELECT name, charge_bytes FROM copies").fetchall())
        _drop_copies(db, known.keys() - charges.keys())
        growing = {name for (name,) in db.execute("SELECT name FROM reservations")}
        for name in sorted(charges):
            # A growing partial copy is booked by its fetcher. If the fetcher died, the copy is larger than its row
            # says.
            if (is_new and name not in known) or (name not in growing and charges[name] != known.get(name)):
                _set_copy(db, name, charges[name])
