"""The SQL tables of the accounts, and the statements on them: plain functions that run inside a transaction."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

BLOCK_BYTES = 4096
FIGURES = (
    "hits",
    "misses",
    "prefetched",
    "bytes_hit",
    "bytes_fetched",
    "evicted",
    "evicted_early",
    "quarantined",
    "poisoned",
)
# s3fifo counts uses with two bits per copy: more bits change little (Yang et al., SOSP 2023, section 4.1).
MOST_FREQ = 3
# How a name left: evicted from the small queue of s3fifo (its ghosts), evicted from the main queue, or lost otherwise
# (deleted by hand, damaged). A process that keeps the rows in memory needs all three.
_GONE = ("small", "main", "lost")

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE copies (
    name TEXT PRIMARY KEY, charge_bytes INTEGER NOT NULL CHECK (charge_bytes >= 0), record TEXT NOT NULL,
    uses INTEGER NOT NULL DEFAULT 0, last_use INTEGER NOT NULL DEFAULT 0,
    main INTEGER NOT NULL DEFAULT 0, freq INTEGER NOT NULL DEFAULT 0, turn INTEGER NOT NULL DEFAULT 0,
    changed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX copies_changed ON copies (changed);
CREATE TABLE gone (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, charge_bytes INTEGER NOT NULL, changed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX gone_changed ON gone (kind, changed);
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
CREATE TRIGGER reservation_in AFTER INSERT ON reservations BEGIN
    UPDATE meta SET value = value + new.charge_bytes WHERE key = 'reserved'; END;
CREATE TRIGGER reservation_out AFTER DELETE ON reservations BEGIN
    UPDATE meta SET value = value - old.charge_bytes WHERE key = 'reserved'; END;
CREATE TRIGGER ghost_in AFTER INSERT ON gone BEGIN
    UPDATE meta SET value = value + new.charge_bytes WHERE key = 'gone ' || new.kind; END;
CREATE TRIGGER ghost_out AFTER DELETE ON gone BEGIN
    UPDATE meta SET value = value - old.charge_bytes WHERE key = 'gone ' || old.kind; END;
INSERT INTO meta VALUES ('used', 0), ('reserved', 0), ('clock', 0), ('forgotten', 0), ('evicted', 0);
INSERT INTO meta VALUES ('gone small', 0), ('gone main', 0), ('gone lost', 0);
"""


@dataclass(frozen=True, slots=True)
class CopyRow:
    """The row of a copy, or of a partial copy.

    Attributes:
        name: Name of the copy.
        charge_bytes: Charge, in bytes.
        record: JSON record; "" if the source is unknown.
        uses: Number of uses.
        last_use: Logical time of the last use: a count, not a time.
        main: For s3fifo: whether the copy is in the main queue, otherwise in the small one.
        freq: For s3fifo: uses since it entered the queue, at most MOST_FREQ.
        turn: For s3fifo: position in the queue, a count; the smallest is the head.
    """

    name: str
    charge_bytes: int
    record: str
    uses: int
    last_use: int
    main: bool = False
    freq: int = 0
    turn: int = 0


@dataclass(frozen=True, slots=True)
class AccountChanges:
    """The changes of the accounts between two queries.

    Attributes:
        since: Value to pass to the next query.
        whole: Whether `select_rows` are all rows, and earlier knowledge is void.
        rows: Rows that changed.
        gone: Names that were removed.
        has_evicted: Whether anything was ever evicted.
        limit_bytes: Smallest limit of all live owners.
    """

    since: tuple[str, int]
    whole: bool
    rows: tuple[CopyRow, ...]
    gone: tuple[str, ...]
    has_evicted: bool
    limit_bytes: int


_ROW = "name, charge_bytes, record, uses, last_use, main, freq, turn"


def create_tables(db: sqlite3.Connection, boot: str) -> None:
    """Make the tables of a new file. boot: Boot id of the machine; accounts of another boot are not trusted."""
    # A trigger contains ";", but a statement ends only at a ";" at the end of a line, and a trigger ends with "END;".
    for statement in _SCHEMA.split(";\n"):
        if statement.strip():
            db.execute(statement)
    db.execute("INSERT INTO meta VALUES ('boot', ?), ('id', ?)", (boot, secrets.token_hex(8)))
    db.executemany("INSERT INTO figures VALUES (?, 0)", [(name,) for name in FIGURES])


def read_meta(db: sqlite3.Connection, key: str) -> int:
    """Return one number of the meta table."""
    return int(db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])


def read_sums(db: sqlite3.Connection) -> tuple[int, int]:
    """Return the bytes of copies, and the reserved bytes."""
    found = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('used', 'reserved')").fetchall())
    return int(found["used"]), int(found["reserved"])


def tick(db: sqlite3.Connection, n: int) -> int:
    """Advance the logical clock by n, and return its new time."""
    return int(db.execute("UPDATE meta SET value = value + ? WHERE key = 'clock' RETURNING value", (n,)).fetchone()[0])


def charge_of(db: sqlite3.Connection, name: str) -> int | None:
    """Return the charge in a copy's row; None if there is no row."""
    row = db.execute("SELECT charge_bytes FROM copies WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def set_copy(db: sqlite3.Connection, name: str, record: str, charge_bytes: int) -> None:
    """Set a copy's row. A new copy enters the main queue if it is a ghost, otherwise the small queue."""
    now = tick(db, 1)
    query = "UPDATE copies SET charge_bytes = ?, record = ?, changed = ? WHERE name = ?"
    if db.execute(query, (charge_bytes, record, now, name)).rowcount:
        return
    row = db.execute("DELETE FROM gone WHERE name = ? RETURNING kind", (name,)).fetchone()
    is_ghost = row is not None and row[0] == "small"
    db.execute(
        "INSERT INTO copies (name, charge_bytes, record, last_use, main, turn, changed) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (name, charge_bytes, record, now, is_ghost, now, now),
    )


def drop_copies(db: sqlite3.Connection, names: Iterable[str], *, evicted: bool) -> None:
    """Delete the rows of copies, and remember that they existed."""
    for name in names:
        row = db.execute("DELETE FROM copies WHERE name = ? RETURNING charge_bytes, main", (name,)).fetchone()
        if row is not None:
            kind = ("main" if row[1] else "small") if evicted else "lost"
            db.execute("INSERT INTO gone VALUES (?, ?, ?, ?)", (name, kind, row[0], tick(db, 1)))
            if evicted:
                db.execute("UPDATE meta SET value = value + 1 WHERE key = 'evicted'")


def forget_gone(db: sqlite3.Connection, most_bytes: int) -> None:
    """Forget the names that left longest ago, beyond most_bytes of each kind."""
    query = "DELETE FROM gone WHERE name = (SELECT name FROM gone WHERE kind = ? ORDER BY changed LIMIT 1)"
    for kind in _GONE:
        while read_meta(db, f"gone {kind}") > most_bytes:
            (last,) = db.execute(f"{query} RETURNING changed", (kind,)).fetchone()
            db.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'forgotten'", (last,))


def is_ghost(db: sqlite3.Connection, name: str) -> bool:
    """Return whether a name was evicted lately."""
    return db.execute("SELECT 1 FROM gone WHERE name = ? AND kind <> 'lost'", (name,)).fetchone() is not None


def add_uses(db: sqlite3.Connection, uses: Mapping[str, int]) -> None:
    """Add uses by name. The order of the mapping is the order of last use."""
    first = tick(db, len(uses)) - len(uses) + 1
    db.executemany(
        "UPDATE copies SET uses = uses + ?1, freq = min(freq + ?1, ?2), last_use = ?3, changed = ?3 WHERE name = ?4",
        [(n, MOST_FREQ, first + i, name) for i, (name, n) in enumerate(uses.items())],
    )


def requeue(db: sqlite3.Connection, moves: Iterable[tuple[str, bool, int]]) -> None:
    """Move copies to the end of a queue, in order. moves: (name, whether into the main queue, freq)."""
    for name, main, freq in moves:
        now = tick(db, 1)
        query = "UPDATE copies SET main = ?1, freq = ?2, turn = ?3, changed = ?3 WHERE name = ?4"
        db.execute(query, (main, freq, now, name))


def _copy_row(row: tuple[Any, ...]) -> CopyRow:
    name, charge_bytes, record, uses, last_use, main, freq, turn = row
    return CopyRow(name, charge_bytes, record, uses, last_use, bool(main), freq, turn)


def select_rows(db: sqlite3.Connection) -> list[CopyRow]:
    """Return the rows of all copies, least recently used first."""
    query = f"SELECT {_ROW} FROM copies ORDER BY last_use, name"  # noqa: S608 - our own columns
    return [_copy_row(row) for row in db.execute(query)]


def select_rows_with(db: sqlite3.Connection, text: str) -> list[CopyRow]:
    """Return the rows whose record contains text. SQLite searches 100,000 records in 40 ms, Python in 2 s."""
    query = f"SELECT {_ROW} FROM copies WHERE instr(record, ?)"  # noqa: S608 - our own columns
    return [_copy_row(row) for row in db.execute(query, (text,))]


def select_changes(db: sqlite3.Connection, since: tuple[str, int], limit_bytes: int) -> AccountChanges:
    """Return the changes since an earlier answer's `since`; ("", 0) for all rows."""
    (catalog,) = db.execute("SELECT value FROM meta WHERE key = 'id'").fetchone()
    whole = since[0] != catalog or since[1] < read_meta(db, "forgotten")
    seen = 0 if whole else since[1]
    query = f"SELECT {_ROW} FROM copies WHERE changed > ?"  # noqa: S608 - our own columns
    found = tuple(_copy_row(row) for row in db.execute(query, (seen,)))
    query = "SELECT name FROM gone WHERE kind IN (?, ?, ?) AND changed > ?"
    gone = () if whole else tuple(name for (name,) in db.execute(query, (*_GONE, seen)))
    return AccountChanges(
        (catalog, read_meta(db, "clock")), whole, found, gone, read_meta(db, "evicted") > 0, limit_bytes
    )


def add_figures(db: sqlite3.Connection, figures: Mapping[str, int]) -> None:
    """Add to the counters, by name."""
    db.executemany(
        "INSERT INTO figures VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = value + ?2",
        list(figures.items()),
    )


def read_figures(db: sqlite3.Connection) -> dict[str, int]:
    """Return the counters, by name."""
    return dict(db.execute("SELECT name, value FROM figures").fetchall())
