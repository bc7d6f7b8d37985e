"""The cache's accounts: who holds how many bytes, who has reserved some, and when each copy was last used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tiercache.catalog.database import Database

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

BLOCK_BYTES = 4096
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE copies (
    name TEXT PRIMARY KEY, charge_bytes INTEGER NOT NULL CHECK (charge_bytes >= 0), record TEXT NOT NULL,
    uses INTEGER NOT NULL DEFAULT 0, last_use INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE reservations (
    owner TEXT NOT NULL, name TEXT NOT NULL, charge_bytes INTEGER NOT NULL CHECK (charge_bytes >= 0),
    PRIMARY KEY (owner, name)
) WITHOUT ROWID;
CREATE TABLE openers (owner TEXT PRIMARY KEY, limit_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER copy_in AFTER INSERT ON copies BEGIN
    UPDATE meta SET value = value + new.charge_bytes WHERE key = 'used'; END;
CREATE TRIGGER copy_out AFTER DELETE ON copies BEGIN
    UPDATE meta SET value = value - old.charge_bytes WHERE key = 'used'; END;
CREATE TRIGGER reservation_in AFTER INSERT ON reservations BEGIN
    UPDATE meta SET value = value + new.charge_bytes WHERE key = 'reserved'; END;
CREATE TRIGGER reservation_out AFTER DELETE ON reservations BEGIN
    UPDATE meta SET value = value - old.charge_bytes WHERE key = 'reserved'; END;
INSERT INTO meta VALUES ('used', 0), ('reserved', 0), ('clock', 0);
"""


@dataclass(frozen=True, slots=True)
class CopyRow:
    """A copy on the books. record: JSON, "" where the source is not known; last_use: a count, not a time."""

    name: str
    charge_bytes: int
    record: str
    uses: int
    last_use: int


class Files(Protocol):
    """What the accounts ask about the folder: everything in them can be made anew from its answers."""

    def ensure(self) -> None:
        """Make the folder and the owner's file in it, where somebody has deleted them."""

    def alive(self, owner: str) -> bool:
        """Whether the owner's process still has the folder open."""

    def bury(self, owner: str) -> None:
        """Remove the files of an owner that is dead."""

    def limits(self) -> Mapping[str, int]:
        """What each owner that lives keeps to, in bytes."""

    def coming(self) -> Iterable[tuple[str, str, int]]:
        """(owner, name, final size in bytes) of each file in the making."""

    def size_of(self, name: str) -> int | None:
        """Size in bytes of a copy; None: it is not there."""

    def sizes(self) -> Mapping[str, int]:
        """Size in bytes of each copy, by name."""

    def record(self, name: str) -> str:
        """The record beside a copy, "" where there is none."""


def charge_bytes(n_bytes: int) -> int:
    """What a file of n_bytes takes on disk, in whole blocks."""
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES


class Accounts:
    """The books of one cache folder, for one owner (a process that has the folder open).

    Every method is one short transaction that many processes may race for, and safe from any thread. Bytes are counted
    in whole blocks. No reservation commits that would take copies and reservations together beyond the limit.
    """

    def __init__(self, path: Path, owner: str, files: Files, *, wal: bool, boot: str) -> None:
        self._owner, self._files, self._boot = owner, files, boot
        self._own_limit_bytes: int | None = None
        self._database = Database(path, wal=wal, make_folder=files.ensure, prepare=self._prepare)

    def _prepare(self, db: sqlite3.Connection) -> None:
        for statement in _SCHEMA.split(";\n"):
            if statement.strip():
                db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('boot', ?)", (self._boot,))
        db.executemany("INSERT INTO openers VALUES (?, ?)", list(self._files.limits().items()))
        for owner, name, n_bytes in self._files.coming():
            if owner == self._owner or self._files.alive(owner):
                db.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?)", (owner, name, charge_bytes(n_bytes)))
        self._take_in(db)

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        self._database.close()

    # -- who has the folder open ------------------------------------------------------------------------------------

    def register(self, limit_bytes: int) -> int:
        """Note that the owner keeps to limit_bytes; returns the smallest limit of all who live."""

        def work(db: sqlite3.Connection) -> int:
            db.execute("INSERT OR REPLACE INTO openers VALUES (?, ?)", (self._owner, limit_bytes))
            return self._limit(db)

        self._own_limit_bytes = limit_bytes
        return self._database.run(work)

    def unregister(self) -> None:
        """Forget the owner and what it had reserved."""
        self._own_limit_bytes = None
        self._database.run(lambda db: self._forget(db, self._owner))

    def limit_bytes(self) -> int:
        """The smallest limit of all who live."""
        return self._database.run(self._limit)

    def _limit(self, db: sqlite3.Connection) -> int:
        # Somebody deleted the folder, and another process made the books anew before we had our owner file again.
        if self._own_limit_bytes is not None:
            db.execute("INSERT OR IGNORE INTO openers VALUES (?, ?)", (self._owner, self._own_limit_bytes))
        for owner, limit_bytes in db.execute("SELECT owner, limit_bytes FROM openers ORDER BY limit_bytes").fetchall():
            if owner == self._owner or self._files.alive(owner):
                return int(limit_bytes)
            self._files.bury(owner)
            self._forget(db, owner)
        return 0

    def _forget(self, db: sqlite3.Connection, owner: str) -> None:
        db.execute("DELETE FROM openers WHERE owner = ?", (owner,))
        query = "DELETE FROM reservations WHERE owner = ? RETURNING name"
        for (name,) in db.execute(query, (owner,)).fetchall():
            # It may have died between naming the copy and booking it.
            n_bytes = self._files.size_of(name)
            if n_bytes is not None and not self._is_booked(db, name):
                self._insert(db, name, self._files.record(name), n_bytes)

    def _is_booked(self, db: sqlite3.Connection, name: str) -> bool:
        return db.execute("SELECT 1 FROM copies WHERE name = ?", (name,)).fetchone() is not None

    # -- bytes ------------------------------------------------------------------------------------------------------

    def reserve(self, name: str, n_bytes: int, *, spare_bytes: Callable[[], int]) -> bool:
        """Reserve room for a copy before it is fetched, once for an owner and name; False: there is no room.

        spare_bytes: what the disk has free above the floor that must stay free.
        """

        def work(db: sqlite3.Connection) -> bool:
            self._release(db, name)
            if self._lack(db, n_bytes, spare_bytes) > 0:
                return False
            row = (self._owner, name, charge_bytes(n_bytes))
            db.execute("INSERT INTO reservations VALUES (?, ?, ?)", row)
            self._check_budget(db)
            return True

        return self._database.run(work)

    def lack_bytes(self, n_bytes: int, *, spare_bytes: Callable[[], int]) -> int:
        """How many bytes must go before a copy of n_bytes can be reserved; 0 or less: it can be now."""
        return self._database.run(lambda db: self._lack(db, n_bytes, spare_bytes))

    def _lack(self, db: sqlite3.Connection, n_bytes: int, spare_bytes: Callable[[], int]) -> int:
        limit = self._limit(db)
        self._release_dead(db)
        used, reserved = self._sums(db)
        # Of what is reserved some is on disk already: counting all of it against the free space errs on the safe side.
        return max(used + reserved - limit, reserved - spare_bytes()) + charge_bytes(n_bytes)

    def _release_dead(self, db: sqlite3.Connection) -> None:
        owners = [o for (o,) in db.execute("SELECT DISTINCT owner FROM reservations WHERE owner <> ?", (self._owner,))]
        for owner in owners:
            if not self._files.alive(owner):
                self._files.bury(owner)
                self._forget(db, owner)

    def _sums(self, db: sqlite3.Connection) -> tuple[int, int]:
        sums = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('used', 'reserved')").fetchall())
        return int(sums["used"]), int(sums["reserved"])

    def _check_budget(self, db: sqlite3.Connection) -> None:
        used, reserved = self._sums(db)
        limit = self._limit(db)
        if used + reserved > limit:
            raise RuntimeError(f"the cache's books would exceed the budget: {used} + {reserved} > {limit} bytes")

    def publish(self, name: str, record: str, n_bytes: int) -> None:
        """Turn a reservation into a copy. Without one (the catalog was lost meanwhile) the file is there all the same.

        Raises:
            RuntimeError: it takes more than was reserved for it.
        """

        def work(db: sqlite3.Connection) -> None:
            before = sum(self._sums(db))
            held = self._release(db, name)
            db.execute("DELETE FROM copies WHERE name = ?", (name,))
            self._insert(db, name, record, n_bytes)
            if held and sum(self._sums(db)) > before:
                raise RuntimeError("publishing a copy took more bytes than were reserved for it")

        self._database.run(work)

    def _insert(self, db: sqlite3.Connection, name: str, record: str, n_bytes: int) -> None:
        db.execute(
            "INSERT INTO copies (name, charge_bytes, record, last_use) VALUES (?, ?, ?, ?)",
            (name, charge_bytes(n_bytes), record, self._tick(db, 1)),
        )

    def _tick(self, db: sqlite3.Connection, n: int) -> int:
        return int(
            db.execute("UPDATE meta SET value = value + ? WHERE key = 'clock' RETURNING value", (n,)).fetchone()[0]
        )

    def release(self, name: str) -> None:
        """Give a reservation back. Harmless when there is none."""
        self._database.run(lambda db: self._release(db, name))

    def _release(self, db: sqlite3.Connection, name: str) -> int:
        query = "DELETE FROM reservations WHERE owner = ? AND name = ?"
        return db.execute(query, (self._owner, name)).rowcount

    def remove(self, names: Iterable[str]) -> None:
        """Take copies off the books whose files are gone.

        The race with a publisher: (1) we delete the file, (2) it is fetched again, named and booked, (3) we book it
        out. A publisher names before it books, so a file that is not there now will be booked after us.
        """

        def work(db: sqlite3.Connection) -> None:
            rows = [(name,) for name in names if self._files.size_of(name) is None]
            db.executemany("DELETE FROM copies WHERE name = ?", rows)

        self._database.run(work)

    def add_uses(self, uses: Mapping[str, int]) -> None:
        """Add uses by name; the mapping's order is the order of last use."""

        def work(db: sqlite3.Connection) -> None:
            first = self._tick(db, len(uses)) - len(uses) + 1
            rows = [(n, first + i, name) for i, (name, n) in enumerate(uses.items())]
            db.executemany("UPDATE copies SET uses = uses + ?, last_use = ? WHERE name = ?", rows)

        self._database.run(work)

    # -- looking ----------------------------------------------------------------------------------------------------

    def sums(self) -> tuple[int, int, int]:
        """Bytes of copies, bytes reserved, and the limit."""
        return self._database.run(lambda db: (*self._sums(db), self._limit(db)))

    def is_reserved(self, name: str) -> bool:
        """Whether somebody is fetching name."""
        query = "SELECT count(*) FROM reservations WHERE name = ?"
        return bool(self._database.run(lambda db: db.execute(query, (name,)).fetchone()[0]))

    def rows(self) -> list[CopyRow]:
        """All copies on the books, least recently used first."""
        query = "SELECT name, charge_bytes, record, uses, last_use FROM copies ORDER BY last_use, name"
        return self._database.run(lambda db: [CopyRow(*row) for row in db.execute(query)])

    def unrecorded(self) -> set[str]:
        """Names of copies without a record."""
        query = "SELECT name FROM copies WHERE record = ''"
        return self._database.run(lambda db: {name for (name,) in db.execute(query)})

    # -- agreeing with the files ------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Make the books agree with the files; all over where they are from before the machine started.

        They are not synced to disk, so a power failure may have taken some of them; nothing else can.
        """
        query = "SELECT value FROM meta WHERE key = 'boot'"
        if self._database.run(lambda db: db.execute(query).fetchone()[0]) != self._boot:
            self._database.replace()
        self._database.run(self._take_in)

    def _forget_dead(self, db: sqlite3.Connection) -> None:
        """Forget all who died without saying so: worker processes often do, several an epoch."""
        for (owner,) in db.execute("SELECT owner FROM openers WHERE owner <> ?", (self._owner,)).fetchall():
            if not self._files.alive(owner):
                self._files.bury(owner)
                self._forget(db, owner)

    def _take_in(self, db: sqlite3.Connection) -> None:
        # A copy that is being published now counts twice until its publisher turns the reservation into it: too much
        # for a moment is better than too little for ever, should the publisher die.
        self._forget_dead(db)
        self._release_dead(db)
        sizes = self._files.sizes()
        known = {name for (name,) in db.execute("SELECT name FROM copies")}
        db.executemany("DELETE FROM copies WHERE name = ?", [(name,) for name in known - sizes.keys()])
        for name in sorted(sizes.keys() - known):
            self._insert(db, name, self._files.record(name), sizes[name])
