"""This machine's catalog of tiers: verified copies, and the journal of moves, in `<state>/tiers.sqlite`.

The file is durable, but nothing depends on it: a copy without an entry is verified again, a move without a journal row
is started again. If the file is lost, work is lost, never data; the package's docstring gives the reasons. The dates of
first writing are lost too: a moved object then counts as young as its copies, which is the safe side, because it is
deleted later.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import pyarrow as pa

from tiercache.store.shared_files import Database, make_folder

# -- the catalog and the journal -------------------------------------------------------------------------------------

# Columns of the objects of a tier, see TierCatalog.checksums().
_ENTRY_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("n_bytes", pa.int64()),
        ("etag", pa.large_string()),
        ("crc32c", pa.int64()),
        ("verified", pa.bool_()),
        ("written_s", pa.float64()),
    ]
)


def entry_table(batches: Iterable[Sequence[Sequence[Any]]]) -> pa.Table:
    made = []
    for rows in batches:
        columns = [*zip(*rows, strict=True)] or [()] * len(_ENTRY_SCHEMA)
        columns[4] = tuple(map(bool, columns[4]))
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _ENTRY_SCHEMA, strict=True)]
        made.append(pa.RecordBatch.from_arrays(arrays, schema=_ENTRY_SCHEMA))
    return pa.Table.from_batches(made, _ENTRY_SCHEMA)


# begun: The journal has the move; nothing that readers rely on has changed. Parts of its copy may be in dst. The next
#   run finishes the copy or removes the parts, before it lists the tiers (mover.py).
# stopped: The move was not made, for the reason in `note`, and dst has no part of its copy (if the rule file still has
#   that tier). The next plan replaces the row, or prune() deletes it.
# waiting: The copies, if there are any, and the placement are made; the grace period runs until due_s. Deletions that
#   a check postponed keep this state.
# dropping: The grace period is over, and deletions may have been made. The next run finishes them.
# done: Nothing is left to do.
# cancelled: Another move of the path replaced it, or objects or rules changed before the deletions.
MoveState: TypeAlias = Literal["begun", "stopped", "waiting", "dropping", "done", "cancelled"]
OPEN_STATES: tuple[MoveState, ...] = ("begun", "stopped", "waiting", "dropping")
_PRUNED_STATES: tuple[MoveState, ...] = ("stopped", "done", "cancelled")
KEPT_S = 90 * 86400.0  # finished and stopped moves stay in the journal for this time, for people
# Rows that are Python objects at once while many are read. A million rows took 2.1 to 2.9 s with 16,384, and 1.3 to 1.8
# s with 1,024, which used 50 to 100 MiB more in one run of three; this is between.
_ROWS_AT_A_TIME = 1 << 12

# `place` is the URL of a tier.
_SCHEMA = """
CREATE TABLE copies (
    place TEXT NOT NULL, key TEXT NOT NULL, n_bytes INTEGER NOT NULL, etag TEXT, crc32c INTEGER,
    written_s REAL, verified INTEGER NOT NULL,
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


class CatalogEntry(NamedTuple):
    """Catalog entry: what this machine knows of an object in a tier.

    While size and ETag are equal, the object is the one of the entry. A verified entry proves that the copy is good: it
    describes the object as it was when its bytes were compared. An entry that is not verified, with a checksum, is that
    of a damaged copy; without one, nobody has compared the bytes.
    """

    n_bytes: int
    etag: str | None
    crc32c: int | None  # that the object must have; None if unknown
    written_s: float | None = None  # when it was first written, whichever copy this is; None: its own date counts
    verified: bool = True  # False if nobody has compared its bytes, or if they were found wrong since


class PlannedObject(NamedTuple):
    """An object of a move, as it was listed. The mover does not move an object that has changed since."""

    key: str  # below the tier's URL
    n_bytes: int
    etag: str | None = None
    modified_s: float | None = None
    crc32c: int | None = None  # if the store, the manifest or the catalog knows it
    tier: str = ""  # in the journal of a move that covers several tiers
    # Whether dst lacked the object when the journal recorded a copy or move, before its first byte was copied: an
    # object that dst has now under this key was made by this move.
    was_absent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRow:
    """A move in the journal, which plan and number identify. URLs, because the names may mean other tiers later."""

    plan: str
    number: int
    path: str
    kind: str
    action: str
    src: str
    dst: str  # "" where there is none
    src_url: str
    dst_url: str
    home: str  # URL of the home tier
    rules: str  # SHA-256 of the rule file that asked for the move
    rule: str
    state: MoveState  # "begun": in progress, or interrupted
    since_s: float = 0.0  # start and end of the grace period, in seconds since the epoch; 0 before it begins
    due_s: float = 0.0
    objects: tuple[PlannedObject, ...]  # the completing object of the group is last
    note: str = ""  # reason why the move stopped last time, for people
    changed_s: float  # when this row was written


_COPY = ", ".join(CatalogEntry._fields)
_FIELDS = tuple(field.name for field in fields(JournalRow))
# The file keeps the first names of its columns.
_COLUMNS = tuple({"src_url": "src_place", "dst_url": "dst_place"}.get(name, name) for name in _FIELDS)


class TierCatalog:
    """The catalog of tiers of this machine. Every method is one short transaction. Thread-safe and process-safe.

    A damaged or missing file is made anew, empty. Use it as a context manager, or call close().
    """

    def __init__(self, path: Path, urls: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._urls = dict(urls or {})
        # No WAL: by default the file is in a home folder, which may be on NFS, and there are few commits, each of many
        # rows.
        self._database = Database(
            path, wal=False, make_folder=lambda: make_folder(path.parent, 0o700), prepare=_prepare, durable=True
        )

    def __enter__(self) -> TierCatalog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def bind(self, urls: Mapping[str, str]) -> None:
        """Set the URLs of tier names. Entries are kept by URL, because URLs outlive names."""
        self._urls = dict(urls)

    def url(self, tier: str) -> str:
        return self._urls.get(tier, tier)

    # -- copies -----------------------------------------------------------------------------------------------------

    def checksums(self, tier: str) -> pa.Table:
        """Return the entries of a tier's objects, sorted by key, which is unique.

        Columns: key, n_bytes, etag, crc32c, verified, written_s. An object with another ETag is another object.
        """
        names = ", ".join(_ENTRY_SCHEMA.names)
        query = f"SELECT {names} FROM copies WHERE place = ? ORDER BY key"  # noqa: S608

        def work(db: sqlite3.Connection) -> pa.Table:
            rows = db.execute(query, (self.url(tier),))
            return entry_table(iter(lambda: rows.fetchmany(_ROWS_AT_A_TIME), []))

        return self._database.run(work)

    def has_entries(self, tier: str) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM copies WHERE place = ?)"
        return bool(self._database.run(lambda db: db.execute(query, (self.url(tier),)).fetchone()[0]))

    def entries(self, tier: str, keys: Iterable[str]) -> Mapping[str, CatalogEntry]:
        url, wanted = self.url(tier), [*keys]
        query = f"SELECT {_COPY} FROM copies WHERE place = ? AND key = ?"  # noqa: S608

        def work(db: sqlite3.Connection) -> dict[str, CatalogEntry]:
            rows = ((key, db.execute(query, (url, key)).fetchone()) for key in wanted)
            return {key: CatalogEntry(*row)._replace(verified=bool(row[-1])) for key, row in rows if row is not None}

        return self._database.run(work)

    def record(self, copies: Iterable[tuple[str, str, CatalogEntry]]) -> None:
        rows = [(self.url(tier), key, *entry) for tier, key, entry in copies]
        if rows:
            query = f"INSERT OR REPLACE INTO copies (place, key, {_COPY}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
            self._database.run(lambda db: db.executemany(query, rows))

    def forget(self, copies: Iterable[tuple[str, str]]) -> None:
        rows = [(self.url(tier), key) for tier, key in copies]
        if rows:
            self._database.run(lambda db: db.executemany("DELETE FROM copies WHERE place = ? AND key = ?", rows))

    # -- markers of tiers -------------------------------------------------------------------------------------------

    def mount_marker(self, tier: str) -> str | None:
        query, url = "SELECT mark FROM marks WHERE place = ?", self.url(tier)
        found = self._database.run(lambda db: db.execute(query, (url,)).fetchone())
        return None if found is None else str(found[0])

    def record_mount_marker(self, tier: str, marker: str) -> None:
        row = self.url(tier), marker
        self._database.run(lambda db: db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", row))

    # -- the journal ------------------------------------------------------------------------------------------------

    def write(self, rows: Sequence[JournalRow], *, instead_of: Iterable[tuple[str, int]] = ()) -> None:
        """Write rows into the journal, replacing the rows of the same moves, all in one transaction.

        instead_of: (plan, number) of further rows that are deleted.
        """
        values, gone = [_values(row) for row in rows], [*instead_of]
        marks = ", ".join("?" * len(_COLUMNS))
        query = f"INSERT OR REPLACE INTO moves ({', '.join(_COLUMNS)}) VALUES ({marks})"  # noqa: S608

        def work(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM moves WHERE plan = ? AND number = ?", gone)
            db.executemany(query, values)

        if values or gone:
            self._database.run(work)

    def of_plan(self, plan: str) -> Mapping[int, JournalRow]:
        return {row.number: row for row in self._rows("plan = ?", (plan,))}

    def open_moves(self, home: str, *states: MoveState) -> tuple[JournalRow, ...]:
        wanted = states or OPEN_STATES
        marks = ", ".join("?" * len(wanted))
        return self._rows(f"home = ? AND state IN ({marks})", (home, *wanted))

    def prune(self, now_s: float) -> None:
        """Delete old rows of finished moves, and of moves that stopped before anything was promised."""
        marks = ", ".join("?" * len(_PRUNED_STATES))
        query = f"DELETE FROM moves WHERE state IN ({marks}) AND changed_s < ?"  # noqa: S608
        self._database.run(lambda db: db.execute(query, (*_PRUNED_STATES, now_s - KEPT_S)))

    def _rows(self, where: str, values: tuple[object, ...]) -> tuple[JournalRow, ...]:
        query = f"SELECT {', '.join(_COLUMNS)} FROM moves WHERE {where} ORDER BY changed_s, plan, number"  # noqa: S608
        rows = self._database.run(lambda db: db.execute(query, values).fetchall())
        return tuple(_row(row) for row in rows)


def _prepare(db: sqlite3.Connection) -> None:
    for statement in filter(str.strip, _SCHEMA.split(";\n")):
        db.execute(statement)


def _values(row: JournalRow) -> tuple[object, ...]:
    if row.state not in get_args(MoveState):
        raise ValueError(f"a move is in one of the states {get_args(MoveState)}, got {row.state!r}")
    return tuple(json.dumps(row.objects) if name == "objects" else getattr(row, name) for name in _FIELDS)


def _row(values: tuple[Any, ...]) -> JournalRow:
    row = dict(zip(_FIELDS, values, strict=True))
    return JournalRow(**row | {"objects": tuple(PlannedObject(*one) for one in json.loads(row["objects"]))})
