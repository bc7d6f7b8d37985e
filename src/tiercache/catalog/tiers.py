"""What this machine knows of tiers: copies that were verified, and the journal of moves. `<state>/tiers.sqlite`.

Durable, and yet nothing hangs on it: a copy that is not on these books is verified anew, a move that is not in the
journal is begun anew. What is lost with the file is work, never data; see tier/mover.py for why. With it go the dates
of first writing: what was moved is then as young as its copies, which is the safe side, for it is deleted later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from tiercache.catalog.checksums import Checksums, batch_of
from tiercache.catalog.database import Database
from tiercache.catalog.files import make_folder

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from pyarrow import RecordBatch

# begun: nothing is promised yet, and where it was stopped it stays so; waiting: grace runs until due_s; dropping:
# deletions may have begun; done; cancelled: another move took its place, or the world changed.
MoveState: TypeAlias = Literal["begun", "waiting", "dropping", "done", "cancelled"]
OPEN_STATES: tuple[MoveState, ...] = ("begun", "waiting", "dropping")
_PRUNED_STATES: tuple[MoveState, ...] = ("begun", "done", "cancelled")
KEPT_S = 90 * 86400.0  # that a move which is over, or was stopped for good, stays in the journal, for people
# That are Python objects while many are read. By 16,384 at a time a million took 2.1 to 2.9 s, by 1,024 at a time 1.3
# to 1.8, but one run in three then held 50 to 100 MiB more; this is between.
_ROWS_AT_A_TIME = 1 << 12
_MOST_VARIABLES = 500  # SQLite takes 999 at least

_SCHEMA = """
CREATE TABLE copies (
    place TEXT NOT NULL, key TEXT NOT NULL, n_bytes INTEGER NOT NULL, etag TEXT, crc32c INTEGER,
    made_from TEXT NOT NULL, written_s REAL, verified INTEGER NOT NULL,
    PRIMARY KEY (place, key)
) WITHOUT ROWID;
CREATE TABLE moves (
    plan TEXT NOT NULL, number INTEGER NOT NULL, path TEXT NOT NULL, kind TEXT NOT NULL, action TEXT NOT NULL,
    src TEXT NOT NULL, dst TEXT NOT NULL, src_place TEXT NOT NULL, dst_place TEXT NOT NULL, home TEXT NOT NULL,
    rules TEXT NOT NULL, rule TEXT NOT NULL, state TEXT NOT NULL, since_s REAL NOT NULL, due_s REAL NOT NULL,
    objects TEXT NOT NULL, note TEXT NOT NULL, changed_s REAL NOT NULL,
    PRIMARY KEY (plan, number)
) WITHOUT ROWID;
CREATE TABLE marks (place TEXT PRIMARY KEY, mark TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX moves_state ON moves (home, state);
CREATE INDEX moves_path ON moves (home, path);
"""


class KnownCopy(NamedTuple):
    """An object as it was when its bytes were verified. While size and ETag are these, it is that object.

    made_from: the place that a move has copied it from, while that still has its object; else "". With neither ETag nor
    checksum it is one that was about to be made where nothing lay: who finds it half done may make it again.
    written_s: when the object was written first, whatever copy this is; None: its own date counts. verified: False of
    one whose bytes nobody has compared, which is here for its date alone.
    """

    n_bytes: int
    etag: str | None
    crc32c: int | None
    made_from: str = ""
    written_s: float | None = None
    verified: bool = True

    @property
    def is_intended(self) -> bool:
        """Whether it was about to be made, and nobody knows more."""
        return bool(self.made_from) and self.etag is None and self.crc32c is None


class JournalObject(NamedTuple):
    """An object of a journaled move, as it must still be. where: the tier's place, of moves that are about several."""

    key: str
    n_bytes: int
    etag: str | None
    modified_s: float | None
    crc32c: int | None
    where: str = ""


@dataclass(frozen=True, slots=True)
class JournalRow:
    """A move in the journal.

    Attributes:
        plan, number: what names it.
        path, kind, action, src, dst, rule: as the plan has it; dst is "" where there is none.
        src_place, dst_place, home: URLs: names of tiers may mean something else tomorrow.
        rules: SHA-256 of the rule file that asked for it.
        state: how far it is.
        since_s, due_s: when grace began, and when it is over; seconds since the epoch, 0 before.
        objects: those that make it whole last.
        note: why it stopped the last time, for people.
        changed_s: when this row was written.
    """

    plan: str
    number: int
    path: str
    kind: str
    action: str
    src: str
    dst: str
    src_place: str
    dst_place: str
    home: str
    rules: str
    rule: str
    state: MoveState
    since_s: float
    due_s: float
    objects: tuple[JournalObject, ...]
    note: str
    changed_s: float


_COPY = ", ".join(KnownCopy._fields)
_COLUMNS = ", ".join(field.name for field in fields(JournalRow))
_MARKS = ", ".join("?" * len(fields(JournalRow)))


class TierCatalog:
    """The books of this machine. Every method is one short transaction, safe from any thread and process.

    A file that is damaged or gone is made anew, empty. Use as a context manager, or close().
    """

    def __init__(self, path: Path, places: Mapping[str, str] | None = None) -> None:
        """Remember where the file is. places: names of tiers -> their URLs; see bind()."""
        self.path = path
        self._places = dict(places or {})
        # No WAL: a home folder on NFS is where this file lies by default, and there are few commits, each of many rows.
        self._database = Database(
            path, wal=False, make_folder=lambda: make_folder(path.parent, 0o700), prepare=_prepare, durable=True
        )

    def __enter__(self) -> TierCatalog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. It may be used again after it."""
        self._database.close()

    def bind(self, places: Mapping[str, str]) -> None:
        """Say what names of tiers mean from now on: copies are known by URLs, which outlive names."""
        self._places = dict(places)

    def place(self, tier: str) -> str:
        """The URL that a tier's name stands for; a URL stands for itself."""
        return self._places.get(tier, tier)

    # -- copies -----------------------------------------------------------------------------------------------------

    def checksums(self, tier: str) -> Checksums:
        """Of each object of a tier: size, ETag, CRC-32C, whether it was verified, when the object was written first.

        With another ETag it is another.
        """
        known = "(etag IS NOT NULL OR crc32c IS NOT NULL)"
        columns = "key, n_bytes, etag, crc32c, verified, written_s"
        query = f"SELECT {columns} FROM copies WHERE place = ? AND {known} ORDER BY key"  # noqa: S608

        def work(db: sqlite3.Connection) -> list[RecordBatch]:
            rows = db.execute(query, (self.place(tier),))
            return [batch_of(some) for some in iter(lambda: rows.fetchmany(_ROWS_AT_A_TIME), [])]

        return Checksums(self._database.run(work))

    def known(self, tier: str, keys: Iterable[str]) -> Mapping[str, KnownCopy]:
        """What is known of these objects."""
        place, wanted = self.place(tier), [*keys]

        def work(db: sqlite3.Connection) -> dict[str, KnownCopy]:
            found: dict[str, KnownCopy] = {}
            for start in range(0, len(wanted), _MOST_VARIABLES):
                some = wanted[start : start + _MOST_VARIABLES]
                marks = ", ".join("?" * len(some))
                query = f"SELECT key, {_COPY} FROM copies WHERE place = ? AND key IN ({marks})"  # noqa: S608
                found.update(map(_known, db.execute(query, (place, *some))))
            return found

        return self._database.run(work)

    def record(self, copies: Iterable[tuple[str, str, KnownCopy]]) -> None:
        """Note copies: (tier, key, what it is) each."""
        rows = [(self.place(tier), key, *one) for tier, key, one in copies]
        if rows:
            query = f"INSERT OR REPLACE INTO copies (place, key, {_COPY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
            self._database.run(lambda db: db.executemany(query, rows))

    def keep(self, copies: Iterable[tuple[str, str]]) -> None:
        """Note that what copies were made from goes: they may be the last of their bytes. (tier, key) each."""
        rows = [(self.place(tier), key) for tier, key in copies]
        if rows:
            query = "UPDATE copies SET made_from = '' WHERE place = ? AND key = ?"
            self._database.run(lambda db: db.executemany(query, rows))

    def forget(self, copies: Iterable[tuple[str, str]]) -> None:
        """Note that copies are gone, or no longer to be believed: (tier, key) each."""
        rows = [(self.place(tier), key) for tier, key in copies]
        if rows:
            self._database.run(lambda db: db.executemany("DELETE FROM copies WHERE place = ? AND key = ?", rows))

    # -- places -----------------------------------------------------------------------------------------------------

    def mark(self, tier: str) -> str | None:
        """What was found in a tier that tells it from an empty folder of its name; None: it was never looked at."""
        query, place = "SELECT mark FROM marks WHERE place = ?", self.place(tier)
        found = self._database.run(lambda db: db.execute(query, (place,)).fetchone())
        return None if found is None else str(found[0])

    def remember_mark(self, tier: str, mark: str) -> None:
        """Note what tells a tier from an empty folder of its name."""
        row = self.place(tier), mark
        self._database.run(lambda db: db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", row))

    # -- the journal ------------------------------------------------------------------------------------------------

    def write(self, rows: Sequence[JournalRow], *, instead_of: Iterable[tuple[str, int]] = ()) -> None:
        """Put these rows into the journal, whole, in the place of what it had of the same moves; all or none.

        instead_of: (plan, number) of rows that they take the place of, too.
        """
        values, gone = [_values(row) for row in rows], [*instead_of]

        def work(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM moves WHERE plan = ? AND number = ?", gone)
            db.executemany(f"INSERT OR REPLACE INTO moves ({_COLUMNS}) VALUES ({_MARKS})", values)  # noqa: S608

        if values or gone:
            self._database.run(work)

    def of_plan(self, plan: str) -> Mapping[int, JournalRow]:
        """What the journal has of a plan, by number."""
        return {row.number: row for row in self._rows("plan = ?", (plan,))}

    def open_moves(self, home: str, *states: MoveState) -> tuple[JournalRow, ...]:
        """The moves of a home that are in one of these states (none: in any that is not over), by plan and number."""
        wanted = states or OPEN_STATES
        marks = ", ".join("?" * len(wanted))
        return self._rows(f"home = ? AND state IN ({marks})", (home, *wanted))

    def waiting_homes(self) -> Mapping[str, int]:
        """Of each home how many moves wait, also of those that no rule file has by now: they are never forgotten."""
        query = "SELECT home, COUNT(*) FROM moves WHERE state IN ('waiting', 'dropping') GROUP BY home ORDER BY home"
        return dict(self._database.run(lambda db: db.execute(query).fetchall()))

    def prune(self, now_s: float) -> None:
        """Forget moves that have long been over, and those that were stopped long ago and that no plan has now."""
        marks = ", ".join("?" * len(_PRUNED_STATES))
        query = f"DELETE FROM moves WHERE state IN ({marks}) AND changed_s < ?"  # noqa: S608
        self._database.run(lambda db: db.execute(query, (*_PRUNED_STATES, now_s - KEPT_S)))

    def _rows(self, where: str, values: tuple[object, ...]) -> tuple[JournalRow, ...]:
        query = f"SELECT {_COLUMNS} FROM moves WHERE {where} ORDER BY changed_s, plan, number"  # noqa: S608
        rows = self._database.run(lambda db: db.execute(query, values).fetchall())
        return tuple(_row(row) for row in rows)


def _prepare(db: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";\n"):
        if statement.strip():
            db.execute(statement)


def _known(values: tuple[str, int, str | None, int | None, str, float | None, int]) -> tuple[str, KnownCopy]:
    key, n_bytes, etag, crc, made_from, written_s, verified = values
    return key, KnownCopy(n_bytes, etag, crc, made_from, written_s, bool(verified))


def _values(row: JournalRow) -> tuple[object, ...]:
    if row.state not in get_args(MoveState):
        raise ValueError(f"a move is in one of the states {get_args(MoveState)}, got {row.state!r}")
    values = {field.name: getattr(row, field.name) for field in fields(JournalRow)}
    return tuple((values | {"objects": json.dumps(row.objects)}).values())


def _row(values: tuple[object, ...]) -> JournalRow:
    named = dict(zip((field.name for field in fields(JournalRow)), values, strict=True))
    objects = tuple(JournalObject(*one) for one in json.loads(str(named["objects"])))
    return JournalRow(**(named | {"objects": objects}))  # type: ignore[arg-type]
