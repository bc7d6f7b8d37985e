"""A SQLite file that may vanish, be damaged or busy, and be used over a fork."""

import fcntl
import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from threading import Event, Thread

import pytest

from tiercache.cache.folder import is_disk_full
from tiercache.store.shared_files import Database
from tiercache.waiting import wait_for

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


def test_work_that_raises_changes_nothing(database):
    def work(db):
        db.execute("INSERT INTO t VALUES (2)")
        raise KeyError

    with pytest.raises(KeyError):
        database.run(work)
    assert values(database) == ["new"]


def test_a_damaged_file_is_replaced(database):
    for content, is_open in product((b"garbage" * 2000, b"", b"SQLite format 3\0" + b"\xff" * 5000), (True, False)):
        database.replace()
        add(database, 1)
        if not is_open:
            database.close()
        database.path.write_bytes(content)
        found = values(database)  # an open connection may still know the old pages
        assert found == ["new"] or (is_open and found == ["new", 1]), (content, is_open)


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


def test_a_file_that_was_emptied_in_place_is_made_anew_at_once_though_others_have_it_open(database, monkeypatch):
    monkeypatch.setattr("tiercache.store.shared_files.BUSY_S", 60.0)  # it would be waited for that long
    add(database, 1)
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("SELECT * FROM t").fetchall()
    os.truncate(database.path, 0)
    newcomer = Database(database.path, wal=True, make_folder=lambda: None, prepare=database._prepare)
    assert values(newcomer) == ["new"]
    add(database, 2)
    assert values(newcomer) == values(database) == ["new", 2]
    newcomer.close()
    other.close()


def test_a_file_that_is_replaced_while_it_is_opened_is_not_written_to(database, monkeypatch):
    monkeypatch.setattr("tiercache.store.shared_files.BUSY_S", 0.05)
    really = database._set_up

    def set_up(connection):
        monkeypatch.setattr(database, "_set_up", really)
        really(connection)
        for path in database.path.parent.glob("c.sqlite*"):
            path.unlink()  # where locks lie two may be at the door
        other = Database(database.path, wal=True, make_folder=lambda: None, prepare=prepare)
        add(other, "theirs")
        other.close()

    monkeypatch.setattr(database, "_set_up", set_up)
    add(database, "lost")
    add(database, "ours")
    assert values(database) == ["new", "theirs", "ours"]


def test_a_busy_file_is_an_error_and_not_replaced(database, monkeypatch):
    monkeypatch.setattr("tiercache.store.shared_files.BUSY_S", 0.02)
    add(database, 1)
    database.close()
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match="locked"):
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


def test_the_files_are_private(tmp_path):
    for umask, wal in product((0o000, 0o022, 0o077, 0o777), (True, False)):
        folder = tmp_path / f"{umask}-{wal}"
        folder.mkdir()
        before = os.umask(umask)
        try:
            database = Database(folder / "c.sqlite", wal=wal, make_folder=lambda: None, prepare=prepare)
            add(database, 1)
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
            database.close()
        finally:
            os.umask(before)
        assert set(modes.values()) == {0o600}, umask
        assert ("c.sqlite-wal" in modes) == wal
        (folder / "c.sqlite").chmod(0o666)
        assert values(database) == ["new", 1]
        assert stat.S_IMODE((folder / "c.sqlite").stat().st_mode) == 0o600, umask
        database.close()


def test_a_link_under_its_name_is_removed_and_its_target_kept(database, tmp_path):
    names = ("c.sqlite", "c.sqlite-wal", "c.sqlite-shm", "c.sqlite-journal", "c.lock")
    for name, is_there in product(names, (True, False)):
        add(database, 1)
        database.close()
        target = tmp_path / f"target-{name}-{is_there}"
        if is_there:
            target.write_text("keep")
        link = tmp_path / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        add(database, 2)
        assert values(database)[-1] == 2
        assert target.exists() == is_there, name
        assert not is_there or target.read_text() == "keep", name
        database.close()
        link.unlink(missing_ok=True)


def test_threads_that_wait_for_a_busy_file_give_up_together(database, monkeypatch):
    """One after the other, the last of thirty threads would wait for minutes."""
    monkeypatch.setattr("tiercache.store.shared_files.BUSY_S", 0.3)
    add(database, 1)
    database.close()
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    tries, errors = [], []
    really_attempt = database._attempt

    def attempt(work, connection):
        tries.append(work)
        return really_attempt(work, connection)

    monkeypatch.setattr(database, "_attempt", attempt)

    def work():
        try:
            add(database, 2)
        except OSError as error:
            errors.append(str(error))

    with database._lock:  # so that all have come before the first of them tries
        threads = [Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        monkeypatch.setattr(database, "_gave_up", None)
    for thread in threads:
        thread.join()
    other.execute("ROLLBACK")
    other.close()
    assert len(errors) == 8
    assert all("locked" in error for error in errors)
    assert len(tries) < 8
    add(database, 3)
    assert values(database) == ["new", 1, 3]


def test_a_full_disk_is_reported_and_the_file_kept(database, monkeypatch):
    add(database, 1)

    def work(db):
        db.execute("PRAGMA max_page_count = 3")
        db.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 100)

    with pytest.raises(OSError, match="full") as caught:
        database.run(work)
    assert is_disk_full(caught.value)
    database.close()
    assert values(database) == ["new", 1]


def test_file_errors_are_os_errors_and_sql_errors_are_not(tmp_path, database):
    (tmp_path / "x").mkdir()
    nowhere = Database(tmp_path / "x" / "c.sqlite" / "below", wal=True, make_folder=lambda: None, prepare=prepare)
    with pytest.raises(FileNotFoundError):
        nowhere.run(lambda db: None)
    (tmp_path / "d.sqlite").mkdir()
    folder = Database(tmp_path / "d.sqlite", wal=True, make_folder=lambda: None, prepare=prepare)
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on who says it first
        folder.run(lambda db: None)

    def wrong(db):
        db.execute("CREATE TABLE u (x CHECK (x > 0))")
        db.execute("INSERT INTO u VALUES (0)")

    with pytest.raises(sqlite3.IntegrityError):
        database.run(wrong)
    assert values(database) == ["new"]


def test_a_file_that_another_process_is_making_is_waited_for(database, tmp_path):
    (tmp_path / "c.sqlite").touch()
    other = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")  # SQLite lets nobody else make a log meanwhile, and does not wait for it
    asked = Event()
    connection_of = sqlite3.connect

    def connect(*args, **options):
        asked.set()
        return connection_of(*args, **options)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(sqlite3, "connect", connect)
        found = pool.submit(values, database)
        assert asked.wait(10)
        assert not wait_for(found.done, 0.1)
        other.execute("COMMIT")
        assert found.result(10) == []
    other.close()


def test_a_file_that_another_process_has_replaced_is_not_replaced_again(database, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda fd, operation: None)  # or the other one would wait at the door
    set_up, spoilt = Database._set_up, []

    def set_up_late(self, connection):
        if self is database and not spoilt:
            spoilt.append(connection)
            for suffix in ("", "-wal", "-shm"):
                (tmp_path / f"c.sqlite{suffix}").unlink(missing_ok=True)
            other = Database(tmp_path / "c.sqlite", wal=True, make_folder=lambda: None, prepare=prepare)
            add(other, "theirs")
            other.close()
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        set_up(self, connection)

    monkeypatch.setattr(Database, "_set_up", set_up_late)
    assert values(database) == ["new", "theirs"]
