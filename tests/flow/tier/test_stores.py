"""The stores of a rule file's tiers, and the state of a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.model import ObjectInfo
from tiercache.tier.rules import RuleFile, Tier, load_rule_file
from tiercache.tier.snapshot import ARCHIVED, READABLE, RESTORED, RESTORING
from tiercache.tier.stores import Stores, restored_until, state_of

GOES = 'ongoing-request="true"'
STAYS = 'ongoing-request="false", expiry-date="Fri, 21 Dec 2012 00:00:00 GMT"'


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


@given(st.text())
def test_any_restore_field_has_a_state(said):
    assert state_of(info_of("GLACIER", said), 0.0) in (ARCHIVED, RESTORING, RESTORED)


def test_an_invalid_expiry_is_unknown():
    assert restored_until(info_of("GLACIER", 'ongoing-request="false", expiry-date="soon"')) is None


# -- stores ---------------------------------------------------------------------------------------------------------


def test_a_storage_class_without_boto3_is_an_error_that_names_the_extra(rules, monkeypatch):
    monkeypatch.setattr("tiercache.tier.stores.has_boto3", lambda: False)
    file = rules(standard="url = 's3://b'", archive="url = 's3://c'\nstorage_class = 'GLACIER'")
    with Stores(file) as stores:
        assert stores.s3_classes("standard") is None
        with pytest.raises(ValueError, match=r"tiers.archive.storage_class.*tiercache-data\[archive\]"):
            stores.s3_classes("archive")


# -- places ---------------------------------------------------------------------------------------------------------


def two_tiers(first, second, **more):
    """A rule file of two tiers that no file would pass."""
    tiers = (Tier(name="hot", url=first), Tier(name="cold", url=second, **more))
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
