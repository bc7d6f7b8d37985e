"""A database that may vanish, rot, be busy, and be forked over."""

import os
import sqlite3

import pytest

from tiercache.catalog import Database

# From Python 3.12 on: what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def prepare(db):
    db.execute("CREATE TABLE t (x)")
    db.execute("INSERT INTO t VALUES ('new')")


@pytest.fixture
def database(tmp_path):
    database = Database(
        tmp_path / "c.sqlite", wal=True, make_folder=lambda: tmp_path.mkdir(exist_ok=True), prepare=prepare
    )
    yield database
    database.close()


def add(database, value):
    database.run(lambda db: db.execute("INSERT INTO t VALUES (?)", (value,)))


def values(database):
    return [x for (x,) in database.run(lambda db: db.execute("SELECT x FROM t ORDER BY rowid").fetchall())]


def test_a_new_file_is_prepared_once(database):
    add(database, 1)
    database.close()
    assert values(database) == ["new", 1]


def test_work_that_raises_changes_nothing(database):
    def work(db):
        db.execute("INSERT INTO t VALUES (2)")
        raise KeyError

    with pytest.raises(KeyError):
        database.run(work)
    assert values(database) == ["new"]


@pytest.mark.parametrize("content", [b"garbage" * 2000, b"", b"SQLite format 3\0" + b"\xff" * 5000])
@pytest.mark.parametrize("opened", [True, False])
def test_a_damaged_file_is_replaced(database, content, opened):
    add(database, 1)
    if not opened:
        database.close()
    database.path.write_bytes(content)
    if not opened:
        assert values(database) == ["new"]
    else:
        assert values(database) in (["new"], ["new", 1])  # the open connection may still know the old pages


def test_a_file_that_vanished_or_was_replaced_is_noticed(database, tmp_path):
    add(database, 1)
    database.path.unlink()
    assert values(database) == ["new"]
    other = Database(database.path, wal=True, make_folder=lambda: None, prepare=prepare)
    other.replace()
    add(other, 7)
    assert values(database) == ["new", 7]
    other.close()


def test_a_lost_table_is_made_anew(database):
    database.run(lambda db: db.execute("DROP TABLE t"))
    assert values(database) == ["new"]


def test_a_busy_file_is_an_error_and_not_replaced(database, monkeypatch):
    monkeypatch.setattr("tiercache.catalog.database.BUSY_S", 0.02)
    add(database, 1)
    database.close()
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        add(database, 2)
    other.execute("ROLLBACK")
    other.close()
    assert values(database) == ["new", 1]


def test_parent_and_forked_child_write_the_same_file(database):
    add(database, "parent before")
    pid = os.fork()
    if pid == 0:
        try:
            for i in range(20):
                add(database, i)
        finally:
            os._exit(0)
    for i in range(20):
        add(database, i)
    os.waitpid(pid, 0)
    assert len(values(database)) == 42
    assert database.run(lambda db: db.execute("PRAGMA integrity_check").fetchone()) == ("ok",)


def test_no_connection_is_open_while_the_process_forks(database):
    add(database, 1)
    assert database._connection is not None
    pid = os.fork()
    if pid == 0:
        os._exit(0 if database._connection is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
