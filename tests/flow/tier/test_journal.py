"""The catalog of tiers: entries of copies, and the journal of moves."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from tiercache.tier.journal import CatalogEntry, JournalRow, PlannedObject, TierCatalog

OBJECTS = (PlannedObject("a/1", 10, '"e"', 5.5, 7), PlannedObject("a/.metadata", 1, None, None, None, "hot"))
ROW = JournalRow(
    plan="plan", number=1, path="a", kind="checkpoint", action="move", src="hot", dst="cold", src_url="/nvme",
    dst_url="s3://cold", home="s3://home", rules="sha", rule="rules[1]", state="begun", objects=OBJECTS,
    changed_s=100.0,
)  # fmt: skip


@pytest.fixture
def catalog(tmp_path):
    with TierCatalog(tmp_path / "state" / "tiers.sqlite", {"cold": "s3://cold"}) as catalog:
        yield catalog


def checksums(catalog, tier):
    return {key: (*values,) for key, *values in (row.values() for row in catalog.checksums(tier).to_pylist())}


def test_entries_are_kept_by_the_url_of_a_tier(catalog):
    catalog.record([("cold", "k", CatalogEntry(3, '"e"', 9))])
    assert checksums(catalog, "cold") == checksums(catalog, "s3://cold") == {"k": (3, '"e"', 9, True, None)}
    catalog.bind({"cold": "s3://other"})
    assert checksums(catalog, "cold") == {}


def test_a_catalog_with_other_columns_is_made_anew(catalog):
    catalog.path.parent.mkdir()
    with closing(sqlite3.connect(catalog.path)) as db:
        db.execute("CREATE TABLE copies (place TEXT, key TEXT, n_bytes INTEGER, etag TEXT, crc32c INTEGER)")
        db.commit()
    assert checksums(catalog, "cold") == {}
    catalog.record([("cold", "k", CatalogEntry(3, '"e"', 9))])
    assert list(checksums(catalog, "cold")) == ["k"]


def test_a_move_comes_back_from_the_journal_as_it_was_written(catalog):
    catalog.write([ROW])
    assert catalog.of_plan("plan") == {1: ROW}
    later = replace(ROW, state="waiting", due_s=5.0, since_s=1.0, note="why")
    catalog.write([later])
    assert catalog.of_plan("plan") == {1: later}


def test_old_stopped_moves_are_pruned_and_interrupted_ones_are_not(catalog):
    states = ("stopped", "begun", "dropping")
    catalog.write([replace(ROW, number=number, state=state) for number, state in enumerate(states)])
    catalog.prune(100.0 + 91 * 86400)
    assert [row.state for row in catalog.of_plan("plan").values()] == ["begun", "dropping"]


def test_rows_are_replaced_in_one_transaction(catalog):
    catalog.write([ROW, replace(ROW, number=2)])
    with pytest.raises(ValueError, match="one of the states"):
        catalog.write([replace(ROW, number=3, state="lost")], instead_of=[("plan", 1)])
    assert list(catalog.of_plan("plan")) == [1, 2]
    catalog.write([replace(ROW, number=3)], instead_of=[("plan", 1)])
    assert list(catalog.of_plan("plan")) == [2, 3]


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_a_damaged_file_is_made_anew(catalog, content):
    catalog.write([ROW])
    catalog.close()
    catalog.path.write_bytes(content)
    assert catalog.of_plan("plan") == {}
    catalog.write([ROW])
    assert catalog.of_plan("plan") == {1: ROW}


def test_committed_rows_survive_a_power_failure(catalog):
    catalog.write([ROW])
    found = catalog._database.run(lambda db: db.execute("PRAGMA synchronous").fetchone()[0])
    assert found == 2  # FULL


def test_the_state_folder_is_private(catalog):
    catalog.write([ROW])
    assert catalog.path.stat().st_mode & 0o777 == 0o600
    assert catalog.path.parent.stat().st_mode & 0o777 == 0o700
