"""The cache's accounts: bytes of copies, reservations of processes, and the last use of each copy.

The first part has the SQL tables and the statements on them, as plain functions that run inside a transaction.
`Accounts` is the interface: each method is one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tiercache.catalog import tables
from tiercache.catalog.database import Database
from tiercache.catalog.tables import BLOCK_BYTES, AccountChanges, CopyRow

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

# Share of the budget for ghosts: as much as the main queue of s3fifo holds (Yang et al., SOSP 2023).
GHOSTS_SHARE = 0.9


class CacheFiles(Protocol):
    """Questions of the accounts about the cache folder. The accounts can be rebuilt from the answers."""

    def ensure(self) -> None:
        """Make the folder, and the owner's file in it, if somebody has deleted them."""

    def alive(self, owner: str) -> bool:
        """Return whether the owner's process still has the folder open."""

    def remove_files_of(self, owner: str) -> None:
        """Remove the files of a dead owner."""

    def limits(self) -> Mapping[str, int]:
        """Return the limit of each live owner, in bytes."""

    def is_over(self, owner: str, name: str) -> bool:
        """Return whether a reservation of a live owner is no longer used."""

    def running_fetches(self) -> Iterable[tuple[str, str, int]]:
        """Yield (owner, name, charge) of each running fetch. The charge is that of the bytes that may still come."""

    def charge_of(self, name: str) -> int | None:
        """Return the current charge of a copy, or of a partial copy, in bytes; None if it does not exist."""

    def charges(self) -> Mapping[str, int]:
        """Return the charge of each copy and partial copy, in bytes, by name."""

    def record(self, name: str) -> str:
        """Return the record beside a copy, "" if there is none."""


def charge_bytes(n_bytes: int) -> int:
    """Return the charge of a file of n_bytes: its size in whole disk blocks, plus one block for its record."""
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES


class Accounts:
    """The accounts of one cache folder, used by one owner (a process that has the folder open).

    Every method is one short transaction for which processes may race. Thread-safe. Byte counts are charges, see
    charge_bytes. No reservation commits if copies and reservations together would exceed the limit, and no booking
    commits if it takes more than was reserved for it.
    """

    def __init__(self, path: Path, owner: str, files: CacheFiles, *, wal: bool, boot: str) -> None:
        self._owner, self._files, self._boot = owner, files, boot
        self._own_limit_bytes: int | None = None
        # Our reservations, in case the file is lost. Changed only inside run(), which holds its lock.
        self._held: dict[str, int] = {}
        self._database = Database(path, wal=wal, make_folder=files.ensure, prepare=self._prepare)

    def _prepare(self, db: sqlite3.Connection) -> None:
        tables.create_tables(db, self._boot)
        db.executemany("INSERT INTO openers VALUES (?, ?)", list(self._files.limits().items()))
        for owner, name, charge in self._files.running_fetches():
            if owner != self._owner and self._files.alive(owner):
                db.execute("INSERT OR IGNORE INTO reservations VALUES (?, ?, ?)", (owner, name, charge))
        self._come_back(db)
        self._take_in(db, is_new=True)

    def close(self) -> None:
        """Close the file. The next call opens it again."""
        self._database.close()

    # -- owners -----------------------------------------------------------------------------------------------------

    def register(self, limit_bytes: int) -> int:
        """Record the owner's limit. Return the smallest limit of all live owners, in bytes."""

        def work(db: sqlite3.Connection) -> int:
            db.execute("INSERT OR REPLACE INTO openers VALUES (?, ?)", (self._owner, limit_bytes))
            return self._limit(db)

        self._own_limit_bytes = limit_bytes
        return self._database.run(work)

    def unregister(self) -> None:
        """Forget the owner and its reservations."""

        def work(db: sqlite3.Connection) -> None:
            self._held.clear()
            self._forget(db, self._owner)

        self._own_limit_bytes = None
        self._database.run(work)

    def limit_bytes(self) -> int:
        """Return the smallest limit of all live owners, in bytes."""
        return self._database.run(self._limit)

    def _limit(self, db: sqlite3.Connection) -> int:
        self._come_back(db)
        for owner, limit_bytes in db.execute("SELECT owner, limit_bytes FROM openers ORDER BY limit_bytes").fetchall():
            if owner == self._owner or self._files.alive(owner):
                return int(limit_bytes)
            self._files.remove_files_of(owner)
            self._forget(db, owner)
        return 0

    def _come_back(self, db: sqlite3.Connection) -> None:
        """Restore our limit and reservations in a file that another process made after somebody deleted the old one."""
        if self._own_limit_bytes is not None:
            db.execute("INSERT OR IGNORE INTO openers VALUES (?, ?)", (self._owner, self._own_limit_bytes))
        held = [(name, charge) for name, charge in self._held.items() if not self._files.is_over(self._owner, name)]
        rows = [(self._owner, name, charge) for name, charge in held]
        db.executemany("INSERT OR IGNORE INTO reservations VALUES (?, ?, ?)", rows)

    def _forget(self, db: sqlite3.Connection, owner: str) -> None:
        db.execute("DELETE FROM openers WHERE owner = ?", (owner,))
        query = "DELETE FROM reservations WHERE owner = ? RETURNING name"
        for (name,) in db.execute(query, (owner,)).fetchall():
            self._measure(db, name)  # the owner may have died between writing bytes and booking them

    def _measure(self, db: sqlite3.Connection, name: str) -> None:
        charge = self._files.charge_of(name)
        if charge is not None:
            tables.set_copy(db, name, self._files.record(name), charge)

    # -- bytes ------------------------------------------------------------------------------------------------------

    def reserve(self, name: str, charge_bytes: int, *, spare_bytes: Callable[[], int]) -> bool:
        """Reserve room for bytes that will be added to a copy or a partial copy, before they are fetched.

        An owner holds one reservation per name. A second call replaces it; if there is no room for the new size, the
        first reservation stays.

        Args:
            name: Name of the copy.
            charge_bytes: Charge of the bytes that will be added.
            spare_bytes: Function that returns the free bytes of the disk above its required minimum.

        Returns:
            Whether the room was reserved.
        """
        before = self._held.get(name)

        def work(db: sqlite3.Connection) -> bool:
            self._held.pop(name, None)
            self._delete_reservation(db, name)
            if self._lack(db, charge_bytes, spare_bytes) > 0:
                if before is not None:
                    self._held[name] = before
                    self._come_back(db)
                return False
            db.execute("INSERT INTO reservations VALUES (?, ?, ?)", (self._owner, name, charge_bytes))
            self._check_budget(db)
            self._held[name] = charge_bytes
            return True

        return self._database.run(work)

    def lack_bytes(self, charge_bytes: int, *, spare_bytes: Callable[[], int]) -> int:
        """Return how many bytes must be evicted before charge_bytes can be reserved; 0 or less: none."""
        return self._database.run(lambda db: self._lack(db, charge_bytes, spare_bytes))

    def _lack(self, db: sqlite3.Connection, charge_bytes: int, spare_bytes: Callable[[], int]) -> int:
        limit = self._limit(db)
        self._release_dead(db)
        used, reserved = tables.read_sums(db)
        # Some of the reserved bytes are on disk already. Counting all of them against the free space is the safe side.
        return max(used + reserved - limit, reserved - spare_bytes()) + charge_bytes

    def _release_dead(self, db: sqlite3.Connection) -> None:
        """Release the reservations of dead owners, and those that live owners no longer use and have not released."""
        rows = db.execute("SELECT owner, name FROM reservations WHERE owner <> ?", (self._owner,)).fetchall()
        alive = {owner: self._files.alive(owner) for owner, _ in rows}
        for owner in [owner for owner, lives in alive.items() if not lives]:
            self._files.remove_files_of(owner)
            self._forget(db, owner)
        over = [(owner, name) for owner, name in rows if alive[owner] and self._files.is_over(owner, name)]
        db.executemany("DELETE FROM reservations WHERE owner = ? AND name = ?", over)

    def _check_budget(self, db: sqlite3.Connection) -> None:
        used, reserved = tables.read_sums(db)
        limit = self._limit(db)
        if used + reserved > limit:
            raise RuntimeError(f"the cache's accounts would exceed the budget: {used} + {reserved} > {limit} bytes")

    def book(self, name: str, record: str, charge_bytes: int) -> None:
        """Set the row of a copy or partial copy, and release this owner's reservation for the name.

        Bytes without a reservation (the catalog was lost, or the file was found) are booked too.

        Args:
            name: Name of the copy.
            record: JSON record; "" if the source is unknown.
            charge_bytes: Charge of the whole copy or partial copy.

        Raises:
            RuntimeError: The copy takes more than its row and the reservations for it. Nothing is booked.
        """

        def work(db: sqlite3.Connection) -> None:
            own = self._delete_reservation(db, name)
            most = (tables.charge_of(db, name) or 0) + own
            query = "SELECT total(charge_bytes) FROM reservations WHERE name = ?"
            others = int(db.execute(query, (name,)).fetchone()[0])
            if own and charge_bytes > most + others:
                raise RuntimeError(
                    f"a copy takes more bytes than were reserved for it: {charge_bytes} > {most + others} ({name})"
                )
            # On file systems where flock is not enforced, two processes may write one partial copy: each books its own
            # reservation.
            tables.set_copy(db, name, record, min(charge_bytes, most) if own and others else charge_bytes)
            self._held.pop(name, None)

        self._database.run(work)

    def release(self, name: str) -> None:
        """Release a reservation. Harmless if there is none."""

        def work(db: sqlite3.Connection) -> None:
            self._held.pop(name, None)
            self._delete_reservation(db, name)

        self._database.run(work)

    def _delete_reservation(self, db: sqlite3.Connection, name: str) -> int:
        query = "DELETE FROM reservations WHERE owner = ? AND name = ? RETURNING charge_bytes"
        return sum(charge for (charge,) in db.execute(query, (self._owner, name)).fetchall())

    def remove(self, names: Iterable[str], *, evicted: bool = False) -> None:
        """Remove the rows of copies whose files are gone. evicted: Whether they become ghosts, remembered for a while.

        The race with a publisher: (1) we delete the file, (2) it is fetched again, published and booked, (3) we remove
        its row. A publisher publishes before it books, so a file that does not exist now will be booked after our
        removal.
        """

        def work(db: sqlite3.Connection) -> None:
            tables.drop_copies(db, [name for name in names if self._files.charge_of(name) is None], evicted=evicted)
            tables.forget_gone(db, int(self._limit(db) * GHOSTS_SHARE))

        self._database.run(work)

    # -- uses, queues and counters ----------------------------------------------------------------------------------

    def add_uses(self, uses: Mapping[str, int]) -> None:
        """Add uses by name. The order of the mapping is the order of last use."""
        self._database.run(lambda db: tables.add_uses(db, uses))

    def requeue(self, moves: Iterable[tuple[str, bool, int]]) -> None:
        """Move copies to the end of a queue of s3fifo, in order. moves: (name, whether into the main queue, freq)."""
        self._database.run(lambda db: tables.requeue(db, moves))

    def is_ghost(self, name: str) -> bool:
        """Return whether name was evicted lately."""
        return self._database.run(lambda db: tables.is_ghost(db, name))

    def add_figures(self, figures: Mapping[str, int]) -> None:
        """Add to the counters of all processes, by name."""
        self._database.run(lambda db: tables.add_figures(db, figures))

    def figures(self) -> dict[str, int]:
        """Return the counters (FIGURES) of all processes since the catalog was made."""
        return self._database.run(tables.read_figures)

    # -- queries ----------------------------------------------------------------------------------------------------

    def sums(self) -> tuple[int, int, int]:
        """Return the bytes of copies, the reserved bytes, and the limit."""
        return self._database.run(lambda db: (*tables.read_sums(db), self._limit(db)))

    def is_reserved(self, name: str) -> bool:
        """Return whether somebody is fetching name."""
        query = "SELECT count(*) FROM reservations WHERE name = ?"
        return bool(self._database.run(lambda db: db.execute(query, (name,)).fetchone()[0]))

    def rows(self) -> list[CopyRow]:
        """Return the rows of all copies, least recently used first."""
        return self._database.run(tables.select_rows)

    def rows_with(self, text: str) -> list[CopyRow]:
        """Return the rows of copies whose record contains text."""
        return self._database.run(lambda db: tables.select_rows_with(db, text))

    def changes(self, since: tuple[str, int]) -> AccountChanges:
        """Return the changes since an earlier answer's `since`; ("", 0): all rows."""
        return self._database.run(lambda db: tables.select_changes(db, since, self._limit(db)))

    def unrecorded(self) -> set[str]:
        """Return the names of copies without a record."""
        query = "SELECT name FROM copies WHERE record = ''"
        return self._database.run(lambda db: {name for (name,) in db.execute(query)})

    # -- reconciliation with the files ------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Make the accounts agree with the files. Accounts from before the last boot are rebuilt.

        They are not synced to disk, so a power failure may have lost some of them; nothing else can.
        """
        query = "SELECT value FROM meta WHERE key = 'boot'"
        if self._database.run(lambda db: db.execute(query).fetchone()[0]) != self._boot:
            self._database.replace()
        self._database.run(lambda db: self._take_in(db, is_new=False))

    def _forget_dead(self, db: sqlite3.Connection) -> None:
        """Forget all owners that died without unregistering: worker processes often do, several per epoch."""
        for (owner,) in db.execute("SELECT owner FROM openers WHERE owner <> ?", (self._owner,)).fetchall():
            if not self._files.alive(owner):
                self._files.remove_files_of(owner)
                self._forget(db, owner)

    def _take_in(self, db: sqlite3.Connection, *, is_new: bool) -> None:
        # In new accounts, bytes that are being fetched count twice until their fetcher books them: its reservation may
        # be smaller than the partial copy. In existing accounts, the reservation covers what was added since the row
        # was set.
        self._forget_dead(db)
        self._release_dead(db)
        charges = self._files.charges()
        known = {row.name: row.charge_bytes for row in tables.select_rows(db)}
        tables.drop_copies(db, known.keys() - charges.keys(), evicted=False)
        growing = {name for (name,) in db.execute("SELECT name FROM reservations")}
        for name in sorted(charges):
            # A growing partial copy is booked by its fetcher. If the fetcher died, the copy is larger than its row
            # says.
            if (is_new and name not in known) or (name not in growing and charges[name] != known.get(name)):
                tables.set_copy(db, name, self._files.record(name), charges[name])
