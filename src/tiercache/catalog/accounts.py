"""The cache's accounts: who holds how many bytes, who has reserved some, and when each copy was last used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tiercache.catalog import tables
from tiercache.catalog.database import Database
from tiercache.catalog.tables import BLOCK_BYTES, Changes, CopyRow

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

# As much is remembered of what was evicted as the main queue of s3fifo holds (Yang et al., SOSP 2023).
GHOSTS_SHARE = 0.9


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

    def is_over(self, owner: str, name: str) -> bool:
        """Whether what an owner has reserved under this name is taken by nobody any more, though the owner lives."""

    def coming(self) -> Iterable[tuple[str, str, int]]:
        """(owner, name, charge in bytes of what may still come) of each fetch that runs."""

    def charge_of(self, name: str) -> int | None:
        """What a copy, or a part of one, takes on disk now, as a charge in bytes; None: it is not there."""

    def charges(self) -> Mapping[str, int]:
        """The charge in bytes of each copy and part, by name."""

    def record(self, name: str) -> str:
        """The record beside a copy, "" where there is none."""


def charge_bytes(n_bytes: int) -> int:
    """What a file of n_bytes and its record take on disk: whole blocks, and one for the record."""
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES


class Accounts:
    """The books of one cache folder, for one owner (a process that has the folder open).

    Every method is one short transaction that many processes may race for, and safe from any thread. Bytes are charges
    (charge_bytes). No reservation commits that would take copies and reservations together beyond the limit, and no
    booking that takes more than was reserved for it.
    """

    def __init__(self, path: Path, owner: str, files: Files, *, wal: bool, boot: str) -> None:
        self._owner, self._files, self._boot = owner, files, boot
        self._own_limit_bytes: int | None = None
        # What this owner has reserved, should the file be lost: changed only inside run(), which holds its lock.
        self._held: dict[str, int] = {}
        self._database = Database(path, wal=wal, make_folder=files.ensure, prepare=self._prepare)

    def _prepare(self, db: sqlite3.Connection) -> None:
        tables.make(db, self._boot)
        db.executemany("INSERT INTO openers VALUES (?, ?)", list(self._files.limits().items()))
        for owner, name, charge in self._files.coming():
            if owner != self._owner and self._files.alive(owner):
                db.execute("INSERT OR IGNORE INTO reservations VALUES (?, ?, ?)", (owner, name, charge))
        self._come_back(db)
        self._take_in(db, is_new=True)

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

        def work(db: sqlite3.Connection) -> None:
            self._held.clear()
            self._forget(db, self._owner)

        self._own_limit_bytes = None
        self._database.run(work)

    def limit_bytes(self) -> int:
        """The smallest limit of all who live."""
        return self._database.run(self._limit)

    def _limit(self, db: sqlite3.Connection) -> int:
        self._come_back(db)
        for owner, limit_bytes in db.execute("SELECT owner, limit_bytes FROM openers ORDER BY limit_bytes").fetchall():
            if owner == self._owner or self._files.alive(owner):
                return int(limit_bytes)
            self._files.bury(owner)
            self._forget(db, owner)
        return 0

    def _come_back(self, db: sqlite3.Connection) -> None:
        """Note our limit and reservations in books that another process made anew after somebody deleted the file."""
        if self._own_limit_bytes is not None:
            db.execute("INSERT OR IGNORE INTO openers VALUES (?, ?)", (self._owner, self._own_limit_bytes))
        held = [(name, charge) for name, charge in self._held.items() if not self._files.is_over(self._owner, name)]
        rows = [(self._owner, name, charge) for name, charge in held]
        db.executemany("INSERT OR IGNORE INTO reservations VALUES (?, ?, ?)", rows)

    def _forget(self, db: sqlite3.Connection, owner: str) -> None:
        db.execute("DELETE FROM openers WHERE owner = ?", (owner,))
        query = "DELETE FROM reservations WHERE owner = ? RETURNING name"
        for (name,) in db.execute(query, (owner,)).fetchall():
            self._measure(db, name)  # it may have died between writing bytes and booking them

    def _measure(self, db: sqlite3.Connection, name: str) -> None:
        charge = self._files.charge_of(name)
        if charge is not None:
            tables.set_copy(db, name, self._files.record(name), charge)

    # -- bytes ------------------------------------------------------------------------------------------------------

    def reserve(self, name: str, charge_bytes: int, *, spare_bytes: Callable[[], int]) -> bool:
        """Reserve room for bytes to be added to a copy or a part, before they are fetched.

        An owner holds one reservation for a name: a second call replaces it by one of the new size, and where there is
        no room for that (False) the first one stays.

        Args:
            name: of the copy.
            charge_bytes: what will be added, as a charge.
            spare_bytes: what the disk has free above the floor that must stay free.
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
        """How many bytes must go before charge_bytes can be reserved; 0 or less: they can be now."""
        return self._database.run(lambda db: self._lack(db, charge_bytes, spare_bytes))

    def _lack(self, db: sqlite3.Connection, charge_bytes: int, spare_bytes: Callable[[], int]) -> int:
        limit = self._limit(db)
        self._release_dead(db)
        used, reserved = tables.sums(db)
        # Of what is reserved some is on disk already: counting all of it against the free space errs on the safe side.
        return max(used + reserved - limit, reserved - spare_bytes()) + charge_bytes

    def _release_dead(self, db: sqlite3.Connection) -> None:
        """Give back what the dead have reserved, and what the living need no more and are too idle to give back."""
        rows = db.execute("SELECT owner, name FROM reservations WHERE owner <> ?", (self._owner,)).fetchall()
        alive = {owner: self._files.alive(owner) for owner, _ in rows}
        for owner in [owner for owner, lives in alive.items() if not lives]:
            self._files.bury(owner)
            self._forget(db, owner)
        over = [(owner, name) for owner, name in rows if alive[owner] and self._files.is_over(owner, name)]
        db.executemany("DELETE FROM reservations WHERE owner = ? AND name = ?", over)

    def _check_budget(self, db: sqlite3.Connection) -> None:
        used, reserved = tables.sums(db)
        limit = self._limit(db)
        if used + reserved > limit:
            raise RuntimeError(f"the cache's books would exceed the budget: {used} + {reserved} > {limit} bytes")

    def book(self, name: str, record: str, charge_bytes: int) -> None:
        """Set the row of a copy or a part, and give this owner's reservation for the name back.

        What is there without a reservation (the catalog was lost, or the file was found) is booked all the same.

        Args:
            name: of the copy.
            record: JSON, "" where the source is not known.
            charge_bytes: all that the copy or part takes, as a charge.

        Raises:
            RuntimeError: it takes more than its row and the reservations for it: nothing is booked.
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
            # Where locks lie two may write one part at once: what the other has reserved, the other will book.
            tables.set_copy(db, name, record, min(charge_bytes, most) if own and others else charge_bytes)
            self._held.pop(name, None)

        self._database.run(work)

    def release(self, name: str) -> None:
        """Give a reservation back. Harmless when there is none."""

        def work(db: sqlite3.Connection) -> None:
            self._held.pop(name, None)
            self._delete_reservation(db, name)

        self._database.run(work)

    def _delete_reservation(self, db: sqlite3.Connection, name: str) -> int:
        query = "DELETE FROM reservations WHERE owner = ? AND name = ? RETURNING charge_bytes"
        return sum(charge for (charge,) in db.execute(query, (self._owner, name)).fetchall())

    def remove(self, names: Iterable[str], *, evicted: bool = False) -> None:
        """Take copies off the books whose files are gone. evicted: they are ghosts now, remembered for a while.

        The race with a publisher: (1) we delete the file, (2) it is fetched again, named and booked, (3) we book it
        out. A publisher names before it books, so a file that is not there now will be booked after us.
        """

        def work(db: sqlite3.Connection) -> None:
            tables.drop_copies(db, [name for name in names if self._files.charge_of(name) is None], evicted=evicted)
            tables.forget_gone(db, int(self._limit(db) * GHOSTS_SHARE))

        self._database.run(work)

    # -- uses, queues and figures -----------------------------------------------------------------------------------

    def add_uses(self, uses: Mapping[str, int]) -> None:
        """Add uses by name; the mapping's order is the order of last use."""
        self._database.run(lambda db: tables.add_uses(db, uses))

    def requeue(self, moves: Iterable[tuple[str, bool, int]]) -> None:
        """Put copies at the end of a queue of s3fifo, in order. moves: (name, into the main queue, freq)."""
        self._database.run(lambda db: tables.requeue(db, moves))

    def is_ghost(self, name: str) -> bool:
        """Whether name was evicted lately."""
        return self._database.run(lambda db: tables.is_ghost(db, name))

    def add_figures(self, figures: Mapping[str, int]) -> None:
        """Add to the sums of all processes, by name."""
        self._database.run(lambda db: tables.add_figures(db, figures))

    def figures(self) -> dict[str, int]:
        """The sums of FIGURES since the catalog was made, of all processes that have booked theirs."""
        return self._database.run(tables.figures)

    # -- looking ----------------------------------------------------------------------------------------------------

    def sums(self) -> tuple[int, int, int]:
        """Bytes of copies, bytes reserved, and the limit."""
        return self._database.run(lambda db: (*tables.sums(db), self._limit(db)))

    def is_reserved(self, name: str) -> bool:
        """Whether somebody is fetching name."""
        query = "SELECT count(*) FROM reservations WHERE name = ?"
        return bool(self._database.run(lambda db: db.execute(query, (name,)).fetchone()[0]))

    def rows(self) -> list[CopyRow]:
        """All copies on the books, least recently used first."""
        return self._database.run(tables.rows)

    def rows_with(self, text: str) -> list[CopyRow]:
        """Copies whose record has text in it."""
        return self._database.run(lambda db: tables.rows_with(db, text))

    def changes(self, since: tuple[str, int]) -> Changes:
        """What changed on the books since an earlier answer's `since`; ("", 0): all that is on them."""
        return self._database.run(lambda db: tables.changes(db, since, self._limit(db)))

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
        self._database.run(lambda db: self._take_in(db, is_new=False))

    def _forget_dead(self, db: sqlite3.Connection) -> None:
        """Forget all who died without saying so: worker processes often do, several an epoch."""
        for (owner,) in db.execute("SELECT owner FROM openers WHERE owner <> ?", (self._owner,)).fetchall():
            if not self._files.alive(owner):
                self._files.bury(owner)
                self._forget(db, owner)

    def _take_in(self, db: sqlite3.Connection, *, is_new: bool) -> None:
        # In new books what is being fetched now counts twice until its fetcher books it: what he has reserved may be
        # less than all of the part. In books that were there it covers what came since its row (or since nothing).
        self._forget_dead(db)
        self._release_dead(db)
        charges = self._files.charges()
        known = {row.name: row.charge_bytes for row in tables.rows(db)}
        tables.drop_copies(db, known.keys() - charges.keys(), evicted=False)
        growing = {name for (name,) in db.execute("SELECT name FROM reservations")}
        for name in sorted(charges):
            # A part that somebody grows is booked by who does; one whose fetcher died is larger than its row says.
            if (is_new and name not in known) or (name not in growing and charges[name] != known.get(name)):
                tables.set_copy(db, name, self._files.record(name), charges[name])
