"""The stores of a rule file's tiers, and the state of a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import NotFound
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder, MemoryStore
from tiercache.tier.model import ARCHIVED, READABLE, RESTORED, RESTORING
from tiercache.tier.rules import RuleFile, Tier, load_rule_file
from tiercache.tier.stores import Stores, restored_until, state_of

GOES = 'ongoing-request="true"'
STAYS = 'ongoing-request="false", expiry-date="Fri, 21 Dec 2012 00:00:00 GMT"'
STAYS_UNTIL_S = 1_356_048_000.0


def info_of(storage_class=None, restore=None):
    return ObjectInfo("a", 1, storage_class=storage_class, restore=restore)


@pytest.fixture
def rules(tmp_path):
    """A rule file of tiers given as their tables' texts."""

    def write(**tiers):
        path = tmp_path / "tiercache.toml"
        path.write_text("".join(f"[tiers.{name}]\n{text}\n" for name, text in tiers.items()))
        return load_rule_file(path)

    return write


# -- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage_class", "restore", "state"),
    [
        (None, None, READABLE),
        ("STANDARD", None, READABLE),
        ("GLACIER_IR", None, READABLE),
        ("GLACIER", None, ARCHIVED),
        ("DEEP_ARCHIVE", None, ARCHIVED),
        ("GLACIER", GOES, RESTORING),
        ("DEEP_ARCHIVE", STAYS, RESTORED),
        ("INTELLIGENT_TIERING", None, READABLE),
        ("INTELLIGENT_TIERING", 'archive-status="DEEP_ARCHIVE_ACCESS"', ARCHIVED),
        ("INTELLIGENT_TIERING", GOES, RESTORING),
    ],
)
def test_the_restore_field_decides_the_state_and_the_storage_class_without_it(storage_class, restore, state):
    assert state_of(info_of(storage_class, restore)) == state


@pytest.mark.parametrize(("now_s", "state"), [(STAYS_UNTIL_S - 1, RESTORED), (STAYS_UNTIL_S, ARCHIVED)])
def test_a_restored_copy_that_has_expired_is_archived(now_s, state):
    assert state_of(info_of("GLACIER", STAYS), now_s) == state


def test_the_expiry_of_a_restored_copy_is_parsed():
    assert restored_until(info_of("GLACIER", STAYS)) == STAYS_UNTIL_S


@given(st.text())
def test_any_restore_field_has_a_state(said):
    assert state_of(info_of("GLACIER", said), 0.0) in (ARCHIVED, RESTORING, RESTORED)


def test_an_invalid_expiry_is_unknown():
    assert restored_until(info_of("GLACIER", 'ongoing-request="false", expiry-date="soon"')) is None


# -- stores ---------------------------------------------------------------------------------------------------------


def test_the_store_of_a_tier_is_opened_once(rules, tmp_path):
    with Stores(rules(hot=f"url = '{tmp_path / 'hot'}'")) as stores:
        assert isinstance(stores.store("hot"), LocalFolder)
        assert stores.store("hot") is stores.store("hot")


def test_a_given_store_replaces_that_of_the_url(rules):
    given_store = MemoryStore()
    with Stores(rules(hot="url = 's3://bucket'"), stores={"hot": given_store}) as stores:
        assert (stores.store("hot") is given_store, stores.s3_classes("hot")) == (True, None)


def test_a_local_tier_has_no_archive(rules, tmp_path):
    with Stores(rules(hot=f"url = '{tmp_path}'")) as stores:
        assert stores.s3_classes("hot") is None


def test_a_storage_class_without_boto3_is_an_error_that_names_the_extra(rules, monkeypatch):
    monkeypatch.setattr("tiercache.tier.stores.has_boto3", lambda: False)
    file = rules(standard="url = 's3://b'", archive="url = 's3://c'\nstorage_class = 'GLACIER'")
    with Stores(file) as stores:
        assert stores.s3_classes("standard") is None
        with pytest.raises(ValueError, match=r"tiers.archive.storage_class.*tiercache-data\[archive\]"):
            stores.s3_classes("archive")


def test_listing_and_head_of_a_local_tier_are_those_of_its_store(rules, tmp_path):
    with Stores(rules(hot=f"url = '{tmp_path / 'hot'}'")) as stores:
        stores.store("hot").put("a/b", b"12")
        assert [(info.key, info.n_bytes) for info in stores.listing("hot", "a/")] == [("a/b", 2)]
        assert stores.head("hot", "a/b").n_bytes == 2
        with pytest.raises(NotFound):
            stores.head("hot", "c")


# -- places ---------------------------------------------------------------------------------------------------------


def two_tiers(first, second, **more):
    """A rule file of two tiers that no file would pass."""
    tiers = (Tier(name="hot", role="hot", url=first), Tier(name="cold", role="archive", url=second, **more))
    return RuleFile(path=Path("rules.toml"), sha256="", tiers=tiers)


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("s3://b/x", "s3://b/x/", True),
        ("s3://b/x", "s3a://b/x", True),
        ("s3://b/x", "s3://b/y", False),
        ("s3://b/x", "gs://b/x", False),
        ("memory://b/x", "memory://b/x/", True),
    ],
)
def test_two_urls_may_be_the_same_location(first, second, is_same):
    with Stores(two_tiers(first, second)) as stores:
        assert stores.same_url("hot", "cold") == is_same


def test_a_symbolic_link_is_the_location_of_its_target(rules, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Stores(rules(hot=f"url = '{tmp_path / 'real'}'", standard=f"url = '{tmp_path / 'link'}'")) as stores:
        assert stores.same_url("hot", "standard")


def test_one_bucket_name_at_two_endpoints_is_two_locations():
    with Stores(two_tiers("s3://b/x", "s3://b/x", storage_options={"endpoint": "http://two"})) as stores:
        assert not stores.same_url("hot", "cold")


@pytest.mark.parametrize(
    ("storage_class", "tier"),
    [("STANDARD", "standard"), (None, "standard"), ("GLACIER", "archive"), ("STANDARD_IA", "standard")],
)
def test_an_object_belongs_to_the_tier_of_its_storage_class(rules, storage_class, tier):
    file = rules(standard="url = 's3://b'", archive="url = 's3://b'\nstorage_class = 'GLACIER'")
    with Stores(file) as stores:
        assert stores.tier_of(stores.sharing("standard"), info_of(storage_class)) == tier


def test_the_first_tier_of_a_url_has_objects_of_other_classes(rules):
    tables = {
        name: f"url = 's3://b'\nstorage_class = '{name.upper()}'\nrole = 'archive'"
        for name in ("glacier_ir", "glacier")
    }
    with Stores(rules(hot="url = '/x'", **tables)) as stores:
        assert stores.tier_of(stores.sharing("glacier"), info_of("STANDARD")) == "glacier_ir"


# -- capacity -------------------------------------------------------------------------------------------------------


def test_a_percentage_refers_to_the_disk_of_the_folder(rules, tmp_path, monkeypatch):
    monkeypatch.setattr("tiercache.tier.stores.shutil.disk_usage", lambda path: type("Usage", (), {"total": 1000}))
    with Stores(rules(hot=f"url = '{tmp_path / 'not' / 'yet'}'\ncapacity = '50%'")) as stores:
        assert stores.capacity("hot") == 500


def test_a_capacity_is_a_size_or_unlimited(rules):
    with Stores(rules(hot="url = '/x'\ncapacity = '2KB'", standard="url = 's3://b'")) as stores:
        assert (stores.capacity("hot"), stores.capacity("standard")) == (2000, None)
